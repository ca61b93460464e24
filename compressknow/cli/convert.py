"""`compressknow convert`: options in, a compressed checkpoint out, and a table of what was done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import click

from compressknow.base.errors import UsageError
from compressknow.base.format import count, write_percent, write_size
from compressknow.base.packages import Registry
from compressknow.cli import NOTHING_WRITTEN, check_upload, explain_interrupt, push_options, upload
from compressknow.cli import options as opt
from compressknow.cli.terminal import WIDTH, ProgressLines, format_duration, show, show_json, wrap_whole
from compressknow.compress.parameters import Parameter
from compressknow.compress.pruning import METHODS
from compressknow.compress.recipe import OPTIONS, list_parameters
from compressknow.compress.schemes import SCHEMES, choose_word, find_schemes
from compressknow.compress.steps import SELF
from compressknow.model.manifest import describe_calibration, describe_removed, summarize_calibration
from compressknow.pages.model_card import describe_runtimes, has_packed_encoder, list_warnings

EPILOG = """\b
Scopes (--scope):
  blocks            every Linear layer in the transformer blocks (default)
  attention         query, key, value and output projections
  feed-forward      the Linear layers of the feed-forward blocks
  final             the layer that computes the vocabulary logits
  overall           blocks and other Linear layers; final too if quantized
  vision            the image, video and audio towers of a multimodal model
  self-attention, cross-attention, encoder-attention, decoder-attention,
  encoder, decoder  if the model has them

"""


_PARAMETERS = list_parameters()


def _list_names(heading: str, registry: Registry[Any]) -> str:
    """Return a section of the help page: a line per name, with its options."""
    width, usable = max(map(len, registry)), registry.usable()[0]
    lines = ["\b", heading]
    for name in registry:
        # Nearly all methods have per_layer.
        options = [p.option for p in usable[name].parameters() if p.name != "per_layer"] if name in usable else []
        text = usable[name].help if name in usable else "cannot be used"
        text += f" ({', '.join(options)})" if options else ""
        lines.append(f"  {name:<{width}}  {text}" + (" (default)" if name == METHODS.first else ""))
    return "\n".join([*lines, "", ""])


EPILOG += _list_names("Methods (--prune-method):", METHODS)
EPILOG += _list_names("Schemes (--quantize):", SCHEMES)


def _make_parameter_option(declared: Parameter) -> opt.Decorator:
    return opt.option(
        f"{declared.option}/--no-{declared.option[2:]}" if declared.default is True else declared.option,
        group=opt.HOW,
        default=declared.default,
        type=declared.kind,
        is_flag=declared.kind is bool,
        show_default=not isinstance(declared.default, bool) and declared.default is not None,
        help=declared.help,
        callback=_check,
    )


def _check(ctx: click.Context, option: click.Parameter, value: Any) -> Any:
    """Return the value, or raise a usage error if no method or scheme with such a parameter allows it."""
    first_error = None
    for each in _PARAMETERS[str(option.name)]:
        try:
            return each.check(value)
        except UsageError as error:
            first_error = first_error or error
    raise click.BadParameter(str(first_error), ctx, option)


@opt.command(epilog=EPILOG)
@click.argument("model")
@click.argument("output", type=opt.PATH)
@opt.join_options(
    *map(opt.make_recipe_option, OPTIONS), *(_make_parameter_option(first) for first, *_ in _PARAMETERS.values())
)
@opt.option("--recipe", group=opt.HOW, type=opt.PATH, help="TOML file, manifest or converted folder to repeat.")
@opt.threads_option
@opt.checkpoint_options
@push_options
@opt.option("--dry-run", is_flag=True, help="Show what would be done; write nothing.")
@opt.option("--overwrite", is_flag=True, help="Replace OUTPUT if convert wrote it.")
@opt.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.pass_context
def convert(ctx: click.Context, /, model: str, output: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Prune and quantize MODEL, a local folder or a Hub id, into the new folder OUTPUT.

    OUTPUT loads in plain transformers; the last printed line lists all runtimes. Its manifest, compressknow.json,
    records what was done to each tensor. The same input and recipe give the same bytes.

    \b
    compressknow convert MODEL OUT --scope attention --prune 0.2 --quantize int8
    compressknow convert MODEL OUT --quantize int8 --layers 2-27
    compressknow convert MODEL OUT --drop-blocks 4 --drop-neurons 0.2
    compressknow convert MODEL OUT --recipe recipe.toml
    compressknow convert MODEL OUT --quantize int8 --push me/my-model
    """
    from compressknow.api.convert import convert as run

    repo, private = options.pop("push"), options.pop("private")
    check_upload(repo, private, dry_run=dry_run)
    options = opt.drop_recipe_conflicts(options, (*OPTIONS, *_PARAMETERS))
    # Parameters that other packages add; the function has keywords for the rest.
    third_party_names = options.keys() - signature(run).parameters
    third_party = {name: options.pop(name) for name in _PARAMETERS if name in third_party_names}
    options["parameters"] = {
        name: value
        for name, value in third_party.items()
        if ctx.get_parameter_source(name) != click.core.ParameterSource.DEFAULT
    }
    with explain_interrupt(NOTHING_WRITTEN):
        manifest = run(model, output, dry_run=dry_run, on_progress=ProgressLines(), **options)
    if as_json:
        show_json(manifest)
    else:
        show(*build_manifest_page(manifest, model, output, dry_run=dry_run))
    if repo:
        upload(output, repo, private, planned=manifest["planned_files"] if dry_run else None, err=as_json)


