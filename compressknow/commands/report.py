"""report: what compressed models kept and lost of the original's knowledge, as a report card."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from compressknow.commands.words import ServingWords, files_of, records_of, speaks_python

if TYPE_CHECKING:
    from compressknow.evaluate.handle import Settings
    from compressknow.evaluate.sources import Options
    from compressknow.pages.records import Card
    from compressknow.quiet import OnProgress


@speaks_python(probes="probe", outputs="output", timed="time", keep_in="answers")
def report(
    original: str | Path,
    compressed: str | Path | Sequence[str | Path],
    probe: str | Sequence[str] | None = None,
    *,
    output: str | Path | Sequence[str | Path] = (),
    options: Options | None = None,
    settings: Settings | None = None,
    known: str = "recognized",
    fail_under: float | None = None,
    strict: bool = False,
    early: bool | float = False,
    no_facts: bool = False,
    time: bool = False,
    into_model_card: bool = False,
    answers: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
    **words: Unpack[ServingWords],
) -> Card:
    """Evaluate the original and each compressed model on the same facts, and compare them.

    Parameters
    ----------
    original, compressed : local folders, ``FOLDER/FILE.gguf``, hub ids, addresses of servers, or answers folders that
        `probe` wrote.
    probe : names; see `compressknow.probe`.
    output : files to write: ``.html``, ``.md``, ``.json``.
    options, settings, words : see `compressknow.probe`.
    known : what counts as known: ``recognized`` (picked among the candidates, or better) or only ``produced`` (said).
    fail_under : a least share of knowledge to be kept, 0 to 1; once all is written, an error says where less is.
    strict : hold the intervals to it: too few facts to tell are an error too.
    early : evaluate facts in random order, only until it is known whether `fail_under` is met, of one compressed model.
    no_facts : leave the text of every fact out.
    time : measure each model's speed and memory on this machine.
    into_model_card : write the verdict into the README.md of each compressed folder.
    answers : folder of the answers; by default ``~/.cache/compressknow/answers``.
    overwrite : replace files of `output` that are there already, if they are pages of compressknow outside a
        checkpoint.
    command : the command line to show on the card.
    on_progress : called with each `compressknow.Progress`, in facts; ``"bar"`` shows bars.

    Returns
    -------
    The card, with all figures.

    Raises
    ------
    compressknow.errors.GateNotMet, compressknow.errors.GateUndecided : `fail_under` is not met, or, with `strict`, too
        few facts tell; the error's `result` is the card.
    compressknow.errors.CompressknowError : a model cannot be found, loaded or evaluated; two that cannot be compared;
        an output that cannot be written.
    """
    from compressknow.evaluate.gather import Evaluation, default_answers_folder, gather, names_of
    from compressknow.evaluate.grades import check_known
    from compressknow.model.checkpoint import can_be_converted
    from compressknow.pages.card.make import check_early, check_gate, hold_to_gate, make_card
    from compressknow.pages.card.pages import write_reports
    from compressknow.pages.model_card import check_model_cards, write_into_model_cards
    from compressknow.pages.pages import check_outputs, require_for
    from compressknow.quiet import listener

    gate = fail_under
    if not isinstance(early, bool) and early is not None:
        warnings.warn("Write fail_under=SHARE, early=True in place of early=SHARE.", DeprecationWarning, stacklevel=3)
        # It raised nothing.
        fail_under, early, gate = early, True, None
    check_known(known)
    check_gate(fail_under, strict=strict, early=bool(early))
    models = [compressed] if isinstance(compressed, str | Path) else list(compressed)
    files = files_of(output)
    check_early(fail_under if early else None, len(models), strict=strict)
    require_for(files, "pyarrow", "scipy")
    check_outputs(files, overwrite=overwrite)
    if into_model_card:
        check_model_cards(models)
    evaluation = Evaluation(
        names_of(probe),
        *records_of(words, options, settings),
        keep_in=Path(answers) if answers else default_answers_folder(),
        timed=time,
        known=known,
    )
    listening = listener(on_progress)
    if not early or fail_under is None:
        before, after = gather(original, models, evaluation, revision=revision, on_progress=listening)
        stop = None
    else:
        from compressknow.evaluate.early import gather_early
        from compressknow.stats.sequential import decider

        before, only, stop = gather_early(
            original, models[0], evaluation, decider(fail_under), revision=revision, on_progress=listening
        )
        after = [only]
    path = str(original) if can_be_converted(original) else None
    card = make_card(before, after, show_facts=not no_facts, known=known, command=command, early=stop, path=path)
    write_reports(card, files, overwrite=overwrite)
    if into_model_card:
        write_into_model_cards(card, models)
    hold_to_gate(card, card, gate, strict=strict)
    return card
