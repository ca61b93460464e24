"""Masks of the smallest weights, groups and channels, found exactly without gathering the weights.

A float's bits without the sign sort like its magnitude. One pass counts the leading bits of all weights in a histogram,
which shows the bin that holds the k-th; the next pass counts the remaining bits within that bin. Memory does not depend
on the number of weights (numpy.partition, torch.kthvalue and torch.topk all gather them).
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

# Wide enough that few weights remain for the second pass, narrow enough that adding up the blocks' histograms costs
# less than counting. 16-bit floats need only one pass.
DIGITS = {15: (15,), 31: (14, 17)}
BATCH = 1 << 18

Keys = npt.NDArray[np.signedinteger]
# Yields the keys of the tensor at an index in blocks: int16 or int32, non-negative, of any shape.
KeyReader = Callable[[int], Iterator[Keys]]


def select_smallest(
    run: Callable[..., list[Any]], count: int, amount: int, bits: int, keys: KeyReader
) -> tuple[int, tuple[int, ...]]:
    """Return the threshold key and ``ties`` that select exactly `amount` weights of `count` tensors, ties in tensor and
    index order: all weights with lower keys, and in tensor i the first ``ties[i]`` with exactly the threshold key.

    Parameters
    ----------
    run : applies a function to each tensor's index, as `Pool.map` does.
    bits : width of the keys, 15 or 31.
    keys : the tensors' keys; read one to three times.
    """
    if amount == 0:
        return 0, (0,) * count
    prefix, below, shift, at_index = 0, 0, bits, 0
    for width in DIGITS[bits]:
        # Count the next digit of the keys that start with the digits in `prefix`.
        above, shift = shift, shift - width
        cut = partial(_cut_digit, above=above, shift=shift, prefix=None if above == bits else prefix)
        histogram, lock = torch.zeros(1 << width, dtype=torch.int64), threading.Lock()
        run(partial(_add_counts, keys, cut, histogram, lock), range(count))
        cumulative = histogram.cumsum(0)
        index = int(torch.searchsorted(cumulative, amount - below))
        at_index = int(histogram[index])
        below += int(cumulative[index]) - at_index
        prefix = (prefix << width) | index
    needed = amount - below
    if needed == at_index:
        # All ties are selected: they need not be counted.
        return prefix + 1, (0,) * count
    ties = run(lambda index: sum(int(np.count_nonzero(block == prefix)) for block in keys(index)), range(count))
    # Take the needed ties from the tensors in order.
    selected = np.diff(np.minimum(np.cumsum(ties), needed), prepend=0)
    return prefix, tuple(selected.tolist())


def _cut_digit(block: Keys, *, above: int, shift: int, prefix: int | None) -> Keys:
    """Return bits `shift` to `above` (exclusive) of the keys whose higher bits are `prefix`; of all keys if None."""
    if prefix is None:
        return block.reshape(-1) >> shift
    digits: Keys = (block[(block >> above) == prefix] & ((1 << above) - 1)) >> shift
    return digits


def _add_counts(
    keys: KeyReader, cut: Callable[[Keys], Keys], histogram: torch.Tensor, lock: threading.Lock, index: int
) -> None:
    """Add a tensor's counts to the common histogram."""
    for batch in _join_pieces(map(cut, keys(index))):
        # numpy's bincount takes more than twice as long.
        counts = torch.bincount(torch.from_numpy(batch), minlength=len(histogram))
        with lock:
            histogram += counts


def _join_pieces(pieces: Iterator[Keys]) -> Iterator[Keys]:
    """Join pieces into batches: few weights of a block share a prefix, and each count scans the whole histogram."""
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
    """Mask of the weights with keys below `key`, and of the first `ties` weights with exactly this key."""

    key: int
    ties: int
    keys_of: KeyMaker

    def start(self) -> BlockMask:
        ties, keys_of = self.ties, self.keys_of()

        def mask(block: Block) -> BoolArray:
            nonlocal ties
            keys = keys_of(block)
            pruned: BoolArray = keys < self.key
            if ties:
                equal = np.flatnonzero(keys == self.key)[:ties]
                pruned.reshape(-1)[equal] = True
                ties -= len(equal)
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
    """Mask the weights with the smallest keys: `amounts` is their number over all tensors, or in each tensor.

    `makers` give the keys of each tensor, non-negative and as wide as a float of the dtype `common` without its sign.
    `are_magnitudes` means that the keys are the weights' magnitudes in that dtype.

    Raises CheckpointError naming a tensor that holds NaN or an infinity.
    """

    def keys(index: int) -> Iterator[Keys]:
        keys_of = makers[index]()
        for block in reader.blocks(tensors[index]):
            block_keys = keys_of(block)
            magnitudes = block_keys if are_magnitudes else make_magnitude_keys(block.values.to(common))
            check_finite(int(magnitudes.max(initial=0)), common, tensors[index])
            yield block_keys

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
    """Mask the weights with the smallest magnitudes, as `smallest` does. They are compared in the tensors' dtype, in
    float32 if there are several."""
    dtypes = {each.tensor.dtype for each in weights}
    common = get_torch_dtype(dtypes.pop()) if len(dtypes) == 1 else torch.float32
    tensors = [each.tensor for each in weights]

    def start() -> Callable[[Block], Keys]:
        return lambda block: make_magnitude_keys(block.values.to(common))

    return smallest(reader, tensors, [start] * len(tensors), common, amounts, are_magnitudes=True)


def make_score_keys(scores: torch.Tensor, zero: torch.Tensor) -> Keys:
    """Return integers that sort like non-negative float32 scores, with weights that are `zero` (bool) first."""
    keys = make_magnitude_keys(scores)
    keys[zero.numpy()] = -1
    return keys


# Up to this many columns, comparing all pairs is faster than partitioning each row: ten times with 4.
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
    # Partitioning integers is ten times as fast as sorting them, which would give the indices.
    highest = np.partition(keys, count - 1, axis=1)[:, count - 1 : count]
    pruned: BoolArray = keys <= highest
    spare = pruned.sum(axis=1) - count
    tied = np.flatnonzero(spare)
    equal = keys[tied] == highest[tied]
    from_last = equal[:, ::-1].cumsum(axis=1)[:, ::-1]
    pruned[tied] &= ~equal | (from_last > spare[tied, None])
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
    """Return masks of the groups of rows that span two or more blocks, by their first row."""
    masks: dict[int, BoolArray] = {}
    incomplete: Keys | None = None
    for block in reader.blocks(tensor):
        keys, first = make_magnitude_keys(block.values), block.first_row
        if incomplete is not None:
            keys, first = np.concatenate([incomplete, keys]), first - len(incomplete)
            if len(keys) >= size:
                masks[first] = _mask_along_rows(keys[:size], size, count)
        remainder = len(keys) % size
        incomplete = keys[len(keys) - remainder :].copy() if remainder else None
    return masks


def mask_channels(scores: torch.Tensor, amount: float, axis: int, rows: int) -> Mask:
    """Mask the channels with the lowest scores [matrices, channels], ties in their order: whole rows (`axis` 0) or
    columns (1) of stacked matrices, which have `rows` rows each."""
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
