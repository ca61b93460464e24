"""Walk over the blocks of a model with all of the calibration text, to compress or observe them.

Each pass runs in its own thread (`compressknow.compress.calibrate.model`), and all stop before a block. There a visitor
sees the block's inputs and may change its weights; then the block runs, and the passes go on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from transformers import Cache, PreTrainedModel

from compressknow.base.errors import CompressknowError
from compressknow.base.format import write_size
from compressknow.base.progress import Advance, ignore_advance
from compressknow.base.reading import group_by
from compressknow.base.system import trim_heap
from compressknow.compress.blocks import Pool
from compressknow.compress.calibrate.gathering import AllSeen, InputRecorder, InputStatistics, InputSums, Key
from compressknow.compress.calibrate.model import (
    WHOLE_IN_MEMORY,
    BlockwiseUnsupported,
    Call,
    ForwardPass,
    StreamedModel,
    explain_missing_memory,
    intercept,
    translate_failures,
)
from compressknow.compress.plan import PlannedTensor
from compressknow.compress.sources import Sources
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.groups import read_structure
from compressknow.model.structure import LinearWeight
from compressknow.model.tensors import OpenFiles

TAKEN = "Its weights alone take {} in float32, and the statistics of their inputs take more."
Batches = Sequence[Mapping[str, torch.Tensor]]
# Takes the statistics of a block's inputs, its weights if they may be changed, and a pool for the work.
Visit = Callable[[dict[Key, InputStatistics], Mapping[str, torch.Tensor], Pool], object]


class Visitor:
    """Visitor of a walk; this base class watches nothing, and changes nothing."""

    # Single Linear layers outside the blocks, before which passes also stop.
    lone_layers: Collection[str] = ()
    # Modules whose runs are counted as progress.
    modules: Collection[str] = ()
    # Whether each batch runs twice, in parallel: first through the original, then through the changed model.
    pairs = False

    @property
    def is_done(self) -> bool:
        """True if all work is done, so that the rest of the model need not run."""
        return False

    def enter(self, module: str) -> None:
        """Change the weights of a module, which are loaded, before any batch runs through it."""

    def list_watched(self, module: str) -> Collection[str]:  # noqa: ARG002
        """Return the parameters of a block (or lone layer) to watch; if there are none, it is not visited."""
        return ()

    def get_sums(self, module: str) -> InputSums:
        """Return the sums to which the inputs of watched parameters are added."""
        raise NotImplementedError(module)

    def keeps_output(self, module: str, batch: int) -> bool:  # noqa: ARG002
        """Tell whether a watched module's output is what the next module reads. Otherwise it runs once more: its
        weights were changed, or its output is too large to keep for all batches."""
        return False

    def visit(self, module: str, rerun: Callable[[], Any]) -> None:
        """Act on the inputs of all batches. The module's weights are loaded, and may be changed. `rerun` runs the
        module again on the first batch, and returns its output."""

    def receive_output(self, module: str, batch: int, call: Call, output: Any) -> None:
        """Receive the final output of a module for a batch, as the next one will read it."""

    def finish(self) -> None:
        """Do the work that had to wait. Raises BlockwiseUnsupported if the model does not run all blocks."""

    def run_whole(self, batches: Batches, advance: Advance) -> None:
        """Run a whole model in memory, instead of a walk: every layer reads the outputs of original layers."""
        raise NotImplementedError


T = TypeVar("T", bound=LinearWeight | PlannedTensor)


def group_by_block(streamed: StreamedModel, targets: Iterable[T]) -> dict[str, list[T]]:
    """Return targets by the blocks that contain them, or by their own modules if none does."""
    groups: dict[str, list[T]] = {}
    for target in targets:
        for block in dict.fromkeys(map(streamed.find_block, target.modules)):
            groups.setdefault(block, []).append(target)
    return groups


def _find_homes(streamed: StreamedModel, targets: Iterable[T]) -> dict[str, str]:
    """Return, by block, the first block that shares targets with it (as in Zamba); for most blocks, itself."""
    homes: dict[str, str] = {}
    for target in targets:
        first, *merged = dict.fromkeys(
            homes.setdefault(block, block) for block in map(streamed.find_block, target.modules)
        )
        if merged:
            homes = {block: first if home in merged else home for block, home in homes.items()}
    return homes


class TargetVisitor(Visitor, Generic[T]):
    """Visitor that sums up the inputs of its targets, and acts on those of a module after all batches, or, if it
    `waits` for repeated uses, at the end. Blocks that share targets count as one."""

    def __init__(self, streamed: StreamedModel, targets: Sequence[T], *, waits: bool = False) -> None:
        self._streamed, self._by_module, self._waits = streamed, group_by_block(streamed, targets), waits
        self._homes = _find_homes(streamed, targets)
        self._targets = group_by(targets, lambda target: self._homes[streamed.find_block(target.modules[0])])
        self.modules = list(self._by_module)
        self.lone_layers = [module for module in self._by_module if module not in streamed.blocks]
        self._sums: dict[str, InputSums] = {}
        self._unvisited = dict.fromkeys(self._targets)

    def make_sums(self, targets: Sequence[T]) -> InputSums:
        """Create the sums over the inputs of targets that are visited together."""
        raise NotImplementedError

    def list_watched(self, module: str) -> Collection[str]:
        return list(dict.fromkeys(target.parameter for target in self._by_module.get(module, ())))

    def get_sums(self, module: str) -> InputSums:
        """Return the sums of a module, the same from one use of it to the next."""
        home = self._homes[module]
        if home not in self._sums:
            self._sums[home] = self.make_sums(self._targets[home])
            # A block may also have layers that it does not share.
            self._sums[home].has_twins = list(self._homes.values()).count(home) == 1
        return self._sums[home]

    @property
    def is_done(self) -> bool:
        return not self._unvisited

    def visit(self, module: str, rerun: Callable[[], Any]) -> None:
        if not self._waits:
            self._act_on(module, rerun)

    def finish(self) -> None:
        for module in list(self._unvisited):
            is_needed = module in self._streamed.blocks or any(each.group == "final" for each in self._targets[module])
            if is_needed and module not in self._sums:
                # The model uses the weights of this block or head elsewhere.
                raise BlockwiseUnsupported(f"the model does not run {module}")
            with self._streamed.load(module):
                self._act_on(module, None)

    def _act_on(self, module: str, rerun: Callable[[], Any] | None) -> None:
        self._unvisited.pop(module, None)
        self.act(self._targets[module], self.get_sums(module), module, rerun)
        del self._sums[module]

    def run_whole(self, batches: Batches, advance: Advance) -> None:
        self.pairs = False
        targets = [target for group in self._targets.values() for target in group]
        sums = self.make_sums(targets)
        weights = {target.parameter: self._streamed.model.get_parameter(target.parameter) for target in targets}
        for number, batch in enumerate(batches):
            with InputRecorder(weights) as watch:
                self._streamed.run(batch)
            sums.add(number, watch.seen)
            advance(number + 1, len(batches))
        self.act(targets, sums, None, None)

    def act(self, targets: Sequence[T], sums: InputSums, module: str | None, rerun: Callable[[], Any] | None) -> None:
        """Act on the targets of a loaded module, or of the whole model if it is None. `rerun` is as in `visit`, or None
        if the module does not run again."""
        raise NotImplementedError


def run_text(
    tree: PreTrainedModel,
    sources: Sources,
    files: OpenFiles,
    batches: Batches,
    make: Callable[[StreamedModel, Pool, bool], Sequence[Visitor]],
    why: Callable[[], str],
    *,
    threads: int | None,
    advance: Advance,
) -> None:
    """Run a text through a model in a walk for each visitor, or through the whole model in memory if its blocks cannot
    be run one by one. Raises the errors of `walk`, except BlockwiseUnsupported; for a whole model, CheckpointError for
    any weight that is NaN or infinite.

    `make` creates the visitors of a model, given a pool for their work and whether the model runs as a whole; `why`
    explains a lack of memory. `advance` is called with the number of the visitors' modules that have run, and of all;
    with numbers of batches, if the model runs as a whole.
    """
    name = type(tree).__name__
    try:
        # An error stops the pool.
        with explain_missing_memory(name, why), Pool(threads) as pool:
            streamed = StreamedModel(tree, sources, files)
            visitors = make(streamed, pool, False)
            modules, done = {module for visitor in visitors for module in visitor.modules}, set[str]()

            def report(module: str) -> None:
                if module in modules:
                    done.add(module)
                    advance(len(done), len(modules))

            for visitor in visitors:
                walk(streamed, [batch for batch in batches for _ in range(1 + visitor.pairs)], visitor, pool, report)
                visitor.finish()
    except BlockwiseUnsupported:
        with explain_missing_memory(name, lambda: WHOLE_IN_MEMORY), Pool(threads) as pool:
            streamed = StreamedModel(tree, sources, files, whole=True)
            # No block stops here, so that its output could be looked at.
            streamed.check_stored(pool)
            for visitor in make(streamed, pool, True):
                visitor.run_whole(batches, advance)


def walk(
    streamed: StreamedModel,
    batches: Batches,
    visitor: Visitor,
    pool: Pool,
    on_module: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the batches through the model in parallel, block by block, and let the visitor visit each block.

    Every batch is computed by a single thread, so that results do not depend on the number of threads.

    `batches` are keyword arguments of the model's forward function: ``input_ids`` int64 [sequences, tokens], and
    ``decoder_input_ids`` if it has a decoder. `on_module` is called with each block, or lone layer, that has run.

    Raises CheckpointError naming a weight that is NaN or infinite if a block's output is, CompressknowError if only
    the output is or a block needs too much memory, BlockwiseUnsupported if the model cannot be run this way.
    """
    passes = [ForwardPass(streamed.model, batch, number) for number, batch in enumerate(batches)]
    with intercept(streamed.model, [*streamed.blocks, *visitor.lone_layers], passes) as forwards:
        calls = pool.map(ForwardPass.advance, passes)
        streamed.release()
        while pending := [call for call in calls if call]:
            module = pending[0].module
            if any(call is None or call.module != module for call in calls):
                raise BlockwiseUnsupported(f"not all batches reach {module} at the same time")
            run, stops = partial(_run, streamed, forwards[module], pool), list(zip(passes, pending, strict=True))
            numel = sum(each.numel() for each in streamed.model.get_submodule(module).parameters())
            with explain_missing_memory(module, partial(TAKEN.format, write_size(4 * numel))), streamed.load(module):
                visitor.enter(module)
                outputs: Sequence[Any] = [None] * len(stops)
                if names := visitor.list_watched(module):
                    weights = {name: streamed.model.get_parameter(name) for name in names}
                    sums = visitor.get_sums(module)
                    sums.begin()
                    outputs = pool.map(partial(_gather, run, weights, sums, visitor), stops)
                    visitor.visit(module, partial(_run_copy, run, pending[0]))
                if not visitor.is_done:
                    calls = pool.map(partial(_advance, run, visitor), zip(stops, outputs, strict=True))
            streamed.release()
            trim_heap()
            on_module(module)
            if visitor.is_done:
                break


