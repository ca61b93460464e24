"""Write the verdict, one sentence with its numbers, grade the domains, and say what to do next in one line."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.format import NONE, SIGNIFICANT, clean, count, share, share_against, write_p_value, write_percent
from compressknow.comparison.intervals import design_of_kept, estimate_kept, list_clusters, run_mcnemar
from compressknow.comparison.paired import order_domains
from compressknow.comparison.power import SMALL, count_facts_to_decide
from compressknow.comparison.records import Certainty, Counts, EarlyStop, Estimate, ProbeFigures
from compressknow.compress.recipe import Recipe, format_options
from compressknow.compress.steps import PAPER_BITS, PAPER_SCOPES, DropBlocks, DropNeurons, Prune, Quantize, Step, Where
from compressknow.pages.records import NAME_CHARACTERS, SCALE, Comparison, Grade, label_models, write_range

LOWEST = "F"
_SCALE = ", ".join(f"{grade} from {least} % kept" if grade == "A+" else f"{grade} {least} %" for grade, least in SCALE)
LEGEND = f"{_SCALE}, {LOWEST} less. Where the interval reaches over several grades, they are named next to the letter."
SHORT_LEGEND = f"{_SCALE}, {LOWEST} less. A question mark says that the interval reaches over several grades."


def grade_domains(probes: Iterable[ProbeFigures]) -> tuple[Grade, ...]:
    """Return a grade for each domain over all probes."""
    clusters: dict[str, tuple[Counts, ...]] = {}
    for probe in probes:
        for group in probe.by_subject:
            # Of a probe of one relation, facts are what was drawn; of others, a domain may have one relation alone.
            own = group.relations if len(probe.by_relation) > 1 else list_clusters(group.relations)
            clusters[group.name] = (*clusters.get(group.name, ()), *own)
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


def write_verdict(original: str, counts: Counts, kept: Estimate, certainty: Certainty) -> str:
    """Return the sentence on one compressed model, and one on what so many facts could have shown.

    `kept` has the interval to go by, `certainty` the paired test and what would have been seen.

    >>> from compressknow.comparison.intervals import estimate_proportion, run_mcnemar
    >>> from compressknow.comparison.records import PairedTest
    >>> counts = Counts(both=90, lost=10, gained=1, neither=99)
    >>> certainty = Certainty(PairedTest(run_mcnemar(counts), "fact"))
    >>> print(write_verdict("bert", counts, estimate_proportion(90, 100), certainty))
    Keeps 90 of 100 facts that bert knew (90.0 %, interval 82.6 to 94.5 %): it forgot 10 and gained 1, a net \
