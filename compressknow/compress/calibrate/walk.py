"""The blocks of a model, one after the other, over all of the calibration text: to compress them, or only to observe.

Whatever code a model runs between its blocks, it runs itself, each pass in a thread of its own: nothing is known here
of masks, positions, caches or encoders. So any model whose blocks are modules can be run with one block in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import Cache

from compressknow.base.errors import CompressknowError, lacks_memory
from compressknow.base.format import size
from compressknow.compress.calibrate.forward import Call, ForwardPass, NotApart, failing_apart, stopping_before
from compressknow.compress.calibrate.gathering import Key, MixedSums, Sums, Watch
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.pool import Pool
from compressknow.compress.sources import Sources
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import structure_of
from compressknow.model.structure import LinearWeight
from compressknow.model.tensors import OpenFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Hidden states of more than this lie in files between the blocks.
MOST_BYTES_IN_MEMORY = 1 << 30


class Visitor(Protocol):
    """What is done on the way."""

    @property
    def alone(self) -> Collection[str]:
        """Modules in no block to stop before, too: single Linear layers."""

    def watched(self, module: str) -> Collection[str]:
        """The parameters of a block (or single layer) whose inputs are to be seen; none where nothing is to be done."""

    def sums(self, module: str) -> Sums | MixedSums:
        """Where the sums over the inputs of what is watched go."""

    def visit(self, module: str, again: Callable[[], Any]) -> None:
        """All batches were seen. The module's weights are loaded; those that change are changed for what follows.
        `again` runs the module on the first batch once more, and gives its output."""

    def output(self, module: str, batch: int, call: Call, output: Any) -> None:
        """What a block has made of a batch, as the next block will see it."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to do, so that the rest of the model need not be run."""


