"""search: the cheapest checkpoint that keeps what is asked for, judged on facts that the search did not see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.compress.recipe import Quantize, Recipe
from compressknow.compress.schemes import DEFAULT as USUAL
from compressknow.compress.staging import discard
from compressknow.libraries import require
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.probe.answers import Answers
from compressknow.probe.run import Settings, refuse_twins
from compressknow.probe.sources import DEFAULT, Options, open_all
from compressknow.quiet import Bar
from compressknow.report.card.make import compare, make_card, model_facts
from compressknow.report.search.records import Search, Tried
from compressknow.study.cells import Subject
from compressknow.study.folder import claim, refuse_foreign
from compressknow.study.grid import Cell
from compressknow.study.running import RayOptions, runner
from compressknow.study.selection import Aim, cheapness, confirm, level, may_meet, meets, promising
from compressknow.study.space import TOGETHER, Space, cell_of, optimize, references
from compressknow.study.split import Asked, parts_of

if TYPE_CHECKING:
    from compressknow.model.structure import ModuleMap

SEARCHED, HELD_OUT, WINNER = "searched", "held-out", "winner"
RECIPE, REPORTS, PAGES = "recipe.toml", ("report.html", "report.md"), ("search.html", "search.json")
WRITTEN = (*PAGES, RECIPE, *REPORTS)
TRIALS = 40
Told = Callable[[Tried], None]


def search(
    model: str | Path,
    output: str | Path,
    *,
    keep: float,
    minimize: str = "bytes",
    trials: int = TRIALS,
    schemes: Sequence[str] = ("int8", "int8-weights"),
    module_map: ModuleMap = "structural",
    probes: Sequence[str] | None = None,
    options: Options | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    no_facts: bool = False,
    ray: RayOptions | None = None,
    revision: str | None = None,
    command: str | None = None,
    bar: Bar | None = None,
    told: Told | None = None,
) -> Search:
    """Find the cheapest checkpoint of a model that keeps a share of its knowledge.

    Half of the facts of each relation guide the search; what it finds is judged on the other half, by the lower end of
    its interval. A search that was stopped resumes, and ends as it would have. Needs Optuna.

    Parameters
    ----------
    model : a local folder or a hub id.
    output : folder of the search; one of this model and version is resumed.
    keep : share of knowledge, between 0 and 1.
    minimize : ``bytes`` (on disk, where pruned weights are dense), ``sparse-bytes`` (non-zero weights at their width
        and one bit a weight) or ``nonzero`` (weights left). Ties go to the recipe that keeps more.
    trials : recipes that the optimiser chooses, beside the paper's setups.
    schemes : int8 schemes that it may choose from.
    probes, options, settings : see `compressknow.probe`; lm-eval's tasks cannot be held out.
    seed : of the halves and of the optimiser.
    no_facts : leave the text of every fact out of the winner's report card.
    ray : run on a Ray cluster; see `compressknow.study.running.RayOptions`.
    told : is told each recipe's result as it comes.

    Returns
    -------
    The search, as ``search.html`` and ``search.json`` in `output` show it; `winner` is None where nothing keeps as
    much. With a winner there are ``recipe.toml``, the converted ``winner/``, and its ``report.html`` too.

    Raises
    ------
    compressknow.errors.CompressknowError : the model or a probe cannot be found or asked, Optuna is missing, or
        `output` holds something else.
    """
    from compressknow.report.search.view import write_search

    require("matplotlib", "optuna", "pyarrow", "scipy", *(["ray"] if ray else []))
    aim, folder = Aim(keep, minimize), Path(output)
    refuse_foreign(folder)
    asked = open_all([probes] if isinstance(probes, str) else probes or DEFAULT, options or Options())
    refuse_twins(asked)
    parts = [parts_of(probe, seed) for probe in asked]
    with (
        Subject(model, settings or Settings(), revision=revision, keep_in=None if ray else folder) as subject,
        claim(folder, subject.original),
        runner(ray, bar) as run,
    ):
        rest, first = [part.rest for part in parts], [part.first for part in parts]
        seen = Asked.of(subject, rest, folder / SEARCHED, bar, run, first)
        together = TOGETHER if ray else 1
        tried = _explore(seen, aim, schemes, module_map, trials, together, seed, told)
        unseen = Asked.of(subject, [part.held_out for part in parts], folder / HELD_OUT, bar, run)
        candidates = promising(tried, aim)
        confirmed = tuple(confirm(unseen, aim, candidates))
        winner = next((t for t in confirmed if meets(t.held_out, keep)), None)
        _remove_earlier(folder, but_winner=winner is not None)
        if winner:
            _write_winner(subject, unseen, winner, folder, no_facts=no_facts, command=command)
        found = _record(aim, seen, unseen, level(candidates), tried, confirmed, winner, seed, command)
        write_search(found, folder)
    return found


def _explore(
    seen: Asked,
    aim: Aim,
    schemes: Sequence[str],
    module_map: ModuleMap,
    trials: int,
    together: int,
    seed: int,
    told: Told | None,
) -> tuple[Tried, ...]:
    """The paper's setups, then the layers one band after the other, then the search itself."""
    structure = seen.subject.maker.structure(module_map)
    tried: dict[Recipe, Tried] = {}
    order: list[Recipe] = []

    def ask(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Answers]]:
        order.extend(cell.recipe for cell in cells)
        return seen.ask(cells, lambda answers: may_meet(seen, answers, aim.keep))

    def note(cell: Cell, answers: Answers, kind: str) -> Tried:
        if cell.recipe not in tried:
            tried[cell.recipe] = _tried(seen, cell, answers, kind)
            if told:
                told(tried[cell.recipe])
        return tried[cell.recipe]

    for cell, answers in ask(references(structure, schemes, module_map)):
        note(cell, answers, "paper")
    space = Space(structure, schemes, module_map)
    bands = {cell.recipe: band for band, cell in space.trials_of_bands()}
    harm = {}
    for cell, answers in ask([cell for _, cell in space.trials_of_bands()]):
        harm[bands[cell.recipe]] = note(cell, answers, "layers").harm or 0.0
    space.learn(harm)
    original = _sizes_of_original(seen)[aim.minimize]
    optimize(ask, aim.minimize, aim.keep, space, trials, together, seed, original, note)
    # Not as they came: on a cluster that is another order each time.
    return tuple(tried[recipe] for recipe in dict.fromkeys(order))


