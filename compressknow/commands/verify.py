"""verify: a converted checkpoint against its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressknow.compress.verify import Verification


def verify(folder: str | Path) -> Verification:
    """Recount and rehash a converted checkpoint against its manifest.

    Returns
    -------
    What was compared: numbers of tensors, files and bytes.

    Raises
    ------
    compressknow.errors.VerificationError : the weights differ from what the manifest says.
    """
    from compressknow.compress.verify import verify as verify_checkpoint

    return verify_checkpoint(folder)
