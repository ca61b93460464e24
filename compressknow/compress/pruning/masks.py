"""Masks of the smallest weights, groups and channels, found exactly without gathering the weights.

A float's bits without the sign order as its magnitude does. One pass counts the leading bits of all weights in a
histogram, which tells the bin that holds the k-th; the next counts the remaining bits within that bin. Memory does not
depend on the number of weights (numpy.partition, torch.kthvalue and torch.topk all gather them).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressknow.compress.blocks import Block, Reader, check_finite, make_magnitude_keys
from compressknow.compress.pruning import BlockMask, EachBlock, Mask, Weights
from compressknow.model.tensors import StoredTensor, get_torch_dtype

# Wide enough that a float's exponent and some of its mantissa leave few weights to the second pass, narrow enough that
# adding up the blocks' histograms costs less than counting. 16-bit floats need one pass only.
DIGITS = {15: (15,), 31: (14, 17)}
BATCH = 1 << 18

Keys = npt.NDArray[np.signedinteger]
# Blocks of keys (int16 or int32, non-negative, any shape) of the tensor with this position.
KeyReader = Callable[[int], Iterator[Keys]]


def select_smallest(
    run: Callable[..., list[Any]], count: int, amount: int, bits: int, keys: KeyReader
) -> tuple[int, tuple[int, ...]]:
    """Find where to cut so that exactly `amount` weights of `count` tensors go, ties in tensor and index order: weights
    with lower keys than the first result go, and in tensor i the first ``ties[i]`` of those with exactly this key.

    Parameters
    ----------
    run : applies a function to each tensor's position, as `Pool.map` does.
    bits : width of the keys, 15 or 31.
    keys : the tensors' keys; read one to three times.
    """
    if amount == 0:
        return 0, (0,) * count
    prefix, below, shift, at_index = 0, 0, bits, 0
    for width in DIGITS[bits]:
        # The next digit of the keys that begin with the digits found so far.
        above, shift = shift, shift - width
        cut = partial(_cut_digit, above=above, shift=shift, prefix=None if above == bits else prefix)
        histogram, lock = torch.zeros(1 << width, dtype=torch.int64), threading.Lock()
        run(partial(_add_counts, keys, cut, histogram, lock), range(count))
        cumulative = histogram.cumsum(0)
        index = int(torch.searchsorted(cumulative, amount - below))
        at_index = int(histogram[index])
        below += int(cumulative[index]) - at_index
        prefix = (prefix << width) | index
    wanted = amount - below
    if wanted == at_index:
        # All of them go: no need to know how many lie where.
        return prefix + 1, (0,) * count
    ties = run(lambda index: sum(int(np.count_nonzero(block == prefix)) for block in keys(index)), range(count))
    # To each tensor in order at most what is tied there.
    dealt = np.diff(np.minimum(np.cumsum(ties), wanted), prepend=0)
    return prefix, tuple(dealt.tolist())


def _cut_digit(block: Keys, *, above: int, shift: int, prefix: int | None) -> Keys:
    """Return the bits below `above` and from `shift` on, of the keys whose higher bits are `prefix`; of all if None."""
    if prefix is None:
        return block.reshape(-1) >> shift
    digits: Keys = (block[(block >> above) == prefix] & ((1 << above) - 1)) >> shift
    return digits


def _add_counts(
    keys: KeyReader, cut: Callable[[Keys], Keys], histogram: torch.Tensor, lock: threading.Lock, index: int
) -> None:
    """Add a tensor's counts to the histogram of all."""
    for batch in _join_pieces(map(cut, keys(index))):
        # numpy's bincount takes more than twice as long.
        counts = torch.bincount(torch.from_numpy(batch), minlength=len(histogram))
        with lock:
            histogram += counts


def _join_pieces(pieces: Iterator[Keys]) -> Iterator[Keys]:
    """Join pieces to batches: few weights of a block share a prefix, and each count costs a pass over the histogram."""
    batch: list[Keys] = []
    for piece in pieces:
        batch.append(piece)
        if sum(map(len, batch)) > BATCH:
            yield np.concatenate(batch) if len(batch) > 1 else piece
            batch.clear()
    if batch:
        yield np.concatenate(batch)


BoolArray = npt.NDArray[np.bool_]
# Restarts a tensor; the function it returns gives the keys of each of its blocks in order.
KeyMaker = Callable[[], Callable[[Block], Keys]]


@dataclass(frozen=True)
class KeyMask:
    """Mask of the weights with keys below `key`, and of the first `ties` of those with exactly this key."""

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


def smallest(
    reader: Reader,
    tensors: Sequence[StoredTensor],
    makers: Sequence[KeyMaker],
    common: torch.dtype,
    amounts: int | Sequence[int],
    *,
    are_magnitudes: bool = False,
) -> list[KeyMask]:
    """Mask the weights with the smallest keys: so many over all tensors together, or so many in each.

    `makers` give the keys of each tensor, non-negative, of as many bits as a float of the dtype `common` has without
    its sign; `are_magnitudes` says that they are those of the weights in that dtype.

    Raises CheckpointError naming a tensor that holds NaN or an infinity.
    """

    def keys(index: int) -> Iterator[Keys]:
        keys_of = makers[index]()
        for block in reader.blocks(tensors[index]):
            found = keys_of(block)
            sizes = found if are_magnitudes else make_magnitude_keys(block.values.to(common))
            check_finite(int(sizes.max(initial=0)), common, tensors[index])
            yield found

    bits = 8 * common.itemsize - 1
    if isinstance(amounts, int):
        key, ties = select_smallest(reader.pool.map, len(tensors), amounts, bits, keys)
        return [KeyMask(key, each, maker) for each, maker in zip(ties, makers, strict=True)]

    def select_alone(index: int) -> KeyMask:
        run_in_turn = lambda task, items: [task(item) for item in items]  # noqa: E731
        key, (ties,) = select_smallest(run_in_turn, 1, amounts[index], bits, lambda _: keys(index))
        return KeyMask(key, ties, makers[index])

    return reader.pool.map(select_alone, range(len(tensors)))


