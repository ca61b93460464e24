"""The k-th smallest magnitude of many tensors, exactly, without gathering them: a radix selection.

A float's bits without the sign order as its magnitude does. One pass counts the leading bits of all weights in a
histogram, which tells the bin that holds the k-th; the next counts the remaining bits within that bin. Memory does not
depend on the number of weights (numpy.partition, torch.kthvalue and torch.topk all gather them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from compressknow.compress.pool import Map

# Wide enough that a float's exponent and some of its mantissa leave few weights to the second pass, narrow enough that
# adding up the blocks' histograms costs less than counting. 16-bit floats need one pass only.
DIGITS = {15: (15,), 31: (14, 17)}

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
    prefix, below, shift = 0, 0, bits
    for width in DIGITS[bits]:
        shift -= width
        digit = _Digit(shift + width == bits, prefix, shift + width, shift, 1 << width)
        histogram = sum(run(lambda i, digit=digit: _histogram(keys(i), digit), range(count)))
        assert isinstance(histogram, torch.Tensor)
        cumulative = histogram.cumsum(0)
        index = int(torch.searchsorted(cumulative, amount - below))
        below += int(cumulative[index]) - int(histogram[index])
        prefix = (prefix << width) | index
    wanted, tied = amount - below, int(histogram[index])
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


def _histogram(key_blocks: Iterator[Keys], digit: _Digit) -> torch.Tensor:
    if digit.leading:
        total = torch.zeros(digit.size, dtype=torch.int64)
        for block in key_blocks:
            total += _count(block.reshape(-1) >> digit.shift, digit.size)
        return total
    # Few weights share their leading bits with the threshold.
    rest = [keys[(keys >> digit.above) == digit.prefix] for keys in key_blocks]
    matching = np.concatenate(rest) if rest else np.empty(0, dtype=np.int32)
    return _count((matching & ((1 << digit.above) - 1)) >> digit.shift, digit.size)


def _count(values: Keys, size: int) -> torch.Tensor:
    # numpy's bincount takes more than twice as long.
    return torch.bincount(torch.from_numpy(values), minlength=size)


def _count_equal(key_blocks: Iterator[Keys], key: int) -> int:
    return sum(int(np.count_nonzero(keys == key)) for keys in key_blocks)


def _deal(wanted: int, tied: Sequence[int]) -> tuple[int, ...]:
    dealt = []
    for available in tied:
        dealt.append(min(wanted, available))
        wanted -= dealt[-1]
    return tuple(dealt)
