"""Measure how sensitive a model's knowledge is to each weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compressknow.api.keywords import api_function, list_files
from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.base.packages import require
from compressknow.base.progress import OnProgress, resolve_progress
from compressknow.compress.calibrate.text import check_text
from compressknow.compress.steps import Calibration
from compressknow.engine.identity import LocatedModel, locate
from compressknow.engine.language_model import find_family
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from compressknow.model.checkpoint import check_is_checkpoint
from compressknow.pages.pages import check_outputs, require_for
from compressknow.study.map import FORMATS, Map, write_map
from compressknow.study.sensitivity import FIT_TOKENS, Guide, Sensitivity, check_guide, open_facts

if TYPE_CHECKING:
    from compressknow.study.measuring import Roundings


Form = Literal["gguf", "checkpoint"]


@api_function
def sensitivity(
    model: str | Path,
    output: str | Path | Sequence[str | Path] = (),
    *,
    to: Form | None = None,
    guide: Guide = "both",
    facts: str | Sequence[str] | None = None,
    data: str | Path | None = None,
    calibration: str = "self",
    calibration_tokens: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Sensitivity:
    """Estimate how rounding each weight of a checkpoint, to each type, affects facts that the model knows, and text.

    Parameters
    ----------
    model : a local folder or a hub id of an unquantized checkpoint.
    output : files to write: a page (``.html``, ``.md``), all figures (``.json``), a row per weight and type (``.csv``).
    to : the types: of a ``gguf`` file, the default for causal models, or the schemes of a ``checkpoint``.
    guide : what weights are ranked by: ``facts``, ``text`` or ``both``.
    facts : probes, by default ``atlas``; about 200 facts that the model knows are used. `data` has LAMA and BEAR.
    calibration : the text: ``self`` (the model's own samples), the path of a ``.txt`` or ``.jsonl`` file, or
        ``hf:DATASET``; `calibration_tokens` of it, 8,192 by default. `seed` seeds the samples and the masking.
    revision : branch, tag or commit of a hub id.
    trust_remote_code : run the Python code that the checkpoint contains.
    overwrite : replace existing files of `output`, if compressknow wrote them.
    on_progress : called with each `compressknow.Progress`, or ``"bar"``.

    Returns
    -------
    A row per weight, each with its KL and its facts at risk by type. They are stored, so a second call is fast.

    Raises
    ------
    compressknow.CompressknowError : the checkpoint is missing, damaged or quantized already; it knows fewer than
        30 of the facts; an output cannot be written.
    """
    if to not in ("gguf", "checkpoint", None):
        raise UsageError(f"--to {to}: choose gguf or checkpoint.")
    check_guide(guide)
    text = Calibration(calibration, FIT_TOKENS if calibration_tokens is None else calibration_tokens, seed)
    check_text(text)
    files = list_files(output)
    require_for(files, *(["llama_cpp_py_sync"] if to == "gguf" else []), "pyarrow")
    check_outputs(files, overwrite=overwrite, formats=FORMATS)
    probes = open_facts(facts or None, data)
    check_is_checkpoint(model)
    handle = ModelHandle(locate(model, revision), Settings(trust_remote_code=trust_remote_code))
    from compressknow.study.guides import measure_guides

    roundings = _open_roundings(handle.located, to, guide, text, trusted=trust_remote_code)
    result, *_ = measure_guides(handle, probes, text, guide, roundings, resolve_progress(on_progress))
    if files:
        write_map(Map(handle.located.name, result, guide), files, overwrite=overwrite)
    return result


def _open_roundings(
    model: LocatedModel, to: Form | None, guide: Guide, text: Calibration, *, trusted: bool
) -> Roundings:
    """Return the candidate types. Raises CompressknowError for a model that has none, or is quantized already."""
    from compressknow.compress.convert import VariantMaker
    from compressknow.compress.sources import Sources
    from compressknow.study.formats import CHECKPOINT, CheckpointFormat, SearchRequest
    from compressknow.study.measuring import GgufRoundings, SchemeRoundings

    maker = VariantMaker(model.path, trust_remote_code=trusted)
    # It raises an error for quantized weights.
    sources = Sources(maker.checkpoint, maker.tree, maker.structure())
    family = find_family(maker.tree)
    if to == "gguf" and family != "causal":
        raise UnsupportedError(
            f"{model.name} is not a causal language model: there is no GGUF file of it.", hint="Give --to checkpoint."
        )
    if family != "causal" or to == "checkpoint":
        try:
            return CheckpointFormat(maker, SearchRequest(None, 1, CHECKPOINT, guide, (), "nearest", text)).roundings
        except UnsupportedError:
            # transformers does not load these weights quantized (GPT-2's), but they matter to what the model knows.
            linears = maker.structure().linears
            return SchemeRoundings(stored.dtype for weight in linears for stored in sources.of(weight))
    require("llama_cpp_py_sync")
    return GgufRoundings()
