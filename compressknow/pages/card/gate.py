"""Check models against gates, report results as an error, JUnit XML and a job summary, and recommend a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import starmap
from typing import Any
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from compressknow.base.errors import GateNotMet, GateUndecided, UsageError
from compressknow.base.format import (
    answer,
    clean,
    count,
    parse_share,
    share_against,
    write_percent,
    write_size,
    write_two_sizes,
)
from compressknow.comparison.paired import is_as_small, rank_models
from compressknow.comparison.records import Estimate
from compressknow.evaluate.answers import Answers
from compressknow.pages.card.verdict import count_facts, estimate_facts_needed, join_names, round_up, write_kept_against
from compressknow.pages.card.warnings import AT_CHANCE, FEW_FACTS, estimate_rounding_kept, is_at_chance, list_probes
from compressknow.pages.pages import escape_markdown, render
from compressknow.pages.parts import Table, write_prompt
from compressknow.pages.records import Card, Comparison, Gate, Recommendation, label_models, name_models, write_estimate

SUMMARY = "summary.md"
# Lost facts that a summary shows, domains, and results of gates: a comment on GitHub has at most 65,536 characters.
_FACTS, _DOMAINS, _MOST_RESULTS = 5, 6, 100
_RESULTS = {True: "met", False: "not met", None: "undecided"}


def parse_gates(values: float | str | Sequence[float | str] | None, *, strict: bool = False) -> tuple[Gate, ...]:
    """Return the gates of ``--fail-under``: shares, ``90%``, ``NAME=SHARE``. Raises UsageError for anything else.

    >>> parse_gates([0.9, "science=85%"])
    (Gate(least=0.9, of=None, strict=False), Gate(least=0.85, of='science', strict=False))
    """
    listed: Any = [] if values is None else values
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        listed = [listed]
    gates = [_parse(value, strict=strict) for value in listed]
    if twice := next((gate for place, gate in enumerate(gates) if gate.of in [g.of for g in gates[:place]]), None):
        raise UsageError(f"--fail-under is given twice for {twice.of or 'all facts'}.", hint="Leave out one of them.")
    return tuple(gates)


def _parse(value: float | str, *, strict: bool) -> Gate:
    name, sign, text = value.rpartition("=") if isinstance(value, str) else ("", "", str(value))
    if sign and not name.strip():
        hint = "Is a variable in your script unset?"
        raise UsageError(f"--fail-under {value} names no domain or relation.", hint=hint)
    try:
        least = parse_share(text)
    except (ArithmeticError, ValueError):
        least = -1.0
    if not 0 <= least <= 1:
        raise UsageError(
            f"--fail-under must be between 0 and 1: {text.strip() or value}.",
            hint="Write 95 % as 0.95 or 95%, and a gate on a domain as science=0.85.",
        )
    return Gate(least, name.strip() or None, strict)


def check_gates(gates: Sequence[Gate], *, strict: bool = False, early: bool = False, models: int = 1) -> None:
    """Raise UsageError if `strict` or `early` lacks a gate to decide, or has one that it cannot decide."""
    if not gates and (strict or early):
        option = "--strict" if strict else "--early"
        raise UsageError(f"{option} needs a gate.", hint=f"Add --fail-under SHARE, or leave out {option}.")
    if strict and any(gate.least == 1 for gate in gates):
        raise UsageError(
            "--strict with a gate of 100 % is never met: no number of facts shows that nothing at all is lost.",
            hint="Choose a lower --fail-under, or leave out --strict to use the share alone.",
        )
    if not early:
        return
    if [gate.of for gate in gates] != [None]:
        raise UsageError("--early decides a single gate, on all facts.", hint="Give one --fail-under SHARE.")
    if models > 1:
        raise UsageError(
            f"--early decides for one compressed model, not for {models}.",
            hint="Give one model, or leave out --early: each of several would need its own facts.",
        )
    if strict:
        raise UsageError(
            "--early and --strict cannot be combined: --early continues until it can decide.",
            hint="Leave out one of them.",
        )


def hold_to_gates(result: object, card: Card) -> None:
    """Check every compressed model against each gate of a card; errors carry the caller's `result`. A model whose
    interval spans a strict gate has neither met nor missed it.

    Raises GateNotMet if a model keeps less, or if the original knew nothing that could be kept; GateUndecided if that
    is undecided for one model and all others meet it; UsageError if no facts were evaluated.
    """
    if not card.gates:
        return
    if any(comparison.only_texts for comparison in card.comparisons):
        raise UsageError("--fail-under needs facts, and none were evaluated.", hint="Add a probe of facts: -p atlas.")
    labels = label_models(card.comparisons)
    judged = [
        (label, comparison, gate, gate.is_met(comparison))
        for label, comparison in zip(labels, card.comparisons, strict=True)
        for gate in card.gates
    ]
    unmet: GateNotMet | GateUndecided
    if failed := [(label, c, gate) for label, c, gate, met in judged if met is False]:
        is_known = any(gate.measure_kept(c)[0].known_before for _, c, gate in failed)
        share = describe_share(gate for *_, gate in failed)
        opening = f"Less than {share} is kept" if is_known else f"It cannot be judged whether {share} is kept"
        hint = "A report (-o report.html) lists the lost facts and the domains; compress less, or lower --fail-under."
        if not is_known:
            hint = "Choose facts that the original knows (-p PROBE)."
        elif all(is_at_chance(c) for _, c, _ in failed):
            hint = f"Evaluate more facts, or another probe (-p): {AT_CHANCE}"
        unmet = GateNotMet(f"{opening}: {'; '.join(starmap(_describe_shortfall, failed))}.", hint=hint)
    elif unsure := [(label, c, gate) for label, c, gate, met in judged if met is None]:
        shares = (
            f"{f'of {gate.of}, ' if gate.of else ''}{label} keeps {_write_kept(c, gate)}" for label, c, gate in unsure
        )
        unmet = GateUndecided(
            f"It is undecided whether {describe_share(gate for *_, gate in unsure)} is kept: {'; '.join(shares)}.",
            hint=_advise_more_facts([(c, gate) for _, c, gate in unsure]),
        )
    else:
        return
    unmet.result = result
    raise unmet


def describe_share(gates: Iterable[Gate]) -> str:
    """Return ``95 % of the knowledge`` for one gate; for several, words without a number."""
    several = list(dict.fromkeys(gates))
    if len(several) > 1:
        return "what --fail-under asks"
    return f"{100 * several[0].least:g} % of {several[0].of or 'the knowledge'}"


def _advise_more_facts(unsure: Sequence[tuple[Comparison, Gate]]) -> str:
    """Say how many known facts would decide all gates if the shares kept stayed the same."""
    needed = [estimate_facts_needed(comparison, gate.least) for comparison, gate in unsure if not gate.of]
    or_share = "or leave out --strict to use the share alone."
    if None in needed:
        return f"More of these facts would not soon decide it: choose other probes (-p), {or_share}"
    if len(needed) < len(unsure):
        return f"Evaluate more facts (--limit, more probes), {or_share}"
    about = round_up(max(filter(None, needed)))
    return f"Evaluate more facts (--limit, more probes): about {about} that the original knows would decide it."


def _describe_shortfall(label: str, comparison: Comparison, gate: Gate) -> str:
    counts, _ = gate.measure_kept(comparison)
    of = f" of {gate.of}" if gate.of else ""
    if counts.kept is None:
        return f"the original knew none of {count_facts(counts.n)}{of}, so {label} has none to keep"
    kept = share_against(counts.kept, [gate.least])
    return f"{label} keeps {count(counts.both)} of {count(counts.known_before)}{of} ({kept})"


def render_junit(card: Card) -> str:
    """Return gates as test cases, one suite per model; a gate that is not met, or is undecided, fails."""
    suites = Element("testsuites", name="compressknow")
    for name, comparison in zip(name_models(card), card.comparisons, strict=True):
        suite = SubElement(suites, "testsuite", name=name, tests=str(len(card.gates)))
        failures = 0
        for gate in card.gates:
            case = SubElement(suite, "testcase", classname=f"compressknow.{name}", name=f"keeps {gate.in_words}")
            met = gate.is_met(comparison)
            if not met:
                failures += 1
                kind = "GateNotMet" if met is False else "GateUndecided"
                SubElement(case, "failure", type=kind, message=_write_kept(comparison, gate)).text = comparison.verdict
        suite.set("failures", str(failures))
        SubElement(suite, "system-out").text = " ".join(filter(None, (comparison.verdict, comparison.next)))
    indent(suites)
    return f"<?xml version='1.0' encoding='utf-8'?>\n{tostring(suites, encoding='unicode')}\n"


def render_job_summary(card: Card) -> str:
    """Return Markdown with the results of gates and, of a single model, its worst domains and some lost facts."""
    results = [
        (name, write_size(each.model.bytes), *(clean(cell, 80) for cell in cells))
        for name, each in zip(name_models(card), card.comparisons, strict=True)
        for cells in list_results(card, each)
    ]
    # If there are too many, leave out gates that are met.
    shown = sorted(results, key=lambda cells: cells[-1] == _RESULTS[True])[:_MOST_RESULTS]
    single = card.comparisons[0] if len(card.comparisons) == 1 else None
    grades = single.grades if single else ()
    worst = sorted(grades, key=lambda grade: 1.0 if grade.kept.value is None else grade.kept.value)[:_DOMAINS]
    domains = [
        f"{escape_markdown(grade.subject)} {write_percent(grade.counts.both, grade.counts.known_before)}"
        for grade in worst
        if grade.counts.known_before
    ]
    facts = single.lost[:_FACTS] if single and card.show_facts else ()
    lost = [f"{write_prompt(fact.prompt)} ({clean(fact.gold)}, now {answer(fact.after)})" for fact in facts]
    more = len(results) - len(shown)
    results = shown if more else results
    return render("summary.md.j2", card=card, results=results, more=more, domains=domains, lost=lost)


def list_results(card: Card, comparison: Comparison) -> list[tuple[str, str, str]]:
    """Return each gate of a card in words, what the model keeps of its facts, and the result."""
    return [(gate.in_words, _write_kept(comparison, gate), _RESULTS[gate.is_met(comparison)]) for gate in card.gates]


def tabulate_results(card: Card, comparison: Comparison) -> Iterator[Table]:
    """Yield a table of a card's gates, if it has any."""
    if rows := tuple(tuple(clean(cell, 200) for cell in cells) for cells in list_results(card, comparison)):
        yield Table("Gates", ("Gate", "Kept (95 % interval)", "Result"), rows, prose=True)


