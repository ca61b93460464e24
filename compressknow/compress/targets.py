"""What config.json says of quantized layers: names of modules as targets in the layout of compressed-tensors.

A target that begins with ``re:`` is a pattern, matched from the start of a module's name (by transformers and by vLLM);
any other is a whole name, or the class of a module. Patterns here hold with and without the base model's prefix: what
is ``bert.encoder.layer.0`` in BertForMaskedLM is ``encoder.layer.0`` in BertModel, which AutoModel, pipelines and
sentence-transformers load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressknow.compress.schemes import Scheme

PATTERN = "re:"
# The name of a layout that differs between groups; each group has its own.
MIXED = "mixed-precision"
_NUMBERS = re.compile(r"\(\?:(\d+(?:\|\d+)*)\)")


def target_patterns(modules: Iterable[str], prefix: str, others: Iterable[str] = ()) -> list[str]:
    """Patterns that match the named modules and none of the `others`, one for all that differ in their numbers alone.

    Parameters
    ----------
    modules, others : names in the module tree of the whole model.
    prefix : the attribute under which the model holds its base model; another class may lack it, or have it.

    >>> target_patterns(["bert.encoder.layer.0.output.dense", "bert.encoder.layer.2.output.dense"], "bert")
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
        f"{PATTERN}^{kind[0]}{_filled(kind[1:], choices)}$"
        for kind in sorted(kinds)
        for choices in _products(sorted(kinds[kind]))
    ]


def target_count(targets: Iterable[str]) -> int:
    """How many modules targets name, as `target_patterns` writes them; a pattern of others, or a class, counts as one.

    >>> target_count(["lm_head", *target_patterns(["layers.0.mlp.up", "layers.1.mlp.up"], "model")])
    3
    """
    # No pattern of a file is run here: it may take exponential time.
    return sum(math.prod(len(numbers.split("|")) for numbers in _NUMBERS.findall(target)) for target in targets)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()


def _filled(kind: tuple[str, ...], choices: Sequence[Sequence[int]]) -> str:
    numbers = iter(choices)
    return r"\.".join(part or _either(next(numbers)) for part in kind)


def _either(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"(?:{'|'.join(map(str, numbers))})"


def _products(numbers: Sequence[tuple[int, ...]]) -> Iterator[list[list[int]]]:
    """Tuples of one length, sorted, as few products of choices at each position: layers 0-2 x experts 0-7."""
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
        for inner in _products(tails):
            yield [firsts, *inner]


def quantization_config(
    targets: Mapping[Scheme, Sequence[str]], ignore: Sequence[str], version: str, prefix: str = ""
) -> dict[str, Any]:
    """`quantization_config` of config.json: exactly the named modules of each scheme, and by name each Linear module
    that stays as it is (vLLM refuses a Linear that it finds in neither list).

    `prefix` is that of the base model, which the names may do without: see `target_patterns`.
    """
    linears = {*ignore, *(name for names in targets.values() for name in names)}
    ordered = sorted(targets.items(), key=lambda item: (item[0].name, repr(item[0].values())))
    groups = {
        f"group_{i}": {
            "format": scheme.format,
            "targets": target_patterns(names, prefix, linears.difference(names)),
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
        "ignore": target_patterns(ignore, prefix, linears.difference(ignore)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": version,
    }
