"""Records of a comparison of two checkpoints: filled from files and answers, rendered to every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from compressknow.base.format import count, number, plain, size
from compressknow.base.notebook import Shown, Summary
from compressknow.comparison.diff import CheckpointDiff, group_tensors, sum_tensors
from compressknow.pages.records import Card, Checkpoint

KnownBy = Literal["only A", "only B", "neither"]


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Fact that the two models answer differently, with the answers that each holds most likely, best first."""

    probe: str
    fact_id: str
    relation: str
    subject: str
    prompt: str
    gold: str
    known_by: KnownBy
    top_a: tuple[str, ...]
    top_b: tuple[str, ...]
    rank_a: int | None
    rank_b: int | None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Answers of the two models to the same facts.

    Attributes
    ----------
    b_against_a : A as the original: what of A's knowledge B keeps, and KL(A || B).
    a_against_b : the other way round.
    answers : facts whose top answer differs; empty where the text of facts is left out.
    known : what counts as known; see `compressknow.pages.records.Card`.
    """

    b_against_a: Card
    a_against_b: Card
    answers: tuple[AnswerPair, ...]
    warnings: tuple[str, ...]
    known: str = "recognized"


@dataclass(frozen=True, slots=True, repr=False)
class CheckpointComparison(Shown):
    """Comparison of two checkpoints, b against a.

    Attributes
    ----------
    identical : all files that decide what the models answer are the same to the byte; then there is no `difference`.
    files : other files than weights and config that differ, such as those of the tokenizer.
    difference : None too where the weights cannot be read; a warning says so.
    behaviour : None where nothing was evaluated.
    """

    verdict: str
    a: Checkpoint
    b: Checkpoint
    identical: bool
    files: tuple[str, ...]
    difference: CheckpointDiff | None
    behaviour: Behaviour | None
    warnings: tuple[str, ...]
    show_facts: bool
    versions: Mapping[str, str]
    command: str | None

    def _summary(self) -> Summary:
        names = [f"{plain(side.name, 40)} ({size(side.bytes)})" for side in (self.a, self.b)]
        groups = group_tensors(self.difference.tensors, lambda tensor: tensor.group) if self.difference else {}
        sums = {group: sum_tensors(tensors) for group, tensors in groups.items()}
        return Summary(
            f"CheckpointComparison: {names[1]} against {names[0]}",
            self.verdict,
            ("Group", "Weights", "Zeros before", "Zeros after", "Relative error"),
            tuple(
                (group, count(s.numel), count(s.zeros_a), count(s.zeros_b), number(s.relative_error))
                for group, s in sums.items()
            ),
        )


def names_of(a: Checkpoint, b: Checkpoint) -> tuple[str, str]:
    """Return what sentences call the two: their names where these differ."""
    names = plain(a.name, 60), plain(b.name, 60)
    return names if names[0] != names[1] else ("A", "B")
