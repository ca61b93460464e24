"""What to do next, in one line, from the numbers of a comparison: deploy, compress less, or evaluate more facts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressknow.compress.options import convert_options
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import (
    PAPER_BITS,
    PAPER_SCOPES,
    ROUNDINGS,
    DropBlocks,
    DropNeurons,
    Prune,
    Quantize,
    Step,
    Where,
)
from compressknow.errors import CompressknowError, UsageError
from compressknow.format import count, plain
from compressknow.pages.card.verdict import rounded_up
from compressknow.pages.records import Comparison
from compressknow.stats.clusters import design_of_kept
from compressknow.stats.power import facts_to_decide

# The share kept from which a model is good enough, where no gate says another.
ENOUGH = 0.95
# Less pruning than this is none.
LEAST = 0.05
# The scheme that errs least.
FINEST = "int8-weights"
# Facts beyond this many nobody evaluates to know a share.
MOST = 20_000


@dataclass(frozen=True, slots=True)
class Milder:
    """A recipe that does less, and in words what it does other than the one that was used."""

    change: str
    recipe: Recipe


def advice(comparison: Comparison, path: str | None = None) -> str:
    """The line; nothing where the numbers carry none. `path` is where the user has the model's source.

    They are held to the gate that was decided early, or else to `ENOUGH`: the interval must lie on one side of it.
    """
    counts, gate = comparison.counts, comparison.early.gate if comparison.early else ENOUGH
    if not counts.known_before:
        return "Next: choose facts that the original knows (-p PROBE); it knew none of these." if counts.n else ""
    kept = comparison.kept
    low, high = 0.0 if kept.low is None else kept.low, 1.0 if kept.high is None else kept.high
    wanted = f"{100 * gate:g} %"
    if comparison.early.met if comparison.early else low >= gate:
        return f"Next: deploy it, if {wanted} is enough: the interval lies above."
    if not comparison.early and high >= gate:
        return _more_facts(comparison, gate)
    return _compress_less(comparison, f"less than {wanted} is kept", path)


def facts_needed(comparison: Comparison, gate: float) -> int | None:
    """Return about how many known facts it takes to tell on which side of the gate the share kept lies, if it stays as
    it is; None where nobody evaluates so many.
    """
    needed = facts_to_decide(comparison.counts, gate, design_of_kept(comparison.clusters))
    return needed if needed is not None and needed <= MOST else None


def _more_facts(comparison: Comparison, gate: float) -> str:
    counts, wanted = comparison.counts, f"{100 * gate:g} %"
    needed = facts_needed(comparison, gate)
    if needed is None:
        return (
            f"Next: look at the facts lost: the share kept is so near {wanted} that no number of facts of these probes "
            "would soon tell."
        )
    # It cannot take fewer than did not tell.
    about = max(needed, counts.known_before + 1)
    return (
        f"Next: evaluate more facts: about {rounded_up(about)} that the original knows would tell whether {wanted} is "
        f"kept, and it knew {count(counts.known_before)} of these{_where(comparison, about)}."
    )


def _where(comparison: Comparison, needed: int) -> str:
    """How to get so many, where the probes have them."""
    counts = comparison.counts
    limits = [probe.limit for probe in comparison.probes]
    if len(limits) != 1 or limits[0] is None:
        return ""
    limit = math.ceil(1.1 * needed * counts.n / counts.known_before / 100) * 100
    more = f"--limit {limit}" if limit < comparison.probes[0].facts_read else "without --limit"
    enough = limit <= comparison.probes[0].facts_read
    return f" ({more})" if enough else f" ({more}, and with more probes)"


def _compress_less(comparison: Comparison, reason: str, path: str | None) -> str:
    model = comparison.model
    try:
        recipe = Recipe.from_dict(dict(model.recipe)) if model.recipe else None
    except CompressknowError:
        # Of another version, or of a package that is not installed.
        recipe = None
    found = next(milder(recipe, model.groups), None) if recipe else None
    if found is None:
        return f"Next: compress less, or in another way: {reason}."
    name = plain(str((model.source or {}).get("name") or ""), 120)
    # The name of a folder alone would lead nowhere.
    source = path or (name if "/" in name else "MODEL")
    options = convert_options(found.recipe)
    command = f": compressknow convert {shlex.join([source, 'OUTPUT', *options])}" if options else ""
    return f"Next: {reason}; {found.change}{command}"


def milder(recipe: Recipe, groups: Mapping[str, Mapping[str, Any]]) -> Iterator[Milder]:
    """Recipes that do less than this one, the one to try first before the others.

    Parameters
    ----------
    groups : by group of layers, what the manifest says of it: `relative_error`.
    """
    yield from _less(recipe, DropBlocks, "blocks", "drop {half} blocks in place of {most}", 1)
    yield from _less(recipe, DropNeurons, "amount", "drop {half} of the neurons in place of {most}", LEAST)
    yield from _less(recipe, Prune, "amount", "prune {half} of the weights in place of {most}", LEAST)
    for kind, change in ((Prune, "do not prune"), (DropNeurons, "drop no neurons"), (DropBlocks, "drop no blocks")):
        if any(isinstance(step, kind) for step in recipe.steps):
            yield from _changed(recipe, [step for step in recipe.steps if not isinstance(step, kind)], change)
    yield from _finer(recipe)
    yield from _without_worst(recipe, groups)


def _less(recipe: Recipe, kind: type[Step], name: str, change: str, least: float) -> Iterator[Milder]:
    """Half of what the steps of a kind take away."""
    amounts = [getattr(step, name) for step in recipe.steps if isinstance(step, kind)]
    # Blocks that are named cannot be halved.
    if not amounts or any(isinstance(amount, str) or amount / 2 < least for amount in amounts):
        return
    try:
        steps = [
            replace(step, **{name: _half(getattr(step, name))}) if isinstance(step, kind) else step  # type: ignore[arg-type]
            for step in recipe.steps
        ]
    except UsageError:
        # A pattern such as 2:4 has one amount.
        return
    yield from _changed(recipe, steps, change.format(half=_written(_half(max(amounts))), most=_written(max(amounts))))


def _half(amount: float) -> float:
    return amount // 2 if isinstance(amount, int) else round(amount / 2, 4)


def _written(amount: float) -> str:
    return str(amount) if isinstance(amount, int) else f"{100 * amount:.3g} %"


def _finer(recipe: Recipe) -> Iterator[Milder]:
    """Quantization that errs less: by GPTQ, then of 8 bits, then of the weights alone."""
    for step in recipe.steps:
        if not isinstance(step, Quantize) or step.scheme == FINEST:
            continue
        if step.chosen.bits < PAPER_BITS and step.rounding == ROUNDINGS[0]:
            yield from _replaced(recipe, step, replace(step, rounding="gptq"), "round by GPTQ in place of to nearest")
        coarse = f"{FINEST} in place of {step.scheme}"
        yield from _replaced(recipe, step, Quantize(FINEST, step.where), f"quantize to {coarse}")


def _without_worst(recipe: Recipe, groups: Mapping[str, Mapping[str, Any]]) -> Iterator[Milder]:
    """Without the group of layers whose weights changed most, where several changed and each has a scope."""
    errors = {name: group.get("relative_error") or 0.0 for name, group in groups.items()}
    changed = sorted((name for name, error in errors.items() if error > 0), key=lambda name: errors[name])
    if (
        len(changed) < 2
        or not set(changed) <= set(PAPER_SCOPES) | {"final"}
        or errors[changed[-1]] == errors[changed[0]]
    ):
        return
    *rest, worst = changed
    where = Where(tuple(rest))
    if {step.where for step in recipe.steps if isinstance(step, Prune | Quantize)} <= {where}:
        return
    steps = [replace(step, where=where) if isinstance(step, Prune | Quantize) else step for step in recipe.steps]
    yield from _changed(recipe, steps, f"leave {worst} as it is, whose weights changed most")


def _replaced(recipe: Recipe, old: Step, new: Step, change: str) -> Iterator[Milder]:
    yield from _changed(recipe, [new if step is old else step for step in recipe.steps], change)


def _changed(recipe: Recipe, steps: Sequence[Step], change: str) -> Iterator[Milder]:
    if steps:
        calibration = recipe.calibration if any(step.calibrated for step in steps) else None
        yield Milder(change, replace(recipe, steps=tuple(steps), calibration=calibration))
