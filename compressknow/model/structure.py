"""What a checkpoint is made of: its module tree on the meta device, and the Linear weights in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal

Group = Literal["attention", "feed-forward", "final", "other", "vision"]
ModuleMap = Literal["structural", "paper"]
GROUPS: tuple[Group, ...] = ("attention", "feed-forward", "final", "other", "vision")
# The group of every tensor that is not a Linear weight: embeddings, norms, biases.
NOT_LINEAR = "not-linear"


@dataclass(frozen=True)
class LinearWeight:
    """One weight matrix, or stack of matrices, of the module tree.

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
        """All modules that hold it."""
        return self.module, *self.sharing

    @property
    def stored(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)

    @property
    def used(self) -> int:
        """Elements that one forward pass multiplies by: the tensor counted once a use."""
        return self.stored * self.uses


@dataclass(frozen=True)
class Structure:
    """The module tree of a checkpoint, without weights.

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
        """Modules that hold a Linear weight which no rule places."""
        return tuple(weight.module for weight in self.linears if weight.group is None)
