"""Find weights that a model reads past their layer: code of another module takes ``layer.weight`` itself.

An int8 layer computes with its scale and quantizes what comes in; whoever takes its weight gets bare integers. What a
model reads is told by the source of its own classes, so that branches for kernels that are not here are seen too.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressknow.base.progress import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Read = Literal["values", "dtype"]
# What is asked of a weight without looking at its values.
ASIDE = {"shape", "size", "device", "ndim", "dim", "numel", "requires_grad", "is_cuda", "element_size"}
# Code that runs before there are weights, or on purpose changes them.
NOT_RUN = re.compile(r"__init__$|_?init_weights|reset_parameters|tie_weights|_?prune|resize|[gs]et_\w*embeddings$")


def find_direct_reads(model: PreTrainedModel) -> dict[str, Read]:
    """Return the Linear modules whose weight the code of another module reads: its ``values``, or its ``dtype`` alone,
    to cast something to it. What its source may read, and a short forward pass on the meta device does not, is left out
    (BLOOM's exact mode); the source is believed of what the pass has not reached: where it stops midway, and of towers
    that read no text."""
    candidates = dict(_candidates(model))
    if candidates and model.device.type != "meta":
        with torch.device("meta"):
            model = type(model)(copy.deepcopy(model.config)).eval()
    return {name: candidates[name] for name in _find_read(model, candidates)} if candidates else {}


def _candidates(tree: nn.Module) -> Iterator[tuple[str, Read]]:
    from transformers import PreTrainedModel

    linears = {name for name, module in tree.named_modules() if isinstance(module, nn.Linear)}
    for name, module in tree.named_modules():
        start = re.escape(f"{name}.") if name else ""
        bases = (each for each in type(module).__mro__ if each not in PreTrainedModel.__mro__)
        # Values last: they are what counts where both are read.
        for path, read in sorted({read for each in bases for read in _reads_in(each)}):
            pattern = re.compile(start + path)
            yield from ((linear, read) for linear in linears if pattern.fullmatch(linear))


def _find_read(tree: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Return those whose weight is read from outside in a forward pass of a few tokens, or that it does not reach."""
    ids = torch.ones((1, 4), dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": ids}
    if tree.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(tree.forward).parameters:
        inputs["use_cache"] = False
    read: set[str] = set()
    ran: set[str] = set()
    with contextlib.ExitStack() as watches, torch.no_grad():
        for name in names:
            watches.enter_context(_watch(tree.get_submodule(name), name, read, ran))
        try:
            with quiet(), _Valueless():  # type: ignore[no-untyped-call]
                tree(**inputs)
        except Exception:  # Code that was not written for tensors without values may fail anywhere.
            pass
    # One block runs as the next does.
    reached = {_kind(name) for name in ran}
    return read | {name for name in names if _kind(name) not in reached}


def _kind(name: str) -> str:
    return re.sub(r"\d+", "", name)


class _Valueless(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that answers what code asks of the values of tensors that have none: each is zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return torch.empty((0, args[0].dim()), dtype=torch.long, device="meta")
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def _watch(module: nn.Module, name: str, read: set[str], ran: set[str]) -> Iterator[None]:
    plain: Any = type(module)

    class Watched(plain):  # type: ignore[misc]
        def __getattr__(self, attribute: str) -> Any:
            if attribute == "weight" and not self.__dict__.get("inside"):
                read.add(name)
            return super().__getattr__(attribute)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.__dict__["inside"] = True
            ran.add(name)
            try:
                return super().forward(*args, **kwargs)
            finally:
                del self.__dict__["inside"]

    module.__class__ = Watched
    try:
        yield
    finally:
        module.__class__ = plain


@cache
def _reads_in(module_class: type) -> frozenset[tuple[str, Read]]:
    try:
        source = textwrap.dedent(inspect.getsource(module_class))
    except (OSError, TypeError):  # A class without source has none to read.
        return frozenset()
    if ".weight" not in source:
        return frozenset()
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return frozenset(read for each in functions if not NOT_RUN.search(each.name) for read in _reads_in_function(each))


def _reads_in_function(function: ast.FunctionDef) -> Iterator[tuple[str, Read]]:
    parents = {child: parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and (path := _path(node.value)):
            parent = parents.get(node)
            if isinstance(parent, ast.Attribute) and parent.attr in {*ASIDE, "dtype"}:
                # A function that knows of int8 weights does not cast to them.
                if parent.attr == "dtype" and "int8" not in ast.unparse(function):
                    yield path, "dtype"
            elif not _only_tested(parent):
                yield path, "values"


def _path(node: ast.expr) -> str | None:
    """Return a pattern of the module that an expression names, below the one whose method it stands in."""
    parts: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Subscript):
            parts.append(r"[^.]+")
            node = node.value
        elif isinstance(node, ast.Attribute):
            parts.append(re.escape(node.attr))
            node = node.value
        else:
            return None
    if not parts:
        return None
    # Of a variable nothing is known but that it holds some module below.
    return ("" if node.id == "self" else r"(?:.+\.)?") + r"\.".join(reversed(parts))


def _only_tested(parent: ast.AST | None) -> bool:
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
    return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
