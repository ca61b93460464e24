"""The proof that an output loads: what its config and its headers say, put through transformers on the meta device.

Nothing here knows of a scheme: whatever the quantizer that the config names does with the tensors, it does here too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UnsupportedError
from compressknow.compress.plan import PlannedTensor
from compressknow.model.checkpoint import Checkpoint, open_checkpoint, some_of
from compressknow.model.loading import Header, LoadReport, headers_of, load_report
from compressknow.model.meta import config_from_dict

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prove(source: Checkpoint, tree: PreTrainedModel, config: Mapping[str, Any], tensors: Mapping[str, Header]) -> None:
    """Load an output as plain transformers would, without its values.

    Parameters
    ----------
    source : the checkpoint that it was made of, and `tree` its module tree. Tensors that no weight takes, and weights
        that none gives, are no fault of the output where the source has them too.
    config : the output's config.json.
    tensors : dtype and shape by name, as its headers have them.

    Raises
    ------
    UnsupportedError : transformers would not load every weight.
    """
    found = load_report(type(tree), config_from_dict(tree, copy.deepcopy(dict(config))), tensors)
    if fault := _fault(found, source, tree):
        raise UnsupportedError(
            f"{type(tree).__name__} cannot be compressed in this way: transformers could not load the output.",
            why=fault,
            hint="Prune only, or narrow --scope (or --exclude) to other layers.",
        )


def prove_written(source: Checkpoint, tree: PreTrainedModel, folder: Path) -> None:
    """The same for a folder with a config.json and weight files."""
    written = open_checkpoint(folder)
    prove(source, tree, written.config, headers_of(written))


def planned_headers(tensors: Iterable[PlannedTensor]) -> dict[str, Header]:
    """Dtype and shape of all that a plan writes, scales included, by name."""
    return {name: (part.dtype, part.shape) for tensor in tensors for name, part in tensor.written}


def _fault(found: LoadReport, source: Checkpoint, tree: PreTrainedModel) -> str | None:
    if found == LoadReport():
        return None
    if found.conversion_failed:
        return "It fuses or splits weights of this model on loading, and fails if only some of them are quantized."
    if found.failure:
        return f"Loading stops: {found.failure}"
    before = load_report(type(tree), tree.config, headers_of(source))
    kinds = {
        "It finds no values for": (found.missing, before.missing),
        "It finds no place for": (found.unexpected, before.unexpected),
        "It finds another shape in": (found.mismatched, before.mismatched),
        "It would take floats for integers, or the reverse, in": (found.retyped, before.retyped),
    }
    faults = {what: set(now) - set(then) for what, (now, then) in kinds.items()}
    return next((f"{what} {some_of(names)}." for what, names in faults.items() if names), None)
