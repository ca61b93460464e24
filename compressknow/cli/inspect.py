"""`compressknow inspect`: the layers of a checkpoint, by group and scope."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import click

from compressknow.base.format import write_size
from compressknow.cli.export import build_types_table
from compressknow.cli.options import checkpoint_options, command, make_recipe_option, option
from compressknow.cli.terminal import WIDTH, show, show_json

LISTED = 8
DTYPE_NAMES = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "int8", "I4": "int4"}
DTYPE_NAMES |= {"U8": "uint8", "F8_E4M3": "fp8", "F8_E5M2": "fp8 (e5m2)"}


@command()
@click.argument("model")
@make_recipe_option("module_map")
@checkpoint_options
@option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str, module_map: Any, revision: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Show the Linear layers of MODEL by group, and how many parameters each scope covers.

    MODEL is a local folder or a Hub id. A folder with only a config.json is enough. For a GGUF file, it shows
    the types of its tensors by group.
    """
    from compressknow.api.inspect import inspect as run

    summary = run(model, module_map=module_map, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        show_json(summary)
    else:
        show(*(_build_gguf_page(summary) if "bytes" in summary else _build_page(summary)))


def _build_page(summary: dict[str, Any]) -> Iterator[str]:
    counts = summary["parameters"]
    yield f"{summary['model']}: {summary['architecture']} ({summary['model_type']})"
    used = f", {counts['used']:,} as used" if counts["used"] != counts["stored"] else ""
    yield f"{counts['stored']:,} parameters stored{used}; module map: {summary['module_map']}"
    yield from _list_groups(summary["groups"])
    yield f"\n{'Scope':<24}{'--prune takes':>18}{'--quantize takes':>18}"
    for name, takes in summary["scopes"].items():
        yield f"{name:<24}{takes['prune']:>18,}{takes['quantize']:>18,}"
    weights = [weight for group in summary["groups"].values() for weight in group["weights"]]
    for kind, where in (("conv1d", "Conv1D layers"), ("experts", "fused experts")):
        if of_kind := [weight for weight in weights if weight["kind"] == kind]:
            parameters = sum(prod(weight["shape"]) * weight["uses"] for weight in of_kind)
            yield f"\n{parameters:,} of these parameters are in {where}."
            yield "  convert cannot quantize them; export can, if the model generates text."
    ties = _count_patterns(f"{name} = {source}" for name, source in summary["tied"])
    yield from _list("Tied (stored once)", ties)
    if grid := summary.get("grid"):
        matrices = f"{grid['weights']} of {grid['of']} matrices"
        yield f"\nOn a grid already: {matrices}, at most {grid['values']} values in 32 neighbours."
        yield "  A type of this grid keeps them as they are, which flatters it."
    yield from _list("Missing from the weight files", summary.get("missing", []))
    yield from _list("Unplaced (choose with --include or --exclude)", _count_patterns(summary["unplaced"]))
    yield from _list("Matrices that are not Linear layers (never compressed)", _count_patterns(summary["opaque"]))


def _build_gguf_page(summary: dict[str, Any]) -> Iterator[str]:
    yield f"{summary['model']}: {summary['architecture']}, a GGUF file of {write_size(summary['bytes'])}"
    if "made_of" in summary:
        origin = summary["made_of"]
        yield f"made by compressknow: {origin.get('setup')} of {origin.get('source.name')}"
    yield f"{summary['parameters']['stored']:,} parameters\n"
    yield from build_types_table({name: group["types"] for name, group in summary["groups"].items()})


def _list_groups(groups: dict[str, Any]) -> Iterator[str]:
    yield f"\n{'Group':<16}{'Modules':>8}{'Stored':>18}{'As used':>18}"
    for name, group in groups.items():
        yield f"{name:<16}{group['modules']:>8,}{group['stored']:>18,}{group['used']:>18,}"
        shapes = Counter((tuple(w["shape"]), w["dtype"], w["uses"]) for w in group["weights"])
        for (shape, dtype, uses), count in list(shapes.items())[:LISTED]:
            stored = f" {DTYPE_NAMES.get(dtype, dtype)}" if dtype else ""
            yield f"  {count} x {list(shape)}{stored}" + (f", each used {uses} times" if uses > 1 else "")
        if len(shapes) > LISTED:
            yield f"  and {len(shapes) - LISTED} other shapes"


def _list(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield f"\n{title}"
        for entry in entries[:LISTED]:
            yield f"  {entry}" if len(entry) + 2 <= WIDTH else f"  {entry}".replace(" = ", "\n    = ")
    if len(entries) > LISTED:
        yield f"  and {len(entries) - LISTED} more: see --json"


def _count_patterns(names: Iterable[str]) -> list[str]:
    kinds = Counter(re.sub(r"\d+", "N", name) for name in names)
    return [f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()]
