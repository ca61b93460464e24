"""Separating the final layer from the embedding that it shares its weight with, so that only one of them changes."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressknow.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Untied:
    """A weight that got values of its own: its `name`, what it was `tied_to`, and the `bytes` that this costs."""

    name: str
    tied_to: str
    bytes: int


def untied_config(config: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """config.json of the same model with its final layer untied.

    Raises
    ------
    UnsupportedError : the model computes something else when its config says that nothing is tied.
    """
    forward = inspect.unwrap(type(model).forward)
    if "tie_word_embeddings" in inspect.getsource(forward):
        raise UnsupportedError(
            f"The final layer of {type(model).__name__} cannot be untied from its embedding.",
            why="Its forward pass reads tie_word_embeddings: the model would compute something else.",
            hint="Leave the final layer out: --scope attention --scope feed-forward, or --exclude its name.",
        )
    changed = copy.deepcopy(config)
    for part in (changed, changed.get("text_config")):
        if isinstance(part, dict) and (part is changed or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    # T5 scales what goes into a tied final layer; its config derives that from tie_word_embeddings unless told.
    if hasattr(model.config, "scale_decoder_outputs"):
        changed["scale_decoder_outputs"] = model.config.scale_decoder_outputs
    return changed


def missing_when_untied(model: PreTrainedModel, config: dict[str, Any], supplied: set[str]) -> dict[str, str]:
    """Parameters that the untied model no longer takes from the one that they were tied to, with that one's name.

    BERT is such a model: with its decoder's weight, its decoder's bias is no longer tied either.
    """
    import torch

    with torch.device("meta"):
        untied = type(model)(type(model.config).from_dict(config))
    still_tied = untied.all_tied_weights_keys
    return {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target not in still_tied and target in supplied and source in supplied
    }
