"""The settings of a config that decide how many blocks a model has and how wide its feed-forward blocks are, found by
trying: a setting is changed, the model built again on the meta device, and its shapes compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError
from compressknow.model.meta import build_whole_config, rebuild_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Keys = tuple[str, ...]
Shapes = dict[str, tuple[int, ...]]
# Lists that may be as long as a model has blocks, and say nothing of them.
NOT_PER_BLOCK = re.compile(r"(^|_)(ids?|tokens?|architectures|labels?|languages?)($|_)")
# Settings that need not be set: a model then takes a multiple of its hidden size.
WIDTH_UNSET = re.compile(r"inner|ffn|intermediate|(^|_)d?ff($|_)")
BLOCK = re.compile(r"^(?P<list>.*?)\.(?P<number>\d+)\.(?P<rest>.+)$")


class Settings:
    """The config of a checkpoint, defaults included, and what its model becomes where it is changed.

    Parameters
    ----------
    tree : the model on the meta device, and `raw` the content of its config.json, which lies at `path`.
    """

    def __init__(self, tree: PreTrainedModel, raw: Mapping[str, Any], path: Path) -> None:
        self.tree, self.raw, self.path = tree, dict(raw), path

    @cached_property
    def whole(self) -> dict[str, Any]:
        config: dict[str, Any] = build_whole_config(self.tree, copy.deepcopy(self.raw)).to_dict()
        return config

    @cached_property
    def shapes(self) -> Shapes:
        return shapes_of(self.tree)

    def tried(self, changed: dict[str, Any]) -> Shapes | None:
        """The shapes of the model with a changed config; None where there is no such model."""
        try:
            return shapes_of(rebuild_model(self.tree, changed, self.path))
        except CheckpointError:
            return None

    def written(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """config.json as it stands, with what `changed`, a version of `whole`, has otherwise."""
        raw = copy.deepcopy(self.raw)
        for keys, value in _differing(changed, self.whole):
            set_at(raw, keys, value)
        # A setting may stand in the file under another of its names, which would overrule it.
        for other, name in (self.tree.config.attribute_map or {}).items():
            if other in raw and name in changed and changed[name] != self.whole.get(name):
                raw[other] = changed[name]
        return self._derived(raw)

    def _derived(self, raw: dict[str, Any]) -> dict[str, Any]:
        """BART's `num_hidden_layers` repeats another setting: it would no longer be true."""
        key = "num_hidden_layers"
        without = [{name: value for name, value in each.items() if name != key} for each in (self.raw, raw)]
        try:
            before, after = (build_whole_config(self.tree, copy.deepcopy(each)).to_dict().get(key) for each in without)
        except Exception:  # A config that needs the setting may fail anywhere without it.
            return raw
        return raw | {key: after} if raw.get(key) == self.raw.get(key) == before and key in raw else raw


def shapes_of(tree: PreTrainedModel) -> Shapes:
    """The shape of everything in the state dict, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tree.state_dict().items()}


def value_at(config: Mapping[str, Any], keys: Keys) -> Any:
    for key in keys:
        config = config[key]
    return config


def set_at(config: dict[str, Any], keys: Keys, value: Any) -> None:
    for key in keys[:-1]:
        config = config.setdefault(key, {})
    config[keys[-1]] = value


def _numbers(config: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Every setting, by the keys that lead to it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value, (*above, key))
        else:
            yield (*above, key), value


def _differing(new: Mapping[str, Any], old: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            yield from _differing(value, old[key], (*above, key))
        elif key not in old or old[key] != value:
            yield (*above, key), value


@dataclass(frozen=True)
class Stack:
    """Blocks that one setting counts: its `keys`, its `count`, and the `lists` of modules that have a block each."""

    keys: Keys
    count: int
    lists: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.lists[0]

    def cut(self, config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
        """A config with these blocks alone: their number and, beside it, lists with an entry for each block."""
        config = copy.deepcopy(config)
        level = value_at(config, self.keys[:-1])
        for key, value in level.items():
            if isinstance(value, (list, tuple)) and len(value) == self.count and not NOT_PER_BLOCK.search(key):
                level[key] = [value[number] for number in kept]
        level[self.keys[-1]] = len(kept)
        return config


def block_of(name: str) -> tuple[str, int, str] | None:
    """The list of blocks that a parameter lies in, the block's number, and its name in the block."""
    found = BLOCK.match(name)
    return (found["list"], int(found["number"]), found["rest"]) if found else None


def stacks_of(settings: Settings) -> tuple[Stack, ...]:
    """The stacks of a model whose blocks a setting counts; where one is not among them, none does."""
    counts: dict[str, int] = {}
    for name in settings.shapes:
        if place := block_of(name):
            counts[place[0]] = max(counts.get(place[0], 0), place[1] + 1)
    found: dict[str, Stack] = {}
    for keys, value in _numbers(settings.whole):
        if type(value) is int and value > 1 and value in counts.values():
            stack = _counted_by(settings, keys, value)
            if stack and not set(stack.lists) & found.keys():
                found |= dict.fromkeys(stack.lists, stack)
    return tuple(dict.fromkeys(found.values()))


def _counted_by(settings: Settings, keys: Keys, count: int) -> Stack | None:
    """The stack that loses its last block, and nothing else changes, where a setting is one less."""
    smaller = settings.tried(Stack(keys, count, ()).cut(settings.whole, range(count - 1)))
    if smaller is None or any(settings.shapes.get(name) != shape for name, shape in smaller.items()):
        return None
    places = [block_of(name) for name in settings.shapes if name not in smaller]
    if not places or not all(place and place[1] == count - 1 for place in places):
        return None
    return Stack(keys, count, tuple(dict.fromkeys(place[0] for place in places if place)))


@dataclass(frozen=True)
class Width:
    """A setting that is the hidden width of feed-forward blocks: its `keys`, its `value`, and of each parameter with a
    row or column for each neuron the axis, and how many it has for each (two where two projections are fused)."""

    keys: Keys
    value: int
    cuts: Mapping[str, tuple[int, int]]

    def cut(self, config: dict[str, Any], kept: int) -> dict[str, Any]:
        config = copy.deepcopy(config)
        set_at(config, self.keys, kept)
        return config


def widths_of(settings: Settings, parameters: set[str]) -> tuple[Width, ...]:
    """The settings that change the shapes of some of these parameters alone, along one axis each."""
    sizes = sorted({size for name in parameters for size in settings.shapes[name]})
    found: list[Width] = []
    for keys, value in _numbers(settings.whole):
        tried = [value] if type(value) is int else sizes if value is None and WIDTH_UNSET.search(keys[-1]) else []
        widths = (_width(settings, keys, size, parameters) for size in tried if size in sizes and size > 1)
        found += [width for width in widths if width and not any(width.cuts.keys() & one.cuts.keys() for one in found)]
    return tuple(found)


def _width(settings: Settings, keys: Keys, value: int, parameters: set[str]) -> Width | None:
    narrower = settings.tried(Width(keys, value, {}).cut(settings.whole, value - 1))
    if narrower is None or narrower.keys() != settings.shapes.keys():
        return None
    cuts: dict[str, tuple[int, int]] = {}
    for name, shape in settings.shapes.items():
        if shape == narrower[name]:
            continue
        axes = [axis for axis, (one, other) in enumerate(zip(shape, narrower[name], strict=True)) if one != other]
        each = shape[axes[0]] - narrower[name][axes[0]]
        if name not in parameters or len(axes) != 1 or shape[axes[0]] != each * value:
            return None
        cuts[name] = axes[0], each
    return Width(keys, value, cuts) if cuts else None
