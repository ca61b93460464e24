"""A sensitivity as a map: what each layer and module bears, and what the next MB buys."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from compressknow._version import __version__
from compressknow.format import plain
from compressknow.pages.diff.tables import short_names
from compressknow.pages.heat import Grid
from compressknow.pages.pages import write_formats
from compressknow.study.allocation import Allocation, Option, Table, allocate
from compressknow.study.sensitivity import Guide, Sensitivity, TensorSensitivity

FORMATS = (".html", ".md", ".json", ".csv")
COLUMNS = (
    *("name", "group", "stack", "layer", "module", "rows", "columns", "type", "bytes"),
    *("kl_facts", "kl_text", "at_risk"),
)
# Sizes on the curve, in equal ratios from the smallest to the largest.
BUDGETS = 20
# What llama.cpp gives a weight whose rows a type does not fit; that of q5_k is none of our candidates.
_FALLBACKS = {"q6_k": "q8_0", "q4_k": "q5_0", "q3_k": "iq4_nl", "q2_k": "iq4_nl"}

Weights = Sequence[TensorSensitivity]


class Size(NamedTuple):
    """Bytes of all weights of a model, and the KL that is predicted of it; `type` where all weights are of one."""

    nbytes: int
    kl: float
    type: str = ""


@dataclass(frozen=True)
class Map:
    """The sensitivity of a model, by layer, module and domain.

    Attributes
    ----------
    model : its name.
    guide : what weights are ranked and types chosen by.
    """

    model: str
    sensitivity: Sensitivity
    guide: Guide

    @cached_property
    def ranked(self) -> list[TensorSensitivity]:
        """The weights, those first that bear least for what 4 bits of them save."""
        return self.sensitivity.ranked(self.guide)

    def by_layer(self) -> dict[str, Weights]:
        """The weights of each layer, and of each group outside the layers."""
        return _grouped(sorted(self.sensitivity.rows, key=_order), lambda row: row.place)

    def by_module(self) -> dict[str, Weights]:
        """The weights of each kind of module."""
        return _grouped(
            sorted(self.sensitivity.rows, key=_order), lambda row: row.module if _is_inside(row) else row.group
        )

    def grid(self, figure: Callable[[Weights], float | None]) -> Grid:
        """A figure of the weights of each layer and module; of a weight outside the layers a row of its own."""
        modules = [*dict.fromkeys(row.module for row in sorted(self.sensitivity.rows, key=_order) if _is_inside(row))]
        cells = []
        for rows in self.by_layer().values():
            own = [[row for row in rows if row.module == module] for module in modules]
            inside = _is_inside(rows[0]) and modules
            cells.append(tuple(figure(each) if each else None for each in own) if inside else (figure(rows),))
        names = tuple(plain(name, 40) for name in short_names(tuple(modules))) or ("",)
        return Grid(tuple(self.by_layer()), names, tuple(cells))

    @property
    def others(self) -> int:
        """Bytes of what has 16 bits whatever is chosen: norms, biases, weights that were not measured."""
        return 2 * self.sensitivity.others

    @cached_property
    def table(self) -> Table:
        """What each weight takes and loses by type."""
        return {
            row.name: {name: Option(each.bytes, each.kl(self.guide)) for name, each in row.by_type.items()}
            for row in self.sensitivity.rows
        }

    @cached_property
    def frontier(self) -> tuple[Size, ...]:
        """The least KL at sizes from the smallest to the largest, a type for each weight."""
        low, high = (
            self.others + sum(end(option.nbytes for option in options.values()) for options in self.table.values())
            for end in (min, max)
        )
        budgets = {round(low * (high / low) ** (step / (BUDGETS - 1))) for step in range(BUDGETS)}
        found = {Size(each.nbytes, each.loss) for each in map(self._fitted, sorted(budgets))}
        return tuple(sorted(found))

    @cached_property
    def uniform(self) -> tuple[Size, ...]:
        """All weights of one type each, the largest first: those types that all rows fit, or llama.cpp's fallback of
        them does."""
        found = []
        for type in self.sensitivity.guidance.types:
            kinds = (type, _FALLBACKS.get(type, type))
            chosen = [
                next((options[kind] for kind in kinds if kind in options), None) for options in self.table.values()
            ]
            if all(chosen):
                own = [option for option in chosen if option]
                size = self.others + sum(option.nbytes for option in own)
                found.append(Size(size, sum(option.loss for option in own), type))
        return tuple(found)

    def at(self, nbytes: int) -> Size:
        """The least KL within so many bytes."""
        found = self._fitted(nbytes)
        return Size(found.nbytes, found.loss)

    def _fitted(self, nbytes: int) -> Allocation:
        return allocate(self.table, nbytes, overhead=self.others)


def kl_per_mb(rows: Weights, guide: Guide, domain: str | None = None) -> float:
    """The KL of some weights for each MB that they save, all of them rounded to 4 bits; that of a domain's facts."""
    kl = sum(
        row.by_type[row.compared].kl(guide) * (1.0 if domain is None else row.by_domain.get(domain, 1.0))
        for row in rows
    )
    return kl / sum(row.saved for row in rows) * 1e6


