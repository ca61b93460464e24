"""What a search leaves in its folder: the page, and of a winner its recipe, its checkpoint and its report card."""

from __future__ import annotations

from pathlib import Path

from compressknow.compress.recipe import Recipe, to_toml
from compressknow.compress.staging import discard
from compressknow.files import write_whole
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.report.card.make import make_card
from compressknow.report.search import Search, Trial
from compressknow.study.split import EvaluationSet, cell_of

SEARCHED, HELD_OUT, WINNER = "searched", "held-out", "winner"
RECIPE, REPORTS, PAGES = "recipe.toml", ("report.html", "report.md"), ("search.html", "search.json")
WRITTEN = (*PAGES, RECIPE, *REPORTS)


def write_found(found: Search, held_out: EvaluationSet, folder: Path, *, show_facts: bool) -> None:
    """Write all of it, in the place of what an earlier search of this folder has found."""
    from compressknow.report.search import write_search

    _remove_earlier(folder, but_winner=found.winner is not None)
    if found.winner:
        _write_winner(found.winner, held_out, folder, show_facts=show_facts, command=found.command)
    write_search(found, folder)


def _remove_earlier(folder: Path, *, but_winner: bool) -> None:
    """What an earlier search of this folder, for another share or size, has found; a new winner replaces an old one."""
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    if not but_winner and _is_earlier_winner(folder / WINNER):
        discard(folder / WINNER)


def _is_earlier_winner(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def _write_winner(
    winner: Trial, held_out: EvaluationSet, folder: Path, *, show_facts: bool, command: str | None
) -> None:
    """The converted winner, its recipe, and its report card over the held-out facts."""
    from compressknow.compress.convert import convert
    from compressknow.report.card.pages import write_reports
    from compressknow.report.model_card import model_card_for

    recipe, source = Recipe.from_dict(dict(winner.recipe)), held_out.study_model.maker.checkpoint.folder
    replaces = _is_earlier_winner(folder / WINNER)
    convert(source, folder / WINNER, recipe, overwrite=replaces, render_card=model_card_for)
    write_whole(folder / RECIPE, (to_toml(recipe.to_dict()) + "\n").encode())
    ((_, answers),) = held_out.evaluate([cell_of(recipe)])
    card = make_card(held_out.original, [answers], show_facts=show_facts, command=command)
    write_reports(card, [folder / name for name in REPORTS], overwrite=True)
