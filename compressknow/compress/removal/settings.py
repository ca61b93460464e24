"""Settings of a config that decide how many blocks a model has and how wide its feed-forward blocks are.

They have a few names in configs. To find out what a setting does, the model is built again on the meta device with the
setting reduced by one, and its shapes are compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compressknow.base.errors import CheckpointError
from compressknow.model.meta import build_whole_config, rebuild_model

Keys = tuple[str, ...]
Shapes = dict[str, tuple[int, ...]]
# Lists that are not per block, but may have as many entries: Mamba 2's range of time steps is a pair.
NOT_PER_BLOCK = re.compile(r"(^|_)(ids?|tokens?|architectures|labels?|languages?|limit)($|_)|^(mlp|ssm)_multipliers$")
# Lists of block numbers: Zamba2's hybrid_layer_ids, Llama 4's moe_layers, LFM2's full_attn_idxs.
BLOCK_NUMBERS = re.compile(r"(layers|(layer|block|attn)_(ids|idxs|indices|indexes))$")
DEPTHS = {
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"),
    *("num_encoder_layers", "num_decoder_layers", "num_layers_per_stack", "num_blocks", "num_self_attends_per_block"),
}
WIDTHS = {
    *("intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "d_inner", "n_inner", "hidden_dim", "ffn_hidden_size"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size", "moe_intermediate_size", "expert_ffn_hidden_size"),
    *("shared_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "shared_experts_intermediate_size",
}
BLOCK = re.compile(r"^(?P<list>.*?)\.(?P<number>\d+)\.(?P<rest>.+)$")


class Config:
    """Config of a model on the meta device: `raw`, the content of its config.json, and `whole`, with all defaults."""

    def __init__(self, tree: PreTrainedModel, raw: Mapping[str, Any], path: Path) -> None:
        self.tree, self.raw, self.path = tree, dict(raw), path

    @cached_property
    def whole(self) -> dict[str, Any]:
        config: dict[str, Any] = build_whole_config(self.tree, copy.deepcopy(self.raw)).to_dict()
        return config

    @cached_property
    def shapes(self) -> Shapes:
        return read_shapes(self.tree)

    def try_config(self, changed: dict[str, Any]) -> Shapes | None:
        """Return the shapes of the model with a changed config; None if it cannot be built."""
        try:
            return read_shapes(rebuild_model(self.tree, changed, self.path))
        except CheckpointError:
            return None

    def update_raw(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of config.json with the changes that turn `whole` into `changed`."""
        raw, before = dict(self.raw), dict(_flatten(self.whole))
        for keys, value in _flatten(changed):
            if before.get(keys) != value:
                raw = set_at(raw, keys, value)
        # The file may have a setting under an alias, or twice (BART), which would override the change.
        for other, name in (self.tree.config.attribute_map or {}).items():
            if other in raw and name in changed and changed[name] != self.whole.get(name):
                raw[other] = changed[name]
        return raw


