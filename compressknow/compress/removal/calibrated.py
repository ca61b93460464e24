"""TODO"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressknow.base.errors import CompressknowError
from compressknow.compress.blocks import Reader
from compressknow.compress.calibrate.forward import Call, NotApart
from compressknow.compress.calibrate.gathering import Key, Sums, Watch
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.compress.calibrate.walk import memory_named, tensors_in, walk, whole_in_memory
from compressknow.compress.pool import Pool
from compressknow.compress.recipe import Recipe
from compressknow.compress.removal.neurons import FeedForward
from compressknow.compress.removal.settings import Stack
from compressknow.compress.removal.smaller import KeptNeurons, Removal, cut_tensors, remove
from compressknow.compress.sources import Sources
from compressknow.compress.steps import DropBlocks
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import structure_of
from compressknow.model.tensors import torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Of the mean diagonal of X^T X; the second where the first is too little.
DAMPING = (0.01, 0.1)


def blocks_to_drop(similarities: Sequence[float], number: int) -> tuple[int, ...]:
    """The blocks that change their input least, ascending.

    Parameters
    ----------
    similarities : of each block, the mean over tokens of the cosine between a token's hidden state before and after it.
        1 - that is the block's influence (Men et al. 2024, ShortGPT, arXiv 2403.03853, section 3.2).
    number : how many. Of equal ones the first go.

    >>> blocks_to_drop([0.5, 0.9, 0.8, 0.9], 2)
    (1, 3)
    """
    order = sorted(range(len(similarities)), key=lambda block: (-similarities[block], block))
    return tuple(sorted(order[:number]))


def neurons_to_keep(down: torch.Tensor, squares: torch.Tensor, number: int) -> torch.Tensor:
    """The neurons that give most to the output, int64 [number], ascending.

    A neuron's score is the norm of its activations times the norm of the weights that read it,
    ||h_j||_2 * ||W[:, j]||_2: the Frobenius norm of what it adds to the output, over all tokens.

    Parameters
    ----------
    down : float [out, in], the weight of the down projection; `in` counts neurons.
    squares : float [in], the sum over tokens of each activation's square.
    number : how many. Of equal ones the first stay.
    """
    scores = squares.to(torch.float64).sqrt() * torch.linalg.vector_norm(down.to(torch.float64), dim=0)
    best = torch.sort(scores, descending=True, stable=True).indices[:number]
    return torch.sort(best).values


def fit(down: torch.Tensor, products: torch.Tensor, kept: torch.Tensor, name: str = "") -> torch.Tensor:
    """The down projection of the kept neurons that gives most nearly what all of them gave, float32 [out, len(kept)].

    Least squares over the calibration tokens: with H = X^T X, it is W' = W H[:, S] H[S, S]^-1. Damped, it is drawn
    towards the weights that it had, so that a neuron which the text never woke keeps them:
    W' = W[:, S] + W[:, D] H[D, S] (H[S, S] + damping)^-1, for kept neurons S and dropped ones D.

    Parameters
    ----------
    down : float [out, in]. products : float [in, in], H. kept : int64, ascending.
    name : of the module, for errors.

    Raises
    ------
    CompressknowError : H[S, S] has no inverse even with a damping of 10 % of its mean diagonal.
    """
    gone = torch.ones(down.shape[1], dtype=torch.bool)
    gone[kept] = False
    weight = down.to(torch.float64)
    inner = products[kept][:, kept].to(torch.float64)
    target = weight[:, gone] @ products[gone][:, kept].to(torch.float64)
    mean = float(inner.diagonal().mean())
    for damping in DAMPING:
        factor, failed = torch.linalg.cholesky_ex(inner + torch.eye(len(kept), dtype=torch.float64) * (damping * mean))
        if mean > 0 and not int(failed):
            change = torch.cholesky_solve(target.T, factor).T
            return (weight[:, kept] + change).to(torch.float32)
    raise CompressknowError(
        f"What was seen of the neurons of {name} has no inverse.",
        why="Their activations on the calibration text are zero, infinite, or all alike.",
        hint="Calibrate on more text.",
    )


Batches = Sequence[Mapping[str, torch.Tensor]]


def decide(
    removal: Removal,
    recipe: Recipe,
    batches: Batches,
    reader: Reader,
    folder: Path,
    on_progress: Callable[[int, int], object] = max,
) -> Removal:
    """Choose blocks and neurons, and write the tensors that are cut.

    Parameters
    ----------
    removal : of the recipe, as `remove` gives it from headers alone.
    batches : the calibration text, as arguments of forward passes.
    folder : where cut tensors and large hidden states lie; it must stay until the tensors were read.
    on_progress : the blocks that were run, and in all: each once for the blocks to drop, and once for the neurons.

    Raises what `remove`, `walk` and `fit` do.
    """
    open_blocks = any(not drop.known for drop in removal.blocks)
    run = _Run(batches, reader, folder, on_progress, _later_blocks(removal, recipe))
    if open_blocks:
        removal = remove(*removal.given, recipe, run.similarities)
    if removal.cuts:
        chosen = run.neurons(removal)
        cut, unfitted = cut_tensors(reader, removal, chosen, folder)
        tensors = {name: cut.get(name, tensor) for name, tensor in removal.checkpoint.tensors.items()}
        kept = {name: tuple(neurons.numbers.tolist()) for name, neurons in chosen.items()}
        smaller = replace(removal.checkpoint, tensors=tensors)
        removal = replace(removal, checkpoint=smaller, kept=kept, unfitted=unfitted)
    return replace(removal, decided=True, apart=run.are_apart)


def _later_blocks(removal: Removal, recipe: Recipe) -> list[int]:
    """How many blocks fewer than the first pass each later one has, as if all went before it."""
    by_similarity = sum(isinstance(step, DropBlocks) and step.named is None for step in recipe.removals)
    gone = sum(len(drop.dropped) * len(drop.stack.lists) for drop in removal.blocks if not drop.known)
    return [gone] * (by_similarity + bool(removal.cuts) - 1)


class _Run:
    def __init__(
        self,
        batches: Batches,
        reader: Reader,
        folder: Path,
        on_progress: Callable[[int, int], object],
        later: list[int],
    ) -> None:
        self._batches, self._reader, self._folder = batches, reader, folder
        self._on_progress, self._later, self._run = on_progress, later, 0
        self._found: dict[int, _Similarities] = {}
        self.are_apart = True

    def similarities(self, checkpoint: Checkpoint, tree: PreTrainedModel, stack: Stack) -> tuple[float, ...]:
        """Of each block of a stack, see `choice.blocks_to_drop`."""
        if id(tree) not in self._found:
            visitor = self._found[id(tree)] = _Similarities()
            self._walk(checkpoint, tree, visitor)
        return tuple(self._found[id(tree)].of(f"{stack.name}.{number}") for number in range(stack.count))

    def neurons(self, removal: Removal) -> dict[str, KeptNeurons]:
        """What stays of each feed-forward network, by the parameter name of its down projection."""
        visitor = _Neurons(removal)
        self._walk(*removal.wide, visitor)
        return visitor.kept

    def _walk(self, checkpoint: Checkpoint, tree: PreTrainedModel, visitor: _Similarities | _Neurons) -> None:
        sources, name = Sources(checkpoint, tree, structure_of(tree)), type(tree).__name__
        try:
            # What fails stops its pool.
            with memory_named(name, _outside), Pool(self._reader.pool.threads) as pool:
                visitor.streamed, visitor.pool = StreamedModel(tree, sources, self._reader.files), pool
                on_progress = partial(self._tell, visitor.streamed.blocks, [])
                walk(visitor.streamed, self._batches, visitor, pool, self._folder, on_progress)
                visitor.finish()
        except NotApart:
            self.are_apart = False
            visitor.clear()
            with memory_named(name, whole_in_memory):
                visitor.streamed = StreamedModel(tree, sources, self._reader.files, whole=True)
                visitor.pool = self._reader.pool
                visitor.together(visitor.streamed, self._batches)
                visitor.finish()
        self._run += len(visitor.streamed.blocks)
        self._on_progress(self._run, self._run + self._to_come(visitor.streamed.blocks))
        self._later = self._later[1:]

    def _tell(self, blocks: Sequence[str], seen: list[str], module: str) -> None:
        seen.append(module)
        done = self._run + min(len(seen), len(blocks))
        self._on_progress(done, self._run + len(blocks) + self._to_come(blocks))

    def _to_come(self, blocks: Sequence[str]) -> int:
        """Of the passes after this one."""
        return sum(max(len(blocks) - fewer, 0) for fewer in self._later)


def _outside() -> str:
    return "A block and all that lies outside the blocks is in memory, in float32, beside what is gathered."


class _Similarities:
    """Sums up, for each block, the cosines between what a token's hidden state was and what the block made of it."""

    streamed: StreamedModel
    pool: Pool
    alone: Collection[str] = ()
    done = False

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, tuple[float, int]]] = {}

    def of(self, module: str) -> float:
        """The mean over all tokens, batch by batch."""
        own = [self._sums[module][batch] for batch in sorted(self._sums.get(module, {}))]
        if not own:
            raise CompressknowError(f"The model does not run {module}, so how much it changes cannot be told.")
        return sum(cosines for cosines, _ in own) / sum(tokens for _, tokens in own)

    def clear(self) -> None:
        """Begin anew."""
        self._sums.clear()

    def watched(self, module: str) -> Collection[str]:  # noqa: ARG002
        """No weight is of interest."""
        return ()

    def sums(self, module: str) -> Sums:
        """Nothing is watched."""
        raise AssertionError(module)

    def visit(self, module: str, again: Callable[[], Any]) -> None:
        """Nothing is changed."""

    def output(self, module: str, batch: int, call: Call, output: Any) -> None:
        """Compare what came in with what goes out."""
        after = tensors_in(output)[0]
        given = (tensor for tensor in tensors_in((*call.args, *call.kwargs.values())) if tensor.shape == after.shape)
        if (before := next(given, None)) is None:
            raise CompressknowError(
                f"{module} gives no hidden states of the shape that it is given, so how much it "
                "changes them cannot be told.",
                hint="Name the blocks to drop.",
            )
        cosines = torch.cosine_similarity(before.to(torch.float64), after.to(torch.float64), dim=-1)
        self._sums.setdefault(module, {})[batch] = float(cosines.sum()), cosines.numel()

    def together(self, streamed: StreamedModel, batches: Batches) -> None:
        """The same of a model that is in memory as a whole."""
        number = 0

        def note(name: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.output(name, number, Call(name, args, kwargs), output)

        hooks = [
            streamed.model.get_submodule(name).register_forward_hook(partial(note, name), with_kwargs=True)
            for name in streamed.blocks
        ]
        for number, batch in enumerate(batches):  # noqa: B007  (`note` reads it)
            streamed.run(batch)
        for hook in hooks:
            hook.remove()

    def finish(self) -> None:
        """Nothing waits."""


class _Neurons:
    """Chooses the neurons of each block as soon as it has seen what they do, and lets the next see what is left; those
    of a block that is used several times after all of its uses."""

    streamed: StreamedModel
    pool: Pool
    alone: Collection[str] = ()

    def __init__(self, removal: Removal) -> None:
        self._stored = {cut.parameter: cut.source for cut in removal.cuts.values()}
        self._after = {n.down.parameter: drop.after for drop in removal.neurons for n in drop.networks}
        self._networks = [network for drop in removal.neurons for network in drop.networks]
        self._sums: dict[str, Sums] = {}
        self.kept: dict[str, KeptNeurons] = {}

    @property
    def done(self) -> bool:
        """When all networks are cut."""
        return len(self.kept) == len(self._networks)

    def clear(self) -> None:
        """Begin anew."""
        self._sums.clear()
        self.kept.clear()

    def watched(self, module: str) -> Collection[str]:
        """The projections that read the neurons of a block."""
        return [network.down.parameter for network in self._in(module)]

    def sums(self, module: str) -> Sums:
        """Those of a block; kept from one use to the next."""
        if module not in self._sums:
            order = [network.down.parameter for network in self._in(module)]
            self._sums[module] = Sums(order, products=True, peaks=False, check=self.pool.check)
        return self._sums[module]

    def visit(self, module: str, again: Callable[[], Any]) -> None:  # noqa: ARG002
        """Cut the networks of a block, unless it will be used again."""
        once = [network for network in self._in(module) if network.down.uses == 1]
        self.pool.map(partial(self._cut, self._sums[module]), once)
        if once:
            del self._sums[module]

    def output(self, module: str, batch: int, call: Call, output: Any) -> None:
        """Nothing is learned from it."""

    def together(self, streamed: StreamedModel, batches: Batches) -> None:
        """Of a model that is in memory as a whole: every block sees what the original gave it."""
        order = [network.down.parameter for network in self._networks]
        sums = Sums(order, products=True, peaks=False, check=self.pool.check)
        weights = {name: streamed.model.get_parameter(name) for name in order}
        for number, batch in enumerate(batches):
            with Watch(weights) as watch:
                streamed.run(batch)
            sums.add(number, watch.seen)
        self.pool.map(partial(self._cut, sums), self._networks)

    def finish(self) -> None:
        """Cut what waited."""
        for module in list(self._sums):
            waited = [network for network in self._in(module) if network.down.parameter not in self.kept]
            with self.streamed.loaded(module):
                self.pool.map(partial(self._cut, self._sums[module]), waited)
        if lacking := [n.down.module for n in self._networks if n.down.parameter not in self.kept]:
            raise CompressknowError(
                f"{lacking[0]} has read nothing on the calibration text, so its neurons cannot be chosen.",
                hint="Prune instead: --scope feed-forward --prune 0.2.",
            )

    def _in(self, module: str) -> list[FeedForward]:
        return [network for network in self._networks if f"{network.down.module}.".startswith(f"{module}.")]

    def _cut(self, sums: Sums, network: FeedForward) -> None:
        parameter, transposed = network.down.parameter, network.down.transposed
        if (seen := sums.of(Key(parameter))) is None:
            return
        assert seen.products is not None
        held = self.streamed.model.get_parameter(parameter).detach()
        down = held.T if transposed else held
        numbers = neurons_to_keep(down, seen.squares, self._after[parameter])
        stored = self._stored[parameter]
        # As it will be written.
        fitted = fit(down, seen.products, numbers, seen.name).to(torch_dtype(stored.dtype)).to(torch.float32)
        self.kept[parameter] = KeptNeurons(numbers, fitted)
        left = torch.zeros(down.shape)
        left[:, numbers] = fitted
        self.streamed.replace(parameter, stored, (left.T if transposed else left).contiguous())
        # The block holds it as long as it is needed.
        self.streamed.forget([stored])
