"""Records of a comparison of two checkpoints, and functions that make them, with verdict and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from compressknow._version import __version__
from compressknow.base.format import clean, count, number, write_percent, write_size
from compressknow.base.notebook import Summary, SummaryRepr
from compressknow.base.reading import Key, group_by
from compressknow.comparison.diff import CheckpointDiff, DiffSums, Kind, TensorDiff, sum_tensors
from compressknow.comparison.paired import Pair, order_domains, pair_answers
from compressknow.comparison.records import Counts
from compressknow.evaluate.answers import Answer, Answers
from compressknow.evaluate.gather import Direction
from compressknow.evaluate.grades import RECOGNIZED, apply_reading, merge_wordings
from compressknow.evaluate.records import ModelRecord
from compressknow.pages.card import warnings
from compressknow.pages.card.make import make_card
from compressknow.pages.card.verdict import count_facts
from compressknow.pages.records import Card, Gate
from compressknow.pages.texts import list_text_warnings, write_sentence


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Answers of the two models to the same facts."""

    b_against_a: Card  # A as the original: how much of A's knowledge B keeps, and KL(A || B)
    a_against_b: Card
    answers: tuple[Pair, ...]  # for facts whose top answer differs; empty if the text of facts is left out
    warnings: tuple[str, ...]
    known: str = "recognized"  # as in `Card`


@dataclass(frozen=True, slots=True, repr=False)
class CheckpointComparison(SummaryRepr):
    """Comparison of two checkpoints, b against a. They are `identical` if all files that affect answers have the same
    bytes. Then there is no `difference`, and neither if the weights cannot be read."""

    verdict: str
    a: ModelRecord
    b: ModelRecord
    identical: bool
    # Differing files other than weights and config, such as those of the tokenizer, and whether a and b have each.
    files: Mapping[str, tuple[bool, bool]]
    difference: CheckpointDiff | None
    behaviour: Behaviour | None  # None if nothing was evaluated
    warnings: tuple[str, ...]
    show_facts: bool
    versions: Mapping[str, str]
    command: str | None

    def _summary(self) -> Summary:
        names = [f"{clean(side.name, 40)} ({write_size(side.bytes)})" for side in (self.a, self.b)]
        sums = sum_by(self.difference, lambda tensor: tensor.group) if self.difference else {}
        rows = tuple(
            (group, count(s.numel), count(s.zeros_a), count(s.zeros_b), number(s.relative_error))
            for group, s in sums.items()
        )
        columns = ("Group", "Weights", "Zeros before", "Zeros after", "Relative error")
        return Summary(f"CheckpointComparison: {names[1]} against {names[0]}", self.verdict, columns, rows)


def sum_by(difference: CheckpointDiff, key: Callable[[TensorDiff], Key | None]) -> dict[Key, DiffSums]:
    """Return the sums of the tensors that have a key, by key, in order of first appearance."""
    return {value: sum_tensors(tensors) for value, tensors in group_by(difference.tensors, key).items()}


def name_both(a: ModelRecord, b: ModelRecord) -> tuple[str, str]:
    """Return what to call the two in sentences: their names, or A and B if these are the same."""
    names = clean(a.name, 60), clean(b.name, 60)
    return names if names[0] != names[1] else ("A", "B")


_LONG = 120


def make_comparison(
    a: ModelRecord,
    b: ModelRecord,
    difference: CheckpointDiff | None,
    behaviour: Behaviour | None,
    *,
    files: Mapping[str, tuple[bool, bool]],
    show_facts: bool = True,
    command: str | None = None,
) -> CheckpointComparison:
    """Make the comparison with its verdict and warnings; parameters are the fields of the same names."""
    identical = a.sha256 == b.sha256
    return CheckpointComparison(
        verdict=write_verdict(name_both(a, b), identical, difference, behaviour),
        a=a,
        b=b,
        identical=identical,
        files=files,
        difference=difference,
        behaviour=behaviour,
        warnings=tuple(dict.fromkeys(list_warnings(a, b, identical, difference, behaviour))),
        show_facts=show_facts,
        versions=dict(behaviour.b_against_a.versions) if behaviour else {"compressknow": __version__},
        command=command,
    )


