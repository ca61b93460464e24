"""Records of a report card, and their values for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from compressknow.base.format import NONE, clean, count, share, share_against, write_percent, write_size
from compressknow.base.notebook import Summary, SummaryRepr, Tabular
from compressknow.comparison.intervals import estimate_kept, list_clusters, run_mcnemar
from compressknow.comparison.records import (
    NOT_MEASURED,
    Certainty,
    ChangedFact,
    Counts,
    EarlyStop,
    Estimate,
    ProbeFigures,
    TextFigures,
)
from compressknow.evaluate.records import ModelRecord
from compressknow.pages import as_json

if TYPE_CHECKING:
    from compressknow.comparison.paired import Standing

SCHEMA = 1  # of report.json
NAME_CHARACTERS = 80  # maximum length of a name in a sentence
SCALE = (("A+", 99), ("A", 97), ("B", 93), ("C", 85), ("D", 70))  # the minimum share kept for each grade, in percent


@dataclass(frozen=True, slots=True)
class Grade:
    """Line of the report card: knowledge kept of one domain over all probes.

    `grade` is A+ (>= 99 % kept), A (>= 97), B (>= 93), C (>= 85), D (>= 70) or F; `-` if the original knew nothing.
    `range` names the grades that the interval spans if there are several ("A to C"). The interval is over `clusters`
    (relations, or facts if a probe has one relation) if there are enough of them, else the simple one.
    """

    subject: str
    clusters: tuple[Counts, ...]
    kept: Estimate
    grade: str
    range: str | None = None

    @property
    def counts(self) -> Counts:
        return sum(self.clusters, Counts())

    @property
    def mark(self) -> str:
        return self.grade + "?" * (self.range is not None)

    @property
    def written(self) -> str:
        """Return the share kept with its interval, with enough digits to show their grades: 92.96 % is a C."""
        return write_estimate(self.kept, partial(share_against, limits=[least / 100 for _, least in SCALE]))


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(SummaryRepr):
    """Comparison of the original with one compressed model, over all probes.

    Attributes
    ----------
    kept : over the facts of all probes; the interval is over relations if there are enough, else the simple one.
    certainty : certainty of the figures over all probes; each relation of a probe is a cluster.
    early : how a gate was decided before all facts were evaluated, if it was.
    next : advice on what to do next, in one line; empty if the figures support none.
    measured : by section and probe, what the section measured, as values for JSON.
    left_out : sections of other packages that failed, and the warning on each.
    source_matches : whether the compressed model records the original's files as its source, or as the source of its
        source; None if unknown.
    texts : figures on running texts, which are not among `probes`.
    """

    model: ModelRecord
    verdict: str
    kept: Estimate
    counts: Counts
    grades: tuple[Grade, ...]
    probes: tuple[ProbeFigures, ...]
    lost: tuple[ChangedFact, ...]
    gained: tuple[ChangedFact, ...]
    warnings: tuple[str, ...]
    certainty: Certainty = NOT_MEASURED
    early: EarlyStop | None = None
    next: str = ""
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[TextFigures, ...] = ()
    source_matches: bool | None = None

    @property
    def clusters(self) -> list[Counts]:
        """Return the counts of each cluster, over all probes."""
        return [each for probe in self.probes for each in list_clusters([group.counts for group in probe.by_relation])]

    def kept_at(self, level: float) -> Estimate:
        """Return knowledge kept with an interval at another confidence level."""
        return estimate_kept(self.clusters, level)

    @property
    def only_texts(self) -> bool:
        """Return whether the two were compared only on texts, so that there are no facts to count."""
        return bool(self.texts) and not self.probes

    def _summary(self) -> Summary:
        rows = tuple(
            (grade.subject, count(grade.counts.known_before), count(grade.counts.both), grade.written, grade.mark)
            for grade in self.grades
        )
        columns = ("Domain", "Known before", "Kept", "Share kept (95 % interval)", "Grade")
        return Summary(f"Comparison: what {clean(self.model.name, 60)} kept", self.verdict, columns, rows)


@dataclass(frozen=True)
class Gate:
    """Minimum share of knowledge to keep (0 to 1), of all facts or of a domain or relation, `of`.

    >>> Gate(0.9).in_words, Gate(0.85, "science").in_words
    ('at least 90 %', 'at least 85 % of science')
    """

    least: float
    of: str | None = None
    strict: bool = False  # whether the whole interval must meet it, not only the share

    @property
    def in_words(self) -> str:
        return f"at least {100 * self.least:g} %{f' of {self.of}' if self.of else ''}"

    def measure_kept(self, comparison: Comparison) -> tuple[Counts, Estimate]:
        """Return the counts of the gate's facts, and knowledge kept of them with its interval."""
        if self.of is None:
            return comparison.counts, comparison.kept
        for grade in comparison.grades:
            if grade.subject == self.of:
                return grade.counts, grade.kept
        relations = (group for probe in comparison.probes for group in probe.by_relation)
        clusters = [group.counts for group in relations if group.name == self.of]
        return sum(clusters, Counts()), estimate_kept(clusters)

    def is_met(self, comparison: Comparison) -> bool | None:
        """Return whether a model meets the gate; None if a strict gate is neither met nor missed."""
        if comparison.early is not None:
            return comparison.early.met
        counts, interval = self.measure_kept(comparison)
        if counts.kept is None or not self.strict:
            return counts.kept is not None and counts.kept >= self.least
        low, high = interval.low or 0.0, interval.high or 0.0
        return None if low < self.least <= high else low >= self.least


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Choice of one of several models."""

    place: int | None  # index of the recommended model among the compressed ones; None if there is none
    reason: str  # sentences: why, and which models no test distinguishes from it
    standings: tuple[Standing, ...]  # how each model compares with the others
    within: int | None = None  # maximum size in bytes, if one was set


@dataclass(frozen=True, slots=True, repr=False)
class Card(Tabular):
    """Report card of one original against compressed models; its rows are those of each model and probe."""

    verdict: str
    original: ModelRecord
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]
    show_facts: bool
    versions: Mapping[str, str]
    command: str | None
    method: tuple[str, ...]  # sentences on how models were evaluated and judged, and the limits of that
    known: str = "recognized"  # what counts as known: that or better, or only "produced"
    decision: Recommendation | None = None  # if there are several compressed models
    gates: tuple[Gate, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``report.json``, for ``json.dumps(..., allow_nan=False)``.

        Shares and accuracies lie between 0 and 1; unknown values are None; intervals are [low, high], 95 %. Without
        `show_facts`, it contains no text of facts.
        """
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "known": self.known,
            "recommended": _dump_recommendation(self.decision, name_models(self)) if self.decision else None,
            "gates": [
                {
                    **{"of": gate.of, "least": gate.least, "strict": gate.strict},
                    "met": [gate.is_met(each) for each in self.comparisons],
                }
                for gate in self.gates
            ],
            "original": as_json.dump_model(self.original),
            "compressed": [dump_comparison(each, show_facts=self.show_facts) for each in self.comparisons],
            "warnings": list(self.warnings),
            "method": list(self.method),
            "versions": dict(self.versions),
            "command": self.command,
        }

    def _rows(self) -> list[dict[str, Any]]:
        return [_make_frame_row(each.model, probe) for each in self.comparisons for probe in each.probes]

    def _summary(self) -> Summary:
        title = f"Card: what {clean(self.original.name, 60)} knew"
        if len(self.comparisons) == 1:
            return self.comparisons[0]._summary()._replace(title=title, verdict=self.verdict)
        rows = tuple(
            (each.model.name, each.model.setup or "-", write_size(each.model.bytes), write_estimate(each.kept))
            for each in self.comparisons
        )
        return Summary(title, self.verdict, ("Model", "Setup", "Size", "Kept (95 % interval)"), rows)


