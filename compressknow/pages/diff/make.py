"""The records of a comparison of two checkpoints: both sides, what both know, the verdict, what to read first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compressknow._version import __version__
from compressknow.base.format import count, number, percent, plain
from compressknow.comparison.differences import Difference, Sums, summed
from compressknow.comparison.paired import Pair, domain_order, paired
from compressknow.comparison.records import Counts
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.gather import PairedAnswers
from compressknow.evaluate.grades import RECOGNIZED, apply_reading, merge_wordings
from compressknow.pages.card import warnings
from compressknow.pages.card.make import make_card
from compressknow.pages.diff.records import Behaviour, CheckpointComparison, KnownBy, SideBySide, names_of
from compressknow.pages.records import Card, Checkpoint
from compressknow.pages.texts import list_text_warnings, write_sentence

TOP = 3
_LONG = 120
_ASK = "To compare their answers instead, choose a probe with -p PROBE."


def checkpoint_of(described: Mapping[str, Any], sha256: str) -> Checkpoint:
    """`described` : by `compressknow.engine.identity.describe`."""
    known: dict[str, Any] = {key: described.get(key) for key in Checkpoint.__dataclass_fields__}
    return Checkpoint(**known | {"sha256": sha256})


def make_comparison(
    a: Checkpoint,
    b: Checkpoint,
    difference: Difference | None,
    behaviour: Behaviour | None,
    *,
    files: Sequence[str] = (),
    show_facts: bool = True,
    command: str | None = None,
) -> CheckpointComparison:
    """The whole comparison, with its verdict and its warnings.

    Parameters
    ----------
    difference : of the weights; None where both are the same to the byte, or where they cannot be read.
    behaviour : of the answers; None where nothing was evaluated.
    files : other files that differ.
    """
    identical = a.sha256 == b.sha256
    return CheckpointComparison(
        verdict=comparison_verdict(names_of(a, b), identical, difference, behaviour),
        a=a,
        b=b,
        identical=identical,
        files=tuple(files),
        difference=difference,
        behaviour=behaviour,
        warnings=tuple(comparison_warnings(a, b, identical, difference, behaviour)),
        show_facts=show_facts,
        versions=dict(behaviour.b_against_a.versions) if behaviour else {"compressknow": __version__},
        command=command,
    )


def comparison_warnings(
    a: Checkpoint, b: Checkpoint, identical: bool, difference: Difference | None, behaviour: Behaviour | None
) -> Iterator[str]:
    """What stands in the wrong place, could not be compared, or is broken; and the warnings on the answers."""
    if warnings.is_made_from(a, b):
        yield "A was made from B, as it says itself: give B first to see what it lost."
    smoothed = [name for name, side in (("A", a), ("B", b)) if side.calibration and side.calibration["smoothed"]]
    if len(smoothed) == 1 and difference:
        yield (
            f"{smoothed[0]} was smoothed: some norms were divided by numbers that the weights behind them were "
            "multiplied with, which cancels out when it runs. The errors here count both; its manifest and its report "
            "leave them out."
        )
    if not identical and difference is None:
        yield _left_out("The weights of a GGUF file are compared with those of another one alone.", behaviour)
    if difference and (packed := difference.packed()):
        yield _packed(len(packed), packed[0].name, behaviour)
    for tensor in difference.tensors if difference else ():
        if not tensor.sums.finite:
            yield f"{plain(tensor.name, _LONG)} holds NaN or infinity: neither it nor what it is a part of has figures."
    if behaviour and not identical:
        yield from behaviour.warnings


def _packed(number: int, example: str, behaviour: Behaviour | None) -> str:
    weights = "1 weight is" if number == 1 else f"{count(number)} weights are"
    said = f"{weights} packed in a form whose values cannot be read here, {plain(example, _LONG)} for one, and left out"
    return _left_out(f"{said} of all figures of weights.", behaviour)


def _left_out(said: str, behaviour: Behaviour | None) -> str:
    return said if behaviour else f"{said} {_ASK}"


def comparison_verdict(
    names: tuple[str, str], identical: bool, difference: Difference | None, behaviour: Behaviour | None
) -> str:
    """The sentences, on the weights and, where there are some, on the answers.

    Parameters
    ----------
    names : what to call a and b.
    """
    if identical:
        return f"{names[0]} and {names[1]} are identical: every file that decides an answer is the same to the byte."
    said = [_weights(names, difference)] if difference else []
    said += [_knowledge(names, behaviour)] if behaviour else []
    return " ".join(said) or f"The weights of {names[0]} and {names[1]} could not be compared."


def _weights(names: tuple[str, str], difference: Difference) -> str:
    a, b = names
    changed = [tensor for tensor in difference.tensors if not tensor.same_bytes]
    apart = _apart(difference)
    if not difference.tensors:
        return f"No tensor of {a} and {b} can be compared: {apart or 'there is none'}."
    if not changed:
        if not apart:
            return f"The weights of {a} and {b} are identical to the byte; only other files differ."
        return f"What both {a} and {b} hold is the same to the byte; {apart}."
    total, those = difference.total, sum((tensor.sums for tensor in changed), Sums())
    if not total.energy_change:
        opening = f"{b} stores {count(len(changed))} of {_tensors(len(difference.tensors))} otherwise than {a} does"
        return f"{opening}, with the same values{f'; {apart}' if apart else ''}."
    opening = (
        f"{b} differs from {a} in {count(len(changed))} of {_tensors(len(difference.tensors))} "
        f"({percent(those.numel, total.numel)} of the weights): relative error {number(total.relative_error, 4)}"
    )
    return f"{opening}{_most(difference)}{f'; {apart}' if apart else ''}."


def _most(difference: Difference) -> str:
    """The group that differs most, where there are several."""
    groups = summed(difference.tensors, lambda tensor: tensor.group)
    errors = {group: sum((t.sums for t in those), Sums()).relative_error or 0.0 for group, those in groups.items()}
    if len(errors) < 2 or not any(errors.values()):
        return ""
    group = max(errors, key=lambda group: errors[group])
    return f", most in {group} ({number(errors[group], 4)})"


def _apart(difference: Difference) -> str:
    kinds = Counter(change.kind for change in difference.structure)
    told = {
        "added": "is only in B",
        "missing": "is only in A",
        "reshaped": "has another shape",
        "packed": "is packed in a form that cannot be compared",
    }
    several = {"is": "are", "has": "have"}
    parts = []
    for kind, words in told.items():
        if number_of := kinds.get(kind):  # type: ignore[call-overload]
            verb, _, rest = words.partition(" ")
            parts.append(f"{_tensors(number_of)} {verb if number_of == 1 else several[verb]} {rest}")
    return ", ".join(parts)


def _knowledge(names: tuple[str, str], behaviour: Behaviour) -> str:
    there, back = behaviour.b_against_a.comparisons[0].counts, behaviour.a_against_b.comparisons[0].counts
    texts = [write_sentence(figures, names) for figures in behaviour.b_against_a.comparisons[0].texts]
    if not behaviour.b_against_a.comparisons[0].probes:
        return " ".join(texts)
    return " ".join((_facts(names, there, back), *texts))


def _facts(names: tuple[str, str], there: Counts, back: Counts) -> str:
    a, b = names
    if not there.known_before and not back.known_before:
        return f"Neither model knows any of the {count(there.n)} facts."
    return f"{b} knows {_kept(there)} that {a} knows, {a} knows {_kept(back)} that {b} knows."


def _kept(counts: Counts) -> str:
    if not counts.known_before:
        return "none of the 0 facts"
    return (
        f"{count(counts.both)} of the {count(counts.known_before)} facts ({percent(counts.both, counts.known_before)})"
    )


def _tensors(number_of: int) -> str:
    return "1 tensor" if number_of == 1 else f"{count(number_of)} tensors"


def behaviour_of(answers: PairedAnswers, *, show_facts: bool, known: str = RECOGNIZED) -> Behaviour:
    """The statistics in both directions; `known` is as for `make_card`. Raises CompressknowError where the two did not
    answer the same facts.
    """
    answers = PairedAnswers(*(apply_reading(each, known) for each in answers))
    there = make_card(answers.a, [answers.b_like_a], show_facts=show_facts)
    back = make_card(answers.b, [answers.a_like_b], show_facts=show_facts)
    return Behaviour(
        b_against_a=there,
        a_against_b=back,
        answers=tuple(_side_by_side(merge_wordings(answers.a), merge_wordings(answers.b_like_a))) if show_facts else (),
        warnings=tuple(dict.fromkeys((*warnings.warn_of_known(known), *_warnings(answers, there, back)))),
        known=known,
    )


def _warnings(answers: PairedAnswers, there: Card, back: Card) -> Iterator[str]:
    """Those of a report in both directions, but for what concerns grades."""
    yield from warnings.warn_of_models(there.original, back.original)
    yield from warnings.warn_of_recipe(there.original)
    yield from warnings.warn_of_runtimes(answers.a, answers.b_like_a)
    for name, given, card in (("A", answers.a, there), ("B", answers.b, back)):
        comparison = card.comparisons[0]
        yield from warnings.warn_of_answers(name, given)
        yield from warnings.warn_of_figures(comparison.counts, (), comparison.probes, name=name)
    yield from list_text_warnings(there.comparisons[0].texts, ("A", "B"))


def _side_by_side(a: Answers, b: Answers) -> Iterator[SideBySide]:
    facts = [probe for probe in a.probes if not a.record.probes[probe].text]
    pairs = [pair for probe in facts for pair in _paired(probe, a, b) if _differ(pair)]
    for pair in sorted(pairs, key=_place):
        yield _row(pair)


def _paired(probe: str, a: Answers, b: Answers) -> list[Pair]:
    return paired(probe, a.of(probe), b.of(probe), a.record.probes[probe], b.record.probes[probe])


def _differ(pair: Pair) -> bool:
    return pair[0].predicted != pair[1].predicted or pair[0].correct != pair[1].correct


def _known_by(pair: Pair) -> KnownBy:
    if pair[0].correct == pair[1].correct:
        return "neither"
    return "only A" if pair[0].correct else "only B"


def _place(pair: Pair) -> tuple[object, ...]:
    fact = pair[0]
    order = ("only A", "only B", "neither").index(_known_by(pair))
    return order, domain_order(fact.subject), fact.relation, fact.probe, fact.fact_id


def _row(pair: Pair) -> SideBySide:
    a, b = pair
    return SideBySide(
        probe=a.probe,
        fact_id=a.fact_id,
        relation=a.relation,
        subject=a.subject,
        prompt=a.prompt,
        gold=a.gold,
        known_by=_known_by(pair),
        top_a=a.top5[:TOP] or (a.predicted,),
        top_b=b.top5[:TOP] or (b.predicted,),
        rank_a=a.rank,
        rank_b=b.rank,
    )