loss that chance does not explain (p = 0.012).
    """
    name = clean(original, NAME_CHARACTERS)
    if not counts.n:
        return f"The models were not evaluated on any common fact, so nothing can be said about what {name} lost."
    if not counts.known_before:
        gained = f"; the compressed model answers {count(counts.gained)} right" if counts.gained else ""
        return f"{name} knew none of {count_facts(counts.n)}, so there is nothing to keep{gained}."
    interval = f"({write_percent(counts.both, counts.known_before)}{_write_ends(kept, 'interval')})"
    sentence = _write_kept(name, counts, interval, certainty.test.p)
    return f"{sentence} {describe_power(counts, certainty)}".rstrip()


def _write_kept(name: str, counts: Counts, interval: str, p: float | None) -> str:
    lost, gained = (count(number) if number else "none" for number in (counts.lost, counts.gained))
    change = ", which evens out" if counts.lost else ""
    # Many of both, of a model that is much changed, can even out.
    if p is not None and counts.lost != counts.gained:
        net, explained = "loss" if counts.lost > counts.gained else "gain", "chance could explain"
        if p < SIGNIFICANT:
            explained = "chance does not explain"
        elif (run_mcnemar(counts) or 0.0) < SIGNIFICANT:
            # Too uneven for facts drawn one by one, but of few relations.
            explained = "the choice of relations could explain"
        change = f", a net {net} that {explained} ({write_p_value(p)})"
    opening = f"Keeps {count(counts.both)} of {count_facts(counts.known_before)} that {name} knew {interval}"
    return f"{opening}: it forgot {lost} and gained {gained}{change}."


def describe_power(counts: Counts, certainty: Certainty) -> str:
    """Say which loss so many facts show, and how many facts it takes for a small one; nothing if that is not known.

    >>> describe_power(Counts(both=185), Certainty(smallest_loss=0.0424, facts_for_two=394))
    'A net loss under 4.2 % of these 185 may go unseen; 400 known facts would show 2 %.'
    >>> describe_power(Counts(both=8), Certainty(smallest_loss=0.997))
    'A net loss under 100 % of these 8 may go unseen.'
    """
    more, known = certainty.facts_for_two, count(counts.known_before)
    if certainty.smallest_loss is None:
        return f"So few facts show no net loss at all; {round_up(more)} known ones would show 2 %." if more else ""
    # Two digits: 4.2, 12, but no 1e+02.
    least = float(f"{100 * certainty.smallest_loss:.2g}")
    seen = f"A net loss under {least:g} % of these {known} may go unseen"
    if more is None or certainty.smallest_loss <= SMALL:
        return f"{seen}."
    return f"{seen}; {round_up(more)} known facts would show {100 * SMALL:g} %."


def describe_early(early: EarlyStop | None) -> str:
    """Say how a gate was decided early, and how many facts it took; nothing if it was not.

    >>> early = EarlyStop(0.8, 0.05, facts=64, known=40, of=4021, kept=Estimate(0.95, 0.86, 0.99), met=True)
    >>> print(describe_early(early))
    It took 64 of 4,021 facts in random order to know that at least 80 % of the knowledge is kept (confidence \
sequence 86.0 to 99.0 %, wrong in at most 5 of 100 runs).
    """
    if early is None:
        return ""
    known = f"{'at least' if early.met else 'less than'} {100 * early.gate:g} % of the knowledge is kept"
    if early.facts == early.of:
        return f"It took all {count(early.of)} facts to know that {known}."
    sequence = _write_ends(early.kept, "confidence sequence").removeprefix(", ")
    return (
        f"It took {count(early.facts)} of {count(early.of)} facts in random order to know that {known} ({sequence}, "
        f"wrong in at most {100 * early.level:g} of 100 runs)."
    )


def round_up(facts: int) -> str:
    """Say about how many: two digits, rounded up.

    >>> round_up(4514), round_up(94)
    ('4,600', '94')
    """
    step = 10 ** max(0, len(str(facts)) - 2)
    return count(-(-facts // step) * step)


def write_joint_verdict(original: str, comparisons: Sequence[Comparison], alike: Sequence[int] | None) -> str:
    """Return the sentence on several compressed models: the best, the worst, and those `alike` (by place), which no
    test tells from the best; None if they were not evaluated on the same facts."""
    name = clean(original, NAME_CHARACTERS)
    labels = label_models(comparisons)
    known = [(c.counts, label) for c, label in zip(comparisons, labels, strict=True) if c.counts.known_before]
    if not known:
        return f"{name} knew none of the facts, so there is nothing that a compressed model could keep."
    best, worst = max(known, key=_get_kept), min(known, key=_get_kept)
    if alike is None:
        return f"The {len(comparisons)} compressed models answered different facts: what each keeps cannot be compared."
    if _get_kept(best) == _get_kept(worst):
        every = "Both" if len(known) == 2 else f"All {len(known)}"
        return f"{every} compressed models keep {share(_get_kept(best))} of what {name} knew."
    if len(known) == 2:
        chance = "could explain" if alike else "does not explain"
        return (
            f"{best[1]} keeps more of what {name} knew ({_write_share(best[0])}) than {worst[1]} "
            f"({_write_share(worst[0])}), a difference that chance {chance}."
        )
    sentence = (
        f"Of {len(known)} compressed models, {best[1]} keeps most of what {name} knew ({_write_share(best[0])}) "
        f"and {worst[1]} least ({_write_share(worst[0])})."
    )
    if not alike:
        return f"{sentence} No other keeps as much: that is more than chance."
    named = join_names([labels[place] for place in alike])
    return f"{sentence} {count(len(alike))} cannot be told apart from the best: {named}."


# So many of several are named.
_NAMED = 4


def join_names(names: Sequence[str]) -> str:
    """Return names in a row, of many the first ones.

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


def _write_ends(kept: Estimate, name: str) -> str:
    if kept.low is None or kept.high is None:
        return ""
    return f", {name} {write_range(kept.low, kept.high, partial(share_against, limits=[ENOUGH]))}"


def count_facts(number: int) -> str:
    return "1 fact" if number == 1 else f"{count(number)} facts"


def _write_share(counts: Counts) -> str:
    return f"{count(counts.both)} of {count(counts.known_before)}, {write_percent(counts.both, counts.known_before)}"


ENOUGH = 0.95  # the share kept from which a model is good enough, where no gate says another
LEAST = 0.05  # less pruning than this is none
FINEST = "int8-weights"  # the scheme that errs least
MOST = 20_000  # facts beyond this many nobody evaluates to know a share


