"""SmoothQuant: part of the activations' outliers moves into the weights, and a norm is divided instead of them.

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", section 4,
equation 4: channel j of the activations is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and column j of the
weights is multiplied by it. The norm before the weights is divided instead of its outputs, so it may feed nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.compress.blocks import Pool
from compressknow.compress.calibrate.gathering import OPERANDS, InputStatistics, InputSums
from compressknow.compress.calibrate.model import BlockwiseUnsupported, StreamedModel
from compressknow.compress.calibrate.walk import Visitor, find_tensors, group_by_block, walk
from compressknow.compress.plan import Plan, PlannedTensor, make_plan
from compressknow.engine.language_model import count_embedding_rows
from compressknow.model.groups import read_structure
from compressknow.model.tensors import OpenFiles

SMALLEST = 1e-5
# Enough tokens to show what a block's layers read.
TRIAL_TOKENS = 8
SHARED_WEIGHTS = "Its blocks share their weights, and each use needs other factors."
NOT_BLOCKWISE = "Its blocks cannot be run one by one."


def find_norms(
    block: str, module: nn.Module, weights: Mapping[str, torch.Tensor], run: Callable[[], Any]
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Find the norms in a block that can be divided: they feed only Linear weights, which read nothing else. Yield the
    name of each, the parameters that multiply its outputs, and the number that the norm adds to its weight before use
    (1 in Gemma's, else 0).

    `block` is the name of `module`, which has its weights; `weights` may be smoothed, by name; `run` runs the block on
    some text, and returns its output.
    """
    recorder = _Recorder(module, weights)
    with recorder:
        returned = recorder.find_norms(_find_addresses(run()))
    for name, norm in recorder.norms.items():
        readers = tuple(reader for reader, norms in recorder.sources.items() if name in norms)
        is_only_source = all(len(recorder.sources[reader]) == 1 for reader in readers)
        if readers and is_only_source and name not in returned | recorder.elsewhere:
            offset = _find_offset(norm, recorder.inputs[name])
            if offset is not None:
                yield f"{block}.{name}" if name else block, readers, offset


def _find_addresses(values: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in find_tensors(values)}


class _Recorder(TorchFunctionMode):
    """Context that records what a block's norms read, and what reads their outputs.

    Attributes
    ----------
    inputs : the input of each norm.
    sources : by Linear weight, the norms whose outputs it reads; None for other inputs.
    elsewhere : norms whose outputs are also read by anything other than these weights.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in weights.items()}
        self.norms = {
            name: child
            for name, child in module.named_modules()
            if type(child).__name__.endswith("Norm") and getattr(getattr(child, "weight", None), "ndim", 0) == 1
        }
        self.inputs: dict[str, torch.Tensor] = {}
        self.sources: dict[str, set[str | None]] = {}
        self.elsewhere: set[str] = set()
        # Each output and its norm, by address. Holding the output keeps other tensors from reusing its address.
        self._outputs: dict[int, tuple[torch.Tensor, str]] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> _Recorder:
        for name, norm in self.norms.items():
            self._hooks.callback(norm.register_forward_hook(partial(self._record_output, name)).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def _record_output(self, name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, torch.Tensor):
            self.inputs[name] = args[0]
            self._outputs[output.untyped_storage().data_ptr()] = output, name

    def find_norms(self, addresses: set[int]) -> set[str]:
        """Return the norms whose outputs are at these addresses."""
        return {self._outputs[address][1] for address in addresses if address in self._outputs}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self._outputs.keys() & _find_addresses([*args, *(kwargs or {}).values()])
        result = func(*args, **kwargs or {})
        results = _find_addresses(result) if read else set()
        # A view does not use the values yet; what reads the view will be recorded.
        used = self.find_norms(read - results) if results else set()
        name = None
        if (operands := OPERANDS.get(func)) and len(args) > operands[1]:
            name = self._names.get(args[operands[1]].untyped_storage().data_ptr())
        if name is None:
            self.elsewhere |= used
        else:
            self.sources.setdefault(name, set()).update(used or {None})
        return result


def _find_offset(norm: nn.Module, inputs: torch.Tensor) -> float | None:
    """Find the number that a norm adds to its weight, by trial: 0 or 1, or None if neither divides its output."""
    with torch.no_grad():
        before = norm(inputs)
        factors = torch.linspace(0.5, 2, before.shape[-1])
        for offset in (0.0, 1.0):
            divided = {name: parameter / factors for name, parameter in norm.named_parameters(recurse=False)}
            divided["weight"] = (norm.get_parameter("weight") + offset) / factors - offset
            after = functional_call(norm, divided, (inputs,))
            if torch.allclose(after * factors, before, rtol=1e-3, atol=1e-5):
                return offset
    return None


def compute_factors(statistics: InputStatistics, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """Compute s [channels], float32, by equation 4, for all `weights` [out, channels] with these inputs; 1 for channels
    that are always zero."""
    assert statistics.peaks is not None
    peaks = statistics.peaks
    largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    factors = peaks.clamp(min=SMALLEST) ** alpha / largest.clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where((peaks > 0) & (largest > 0), factors.clamp(min=SMALLEST), 1.0)


def divide_stored(weight: torch.Tensor, factors: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's weight in its own dtype; return it with the exact factors after rounding, by which the weights
    behind it are multiplied."""
    original = weight.to(torch.float32) + offset
    divided = (original / factors - offset).to(weight.dtype)
    written = divided.to(torch.float32) + offset
    usable = (written != 0) & (original != 0)
    return torch.where(usable, divided, weight), torch.where(usable, original / written, 1.0)


