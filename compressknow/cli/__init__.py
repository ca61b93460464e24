"""Command line: options, printing and exit codes. The work is done elsewhere."""

from __future__ import annotations

import click

from compressknow._version import __version__
from compressknow.cli.run import LazyGroup, run

COMMANDS = {
    "inspect": ("compressknow.cli.inspect:inspect", "Show a checkpoint's Linear layers by group and scope."),
    "convert": ("compressknow.cli.convert:convert", "Prune and quantize a checkpoint into a new folder."),
    "export": ("compressknow.cli.export:export", "Write a checkpoint as a GGUF file for llama.cpp."),
    "verify": ("compressknow.cli.verify:verify", "Check a converted checkpoint against its manifest."),
    "probe": ("compressknow.cli.probe:probe", "Evaluate a model on facts, and store its answers."),
    "report": ("compressknow.cli.report:report", "Show which knowledge compressed models kept and lost."),
    "compare": ("compressknow.cli.compare:compare", "Show how two checkpoints differ."),
    "sweep": ("compressknow.cli.sweep:sweep", "Evaluate a model compressed by every recipe of a grid."),
    "sensitivity": ("compressknow.cli.sensitivity:sensitivity", "Show which weights hold a model's knowledge."),
    "search": ("compressknow.cli.search:search", "Find the smallest checkpoint that keeps a share of knowledge."),
}


@click.group(
    cls=LazyGroup,
    commands_at=COMMANDS,
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