def read_shapes(tree: PreTrainedModel) -> Shapes:
    """Return the shapes of the state dict, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tree.state_dict().items()}


def set_at(config: dict[str, Any], keys: Keys, value: Any) -> dict[str, Any]:
    """Return a config with another value under these keys."""
    key, *rest = keys
    return {**config, key: set_at(config.get(key, {}), tuple(rest), value) if rest else value}


def _flatten(config: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*above, key))
        else:
            yield (*above, key), value


@dataclass(frozen=True)
class Stack:
    """Blocks that one setting counts: its `keys`, its `count`, and the module `lists` that contain the blocks.

    `dropped` are the blocks to drop, by their original numbers, and `similarities` those of all blocks, if they decided
    this (see `choose_blocks`). As long as `is_decided` is False, other blocks may be dropped instead. `has_settings` is
    False if lists with an entry per block belong to another stack of the same depth (LED's windows).
    """

    keys: Keys
    count: int
    lists: tuple[str, ...]
    dropped: tuple[int, ...] = ()
    similarities: tuple[float, ...] = ()
    is_decided: bool = True
    has_settings: bool = True

    @property
    def name(self) -> str:
        return self.lists[0]

    @property
    def remaining(self) -> tuple[int, ...]:
        return tuple(number for number in range(self.count) if number not in self.dropped)

    def cut(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a config with only the remaining blocks: a smaller number, shorter lists with an entry per block, and
        new numbers in lists of block numbers."""
        config, remaining = copy.deepcopy(config), self.remaining
        level = reduce(getitem, self.keys[:-1], config)
        for key, value in level.items() if self.has_settings else ():
            if not isinstance(value, (list, tuple)):
                continue
            if BLOCK_NUMBERS.search(key) and self._are_numbers(value):
                level[key] = [new for new, old in enumerate(remaining) if old in value]
            elif len(value) == self.count and not NOT_PER_BLOCK.search(key):
                level[key] = [value[number] for number in remaining]
        level[self.keys[-1]] = len(remaining)
        return config

    def _are_numbers(self, values: Sequence[Any]) -> bool:
        """Return True if these are block numbers, not an entry per block (Llama 4's no_rope_layers)."""
        return list(values) == [number for number in range(self.count) if number in values]


def parse_block(name: str) -> tuple[str, int, str] | None:
    """Parse a parameter's name into its list of blocks, block number and name in the block; None outside blocks."""
    match = BLOCK.match(name)
    return (match["list"], int(match["number"]), match["rest"]) if match else None


def find_stacks(settings: Config) -> tuple[Stack, ...]:
    """Find the stacks of a model whose blocks a setting counts."""
    counts: dict[str, int] = {}
    for name in settings.shapes:
        if block := parse_block(name):
            counts[block[0]] = max(counts.get(block[0], 0), block[1] + 1)
    stacks: dict[str, Stack] = {}
    for keys, value in _flatten(settings.whole):
        if keys[-1] in DEPTHS and type(value) is int and value > 1 and value in counts.values():
            stack = _find_counted(settings, keys, value)
            if stack and not set(stack.lists) & stacks.keys():
                stacks |= dict.fromkeys(stack.lists, stack)
    return tuple(dict.fromkeys(stacks.values()))


def _find_counted(settings: Config, keys: Keys, count: int) -> Stack | None:
    """Find the stack that loses its last block, while nothing else changes, if a setting is reduced by one."""
    for has_settings in (True, False):
        stack = Stack(keys, count, (), has_settings=has_settings)
        smaller = settings.try_config(replace(stack, dropped=(count - 1,)).cut(settings.whole))
        if smaller is None or any(settings.shapes.get(name) != shape for name, shape in smaller.items()):
            continue
        blocks = [parse_block(name) for name in settings.shapes if name not in smaller]
        if blocks and all(block and block[1] == count - 1 for block in blocks):
            return replace(stack, lists=tuple(dict.fromkeys(block[0] for block in blocks if block)))
    return None


# For each parameter with rows or columns for the neurons of feed-forward blocks: their axis, and their number per
# neuron, which is 2 if two projections are fused.
Cuts = dict[str, tuple[int, int]]


def find_widths(settings: Config, parameters: set[str]) -> list[tuple[Keys, int, Cuts]]:
    """Find the settings that change only the shapes of some of these parameters, along one axis each: the keys and the
    value of each setting, and the parameters that it changes."""
    sizes = sorted({size for name in parameters for size in settings.shapes[name]})
    widths: list[tuple[Keys, int, Cuts]] = []
    for keys, value in _flatten(settings.whole):
        if keys[-1] not in WIDTHS:
            continue
        # The default of a setting that is not set is a multiple of the hidden size.
        for size in sizes if value is None else [value]:
            if size in sizes and size > 1:
                cuts = _try_width(settings, keys, size, parameters)
                if cuts and not any(cuts.keys() & others.keys() for *_, others in widths):
                    widths.append((keys, size, cuts))
    return widths


def _try_width(settings: Config, keys: Keys, value: int, parameters: set[str]) -> Cuts | None:
    narrower = settings.try_config(set_at(settings.whole, keys, value - 1))
    if narrower is None or narrower.keys() != settings.shapes.keys():
        return None
    cuts: Cuts = {}
    for name, shape in settings.shapes.items():
        if shape == narrower[name]:
            continue
        axes = [axis for axis, (one, other) in enumerate(zip(shape, narrower[name], strict=True)) if one != other]
        each = shape[axes[0]] - narrower[name][axes[0]]
        if name not in parameters or len(axes) != 1 or shape[axes[0]] != each * value:
            return None
        cuts[name] = axes[0], each
    return cuts
