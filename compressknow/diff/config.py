"""The settings in which two configs differ, without those that change nothing of what a model computes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from compressknow.compress.targets import target_count
from compressknow.diff.records import ConfigChange

# Who wrote the file, with what, and how a caller likes its results. The dtype is told by the tensors themselves.
NOISE = {
    *("transformers_version", "dtype", "torch_dtype", "architectures", "name_or_path", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "torchscript", "id2label", "label2id", "problem_type"),
}
# Its list of layers and its settings of each group would bury everything else.
QUANTIZATION = "quantization_config"


def config_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[ConfigChange, ...]:
    """What differs between two configs, by key; a setting that is null is none.

    >>> config_changes({"vocab_size": 9, "_name_or_path": "x", "rope": {"theta": 1}}, {"vocab_size": 9, "rope": {}})
    (ConfigChange(key='rope.theta', a='1', b=None),)
    """
    before, after = dict(_settings(a)), dict(_settings(b))
    keys = sorted(before.keys() | after.keys())
    return tuple(
        ConfigChange(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    )


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if str(name).startswith("_") or name in NOISE or value is None:
            continue
        if name == QUANTIZATION and isinstance(value, Mapping):
            yield prefix + name, _quantization(value)
        elif isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _quantization(value: Mapping[str, Any]) -> str:
    method, form = value.get("quant_method", "unknown"), value.get("format")
    layers = sum(target_count(map(str, group.get("targets") or ())) for group in _groups(value))
    return json.dumps(
        ", ".join([str(method), *([str(form)] if form else []), *([f"{layers} targets"] if layers else [])])
    )


def _groups(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = value.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group
