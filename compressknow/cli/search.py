"""`compressknow search`: the smallest checkpoint that keeps a share of the knowledge."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.cli.options import (
    COMPRESS,
    HOW,
    REVISION,
    RUNS,
    OneOf,
    Share,
    calibration_options,
    command,
    known_option,
    option,
    probe_options,
    probes_help,
    ray_options,
    templates_option,
)
from compressknow.cli.report import command_of
from compressknow.cli.run import RESUMES, if_interrupted
from compressknow.cli.terminal import Lines, show, show_json_text
from compressknow.compress.pruning import METHODS
from compressknow.compress.schemes import SCHEMES
from compressknow.compress.steps import ROUNDINGS
from compressknow.errors import GateNotMet
from compressknow.format import count, estimate, plain, size

if TYPE_CHECKING:
    from compressknow.pages.search import Trial

WIDTH = 80
COLUMNS = f"{'Recipe':<40}{'Kept (95 % interval)':<28}"
SIZE_COLUMNS = {"bytes": "On disk", "sparse-bytes": "Sparse", "nonzero": "Weights"}


@command(short_help="Find the smallest checkpoint that keeps a share of knowledge.", more=probes_help)
@click.argument("model")
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the search; a stopped one resumes.",
)
@option("--keep", group=HOW, type=Share(), required=True, metavar="SHARE", help="Knowledge to keep: 0.98, or 98%.")
@option(
    "--minimize",
    group=HOW,
    type=OneOf(["bytes", "sparse-bytes", "nonzero"]),
    default="bytes",
    show_default=True,
    help="bytes (on disk), sparse-bytes (in a sparse format) or nonzero (weights left).",
)
@option("--trials", group=HOW, type=click.IntRange(1), default=40, show_default=True, help="Recipes for Optuna to try.")
@option(
    "--quantize",
    group=HOW,
    multiple=True,
    metavar="SCHEME",
    type=OneOf(list(SCHEMES)),
    help="Scheme to try, repeatable.  [default: int8, int8-weights]",
)
@option(
    "--prune-method",
    group=HOW,
    multiple=True,
    type=OneOf(list(METHODS)),
    help="Method to try, repeatable.  [default: l1-unstructured]",
)
@option(
    "--rounding",
    group=HOW,
    multiple=True,
    type=OneOf(list(ROUNDINGS)),
    help="Rounding to try, repeatable.  [default: nearest]",
)
@calibration_options
@option(
    "--module-map",
    group=COMPRESS,
    type=OneOf(["structural", "paper"]),
    default="structural",
    help="structural (default) or paper, the authors' split.",
)
@ray_options
@probe_options
@templates_option
@known_option
@option("--no-facts", is_flag=True, help="Leave out the text of every fact.")
@option("--revision", group=RUNS, help=REVISION)
@option("--json", "as_json", is_flag=True, help="Print the search as JSON.")
@click.pass_context
def search(
    ctx: click.Context, /, model: str, output: Path, probe: tuple[str, ...], as_json: bool, **given: Any
) -> None:
    """Find the cheapest checkpoint of MODEL that keeps a share of its knowledge.

    Half of the facts guide the search. The recipe that it finds must keep the share on the other half, by the lower
    end of its interval. OUTPUT gets the page (search.html), the recipe (recipe.toml), the converted checkpoint
    (winner/) and its report card (report.html). Exits with 3 if nothing keeps as much. Needs Optuna:
    pip install 'compressknow[search]'.

    \b
    compressknow search MODEL -o found --keep 0.95 --limit 1000
    compressknow search MODEL -o found --keep 0.98 --minimize sparse-bytes
    compressknow convert MODEL CONVERTED --recipe found/recipe.toml
    """
    from compressknow.commands.search import search as run
    from compressknow.pages.search import said, verdict

    for name in ("quantize", "prune_method", "rounding"):
        if not given[name]:
            del given[name]
    with if_interrupted(RESUMES):
        found = run(
            model,
            output,
            probe=probe or None,
            command=command_of(ctx),
            on_progress=Lines(),
            on_result=None if as_json else _Lines(given["minimize"]),
            **given,
        )
    if as_json:
        show_json_text((output / "search.json").read_text(encoding="utf-8"))
    else:
        show()
        for text in (verdict(found), *said(found)):
            show("\n".join(textwrap.wrap(text, WIDTH)))
        show(f"\nWritten: {output}/search.html" + (", recipe.toml, winner/, report.html" if found.winner else ""))
    if found.winner is None:
        raise GateNotMet(
            f"No recipe tried is certain to keep {100 * found.keep:g} %.",
            hint="Lower --keep, use more facts (--limit), or run more trials (--trials).",
        )


class _Lines:
    """Prints a line a recipe, as it comes."""

    def __init__(self, minimize: str) -> None:
        self._begun, self._minimize = False, minimize

    def __call__(self, trial: Trial) -> None:
        if not self._begun:
            self._begun = True
            columns = f"{COLUMNS}{SIZE_COLUMNS[self._minimize]:>12}"
            show(f"{columns}\n{'-' * len(columns)}")
        kept = estimate(trial.kept.value, trial.kept.low, trial.kept.high)
        name = plain(trial.setup, WIDTH)
        if len(name) > 39:
            show(name)
            name = ""
        amount = trial.sizes[self._minimize]
        written = count(amount) if self._minimize == "nonzero" else size(amount)
        show(f"{name:<40}{kept:<28}{written:>12}")
