"""Gradients of scores, block by block: every block is read once on the way forward and once on the way back.

A pass keeps the arguments of each block; on the way back a block runs again with gradients, and they go on to the block
before. For each weight there are the inputs x and the gradients g at its outputs, never a gradient of the weight's own
size: to first order a change D of it moves a score by the sum of g . D x over the tokens.

Each row of a batch may have several scores, its directions. Between blocks a model computes on a copy of the row for
each; inside a block the copies run as one, and only the gradients are as many as the directions.
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


# Dtype of gradients, and of the inputs of blocks until they run again: most of the memory.
GRADIENTS = torch.bfloat16


def choose_factors() -> torch.dtype:
    """Return what the factors of products are rounded to: bfloat16, where the CPU multiplies it faster than float32."""
    own = torch.cpu.get_capabilities()
    # Intel's without AMX have instructions for it that are slower (80 GFLOP/s of one core, 130 to 180 in float32);
    # AVX512-FP16 tells them from AMD's.
    fast = own.get("amx_bf16") or (own.get("avx512_bf16") and not own.get("avx512_fp16"))
    return torch.bfloat16 if fast else torch.float32


# Scores, on the way forward, are computed in float32 everywhere.
FACTORS = choose_factors()


@dataclass(frozen=True)
class ScoredBatch:
    """Batch of rows of one length, and their scores.

    Attributes
    ----------
    inputs : arguments of a forward pass, int64 [rows, tokens] each.
    directions : scores per row.
    positions : where the head is read, int64 [rows, positions].
    score : of logits [rows, directions, positions, vocabulary] makes the scores [rows, directions].
    """

    inputs: Mapping[str, torch.Tensor]
    directions: int
    positions: torch.Tensor
    score: Callable[[torch.Tensor], torch.Tensor]


class Product(NamedTuple):
    """Use of a weight in one batch: what it was multiplied with, and the gradients of the scores at its outputs.

    Attributes
    ----------
    batch : its number.
    inputs : [rows, tokens, in], of the dtype `GRADIENTS`; of an embedding its ids, int64 [rows, tokens].
    gradients : [rows, directions, tokens, out], of the dtype `GRADIENTS`.
    """

    batch: int
    inputs: torch.Tensor
    gradients: torch.Tensor


# Gets a module whose weights are loaded, and the products of each of its parameters.
Visit = Callable[[str, Mapping[str, Sequence[Product]]], None]


def compute_gradients(
    streamed: StreamedModel, weights: Sequence[LinearWeight], batches: Sequence[ScoredBatch], visit: Visit
) -> list[torch.Tensor]:
    """Return the scores of each batch, [rows, directions]; on the way back `visit` each block, single layer and
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
    """Advance all passes together, from block to block, and back; at the head, each goes there and back by itself: its
    gradients there are as large as a vocabulary."""
    waiting = {each: call for each in passes if (call := each.advance()) is not None}
    returned = set[int]()
    while waiting:
        first = next(iter(waiting.values()))
        module, is_back = first.module, first.is_back
        group = [each for each, call in waiting.items() if (call.module, call.is_back) == (module, is_back)]
        turns = is_back or module == head
        trim_heap()
        if turns:
            streamed.release()
        # A forward pass itself reads what else lies outside the blocks when it comes to it.
        with streamed.load(module) if turns or module in streamed.blocks else nullcontext():
            parameters = {
                weight.parameter: streamed.model.get_parameter(weight.parameter)
                for weight in weights
                if any(f"{own}.".startswith(f"{module}.") for own in weight.modules)
            }
            products: dict[str, list[Product]] = {name: [] for name in parameters}
            for each in group:
                call = waiting.pop(each)
                after = None if is_back else each.advance(each.run_forward(forwards[module], call))
                if turns:
                    with _multiply_in(FACTORS):
                        after = each.advance(each.run_backward(forwards[module], after or call, parameters, products))
                if after is not None:
                    waiting[each] = after
            if turns:
                visit(module, products)
                if module in streamed.blocks:
                    returned |= {product.batch for own in products.values() for product in own}
    if len(returned) < len(passes) and any(streamed.find_block(own.module) in streamed.blocks for own in weights):
        # XLNet's states are [tokens, rows], which are taken for rows only where there are as many.
        raise BlockwiseUnsupported("no gradient comes back to its blocks")


