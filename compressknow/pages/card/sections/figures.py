"""Sections on all figures of all probes, their certainty, what was done to the model, and its speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from compressknow.base.format import (
    NONE,
    clean,
    count,
    number,
    share,
    write_p_value,
    write_percent,
    write_points,
    write_rate,
    write_size,
)
from compressknow.comparison.distributions import CALIBRATION_FACTS
from compressknow.comparison.intervals import FEWEST, estimate_difference, estimate_proportion, run_mcnemar
from compressknow.comparison.records import Certainty, Counts, Estimate, KlFigures, ProbeFigures
from compressknow.compress.schemes import choose_word, read_schemes
from compressknow.evaluate.records import NoiseFloor
from compressknow.model.manifest import describe_calibration, describe_removed
from compressknow.pages.card.pages import name_deployment
from compressknow.pages.card.sections import Context, Section
from compressknow.pages.card.verdict import count_facts
from compressknow.pages.card.warnings import name_source
from compressknow.pages.parts import Folded, Note, Part, Remarks, Table, make_groups_table
from compressknow.pages.records import write_estimate, write_part

_AVERAGES = {"micro": "share of all facts", "macro": "mean over relations"}


class Figures(Section):
    title = "All figures"
    order = 60
    glossary = (
        ("Knowledge kept", "of the facts that the original knew, the share that the compressed model still knows."),
        ("Kept above chance", "the same, counting only what is known beyond guessing among the candidates."),
        ("Lost, gained, flips", "facts known only to the original, only to the compressed model, and both together."),
        (
            "Interval",
            "the range in brackets: of 100 such ranges, each from other facts of the kind, 95 contain the true value.",
        ),
        (
            "p",
            "how often chance alone would split lost and gained facts this unevenly; a small p means that the net "
            "change is real.",
        ),
        ("Top answer changed", "facts whose answer differs, including changes from one wrong answer to another."),
        (
            "By rounding alone",
            "how the original's own answers change in another precision: a change of a compressed model that is no "
            "larger than this may be rounding.",
        ),
        (
            "By the runtime alone",
            "the same if the original runs in the compressed model's runtime, from a file that is not quantized.",
        ),
        ("Among the top 5", "if the right answer is still near the top, the fact is suppressed rather than erased."),
        ("Mean reciprocal rank", "1 if the right answer always comes first, 1/2 if it always comes second, and so on."),
        ("Movement (KL)", "how far the probabilities of the next token moved, in nats; 0 is no change at all."),
        ("Calibration error, Brier score", "how far a model's confidence is from being right; 0 is perfect."),
        ("Majority baseline", "the accuracy of always giving a relation's most frequent answer."),
        ("The paper's drop", "accuracy before minus accuracy after, in points, and relative to accuracy before."),
    )

    def parts(self, context: Context) -> Iterator[Part]:
        probes = context.comparison.probes
        if context.comparison.only_texts:
            return
        rows, missing = [], []
        for name, write, why_none in _FIGURES:
            cells = tuple(map(write, probes))
            if why_none is None and set(cells) <= {NONE}:
                continue
            rows.append((name, *cells))
            without = [clean(p.probe, 60) for p, cell in zip(probes, cells, strict=True) if cell == NONE]
            if without and why_none:
                where = f" ({', '.join(without)})" if len(probes) > 1 else ""
                missing.append(f"{name}{where}: {why_none}")
        columns = ("Figure", *(clean(probe.probe, 60) for probe in probes))
        yield Table("All figures of each probe", columns, tuple(rows), captioned=False)
        if missing:
            yield Remarks("Why some figures are missing", tuple(missing))
        subjects = tuple(
            make_groups_table(probe.by_subject, "Domain", f"{clean(probe.probe, 60)} by domain", bars=False)
            for probe in probes
            if probe.by_subject
        )
        if subjects:
            yield Folded("By domain, probe by probe", subjects)


def write_pair(pair: tuple[float, float] | None, write: Callable[[float], str], then: str = " → ") -> str:
    """Write the figure of both models, if it was measured."""
    return NONE if pair is None else f"{write(pair[0])}{then}{write(pair[1])}"


def write_rest(moved: KlFigures | None, then: str = " → ") -> str:
    """Write the probability of the tokens that are taken together, if any are."""
    return write_pair(moved.rest if moved else None, share, then)


def write_movement(moved: KlFigures | None, get: Callable[[KlFigures], float], digits: int = 3) -> str:
    """Write a figure of how far distributions moved, if that was measured."""
    if moved is None:
        return NONE
    return f"{'at least ' if moved.is_lower_bound else ''}{number(get(moved), digits)}"


def _write_logp_change(probe: ProbeFigures, low: str, high: str) -> str:
    """Write the changes at two percentiles as a range; of one percentile, its change."""
    if not probe.logp_change:
        return NONE
    ends = (number(probe.logp_change[end], 2) for end in dict.fromkeys((low, high)))
    return " to ".join(ends)


def _write_facts(probe: ProbeFigures) -> str:
    limited = f", limited to {count(probe.limit)}" if probe.limit is not None else ""
    return f"{count(probe.counts.n)} of {count(probe.facts_read)} read{limited}"


def _write_suppressed(probe: ProbeFigures) -> str:
    if probe.lost_still_in_top5 is None or not probe.counts.lost:
        return NONE
    return write_part(probe.lost_still_in_top5, probe.counts.lost)


def _write_changes(floor: NoiseFloor | None) -> str:
    return f"{write_percent(floor.changed, floor.n)} of {count_facts(floor.n)}" if floor and floor.n else NONE


def _write_flips(floor: NoiseFloor | None) -> str:
    return write_percent(floor.lost + floor.gained, floor.n) if floor else NONE


def _write_moves(floor: NoiseFloor | None) -> str:
    return number(floor.kl_mean) if floor else NONE


_NO_FACTS = "there is nothing to count."
_NOTHING_KNOWN = "the original knew none of the facts."
_NO_CHANCE = "the answer is free text, so nothing is right by chance, or " + _NOTHING_KNOWN
_NO_DISTRIBUTION = "the answers hold no distribution over tokens."
_LOGP = "Change of the right answer's log-probability"
_NO_LOGP = "the answers hold no probability of the right answer."
_NO_NOISE = "the original did not answer in another precision."
_FEW_RELATIONS = "there are too few relations."
_NO_RANK = "the answers hold no rank of the right answer."
_NO_TOP5 = "there are at most five answers to choose from, or " + _NO_RANK
_NO_CONFIDENCE = (
    f"it needs the probability of each answer among all candidates, for {CALIBRATION_FACTS} facts or more; free "
    "answers, most servers and answers of older versions do not include it."
)

# Name, the function that writes it, and why it may be missing. None: without the figure, there is no row.
_FIGURES: tuple[tuple[str, Callable[[ProbeFigures], str], str | None], ...] = (
    ("Facts evaluated", _write_facts, ""),
    ("Accuracy before", lambda p: write_estimate(p.accuracy_original), _NO_FACTS),
    ("Accuracy after", lambda p: write_estimate(p.accuracy_compressed), _NO_FACTS),
    ("Difference", lambda p: write_estimate(p.difference, write_points), _NO_FACTS),
    ("Mean over relations before", lambda p: write_estimate(p.macro_original), _FEW_RELATIONS),
    ("Mean over relations after", lambda p: write_estimate(p.macro_compressed), _FEW_RELATIONS),
    ("Difference of these means", lambda p: write_estimate(p.macro_difference, write_points), _FEW_RELATIONS),
    ("Knowledge kept", lambda p: write_estimate(p.kept), _NOTHING_KNOWN),
    ("Kept above chance", lambda p: write_estimate(p.kept_above_chance), _NO_CHANCE),
    ("Lost", lambda p: write_part(p.counts.lost, p.counts.known_before), ""),
    ("Gained", lambda p: write_part(p.counts.gained, p.counts.gained + p.counts.neither), ""),
    ("Flips (lost or gained)", lambda p: share(p.counts.flips), _NO_FACTS),
    ("Net change against chance", lambda p: write_p_value(p.certainty.p), "no fact was lost or gained."),
    ("Top answer changed", lambda p: share(p.answer_changed), _NO_FACTS),
    ("Top answer changed by rounding alone", lambda p: _write_changes(p.noise_floor), _NO_NOISE),
    ("Top answer changed by the runtime alone", lambda p: _write_changes(p.runtime_noise_floor), None),
    ("Flips by rounding alone", lambda p: _write_flips(p.noise_floor), ""),
    ("Flips by the runtime alone", lambda p: _write_flips(p.runtime_noise_floor), None),
    ("Lost, but still among the top 5", _write_suppressed, "nothing was lost, " + _NO_TOP5),
    ("Mean reciprocal rank", lambda p: write_pair(p.mrr, number), _NO_RANK),
    ("Right answer among the top 5", lambda p: write_pair(p.p_at_5, share), _NO_TOP5),
    ("Movement (KL, nats), mean", lambda p: write_movement(p.movement, lambda m: m.kl_mean), _NO_DISTRIBUTION),
    ("Movement by rounding alone, mean", lambda p: _write_moves(p.noise_floor), ""),
    ("Movement by the runtime alone, mean", lambda p: _write_moves(p.runtime_noise_floor), None),
    ("Movement, median", lambda p: write_movement(p.movement, lambda m: m.kl_median), ""),
    ("Movement, 99th percentile", lambda p: write_movement(p.movement, lambda m: m.kl_p99), ""),
    ("Movement, largest", lambda p: write_movement(p.movement, lambda m: m.kl_max), ""),
    ("Probability of the tokens taken together", lambda p: write_rest(p.movement), ""),
    (f"{_LOGP}, median", lambda p: _write_logp_change(p, "p50", "p50"), _NO_LOGP),
    (f"{_LOGP}, middle half", lambda p: _write_logp_change(p, "p25", "p75"), ""),
    (f"{_LOGP}, 5th to 95th percentile", lambda p: _write_logp_change(p, "p5", "p95"), ""),
    (f"{_LOGP}, 1st to 99th percentile", lambda p: _write_logp_change(p, "p1", "p99"), ""),
    (
        "Calibration error (ECE)",
        lambda p: write_pair(p.confidence.ece if p.confidence else None, number),
        _NO_CONFIDENCE,
    ),
    ("Brier score", lambda p: write_pair(p.confidence.brier if p.confidence else None, number), _NO_CONFIDENCE),
    ("Right by chance", lambda p: share(p.chance), "the answer is free text."),
    ("Majority baseline", lambda p: share(p.majority), _NO_FACTS),
    ("The paper's drop, absolute", lambda p: write_points(p.drop_absolute).removeprefix("+"), _NO_FACTS),
    ("The paper's drop, relative", lambda p: share(p.drop_relative), _NOTHING_KNOWN),
    ("Headline accuracy is the", lambda p: _AVERAGES.get(p.average, clean(p.average, 40)), ""),
    ("Protocol", lambda p: clean(p.protocol, 60), ""),
    ("Seed", lambda p: str(p.seed), ""),
)


class HowSure(Section):
    title = "How sure the figures are"
    order = 57
    glossary = (
        (
            "Interval over relations",
            "facts of one relation are learned and lost together, so they tell less than as many unrelated facts. "
            "This interval, which gates, advice and searches use, shows how the figure varies with other relations.",
        ),
        (
            "Smallest detectable loss",
            "a net loss smaller than this, in percent of the known facts, would pass for chance in more than one case "
            "in five.",
        ),
    )
    method = (
        "Related facts count as a smaller number of unrelated facts that tell as much (design effect, Kish 1965; Korn "
        "and Graubard 1998). Intervals over relations are Wilson's for that number of facts, with Student's t, and "
        f"Newcombe's for the difference. There are none with fewer than {FEWEST} relations, or if each known "
        "fact is of another one.",
        "The smallest detectable loss is the one that the test would detect in four of five cases (a power of 80 %, "
        "Duffy 1984), if facts were gained as often as here.",
    )

    def parts(self, context: Context) -> Iterator[Part]:
        comparison = context.comparison
        columns = [(clean(each.probe, 60), each.counts, each.certainty) for each in comparison.probes]
        columns += [("all", comparison.counts, comparison.certainty)] if len(columns) > 1 else []
        columns = [each for each in columns if each[1].known_before]
        # For many models, the verdict says enough; the JSON has it all.
        if not columns or context.limits.relations is not None:
            return
        rows = tuple((name, *(write(counts, sure) for _, counts, sure in columns)) for name, write in _ROWS)
        heads = ("Estimate", *(name for name, *_ in columns))
        yield Table("Intervals and smallest detectable loss", heads, rows, captioned=False)
        for name, _, sure in columns:
            facts = f"known facts of {name}" if len(columns) > 1 else "known facts"
            relations = sure.relations
            if relations == 1:
                yield Note(f"All {facts} belong to one relation, so there is no interval over relations.")
            elif relations < FEWEST:
                yield Note(f"The {facts} belong to {relations} relations: too few for an interval over these.")
            elif sure.kept.low is None:
                yield Note(f"No two {facts} count as related: an interval over relations would be the simple one.")


def _write_interval(figure: Estimate, write: Callable[[float], str] = share) -> str:
    return NONE if figure.low is None else write_estimate(figure, write)


# What is written of the counts and the certainty of some facts.
_ROWS: tuple[tuple[str, Callable[[Counts, Certainty], str]], ...] = (
    ("Known facts", lambda c, _: count(c.known_before)),
    ("Relations with known facts", lambda _, s: count(s.relations)),
    ("Knowledge kept, simple interval", lambda c, _: _write_interval(estimate_proportion(c.both, c.known_before))),
    ("Knowledge kept, interval over relations", lambda _, s: _write_interval(s.kept)),
    ("Difference of accuracy, simple interval", lambda c, _: write_estimate(estimate_difference(c), write_points)),
    ("Difference of accuracy, interval over relations", lambda _, s: _write_interval(s.difference, write_points)),
    ("Net change against chance, by relation", lambda _, s: write_p_value(s.p) if s.unit == "relation" else NONE),
    ("Net change against chance, facts as independent", lambda c, _: write_p_value(run_mcnemar(c))),
    ("Smallest detectable net loss", lambda _, s: share(s.smallest_loss)),
    ("Known facts to detect a net loss of 2 %", lambda _, s: count(s.facts_for_two) if s.facts_for_two else NONE),
)


_COLUMNS = ("Model", "Timed in", "Device", "Facts per second", "Tokens per second", "Peak memory")


class Layers(Section):
    title = "By group of layers"
    order = 50

    def parts(self, context: Context) -> Iterator[Part]:
        model = context.comparison.model
        groups = model.groups or {}
        if rows := tuple(_make_group_row(name, group) for name, group in groups.items() if group.get("parameters")):
            scheme = choose_word(read_schemes(model.recipe))
            columns = ("Group of layers", "Parameters", "Zeros", "Pruned", scheme, "Relative error")
            yield Table("What was done to each group of layers", columns, rows, captioned=False)
            if context.comparison.source_matches is False:
                step = f"the step from {name_source(model)}, which this model was made from"
                yield Note(f"The table describes {step}, not from the original.")
        if removed := " ".join(describe_removed(model.removed)):
            yield Note(clean(removed, 1000))
        sentences = [*describe_calibration(model.calibration)]
        if facts := model.in_calibration:
            appear = "appears" if facts.found == 1 else "appear"
            sentences.append(
                f"{count(facts.found) if facts.found else 'None'} of {count_facts(facts.facts)} {appear} in this text "
                f"(subject and object in one sentence), {count(facts.known_found)} of the {count(facts.known)} that "
                "the original knew."
            )
        if sentences:
            yield Note(clean(" ".join(sentences), 1000))


def _make_group_row(name: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    parameters = int(group["parameters"])

    def part(key: str) -> str:
        return write_percent(int(group[key]), parameters) if group.get(key) is not None else NONE

    parts = map(part, ("zeros_after", "pruned", "quantized"))
    return clean(name, 60), count(parameters), *parts, number(group.get("relative_error"), 4)


class Speed(Section):
    title = "Speed and memory"
    order = 70

    def parts(self, context: Context) -> Iterator[Part]:
        rows = []
        for who, model in (("original", context.original), ("compressed", context.comparison.model)):
            if speed := model.speed:
                rates = map(write_rate, (speed.facts_per_second, speed.tokens_per_second))
                place = clean(name_deployment(model), 60), clean(speed.device, 60)
                rows.append((who, *place, *rates, write_size(speed.peak_bytes)))
        if rows:
            yield Table("Speed and memory, measured on this machine", _COLUMNS, tuple(rows))
