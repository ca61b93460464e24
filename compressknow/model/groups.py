"""Read a module tree: its Linear weights, their group, block and stack, and how often a pass runs them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressknow.model.structure import Group, Kind, LinearWeight, ModuleMap, Structure, check_module_map

# Llama 4's experts are stored as [experts, in, out], but lack the attribute that says so in others.
TRANSPOSED_EXPERTS = {"Llama4TextExperts"}
BERT_ATTENTION_OUTPUT = re.compile(r"^(.*attention\.)output\.dense$")
TOWER_CONFIG = re.compile("Vision|Audio|Speech|Video|QFormer|Tokenizer|SaProt")
PLAIN_MODULES = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm, nn.Conv2d, nn.Conv3d)


def _match_end(*names: str) -> re.Pattern[str]:
    # The end of a class name shows its kind; the start is the model's name (FalconMambaMLP is an MLP).
    return re.compile(f"(?:{'|'.join(names)})$")


def _is(*names: str) -> re.Pattern[str]:
    return re.compile(f"^(?:{'|'.join(names)})$")


Rules = tuple[tuple[Group, re.Pattern[str]], ...]
# Nearest module first, class before attribute. Linear attention (gated delta nets, lightning attention) is attention,
# as its authors and its configs call it; state-space and other recurrent mixers, RWKV's included, are `other`.
CLASS_RULES: Rules = (
    ("other", _match_end("Router(?:MLP)?", "TopKGating", "MessageGate")),
    ("other", _match_end("Mixer", "MambaLayer", "xLSTMLayer", "RecurrentBlock", "ShortConv", "Rwkv\\w*Attention")),
    ("other", _match_end("Adapter", "AltUp", "LaurelBlock", "Bottleneck(?:Layer)?", "GatedResidual")),
    ("attention", _match_end("Attention", "Attn", "SelfOutput", "AttentionOutput", "MLA", "MoA", "DeltaNet")),
    ("feed-forward", _match_end("MLP", "Mlp", "FFN", "FF", "FeedForward(?:Network)?", "Dense(?:Gated)?Act(?:Dense)?")),
    ("feed-forward", _match_end("DenseGatedACT", "Experts?", "MoE", "Moe", "MOE", "MoeBlock", "ExpertGLU")),
)
# Names that have this meaning only inside a block: heads have an `output` too, and projectors an `mlp`.
BLOCK_CLASS_RULES: Rules = (("feed-forward", _match_end("Intermediate", "Output")),)
BLOCK_ATTRIBUTE_RULES: Rules = (
    ("attention", re.compile(r"(?:^|_)(?:attn|att|attention)s?$|Attention$|^crossattention$|_attn_layers$")),
    ("feed-forward", _is("mlps?", "ffns?", "ff", "feed_?forward", "DenseReluDense", "(?:shared_)?experts?")),
    ("feed-forward", _is("intermediate", "output")),
)
# Attributes of weights whose group no module around them shows (BART's and OPT's layers have fc1 and fc2).
LEAF_RULES: Rules = (
    ("other", _is("per_layer_(?:input_gate|projection)")),
    ("attention", _is("[qkvo]_proj", "query", "key", "value", "qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv")),
    ("feed-forward", _is("fc_?(?:1|2|in|out)", "ffn", "ffn_output", "(?:gate|up|down|gate_up)_proj", "w[123io]")),
    ("feed-forward", _is("wi_[01]", "lin(?:ear)?[12]", "c_fc", "dense_h_to_4h", "dense_4h_to_h")),
)
ROUTER = _is("gate", "router", "router_gate", "shared_expert_gate")
# A norm may contain a small MLP that computes its scale. The classes of DBRX's attention and SqueezeBERT's matrices
# also end in Norm.
NORM_CLASS = re.compile(r"^(?!ConvDropout|\w*Attention)\w*Norm$")
CROSS = re.compile(r"^(?:cross_?att(?:entio)?n(?:_layers)?|encoder_attn|EncDecAttention)$")
CROSS_CLASS = _match_end("CrossAttention")
# Heads with logits over a vocabulary, besides the model's output embeddings: Luke's entities, BLT's patcher, the
# columns that MobileBERT stores separately and joins to its decoder; and FSMT's, which declares its embedding instead.
FURTHER_HEADS = _match_end(r"(?:^|\.)lm_head", r"predictions\.decoder")
FURTHER_HEADS_BY_CLASS = _is("MobileBertLMPredictionHead.dense", "FSMTDecoder.output_projection")


def read_structure(model: PreTrainedModel, module_map: ModuleMap = "structural") -> Structure:
    """Read the structure of a model, usually on the meta device. The module map ``paper`` counts BERT's and RoBERTa's
    ``attention.output.dense`` as feed-forward, like the paper's code; ``structural`` as attention."""
    check_module_map(module_map)
    tree = _Tree(model)
    linears = [_place_weight(tree, holders, kind, name) for holders, kind, name in _list_linear_parameters(model)]
    if module_map == "paper":
        for i, weight in enumerate(linears):
            output = BERT_ATTENTION_OUTPUT.match(weight.module)
            if output and f"{output.group(1)}self.query" in tree.modules:
                linears[i] = replace(weight, group="feed-forward", cross=False)
    return Structure(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        module_map=module_map,
        linears=tuple(linears),
        parameters={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        tied=_find_ties(model),
        opaque=dict(_list_opaque_parameters(tree)),
        buffers=frozenset(name for name, _ in model.named_buffers()),
        prefix=model.base_model_prefix,
    )


def list_block_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the outermost transformer blocks of a model, in tree order, without those of towers that read no text."""
    tree = _Tree(model)
    return tuple(name for name in tree.layers if not tree.in_tower(name))


# Modules on the path from the root to a weight: the attribute and the class of each.
_Steps = Sequence[tuple[str, str]]


class _Tree:
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.towers = set(_find_towers(model))
        # The complete models within a composite one.
        models = {name: module for name, module in self.modules.items() if isinstance(module, PreTrainedModel)}
        self.parts = {n for n, each in models.items() if not isinstance(each.config, type(model.config))} - self.towers
        self.layers = self._number_blocks()
        # FSMT returns its embedding, which shares its weight with the output projection; MusicGen a list of heads.
        head = model.get_output_embeddings()
        heads = head.modules() if isinstance(head, nn.Module) else ()
        self.heads = {id(module.weight) for module in heads if hasattr(module, "weight")}
        if not self.heads and not type(model).__module__.startswith("transformers."):
            self.heads = set(self._find_own_heads())
        # A weight with several names (Zamba's shared block) is applied once under each.
        self.names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def place(self, name: str) -> tuple[_Steps, int | None]:
        """Return the modules around a module, the root first, and the index of its block in the stack, if any."""
        parents = [*list_parents(name), ""][::-1]
        steps = [(each.rpartition(".")[2], type(self.modules[each]).__name__) for each in parents]
        layer = next((self.layers[each] for each in (*parents, name) if each in self.layers), None)
        return steps, layer

    def _find_own_heads(self) -> Iterator[int]:
        """Yield the weights that give logits in code that comes with a checkpoint and names no head (NeoBERT's)."""
        rows = getattr(self.model.config, "vocab_size", None)
        for name, module in self.modules.items():
            is_outside = self.layers.keys().isdisjoint((name, *list_parents(name)))
            if isinstance(module, nn.Linear) and module.out_features == rows and is_outside:
                yield id(module.weight)

    def in_tower(self, name: str) -> bool:
        return not self.towers.isdisjoint((name, *list_parents(name)))

    def is_between(self, name: str) -> bool:
        """Return whether a module is between the towers and the language model, in neither of these."""
        has_language = bool(self.towers) and any(not self.in_tower(part) for part in self.parts)
        return has_language and not any(
            each in self.parts or each in self.towers for each in (name, *list_parents(name))
        )

    def _number_blocks(self) -> dict[str, int]:
        """Return the outermost blocks and their indices in the stack. Nested lists (Funnel's) are one stack."""
        layers: dict[str, int] = {}
        counts: Counter[str] = Counter()
        for name in self.modules:
            is_outermost = self._is_block(name) and not any(parent in layers for parent in list_parents(name))
            if is_outermost and not self.is_between(name):
                stack = re.split(r"\.\d+(?:\.|$)", name)[0]
                layers[name] = counts[stack]
                counts[stack] += 1
        return layers

    def _is_block(self, name: str) -> bool:
        parent, _, attribute = name.rpartition(".")
        module = self.modules[name]
        is_custom = not type(module).__module__.startswith("torch.nn")
        in_list = isinstance(self.modules[parent], (nn.ModuleList, nn.Sequential))
        return attribute.isdigit() and in_list and is_custom and any(True for _ in module.children())


def list_parents(name: str) -> Iterator[str]:
    """Yield the modules that contain a name, except the root, the innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def _find_towers(model: PreTrainedModel) -> Iterator[str]:
    """Yield the parts of a multimodal model that read images, video or sound, or condense the output of such a part."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        # Idefics' vision model is a plain module with a config of its own.
        if isinstance(config, PreTrainedConfig) and not isinstance(config, type(model.config)):
            # Qwen's vision models inherit text as an input modality from the whole model.
            reads_no_text = isinstance(module, PreTrainedModel) and "text" not in module.input_modalities
            if reads_no_text or TOWER_CONFIG.search(type(config).__name__):
                yield name


def _list_linear_parameters(model: PreTrainedModel) -> Iterable[tuple[list[str], Kind, str]]:
    """List every Linear weight once, in tree order: the modules that hold it, its kind, and its name in them."""
    linears: dict[int, tuple[list[str], Kind, str]] = {}
    for module_name, module in model.named_modules():
        kind: Kind = "linear" if isinstance(module, nn.Linear) else "conv1d"
        weights = {"weight": module.weight} if isinstance(module, (nn.Linear, Conv1D)) else {}
        if not weights and type(module).__name__.endswith("Experts"):
            parameters, kind = module.named_parameters(recurse=False), "experts"
            weights = {name: each for name, each in parameters if each.dim() >= 3 and "bias" not in name}
        for name, parameter in weights.items():
            linears.setdefault(id(parameter), ([], kind, name))[0].append(module_name)
    return linears.values()


def _place_weight(tree: _Tree, holders: list[str], kind: Kind, name: str) -> LinearWeight:
    module, *sharing = holders
    holder = tree.modules[module]
    parameter: torch.Tensor = getattr(holder, name)
    steps, layer = tree.place(module)
    group = _group(tree, module, parameter, steps, layer is not None)
    # Each part of a composite model has its own config: the nearest one determines how its blocks are run.
    parents = (tree.modules[parent] for parent in (*list_parents(module), ""))
    config = next(each.config for each in parents if hasattr(each, "config"))
    # Zamba2's shared block holds an adapter for each of its uses, and applies only that one.
    is_once = group == "final" or "_adapter_list." in module
    is_transposed = kind == "conv1d"
    if kind == "experts":
        is_transposed = bool(getattr(holder, "is_transposed", type(holder).__name__ in TRANSPOSED_EXPERTS))
    return LinearWeight(
        parameter=f"{module}.{name}" if module else name,
        module=module,
        kind=kind,
        shape=tuple(parameter.shape),
        group=group,
        layer=layer,
        stack=None if group == "vision" else _find_stack(tree.model, module),
        # Cross-attention reads the other stack's states.
        cross=group == "attention"
        and any(CROSS.search(attribute) or CROSS_CLASS.search(class_name) for attribute, class_name in steps),
        uses=1 if is_once else tree.names[id(parameter)] * _count_loops(config, module, layer),
        transposed=is_transposed,
        sharing=tuple(sharing),
    )


def _group(tree: _Tree, module: str, parameter: torch.Tensor, steps: _Steps, in_block: bool) -> Group | None:
    leaf = module.rpartition(".")[2]
    if tree.in_tower(module):
        return "vision"
    is_further = FURTHER_HEADS.search(module) or FURTHER_HEADS_BY_CLASS.search(f"{steps[-1][1]}.{leaf}")
    if id(parameter) in tree.heads or (is_further and not in_block):
        return "final"
    if not in_block and tree.towers:
        # The attention and feed-forward layers that bring images to the language model are not its own.
        return "other"
    return _place(steps, leaf, in_block)


def _place(steps: _Steps, leaf: str, in_block: bool) -> Group | None:
    """Return the group of a weight that is not a final layer; None if no rule matches. `steps` are the modules around
    the weight's own module, the root first; `leaf` is the attribute of its own module."""
    if any(NORM_CLASS.search(class_name) for _, class_name in steps):
        return "other"
    class_rules = CLASS_RULES + BLOCK_CLASS_RULES if in_block else CLASS_RULES
    attribute_rules = BLOCK_ATTRIBUTE_RULES if in_block else ()
    parent, parent_class = steps[-1]
    for attribute, class_name in reversed(steps):
        if group := _find(class_rules, class_name) or _find(attribute_rules, attribute):
            is_router = group == "feed-forward" and (ROUTER.search(leaf) or ROUTER.search(parent))
            return "other" if is_router else group
    if not in_block or (leaf == "linear" and parent_class.endswith("HybridLayer")):
        return "other"
    return _find(LEAF_RULES, leaf)


def _find(rules: Rules, name: str) -> Group | None:
    return next((group for group, rule in rules if rule.search(name)), None)


def _find_stack(model: PreTrainedModel, module: str) -> Literal["encoder", "decoder"] | None:
    side = re.search(r"(?:^|\.|_)(encoder|decoder)(?=\.)", module)
    if side is None or not getattr(model.config, "is_encoder_decoder", False):
        return None
    return "encoder" if side.group(1) == "encoder" else "decoder"


def _find_ties(model: PreTrainedModel) -> dict[str, str]:
    """Map names to the name that they share storage with: declared by the class, or modules in several places."""
    tensors = model.state_dict(keep_vars=True)
    declared = model.all_tied_weights_keys
    tied = {name: source for name, source in declared.items() if name in tensors and source in tensors}
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        source = first.setdefault(id(tensor), name)
        if source != name and name not in tied and source not in tied:
            tied[name] = source
    return tied


def _list_opaque_parameters(tree: _Tree) -> Iterator[tuple[str, Group]]:
    """Yield parameters that are matrices of attention or feed-forward, but not the weight of a Linear layer."""
    text = tree.model.config.get_text_config(decoder=True)
    width = int(getattr(text, "hidden_size", 0) or 0)
    for module_name, module in tree.modules.items():
        if isinstance(module, PLAIN_MODULES) or type(module).__name__.endswith("Experts"):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if not _is_matrix(module, name, parameter, width):
                continue
            steps, layer = tree.place(f"{module_name}.{name}")
            group = _place(steps, name, layer is not None)
            if group in ("attention", "feed-forward"):
                yield f"{module_name}.{name}", "vision" if tree.in_tower(module_name) else group


def _is_matrix(module: nn.Module, name: str, parameter: torch.Tensor, width: int) -> bool:
    if isinstance(module, nn.Conv1d):
        return name == "weight" and module.kernel_size == (1,)
    if parameter.dim() < 2 or "bias" in name or "embed" in name:
        return False
    rows = parameter.shape[0]
    # A table (of relative positions, of segments) has a dimension far smaller than the model's width.
    return min(rows, parameter.numel() // rows) * 8 >= max(width, 8)


def _count_loops(config: Any, module: str, layer: int | None) -> int:
    """Count how often a pass runs a module under one name: some architectures loop over blocks. `config` is that of the
    nearest enclosing module that has one."""
    if layer is None:
        return 1
    match getattr(config, "model_type", ""):
        case "albert":
            layers_per_group = config.num_hidden_layers / config.num_hidden_groups
            return [int(index / layers_per_group) for index in range(config.num_hidden_layers)].count(layer)
        case "perceiver" if ".self_attends." in module:
            return int(config.num_blocks)
        case "funnel" if block := re.search(r"encoder\.blocks\.(\d+)\.", module):
            return int(config.block_repeats[int(block.group(1))])
        case "dory" if 0 <= layer - config.n_input_layers < config.n_recurrent_layers:
            return int(config.n_recurrent_loops)
        case "hrm_text":
            return int(config.H_cycles * (config.L_cycles if ".L_module." in f".{module}" else 1))
        case "inkling2_loop_text" if config.loop_layer_index_start <= layer < config.loop_layer_index_end:
            return int(config.loop_num_passes)
    return 1