def at_risk(rows: Weights) -> float | None:
    """The share of facts that rounding some weights to 4 bits is expected to make the model forget: the sum, 1 at most.
    None where no facts guided."""
    shares = [row.by_type[row.compared].at_risk for row in rows]
    return None if None in shares else min(1.0, sum(share for share in shares if share is not None))


def millinats(kl: float) -> str:
    """A KL in thousandths of a nat, to two digits.

    >>> millinats(0.16433), millinats(0.05582), millinats(0.0000123), millinats(0.0)
    ('164', '56', '0.012', '0')
    """
    value = 1000 * kl
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _is_inside(row: TensorSensitivity) -> bool:
    return row.layer is not None


def _order(row: TensorSensitivity) -> tuple[bool, str, int]:
    """Encoder, decoder, then what lies outside; measured was from the last layer to the first."""
    return row.layer is None, {"encoder": "", None: ""}.get(row.stack, "decoder"), row.layer or 0


def _grouped(rows: Iterable[TensorSensitivity], key: Callable[[TensorSensitivity], str]) -> dict[str, Weights]:
    found: dict[str, list[TensorSensitivity]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return dict(found)


def write_map(map: Map, files: Sequence[Path], *, overwrite: bool) -> None:
    """Write it in the formats that the names of the files ask for."""
    from compressknow.study.map_page import render_map_html, render_map_markdown

    written: Mapping[str, Callable[[Map], str]] = {
        **{".html": render_map_html, ".md": render_map_markdown},
        **{".csv": _csv, ".json": _json},
    }
    write_formats(lambda path: written[path.suffix.lower()](map), files, overwrite=overwrite)


def _json(map: Map) -> str:
    from compressknow.study.map_page import verdict

    sensitivity = map.sensitivity.as_json()
    values = {
        **{"schema": sensitivity["schema"], "verdict": verdict(map), "model": map.model, "guide": map.guide},
        **sensitivity,
        "frontier": [{"bytes": size.nbytes, "kl": size.kl} for size in map.frontier],
        "uniform": [{"type": size.type, "bytes": size.nbytes, "kl": size.kl} for size in map.uniform],
        "versions": {"compressknow": __version__},
    }
    return json.dumps(values, indent=1) + "\n"


def _csv(map: Map) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_rows(map.sensitivity))
    return text.getvalue()


def _rows(sensitivity: Sensitivity) -> Iterator[tuple[object, ...]]:
    for row in sensitivity.rows:
        place = row.name, row.group, row.stack, row.layer, row.module, *row.shape
        for name, rounding in row.by_type.items():
            yield *place, name, rounding.bytes, rounding.facts, rounding.text, rounding.at_risk
