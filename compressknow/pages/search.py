"""What a search for the smallest checkpoint that keeps enough knowledge says: its records, page, chart and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from compressknow import notebook
from compressknow.compress.recipe import to_toml
from compressknow.evaluate.grades import RECOGNIZED
from compressknow.files import write_whole
from compressknow.format import at_least, count, estimate, json_text, number, plain, plain_lines, share, size, smaller
from compressknow.pages.card.warnings import of_known
from compressknow.pages.drawing import INK, MUTED, SERIES
from compressknow.pages.pages import html_page
from compressknow.pages.parts import BAR, Code, Drawn, Entries, Folded, Note, Page, Sentences, Shown
from compressknow.pages.records import ModelFacts
from compressknow.pages.tables import Entry, Table, identity
from compressknow.pages.tradeoff import Look, Mark, Tradeoff, tradeoff, unbeaten
from compressknow.stats.clusters import FEWEST_SIGNS
from compressknow.stats.records import Estimate

# What may be made small, and how people call it.
SIZES = {
    "bytes": "size on disk",
    "sparse-bytes": "sparse size",
    "nonzero": "weights left",
}
_FRONT = (
    "The share is measured on the facts of the search split. The broken line is the share to keep; the "
    "lower end of a recipe's interval (95 %, the stroke through its mark) must reach it."
)
# A search's page is short enough to have no table of contents.
_ALL = 99
# Recipes in the table at once.
_SHOWN = 10
_KINDS = {"paper": "a setup of the paper", "search": "chosen by the search", "layers": "some layers alone"}
_GETS = {
    "sparse-bytes": "No current runtime reads a sparse store: on disk pruned weights are dense, and what you get today "
    "is the size on disk.",
    "bytes": "This is what you get today; pruned weights are dense on disk, so that pruning alone saves nothing here.",
    "nonzero": "No current runtime leaves out weights that are zero: they are dense on disk and in memory, and what "
    "you get today is the size on disk.",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe that was evaluated.

    Attributes
    ----------
    kind : ``paper`` for one of the paper's setups, ``search`` for one that the search chose, ``layers`` for one that
        shows how much some layers bear.
    kept : on the facts of the search that it was evaluated on; `facts` is their number. `held_out` on those held out to
        select by, where it was evaluated on these; `graded` of the winner, on those that chose nothing.
    sizes : ``sparse-bytes``, ``bytes`` and ``nonzero``.
    """

    setup: str
    kind: str
    recipe: Mapping[str, Any]
    kept: Estimate
    facts: int
    sizes: Mapping[str, int]
    held_out: Estimate | None = None
    graded: Estimate | None = None
    harm: float | None = None  # mean KL divergence from the original, nats
    harm_is_lower_bound: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Search(notebook.Shown):
    """A whole search.

    Attributes
    ----------
    keep : share of knowledge that must be kept; `minimize` one of `SIZES`.
    winner : the cheapest that keeps it on the held-out facts, or None; `closest` what came nearest then.
    naive : the cheapest of everything pruned by one amount that keeps as much on the facts of the search, or None.
    searched, held_out, graded : numbers of facts; `known_searched`, `known_held_out`, `known_graded` those that the
        original answers right.
    first : how many of those to search with are evaluated first; 0 where all are at once.
    level : of the intervals of the held-out facts, adjusted for how many recipes were tried on these.
    sizes : of the original.
    known : what counts as known: ``recognized`` or better, or only ``produced``.
    templates : in how many wordings each fact was put; it is known then if more than half of them are.
    rounding : share of what the original knows of the facts that grade that it still knows in another precision, by a
        sample of them (0 to 1); None where that was not found.
    """

    original: ModelFacts
    keep: float
    minimize: str
    probes: tuple[str, ...]
    searched: int
    first: int
    held_out: int
    graded: int
    known_searched: int
    known_held_out: int
    known_graded: int
    level: float
    sizes: Mapping[str, int]
    tried: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    winner: Trial | None
    closest: Trial | None
    naive: Trial | None
    seed: int
    versions: Mapping[str, str]
    command: str | None
    known: str = RECOGNIZED
    templates: int = 1
    rounding: float | None = None

    def _summary(self) -> notebook.Summary:
        return notebook.Summary(
            f"Search: the smallest {plain(self.original.name, 60)} that keeps {share(self.keep)}",
            self._outcome(),
            ("Held-out facts decide", f"Kept of {count(self.known_held_out)} known", SIZES[self.minimize].capitalize()),
            tuple(self._row(trial) for trial in self.confirmed),
        )

    def _outcome(self) -> str:
        tried = f"{count(len(self.tried))} recipes tried"
        if self.winner is None:
            return f"{tried}; none keeps that much for sure."
        sizes = [self._size(of.sizes[self.minimize]) for of in (self, self.winner)]
        return f"{tried}; {plain(self.winner.setup, 120)} wins: {sizes[1]}, the original {sizes[0]}."

    def _row(self, trial: Trial) -> tuple[str, ...]:
        kept = trial.held_out or Estimate(None)
        written = estimate(kept.value, kept.low, kept.high)
        return trial.setup, written, self._size(trial.sizes[self.minimize])

    def _size(self, amount: int) -> str:
        return count(amount) if self.minimize == "nonzero" else size(amount)


