"""Structure of a checkpoint: the Linear weights of its module tree, and the rules that place each into a group. Nothing
here needs torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple

Group = Literal["attention", "feed-forward", "final", "other", "vision"]
ModuleMap = Literal["structural", "paper"]
GROUPS: tuple[Group, ...] = ("attention", "feed-forward", "final", "other", "vision")
# The group of every tensor that is not a Linear weight: embeddings, norms, biases.
NOT_LINEAR = "not-linear"


@dataclass(frozen=True)
class LinearWeight:
    """Weight matrix, or stack of matrices, of the module tree.

    `parameter` is its name in the tree (``bert.encoder.layer.0.attention.self.query.weight``), `module` the name of
    the module that holds it, `sharing` those of further modules that hold the same one (Zamba's blocks), `kind` how
    the module stores it: ``linear`` (nn.Linear, ``[out, in]``), ``conv1d``
    (GPT-2's, ``[in, out]``) or ``experts`` (fused, ``[experts, ...]``). `group` is None where no rule places it.
    ``vision`` takes all that lies in the towers of a multimodal model, which read images, video or sound.
    `layer` counts the block within its stack, `stack` names the side of an encoder-decoder model (None in a model of
    one stack), `cross` marks cross-attention. `uses` is how often one forward pass applies it (ALBERT shares layers).
    `transposed` says that the last axis is the output (conv1d; the experts of GPT-OSS, Llama 4 and Aria).
    """

    parameter: str
    module: str
    kind: Literal["linear", "conv1d", "experts"]
    shape: tuple[int, ...]
    group: Group | None
    layer: int | None = None
    stack: Literal["encoder", "decoder"] | None = None
    cross: bool = False
    uses: int = 1
    transposed: bool = False
    sharing: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Return all modules that hold it."""
        return self.module, *self.sharing

    @property
    def stored(self) -> int:
        """Count the elements of the tensor."""
        return prod(self.shape)

    @property
    def used(self) -> int:
        """Count the elements that one forward pass multiplies by: the tensor counted once per use."""
        return self.stored * self.uses


@dataclass(frozen=True)
class Structure:
    """Module tree of a checkpoint, without weights.

    `parameters` maps every name of the state dict (parameters and persistent buffers, tied names included) to its
    shape, `buffers` are those of them that are no parameters; `tied` maps a name to the name that it shares its storage
    with, as transformers ties them on loading.
    `opaque` maps parameters that act as a weight matrix of attention or feed-forward without being a Linear layer
    (XLNet's q, k, v, o; I-BERT's QuantLinear; SqueezeBERT's convolutions) to the group that they belong to. No scope
    can take them, so a scope that ought to is refused rather than half compressed.
    `prefix` is the attribute under which a model of this kind holds its base model (``bert``, ``model``).
    """

    architecture: str
    model_type: str
    module_map: ModuleMap
    linears: tuple[LinearWeight, ...]
    parameters: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    opaque: dict[str, Group] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    prefix: str = ""

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Return the modules that hold a Linear weight which no rule places."""
        return tuple(weight.module for weight in self.linears if weight.group is None)


class Step(NamedTuple):
    """Module on the way from the root to a weight: the attribute that holds it, and its class."""

    attribute: str
    class_name: str


def _ends(*names: str) -> re.Pattern[str]:
    # Only the end of a class name says what it is: its start is the model's name (FalconMambaMLP is an MLP).
    return re.compile(f"(?:{'|'.join(names)})$")


def _is(*names: str) -> re.Pattern[str]:
    return re.compile(f"^(?:{'|'.join(names)})$")


# Nearest module first, class before attribute. Linear attention (gated delta nets, lightning attention) is attention,
# as its authors and its configs call it; state-space and other recurrent mixers, RWKV's included, are `other`.
CLASS_RULES: tuple[tuple[Group, re.Pattern[str]], ...] = (
    ("other", _ends("Router(?:MLP)?", "TopKGating", "MessageGate")),
    ("other", _ends("Mixer", "MambaLayer", "xLSTMLayer", "RecurrentBlock", "ShortConv", "Rwkv\\w*Attention")),
    ("other", _ends("Adapter", "AltUp", "LaurelBlock", "Bottleneck(?:Layer)?", "GatedResidual")),
    ("attention", _ends("Attention", "Attn", "SelfOutput", "AttentionOutput", "MLA", "MoA", "DeltaNet")),
    ("feed-forward", _ends("MLP", "Mlp", "FFN", "FF", "FeedForward(?:Network)?", "Dense(?:Gated)?Act(?:Dense)?")),
    ("feed-forward", _ends("DenseGatedACT", "Experts?", "MoE", "Moe", "MOE", "MoeBlock", "ExpertGLU")),
)
# Names that mean this only inside a block: a head has an `output`, a projector an `mlp`, of its own.
BLOCK_CLASS_RULES: tuple[tuple[Group, re.Pattern[str]], ...] = (("feed-forward", _ends("Intermediate", "Output")),)
BLOCK_ATTRIBUTE_RULES: tuple[tuple[Group, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"(?:^|_)(?:attn|att|attention)s?$|Attention$|^crossattention$|_attn_layers$")),
    ("feed-forward", _is("mlps?", "ffns?", "ff", "feed_?forward", "DenseReluDense", "(?:shared_)?experts?")),
    ("feed-forward", _is("intermediate", "output")),
)
# The weight's own attribute, where no module around it says what it is (BART's and OPT's layers hold fc1 and fc2).
LEAF_RULES: tuple[tuple[Group, re.Pattern[str]], ...] = (
    ("other", _is("per_layer_(?:input_gate|projection)")),
    ("attention", _is("[qkvo]_proj", "query", "key", "value", "qkv", "qkv_proj", "query_key_value", "c_attn", "Wqkv")),
    ("feed-forward", _is("fc_?(?:1|2|in|out)", "ffn", "ffn_output", "(?:gate|up|down|gate_up)_proj", "w[123io]")),
    ("feed-forward", _is("wi_[01]", "lin(?:ear)?[12]", "c_fc", "dense_h_to_4h", "dense_4h_to_h")),
)
ROUTER = _is("gate", "router", "router_gate", "shared_expert_gate")
# A norm may hold a small MLP that sets its scale. DBRX's attention and SqueezeBERT's matrices lie in classes that end
# alike.
NORM_CLASS = re.compile(r"^(?!ConvDropout|\w*Attention)\w*Norm$")
CROSS = re.compile(r"^(?:cross_?att(?:entio)?n(?:_layers)?|encoder_attn|EncDecAttention)$")
CROSS_CLASS = _ends("CrossAttention")
# Heads that give logits over a vocabulary besides the one that the model names: Luke's entities, BLT's patcher, the
# columns that MobileBERT keeps apart and joins to its decoder; and FSMT's, which names its embedding instead.
FURTHER_HEADS = _ends(r"(?:^|\.)lm_head", r"predictions\.decoder")
FURTHER_HEADS_BY_CLASS = _is("MobileBertLMPredictionHead.dense", "FSMTDecoder.output_projection")


def place(steps: tuple[Step, ...], leaf: str, in_block: bool) -> Group | None:
    """Return the group of a weight that is no final layer; None where no rule knows its place. `steps` are the modules
    above it, the root first, its own left out; `leaf` is the attribute of the module that holds the weight."""
    group = _by_modules(steps, in_block)
    if group == "feed-forward" and (ROUTER.search(leaf) or ROUTER.search(steps[-1].attribute)):
        return "other"
    if group is not None:
        return group
    if not in_block:
        return "other"
    if leaf == "linear" and steps[-1].class_name.endswith("HybridLayer"):
        return "other"
    return next((group for group, rule in LEAF_RULES if rule.search(leaf)), None)


def is_cross(steps: tuple[Step, ...]) -> bool:
    """Return whether an attention weight reads the other stack's states."""
    return any(CROSS.search(step.attribute) or CROSS_CLASS.search(step.class_name) for step in steps)


def is_further_head(steps: tuple[Step, ...], module: str, leaf: str) -> bool:
    """Return whether a weight outside all blocks gives logits over a second vocabulary."""
    return bool(FURTHER_HEADS.search(module) or FURTHER_HEADS_BY_CLASS.search(f"{steps[-1].class_name}.{leaf}"))


def _by_modules(steps: tuple[Step, ...], in_block: bool) -> Group | None:
    class_rules = CLASS_RULES + BLOCK_CLASS_RULES if in_block else CLASS_RULES
    attribute_rules = BLOCK_ATTRIBUTE_RULES if in_block else ()
    if any(NORM_CLASS.search(step.class_name) for step in steps):
        return "other"
    for step in reversed(steps):
        for group, rule in class_rules:
            if rule.search(step.class_name):
                return group
        for group, rule in attribute_rules:
            if rule.search(step.attribute):
                return group
    return None
