"""Results at a prompt and in a notebook: a heading, a sentence, and a small table; no more."""

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
# Rows beyond these are counted.
SHOWN_AT_A_PROMPT, SHOWN_IN_A_NOTEBOOK = 8, 20
# In the colours of the surrounding page, light or dark.
TABLE = "border-collapse:collapse;font-variant-numeric:tabular-nums;color:inherit"
CELL = "padding:2px 10px;border-bottom:1px solid rgba(128,128,128,0.35);background:transparent;color:inherit"


class Summary(NamedTuple):
    """Summary of a result.

    Attributes
    ----------
    title : what it is, and of what.
    verdict : a sentence, or nothing.
    columns, rows : a table whose first column names, and whose others are figures; maybe empty.
    """

    title: str
    verdict: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def _fit(summary: Summary) -> Summary:
    """Shorten texts to a line each, without characters that nobody sees: they may come from a model or a file."""
    return Summary(
        clean(summary.title, TITLE_CHARACTERS),
        clean(summary.verdict, VERDICT_CHARACTERS),
        summary.columns,
        [[clean(cell, CELL_CHARACTERS) for cell in row] for row in summary.rows],
    )


class SummaryRepr:
    """Result that has a `_summary`, and is shown by it: on a line, printed with a table, or as HTML in a notebook."""

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
        # One that lacks what its class promises, such as a dict that was emptied, is shown as it is.
        try:
            return write(_fit(self._summary()))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return None


class Tabular(SummaryRepr):
    """Result that has rows, too: `_rows` gives them, each a dict of the same columns."""

    __slots__ = ()

    def _rows(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def to_frame(self) -> Any:
        """Return the rows as a pandas DataFrame. Raises CompressknowError if pandas is not installed."""
        require("pandas")
        import pandas as pd

        return pd.DataFrame(self._rows())


def write_line(summary: Summary) -> str:
    """Return one line in angle brackets, as an object without a literal form is shown.

    >>> write_line(Summary("Card: what a knew", "95 % kept."))
    '<Card: what a knew; 95 % kept.>'
    """
    line = f"{summary.title}; {summary.verdict}" if summary.verdict else summary.title
    return f"<{textwrap.shorten(line, LINE_CHARACTERS, placeholder=' ...')}>"


def write_text(summary: Summary) -> str:
    """Return lines in angle brackets: the whole summary.

    >>> print(write_text(Summary("Card: a against b", "95 % kept.", ("Group", "n"), [("x", "12"), ("longer", "3")])))
    <Card: a against b
      95 % kept.
      Group    n
      x       12
      longer   3>
    """
    rows = [summary.columns, *summary.rows[:SHOWN_AT_A_PROMPT]] if summary.rows else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [summary.title, *textwrap.wrap(summary.verdict, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    for name, *figures in rows:
        padded = [f"{figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([f"  {name:<{widths[0]}}", *padded]))
    if more := _count_more(summary, SHOWN_AT_A_PROMPT):
        lines.append(f"  {more}")
    return f"<{chr(10).join(lines)}>"


def write_html(summary: Summary) -> str:
    """Return the summary as a fragment of HTML, every text escaped.

    >>> write_html(Summary("<b>"))
    '<div><p><strong>&lt;b&gt;</strong></p></div>'
    """
    verdict = f"<br>{escape(summary.verdict)}" if summary.verdict else ""
    table = ""
    if summary.rows:
        rows = "".join(_write_row(row, "td") for row in summary.rows[:SHOWN_IN_A_NOTEBOOK])
        head = f"<thead>{_write_row(summary.columns, 'th')}</thead>"
        table = f'<table style="{TABLE}">{head}<tbody>{rows}</tbody></table>'
    more = _count_more(summary, SHOWN_IN_A_NOTEBOOK)
    rest = f"<p>{more}</p>" if more else ""
    return f"<div><p><strong>{escape(summary.title)}</strong>{verdict}</p>{table}{rest}</div>"


def _write_row(cells: Sequence[str], tag: str) -> str:
    scope = ' scope="col"' if tag == "th" else ""
    sides = ("left", *("right" for _ in cells[1:]))
    written = [
        f'<{tag}{scope} style="{CELL};text-align:{side}">{escape(cell)}</{tag}>'
        for cell, side in zip(cells, sides, strict=True)
    ]
    return f"<tr>{''.join(written)}</tr>"


def _count_more(summary: Summary, shown: int) -> str:
    more = len(summary.rows) - shown
    return f"and {more:,} more" if more > 0 else ""
