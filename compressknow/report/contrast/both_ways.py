"""Two models' answers to the same facts, each asked for its own most likely tokens and for those of the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from compressknow.probe.answers import Answers
from compressknow.report.card import cautions
from compressknow.report.card.make import make_card
from compressknow.report.comparison import subject_order
from compressknow.report.contrast.records import Behaviour, KnownBy, SideBySide
from compressknow.report.gather import folder_of
from compressknow.report.pairing import Pair, paired
from compressknow.report.records import Card

if TYPE_CHECKING:
    from compressknow.probe.facts import Probe
    from compressknow.probe.progress import Bar
    from compressknow.probe.run import Respondent
    from compressknow.probe.tasks import Task

TOP = 3


class BothWays(NamedTuple):
    """Answers of `a` and `b`, and of each with the probabilities of the other's most likely tokens."""

    a: Answers
    b_like_a: Answers
    b: Answers
    a_like_b: Answers


def ask_both_ways(
    a: Respondent, b: Respondent, probes: Sequence[Probe | Task], keep_in: Path, bar: Bar | None = None
) -> BothWays:
    """Ask both models, one in memory at a time: each once for its answers, and once more for what it gives the other
    tokens. Answers that `keep_in` holds already are not asked for again.

    Raises CompressknowError where a model cannot be loaded or asked, or where the two have no vocabulary in common.
    """
    from compressknow.probe.distributions import Distributions
    from compressknow.probe.progress import staged
    from compressknow.probe.run import probe_model

    def ask(
        model: Respondent, reference: Answers | None, whole: Distributions | None, known: Answers | None = None
    ) -> Answers:
        folder = folder_of(keep_in, model.sha256, reference)
        watched = staged(bar, number=1 if model is a else 2, of=2)
        return probe_model(model, probes, folder, reference=reference, known=known, whole=whole, bar=watched, wait=True)

    if a.sha256 == b.sha256:
        alone = ask(a, None, None)
        a.release()
        return BothWays(alone, alone, alone, alone)
    with Distributions(a, keep_in) as whole_a, Distributions(b, keep_in) as whole_b:
        of_a = ask(a, None, whole_a)
        a.release()
        b_like_a = ask(b, of_a, whole_a)
        whole_a.close()
        of_b = ask(b, None, whole_b, known=b_like_a)
        b.release()
        a_like_b = ask(a, of_b, whole_b, known=of_a)
        a.release()
    return BothWays(of_a, b_like_a, of_b, a_like_b)


def behaviour_of(answers: BothWays, *, show_facts: bool) -> Behaviour:
    """The statistics in both directions. Raises CompressknowError where the two did not answer the same facts."""
    there = make_card(answers.a, [answers.b_like_a], show_facts=show_facts)
    back = make_card(answers.b, [answers.a_like_b], show_facts=show_facts)
    return Behaviour(
        b_against_a=there,
        a_against_b=back,
        answers=tuple(_side_by_side(answers.a, answers.b_like_a)) if show_facts else (),
        warnings=tuple(dict.fromkeys(_warnings(answers, there, back))),
    )


def _warnings(answers: BothWays, there: Card, back: Card) -> Iterator[str]:
    """Those of a report in both directions, but for what concerns grades."""
    yield from cautions.of_models(there.original, back.original)
    yield from cautions.of_recipe(there.original)
    for name, given, card in (("A", answers.a, there), ("B", answers.b, back)):
        comparison = card.comparisons[0]
        yield from cautions.of_answers(name, given)
        yield from cautions.of_figures(comparison.counts, (), comparison.probes, name=name)


def _side_by_side(a: Answers, b: Answers) -> Iterator[SideBySide]:
    pairs = [pair for probe in a.probes for pair in _paired(probe, a, b) if _differ(pair)]
    for pair in sorted(pairs, key=_place):
        yield _row(pair)


def _paired(probe: str, a: Answers, b: Answers) -> list[Pair]:
    return paired(probe, a.of(probe), b.of(probe), a.record["probes"][probe], b.record["probes"][probe])


def _differ(pair: Pair) -> bool:
    return pair[0].predicted != pair[1].predicted or pair[0].correct != pair[1].correct


def _known_by(pair: Pair) -> KnownBy:
    if pair[0].correct == pair[1].correct:
        return "neither"
    return "only A" if pair[0].correct else "only B"


def _place(pair: Pair) -> tuple[object, ...]:
    fact = pair[0]
    order = ("only A", "only B", "neither").index(_known_by(pair))
    return order, subject_order(fact.subject), fact.relation, fact.probe, fact.fact_id


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
