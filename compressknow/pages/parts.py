"""Parts that a section of a page is made of, tables among them.

A section says what it has to say in these. The templates have one piece for each kind, in HTML and in Markdown, which
escapes all text: nothing of a section is HTML, but for a chart, and that is drawn by `pages.drawing` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from markupsafe import Markup

from compressknow.base.format import NONE, count, millions, p_value, percent, plain, share, size, smaller
from compressknow.comparison.records import Estimate, Group, ProbeFigures
from compressknow.pages.drawing import Chart as Chart
from compressknow.pages.records import Card, ModelFacts, write_estimate

_GROUP_COLUMNS = ("Facts", "Known before", "Lost", "Gained", "Kept", "Answer changed", "p (Holm)")


@dataclass(frozen=True, slots=True)
class Table:
    """Table of cells as text, one tuple per row; the first cell is the header of its row.

    Attributes
    ----------
    bars : a figure a row that HTML draws as a bar, after the column `bars_after`; empty for none.
    links : the id that each row's header leads to; empty for none.
    prose : all cells are text, not figures.
    pinned : so many rows stay on top however the others are sorted.
    sortable : a click on a column's header sorts by it.
    captioned : Markdown says the caption too; not where the section's title says it.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bars: tuple[Estimate | None, ...] = ()
    bars_after: int = 0
    links: tuple[str, ...] = ()
    prose: bool = False
    pinned: int = 0
    sortable: bool = False
    captioned: bool = True


_SHORT = 12  # hexadecimal digits that tell any two checkpoints apart


@dataclass(frozen=True, slots=True)
class Entry:
    """Labelled value; `full` is what a shortened value stands for, `code` that it is to be copied as it is."""

    label: str
    value: str
    code: bool = False
    full: str = ""


def list_identity(model: ModelFacts) -> tuple[Entry, ...]:
    """Return which checkpoint this is, where it came from and what was done to it."""
    return tuple(_identify(model))


def _identify(model: ModelFacts) -> Iterator[Entry]:
    yield Entry("Name", _write_name(model.name, model.revision), code=True)
    yield Entry("SHA-256", plain(model.sha256, 80)[:_SHORT], code=True, full=plain(model.sha256, 80))
    if source := model.source:
        yield Entry("Made from", _write_name(source.get("name", ""), source.get("revision")), code=True)
    if model.setup:
        yield Entry("Setup", plain(model.setup, 80))
    if model.quantization:
        yield Entry("Quantization", plain(model.quantization, 200))
    yield from _list_runtime(model.runtime or {})
    yield Entry("Kind", f"{plain(model.architecture, 80)}, {plain(model.family, 40)}, {plain(model.dtype, 40)}")
    zeros = ""
    if model.zeros is not None and model.parameters is not None:
        zeros = f", {percent(model.zeros, model.parameters)} of them zero"
    yield Entry("Parameters", f"{millions(model.parameters)}{zeros}")


def _list_runtime(runtime: Mapping[str, Any]) -> Iterator[Entry]:
    """Yield what ran it, where that was not transformers, and how it stores each group of layers."""
    if runtime:
        yield Entry("Runtime", plain(" ".join(filter(None, (runtime["name"], runtime.get("build")))), 80))
    if types := runtime.get("types"):
        stored = "; ".join(f"{group} {_write_shares(kinds)}" for group, kinds in types.items())
        yield Entry("Stored as", plain(stored, 400))


def _write_shares(kinds: Mapping[str, int]) -> str:
    """Write types with their shares of the parameters, where there are several.

    >>> _write_shares({"Q4_K": 3, "F32": 1}), _write_shares({"Q6_K": 5})
    ('Q4_K 75.0 %, F32 25.0 %', 'Q6_K')
    """
    if len(kinds) == 1:
        return next(iter(kinds))
    total = sum(kinds.values())
    return ", ".join(f"{kind} {percent(number, total)}" for kind, number in kinds.items())


def _write_name(name: object, revision: object) -> str:
    return plain(name, 120) + (f"@{plain(revision, 60)}" if revision else "")


def list_run(card: Card) -> tuple[Entry, ...]:
    """Return how the card was made, for making it again."""
    seeds = sorted({probe.seed for c in card.comparisons for probe in c.probes})
    versions = ", ".join(f"{plain(name, 40)} {plain(version, 40)}" for name, version in card.versions.items())
    return (Entry("Seed", ", ".join(map(str, seeds)) or NONE), Entry("Versions", versions or NONE))


