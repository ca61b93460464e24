"""Batch-invariant float products: a row gets the same bits in any batch, for models that make much of a last bit.

Kernels choose their way by the number of rows and of threads, so that what a row comes to depends on how many stand
beside it. Where activations are rounded to integers, later layers make answers of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from compressknow.engine.layers import EngineLinear

# Every product has this many rows: only products of one shape are sure to go one way (AMD EPYC and Intel Xeon, AVX-512,
# MKL, torch 2.13). With 128 a long input takes 1.2 times as long as in one product, and one of 128 rows no longer; with
# 16 it would be 2.5 times.
ROWS = 128


def multiply_in_parts(x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return a product of rows [..., in] as [..., out], computed `ROWS` rows at a time."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == ROWS:
        return product(rows).reshape(*x.shape[:-1], -1)
    filled = functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))
    products = [product(part) for part in torch.split(filled, ROWS)]
    values = products[0] if len(products) == 1 else torch.cat(products)
    return values[: len(rows)].reshape(*x.shape[:-1], values.shape[-1])


class BatchInvariantLinear(nn.Linear):
    """Linear layer of [..., in] to [..., out], computed `ROWS` rows at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return multiply_in_parts(x, super().forward)


class _Products(TorchFunctionMode):
    """Mode in which torch's products of rows by a matrix are computed `ROWS` rows at a time, and those of two batches
    of matrices from memory of one layout: of a batch of one, kernels read parts of larger tensors in place, by another
    way."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and len(args) > 2 and args[0].dim() == 4:
            return func(*_copy_heads(args[:3], kwargs), *args[3:], **kwargs)
        place = _ROWS_AT.get(func)
        if place is not None and not kwargs and _is_matrix(args[place + 1]) and args[place].numel():
            return multiply_in_parts(args[place], lambda part: func(*args[:place], part, *args[place + 1 :]))
        if place is not None or func in _OF_BATCHES:
            args = tuple(value.contiguous() if isinstance(value, torch.Tensor) else value for value in args)
        return func(*args, **kwargs)


# Where the rows stand among a function's arguments; the matrix follows them.
_ROWS_AT: dict[Any, int] = {
    **dict.fromkeys((functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm), 0),
    torch.addmm: 1,
}
_OF_BATCHES = {torch.bmm, torch.Tensor.bmm, torch.baddbmm, torch.Tensor.baddbmm}


def _is_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.is_floating_point()


def _copy_heads(tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield queries, keys and values [batch, heads, tokens, size], each in memory of its own."""
    heads = tensors[0].shape[1]
    for tensor in tensors:
        # One head for all would be read in place.
        shared = tensor.shape[1] == 1 and not kwargs.get("enable_gqa")
        yield (tensor.expand(-1, heads, -1, -1) if shared else tensor).contiguous()


def make_batch_invariant(model: nn.Module) -> None:
    """Make the float products of a model batch-invariant, in place; its weights, names and hooks stay.

    A plain Linear is one by its class. Of other modules that hold a matrix (routers, fused experts, a Linear of an
    architecture's own), and of those that their layers are children of (attention), the forward is run with torch's
    products replaced.
    """
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            module.__class__ = BatchInvariantLinear
            continue
        # A whole model leaves what it does with its layers to them.
        parts = (module,) if isinstance(module, PreTrainedModel) else (module, *module.children())
        if not isinstance(module, BatchInvariantLinear | EngineLinear) and any(map(_holds_matrix, parts)):
            module.forward = functools.partial(_forward_in_parts, module.forward)
    if isinstance(model, PreTrainedModel):
        # The other implementations hand the rows of all experts to one kernel.
        model.set_experts_implementation("eager")


def undo_batch_invariant(model: nn.Module) -> None:
    """Undo `make_batch_invariant`, since a product of `ROWS` takes a single row many times as long. How experts are run
    stays."""
    for module in model.modules():
        if type(module) is BatchInvariantLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
        replaced = vars(module).get("forward")
        if isinstance(replaced, functools.partial) and replaced.func is _forward_in_parts:
            module.forward = replaced.args[0]


def _holds_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return False
    return isinstance(module, EngineLinear) or any(
        parameter.dim() > 1 and parameter.is_floating_point() for parameter in module.parameters(recurse=False)
    )


_replaced = ContextVar("_replaced", default=False)


def _forward_in_parts(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _replaced.get():
        return forward(*args, **kwargs)
    token = _replaced.set(True)
    try:
        with _Products():
            return forward(*args, **kwargs)
    finally:
        _replaced.reset(token)