def search_page(search: Search) -> Page:
    """The search as text, with its chart."""
    return Page(
        kind="search",
        title=f"{headline(search)}: {plain(search.original.name, 60)}",
        models=plain(search.original.name, 80),
        headline=headline(search),
        verdict=verdict(search),
        first="What you get today" if search.known == RECOGNIZED else "Read this first",
        warnings=said(search),
        sections=tuple(section for section in _sections(search) if section.parts),
        unlisted=_ALL,
    )


def _sections(search: Search) -> Iterator[Shown]:
    versions = ", ".join(f"{plain(name, 40)} {plain(version, 40)}" for name, version in search.versions.items())
    run = (*identity(search.original), Entry("Seed", str(search.seed)), Entry("Versions", versions))
    command = plain(search.command, 2000) if search.command else None
    recipe = plain_lines(to_toml(dict(search.winner.recipe))) if search.winner else None
    layers = _layers(search)
    yield Shown("front", "Knowledge kept against size", (*_front(search), Note(_FRONT + _rounding(search))))
    yield Shown("winner", "The winning recipe", (Code(recipe, "toml"),) if recipe else ())
    yield Shown("held-out", "On the facts held out to select by", (_confirmed(search),), look="wide")
    yield Shown("tried", "All recipes", (*_tried(search), Note("", drawn=BAR)), look="wide")
    yield Shown("layers", "Layers", (layers,) if layers else ())
    yield Shown("method", "Method and limits", (Sentences(_method(search)),), look="text")
    yield Shown("run", "The run", (Code(command, "sh", look="command"), Entries(run)), look="text")


def _front(search: Search) -> Iterator[Drawn]:
    yield Drawn(Markup(pareto(search)), look="narrow")
    yield Drawn(Markup(pareto(search, broad=True)), look="broad")


def _rounding(search: Search) -> str:
    if search.rounding is None:
        return ""
    return (
        f" The dotted line is what rounding alone keeps, {share(search.rounding)}: the original answered some of the "
        "facts that grade in another precision, too."
    )


def headline(search: Search) -> str:
    """What stands above everything."""
    least = f"{100 * search.keep:.6g} %"
    if search.winner is None:
        return f"No recipe tried is certain to keep {least}"
    before, after = search.sizes[search.minimize], search.winner.sizes[search.minimize]
    if after >= before:
        return f"Nothing smaller than the original is certain to keep {least}"
    return f"{share(1 - after / before)} smaller, and at least {least} kept"


def verdict(search: Search) -> str:
    """The outcome in one sentence or two, with its numbers."""
    if search.winner is None:
        return _missed(search)
    winner, before = search.winner, search.sizes[search.minimize]
    after = winner.sizes[search.minimize]
    return (
        f"{_setup(winner)} keeps {_kept(winner.graded or Estimate(None))} of what {plain(search.original.name, 60)} "
        f"knew of {count(search.graded)} facts that chose nothing. Its {SIZES[search.minimize]} is "
        f"{_amount(after, search)}: {_beside(after, before)} the original ({_amount(before, search)}){_naive(search)}."
    )


def _missed(search: Search) -> str:
    if search.closest is None:
        return f"No recipe that keeps {share(search.keep)} could be evaluated."
    closest = search.closest
    return (
        f"No recipe of {count(len(search.tried))} is certain to keep {share(search.keep)}. The closest is "
        f"{_setup(closest)}: it keeps {_held_out(closest)} of the {count(search.known_held_out)} facts held out that "
        f"{plain(search.original.name, 60)} knew{_too_few(search)}."
    )


def _too_few(search: Search) -> str:
    """Where no outcome at all could have shown it."""
    from compressknow.stats.intervals import proportion

    best = proportion(search.known_held_out, search.known_held_out, search.level).low
    if best is None or best >= search.keep:
        return ""
    return (
        f"; even if it kept all of them, only {share(best)} would be certain: use more facts (a larger --limit) or "
        "lower --keep"
    )


