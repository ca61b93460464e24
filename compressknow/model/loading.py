"""Find what transformers would say of a checkpoint if it loaded it, on the meta device from names and shapes alone.

`from_pretrained` itself does the work: it renames, splits, fuses, ties and (by the quantizer that the config names)
prepares layers as it always does, on tensors that have no memory. No weight is read.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressknow.base.errors import CheckpointError
from compressknow.base.libraries import require
from compressknow.base.progress import quiet
from compressknow.model.checkpoint import Checkpoint, open_checkpoint, some_of
from compressknow.model.meta import meta_model
from compressknow.model.naming import Naming
from compressknow.model.tensors import torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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

    Parameters
    ----------
    config : that of the checkpoint, its quantization included; left as it is.
    """
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
        # A stack of fewer matrices than there are experts has another shape.
        missing.update(Naming(tree).missing_parts(checkpoint.tensors))
    return tuple(sorted(missing))


def open_complete(
    model: str | Path, revision: str | None = None, *, trust_remote_code: bool = False
) -> tuple[Checkpoint, PreTrainedModel]:
    """Open a checkpoint that holds every weight of its model, and its module tree on the meta device.

    Raises
    ------
    CheckpointError : what `open_checkpoint` and `meta_model` raise; or weights are missing, or have another shape than
        the model's, which transformers would fill with random numbers.
    """
    checkpoint = open_checkpoint(model, revision)
    tree = meta_model(checkpoint.folder, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
    # What is quantized already has other tensors than its module tree; it is refused for that.
    if checkpoint.tensors and not checkpoint.config.get("quantization_config"):
        _refuse_incomplete(checkpoint, tree)
    return checkpoint, tree


def _refuse_incomplete(checkpoint: Checkpoint, tree: PreTrainedModel) -> None:
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