def _make_frame_row(model: ModelRecord, probe: ProbeFigures) -> dict[str, Any]:
    counts, kept = probe.counts, probe.kept
    return {
        **{"model": model.name, "setup": model.setup, "probe": probe.probe},
        **{"facts": counts.n, "known_before": counts.known_before, "both": counts.both},
        **{"lost": counts.lost, "gained": counts.gained},
        **{"kept": kept.value, "kept_low": kept.low, "kept_high": kept.high},
        **{"accuracy_original": probe.accuracy_original.value, "accuracy_compressed": probe.accuracy_compressed.value},
        "p": probe.certainty.p,
        "mcnemar_p": run_mcnemar(counts),
        "answer_changed": probe.answer_changed,
    }


def write_estimate(figure: Estimate, write: Callable[[float], str] = share) -> str:
    """Write a figure with its interval, without repeating the unit more than needed.

    >>> [write_estimate(Estimate(*ends)) for ends in ((0.951, 0.94, 0.961), (1.0, 0.93, 1.0), (0.5,), (None,))]
    ['95.1 % (94.0 to 96.1 %)', '100 % (93.0 to 100 %)', '50.0 %', '-']
    >>> from compressknow.base.format import write_points
    >>> write_estimate(Estimate(-0.02, -0.03, 0.0), write_points)
    '−2.0 points (−3.0 to 0)'
    """
    if figure.value is None:
        return NONE
    if figure.low is None or figure.high is None:
        return write(figure.value)
    return f"{write(figure.value)} ({write_range(figure.low, figure.high, write).replace(' points', '')})"


