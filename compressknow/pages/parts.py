"""Parts of a page: sections, and the tables, notes, charts and so on that they show.

The templates render each kind in HTML and Markdown, escaping all text. Nothing in a section is HTML except for a chart,
which only `pages.drawing` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compressknow.base.format import NONE, clean, count, share, write_millions, write_p_value, write_percent
from compressknow.comparison.records import Counts, Estimate, Group, ProbeFigures
from compressknow.evaluate.facts import BLANK
from compressknow.evaluate.records import ModelRecord
from compressknow.pages.drawing import open_axes
from compressknow.pages.records import write_estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROUP_COLUMNS = ("Facts", "Known before", "Lost", "Gained", "Kept", "Answer changed", "p (Holm)")


class Part:
    """What a section can show; the templates have a piece for each kind."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True)
class Table(Part):
    """Table of text cells, one tuple per row; the first cell of a row is its header."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bars: tuple[Estimate | None, ...] = ()  # a figure per row that HTML draws as a bar, after the column `bars_after`
    bars_after: int = 0
    links: tuple[str, ...] = ()  # the id that each row's header links to
    prose: bool = False  # all cells are text, not figures
    pinned: int = 0  # number of rows that stay on top when the others are sorted
    sortable: bool = False  # a click on a column's header sorts the rows
    captioned: bool = True  # whether Markdown shows the caption; not if the section's title says it


@dataclass(frozen=True, slots=True)
class Entry:
    """Labelled value; `full` is the value before shortening, `code` marks a value to copy."""

    label: str
    value: str
    code: bool = False
    full: str = ""


def make_name_entry(label: str, name: object, revision: object) -> Entry:
    """Return the name of a checkpoint, with its revision if it has one."""
    return Entry(label, clean(name, 120) + (f"@{clean(revision, 60)}" if revision else ""), code=True)


def make_hash_entry(sha256: object, label: str = "Fingerprint") -> Entry:
    """Return a hash, shortened to enough digits to distinguish any two."""
    hash = clean(sha256, 80)
    return Entry(label, hash[:12], code=True, full=hash)


def list_origin(model: ModelRecord) -> list[Entry]:
    """Return the checkpoint's name and hash, where it came from and what was done to it."""
    entries = [make_name_entry("Name", model.name, model.revision), make_hash_entry(model.sha256)]
    source = model.source or {}
    if clean(name := source.get("name") or ""):
        entries.append(make_name_entry("Made from", name, source.get("revision")))
    if model.setup:
        entries.append(Entry("Setup", clean(model.setup, 80)))
    if model.quantization:
        entries.append(Entry("Quantization", clean(model.quantization, 200)))
    return entries


def list_identity(model: ModelRecord) -> tuple[Entry, ...]:
    """Return the origin of a model, its runtime, its kind and its size."""
    entries = list_origin(model)
    if runtime := model.runtime:
        entries.append(Entry("Runtime", clean(" ".join(filter(None, (runtime["name"], runtime.get("build")))), 80)))
        if types := runtime.get("types"):
            stored = "; ".join(f"{group} {_write_shares(kinds)}" for group, kinds in types.items())
            entries.append(Entry("Stored as", clean(stored, 400)))
    zeros = ""
    if model.zeros is not None and model.parameters is not None:
        zeros = f", {write_percent(model.zeros, model.parameters)} of them zero"
    kind = f"{clean(model.architecture, 80)}, {clean(model.family, 40)}, {clean(model.dtype, 40)}"
    return (*entries, Entry("Kind", kind), Entry("Parameters", f"{write_millions(model.parameters)}{zeros}"))


def _write_shares(kinds: Mapping[str, int]) -> str:
    """Write types, with their shares of the parameters if there are several.

    >>> _write_shares({"Q4_K": 3, "F32": 1}), _write_shares({"Q6_K": 5})
    ('Q4_K 75.0 %, F32 25.0 %', 'Q6_K')
    """
    if len(kinds) == 1:
        return next(iter(kinds))
    total = sum(kinds.values())
    return ", ".join(f"{kind} {write_percent(number, total)}" for kind, number in kinds.items())


def get_headline_accuracy(probe: ProbeFigures) -> tuple[Estimate, Estimate]:
    """Return the accuracy of the original and of the compressed model, averaged as the probe's protocol does."""
    if probe.average == "macro":
        return probe.macro_original, probe.macro_compressed
    return probe.accuracy_original, probe.accuracy_compressed


def name_accuracy(probe: str, average: str) -> str:
    """Return the header of a column with the headline accuracy of a probe that is averaged in this way."""
    return f"Accuracy, {clean(probe, 40)}{', mean over relations' if average == 'macro' else ''}"


