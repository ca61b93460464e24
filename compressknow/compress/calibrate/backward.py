"""Gradients of scores, block by block: every block is read once on the way forward and once on the way back.

Many batches go through a model side by side (`compressknow.compress.calibrate.walk`). A pass keeps what each block
was called with; on the way back a block runs again with gradients, and they go on to the block before. Of each weight
there are the inputs x and the gradients g at its outputs, never a gradient of the weight's own size: to first order a
change D of it moves a score by the sum of g . D x over the tokens.

Each row of a batch may have several scores, its directions. Between blocks a model computes on a copy of the row for
each; inside a block the copies run as one, and only the gradients are as many as the directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from compressknow.compress.calibrate.forward import Call, ForwardPass, NotApart, failing_apart, stopping_before
from compressknow.compress.calibrate.gathering import OPERANDS
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.model.structure import LinearWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """Rows of one length, and their scores.

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
    """What one use of a weight, in one batch, was multiplied with, and what the scores say of its outputs.

    Attributes
    ----------
    batch : its number.
    inputs : float32 [rows, tokens, in]; of an embedding its ids, int64 [rows, tokens].
    gradients : float32 [rows, directions, tokens, out].
    """

    batch: int
    inputs: torch.Tensor
    gradients: torch.Tensor


# A module whose weights are loaded, and by parameter what it was used for.
Visit = Callable[[str, Mapping[str, Sequence[Product]]], None]


def gradients(
    streamed: StreamedModel, weights: Sequence[LinearWeight], batches: Sequence[Batch], visit: Visit
) -> list[torch.Tensor]:
    """Return the scores of each batch, [rows, directions]; on the way back `visit` each block, single layer and
    embedding.

    Raises NotApart where the model does not run block by block.
    """
    head = _head_of(streamed.model)
    modules = dict.fromkeys(
        [*streamed.blocks, *_alone(streamed.blocks, weights), head, *_embeddings_of(streamed.model)]
    )
    watched = {
        module: [
            weight.parameter for weight in weights if any(f"{own}.".startswith(f"{module}.") for own in weight.modules)
        ]
        for module in modules
    }
    with stopping_before(streamed.model, list(modules)) as forwards:
        passes = [GradientPass(streamed.model, batch, number, head) for number, batch in enumerate(batches)]
        try:
            _run(streamed, passes, forwards, watched, visit)
        finally:
            for each in passes:
                each.close()
    return [each.scores for each in passes]


def _run(
    streamed: StreamedModel,
    passes: Sequence[GradientPass],
    forwards: Mapping[str, Callable[..., Any]],
    watched: Mapping[str, Sequence[str]],
    visit: Visit,
) -> None:
    """All passes, from block to block together."""
    waiting = {each.number: call for each in passes if (call := each.advance()) is not None}
    while waiting:
        first = next(iter(waiting.values()))
        module, kind = first.module, type(first.args[0])
        group = [number for number, call in waiting.items() if (call.module, type(call.args[0])) == (module, kind)]
        if kind is _Forward:
            # What lies outside the blocks a forward pass reads itself when it comes to it.
            with streamed.loaded(module) if module in streamed.blocks else nullcontext():
                answers = {number: passes[number].forward(forwards[module], waiting[number]) for number in group}
        else:
            streamed.let_go()
            with streamed.loaded(module):
                parameters = {name: streamed.model.get_parameter(name) for name in watched[module]}
                products: dict[str, list[Product]] = {name: [] for name in parameters}
                answers = {
                    number: passes[number].backward(forwards[module], waiting[number], parameters, products)
                    for number in group
                }
                visit(module, products)
        for number in group:
            call = passes[number].advance(answers.pop(number))
            if call is None:
                del waiting[number]
            else:
                waiting[number] = call


