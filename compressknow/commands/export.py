"""export: a checkpoint as a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressknow.export.record import ExportRecord
    from compressknow.quiet import OnProgress


def export(
    model: str | Path,
    output: str | Path,
    *,
    type: str = "q8_0",
    type_of: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    converter: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> ExportRecord:
    """Write a checkpoint, original or converted, as a GGUF file for llama.cpp, Ollama or LM Studio.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : the ``.gguf`` file to write; it appears only when it is whole, and ``output.json`` beside it.
    type : of most weights: ``q8_0``, ``q6_k``, ``q5_k_m``, ``q4_k_m``, ``f16`` and whatever else llama.cpp has.
    type_of : types of some tensors, by a scope (``attention``) or a regular expression on the names that they have in
        the file; of several that name a tensor the last holds.
    converter : where llama.cpp's ``convert_hf_to_gguf.py`` lies; see `docs/gguf.md` for where it is looked for.
    overwrite : replace `output` where export wrote it, once the new one is whole.
    dry_run : write nothing that stays; return what the record would hold, but for the hash.
    threads : of quantization, by default one a core.
    on_progress : called with each `compressknow.Progress`; ``"bar"`` shows bars.

    Returns
    -------
    What ``output.json`` says: setup, source, versions, types and bytes by group of layers, hash.

    Raises
    ------
    compressknow.errors.CompressknowError : with what is wrong, why, and what to try.
    """
    from compressknow.export.converter import find_converter
    from compressknow.libraries import require

    place = Path(output)
    # Said before torch is imported, which takes seconds.
    require("llama_cpp_py_sync", "gguf")
    _refuse_before_work(model, place, overwrite=overwrite, writes=not dry_run)
    found = find_converter(converter)
    from compressknow.export.choice import Choice
    from compressknow.quiet import Stage, begun, listener

    rules = type_of.items() if isinstance(type_of, Mapping) else type_of
    choice = Choice(type, tuple((which, chosen) for which, chosen in rules))
    from compressknow.export.export import prepare, preview, write

    listening = listener(on_progress)
    job = prepare(model, choice, found, revision=revision, trust_remote_code=trust_remote_code)

    def begin(work):  # type: ignore[no-untyped-def]
        return begun(listening, Stage(work, str(model)))

    if dry_run:
        return preview(job, place, threads=threads, begin=begin)
    return write(job, place, overwrite=overwrite, threads=threads, begin=begin)


def _refuse_before_work(model: str | Path, output: Path, *, overwrite: bool, writes: bool) -> None:
    """What is wrong with the two places; what a dead run has left goes, whatever becomes of this one."""
    from compressknow.compress.staging import clean
    from compressknow.export.place import refuse_file
    from compressknow.model.checkpoint import refuse_no_checkpoint

    refuse_no_checkpoint(model)
    if writes:
        clean(output)
    refuse_file(output, overwrite=overwrite, source=Path(model))
