"""Single weights: the smallest, or any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compressknow.compress.parameters import parameter
from compressknow.compress.pruning import Mask, PruningMethod, Weights
from compressknow.compress.pruning.patterns import Patterned

if TYPE_CHECKING:
    from compressknow.compress.blocks import Block, Reader
    from compressknow.compress.pruning.masks import KeyMaker
    from compressknow.compress.pruning.threshold import Keys
    from compressknow.model.tensors import StoredTensor

FLOAT_ONE_BITS = 0x3F800000


class Unstructured(PruningMethod):
    """Weights chosen one by one, over all of the step together or in each tensor by itself."""

    needs = "magnitudes"
    per_layer: bool = parameter(default=False, help="Prune each tensor by AMOUNT, not all together.")

    @property
    def over_scope(self) -> bool:
        """Unless `per_layer`."""
        return not self.per_layer

    def amounts(self, weights: Sequence[Weights], amount: float) -> int | list[int]:
        """How many fall over all tensors, or in each."""
        if self.over_scope:
            return round(amount * sum(each.tensor.numel for each in weights))
        return [self.count(each, amount) for each in weights]


class L1Unstructured(Patterned, Unstructured):
    """The smallest magnitudes. One threshold over all of the step, ties in the order of tensors, then of index; with a
    pattern, in each group by itself."""

    name = "l1-unstructured"
    help = "the smallest weights of all"

    @property
    def label(self) -> str:
        """As the paper writes it."""
        return f"L1-unstructured {self.pattern or ''}".strip()

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """See `PruningMethod.choose`."""
        from compressknow.compress.pruning.masks import common_dtype, group_mask, magnitudes, smallest

        if (groups := self.groups) is not None:
            return reader.pool.map(lambda each: group_mask(reader, each, groups.of, groups.pruned), weights)
        common = common_dtype(weights)
        tensors = [each.tensor for each in weights]
        makers = [magnitudes(common)] * len(tensors)
        return smallest(reader, tensors, makers, common, self.amounts(weights, amount), are_magnitudes=True)


class RandomUnstructured(Unstructured):
    """Any weights, drawn for each tensor from the seed and its name alone."""

    name = "random-unstructured"
    help = "any weights"
    seed: int = parameter(
        default=0, help="Seed of the random methods.", must="a whole number of at least 0", fits=lambda seed: seed >= 0
    )

    @property
    def label(self) -> str:
        """As the paper would write it."""
        return self.name

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """See `PruningMethod.choose`."""
        import torch

        from compressknow.compress.pruning.masks import smallest

        tensors = [each.tensor for each in weights]
        makers = [_random_keys(self.seed, tensor) for tensor in tensors]
        return smallest(reader, tensors, makers, torch.float32, self.amounts(weights, amount))


def _random_keys(seed: int, tensor: StoredTensor) -> KeyMaker:
    def start() -> Callable[[Block], Keys]:
        import torch

        from compressknow.compress.pruning.masks import generator

        drawing = generator(seed, tensor.name)

        def keys(block: Block) -> Keys:
            # torch prunes where its uniform numbers are largest. It draws them one after the other, so that blocks
            # get the numbers that the whole tensor would.
            drawn = torch.rand(block.values.numel(), generator=drawing).view(torch.int32).numpy()
            return (FLOAT_ONE_BITS - drawn).reshape(tuple(block.values.shape))

        return keys

    return start
