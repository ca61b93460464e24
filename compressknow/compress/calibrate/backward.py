"""Gradients of scores, block by block: every block is read once in the forward and once in the backward pass.

A pass keeps the arguments of each block; in the backward pass a block runs again with gradients, which are passed on to
the block before it. For each weight this gives the inputs x and the gradients g at its outputs, never a gradient of the
weight's own size: to first order, a change D of the weight moves a score by the sum of g . D x over the tokens.

Each row of a batch may have several scores, called directions. Between blocks, the model computes on one copy of the
row per direction; inside a block the copies run as one, and only the gradients are computed per direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from compressknow.base.system import trim_heap
from compressknow.compress.calibrate.gathering import OPERANDS
from compressknow.compress.calibrate.model import (
    BlockwiseUnsupported,
    ForwardPass,
    StreamedModel,
    intercept,
    translate_failures,
)
from compressknow.model.structure import LinearWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Dtype of stored gradients and block inputs, which take most of the memory.
GRADIENTS = torch.bfloat16


def choose_factors() -> torch.dtype:
    """Return the dtype for factors of products: bfloat16 if the CPU multiplies it faster than float32."""
    capabilities = torch.cpu.get_capabilities()
    # On Intel CPUs without AMX, bfloat16 instructions are slower (80 GFLOP/s per core, 130 to 180 in float32).
    # AVX512-FP16 distinguishes these from AMD's.
    has_amx, has_avx, is_intel = (capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "avx512_fp16"))
    return torch.bfloat16 if has_amx or (has_avx and not is_intel) else torch.float32


# For backward passes. Scores, from forward passes, are always computed in float32.
FACTORS = choose_factors()


@dataclass(frozen=True)
class ScoredBatch:
    """Batch of rows of equal length, and how to score them.

    Attributes
    ----------
    inputs : arguments of a forward pass, int64 [rows, tokens] each.
    directions : scores per row.
    positions : positions at which the head is computed, int64 [rows, positions].
    score : computes scores [rows, directions] from logits [rows, directions, positions, vocabulary].
    """

    inputs: Mapping[str, torch.Tensor]
    directions: int
    positions: torch.Tensor
    score: Callable[[torch.Tensor], torch.Tensor]


class Product(NamedTuple):
    """Use of a weight in one batch: its inputs, and the gradients of the scores at its outputs.

    Attributes
    ----------
    batch : the batch's number.
    inputs : [rows, tokens, in], in the dtype `GRADIENTS`; for an embedding its ids, int64 [rows, tokens].
    gradients : [rows, directions, tokens, out], in the dtype `GRADIENTS`.
    """

    batch: int
    inputs: torch.Tensor
    gradients: torch.Tensor


# Takes a module whose weights are loaded, and the products of each of its parameters.
Visit = Callable[[str, Mapping[str, Sequence[Product]]], None]


def compute_gradients(
    streamed: StreamedModel, weights: Sequence[LinearWeight], batches: Sequence[ScoredBatch], visit: Visit
) -> list[torch.Tensor]:
    """Return the scores of each batch, [rows, directions]; in the backward pass, `visit` each block, single layer and
    embedding.

    Raises BlockwiseUnsupported if the model does not run block by block.
    """
    output = streamed.model.get_output_embeddings()
    head = next((name for name, module in streamed.model.named_modules() if module is output), None)
    if head is None:
        raise BlockwiseUnsupported(f"{type(streamed.model).__name__} has no head")
    # MusicGen has a list of them.
    rows = getattr(streamed.model.get_input_embeddings(), "weight", torch.empty(0)).shape[0]
    embeddings = [
        name
        for name, module in streamed.model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight.shape[0] == rows
    ]
    layers = [weight.module for weight in weights if streamed.find_block(weight.module) == weight.module]
    modules = dict.fromkeys([*streamed.blocks, *layers, head, *embeddings])
    passes = [GradientPass(streamed.model, batch, number, head) for number, batch in enumerate(batches)]
    with intercept(streamed.model, modules, passes) as forwards:
        _run(streamed, passes, forwards, weights, visit, head)
    return [each.scores for each in passes]


def _run(
    streamed: StreamedModel,
    passes: Sequence[GradientPass],
    forwards: Mapping[str, Run],
    weights: Sequence[LinearWeight],
    visit: Visit,
    head: str,
) -> None:
    """Advance all passes together, from block to block, and back. At the head, one pass after the other runs forward
    and back, since its gradients there are as large as the vocabulary."""
    waiting = {each: call for each in passes if (call := each.advance()) is not None}
    returned = set[int]()
    while waiting:
        first = next(iter(waiting.values()))
        module, is_back = first.module, first.is_back
        group = [each for each, call in waiting.items() if (call.module, call.is_back) == (module, is_back)]
        runs_back = is_back or module == head
        trim_heap()
        if runs_back:
            streamed.release()
        # In a forward pass, other layers outside the blocks are read when they run.
        with streamed.load(module) if runs_back or module in streamed.blocks else nullcontext():
            parameters = {
                weight.parameter: streamed.model.get_parameter(weight.parameter)
                for weight in weights
                if any(f"{name}.".startswith(f"{module}.") for name in weight.modules)
            }
            products: dict[str, list[Product]] = {name: [] for name in parameters}
            for each in group:
                call = waiting.pop(each)
                following = None if is_back else each.advance(each.run_forward(forwards[module], call))
                if runs_back:
                    with _multiply_in(FACTORS):
                        gradients = each.run_backward(forwards[module], following or call, parameters, products)
                        following = each.advance(gradients)
                if following is not None:
                    waiting[each] = following
            if runs_back:
                visit(module, products)
                if module in streamed.blocks:
                    returned |= {product.batch for uses in products.values() for product in uses}
    if len(returned) < len(passes) and any(streamed.find_block(each.module) in streamed.blocks for each in weights):
        # XLNet's states are [tokens, rows], which look like rows only if there are equally many of both.
        raise BlockwiseUnsupported("no gradient reaches its blocks")


@contextmanager
def _multiply_in(dtype: torch.dtype) -> Iterator[None]:
    """Round the factors of float32 products to a dtype; sums stay in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