def list_warnings(
    a: ModelRecord, b: ModelRecord, identical: bool, difference: CheckpointDiff | None, behaviour: Behaviour | None
) -> Iterator[str]:
    """Yield warnings on swapped or changed models, on what could not be compared or is broken, and on the answers."""
    if warnings.is_made_from(a, b):
        yield "A was made from B, according to its own record: give B first to see what A lost."
    yield from warnings.warn_of_changes(a, b)
    smoothed = [name for name, side in (("A", a), ("B", b)) if side.calibration and side.calibration["smoothed"]]
    if len(smoothed) == 1 and difference:
        yield (
            f"{smoothed[0]} was smoothed: some norms were divided by factors that multiply the weights after them, "
            "which cancel out when it runs. The errors here include these changes; its manifest and its report do not."
        )
    if not identical and difference is None:
        yield _suggest_probe("The weights of a GGUF file are only compared with those of another GGUF file.", behaviour)
    if packed := [change for change in difference.structure if change.kind == "packed"] if difference else []:
        weights = "1 weight is" if len(packed) == 1 else f"{count(len(packed))} weights are"
        form = f"{weights} packed in a form whose values cannot be read here (such as {clean(packed[0].name, _LONG)})"
        yield _suggest_probe(f"{form} and left out of all figures on weights.", behaviour)
    for tensor in difference.tensors if difference else ():
        if not tensor.sums.finite:
            yield f"{clean(tensor.name, _LONG)} holds NaN or infinity, so all figures that include it are missing."
    if behaviour and not identical:
        yield from behaviour.warnings


def _suggest_probe(sentence: str, behaviour: Behaviour | None) -> str:
    return sentence if behaviour else f"{sentence} To compare their answers instead, choose a probe with -p PROBE."


def write_verdict(
    names: tuple[str, str], identical: bool, difference: CheckpointDiff | None, behaviour: Behaviour | None
) -> str:
    """Write sentences on the weights and the answers, if any; `names` are what to call a and b."""
    if identical:
        return f"{names[0]} and {names[1]} are identical: every file that affects an answer has the same bytes."
    sentences = [_describe_weights(names, difference)] if difference else []
    if behaviour:
        forward, backward = behaviour.b_against_a.comparisons[0], behaviour.a_against_b.comparisons[0]
        sentences += [_describe_facts(names, forward.counts, backward.counts)] if forward.probes else []
        sentences += [write_sentence(figures, names) for figures in forward.texts]
    return " ".join(sentences) or f"The weights of {names[0]} and {names[1]} could not be compared."


_UNMATCHED: dict[Kind, str] = {
    "added": "only in B",
    "missing": "only in A",
    "reshaped": "with another shape",
    "packed": "packed in a form that cannot be compared",
}


def _describe_weights(names: tuple[str, str], difference: CheckpointDiff) -> str:
    a, b = names
    stored = [tensor for tensor in difference.tensors if not tensor.same_bytes]
    changed = [tensor for tensor in stored if tensor.differs]
    kinds = Counter(change.kind for change in difference.structure)
    unmatched = ", ".join(f"{_count_tensors(kinds[kind])} {where}" for kind, where in _UNMATCHED.items() if kinds[kind])
    if not difference.tensors:
        return f"No tensor of {a} and {b} can be compared: {unmatched or 'there is none'}."
    if not stored and not unmatched:
        return f"The weights of {a} and {b} are identical to the byte; only other files differ."
    if not stored:
        return f"What both {a} and {b} hold is the same to the byte; {unmatched}."
    total, end = difference.total, f"; {unmatched}" if unmatched else ""
    of_all = f"{count(len(changed or stored))} of {_count_tensors(len(difference.tensors))}"
    if not changed:
        return f"{b} stores {of_all} differently from {a}, but with the same values{end}."
    if same := len(stored) - len(changed):
        end = f"; {count(same)} more {'is' if same == 1 else 'are'} stored differently, but with the same values{end}"
    weights = write_percent(sum_tensors(changed).numel, total.numel)
    error = f"relative error {number(total.relative_error, 4)}{_name_worst_group(difference)}"
    return f"{b} differs from {a} in {of_all} ({weights} of the weights): {error}{end}."


