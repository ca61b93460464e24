"""Pruning methods: which weights of a step go, and those built in.

A method that looks at weights alone decides first, over all tensors of its step (`PruningMethod.choose`), in passes
that read the weights. The result is small: a mask per tensor, expanded block by block while the weights are written. A
method that looks at activations (`Calibrated`) prunes a whole matrix at a time, once its inputs are known.
"""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from compressknow.base.errors import CheckpointError, UsageError
from compressknow.base.packages import Registry
from compressknow.compress.parameters import Parametric, parameter
from compressknow.model.tensors import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from compressknow.compress.blocks import Block, Reader
    from compressknow.compress.calibrate.gathering import InputStatistics
    from compressknow.compress.pruning.masks import Keys

    BoolArray = npt.NDArray[np.bool_]


Needs = Literal["nothing", "magnitudes", "norms", "products"]


@dataclass(frozen=True)
class Weights:
    """Stored tensor to prune; `transposed` says that its last axis is the output (GPT-2's Conv1D)."""

    tensor: StoredTensor
    transposed: bool = False

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Number of stacked matrices (fused experts have many), and rows and columns of each."""
        shape = self.tensor.shape
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def axis(self, dim: int) -> int:
        """Return the axis of the stored matrices, 0 or 1, that counts output (`dim` 0) or input channels (1)."""
        return dim ^ self.transposed


class Pruned(NamedTuple):
    """Mask and new values of a block, from a method that also changes weights that stay.

    Attributes
    ----------
    mask : the pruned weights, bool [rows, columns].
    values : of all weights of the block [rows, columns], in its dtype; those of the pruned ones do not matter.
    """

    mask: BoolArray
    values: torch.Tensor


# The pruned weights of a block, bool [rows, columns]; called for each block of a tensor, in order.
BlockMask = Callable[["Block"], "BoolArray | Pruned"]


class Mask(Protocol):
    """Pruned weights of one tensor."""

    def start(self) -> BlockMask:
        """Begin with the first block of the tensor; this may happen several times."""


@dataclass(frozen=True)
class EachBlock:
    """Mask whose blocks do not depend on each other: `pruned` gives that of any block."""

    pruned: BlockMask

    def start(self) -> BlockMask:
        return self.pruned


class PruningMethod(Parametric, abc.ABC):
    """Way to choose the weights to zero; its parameters are its fields (`compressknow.compress.parameters`).

    Attributes
    ----------
    name : what a recipe calls it, and its entry point.
    help : a line of `convert --help`.
    needs : what it looks at before a weight is written: ``nothing``, ``magnitudes`` (a pass over the weights), or, of
        a Linear's inputs X [tokens, in] on the calibration text, ``norms`` (of its columns) or ``products`` (X^T X).
    """

    needs: ClassVar[Needs] = "nothing"

    @property
    def over_scope(self) -> bool:
        """True if one choice over all tensors of the step decides how many weights fall in each."""
        return False

    @property
    def label(self) -> str:
        """Name of the method in setups, in the paper's words (`L1-structured`)."""
        return " ".join([self.name, *(f"{name} {value}" for name, value in self.changed().items())])

    def count(self, weights: Weights, amount: float) -> int:
        """Count the weights of a tensor that fall, from its shape alone."""
        return round(amount * weights.tensor.numel)

    def count_all(self, weights: Sequence[Weights], amount: float) -> int | list[int]:
        """Count the weights that fall: over all tensors of the step together, or in each."""
        if self.over_scope:
            return round(amount * sum(each.tensor.numel for each in weights))
        return [self.count(each, amount) for each in weights]

    def check(self, amount: float) -> None:
        """Raise UsageError if the method cannot prune this amount; most can prune any."""

    def misfit(self, weights: Weights) -> str | None:  # noqa: ARG002
        """Say in a sentence why a tensor of this shape cannot be pruned so; None if it can."""
        return None

    @abc.abstractmethod
    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """Choose a mask for each tensor. They are F32, F16 or BF16, in the order in which ties are broken.

        The masks of one step zero exactly as many weights as `count_pruned` says, whatever the number of threads.
        `reader` gives the blocks of a tensor, and its pool maps a function over the tensors.
        """


