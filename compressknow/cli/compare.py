"""`compressknow compare`: two checkpoints side by side, in what they hold and in what they know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.cli.compare_page import compare_page
from compressknow.cli.probe_options import EPILOG, probe_options, split_options
from compressknow.cli.progress import bytes_bar, facts_bar
from compressknow.cli.report import command_of
from compressknow.cli.run import NOTHING_WRITTEN, RESUMES, if_interrupted
from compressknow.cli.terminal import show, show_json
from compressknow.cli.values import Share

if TYPE_CHECKING:
    from compressknow.report.contrast.records import Contrast


@click.command(short_help="Show how two checkpoints differ.", epilog=EPILOG)
@click.argument("a")
@click.argument("b")
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="File for the comparison: .html, .md or .json (repeatable).",
)
@probe_options
@click.option(
    "--fail-under",
    type=Share(),
    metavar="SHARE",
    help="Exit with 3 if B knows less of what A knows: 0.95, or 95%. Needs -p.",
)
@click.option("--no-facts", is_flag=True, help="Leave the text of every fact out.")
@click.option(
    "--answers",
    "keep_in",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where answers are kept, so that no model is asked twice.  [default: ~/.cache/compressknow/answers]",
)
@click.option("--overwrite", is_flag=True, help="Replace files of -o that are there already.")
@click.option("--threads", type=click.IntRange(1), help="Tensors worked on at a time.  [default: one a core]")
@click.option("--revision", help="Branch, tag or commit of A, if it is a hub id.")
@click.option("--revision-b", help="Branch, tag or commit of B, if it is a hub id.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    a: str,
    b: str,
    outputs: tuple[Path, ...],
    probes: tuple[str, ...],
    fail_under: float | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Show how checkpoint B differs from A: in settings, in what is stored, and weight by weight.

    Both are local folders or hub ids, of one architecture: an original and what was made from it, two conversions, two
    fine-tunes. int8 weights are compared as what they stand for. With -p both are asked facts as well, and the page
    says what each keeps of the other's knowledge.

    \b
    compressknow compare MODEL CONVERTED
    compressknow compare CONVERTED OTHER -o compare.html -o compare.json
    compressknow compare MODEL CONVERTED -p atlas --limit 300 -o compare.html
    compressknow compare MODEL CONVERTED -p atlas --fail-under 0.95
    """
    from compressknow.report.card.make import check_gate, gate
    from compressknow.report.contrast.as_json import contrast_json
    from compressknow.report.contrast.compare import compare as contrast_of

    if fail_under is not None and not probes:
        raise click.UsageError("--fail-under judges knowledge: name what to ask with -p PROBE.")
    check_gate(fail_under)
    options, settings = split_options(given)
    with bytes_bar("Comparing") as progress, facts_bar() as bar, if_interrupted(RESUMES if probes else NOTHING_WRITTEN):
        contrast = contrast_of(
            a,
            b,
            probes,
            outputs=outputs,
            options=options,
            settings=settings,
            command=command_of(ctx),
            progress=progress,
            bar=bar,
            **given,
        )
    if as_json:
        show_json(contrast_json(contrast))
    else:
        show("\n".join(_lines(contrast, outputs)))
    if fail_under is not None and contrast.behaviour:
        gate(contrast.behaviour.b_against_a, fail_under)


def _lines(contrast: Contrast, outputs: tuple[Path, ...]) -> Iterator[str]:
    yield from compare_page(contrast)
    if outputs:
        yield f"\nWritten: {', '.join(map(str, outputs))}"