def smallest_magnitudes(reader: Reader, weights: Sequence[Weights], amounts: int | Sequence[int]) -> list[KeyMask]:
    """Mask the weights with the smallest magnitudes, as `smallest` does. They compare in the dtype of all tensors, or
    the widest."""
    dtypes = {each.tensor.dtype for each in weights}
    common = get_torch_dtype(dtypes.pop()) if len(dtypes) == 1 else torch.float32
    tensors = [each.tensor for each in weights]

    def start() -> Callable[[Block], Keys]:
        return lambda block: make_magnitude_keys(block.values.to(common))

    return smallest(reader, tensors, [start] * len(tensors), common, amounts, are_magnitudes=True)


def make_score_keys(scores: torch.Tensor, zero: torch.Tensor) -> Keys:
    """Return integers that order as non-negative float32 scores do, with weights that are `zero` (bool) first."""
    keys = make_magnitude_keys(scores)
    keys[zero.numpy()] = -1
    return keys


# Up to so many, comparing each two is faster than a partition of each row: ten times with 4.
FEW_COLUMNS = 8


def mask_smallest_of_rows(keys: Keys, count: int) -> BoolArray:
    """Mask the `count` smallest keys of each row [rows, columns], ties in the order of columns."""
    if count == 0:
        return np.zeros(keys.shape, dtype=np.bool_)
    if keys.shape[1] <= FEW_COLUMNS:
        columns = np.ascontiguousarray(keys.T)
        ranks = np.zeros(columns.shape, dtype=np.int8)
        for one, other in combinations(range(len(columns)), 2):
            is_first = columns[one] <= columns[other]
            ranks[other] += is_first
            ranks[one] += ~is_first
        return np.ascontiguousarray((ranks < count).T)
    # Partitioning integers is ten times as fast as sorting them, which finding the indices would take.
    highest = np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
    pruned: BoolArray = keys <= highest
    spare = pruned.sum(axis=1) - count
    tied = np.flatnonzero(spare)
    equal = keys[tied] == highest[tied]
    from_the_last = equal[:, ::-1].cumsum(axis=1)[:, ::-1]
    pruned[tied] &= ~equal | (from_the_last > spare[tied, None])
    return pruned


def mask_groups(reader: Reader, weights: Weights, size: int, count: int) -> Mask:
    """Mask the `count` smallest magnitudes in each group of `size` neighbouring input channels, ties in their order."""
    if weights.axis(1) == 1:
        return EachBlock(lambda block: _mask_along_columns(make_magnitude_keys(block.values), size, count))
    straddling = _mask_straddling(reader, weights.tensor, size, count)

    def mask(block: Block) -> BoolArray:
        start, stop = block.rows.start, block.rows.stop
        first, last = -(-start // size) * size, stop // size * size
        parts = []
        if start < first:
            parts.append(straddling[first - size][start - first + size :][: stop - start])
        if first < last:
            parts.append(_mask_along_rows(make_magnitude_keys(block.values[first - start : last - start]), size, count))
        if first <= last < stop:
            parts.append(straddling[last][: stop - last])
        return np.concatenate(parts)

    return EachBlock(mask)


def _mask_along_columns(keys: Keys, size: int, count: int) -> BoolArray:
    return mask_smallest_of_rows(keys.reshape(-1, size), count).reshape(keys.shape)


def _mask_along_rows(keys: Keys, size: int, count: int) -> BoolArray:
    return np.ascontiguousarray(_mask_along_columns(np.ascontiguousarray(keys.T), size, count).T)


def _mask_straddling(reader: Reader, tensor: StoredTensor, size: int, count: int) -> dict[int, BoolArray]:
    """Mask the groups of rows that lie in more than one block, by their first row."""
    found: dict[int, BoolArray] = {}
    rest: Keys | None = None
    for block in reader.blocks(tensor):
        keys, first = make_magnitude_keys(block.values), block.first_row
        if rest is not None:
            keys, first = np.concatenate([rest, keys]), first - len(rest)
            if len(keys) >= size:
                found[first] = _mask_along_rows(keys[:size], size, count)
        left = len(keys) % size
        rest = keys[len(keys) - left :].copy() if left else None
    return found


def mask_channels(scores: torch.Tensor, amount: float, axis: int, rows: int) -> Mask:
    """Mask the channels of the lowest scores [matrices, channels], ties in their order: whole rows (`axis` 0) or
    columns (1) of stacked matrices of so many rows."""
    channels = np.zeros(tuple(scores.shape), dtype=np.bool_)
    lowest = torch.argsort(scores, dim=1, stable=True)[:, : round(amount * scores.shape[1])].numpy()
    np.put_along_axis(channels, lowest, True, axis=1)

    def mask(block: Block) -> BoolArray:
        numbers = np.arange(block.rows.start, block.rows.stop)
        pruned = channels.reshape(-1)[numbers, None] if axis == 0 else channels[numbers // rows]
        return np.ascontiguousarray(np.broadcast_to(pruned, tuple(block.values.shape)))

    return EachBlock(mask)


def make_generator(seed: int, name: str) -> torch.Generator:
    """Make the random generator of one tensor: it depends on the tensor's name, not on what else is pruned."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
