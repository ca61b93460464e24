"""Records of the differences between two checkpoints. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["added", "missing", "retyped", "reshaped", "tied", "untied", "packed"]


@dataclass(frozen=True, slots=True)
class DiffSums:
    """Sums over the elements of two tensors of equal shape, a and b; ratios are derived, never stored.

    For a = (3, 4) and b = (0, 4):

    >>> sums = DiffSums(numel=2, zeros_b=1, energy_a=25.0, energy_b=16.0, energy_change=9.0, largest=3.0)
    >>> sums.relative_error, sums.cosine, round(sums.snr_db, 2), (sums + sums).relative_error
    (0.6, 0.8, 4.44, 0.6)
    """

    numel: int = 0
    zeros_a: int = 0
    zeros_b: int = 0
    energy_a: float = 0.0  # the sum of squares
    energy_b: float = 0.0
    energy_change: float = 0.0  # that of b - a
    largest: float = 0.0  # the largest magnitude in b - a

    def __add__(self, other: DiffSums) -> DiffSums:
        return DiffSums(
            self.numel + other.numel,
            self.zeros_a + other.zeros_a,
            self.zeros_b + other.zeros_b,
            self.energy_a + other.energy_a,
            self.energy_b + other.energy_b,
            self.energy_change + other.energy_change,
            max(self.largest, other.largest),
        )

    @property
    def finite(self) -> bool:
        """Return whether neither tensor has NaN or infinity; otherwise there are no ratios."""
        return math.isfinite(self.energy_a + self.energy_b)

    @property
    def relative_error(self) -> float | None:
        """Return ||b - a|| / ||a||, by the Frobenius norm; None if a is all zero and b is not."""
        if not self.finite or (self.energy_change and not self.energy_a):
            return None
        return math.sqrt(self.energy_change / self.energy_a) if self.energy_change else 0.0

    @property
    def cosine(self) -> float | None:
        """Return the cosine of the angle between a and b; None if one of them is all zero."""
        if not self.finite or not self.energy_a or not self.energy_b:
            return None
        if not self.energy_change:
            # Rounded square roots could give slightly less.
            return 1.0
        product = (self.energy_a + self.energy_b - self.energy_change) / 2
        return max(-1.0, min(1.0, product / math.sqrt(self.energy_a) / math.sqrt(self.energy_b)))

    @property
    def snr_db(self) -> float | None:
        """Return 10 log10(||a||² / ||b - a||²), in decibels; None if nothing changed, or if a is all zero."""
        if not self.finite or not self.energy_change or not self.energy_a:
            return None
        return 10 * math.log10(self.energy_a / self.energy_change)

    @property
    def largest_change(self) -> float | None:
        """Return the largest |b - a|."""
        return self.largest if self.finite else None


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """Tensor that both checkpoints have in the same shape; int8 and int4 weights are compared by their float values."""

    name: str  # of the parameter in the module tree, or as stored if the tree has none
    group: str  # ``attention``, ``feed-forward``, ``final``, ``other``, ``vision`` or ``not-linear``
    stack: str | None  # for encoder-decoder models; this and the next two only for Linear weights in blocks
    layer: int | None  # number of the block
    module: str | None  # name inside the block: ``self_attn.q_proj``
    shape: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    bytes_a: int  # on disk, including scales
    bytes_b: int
    same_bytes: bool  # stored bit for bit the same
    sums: DiffSums

    @property
    def differs(self) -> bool:
        """Return whether its values differ; the same ones may be stored in another dtype."""
        return not self.same_bytes and bool(self.sums.energy_change)


@dataclass(frozen=True, slots=True)
class StructureChange:
    """Tensor that the two checkpoints store differently; `a` and `b` say how, "-" if not at all."""

    name: str
    kind: Kind
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """Setting that differs, by its dotted name; values are JSON, None for a missing setting."""

    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class CheckpointDiff:
    """Differences between two checkpoints of one architecture, from a to b."""

    architecture: str
    config: tuple[ConfigChange, ...]
    structure: tuple[StructureChange, ...]
    tensors: tuple[TensorDiff, ...]

    @property
    def total(self) -> DiffSums:
        return sum_tensors(self.tensors)

    @property
    def same_weights(self) -> bool:
        """Return whether both checkpoints store every tensor in one dtype with the same bits."""
        return not self.structure and all(tensor.same_bytes for tensor in self.tensors)


def sum_tensors(tensors: Iterable[TensorDiff]) -> DiffSums:
    """Return the sums over all these tensors together."""
    return sum((tensor.sums for tensor in tensors), DiffSums())
