"""A calibration text in a file, so that all that is calibrated on it, now or later, reads the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.compress.calibrate.text import CalibrationText, sha256_of_batches
from compressknow.files import write_whole
from compressknow.reading import RECORD, misfit, read_json

if TYPE_CHECKING:
    from compressknow.compress.steps import Calibration

_FORM = {
    **{"kind": str, "source": str, "sha256": str, "seed": int, "tokens": int, "asked": int},
    **{"batches": [{str: [[int]]}], "texts": [str]},
}


def kept_text(folder: Path, calibration: Calibration, make: Callable[[], CalibrationText]) -> CalibrationText:
    """The text of a calibration as `folder` has it, or as `make` gives it, which is kept there then.

    What is damaged is made anew. Raises what `make` does, and OutputError where it cannot be written.
    """
    path = folder / f"{name_of(calibration)}.json"
    text = _read(path)
    if text is None:
        text = make()
        folder.mkdir(parents=True, exist_ok=True)
        said = asdict(text) | {"batches": [{n: ids.tolist() for n, ids in batch.items()} for batch in text.batches]}
        write_whole(path, json.dumps(said).encode())
    return text


def name_of(calibration: Calibration) -> str:
    """A file's name, of that calibration alone.

    >>> from compressknow.compress.recipe import Calibration
    >>> name_of(Calibration())
    'self-32768-0-b6ef'
    """
    import hashlib
    import re

    said = f"{calibration.text} {calibration.tokens} {calibration.seed}"
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", Path(calibration.text).name).strip("-.")[:100]
    digest = hashlib.sha256(said.encode()).hexdigest()[:4]
    return f"{readable}-{calibration.tokens}-{calibration.seed}-{digest}"


def _read(path: Path) -> CalibrationText | None:
    """None where there is none, or not the one that was written."""
    import torch

    try:
        said = read_json(path, RECORD)
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or misfit(said, _FORM):
        return None
    try:
        batches = tuple({name: torch.tensor(ids) for name, ids in batch.items()} for batch in said["batches"])
    except ValueError:
        return None
    if sha256_of_batches(batches) != said["sha256"]:
        return None
    return CalibrationText(**{**said, "batches": batches, "texts": tuple(said["texts"])})
