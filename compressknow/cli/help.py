"""Commands whose help page shows their options in groups, each option on one line where it fits in 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

# The groups, in the order in which one decides.
COMPRESS, HOW, EVALUATE, RUNS, OUTPUT = (
    "What to compress",
    "How to compress it",
    "What to evaluate",
    "Where it runs",
    "Output",
)
GROUPS = (COMPRESS, HOW, EVALUATE, RUNS, OUTPUT)
# Width of the column of names, where help texts start in the same line.
NAMES = 22


class Option(click.Option):
    """An option that stands in a group of the help page; bounds that its values must keep are not repeated there."""

    def __init__(self, *args: Any, group: str = OUTPUT, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group

    def make_metavar(self, ctx: click.Context) -> str:
        """One word: what may be chosen is said in the help text."""
        if self.metavar is not None or self.is_flag:
            return super().make_metavar(ctx)
        if isinstance(self.type, click.Choice):
            return "NAME"
        kind = type(self.type)
        return {click.IntRange: "N", click.FloatRange: "N", click.Path: "PATH"}.get(kind, super().make_metavar(ctx))

    def get_help_extra(self, ctx: click.Context) -> Any:
        """What follows the help text in brackets: the default alone."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command whose options are shown in groups.

    Parameters
    ----------
    more : gives what follows the epilog, in its form; it is called when the page is shown.
    """

    def __init__(self, *args: Any, more: Callable[[], str] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._more = more

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the epilog, and what follows it."""
        if self._more is None:
            super().format_epilog(ctx, formatter)
            return
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text((self.epilog or "") + self._more())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups that have options, in their order; `--help` closes the last."""
        records: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                records[getattr(parameter, "group", OUTPUT)].append(record)
        for group, shown in records.items():
            if shown:
                with formatter.section(group):
                    formatter.write_dl(_aligned(shown), col_max=NAMES)


def _aligned(records: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first column has one width in every group."""
    return [(f"{names:<{NAMES - 2}}", text) for names, text in records]


def command(**settings: Any) -> Callable[[Callable[..., Any]], Command]:
    """`click.command` with options in groups."""
    return click.command(cls=Command, **settings)


def option(*names: str, group: str = OUTPUT, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`click.option` in a group of the help page."""
    return click.option(*names, cls=Option, group=group, **settings)