def _tried(seen: Asked, cell: Cell, answers: Answers, kind: str) -> Tried:
    comparison = compare(seen.original, answers, show_facts=False)
    moved = [(p.movement.n, p.movement.kl_mean) for p in comparison.probes if p.movement]
    total = sum(n for n, _ in moved)
    return Tried(
        setup=_name(cell.recipe),
        kind=kind,
        recipe=cell.recipe.to_dict(),
        kept=comparison.kept,
        facts=len(answers.answers),
        sizes=_sizes(answers),
        harm=sum(n * mean for n, mean in moved) / total if total else None,
    )


def _name(recipe: Recipe) -> str:
    """The setup, and the scheme where it is not the usual one: the paper has one scheme and does not name it."""
    schemes = {step.scheme for step in recipe.steps if isinstance(step, Quantize)} - {USUAL}
    return f"{recipe.setup} ({', '.join(sorted(schemes))})" if schemes else recipe.setup


def _sizes(answers: Answers) -> dict[str, int]:
    model = answers.record["model"]
    return {
        "sparse-bytes": model["totals"]["sparse_bytes"],
        "bytes": model["bytes"],
        "nonzero": model["totals"]["nonzero"],
    }


def _sizes_of_original(seen: Asked) -> dict[str, int]:
    """A dense model's sparse size is its size; what is zero in it already is not counted."""
    model = seen.original.record["model"]
    return {"sparse-bytes": model["bytes"], "bytes": model["bytes"], "nonzero": model["parameters"]}


def _remove_earlier(folder: Path, *, but_winner: bool) -> None:
    """What an earlier search of this folder, for another share or size, has found; a new winner replaces an old one."""
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    if not but_winner and _is_earlier_winner(folder / WINNER):
        discard(folder / WINNER)


def _is_earlier_winner(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def _write_winner(
    subject: Subject, unseen: Asked, winner: Tried, folder: Path, *, no_facts: bool, command: str | None
) -> None:
    """The converted winner, its recipe, and its report card over the held-out facts."""
    from compressknow.compress.convert import convert
    from compressknow.compress.recipe import to_toml
    from compressknow.files import write_whole
    from compressknow.report.card.pages import write_reports
    from compressknow.report.model_card.render import model_card_for

    recipe = Recipe.from_dict(dict(winner.recipe))
    replaces = _is_earlier_winner(folder / WINNER)
    convert(subject.maker.checkpoint.folder, folder / WINNER, recipe, overwrite=replaces, render_card=model_card_for)
    write_whole(folder / RECIPE, (to_toml(recipe.to_dict()) + "\n").encode())
    ((_, answers),) = unseen.ask([cell_of(recipe)])
    card = make_card(unseen.original, [answers], show_facts=not no_facts, command=command)
    write_reports(card, [folder / name for name in REPORTS], overwrite=True)


def _record(
    aim: Aim,
    seen: Asked,
    unseen: Asked,
    confidence: float,
    tried: tuple[Tried, ...],
    confirmed: tuple[Tried, ...],
    winner: Tried | None,
    seed: int,
    command: str | None,
) -> Search:
    failed = [t.recipe for t in confirmed if not meets(t.held_out, aim.keep)]
    naive = [t for t in tried if _is_naive(t) and meets(t.kept, aim.keep) and t.recipe not in failed]
    return Search(
        original=model_facts(seen.original.record["model"]),
        keep=aim.keep,
        minimize=aim.minimize,
        probes=tuple(probe.name for probe in unseen.probes),
        searched=len(seen.original.answers),
        first=sum(len(probe.facts) for probe in seen.first),
        held_out=len(unseen.original.answers),
        known_searched=seen.known,
        known_held_out=unseen.known,
        level=confidence,
        sizes=_sizes_of_original(seen),
        tried=tried,
        confirmed=confirmed,
        winner=winner,
        closest=None if winner else max(confirmed, key=lambda t: (t.held_out and t.held_out.low) or 0.0, default=None),
        naive=min(naive, key=lambda t: cheapness(t, aim), default=None),
        seed=seed,
        versions=dict(seen.original.record["versions"]),
        command=command,
    )


def _is_naive(tried: Tried) -> bool:
    """Everything pruned by one amount, quantized or not."""
    return tried.kind == "paper" and all(step["scope"] == ["overall"] for step in tried.recipe["steps"])