class Calibrated(PruningMethod):
    """Method that looks at activations; `needs` is ``norms`` or ``products``."""

    needs: ClassVar[Needs] = "norms"

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """Raise NotImplementedError: weights alone do not decide it. See `prune`."""
        raise NotImplementedError(f"{self.name} looks at activations.")

    @abc.abstractmethod
    def prune(
        self, weight: torch.Tensor, inputs: InputStatistics, amount: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prune one matrix, float32 [out, in] however it is stored, and leave it as it is.

        Return the pruned weights, bool [out, in], exactly as many as `count` says; and, if weights that stay change,
        new values of all, float32 [out, in] (those of pruned ones do not matter). The result must not depend on the
        number of threads; ties go in the order of the index.
        """


METHODS: Registry[PruningMethod] = Registry(
    "compressknow.pruning",
    "pruning method",
    PruningMethod,  # type: ignore[type-abstract]
    {
        "l1-unstructured": "compressknow.compress.pruning:L1Unstructured",
        "ln-structured": "compressknow.compress.pruning:LnStructured",
        "random-unstructured": "compressknow.compress.pruning:RandomUnstructured",
        "random-structured": "compressknow.compress.pruning:RandomStructured",
        "wanda": "compressknow.compress.pruning:Wanda",
        "sparsegpt": "compressknow.compress.pruning:SparseGPT",
    },
)


# By so much an amount may differ from its pattern's: 0.6667 will do for 1:3.
TOLERANCE = 1e-4


class Pattern(NamedTuple):
    """N:M sparsity: `keep` of each `of` neighbouring weights stay."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: Any) -> Pattern | None:
        """Parse ``2:4`` as a pattern; None if it is none.

        >>> Pattern.parse("2:4"), Pattern.parse("4:2")
        (Pattern(keep=2, of=4), None)
        """
        found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text) if isinstance(text, str) else None
        pattern = cls(*map(int, found.groups())) if found else None
        return pattern if pattern and pattern.keep < pattern.of else None

    @property
    def pruned(self) -> int:
        return self.of - self.keep


class Patterned(PruningMethod):
    """Method that can prune by N:M, each group by itself, if its `pattern` is set."""

    pattern: str | None = parameter(
        default=None,
        kind=str,
        help="Keep N of each M neighbouring inputs, as in 2:4.",
        must="N:M with N below M, such as 2:4",
        fits=lambda text: Pattern.parse(text) is not None,
    )

    @property
    def label(self) -> str:
        """See `PruningMethod.label`; the pattern comes last, without its name."""
        further = [f"{name} {value}" for name, value in self.changed().items() if name != "pattern"]
        return " ".join([self.name, *further, *([self.pattern] if self.pattern else [])])

    @property
    def groups(self) -> Pattern | None:
        return Pattern.parse(self.pattern)

    @property
    def over_scope(self) -> bool:
        return self.pattern is None and super().over_scope

    def count(self, weights: Weights, amount: float) -> int:
        """See `PruningMethod.count`; a pattern decides it by its groups."""
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
        """See `PruningMethod.misfit`; the inputs must make whole groups."""
        inputs = weights.matrices[1 + weights.axis(1)]
        if self.groups is None or inputs % self.groups.of == 0:
            return None
        return f"Its {inputs:,} input channels are no multiple of {self.groups.of}."


FLOAT_ONE_BITS = 0x3F800000


class Unstructured(PruningMethod):
    """Weights chosen one by one, over all of the step together or in each tensor by itself."""

    needs = "magnitudes"
    per_layer: bool = parameter(default=False, help="Prune each tensor by AMOUNT, not all together.")

    @property
    def over_scope(self) -> bool:
        return not self.per_layer


class L1Unstructured(Patterned, Unstructured):
    """Smallest magnitudes: one threshold over all, ties in the order of tensors, then of index; or by a pattern."""

    name = "l1-unstructured"
    help = "the smallest weights of all"

    @property
    def label(self) -> str:
        return f"L1-unstructured {self.pattern or ''}".strip()

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        from compressknow.compress.pruning.masks import mask_groups, smallest_magnitudes

        if (groups := self.groups) is not None:
            return reader.pool.map(lambda each: mask_groups(reader, each, groups.of, groups.pruned), weights)
        return smallest_magnitudes(reader, weights, self.count_all(weights, amount))


