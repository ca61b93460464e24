"""A click group that imports only the command that is called."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

import click

from compressknow.cli.terminal import show
from compressknow.errors import did_you_mean


class LazyGroup(click.Group):
    """A group whose commands are named by address, so that `--help` is there at once.

    Parameters
    ----------
    commands_at : name -> (``"module:attribute"``, short help), in the order of the help page.
    """

    def __init__(self, *args: Any, commands_at: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names in the order given: the order in which one needs them."""
        return list(self.commands_at)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command of that name; None where there is none."""
        if cmd_name not in self.commands_at:
            return None
        module, attribute = self.commands_at[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short_help) for name, (_, short_help) in self.commands_at.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown command lists those that there are."""
        if not ctx.resilient_parsing and args[0] not in self.commands_at and not args[0].startswith("-"):
            near = did_you_mean(args[0], self.commands_at)
            ctx.fail(f"No such command '{args[0]}'. {near}There are: {', '.join(self.commands_at)}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with `--debug`, print the traceback of what goes wrong before it is reported."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            if ctx.params.get("debug"):
                show(traceback.format_exc(), err=True)
            raise
