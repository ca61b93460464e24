"""Pruning methods, which choose the weights that a step zeroes.

A method that looks only at weights chooses first, over all tensors of its step (`PruningMethod.choose`), in passes that
read the weights. The result is small: a mask per tensor, expanded block by block while the weights are written. A
method that looks at activations (`Calibrated`) prunes one whole matrix at a time, once its inputs are known.
"""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from compressknow.base.errors import UsageError
from compressknow.base.packages import Registry
from compressknow.compress.parameters import Parametric, parameter
from compressknow.model.tensors import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from compressknow.compress.blocks import Block, Reader
    from compressknow.compress.calibrate.gathering import InputStatistics

    BoolArray = npt.NDArray[np.bool_]


Needs = Literal["nothing", "magnitudes", "norms", "products"]


@dataclass(frozen=True)
class Weights:
    """Stored tensor to prune; `transposed` says that its last axis is the output (GPT-2's Conv1D)."""

    tensor: StoredTensor
    transposed: bool = False

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Number of stacked matrices (fused experts have many), and the rows and columns of each."""
        shape = self.tensor.shape
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def axis(self, dim: int) -> int:
        """Return the axis of the stored matrices, 0 or 1, of the output (`dim` 0) or input channels (1)."""
        return dim ^ self.transposed


class Pruned(NamedTuple):
    """Mask and new values of a block, from a method that also changes the remaining weights.

    Attributes
    ----------
    mask : the pruned weights, bool [rows, columns].
    values : new values of the block [rows, columns], in its dtype; pruned weights may have any.
    """

    mask: BoolArray
    values: torch.Tensor


# The pruned weights of a block, bool [rows, columns]; called for each block of a tensor, in order.
BlockMask = Callable[["Block"], "BoolArray | Pruned"]


class Mask(Protocol):
    """Pruned weights of one tensor."""

    def start(self) -> BlockMask:
        """Start at the first block of the tensor; this may happen several times."""


@dataclass(frozen=True)
class EachBlock:
    """Mask whose blocks do not depend on each other: `pruned` returns the mask of any block."""

    pruned: BlockMask

    def start(self) -> BlockMask:
        return self.pruned


class PruningMethod(Parametric, abc.ABC):
    """Way to choose the weights to zero; its parameters are its fields (`compressknow.compress.parameters`).

    Attributes
    ----------
    name : its name in recipes, and its entry point.
    help : its line of `convert --help`.
    needs : what it reads before a weight is written: ``nothing``, ``magnitudes`` (a pass over the weights) or, from the
        inputs X [tokens, in] of a Linear on the calibration text, ``norms`` (of columns) or ``products`` (X^T X).
    """

    needs: ClassVar[Needs] = "nothing"

    @property
    def over_scope(self) -> bool:
        """True if the step's tensors are pruned together, so that the amount may differ between them."""
        return False

    @property
    def label(self) -> str:
        """Name of the method in setups, in the paper's words (`L1-structured`)."""
        return " ".join([self.name, *self.describe_changed()])

    def count(self, weights: Weights, amount: float) -> int:
        """Count the weights of a tensor that are pruned, from its shape alone."""
        return round(amount * weights.tensor.numel)

    def count_all(self, weights: Sequence[Weights], amount: float) -> int | list[int]:
        """Count the weights that are pruned, over all tensors of the step or in each."""
        if self.over_scope:
            return round(amount * sum(each.tensor.numel for each in weights))
        return [self.count(each, amount) for each in weights]

    def check(self, amount: float) -> None:
        """Raise UsageError if the method cannot prune this amount; most can prune any."""

    def misfit(self, weights: Weights) -> str | None:  # noqa: ARG002
        """Return a sentence on why a tensor of this shape cannot be pruned this way; None if it can."""
        return None

    @abc.abstractmethod
    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """Choose a mask for each tensor. Tensors are F32, F16 or BF16, in the order in which ties are broken.

        The masks of one step zero exactly as many weights as `count_all` returns, whatever the number of threads.
        `reader` yields the blocks of a tensor, and its pool maps a function over the tensors.
        """


