"""Records of a comparison's numbers: raw counts, from which ratios are derived, and the figures of each probe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from compressknow.evaluate.records import NoiseFloor


@dataclass(frozen=True, slots=True)
class Counts:
    """Facts by what the original and the compressed model know; ratios are derived, never stored.

    >>> counts = Counts(both=8, lost=2, gained=1, neither=9)
    >>> counts.n, counts.kept, counts + counts == Counts(16, 4, 2, 18)
    (20, 0.8, True)
    """

    both: int = 0
    lost: int = 0
    gained: int = 0
    neither: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.both + other.both, self.lost + other.lost, self.gained + other.gained, self.neither + other.neither
        )

    @property
    def n(self) -> int:
        return self.both + self.lost + self.gained + self.neither

    @property
    def known_before(self) -> int:
        return self.both + self.lost

    @property
    def known_after(self) -> int:
        return self.both + self.gained

    @property
    def kept(self) -> float | None:
        """Return knowledge kept: the share of what the original knew that the compressed model still knows."""
        return self.both / self.known_before if self.known_before else None

    @property
    def flips(self) -> float | None:
        return (self.lost + self.gained) / self.n if self.n else None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Figure with its confidence interval. `value` is None if there is nothing to estimate it from, such as no known
    facts; `low` and `high` are None if there are too few facts for an interval."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def or_by_relation(self, by_relation: Estimate) -> Estimate:
        """Return the preferred estimate: the one with an interval over relations, if there is such an interval."""
        return self if by_relation.low is None else by_relation


@dataclass(frozen=True, slots=True)
class Group:
    """Facts of one relation, domain or popularity bin."""

    name: str
    counts: Counts
    relations: tuple[Counts, ...]  # the counts of each of its relations
    kept: Estimate  # knowledge kept, with its interval over relations if there are enough of them, else the simple one
    p: float | None  # of the paired test by relation (exact McNemar if there is only one)
    p_holm: float | None  # the same, adjusted over all groups of its table (Holm)
    answer_changed: float | None  # share of facts whose top answer differs
    chance: float | None = None  # expected accuracy of guessing; None if any text is possible


@dataclass(frozen=True, slots=True)
class KlFigures:
    """Divergence (nats) of the distribution at the answer's first position, over the `n` facts that have one. `rest` is
    the mean probability, before and after, of tokens that count as one, which makes the divergences lower bounds; None
    if divergences are over the whole vocabulary."""

    n: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    rest: tuple[float, float] | None

    @property
    def is_lower_bound(self) -> bool:
        return self.rest is not None


@dataclass(frozen=True, slots=True)
class Certainty:
    """Certainty of figures, given that facts of a relation are correlated, and the power of this number of facts."""

    p: float | None = None  # two-sided, of the test of whether facts are lost as often as gained; None without facts
    unit: str = "fact"  # what that test samples, ``fact`` or ``relation``
    relations: int = 0  # those of which the original knew a fact; with fewer than five there are no intervals
    # Knowledge kept and the difference in accuracy, with their intervals over relations.
    kept: Estimate = Estimate(None)
    difference: Estimate = Estimate(None)
    # The smallest net loss, as a share of the known facts, that is detected with a power of 80 %; None if not even the
    # loss of all would be.
    smallest_loss: float | None = None
    facts_for_two: int | None = None  # known facts needed to detect a net loss of 2 % of them; None if none suffice


NOT_MEASURED = Certainty()


@dataclass(frozen=True, slots=True)
class Tertile:
    """Third of the known facts by the original's confidence in its answer, from `low` to `high` (0 to 1)."""

    name: str
    low: float
    high: float
    counts: Counts
    kept: Estimate


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Answers in one bin of confidence: their number, the number of right ones, and their mean confidence (0 to 1)."""

    facts: int
    right: int
    confidence: float | None


@dataclass(frozen=True, slots=True)
class Confidence:
    """Confidence of both models in their answers."""

    thirds: tuple[Tertile, ...]  # of the facts that the original knew, the most confident first; empty if too few
    median: float  # median of the original's confidence over all facts
    wrong_original: int
    wrong_compressed: int
    confidently_wrong_original: int  # wrong answers with more confidence than the original's median
    confidently_wrong_compressed: int
    reliability_original: tuple[ReliabilityBin, ...]  # calibration, by bins of equal width from 0 to 1
    reliability_compressed: tuple[ReliabilityBin, ...]
    ece: tuple[float, float]  # calibration error, before and after
    brier: tuple[float, float]


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """Gate that was decided by the first `facts` of all `of` facts in random order; the original knew `known` of these,
    and the share of all is at least the gate if `met`. `level` is the allowed probability of a wrong decision, `kept`
    the share of the known facts, with its confidence sequence, which is valid at every look."""

    gate: float
    level: float
    facts: int
    known: int
    of: int
    kept: Estimate
    met: bool


@dataclass(frozen=True, slots=True)
class GradeCounts:
    """Numbers of facts by grade (`compressknow.evaluate.grades.GRADES`): in each model, and as they `moved` from one
    grade to another. `written` is whether each model generated text; without text no fact counts as produced. `shown`
    is the number of lost facts evaluated again after a solved example, `back` of those that were then produced."""

    original: Mapping[str, int]
    compressed: Mapping[str, int]
    moved: Mapping[tuple[str, str], int]
    written: tuple[bool, bool]
    shown: int
    back: int


@dataclass(frozen=True, slots=True)
class ProbeFigures:
    """Figures of one probe, paired by fact; `kept` has its interval over relations if there are enough."""

    probe: str
    protocol: str
    average: str
    counts: Counts
    accuracy_original: Estimate
    accuracy_compressed: Estimate
    difference: Estimate
    kept: Estimate
    kept_above_chance: Estimate
    macro_original: Estimate
    macro_compressed: Estimate
    macro_difference: Estimate
    answer_changed: float | None
    movement: KlFigures | None
    logp_change: Mapping[str, float] | None  # of the gold: p1 p5 p25 p50 p75 p95 p99
    mrr: tuple[float, float] | None  # mean reciprocal rank of the gold, before and after
    p_at_5: tuple[float, float] | None
    lost_still_in_top5: int | None  # lost facts whose gold is still among the five most likely answers
    chance: float | None
    majority: float | None
    drop_absolute: float | None  # the paper's figures: accuracy before - after, in points of 1 and relative to before
    drop_relative: float | None
    by_relation: tuple[Group, ...]
    by_subject: tuple[Group, ...]
    by_popularity: tuple[Group, ...]
    facts_read: int
    dropped: Mapping[str, int]
    limit: int | None
    seed: int
    certainty: Certainty = NOT_MEASURED
    confidence: Confidence | None = None
    noise_floor: NoiseFloor | None = None  # of the original
    runtime_noise_floor: NoiseFloor | None = None  # of the original in the compressed model's runtime
    knowing: GradeCounts | None = None
    # Of facts with several wordings: counts and knowledge kept by wording, numbered from 1, and the share of pairs of
    # wordings with the same answer, for the original and the compressed model.
    by_template: Mapping[int, tuple[Counts, Estimate]] = field(default_factory=dict)
    consistency: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True)
class ChangedFact:
    """Fact that was lost or gained, with both models' answers and grades. `with_example` says whether the compressed
    model produces it after one solved example; None if that was not tried."""

    probe: str
    relation: str
    subject: str
    prompt: str
    gold: str
    before: str
    after: str
    rank_before: int | None
    rank_after: int | None
    fact_id: str = ""
    grade_before: str | None = None
    grade_after: str | None = None
    with_example: bool | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Figure with its standard error, which is 0 if there are too few tokens to estimate one."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class GreedyDivergence:
    """Comparison of `n` greedy continuations of two models, each of `tokens` tokens: `same` is the number of identical
    ones, and `first` has the positions of the first different token in the others, from 1, ascending."""

    n: int
    tokens: int
    same: int
    first: tuple[int, ...]

    @property
    def middle(self) -> float | None:
        """Return the median position of the first different token; None if the median continuation is identical."""
        positions = [float(position) for position in self.first] + [math.inf] * self.same
        middle = median(positions) if positions else math.inf
        return middle if math.isfinite(middle) else None


@dataclass(frozen=True, slots=True)
class TextChange:
    """Change from the original to the compressed model over the same tokens."""

    ratio: Measurement  # of the perplexities, compressed / original
    log_ratio: Measurement
    difference: Measurement  # of the perplexities, compressed - original
    correlation: float | None  # of the two models' log-likelihoods; None if one does not vary
    kl: Measurement | None  # KL(original || compressed), nats, over the whole vocabulary; None if it was not measured
    kl_percentiles: Mapping[str, float] | None
    same_top: Measurement  # share of positions at which both models' most likely token is the same
    change: Measurement  # of the probability of the text's token, compressed - original
    change_rms: Measurement
    change_percentiles: Mapping[str, float]
    divergent: GreedyDivergence | None


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity: exp of the mean negative log-likelihood per token; and bits per byte of the text, which can be
    compared between vocabularies, None if the tokenizer does not tell the bytes."""

    value: Measurement
    tokens: int
    bits_per_byte: Measurement | None


@dataclass(frozen=True, slots=True)
class TextFigures:
    """Figures of one text."""

    text: str
    context: int  # tokens per chunk, by the original's tokenizer
    chunks: int
    divergence: str  # ``measured``, or why there is no KL: see `compressknow.evaluate.records`
    original: Perplexity
    compressed: Perplexity
    moved: TextChange | None  # None if the two models read the text as different tokens
