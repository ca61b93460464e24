"""Write the verdict in a sentence with its numbers, grade domains, and advise on what to do next in one line."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.format import NONE, SIGNIFICANT, clean, count, share_against, write_p_value
from compressknow.comparison.intervals import design_of_kept, estimate_kept, list_clusters, run_mcnemar
from compressknow.comparison.paired import order_domains
from compressknow.comparison.power import SMALL, count_facts_to_decide
from compressknow.comparison.records import Certainty, Counts, EarlyStop, Estimate, ProbeFigures
from compressknow.compress.recipe import Recipe, format_options
from compressknow.compress.steps import PAPER_BITS, PAPER_SCOPES, DropBlocks, DropNeurons, Prune, Quantize, Step, Where
from compressknow.pages.records import (
    NAME_CHARACTERS,
    SCALE,
    Comparison,
    Gate,
    Grade,
    label_models,
    write_estimate,
    write_range,
)

LOWEST = "F"
_SCALE = ", ".join(f"{grade} from {least} % kept" if grade == "A+" else f"{grade} {least} %" for grade, least in SCALE)
LEGEND = f"{_SCALE}, {LOWEST} less. If the interval spans several grades, they are named next to the letter."
SHORT_LEGEND = f"{_SCALE}, {LOWEST} less. A question mark means that the interval spans several grades."


def grade_domains(probes: Iterable[ProbeFigures]) -> tuple[Grade, ...]:
    """Return a grade for each domain over all probes."""
    clusters: dict[str, tuple[Counts, ...]] = {}
    for probe in probes:
        for group in probe.by_subject:
            # If the probe has one relation, each fact is a cluster; otherwise a domain may have a single cluster.
            of_probe = group.relations if len(probe.by_relation) > 1 else list_clusters(group.relations)
            clusters[group.name] = (*clusters.get(group.name, ()), *of_probe)
    grades = []
    for subject in sorted(clusters, key=order_domains):
        counts, kept = sum(clusters[subject], Counts()), estimate_kept(clusters[subject])
        best, worst = (NONE if end is None else find_grade(end) for end in (kept.high, kept.low))
        spanned = f"{best} to {worst}" if best != worst else None
        grades.append(Grade(subject, clusters[subject], kept, find_grade(counts.both, counts.known_before), spanned))
    return tuple(grades)


def find_grade(part: float, whole: float = 1) -> str:
    """Return the grade for keeping `part` of `whole`. Counts are compared as whole numbers: nothing is rounded up.

    >>> find_grade(99, 100), find_grade(98_999, 100_000), find_grade(7, 10), find_grade(0, 3), find_grade(0, 0)
    ('A+', 'A', 'D', 'F', '-')
    """
    if not whole:
        return NONE
    return next((name for name, least in SCALE if 100 * part >= least * whole), LOWEST)


def write_verdict(
    original: str, counts: Counts, kept: Estimate, certainty: Certainty, gates: Iterable[Gate] = ()
) -> str:
    """Return the sentence on one compressed model, and one on the losses that its number of facts can reveal.

    `kept` has the interval to report, `certainty` the paired test and the smallest detectable loss.

    >>> from compressknow.comparison.intervals import estimate_proportion, run_mcnemar
    >>> counts = Counts(both=90, lost=10, gained=1, neither=99)
    >>> print(write_verdict("bert", counts, estimate_proportion(90, 100), Certainty(run_mcnemar(counts))))
    Keeps 90 of 100 facts that bert knew (90.0 %, interval 82.6 to 94.5 %): it forgot 10 and gained 1, a net \