@contextmanager
def _multiply_in(dtype: torch.dtype) -> Iterator[None]:
    """Round the factors of products of float32 to a dtype; sums stay in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if dtype == torch.bfloat16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


Run = Callable[..., Any]
# Puts tensors in the places of those that arguments or outputs of a module had.
_Fill = Callable[[Sequence[torch.Tensor]], Any]
_TENSOR = object()


def _split(nested: Any) -> tuple[_Fill, list[torch.Tensor]]:
    """Split values into what fills their structure again, which does not hold their tensors, and these in order."""
    flat, spec = pytree.tree_flatten(nested)
    values = [_TENSOR if isinstance(value, torch.Tensor) else value for value in flat]

    def fill(tensors: Sequence[torch.Tensor]) -> Any:
        remaining = iter(tensors)
        return pytree.tree_unflatten([next(remaining) if value is _TENSOR else value for value in values], spec)

    return fill, [value for value in flat if isinstance(value, torch.Tensor)]


class _Call(NamedTuple):
    """Call of a module on the way forward, with one copy of each row; on the way back, with the `gradients` at the
    outputs, and which of the inputs need some."""

    module: str
    inputs: Sequence[torch.Tensor]
    fill: _Fill
    is_back: bool = False
    needed: Sequence[bool] = ()
    gradients: Sequence[torch.Tensor | None] = ()


class GradientPass(ForwardPass):
    """Pass of one batch through the model and back, which then has its `scores` [rows, directions]."""

    def __init__(self, model: PreTrainedModel, batch: ScoredBatch, number: int, head: str) -> None:
        inputs = {name: ids.repeat_interleave(batch.directions, 0) for name, ids in batch.inputs.items()}
        super().__init__(model, inputs, number)
        self._batch, self._head = batch, head
        self._rows, self._copies = len(batch.positions), batch.directions
        self.scores = torch.empty(0)
        # An input with a gradient, so that all outputs have one.
        self._leaf = torch.zeros((), requires_grad=True)
        # Tensors without a gradient go to all blocks: each is thinned out once.
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
            places = self._batch.positions.repeat_interleave(self._copies, 0)
            args = (args[0][torch.arange(len(places))[:, None], places], *args[1:])
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
            # An embedding: its weight was not multiplied with anything.
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
            own = torch.autograd.grad(
                [output for output, _ in pairs],
                [*sources, *(edge for _, _, edge, _ in watch.seen)],
                [gradient[:, direction] for _, gradient in pairs],
                retain_graph=direction + 1 < self._copies,
                allow_unused=True,
            )
            by_direction.append(own[: len(sources)])
            for (*_, shape), gradient, each in zip(watch.seen, own[len(sources) :], gradients, strict=True):
                each.append((torch.zeros(shape) if gradient is None else gradient).to(GRADIENTS))
        # Several weights read the same inputs.
        kept = {id(inputs): inputs.detach().to(GRADIENTS) for _, inputs, *_ in watch.seen}
        for (name, inputs, *_), each in zip(watch.seen, gradients, strict=True):
            # Tokens that were flattened are split by row again.
            tokens = [value.reshape(self._rows, -1, value.shape[-1]) for value in (kept[id(inputs)], *each)]
            products[name].append(Product(self.number, tokens[0], torch.stack(tokens[1:], 1)))
        joined = iter([_join_directions(each) for each in zip(*by_direction, strict=True)])
        return [next(joined) if needed else None for needed in call.needed]

    def _split_directions(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.reshape(self._rows, self._copies, *gradient.shape[1:])

    def thin(self, value: torch.Tensor, keep: bool) -> torch.Tensor:
        """Return one copy of each row, in a memory of its own; `keep` it for other calls with the same tensor.

        A row may be several of a tensor's: one per head, where attention is biased (BLOOM).
        """
        if self._copies == 1 or value.dim() < 2 or not value.numel() or len(value) % (self._rows * self._copies):
            return value.detach()
        copies = value.detach().reshape(self._rows, self._copies, -1, *value.shape[1:])
        if not keep:
            return copies[:, 0].clone().flatten(0, 1)
        if id(value) not in self._thinned:
            # As many heads as rows are not rows (MPT): they differ.
            alike = torch.equal(copies, copies[:, :1].expand_as(copies))
            self._thinned[id(value)] = value, copies[:, 0].clone().flatten(0, 1) if alike else value.detach()
        return self._thinned[id(value)][1]

    def has_rows(self, value: torch.Tensor) -> bool:
        """Return True if a module's output differs from row to row."""
        return value.dim() > 1 and len(value) == self._rows and value.is_floating_point()

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """Repeat each row for all directions."""
        # No view, as `repeat_interleave` gives: models scale what an embedding gives in its place (CTRL).
        rows = torch.arange(len(value)).repeat_interleave(self._copies) if self.has_rows(value) else None
        return value if rows is None else value[rows]


