"""sensitivity: where a model's knowledge sits, weight by weight and type by type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from compressknow.commands.words import SeededWords, files_of, records_of, speaks_python

if TYPE_CHECKING:
    from compressknow.compress.calibrate.text import CalibrationText
    from compressknow.evaluate.handle import ModelHandle, Settings
    from compressknow.evaluate.sources import Options
    from compressknow.quiet import Listener, OnProgress
    from compressknow.study.sensitivity import Guide, Sensitivity

# Of four facts that are evaluated, a small model may know two: so many that there are enough.
ASKED = 2


@speaks_python()
def sensitivity(
    model: str | Path,
    output: str | Path | Sequence[str | Path] = (),
    *,
    to: Literal["gguf", "checkpoint"] = "gguf",
    guide: Guide = "both",
    facts: int = 200,
    probe: str | Sequence[str] | None = None,
    calibration: str = "self",
    options: Options | None = None,
    settings: Settings | None = None,
    answers: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    on_progress: OnProgress | None = None,
    **words: Unpack[SeededWords],
) -> Sensitivity:
    """Measure what rounding each weight of a model alone, to each type, does to facts that it knows and to text.

    It is an estimate to first order, from one pass forward and one back with one block in memory; it is stored, and
    costs nothing when it is asked for again.

    Parameters
    ----------
    model : a local folder or hub id of a checkpoint of floats.
    output : files to write: ``.csv``, ``.json``.
    to : what types are meant: those of a ``gguf`` file, or the schemes of a ``checkpoint``.
    guide : ``facts``, ``text`` or ``both``.
    facts : how many facts that the model knows guide, evenly over relations.
    probe, options, settings, words : where facts come from, and how the model is run; see `compressknow.probe`.
    calibration : the text: ``self`` (the model's own samples), ``FILE.txt``, ``FILE.jsonl`` or ``hf:DATASET``.
    answers : folder of the answers; by default ``~/.cache/compressknow/answers``.
    overwrite : replace files of `output` that are there already.
    on_progress : called with each `compressknow.Progress`; ``"bar"`` shows bars.

    Returns
    -------
    The predicted KL divergence by weight and type.

    Raises
    ------
    compressknow.errors.CompressknowError : the model cannot be evaluated, or knows too few of the facts; an output that
        cannot be written.
    """
    from compressknow.libraries import require
    from compressknow.pages.pages import check_outputs
    from compressknow.study.map import FORMATS, write_map
    from compressknow.study.sensitivity import check_guide

    require("pyarrow", *(("llama_cpp_py_sync", "gguf") if to == "gguf" else ()))
    check_guide(guide)
    files = files_of(output)
    check_outputs(files, overwrite=overwrite, formats=FORMATS)
    from compressknow.engine.identity import locate
    from compressknow.errors import UsageError
    from compressknow.evaluate.facts import Probe
    from compressknow.evaluate.gather import default_answers_folder, open_named
    from compressknow.evaluate.handle import Beside, ModelHandle
    from compressknow.evaluate.run import probe_model
    from compressknow.quiet import Stage, begun, listener
    from compressknow.study.guide import FEWEST, known_facts, sensitivity_of
    from compressknow.study.roundings import GgufRoundings, SchemeRoundings

    options, settings = records_of(words, options, settings)
    options = options if options.limit else replace(options, limit=ASKED * facts)
    listening = listener(on_progress)
    handle = ModelHandle(locate(model, revision), settings)
    opened = open_named(probe, options) if guide != "text" else []
    probes = [each for each in opened if isinstance(each, Probe)]
    known, given = {}, None
    if opened:
        folder = (Path(answers) if answers else default_answers_folder()) / handle.sha256[:16]
        given = probe_model(handle, opened, folder, Beside(), on_progress=listening, wait=True)
        known = known_facts(given, probes, facts)
        handle.release()
        if (count := sum(map(len, known.values()))) < FEWEST:
            raise UsageError(
                f"{handle.located.name} knows {count} of these facts, and {FEWEST} are needed to guide.",
                hint="Give another probe with -p, or pass --guide text.",
            )
    text = _text(handle, calibration, options.seed, listening) if guide != "facts" else None
    with begun(listening, Stage("sensitivity", handle.located.name)) as advance:
        found = sensitivity_of(
            handle.located.path,
            handle.sha256,
            GgufRoundings() if to == "gguf" else SchemeRoundings(),
            answers=given,
            probes=probes,
            facts=known,
            text=text,
            trust_remote_code=settings.trust_remote_code,
            advance=advance,
        )
    write_map(found, files, overwrite=overwrite)
    return found


def _text(handle: ModelHandle, calibration: str, seed: int, on_progress: Listener | None) -> CalibrationText:
    """The text that guides."""
    from compressknow.compress.calibrate.text import calibration_text
    from compressknow.model.loading import open_complete
    from compressknow.quiet import Stage, begun
    from compressknow.study.guide import TOKENS

    folder, trusted = handle.located.path, handle.settings.trust_remote_code
    _, tree = open_complete(folder, trust_remote_code=trusted)
    with begun(on_progress, Stage("sample" if calibration == "self" else "text", handle.located.name)) as advance:
        return calibration_text(
            folder, tree, text=calibration, tokens=TOKENS, seed=seed, trust_remote_code=trusted, advance=advance
        )
