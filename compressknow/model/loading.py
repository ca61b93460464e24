"""Find what transformers does with a checkpoint when it loads and runs it, on the meta device, from names and shapes.

`from_pretrained` itself does the loading: it renames, splits, fuses, ties and (by the quantizer that the config names)
prepares layers as it always does, on tensors that have no memory. No weight is read.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from compressknow.base.errors import CheckpointError
from compressknow.base.packages import require
from compressknow.base.progress import quiet
from compressknow.model.checkpoint import Checkpoint, open_checkpoint, some_of
from compressknow.model.meta import meta_model
from compressknow.model.tensors import torch_dtype

Shape = tuple[int, ...]
Header = tuple[str, Shape]
# What transformers says where it cannot make a weight of the tensors that are stored for it; the table that it goes on
# to refer to is not shown.
CONVERSION_FAILED = "issues during automatic conversion of the weights"


@dataclass(frozen=True)
class LoadReport:
    """Report of a load: weights that no tensor gives (they would be filled with random numbers), tensors that no weight
    takes, weights of another shape than the model's (that shape, and the model's), floats that a weight of integers
    takes or the reverse, which are rounded without a word; and what stopped the load, where anything did."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    retyped: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def conversion_failed(self) -> bool:
        """Return whether transformers could not make some weight of the tensors that are stored for it."""
        return self.failure is not None and CONVERSION_FAILED in self.failure


