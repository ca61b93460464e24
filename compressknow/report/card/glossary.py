"""What the figures of a report mean, for readers who meet them for the first time."""

from __future__ import annotations

from compressknow.report.card.grades import LOWEST, SCALE

GLOSSARY = (
    ("Knowledge kept", "of the facts that the original knew, the share that the compressed model still knows."),
    ("Kept above chance", "the same, counting only what is known beyond guessing among the candidates."),
    ("Lost, gained, flips", "facts that only the original knows, that only the compressed model knows, and both."),
    (
        "Interval",
        "the range in brackets: with other facts of the same kind, 95 of 100 such ranges hold the true figure.",
    ),
    (
        "p",
        "how often chance alone splits lost and gained facts as unevenly; a small p means that the net change is real.",
    ),
    ("Top answer changed", "facts to which the answer differs, from one wrong answer to another included."),
    ("Among the top 5", "a right answer that is still close to the top is hidden, not erased."),
    ("Mean reciprocal rank", "1 where the right answer always comes first, 1/2 where it comes second, and so on."),
    ("Movement (KL)", "how far the probabilities of the next token moved, in nats; 0 is no change at all."),
    ("Calibration error, Brier score", "how far a model's confidence is from being right; 0 is perfect."),
    ("Always the commonest answer", "what a model scores that knows nothing and always says the same."),
    ("The paper's drop", "accuracy before minus accuracy after, in points, and relative to accuracy before."),
)

_SCALE = ", ".join(f"{grade} from {least} % kept" if grade == "A+" else f"{grade} {least} %" for grade, least in SCALE)
LEGEND = f"{_SCALE}, {LOWEST} less. Where the interval reaches over several grades, they are named beside the letter."
SHORT_LEGEND = f"{_SCALE}, {LOWEST} less. A question mark says that the interval reaches over several grades."
HOLM = (
    "p is of the exact McNemar test, adjusted over the relations of a table (Holm): below 0.05, chance hardly explains "
    "that a relation lost more than it gained, or less."
)
