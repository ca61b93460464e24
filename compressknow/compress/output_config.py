"""Description of quantized layers in config.json, and a check on the meta device that an output loads with it.

A target that begins with ``re:`` is a pattern, matched from the start of a module's name (by transformers and by vLLM);
any other is a whole name, or the class of a module. Patterns here match with and without the base model's prefix:
``bert.encoder.layer.0`` in BertForMaskedLM is ``encoder.layer.0`` in BertModel, which AutoModel, pipelines and
sentence-transformers load.

The check does not depend on the scheme: it runs the quantizer that the config names.
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
from compressknow.base.reading import group_by
from compressknow.compress.plan import Plan
from compressknow.compress.schemes import SCHEMES, Scheme
from compressknow.compress.sources import PRUNE_OR_EXPORT
from compressknow.model.checkpoint import list_some
from compressknow.model.loading import LoadReport, list_headers, load_report
from compressknow.model.meta import parse_config

PATTERN = "re:"
# The format of a config whose groups have different formats.
MIXED = "mixed-precision"
_NUMBERS = re.compile(r"\(\?:(\d+(?:\|\d+)*)\)")


def build_target_patterns(modules: Iterable[str], prefix: str, others: Iterable[str] = ()) -> list[str]:
    """Return patterns that match the named modules and no `others`, one for all that differ only in numbers.

    Parameters
    ----------
    modules, others : names in the module tree of the whole model.
    prefix : the attribute under which the model holds its base model; other classes of the model may not have it.

    >>> build_target_patterns(["bert.encoder.layer.0.output.dense", "bert.encoder.layer.2.output.dense"], "bert")
    ['re:^(?:bert\\\\.)?encoder\\\\.layer\\\\.(?:0|2)\\\\.output\\\\.dense$']
    """
    start = f"{prefix}."
    reserved = {other.removeprefix(start) for other in others}
    kinds: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for module in modules:
        inner = module.removeprefix(start)
        # Names with and without the prefix may both exist: `model.projector` and `projector`.
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
    """Count the modules that patterns of `build_target_patterns` name; any other pattern, or a class, counts as one.

    >>> count_targets(["lm_head", *build_target_patterns(["layers.0.mlp.up", "layers.1.mlp.up"], "model")])
    3
    """
    return sum(math.prod(len(numbers.split("|")) for numbers in _NUMBERS.findall(target)) for target in targets)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()


def _fill(kind: tuple[str, ...], choices: Sequence[Sequence[int]]) -> str:
    """Fill the empty parts of a kind of module with numbers, or with alternatives of several."""
    numbers = (str(one[0]) if len(one) == 1 else f"(?:{'|'.join(map(str, one))})" for one in choices)
    return r"\.".join(part or next(numbers) for part in kind)


def _factor(numbers: Sequence[tuple[int, ...]]) -> Iterator[list[list[int]]]:
    """Yield sorted tuples of equal length as few products of choices at each position: layers 0-2 x experts 0-7."""
    if not numbers[0]:
        yield []
        return
    by_first = group_by(numbers, lambda each: each[0])
    for common, firsts in group_by(by_first, lambda first: tuple(each[1:] for each in by_first[first])).items():
        for inner in _factor(common):
            yield [firsts, *inner]


def build_quantization_config(
    targets: Mapping[Scheme, Sequence[str]], ignore: Sequence[str], version: str, prefix: str = ""
) -> dict[str, Any]:
    """Return `quantization_config` of config.json, with exactly the named modules of each scheme as targets, and all
    other Linear modules as ignored (vLLM rejects a Linear that is in neither list). `prefix` is that of the base model,
    as in `build_target_patterns`."""
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

    Some families (T5) initialize layers through their weight, which packed layers do not have. If the config says so,
    transformers unpacks such layers on loading, but only with a single scheme, and without rounding activations.

    Raises UnsupportedError if transformers loads neither form.
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
    every weight, ignoring faults that the source has too."""
    tree, headers = plan.tree, {name: (part.dtype, part.shape) for each in plan.tensors for name, part in each.written}
    report = load_report(type(tree), parse_config(tree, copy.deepcopy(build_config(plan))), headers)
    if fault := _find_fault(report, plan):
        hint = "Narrow --scope (or --exclude)."
        if plan.targets:
            hint = "Prune only, or narrow --scope (or --exclude) to other layers."
        if len(plan.targets) > 1:
            hint = "Use one scheme and group size for all layers: in some families (T5), transformers loads no two."
        if report.conversion_failed:
            hint = PRUNE_OR_EXPORT
        if added := next((scheme.name for scheme in plan.targets if SCHEMES.is_added(scheme.name)), None):
            package = SCHEMES.added_by(added)
            hint = (
                f"Perhaps the `arguments` of the scheme {added!r} that {package} adds do not match what it stores: "
                f"if a built-in scheme works, update or uninstall {package}."
            )
            if report.conversion_failed:
                fault = "It cannot convert what is stored to the weights of this model."
        raise UnsupportedError(
            f"{type(tree).__name__} cannot be compressed in this way: transformers could not load the output.",
            why=fault,
            hint=hint,
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
