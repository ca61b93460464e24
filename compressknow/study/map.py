"""Map of a sensitivity: what rounding each layer and module costs, what the next MB buys, and the page on both."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from math import floor, log10
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from compressknow._version import __version__
from compressknow.base.format import clean, count, number, share, write_size
from compressknow.base.reading import group_by
from compressknow.model.structure import LANGUAGE
from compressknow.pages import parts
from compressknow.pages.drawing import INK, MUTED, SERIES, draw_labels
from compressknow.pages.pages import render_html, render_markdown, write_files
from compressknow.pages.svg import Grid, draw_heat_map, find_bounds, shorten_names
from compressknow.study.allocation import (
    NONE,
    OptionTable,
    TypeOption,
    allocate_from,
    group_fused,
    join_options,
    split_by_type,
)
from compressknow.study.sensitivity import Guide, Sensitivity, TensorSensitivity, name_guide, warn_of_few_facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


FORMATS = (".html", ".md", ".json", ".csv")
COLUMNS = "name group stack layer module rows columns type bytes kl_facts kl_text at_risk".split()
BUDGETS = 20  # sizes on the curve, in equal ratios from the smallest to the largest
# llama.cpp's fallbacks for rows that a type does not fit; that of q5_k is not among our candidates.
_FALLBACKS = {"q6_k": "q8_0", "q4_k": "q5_0", "q3_k": "iq4_nl", "q2_k": "iq4_nl"}

Weights = Sequence[TensorSensitivity]


@dataclass(frozen=True)
class Map:
    """Sensitivity of a model by layer, module and domain; `guide` decides the ranking of weights and the types."""

    model: str
    sensitivity: Sensitivity
    guide: Guide

    @cached_property
    def ranked(self) -> list[TensorSensitivity]:
        """Return the weights by KL per MB that 4 bits save, largest first."""
        return self.sensitivity.ranked(self.guide)

    @cached_property
    def _placed(self) -> list[TensorSensitivity]:
        """Return the weights in order of place: encoder, decoder, outside. (The last layer was measured first.)"""
        first = ("encoder", None)
        return sorted(self.sensitivity.rows, key=lambda r: (r.layer is None, r.stack not in first, r.layer or 0))

    def by_layer(self) -> Mapping[str, Weights]:
        """Return the weights of each layer, and of each group outside the layers."""
        return group_by(self._placed, lambda row: row.place)

    def by_module(self) -> Mapping[str, Weights]:
        """Return the weights of each kind of module."""
        return group_by(self._placed, lambda row: row.group if row.layer is None else row.module)

    def grid(self, figure: Callable[[Weights], float | None]) -> Grid:
        """Return a figure for each layer and module; a weight outside the layers has its own row."""
        modules = [*dict.fromkeys(row.module for row in self._placed if row.layer is not None)]
        cells: list[tuple[float | None, ...]] = []
        for rows in self.by_layer().values():
            if rows[0].layer is None:
                cells.append((figure(rows),))
                continue
            by_module = [[row for row in rows if row.module == module] for module in modules]
            cells.append(tuple(figure(weights) if weights else None for weights in by_module))
        names = tuple(clean(name, 40) for name in shorten_names(tuple(modules))) or ("",)
        return Grid(tuple(self.by_layer()), names, tuple(cells))

    @cached_property
    def usual(self) -> Mapping[str, float]:
        """Return the KL of each domain's facts relative to the mean over all facts, for all weights together."""
        losses = [(row.by_domain, row.by_type[row.compared].kl("facts")) for row in self._placed if row.by_domain]
        total = sum(kl for _, kl in losses)
        domains = dict.fromkeys(domain for by_domain, _ in losses for domain in by_domain)
        sums = {name: sum(by_domain.get(name, 0.0) * kl for by_domain, kl in losses) for name in domains}
        return {name: loss / total for name, loss in sums.items() if loss}

    @cached_property
    def _chosen(self) -> Weights:
        """Return the weights that have a type in a file: in a checkpoint, as in a search, only those of the blocks."""
        if self.sensitivity.guidance.form == "gguf":
            return self.sensitivity.rows
        return [row for row in self.sensitivity.rows if row.group in LANGUAGE and row.layer is not None]

    @property
    def bits(self) -> int:
        """Return the bits of each value of weights that are not rounded."""
        return self.ranked[0].bits

    @property
    def others(self) -> int:
        """Return the bytes of weights that are never rounded: norms, biases, weights that were not measured."""
        unchosen = sum(row.exact for row in self.sensitivity.rows) - sum(row.exact for row in self._chosen)
        return self.bits // 8 * self.sensitivity.others + unchosen

    @cached_property
    def table(self) -> OptionTable:
        """Return the bytes and predicted loss by type of each weight, or of those of a checkpoint that share a type."""
        table = {
            row.name: {name: TypeOption(each.bytes, each.kl(self.guide)) for name, each in row.by_type.items()}
            for row in self._chosen
        }
        if self.sensitivity.guidance.form == "gguf":
            return table
        exact = {row.name: TypeOption(row.exact, 0.0) for row in self._chosen}
        by_module = {name.removesuffix(".weight"): {NONE: exact[name], **options} for name, options in table.items()}
        return join_options(by_module, group_fused(by_module))

    @cached_property
    def _tables(self) -> list[OptionTable]:
        """Return the tables from one of which types are chosen."""
        guidance = self.sensitivity.guidance
        return split_by_type(self.table, guidance.types) if guidance.has_one_type else [self.table]

    @cached_property
    def frontier(self) -> tuple[TypeOption, ...]:
        """Return the minimum total KL at sizes from the smallest to the largest, with a type chosen for each weight."""
        low = self.others + min(
            sum(min(option.nbytes for option in options.values()) for options in table.values())
            for table in self._tables
        )
        high = self.others + sum(
            max(option.nbytes for kind, option in options.items() if kind != NONE or len(options) == 1)
            for options in self.table.values()
        )
        budgets = {round(low * (high / low) ** (step / (BUDGETS - 1))) for step in range(BUDGETS)}
        return tuple(sorted({self.at(budget) for budget in budgets}))

    @cached_property
    def uniform(self) -> dict[str, TypeOption]:
        """Return bytes and KL by type of all weights, largest first, if all rows fit it or llama.cpp's fallback."""
        sizes = {}
        for type in self.sensitivity.guidance.types:
            chosen = [options.get(type) or options.get(_FALLBACKS.get(type, type)) for options in self.table.values()]
            fitting = [option for option in chosen if option is not None]
            if len(fitting) == len(chosen):
                nbytes = self.others + sum(option.nbytes for option in fitting)
                sizes[type] = TypeOption(nbytes, sum(option.loss for option in fitting))
        return sizes

    def at(self, nbytes: int) -> TypeOption:
        """Return the minimum KL within `nbytes`."""
        least = allocate_from(self._tables, nbytes, overhead=self.others)
        return TypeOption(least.nbytes, least.loss)


