"""How results appear at a prompt and in a notebook: a title, a sentence and a small table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from compressknow.base.format import clean
from compressknow.base.packages import require

WIDTH = 80
# Longer texts are cut.
TITLE_CHARACTERS, VERDICT_CHARACTERS, CELL_CHARACTERS, LINE_CHARACTERS = 200, 800, 60, 160
# Rows that are shown; the number of the others is stated.
PROMPT_ROWS, NOTEBOOK_ROWS = 8, 20
# Colours that fit a light page and a dark one.
TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums;color:inherit"
CELL = "padding:2px 10px;border-bottom:1px solid rgba(128,128,128,0.35);background:transparent;color:inherit"


class Summary(NamedTuple):
    """Summary of a result: its kind and models, a sentence if any, and a table, whose first column has names."""

    title: str
    verdict: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def _fit(summary: Summary) -> Summary:
    """Clean every text, which may come from a model or a file, and cut it to one line."""
    return Summary(
        clean(summary.title, TITLE_CHARACTERS),
        clean(summary.verdict, VERDICT_CHARACTERS),
        summary.columns,
        [[clean(cell, CELL_CHARACTERS) for cell in row] for row in summary.rows],
    )


class SummaryRepr:
    """Result that is shown by its `_summary`: `repr` on one line, `str` with a table, and HTML in a notebook."""

    __slots__ = ()

    def _summary(self) -> Summary:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self._show(write_line) or super().__repr__()

    def __str__(self) -> str:
        return self._show(write_text) or super().__repr__()

    def _repr_html_(self) -> str | None:
        return self._show(write_html)

    def _show(self, write: Callable[[Summary], str]) -> str | None:
        # A result that lacks what the summary needs, such as an emptied dict, gets the default repr.
        try:
            return write(_fit(self._summary()))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return None


class Tabular(SummaryRepr):
    """Result that is also a table: `_rows` returns dicts that all have the same keys."""

    __slots__ = ()

    def _rows(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def to_frame(self) -> Any:
        """Return the rows as a pandas DataFrame. Raises CompressknowError if pandas is not installed."""
        require("pandas")
        import pandas as pd

        return pd.DataFrame(self._rows())


def write_line(summary: Summary) -> str:
    """Return the title and verdict on one line in angle brackets.

    >>> write_line(Summary("Card: what a knew", "95 % kept."))
    '<Card: what a knew; 95 % kept.>'
    """
    line = f"{summary.title}; {summary.verdict}" if summary.verdict else summary.title
    return f"<{textwrap.shorten(line, LINE_CHARACTERS, placeholder=' ...')}>"


def write_text(summary: Summary) -> str:
    """Return the whole summary as lines in angle brackets.

    >>> print(write_text(Summary("Card: a against b", "95 % kept.", ("Group", "n"), [("x", "12"), ("longer", "3")])))
    <Card: a against b
      95 % kept.
      Group    n
      x       12
      longer   3>
    """
    rows = [summary.columns, *summary.rows[:PROMPT_ROWS]] if summary.rows else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [summary.title, *textwrap.wrap(summary.verdict, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    for name, *figures in rows:
        padded = [f"{figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([f"  {name:<{widths[0]}}", *padded]))
    if more := _count_more(summary, PROMPT_ROWS):
        lines.append(f"  {more}")
    return f"<{chr(10).join(lines)}>"


def write_html(summary: Summary) -> str:
    """Return the summary as an HTML fragment, with every text escaped.

    >>> write_html(Summary("<b>"))
    '<div><p><strong>&lt;b&gt;</strong></p></div>'
    """
    verdict = f"<br>{escape(summary.verdict)}" if summary.verdict else ""
    table = ""
    if summary.rows:
        rows = "".join(_write_row(row, "td") for row in summary.rows[:NOTEBOOK_ROWS])
        head = f"<thead>{_write_row(summary.columns, 'th')}</thead>"
        table = f'<table style="{TABLE}">{head}<tbody>{rows}</tbody></table>'
    more = _count_more(summary, NOTEBOOK_ROWS)
    footer = f"<p>{more}</p>" if more else ""
    return f"<div><p><strong>{escape(summary.title)}</strong>{verdict}</p>{table}{footer}</div>"


def _write_row(cells: Sequence[str], tag: str) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    alignments = ("left", *("right" for _ in cells[1:]))
    elements = [
        f'<{tag}{scope} style="{CELL};text-align:{alignment}">{escape(cell)}</{tag}>'
        for cell, alignment in zip(cells, alignments, strict=True)
    ]
    return f"<tr>{''.join(elements)}</tr>"


def _count_more(summary: Summary, shown: int) -> str:
    more = len(summary.rows) - shown
    return f"and {more:,} more" if more > 0 else ""
