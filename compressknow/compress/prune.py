"""Which weights a prune step zeroes, tensor by tensor, with the semantics of torch.nn.utils.prune.

What is chosen over many tensors or over whole channels is decided first (`choose`), in passes that read the weights;
the masks that come out are small, and are expanded block by block when the weights are written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from compressknow.compress.blocks import BIT_LAYOUTS, Block, Reader, check_finite, magnitude_keys
from compressknow.compress.pool import in_turn
from compressknow.compress.recipe import Prune
from compressknow.compress.threshold import Keys, select_smallest
from compressknow.errors import CheckpointError
from compressknow.model.tensors import StoredTensor, torch_dtype

BoolArray = npt.NDArray[np.bool_]
# The pruned weights of a block, [rows, columns]; asked for each block of a tensor in order.
BlockMask = Callable[[Block], BoolArray]
# Starts a tensor anew; what it returns gives the keys of each of its blocks in order.
KeyMaker = Callable[[], Callable[[Block], Keys]]

FLOAT_ONE_BITS = 0x3F800000


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A weight as stacked matrices: their number (fused experts have many), rows and columns of each."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


@dataclass(frozen=True)
class Weights:
    """A stored tensor to be pruned; `transposed` says that its last axis is the output (GPT-2's Conv1D)."""

    tensor: StoredTensor
    transposed: bool = False

    def axis(self, dim: int) -> int:
        """The axis of the stored matrices, 0 or 1, along which output (`dim` 0) or input channels (1) are counted."""
        return dim ^ self.transposed


def pruned_count(step: Prune, weights: Sequence[Weights]) -> tuple[list[int] | None, int]:
    """How many weights a step zeroes, from shapes alone: in each tensor, and in all (`None` where one threshold over
    all tensors decides how many fall in which)."""
    if step.is_global:
        return None, round(step.amount * sum(each.tensor.numel for each in weights))
    counts = [_count_in(step, each) for each in weights]
    return counts, sum(counts)


def _count_in(step: Prune, weights: Weights) -> int:
    if not step.structured:
        return round(step.amount * weights.tensor.numel)
    number, rows, columns = matrices(weights.tensor.shape)
    channels, length = (rows, columns) if weights.axis(step.dim) == 0 else (columns, rows)
    return number * round(step.amount * channels) * length


@dataclass(frozen=True)
class KeyMask:
    """Weights whose key is below `key`, and the first `ties` of those that have exactly this key."""

    key: int
    ties: int
    keys_of: KeyMaker

    def start(self) -> BlockMask:
        left, keys_of = self.ties, self.keys_of()

        def mask(block: Block) -> BoolArray:
            nonlocal left
            keys = keys_of(block)
            pruned: BoolArray = keys < self.key
            if left:
                equal = np.flatnonzero(keys == self.key)[:left]
                pruned.reshape(-1)[equal] = True
                left -= len(equal)
            return pruned

        return mask


@dataclass(frozen=True)
class ChannelMask:
    """Whole rows (`axis` 0) or columns (1) of each of the stacked matrices: `channels` is [matrices, channels]."""

    channels: BoolArray
    axis: int
    rows: int

    def start(self) -> BlockMask:
        def mask(block: Block) -> BoolArray:
            if self.axis == 0:
                pruned = self.channels.reshape(-1)[block.rows, None]
            else:
                pruned = self.channels[np.arange(block.rows.start, block.rows.stop) // self.rows]
            return np.ascontiguousarray(np.broadcast_to(pruned, tuple(block.values.shape)))

        return mask


Mask = KeyMask | ChannelMask


def choose(reader: Reader, step: Prune, weights: Sequence[Weights]) -> list[Mask]:
    """Decide what a step prunes. Weights are F32, F16 or BF16, in the order in which ties are broken.

    Raises CheckpointError naming a tensor that holds NaN or an infinity.
    """
    if step.structured:
        return list(reader.pool.map(lambda each: _channel_mask(reader, step, each), weights))
    tensors = [each.tensor for each in weights]
    # Magnitudes of several dtypes compare in the widest.
    common = torch_dtype(tensors[0].dtype) if len({tensor.dtype for tensor in tensors}) == 1 else torch.float32
    by_magnitude = step.method == "l1-unstructured"
    makers = [_magnitudes(common) if by_magnitude else _random_keys(step.seed, tensor) for tensor in tensors]

    def keys(index: int) -> Iterator[Keys]:
        keys_of = makers[index]()
        for block in reader.blocks(tensors[index]):
            found = keys_of(block)
            magnitudes = found if by_magnitude else magnitude_keys(block.values.to(common))
            check_finite(int(magnitudes.max(initial=0)), common, tensors[index])
            yield found

    bits = BIT_LAYOUTS[common].bits if by_magnitude else BIT_LAYOUTS[torch.float32].bits
    counts, total = pruned_count(step, weights)
    if counts is None:
        chosen = select_smallest(reader.pool.map, len(tensors), total, bits, keys)
        return [KeyMask(chosen.key, ties, maker) for ties, maker in zip(chosen.ties, makers, strict=True)]
    singles = reader.pool.map(
        lambda i: select_smallest(in_turn, 1, counts[i], bits, lambda _: keys(i)), range(len(tensors))
    )
    return [KeyMask(one.key, one.ties[0], maker) for one, maker in zip(singles, makers, strict=True)]


def tensor_seed(seed: int, name: str) -> int:
    """The seed of the random methods in one tensor: it depends on the tensor's name, not on what else is pruned."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _magnitudes(common: torch.dtype) -> KeyMaker:
    return lambda: lambda block: magnitude_keys(block.values.to(common))


def _random_keys(seed: int, tensor: StoredTensor) -> KeyMaker:
    def start() -> Callable[[Block], Keys]:
        generator = torch.Generator().manual_seed(tensor_seed(seed, tensor.name))

        def keys(block: Block) -> Keys:
            # torch prunes where its uniform numbers are largest. It draws them one after the other, so that blocks
            # get the numbers that the whole tensor would.
            drawn = torch.rand(block.values.numel(), generator=generator).view(torch.int32).numpy()
            return (FLOAT_ONE_BITS - drawn).reshape(tuple(block.values.shape))

        return keys

    return start


def _channel_mask(reader: Reader, step: Prune, weights: Weights) -> ChannelMask:
    tensor, axis = weights.tensor, weights.axis(step.dim)
    number, rows, columns = matrices(tensor.shape)
    size = rows if axis == 0 else columns
    if step.method == "random-structured":
        generator = torch.Generator().manual_seed(tensor_seed(step.seed, tensor.name))
        scores = torch.rand(number * size, generator=generator).view(number, size)
    else:
        scores = _channel_norms(reader, step, tensor, axis)
    channels = np.zeros((number, size), dtype=np.bool_)
    smallest = torch.argsort(scores, dim=1, stable=True)[:, : round(step.amount * size)].numpy()
    np.put_along_axis(channels, smallest, True, axis=1)
    return ChannelMask(channels, axis, rows)


def _channel_norms(reader: Reader, step: Prune, tensor: StoredTensor, axis: int) -> torch.Tensor:
    """Norms to the power of their order [matrices, channels], float64: they rank as the norms do."""
    number, rows, columns = matrices(tensor.shape)
    total = torch.zeros(number * rows if axis == 0 else number, columns if axis else 1, dtype=torch.float64)
    for block in reader.blocks(tensor):
        check_finite(int(magnitude_keys(block.values).max(initial=0)), block.values.dtype, tensor)
        magnitudes = block.values.to(torch.float64).abs_()
        powers = magnitudes if step.norm in (1, math.inf) else magnitudes.pow_(step.norm)
        if axis == 0:
            total[block.rows, 0] = powers.amax(1) if math.isinf(step.norm) else powers.sum(1)
        else:
            matrix = torch.arange(block.rows.start, block.rows.stop) // rows
            reduce = "amax" if math.isinf(step.norm) else "sum"
            total.scatter_reduce_(0, matrix[:, None].expand_as(powers), powers, reduce)
    if not bool(torch.isfinite(total).all()):
        raise CheckpointError(f"The L{step.norm:g} norm of {tensor.name} overflows.", hint="Choose a lower norm.")
    return total.view(number, -1)
