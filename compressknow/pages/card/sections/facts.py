"""Sections on facts and groups of them: lost and gained, by relation, grade, wording and confidence; running text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from compressknow.base.format import NONE, answer, clean, count, share, write_percent, write_rank
from compressknow.comparison.distributions import CALIBRATION_BINS
from compressknow.comparison.records import Confidence, Counts, Estimate, GradeCounts, Group, ReliabilityBin, Tertile
from compressknow.evaluate.answers import GRADES
from compressknow.evaluate.grades import PRODUCED
from compressknow.pages import drawing
from compressknow.pages.card.sections import Context, Section
from compressknow.pages.drawing import to_percents
from compressknow.pages.parts import (
    Beside,
    Chart,
    Charts,
    Folded,
    Note,
    Part,
    Table,
    count_more,
    make_fact_parts,
    make_groups_table,
    write_prompt,
)
from compressknow.pages.records import write_estimate, write_range
from compressknow.pages.texts import list_text_warnings, make_text_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_COLUMNS = ("Prompt", "Right answer", "Original", "Compressed", "Rank of the right answer", "Relation")
_GRADED = (*_COLUMNS[:-1], "Grade now", "Relation")


class Lost(Section):
    """Facts that only the original knows; `which` names their field in `Comparison` and `Limits`, and their style."""

    title = "Facts lost"
    order = 10
    shows_facts = True
    which = "lost"
    caption = "The original answered these right; the compressed model does not"

    def parts(self, context: Context) -> Iterator[Part]:
        if context.comparison.only_texts:
            return
        facts = getattr(context.comparison, self.which)
        graded = any(fact.grade_after for fact in facts)
        rows = []
        for fact in facts[: getattr(context.limits, self.which)]:
            recovery = ", comes back with one example" if fact.with_example else ""
            grade = clean(fact.grade_after, 20) + recovery if fact.grade_after else NONE
            ranks = f"{write_rank(fact.rank_before)} → {write_rank(fact.rank_after)}"
            ranks = ranks if fact.rank_before or fact.rank_after else NONE
            answers = clean(fact.gold), answer(fact.before), answer(fact.after)
            further = [ranks, *([grade] if graded else []), clean(fact.relation, 60)]
            rows.append((write_prompt(fact.prompt), *answers, *further))
        table = Table(self.caption, _GRADED if graded else _COLUMNS, tuple(rows), prose=True)
        left_out = len(facts) - len(rows)
        yield from make_fact_parts(table, context.limits.shown, left_out=left_out, shade=self.which)


class Gained(Lost):
    title = "Facts gained"
    order = 20
    which = "gained"
    caption = "The original answered these wrong; the compressed model answers them right"


class Dropped(Section):
    title = "Dropped facts"
    order = 80

    def parts(self, context: Context) -> Iterator[Part]:
        rows = []
        for probe in context.comparison.probes:
            name, read = clean(probe.probe, 60), max(probe.facts_read, sum(probe.dropped.values()))
            dropped = [(clean(reason, 120), number) for reason, number in probe.dropped.items() if number]
            rows += [(reason, name, count(number), write_percent(number, read)) for reason, number in dropped]
        if rows:
            columns = ("Reason", "Probe", "Facts", "Share of facts read")
            yield Table("Facts that were dropped", columns, tuple(rows), captioned=False)


class Relations(Section):
    title = "By relation"
    order = 30

    def parts(self, context: Context) -> Iterator[Part]:
        limit, probes = context.limits.relations, [p for p in context.comparison.probes if p.by_relation]
        for probe in probes:
            caption, groups = f"{clean(probe.probe, 60)} by relation", probe.by_relation
            if limit is not None and len(groups) > limit:
                caption += f", largest losses first; {count_more(len(groups) - limit)} in the JSON"
                groups = tuple(sorted(groups, key=lambda group: -group.counts.lost)[:limit])
            yield make_groups_table(groups, "Relation", caption)
        if probes:
            yield Note(
                "p is from the exact McNemar test, adjusted over the relations of a table (Holm). Below 0.05, chance "
                "hardly explains the difference between facts lost and gained."
            )


class Popularity(Section):
    title = "By popularity"
    order = 40

    def parts(self, context: Context) -> Iterator[Part]:
        for probe in context.comparison.probes:
            if bins := probe.by_popularity:
                name = clean(probe.probe, 60)
                table = make_groups_table(bins, "Popularity", f"{name} by popularity", bars=False)
                yield Beside(chart_popularity(bins, name), replace(table, sortable=False))


def chart_popularity(groups: Sequence[Group], name: str) -> Chart | None:
    """Chart knowledge kept by popularity bin, as dots with intervals; None if fewer than two bins have a value."""
    bins = [(clean(group.name, 16), group.kept) for group in groups if group.kept.value is not None]
    if len(bins) < 2:
        return None
    listed = ", ".join(f"{label} {share(kept.value)}" for label, kept in bins)
    title = f"Knowledge kept by popularity, {clean(name, 60)}"
    return Chart(title, f"From left to right: {listed}.", lambda plot: _draw(plot, bins))


def _draw(plot: Axes, bins: Sequence[tuple[str, Estimate]]) -> None:
    for x, (_, kept) in enumerate(bins):
        value, low, high = to_percents(kept)
        plot.plot([x, x], [low, high], color=drawing.SERIES[0], linewidth=2, solid_capstyle="round")
        plot.plot([x], [value], "o", color=drawing.SERIES[0], markersize=8, markeredgecolor=drawing.PAPER)
        plot.annotate(share(kept.value), (x, value), (8, 0), textcoords="offset points", va="center")
    plot.set_xlim(-0.4, len(bins) - 0.3)
    # Short labels, so that the fifth does not touch the fourth.
    ticks = [label.removesuffix(" %").replace(" to ", "\N{EN DASH}") if " to " in label else label for label, _ in bins]
    plot.set_xticks(range(len(bins)), ticks, fontsize=10)
    # The axis begins at the tens below the lowest interval.
    drawing.set_percent_axis(plot, max(0, int(min(to_percents(kept)[1] for _, kept in bins) // 10) * 10))


class Grades(Section):
    title = "Grades of knowing"
    order = 25
    glossary = (
        ("Produced", "the right answer is the model's first choice, and what it writes by itself begins with it."),
        ("Recognized", "the right answer is the model's first choice, but not what it writes."),
        (
            "Demoted",
            "not its first choice, but among its top five, or what it writes, by itself or after one solved example.",
        ),
        ("Gone", "none of these."),
    )
    method = (
        "What a model produces is decoded greedily after the prompt, or at the mask among its whole vocabulary (an "
        "object of several tokens at as many masks, from left to right). Facts that the original knew and the "
        "compressed model does not are evaluated once more, after one solved example of the same relation with another "
        "answer. With five candidates or fewer, being among the top five does not count.",
    )

    def parts(self, context: Context) -> Iterator[Part]:
        graded = [(probe, probe.knowing) for probe in context.comparison.probes if probe.knowing]
        # A page of many models has no room for this; the JSON has it all.
        if not graded or context.limits.relations is not None:
            return
        for probe, knowing in graded:
            name = clean(probe.probe, 60)
            yield make_grades_table(knowing, f"{name}: the original's grades (rows), and what they became")
            if sentences := " ".join(_describe_grades(knowing)):
                yield Note(sentences)
        yield Note("The glossary explains the grades.")


def make_grades_table(knowing: GradeCounts, caption: str, who: str = "Original") -> Table:
    """Tabulate facts by the grades of one model, `who`, in rows, and of the other in columns."""
    moved, before = knowing.moved, knowing.original
    rows = [(grade, *(count(moved[grade, after]) for after in GRADES), count(before[grade])) for grade in GRADES]
    total = ("all", *(count(knowing.compressed[grade]) for grade in GRADES), count(sum(before.values())))
    return Table(caption, (who, *GRADES, "all"), (*rows, total))


def _describe_grades(knowing: GradeCounts) -> Iterator[str]:
    if knowing.shown:
        back = f"{count(knowing.back)} ({write_percent(knowing.back, knowing.shown)})"
        lost = "1 lost fact that was" if knowing.shown == 1 else f"{count(knowing.shown)} lost facts that were"
        yield f"One solved example brings back {back} of {lost} evaluated with it."
    for who, written in zip(("original", "compressed model"), knowing.written, strict=True):
        if not written:
            yield f"The {who} cannot write: {PRODUCED} is left out."


class Text(Section):
    title = "Running text"
    order = 55

    def parts(self, context: Context) -> Iterator[Part]:
        for figures in context.comparison.texts:
            yield from make_text_parts(figures, ("original", "compressed"))

    def warnings(self, context: Context) -> Iterator[str]:
        for figures in context.comparison.texts:
            yield from list_text_warnings(figures)


_AGREEMENT = (
    "A fact is known if more than half of its wordings are answered right. Consistency, the share of pairs of wordings "
    "of a fact that get the same answer (Elazar et al. 2021)"
)
_WORDING_COLUMNS = ("Wording", "Facts", "Right before", "Right after", "Lost", "Gained", "Kept")


class ByWording(Section):
    title = "By wording"
    order = 45

    def parts(self, context: Context) -> Iterator[Part]:
        for probe in context.comparison.probes:
            # For many models, only the JSON has them.
            if probe.by_template and context.limits.relations is None:
                rows = [_make_wording_row(str(number), *figures) for number, figures in probe.by_template.items()]
                rows.append(_make_wording_row("majority", probe.counts, probe.kept))
                yield Table(f"{clean(probe.probe, 60)} by wording", _WORDING_COLUMNS, tuple(rows))
                before, after = map(share, probe.consistency)
                yield Note(f"{_AGREEMENT}: {before} before, {after} after.")


def _make_wording_row(name: str, counts: Counts, kept: Estimate) -> tuple[str, ...]:
    right = (write_percent(known, counts.n) for known in (counts.known_before, counts.known_after))
    return name, count(counts.n), *right, count(counts.lost), count(counts.gained), write_estimate(kept)


_BINS = ("Confidence", "Original's answers", "Right", "Compressed model's answers", "Right")
# A dot of fewer answers than this says nothing about calibration, and is drawn hollow.
_FEW = 10
_CALIBRATION = (
    "On the dotted line, a model is right as often as its confidence says; below the line, it is overconfident. Hollow "
    f"dots rest on fewer than {_FEW} answers."
)


class Confident(Section):
    title = "Confidence"
    order = 48
    glossary = (
        ("Confidence", "the probability that a model gives to its answer, among all answers that it could give."),
        (
            "Confidently wrong",
            "a wrong answer that is given with more confidence than the original's median answer.",
        ),
        (
            "Calibration",
            "whether answers of 80 % confidence are right 80 % of the time; if so, the dots lie on the diagonal.",
        ),
    )
    method = (
        "The facts that the original knew are split into thirds by the probability of its answer. An answer is "
        "confidently wrong if it is wrong and its probability is above the median of the original's over all facts.",
    )

    def parts(self, context: Context) -> Iterator[Part]:
        # This would take most of a page of many models; the JSON has it all.
        if context.limits.relations is not None:
            return
        for probe in context.comparison.probes:
            if confidence := probe.confidence:
                name = clean(probe.probe, 60)
                if confidence.thirds:
                    yield _tabulate_thirds(name, confidence.thirds)
                yield Note(_describe_wrong(name, confidence), _CALIBRATION)
                sides = {"Original": confidence.reliability_original, "Compressed": confidence.reliability_compressed}
                charts = tuple(_chart_calibration(name, side, bins) for side, bins in sides.items())
                yield Charts(charts, f"Calibration, {name}")
                yield Folded(f"Calibration, {name}, bin by bin", (_tabulate_bins(name, *sides.values()),))


def _tabulate_thirds(name: str, thirds: Sequence[Tertile]) -> Table:
    columns, rows = ("Original's answer", "Its confidence", "Known before", "Lost", "Kept"), []
    for third in thirds:
        facts = count(third.counts.known_before), count(third.counts.lost)
        rows.append((clean(third.name, 40), write_range(third.low, third.high), *facts, write_estimate(third.kept)))
    bars = tuple(third.kept for third in thirds)
    return Table(f"{name}: kept by the original's confidence", columns, tuple(rows), bars, bars_after=4)


def _describe_wrong(name: str, confidence: Confidence) -> str:
    sides = (
        f"{count(part)} of the {whose}'s {count(wrong)} wrong answers ({write_percent(part, wrong)})"
        for whose, part, wrong in (
            ("compressed model", confidence.confidently_wrong_compressed, confidence.wrong_compressed),
            ("original", confidence.confidently_wrong_original, confidence.wrong_original),
        )
    )
    return (
        f"Confidently wrong on {name}: {' and '.join(sides)} exceed the original's median confidence "
        f"({share(confidence.median)})."
    )


def _chart_calibration(name: str, side: str, bins: Sequence[ReliabilityBin]) -> Chart:
    description = ", ".join(
        f"at {share(each.confidence)} confidence {write_percent(each.right, each.facts)} right"
        for each in bins
        if each.facts
    )
    title, text = f"Calibration of the {side.lower()} model, {name}", f"{description[:1].upper()}{description[1:]}."
    return Chart(title, text, partial(_draw_calibration, bins=bins), height=300, heading=side)


def _draw_calibration(plot: Axes, bins: Sequence[ReliabilityBin]) -> None:
    plot.plot([0, 100], [0, 100], color=drawing.MUTED, linestyle=(0, (2, 3)), linewidth=1)
    dots = [(100 * each.confidence, 100 * each.right / each.facts, each.facts) for each in bins if each.confidence]
    plot.plot([x for x, _, _ in dots], [y for _, y, _ in dots], color=drawing.SERIES[0], linewidth=1.2)
    for x, y, facts in dots:
        inside = drawing.PAPER if facts < _FEW else drawing.SERIES[0]
        plot.plot([x], [y], "o", color=inside, markersize=7, markeredgecolor=drawing.SERIES[0])
    plot.set_xlim(-2, 102)
    plot.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    plot.set_xlabel("confidence (vertical axis: right answers)", loc="left")
    drawing.set_percent_axis(plot, 0)


def _tabulate_bins(name: str, original: Sequence[ReliabilityBin], compressed: Sequence[ReliabilityBin]) -> Table:
    rows = []
    for place, (before, after) in enumerate(zip(original, compressed, strict=True)):
        if before.facts or after.facts:
            ends = (100 * edge / CALIBRATION_BINS for edge in (place, place + 1))
            cells = ((count(side.facts), write_percent(side.right, side.facts)) for side in (before, after))
            rows.append((" to ".join(f"{end:.0f}" for end in ends) + " %", *chain(*cells)))
    return Table(f"Calibration of both models, {name}", _BINS, tuple(rows))
