"""`compressknow sensitivity`: which weights matter most, as a table and as a map."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.base.format import clean, count, share
from compressknow.cli import RESUMES, explain_interrupt
from compressknow.cli import options as opt
from compressknow.cli.report import list_arguments
from compressknow.cli.terminal import WIDTH, ProgressLines, show, show_json_text, show_written, wrap

if TYPE_CHECKING:
    from compressknow.study.sensitivity import Sensitivity, TensorSensitivity

# Weights in each of the two lists.
SHOWN = 10
# Bits per weight of the suggested file.
_BITS = 5.0
# Options that `export` and `search` share.
_SHARED = ("guide", "facts", "data", "calibration", "calibration_tokens", "seed", "revision", "trust_remote_code")


@opt.command()
@click.argument("model")
@opt.add_output_files("File, repeatable: .html, .md, .json or .csv.")
@opt.option(
    "--to",
    group=opt.HOW,
    type=opt.FORM,
    help="Types of a GGUF file, or schemes of convert.  [default: gguf for causal models]",
)
@opt.add_guide_option(group=opt.HOW, default="both", help="What ranks weights: facts, text or both.  [default: both]")
@opt.option("--facts", group=opt.EVALUATE, multiple=True, metavar="PROBE", help="Facts; repeatable.  [default: atlas]")
@opt.add_data_option(opt.EVALUATE)
@opt.add_calibration_options(tokens="8192", default="self")
@opt.option(
    "--seed", group=opt.CALIBRATION, type=int, default=0, show_default=True, help="Seed of own samples and of masking."
)
@opt.checkpoint_options
@opt.option("--overwrite", is_flag=True, help="Replace files that compressknow wrote.")
@opt.option("--json", "as_json", is_flag=True, help="Print the map as JSON.")
def sensitivity(model: str, output: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Show which weights of MODEL, a local folder or a Hub id, matter most to what it knows.

    For each weight and each type, it estimates how rounding only this weight affects facts that the model knows, and
    text. The estimates are stored for further calls and for `export --size`.

    \b
    compressknow sensitivity MODEL
    compressknow sensitivity MODEL -o map.html -o map.csv
    compressknow sensitivity MODEL --facts facts:mine.jsonl --guide facts
    """
    from compressknow.api.sensitivity import sensitivity as run

    with explain_interrupt(RESUMES):
        result = run(model, output, on_progress=ProgressLines(), **options)
    if as_json:
        from compressknow.engine.identity import locate
        from compressknow.study.map import Map, map_to_json

        show_json_text(map_to_json(Map(locate(model, options["revision"]).name, result, options["guide"])))
        return
    show(*build_page(result, options["guide"]))
    show(f"\nNext: compressknow {shlex.join(_suggest_command(result, model))}")
    show_written(output)


def build_page(sensitivity: Sensitivity, guide: Any) -> Iterator[str]:
    """Yield the lines that show which weights matter most and least."""
    from compressknow.study.sensitivity import name_guide, warn_of_few_facts

    guidance, ranked, by = sensitivity.guidance, sensitivity.ranked(guide), name_guide(guide)
    facts = f"{count(guidance.facts)} known facts, " if guidance.facts else ""
    yield f"{count(len(ranked))} weights by {by}: {facts}{count(guidance.tokens)} tokens."
    for warning in warn_of_few_facts(guidance):
        yield from wrap(warning, indent="")
    shown = min(SHOWN, -(-len(ranked) // 2))
    for title, rows in (("Most sensitive", ranked[:shown]), ("Least sensitive", ranked[shown:][-shown:][::-1])):
        if rows:
            yield ""
            yield f"{title:<16}{'':<34}{'KL per MB':>14}{'Facts at risk':>16}"
            yield "-" * WIDTH
            yield from (_format_row(row, guide) for row in rows)
    kinds = " or ".join(sorted({row.compared for row in ranked}))
    saves = f"{kinds} saves against {ranked[0].bits} bits"
    yield ""
    yield from wrap(f"KL in thousandths of a nat, for each MB that {saves}.", indent="")


def _format_row(row: TensorSensitivity, guide: Any) -> str:
    from compressknow.study.map import format_millinats

    risk = share(row.by_type[row.compared].at_risk)
    return f"{row.place:<16}{clean(row.module, 33):<34}{format_millinats(row.per_mb(guide)):>14}{risk:>16}"


def _suggest_command(sensitivity: Sensitivity, model: str) -> Iterator[str]:
    """Yield the words of the command that uses the result."""
    if sensitivity.guidance.form == "gguf":
        weights = sensitivity.others + sum(prod(row.shape) for row in sensitivity.rows)
        yield from ("export", model, "small.gguf", "--size", _round_size(weights * _BITS / 8))
    else:
        yield from ("search", model, "-o", "found", "--keep", "0.95", "--to", "checkpoint")
    yield from list_arguments(_SHARED)


def _round_size(nbytes: float) -> str:
    """Write a size to two or three digits, as ``--size`` takes it.

    >>> [_round_size(number) for number in (900_000, 75_600_000, 4_120_000_000)]
    ['900kB', '76MB', '4.1GB']
    """
    unit, factor = next((each for each in (("GB", 1e9), ("MB", 1e6)) if nbytes >= each[1]), ("kB", 1e3))
    return f"{nbytes / factor:.{int(nbytes < 10 * factor)}f}{unit}"
