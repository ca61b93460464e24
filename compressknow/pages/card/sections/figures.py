"""Every figure of every probe, and the models themselves: what was done to them, how fast each is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compressknow.base.format import (
    NONE,
    at_least,
    count,
    estimate,
    number,
    p_value,
    percent,
    plain,
    points,
    share,
    size,
)
from compressknow.comparison.records import Estimate, Movement, ProbeFigures
from compressknow.compress.schemes import choose_word, read_schemes
from compressknow.evaluate.records import FactsInText, NoiseFloor
from compressknow.model.manifest import calibrated_in_words, removed_in_words
from compressknow.pages.card.costs import deployed_in
from compressknow.pages.card.sections import Context, Section
from compressknow.pages.parts import Folded, Note, Part, Remarks, Table, groups_table
from compressknow.pages.records import counts_to_json, estimate_to_json, groups_to_json, kept_to_json, pair_to_json

_AVERAGES = {"micro": "share of all facts", "macro": "mean over relations"}


class Figures(Section):
    """A row a figure, a column a probe."""

    title = "All figures"
    order = 60
    glossary = (
        ("Knowledge kept", "of the facts that the original knew, the share that the compressed model still knows."),
        ("Kept above chance", "the same, counting only what is known beyond guessing among the candidates."),
        ("Lost, gained, flips", "facts that only the original knows, that only the compressed model knows, and both."),
        (
            "Interval",
            "the range in brackets: for other facts of the same kind, 95 of 100 such ranges contain the true value.",
        ),
        (
            "p",
            "how often chance alone splits lost and gained facts as unevenly; a small p means that the net change is "
            "real.",
        ),
        ("Top answer changed", "facts to which the answer differs, from one wrong answer to another included."),
        (
            "By rounding alone",
            "the original's own answers in another precision, against those that all else is compared with: a change "
            "no larger than this may be rounding.",
        ),
        (
            "By the runtime alone",
            "the same where the original runs in the compressed model's runtime, from a file that is not quantized.",
        ),
        ("Among the top 5", "if the right answer is still near the top, the fact is suppressed rather than erased."),
        ("Mean reciprocal rank", "1 where the right answer always comes first, 1/2 where it comes second, and so on."),
        ("Movement (KL)", "how far the probabilities of the next token moved, in nats; 0 is no change at all."),
        ("Calibration error, Brier score", "how far a model's confidence is from being right; 0 is perfect."),
        ("Majority baseline", "what a model scores that knows nothing and always says the same."),
        ("The paper's drop", "accuracy before minus accuracy after, in points, and relative to accuracy before."),
    )

    def parts(self, context: Context) -> Iterator[Part]:
        probes = context.comparison.probes
        if context.comparison.only_texts:
            return
        table, missing = _figures(probes)
        yield table
        if missing:
            yield Remarks("Why some figures are missing", missing)
        subjects = tuple(_by_subject(probe) for probe in probes if probe.by_subject)
        if subjects:
            yield Folded("By domain, probe by probe", subjects)

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:
        return {
            "protocol": probe.protocol,
            "average": probe.average,
            **counts_to_json(probe.counts),
            **estimate_to_json("accuracy_original", probe.accuracy_original),
            **estimate_to_json("accuracy_compressed", probe.accuracy_compressed),
            **estimate_to_json("difference", probe.difference),
            **kept_to_json(probe.counts),
            **estimate_to_json("kept_above_chance", probe.kept_above_chance),
            **estimate_to_json("macro_original", probe.macro_original),
            **estimate_to_json("macro_compressed", probe.macro_compressed),
            **estimate_to_json("macro_difference", probe.macro_difference),
            "flips": probe.counts.flips,
            "answer_changed": probe.answer_changed,
            "noise_floor": _noise_to_json(probe.noise_floor),
            "runtime_noise_floor": _noise_to_json(probe.runtime_noise_floor),
            **_movement(probe),
            "logp_change": dict(probe.logp_change) if probe.logp_change else None,
            **pair_to_json("mrr", probe.mrr),
            **pair_to_json("p_at_5", probe.p_at_5),
            "lost_still_in_top5": probe.lost_still_in_top5,
            **pair_to_json("ece", probe.ece),
            **pair_to_json("brier", probe.brier),
            "chance": probe.chance,
            "majority": probe.majority,
            "drop_absolute": probe.drop_absolute,
            "drop_relative": probe.drop_relative,
            "by_subject": groups_to_json(probe.by_subject),
        }


def _by_subject(probe: ProbeFigures) -> Table:
    caption = f"{plain(probe.probe, 60)} by domain"
    return groups_table(probe.by_subject, "Domain", caption, bars=False)


def _figures(probes: tuple[ProbeFigures, ...]) -> tuple[Table, tuple[str, ...]]:
    """The table, and why some figures are missing, a sentence each."""
    rows, missing = [], []
    for figure in _FIGURES:
        cells = tuple(figure.write(probe) for probe in probes)
        if figure.optional and set(cells) <= {NONE}:
            continue
        rows.append((figure.name, *cells))
        without = [plain(p.probe, 60) for p, cell in zip(probes, cells, strict=True) if cell == NONE]
        if without and figure.why_none:
            where = f" ({', '.join(without)})" if len(probes) > 1 else ""
            missing.append(f"{figure.name}{where}: {figure.why_none}")
    columns = ("Figure", *(plain(probe.probe, 60) for probe in probes))
    return Table("All figures of each probe", columns, tuple(rows), captioned=False), tuple(missing)


def _noise_to_json(floor: NoiseFloor | None) -> dict[str, Any] | None:
    """Of the reading of knowing that the card is by, which the figures are already in."""
    return {key: value for key, value in asdict(floor).items() if key != "produced"} if floor else None


def _movement(probe: ProbeFigures) -> dict[str, Any]:
    moved: Mapping[str, Any] = asdict(probe.movement) if probe.movement else {}
    keys = ("kl_mean", "kl_median", "kl_p99", "kl_max")
    rest = moved.get("rest")
    return {
        "kl_facts": moved.get("n", 0),
        **{key: moved.get(key) for key in keys},
        "kl_is_lower_bound": probe.movement.is_lower_bound if probe.movement else None,
        **pair_to_json("kl_rest", rest),
    }


def _written(figure: Estimate, write: Callable[[float], str] = share) -> str:
    return estimate(figure.value, figure.low, figure.high, write)


def _pair(pair: tuple[float, float] | None, write: Callable[[float], str]) -> str:
    return NONE if pair is None else f"{write(pair[0])} → {write(pair[1])}"


def _moved(probe: ProbeFigures, get: Callable[[Movement], float]) -> str:
    moved = probe.movement
    return NONE if moved is None else at_least(number(get(moved)), moved.is_lower_bound)


def _rest(probe: ProbeFigures) -> str:
    return _pair(probe.movement.rest if probe.movement else None, share)


def _logp_change(probe: ProbeFigures, low: str, high: str) -> str:
    """What the changes between two percentiles lie between, or the median."""
    change = probe.logp_change
    if not change or low not in change or high not in change:
        return NONE
    return number(change[low], 2) if low == high else f"{number(change[low], 2)} to {number(change[high], 2)}"


def _facts(probe: ProbeFigures) -> str:
    limited = f", limited to {count(probe.limit)}" if probe.limit is not None else ""
    return f"{count(probe.counts.n)} of {count(probe.facts_read)} read{limited}"


def _hidden(probe: ProbeFigures) -> str:
    if probe.lost_still_in_top5 is None or not probe.counts.lost:
        return NONE
    share_of_lost = percent(probe.lost_still_in_top5, probe.counts.lost)
    return f"{count(probe.lost_still_in_top5)} of {count(probe.counts.lost)} ({share_of_lost})"


def _changed_by(floor: NoiseFloor | None) -> str:
    return NONE if floor is None or not floor.n else f"{percent(floor.changed, floor.n)} of {count(floor.n)} facts"


def _flipped_by(floor: NoiseFloor | None) -> str:
    return NONE if floor is None or not floor.n else percent(floor.lost + floor.gained, floor.n)


def _moved_by(floor: NoiseFloor | None) -> str:
    return NONE if floor is None or floor.kl_mean is None else number(floor.kl_mean)


def _lost(probe: ProbeFigures) -> str:
    counts = probe.counts
    return f"{count(counts.lost)} of {count(counts.known_before)} ({percent(counts.lost, counts.known_before)})"


def _gained(probe: ProbeFigures) -> str:
    counts = probe.counts
    unknown = counts.gained + counts.neither
    return f"{count(counts.gained)} of {count(unknown)} ({percent(counts.gained, unknown)})"


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    write: Callable[[ProbeFigures], str]
    why_none: str = ""
    # Left out where no probe has it: it is of some models alone.
    optional: bool = False


_NO_FACTS = "there is nothing to count."
_NOTHING_KNOWN = "the original knew none of the facts."
_NO_DISTRIBUTION = "the answers hold no distribution over tokens."
_LOGP = "Change of the right answer's log-probability"
_NO_LOGP = "the answers hold no probability of the right answer."
_NO_NOISE = "the original did not answer in another precision."
_NO_RANK = "the answers hold no rank of the right answer."
_NO_CONFIDENCE = (
    "it needs the probability of each answer among all candidates, which free answers, most servers and answers of "
    "older versions do not tell."
)

_FIGURES = (
    _Figure("Facts evaluated", _facts),
    _Figure("Accuracy before", lambda p: _written(p.accuracy_original), _NO_FACTS),
    _Figure("Accuracy after", lambda p: _written(p.accuracy_compressed), _NO_FACTS),
    _Figure("Difference", lambda p: _written(p.difference, points), _NO_FACTS),
    _Figure("Mean over relations before", lambda p: _written(p.macro_original), "there are too few relations."),
    _Figure("Mean over relations after", lambda p: _written(p.macro_compressed), "there are too few relations."),
    _Figure(
        "Difference of these means", lambda p: _written(p.macro_difference, points), "there are too few relations."
    ),
    _Figure("Knowledge kept", lambda p: _written(p.kept), _NOTHING_KNOWN),
    _Figure(
        "Kept above chance",
        lambda p: _written(p.kept_above_chance),
        "the answer is free text, so that nothing is right by chance, or the original was no better than chance.",
    ),
    _Figure("Lost", _lost),
    _Figure("Gained", _gained),
    _Figure("Flips (lost or gained)", lambda p: share(p.counts.flips), _NO_FACTS),
    _Figure("Net change against chance", lambda p: p_value(p.certainty.test.p), "no fact was lost or gained."),
    _Figure("Top answer changed", lambda p: share(p.answer_changed), _NO_FACTS),
    _Figure("Top answer changed by rounding alone", lambda p: _changed_by(p.noise_floor), _NO_NOISE),
    _Figure("Top answer changed by the runtime alone", lambda p: _changed_by(p.runtime_noise_floor), optional=True),
    _Figure("Flips by rounding alone", lambda p: _flipped_by(p.noise_floor)),
    _Figure("Flips by the runtime alone", lambda p: _flipped_by(p.runtime_noise_floor), optional=True),
    _Figure("Lost, but still among the top 5", _hidden, "nothing was lost, or " + _NO_RANK),
    _Figure("Mean reciprocal rank", lambda p: _pair(p.mrr, number), _NO_RANK),
    _Figure("Right answer among the top 5", lambda p: _pair(p.p_at_5, share), _NO_RANK),
    _Figure("Movement (KL, nats), mean", lambda p: _moved(p, lambda m: m.kl_mean), _NO_DISTRIBUTION),
    _Figure("Movement by rounding alone, mean", lambda p: _moved_by(p.noise_floor)),
    _Figure("Movement by the runtime alone, mean", lambda p: _moved_by(p.runtime_noise_floor), optional=True),
    _Figure("Movement, median", lambda p: _moved(p, lambda m: m.kl_median)),
    _Figure("Movement, 99th percentile", lambda p: _moved(p, lambda m: m.kl_p99)),
    _Figure("Movement, largest", lambda p: _moved(p, lambda m: m.kl_max)),
    _Figure("Probability of the tokens taken together", _rest),
    _Figure(f"{_LOGP}, median", lambda p: _logp_change(p, "p50", "p50"), _NO_LOGP),
    _Figure(f"{_LOGP}, middle half", lambda p: _logp_change(p, "p25", "p75")),
    _Figure(f"{_LOGP}, 5th to 95th percentile", lambda p: _logp_change(p, "p5", "p95")),
    _Figure(f"{_LOGP}, 1st to 99th percentile", lambda p: _logp_change(p, "p1", "p99")),
    _Figure("Calibration error (ECE)", lambda p: _pair(p.ece, number), _NO_CONFIDENCE),
    _Figure("Brier score", lambda p: _pair(p.brier, number), _NO_CONFIDENCE),
    _Figure("Right by chance", lambda p: share(p.chance), "the answer is free text."),
    _Figure("Majority baseline", lambda p: share(p.majority), _NO_FACTS),
    _Figure("The paper's drop, absolute", lambda p: points(p.drop_absolute).removeprefix("+"), _NO_FACTS),
    _Figure("The paper's drop, relative", lambda p: share(p.drop_relative), _NOTHING_KNOWN),
    _Figure("Headline accuracy is the", lambda p: _AVERAGES.get(p.average, plain(p.average, 40))),
    _Figure("Protocol", lambda p: plain(p.protocol, 60)),
    _Figure("Seed", lambda p: str(p.seed)),
)


_COLUMNS = ("Model", "Timed in", "Device", "Facts a second", "Tokens a second", "Peak memory")


class Layers(Section):
    """Parameters, zeros and error of each group of layers, what was dropped, and the calibration text; left out for a
    checkpoint without a manifest."""

    title = "By group of layers"
    order = 50

    def parts(self, context: Context) -> Iterator[Part]:
        model = context.comparison.model
        if rows := tuple(_group_row(name, group) for name, group in model.groups.items() if group.get("parameters")):
            scheme = choose_word(read_schemes(model.recipe))
            columns = ("Group of layers", "Parameters", "Zeros", "Pruned", scheme, "Relative error")
            yield Table("What was done to which layers", columns, rows, captioned=False)
        if removed := " ".join(removed_in_words(model.removed)):
            yield Note(plain(removed, 1000))
        if told := " ".join((*calibrated_in_words(model.calibration), *_found(model.in_calibration))):
            yield Note(plain(told, 1000))


def _found(facts: FactsInText | None) -> Iterator[str]:
    if facts:
        stand = "stands" if facts.found == 1 else "stand"
        yield (
            f"{count(facts.found) if facts.found else 'None'} of {count(facts.facts)} facts {stand} in this text "
            f"(subject and object in one sentence), {count(facts.known_found)} of the {count(facts.known)} that the "
            "original knew."
        )


def _group_row(name: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    parameters = int(group["parameters"])

    def part(key: str) -> str:
        return percent(int(group[key]), parameters) if group.get(key) is not None else NONE

    error = group.get("relative_error")
    return (
        plain(name, 60),
        count(parameters),
        part("zeros_after"),
        part("pruned"),
        part("quantized"),
        number(float(error), 4) if error is not None else NONE,
    )


class Speed(Section):
    """Facts and tokens a second and peak memory, of both models or of the one that was measured."""

    title = "Speed and memory"
    order = 70

    def parts(self, context: Context) -> Iterator[Part]:
        rows = tuple(
            (
                who,
                plain(deployed_in(model), 60),
                plain(model.speed.device, 60),
                f"{model.speed.facts_per_second:,.1f}",
                f"{model.speed.tokens_per_second:,.1f}" if model.speed.tokens_per_second is not None else NONE,
                size(model.speed.peak_bytes) if model.speed.peak_bytes is not None else NONE,
            )
            for who, model in (("original", context.original), ("compressed", context.comparison.model))
            if model.speed
        )
        if rows:
            yield Table("Speed and memory, measured on this machine", _COLUMNS, rows)
