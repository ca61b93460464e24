"""`compressknow sensitivity`: where a model's knowledge sits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressknow.cli.options import (
    CALIBRATION,
    EVALUATE,
    HOW,
    REVISION,
    RUNS,
    OneOf,
    command,
    option,
    probe_options,
    probes_help,
)
from compressknow.cli.run import RESUMES, if_interrupted
from compressknow.cli.terminal import Lines, show, show_json
from compressknow.format import count, number, plain

if TYPE_CHECKING:
    from compressknow.study.sensitivity import Guide, Sensitivity

LISTED = 10


@command(short_help="Show which weights knowledge depends on.", more=probes_help)
@click.argument("model")
@option("-o", "--output", multiple=True, type=click.Path(path_type=Path), help="File, repeatable: .csv or .json.")
@option(
    "--to",
    group=HOW,
    type=OneOf(["gguf", "checkpoint"]),
    default="gguf",
    show_default=True,
    help="gguf (its types) or checkpoint (schemes).",
)
@option(
    "--guide",
    group=EVALUATE,
    type=OneOf(["facts", "text", "both"]),
    default="both",
    show_default=True,
    help="What rounding may change: facts, text or both.",
)
@option("--facts", group=EVALUATE, type=click.IntRange(1), default=200, show_default=True, help="Known facts to use.")
@option(
    "--calibration",
    group=CALIBRATION,
    metavar="TEXT",
    default="self",
    help="self (the model's own samples; default), FILE.txt, FILE.jsonl or hf:DATASET.",
)
@probe_options
@option(
    "--answers",
    type=click.Path(path_type=Path, file_okay=False),
    group=EVALUATE,
    help="Where answers are stored.  [default: ~/.cache/compressknow/answers]",
)
@option("--overwrite", is_flag=True, help="Replace files that compressknow wrote.")
@option("--revision", group=RUNS, help=REVISION)
@option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def sensitivity(
    model: str, output: tuple[Path, ...], probe: tuple[str, ...], guide: Any, as_json: bool, **given: Any
) -> None:
    """Estimate what rounding each weight of MODEL to each type does to facts that it knows, and to text.

    MODEL is a local folder or a Hub id of a checkpoint of floats. The estimate is the KL divergence, in nats, from the
    original: of the best candidates of a fact, and of the next token of a text. It is stored, and costs nothing when
    you ask for it again.

    \b
    compressknow sensitivity MODEL -o map.csv
    compressknow sensitivity MODEL -p facts:mine.jsonl --guide facts -o map.json
    """
    from compressknow.commands.sensitivity import sensitivity as run

    with if_interrupted(RESUMES):
        found = run(model, output, probe=probe or None, guide=guide, on_progress=Lines(), **given)
    if as_json:
        show_json(found.as_json())
    else:
        show("\n".join(_page(found, guide)))


def _page(found: Sensitivity, guide: Guide) -> Iterator[str]:
    guidance = found.guidance
    by = [f"{count(guidance.facts)} facts"] if guidance.facts else []
    by += [f"{count(guidance.tokens)} tokens of text"] if guidance.tokens else []
    yield f"Sensitivity of {count(len(found.rows))} weights to rounding, by {' and '.join(by)}."
    smallest = guidance.types[-1]
    kl = found.kl(guide)
    types = {name: (smallest if smallest in own else list(own)[-1]) for name, own in kl.items()}
    ranked = sorted(kl, key=lambda name: -kl[name][types[name]])
    for title, names in (("Most sensitive", ranked[:LISTED]), ("Least sensitive", ranked[::-1][:LISTED])):
        yield f"\n{title:<56}{'Type':>12}{'KL':>12}"
        for name in names:
            yield f"{plain(name, 54):<56}{types[name]:>12}{number(kl[name][types[name]]):>12}"