loss that chance does not explain (p = 0.012).
    """
    name = clean(original, NAME_CHARACTERS)
    if not counts.n:
        return f"The models were not evaluated on any common fact, so nothing can be said about what {name} lost."
    if not counts.known_before:
        gained = f"; the compressed model answers {count(counts.gained)} right" if counts.gained else ""
        return f"{name} knew none of {count_facts(counts.n)}, so there is nothing to keep{gained}."
    least = find_least(gates)
    interval = f"({_write_percent(counts, least)}{_write_ends(kept, 'interval', least)})"
    sentence = _write_kept(name, counts, interval, certainty.p)
    return f"{sentence} {describe_power(counts, certainty)}".rstrip()


def _write_kept(name: str, counts: Counts, interval: str, p: float | None) -> str:
    lost, gained = (count(number) if number else "none" for number in (counts.lost, counts.gained))
    change = ", which evens out" if counts.lost else ""
    # Even many losses and gains can balance.
    if p is not None and counts.lost != counts.gained:
        net, explained = "loss" if counts.lost > counts.gained else "gain", "chance could explain"
        if p < SIGNIFICANT:
            explained = "chance does not explain"
        elif (run_mcnemar(counts) or 0.0) < SIGNIFICANT:
            # Significant for independent facts, but not by relation.
            explained = "the choice of relations could explain"
        change = f", a net {net} that {explained} ({write_p_value(p)})"
    opening = f"Keeps {count(counts.both)} of {count_facts(counts.known_before)} that {name} knew {interval}"
    return f"{opening}: it forgot {lost} and gained {gained}{change}."


def describe_power(counts: Counts, certainty: Certainty) -> str:
    """Say which net loss the facts can reveal, and how many facts reveal a small one; empty if that is unknown. If
    nothing was lost, the interval rules out losses that the test may miss, so only the number of facts is of use.

    >>> describe_power(Counts(both=170, lost=15), Certainty(smallest_loss=0.0424, facts_for_two=394))
    'A net loss under 4.2 % of these 185 may go unseen; 400 known facts would show 2 %.'
    >>> describe_power(Counts(both=4, lost=4), Certainty(smallest_loss=0.997))
    'A net loss under 100 % of these 8 may go unseen.'
    >>> describe_power(Counts(both=2241, lost=274), Certainty(smallest_loss=0.0202, facts_for_two=2632))
    'A net loss under 2 % of these 2,515 may go unseen.'
    >>> describe_power(Counts(both=16), Certainty(smallest_loss=0.74, facts_for_two=394))
    '400 known facts would show a net loss of 2 %.'
    """
    more, known = certainty.facts_for_two, count(counts.known_before)
    if not counts.lost:
        is_small = (certainty.smallest_loss or 1) <= SMALL
        return "" if more is None or is_small else f"{round_up(more)} known facts would show a net loss of 2 %."
    if certainty.smallest_loss is None:
        return f"So few facts cannot show a net loss; {round_up(more)} known ones would show 2 %." if more else ""
    # Two digits: 4.2, 12, but no 1e+02.
    least = float(f"{100 * certainty.smallest_loss:.2g}")
    sentence = f"A net loss under {least:g} % of these {known} may go unseen"
    if more is None or least <= 100 * SMALL:
        return f"{sentence}."
    return f"{sentence}; {round_up(more)} known facts would show {100 * SMALL:g} %."


def describe_early(early: EarlyStop | None, evaluated: int) -> str:
    """Say how a gate was decided early, and how many facts it took, of those evaluated; empty if it was not.

    >>> early = EarlyStop(0.8, 0.05, facts=64, known=40, of=4021, kept=Estimate(0.95, 0.86, 0.99), met=True)
    >>> print(describe_early(early, 80))
    It took 64 of 4,021 facts in random order to know that at least 80 % of the knowledge is kept (confidence \
sequence 86.0 to 99.0 %, wrong in at most 5 of 100 runs). The figures are of 80 facts: the last batch was finished.
    >>> [describe_early(replace(early, facts=facts, of=facts), facts) for facts in (1, 2)]  # doctest: +ELLIPSIS
    ['It took 1 fact to know that at least ...', 'It took all 2 facts to know that at least ...']
    """
    if early is None:
        return ""
    known = f"{'at least' if early.met else 'less than'} {100 * early.gate:g} % of the knowledge is kept"
    if early.facts == early.of:
        return f"It took {'all ' if early.of > 1 else ''}{count_facts(early.of)} to know that {known}."
    sequence = _write_ends(early.kept, "confidence sequence", early.gate).removeprefix(", ")
    return (
        f"It took {count(early.facts)} of {count(early.of)} facts in random order to know that {known} ({sequence}, "
        f"wrong in at most {100 * early.level:g} of 100 runs)."
        f"{f' The figures are of {count(evaluated)} facts: the last batch was finished.' * (evaluated > early.facts)}"
    )


def round_up(facts: int) -> str:
    """Write a number of facts rounded up to two significant digits.

    >>> round_up(4514), round_up(94)
    ('4,600', '94')
    """
    step = 10 ** max(0, len(str(facts)) - 2)
    return count(-(-facts // step) * step)


def write_joint_verdict(
    original: str, comparisons: Sequence[Comparison], alike: Sequence[int] | None, gates: Iterable[Gate] = ()
) -> str:
    """Return the sentence on several compressed models: the best, the worst, and those `alike` (by index), which no
    test distinguishes from the best; None if they were not evaluated on the same facts."""
    name, least = clean(original, NAME_CHARACTERS), find_least(gates)
    labels = label_models(comparisons)
    known = [(c.counts, label) for c, label in zip(comparisons, labels, strict=True) if c.counts.known_before]
    if not known:
        return f"{name} knew none of the facts, so there is nothing that a compressed model could keep."
    best, worst = max(known, key=_get_kept), min(known, key=_get_kept)
    if alike is None:
        return f"The {len(comparisons)} compressed models answered different facts: what each keeps cannot be compared."
    if _get_kept(best) == _get_kept(worst):
        every = "Both" if len(known) == 2 else f"All {len(known)}"
        return f"{every} compressed models keep {_write_percent(best[0], least)} of what {name} knew."
    if len(known) == 2:
        chance = "could explain" if alike else "does not explain"
        return (
            f"{best[1]} keeps more of what {name} knew ({_write_share(best[0], least)}) than {worst[1]} "
            f"({_write_share(worst[0], least)}), a difference that chance {chance}."
        )
    sentence = (
        f"Of {len(known)} compressed models, {best[1]} keeps most of what {name} knew ({_write_share(best[0], least)}) "
        f"and {worst[1]} least ({_write_share(worst[0], least)})."
    )
    if not alike:
        return f"{sentence} No other keeps as much, and chance does not explain it."
    named = join_names([labels[place] for place in alike])
    return f"{sentence} {count(len(alike))} cannot be told apart from the best: {named}."


_NAMED = 4  # maximum number of names in a sentence


def join_names(names: Sequence[str]) -> str:
    """Join names; of many, only the first ones.

    >>> join_names(["a"]), join_names(["a", "b"]), join_names(list("abcdef"))
    ('a', 'a and b', 'a, b, c, d and 2 more')
    """
    return join_words([*names[:_NAMED], *([f"{len(names) - _NAMED} more"] if len(names) > _NAMED else [])])


def join_words(parts: Sequence[str]) -> str:
    """Join with commas, and with "and" before the last.

    >>> join_words(["a"]), join_words(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _get_kept(known: tuple[Counts, str]) -> float:
    return known[0].kept or 0.0


def _write_ends(kept: Estimate, name: str, least: float) -> str:
    if kept.low is None or kept.high is None:
        return ""
    return f", {name} {write_range(kept.low, kept.high, partial(share_against, limits=[least]))}"


def count_facts(number: int) -> str:
    return "1 fact" if number == 1 else f"{count(number)} facts"


def _write_share(counts: Counts, least: float) -> str:
    return f"{count(counts.both)} of {count(counts.known_before)}, {_write_percent(counts, least)}"


def _write_percent(counts: Counts, least: float) -> str:
    return share_against(counts.kept or 0.0, [least])


ENOUGH = 0.95  # the share kept at which a model is good enough, unless a gate sets another
LEAST = 0.05  # the smallest amount of pruning that is advised
FINEST = "int8-weights"  # the scheme with the smallest error
MOST = 20_000  # facts: the largest number that is worth evaluating for one share


def find_least(gates: Iterable[Gate]) -> float:
    """Return the share of all facts at which a model is good enough. Pages write shares of all facts against it."""
    return next((gate.least for gate in gates if gate.of is None), ENOUGH)


def write_kept_against(kept: Estimate, gates: Iterable[Gate]) -> str:
    """Write the share of all facts that is kept and its interval, with enough digits to show whether it is enough."""
    return write_estimate(kept, partial(share_against, limits=[find_least(gates)]))


def write_advice(comparison: Comparison, path: str | None = None, least: float = ENOUGH) -> str:
    """Return the advice; empty if the numbers support none: the interval must lie on one side of `least`, unless the
    gate was decided early. `path` is where the user has the model's source."""
    counts, gate = comparison.counts, comparison.early.gate if comparison.early else least
    if not counts.known_before:
        return "Next: choose facts that the original knows (-p PROBE); it knew none of these." if counts.n else ""
    kept = comparison.kept
    low, high = 0.0 if kept.low is None else kept.low, 1.0 if kept.high is None else kept.high
    wanted = f"{100 * gate:g} %"
    if comparison.early:
        # The interval may span a gate that is decided for these facts, because it covers other facts too.
        if comparison.early.met:
            return f"Next: deploy it, if {wanted} is enough."
    elif low >= gate:
        return f"Next: deploy it, if {wanted} is enough: the interval lies above."
    elif high >= gate:
        return _advise_more_facts(comparison, gate)
    return advise_less(comparison, f"less than {wanted} is kept", path)


def estimate_facts_needed(comparison: Comparison, gate: float) -> int | None:
    """Return about how many known facts decide on which side of the gate the share lies; None for more than `MOST`."""
    needed = count_facts_to_decide(comparison.counts, gate, design_of_kept(comparison.clusters))
    return needed if needed is not None and needed <= MOST else None


def _advise_more_facts(comparison: Comparison, gate: float) -> str:
    counts, wanted = comparison.counts, f"{100 * gate:g} %"
    needed = estimate_facts_needed(comparison, gate)
    if needed is None:
        alone = count_facts_to_decide(counts, gate)
        if alone is not None and alone <= MOST:
            return (
                "Next: evaluate facts of more relations: what is kept differs so much between these that more of their "
                f"facts would not soon show whether {wanted} is kept."
            )
        return (
            f"Next: look at the facts lost: the share kept is too close to {wanted} for more facts of these probes to "
            "decide soon."
        )
    return (
        f"Next: evaluate more facts: about {round_up(needed)} that the original knows would tell whether {wanted} is "
        f"kept, and it knew {count(counts.known_before)} of these{_advise_limit(comparison, needed)}."
    )


def _advise_limit(comparison: Comparison, needed: int) -> str:
    """Say how to get that many facts, if the probe has them."""
    counts = comparison.counts
    limits = [probe.limit for probe in comparison.probes]
    if len(limits) != 1 or limits[0] is None:
        return ""
    limit = math.ceil(1.1 * needed * counts.n / counts.known_before / 100) * 100
    more = f"--limit {limit}" if limit < comparison.probes[0].facts_read else "without --limit"
    enough = limit <= comparison.probes[0].facts_read
    return f" ({more})" if enough else f" ({more}, and with more probes)"


def advise_less(comparison: Comparison, reason: str, path: str | None) -> str:
    model = comparison.model
    try:
        # The recipe of a model that was not made from the original is only its last step.
        is_whole = model.recipe and comparison.source_matches is not False
        recipe = Recipe.from_dict(dict(model.recipe or {})) if is_whole else None
    except CompressknowError:
        # The recipe is from another version, or needs a package that is not installed.
        recipe = None
    milder = find_milder(recipe, model.groups or {}) if recipe else None
    if milder is None:
        return f"Next: compress less, or in another way: {reason}."
    name = clean(str((model.source or {}).get("name") or ""), 120)
    # The bare name of a folder would not lead to it.
    source = path or (name if "/" in name else "MODEL")
    change, milder_recipe = milder
    if is_larger_by_final_layer(model.groups or {}):
        spared = _spare_final(milder_recipe.steps)
        if spared != milder_recipe.steps:
            change = f"{change}, and leave the final layer as it is"
            milder_recipe = replace(milder_recipe, steps=spared)
    options = format_options(milder_recipe)
    command = f": compressknow convert {shlex.join([source, 'OUTPUT', *options])}" if options else ""
    return f"Next: {reason}; {change}{command}"


def is_larger_by_final_layer(groups: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a model is larger than its source because its final layer no longer shares its weight with the
    embedding. `groups` have ``bytes_before`` and ``bytes_after``."""
    keys = "bytes_before", "bytes_after"
    before, after = ({name: group.get(key) or 0 for name, group in groups.items()} for key in keys)
    is_untied = not before.get("final") and after.get("final", 0) > 0
    return is_untied and sum(after.values()) > sum(before.values())


def _spare_final(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps without the final layer, unless a scope would be empty, or modules are named."""

    def spare(where: Where) -> Where:
        scopes = tuple("blocks" if name == "overall" else name for name in where.scope if name != "final")
        return where if where.include or not scopes else replace(where, scope=scopes)

    return tuple(
        replace(step, where=spare(step.where)) if isinstance(step, Prune | Quantize) else step for step in steps
    )


# A change in words, and the changed steps.
_Change = tuple[str, Sequence[Step]]


def find_milder(recipe: Recipe, groups: Mapping[str, Mapping[str, Any]]) -> tuple[str, Recipe] | None:
    """Return what a milder recipe changes, and that recipe; None if there is none. `groups` have a `relative_error`."""
    steps = recipe.steps
    changed = (
        _halve(steps, DropBlocks, "blocks", "drop {half} instead of {most} blocks", 1)
        or _leave_out(steps, DropBlocks, "drop no blocks")
        or _halve(steps, DropNeurons, "amount", "drop {half} of the neurons instead of {most}", LEAST)
        or _leave_out(steps, DropNeurons, "drop no neurons")
        or _halve(steps, Prune, "amount", "prune {half} of the weights instead of {most}", LEAST)
        or _leave_out(steps, Prune, "do not prune")
        or _round_finer(steps)
        or _spare_worst(steps, groups)
    )
    if changed is None:
        return None
    change, milder = changed
    calibration = recipe.calibration if any(step.calibrated for step in milder) else None
    return change, replace(recipe, steps=tuple(milder), calibration=calibration)


def _leave_out(steps: Sequence[Step], kind: type[Step], change: str) -> _Change | None:
    others = [step for step in steps if not isinstance(step, kind)]
    return (change, others) if 0 < len(others) < len(steps) else None


def _halve(steps: Sequence[Step], kind: type[Step], name: str, change: str, least: float) -> _Change | None:
    amounts = [getattr(step, name) for step in steps if isinstance(step, kind)]
    # Blocks that are named cannot be halved.
    if not amounts or any(isinstance(amount, str) or amount / 2 < least for amount in amounts):
        return None

    def halve(amount: float) -> float:
        return amount // 2 if isinstance(amount, int) else round(amount / 2, 4)

    def write(amount: float) -> str:
        return str(amount) if isinstance(amount, int) else f"{100 * amount:.3g} %"

    try:
        halved = [
            replace(step, **{name: halve(getattr(step, name))}) if isinstance(step, kind) else step  # type: ignore[arg-type]
            for step in steps
        ]
    except UsageError:
        # A pattern such as 2:4 has one amount.
        return None
    most = max(amounts)
    return change.format(half=write(halve(most)), most=write(most)), halved


def _round_finer(steps: Sequence[Step]) -> _Change | None:
    """Quantize with less error: by GPTQ, or else only the weights, to 8 bits."""
    for place, step in enumerate(steps):
        if not isinstance(step, Quantize) or step.scheme == FINEST:
            continue
        before, after = steps[:place], steps[place + 1 :]
        if step.chosen.bits < PAPER_BITS and step.rounding == "nearest":
            return "round by GPTQ instead of to nearest", (*before, replace(step, rounding="gptq"), *after)
        finest = Quantize(FINEST, step.where)
        return f"quantize to {FINEST} instead of {step.scheme}", (*before, finest, *after)
    return None


def _spare_worst(steps: Sequence[Step], groups: Mapping[str, Mapping[str, Any]]) -> _Change | None:
    """Spare the group of layers whose weights changed most, if several changed and each has a scope."""
    errors = {name: group.get("relative_error") or 0.0 for name, group in groups.items()}
    changed = sorted((name for name, error in errors.items() if error > 0), key=lambda name: errors[name])
    if (
        len(changed) < 2
        or not set(changed) <= set(PAPER_SCOPES) | {"final"}
        or errors[changed[-1]] == errors[changed[0]]
    ):
        return None
    *rest, worst = changed
    where = Where(tuple(rest))
    if {step.where for step in steps if isinstance(step, Prune | Quantize)} <= {where}:
        return None
    spared = [replace(step, where=where) if isinstance(step, Prune | Quantize) else step for step in steps]
    return f"leave {worst} as it is: its weights changed most", spared
