"""The typed records of a search for the smallest checkpoint that keeps a share of the knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compressknow.format import count, estimate, plain, share, size
from compressknow.notebook import Shown, Summary
from compressknow.report.records import ModelFacts
from compressknow.stats.records import Estimate

# What may be made small, and how people call it.
SIZES = {
    "bytes": "size on disk",
    "sparse-bytes": "sparse size",
    "nonzero": "weights left",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe that was evaluated.

    Attributes
    ----------
    kind : ``paper`` for one of the paper's setups, ``search`` for one that the search chose, ``layers`` for one that
        shows how much some layers bear.
    kept : on the facts of the search that it was evaluated on; `facts` is their number. `held_out` on those kept from
        the search, where it was evaluated on these.
    sizes : ``sparse-bytes``, ``bytes`` and ``nonzero``.
    """

    setup: str
    kind: str
    recipe: Mapping[str, Any]
    kept: Estimate
    facts: int
    sizes: Mapping[str, int]
    held_out: Estimate | None = None
    harm: float | None = None  # mean KL divergence from the original, nats


@dataclass(frozen=True, slots=True, repr=False)
class Search(Shown):
    """A whole search.

    Attributes
    ----------
    keep : share of knowledge that must be kept; `minimize` one of `SIZES`.
    winner : the cheapest that keeps it on the held-out facts, or None; `closest` what came nearest then.
    naive : the cheapest of everything pruned by one amount that keeps as much on the facts of the search, or None.
    searched, held_out : numbers of facts; `known_searched`, `known_held_out` those that the original answers right.
    first : how many of those to search with are evaluated first; 0 where all are at once.
    level : of the intervals of the held-out facts, adjusted for how many recipes were tried on these.
    sizes : of the original.
    """

    original: ModelFacts
    keep: float
    minimize: str
    probes: tuple[str, ...]
    searched: int
    first: int
    held_out: int
    known_searched: int
    known_held_out: int
    level: float
    sizes: Mapping[str, int]
    tried: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]
    winner: Trial | None
    closest: Trial | None
    naive: Trial | None
    seed: int
    versions: Mapping[str, str]
    command: str | None

    def _summary(self) -> Summary:
        return Summary(
            f"Search: the smallest {plain(self.original.name, 60)} that keeps {share(self.keep)}",
            self._outcome(),
            ("Held-out facts decide", f"Kept of {count(self.known_held_out)} known", SIZES[self.minimize].capitalize()),
            tuple(self._row(trial) for trial in self.confirmed),
        )

    def _outcome(self) -> str:
        tried = f"{count(len(self.tried))} recipes tried"
        if self.winner is None:
            return f"{tried}; none keeps that much for sure."
        sizes = [self._size(of.sizes[self.minimize]) for of in (self, self.winner)]
        return f"{tried}; {plain(self.winner.setup, 120)} wins: {sizes[1]}, the original {sizes[0]}."

    def _row(self, trial: Trial) -> tuple[str, ...]:
        kept = trial.held_out or Estimate(None)
        written = estimate(kept.value, kept.low, kept.high)
        return trial.setup, written, self._size(trial.sizes[self.minimize])

    def _size(self, amount: int) -> str:
        return count(amount) if self.minimize == "nonzero" else size(amount)
