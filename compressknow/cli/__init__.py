"""Command line: options, printing and exit codes. The work is done elsewhere."""

from __future__ import annotations

import click

from compressknow._version import __version__
from compressknow.cli.run import LazyGroup, run

# By name, in the order in which one needs them: each is the function of that name in the module of that name.
COMMANDS = {
    "inspect": "Show a checkpoint's Linear layers by group and scope.",
    "convert": "Prune and quantize a checkpoint into a new folder.",
    "export": "Write a checkpoint as a GGUF file for llama.cpp.",
    "verify": "Check a converted checkpoint against its manifest.",
    "probe": "Evaluate a model on facts, and store its answers.",
    "report": "Show which knowledge compressed models kept and lost.",
    "compare": "Show how two checkpoints differ.",
    "sweep": "Evaluate a model compressed by every recipe of a grid.",
    "sensitivity": "Show which weights hold a model's knowledge.",
    "search": "Find the smallest file that keeps a share of knowledge.",
}


@click.group(
    cls=LazyGroup,
    help_by_command=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(__version__, message="%(prog)s %(version)s", help="Show the version and exit.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Compress a language model, and know what it forgot.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 a gate that you set was not met, 4 too few facts tell (--strict), 130
    interrupted.
    """


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code; `args` default to those of the process."""
    return run(cli, args)