def build_manifest_page(manifest: Mapping[str, Any], model: str, output: Path, *, dry_run: bool) -> Iterator[str]:
    """Yield the lines that show, by group, what was done or, with `dry_run`, would be done."""
    word = choose_word(find_schemes(row["scheme"] for row in manifest["tensors"] if row["scheme"])).capitalize()
    yield f"{manifest['setup']}: {model} -> {output}"
    yield ""
    yield f"{'Group':<14}{'Parameters':>15}{'Pruned':>15}{'Zeros':>9}{word:>8}{'Before':>10}{'After':>9}"
    yield "-" * WIDTH
    for name, counts in manifest["groups"].items():
        yield _format_row(name, counts)
    yield "-" * WIDTH
    yield _format_row("total", manifest["totals"])
    if removed := " ".join(describe_removed(manifest.get("removed"))):
        yield _wrap_paragraph(removed)
    for tie in manifest["untied"]:
        shared = f"{tie['name']} no longer shares its weight with {tie['tied_to']}"
        yield _wrap_paragraph(f"{shared}: {write_size(tie['bytes'])} more.")
    if calibrated := " ".join(describe_calibration(summarize_calibration(manifest))):
        yield _wrap_paragraph(calibrated)
    for warning in list_warnings(manifest):
        yield _wrap_paragraph(f"Warning: {warning}")
    yield _wrap_paragraph(describe_runtimes(manifest))
    if has_packed_encoder(manifest):
        load = "Load it with compressknow.load before you call generate"
        yield _wrap_paragraph(f"{load}: plain transformers runs the encoder before it has unpacked it.")
    if estimate := manifest.get("estimate"):
        blocks, memory, seconds = (estimate[key] for key in ("blocks", "bytes", "seconds"))
        time, room = format_duration(seconds), write_size(memory)
        text = f"Calibration takes about {time} for {count(blocks)} blocks, and {room} of memory."
        is_own = manifest["recipe"]["calibration"]["text"] == SELF
        yield _wrap_paragraph(f"{text} Before that, the model writes the text." if is_own else text)
    if dry_run:
        yield "\nDry run: nothing was written."


def _wrap_paragraph(text: str) -> str:
    return "\n" + "\n".join(wrap_whole(text))


def _format_row(name: str, counts: Mapping[str, Any]) -> str:
    parameters, pruned, zeros = counts["parameters"], counts["pruned"], counts.get("zeros_after")
    return (
        f"{name:<14}{count(parameters):>15}{'?' if pruned is None else count(pruned):>15}"
        f"{'?' if zeros is None else write_percent(zeros, parameters):>9}"
        f"{write_percent(counts['quantized'], parameters):>8}"
        f"{write_size(counts['bytes_before']):>10}{write_size(counts['bytes_after']):>9}"
    )
