"""What config.json says of quantized layers, and proof that an output loads by it, on the meta device.

A target that begins with ``re:`` is a pattern, matched from the start of a module's name (by transformers and by vLLM);
any other is a whole name, or the class of a module. Patterns here hold with and without the base model's prefix: what
is ``bert.encoder.layer.0`` in BertForMaskedLM is ``encoder.layer.0`` in BertModel, which AutoModel, pipelines and
sentence-transformers load.

The proof knows of no scheme: whatever the quantizer that the config names does with the tensors, it does here too.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from compressknow.base.errors import UnsupportedError
from compressknow.base.packages import require
from compressknow.compress.plan import Plan
from compressknow.compress.schemes import Scheme
from compressknow.compress.sources import PRUNE_OR_EXPORT
from compressknow.model.checkpoint import list_some
from compressknow.model.loading import LoadReport, list_headers, load_report
from compressknow.model.meta import parse_config

PATTERN = "re:"
# The name of a layout that differs between groups; each group has its own.
MIXED = "mixed-precision"
_NUMBERS = re.compile(r"\(\?:(\d+(?:\|\d+)*)\)")


def build_target_patterns(modules: Iterable[str], prefix: str, others: Iterable[str] = ()) -> list[str]:
    """Return patterns that match the named modules and none of the `others`, one for all that differ in numbers alone.

    Parameters
    ----------
    modules, others : names in the module tree of the whole model.
    prefix : the attribute under which the model holds its base model; another class may lack it, or have it.

    >>> build_target_patterns(["bert.encoder.layer.0.output.dense", "bert.encoder.layer.2.output.dense"], "bert")
    ['re:^(?:bert\\\\.)?encoder\\\\.layer\\\\.(?:0|2)\\\\.output\\\\.dense$']
    """
    start = f"{prefix}."
    reserved = {other.removeprefix(start) for other in others}
    kinds: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for module in modules:
        inner = module.removeprefix(start)
        # Both sides of an optional prefix may be there: `model.projector` and `projector`.
        exact = not prefix or inner in reserved
        parts = (module if exact else inner).split(".")
        kind = ("" if exact else f"(?:{re.escape(start)})?", *("" if _is_number(p) else re.escape(p) for p in parts))
        kinds.setdefault(kind, set()).add(tuple(int(part) for part in parts if _is_number(part)))
    return [
        f"{PATTERN}^{kind[0]}{_fill(kind[1:], choices)}$"
        for kind in sorted(kinds)
        for choices in _factor(sorted(kinds[kind]))
    ]


def count_targets(targets: Iterable[str]) -> int:
    """Count the modules that `build_target_patterns` names in targets; any other pattern, or a class, counts as one.

    >>> count_targets(["lm_head", *build_target_patterns(["layers.0.mlp.up", "layers.1.mlp.up"], "model")])
    3
    """
    return sum(math.prod(len(numbers.split("|")) for numbers in _NUMBERS.findall(target)) for target in targets)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()


def _fill(kind: tuple[str, ...], choices: Sequence[Sequence[int]]) -> str:
    """Write numbers, or the choice of several, where a kind of module has them: its empty parts."""
    numbers = (str(one[0]) if len(one) == 1 else f"(?:{'|'.join(map(str, one))})" for one in choices)
    return r"\.".join(part or next(numbers) for part in kind)


def _factor(numbers: Sequence[tuple[int, ...]]) -> Iterator[list[list[int]]]:
    """Yield tuples of one length, sorted, as few products of choices at each position: layers 0-2 x experts 0-7."""
    if not numbers[0]:
        yield []
        return
    rests: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in numbers:
        rests.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, those in rests.items():
        alike.setdefault(tuple(those), []).append(first)
    for tails, firsts in alike.items():
        for inner in _factor(tails):
            yield [firsts, *inner]


def build_quantization_config(
    targets: Mapping[Scheme, Sequence[str]], ignore: Sequence[str], version: str, prefix: str = ""
) -> dict[str, Any]:
    """Return `quantization_config` of config.json: exactly the named modules of each scheme, and by name each Linear
    module that stays as it is (vLLM refuses a Linear that it finds in neither list). `prefix` is that of the base
    model, as in `build_target_patterns`."""
    linears = {*ignore, *(name for names in targets.values() for name in names)}
    ordered = sorted(targets.items(), key=lambda item: (item[0].name, repr(item[0].values())))
    groups = {
        f"group_{i}": {
            "format": scheme.format,
            "targets": build_target_patterns(names, prefix, linears.difference(names)),
            **scheme.arguments(),
            "output_activations": None,
        }
        for i, (scheme, names) in enumerate(ordered)
    }
    formats = {scheme.format for scheme in targets}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": build_target_patterns(ignore, prefix, linears.difference(ignore)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": version,
    }


def build_config(plan: Plan) -> dict[str, Any]:
    """Return the output's config.json."""
    if not plan.targets:
        return plan.config
    require("compressed_tensors")
    version = importlib.metadata.version("compressed-tensors")
    settings = build_quantization_config(plan.targets, plan.ignore, version, plan.structure.prefix)
    if plan.unpacked:
        settings["dequantize"] = True
    return plan.config | {"quantization_config": settings}


def ensure_loadable(plan: Plan) -> Plan:
    """Return the plan of an output that transformers loads.

    Some families (T5) initialize layers by their weight, which packed layers do not have. Transformers unpacks these
    while it loads them, if their config says so: by the scheme of all weights, and without rounding activations.

    Raises UnsupportedError if it loads neither form.
    """
    try:
        _load(plan)
    except UnsupportedError:
        if len(plan.targets) != 1 or any(scheme.rounds for scheme in plan.targets):
            raise
        plan = replace(plan, unpacked=True)
        _load(plan)
    return plan


def _load(plan: Plan) -> None:
    """Load an output as plain transformers would, without its values. Raises UnsupportedError if it would not load
    every weight, but for what the source has too."""
    tree, headers = plan.tree, {name: (part.dtype, part.shape) for each in plan.tensors for name, part in each.written}
    report = load_report(type(tree), parse_config(tree, copy.deepcopy(build_config(plan))), headers)
    if fault := _find_fault(report, plan):
        narrow = "Prune only, or narrow --scope (or --exclude) to other layers."
        raise UnsupportedError(
            f"{type(tree).__name__} cannot be compressed in this way: transformers could not load the output.",
            why=fault,
            hint=PRUNE_OR_EXPORT if report.conversion_failed else narrow,
        )


def _find_fault(report: LoadReport, plan: Plan) -> str | None:
    if report == LoadReport():
        return None
    if report.conversion_failed:
        return "It fuses or splits weights of this model on loading, and fails if only some of them are quantized."
    if report.failure:
        return f"Loading stops: {report.failure}"
    before = load_report(type(plan.tree), plan.tree.config, list_headers(plan.checkpoint))
    kinds = {
        "It finds no values for": (report.missing, before.missing),
        "It finds no place for": (report.unexpected, before.unexpected),
        "It finds another shape in": (report.mismatched, before.mismatched),
        "It would take floats for integers, or the reverse, in": (report.retyped, before.retyped),
    }
    faults = {what: set(now) - set(then) for what, (now, then) in kinds.items()}
    return next((f"{what} {list_some(names)}." for what, names in faults.items() if names), None)
