"""From the names in a checkpoint's files to the names in its module tree, as transformers maps them on loading.

They differ where an architecture was refactored since (GPT-NeoX: ``embed_out`` is now ``lm_head``; Mixtral: one
tensor an expert is now one stack), where a base model's checkpoint lacks its prefix, and where weights are tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressknow.model.checkpoint import Checkpoint
from compressknow.model.streaming import OpenFiles
from compressknow.model.tensors import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPARE_BYTES = 1 << 22


@dataclass(frozen=True)
class Binding:
    """Where transformers loads a stored tensor to: `parameter` in the module tree; `reshaped` where it is fused,
    split or transposed on the way, so that it is not stored in the form that the module holds."""

    parameter: str
    reshaped: bool


class Naming:
    """The mapping of stored names for one module tree on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._tree = dict(model.state_dict())

    def bind(self, stored: str) -> Binding | None:
        """The parameter that a stored name is loaded to, None for one that the module tree does not have."""
        name, pattern = self._rename(stored, self._tree)
        return Binding(name, pattern is not None) if name in self._tree else None

    def transposes(self, stored: str, shape: tuple[int, ...], parameter: str) -> bool:
        """Whether a stored tensor has its last two axes swapped on the way to `parameter`."""
        from transformers.core_model_loading import Transpose

        pattern = self._rename(stored, self._tree)[1]
        steps = (step for entry in self._converters if pattern in entry.source_patterns for step in entry.operations)
        swaps = [step for step in steps if isinstance(step, Transpose)]
        # Some are only made where the shapes call for them.
        return any(not step.check_dims or shape != tuple(self._tree[parameter].shape) for step in swaps)

    def scale_follows(self, stored: str, parameter: str) -> bool:
        """Whether a scale stored beside `stored` would be loaded beside `parameter`."""
        tree = {**self._tree, parameter + "_scale": self._tree[parameter]}
        return self._rename(stored + "_scale", tree) == (parameter + "_scale", None)

    def _rename(self, stored: str, tree: Mapping[str, Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        renamed: tuple[str, str | None] = rename_source_key(
            stored, self._renamings, self._converters, self._prefix, tree
        )
        if renamed[0] not in tree and stored in tree:
            # As transformers does: a name that the tree has already is not renamed.
            renamed = rename_source_key(stored, [], [], self._prefix, tree)
        return renamed


def suppliers(checkpoint: Checkpoint, bound: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, str]:
    """Which stored tensor gives each parameter its values, ties resolved against what the files hold.

    `bound` maps stored names to parameters, `tied` a parameter to the one whose storage it shares by the model's
    class and config. Two that are both stored with different values are not tied, whatever the config says:
    transformers loads them so (Flan-T5 is such a model).
    """
    supply = {parameter: stored for stored, parameter in bound.items()}
    for target, source in tied.items():
        if target in supply and source in supply:
            if same_bytes(checkpoint.tensors[supply[target]], checkpoint.tensors[supply[source]]):
                supply[target] = supply[source]
        elif source in supply:
            supply[target] = supply[source]
    # A checkpoint may hold the target of a tie alone: then the source, and all else tied to it, takes its values.
    for target, source in tied.items():
        if source not in supply and target in supply:
            supply[source] = supply[target]
    for target, source in tied.items():
        if target not in supply and source in supply:
            supply[target] = supply[source]
    return supply


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same values bit for bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if (one.file, one.offset) == (other.file, other.offset):
        return True
    with OpenFiles() as files:
        chunks = zip(files.chunks(one, COMPARE_BYTES), files.chunks(other, COMPARE_BYTES), strict=True)
        return all(left == right for left, right in chunks)