Run = Callable[..., Any]
# Rebuilds the arguments or outputs of a module with other tensors.
_Fill = Callable[[Sequence[torch.Tensor]], Any]
_TENSOR = object()


def _split(nested: Any) -> tuple[_Fill, list[torch.Tensor]]:
    """Split nested values into a function that rebuilds them from tensors, and their tensors in order."""
    flat, spec = pytree.tree_flatten(nested)
    values = [_TENSOR if isinstance(value, torch.Tensor) else value for value in flat]

    def fill(tensors: Sequence[torch.Tensor]) -> Any:
        remaining = iter(tensors)
        return pytree.tree_unflatten([next(remaining) if value is _TENSOR else value for value in values], spec)

    return fill, [value for value in flat if isinstance(value, torch.Tensor)]


class _Call(NamedTuple):
    """Call of a module with one copy of each row; in the backward pass (`is_back`), also with the `gradients` at its
    outputs, and which of its inputs need some."""

    module: str
    inputs: Sequence[torch.Tensor]
    fill: _Fill
    is_back: bool = False
    needed: Sequence[bool] = ()
    gradients: Sequence[torch.Tensor | None] = ()


class GradientPass(ForwardPass):
    """Forward and backward pass of one batch, which also computes its `scores` [rows, directions]."""

    def __init__(self, model: PreTrainedModel, batch: ScoredBatch, number: int, head: str) -> None:
        inputs = {name: ids.repeat_interleave(batch.directions, 0) for name, ids in batch.inputs.items()}
        super().__init__(model, inputs, number)
        self._batch, self._head = batch, head
        self._rows, self._copies = len(batch.positions), batch.directions
        self.scores = torch.empty(0)
        # An input that requires a gradient, so that all outputs do.
        self._leaf = torch.zeros((), requires_grad=True)
        # Tensors without a gradient, which go to all blocks: their copies are removed only once.
        self._thinned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def compute(self) -> None:
        with torch.enable_grad():
            logits = self._model(**self._inputs).logits.float()
            scores = self._batch.score(logits.reshape(self._rows, self._copies, *logits.shape[1:]))
            del logits
            self.scores = scores.detach()
            scores.sum().backward()  # type: ignore[no-untyped-call]

    def stop_before(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module == self._head:
            positions = self._batch.positions.repeat_interleave(self._copies, 0)
            args = (args[0][torch.arange(len(positions))[:, None], positions], *args[1:])
        fill, tensors = _split((args, kwargs))
        returned: list[_Fill] = []
        outputs = _Stop.apply(self, module, fill, returned, self._leaf, *tensors)  # type: ignore[no-untyped-call]
        return returned[0](outputs)

    def run_forward(self, run: Run, call: _Call) -> Any:
        """Run a module without gradients, for one copy of each row."""
        args, kwargs = call.fill(call.inputs)
        with torch.no_grad(), translate_failures():
            return run(*args, **kwargs)

    def run_backward(
        self, run: Run, call: _Call, parameters: Mapping[str, torch.Tensor], products: dict[str, list[Product]]
    ) -> list[torch.Tensor | None]:
        """Return the gradients at the inputs of a module, from those at its outputs; add the uses of its weights to
        `products`."""
        if not any(call.needed):
            if not hasattr(self._model.get_submodule(call.module), "weight"):
                raise BlockwiseUnsupported(f"what {call.module} reads comes from no embedding")
            # This is an embedding, whose weight was not multiplied.
            (gradient,) = call.gradients
            if gradient is not None:
                lookup = Product(self.number, call.inputs[0], self._split_directions(gradient.to(GRADIENTS)))
                products.setdefault(f"{call.module}.weight", []).append(lookup)
            return [None] * len(call.inputs)
        leaves = [
            value.float().requires_grad_() if needed else value
            for value, needed in zip(call.inputs, call.needed, strict=True)
        ]
        args, kwargs = call.fill(leaves)
        with torch.enable_grad(), _GradientWatch(parameters) as watch, translate_failures():
            _, outputs = _split(run(*args, **kwargs))
        pairs = [
            (output, self._split_directions(gradient))
            for output, gradient in zip(outputs, call.gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        sources = [leaf for leaf, needed in zip(leaves, call.needed, strict=True) if needed]
        by_direction = []
        gradients: list[list[torch.Tensor]] = [[] for _ in watch.seen]
        for direction in range(self._copies):
            computed = torch.autograd.grad(
                [output for output, _ in pairs],
                [*sources, *(edge for _, _, edge, _ in watch.seen)],
                [gradient[:, direction] for _, gradient in pairs],
                retain_graph=direction + 1 < self._copies,
                allow_unused=True,
            )
            by_direction.append(computed[: len(sources)])
            for (*_, shape), gradient, each in zip(watch.seen, computed[len(sources) :], gradients, strict=True):
                each.append((torch.zeros(shape) if gradient is None else gradient).to(GRADIENTS))
        # Several weights may read the same inputs, which are converted once.
        converted = {id(inputs): inputs.detach().to(GRADIENTS) for _, inputs, *_ in watch.seen}
        for (name, inputs, *_), each in zip(watch.seen, gradients, strict=True):
            # Flattened tokens are split by row again.
            tokens = [value.reshape(self._rows, -1, value.shape[-1]) for value in (converted[id(inputs)], *each)]
            products[name].append(Product(self.number, tokens[0], torch.stack(tokens[1:], 1)))
        joined = iter([_join_directions(each) for each in zip(*by_direction, strict=True)])
        return [next(joined) if needed else None for needed in call.needed]

    def _split_directions(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.reshape(self._rows, self._copies, *gradient.shape[1:])

    def thin(self, value: torch.Tensor, keep: bool) -> torch.Tensor:
        """Return one copy of each row, in memory of its own; `keep` it for other calls with the same tensor.

        A row of the batch may be several of the tensor, such as one per head in attention biases (BLOOM).
        """
        if self._copies == 1 or value.dim() < 2 or not value.numel() or len(value) % (self._rows * self._copies):
            return value.detach()
        copies = value.detach().reshape(self._rows, self._copies, -1, *value.shape[1:])
        if not keep:
            return copies[:, 0].clone().flatten(0, 1)
        if id(value) not in self._thinned:
            # If the copies differ, these are not rows, but as many heads (MPT).
            are_equal = torch.equal(copies, copies[:, :1].expand_as(copies))
            self._thinned[id(value)] = value, copies[:, 0].clone().flatten(0, 1) if are_equal else value.detach()
        return self._thinned[id(value)][1]

    def has_rows(self, value: torch.Tensor) -> bool:
        """Return True if a module's output is per row."""
        return value.dim() > 1 and len(value) == self._rows and value.is_floating_point()

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """Repeat each row for all directions."""
        # Not `repeat_interleave`, which may return a view: models scale an embedding's output in place (CTRL).
        rows = torch.arange(len(value)).repeat_interleave(self._copies) if self.has_rows(value) else None
        return value if rows is None else value[rows]


class _Stop(torch.autograd.Function):
    """Module that another thread runs, forward and back."""

    @staticmethod
    def forward(
        ctx: Any, batch: GradientPass, module: str, fill: _Fill, returned: list[_Fill], _: Any, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        needed = ctx.needs_input_grad[5:]
        inputs = [batch.thin(value, keep=not is_needed) for value, is_needed in zip(tensors, needed, strict=True)]
        ctx.inputs = [each.to(GRADIENTS) if is_needed else each for each, is_needed in zip(inputs, needed, strict=True)]
        ctx.batch, ctx.module, ctx.fill = batch, module, fill
        call = _Call(module, inputs, fill)
        del inputs
        outer, outputs = _split(batch.hand_over(call))
        returned.append(outer)
        spread = [batch.spread(value) for value in outputs]
        constant = [value for value, output in zip(spread, outputs, strict=True) if not batch.has_rows(output)]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return tuple(spread)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        call = _Call(ctx.module, ctx.inputs, ctx.fill, True, ctx.needs_input_grad[5:], grads)
        ctx.inputs = None
        return (None,) * 5 + tuple(ctx.batch.hand_over(call))


def _join_directions(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Join the gradients of all directions at an input, in the order of the copies of its rows."""
    known = [value for value in gradients if value is not None]
    if not known:
        return None
    filled = [torch.zeros_like(known[0]) if value is None else value for value in gradients]
    return filled[0] if len(filled) == 1 else torch.stack(filled, 1).flatten(0, 1)


class _GradientWatch(TorchFunctionMode):
    """Context that records every product with one of these weights: its name, the inputs, the graph edge at the output,
    which stays valid if the model overwrites the output (Longformer's queries), and the output's shape. Products with
    part of a weight (experts) or with several (DeepSeek V4) are not recorded."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in weights.items()}
        self._sizes = {name: tensor.numel() for name, tensor in weights.items()}
        self.seen: list[tuple[str, torch.Tensor, GradientEdge, torch.Size]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if (positions := OPERANDS.get(func)) and len(args) > positions[1]:
            inputs, weight = (args[position] for position in positions)
            name = self._names.get(weight.untyped_storage().data_ptr())
            if name is not None and weight.numel() == self._sizes[name] and weight.dim() == 2 and output.requires_grad:
                self.seen.append((name, inputs, get_gradient_edge(output), output.shape))
        return output
