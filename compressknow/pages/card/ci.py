"""A card for a machine that builds: JUnit's XML, a test case a gate, and a summary of a job in some 20 lines."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from compressknow.base.format import estimate, percent, size
from compressknow.pages.card.gate import Gate, is_met, kept_of
from compressknow.pages.card.view import section_names
from compressknow.pages.pages import escape_markdown
from compressknow.pages.records import Card, Comparison

# Lost facts that a summary shows, and domains.
_FACTS, _DOMAINS = 5, 6

SUMMARY = "summary.md"


_RESULTS = {True: "met", False: "not met", None: "undecided"}


def junit(card: Card, gates: Sequence[Gate], *, strict: bool) -> str:
    """Return the gates as test cases, a suite for each compressed model: what is not met has failed, and what cannot be
    told too, as ``undecided``.
    """
    suites = Element("testsuites", name="compressknow")
    for name, comparison in zip(section_names(card), card.comparisons, strict=True):
        suite = SubElement(suites, "testsuite", name=name, tests=str(len(gates)))
        failures = 0
        for gate in gates:
            case = SubElement(suite, "testcase", classname=f"compressknow.{name}", name=f"keeps {gate.in_words}")
            met = is_met(comparison, gate, strict=strict)
            if not met:
                failures += 1
                kind = "GateNotMet" if met is False else "GateUndecided"
                SubElement(case, "failure", type=kind, message=_kept(comparison, gate)).text = comparison.verdict
        suite.set("failures", str(failures))
        SubElement(suite, "system-out").text = " ".join(filter(None, (comparison.verdict, comparison.next)))
    indent(suites)
    return f"<?xml version='1.0' encoding='utf-8'?>\n{tostring(suites, encoding='unicode')}\n"


def job_summary(card: Card, gates: Sequence[Gate], *, strict: bool) -> str:
    """Return what a reviewer needs, as Markdown: the gates, the decision of several models or the domains and first
    losses of one."""
    names = section_names(card)
    lines = [f"### What {escape_markdown(card.original.name)} kept", "", escape_markdown(card.verdict), ""]
    if card.decision:
        lines += [f"**{escape_markdown(card.decision.reason)}**", ""]
    if gates:
        lines += ["| model | size | gate | kept (95 % interval) | |", "| --- | ---: | --- | --- | --- |"]
        for name, comparison in zip(names, card.comparisons, strict=True):
            for gate in gates:
                met = _RESULTS[is_met(comparison, gate, strict=strict)]
                cells = (name, size(comparison.model.bytes), gate.in_words, _kept(comparison, gate), met)
                lines.append(f"| {' | '.join(map(escape_markdown, cells))} |")
        lines.append("")
    if len(card.comparisons) == 1:
        lines += _domains(card.comparisons[0], with_facts=card.show_facts)
    return "\n".join([*lines, f"- Versions: compressknow {card.versions.get('compressknow', '')}", ""])


def _domains(comparison: Comparison, *, with_facts: bool) -> list[str]:
    worst = sorted(comparison.grades, key=lambda grade: 1.0 if grade.kept.value is None else grade.kept.value)
    parts = [
        f"{escape_markdown(grade.subject)} {percent(grade.counts.both, grade.counts.known_before)}"
        for grade in worst[:_DOMAINS]
        if grade.counts.known_before
    ]
    lines = [f"By domain, the worst first: {', '.join(parts)}.", ""] if parts else []
    if with_facts and comparison.lost:
        lost = (f"{fact.prompt} ({fact.gold}, now {fact.after})" for fact in comparison.lost[:_FACTS])
        lines += ["Forgotten, among others:", "", *(f"- {escape_markdown(fact)}" for fact in lost), ""]
    return lines


def _kept(comparison: Comparison, gate: Gate) -> str:
    counts, kept = kept_of(comparison, gate)
    return f"{counts.both} of {counts.known_before}, {estimate(kept.value, kept.low, kept.high)}"
