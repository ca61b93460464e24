"""Evaluate a model on facts, and store its answers in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from compressknow.api.keywords import ServerKeywords, api_function, build_run_options
from compressknow.base.errors import UsageError
from compressknow.base.packages import require
from compressknow.base.progress import OnProgress, resolve_progress
from compressknow.engine.identity import locate
from compressknow.evaluate.answers import Answers, read_answers
from compressknow.evaluate.distributions import Context
from compressknow.evaluate.gather import open_named
from compressknow.evaluate.handle import make_handles
from compressknow.evaluate.noise import NoiseFloors
from compressknow.evaluate.run import probe_model
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Options, find_source


@api_function
def probe(
    model: str | Path,
    output: str | Path,
    probe: str | Sequence[str] | None = None,
    *,
    reference: str | Path | None = None,
    overwrite: bool = False,
    options: Options | None = None,
    settings: Settings | None = None,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
    **keywords: Unpack[ServerKeywords],
) -> Answers:
    """Evaluate a model on facts, and store its answers in a folder.

    Parameters
    ----------
    model : a local folder, ``FOLDER/FILE.gguf``, a hub id, or the address of a server, ``http://HOST:PORT``.
    output : the folder for the answers; answers of this model that are already in it are reused.
    probe : names, such as ``atlas`` (the default), ``lama:trex``, ``bear``, ``facts:mine.jsonl``, ``lm-eval:boolq``.
    reference : answers folder of the original model, to measure the divergence of distributions on its likely tokens.
    overwrite : replace answers in `output` to the same probe that are to other facts, or were made with other settings.
    keywords : folder of the data, protocol, sample (``limit=300``), device, dtype, batch size: as on the command line.
        See `compressknow.Options` and `compressknow.Settings`; their `columns` is ``map`` here, `model` ``model_name``.
    options, settings : records with several of these; keywords take precedence.
    on_progress : called with each `compressknow.Progress`, in facts; ``"bar"`` shows bars.

    Returns
    -------
    The answers and their record (the content of ``answers.parquet`` and ``probe.json``).

    Raises
    ------
    compressknow.CompressknowError : the model has no head or no tokenizer, a probe is unknown or leaves no
        facts, the folder contains something else, or other answers to the same probe.
    """
    require("pyarrow")

    if not probe and find_source(str(output)) and not Path(output).exists():
        raise UsageError(
            f"{output} is the name of a probe, not of a folder for the answers.",
            hint=f"Give the folder before the probe, or write ./{output} for a folder of that name.",
        )
    options, settings = build_run_options(keywords, options, settings)
    opened = open_named(probe, options)
    original = read_answers(Path(reference)) if reference is not None else None
    (handle,) = make_handles([locate(model, revision)], settings, opened)
    listener = resolve_progress(on_progress)
    answers = probe_model(handle, opened, Path(output), Context(original), on_progress=listener, overwrite=overwrite)
    return answers if original else NoiseFloors(handle, Path(output), listener).add_precision(opened, answers)
