"""Load a checkpoint as a transformers model that computes what the checkpoint says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.api.keywords import api_function
from compressknow.engine.load import load as load_folder
from compressknow.model.checkpoint import open_checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@api_function
def load(
    model: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint, converted or not, as a transformers model in eval mode that computes what the checkpoint says.

    Use it rather than ``from_pretrained`` for an int8 checkpoint of an encoder-decoder model: there, plain transformers
    fails in ``generate``.

    Parameters
    ----------
    model : a local folder or a hub id.
    revision : branch, tag or commit of a hub id.
    device : where the weights are held, and the model runs.
    dtype : dtype of the weights that are not quantized; the checkpoint's own by default.
    trust_remote_code : run the Python code that the checkpoint contains.

    Raises
    ------
    compressknow.CheckpointError : a weight is missing or damaged; none is ever initialized at random.
    """
    folder = open_checkpoint(model, revision).folder
    return load_folder(folder, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