def list_hashes(card: Card) -> tuple[Entry, ...]:
    """Return the SHA-256 of every model, in full."""
    models = (card.original, *(comparison.model for comparison in card.comparisons))
    return tuple(Entry(plain(model.name, 60), plain(model.sha256, 80), code=True) for model in models)


def get_headline_accuracy(probe: ProbeFigures) -> tuple[Estimate, Estimate]:
    """Return the accuracy of the original and of the compressed model, averaged as the probe's protocol does."""
    if probe.average == "macro":
        return probe.macro_original, probe.macro_compressed
    return probe.accuracy_original, probe.accuracy_compressed


def make_groups_table(groups: tuple[Group, ...], kind: str, caption: str, *, bars: bool = True) -> Table:
    """Return a table with one row per group; `kind` is what a group is of."""
    return Table(
        caption,
        (kind, *_GROUP_COLUMNS),
        tuple(_make_group_row(group) for group in groups),
        bars=tuple(group.kept for group in groups) if bars else (),
        bars_after=5,
        sortable=len(groups) > 1,
    )


def _make_group_row(group: Group) -> tuple[str, ...]:
    counts = group.counts
    return (
        plain(group.name, 80),
        count(counts.n),
        count(counts.known_before),
        count(counts.lost),
        count(counts.gained),
        write_estimate(group.kept),
        share(group.answer_changed),
        p_value(group.p_holm).removeprefix("p = ").removeprefix("p "),
    )


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraph."""

    kind: ClassVar[str] = "text"
    sentence: str


@dataclass(frozen=True, slots=True)
class Note:
    """Note on what stands above, in small print; `drawn` is on what HTML alone draws."""

    kind: ClassVar[str] = "note"
    sentence: str
    drawn: str = ""


@dataclass(frozen=True, slots=True)
class Sentences:
    """Sentences: a paragraph each or, `joined`, one paragraph in HTML; a list in Markdown."""

    kind: ClassVar[str] = "sentences"
    sentences: tuple[str, ...]
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Entries:
    """Labelled values."""

    kind: ClassVar[str] = "entries"
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Code:
    """Text to be copied as it is; nothing where there is none."""

    kind: ClassVar[str] = "code"
    text: str | None
    language: str
    look: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """Names, the key of each where it has one, and what is said of them."""

    kind: ClassVar[str] = "terms"
    terms: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """Claim about models, whether it holds, and why; `look` is the answer as a class of the style sheet."""

    id: str
    claim: str
    families: str
    answer: str
    look: str
    statistic: str
    why: str
    per_million: str


@dataclass(frozen=True, slots=True)
class Claims:
    """Claims, each with its answer."""

    kind: ClassVar[str] = "claims"
    caption: str
    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """Claim, whether it holds, and the numbers, in a line; `id` is that of the `Claim` with more on it."""

    id: str
    claim: str
    answer: str
    look: str
    numbers: str


@dataclass(frozen=True, slots=True)
class Findings:
    """Findings, and the chart that shows them beside them where there is room."""

    kind: ClassVar[str] = "findings"
    findings: tuple[Finding, ...]
    chart: Drawn | None = None


@dataclass(frozen=True, slots=True)
class Remarks:
    """Sentences under a title: folded in HTML, a list in Markdown."""

    kind: ClassVar[str] = "remarks"
    title: str
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts and what models answered: text throughout, one fact a row, `shade` the style of its last answer.

    The last column is small in HTML, under the first.
    """

    kind: ClassVar[str] = "facts"
    table: Table
    shade: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Number of those of the above that only the JSON has; nothing where there are none."""

    kind: ClassVar[str] = "left-out"
    number: int
    page: str = "report"
    file: str = "report.json"


@dataclass(frozen=True, slots=True)
class Drawn:
    """Chart as SVG, made by `pages.drawing`; Markdown leaves it out.

    Attributes
    ----------
    title : stands above it; `note` below it.
    look : a class of the style sheet.
    """

    kind: ClassVar[str] = "drawn"
    svg: Markup
    title: str = ""
    note: str = ""
    look: str = ""


@dataclass(frozen=True, slots=True)
class Charts:
    """Charts side by side where there is room, under one title where they have one; Markdown leaves them out."""

    kind: ClassVar[str] = "charts"
    charts: tuple[Drawn | Chart, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Beside:
    """Chart, and the table of its figures beside it where there is room."""

    kind: ClassVar[str] = "beside"
    chart: Chart | Drawn | None
    table: Table


@dataclass(frozen=True, slots=True)
class Folded:
    """Parts under a title, unfolded by a click; Markdown shows them all without the title, if `in_text`."""

    kind: ClassVar[str] = "folded"
    title: str
    parts: tuple[Part, ...]
    in_text: bool = True


Part = (
    Table
    | Text
    | Note
    | Sentences
    | Remarks
    | Entries
    | Code
    | Terms
    | Claims
    | Findings
    | Facts
    | LeftOut
    | Chart
    | Drawn
    | Charts
    | Beside
    | Folded
)


@dataclass(frozen=True, slots=True)
class Shown:
    """Section as it stands on a page.

    Attributes
    ----------
    id : its own on the page.
    look : a class of the style sheet.
    short : its name in the table of contents, where that is not the title.
    """

    id: str
    title: str
    parts: tuple[Part, ...]
    look: str = ""
    short: str = ""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes before and after, and each as a share of the larger of the two."""

    before: str
    after: str
    change: str
    share: float
    share_before: float


