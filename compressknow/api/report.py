"""Report what compressed models kept and lost of the original's knowledge, as a report card."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

from compressknow.api.keywords import ServerKeywords, api_function, build_run_options, list_files, list_paths
from compressknow.base.errors import UsageError
from compressknow.base.format import parse_size
from compressknow.base.progress import OnProgress, resolve_progress
from compressknow.evaluate.gather import Evaluation, check_names, find_answers_folder, gather, list_names
from compressknow.evaluate.grades import check_known
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Options
from compressknow.model.checkpoint import check_revision, is_convertible
from compressknow.pages.card.gate import check_gates, hold_to_gates, parse_gates
from compressknow.pages.card.make import complete_warnings, make_card
from compressknow.pages.card.pages import write_reports
from compressknow.pages.pages import FORMATS, check_outputs, require_for
from compressknow.pages.records import Card


@api_function
def report(
    original: str | Path,
    compressed: str | Path | Sequence[str | Path],
    probe: str | Sequence[str] | None = None,
    *,
    output: str | Path | Sequence[str | Path] = (),
    options: Options | None = None,
    settings: Settings | None = None,
    known: str = "recognized",
    fail_under: float | str | Sequence[float | str] | None = None,
    strict: bool = False,
    early: bool = False,
    within: str | int | None = None,
    no_facts: bool = False,
    time: bool = False,
    into_model_card: bool = False,
    answers: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
    **keywords: Unpack[ServerKeywords],
) -> Card:
    """Evaluate the original and each compressed model on the same facts, and compare them.

    Parameters
    ----------
    original, compressed : local folders, ``FOLDER/FILE.gguf``, hub ids, addresses of servers, or `probe`'s folders.
    probe : names; see `compressknow.probe`.
    output : files to write: ``.html``, ``.md``, ``.json``; ``.xml`` is JUnit's form, and a file called ``summary.md``
        is a summary of about 20 lines, both for CI.
    options, settings, keywords : see `compressknow.probe`.
    known : what counts as known: ``recognized`` (picked among the candidates, or better) or only ``produced`` (said).
    fail_under : the share of knowledge that must be kept, 0 to 1, or ``"science=0.85"`` for a domain or relation, or
        several of these; after everything is written, an error says which gates are not met.
    strict : check the whole interval against it: too few facts to decide are an error too.
    early : evaluate facts in random order, only until it is clear whether the compressed model meets `fail_under`.
    within : the maximum size of the recommended model, such as ``"110MB"``; larger models get a warning.
    no_facts : leave out the text of every fact.
    time : measure each model's speed and memory on this machine.
    into_model_card : write the verdict into the README.md of each compressed folder.
    answers : folder of the answers; by default ``~/.cache/compressknow/answers``.
    overwrite : replace existing files of `output`, if compressknow wrote them and they are not in a checkpoint.
    command : the command line to show on the card.
    on_progress : called with each `compressknow.Progress`, in facts; ``"bar"`` shows bars.

    Returns
    -------
    The card, with all figures.

    Raises
    ------
    compressknow.GateNotMet, compressknow.GateUndecided : `fail_under` is not met, or, with `strict`, there are too
        few facts to decide; the error's `result` is the card.
    compressknow.CompressknowError : a model cannot be found, loaded or evaluated; two models cannot be compared;
        an output cannot be written.
    """
    check_known(known)
    check_revision(original, revision)
    gates = parse_gates(fail_under, strict=strict)
    if not (models := list_paths("compressed", compressed)):
        raise UsageError("There is no compressed model to compare.", hint="Give at least one after the original.")
    files = list_files(output)
    check_gates(gates, strict=strict, early=early, models=len(models))
    most = None if within is None else parse_size(within, "--within")
    require_for(files, "pyarrow", "scipy")
    check_outputs(files, overwrite=overwrite, formats=(*FORMATS, ".xml"))
    if not gates and (of_gates := next((file for file in files if file.suffix.lower() == ".xml"), None)):
        raise UsageError(f"{of_gates}: its test cases are gates.", hint="Add --fail-under SHARE, or leave out this -o.")
    if into_model_card:
        from compressknow.pages.model_card import check_model_cards, write_into_model_cards

        check_model_cards(models)
    evaluation = Evaluation(
        list_names(probe),
        *build_run_options(keywords, options, settings),
        keep_in=Path(answers) if answers else find_answers_folder(),
        timed=time,
        known=known,
        gated=[gate.of for gate in gates],
        revision=revision,
        on_progress=resolve_progress(on_progress),
    )
    if not early:
        before, after = gather(original, models, evaluation)
        stop = None
    else:
        from compressknow.comparison.power import decide_gate
        from compressknow.evaluate.early import gather_early

        at_gate = partial(decide_gate, gates[0].least)
        before, only, stop = gather_early(original, models[0], evaluation, at_gate)
        after = [only]
    # Facts of tasks and of stored answers are only known now.
    check_names(before.answers, evaluation.gated)
    path = str(original) if is_convertible(original) else None
    card = make_card(
        before,
        after,
        show_facts=not no_facts,
        known=known,
        command=command,
        early=stop,
        path=path,
        gates=gates,
        within=most,
    )
    write_reports(card, files, overwrite=overwrite)
    if into_model_card:
        write_into_model_cards(complete_warnings(card), models)
    hold_to_gates(card, card)
    return card
