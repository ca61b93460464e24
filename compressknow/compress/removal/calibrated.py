"""Choice of blocks and neurons to drop by the model's activations on the calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from compressknow.base.errors import CompressknowError
from compressknow.base.progress import Advance
from compressknow.compress.blocks import Pool, Reader
from compressknow.compress.calibrate.compression import describe_memory
from compressknow.compress.calibrate.gathering import InputSums, Key
from compressknow.compress.calibrate.model import Call, StreamedModel
from compressknow.compress.calibrate.walk import Batches, TargetVisitor, Visitor, find_tensors, run_text
from compressknow.compress.plan import Plan
from compressknow.compress.removal.neurons import choose_neurons, fit_down, write_cut
from compressknow.compress.removal.settings import Stack
from compressknow.compress.removal.smaller import Removal, remove
from compressknow.compress.sources import Sources
from compressknow.compress.steps import DropBlocks
from compressknow.compress.weights import Values
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import read_structure
from compressknow.model.structure import LinearWeight
from compressknow.model.tensors import StoredTensor, get_torch_dtype


def complete_removal(plan: Plan, batches: Batches, reader: Reader, folder: Path, advance: Advance) -> Removal:
    """Choose the blocks and neurons that a plan drops, and write the tensors that are cut.

    `batches` are the calibration text as arguments of forward passes; cut tensors are written to `folder`, which must
    exist until they are read. `advance` is called with the number of blocks that have run, and of all: each counts once
    for the choice of blocks, and once for that of neurons.

    Raises the errors of `remove`, `walk` and `fit_down`.
    """
    recipe, removal = plan.recipe, plan.removal
    assert removal is not None
    choice = _RemovalChoice(plan, batches, reader, advance)
    if any(not drop.is_decided for drop in removal.blocks):
        removal = remove(*removal.original, recipe, choice.measure_similarities)
    if removal.cuts:
        visitor = choice.select_neurons(removal, folder)
        tensors, unfitted = removal.checkpoint.tensors | visitor.fitted, dict[str, Values]()
        for name, cut in removal.cuts.items():
            remaining = cut.select(visitor.selected[cut.down.parameter])
            if cut.is_down:
                unfitted[name] = remaining
            else:
                pieces = (block.values for block in remaining.blocks(reader))
                tensors[name] = write_cut(removal.checkpoint, name, cut, pieces, folder)
        checkpoint = replace(removal.checkpoint, tensors=tensors)
        selected = {name: tuple(numbers.tolist()) for name, numbers in visitor.selected.items()}
        removal = replace(removal, checkpoint=checkpoint, selected=selected, unfitted=unfitted)
    return replace(removal, is_blockwise=choice.is_blockwise)


V = TypeVar("V", bound=Visitor)


class _RemovalChoice:
    """Choice of blocks and neurons, in one or more runs of the text through the model."""

    def __init__(self, plan: Plan, batches: Batches, reader: Reader, advance: Advance) -> None:
        self._plan, self._batches, self._reader, self._advance = plan, batches, reader, advance
        removal = plan.removal
        assert removal is not None
        runs = sum(isinstance(step, DropBlocks) and step.calibrated for step in plan.recipe.removals)
        # For each later run, how many blocks fewer than the first it has, as if all were dropped before it.
        fewer = sum(len(drop.dropped) * len(drop.lists) for drop in removal.blocks if not drop.is_decided)
        self._later, self._blocks_run = [fewer] * (runs + bool(removal.cuts) - 1), 0
        self._similarities: dict[int, _SimilarityVisitor] = {}
        self.is_blockwise = True

    def measure_similarities(self, checkpoint: Checkpoint, tree: PreTrainedModel, stack: Stack) -> tuple[float, ...]:
        """Measure the similarity of each block of a stack, as defined in `choose_blocks`."""
        if id(tree) not in self._similarities:
            self._similarities[id(tree)] = self._run(checkpoint, tree, _SimilarityVisitor)
        visitor = self._similarities[id(tree)]
        return tuple(visitor.average(f"{stack.name}.{number}") for number in range(stack.count))

    def select_neurons(self, removal: Removal, folder: Path) -> _NeuronVisitor:
        """Select the neurons of each feed-forward network, and write the weights that read them to `folder`."""
        return self._run(*removal.wide, partial(_NeuronVisitor, removal, folder))

    def _run(self, checkpoint: Checkpoint, tree: PreTrainedModel, make: Callable[[StreamedModel, Pool], V]) -> V:
        visitors: list[V] = []

        def make_visitor(streamed: StreamedModel, pool: Pool, whole: bool) -> Sequence[V]:
            self.is_blockwise &= not whole
            visitors.append(make(streamed, pool))
            return visitors[-1:]

        def report(done: int, total: int, _: float | None = None) -> None:
            blocks = len(visitors[-1].modules)
            later = sum(max(blocks - fewer, 0) for fewer in self._later)
            # If the model runs as a whole, `done` and `total` count batches.
            self._advance(self._blocks_run + blocks * done // total, self._blocks_run + blocks + later)

        sources, threads = Sources(checkpoint, tree, read_structure(tree)), self._reader.pool.threads
        why = partial(describe_memory, self._plan)
        run_text(tree, sources, self._reader.files, self._batches, make_visitor, why, threads=threads, advance=report)
        report(1, 1)
        self._blocks_run += len(visitors[-1].modules)
        self._later = self._later[1:]
        return visitors[-1]


class _SimilarityVisitor(Visitor):
    """Visitor that sums, for each block, the cosines between a token's hidden states before and after it."""

    def __init__(self, streamed: StreamedModel, _: Pool) -> None:
        self._streamed, self.modules = streamed, streamed.blocks
        self._cosines: dict[str, dict[int, tuple[float, int]]] = {}

    def average(self, module: str) -> float:
        """Return the mean over all tokens, added up batch by batch."""
        by_batch = self._cosines.get(module, {})
        sums = [by_batch[batch] for batch in sorted(by_batch)]
        if not sums:
            raise CompressknowError(f"The model does not run {module}, so its similarity cannot be measured.")
        return sum(cosines for cosines, _ in sums) / sum(tokens for _, tokens in sums)

    @property
    def is_done(self) -> bool:
        return len(self._cosines) == len(self.modules)

    def receive_output(self, module: str, batch: int, call: Call, output: Any) -> None:
        after = find_tensors(output)[0]
        inputs = find_tensors((*call.args, *call.kwargs.values()))
        if (before := next((tensor for tensor in inputs if tensor.shape == after.shape), None)) is None:
            raise CompressknowError(
                f"{module} has no hidden states of the same shape as its inputs, so its similarity cannot be measured.",
                hint="Name the blocks to drop.",
            )
        cosines = torch.cosine_similarity(before.to(torch.float64), after.to(torch.float64), dim=-1)
        self._cosines.setdefault(module, {})[batch] = float(cosines.sum()), cosines.numel()

    def run_whole(self, batches: Batches, advance: Advance) -> None:
        number = 0

        def record(name: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.receive_output(name, number, Call(name, args, kwargs), output)

        # The hooks stay, since the model is not used again.
        for name in self._streamed.blocks:
            self._streamed.model.get_submodule(name).register_forward_hook(partial(record, name), with_kwargs=True)
        for number, batch in enumerate(batches):
            self._streamed.run(batch)
            advance(number + 1, len(batches))


class _NeuronVisitor(TargetVisitor[LinearWeight]):
    """Visitor that selects the neurons of each block once their activations are known, so that the next block runs on
    the outputs of the remaining ones; if blocks are used several times, after all uses.

    Attributes
    ----------
    selected : the remaining neurons, int64, ascending, by the parameter name of the down projection.
    fitted : the down projections fitted to them, by stored name; written to files, as they may not fit in memory.
    """

    def __init__(self, removal: Removal, folder: Path, streamed: StreamedModel, pool: Pool) -> None:
        downs = [down for drop in removal.neurons for down in drop.networks]
        super().__init__(streamed, downs, waits=any(down.uses > 1 for down in downs))
        self._pool, self.modules = pool, streamed.blocks
        self._checkpoint, self._folder = removal.checkpoint, folder
        self._cuts = {cut.parameter: (name, cut) for name, cut in removal.cuts.items() if cut.is_down}
        self.selected: dict[str, torch.Tensor] = {}
        self.fitted: dict[str, StoredTensor] = {}

    def make_sums(self, targets: Sequence[LinearWeight]) -> InputSums:
        return InputSums([down.parameter for down in targets], products=True, peaks=False, check=self._pool.check)

    def act(self, targets: Sequence[LinearWeight], sums: InputSums, *_: Any) -> None:
        for down, (numbers, weight) in zip(targets, self._pool.map(partial(self._fit, sums), targets), strict=True):
            name, cut = self._cuts[down.parameter]
            self.selected[down.parameter] = numbers
            self.fitted[name] = write_cut(self._checkpoint, name, cut, [weight], self._folder)

    def _fit(self, sums: InputSums, down: LinearWeight) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the remaining neurons of a network, and the fitted weight that reads them, as stored; the model
        continues with it."""
        statistics = sums.get(Key(down.parameter))
        if statistics is None or statistics.products is None:
            raise CompressknowError(
                f"{down.module} received no input from the calibration text, so its neurons cannot be chosen.",
                hint="Prune instead: --scope feed-forward --prune 0.2.",
            )
        parameter = self._streamed.model.get_parameter(down.parameter).detach()
        weight = parameter.T if down.transposed else parameter
        cut = self._cuts[down.parameter][1]
        numbers, stored = choose_neurons(weight, statistics.squares, cut.drop.after), cut.source
        fitted = fit_down(weight, statistics.products, numbers, statistics.name).to(get_torch_dtype(stored.dtype))
        padded = torch.zeros(weight.shape)
        padded[:, numbers] = fitted.to(torch.float32)
        self._streamed.replace([(down.parameter, stored, (padded.T if down.transposed else padded).contiguous())])
        # The loaded block holds the values as long as they are needed.
        self._streamed.forget([stored])
        return numbers, fitted.T if down.transposed else fitted
