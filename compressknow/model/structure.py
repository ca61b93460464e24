"""Structure of a checkpoint: the Linear weights of its module tree, their groups, and their selection by scopes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal, get_args

from compressknow.base.errors import UnsupportedError, UsageError, suggest_word

Group = Literal["attention", "feed-forward", "final", "other", "vision"]
ModuleMap = Literal["structural", "paper"]
GROUPS: tuple[Group, ...] = get_args(Group)
Kind = Literal["linear", "conv1d", "experts"]
# The group of every tensor that is not a Linear weight: embeddings, norms, biases.
NOT_LINEAR = "not-linear"


def check_module_map(name: str) -> None:
    """Raise UsageError if this is not a module map."""
    if name not in get_args(ModuleMap):
        raise UsageError(f"Unknown module map {name!r}.", hint="Choose structural or paper.")


@dataclass(frozen=True)
class LinearWeight:
    """Weight matrix, or stack of matrices, of the module tree.

    `parameter` is its name in the tree (``bert.encoder.layer.0.attention.self.query.weight``), `module` the name of the
    module that holds it, `sharing` those of further modules with the same weight (Zamba's blocks). `kind` is how the
    module stores it: ``linear`` (nn.Linear, ``[out, in]``), ``conv1d`` (GPT-2's, ``[in, out]``) or ``experts`` (fused,
    ``[experts, ...]``). `group` is None if no rule matches; ``vision`` contains all weights in the towers of a
    multimodal model, which read images, video or sound. `layer` is the index of its block in the stack, `stack` the
    side of an encoder-decoder model (None if there is only one stack); `cross` marks cross-attention. `uses` is how
    often one forward pass applies it (ALBERT shares layers). `transposed` means that the last axis is the output
    (conv1d; the experts of GPT-OSS, Llama 4 and Aria).
    """

    parameter: str
    module: str
    kind: Kind
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
    def is_expert(self) -> bool:
        """Return whether it belongs to experts of a mixture, fused or one by one."""
        return self.kind == "experts" or ".experts." in self.parameter

    @property
    def stored(self) -> int:
        """Count the elements of the tensor."""
        return prod(self.shape)

    @property
    def used(self) -> int:
        """Count the elements that one forward pass multiplies by: those of the tensor, once per use."""
        return self.stored * self.uses


@dataclass(frozen=True)
class Structure:
    """Module tree of a checkpoint, without weights.

    `parameters` maps every name of the state dict (parameters and persistent buffers, including tied names) to its
    shape; `buffers` are the names that are not parameters. `tied` maps a name to the name that it shares its storage
    with, as transformers ties them on loading. `opaque` maps parameters that act as a weight matrix of attention or
    feed-forward without being a Linear layer (XLNet's q, k, v, o; I-BERT's QuantLinear; SqueezeBERT's convolutions) to
    their group. They cannot be compressed, so a scope that would include them is rejected rather than partly
    compressed. `prefix` is the attribute under which a model of this kind holds its base model (``bert``, ``model``).
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
    def stored(self) -> int:
        """Return how many parameters a checkpoint of it stores; those that share their storage count once."""
        left_out = self.buffers | self.tied.keys()
        return sum(prod(shape) for name, shape in self.parameters.items() if name not in left_out)

    @cached_property
    def _groups(self) -> dict[str | None, str]:
        return {weight.parameter: weight.group or "other" for weight in self.linears}

    def find_group(self, parameter: str | None) -> str:
        """Return the group of a parameter; `NOT_LINEAR` for None, and for parameters that are not Linear weights."""
        return self._groups.get(parameter, NOT_LINEAR)

    @property
    def unplaced(self) -> tuple[str, ...]:
        """Return the modules of Linear weights without a group."""
        return tuple(weight.module for weight in self.linears if weight.group is None)


# The deepest transformer trained so far has 1,000 (DeepNet).
MOST_BLOCKS = 2_000


def compile_pattern(option: str, pattern: str) -> re.Pattern[str]:
    """Compile a regular expression. Raises UsageError, which names the `option` that gave it, if it is invalid."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"{option} {pattern!r} is not a valid regular expression: {error}.") from None


Action = Literal["prune", "quantize"]
Patterns = tuple[re.Pattern[str], ...]


def compile_patterns(option: str, patterns: Sequence[str]) -> Patterns:
    """Compile regular expressions. Raises the errors of `compile_pattern`."""
    return tuple(compile_pattern(option, pattern) for pattern in patterns)


LANGUAGE = ("attention", "feed-forward", "other")  # neither the final layer nor the towers of a multimodal model
SCOPES: dict[str, Callable[[LinearWeight, Action], bool]] = {
    "blocks": lambda weight, _: weight.group in LANGUAGE and weight.layer is not None,
    "attention": lambda weight, _: weight.group == "attention",
    "feed-forward": lambda weight, _: weight.group == "feed-forward",
    "final": lambda weight, _: weight.group == "final",
    # As in the paper, pruning everything leaves out the final layer, but quantizing everything does not.
    "overall": lambda weight, action: weight.group in LANGUAGE or (action == "quantize" and weight.group == "final"),
    "self-attention": lambda weight, _: weight.group == "attention" and not weight.cross,
    "cross-attention": lambda weight, _: weight.group == "attention" and weight.cross,
    "encoder-attention": lambda weight, _: weight.group == "attention" and weight.stack == "encoder",
    "decoder-attention": lambda weight, _: weight.group == "attention" and weight.stack == "decoder",
    "encoder": lambda weight, _: weight.stack == "encoder" and weight.group in LANGUAGE,
    "decoder": lambda weight, _: weight.stack == "decoder" and weight.group in LANGUAGE,
    "vision": lambda weight, _: weight.group == "vision",
}
# For pruning and for quantizing: every runtime takes it, and a tied final layer stays tied.
DEFAULT_SCOPES = ("blocks",)
# Other names for scopes, for hints.
OTHER_WORDS = {
    **dict.fromkeys(("mlp", "ffn", "ff"), "feed-forward"),
    **dict.fromkeys(("attn", "att"), "attention"),
    **dict.fromkeys(("lm_head", "head"), "final"),
    **dict.fromkeys(("all", "everything"), "overall"),
}
SHOWN = 8


def check_scope_names(scopes: Collection[str]) -> None:
    """Raise UsageError for a name that is not a scope of any model, or if there are no names."""
    if not scopes:
        raise UsageError("No scope is given.", hint=f"Choose from {', '.join(SCOPES)}.")
    for scope in scopes:
        if scope not in SCOPES:
            other = OTHER_WORDS.get(scope.lower())
            suggestion = f"Did you mean {other}? " if other else suggest_word(scope, SCOPES)
            raise UsageError(f'There is no scope "{scope}".', hint=f"{suggestion}Choose from {', '.join(SCOPES)}.")


def list_scopes(structure: Structure) -> tuple[str, ...]:
    """Return the scopes that contain at least one weight of this model."""
    return tuple(name for name in SCOPES if any(SCOPES[name](weight, "quantize") for weight in structure.linears))


def count_scope_parameters(structure: Structure) -> dict[str, dict[Action, int]]:
    """Count the parameters that each scope of the model contains, by action; shared layers count once per use."""
    actions: tuple[Action, ...] = ("prune", "quantize")
    return {
        name: {action: sum(w.used for w in structure.linears if SCOPES[name](w, action)) for action in actions}
        for name in list_scopes(structure)
    }


def select(
    structure: Structure,
    scopes: Sequence[str],
    action: Action,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: str | None = None,
) -> tuple[LinearWeight, ...]:
    """Return the weights that an action applies to, in tree order.

    Parameters
    ----------
    scopes : names from `SCOPES`; their union is selected.
    include : regular expressions, searched in module names. They narrow the scopes to modules that match one of them;
        however, a pattern that matches only unplaced layers adds these to the scopes.
    layers : blocks by number, such as ``0-5``, ``3`` or ``0-2,5``, counted in each stack separately (encoder, decoder,
        vision tower). Weights outside the blocks are left out.

    Raises UsageError if a scope, a pattern or a range matches nothing, or nothing remains, UnsupportedError if a scope
    cannot be resolved or compressed in full: layers without a group, matrices that are not Linear layers.
    """
    check_scope_names(scopes)
    includes, excludes = compile_patterns("--include", include), compile_patterns("--exclude", exclude)
    in_scope = [w for w in structure.linears if any(SCOPES[scope](w, action) for scope in scopes)]
    unplaced = [w for w in structure.linears if w.group is None]
    opaque, modules = _list_opaque(structure, scopes), [w.module for w in (*in_scope, *unplaced)]
    for pattern in includes:
        _check_pattern("--include", pattern, modules, structure)
    for pattern in excludes:
        _check_pattern("--exclude", pattern, [*modules, *opaque], structure)
    narrowing = tuple(p for p in includes if any(p.search(w.module) for w in in_scope))
    included = (name for name in opaque if not narrowing or _is_match(name, narrowing))
    if names := [name for name in included if not _is_match(name, excludes)]:
        what = "Matrices in the scope are not Linear layers and cannot be compressed"
        raise UnsupportedError(
            f"{what} ({len(names)}):\n{_join_names(names)}",
            hint=f"Leave them out by name, for example --exclude '{_name_example(names)}'.",
        )
    resolved = (*includes, *excludes)
    names = list(dict.fromkeys(w.module for w in unplaced if not _is_match(w.module, resolved)))
    if names and set(scopes) != {"final"}:
        raise UnsupportedError(
            f"The group of these Linear layers is not known ({len(names)}):\n{_join_names(names)}",
            hint=f"Add them to the scope with --include '{_name_example(names)}', or leave them out with --exclude.",
        )
    for scope in scopes:
        if not any(SCOPES[scope](weight, action) for weight in structure.linears) and not unplaced:
            counts = count_scope_parameters(structure).items()
            others = ", ".join(f"{name} ({count['quantize']:,} parameters)" for name, count in counts)
            hint = f"It has {others}." if others else f"{structure.architecture} has no Linear layer at all."
            raise UsageError(f'The scope "{scope}" is empty in {structure.architecture}.', hint=hint)
    chosen = [w for w in in_scope if not narrowing or _is_match(w.module, narrowing)]
    chosen += [w for w in unplaced if _is_match(w.module, includes)]
    chosen = [w for w in chosen if not _is_match(w.module, excludes)]
    if layers is not None:
        chosen = _select_layers(structure, chosen, layers)
    if not chosen:
        raise UsageError("No Linear layer is left.", hint="Loosen --exclude, --include or --layers.")
    parameters = {weight.parameter for weight in chosen}
    return tuple(weight for weight in structure.linears if weight.parameter in parameters)


def _is_match(name: str, patterns: Patterns) -> bool:
    return any(pattern.search(name) for pattern in patterns)


def _check_pattern(option: str, pattern: re.Pattern[str], names: list[str], structure: Structure) -> None:
    if any(pattern.search(name) for name in names):
        return
    kinds = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names))
    near = difflib.get_close_matches(pattern.pattern, kinds, n=SHOWN, cutoff=0.3) or kinds[:SHOWN]
    elsewhere = [w for w in structure.linears if pattern.search(w.module)]
    why = f"It matches {elsewhere[0].module}, which is {elsewhere[0].group}." if elsewhere else None
    raise UsageError(
        f"{option} {pattern.pattern!r} matches no Linear layer of the scope.",
        why,
        f"Available modules (N stands for a number): {', '.join(near)}.",
    )


def _list_opaque(structure: Structure, scopes: Sequence[str]) -> list[str]:
    groups = {scope if scope in ("feed-forward", "final") else scope.rpartition("-")[2] for scope in scopes}
    everything = bool(groups & {"blocks", "overall", "encoder", "decoder"})
    return [name for name, group in structure.opaque.items() if group in groups or (everything and group != "vision")]


def _join_names(names: list[str]) -> str:
    kinds = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names))
    return "\n".join([f"  {kind}" for kind in kinds[:SHOWN]] + (["  ..."] if len(kinds) > SHOWN else []))


def _name_example(names: list[str]) -> str:
    # Layers of all blocks share the end of their names.
    return r"\.".join(names[0].split(".")[-2:])


def parse_layers(layers: str) -> dict[str, range]:
    """Parse a text such as ``0-2,5`` into a range for each part. Raises UsageError if it has another form."""
    ranges: dict[str, range] = {}
    for part in layers.split(",") if isinstance(layers, str) else [""]:
        limits = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
        if limits is None or len(part) > 20:
            raise UsageError(f"{layers!r} is not a range of layers.", hint="Write 0-5, 3 or 0-2,5.")
        first = int(limits.group(1))
        last = int(limits.group(2) or first)
        if last < first:
            raise UsageError(f"{part.strip()!r} is not a range of layers.", hint=f"Write {last}-{first}.")
        ranges[part.strip()] = range(first, last + 1)
    return ranges


def _select_layers(structure: Structure, weights: list[LinearWeight], layers: str) -> list[LinearWeight]:
    blocks = {w.layer for w in weights if w.layer is not None}
    hint = f"The scope has blocks {min(blocks)}-{max(blocks)}." if blocks else "The scope has no blocks."
    # Some kinds of layers are only in some blocks of a stack, but a number beyond the stack is a mistake.
    stacks = {(w.stack, w.group == "vision") for w in weights}
    inside = (w.layer for w in structure.linears if (w.stack, w.group == "vision") in stacks)
    last = max((layer for layer in inside if layer is not None), default=0)
    selected: set[int] = set()
    for part, numbers in parse_layers(layers).items():
        if not any(number in numbers for number in blocks):
            raise UsageError(f"No layer of the scope is in blocks {part!r}.", hint=hint)
        if numbers[-1] > last:
            raise UsageError(f"There is no block {numbers[-1]}, which {part!r} names.", hint=hint)
        selected.update(numbers)
    return [w for w in weights if w.layer in selected]
