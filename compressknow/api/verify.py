"""Verify a converted checkpoint against its manifest, or a GGUF file against its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.api.keywords import api_function
from compressknow.base.errors import CheckpointError, VerificationError
from compressknow.base.packages import require
from compressknow.base.progress import Listener, OnProgress, Stage, report_progress, resolve_progress
from compressknow.gguf.record import compare_to_record
from compressknow.model.manifest import check_converted

if TYPE_CHECKING:
    from compressknow.compress.verify import Verification


@api_function
def verify(
    folder: str | Path, *, threads: int | None = None, on_progress: OnProgress | None = None, check: bool = True
) -> Verification:
    """Recount and rehash a converted checkpoint against its manifest, or a GGUF file against the record next to it.

    Parameters
    ----------
    folder : what `convert` wrote, or the file that `export` wrote.
    threads : tensors to check at a time, by default one per core.
    on_progress : called with each `compressknow.Progress`, in bytes; ``"bar"`` shows a bar.
    check : False returns the differences in the result instead of raising an error.

    Returns
    -------
    The numbers of tensors, files and bytes that were compared, and the differences.

    Raises
    ------
    compressknow.CheckpointError : the folder has no manifest, or one that this version cannot read.
    compressknow.VerificationError : the folder differs from its manifest.
    """
    path, listener = Path(folder), resolve_progress(on_progress)
    if path.suffix == ".gguf":
        return _verify_gguf(path, listener, check)

    # Before torch is imported, which takes a second.
    check_converted(path)
    from compressknow.compress.verify import compare_to_manifest, raise_if_different

    with report_progress(listener, Stage("verify", str(folder))) as advance:
        result = compare_to_manifest(folder, threads=threads, advance=advance)
    if check:
        raise_if_different(folder, result)
    return result


def _verify_gguf(path: Path, listener: Listener | None, check: bool) -> Verification:
    if not path.is_file():
        what = f"{path} is not a regular file." if path.exists() else f"{path}: no such file."
        raise CheckpointError(what, hint="Give a file that `compressknow export` wrote.")
    require("gguf")
    with report_progress(listener, Stage("verify", str(path))) as advance:
        result = compare_to_record(path, advance=advance)
    if check and result.differences:
        raise VerificationError(
            f"{path} differs from its record.",
            why="\n".join(map(str, result.differences)),
            hint="Copy or download it and its record again, or export the model again.",
        )
    return result
