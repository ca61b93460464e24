"""`compressknow convert`: options in, a compressed checkpoint out, and a table of what was done."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

import compressknow
from compressknow.cli.options import OneOf, Share
from compressknow.cli.progress import bytes_bar
from compressknow.cli.run import NOTHING_WRITTEN, if_interrupted
from compressknow.cli.terminal import show, show_json
from compressknow.compress.recipe import PRUNE_METHODS, RECIPE_OPTIONS, SCHEMES
from compressknow.model.scopes import DEFAULT_SCOPES
from compressknow.report.format import count, percent, size
from compressknow.report.model_card.render import growth, where_it_runs


@click.command(short_help="Prune and quantize a checkpoint into a new folder.")
@click.argument("model")
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--scope",
    multiple=True,
    help="Which Linear layers, repeatable, or with commas: blocks (default: all in the transformer blocks), "
    "attention, feed-forward, "
    "final, overall (blocks and what lies beside them; when quantizing the final layer too), and where the model has "
    "them self-attention, cross-attention, encoder-attention, decoder-attention, encoder, decoder, vision.",
)
@click.option("--include", multiple=True, metavar="REGEX", help="Keep only modules whose name matches (repeatable).")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave modules out whose name matches (repeatable).")
@click.option("--layers", metavar="RANGE", help="Keep only these blocks, such as 0-5 or 0-2,11.")
@click.option("--prune", type=Share(), metavar="AMOUNT", help="Zero this share of the weights: 0.2, or 20%.")
@click.option(
    "--prune-method", type=OneOf(PRUNE_METHODS), default=PRUNE_METHODS[0], show_default=True, help="How to choose them."
)
@click.option("--per-layer", is_flag=True, help="The share in each tensor by itself, not one threshold over all.")
@click.option("--norm", type=float, default=1.0, show_default=True, help="Order of the norm, for ln-structured.")
@click.option(
    "--dim",
    type=click.IntRange(0, 1),
    default=0,
    show_default=True,
    help="0 prunes whole output channels, 1 input channels, for the structured methods.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="For the random methods.")
@click.option(
    "--quantize",
    type=OneOf(SCHEMES),
    help="int8: to deploy (transformers, vLLM). int8-paper: as in the paper's study. int8-weights: activations stay "
    "float.",
)
@click.option(
    "--module-map",
    type=OneOf(["structural", "paper"]),
    default="structural",
    show_default=True,
    help="`paper` counts attention.output.dense of BERT and RoBERTa as feed-forward, as the paper does.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Do what a TOML file, a manifest or a converted folder says, instead of the options above.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done, from the headers alone; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUTPUT, once the new one is whole, if convert wrote it.")
@click.option("--threads", type=click.IntRange(1), help="Tensors worked on at a time.  [default: one a core]")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run the Python code that the checkpoint brings.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.pass_context
def convert(ctx: click.Context, /, model: str, output: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Prune and quantize MODEL, a local folder or a hub id, into the new folder OUTPUT.

    OUTPUT loads in plain transformers; the last line printed says where else it runs. It holds a manifest,
    compressknow.json, of all that was done to each tensor. The same input and recipe give the same bytes.

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
