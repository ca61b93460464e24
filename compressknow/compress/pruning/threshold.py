"""The k-th smallest magnitude of many tensors, exactly, without gathering them: a radix selection.

A float's bits without the sign order as its magnitude does. One pass counts the leading bits of all weights in a
histogram, which tells the bin that holds the k-th; the next counts the remaining bits within that bin. Memory does not
depend on the number of weights (numpy.partition, torch.kthvalue and torch.topk all gather them).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from compressknow.compress.pool import Map

# Wide enough that a float's exponent and some of its mantissa leave few weights to the second pass, narrow enough that
# adding up the blocks' histograms costs less than counting. 16-bit floats need one pass only.
DIGITS = {15: (15,), 31: (14, 17)}
BATCH = 1 << 18

Keys = npt.NDArray[np.signedinteger]
# Blocks of keys (int16 or int32, non-negative, any shape) of the tensor with this position.
KeyReader = Callable[[int], Iterator[Keys]]


@dataclass(frozen=True)
class Threshold:
    """Weights with a key below `key` go, and in tensor i the first `ties[i]` of those with exactly this key."""

    key: int
    ties: tuple[int, ...]


def select_smallest(run: Map, count: int, amount: int, bits: int, keys: KeyReader) -> Threshold:
    """Where to cut so that exactly `amount` weights of `count` tensors go, ties in tensor order and index order.

    Parameters
    ----------
    run : applies a function to each tensor's position (`Pool.map`, or `in_turn`).
    count : number of tensors, `amount` the weights to select in all of them.
    bits : width of the keys, 15 or 31.
    keys : the tensors' keys; read one to three times.
    """
    if amount == 0:
        return Threshold(0, (0,) * count)
    prefix, below, shift, at_index = 0, 0, bits, 0
    for width in DIGITS[bits]:
        shift -= width
        digit = _Digit(shift + width == bits, prefix, shift + width, shift, 1 << width)
        histogram = torch.zeros(digit.size, dtype=torch.int64)
        run(partial(_add_counts, keys, digit, histogram, threading.Lock()), range(count))
        cumulative = histogram.cumsum(0)
        index = int(torch.searchsorted(cumulative, amount - below))
        at_index = int(histogram[index])
        below += int(cumulative[index]) - at_index
        prefix = (prefix << width) | index
    wanted, tied = amount - below, at_index
    if wanted == tied:
        # All go, wherever they lie: no need to know how many lie where.
        return Threshold(prefix + 1, (0,) * count)
    return Threshold(prefix, _deal(wanted, run(lambda i: _count_equal(keys(i), prefix), range(count))))


@dataclass(frozen=True)
class _Digit:
    """The bits of a key below `above` and from `shift` on, for keys whose higher bits, if any, are `prefix`."""

    leading: bool
    prefix: int
    above: int
    shift: int
    size: int


def _add_counts(keys: KeyReader, digit: _Digit, histogram: torch.Tensor, lock: threading.Lock, index: int) -> None:
    """Add a tensor's counts to those of all."""
    matching = (_matching(block, digit) for block in keys(index))
    for batch in matching if digit.leading else _batches(matching):
        # numpy's bincount takes more than twice as long.
        counts = torch.bincount(torch.from_numpy(batch >> digit.shift), minlength=digit.size)
        with lock:
            histogram += counts


def _matching(block: Keys, digit: _Digit) -> Keys:
    """The keys of a block that have the digit's prefix, without it."""
    if digit.leading:
        return block.reshape(-1)
    rest: Keys = block[(block >> digit.above) == digit.prefix] & ((1 << digit.above) - 1)
    return rest


def _batches(pieces: Iterator[Keys]) -> Iterator[Keys]:
    """Pieces put together: few weights of a block share a prefix, and each count costs a pass over the histogram."""
    batch: list[Keys] = []
    for piece in pieces:
        batch.append(piece)
        if sum(map(len, batch)) > BATCH:
            yield np.concatenate(batch)
            batch.clear()
    if batch:
        yield np.concatenate(batch)


def _count_equal(key_blocks: Iterator[Keys], key: int) -> int:
    return sum(int(np.count_nonzero(keys == key)) for keys in key_blocks)


def _deal(wanted: int, tied: Sequence[int]) -> tuple[int, ...]:
    dealt = []
    for available in tied:
        dealt.append(min(wanted, available))
        wanted -= dealt[-1]
    return tuple(dealt)
