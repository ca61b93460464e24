"""Plan of a conversion, made from headers alone: every tensor of the output, and which ties end."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.compress.pruning import METHODS, Weights
from compressknow.compress.recipe import Recipe
from compressknow.compress.schemes import SCHEMES, Scheme, Stored
from compressknow.compress.sources import Sources
from compressknow.compress.steps import Prune, Quantize, Step, count_pruned
from compressknow.model.checkpoint import Checkpoint, list_some
from compressknow.model.loading import list_headers, load_report
from compressknow.model.meta import rebuild_model
from compressknow.model.structure import NOT_LINEAR, Action, LinearWeight, Structure, select
from compressknow.model.tensors import DTYPE_SIZES, StoredTensor

if TYPE_CHECKING:
    from compressknow.compress.removal.smaller import Removal


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor of the output.

    `transposed` says that the last axis of a weight is its output. If it is changed, `module` is the Linear that it is
    the weight of, and `parameter` its name in the module tree. The source of a `created` one only has it under a tied
    name. `weight` says that it is a parameter of the module tree. `sharing` names further modules with the same weight:
    a loader ties their weights, but gives each a scale of its own.
    """

    name: str
    source: StoredTensor
    group: str
    module: str | None = None
    prune: Prune | None = None
    quantize: Quantize | None = None
    created: bool = False
    weight: bool = True
    transposed: bool = False
    sharing: tuple[str, ...] = ()
    parameter: str = ""

    @property
    def modules(self) -> tuple[str, ...]:
        """Return all modules that hold it."""
        return self.module or "", *self.sharing

    @property
    def to_prune(self) -> Weights:
        return Weights(self.source, self.transposed)

    @property
    def scheme(self) -> Scheme | None:
        return self.quantize.chosen if self.quantize else None

    @cached_property
    def stored(self) -> tuple[Stored, ...]:
        """List what the output stores for it, by suffix of its name: its values, then what else its scheme needs."""
        if self.scheme is None:
            return (Stored("", self.source.dtype, self.source.shape),)
        with SCHEMES.explain_failures(self.scheme.name):
            return self.scheme.stored(self.source.shape, self.source.dtype)

    def names(self, part: Stored) -> tuple[str, ...]:
        """Return the names under which a part is written: its own and, except for the values, which a loader ties,
        those of modules that share the weight."""
        sharing = self.sharing if part is not self.stored[0] else ()
        return self.name + part.suffix, *(f"{module}.weight{part.suffix}" for module in sharing)

    @property
    def written(self) -> Iterator[tuple[str, Stored]]:
        """Yield every tensor of the output by its name."""
        return ((name, part) for part in self.stored for name in self.names(part))

    @property
    def in_scope(self) -> bool:
        return self.prune is not None or self.quantize is not None

    @property
    def is_calibrated(self) -> bool:
        """Return whether its compression depends on its inputs on the calibration text."""
        return any(step and step.calibrated for step in (self.prune, self.quantize))

    @property
    def bytes_after(self) -> int:
        return sum(math.prod(part.shape) * DTYPE_SIZES[part.dtype] for _, part in self.written)


@dataclass(frozen=True)
class Plan:
    """Plan of everything that a conversion will do.

    Attributes
    ----------
    checkpoint, tree : the source (after any `removal`), and its module tree on the meta device.
    targets : the modules that each scheme quantizes; `ignore` are the Linear modules that stay unchanged.
    untied : the weights that are no longer tied: ``name``, ``tied_to``, and the ``bytes`` that this costs.
    config : the output's config.json without its quantization.
    unpacked : transformers unpacks packed weights to floats on loading, not only when it first computes.
    unused : stored tensors that the model does not use, which are copied.
    removal : how the checkpoint was made from the original, if the recipe drops blocks or neurons.
    """

    checkpoint: Checkpoint
    tree: PreTrainedModel = field(repr=False, compare=False)
    structure: Structure
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    targets: dict[Scheme, tuple[str, ...]]
    ignore: tuple[str, ...]
    untied: tuple[dict[str, Any], ...]
    config: dict[str, Any] = field(repr=False)
    sources: Sources = field(repr=False, compare=False)
    unpacked: bool = False
    unused: tuple[str, ...] = ()
    removal: Removal | None = None

    def list_prune_steps(self) -> Iterator[tuple[Prune, list[PlannedTensor]]]:
        """Yield each prune step with its tensors, in the order in which it breaks ties."""
        for step in self.recipe.steps:
            if isinstance(step, Prune):
                yield step, [tensor for tensor in self.tensors if tensor.prune == step]

    def count_pruned(self) -> tuple[dict[str, int], int]:
        """Return how many weights will be pruned: by tensor name, if known from the shapes alone, and in total."""
        known: dict[str, int] = {}
        total = 0
        for step, tensors in self.list_prune_steps():
            counts, in_all = count_pruned(step, [tensor.to_prune for tensor in tensors])
            total += in_all
            known |= {} if counts is None else dict(zip((t.name for t in tensors), counts, strict=True))
        return known, total