class RandomUnstructured(Unstructured):
    """Random weights, drawn for each tensor from the seed and its name alone."""

    name = "random-unstructured"
    help = "any weights"
    seed: int = parameter(
        default=0, help="Seed of the random methods.", must="a whole number of at least 0", fits=lambda seed: seed >= 0
    )

    @property
    def label(self) -> str:
        return self.name

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        import torch

        from compressknow.compress.pruning.masks import smallest

        tensors = [each.tensor for each in weights]
        makers = [partial(_draw_keys, self.seed, tensor.name) for tensor in tensors]
        return smallest(reader, tensors, makers, torch.float32, self.count_all(weights, amount))


def _draw_keys(seed: int, name: str) -> Callable[[Block], Keys]:
    """Return what gives the keys of each block of a tensor, in order."""
    import torch

    from compressknow.compress.pruning.masks import make_generator

    drawing = make_generator(seed, name)

    def keys(block: Block) -> Keys:
        # torch prunes where its uniform numbers are largest. It draws them one after the other, so that blocks
        # get the numbers that the whole tensor would.
        drawn = torch.rand(block.values.numel(), generator=drawing).view(torch.int32).numpy()
        return (FLOAT_ONE_BITS - drawn).reshape(tuple(block.values.shape))

    return keys


class Structured(PruningMethod):
    """Output channels (`dim` 0) or input channels (1) of the lowest scores, however a matrix is stored."""

    dim: int = parameter(
        default=0,
        help="Channels to prune: 0 output, 1 input.",
        must="the dimension 0 (output channels) or 1 (input channels)",
        fits=lambda dim: dim in (0, 1),
    )

    def count(self, weights: Weights, amount: float) -> int:
        number, rows, columns = weights.matrices
        channels, length = (rows, columns) if weights.axis(self.dim) == 0 else (columns, rows)
        return number * round(amount * channels) * length

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        from compressknow.compress.pruning.masks import mask_channels

        def mask(each: Weights) -> Mask:
            return mask_channels(self.scores(reader, each), amount, each.axis(self.dim), each.matrices[1])

        return reader.pool.map(mask, weights)

    @abc.abstractmethod
    def scores(self, reader: Reader, weights: Weights) -> torch.Tensor:
        """Score each channel [matrices, channels]; the lowest go, ties in their order."""


class LnStructured(Structured):
    """Channels of the smallest norm."""

    name = "ln-structured"
    help = "whole channels of the smallest norm"
    needs = "magnitudes"
    norm: float = parameter(
        default=1,
        kind=float,
        help="Order of the norm of ln-structured.",
        must="a number above 0 (inf for the largest magnitude)",
        fits=lambda norm: norm > 0,
    )

    @property
    def label(self) -> str:
        """Name in the paper, such as `L1-structured`."""
        return f"L{self.norm:g}-structured" + (f" dim {self.dim}" if self.dim else "")

    def scores(self, reader: Reader, weights: Weights) -> torch.Tensor:
        """Return norms to the power of their order, float64, which rank as the norms do."""
        import torch

        from compressknow.compress.blocks import check_finite, make_magnitude_keys

        tensor, axis = weights.tensor, weights.axis(self.dim)
        number, rows, columns = weights.matrices
        total = torch.zeros(number * rows if axis == 0 else number, columns if axis else 1, dtype=torch.float64)
        for block in reader.blocks(tensor):
            check_finite(int(make_magnitude_keys(block.values).max(initial=0)), block.values.dtype, tensor)
            powers = block.values.double().abs_()
            if self.norm not in (1, math.inf):
                powers.pow_(self.norm)
            if axis == 0:
                total[block.rows, 0] = powers.amax(1) if math.isinf(self.norm) else powers.sum(1)
            else:
                matrix = torch.arange(block.rows.start, block.rows.stop) // rows
                reduce = "amax" if math.isinf(self.norm) else "sum"
                total.scatter_reduce_(0, matrix[:, None].expand_as(powers), powers, reduce)
        if not bool(torch.isfinite(total).all()):
            raise CheckpointError(f"The L{self.norm:g} norm of {tensor.name} overflows.", hint="Choose a lower norm.")
        return total.view(number, -1)


