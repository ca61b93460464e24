"""search: the smallest checkpoint that keeps a share of the knowledge, judged on facts that the search did not see.

It leaves in its folder the page, and of a winner its recipe, its checkpoint and its report card.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from compressknow.commands.words import Words, cluster_of, records_of, speaks_python
from compressknow.compress.calibrate.text import check_text
from compressknow.compress.recipe import Recipe, to_toml
from compressknow.compress.staging import discard
from compressknow.compress.steps import Calibration
from compressknow.errors import OutputError
from compressknow.evaluate.gather import open_named, refuse_texts_alone
from compressknow.evaluate.grades import RECOGNIZED, check_known
from compressknow.evaluate.handle import Settings
from compressknow.evaluate.text.running import RunningText
from compressknow.files import write_whole
from compressknow.libraries import require
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.pages.card.make import make_card
from compressknow.pages.search import Search, Trial, write_search
from compressknow.quiet import OnProgress, listener
from compressknow.study.cells import StudyModel, write_checkpoint
from compressknow.study.folder import ORIGINAL, TEXTS, claim, refuse_foreign
from compressknow.study.running import RayOptions, runner
from compressknow.study.search import (
    TOGETHER,
    Criterion,
    RecipeSearch,
    confirming,
    evaluating,
    search_of,
    sizes_of_original,
)
from compressknow.study.space import Space, Ways
from compressknow.study.split import EvaluationSet, cell_of, parts_of

if TYPE_CHECKING:
    from compressknow.evaluate.sources import Options
    from compressknow.model.structure import ModuleMap


TRIALS = 40
SEARCHED, HELD_OUT, GRADING, WINNER = "searched", "held-out", "grading", "winner"
RECIPE, REPORTS, PAGES = "recipe.toml", ("report.html", "report.md"), ("search.html", "search.json")
WRITTEN = (*PAGES, RECIPE, *REPORTS)


@speaks_python(probes="probe", schemes="quantize", prune_methods="prune_method", roundings="rounding")
def search(
    model: str | Path,
    output: str | Path,
    *,
    keep: float,
    minimize: str = "bytes",
    trials: int = TRIALS,
    quantize: str | Sequence[str] = ("int8", "int8-weights"),
    prune_method: str | Sequence[str] = Ways.methods,
    rounding: str | Sequence[str] = Ways.roundings,
    calibration: str | None = None,
    calibration_tokens: int | None = None,
    module_map: ModuleMap = "structural",
    probe: str | Sequence[str] | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    known: str = RECOGNIZED,
    seed: int = 0,
    no_facts: bool = False,
    ray: RayOptions | str | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    revision: str | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
    on_result: Callable[[Trial], object] | None = None,
    **words: Unpack[Words],
) -> Search:
    """Find the cheapest checkpoint of a model that keeps a share of its knowledge.

    A third of the facts guides the search; the winner is selected by another, by the lower end of its interval, and
    graded by the last: the share that is told is of facts that chose nothing. A search that was stopped resumes, and
    ends as it would have. Needs Optuna.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : folder of the search; one of this model and version is resumed.
    keep : share of knowledge, between 0 and 1.
    minimize : ``bytes`` (on disk, where pruned weights are dense), ``sparse-bytes`` (non-zero weights at their width
        and one bit a weight) or ``nonzero`` (weights left). Ties go to the recipe that keeps more.
    trials : recipes that the optimiser chooses, beside the paper's setups.
    quantize, prune_method, rounding : schemes, methods and roundings that it may choose from.
    calibration, calibration_tokens : the text for those that look at activations; see `compressknow.convert`.
    probe, options, settings, words : see `compressknow.probe`; lm-eval's tasks cannot be held out. A running text
        beside the facts guides nothing: the winner reads it, and its report card says how.
    known : what counts as known, in all that is kept; see `compressknow.report`.
    seed : of the split, of the optimiser and of the sample.
    no_facts : leave the text of every fact out of the winner's report card.
    ray, num_cpus, num_gpus : run on a Ray cluster: its address, or a `compressknow.RayOptions`.
    on_progress : called with each `compressknow.Progress`, in facts; ``"bar"`` shows bars.
    on_result : called with the trial of each recipe as it comes.

    Returns
    -------
    The search, as ``search.html`` and ``search.json`` in `output` show it; `winner` is None where nothing keeps as
    much. With a winner there are ``recipe.toml``, the converted ``winner/``, and its ``report.html`` too.

    Raises
    ------
    compressknow.errors.CompressknowError : the model or a probe cannot be found or evaluated, Optuna is missing, or
        `output` holds something else.
    """
    seeded = {**words, "seed": seed} if options is None else words
    options, settings = records_of(seeded, options, settings)
    cluster = cluster_of(ray, num_cpus, num_gpus)
    require("matplotlib", "optuna", "pyarrow", "scipy", *(["ray"] if cluster else []))
    check_known(known)
    criterion, folder, listening = Criterion(keep, minimize), Path(output), listener(on_progress)
    usual = Calibration()
    text = Calibration(calibration or usual.text, usual.tokens if calibration_tokens is None else calibration_tokens)
    check_text(text.text, text.tokens)
    ways = Ways(_several(prune_method), _several(rounding), text)
    refuse_foreign(folder)
    _refuse_other_winner(folder / WINNER)
    opened = open_named(probe, options, known)
    refuse_texts_alone(opened, "A search")
    texts = [each for each in opened if isinstance(each, RunningText)]
    parts = [parts_of(each, seed) for each in opened if not isinstance(each, RunningText)]
    with (
        StudyModel(
            model,
            settings,
            revision=revision,
            keep_in=None if cluster else folder,
            texts=folder / TEXTS,
        ) as study_model,
        claim(folder, study_model.original, known),
        runner(cluster, listening) as run,
    ):
        if texts:  # A model that cannot read one is refused before it is evaluated on all else.
            study_model.evaluate_original(texts, folder / GRADING / ORIGINAL, listening)
        rest, first = [part.rest for part in parts], [part.first for part in parts]
        # The noise floor is that of the facts that grade the winner.
        searched = EvaluationSet.of(
            study_model, rest, folder / SEARCHED, listening, run, first, known=known, noise_floor=False
        )
        chosen = RecipeSearch(
            Space(study_model.maker.structure(module_map), _several(quantize), module_map, ways),
            criterion,
            evaluating(searched, criterion, on_result),
            sizes_of_original(searched.original),
            together=TOGETHER if cluster else 1,
        )
        chosen.explore(trials, seed)
        selection = EvaluationSet.of(
            study_model,
            [part.selection for part in parts],
            folder / HELD_OUT,
            listening,
            run,
            known=known,
            noise_floor=False,
        )
        chosen.confirm(confirming(selection))
        graded_by = [part.grading for part in parts]
        grading = EvaluationSet.of(study_model, graded_by, folder / GRADING, listening, run, known=known)
        found = search_of(chosen, searched, selection, grading, seed=seed, command=command)
        _write_found(found, grading.beside(texts, listening), folder, show_facts=not no_facts)
    return found


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names; one may stand by itself."""
    return (names,) if isinstance(names, str) else tuple(names)