# The steps that prune and quantize a weight.
Steps = tuple[Prune | None, Quantize | None]


def make_plan(checkpoint: Checkpoint, model: PreTrainedModel, structure: Structure, recipe: Recipe) -> Plan:
    """Plan a conversion. `model` is the checkpoint's module tree on the meta device, with its `structure`.

    Raises UsageError if a scope, pattern or layer range matches nothing, or two steps prune or quantize the same
    weight, CheckpointError if a weight in scope is missing, UnsupportedError if the input is quantized already,
    or a weight has no quantized form that loads and runs correctly.
    """
    sources = Sources(checkpoint, model, structure)
    recipe = replace(recipe, steps=tuple(_fit_parameters(structure, step) for step in recipe.steps))
    assigned = _assign_steps(structure, recipe)
    _separate(assigned, sources)
    schemes = {weight: quantize.chosen if quantize else None for weight, (_, quantize) in assigned.items()}
    for weight in schemes:
        sources.check(weight, schemes)
    # Weights stored in one tensor are changed together.
    changed = list({t.name: t for each in assigned.items() for t in _plan_changed(*each, sources)}.values())
    _check_methods_fit(changed)
    tied = ((weight.parameter, sources.find_tied_embedding(weight)) for weight in assigned)
    shared_with = {parameter: embedding for parameter, embedding in tied if embedding}
    config = untie_config(checkpoint.config, model) if shared_with else dict(checkpoint.config)
    path = checkpoint.folder / "config.json"
    extra = _find_untied(model, config, path, set(sources.supply)) if shared_with else {}
    _check_sharing(changed, extra, structure)
    # An embedding without stored values gets those of the weight that was tied to it.
    needed = extra | {embedding: parameter for parameter, embedding in shared_with.items()}
    unchanged = _plan_unchanged(sources, structure, {t.name for t in changed}, needed)
    # In the order of the source, with created tensors after those that they were tied to.
    tensors = sorted([*changed, *unchanged], key=lambda t: (sources.position[t.source.name], t.created, t.name))
    for tensor in tensors:
        if tensor.group == "vision" and tensor.is_calibrated:
            raise UnsupportedError(
                f"{tensor.module} cannot be calibrated: it reads no text.",
                hint="Use --scope vision only with methods that need no calibration.",
            )
    targets: dict[Scheme, tuple[str, ...]] = {}
    for tensor in changed:
        if tensor.scheme:
            targets[tensor.scheme] = (*targets.get(tensor.scheme, ()), *tensor.modules)
    quantized = {module for modules in targets.values() for module in modules}
    ignore = tuple(m for w in structure.linears if w.kind == "linear" for m in w.modules if m not in quantized)
    untied = tuple(
        {"name": tensor.name, "tied_to": shared_with[f"{tensor.module}.weight"], "bytes": tensor.bytes_after}
        for tensor in changed
        if f"{tensor.module}.weight" in shared_with
    )
    unused: tuple[str, ...] = ()
    if any(tensor.name not in sources.bound for tensor in sources.distinct()):
        # This excludes tensors of older releases that transformers knows to ignore.
        unused = load_report(type(model), model.config, list_headers(checkpoint)).unexpected
    return Plan(
        checkpoint, model, structure, recipe, tuple(tensors), targets, ignore, untied, config, sources, unused=unused
    )


def _fit_parameters(structure: Structure, step: Step) -> Step:
    """Fill in parameters that depend on the shapes in scope, such as the group size of int4, if any value fits. Raises
    UsageError if a scope, pattern or layer range matches nothing."""
    if not isinstance(step, Quantize) or None not in step.parameters.values():
        return step
    weights = _select_weights(structure, step)
    with SCHEMES.explain_failures(step.scheme):
        return replace(step, parameters={**step.parameters, **(step.chosen.fit(w.shape for w in weights) or {})})


def _select_weights(structure: Structure, step: Prune | Quantize) -> tuple[LinearWeight, ...]:
    where, action = step.where, _name_action(step)
    return select(structure, where.scope, action, where.include, where.exclude, where.layers)


def _name_action(step: Prune | Quantize) -> Action:
    return "prune" if isinstance(step, Prune) else "quantize"


def _assign_steps(structure: Structure, recipe: Recipe) -> dict[LinearWeight, Steps]:
    """Return the steps that act on each weight."""
    assigned: dict[LinearWeight, Steps] = {}
    for step in recipe.steps:
        if not isinstance(step, Prune | Quantize):
            continue
        for weight in _select_weights(structure, step):
            prune, quantize = assigned.get(weight, (None, None))
            if (prune if isinstance(step, Prune) else quantize) is not None:
                raise UsageError(
                    f"Two steps would {_name_action(step)} {weight.module}.",
                    hint="Narrow the steps with exclude or layers, so that their scopes do not overlap.",
                )
            assigned[weight] = (step, quantize) if isinstance(step, Prune) else (prune, step)
    return assigned


