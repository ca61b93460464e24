"""probe: a model evaluated on facts, its answers kept in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressknow.probe.answers import Answers
    from compressknow.probe.handle import Settings
    from compressknow.probe.sources import Options
    from compressknow.quiet import OnProgress


def probe(
    model: str | Path,
    folder: str | Path,
    probes: str | Sequence[str] | None = None,
    *,
    reference: str | Path | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
) -> Answers:
    """Evaluate a model on facts, and keep its answers in a folder.

    Parameters
    ----------
    model : a local folder, ``FOLDER/FILE.gguf``, a hub id, or the address of a server, ``http://HOST:PORT``.
    folder : where the answers are kept; what it holds of this model already is not evaluated again.
    probes : names, such as ``atlas`` (the default), ``lama:trex``, ``bear``, ``facts:mine.jsonl``, ``lm-eval:boolq``.
    reference : answers folder of the original model: its most likely tokens are scored, so that the distance of the
        two distributions can be told.
    options : where data lies, protocol, sample; see `compressknow.probe.sources.Options`.
    settings : device, dtype, batch size; see `compressknow.probe.handle.Settings`.
    on_progress : called with each `compressknow.Progress`, in facts; ``"bar"`` shows bars.

    Returns
    -------
    The answers and their record (the content of ``answers.parquet`` and ``probe.json``).

    Raises
    ------
    compressknow.errors.CompressknowError : the model has no head or no tokenizer, a probe is unknown or leaves no
        facts, the folder holds something else.
    """
    from compressknow.libraries import require

    require("pyarrow")
    from compressknow.engine.identity import locate
    from compressknow.probe.gather import open_named, read_reference
    from compressknow.probe.handle import Beside, ModelHandle, Settings
    from compressknow.probe.noise import with_noise_floor
    from compressknow.probe.run import probe_model
    from compressknow.quiet import listener

    opened = open_named(probes, options)
    original = read_reference(reference) if reference is not None else None
    handle = ModelHandle(locate(model, revision), settings or Settings())
    listening = listener(on_progress)
    answers = probe_model(handle, opened, Path(folder), Beside(original), on_progress=listening)
    return answers if original else with_noise_floor(handle, opened, answers, Path(folder), listening)