def write_advice(comparison: Comparison, path: str | None = None, least: float = ENOUGH) -> str:
    """Return the line; nothing if the numbers carry none. `path` is where the user has the model's source.

    They are held to `least`, on one side of which the interval must lie, or else to the gate that was decided early.
    """
    counts, gate = comparison.counts, comparison.early.gate if comparison.early else least
    if not counts.known_before:
        return "Next: choose facts that the original knows (-p PROBE); it knew none of these." if counts.n else ""
    kept = comparison.kept
    low, high = 0.0 if kept.low is None else kept.low, 1.0 if kept.high is None else kept.high
    wanted = f"{100 * gate:g} %"
    if comparison.early:
        # The interval is of other facts too: it may reach to both sides of a gate that is decided of these.
        if comparison.early.met:
            return f"Next: deploy it, if {wanted} is enough."
    elif low >= gate:
        return f"Next: deploy it, if {wanted} is enough: the interval lies above."
    elif high >= gate:
        return _advise_more_facts(comparison, gate)
    return advise_less(comparison, f"less than {wanted} is kept", path)


def estimate_facts_needed(comparison: Comparison, gate: float) -> int | None:
    """Return about how many known facts tell on which side of the gate this share lies; None for more than `MOST`."""
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
                f"facts would not soon tell whether {wanted} is kept."
            )
        return (
            f"Next: look at the facts lost: the share kept is so near {wanted} that no number of facts of these probes "
            "would soon tell."
        )
    # It cannot take fewer than did not tell.
    about = max(needed, counts.known_before + 1)
    return (
        f"Next: evaluate more facts: about {round_up(about)} that the original knows would tell whether {wanted} is "
        f"kept, and it knew {count(counts.known_before)} of these{_advise_limit(comparison, about)}."
    )


def _advise_limit(comparison: Comparison, needed: int) -> str:
    """Say how to get so many, where the probes have them."""
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
        recipe = Recipe.from_dict(dict(model.recipe)) if model.recipe else None
    except CompressknowError:
        # It is from another version, or needs a package that is not installed.
        recipe = None
    found = find_milder(recipe, model.groups or {}) if recipe else None
    if found is None:
        return f"Next: compress less, or in another way: {reason}."
    name = clean(str((model.source or {}).get("name") or ""), 120)
    # The name of a folder alone would lead nowhere.
    source = path or (name if "/" in name else "MODEL")
    change, milder = found
    options = format_options(milder)
    command = f": compressknow convert {shlex.join([source, 'OUTPUT', *options])}" if options else ""
    return f"Next: {reason}; {change}{command}"


# In words what is done otherwise, and the steps that do it.
_Change = tuple[str, Sequence[Step]]


def find_milder(recipe: Recipe, groups: Mapping[str, Mapping[str, Any]]) -> tuple[str, Recipe] | None:
    """Return how a milder recipe differs, by the `relative_error` of groups, and that recipe; None if there is none."""
    steps = recipe.steps
    found = (
        _halve(steps, DropBlocks, "blocks", "drop {half} blocks in place of {most}", 1)
        or _halve(steps, DropNeurons, "amount", "drop {half} of the neurons in place of {most}", LEAST)
        or _halve(steps, Prune, "amount", "prune {half} of the weights in place of {most}", LEAST)
        or _leave_out(steps)
        or _round_finer(steps)
        or _spare_worst(steps, groups)
    )
    if found is None:
        return None
    change, milder = found
    calibration = recipe.calibration if any(step.calibrated for step in milder) else None
    return change, replace(recipe, steps=tuple(milder), calibration=calibration)


def _leave_out(steps: Sequence[Step]) -> _Change | None:
    for kind, change in ((Prune, "do not prune"), (DropNeurons, "drop no neurons"), (DropBlocks, "drop no blocks")):
        others = [step for step in steps if not isinstance(step, kind)]
        if 0 < len(others) < len(steps):
            return change, others
    return None


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
    """Quantize with less error: by GPTQ, or else to 8 bits, the weights alone."""
    for place, step in enumerate(steps):
        if not isinstance(step, Quantize) or step.scheme == FINEST:
            continue
        before, after = steps[:place], steps[place + 1 :]
        if step.chosen.bits < PAPER_BITS and step.rounding == "nearest":
            return "round by GPTQ in place of to nearest", (*before, replace(step, rounding="gptq"), *after)
        finest = Quantize(FINEST, step.where)
        return f"quantize to {FINEST} in place of {step.scheme}", (*before, finest, *after)
    return None


def _spare_worst(steps: Sequence[Step], groups: Mapping[str, Mapping[str, Any]]) -> _Change | None:
    """Spare the group of layers whose weights changed most, where several changed and each has a scope."""
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
    return f"leave {worst} as it is, whose weights changed most", spared