def write_bare_p(p: float | None) -> str:
    """Write a p-value without the p, for a column that is headed p."""
    return write_p_value(p).removeprefix("p = ").removeprefix("p ")


def make_groups_table(groups: tuple[Group, ...], kind: str, caption: str, *, bars: bool = True) -> Table:
    """Return a table with one row per group; `kind` is the header of their names."""
    rows = []
    for group in groups:
        facts = map(count, (group.counts.n, group.counts.known_before, group.counts.lost, group.counts.gained))
        changes = write_estimate(group.kept), share(group.answer_changed), write_bare_p(group.p_holm)
        rows.append((clean(group.name, 80), *facts, *changes))
    drawn = tuple(group.kept for group in groups) if bars else ()
    return Table(caption, (kind, *_GROUP_COLUMNS), tuple(rows), drawn, bars_after=5, sortable=len(groups) > 1)


Columns = Iterable[tuple[str, Sequence[str]]]  # name and cells of each


def make_overview_table(
    caption: str, columns: Columns, kept: Sequence[Estimate], *, bars_after: int, links: tuple[str, ...] = ()
) -> Table:
    """Return a table of columns with the original on top; bars show what others `kept`."""
    names, cells = zip(*columns, strict=True)
    rows, bars = tuple(zip(*cells, strict=True)), (None, *kept)
    return Table(caption, names, rows, bars, bars_after, links, pinned=1, sortable=len(kept) > 1, captioned=False)