class Calibrated(PruningMethod):
    """Method that looks at activations; `needs` is ``norms`` or ``products``."""

    needs: ClassVar[Needs] = "norms"

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """Raise NotImplementedError: the choice depends on activations. See `prune`."""
        raise NotImplementedError(f"{self.name} looks at activations.")

    @abc.abstractmethod
    def prune(
        self, weight: torch.Tensor, inputs: InputStatistics, amount: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prune one matrix, float32 [out, in] however it is stored, without changing it in place.

        Return the pruned weights, bool [out, in], exactly as many as `count` returns; and, if the remaining weights
        change, new values of all, float32 [out, in] (pruned ones may have any). The result must not depend on the
        number of threads; ties are pruned in the order of the index.
        """


METHODS: Registry[PruningMethod] = Registry(
    "compressknow.pruning",
    "pruning method",
    PruningMethod,  # type: ignore[type-abstract]
    {
        "l1-unstructured": "compressknow.compress.pruning.builtin:L1Unstructured",
        "ln-structured": "compressknow.compress.pruning.builtin:LnStructured",
        "random-unstructured": "compressknow.compress.pruning.builtin:RandomUnstructured",
        "random-structured": "compressknow.compress.pruning.builtin:RandomStructured",
        "wanda": "compressknow.compress.pruning.builtin:Wanda",
        "sparsegpt": "compressknow.compress.pruning.builtin:SparseGPT",
    },
)


# How far an amount may be from its pattern's: 0.6667 is accepted for 1:3.
TOLERANCE = 1e-4


class Pattern(NamedTuple):
    """N:M sparsity: `pruned` of each `of` neighbouring weights are zeroed."""

    pruned: int
    of: int


def parse_pattern(text: Any) -> Pattern | None:
    """Parse a pattern such as ``2:4``; None if it is not one.

    >>> parse_pattern("1:4"), parse_pattern("4:2")
    (Pattern(pruned=3, of=4), None)
    """
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text) if isinstance(text, str) else None
    keep, of = map(int, match.groups()) if match else (0, 0)
    return Pattern(of - keep, of) if keep < of else None


class Patterned(PruningMethod):
    """Method that can prune by N:M, each group separately, if its `pattern` is set."""

    pattern: str | None = parameter(
        default=None,
        kind=str,
        help="Keep N of each M neighbouring inputs, as in 2:4.",
        must="N:M with N below M, such as 2:4",
        fits=lambda text: parse_pattern(text) is not None,
    )

    @property
    def label(self) -> str:
        """See `PruningMethod.label`; the pattern comes last, without its name."""
        others = [f"{name} {value}" for name, value in self.changed().items() if name != "pattern"]
        return " ".join([self.name, *others, self.pattern or ""]).strip()

    @property
    def groups(self) -> Pattern | None:
        return parse_pattern(self.pattern)

    @property
    def over_scope(self) -> bool:
        return self.pattern is None and super().over_scope

    def count(self, weights: Weights, amount: float) -> int:
        """See `PruningMethod.count`; with a pattern, its groups decide the count."""
        if self.groups is None:
            return super().count(weights, amount)
        return weights.tensor.numel // self.groups.of * self.groups.pruned

    def check(self, amount: float) -> None:
        """Raise UsageError if the amount is not the pattern's."""
        if self.groups is None:
            return
        right = self.groups.pruned / self.groups.of
        if abs(amount - right) > TOLERANCE:
            raise UsageError(
                f"The pattern {self.pattern} prunes {right:.4g} of the weights, not {amount:.4g}.",
                hint=f"Pass --prune {right:.4g}, or leave out the pattern.",
            )

    def misfit(self, weights: Weights) -> str | None:
        """See `PruningMethod.misfit`; the inputs must fill whole groups."""
        inputs = weights.matrices[1 + weights.axis(1)]
        if self.groups is None or inputs % self.groups.of == 0:
            return None
        return f"Its {inputs:,} input channels are not a multiple of {self.groups.of}."