class RandomStructured(Structured):
    """Random channels, drawn for each tensor from the seed and its name alone."""

    name = "random-structured"
    help = "any channels"
    seed: int = parameter(
        default=0, help="Seed of the random methods.", must="a whole number of at least 0", fits=lambda seed: seed >= 0
    )

    @property
    def label(self) -> str:
        return self.name + (f" dim {self.dim}" if self.dim else "")

    def scores(self, reader: Reader, weights: Weights) -> torch.Tensor:  # noqa: ARG002
        import torch

        from compressknow.compress.pruning.masks import make_generator

        number, rows, columns = weights.matrices
        size = rows if weights.axis(self.dim) == 0 else columns
        drawn = torch.rand(number * size, generator=make_generator(self.seed, weights.tensor.name))
        return drawn.view(number, size)


class Wanda(Patterned, Calibrated):
    """Wanda (Sun et al. 2023, arXiv 2306.11695, equation 1): scores |W_ij| * ||X_j||_2, compared within a row of W."""

    name = "wanda"
    help = "small weights on small inputs, per output"
    needs: ClassVar[Needs] = "norms"

    def count(self, weights: Weights, amount: float) -> int:
        if self.groups is not None:
            return super().count(weights, amount)
        inputs = weights.matrices[1 + weights.axis(1)]
        return weights.tensor.numel // inputs * round(amount * inputs)

    def prune(self, weight: torch.Tensor, inputs: InputStatistics, amount: float) -> tuple[torch.Tensor, None]:
        import torch

        from compressknow.compress.pruning.masks import make_score_keys, mask_smallest_of_rows

        keys = make_score_keys(weight.abs() * inputs.squares.sqrt(), weight == 0)
        if self.groups is None:
            return torch.from_numpy(mask_smallest_of_rows(keys, round(amount * keys.shape[1]))), None
        pruned = mask_smallest_of_rows(keys.reshape(-1, self.groups.of), self.groups.pruned)
        return torch.from_numpy(pruned).view(weight.shape), None


class SparseGPT(Patterned, Calibrated):
    """SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1).

    The score of a weight is W_ij^2 / U_jj^2, with U the upper Cholesky factor of the inverse of X^T X: the squared
    error that is left when the columns after it have made up for its loss (section 3.2). It is compared over all rows
    in blocks of 128 columns, with a pattern in each group of an output (section 3.4).
    """

    name = "sparsegpt"
    help = "weights that others make up for"
    needs: ClassVar[Needs] = "products"

    def count(self, weights: Weights, amount: float) -> int:
        if self.groups is not None:
            return super().count(weights, amount)
        number, rows, columns = weights.matrices
        return number * round(amount * rows * columns)

    def prune(
        self, weight: torch.Tensor, inputs: InputStatistics, amount: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Calibrated.prune`. A weight that is zero stays zero, whether it counts as pruned or not.

        Raises CompressknowError naming the layer if X^T X cannot be inverted.
        """
        import torch

        from compressknow.compress.calibrate.compensation import BLOCK, FINE, Level, compensate, get_inverse
        from compressknow.compress.pruning.masks import make_score_keys, mask_smallest_of_rows

        factor, _ = get_inverse(inputs)
        columns = weight.T.contiguous().clone()
        values, zero, rows = columns.clone(), columns == 0, len(weight)
        pruned = torch.zeros_like(zero)
        divisors = factor.diagonal().square()

        def choose(first: int, block: torch.Tensor) -> None:
            """Choose what goes of a block of columns once all errors before it have reached it: of each group, or so
            many that the amount is right up to here; ties go in the order of rows, then of columns."""
            here = slice(first, first + len(block))
            scores = block.square().div_(divisors[here, None])
            keys = make_score_keys(scores.T.contiguous(), zero[here].T)
            if self.groups:
                chosen = mask_smallest_of_rows(keys, self.groups.pruned)
            else:
                count = round(amount * rows * here.stop) - round(amount * rows * first)
                chosen = mask_smallest_of_rows(keys.reshape(1, -1), count).reshape(keys.shape)
            pruned[here] = torch.from_numpy(chosen).T

        def settle(column: int, current: torch.Tensor) -> torch.Tensor:
            return values[column].copy_(current).masked_fill_(pruned[column] | zero[column], 0)

        levels = [Level(BLOCK, choose), Level(FINE)]
        if self.groups:
            fine = self.groups.of * max(1, FINE // self.groups.of)
            levels = [Level(fine * max(1, BLOCK // fine)), Level(fine), Level(self.groups.of, choose)]
        compensate(columns, factor, levels, settle)
        return pruned.T.contiguous(), values.T.contiguous()