@dataclass(frozen=True, slots=True)
class Text(Part):
    """Paragraph."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Note(Part):
    """Note in small print; `drawn` is about what only HTML draws."""

    sentence: str
    drawn: str = ""


@dataclass(frozen=True, slots=True)
class Sentences(Part):
    """Sentences: paragraphs in HTML, a list in Markdown."""

    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entries(Part):
    """Labelled values, under a title if they have one."""

    entries: tuple[Entry, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Code(Part):
    """Text to copy; nothing is shown if there is none."""

    text: str | None
    language: str


def show_run(command: str | None, versions: Mapping[str, str], entries: Sequence[Entry] = ()) -> tuple[Part, ...]:
    """Return what reproduces a page: the command, and the versions after other entries."""
    listed = ", ".join(f"{clean(name, 40)} {clean(version, 40)}" for name, version in versions.items())
    return Code(command, "sh"), Entries((*entries, Entry("Versions", listed or NONE)))


@dataclass(frozen=True, slots=True)
class Terms(Part):
    """Terms: name, key (may be empty) and meaning of each."""

    terms: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Claims(Part):
    """Claims about models: id, claim, families, answer, why, statistic, and answer per million parameters of each."""

    claims: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Findings(Part):
    """Findings: id (which links to the full claim), claim, answer and numbers of each; next to them a chart, if any."""

    findings: tuple[tuple[str, str, str, str], ...]
    chart: Drawn | None = None


@dataclass(frozen=True, slots=True)
class Remarks(Part):
    """Sentences under a title: folded in HTML, a list in Markdown."""

    title: str
    sentences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Facts(Part):
    """Facts and answers, a fact per row; HTML has the last column under the first. `shade` styles the last answer."""

    table: Table
    shade: str = ""


@dataclass(frozen=True, slots=True)
class Chart(Part):
    """Chart of a section, in the colours of `pages.drawing`; drawn if a page has room for it."""

    title: str
    description: str  # its figures as text, for screen readers
    draw: Callable[[Axes], object]  # draws on axes of the page's look
    height: int = 200  # in the units of `pages.drawing.WIDTH`
    heading: str = ""  # shown above it if it is one of several side by side

    def draw_svg(self, id: str) -> Drawn:
        """Draw the chart; `id` is as in `open_axes`."""
        with open_axes(self.height, id, self.title, self.description) as (plot, drawn):
            self.draw(plot)
        return Drawn(drawn(), title=self.heading)


@dataclass(frozen=True, slots=True)
class Drawn(Part):
    """Chart as SVG, not escaped, under its title; Markdown leaves it out. `look` is a class of the style sheet."""

    svg: str
    title: str = ""
    look: str = ""


def draw_twice(draw: Callable[[str, bool], str | None], id: str, title: str = "") -> Iterator[Drawn]:
    """Yield a narrow and a broad version of a chart; the page shows the one that fits. `draw` takes an id and whether
    the chart is broad; it returns None if there is nothing to draw."""
    for look in ("narrow", "broad"):
        if svg := draw(f"{look}-{id}", look == "broad"):
            yield Drawn(svg, title, look)


@dataclass(frozen=True, slots=True)
class Charts(Part):
    """Charts side by side if there is room, with an optional common title; Markdown leaves them out."""

    charts: tuple[Drawn | Chart, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Beside(Part):
    """Chart, with the table of its figures next to it if there is room."""

    chart: Chart | Drawn | None
    table: Table


@dataclass(frozen=True, slots=True)
class Folded(Part):
    """Parts under a title, unfolded by a click; in Markdown if `in_text`, where code and terms have the title."""

    title: str
    parts: tuple[Part, ...]
    in_text: bool = True


@dataclass(frozen=True, slots=True)
class Graded(Part):
    """Report card, all domains last: name, facts known before, share kept, interval, grade, grades spanned."""

    rows: tuple[tuple[str, str, str, str, str, str], ...]
    bars: tuple[Estimate, ...]  # share kept, by row
    rounding: float | None = None  # share that rounding alone keeps, a mark on the last bar


@dataclass(frozen=True, slots=True)
class Sizes(Part):
    """Bytes before and after; None if unknown."""

    before: int | None
    after: int | None


@dataclass(frozen=True, slots=True)
class PageSection:
    """Section as shown on a page."""

    id: str  # unique on the page
    title: str
    parts: tuple[Part, ...]
    look: str = ""  # a class of the style sheet


@dataclass(frozen=True, slots=True)
class Page(Part):
    """Page of sections; or a foldable part of a page, about one of several models."""

    headline: str
    sections: tuple[PageSection, ...]
    what: str = ""  # ``report card``, ``study``, ``search``; empty for one of several models
    models: str = ""  # which models it is about
    verdict: str = ""
    warnings: tuple[str, ...] = ()
    unlisted: int = 0  # number of sections before the table of contents, which does not list them
    next: tuple[str, ...] = ()  # sentences on what to do next
    counts: Counts | None = None  # facts by which model knows them
    names: tuple[str, str, str, str] = ("kept", "lost", "gained", "never known")  # names of these counts
    front: tuple[tuple[PageSection, ...], ...] = ()  # above all sections, in two columns if there is room
    id: str = ""  # for one of several models


def draw_charts(parts: Iterable[Part], id: str, charts: bool) -> Iterator[Part]:
    """Yield the parts with their charts drawn under unique ids; without charts and bars if not `charts`."""
    for number, part in enumerate(parts, start=1):
        place = f"{id}-{number}"
        match part:
            case Folded():
                yield replace(part, parts=tuple(draw_charts(part.parts, place, charts)))
            case Chart() | Charts() if not charts:
                continue
            case Table() if not charts:
                yield replace(part, bars=())
            case Beside() if not charts:
                yield replace(part, chart=None, table=replace(part.table, bars=()))
            case Chart():
                yield part.draw_svg(place)
            case Charts():
                each = enumerate(part.charts, start=1)
                drawn = (chart.draw_svg(f"{place}-{i}") if isinstance(chart, Chart) else chart for i, chart in each)
                yield replace(part, charts=tuple(drawn))
            case Beside(chart=Chart() as chart):
                yield replace(part, chart=chart.draw_svg(place))
            case _:
                yield part


BAR = "The bar shows the share kept, and the line on it the 95 % interval."
# Shown instead of facts if their text must not be shown.
NO_FACTS = Text("The text of the facts was left out on request.")


def write_prompt(prompt: str) -> str:
    """Write a prompt on one line, its blank as underscores."""
    return clean(prompt.replace(BLANK, "___"), 300)


def make_fact_parts(table: Table, shown: int, *, left_out: int, shade: str = "") -> Iterator[Part]:
    """Yield a table of facts, with those beyond `shown` folded, and a note on those `left_out`."""
    if table.rows:
        yield Facts(replace(table, rows=table.rows[:shown]), shade)
    elif not left_out:
        yield Text("None.")
    if rest := table.rows[shown:]:
        continued = replace(table, caption=f"{table.caption}, continued", rows=rest)
        yield Folded(f"{count(len(rest))} more", (Facts(continued, shade),))
    if left_out:
        yield make_rest_note(left_out)


def make_rest_note(left_out: int) -> Note:
    """Return the note on entries that only the JSON has."""
    return Note(f"{count_more(left_out)} in the JSON, which -o NAME.json writes.")


def count_more(left_out: int) -> str:
    """Return the start of a sentence on entries that are left out.

    >>> count_more(1), count_more(1200)
    ('1 more is', '1,200 more are')
    """
    return "1 more is" if left_out == 1 else f"{count(left_out)} more are"