def write_part(part: int, whole: int) -> str:
    """Write ``3 of 1,200 (0.2 %)``."""
    return f"{count(part)} of {count(whole)} ({write_percent(part, whole)})"


def write_range(low: float, high: float, write: Callable[[float], str] = share) -> str:
    """Write two shares as the ends of a range.

    >>> write_range(0.914, 0.953)
    '91.4 to 95.3 %'
    """
    return f"{write(low).removesuffix(' %')} to {write(high)}"


def label_models(comparisons: Sequence[Comparison], *, numbered: bool = False) -> list[str]:
    """Return each model's setup, with its name or number if that is ambiguous or, of several, `numbered`."""
    names = [clean(comparison.model.name, NAME_CHARACTERS) for comparison in comparisons]
    setups = [clean(comparison.model.setup or comparison.model.name, NAME_CHARACTERS) for comparison in comparisons]
    repeated = Counter(setups)
    labels = [
        f"{setup} ({name})" if repeated[setup] > 1 and setup != name else setup
        for setup, name in zip(setups, names, strict=True)
    ]
    alike = Counter(labels)
    is_numbered = numbered and len(labels) > 1
    return [f"{i}. {label}" if is_numbered or alike[label] > 1 else label for i, label in enumerate(labels, start=1)]


def name_models(card: Card) -> tuple[str, ...]:
    """Return a name for each compressed model of a card: its label, numbered if there are several."""
    return tuple(label_models(card.comparisons, numbered=True))


def dump_comparison(comparison: Comparison, *, show_facts: bool) -> dict[str, Any]:
    """Return one compressed model against the original, as plain values."""
    model = comparison.model
    values = {
        "setup": model.setup,
        "source": model.source,
        "source_matches": comparison.source_matches,
        "model": as_json.dump_model(model),
        "verdict": comparison.verdict,
        **as_json.dump_counts(comparison.counts),
        **as_json.dump_kept(comparison.counts),
        **as_json.dump_certainty(comparison.certainty),
        "early": as_json.dump_early(comparison.early),
        "next": comparison.next or None,
        "grades": {grade.subject: grade.grade for grade in comparison.grades},
        "grade_details": {
            grade.subject: {
                **{"grade": grade.grade, "range": grade.range},
                **as_json.dump_clusters(grade.counts, grade.clusters),
            }
            for grade in comparison.grades
        },
        "probes": {
            probe.probe: as_json.probe_to_json(probe)
            | {name: values[probe.probe] for name, values in comparison.measured.items() if probe.probe in values}
            for probe in comparison.probes
        },
        "warnings": list(comparison.warnings),
    }
    if show_facts:
        values["lost_facts"] = [asdict(fact) for fact in comparison.lost]
        values["gained_facts"] = [asdict(fact) for fact in comparison.gained]
    return values | ({"texts": as_json.dump_texts(comparison.texts)} if comparison.texts else {})


def _dump_recommendation(decision: Recommendation, names: Sequence[str]) -> dict[str, Any]:
    name: Mapping[int | None, str] = dict(enumerate(names))
    return {
        "model": name.get(decision.place),
        "place": decision.place,
        "reason": decision.reason,
        "within": decision.within,
        "standings": [
            {
                "model": name[place],
                "keeps": each.keeps,
                "beaten_by": name.get(each.beaten_by),
                "surely": each.is_surely_beaten,
                "not_told_from": [name[other] for other in each.alike],
            }
            for place, each in enumerate(decision.standings)
        ],
    }