def compare_sizes(before: int | None, after: int | None) -> Size:
    """Return the sizes as text, and as shares for bars."""
    largest = max(after or 0, before or 0, 1)
    return Size(size(before), size(after), smaller(before, after), (after or 0) / largest, (before or 0) / largest)


@dataclass(frozen=True, slots=True)
class Page:
    """Page of sections, one below the other.

    Attributes
    ----------
    kind : what the page is: ``study``, ``search``.
    models : which models it is about.
    unlisted : so many sections stand before the table of contents, which does not list them.
    """

    kind: str
    title: str
    models: str
    headline: str
    verdict: str
    warnings: tuple[str, ...]
    sections: tuple[Shown, ...]
    unlisted: int

    @property
    def contents(self) -> tuple[tuple[str, str], ...]:
        """Return id and name of the sections listed."""
        return tuple((section.id, section.short or section.title) for section in self.sections[self.unlisted :])


def draw_charts(parts: Iterable[Part], id: str, charts: bool) -> Iterator[Part]:
    """Yield the parts with their charts drawn and ids given; without charts and bars in tables where not `charts`."""
    for number, part in enumerate(parts, start=1):
        if isinstance(part, Chart):
            if charts:
                yield _draw(part, f"{id}-{number}")
        elif isinstance(part, Charts):
            if charts:
                titled = (_draw_titled(each, f"{id}-{number}-{i}") for i, each in enumerate(part.charts, start=1))
                yield replace(part, charts=tuple(titled))
        elif isinstance(part, Beside):
            chart = _draw(part.chart, f"{id}-{number}") if charts and isinstance(part.chart, Chart) else None
            yield replace(part, chart=chart, table=_drop_bars(part.table, charts))
        elif isinstance(part, Folded):
            yield replace(part, parts=tuple(draw_charts(part.parts, f"{id}-{number}", charts)))
        else:
            yield _drop_bars(part, charts) if isinstance(part, Table) else part


def _draw(chart: Chart, id: str) -> Drawn:
    return Drawn(Markup(chart.svg(id)))


def _draw_titled(chart: Chart | Drawn, id: str) -> Drawn:
    return Drawn(Markup(chart.svg(id)), title=chart.heading) if isinstance(chart, Chart) else chart


def _drop_bars(table: Table, bars: bool) -> Table:
    return table if bars else replace(table, bars=())


BLANK = "[MASK]"
BAR = "The bar shows the share kept, and the line on it the 95 % interval."
# What stands in their place where no text of a fact may be shown.
NO_FACTS = Text("The text of the facts was left out on request.")


def make_fact_parts(
    caption: str,
    columns: tuple[str, ...],
    rows: tuple[tuple[str, ...], ...],
    shown: int,
    *,
    left_out: int,
    shade: str = "",
    of: tuple[str, str] = ("report", "report.json"),
) -> Iterator[Part]:
    """Yield facts as parts of a section, `shown` of them at once.

    Parameters
    ----------
    left_out : how many more there are than `rows`; `of` is which page this is, and which file has them all.
    """
    if not rows:
        yield Text("None.")
        return
    yield Facts(Table(caption, columns, rows[:shown], prose=True), shade)
    if rest := rows[shown:]:
        yield Folded(
            f"{count(len(rest))} more", (Facts(Table(f"{caption}, continued", columns, rest, prose=True), shade),)
        )
    yield LeftOut(left_out, *of)