def _name_worst_group(difference: CheckpointDiff) -> str:
    """Name the group that differs most, if there are several."""
    groups = sum_by(difference, lambda tensor: tensor.group)
    errors = {group: sums.relative_error or 0.0 for group, sums in groups.items()}
    if len(errors) < 2 or not any(errors.values()):
        return ""
    group = max(errors, key=lambda group: errors[group])
    return f", most in {group} ({number(errors[group], 4)})"


def _count_tensors(tensors: int) -> str:
    return "1 tensor" if tensors == 1 else f"{count(tensors)} tensors"


def _describe_facts(names: tuple[str, str], forward: Counts, backward: Counts) -> str:
    a, b = names
    if not forward.known_before and not backward.known_before:
        return f"Neither model knows any of the {count_facts(forward.n)}."
    return f"{b} knows {_count_kept(forward)} that {a} knows, and {a} knows {_count_kept(backward)} that {b} knows."


def _count_kept(counts: Counts) -> str:
    known = counts.known_before
    if not known:
        return "none of the 0 facts"
    return f"{count(counts.both)} of the {count_facts(known)} ({write_percent(counts.both, known)})"


def make_behaviour(
    forward: Direction, backward: Direction, *, show_facts: bool, known: str = RECOGNIZED, gates: Sequence[Gate] = ()
) -> Behaviour:
    """Compute the statistics in both directions; `gates` apply to B against A. The rest is as in `make_card`."""
    a, b_like_a, b, a_like_b = (apply_reading(each, known) for each in (*forward, *backward))
    b_against_a = make_card(a, [b_like_a], show_facts=show_facts, gates=gates)
    a_against_b = make_card(b, [a_like_b], show_facts=show_facts)
    sentences = (*warnings.warn_of_known(known), *_list_warnings((a, b_like_a), b, b_against_a, a_against_b))
    return Behaviour(
        b_against_a=b_against_a,
        a_against_b=a_against_b,
        answers=tuple(_pair_answers(merge_wordings(a), merge_wordings(b_like_a))) if show_facts else (),
        warnings=tuple(dict.fromkeys(sentences)),
        known=known,
    )


def _list_warnings(direction: Direction, of_b: Answers, forward: Card, backward: Card) -> Iterator[str]:
    """Yield the warnings of a report in both directions, except those on grades and on origins."""
    yield from warnings.warn_of_models(forward.original, backward.original)
    yield from warnings.warn_of_recipe(forward.original)
    yield from warnings.warn_of_runtimes(*direction)
    for name, of_model, card in (("A", direction[0], forward), ("B", of_b, backward)):
        comparison = card.comparisons[0]
        yield from warnings.warn_of_answers(name, of_model)
        yield from warnings.warn_of_figures(comparison.counts, (), comparison.probes, name=name)
    for figures in forward.comparisons[0].texts:
        yield from list_text_warnings(figures, ("A", "B"))


_KNOWERS = ("only A", "only B", "neither", "both")  # in the order in which pages show facts


def name_knower(a: Answer, b: Answer) -> str:
    """Say which model knows a fact that the two answer differently."""
    if a.correct == b.correct:
        return "both" if a.correct else "neither"
    return "only A" if a.correct else "only B"


def _pair_answers(a: Answers, b: Answers) -> list[Pair]:
    """Return the answers to facts that the two answer differently, ordered by who knows them, domain and relation."""
    pairs = [
        pair
        for probe, entry in a.record.probes.items()
        if not entry.text
        for pair in pair_answers(a, b, probe)
        if pair[0].predicted != pair[1].predicted or pair[0].correct != pair[1].correct
    ]

    def order(pair: Pair) -> tuple[object, ...]:
        fact = pair[0]
        place = _KNOWERS.index(name_knower(*pair))
        return place, order_domains(fact.subject), fact.relation, fact.probe, fact.fact_id

    return sorted(pairs, key=order)
