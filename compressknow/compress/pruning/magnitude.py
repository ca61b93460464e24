"""Methods that look at weights alone: single weights or whole channels, the smallest or random ones."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compressknow.base.errors import CheckpointError
from compressknow.compress.parameters import parameter
from compressknow.compress.pruning import Mask, Patterned, PruningMethod, Weights

if TYPE_CHECKING:
    import torch

    from compressknow.compress.blocks import Block, Reader
    from compressknow.compress.pruning.masks import KeyMaker, Keys
    from compressknow.model.tensors import StoredTensor


FLOAT_ONE_BITS = 0x3F800000


class Unstructured(PruningMethod):
    """Weights chosen one by one, over all of the step together or in each tensor by itself."""

    needs = "magnitudes"
    per_layer: bool = parameter(default=False, help="Prune each tensor by AMOUNT, not all together.")

    @property
    def over_scope(self) -> bool:
        """False with `per_layer`."""
        return not self.per_layer

    def count_all(self, weights: Sequence[Weights], amount: float) -> int | list[int]:
        """Count the weights that fall: over all tensors, or in each."""
        if self.over_scope:
            return round(amount * sum(each.tensor.numel for each in weights))
        return [self.count(each, amount) for each in weights]


class L1Unstructured(Patterned, Unstructured):
    """Smallest magnitudes: one threshold over all of the step, ties in the order of tensors, then of index; with a
    pattern, each group by itself."""

    name = "l1-unstructured"
    help = "the smallest weights of all"

    @property
    def label(self) -> str:
        """Name in the paper."""
        return f"L1-unstructured {self.pattern or ''}".strip()

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """See `PruningMethod.choose`."""
        from compressknow.compress.pruning.masks import find_common_dtype, make_magnitude_keys, mask_groups, smallest

        if (groups := self.groups) is not None:
            return reader.pool.map(lambda each: mask_groups(reader, each, groups.of, groups.pruned), weights)
        common = find_common_dtype(weights)
        tensors = [each.tensor for each in weights]
        makers = [make_magnitude_keys(common)] * len(tensors)
        return smallest(reader, tensors, makers, common, self.count_all(weights, amount), are_magnitudes=True)


class RandomUnstructured(Unstructured):
    """Random weights, drawn for each tensor from the seed and its name alone."""

    name = "random-unstructured"
    help = "any weights"
    seed: int = parameter(
        default=0, help="Seed of the random methods.", must="a whole number of at least 0", fits=lambda seed: seed >= 0
    )

    @property
    def label(self) -> str:
        """Name as the paper would have it."""
        return self.name

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """See `PruningMethod.choose`."""
        import torch

        from compressknow.compress.pruning.masks import smallest

        tensors = [each.tensor for each in weights]
        makers = [_make_random_keys(self.seed, tensor) for tensor in tensors]
        return smallest(reader, tensors, makers, torch.float32, self.count_all(weights, amount))


def _make_random_keys(seed: int, tensor: StoredTensor) -> KeyMaker:
    def start() -> Callable[[Block], Keys]:
        import torch

        from compressknow.compress.pruning.masks import make_generator

        drawing = make_generator(seed, tensor.name)

        def keys(block: Block) -> Keys:
            # torch prunes where its uniform numbers are largest. It draws them one after the other, so that blocks
            # get the numbers that the whole tensor would.
            drawn = torch.rand(block.values.numel(), generator=drawing).view(torch.int32).numpy()
            return (FLOAT_ONE_BITS - drawn).reshape(tuple(block.values.shape))

        return keys

    return start


class Structured(PruningMethod):
    """Output channels (`dim` 0) or input channels (1) of the lowest scores, however a matrix is stored."""

    structured = True
    dim: int = parameter(
        default=0,
        help="Channels to prune: 0 output, 1 input.",
        must="the dimension 0 (output channels) or 1 (input channels)",
        fits=lambda dim: dim in (0, 1),
    )

    def count(self, weights: Weights, amount: float) -> int:
        """See `PruningMethod.count`; whole channels of each matrix."""
        number, rows, columns = weights.matrices
        channels, length = (rows, columns) if weights.axis(self.dim) == 0 else (columns, rows)
        return number * round(amount * channels) * length

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """See `PruningMethod.choose`."""
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

        from compressknow.compress.blocks import check_finite, magnitude_keys

        tensor, axis = weights.tensor, weights.axis(self.dim)
        number, rows, columns = weights.matrices
        total = torch.zeros(number * rows if axis == 0 else number, columns if axis else 1, dtype=torch.float64)
        for block in reader.blocks(tensor):
            check_finite(int(magnitude_keys(block.values).max(initial=0)), block.values.dtype, tensor)
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
        """Name as the paper would have it."""
        return self.name + (f" dim {self.dim}" if self.dim else "")

    def scores(self, reader: Reader, weights: Weights) -> torch.Tensor:  # noqa: ARG002
        """Draw uniform numbers."""
        import torch

        from compressknow.compress.pruning.masks import make_generator

        number, rows, columns = weights.matrices
        size = rows if weights.axis(self.dim) == 0 else columns
        drawn = torch.rand(number * size, generator=make_generator(self.seed, weights.tensor.name))
        return drawn.view(number, size)