def _held_out(tried: Trial) -> str:
    kept = tried.held_out or Estimate(None)
    return estimate(kept.value, kept.low, kept.high)


def _naive(search: Search) -> str:
    assert search.winner is not None
    if search.naive is None:
        return "; no single amount over everything kept as much"
    if search.naive.recipe == search.winner.recipe:
        return "; it is the naive choice itself, one amount over everything"
    mine, other = search.winner.sizes[search.minimize], search.naive.sizes[search.minimize]
    return (
        f", and {_beside(mine, other)} the naive choice, one amount over everything ({_setup(search.naive)}, "
        f"{_amount(other, search)})"
    )


def _beside(after: int, before: int) -> str:
    if after == before:
        return "the same as"
    return f"{share(abs(before - after) / before)} {'less' if after < before else 'more'} than"


def gets(search: Search) -> str:
    """What of the sizes a user gets today."""
    if search.winner is None:
        return _GETS[search.minimize]
    on_disk = search.winner.sizes["bytes"]
    return f"{_GETS[search.minimize]} On disk it is {size(on_disk)} ({smaller(search.sizes['bytes'], on_disk)})."


def said(search: Search) -> tuple[str, ...]:
    """What a reader must know beside the verdict: `gets`, what counts as known where that is not the usual, and that
    rounding alone keeps less than is asked for.
    """
    return (gets(search), *_below_rounding(search), *of_known(search.known))


def _below_rounding(search: Search) -> Iterator[str]:
    if search.rounding is not None and search.rounding < search.keep:
        yield (
            f"Rounding alone keeps {share(search.rounding)} of what the original knows (some of the graded facts, in "
            f"another precision): {100 * search.keep:.6g} % is more than the same weights keep there."
        )


def _setup(tried: Trial) -> str:
    return plain(tried.setup, 160)


def _amount(amount: int, search: Search) -> str:
    return count(amount) if search.minimize == "nonzero" else size(amount)


def _row(tried: Trial) -> tuple[str, ...]:
    sizes = tried.sizes
    return size(sizes["sparse-bytes"]), size(sizes["bytes"]), f"{sizes['nonzero'] / 1e6:.1f}"


_SIZES = ("Sparse size", "On disk", "Weights left, millions")


def _tried(search: Search) -> Iterator[Table | Folded]:
    """The smallest recipes at once, the others folded."""
    rows = sorted(search.tried, key=lambda t: (t.sizes[search.minimize], -(t.kept.value or 0.0)))
    yield _recipes("Evaluated recipes, smallest first", rows[:_SHOWN])
    if more := rows[_SHOWN:]:
        yield Folded(f"{count(len(more))} larger ones", (_recipes("Evaluated recipes, continued", more),))


def _recipes(caption: str, rows: Sequence[Trial]) -> Table:
    return Table(
        caption,
        ("Recipe", "Why", "Kept, facts of the search", "Facts", *_SIZES),
        tuple((_setup(t), _KINDS[t.kind], _kept(t.kept), count(t.facts), *_row(t)) for t in rows),
        bars=tuple(t.kept for t in rows),
        bars_after=2,
        sortable=len(rows) > 1,
    )


def _confirmed(search: Search) -> Table:
    rows = tuple((_setup(t), _kept(t.kept), _held_out(t), *_row(t)) for t in search.confirmed)
    columns = ("Recipe", "Kept, facts of the search", "Kept, held-out facts", *_SIZES)
    return Table("Recipes evaluated on the facts held out to select by", columns, rows)


def _layers(search: Search) -> Table | None:
    rows = tuple((_setup(t), _kept(t.kept), _harm(t)) for t in search.tried if t.kind == "layers")
    columns = ("Pruned", "Kept", "Mean KL divergence, nats")
    return Table("Sensitivity of groups of layers", columns, rows) if rows else None


def _harm(tried: Trial) -> str:
    return at_least(number(tried.harm, 4), tried.harm_is_lower_bound)


def _kept(kept: Estimate) -> str:
    return estimate(kept.value, kept.low, kept.high)


