"""Records, page, chart and JSON of a search for the smallest file that keeps enough knowledge."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compressknow.base import notebook
from compressknow.base.format import (
    NONE,
    clean,
    clean_lines,
    compare_sizes,
    count,
    dump_json,
    number,
    share_against,
    write_size,
)
from compressknow.comparison.intervals import FEWEST_SIGNS
from compressknow.comparison.records import Counts, Estimate
from compressknow.evaluate.grades import RECOGNIZED
from compressknow.evaluate.records import FactsInText, ModelRecord
from compressknow.pages import parts
from compressknow.pages.as_json import dump_model
from compressknow.pages.card.warnings import warn_of_facts_in_text, warn_of_figures, warn_of_grid, warn_of_known
from compressknow.pages.drawing import INK, SERIES, Mark, Tradeoff, draw_tradeoff
from compressknow.pages.pages import render_html, write_files
from compressknow.pages.records import write_estimate
from compressknow.pages.svg import Grid, draw_heat_map, shorten_names

_ALL = 99  # a search's page is short enough to have no table of contents
# Name of a weight in a layer: its stack, the layer's number and the module there.
_IN_LAYER = re.compile(r"(.*?)\.(\d+)\.(.*?)(?:\.weight)?", re.DOTALL)
# Bits at which the shades of the map of types change.
_BITS = (3, 4, 5, 6, 8, 16)
_BITS_NOTE = "Bits per weight, from faint to full colour; 16 or 32 if the weight stays as it is."
_SCALES_NOTES = {
    "gguf": "Scales take about half a bit more.",
    "checkpoint": (
        "Scales come on top, with 16 or 32 bits, as the original's weights have: 16 are half a bit more per weight in "
        "groups of 32, and an eighth in groups of 128."
    ),
}
_FORMS = {"gguf": "GGUF file", "checkpoint": "checkpoint"}


@dataclass(frozen=True, slots=True)
class Trial:
    """File that was evaluated.

    Attributes
    ----------
    setup : how many weights have which type.
    types : the type of each weight that has one.
    bytes : size of the weights.
    predicted_kl : the predicted divergence of the answers, in nats, that the types minimize.
    kept : share kept of the search facts; no value if a size was requested. `held_out` is the share of the held-out
        facts, if it was measured; `graded` that of the grading facts, for the winner only.
    """

    setup: str
    types: Mapping[str, str]
    bytes: int
    predicted_kl: float
    kept: Estimate
    held_out: Estimate | None = None
    graded: Estimate | None = None


def _identify(trial: Trial) -> tuple[tuple[str, str], ...]:
    # Different types may have the same size, and even the same setup.
    return tuple(sorted(trial.types.items()))


@dataclass(frozen=True, slots=True, repr=False)
class Search(notebook.Tabular):
    """Whole search. Its rows are the files that were evaluated."""

    original: ModelRecord
    form: str  # ``gguf`` or ``checkpoint``
    keep: float | None  # share of knowledge that must be kept; None if `budget` is set
    budget: int | None  # bytes that a file may have
    by: str  # what decided the types, and how they are rounded
    probes: tuple[str, ...]
    searched: int  # facts of each part, and below how many of them the original answers right
    held_out: int
    graded: int
    known_searched: int
    known_held_out: int
    known_graded: int
    level: float  # of all intervals but those of the grading facts
    bytes: int  # size of the original's weights
    tried: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    winner: Trial | None  # the smallest that keeps enough of the held-out facts
    closest: Trial | None  # the best one if there is no winner
    recipe: str | None  # the winner's, as TOML
    seed: int
    versions: Mapping[str, str]
    command: str | None
    known: str = RECOGNIZED  # what counts as known: that or better, or only ``produced``
    templates: int = 1  # in how many wordings each fact was put; known if more than half of them are
    # Share of the known grading facts that the original still knows in another precision (0 to 1), by a sample; None if
    # unknown.
    rounding: float | None = None
    # Grading facts that appear in the text that guided types and rounding; None if that text is not available.
    in_calibration: FactsInText | None = None
    is_smallest: bool = False  # whether no choice of types gives a smaller file than the winner

    def _rows(self) -> list[dict[str, Any]]:
        # For each file, keep the row with most of its shares.
        winner = [self.winner] if self.winner else []
        trials = {_identify(each): each for each in (*self.tried, *self.confirmed, *winner)}
        return [
            {
                **{"setup": each.setup, "bytes": each.bytes, "predicted_kl": each.predicted_kl},
                **{"kept": each.kept.value, "kept_low": each.kept.low, "kept_high": each.kept.high},
                "held_out": each.held_out.value if each.held_out else None,
                "graded": each.graded.value if each.graded else None,
                "is_winner": each is self.winner,
            }
            for each in trials.values()
        ]

    def _summary(self) -> notebook.Summary:
        name = clean(self.original.name, 60)
        if self.winner is None:
            outcome = f"{write_headline(self)}."
        else:
            kept = _write_kept(self, self.winner.graded)
            outcome = f"{write_size(self.winner.bytes)}, the original {write_size(self.bytes)}: {kept} kept."
        if self.keep is None:
            title = f"Search: the best {name} of {write_size(self.budget or 0)}"
        else:
            title = f"Search: the smallest {name} that keeps {_write_target(self)}"
        columns = ("Weights", f"Kept of {count(self.known_held_out)} known held-out facts", "Size")
        rows = tuple((each.setup, _write_kept(self, each.held_out), write_size(each.bytes)) for each in self.confirmed)
        return notebook.Summary(title, outcome, columns, rows)


def render_search_html(search: Search) -> str:
    """Return the page: the same search gives the same bytes."""
    page = parts.Page(
        what="search",
        models=clean(search.original.name, 80),
        headline=write_headline(search),
        verdict=write_verdict(search),
        warnings=list_warnings(search),
        sections=tuple(_make_sections(search)),
        unlisted=_ALL,
    )
    return render_html(page)


def _make_sections(search: Search) -> Iterator[parts.PageSection]:
    if search.tried:
        chart = _make_tradeoff(search)
        drawn = parts.draw_twice(partial(draw_tradeoff, chart), "pareto")
        yield parts.PageSection("front", "Knowledge kept against size", (*drawn, parts.Note(_describe_chart(search))))
    if search.recipe and search.winner:
        types = tuple(_show_types(search, search.winner, search.recipe))
        yield parts.PageSection("winner", "The types of its weights", types, look="wide")
    if search.confirmed:
        table = _tabulate_files(search, held_out=True)
        yield parts.PageSection("held-out", "On the held-out facts", (table,), look="wide")
    if search.tried:
        table = _tabulate_files(search, held_out=False)
        bar = f"The bar shows the share kept, and the line on it the {100 * search.level:.3g} % interval."
        yield parts.PageSection("tried", "All files", (table, parts.Note("", drawn=bar)), look="wide")
    entries = (*parts.list_identity(search.original), parts.Entry("Seed", str(search.seed)))
    method = parts.Sentences(tuple(_describe_method(search)))
    yield parts.PageSection("method", "Method and limits", (method,), look="text")
    yield parts.PageSection("run", "The run", parts.show_run(search.command, search.versions, entries), look="text")


def _show_types(search: Search, winner: Trial, recipe: str) -> Iterator[parts.Part]:
    types = _place_types(winner.types)
    # A weight that stays as it is has the original's type.
    bits = {kind: _count_bits(kind) or _count_bits(search.original.dtype or "") or 16 for kind in winner.types.values()}
    within = dict.fromkeys(module for by_module in types.values() for module in by_module if module)
    # Attention before feed-forward, as a layer computes them; a GGUF file has them in another order.
    modules = sorted(within, key=lambda module: module.startswith("ffn"))
    outside = [""] if any("" in by_module for by_module in types.values()) else []
    heads = tuple(clean(name, 40) for name in shorten_names(tuple(modules))) or ("",)
    cells = tuple(
        tuple(bits[row[module]] if module in row else None for module in (outside if "" in row else modules))
        for row in types.values()
    )
    grid = Grid(tuple(types), heads, cells)
    title = "Bits of weights by layer and module"
    yield from parts.draw_twice(partial(draw_heat_map, grid, title, bounds=_BITS, write=lambda n: f"{n:g}"), "types")
    yield parts.Note("", drawn=f"{_BITS_NOTE} {_SCALES_NOTES[search.form]}")
    places = (*modules, *outside)
    rows = tuple((name, *(clean(row.get(place, ""), 40) for place in places)) for name, row in types.items())
    columns = ("Layer", *heads, *("outside" for _ in outside))
    table = parts.Table("Types by layer and module", columns, rows, prose=True)
    yield parts.Folded("The map as a table of types", (table,))
    yield parts.Folded("The recipe", (parts.Code(clean_lines(recipe), "toml"),))


def _place_types(types: Mapping[str, str]) -> Mapping[str, Mapping[str, str]]:
    """Return types by layer and module; a weight outside all layers has its own row, and no module."""
    places = {name: _IN_LAYER.fullmatch(name) for name in types}
    stacks = tuple(dict.fromkeys(at[1] for at in places.values() if at))
    names = [clean(name.partition(".")[0], 20) for name in shorten_names(stacks)] if len(stacks) > 1 else ["layer"]
    rows: dict[tuple[int, int, str], dict[str, str]] = {}
    for name, at in places.items():
        if at:
            stack, number = stacks.index(at[1]), int(at[2])
            rows.setdefault((stack, number, f"{names[stack]} {number}"), {})[at[3]] = types[name]
        else:
            rows[len(stacks), 0, clean(name.removesuffix(".weight"), 40)] = {"": types[name]}
    return {place[-1]: rows[place] for place in sorted(rows)}


def _count_bits(kind: str) -> int | None:
    """Return the bits of a type: the first number in its name, or None if there is none."""
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else None


def _describe_chart(search: Search) -> str:
    about = (
        "The share is measured on the facts of the search split. The broken line is the share to keep; the lower end "
        f"of a file's interval ({100 * search.level:.3g} %, the stroke through its mark) must reach it."
    )
    if search.rounding is None:
        return about
    return (
        f"{about} The dotted line is what rounding alone keeps, {_write_share(search, search.rounding)}: the original "
        "also answered some of the grading facts in another precision."
    )


def write_headline(search: Search) -> str:
    """Return the headline of the page."""
    if search.winner is None:
        return f"No file tried is certain to keep {_write_target(search)}"
    # The share of the grading facts: on the others, the winner may keep enough by luck.
    kept = _write_share(search, search.winner.graded.value if search.winner.graded else None)
    if search.keep is None:
        return f"{write_size(search.winner.bytes)}, and {kept} kept"
    return f"{compare_sizes(search.bytes, search.winner.bytes)}, and {kept} kept"


def write_verdict(search: Search) -> str:
    """Write the outcome in one or two sentences with its numbers."""
    name, winner, closest = clean(search.original.name, 60), search.winner, search.closest
    if winner is not None:
        change = compare_sizes(search.bytes, winner.bytes)
        smallest = " No choice of types gives a smaller file." if search.is_smallest else ""
        return (
            f"The {_FORMS[search.form]} of {write_size(winner.bytes)} keeps {_write_kept(search, winner.graded)} of "
            f"the {count(search.known_graded)} that {name} knew of {count(search.graded)} facts that had no part in "
            f"the choice. The original has {write_size(search.bytes)} ({change}).{smallest}"
        )
    if closest is None:
        return f"No file that keeps {_write_target(search)} could be evaluated."
    tried = len(search.tried)
    none, best = ("The only file is not", "It") if tried == 1 else (f"None of {count(tried)} files is", "The closest")
    return (
        f"{none} certain to keep {_write_target(search)}. {best} has {write_size(closest.bytes)} and keeps "
        f"{_write_kept(search, closest.held_out)} of the {count(search.known_held_out)} held-out facts that {name} "
        "knew."
    )


def list_warnings(search: Search) -> tuple[str, ...]:
    """Return warnings: why there may be no smaller file (more is required than rounding alone keeps, or facts are too
    few), that few facts grade the winner, that the original was rounded before, that facts appear in the text that
    guided the search, and what counts as known."""
    warnings, keep = [], search.keep or 0.0
    if search.rounding is not None and search.rounding < keep:
        warnings.append(
            f"Rounding alone keeps {_write_share(search, search.rounding)} of what the original knows (measured on "
            "some of the grading facts, in another precision): even unchanged weights do not keep "
            f"{_write_target(search)} there."
        )
    most = search.winner.bytes if search.winner else search.bytes
    # What a file keeps of the held-out facts decides, if it was evaluated on them.
    trials = {_identify(t): (t.bytes, t.kept, "search") for t in search.tried}
    trials |= {_identify(t): (t.bytes, t.held_out, "held-out") for t in search.confirmed if t.held_out}
    unsure = [each for each in trials.values() if (each[1].low or 0.0) < keep <= (each[1].value or 0.0)]
    size, kept, split = min(unsure, key=lambda each: each[0], default=(most, None, ""))
    if size < most:
        warnings.append(
            f"The file of {write_size(size)} kept {_write_kept(search, kept)} of the {split} facts. With more facts "
            "(a larger --limit, more probes), a file of that size may be certain to keep enough."
        )
    if search.winner:
        warnings += warn_of_figures(Counts(both=search.known_graded), (), (), name=clean(search.original.name, 60))
    warnings += warn_of_grid(search.original)
    warnings += warn_of_facts_in_text(search.original, search.in_calibration)
    return (*warnings, *warn_of_known(search.known))


def _write_target(search: Search) -> str:
    return f"{100 * (search.keep or 0.0):.6g} %"


def _write_share(search: Search, value: float | None) -> str:
    return NONE if value is None else share_against(value, [search.keep or 0.0])


def _write_kept(search: Search, kept: Estimate | None) -> str:
    return write_estimate(kept or Estimate(None), partial(_write_share, search))


def _tabulate_files(search: Search, *, held_out: bool) -> parts.Table:
    rows = sorted(search.confirmed if held_out else search.tried, key=lambda each: each.bytes)
    columns = ("Weights", "Size", f"Predicted KL of {_name_guide(search)}, nats", "Kept, search facts")
    return parts.Table(
        "Files evaluated on the held-out facts" if held_out else "Evaluated files, smallest first",
        (*columns, "Kept, held-out facts") if held_out else columns,
        tuple(
            (clean(t.setup, 160), write_size(t.bytes), number(t.predicted_kl, 4), _write_kept(search, t.kept))
            + ((_write_kept(search, t.held_out),) if held_out else ())
            for t in rows
        ),
        bars=() if held_out else tuple(t.kept for t in rows),
        bars_after=3,
        sortable=len(rows) > 1,
    )


def _name_guide(search: Search) -> str:
    return clean(search.by.partition(",")[0], 40)


def _describe_method(search: Search) -> Iterator[str]:
    split = f"With {3 * FEWEST_SIGNS} relations or more, facts are split by whole relations."
    if search.templates > 1:
        split += (
            f" Each fact was put in {count(search.templates)} wordings, all in one part, and is known if more than "
            "half are answered right."
        )
    names = ", ".join(clean(p, 60) for p in search.probes)
    searched = (
        f"{count(search.searched)} facts of {names}, drawn by the seed, are the search split (the original knew "
        f"{count(search.known_searched)})"
    )
    graded = f"({count(search.graded)}, {count(search.known_graded)} known)"
    if search.keep is None:
        yield f"{searched}; two thirds of all facts grade the winner {graded}. {split}"
    else:
        yield (
            f"{searched}; a third of all facts was held out to select the winner by ({count(search.held_out)}, "
            f"{count(search.known_held_out)} known), and a third to grade it {graded}. {split}"
        )
    yield (
        "How much rounding each weight to the nearest value of each type changes the answers was measured once (KL "
        f"divergence, to second order; decided by {clean(search.by, 200)}). For each size, types were chosen to "
        f"minimize the predicted loss over all weights: the total KL of {_name_guide(search)}."
    )
    if search.form == "gguf":
        yield (
            "The files were made and evaluated in llama.cpp, the original in transformers: part of a difference may be "
            "due to the runtime."
        )
    if search.keep is not None:
        yield (
            "Sizes were chosen by halving the predicted loss; each file was made and evaluated. The smallest that kept "
            "enough of the search facts (all, if these are too few to show that share) was evaluated on the held-out "
            "facts, then one predicted to lose at most half as much, then a quarter of that (or the largest file), "
            f"until one kept enough there too, by the lower end of its {100 * search.level:.3g} % interval (over "
            "relations if there are enough; adjusted for the number of files that might be tried, Bonferroni)."
        )
    yield (
        "The facts that chose the file prove nothing about it. Its share and its report card are measured on the "
        "grading facts, with 95 % intervals."
    )


_TRIED, _WINNER = "files tried", "the winner"
_LOOKS = {_TRIED: ("o", SERIES[0], 5.0), _WINNER: ("*", INK, 13.0)}


def _make_tradeoff(search: Search) -> Tradeoff:
    marks = []
    trials = [(each, _TRIED, "") for each in search.tried]
    trials += [(search.winner, _WINNER, f"{_WINNER}, ")] if search.winner else []
    for trial, kind, prefix in trials:
        if trial.kept.value is not None:
            kept = _write_share(search, trial.kept.value)
            text = f"{prefix}{write_size(trial.bytes)} {kept}, {clean(trial.setup, 60)}"
            marks.append(Mark(trial.bytes / 1e6, trial.kept, kind, text))
    title, keep, rounding = "Knowledge kept by size", search.keep, search.rounding
    return Tradeoff(title, "size, MB", marks, _LOOKS, edge=(_TRIED,), keep=keep, rounding=rounding)


SCHEMA = 2


def write_search(search: Search, folder: Path) -> None:
    """Write ``search.html`` and ``search.json``, which has shares from 0 to 1 and bytes, into `folder`."""
    values = {"schema": SCHEMA, "verdict": write_verdict(search), **asdict(search)}
    texts = {
        ".html": lambda: render_search_html(search),
        ".json": lambda: dump_json(values | {"original": dump_model(search.original)}),
    }
    write_files(texts, (folder / "search.html", folder / "search.json"), overwrite=True)