def walk(
    streamed: StreamedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
    visitor: Visitor,
    pool: Pool,
    folder: Path | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the batches through the model side by side, block by block, and have each visited.

    Every batch is computed by one thread alone, so that results do not depend on how many there are.

    Parameters
    ----------
    batches : keyword arguments of the model's forward function: ``input_ids`` int64 [sequences, tokens], and
        ``decoder_input_ids`` where it has a decoder.
    folder : where hidden states that are large lie meanwhile; in memory without one.
    on_progress : called with the name of each block when it is done.

    Raises
    ------
    CompressknowError : a block gives NaN or infinities, or there is no memory for it.
    NotApart : the model cannot be run so.
    """
    passes = [ForwardPass(streamed.model, batch) for batch in batches]
    stops = [*streamed.blocks, *visitor.alone]
    tokens = sum(tensor.numel() for batch in batches for tensor in batch.values())
    with ExitStack() as stack:
        forwards = stack.enter_context(stopping_before(streamed.model, stops))
        for each in passes:
            stack.callback(each.close)
        calls = pool.map(ForwardPass.advance, passes)
        streamed.let_go()
        parking = _Parking(folder, tokens)
        while (module := _same(calls)) is not None:
            step = _Step(streamed, module, forwards[module], visitor, pool, parking)
            with memory_named(module, partial(_needs, streamed, module)):
                calls = step.take(passes, [call for call in calls if call])
            streamed.let_go()
            on_progress(module)
            if visitor.done:
                break


def _same(calls: Sequence[Call | None]) -> str | None:
    """Where all passes stand; None at the end of the model."""
    names = {call and call.module for call in calls}
    if len(names) != 1:
        raise NotApart(f"the model takes other ways for other batches: to {names}")
    return names.pop()


class _Step:
    """One block, or single layer, before which all passes stand."""

    def __init__(
        self,
        streamed: StreamedModel,
        module: str,
        forward: Callable[..., Any],
        visitor: Visitor,
        pool: Pool,
        parking: _Parking,
    ) -> None:
        self._streamed, self._module, self._forward = streamed, module, forward
        self._visitor, self._pool, self._parking = visitor, pool, parking

    def take(self, passes: Sequence[ForwardPass], calls: Sequence[Call]) -> list[Call | None]:
        """The same passes one stop later; nothing where nothing is left to do."""
        with self._streamed.loaded(self._module):
            if names := self._visitor.watched(self._module):
                self._gather(names, calls)
                self._visitor.visit(self._module, lambda: self._run(_own(calls[0])))
                if self._visitor.done:
                    return []
            return self._pool.map(self._on, list(enumerate(zip(passes, calls, strict=True))))

    def _gather(self, names: Collection[str], calls: Sequence[Call]) -> None:
        weights = {name: self._streamed.model.get_parameter(name) for name in names}
        sums = self._visitor.sums(self._module)
        sums.begin()

        def gather(numbered: tuple[int, Call]) -> None:
            number, call = numbered
            watch = self._watched(weights, call, copies=False)
            if watch.overwritten:
                watch = self._watched(weights, call, copies=True)
            sums.add(number, watch.seen)

        self._pool.map(gather, list(enumerate(calls)))

    def _watched(self, weights: Mapping[str, torch.Tensor], call: Call, *, copies: bool) -> Watch:
        watch = Watch(weights, copies=copies)
        with watch:
            self._run(_own(call))
        return watch

    def _on(self, numbered: tuple[int, tuple[ForwardPass, Call]]) -> Call | None:
        number, (forward_pass, call) = numbered
        output = self._run(call)
        self._visitor.output(self._module, number, call, output)
        return forward_pass.advance(self._parking.park(output))

    def _run(self, call: Call) -> Any:
        self._pool.check()
        with torch.no_grad(), failing_apart():
            output = self._forward(*call.args, **call.kwargs)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(output)[:1]):
            raise CompressknowError(
                f"{self._module} gives NaN or infinities on the calibration text.",
                why="So nothing can be learned of what its layers read.",
                hint="See that the checkpoint is whole: `compressknow probe` it, or take another calibration text.",
            )
        return output


def tensors_in(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of what a module gives; its hidden states come first."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors_in(value)]


def _own(call: Call) -> Call:
    """A call that may write into what it is given: it will be run once more."""
    return Call(call.module, tuple(map(_copy, call.args)), {key: _copy(value) for key, value in call.kwargs.items()})


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.deepcopy(value) if isinstance(value, Cache) else value


class _Parking:
    """Where hidden states wait for the next block: in memory, or in files that the system writes out where it must."""

    def __init__(self, folder: Path | None, tokens: int) -> None:
        self._folder, self._tokens, self._numbers = folder, tokens, count()

    def park(self, output: Any) -> Any:
        """The same values of a block's output."""
        if isinstance(output, torch.Tensor) and output.dim() > 1:
            large = self._tokens * output.shape[-1] * output.itemsize > MOST_BYTES_IN_MEMORY
            return self._in_file(output) if large and self._folder else output
        if isinstance(output, tuple) and output and type(output) is tuple:
            return (self.park(output[0]), *output[1:])
        return output

    def _in_file(self, output: torch.Tensor) -> torch.Tensor:
        assert self._folder is not None
        path = self._folder / f".hidden-{next(self._numbers)}"
        kept = torch.from_file(str(path), shared=True, size=output.numel(), dtype=output.dtype).view(output.shape)
        # The mapping lives as long as the tensor, also without its name (but on Windows, where the folder goes later).
        with suppress(OSError):
            path.unlink()
        return kept.copy_(output)


def whole_in_memory() -> str:
    """Why a model takes much memory."""
    return "Its blocks cannot be run one by one, so that all of it must be in memory, in float32."


@contextmanager
def memory_named(what: str, why: Callable[[], str]) -> Iterator[None]:
    """What fails for want of memory meanwhile says of what, and why that takes so much."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        hint = "Take fewer --calibration-tokens, a method that looks at weights alone, or another machine."
        raise CompressknowError(f"There is no memory to calibrate {what}.", why(), hint) from error


def _needs(streamed: StreamedModel, module: str) -> str:
    numel = sum(parameter.numel() for parameter in streamed.model.get_submodule(module).parameters())
    return f"Its weights alone take {size(4 * numel)} in float32, and what is gathered of their inputs more."


Batches = Sequence[Mapping[str, torch.Tensor]]


Report = Callable[[int, int], object]


AnySums = Sums | MixedSums


Visit = Callable[[dict[Key, InputStatistics], Pool], object]


def input_statistics(
    checkpoint: Checkpoint,
    tree: PreTrainedModel,
    batches: Batches,
    *,
    threads: int | None = None,
    folder: Path | None = None,
    on_progress: Report = max,
) -> dict[Key, InputStatistics]:
    """The sums of squares of what each Linear weight is multiplied with, the final layer's included. See `observe`."""
    found: dict[Key, InputStatistics] = {}
    observe(
        checkpoint,
        tree,
        [batches],
        lambda seen, _: found.update(seen),
        threads=threads,
        folder=folder,
        on_progress=on_progress,
    )
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
    on_progress: Report = max,
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
    on_progress : the blocks that are done, and in all.
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
                walk(streamed, batches, visitor, own, folder, lambda module: visitor.tell(module, on_progress))
                visitor.finish()
        except NotApart:
            with memory_named(structure.architecture, whole_in_memory):
                streamed = StreamedModel(tree, sources, files, whole=True)
                sums = make(weights, pool)
                _sum_together(streamed, weights, batches, sums, on_progress)
                visit(dict(_found(weights, sums)), pool)


def _found(weights: Iterable[LinearWeight], sums: AnySums) -> Iterator[tuple[Key, InputStatistics]]:
    for weight in weights:
        matrices = weight.shape[0] if len(weight.shape) > 2 else 1
        for key in (Key(weight.parameter, matrix) for matrix in range(matrices)):
            if (statistics := sums.of(key)) is not None:
                yield key, statistics


def _sum_together(
    streamed: StreamedModel, weights: Sequence[LinearWeight], batches: Batches, sums: AnySums, on_progress: Report
) -> None:
    """The whole model at once."""
    parameters = {weight.parameter: streamed.model.get_parameter(weight.parameter) for weight in weights}
    for number, batch in enumerate(batches):
        with Watch(parameters) as watch:
            streamed.run(batch)
        sums.add(number, watch.seen)
        on_progress(number + 1, len(batches))


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

    def tell(self, module: str, on_progress: Report) -> None:
        """Count a block that was seen."""
        if module in self._targets:
            on_progress(len(self._targets) - len(self._left), len(self._targets))

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
