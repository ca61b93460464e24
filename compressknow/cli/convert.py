"""`compressknow convert`: options in, a compressed checkpoint out, and a table of what was done."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

import compressknow
from compressknow.cli.help import COMPRESS, HOW, RUNS, command, option
from compressknow.cli.options import REVISION, TRUST, OneOf, Share
from compressknow.cli.progress import bytes_bar
from compressknow.cli.run import NOTHING_WRITTEN, if_interrupted
from compressknow.cli.terminal import show, show_json
from compressknow.compress.recipe import PRUNE_METHODS, RECIPE_OPTIONS, SCHEMES
from compressknow.model.scopes import DEFAULT_SCOPES
from compressknow.report.format import count, percent, size
from compressknow.report.model_card.render import growth, where_it_runs

EPILOG = """\b
Scopes (--scope):
  blocks            every Linear layer in the transformer blocks (default)
  attention         query, key, value and output projections
  feed-forward      the Linear layers of the feed-forward blocks
  final             the layer that gives vocabulary logits
  overall           blocks and what lies beside them; quantized, final too
  vision            the vision tower of a multimodal model
  self-attention, cross-attention, encoder-attention, decoder-attention,
  encoder, decoder  where the model has them

\b
Methods (--prune-method):
  l1-unstructured      the smallest weights of all (default)
  ln-structured        whole channels of the smallest norm (--norm, --dim)
  random-unstructured  any weights (--seed)
  random-structured    any channels (--seed, --dim)

\b
Schemes (--quantize):
  int8          8-bit weights and activations, to deploy
  int8-weights  8-bit weights; activations stay float
  int8-paper    as in the paper: per tensor, 7-bit activations
"""


@command(short_help="Prune and quantize a checkpoint into a new folder.", epilog=EPILOG)
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@option("--scope", group=COMPRESS, multiple=True, help="Linear layers, repeatable or with commas; see below.")
@option(
    "--include", group=COMPRESS, multiple=True, metavar="REGEX", help="Only modules whose name matches, repeatable."
)
@option("--exclude", group=COMPRESS, multiple=True, metavar="REGEX", help="No modules whose name matches, repeatable.")
@option("--layers", group=COMPRESS, metavar="RANGE", help="Only these blocks, such as 0-5 or 0-2,11.")
@option(
    "--module-map",
    group=COMPRESS,
    type=OneOf(["structural", "paper"]),
    default="structural",
    help="structural (default) or paper, the authors' split.",
)
@option("--prune", group=HOW, type=Share(), metavar="AMOUNT", help="Share of the weights to zero: 0.2, or 20%.")
@option(
    "--prune-method",
    group=HOW,
    type=OneOf(PRUNE_METHODS),
    default=PRUNE_METHODS[0],
    help="Which weights to zero; see below.",
)
@option("--per-layer", group=HOW, is_flag=True, help="Prune each tensor by AMOUNT, not all together.")
@option("--norm", group=HOW, type=float, default=1.0, show_default=True, help="Order of the norm of ln-structured.")
@option(
    "--dim",
    group=HOW,
    type=click.IntRange(0, 1),
    default=0,
    show_default=True,
    help="Channels to prune: 0 output, 1 input.",
)
@option("--seed", group=HOW, type=click.IntRange(0), default=0, show_default=True, help="Seed of the random methods.")
@option("--quantize", group=HOW, metavar="SCHEME", type=OneOf(SCHEMES), help="How to store the weights; see below.")
@option(
    "--recipe",
    group=HOW,
    type=click.Path(path_type=Path),
    help="TOML file, manifest or converted folder to repeat.",
)
@option("--threads", group=RUNS, type=click.IntRange(1), help="Tensors at a time.  [default: one per core]")
@option("--revision", group=RUNS, help=REVISION)
@option("--trust-remote-code", group=RUNS, is_flag=True, help=TRUST)
@option("--dry-run", is_flag=True, help="Show what would be done; write nothing.")
@option("--overwrite", is_flag=True, help="Replace OUTPUT if convert wrote it.")
@option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.pass_context
def convert(ctx: click.Context, /, model: str, output: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Prune and quantize MODEL, a local folder or a Hub id, into the new folder OUTPUT.

    OUTPUT loads in plain transformers; the last line printed says where else it runs. Its manifest, compressknow.json,
    records what was done to each tensor. The same input and recipe give the same bytes.

    \b
    compressknow convert MODEL OUT --scope attention --prune 0.2 --quantize int8
    compressknow convert MODEL OUT --quantize int8 --exclude '^lm_head$'
    compressknow convert MODEL OUT --recipe recipe.toml
    """
    given = {
        name for name in RECIPE_OPTIONS if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    if options["recipe"] and given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
        raise click.UsageError(f"--recipe says it all: leave out {named}.")
    options["scope"] = options["scope"] or DEFAULT_SCOPES
    with bytes_bar("Converting") as progress, if_interrupted(NOTHING_WRITTEN):
        manifest = compressknow.convert(model, output, dry_run=dry_run, progress=progress, **options)
    if as_json:
        show_json(manifest)
    else:
        show("\n".join(manifest_page(manifest, model, output, dry_run=dry_run)))


COLUMNS = f"{'Group':<14}{'Parameters':>15}{'Pruned':>15}{'Zeros':>9}{'Int8':>8}{'Before':>10}{'After':>9}"


def manifest_page(manifest: Mapping[str, Any], model: str, output: Path, *, dry_run: bool) -> Iterator[str]:
    """Lines that say what was done, or with `dry_run` would be done, by group."""
    yield f"{manifest['setup']}: {model} -> {output}"
    yield ""
    yield COLUMNS
    yield "-" * len(COLUMNS)
    for name, counts in manifest["groups"].items():
        yield _row(name, counts)
    yield "-" * len(COLUMNS)
    yield _row("total", manifest["totals"])
    for tie in manifest["untied"]:
        shared = f"{tie['name']} no longer shares its weight with {tie['tied_to']}"
        yield "\n" + fill(f"{shared}: {size(tie['bytes'])} more.")
    for warning in growth(manifest):
        yield "\n" + fill(f"Warning: {warning}")
    yield "\n" + fill(where_it_runs(manifest))
    if dry_run:
        yield "\nDry run: nothing was written."


def fill(text: str) -> str:
    return textwrap.fill(text, len(COLUMNS), break_long_words=False, break_on_hyphens=False)


def _row(name: str, counts: Mapping[str, Any]) -> str:
    parameters, pruned, zeros = counts["parameters"], counts["pruned"], counts.get("zeros_after")
    return (
        f"{name:<14}{count(parameters):>15}{'?' if pruned is None else count(pruned):>15}"
        f"{'?' if zeros is None else percent(zeros, parameters):>9}{percent(counts['quantized'], parameters):>8}"
        f"{size(counts['bytes_before']):>10}{size(counts['bytes_after']):>9}"
    )
