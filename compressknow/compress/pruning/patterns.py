"""N:M sparsity: of each M neighbouring input channels, N weights of an output stay (Mishra et al. 2021, arXiv
2104.08378; 2:4 is what NVIDIA's sparse tensor cores read)."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from compressknow.compress.parameters import parameter
from compressknow.compress.pruning import PruningMethod, Weights
from compressknow.errors import UsageError

# As far as an amount may be off, so that 0.6667 will do for 1:3.
CLOSE = 1e-4


class Pattern(NamedTuple):
    """Of each `of` neighbouring weights `keep` stay."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: Any) -> Pattern | None:
        """``2:4`` as a pattern; None where it is none.

        >>> Pattern.parse("2:4"), Pattern.parse("4:2")
        (Pattern(keep=2, of=4), None)
        """
        found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text) if isinstance(text, str) else None
        pattern = cls(*map(int, found.groups())) if found else None
        return pattern if pattern and pattern.keep < pattern.of else None

    @property
    def pruned(self) -> int:
        """How many of each group fall."""
        return self.of - self.keep


class Patterned(PruningMethod):
    """A method that prunes by N:M where its `pattern` says so: in each group by itself."""

    pattern: str | None = parameter(
        default=None,
        kind=str,
        help="Keep N of each M neighbouring inputs, as in 2:4.",
        must="N:M with N below M, such as 2:4",
        fits=lambda text: Pattern.parse(text) is not None,
    )

    @property
    def label(self) -> str:
        """Its name, and the pattern as it is written."""
        further = [f"{name} {value}" for name, value in self.changed().items() if name != "pattern"]
        return " ".join([self.name, *further, *([self.pattern] if self.pattern else [])])

    @property
    def groups(self) -> Pattern | None:
        """The pattern, if there is one."""
        return Pattern.parse(self.pattern)

    @property
    def over_scope(self) -> bool:
        """Not with a pattern."""
        return self.pattern is None and super().over_scope

    def count(self, weights: Weights, amount: float) -> int:
        """With a pattern, that of its groups."""
        if self.groups is None:
            return super().count(weights, amount)
        return weights.tensor.numel // self.groups.of * self.groups.pruned

    def check(self, amount: float) -> None:
        """Raise UsageError where the amount is not the pattern's."""
        if self.groups is None:
            return
        right = self.groups.pruned / self.groups.of
        if abs(amount - right) > CLOSE:
            raise UsageError(
                f"The pattern {self.pattern} prunes {right:.4g} of the weights, not {amount:.4g}.",
                hint=f"Pass --prune {right:.4g}, or leave out the pattern.",
            )

    def misfit(self, weights: Weights) -> str | None:
        """Where the inputs make no whole groups."""
        inputs = weights.matrices[1 + weights.axis(1)]
        if self.groups is None or inputs % self.groups.of == 0:
            return None
        return f"Its {inputs:,} input channels are no multiple of {self.groups.of}."