Run = Callable[[Call], Any]


def _run(streamed: StreamedModel, forward: Callable[..., Any], pool: Pool, call: Call) -> Any:
    pool.check()
    with torch.no_grad(), translate_failures():
        output = forward(*call.args, **call.kwargs)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in find_tensors(output)[:1]):
        streamed.check_stored(pool)
        raise CompressknowError(
            f"{call.module} gives NaN or infinities on the calibration text.",
            why="The inputs of its layers cannot be measured.",
            hint="Check that the checkpoint is intact: `compressknow probe` it, or use another calibration text.",
        )
    return output


def _run_copy(run: Run, call: Call) -> Any:
    """Run a module on a copy of its arguments, which it may overwrite, because it will run again."""
    return run(_copy_call(call))


def _copy_call(call: Call) -> Call:
    def copy_value(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone()
        return copy.deepcopy(value) if isinstance(value, Cache) else value

    args, kwargs = tuple(map(copy_value, call.args)), {key: copy_value(value) for key, value in call.kwargs.items()}
    return Call(call.module, args, kwargs)


def _gather(
    run: Run, weights: Mapping[str, torch.Tensor], sums: InputSums, visitor: Visitor, stop: tuple[ForwardPass, Call]
) -> Any:
    """Add the inputs of a module's weights for one batch. Return its output; None if it is not kept, but recomputed."""
    forward_pass, call = stop
    copied = _copy_call(call)
    values = [*copied.args, *copied.kwargs.values()]
    tensors = find_tensors(values)
    versions = [tensor._version for tensor in tensors]
    keeps, output = visitor.keeps_output(call.module, forward_pass.number), None
    # A head's output for a batch may be larger than everything else.
    with suppress(AllSeen), InputRecorder(weights, ends=not keeps and call.module in visitor.lone_layers) as watch:
        output = run(copied)
    if watch.overwritten:
        with InputRecorder(weights, copies=True) as watch:
            _run_copy(run, call)
    sums.add(forward_pass.number, watch.seen)
    if not keeps:
        return None
    # If the module changed its arguments in place, the model must see these changes too.
    changed = versions != [tensor._version for tensor in tensors] or any(isinstance(each, Cache) for each in values)
    return run(call) if changed else output


def _advance(run: Run, visitor: Visitor, at: tuple[tuple[ForwardPass, Call], Any]) -> Any:
    """Advance a batch's pass to the next module, if any is needed, with the output of this one; run this one if that is
    None."""
    (forward_pass, call), output = at
    output = run(call) if output is None else output
    visitor.receive_output(call.module, forward_pass.number, call, output)
    return None if visitor.is_done else forward_pass.advance(output)


def find_tensors(output: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors in a module's output, its hidden states first."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in find_tensors(value)]


def observe(
    checkpoint: Checkpoint,
    tree: PreTrainedModel,
    texts: Sequence[Batches],
    visit: Visit,
    *,
    products: bool = False,
    pairs: bool = False,
    threads: int | None = None,
    advance: Advance = ignore_advance,
) -> None:
    """Observe the inputs of each Linear weight, block by block, and free their statistics after each visit.

    Parameters
    ----------
    checkpoint, tree : a checkpoint of floats, and its module tree on the meta device.
    texts : batches of each text, see `walk`. Several texts have equal weight (`InputSums`).
    visit : called with the statistics, by weight or by matrix of a stack, and a pool for the work. Weights that the
        text does not reach are missing (experts, vision towers).
    products : also sum X^T X.
    pairs : run each batch twice in parallel, through the original and through the blocks as `visit` changes them: it
        also gets the block's weights, by parameter, float32, and may overwrite them. Statistics are those of the
        changed model, with the `drift` from the original. Blocks that share weights, and models that do not run block
        by block, are visited without weights.
    advance : called with the number of finished blocks and single layers, and of all.
    """
    structure = read_structure(tree)
    weights = [weight for weight in structure.linears if weight.group != "vision"]

    def make(streamed: StreamedModel, pool: Pool, _: bool) -> list[Visitor]:
        return [_Observer(streamed, weights, list(map(len, texts)), products, pairs, pool, visit)]

    with OpenFiles() as files:
        batches = [batch for text in texts for batch in text]
        sources, why = Sources(checkpoint, tree, structure), lambda: WHOLE_IN_MEMORY
        run_text(tree, sources, files, batches, make, why, threads=threads, advance=advance)


class _Observer(TargetVisitor[LinearWeight]):
    """Visitor that passes on the statistics of each block and lone layer."""

    def __init__(
        self,
        streamed: StreamedModel,
        weights: Sequence[LinearWeight],
        texts: Sequence[int],
        products: bool,
        pairs: bool,
        pool: Pool,
        visit: Visit,
    ) -> None:
        super().__init__(streamed, weights, waits=any(weight.uses > 1 or weight.sharing for weight in weights))
        self._texts, self._products = texts, products
        self._pool, self._visit = pool, visit
        self.pairs = pairs and not self._waits

    def make_sums(self, targets: Sequence[LinearWeight]) -> InputSums:
        # In the passes of a pair, an expert may read different tokens.
        paired = {weight.parameter for weight in targets if weight.kind != "experts"} if self.pairs else None
        return InputSums(
            dict.fromkeys(weight.parameter for weight in targets),
            products=self._products,
            peaks=False,
            check=self._pool.check,
            paired=paired,
            texts=[batches * (1 + self.pairs) for batches in self._texts] if len(self._texts) > 1 else (),
        )

    def keeps_output(self, module: str, batch: int) -> bool:
        return module in self._streamed.blocks and not (self.pairs and batch % 2)

    def act(
        self, targets: Sequence[LinearWeight], sums: InputSums, module: str | None, rerun: Callable[[], Any] | None
    ) -> None:
        """Show the inputs of weights that the text reaches, and in a pair of passes also the weights."""
        # The output of a lone layer is not kept: it still has to run for the original.
        changes = self.pairs and rerun is not None and module in self._streamed.blocks
        keys = [
            Key(weight.parameter, matrix)
            for weight in targets
            for matrix in range(weight.shape[0] if len(weight.shape) > 2 else 1)
        ]
        seen = {key: statistics for key in keys if (statistics := sums.get(key)) is not None}
        names = [weight.parameter for weight in targets] if changes else []
        self._visit(seen, {name: self._streamed.model.get_parameter(name).data for name in names}, self._pool)
