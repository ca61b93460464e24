"""What every Linear layer reads on a text, with nothing changed: block by block, as for compression."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressknow.compress.calibrate.forward import Call, NotApart
from compressknow.compress.calibrate.gathering import Key, MixedSums, Sums, Watch
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.calibrate.walk import memory_named, walk, whole_in_memory
from compressknow.compress.pool import Pool
from compressknow.compress.sources import Sources
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import structure_of
from compressknow.model.structure import LinearWeight
from compressknow.model.tensors import OpenFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batches = Sequence[Mapping[str, torch.Tensor]]
Told = Callable[[int, int], object]
AnySums = Sums | MixedSums
Visit = Callable[[dict[Key, InputStatistics], Pool], object]


def input_statistics(
    checkpoint: Checkpoint,
    tree: PreTrainedModel,
    batches: Batches,
    *,
    threads: int | None = None,
    folder: Path | None = None,
    told: Told = max,
) -> dict[Key, InputStatistics]:
    """The sums of squares of what each Linear weight is multiplied with, the final layer's included. See `observe`."""
    found: dict[Key, InputStatistics] = {}
    observe(checkpoint, tree, [batches], lambda seen, _: found.update(seen), threads=threads, folder=folder, told=told)
    return found


def observe(
    checkpoint: Checkpoint,
    tree: PreTrainedModel,
    texts: Sequence[Batches],
    visit: Visit,
    *,
    products: bool = False,
    threads: int | None = None,
    folder: Path | None = None,
    told: Told = max,
) -> None:
    """Show what each Linear weight is multiplied with, block by block; nothing is kept of a block that was visited.

    Parameters
    ----------
    checkpoint, tree : of floats, with its module tree on the meta device.
    texts : batches each, see `walk`. Of several, each counts as much as the others (`MixedSums`).
    visit : gets what was seen, by weight, or matrix of a stack of them, and a pool to work with; what the text does not
        reach is missing (experts, vision towers).
    products : whether X^T X is gathered too.
    folder : where large hidden states lie meanwhile.
    told : the blocks that are done, and in all.
    """
    structure = structure_of(tree)
    weights = [weight for weight in structure.linears if weight.group != "vision"]
    sources = Sources(checkpoint, tree, structure)
    batches = [batch for text in texts for batch in text]

    def make(weights: Iterable[LinearWeight], pool: Pool) -> AnySums:
        names = dict.fromkeys(weight.parameter for weight in weights)
        parts = [(len(text), Sums(names, products=products, peaks=False, check=pool.check)) for text in texts]
        return parts[0][1] if len(parts) == 1 else MixedSums(parts)

    with OpenFiles() as files, Pool(threads) as pool:
        try:
            with memory_named(structure.architecture, whole_in_memory), Pool(threads) as own:
                streamed = StreamedModel(tree, sources, files)
                visitor = _Observing(streamed.blocks, weights, own, make, visit)
                walk(streamed, batches, visitor, own, folder, lambda module: visitor.tell(module, told))
                visitor.finish()
        except NotApart:
            with memory_named(structure.architecture, whole_in_memory):
                streamed = StreamedModel(tree, sources, files, whole=True)
                sums = make(weights, pool)
                _sum_together(streamed, weights, batches, sums, told)
                visit(dict(_found(weights, sums)), pool)


def _found(weights: Iterable[LinearWeight], sums: AnySums) -> Iterator[tuple[Key, InputStatistics]]:
    for weight in weights:
        matrices = weight.shape[0] if len(weight.shape) > 2 else 1
        for key in (Key(weight.parameter, matrix) for matrix in range(matrices)):
            if (statistics := sums.of(key)) is not None:
                yield key, statistics


def _sum_together(
    streamed: StreamedModel, weights: Sequence[LinearWeight], batches: Batches, sums: AnySums, told: Told
) -> None:
    """The whole model at once."""
    parameters = {weight.parameter: streamed.model.get_parameter(weight.parameter) for weight in weights}
    for number, batch in enumerate(batches):
        with Watch(parameters) as watch:
            streamed.run(batch)
        sums.add(number, watch.seen)
        told(number + 1, len(batches))


class _Observing:
    """Visits blocks, and layers in no block, and shows what was summed of each."""

    def __init__(
        self,
        blocks: Sequence[str],
        weights: Sequence[LinearWeight],
        pool: Pool,
        make: Callable[[Iterable[LinearWeight], Pool], AnySums],
        visit: Visit,
    ) -> None:
        self._blocks, self._pool, self._make, self._visit = blocks, pool, make, visit
        self._targets: dict[str, list[LinearWeight]] = {}
        for weight in weights:
            self._targets.setdefault(self._place_of(weight), []).append(weight)
        # Of blocks that share their weights, all uses are seen.
        self._repeats = any(weight.uses > 1 or weight.sharing for weight in weights)
        self._sums: dict[str, AnySums] = {}
        self._left = set(self._targets)

    def _place_of(self, weight: LinearWeight) -> str:
        return next((block for block in self._blocks if f"{weight.module}.".startswith(f"{block}.")), weight.module)

    @property
    def alone(self) -> Collection[str]:
        """Single layers that lie in no block."""
        return [module for module in self._targets if module not in self._blocks]

    def watched(self, module: str) -> Collection[str]:
        """All Linear weights of a block."""
        return list(dict.fromkeys(weight.parameter for weight in self._targets.get(module, ())))

    def sums(self, module: str) -> AnySums:
        """Those of a block; kept from one use to the next."""
        if module not in self._sums:
            self._sums[module] = self._make(self._targets[module], self._pool)
        return self._sums[module]

    def visit(self, module: str, again: Callable[[], Any]) -> None:  # noqa: ARG002
        """Nothing is changed."""
        self._left.discard(module)
        if not self._repeats:
            self._show(module)

    def _show(self, module: str) -> None:
        self._visit(dict(_found(self._targets[module], self._sums.pop(module))), self._pool)

    def output(self, module: str, batch: int, call: Call, output: Any) -> None:
        """Nothing is learned from it."""

    def tell(self, module: str, told: Told) -> None:
        """Count a block that was seen."""
        if module in self._targets:
            told(len(self._targets) - len(self._left), len(self._targets))

    @property
    def done(self) -> bool:
        """When all were seen."""
        return not self._left and not self._repeats

    def finish(self) -> None:
        """Show what was to wait for further uses. Raises NotApart where the model does not run a block, or its head, as
        a module."""
        for module in self._left:
            if module in self._blocks or any(weight.group == "final" for weight in self._targets[module]):
                raise NotApart(f"the model does not run {module}")
        for module in list(self._sums):
            self._show(module)
