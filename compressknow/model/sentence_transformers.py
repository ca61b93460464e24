"""Checkpoints of sentence-transformers: a model, and modules that take its hidden states, in folders of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from compressknow import reading

MODULES = "modules.json"
# The first of these that there is says how the model is loaded.
CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def module_folders(folder: Path) -> tuple[str, ...]:
    """The folders of the modules behind the model, such as ``2_Dense``; none of any other checkpoint."""
    modules = _read(folder / MODULES)
    paths = [entry.get("path") for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    return tuple(path for path in paths if isinstance(path, str) and PurePosixPath(path).parts)


def loading_floats(folder: Path, quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The file, by name, that has sentence-transformers turn quantized weights into floats while it loads them; none
    for any other checkpoint, and none where they are of several schemes, which transformers cannot load so.

    It calls the `forward` of a model itself (since 6.0), past the hook in which transformers does so otherwise.
    """
    if not (folder / MODULES).is_file() or len(quantization["config_groups"]) > 1:
        return {}
    name = next((name for name in CONFIGS if (folder / name).is_file()), CONFIGS[0])
    settings = _read(folder / name)
    settings = dict(settings) if isinstance(settings, dict) else {}
    # What newer releases call the same.
    key = "config_kwargs" if "config_kwargs" in settings else "config_args"
    given = settings.get(key)
    config = {**(given if isinstance(given, dict) else {}), "quantization_config": {**quantization, "dequantize": True}}
    return {name: {**settings, key: config}}


def _read(path: Path) -> Any:
    """What a JSON file holds; None where there is none that can be read: it goes along as it is."""
    try:
        return reading.read_json(path, reading.CONFIG)
    except (ValueError, OSError):
        return None
