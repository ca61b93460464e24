"""How often one forward pass runs a block, in the few architectures that run one more than once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def uses_of(config: Any, module: str, layer: int | None, names: int = 1) -> int:
    """Times that one forward pass applies a weight.

    Parameters
    ----------
    config : that of the nearest module around it which has one.
    module : its name in the tree, in block `layer` of its stack.
    names : places in the tree where it hangs; it is applied at each.
    """
    if "_adapter_list." in module:
        # Zamba2's shared block holds an adapter for each place where it hangs, and applies that one alone.
        return 1
    rule = RULES.get(getattr(config, "model_type", ""))
    return names * (rule(config, module, layer) if rule is not None and layer is not None else 1)


def _albert(config: Any, module: str, layer: int) -> int:  # noqa: ARG001
    layers_a_group = config.num_hidden_layers / config.num_hidden_groups
    return [int(index / layers_a_group) for index in range(config.num_hidden_layers)].count(layer)


def _perceiver(config: Any, module: str, layer: int) -> int:  # noqa: ARG001
    return int(config.num_blocks) if ".self_attends." in module else 1


def _funnel(config: Any, module: str, layer: int) -> int:  # noqa: ARG001
    block = re.search(r"encoder\.blocks\.(\d+)\.", module)
    return int(config.block_repeats[int(block.group(1))]) if block else 1


def _dory(config: Any, module: str, layer: int) -> int:  # noqa: ARG001
    looped = config.n_input_layers <= layer < config.n_input_layers + config.n_recurrent_layers
    return int(config.n_recurrent_loops) if looped else 1


def _hrm(config: Any, module: str, layer: int) -> int:  # noqa: ARG001
    return int(config.H_cycles * (config.L_cycles if ".L_module." in f".{module}" else 1))


def _inkling2_loop(config: Any, module: str, layer: int) -> int:  # noqa: ARG001
    looped = config.loop_layer_index_start <= layer < config.loop_layer_index_end
    return int(config.loop_num_passes) if looped else 1


# Blocks reached by several names are counted from the tree itself; these loop over a block that has one name.
RULES: dict[str, Callable[[Any, str, int], int]] = {
    "albert": _albert,
    "perceiver": _perceiver,
    "funnel": _funnel,
    "dory": _dory,
    "hrm_text": _hrm,
    "inkling2_loop_text": _inkling2_loop,
}