def _write_found(found: Search, grading: EvaluationSet, folder: Path, *, show_facts: bool) -> None:
    """Write all of it, in the place of what an earlier search of this folder has found."""
    _remove_earlier(folder, but_winner=found.winner is not None)
    if found.winner:
        _write_winner(found.winner, grading, folder, show_facts=show_facts, command=found.command)
    write_search(found, folder)


def _remove_earlier(folder: Path, *, but_winner: bool) -> None:
    """What an earlier search of this folder, for another share or size, has found; a new winner replaces an old one."""
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    if not but_winner and _is_earlier_winner(folder / WINNER):
        discard(folder / WINNER)


def _refuse_other_winner(folder: Path) -> None:
    """Raise OutputError where something stands in the winner's place that no search has put there: else it would be
    found when all is evaluated."""
    if os.path.lexists(folder) and not _is_earlier_winner(folder):
        raise OutputError(
            f"{folder} exists already, and is no winner of a search.",
            hint="Move it away, or choose a new folder for the search.",
        )


def _is_earlier_winner(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def _write_winner(
    winner: Trial, grading: EvaluationSet, folder: Path, *, show_facts: bool, command: str | None
) -> None:
    """The converted winner, its recipe, and its report card over the facts that grade it."""
    from compressknow.pages.card.pages import write_reports

    recipe = Recipe.from_dict(dict(winner.recipe))
    write_checkpoint(grading.study_model, recipe, folder / WINNER, overwrite=_is_earlier_winner(folder / WINNER))
    write_whole(folder / RECIPE, (to_toml(recipe.to_dict()) + "\n").encode())
    before, after = grading.reference, grading.given(cell_of(recipe))
    card = make_card(before, [after], show_facts=show_facts, known=grading.known_as, command=command)
    write_reports(card, [folder / name for name in REPORTS], overwrite=True)