def compute_kl_per_mb(rows: Weights, guide: Guide, domain: str | None = None) -> float:
    """Return the KL, over all facts or those of a domain, per MB that rounding some weights to 4 bits saves."""
    times = [1.0 if domain is None else row.by_domain.get(domain, 1.0) for row in rows]
    kl = sum(row.by_type[row.compared].kl(guide) * each for row, each in zip(rows, times, strict=True))
    return kl / sum(row.saved for row in rows) * 1e6


def compute_risk(rows: Weights) -> float | None:
    """Return the share of facts that the model may forget if weights are rounded to 4 bits; None if none guided."""
    shares = [row.by_type[row.compared].at_risk for row in rows]
    return None if None in shares else min(1.0, sum(share for share in shares if share is not None))


def format_millinats(kl: float) -> str:
    """Format a KL in thousandths of a nat, to two digits.

    >>> format_millinats(0.16433), format_millinats(0.05582), format_millinats(0.0000123), format_millinats(0.0)
    ('164', '56', '0.012', '0')
    >>> format_millinats(0.0996)
    '100'
    """
    value = 1000 * kl
    # Rounded to two digits, 99.5 would be 1e+02.
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}"


def _format_kl(kl: float) -> str:
    """Format a KL in nats with three decimals, or three significant digits if it is small.

    >>> [_format_kl(kl) for kl in (1.7551, 0.1401, 0.000746, 0.0)]
    ['1.755', '0.140', '0.000746', '0']
    """
    return number(kl, max(3, 2 - floor(log10(kl)))) if kl else "0"