class _Form(NamedTuple):
    """Arguments or outputs of a module, without their tensors."""

    values: Sequence[Any]
    is_tensor: Sequence[bool]
    spec: Any

    @classmethod
    def of(cls, nested: Any) -> tuple[_Form, list[torch.Tensor]]:
        """The form, and the tensors in their order."""
        flat, spec = pytree.tree_flatten(nested)
        is_tensor = [isinstance(value, torch.Tensor) for value in flat]
        values = [None if is_own else value for value, is_own in zip(flat, is_tensor, strict=True)]
        return cls(values, is_tensor, spec), [value for value in flat if isinstance(value, torch.Tensor)]

    def fill(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What `of` was given, with these tensors in it."""
        own = iter(tensors)
        flat = [next(own) if is_own else value for value, is_own in zip(self.values, self.is_tensor, strict=True)]
        return pytree.tree_unflatten(flat, self.spec)


class _Forward(NamedTuple):
    """What a module is called with: one copy of each row."""

    inputs: Sequence[torch.Tensor]
    form: _Form


class _Backward(NamedTuple):
    """The same once more, which of the inputs need gradients, and those at the outputs."""

    inputs: Sequence[torch.Tensor]
    form: _Form
    needed: Sequence[bool]
    gradients: Sequence[torch.Tensor | None]


class GradientPass(ForwardPass):
    """One batch on its way through the model and back.

    Attributes
    ----------
    scores : [rows, directions], when it is over.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch, number: int, head: str) -> None:
        super().__init__(
            model, {name: ids.repeat_interleave(batch.directions, 0) for name, ids in batch.inputs.items()}
        )
        self._batch, self.number, self._head = batch, number, head
        self._rows, self._copies = len(batch.positions), batch.directions
        self.scores = torch.empty(0)
        # An input with a gradient, so that all outputs have one.
        self._leaf = torch.zeros((), requires_grad=True)
        # Tensors without a gradient, which all blocks are given: each is thinned out once.
        self._thinned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def compute(self) -> None:
        with torch.enable_grad():
            logits = self.run_model().logits.float()
            scores = self._batch.score(logits.reshape(self._rows, self._copies, *logits.shape[1:]))
            del logits
            self.scores = scores.detach()
            scores.sum().backward()  # type: ignore[no-untyped-call]

    def stop_before(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module == self._head:
            places = self._batch.positions.repeat_interleave(self._copies, 0)
            args = (args[0][torch.arange(len(places))[:, None], places], *args[1:])
        form, tensors = _Form.of((args, kwargs))
        returned: list[_Form] = []
        outputs = _Stop.apply(self, module, form, returned, self._leaf, *tensors)  # type: ignore[no-untyped-call]
        return returned[0].fill(outputs)

    def hand_over(self, module: str, work: _Forward | _Backward) -> Any:
        """In the pass's own thread: stop, until the module's output or gradients are there."""
        return super().stop_before(module, (work,), {})

    def forward(self, run: Callable[..., Any], call: Call) -> Any:
        """A module's output, without gradients, for one copy of each row."""
        (work,) = call.args
        args, kwargs = work.form.fill(work.inputs)
        with torch.no_grad():
            return run(*args, **kwargs)

    def backward(
        self,
        run: Callable[..., Any],
        call: Call,
        parameters: Mapping[str, torch.Tensor],
        products: dict[str, list[Product]],
    ) -> list[torch.Tensor | None]:
        """Gradients at the inputs of a module, of those at its outputs; what they say of its weights is added to
        `products`."""
        (work,) = call.args
        if not any(work.needed):
            # An embedding: its weight was not multiplied with anything.
            (gradient,) = work.gradients
            if gradient is not None:
                lookup = Product(self.number, work.inputs[0], self._by_direction(gradient))
                products.setdefault(f"{call.module}.weight", []).append(lookup)
            return [None] * len(work.inputs)
        leaves = [
            value.detach().requires_grad_() if needed else value
            for value, needed in zip(work.inputs, work.needed, strict=True)
        ]
        args, kwargs = work.form.fill(leaves)
        with torch.enable_grad(), _GradientWatch(parameters) as watch, failing_apart():
            _, outputs = _Form.of(run(*args, **kwargs))
        pairs = [
            (output, self._by_direction(gradient))
            for output, gradient in zip(outputs, work.gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        sources = [leaf for leaf, needed in zip(leaves, work.needed, strict=True) if needed]
        found = []
        for direction in range(self._copies):
            own = torch.autograd.grad(
                [output for output, _ in pairs],
                [*sources, *(use.output for use in watch.seen)],
                [gradient[:, direction] for _, gradient in pairs],
                retain_graph=direction + 1 < self._copies,
                allow_unused=True,
            )
            found.append(own[: len(sources)])
            for use, gradient in zip(watch.seen, own[len(sources) :], strict=True):
                use.gradients.append(torch.zeros_like(use.output) if gradient is None else gradient)
        for use in watch.seen:
            products[use.name].append(use.product(self.number, self._rows))
        joined = iter([_joined(each) for each in zip(*found, strict=True)])
        return [next(joined) if needed else None for needed in work.needed]

    def _by_direction(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.reshape(self._rows, self._copies, *gradient.shape[1:])

    def thin(self, value: torch.Tensor, keep: bool) -> torch.Tensor:
        """One copy of each row, in a memory of its own; `keep` it for other calls with the same tensor."""
        if self._copies == 1 or value.dim() < 2 or len(value) != self._rows * self._copies:
            return value.detach()
        if not keep:
            return value.detach()[:: self._copies].clone()
        if id(value) not in self._thinned:
            self._thinned[id(value)] = value, value[:: self._copies].clone()
        return self._thinned[id(value)][1]

    def has_rows(self, value: torch.Tensor) -> bool:
        """Whether a module's output differs from row to row."""
        return value.dim() > 1 and len(value) == self._rows and value.is_floating_point()

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """As many copies of each row as there are directions."""
        return value.repeat_interleave(self._copies, 0) if self.has_rows(value) else value


class _Stop(torch.autograd.Function):
    """A module that another thread runs, forward and back."""

    @staticmethod
    def forward(
        ctx: Any, own: GradientPass, module: str, form: _Form, returned: list[_Form], _: Any, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        needed = ctx.needs_input_grad[5:]
        ctx.inputs = [own.thin(value, keep=not wanted) for value, wanted in zip(tensors, needed, strict=True)]
        ctx.own, ctx.module, ctx.form = own, module, form
        outer, outputs = _Form.of(own.hand_over(module, _Forward(ctx.inputs, form)))
        returned.append(outer)
        spread = [own.spread(value) for value in outputs]
        alike = [value for value, one in zip(spread, outputs, strict=True) if not own.has_rows(one)]
        ctx.mark_non_differentiable(*alike)
        ctx.set_materialize_grads(False)
        return tuple(spread)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        work = _Backward(ctx.inputs, ctx.form, ctx.needs_input_grad[5:], grads)
        ctx.inputs = None
        return (None,) * 5 + tuple(ctx.own.hand_over(ctx.module, work))


def _joined(each: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Gradients of the directions at an input, as the copies of its rows lie."""
    known = [value for value in each if value is not None]
    if not known:
        return None
    filled = [torch.zeros_like(known[0]) if value is None else value for value in each]
    return filled[0] if len(filled) == 1 else torch.stack(filled, 1).flatten(0, 1)


class _Use:
    """One multiplication with a weight."""

    def __init__(self, name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        self.name, self._inputs, self.output = name, inputs.detach(), output
        self.gradients: list[torch.Tensor] = []

    def product(self, batch: int, rows: int) -> Product:
        """Of all directions; tokens that were flattened are told apart by row again."""
        gradients = [gradient.reshape(rows, -1, gradient.shape[-1]) for gradient in self.gradients]
        return Product(batch, self._inputs.reshape(rows, -1, self._inputs.shape[-1]), torch.stack(gradients, 1))


class _GradientWatch(TorchFunctionMode):
    """Notes every product with one of these weights; those with a part of one, as experts are, it leaves out."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in weights.items()}
        self._sizes = {name: tensor.numel() for name, tensor in weights.items()}
        self.seen: list[_Use] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **kwargs or {})
        if (places := OPERANDS.get(func)) and len(args) > places[1]:
            inputs, weight = (args[place] for place in places)
            name = self._names.get(weight.untyped_storage().data_ptr())
            if name is not None and weight.numel() == self._sizes[name] and output.requires_grad:
                self.seen.append(_Use(name, inputs, output))
        return output


def _head_of(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    found = [name for name, module in model.named_modules() if module is head]
    if found:
        return str(found[0])
    raise NotApart(f"{type(model).__name__} has no head")


def _embeddings_of(model: PreTrainedModel) -> list[str]:
    """Modules that look tokens up."""
    rows = model.get_input_embeddings().weight.shape[0]
    named = model.named_modules()
    return [name for name, module in named if isinstance(module, nn.Embedding) and module.weight.shape[0] == rows]


def _alone(blocks: Sequence[str], weights: Sequence[LinearWeight]) -> Iterator[str]:
    """Layers in no block."""
    starts = tuple(f"{block}." for block in blocks)
    yield from dict.fromkeys(weight.module for weight in weights if not f"{weight.module}.".startswith(starts))
