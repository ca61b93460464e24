"""Calibrated compression: each block's weights are pruned and rounded by what was seen of their inputs, and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressknow.base.format import size
from compressknow.compress.calibrate.estimate import estimate
from compressknow.compress.calibrate.forward import BlockwiseUnsupported
from compressknow.compress.calibrate.gathering import Key, Sums
from compressknow.compress.calibrate.model import WHOLE_IN_MEMORY, StreamedModel, explain_missing_memory, read_tensor
from compressknow.compress.calibrate.smooth import (
    NOT_BLOCKWISE,
    SHARED_WEIGHTS,
    Norm,
    check_no_smoothing,
    compute_factors,
    divide_statistics,
    divide_stored,
    find_alphas,
    find_norms,
    group_in_scope,
    raise_unsmoothable,
)
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.calibrate.walk import (
    AnySums,
    Batches,
    OnProgress,
    TargetVisitor,
    gather_whole,
    walk,
)
from compressknow.compress.plan import Plan, PlannedTensor
from compressknow.compress.pool import Pool
from compressknow.compress.process import Measured, Treatment, Work
from compressknow.compress.pruning import BlockMask, Mask, Pruned
from compressknow.compress.schemes import Scheme, nearest
from compressknow.compress.schemes.gptq import gptq
from compressknow.compress.steps import prune_matrix

if TYPE_CHECKING:
    from compressknow.compress.blocks import Block
    from compressknow.compress.calibrate.text import CalibrationText

# Fewer tokens than this tell nothing of the inputs of an expert.
LEAST_TOKENS = 32


@dataclass
class Calibrated:
    """Results of a calibration.

    Attributes
    ----------
    measured : of each tensor that was written, by name.
    is_blockwise : True if the blocks were run one after the other; else the whole model was in memory.
    unseen : weights that the text does not reach, or hardly (most experts of a mixture, projections of images): they
        were treated as if nothing was known of their inputs.
    smoothed : the norms that were divided, and the weights that make up for it.
    """

    measured: dict[str, Measured] = field(default_factory=dict)
    is_blockwise: bool = True
    unseen: list[str] = field(default_factory=list)
    smoothed: dict[str, list[str]] = field(default_factory=dict)


def calibrate(
    plan: Plan,
    work: Work,
    masks: Mapping[str, Mask],
    text: CalibrationText,
    *,
    folder: Path | None = None,
    on_progress: OnProgress = max,
) -> Calibrated:
    """Compress and write all that is in scope, block by block, each with what it sees of the text once all before it is
    compressed.

    Parameters
    ----------
    masks : by tensor name, those of methods that look at weights alone.
    folder : for large hidden states.
    on_progress : called with the blocks that are done, and with how many there are.

    Raises
    ------
    CompressknowError : a block gives NaN, takes more memory than there is, or a layer's inputs were never seen.
    """
    name = plan.structure.architecture
    try:
        # What fails stops its pool.
        with (
            explain_missing_memory(name, lambda: f"That takes about {size(estimate(plan).bytes)}."),
            Pool(work.pool.threads) as pool,
        ):
            compressor = _Compressor(plan, replace(work, pool=pool), masks)
            _compress_blockwise(compressor, text.batches, folder, on_progress)
    except BlockwiseUnsupported:
        with explain_missing_memory(name, lambda: WHOLE_IN_MEMORY):
            compressor = _Compressor(plan, work, masks)
            _compress_whole(compressor, text.batches, on_progress)
    return compressor.result


def _compress_blockwise(
    compressor: _Compressor, batches: Batches, folder: Path | None, on_progress: OnProgress
) -> None:
    plan, work = compressor.plan, compressor.work
    streamed = StreamedModel(plan.tree, plan.sources, work.files)
    repeated, once = (group_in_scope(plan, streamed, repeated=repeated) for repeated in (True, False))
    done: set[str] = set()
    for targets in (repeated, once):
        if not targets:
            continue
        if waits := targets is repeated:
            check_no_smoothing(plan, SHARED_WEIGHTS)
        visitor = _CompressingVisitor(compressor, streamed, targets, waits=waits)

        def report(module: str, targets: Mapping[str, Any] = targets) -> None:
            if module in targets:
                done.add(module)
                on_progress(len(done), len(repeated) + len(once))

        walk(streamed, batches, visitor, work.pool, folder, report)
        visitor.finish()


def _compress_whole(compressor: _Compressor, batches: Batches, on_progress: OnProgress) -> None:
    """Run the whole model at once: every layer sees what the original gave it."""
    plan, work = compressor.plan, compressor.work
    check_no_smoothing(plan, NOT_BLOCKWISE)
    compressor.result.is_blockwise = False
    streamed = StreamedModel(plan.tree, plan.sources, work.files, whole=True)
    tensors = [tensor for tensor in plan.tensors if tensor.in_scope and tensor.group != "vision"]
    sums = compressor.make_sums(tensors)
    gather_whole(streamed, dict.fromkeys(tensor.parameter for tensor in tensors), batches, sums, on_progress)
    work.pool.map(partial(compressor.compress, sums=sums, factors={}), tensors)


class _CompressingVisitor(TargetVisitor[PlannedTensor]):
    """Visitor that compresses blocks: each at once or, those that are used several times, after all uses were seen."""

    def __init__(
        self,
        compressor: _Compressor,
        streamed: StreamedModel,
        targets: Mapping[str, Sequence[PlannedTensor]],
        *,
        waits: bool,
    ) -> None:
        super().__init__(streamed, targets)
        self._compressor, self._waits = compressor, waits

    def make_sums(self, targets: Sequence[PlannedTensor]) -> AnySums:
        return self._compressor.make_sums(targets)

    def visit(self, module: str, rerun: Callable[[], Any]) -> None:
        if self._waits:
            return
        targets, sums = self._targets[module], self.get_sums(module)
        self._compress(module, self._compressor.smooth(module, targets, sums, self._streamed, rerun))
        self._unvisited.discard(module)
        # It is not read again.
        self._streamed.forget(tensor.source for tensor in targets)

    @property
    def is_done(self) -> bool:
        return not self._unvisited

    def finish(self) -> None:
        """Compress what waited. Raises BlockwiseUnsupported if the model did not run a block as a module."""
        if self._waits:
            for module in self._targets:
                with self._streamed.load(module):
                    self._compress(module, {})
            return
        for module in self._unvisited:
            self.check_run(module)
            self._compress(module, {})

    def _compress(self, module: str, factors: Mapping[str, torch.Tensor]) -> None:
        self._compressor.compress_all(self._targets[module], self.get_sums(module), self._streamed, factors)
        del self._sums[module]


class _Compressor:
    """Compression of tensors, once their inputs are known; `result` is what was done so far."""

    def __init__(self, plan: Plan, work: Work, masks: Mapping[str, Mask]) -> None:
        self.plan, self.work, self._masks = plan, work, masks
        self.result = Calibrated()

    def make_sums(self, tensors: Sequence[PlannedTensor]) -> Sums:
        """Begin sums over the inputs of tensors that are compressed together."""
        steps = [self.plan.quantize_step(tensor) for tensor in tensors]
        return Sums(
            dict.fromkeys(tensor.parameter for tensor in tensors),
            products=any(map(self._needs_products, tensors)),
            peaks=any(step and step.smooth is not None for step in steps),
            check=self.work.pool.check,
        )

    def _needs_products(self, tensor: PlannedTensor) -> bool:
        prune, quantize = self.plan.prune_step(tensor), self.plan.quantize_step(tensor)
        return bool((prune and prune.chosen.needs == "products") or (quantize and quantize.rounding == "gptq"))

    def smooth(
        self,
        module: str,
        tensors: Iterable[PlannedTensor],
        sums: AnySums,
        streamed: StreamedModel,
        rerun: Callable[[], Any],
    ) -> dict[str, torch.Tensor]:
        """Divide the norms of a block and write them. Return, by parameter, the factors by which to multiply the
        columns of the weights behind them. Raises UnsupportedError if no norm can take it."""
        alphas = find_alphas(self.plan, tensors)
        if not alphas or module not in streamed.blocks:
            return {}
        weights = {name: streamed.model.get_parameter(name) for name in alphas}
        factors: dict[str, torch.Tensor] = {}
        for norm in find_norms(module, streamed.model.get_submodule(module), weights, rerun):
            statistics = sums.get(Key(norm.readers[0]))
            assert statistics is not None
            readers = [weights[name] for name in norm.readers]
            wanted = compute_factors(statistics, readers, alphas[norm.readers[0]])
            factors |= dict.fromkeys(norm.readers, self._divide(norm, wanted, streamed))
            self.result.smoothed[norm.module] = list(norm.readers)
        if not factors:
            raise_unsmoothable(module)
        return factors

    def _divide(self, norm: Norm, factors: torch.Tensor, streamed: StreamedModel) -> torch.Tensor:
        """Write a norm's weight and bias divided; return the factors that this comes to."""
        for leaf in ("weight", "bias"):
            parameter = f"{norm.module}.{leaf}"
            if not self.plan.sources.is_supplied(parameter):
                continue
            stored = self.plan.sources.tensor(parameter)
            values = read_tensor(self.work.files, stored)
            if leaf == "weight":
                divided, factors = divide_stored(values, factors, norm.offset)
            else:
                divided = (values.to(torch.float32) / factors).to(values.dtype)
            planned = self._out_of_scope[stored.name]
            self.result.measured[planned.name] = self.work.write_divided(planned, divided, factors)
            streamed.replace(parameter, stored, divided.to(torch.float32))
        return factors

    @cached_property
    def _out_of_scope(self) -> dict[str, PlannedTensor]:
        return {tensor.source.name: tensor for tensor in self.plan.tensors if not tensor.in_scope}

    def compress_all(
        self,
        tensors: Iterable[PlannedTensor],
        sums: AnySums,
        streamed: StreamedModel,
        factors: Mapping[str, torch.Tensor],
    ) -> None:
        """Compress and write tensors of one block; the model goes on with what was written."""
        largest_first = sorted(tensors, key=lambda tensor: -tensor.source.nbytes)
        written = self.work.pool.map(partial(self.compress, sums=sums, factors=factors), largest_first)
        for tensor, values in zip(largest_first, written, strict=True):
            streamed.replace(tensor.parameter, tensor.source, values)

    def compress(self, tensor: PlannedTensor, sums: AnySums, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Write one tensor, and return the values that were written, float32."""
        is_calibrated = self.plan.is_calibrated(tensor)
        statistics = self._read_statistics(tensor, sums) if is_calibrated else []
        own_factors = factors.get(tensor.parameter)
        written = torch.empty(tensor.source.shape, dtype=torch.float32)
        rows = written.view(-1, written.shape[-1])

        def see(place: slice, values: torch.Tensor) -> None:
            rows[place] = values

        mask = self._masks.get(tensor.name) or self._prune(tensor, statistics)
        rounding = nearest
        step = self.plan.quantize_step(tensor)
        if step and step.rounding == "gptq":
            seen = statistics[0] if own_factors is None else divide_statistics(statistics[0], own_factors)
            rounding = partial(_round_gptq, seen)
        treatment = Treatment(rounding, whole=is_calibrated, factors=own_factors, see=see)
        self.result.measured[tensor.name] = self.work.write(tensor, mask, treatment)
        return written

    def _read_statistics(self, tensor: PlannedTensor, sums: AnySums) -> list[InputStatistics]:
        """Return the statistics of each matrix of a tensor. If nothing is known, all channels count alike: methods then
        go by the weights alone."""
        matrices = tensor.to_prune.matrices[0]
        first = 0 if matrices > 1 else self.plan.sources.matrix_of(tensor.source, tensor.parameter)
        is_expert = len(tensor.source.shape) > 2 or ".experts." in f".{tensor.name}"
        width = tensor.to_prune.matrices[1 if tensor.transposed else 2]
        known = []
        for matrix in range(first, first + matrices):
            statistics = sums.get(Key(tensor.parameter, matrix))
            if statistics is None or (is_expert and statistics.tokens < LEAST_TOKENS):
                self.result.unseen.append(tensor.name if matrices == 1 else f"{tensor.name}[{matrix}]")
                products = torch.eye(width) if self._needs_products(tensor) else None
                name = tensor.module or tensor.name
                statistics = InputStatistics(name, 0, torch.ones(width), torch.ones(width), products)
            known.append(statistics)
        return known

    def _prune(self, tensor: PlannedTensor, statistics: Sequence[InputStatistics]) -> Mask | None:
        """Prune a tensor by a method that looks at activations; None if it is not pruned so."""
        step = self.plan.prune_step(tensor)
        if step is None or not step.calibrated:
            return None
        values = read_tensor(self.work.files, tensor.source)
        matrices = values.view(tensor.to_prune.matrices)
        pruned = torch.zeros(matrices.shape, dtype=torch.bool)
        is_changed = False
        for place, inputs in enumerate(statistics):
            matrix = matrices[place].to(torch.float32)
            mask, new = prune_matrix(step, matrix.T.contiguous() if tensor.transposed else matrix, inputs)
            pruned[place] = mask.T if tensor.transposed else mask
            if new is not None:
                matrices[place] = (new.T if tensor.transposed else new).to(values.dtype)
                is_changed = True
        columns = values.shape[-1]
        return _WholeMask(pruned.view(-1, columns).numpy(), values.view(-1, columns) if is_changed else None)


@dataclass(frozen=True)
class _WholeMask:
    """Mask of all of a tensor [rows, columns], and its new values if it has any."""

    mask: np.ndarray[Any, np.dtype[np.bool_]]
    values: torch.Tensor | None

    def start(self) -> BlockMask:
        def mask_block(block: Block) -> Any:
            mask = np.ascontiguousarray(self.mask[block.rows])
            return mask if self.values is None else Pruned(mask, self.values[block.rows])

        return mask_block


def _round_gptq(inputs: InputStatistics, values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    # What is zero was pruned, by this recipe or in the source: a pattern outlives the rounding.
    return gptq(values, scales, scheme, inputs, values == 0)