def _format_risk(risk: float) -> str:
    """Format a share in percent, to two digits: risks, and the figures at which shades change, may all be below 0.1 %,
    and the legend of a narrow map has room for seven letters.

    >>> [_format_risk(risk) for risk in (0.0000123, 0.00000123, 0.0152, 0.995, 1.0, 0.0)]
    ['0.0012', '1.2e-04', '1.5', '100', '100', '0']
    """
    percent = 100 * risk
    if 0 < percent < 0.001:
        return f"{percent:.1e}"
    return f"{percent:.2g}" if percent < 99.5 else "100"


def write_map(map: Map, files: Sequence[Path], *, overwrite: bool) -> None:
    """Write the map in the formats of the files' suffixes."""
    texts = {
        ".html": lambda: render_html(build_page(map, charts=True)),
        ".md": lambda: render_markdown(build_page(map, charts=False)),
        ".csv": lambda: _to_csv(map),
        ".json": lambda: map_to_json(map),
    }
    write_files(texts, files, overwrite=overwrite)


def map_to_json(map: Map) -> str:
    """Return all figures of the map as JSON."""
    sensitivity = map.sensitivity.as_json()
    values = {
        **{"schema": sensitivity["schema"], "verdict": write_verdict(map), "model": map.model, "guide": map.guide},
        **sensitivity,
        "frontier": [{"bytes": nbytes, "kl": kl} for nbytes, kl in map.frontier],
        "uniform": [{"type": type, "bytes": nbytes, "kl": kl} for type, (nbytes, kl) in map.uniform.items()],
        "versions": {"compressknow": __version__},
    }
    return json.dumps(values, indent=1) + "\n"


def _to_csv(map: Map) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in map.sensitivity.rows:
        place = row.name, row.group, row.stack, row.layer, row.module, *row.shape
        for name, each in row.by_type.items():
            writer.writerow((*place, name, each.bytes, each.facts, each.text, each.at_risk))
    return text.getvalue()


# Weights in each of the two tables of extremes.
SHOWN = 10
_UNIT = "thousandths of a nat per MB"
_MAP_NOTE = (
    "The KL divergence that rounding a weight to 4 bits adds per MB saved, in thousandths of a nat, from faint to full "
    "colour in equal ratios. All maps share one scale. The figures under a map are those at which the shades change."
)
_RISK_NOTE = (
    "The share of the known facts, in percent, that the model is expected to answer wrong if only this weight is "
    "rounded."
)
_DOMAIN_NOTE = (
    " The domain is the one that a weight affects most compared with other weights: x 2 means that, relative to all "
    "facts, it changes those of the domain twice as much as all weights do on average."
)
_CURVE_NOTE = (
    "The line is the smallest predicted loss at each size, with a type chosen for each weight; at a mark, all weights "
    "have one type. Sizes are those of the weights: a file also has its vocabulary and metadata."
)


def build_page(map: Map, *, charts: bool) -> parts.Page:
    """Return the map as a page, with or without charts."""
    sections: Mapping[tuple[str, str], Iterable[parts.Part]] = {
        ("maps", "Where the knowledge sits"): _build_maps(map),
        ("risk", "Facts at risk"): _build_risk(map),
        ("weights", "The most and the least sensitive"): _list_extremes(map),
        ("layers", "Layers and modules"): [
            _tabulate_sums(map, "Modules, over all layers", "Module", map.by_module()),
            parts.Folded("By layer", (_tabulate_sums(map, "Layers, over all their modules", "Layer", map.by_layer()),)),
        ],
        ("sizes", "What the next MB buys"): _plot_sizes(map),
        ("method", "Method and limits"): [parts.Sentences(_describe_method(map))],
        ("run", "The run"): parts.show_run(None, {"compressknow": __version__}, tuple(_list_run(map))),
    }
    looks = {"method": "text", "run": "text"}
    shown = (
        parts.PageSection(id, title, tuple(parts.draw_charts(section, id, charts)), look=looks.get(id, "wide"))
        for (id, title), section in sections.items()
    )
    return parts.Page(
        what="map",
        models=clean(map.model, 80),
        headline=write_headline(map),
        verdict=write_verdict(map),
        warnings=tuple(warn_of_few_facts(map.sensitivity.guidance)),
        sections=tuple(section for section in shown if section.parts),
    )