def _check_methods_fit(changed: Iterable[PlannedTensor]) -> None:
    """Raise UnsupportedError if a tensor does not have the shape that its pruning method needs."""
    misfits: dict[str, tuple[Prune, str]] = {}
    for tensor in changed:
        if (step := tensor.prune) is not None:
            with METHODS.explain_failures(step.method):
                why = step.chosen.misfit(tensor.to_prune)
            if why:
                misfits[tensor.module or tensor.name] = step, why
    if misfits:
        step, why = next(iter(misfits.values()))
        raise UnsupportedError(
            f"{step.label} does not fit {list_some(misfits)}.",
            why=why,
            hint="Leave them out with --exclude, or choose other parameters.",
        )


def _separate(assigned: Mapping[LinearWeight, Steps], sources: Sources) -> None:
    """Split stored tensors that hold several weights, unless one step prunes all of them and none is quantized."""
    by_parameter = {weight.parameter: steps for weight, steps in assigned.items()}
    for weight, (prune, _) in assigned.items():
        siblings = sources.find_siblings(weight)
        alike = all(by_parameter.get(parameter) == (prune, None) for parameter in siblings)
        if siblings and not alike and not sources.split(weight):
            raise UnsupportedError(
                f"{weight.parameter} is stored in one tensor with {list_some(set(siblings) - {weight.parameter})}.",
                why="transformers splits it on loading, but not by rows.",
                hint="Prune all of them in one step, or none; and quantize none.",
            )


def _plan_changed(weight: LinearWeight, steps: Steps, sources: Sources) -> Iterator[PlannedTensor]:
    for stored in sources.of(weight):
        yield PlannedTensor(
            stored.name if sources.is_stored(weight.parameter) else weight.parameter,
            stored,
            weight.group or "other",
            weight.module,
            *steps,
            created=sources.is_borrowed(weight, stored),
            transposed=weight.transposed != sources.is_transposed_on_loading(stored),
            sharing=weight.sharing,
            parameter=weight.parameter,
        )


def _plan_unchanged(
    sources: Sources, structure: Structure, changed: set[str], needed: Mapping[str, str]
) -> Iterator[PlannedTensor]:
    """Yield the tensors that are copied: all stored tensors that are not changed, and the `needed` parameters (by name,
    with their tied source) that are not stored under their own names."""
    distinct = list(sources.distinct())
    for stored in distinct:
        if stored.name not in changed:
            parameter = sources.bound[stored.name].parameter if stored.name in sources.bound else None
            group = structure.find_group(parameter)
            yield PlannedTensor(stored.name, stored, group, weight=parameter in sources.weights)
    names = {*changed, *(stored.name for stored in distinct)}
    written = names.union(*(sources.bound[name].parameters for name in names & sources.bound.keys()))
    for parameter, source in needed.items():
        # A pickled file may hold one storage under two names, of which only one is written.
        if parameter not in written:
            yield PlannedTensor(parameter, sources.tensor(source), NOT_LINEAR, created=True)


def _check_sharing(changed: Iterable[PlannedTensor], extra: Mapping[str, str], structure: Structure) -> None:
    """Raise UnsupportedError if modules that share a changed weight would no longer do so."""
    shared = [
        tensor.module or "" for tensor in changed if any(f"{module}.weight" in extra for module in tensor.sharing)
    ]
    if shared:
        raise UnsupportedError(
            f"The final layer of {structure.architecture} cannot be untied from its embedding while "
            f"{list_some(shared)} are compressed too.",
            why="Its config unties all weights or none, and several blocks share these.",
            hint="Leave the final layer out: --scope blocks.",
        )


def untie_config(config: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """Return config.json of the same model with its final layer untied. Raises UnsupportedError if this would change
    what the model computes."""
    forward = inspect.unwrap(type(model).forward)
    if "tie_word_embeddings" in inspect.getsource(forward):
        raise UnsupportedError(
            f"The final layer of {type(model).__name__} cannot be untied from its embedding.",
            why="Its forward pass depends on tie_word_embeddings, so the model would compute something else.",
            hint="Leave the final layer out: --scope attention --scope feed-forward, or --exclude its name.",
        )
    changed = copy.deepcopy(config)
    for part in (changed, changed.get("text_config")):
        if isinstance(part, dict) and (part is changed or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    # T5 scales the inputs of a tied final layer; unless set, its config derives this from tie_word_embeddings.
    if hasattr(model.config, "scale_decoder_outputs"):
        changed["scale_decoder_outputs"] = model.config.scale_decoder_outputs
    return changed


def _find_untied(model: PreTrainedModel, config: dict[str, Any], path: Path, supplied: set[str]) -> dict[str, str]:
    """Return the parameters that the untied model no longer shares, with the names that they were tied to; the source
    may hold only one of a pair. In BERT, untying the decoder's weight unties its bias, too."""
    still_tied = rebuild_model(model, config, path).all_tied_weights_keys
    return {
        name: source
        for target, source in model.all_tied_weights_keys.items()
        if target not in still_tied and target in supplied and source in supplied
        for name in (target, source)
    }