class _Stop(torch.autograd.Function):
    """Module that another thread runs, forward and back."""

    @staticmethod
    def forward(
        ctx: Any, own: GradientPass, module: str, fill: _Fill, returned: list[_Fill], _: Any, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        needed = ctx.needs_input_grad[5:]
        inputs = [own.thin(value, keep=not wanted) for value, wanted in zip(tensors, needed, strict=True)]
        ctx.inputs = [value.to(GRADIENTS) if wanted else value for value, wanted in zip(inputs, needed, strict=True)]
        ctx.own, ctx.module, ctx.fill = own, module, fill
        call = _Call(module, inputs, fill)
        del inputs
        outer, outputs = _split(own.hand_over(call))
        returned.append(outer)
        spread = [own.spread(value) for value in outputs]
        alike = [value for value, one in zip(spread, outputs, strict=True) if not own.has_rows(one)]
        ctx.mark_non_differentiable(*alike)
        ctx.set_materialize_grads(False)
        return tuple(spread)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        call = _Call(ctx.module, ctx.inputs, ctx.fill, True, ctx.needs_input_grad[5:], grads)
        ctx.inputs = None
        return (None,) * 5 + tuple(ctx.own.hand_over(call))


def _join_directions(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Join the gradients of all directions at an input, in the order of the copies of its rows."""
    known = [value for value in gradients if value is not None]
    if not known:
        return None
    filled = [torch.zeros_like(known[0]) if value is None else value for value in gradients]
    return filled[0] if len(filled) == 1 else torch.stack(filled, 1).flatten(0, 1)


class _GradientWatch(TorchFunctionMode):
    """Recorder of every product with one of these weights: its name, the inputs, the edge of the graph at the output,
    which stays what it is where the model overwrites that (Longformer's queries), and its shape; not with a part of
    one, as experts are, nor with several (DeepSeek V4)."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in weights.items()}
        self._sizes = {name: tensor.numel() for name, tensor in weights.items()}
        self.seen: list[tuple[str, torch.Tensor, GradientEdge, torch.Size]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **kwargs or {})
        if (places := OPERANDS.get(func)) and len(args) > places[1]:
            inputs, weight = (args[place] for place in places)
            name = self._names.get(weight.untyped_storage().data_ptr())
            if name is not None and weight.numel() == self._sizes[name] and weight.dim() == 2 and output.requires_grad:
                self.seen.append((name, inputs, get_gradient_edge(output), output.shape))
        return output