def write_headline(map: Map) -> str:
    """Return the headline of the page."""
    first = name_weight(map.ranked[0])
    return f"{first[0].upper()}{first[1:]} matters most for its size"


def write_verdict(map: Map) -> str:
    """Return which weights and layers matter most, in figures."""
    first, figures = map.ranked[0], [row.per_mb(map.guide) for row in map.ranked]
    middle = median(figures)
    times = f", {number(figures[0] / middle, 0)} times the median weight" if middle else ""
    layers = {name: compute_kl_per_mb(rows, map.guide) for name, rows in map.by_layer().items()}
    most, least = max(layers, key=layers.__getitem__), min(layers, key=layers.__getitem__)
    return (
        f"Rounding it to {first.compared} costs a KL of {format_millinats(figures[0])} {_UNIT} saved{times}. The tenth "
        f"of the bytes that matters most causes {share(_share_of_top_tenth(map))} of the loss. For its size, {most} "
        f"matters most of all layers, and {least} least."
    )


def _share_of_top_tenth(map: Map) -> float:
    """Return the share of the loss at 4 bits that the most sensitive tenth of the bytes causes."""
    saved = [0, *accumulate(row.saved for row in map.ranked)]
    losses = [0.0, *accumulate(row.by_type[row.compared].kl(map.guide) for row in map.ranked)]
    return float(np.interp(saved[-1] / 10, saved, losses)) / losses[-1] if losses[-1] else 0.0


def name_weight(row: TensorSensitivity) -> str:
    """Return the layer and module of a weight."""
    return f"{row.place} {clean(row.module, 60)}"


def _build_maps(map: Map) -> Iterator[parts.Part]:
    grids = dict(_list_grids(map))
    figures = [figure for grid in grids.values() for figure in grid.figures]
    if not figures:
        return
    bounds = find_bounds(figures)
    draw = partial(draw_heat_map, broad=False, bounds=bounds, write=format_millinats)
    svgs = {name: draw(grid, f"KL per MB saved: {name}", f"map-{i}") for i, (name, grid) in enumerate(grids.items())}
    yield parts.Charts(tuple(parts.Drawn(svg, title=name) for name, svg in svgs.items() if svg))
    yield parts.Note("", drawn=_MAP_NOTE)
    tables = tuple(
        _tabulate_grid(f"KL of {name[0].lower()}{name[1:]} by layer and module, {_UNIT} saved", grid, format_millinats)
        for name, grid in grids.items()
    )
    yield parts.Folded("The first map as a table", tables[:1])
    if tables[1:]:
        yield parts.Folded("The other maps as tables", tables[1:], in_text=False)


def _list_grids(map: Map) -> Iterator[tuple[str, Grid]]:
    """Yield the map of all facts, of text, and of each domain's facts, the largest first."""
    guidance = map.sensitivity.guidance
    if guidance.facts:
        yield f"All {count(guidance.facts)} facts", map.grid(partial(compute_kl_per_mb, guide="facts"))
    if guidance.tokens:
        yield "Text", map.grid(partial(compute_kl_per_mb, guide="text"))
    for domain, known in sorted(map.sensitivity.domains.items(), key=lambda each: (-each[1], each[0])):
        name, figure = clean(domain, 40), partial(compute_kl_per_mb, guide="facts", domain=domain)
        yield f"{name[:1].upper()}{name[1:]}: {count(known)} facts", map.grid(figure)


def _build_risk(map: Map) -> Iterator[parts.Part]:
    if not map.sensitivity.guidance.facts:
        return
    grid = map.grid(compute_risk)
    title = "Facts at risk by layer and module, in percent"
    svg = draw_heat_map(grid, title, "risk-map", False, write=_format_risk)
    if svg is None:
        sure = "the model is so sure of what it knows that no single weight rounded to 4 bits changes an answer"
        yield parts.Text(f"None: {sure}.")
        return
    yield parts.Charts((parts.Drawn(svg),))
    yield parts.Note("", drawn=_RISK_NOTE)
    table = _tabulate_grid(f"{title}, if only that weight is rounded to 4 bits", grid, _format_risk)
    yield parts.Folded("The map as a table", (table,))


