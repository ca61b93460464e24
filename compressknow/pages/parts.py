"""The kinds of things that a section of a page is made of.

A section says what it has to say in these. The templates have one piece for each kind, in HTML and in Markdown, which
escapes all text: nothing of a section is HTML, but for a chart, and that is drawn by `report.drawing` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from markupsafe import Markup

from compressknow.format import count
from compressknow.pages.drawing import Chart
from compressknow.pages.tables import Entry, Table

__all__ = [
    "BAR",
    "BLANK",
    "NO_FACTS",
    "Beside",
    "Chart",
    "Charts",
    "Claim",
    "Claims",
    "Code",
    "Drawn",
    "Entries",
    "Facts",
    "Finding",
    "Findings",
    "Folded",
    "LeftOut",
    "Note",
    "Page",
    "Part",
    "Remarks",
    "Sentences",
    "Shown",
    "Table",
    "Terms",
    "Text",
    "drawn",
    "fact_parts",
]


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    sentence: str


@dataclass(frozen=True, slots=True)
class Note:
    """What a reader must know of what stands above, in small print; `drawn` of what HTML alone draws."""

    kind: ClassVar[str] = "note"
    sentence: str
    drawn: str = ""


@dataclass(frozen=True, slots=True)
class Sentences:
    """Several: a paragraph each or, `joined`, one paragraph in HTML; a list in Markdown."""

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
    """What is claimed of whom, whether it holds, and why; `look` is the answer as a class of the style sheet."""

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
    """What is claimed, whether it holds, and the numbers, in a line; `id` is that of the `Claim` with more on it."""

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
    """How many more of the above only the JSON has; nothing where there are none."""

    kind: ClassVar[str] = "left-out"
    number: int
    page: str = "report"
    file: str = "report.json"


@dataclass(frozen=True, slots=True)
class Drawn:
    """A chart as SVG, made by `report.drawing`; Markdown leaves it out.

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
    """A chart, and the table of its figures beside it where there is room."""

    kind: ClassVar[str] = "beside"
    chart: Chart | Drawn | None
    table: Table


@dataclass(frozen=True, slots=True)
class Folded:
    """More under a title, unfolded by a click; Markdown shows it all without the title, if `in_text`."""

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
    """A section as it stands on a page.

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
class Page:
    """A page of sections, one below the other.

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
        """Id and name of the sections listed."""
        return tuple((section.id, section.short or section.title) for section in self.sections[self.unlisted :])


def drawn(parts: Iterable[Part], id: str, charts: bool) -> Iterator[Part]:
    """The parts with their charts drawn and ids given; with neither charts nor bars in tables where not `charts`."""
    for number, part in enumerate(parts, start=1):
        if isinstance(part, Chart):
            if charts:
                yield _draw(part, f"{id}-{number}")
        elif isinstance(part, Charts):
            if charts:
                yield replace(part, charts=tuple(_drawn(c, f"{id}-{number}-{i}") for i, c in enumerate(part.charts, 1)))
        elif isinstance(part, Beside):
            chart = _draw(part.chart, f"{id}-{number}") if charts and isinstance(part.chart, Chart) else None
            yield replace(part, chart=chart, table=_table(part.table, charts))
        elif isinstance(part, Folded):
            yield replace(part, parts=tuple(drawn(part.parts, f"{id}-{number}", charts)))
        else:
            yield _table(part, charts) if isinstance(part, Table) else part


def _drawn(chart: Chart | Drawn, id: str) -> Drawn:
    return replace(_draw(chart, id), title=chart.heading) if isinstance(chart, Chart) else chart


def _draw(chart: Chart, id: str) -> Drawn:
    return Drawn(Markup(chart.svg(id)))


def _table(table: Table, bars: bool) -> Table:
    return table if bars else replace(table, bars=())


BLANK = "[MASK]"
BAR = "The bar shows the share kept, and the line on it the 95 % interval."
# What stands in their place where no text of a fact may be shown.
NO_FACTS = Text("The text of the facts was left out on request.")


def fact_parts(
    caption: str,
    columns: tuple[str, ...],
    rows: tuple[tuple[str, ...], ...],
    shown: int,
    *,
    left_out: int,
    shade: str = "",
    of: tuple[str, str] = ("report", "report.json"),
) -> Iterator[Part]:
    """Facts as parts of a section, `shown` of them at once.

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