def _write_kept(comparison: Comparison, gate: Gate) -> str:
    counts, kept = gate.measure_kept(comparison)
    estimate = write_estimate(kept, partial(share_against, limits=[gate.least]))
    return f"{count(counts.both)} of {count(counts.known_before)}, {estimate}"


def recommend_model(
    original: Answers,
    compressed: Sequence[Answers],
    comparisons: Sequence[Comparison],
    *,
    gates: Sequence[Gate] = (),
    within: int | None = None,
    broken: Collection[int] = (),
) -> Recommendation | None:
    """Choose the smallest model that keeps enough (of equally small ones, the best), or no model if the original is at
    chance; None if the models were not evaluated on the same facts, or the original knew none.

    The gates define enough. Without gates, it is what rounding alone keeps, within both intervals; if that is unknown
    or no model keeps it, it is what no test distinguishes from the model that keeps most. `within` is the maximum size
    in bytes, `broken` the indices of models that produce NaN.
    """
    probes = [{probe.probe for probe in c.probes} for c in comparisons]
    if any(each != probes[0] for each in probes) or not any(c.counts.known_before for c in comparisons):
        return None
    of = [[answer for answer in each.answers if answer.probe in probes[0]] for each in (original, *compressed)]
    sizes = [comparison.model.bytes for comparison in comparisons]
    standing = rank_models(of[0], of[1:], sizes)
    conclude = partial(Recommendation, standings=tuple(standing), within=within)
    labels = label_models(comparisons)
    sound = {place: size for place, size in enumerate(sizes) if size is not None and place not in broken}
    fitting = [place for place, size in sound.items() if within is None or size <= within]
    if not sound:
        return conclude(None, "None is recommended: no working model has a known size.")
    if all(map(is_at_chance, comparisons)):
        return conclude(None, f"None is recommended. Evaluate more facts, or another probe (-p): {AT_CHANCE}")
    if within is not None and not fitting:
        least, suffix = min(sound, key=sound.__getitem__), " without NaN" if broken else ""
        allowed, size = write_two_sizes(within, sound[least])
        return conclude(
            None,
            f"No model{suffix} has at most {allowed}: none is recommended. The smallest, {labels[least]}, has {size}.",
        )
    at_most = f" of at most {write_size(within)}" if within is not None else ""
    rounding = estimate_rounding_kept(list_probes(comparisons))
    best, before = max(fitting, key=lambda place: standing[place].keeps), ""
    if gates:
        # A model may keep that share and still miss a strict gate because of its interval.
        floor, sure = join_names([gate.in_words for gate in gates]), "surely " if gates[0].strict else ""
        enough = [i for i in fitting if all(gate.is_met(comparisons[i]) for gate in gates)]
        one, several = f"that {sure}keeps {floor}", f"that {sure}keep {floor}"
        if not enough:
            most = f"{labels[best]} keeps most, {write_kept_against(comparisons[best].kept, gates)}"
            return conclude(None, f"No model{at_most} {sure}keeps {floor}: none is recommended. {most}.")
    else:
        floor = f"rounding alone, which keeps {write_estimate(rounding)}" if rounding.value is not None else ""
        enough = [place for place in fitting if _may_keep_as_much(comparisons[place].kept, rounding)]
        one = several = f"that the intervals do not distinguish from {floor}"
    if keeps_most := not enough:
        enough = [best, *(place for place in standing[best].alike if place in fitting)]
        before = f"none keeps as much as {floor}; " if floor else ""
        several = f"that no test distinguishes from {labels[best]}, which keeps most"
    smallest = min(sound[place] for place in enough)
    # The best of equally small ones.
    small = [place for place in enough if is_as_small(sound[place], smallest)]
    taken = max(small, key=lambda place: (standing[place].keeps, -sound[place]))
    if keeps_most and taken == best:
        choice = f"keeps most{f' among those{at_most}' if at_most else ''}"
        by = "" if sound[taken] == smallest else "more than 1 % "
        choice += f", and of the models that no test distinguishes from it, none is {by}smaller" * (len(enough) > 1)
    elif len(enough) == 1:
        choice = f"is the only model{at_most} {one}"
    else:
        standout = "is the smallest" if sound[taken] == smallest else "keeps most among the smallest (within 1 %)"
        choice = f"{standout} of {count(len(enough))} models{at_most} {several}"
    alike = join_names([f"{labels[place]} ({write_size(sizes[place])})" for place in standing[taken].alike])
    rivals = "the other" if len(comparisons) == 2 else "each of the others"
    others = f"No test distinguishes it from {alike}." if alike else f"What {rivals} keeps differs by more than chance."
    kept = write_kept_against(comparisons[taken].kept, gates)
    reason = f"Take {labels[taken]} ({write_size(sizes[taken])}): {before}it {choice}. It keeps {kept}. {others}"
    known = comparisons[taken].counts.known_before
    if not gates and known < FEW_FACTS:
        # The fewer facts, the worse the models that nothing distinguishes from the best.
        reason += f" But the original knew only {count_facts(known)}: evaluate more before you decide."
    return conclude(taken, reason)


def _may_keep_as_much(kept: Estimate, rounding: Estimate) -> bool:
    """Return whether a model may keep as much as rounding alone does, by the interval of the difference (MOVER, from
    both intervals): a sample in which rounding lost nothing does not prove that it never does."""
    if kept.value is None or rounding.value is None:
        return False
    room = math.hypot((kept.high or 0.0) - kept.value, rounding.value - (rounding.low or 0.0))
    return kept.value + room >= rounding.value


def mark_models(decision: Recommendation, labels: Sequence[str]) -> list[str]:
    """Return for each model whether it is recommended, unbeaten at its size, or beaten by another."""
    marks = []
    for standing in decision.standings:
        beaten = "beaten by" if standing.is_surely_beaten else "perhaps beaten by"
        winner = standing.beaten_by
        marks.append("unbeaten at its size" if winner is None else f"{beaten} {labels[winner]}")
    if decision.place is not None:
        marks[decision.place] = "recommended"
    return marks