def _tabulate_grid(caption: str, grid: Grid, write: Callable[[float], str]) -> parts.Table:
    """Return the map as a table; rows of one figure have it in a separate column."""
    has_outside = any(len(cells) != len(grid.columns) for cells in grid.cells)
    columns = (*grid.columns, *(["outside"] if has_outside else []))
    rows = []
    for name, cells in zip(grid.rows, grid.cells, strict=True):
        texts = ["" if cell is None else write(cell) for cell in cells]
        room = [""] * (len(columns) - len(texts))
        rows.append((name, *texts, *room) if len(cells) == len(grid.columns) else (name, *room, *texts))
    return parts.Table(caption, ("Layer", *columns), tuple(rows))


def _list_extremes(map: Map) -> Iterator[parts.Part]:
    shown = min(SHOWN, -(-len(map.ranked) // 2))
    most, least = map.ranked[:shown], map.ranked[shown:][-shown:][::-1]
    yield _tabulate_weights(f"The {count(shown)} most sensitive weights, by {name_guide(map.guide)}", most, map)
    if least:
        yield _tabulate_weights(f"The {count(len(least))} least sensitive weights", least, map)
    rounding = f"rounding from {map.bits} to 4 bits"
    yield parts.Note(f"KL in {_UNIT} that {rounding} saves.{_DOMAIN_NOTE if map.usual else ''}")


def _tabulate_weights(caption: str, weights: Weights, map: Map) -> parts.Table:
    rows = []
    for weight in weights:
        kind = weight.by_type[weight.compared]
        times = {name: each / map.usual[name] for name, each in weight.by_domain.items() if name in map.usual}
        domain = max(times, key=times.__getitem__, default=None)
        mostly = f"{clean(domain, 40)} (x {times[domain]:.1f})" if domain else "-"
        kl, stored = format_millinats(weight.per_mb(map.guide)), f"{write_size(kind.bytes)} {weight.compared}"
        rows.append((name_weight(weight), kl, share(kind.at_risk), stored, mostly))
    columns = ("Weight", "KL per MB saved", "Facts at risk", "Size at 4 bits", "Affects most")
    return parts.Table(caption, columns, tuple(rows))


def _tabulate_sums(map: Map, caption: str, kind: str, groups: Mapping[str, Weights]) -> parts.Table:
    saved = sum(row.saved for row in map.sensitivity.rows)
    rows = []
    for name, weights in groups.items():
        kl, part = format_millinats(compute_kl_per_mb(weights, map.guide)), sum(row.saved for row in weights) / saved
        rows.append((clean(name, 60), kl, share(compute_risk(weights)), share(part)))
    columns = (kind, "KL per MB saved", "Facts at risk", "Share of the bytes")
    return parts.Table(caption, columns, tuple(rows), sortable=len(rows) > 1)


def _plot_sizes(map: Map) -> Iterator[parts.Part]:
    uniform = map.uniform.items()
    sizes = tuple(
        (type, write_size(size), _format_kl(kl), _format_kl(map.at(size).loss)) for type, (size, kl) in uniform
    )
    columns = ("All weights of one type", "Size of the weights", "Predicted KL", "A type for each")
    ends = " to ".join(
        f"{_format_kl(kl)} at {write_size(nbytes)}" for nbytes, kl in (map.frontier[0], map.frontier[-1])
    )
    text = f"From {ends}. The table next to the chart has the sizes of single types."
    curve = parts.Chart("Predicted KL by size", text, partial(_draw_curve, map=map), height=260)
    yield parts.Beside(curve, parts.Table("Predicted loss of one type for all, and of a type for each", columns, sizes))
    yield parts.Note("", drawn=_CURVE_NOTE)
    # Sizes of a small model are less than 1 MB apart, and at the end there may be less to save.
    along, losses = zip(*map.frontier, strict=True)
    saved = [kl - float(np.interp(nbytes + 1e6, along, losses)) for nbytes, kl in map.frontier]
    buys = [*(format_millinats(kl) for kl in saved[:-1]), "-"]
    rows = tuple(
        (write_size(nbytes), _format_kl(kl), buy) for (nbytes, kl), buy in zip(map.frontier, buys, strict=True)
    )
    heads = ("Size of the weights", "Predicted KL", f"The next MB saves, {_UNIT.removesuffix(' per MB')}")
    yield parts.Folded("The line as a table", (parts.Table("The smallest predicted loss by size", heads, rows),))


def _draw_curve(plot: Axes, *, map: Map) -> None:
    line = [(nbytes / 1e6, kl) for nbytes, kl in map.frontier if kl > 0]
    marks = [(nbytes / 1e6, kl, type) for type, (nbytes, kl) in map.uniform.items() if kl > 0]
    plot.plot(*zip(*line, strict=True), color=SERIES[0], linewidth=1.8)
    for x, y, _ in marks:
        plot.plot([x], [y], "o", color=INK, markersize=5)
    plot.set_yscale("log")
    plot.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    plot.minorticks_off()
    plot.grid(axis="y")
    plot.set_xlabel("size of the weights, MB", fontsize=11, loc="left", color=MUTED)
    plot.set_title("predicted KL, nats", fontsize=11, loc="left", color=MUTED)
    draw_labels(plot, marks)


def _describe_method(map: Map) -> tuple[str, ...]:
    guidance = map.sensitivity.guidance
    facts = (
        f"{count(guidance.facts)} facts that the model knows, evenly over relations, and the five best candidates of "
        "each, or the five most likely first tokens if any answer is allowed: KL is that of the distribution over "
        "them, averaged over facts, to second order in the changes of their log-probabilities.",
        "The risk of a fact is the probability that its object falls below the best other candidate, if the change of "
        "their margin is normal with the measured mean square. A domain has a map if 5 or more of its facts are known.",
    )
    text = (
        f"{count(guidance.tokens)} tokens of text: KL is that of the next token's distribution, averaged over "
        "tokens, without the tenth of the pieces of text that a weight changes most.",
    )
    fallbacks = (
        "All weights of one type means what llama-quantize --pure writes, with llama.cpp's fallbacks if a row does not "
        "fit the type (q5_0 for q4_k, q8_0 for q6_k, iq4_nl for q3_k and q2_k). Mixtures such as q4_k_m differ.",
    )
    one_type = (
        ", and all others have one type, because transformers loads no two schemes in a model of this family"
        if guidance.has_one_type
        else ""
    )
    checkpoint = (
        "Sizes are those of checkpoints as search makes them: weights outside the blocks stay as they are, counted "
        f"with {map.bits} bits each, and others may; those that vLLM joins (q, k and v; gate and up) have the same type"
        f"{one_type}.",
    )
    compared = " or ".join(sorted({row.compared for row in map.sensitivity.rows}))
    rounded, both = [row.by_type[row.compared] for row in map.ranked], []
    if map.guide == "both" and (total := sum(each.kl("both") for each in rounded)):
        of_facts = share(sum(each.kl("facts") for each in rounded) / total)
        both = [
            "Weights are ranked by the KL of facts plus that of text. Of the sum over all weights in "
            f"{compared}, facts are {of_facts}."
        ]
    return (
        "Estimates to first order in the weights, from one forward and one backward pass: the change of a score is its "
        "gradient times the error of rounding. Figures of single weights add up to those of many. Large changes are "
        "underestimated.",
        *(facts if guidance.facts else ()),
        *(text if guidance.tokens else ()),
        f"Weights are compared by rounding them to {compared}, and by the bytes that this saves against {map.bits} "
        "bits. Other types are predicted from their squared errors.",
        *both,
        *(fallbacks if guidance.form == "gguf" else checkpoint),
    )


def _list_run(map: Map) -> Iterator[parts.Entry]:
    guidance = map.sensitivity.guidance
    hashes = {"Fingerprint": map.sensitivity.sha256, "Facts": guidance.fingerprint, "Text": guidance.text}
    yield parts.make_name_entry("Model", map.model, None)
    for label, sha256 in hashes.items():
        if sha256:
            yield parts.make_hash_entry(sha256, label)
    yield parts.Entry("Ranked by", name_guide(map.guide))
