"""What calibration is for: each block's weights pruned and rounded by what was seen of their inputs, and written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressknow.base.format import size
from compressknow.compress.calibrate.estimate import estimate
from compressknow.compress.calibrate.forward import Call, NotApart
from compressknow.compress.calibrate.gathering import Key, Sums, Watch
from compressknow.compress.calibrate.model import StreamedModel, read_tensor
from compressknow.compress.calibrate.smooth import (
    SHARING,
    TOGETHER,
    Norm,
    factors_of,
    norms_before,
    nothing_to_smooth,
    refuse_smoothing,
    smoothed,
    stored_division,
    to_smooth,
)
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.calibrate.walk import memory_named, walk, whole_in_memory
from compressknow.compress.plan import Plan, PlannedTensor
from compressknow.compress.pool import Pool
from compressknow.compress.process import Measured, Treatment, Work
from compressknow.compress.pruning import BlockMask, Mask, Pruned
from compressknow.compress.schemes import Scheme
from compressknow.compress.schemes.rounding import nearest
from compressknow.compress.steps import prune_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compressknow.compress.blocks import Block
    from compressknow.compress.calibrate.text import CalibrationText

# Fewer tokens than this tell nothing of the inputs of an expert.
LEAST_TOKENS = 32


@dataclass
class Calibrated:
    """What calibration did.

    Attributes
    ----------
    measured : of each tensor that it wrote, by name.
    apart : whether the blocks were run one after the other; else the whole model was in memory.
    unseen : weights whose inputs were too few, or that text does not reach (most experts of a mixture, projections of
        images): they were treated as if nothing was known of their inputs.
    smoothed : the norms that were divided, and the weights that make up for it.
    """

    measured: dict[str, Measured] = field(default_factory=dict)
    apart: bool = True
    unseen: list[str] = field(default_factory=list)
    smoothed: dict[str, list[str]] = field(default_factory=dict)


def calibrate(
    plan: Plan,
    tree: PreTrainedModel,
    work: Work,
    masks: Mapping[str, Mask],
    text: CalibrationText,
    *,
    folder: Path | None = None,
    told: Callable[[int, int], object] = max,
) -> Calibrated:
    """Compress and write all that is in scope, block by block, each with what it sees of the text once all before it is
    compressed.

    Parameters
    ----------
    tree : the checkpoint's module tree on the meta device; left as it is.
    masks : what is pruned by methods that look at weights alone, by tensor name.
    folder : where large hidden states lie meanwhile.
    told : the blocks that are done, and in all.

    Raises
    ------
    CompressknowError : a block gives NaN, takes more memory than there is, or a layer's inputs were never seen.
    """
    name = plan.structure.architecture
    try:
        # What fails stops its pool.
        with (
            memory_named(name, lambda: f"That takes about {size(estimate(plan).bytes)}."),
            Pool(work.pool.threads) as pool,
        ):
            return _Run(plan, tree, replace(work, pool=pool), masks, told).apart(text.batches, folder)
    except NotApart:
        with memory_named(name, whole_in_memory):
            return _Run(plan, tree, work, masks, told).together(text.batches)


class _Run:
    def __init__(
        self,
        plan: Plan,
        tree: PreTrainedModel,
        work: Work,
        masks: Mapping[str, Mask],
        told: Callable[[int, int], object],
    ) -> None:
        self._plan, self._tree, self._work, self._masks, self._told = plan, tree, work, masks, told
        self._visited: set[str] = set()
        self.result = Calibrated()

    def apart(self, batches: Sequence[Mapping[str, torch.Tensor]], folder: Path | None) -> Calibrated:
        """Block by block."""
        streamed = StreamedModel(self._tree, self._plan.sources, self._work.files)
        targets = Targets(self._plan, streamed.blocks)
        for part, several in ((targets.repeated, True), (targets.once, False)):
            if part:
                if several:
                    refuse_smoothing(self._plan, SHARING)
                visitor = _Compressing(self, streamed, part, waits=several)
                told = partial(self._tell, part, len(targets.repeated) + len(targets.once))
                walk(streamed, batches, visitor, self._work.pool, folder, told)
                visitor.finish()
        return self.result

    def _tell(self, part: Collection[str], total: int, module: str) -> None:
        if module in part:
            self._visited.add(module)
            self._told(len(self._visited), total)

    def together(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> Calibrated:
        """The whole model at once: every layer sees what the original gave it."""
        refuse_smoothing(self._plan, TOGETHER)
        self.result.apart = False
        streamed = StreamedModel(self._tree, self._plan.sources, self._work.files, whole=True)
        tensors = [tensor for tensor in self._plan.tensors if tensor.in_scope and tensor.group != "vision"]
        names = dict.fromkeys(tensor.parameter for tensor in tensors)
        sums = self.sums(tensors)
        weights = {name: streamed.model.get_parameter(name) for name in names}
        for number, batch in enumerate(batches):
            with Watch(weights) as watch:
                streamed.run(batch)
            sums.add(number, watch.seen)
            self._told(number + 1, len(batches))
        self._work.pool.map(partial(self.compress, sums=sums, factors={}), tensors)
        return self.result

    def sums(self, tensors: Iterable[PlannedTensor]) -> Sums:
        """Of the inputs of some tensors that are compressed together."""
        tensors = list(tensors)
        steps = [self._plan.quantize_step(tensor) for tensor in tensors]
        prunes = [self._plan.prune_step(tensor) for tensor in tensors]
        products = any(step and step.rounding == "gptq" for step in steps)
        products |= any(step and step.chosen.needs == "products" for step in prunes)
        return Sums(
            dict.fromkeys(tensor.parameter for tensor in tensors),
            products=products,
            peaks=any(step and step.smooth is not None for step in steps),
            check=self._work.pool.check,
        )

    def smooth(
        self,
        module: str,
        tensors: Iterable[PlannedTensor],
        sums: Sums,
        streamed: StreamedModel,
        again: Callable[[], Any],
    ) -> dict[str, torch.Tensor]:
        """Divide the norms of a block and write them; what the columns of the weights behind them are to be multiplied
        with, by parameter. Raises UnsupportedError where no norm can take it."""
        wanted = to_smooth(self._plan, tensors)
        if not wanted or module not in streamed.blocks:
            return {}
        weights = {name: streamed.model.get_parameter(name) for name in wanted}
        factors: dict[str, torch.Tensor] = {}
        for norm in norms_before(module, streamed.model.get_submodule(module), weights, again):
            statistics = sums.of(Key(norm.readers[0]))
            assert statistics is not None
            alpha = wanted[norm.readers[0]]
            made = factors_of(statistics, [weights[name] for name in norm.readers], alpha)
            factors |= dict.fromkeys(norm.readers, self._divide(norm, made, streamed))
            self.result.smoothed[norm.module] = list(norm.readers)
        if not factors:
            raise nothing_to_smooth(module)
        return factors

    def _divide(self, norm: Norm, factors: torch.Tensor, streamed: StreamedModel) -> torch.Tensor:
        """Write a norm's weight and bias divided; the factors that this comes to."""
        for leaf in ("weight", "bias"):
            parameter = f"{norm.module}.{leaf}"
            if not self._plan.sources.is_supplied(parameter):
                continue
            stored = self._plan.sources.tensor(parameter)
            values = read_tensor(self._work.files, stored)
            if leaf == "weight":
                divided, factors = stored_division(values, factors, norm.offset)
            else:
                divided = (values.to(torch.float32) / factors).to(values.dtype)
            planned = self._kept[stored.name]
            self.result.measured[planned.name] = self._work.write_divided(planned, divided, factors)
            streamed.replace(parameter, stored, divided.to(torch.float32))
        return factors

    @cached_property
    def _kept(self) -> dict[str, PlannedTensor]:
        return {tensor.source.name: tensor for tensor in self._plan.tensors if not tensor.in_scope}

    def compress_all(
        self,
        tensors: Iterable[PlannedTensor],
        sums: Sums,
        streamed: StreamedModel,
        factors: Mapping[str, torch.Tensor],
    ) -> None:
        """Compress and write tensors of one block; the model goes on with what was written."""
        largest_first = sorted(tensors, key=lambda tensor: -tensor.source.nbytes)
        made = self._work.pool.map(partial(self.compress, sums=sums, factors=factors), largest_first)
        for tensor, values in zip(largest_first, made, strict=True):
            streamed.replace(tensor.parameter, tensor.source, values)

    def compress(self, tensor: PlannedTensor, sums: Sums, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Write one tensor; the values that were written, float32."""
        statistics = self._statistics(tensor, sums)
        own = factors.get(tensor.parameter)
        written = torch.empty(tensor.source.shape, dtype=torch.float32)
        rows = written.view(-1, written.shape[-1])

        def see(place: slice, values: torch.Tensor) -> None:
            rows[place] = values

        mask = self._masks.get(tensor.name) or self._mask(tensor, statistics)
        rounding = nearest
        step = self._plan.quantize_step(tensor)
        if step and step.rounding == "gptq":
            seen = statistics[0] if own is None else smoothed(statistics[0], own)
            rounding = partial(_gptq, seen)
        treatment = Treatment(rounding, whole=self._plan.is_calibrated(tensor), factors=own, see=see)
        self.result.measured[tensor.name] = self._work.write(tensor, mask, treatment)
        return written

    def _statistics(self, tensor: PlannedTensor, sums: Sums) -> list[InputStatistics]:
        """Those of each matrix of a tensor, where it is calibrated."""
        if not self._plan.is_calibrated(tensor):
            return []
        keys = self._keys(tensor)
        found = [sums.of(key) for key in keys]
        width = tensor.to_prune.matrices[1 if tensor.transposed else 2]
        known = []
        for key, statistics in zip(keys, found, strict=True):
            if statistics is None or (_is_expert(tensor) and statistics.tokens < LEAST_TOKENS):
                self.result.unseen.append(tensor.name if len(keys) == 1 else f"{tensor.name}[{key.matrix}]")
                statistics = _nothing_known(tensor, width, self._needs_products(tensor))
            known.append(statistics)
        return known

    def _needs_products(self, tensor: PlannedTensor) -> bool:
        prune, quantize = self._plan.prune_step(tensor), self._plan.quantize_step(tensor)
        return bool((prune and prune.chosen.needs == "products") or (quantize and quantize.rounding == "gptq"))

    def _keys(self, tensor: PlannedTensor) -> list[Key]:
        matrices = tensor.to_prune.matrices[0]
        if matrices > 1:
            return [Key(tensor.parameter, matrix) for matrix in range(matrices)]
        return [Key(tensor.parameter, self._plan.sources.matrix_of(tensor.source, tensor.parameter))]

    def _mask(self, tensor: PlannedTensor, statistics: Sequence[InputStatistics]) -> Mask | None:
        """What a method that looks at activations makes of a tensor."""
        step = self._plan.prune_step(tensor)
        if step is None or not step.calibrated:
            return None
        values = read_tensor(self._work.files, tensor.source)
        stacked = values.view(tensor.to_prune.matrices)
        dropped = torch.zeros(stacked.shape, dtype=torch.bool)
        changed = False
        for place, own in enumerate(statistics):
            matrix = stacked[place].to(torch.float32)
            mask, new = prune_matrix(step, matrix.T.contiguous() if tensor.transposed else matrix, own)
            dropped[place] = mask.T if tensor.transposed else mask
            if new is not None:
                stacked[place] = (new.T if tensor.transposed else new).to(values.dtype)
                changed = True
        columns = values.shape[-1]
        return _Whole(dropped.view(-1, columns).numpy(), values.view(-1, columns) if changed else None)


@dataclass(frozen=True)
class _Whole:
    """A mask of all of a tensor [rows, columns], and its new values where it has any."""

    mask: np.ndarray[Any, np.dtype[np.bool_]]
    values: torch.Tensor | None

    def start(self) -> BlockMask:
        def of(block: Block) -> Any:
            mask = np.ascontiguousarray(self.mask[block.rows])
            return mask if self.values is None else Pruned(mask, self.values[block.rows])

        return of


def _gptq(inputs: InputStatistics, values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    from compressknow.compress.schemes.gptq import gptq

    # What is zero was pruned, by this recipe or in the source: a pattern outlives the rounding.
    return gptq(values, scales, scheme, inputs, values == 0)


def _is_expert(tensor: PlannedTensor) -> bool:
    return len(tensor.source.shape) > 2 or ".experts." in f".{tensor.name}"


def _nothing_known(tensor: PlannedTensor, width: int, products: bool) -> InputStatistics:
    """Inputs of which each channel is like all others: methods then go by the weights alone."""
    return InputStatistics(
        tensor.module or tensor.name, 0, torch.ones(width), torch.ones(width), torch.eye(width) if products else None
    )


class Targets:
    """What is in scope, by the block that holds it, or by its own module where none does."""

    def __init__(self, plan: Plan, blocks: Sequence[str]) -> None:
        self.once: dict[str, list[PlannedTensor]] = {}
        self.repeated: dict[str, list[PlannedTensor]] = {}
        uses = {weight.parameter: weight for weight in plan.structure.linears}
        for tensor in plan.tensors:
            if tensor.in_scope and tensor.group != "vision" and tensor.module is not None:
                weight = uses[tensor.parameter]
                place = next((block for block in blocks if f"{tensor.module}.".startswith(f"{block}.")), tensor.module)
                part = self.repeated if weight.uses > 1 or weight.sharing else self.once
                part.setdefault(place, []).append(tensor)


class _Compressing:
    """Visits blocks to compress them: each at once or, those that are used several times, after all uses were seen."""

    def __init__(
        self, run: _Run, streamed: StreamedModel, targets: Mapping[str, list[PlannedTensor]], *, waits: bool
    ) -> None:
        self._run, self._streamed, self._targets, self._waits = run, streamed, targets, waits
        self._sums: dict[str, Sums] = {}
        self._left = set(targets)

    @cached_property
    def alone(self) -> Collection[str]:
        """Single layers in scope that lie in no block."""
        return [module for module in self._targets if module not in self._streamed.blocks]

    def watched(self, module: str) -> Collection[str]:
        """All weights of a block that are in scope."""
        return list(dict.fromkeys(tensor.parameter for tensor in self._targets.get(module, ())))

    def sums(self, module: str) -> Sums:
        """Those of a block; kept from one use to the next."""
        if module not in self._sums:
            self._sums[module] = self._run.sums(self._targets[module])
        return self._sums[module]

    def visit(self, module: str, again: Callable[[], Any]) -> None:
        """Compress the block, unless it will be used again."""
        if not self._waits:
            targets, sums = self._targets[module], self.sums(module)
            self._compress(module, self._run.smooth(module, targets, sums, self._streamed, again))
            self._left.discard(module)
            # It is not read again.
            self._streamed.forget(tensor.source for tensor in self._targets[module])

    def output(self, module: str, batch: int, call: Call, output: Any) -> None:
        """Nothing is learned from it."""

    @property
    def done(self) -> bool:
        """When all blocks in scope are compressed."""
        return not self._left

    def finish(self) -> None:
        """Compress what waited."""
        for module in self._targets if self._waits else ():
            with self._streamed.loaded(module):
                self._compress(module, {})
        if self._waits:
            return
        for module in self._left:
            if module in self._streamed.blocks or any(tensor.group == "final" for tensor in self._targets[module]):
                # Not run as a module: whatever the model does with its weights, it does elsewhere.
                raise NotApart(f"the model does not run {module}")
            self._compress(module, {})

    def _compress(self, module: str, factors: Mapping[str, torch.Tensor]) -> None:
        self._run.compress_all(self._targets[module], self.sums(module), self._streamed, factors)
        del self._sums[module]
