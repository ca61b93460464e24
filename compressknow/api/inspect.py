"""Inspect the Linear layers of a checkpoint, from its configuration and a few rows of each matrix."""

from __future__ import annotations

from pathlib import Path

from compressknow.api.keywords import api_function
from compressknow.model.checkpoint import check_revision
from compressknow.model.gguf_file import check_parts, list_parts
from compressknow.model.structure import ModuleMap
from compressknow.model.summary import Inspection, inspect_checkpoint, inspect_gguf


@api_function
def inspect(
    model: str | Path,
    *,
    revision: str | None = None,
    module_map: ModuleMap = "structural",
    trust_remote_code: bool = False,
) -> Inspection:
    """Count a checkpoint's Linear layers by group and by scope, from its configuration and a few rows of each matrix.

    Parameters
    ----------
    model : a local folder, a GGUF file or a hub id.
    module_map : ``structural``, or ``paper`` for the split that the paper's authors use in BERT and RoBERTa.

    Returns
    -------
    What ``compressknow inspect --json`` prints: groups, scopes, parameters stored and used, tied and unplaced weights;
    for a GGUF file its types by group, and its size.
    """
    if Path(model).suffix == ".gguf":
        check_revision(model, revision)
        check_parts(Path(model))
        return inspect_gguf(list_parts(Path(model)))

    return inspect_checkpoint(model, module_map=module_map, revision=revision, trust_remote_code=trust_remote_code)
