"""Compare the content of two checkpoints and, with probes, their knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from compressknow.api.keywords import RunKeywords, api_function, build_run_options, list_files
from compressknow.base.errors import UnusedOptions
from compressknow.base.progress import OnProgress, resolve_progress
from compressknow.evaluate import gather
from compressknow.evaluate.grades import PRODUCED, check_known
from compressknow.evaluate.records import ModelRecord
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import WORDS, Options
from compressknow.pages.card.gate import check_gates, hold_to_gates, parse_gates
from compressknow.pages.diff.make import CheckpointComparison, make_behaviour, make_comparison
from compressknow.pages.diff.pages import write_comparisons
from compressknow.pages.pages import check_outputs, require_for


@api_function
def compare(
    a: str | Path,
    b: str | Path,
    probe: str | Sequence[str] = (),
    *,
    output: str | Path | Sequence[str | Path] = (),
    options: Options | None = None,
    settings: Settings | None = None,
    known: str = "recognized",
    fail_under: float | str | Sequence[float | str] | None = None,
    strict: bool = False,
    no_facts: bool = False,
    answers: str | Path | None = None,
    overwrite: bool = False,
    runtime: str | None = None,
    revision: str | None = None,
    revision_b: str | None = None,
    threads: int | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
    **keywords: Unpack[RunKeywords],
) -> CheckpointComparison:
    """Compare two checkpoints of one architecture: settings, structure, every weight and, with probes, knowledge.

    Parameters
    ----------
    a, b : local folders or hub ids. int8 weights are compared by the values that they represent.
    probe : what to evaluate both on, such as ``["atlas"]``; nothing by default. See `compressknow.probe`.
    output : files to write: ``.html``, ``.md``, ``.json``.
    options, settings, keywords : see `compressknow.probe`.
    known : what counts as known; see `compressknow.report`.
    fail_under, strict : the share of a's knowledge that b must keep; see `compressknow.report`.
    no_facts : leave out the text of every fact.
    answers : folder of the answers; by default ``~/.cache/compressknow/answers``.
    overwrite : replace existing files of `output`, if compressknow wrote them and they are not in a checkpoint.
    runtime : what runs the models, if not the default.
    revision, revision_b : of a and of b, if they are hub ids.
    threads : tensors to compare at a time, by default one per core; the figures do not depend on it.
    command : the command line to show.
    on_progress : called with each `compressknow.Progress`, in bytes or in facts; ``"bar"`` shows bars.

    Returns
    -------
    All figures, such as ``difference.total.relative_error`` and ``behaviour.b_against_a.comparisons[0].kept``. If both
    have the same bytes, it is `identical`, and there is no `difference`.

    Raises
    ------
    compressknow.CompressknowError : a checkpoint is missing or damaged; their architectures differ; an output cannot
        be written.
    """
    check_known(known)
    gates = parse_gates(fail_under, strict=strict)
    options, settings = build_run_options({**keywords, **({"runtime": runtime} if runtime else {})}, options, settings)
    asked = {"fail_under": bool(gates), "strict": strict and bool(gates), "known": known == PRODUCED}
    of_facts = [name for name, given in asked.items() if given]
    of_facts += [WORDS.get(field, field) for field in options.list_changed()]
    default = Settings()
    of_facts += [
        name for name in ("device", "dtype", "batch_size") if getattr(settings, name) != getattr(default, name)
    ]
    of_facts += ["answers"] if answers is not None else []
    if of_facts and not probe:
        option = of_facts[0].replace("_", "-")
        raise UnusedOptions(f"--{option} needs a probe.", hint="Choose one with -p PROBE.", names=of_facts)
    check_gates(gates, strict=strict)
    files = list_files(output)
    require_for(files, *(("pyarrow", "scipy") if probe else ()))
    check_outputs(files, overwrite=overwrite)
    opened = gather.open_named(probe, options, known) if probe else []
    gated = [gate.of for gate in gates]
    gather.check_gated(opened, gated)
    listener = resolve_progress(on_progress)
    first, second = gather.find_both((a, revision), (b, revision_b), settings, listener)
    if opened:
        gather.check_comparable((first, second), opened)
    # It imports torch, which takes seconds; wrong arguments have been reported by now.
    from compressknow.comparison.checkpoints import diff_models, find_other_files

    difference, behaviour = None, None
    if first.sha256 != second.sha256:
        trusted = settings.trust_remote_code
        difference = diff_models(
            first.located, second.located, trust_remote_code=trusted, threads=threads, on_progress=listener
        )
    if opened:
        folder = Path(answers) if answers else gather.find_answers_folder()
        there, back = gather.evaluate_both(first, second, opened, folder, listener)
        gather.check_names(there[0].answers, gated)
        behaviour = make_behaviour(there, back, show_facts=not no_facts, known=known, gates=gates)
    for side in (first, second):
        side.check_unchanged()
    comparison = make_comparison(
        ModelRecord.from_dict({**first.describe(), "sha256": first.sha256}),
        ModelRecord.from_dict({**second.describe(), "sha256": second.sha256}),
        difference,
        behaviour,
        files=dict(find_other_files(first.located, second.located)),
        show_facts=not no_facts,
        command=command,
    )
    write_comparisons(comparison, files, overwrite=overwrite)
    if comparison.behaviour:
        hold_to_gates(comparison, comparison.behaviour.b_against_a)
    return comparison
