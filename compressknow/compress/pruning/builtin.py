"""Built-in methods: single weights or whole channels, the smallest or random ones; and Wanda and SparseGPT, which use
the inputs of a layer."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from compressknow.base.errors import CheckpointError
from compressknow.compress.parameters import parameter
from compressknow.compress.pruning import Calibrated, Mask, Needs, Patterned, PruningMethod, Weights

if TYPE_CHECKING:
    import torch

    from compressknow.compress.blocks import Block, Reader
    from compressknow.compress.calibrate.gathering import InputStatistics
    from compressknow.compress.pruning.masks import Keys


FLOAT_ONE_BITS = 0x3F800000


class Unstructured(PruningMethod):
    """Method that chooses single weights, over the whole step or in each tensor separately."""

    needs = "magnitudes"
    per_layer: bool = parameter(default=False, help="Prune each tensor by AMOUNT, not all together.")

    @property
    def over_scope(self) -> bool:
        return not self.per_layer


class L1Unstructured(Patterned, Unstructured):
    """Smallest magnitudes: one threshold over all, ties in tensor order, then index order; or by a pattern."""

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


class Random(PruningMethod):
    """Method whose draws for a tensor depend only on the seed and the tensor's name."""

    seed: int = parameter(
        default=0,
        help="Seed of random methods and calibration.",
        must="a whole number of at least 0",
        fits=lambda seed: seed >= 0,
    )


class RandomUnstructured(Random, Unstructured):
    """Random weights."""

    name = "random-unstructured"
    help = "any weights"

    @property
    def label(self) -> str:
        return self.name

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        import torch

        from compressknow.compress.pruning.masks import make_generator, smallest

        def start(name: str) -> Callable[[Block], Keys]:
            return partial(draw_keys, make_generator(self.seed, name))

        def draw_keys(generator: torch.Generator, block: Block) -> Keys:
            # torch prunes where its uniform numbers are largest. It draws them one after the other, so that blocks get
            # the same numbers as the whole tensor.
            drawn = torch.rand(block.values.numel(), generator=generator).view(torch.int32).numpy()
            return (FLOAT_ONE_BITS - drawn).reshape(tuple(block.values.shape))

        tensors = [each.tensor for each in weights]
        makers = [partial(start, tensor.name) for tensor in tensors]
        return smallest(reader, tensors, makers, torch.float32, self.count_all(weights, amount))


class Structured(PruningMethod):
    """Output channels (`dim` 0) or input channels (1) with the lowest scores, however a matrix is stored."""

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
        """Score each channel [matrices, channels]; the lowest are pruned, ties in their order."""


class LnStructured(Structured):
    """Channels with the smallest norm."""

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
        """Return norms to the power of their order, float64, which rank like the norms."""
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


class RandomStructured(Random, Structured):
    """Random channels."""

    name = "random-structured"
    help = "any channels"

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
    error that remains after the later columns have compensated for its loss (section 3.2). Scores are compared over all
    rows in blocks of 128 columns; with a pattern, in each group of an output (section 3.4).
    """

    name = "sparsegpt"
    help = "weights that the others can make up for"
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
            """Choose the pruned weights of a block of columns, once it has the errors of all columns before it: in each
            group, or so that the amount is right up to this block; ties in the order of rows, then of columns."""
            span = slice(first, first + len(block))
            scores = block.square().div_(divisors[span, None])
            keys = make_score_keys(scores.T.contiguous(), zero[span].T)
            if self.groups:
                chosen = mask_smallest_of_rows(keys, self.groups.pruned)
            else:
                count = round(amount * rows * span.stop) - round(amount * rows * first)
                chosen = mask_smallest_of_rows(keys.reshape(1, -1), count).reshape(keys.shape)
            pruned[span] = torch.from_numpy(chosen).T

        def zero_pruned(column: int, current: torch.Tensor) -> torch.Tensor:
            return values[column].copy_(current).masked_fill_(pruned[column] | zero[column], 0)

        levels: list[Level] = [(BLOCK, choose), (FINE, None)]
        if self.groups:
            fine = self.groups.of * max(1, FINE // self.groups.of)
            levels = [(fine * max(1, BLOCK // fine), None), (fine, None), (self.groups.of, choose)]
        compensate(columns, factor, levels, zero_pruned)
        return pruned.T.contiguous(), values.T.contiguous()
