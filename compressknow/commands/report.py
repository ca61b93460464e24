"""report: what compressed models kept and lost of the original's knowledge, as a report card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressknow.probe.handle import Settings
    from compressknow.probe.sources import Options
    from compressknow.quiet import OnProgress
    from compressknow.report.records import Card


def report(
    original: str | Path,
    compressed: str | Path | Sequence[str | Path],
    probes: str | Sequence[str] | None = None,
    *,
    outputs: Sequence[str | Path] = (),
    options: Options | None = None,
    settings: Settings | None = None,
    known: str = "recognized",
    no_facts: bool = False,
    timed: bool = False,
    early: float | None = None,
    into_model_card: bool = False,
    keep_in: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
) -> Card:
    """Evaluate the original and each compressed model on the same facts, and compare them.

    Parameters
    ----------
    original, compressed : local folders, ``FOLDER/FILE.gguf``, hub ids, addresses of servers, or answers folders that
        `probe` wrote.
    probes : names; see `compressknow.probe`.
    outputs : files to write: ``.html``, ``.md``, ``.json``.
    options, settings : see `compressknow.probe`.
    known : what counts as known: ``recognized`` (picked among the candidates, or better) or only ``produced`` (said).
    no_facts : leave the text of every fact out.
    timed : measure each model's speed and memory on this machine.
    early : a least share of knowledge to be kept, 0 to 1: facts are evaluated in random order, only until it is known
        whether it is; for one compressed model.
    into_model_card : write the verdict into the README.md of each compressed folder.
    keep_in : folder of the answers; by default ``~/.cache/compressknow/answers``.
    overwrite : replace `outputs` that are there already, if they are pages of compressknow outside a checkpoint.
    command : the command line to show on the card.
    on_progress : called with each `compressknow.Progress`, in facts; ``"bar"`` shows bars.

    Returns
    -------
    The card, with all figures.

    Raises
    ------
    compressknow.errors.CompressknowError : a model cannot be found, loaded or evaluated; two that cannot be compared;
        an output that cannot be written.
    """
    from compressknow.probe.gather import Evaluation, default_answers_folder, gather, names_of
    from compressknow.probe.grades import check_known
    from compressknow.probe.handle import Settings
    from compressknow.probe.sources import Options
    from compressknow.quiet import listener
    from compressknow.report.card.make import check_early, make_card
    from compressknow.report.card.pages import write_reports
    from compressknow.report.model_card import check_model_cards, write_into_model_cards
    from compressknow.report.pages import check_outputs, require_for

    check_known(known)
    models = [compressed] if isinstance(compressed, str | Path) else list(compressed)
    files = [Path(path) for path in outputs]
    check_early(early, len(models))
    require_for(files, "pyarrow", "scipy")
    check_outputs(files, overwrite=overwrite)
    if into_model_card:
        check_model_cards(models)
    evaluation = Evaluation(
        names_of(probes),
        options or Options(),
        settings or Settings(),
        keep_in=Path(keep_in) if keep_in else default_answers_folder(),
        timed=timed,
        known=known,
    )
    listening = listener(on_progress)
    if early is None:
        before, after = gather(original, models, evaluation, revision=revision, on_progress=listening)
        stop = None
    else:
        from compressknow.probe.early import gather_early
        from compressknow.stats.sequential import decider

        before, only, stop = gather_early(
            original, models[0], evaluation, decider(early), revision=revision, on_progress=listening
        )
        after = [only]
    card = make_card(before, after, show_facts=not no_facts, known=known, command=command, early=stop)
    write_reports(card, files, overwrite=overwrite)
    if into_model_card:
        write_into_model_cards(card, models)
    return card