def _method(search: Search) -> tuple[str, ...]:
    early = (
        f"A recipe of which {count(search.first)} of the facts of the search, drawn by the seed too, showed that it "
        "keeps less than --keep (by the upper end of a 99 % interval) was not evaluated further; its figures "
        "are based on these facts alone.",
    )
    return (
        f"A third of the facts of {', '.join(plain(p, 60) for p in search.probes)}, drawn by the seed, guided the "
        f"search ({count(search.searched)}, of which the original knew {count(search.known_searched)}); a third was "
        f"held out to select the winner by ({count(search.held_out)}, {count(search.known_held_out)} known), and a "
        f"third to grade it ({count(search.graded)}, {count(search.known_graded)} known). With {3 * FEWEST_SIGNS} "
        f"relations or more these are whole relations.{_in_wordings(search)}",
        "The search first evaluated the paper's setups, then pruned each band of layers alone by 50 %: the bands "
        "whose pruning moves answers most (KL divergence) are the most sensitive. Then Optuna's TPE sampler chose an "
        "amount for attention and for feed-forward, how much more to prune the least sensitive layers than the most "
        "sensitive ones, and a scheme, for the smallest size of which the lower end of the interval keeps the "
        "share of --keep. Ties go to the recipe that keeps more.",
        *(early if search.first else ()),
        "The smallest recipes that did were evaluated on the held-out facts, until one kept as much there too, by "
        f"the lower end of its {100 * search.level:g} % interval (over relations where there are enough; adjusted for "
        "the number of recipes that might be tried so, Bonferroni). What chose the winner proves nothing about it: "
        "its share and its report card are of the facts that grade.",
        "The sparse size is what a store would take that keeps only weights that are not zero, plus one bit per "
        "weight to mark them.",
    )


def _in_wordings(search: Search) -> str:
    if search.templates == 1:
        return ""
    return (
        f" Each fact was put in {count(search.templates)} wordings, all in one part, and is known if more than half of "
        "them are answered right."
    )


_UNITS = {"sparse-bytes": (1e6, "MB"), "bytes": (1e6, "MB"), "nonzero": (1e6, "millions")}


def pareto(search: Search, *, broad: bool = False) -> str:
    """The chart, as an SVG element: for a narrow screen or, if `broad`, for the width of the page. A pointer over a
    recipe is told which it is.
    """
    return tradeoff(_tradeoff(search), "broad-pareto" if broad else "pareto-chart", broad=broad)


_WINNER = "the winner"
_LOOKS = {
    "the paper's setups": Look("s", MUTED),
    "chosen by the search": Look("o", SERIES[0]),
    _WINNER: Look("*", INK, 13),
}
_NAMES = dict(zip(("paper", "search"), _LOOKS, strict=False))


def _tradeoff(search: Search) -> Tradeoff:
    marks = [
        Mark(_cost(t, search), t.kept, _NAMES[t.kind], _hovered(t, search))
        for t in search.tried
        if t.kept.value is not None and t.kind in _NAMES
    ]
    best = unbeaten(marks, lambda mark: (mark.cost, mark.share))
    if won := search.winner:
        marks.append(Mark(_cost(won, search), won.kept, _WINNER, f"{_WINNER}, {_hovered(won, search)}"))
    return Tradeoff(
        f"Knowledge kept by {SIZES[search.minimize]}",
        f"{SIZES[search.minimize]}, {_UNITS[search.minimize][1]}",
        marks,
        _LOOKS,
        edge=tuple(_NAMES.values()),
        told=f"The best at each size: {'; '.join(mark.told for mark in best)}.",
        keep=search.keep,
        rounding=search.rounding,
        bottom=0,
    )


def _cost(trial: Trial, search: Search) -> float:
    return trial.sizes[search.minimize] / _UNITS[search.minimize][0]


def _hovered(trial: Trial, search: Search) -> str:
    return f"{plain(trial.setup, 60)} {share(trial.kept.value)}, {_told(trial, search)}"


def _told(tried: Trial, search: Search) -> str:
    amount = tried.sizes[search.minimize]
    return f"{amount / 1e6:.1f} millions" if search.minimize == "nonzero" else size(amount)


SCHEMA = 1


def write_search(search: Search, folder: Path) -> None:
    """Write ``search.html`` and ``search.json`` into `folder`; each appears only when it is whole."""
    write_whole(folder / "search.html", render_search_html(search).encode())
    write_whole(folder / "search.json", json_text(search_to_json(search)).encode())


def render_search_html(search: Search) -> str:
    """The page: the same search gives the same bytes."""
    return html_page("sections.html.j2", page=search_page(search))


def search_to_json(search: Search) -> dict[str, Any]:
    """Plain values: all that the page says. Shares lie between 0 and 1, sizes are bytes or numbers of weights."""
    return {"schema": SCHEMA, "verdict": verdict(search), "gets": gets(search), **asdict(search)}
