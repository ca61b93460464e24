"""Inputs of weights: recorded while a model runs, and summed over all batches."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compressknow.compress.calibrate.model import BlockwiseUnsupported

# Positions of the inputs and of the weight among the arguments, for all functions with which layers multiply.
OPERANDS: dict[Any, tuple[int, int]] = {
    functional.linear: (0, 1),
    torch.addmm: (1, 2),
    torch.baddbmm: (1, 2),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), (0, 1)),
    **dict.fromkeys((torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__), (0, 1)),
}
TURN_SECONDS = 0.05
# Position after all keys of a batch.
_END = (math.inf, 0)
BAND = 128


@dataclass(eq=False)
class InputStatistics:
    """Statistics of the inputs X [tokens, in] of one Linear on the calibration text.

    Linears that read the same tensor share one object: do not change it.

    Attributes
    ----------
    name : the module's name, for errors.
    tokens : rows of X.
    squares : float32 [in], the sum of x^2 over rows: the diagonal of `products`.
    peaks : float32 [in], the largest magnitudes; None if nothing needs them.
    products : float32 [in, in], X^T X; None if nothing needs them.
    drift : float32 [in, in], (Y - X)^T X, with the inputs Y of the same layer in the original; None if these are not
        known.
    inverses, lock : cache of `compensation.get_inverse`.
    """

    name: str
    tokens: int
    squares: torch.Tensor
    peaks: torch.Tensor | None = None
    products: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    inverses: dict[bool, tuple[torch.Tensor, torch.Tensor]] = field(init=False, repr=False, default_factory=dict)
    lock: threading.Lock = field(init=False, repr=False, default_factory=threading.Lock)


class Key(NamedTuple):
    """Weight matrix: a parameter, or one `matrix` of a stack."""

    parameter: str
    matrix: int = 0


# A weight matrix, and inputs [..., in] that were multiplied by it.
Seen = tuple[Key, torch.Tensor]


class AllSeen(BaseException):
    """Signal that ends a run after all inputs were seen; not an Exception, because models catch these."""


class InputRecorder(TorchFunctionMode):
    """Recorder of the inputs of named weights while it is entered, in this thread only; with `copies`, it copies them,
    for blocks that overwrite them. If it `ends` the run, it raises AllSeen before the last weight is used."""

    def __init__(self, weights: Mapping[str, torch.Tensor], *, copies: bool = False, ends: bool = False) -> None:
        super().__init__()
        self._ends = ends
        # Each with the tensor that it copies: if that were freed, another one could take its place.
        self._copies: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] | None = {} if copies else None
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in weights.items()}
        # Number of elements of the matrix, or of each in a stack.
        self._sizes = {name: max(math.prod(tensor.shape[-2:]), 1) for name, tensor in weights.items()}
        self.seen: list[Seen] = []
        # These inputs, with torch's counts of in-place changes at the time of recording.
        self._versions: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (positions := OPERANDS.get(func)) and len(args) > positions[1]:
            left, right = (args[position] for position in positions)
            self._record(left, right)
            if left.dim() > 1 and right.dim() > 1:
                # In Mamba, the weight is the left operand.
                self._record(right.transpose(-1, -2), left)
            if self._ends and len({key.parameter for key, _ in self.seen}) == len(self._names):
                raise AllSeen
        return func(*args, **kwargs or {})

    def _record(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        name = self._names.get(weight.untyped_storage().data_ptr())
        if name is None:
            return
        if self._copies is not None:
            identity = *_identify(inputs), inputs._version
            if identity not in self._copies:
                self._copies[identity] = inputs, inputs.clone()
            inputs = self._copies[identity][1]
        self._versions.append((inputs, inputs._version))
        # In a batch of products, each matrix of a stack, or some rows of one matrix (DeepSeek V4), has its own inputs.
        parts = zip(weight, inputs, strict=True) if weight.dim() > 2 else [(weight, inputs)]
        self.seen += [(Key(name, part.storage_offset() // self._sizes[name]), read) for part, read in parts]

    @property
    def overwritten(self) -> bool:
        """True if recorded inputs have changed since then."""
        return any(inputs._version != version for inputs, version in self._versions)


def _identify(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


class InputSums:
    """Sums over the inputs of weights, batch by batch; weights that read the same tensors share one.

    Batches come from several threads, but are added in order, so that results do not depend on the number of threads.

    Parameters
    ----------
    order : the parameters that may be seen, in the order in which their inputs are added.
    products : sum X^T X; else only squares.
    peaks : record the largest magnitudes, for a single text.
    paired : None, or the parameters whose drift is summed. Then batches come in pairs: first the original's inputs,
        which are not summed, then those of the changed model.
    check : called while a batch waits for its turn; raises if the work must stop.
    texts : number of batches of each text, if there are several. These have equal weight, whatever their length and
        the size of their inputs: the sums of each are divided by its mean square before they are added.
    """

    def __init__(
        self,
        order: Iterable[str],
        *,
        products: bool,
        peaks: bool,
        check: Callable[[], None],
        paired: Collection[str] | None = None,
        texts: Sequence[int] = (),
    ) -> None:
        self._order = {name: place for place, name in enumerate(order)}
        self._paired = paired
        # The number of the text of each batch, if there are several texts.
        self._text_of = [number for number, batches in enumerate(texts) for _ in range(batches)]
        # Inputs of the originals whose pairs are not complete yet.
        self._originals: dict[int, dict[Key, list[torch.Tensor]]] = {}
        self._products, self._peaks, self._check = products, peaks, check
        # False if weights that share inputs in one round of batches may not share them in the next.
        self.has_twins = True
        self._sums: dict[Key, dict[int, InputStatistics]] = {}
        # Results of `get`: the same object for all callers, since they cache in it.
        self._results: dict[Key, InputStatistics] = {}
        self._leaders: dict[str, str] = {}
        # The position that each batch has passed, in the order of keys.
        self._passed: dict[int, tuple[float, float]] = {}
        self._turn = threading.Condition()

    def begin(self) -> None:
        """Start another round of batches, numbered from 0."""
        self._passed.clear()

    def add(self, batch: int, seen: list[Seen]) -> None:
        """Add the inputs of one batch. `batch` counts from 0, and all batches before it must have begun."""
        is_original = self._paired is not None and batch % 2 == 0
        # Passes of the original are not summed, so they wait for nothing; the others wait for the pair before.
        before = -1 if is_original else batch - 1 if self._paired is None else batch - 2
        try:
            # The first batch decides which weights share inputs.
            self._wait(0 if batch else -1, (0, 0))
            by_key = self._drop_twins(seen)
            if is_original:
                assert self._paired is not None
                self._originals[batch] = {key: read for key, read in by_key.items() if key.parameter in self._paired}
                by_key = {}
            elif self._paired is not None:
                self._wait(batch - 1, (0, 0))
            self._pass(batch, (1, -1))
            for key in sorted(by_key, key=self._locate):
                self._wait(before, self._locate(key))
                originals = self._originals.get(batch - 1, {}).get(key, ())
                self._add_inputs(batch, key, by_key[key], originals)
                self._pass(batch, self._locate(key, after=True))
            # The previous batch may have keys that this one lacks, but the next one has.
            self._wait(before, _END)
        finally:
            self._originals.pop(batch - 1, None)
            self._pass(batch, (math.inf, 1))

    def _add_inputs(
        self, batch: int, key: Key, read: Sequence[torch.Tensor], originals: Sequence[torch.Tensor]
    ) -> None:
        width, text = read[0].shape[-1], self._text_of[batch] if self._text_of else 0
        if (sums := self._sums.setdefault(key, {}).get(text)) is None:
            sums = self._sums[key][text] = InputStatistics(
                key.parameter.removesuffix(".weight"),
                0,
                torch.zeros(width),
                torch.zeros(width) if self._peaks else None,
                torch.zeros(width, width) if self._products else None,
            )
        self._results.pop(key, None)
        sums.inverses.clear()
        for inputs, original in zip_longest(read, originals):
            _add(sums, inputs.reshape(-1, width).to(torch.float32), original)

    def get(self, key: Key) -> InputStatistics | None:
        """Return the statistics of a weight's inputs, one object for all weights with the same inputs; None if it was
        not used."""
        key = Key(self._leaders.get(key.parameter, key.parameter), key.matrix)
        # Several threads may request the same object.
        with self._turn:
            if key in self._sums and key not in self._results:
                parts = list(self._sums[key].values())
                for part in parts:
                    _complete(part)
                self._results[key] = _mix(parts) if self._text_of else parts[0]
            return self._results.get(key)

    def _drop_twins(self, seen: list[Seen]) -> dict[Key, list[torch.Tensor]]:
        """Keep each input tensor once, for the leader of the parameters that read it. The first batch determines the
        leaders, and all others wait for it."""
        read: dict[str, dict[tuple[Any, ...], tuple[Key, torch.Tensor]]] = {}
        for key, inputs in seen:
            read.setdefault(key.parameter, {})[key.matrix, _identify(inputs)] = key, inputs
        first: dict[tuple[Any, ...], str] = {}
        distinct: dict[Key, list[torch.Tensor]] = {}
        for parameter, tensors in read.items():
            leader = first.setdefault(tuple(tensors), parameter) if self.has_twins else parameter
            if self._leaders.setdefault(parameter, leader) != leader:
                raise BlockwiseUnsupported(
                    f"{parameter} and {self._leaders[parameter]} read the same inputs only in some batches"
                )
            if leader == parameter:
                for key, inputs in tensors.values():
                    distinct.setdefault(key, []).append(inputs)
        return distinct

    def _locate(self, key: Key, *, after: bool = False) -> tuple[float, float]:
        return self._order[key.parameter] + 1, key.matrix + after

    def _wait(self, batch: int, position: tuple[float, float]) -> None:
        """Wait until a batch has passed that position, if the batch exists."""
        with self._turn:
            while batch >= 0 and not self._passed.get(batch, (0, 0)) > position:
                self._check()
                self._turn.wait(TURN_SECONDS)

    def _pass(self, batch: int, position: tuple[float, float]) -> None:
        with self._turn:
            self._passed[batch] = position
            self._turn.notify_all()


def _add(sums: InputStatistics, rows: torch.Tensor, original: torch.Tensor | None) -> None:
    """Add inputs, float32 [tokens, in]. Only products above the diagonal are computed, in bands of rows; `_complete`
    mirrors them."""
    width = rows.shape[1]
    if original is not None:
        sums.drift = torch.zeros(width, width) if sums.drift is None else sums.drift
        sums.drift.addmm_((original.reshape(rows.shape).to(torch.float32) - rows).T, rows)
    sums.tokens += len(rows)
    if sums.products is None:
        sums.squares += torch.linalg.vector_norm(rows, dim=0).square_()
    else:
        for start in range(0, width, BAND):
            sums.products[start : start + BAND, start:].addmm_(rows[:, start : start + BAND].T, rows[:, start:])
    if sums.peaks is not None and len(rows):
        sums.peaks = torch.maximum(sums.peaks, rows.abs().amax(dim=0))


def _complete(sums: InputStatistics) -> None:
    """Fill in the products below the diagonal, and the squares, from the products above it."""
    if (products := sums.products) is not None:
        for start in range(0, len(products), BAND):
            stop = start + BAND
            products[stop:, start:stop] = products[start:stop, stop:].T
        sums.squares = products.diagonal().clone()


def _mix(parts: Sequence[InputStatistics]) -> InputStatistics:
    """Combine statistics of the same inputs in several texts, in place in those of the first text."""
    scales = [1 / max(float(part.squares.mean()), torch.finfo(torch.float32).tiny) for part in parts]

    def mix(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        known = [(tensor, scale) for tensor, scale in zip(tensors, scales, strict=True) if tensor is not None]
        for number, (tensor, scale) in enumerate(known):
            if number:
                known[0][0].add_(tensor, alpha=scale)
            else:
                tensor.mul_(scale)
        return known[0][0] if known else None

    tokens, squares = sum(part.tokens for part in parts), mix([part.squares for part in parts])
    assert squares is not None
    products, drift = mix([part.products for part in parts]), mix([part.drift for part in parts])
    return InputStatistics(parts[0].name, tokens, squares, products=products, drift=drift)