def load_report(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, Header]
) -> LoadReport:
    """Load tensors, given as dtype (``F32``) and shape by name, as plain transformers does, without their values.
    `config` is that of the checkpoint, its quantization included; it is left as it is."""
    # transformers takes a `device_map` only with it, and its refusal would pass for a fault of the checkpoint.
    require("accelerate")
    state = {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta") for name, (dtype, shape) in tensors.items()
    }
    options = {"device_map": "meta", "dtype": "auto", "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with quiet():
            model, found = model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict=state, **options)
    except Exception as error:  # Wherever transformers or a quantizer stops, it stops for whoever loads it too.
        return LoadReport(failure=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    # What is tied though both are stored is compared first, on other devices than this one.
    for pair in model.all_tied_weights_keys.items():
        dtypes = {state[name].dtype for name in pair if name in state}
        if len(dtypes) > 1 and torch.float8_e4m3fn in dtypes:
            return LoadReport(failure=f"it compares {pair[0]} with {pair[1]}, and torch compares no floats of 8 bits.")
    mismatched = {name: (tuple(stored), tuple(needed)) for name, stored, needed in sorted(found["mismatched_keys"])}
    loaded = model.state_dict()
    retyped = (n for n in state.keys() & loaded.keys() if state[n].is_floating_point() != loaded[n].is_floating_point())
    missing, unexpected = (tuple(sorted(found[keys])) for keys in ("missing_keys", "unexpected_keys"))
    return LoadReport(missing, unexpected, mismatched, tuple(sorted(retyped)))


def headers_of(checkpoint: Checkpoint) -> dict[str, Header]:
    """Return dtype and shape of what a checkpoint's files hold, by name."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}


def missing_weights(checkpoint: Checkpoint, tree: PreTrainedModel) -> tuple[str, ...]:
    """Return the weights of a checkpoint's module tree that its files do not hold, under their own name or a tied one;
    of those that transformers makes of several tensors (one for each expert), the tensors that the files lack.

    A pooler that the class can be built without (``add_pooling_layer``) is no part of every checkpoint: where all of it
    is missing, nothing is.
    """
    return _missing(load_report(type(tree), tree.config, headers_of(checkpoint)), checkpoint, tree)


def _missing(report: LoadReport, checkpoint: Checkpoint, tree: PreTrainedModel) -> tuple[str, ...]:
    missing = set(report.missing)
    if "add_pooling_layer" in inspect.signature(type(tree).__init__).parameters:
        pooler = {name for name in tree.state_dict() if name.startswith("pooler.")}
        missing -= pooler if pooler <= missing else set()
    if report.mismatched or report.conversion_failed:
        from compressknow.model.naming import Naming

        # A stack of fewer matrices than there are experts has another shape.
        missing.update(Naming(tree).missing_parts(checkpoint.tensors))
    return tuple(sorted(missing))


def open_complete(
    model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[Checkpoint, PreTrainedModel]:
    """Open a checkpoint that holds every weight of its model, and its module tree on the meta device.

    Raises what `open_checkpoint` and `meta_model` do, and CheckpointError where weights are missing or have another
    shape than the model's: transformers would fill them with random numbers.
    """
    checkpoint = open_checkpoint(model, revision)
    tree = meta_model(checkpoint.folder, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
    # What is quantized already has other tensors than its module tree; it is refused for that.
    if not checkpoint.tensors or checkpoint.config.get("quantization_config"):
        return checkpoint, tree
    report = load_report(type(tree), tree.config, headers_of(checkpoint))
    if missing := _missing(report, checkpoint, tree):
        count = "a weight" if len(missing) == 1 else f"{len(missing)} weights"
        raise CheckpointError(
            f"{checkpoint.folder} lacks {count} of {type(tree).__name__}: {some_of(missing)}.",
            why="transformers would fill them with random numbers.",
            hint="Download or save it again, or see that `architectures` in its config.json names the class that the "
            "weights were saved from.",
        )
    weights = {name for name, _ in tree.named_parameters(remove_duplicate=False)}
    for name, (stored, needed) in report.mismatched.items():
        if name in weights:
            raise CheckpointError(
                f"{name} has shape {list(stored)}, config.json says {list(needed)}.",
                hint="The config and the weights do not match: download or save both again.",
            )
    if report.conversion_failed:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit its config.json: transformers cannot make all weights of "
            f"{type(tree).__name__} of the tensors that are stored.",
            hint="The config and the weights do not match: download or save both again.",
        )
    return checkpoint, tree


Read = Literal["values", "dtype"]
# What is asked of a weight without looking at its values.
_ASIDE = {getattr(torch.Tensor, name).__get__ for name in ("shape", "device", "ndim", "is_cuda", "requires_grad")}
_ASIDE |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.element_size}


def find_direct_reads(model: PreTrainedModel) -> dict[str, Read]:
    """Return the Linear modules whose weight the code of another module reads: its ``values``, or its ``dtype`` alone,
    to cast something to it. An int8 layer computes with its scale; whoever takes its weight gets bare integers.

    A forward pass of a few tokens shows it. Where that stops midway, a layer that it has not reached is taken to be
    read if the code of the model's classes names its weight. Of the towers of a multimodal model, which read no text,
    torch's own attention is known to.
    """
    if model.device.type != "meta":
        with torch.device("meta"):
            model = type(model)(copy.deepcopy(model.config)).eval()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ids = torch.ones((1, 16), dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    uses, is_whole = _Uses(), False
    with contextlib.ExitStack() as watches, contextlib.suppress(Exception):  # Code may not suit tensors without values.
        for name, module in linears.items():
            watches.enter_context(_watch(name, module, uses))
        with torch.no_grad(), quiet(), _Valueless(), uses:  # type: ignore[no-untyped-call]
            model(**inputs)
        is_whole = True
    if not is_whole:
        # One block runs as the next does.
        reached = {_without_numbers(name) for name in uses.ran}
        code = "".join(map(_read_code, {type(module) for module in model.modules()}))
        named = set(re.findall(r"(\w+|\])\.weight\b", code))
        uses.reads |= {
            name: "values"
            for name in linears
            if _without_numbers(name) not in reached and (re.sub(r"^\d+$", "]", name.rpartition(".")[2]) in named)
        }
    uses.reads |= {name: "values" for name, each in linears.items() if type(each) is NonDynamicallyQuantizableLinear}
    return uses.reads


def _read_code(kind: type[nn.Module]) -> str:
    """Return the source of a class of transformers, or of remote code, and of its bases, without texts (names of tied
    weights are no code) and without what sets weights."""
    bases = (each for each in kind.__mro__ if each not in PreTrainedModel.__mro__)
    source = "".join(inspect.getsource(base) for base in bases if not base.__module__.startswith("torch."))
    return re.sub(r"\"[^\"\n]*\"|'[^'\n]*'|def _init_weights\(.*?(?=\n    (?:def|@)|\Z)", "", source, flags=re.DOTALL)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "", name)


@contextlib.contextmanager
def _watch(name: str, module: nn.Linear, uses: _Uses) -> Iterator[None]:
    """Hand another weight than its own to whoever asks a module for it while it does not run."""
    plain: Any = type(module)

    class Watched(plain):  # type: ignore[misc]
        def __getattr__(self, attribute: str) -> Any:
            if attribute == "weight" and name not in uses.running:
                return uses.stand_ins.setdefault(name, nn.Parameter(torch.empty_like(super().__getattr__("weight"))))
            return super().__getattr__(attribute)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            uses.running.add(name)
            uses.ran.add(name)
            try:
                return super().forward(*args, **kwargs)
            finally:
                uses.running.discard(name)

    module.__class__ = Watched
    try:
        yield
    finally:
        module.__class__ = plain


class _Uses(TorchFunctionMode):
    """Mode that notes what is done with weights that were handed out, whose dtype it says is int8."""

    def __init__(self) -> None:
        super().__init__()
        self.running: set[str] = set()
        self.ran: set[str] = set()
        self.stand_ins: dict[str, nn.Parameter] = {}
        self.reads: dict[str, Read] = {}
        self._last = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch.cat takes a list of tensors.
        given = [
            each for one in (*args, *kwargs.values()) for each in (one if isinstance(one, list | tuple) else [one])
        ]
        for name, weight in self.stand_ins.items():
            if any(each is weight for each in given) and func not in _ASIDE:
                if func == torch.Tensor.dtype.__get__:  # type: ignore[attr-defined]
                    self._last = name
                    return torch.int8
                self.reads[name] = "values"
        if self._last and any(each is torch.int8 for each in given):
            self.reads.setdefault(self._last, "dtype")
            args = [torch.float32 if each is torch.int8 else each for each in args]
            kwargs = {key: torch.float32 if each is torch.int8 else each for key, each in kwargs.items()}
        return func(*args, **kwargs)


class _Valueless(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that answers what code asks of the values of tensors that have none: each is zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:
            return torch.empty((0, args[0].dim()), dtype=torch.long, device="meta")
        if func is torch.ops.aten._grouped_mm.default:
            # Of experts; torch has it in bfloat16 alone.
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **kwargs or {})