def divide_statistics(statistics: InputStatistics, factors: torch.Tensor) -> InputStatistics:
    """Return the statistics of the same inputs divided by `factors`."""

    def divide(products: torch.Tensor | None) -> torch.Tensor | None:
        return None if products is None else products / factors[:, None] / factors[None, :]

    return replace(
        statistics,
        squares=statistics.squares / factors.square(),
        peaks=None if statistics.peaks is None else statistics.peaks / factors,
        products=divide(statistics.products),
        drift=divide(statistics.drift),
    )


def find_alphas(tensors: Iterable[PlannedTensor]) -> dict[str, float]:
    return {each.parameter: each.quantize.smooth for each in tensors if each.quantize and each.quantize.smooth}


def raise_unsmoothable(module: str, *, by_scope: bool = False) -> NoReturn:
    """Raise UnsupportedError for a block without a norm that can be divided, or `by_scope` without one in the scope."""
    raise UnsupportedError(
        f"Nothing in {module} can be smoothed.",
        why="Outliers can only be moved out of a norm that feeds quantized layers and nothing else.",
        hint=f"Leave --smooth out{', or extend --scope to all layers that read a norm' if by_scope else ''}.",
    )


def check_no_smoothing(plan: Plan, why: str) -> None:
    if plan.recipe.smooths:
        what = f"{plan.structure.architecture} cannot be smoothed."
        raise UnsupportedError(what, why=why, hint="Leave --smooth out.")


def split_scope(plan: Plan) -> tuple[list[PlannedTensor], list[PlannedTensor]]:
    """Return the weights in scope that a text reaches, in two lists: those used several times, and those used once."""
    repeats = {weight.parameter: weight.uses > 1 or bool(weight.sharing) for weight in plan.structure.linears}
    targets = [tensor for tensor in plan.tensors if tensor.in_scope and tensor.group != "vision"]
    several = [tensor for tensor in targets if repeats[tensor.parameter]]
    return several, [tensor for tensor in targets if not repeats[tensor.parameter]]


def check_smoothable(plan: Plan) -> None:
    """Raise UnsupportedError if a block to be smoothed has no norm that can take it, UsageError if two steps smooth a
    norm differently. A few tokens tell, before the model writes a text."""
    if not plan.recipe.smooths:
        return
    if plan.removal and not plan.removal.is_decided:
        # It is not known yet what is dropped; a norm feeds the same layers as in the whole model.
        checkpoint, tree = plan.removal.original
        plan = make_plan(checkpoint, tree, read_structure(tree, plan.recipe.module_map), plan.recipe)
    with OpenFiles() as files, Pool(1) as pool:
        streamed = StreamedModel(plan.tree, plan.sources, files)
        several, once = split_scope(plan)
        if several:
            check_no_smoothing(plan, SHARED_WEIGHTS)
        visitor = _SmoothingTrial(once, streamed, pool)
        ids = torch.arange(TRIAL_TOKENS)[None] % count_embedding_rows(streamed.model)
        decoder = {"decoder_input_ids": ids} if streamed.model.config.is_encoder_decoder else {}
        try:
            walk(streamed, [{"input_ids": ids, **decoder}], visitor, pool)
        except BlockwiseUnsupported:
            check_no_smoothing(plan, NOT_BLOCKWISE)


class _SmoothingTrial(Visitor):
    """Visitor of one block of each kind to smooth, that is, of one class with the same weights to smooth."""

    def __init__(self, tensors: Sequence[PlannedTensor], streamed: StreamedModel, pool: Pool) -> None:
        self._streamed, self._pool = streamed, pool
        targets = group_by_block(streamed, tensors)
        smoothed = {module: alphas for module, group in targets.items() if (alphas := find_alphas(group))}
        self._blocks = {module: alphas for module, alphas in smoothed.items() if module in streamed.blocks}
        if not self._blocks:
            raise_unsmoothable(next(iter(smoothed)), by_scope=True)
        self._untried = {self._find_kind(module) for module in self._blocks}

    def _find_kind(self, module: str) -> tuple[Any, ...]:
        alphas = {name.removeprefix(module): alpha for name, alpha in self._blocks.get(module, {}).items()}
        return type(self._streamed.model.get_submodule(module)), *sorted(alphas.items())

    @property
    def is_done(self) -> bool:
        return not self._untried

    def list_watched(self, module: str) -> Collection[str]:
        return self._blocks.get(module, ()) if self._find_kind(module) in self._untried else ()

    def get_sums(self, module: str) -> InputSums:
        return InputSums(self.list_watched(module), products=False, peaks=False, check=self._pool.check)

    def visit(self, module: str, rerun: Callable[[], Any]) -> None:
        alphas, model = self._blocks[module], self._streamed.model
        weights, block = {name: model.get_parameter(name) for name in alphas}, model.get_submodule(module)
        norms = list(find_norms(module, block, weights, rerun))
        if not norms:
            linears = {name: each.weight for name, each in block.named_modules() if isinstance(each, nn.Linear)}
            raise_unsmoothable(module, by_scope=any(find_norms(module, block, linears, rerun)))
        for norm, readers, _ in norms:
            if len(strengths := sorted({alphas[reader] for reader in readers})) > 1:
                raise UsageError(
                    f"Two steps smooth the output of {norm}, by {strengths[0]:g} and by {strengths[1]:g}.",
                    why="It can be divided only once, for all layers that read it.",
                    hint="Give these steps the same value of `smooth`.",
                )
        self._untried.remove(self._find_kind(module))
