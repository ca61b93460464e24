"""What a comparison of two checkpoints says, as text in order: the one source of the HTML page and the Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compressknow.probe.answers import Answers
from compressknow.probe.both_ways import BothWays
from compressknow.report.card import warnings as cautions
from compressknow.report.card.make import make_card
from compressknow.report.card.view import Size
from compressknow.report.diff import tables as knowledge
from compressknow.report.diff import tables as weights
from compressknow.report.diff.records import Behaviour, Checkpoint, Contrast, KnownBy, SideBySide
from compressknow.report.diff.verdict import names_of
from compressknow.report.format import NONE, number, plain, share, size, smaller
from compressknow.report.records import Card
from compressknow.report.tables import Entry, FactList, Table
from compressknow.stats.paired import Pair, paired, subject_order
from compressknow.stats.records import Counts

TOP = 3


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


_SHORT = 12
_GROUPS = "What differs by group of layers"


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tensors and facts a format shows; the JSON has them all."""

    tensors: int
    facts: int
    open: int


@dataclass(frozen=True, slots=True)
class Weights:
    """The tables of the weights. `grid` is the heat map, `cells` the same as a table."""

    groups: Table
    grid: weights.Grid | None
    cells: Table | None
    layers: Table | None
    tensors: Table | None
    tensors_left_out: int


@dataclass(frozen=True, slots=True)
class Knowledge:
    """The tables of the answers. `counts` are those of A as the original, over all probes."""

    counts: Counts
    figures: Table
    groups: tuple[Table, ...]
    answers: FactList
    method: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A whole comparison."""

    id: str
    name: str
    title: str
    headline: str
    verdict: str
    warnings: tuple[str, ...]
    size: Size
    a: tuple[Entry, ...]
    b: tuple[Entry, ...]
    identical: bool
    weights: Weights | None
    settings: Table | None
    structure: Table | None
    knowledge: Knowledge | None
    show_facts: bool
    run: tuple[Entry, ...]
    command: str | None

    @property
    def contents(self) -> tuple[tuple[str, str], ...]:
        """The parts of the page: id and name."""
        parts = (
            ("knowledge", "Knowledge", self.knowledge),
            ("answers", "Answers side by side", self.knowledge),
            ("map", "By layer and module", self.weights and self.weights.cells),
            ("layers", "By layer", self.weights and self.weights.layers),
            ("tensors", "By tensor", self.weights and self.weights.tensors),
            ("structure", "Settings and structure", self.settings or self.structure),
            ("method", "Method", True),
        )
        return tuple((id, name) for id, name, there in parts if there)


def contrast_page(contrast: Contrast, limits: Limits) -> Page:
    """The comparison as text."""
    a, b = names_of(contrast.a, contrast.b)
    headline = _headline(contrast)
    difference = contrast.difference
    versions = ", ".join(f"{plain(name, 40)} {plain(version, 40)}" for name, version in contrast.versions.items())
    return Page(
        id="compare",
        name=f"{a} and {b}",
        title=f"{headline}: {a} and {b}",
        headline=headline,
        verdict=plain(contrast.verdict, 1000),
        warnings=tuple(plain(warning, 1000) for warning in contrast.warnings),
        size=_size(contrast.a.bytes, contrast.b.bytes),
        a=_identity(contrast.a),
        b=_identity(contrast.b),
        identical=contrast.identical,
        weights=_weights(contrast, limits),
        settings=weights.settings_table(difference, contrast.files) if difference else None,
        structure=weights.structure_table(difference) if difference else None,
        knowledge=_knowledge(contrast.behaviour, limits) if contrast.behaviour else None,
        show_facts=contrast.show_facts,
        run=(Entry("Versions", versions or NONE),),
        command=plain(contrast.command, 2000) if contrast.command else None,
    )


def _headline(contrast: Contrast) -> str:
    if contrast.identical:
        return "Identical"
    if contrast.behaviour and (kept := contrast.behaviour.b_against_a.comparisons[0].kept.value) is not None:
        return f"B knows {share(kept)} of what A knows"
    if contrast.difference is None or not contrast.difference.tensors:
        return "Weights that cannot be compared"
    total = contrast.difference.total
    if not total.energy_change and total.finite:
        return "The same weights" if contrast.difference.same_weights else "The same values"
    return f"Relative error {number(total.relative_error, 4)}"


def _size(a: int, b: int) -> Size:
    largest = max(a, b, 1)
    return Size(size(a), size(b), smaller(a, b), b / largest, a / largest)


def _identity(side: Checkpoint) -> tuple[Entry, ...]:
    name = plain(side.name, 120) + (f"@{plain(side.revision, 60)}" if side.revision else "")
    source = plain((side.source or {}).get("name") or "", 120)
    entries = (
        Entry("Name", name, code=True),
        Entry("SHA-256", plain(side.sha256, 80)[:_SHORT], code=True, full=plain(side.sha256, 80)),
        Entry("Made from", source, code=True) if source else None,
        Entry("Setup", plain(side.setup, 80)) if side.setup else None,
        Entry("Quantization", plain(side.quantization, 200)) if side.quantization else None,
        Entry("Type", plain(side.dtype, 60)),
        Entry("Size", size(side.bytes)),
    )
    return tuple(entry for entry in entries if entry)


def _weights(contrast: Contrast, limits: Limits) -> Weights | None:
    difference = contrast.difference
    if difference is None or not difference.tensors:
        return None
    grid, layers = weights.grid(difference), weights.layers(difference)
    tensors, left_out = weights.tensors_table(difference, limits.tensors)
    total = weights.Part("all", difference.tensors)
    changed = bool(difference.total.energy_change) or not difference.total.finite
    return Weights(
        groups=weights.parts_table(_GROUPS, "Group", weights.groups(difference), total),
        grid=grid if changed else None,
        cells=weights.grid_table(grid) if grid and changed else None,
        layers=weights.parts_table("Linear weights by layer", "Layer", layers) if layers and changed else None,
        tensors=tensors,
        tensors_left_out=left_out,
    )


def _knowledge(behaviour: Behaviour, limits: Limits) -> Knowledge:
    probes = knowledge.probes_of(behaviour)
    return Knowledge(
        counts=behaviour.b_against_a.comparisons[0].counts,
        figures=knowledge.figures_table(probes),
        groups=knowledge.group_tables(probes),
        answers=knowledge.answers_list(behaviour.answers, limits.facts, limits.open),
        method=tuple(plain(sentence, 2000) for sentence in behaviour.b_against_a.method),
    )
