"""Calibrated compression: prune and round the weights of each block, given their inputs, and write them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressknow.base.format import write_size
from compressknow.base.progress import Advance, ignore_advance
from compressknow.base.system import count_cores
from compressknow.compress.blocks import Block, Pool, Reader
from compressknow.compress.calibrate import smooth
from compressknow.compress.calibrate.compensation import fit_scales, round_by_gptq
from compressknow.compress.calibrate.gathering import InputStatistics, InputSums, Key
from compressknow.compress.calibrate.model import StreamedModel, read_tensor
from compressknow.compress.calibrate.samples import choose_dtype
from compressknow.compress.calibrate.text import LEAST_TOKENS, CalibrationText
from compressknow.compress.calibrate.walk import TargetVisitor, Visitor, run_text
from compressknow.compress.plan import Plan, PlannedTensor
from compressknow.compress.process import TensorConverter, TensorStats, read_pruned
from compressknow.compress.pruning import EachBlock, Mask, Pruned
from compressknow.compress.steps import Prune, Quantize, prune_matrix
from compressknow.model.groups import read_structure
from compressknow.model.structure import LinearWeight, Structure

if TYPE_CHECKING:
    from compressknow.compress.removal.smaller import Removal

# Size and number of the matrix products that are timed to estimate the speed.
TRIAL, TRIALS = 512, 8
FLOAT_BYTES = 4


# Number of blocks (and single layers) that are compressed, peak memory in bytes, and number of operations.
Estimate = tuple[int, int, int]


def estimate(plan: Plan) -> dict[str, Any]:
    """Estimate the cost of a calibrated plan: ``blocks`` (and single layers) to compress, peak ``bytes`` of memory, and
    ``seconds`` at the speed of bare matrix products, without the time to write the text."""
    calibration = plan.recipe.calibration
    assert calibration is not None
    parts = list(_estimate_removal(plan.removal, calibration.tokens)) if plan.removal else []
    if any(step.calibrated for step in plan.recipe.steps if isinstance(step, Prune | Quantize)):
        parts.append(_estimate_compression(plan, calibration.tokens))
    blocks, memory, operations = zip(*parts, strict=True)
    if calibration.kind == "self":
        # The whole original model writes the text.
        original = read_structure(plan.removal.original[1]) if plan.removal else plan.structure
        memory = (*memory, original.stored * getattr(torch, choose_dtype()).itemsize)
    return {"blocks": max(blocks), "bytes": max(memory), "seconds": sum(operations) / _measure_speed()}


def describe_memory(plan: Plan) -> str:
    """Describe in a sentence how much memory the calibration of a plan takes."""
    return f"That takes about {write_size(estimate(plan)['bytes'])}."


def _estimate_removal(removal: Removal, tokens: int) -> Iterator[Estimate]:
    """Estimate one run of the text to choose blocks, and two to choose neurons, with X^T X and a fit."""
    if any(not drop.is_decided for drop in removal.blocks):
        yield _estimate_runs(read_structure(removal.original[1]), tokens, 1)
    if removal.neurons and not removal.is_decided:
        widths = [drop.before for drop in removal.neurons for _ in drop.networks]
        # X^T X in float32, and two float64 copies.
        sums = 5 * max(widths) ** 2
        yield _estimate_runs(read_structure(removal.wide[1]), tokens, 2, widths=widths, sums=sums)


def _estimate_compression(plan: Plan, tokens: int) -> Estimate:
    targets = {tensor.parameter for tensor in plan.tensors if tensor.in_scope and tensor.group != "vision"}
    compressed = [weight for weight in plan.structure.linears if weight.parameter in targets]
    reads: set[tuple[str, str, int]] = set()
    if any(map(_is_sum_of_products, plan.tensors)):
        # Sibling layers of a module usually read the same tensor.
        reads = {(_find_block(w), w.module.rpartition(".")[0], w.shape[-2 if w.transposed else -1]) for w in compressed}
    squares: Counter[str] = Counter()
    for block, _, width in reads:
        squares[block] += width**2
    # In pairs, the text also runs through the original, and the drift of inputs from the original's is summed.
    pairs = 1 + _looks_back(plan.tensors)
    widths, sums = [width for *_, width in reads], max(squares.values(), default=0)
    _, memory, operations = _estimate_runs(plan.structure, tokens, 1 + pairs, pairs=pairs, widths=widths, sums=sums)
    return len(set(map(_find_block, compressed))), memory, operations


def _estimate_runs(
    structure: Structure, tokens: int, runs: int, *, pairs: int = 1, widths: Sequence[int] = (), sums: int = 0
) -> Estimate:
    """Estimate runs of the text, with X^T X of these channels and its decomposition, for each of `pairs`. Memory holds
    hidden states, with either the largest block and its sums or the layers outside the blocks."""
    weights = [weight for weight in structure.linears if weight.group != "vision"]
    blocks: Counter[str] = Counter()
    for weight in weights:
        blocks[_find_block(weight)] += weight.stored
    inside = {weight.parameter for weight in weights if weight.layer is not None}
    outside = sum(math.prod(shape) for name, shape in structure.parameters.items() if name not in inside)
    states = 2 * pairs * tokens * max(weight.shape[-1] for weight in weights)
    memory = FLOAT_BYTES * (states + max(2 * max(blocks.values()) + pairs * sums, outside))
    operations = runs * 2 * tokens * sum(weight.used for weight in weights)
    operations += pairs * sum(2 * tokens * width**2 + width**3 for width in widths)
    return len({_find_block(weight) for weight in weights if weight.layer is not None}), memory, operations


def _is_sum_of_products(tensor: PlannedTensor) -> bool:
    prune = tensor.prune
    return bool((prune and prune.chosen.needs == "products") or _is_rounded_by_gptq(tensor))


def _is_rounded_by_gptq(tensor: PlannedTensor) -> bool:
    return bool(tensor.quantize and tensor.quantize.rounding == "gptq")


def _looks_back(tensors: Sequence[PlannedTensor]) -> bool:
    """Return True if GPTQ compensates for the rounding errors of earlier layers.

    It does not compensate for pruning, which would overfit the remaining weights to the text: the pruned model is taken
    as the original. With calibrated pruning there is no such model, since each layer is pruned by its inputs from
    layers that are already rounded.
    """
    is_pruned = any(tensor.prune and tensor.prune.calibrated for tensor in tensors)
    return not is_pruned and any(map(_is_rounded_by_gptq, tensors))


def _is_expert(tensor: PlannedTensor) -> bool:
    return len(tensor.source.shape) > 2 or ".experts." in f".{tensor.name}"


def _find_block(weight: LinearWeight) -> str:
    """Return a key for the block of a weight, or for the weight itself if it is in none."""
    return weight.module if weight.layer is None else f"{weight.stack} {weight.layer}"


def _measure_speed() -> float:
    """Measure the operations per second of all cores, on a matrix product."""
    # No random numbers: these would change the caller's.
    matrix = torch.ones(TRIAL, TRIAL)
    torch.mm(matrix, matrix)
    start = time.perf_counter()
    for _ in range(TRIALS):
        torch.mm(matrix, matrix)
    seconds = time.perf_counter() - start
    return 2 * TRIAL**3 * TRIALS / seconds * max(1, count_cores() / torch.get_num_threads())


@dataclass
class CalibrationResult:
    """Results of a calibration.

    Attributes
    ----------
    measured : statistics of each written tensor, by name.
    is_blockwise : True if the blocks were run one after the other; else the whole model was in memory.
    unseen : weights that the text hardly reaches or not at all (most experts of a mixture, projections of images),
        which were compressed as if all their input channels were alike.
    smoothed : the norms that were divided, and the weights that compensate for it.
    """

    measured: dict[str, TensorStats] = field(default_factory=dict)
    is_blockwise: bool = True
    unseen: list[str] = field(default_factory=list)
    smoothed: dict[str, list[str]] = field(default_factory=dict)


def calibrate(
    plan: Plan,
    converter: TensorConverter,
    masks: Mapping[str, Mask],
    text: CalibrationText,
    advance: Advance = ignore_advance,
) -> CalibrationResult:
    """Compress and write all weights in scope, block by block, each by its inputs on the text after all blocks before
    it are compressed. `masks` are those of methods without calibration, by tensor name; `advance` is called with the
    number of finished blocks and single layers, and of all.

    Raises CompressknowError if a block gives NaN or needs more memory than there is.
    """
    result = CalibrationResult()
    several, once = smooth.split_scope(plan)

    def make(streamed: StreamedModel, pool: Pool, whole: bool) -> list[Visitor]:
        """Compress weights with several uses first, in a separate walk that observes all uses."""
        nonlocal result
        result = CalibrationResult(is_blockwise=not whole)
        if whole or several:
            smooth.check_no_smoothing(plan, smooth.NOT_BLOCKWISE if whole else smooth.SHARED_WEIGHTS)
        compressor = partial(_Compressor, streamed, plan, replace(converter, pool=pool), masks, result)
        if whole:
            return [compressor([*several, *once])]
        return [compressor(targets, waits=targets is several) for targets in (several, once) if targets]

    why, threads = partial(describe_memory, plan), converter.pool.threads
    run_text(plan.tree, plan.sources, converter.files, text.batches, make, why, threads=threads, advance=advance)
    return result


class _Compressor(TargetVisitor[PlannedTensor]):
    """Visitor that compresses each block once its inputs are known, and records this in `result`."""

    def __init__(
        self,
        streamed: StreamedModel,
        plan: Plan,
        converter: TensorConverter,
        masks: Mapping[str, Mask],
        result: CalibrationResult,
        targets: Sequence[PlannedTensor],
        *,
        waits: bool = False,
    ) -> None:
        super().__init__(streamed, targets, waits=waits)
        self._plan, self._converter, self._masks, self._result = plan, converter, masks, result
        self.pairs = not waits and _looks_back(targets)

    def enter(self, module: str) -> None:
        # Rounding should preserve the pruned model.
        pruned = [each for each in self._targets.get(module, ()) if self.pairs and each.name in self._masks]
        reader = Reader(self._converter.pool, self._converter.files, lambda _: None)
        values = self._converter.pool.map(lambda tensor: read_pruned(reader, tensor, self._masks[tensor.name]), pruned)
        self._replace(pruned, values)

    def keeps_output(self, module: str, batch: int) -> bool:
        return self.pairs and not batch % 2 and module in self._streamed.blocks

    def make_sums(self, targets: Sequence[PlannedTensor]) -> InputSums:
        # In the passes of a pair, an expert may read different tokens.
        paired = {each.parameter for each in targets if _is_rounded_by_gptq(each) and not _is_expert(each)}
        return InputSums(
            dict.fromkeys(tensor.parameter for tensor in targets),
            products=any(map(_is_sum_of_products, targets)),
            peaks=any(tensor.quantize and tensor.quantize.smooth is not None for tensor in targets),
            check=self._converter.pool.check,
            paired=paired if self.pairs else None,
        )

    def act(
        self, targets: Sequence[PlannedTensor], sums: InputSums, module: str | None, rerun: Callable[[], Any] | None
    ) -> None:
        """Compress and write the targets; the model continues with the written values."""
        factors = self._smooth(module, sums, rerun) if module in self._streamed.blocks and rerun else {}
        largest_first = sorted(targets, key=lambda tensor: -tensor.source.nbytes)
        written = self._converter.pool.map(partial(self.compress, sums, factors), largest_first)
        if module:
            self._replace(largest_first, written)
        if not self._waits:
            # No later block reads them.
            self._streamed.forget(tensor.source for tensor in targets)

    def _replace(self, tensors: Sequence[PlannedTensor], values: Sequence[torch.Tensor]) -> None:
        self._streamed.replace([(each.parameter, each.source, new) for each, new in zip(tensors, values, strict=True)])

    def _smooth(self, module: str, sums: InputSums, rerun: Callable[[], Any]) -> dict[str, torch.Tensor]:
        """Divide and write a block's norms. Return, by parameter, factors for the columns of the weights behind them.
        Raises UnsupportedError if no norm can be divided."""
        if not (alphas := smooth.find_alphas(self._targets[module])):
            return {}
        model = self._streamed.model
        weights = {name: model.get_parameter(name) for name in alphas}
        factors: dict[str, torch.Tensor] = {}
        for norm, readers, offset in smooth.find_norms(module, model.get_submodule(module), weights, rerun):
            statistics = sums.get(Key(readers[0]))
            assert statistics is not None
            wanted = smooth.compute_factors(statistics, [weights[name] for name in readers], alphas[readers[0]])
            factors |= dict.fromkeys(readers, self._divide(norm, offset, wanted))
            self._result.smoothed[norm] = list(readers)
        if not factors:
            smooth.raise_unsmoothable(module)
        return factors

    def _divide(self, norm: str, offset: float, factors: torch.Tensor) -> torch.Tensor:
        """Write a norm's weight and bias, divided; return the factors that result after rounding."""
        for leaf, added in (("weight", offset), ("bias", 0.0)):
            parameter = f"{norm}.{leaf}"
            if not self._plan.sources.is_supplied(parameter):
                continue
            stored = self._plan.sources.tensor(parameter)
            values = read_tensor(self._converter.files, stored)
            if leaf == "weight":
                divided, factors = smooth.divide_stored(values, factors, added)
            else:
                divided = (values.to(torch.float32) / factors).to(values.dtype)
            planned = next(each for each in self._plan.tensors if each.source.name == stored.name and not each.in_scope)
            self._result.measured[planned.name] = self._converter.write_divided(planned, divided, factors, added)
            self._streamed.replace([(parameter, stored, divided.to(torch.float32))])
        return factors

    def compress(self, sums: InputSums, factors: Mapping[str, torch.Tensor], tensor: PlannedTensor) -> torch.Tensor:
        """Write one tensor, and return the written values, float32."""
        statistics = self._read_statistics(tensor, sums) if tensor.is_calibrated else []
        tensor_factors = factors.get(tensor.parameter)
        written = torch.empty(tensor.source.shape, dtype=torch.float32)
        rows = written.view(-1, written.shape[-1])
        mask = self._masks.get(tensor.name) or self._prune(tensor, statistics)
        by_gptq = {}
        if _is_rounded_by_gptq(tensor):
            inputs = statistics[0]
            if tensor_factors is not None:
                inputs = smooth.divide_statistics(inputs, tensor_factors)
            by_gptq = {"rounding": partial(round_by_gptq, inputs=inputs), "fit": partial(fit_scales, inputs=inputs)}
        self._result.measured[tensor.name] = self._converter.write(
            tensor, mask, whole=tensor.is_calibrated, factors=tensor_factors, see=rows.__setitem__, **by_gptq
        )
        return written

    def _read_statistics(self, tensor: PlannedTensor, sums: InputSums) -> list[InputStatistics]:
        """Return the statistics of each matrix of a tensor; if it is unseen, all channels are equal."""
        matrices = tensor.to_prune.matrices[0]
        first = 0 if matrices > 1 else self._plan.sources.matrix_of(tensor.source, tensor.parameter)
        width = tensor.to_prune.matrices[1 if tensor.transposed else 2]
        known = []
        for matrix in range(first, first + matrices):
            statistics = sums.get(Key(tensor.parameter, matrix))
            if statistics is None or (_is_expert(tensor) and statistics.tokens < LEAST_TOKENS):
                self._result.unseen.append(tensor.name if matrices == 1 else f"{tensor.name}[{matrix}]")
                products = torch.eye(width) if _is_sum_of_products(tensor) else None
                name = tensor.module or tensor.name
                statistics = InputStatistics(name, 0, torch.ones(width), torch.ones(width), products)
            known.append(statistics)
        return known

    def _prune(self, tensor: PlannedTensor, statistics: Sequence[InputStatistics]) -> Mask | None:
        """Prune a tensor by a calibrated method; None if it has none."""
        if tensor.prune is None or not tensor.prune.calibrated:
            return None
        values = read_tensor(self._converter.files, tensor.source)
        matrices = values.view(tensor.to_prune.matrices)
        pruned = torch.zeros(matrices.shape, dtype=torch.bool)
        is_changed = False
        for index, inputs in enumerate(statistics):
            matrix = matrices[index].to(torch.float32)
            mask, new = prune_matrix(tensor.prune, matrix.T.contiguous() if tensor.transposed else matrix, inputs)
            pruned[index] = mask.T if tensor.transposed else mask
            if new is not None:
                matrices[index] = (new.T if tensor.transposed else new).to(values.dtype)
                is_changed = True
        pruned_rows, new_values = pruned.flatten(0, 1).numpy(), values.flatten(0, -2)

        def mask_block(block: Block) -> Any:
            mask = np.ascontiguousarray(pruned_rows[block.rows])
            return Pruned(mask, new_values[block.rows]) if is_changed else mask

        return EachBlock(mask_block)
