"""Removal of neurons: feed-forward blocks lose rows of input projections and columns of the output projection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError, UsageError
from compressknow.compress.calibrate.compensation import DAMPINGS
from compressknow.compress.removal.settings import Config, Cuts, Keys, find_widths, parse_block, read_shapes, set_at
from compressknow.compress.steps import DropNeurons, Where
from compressknow.compress.weights import Values
from compressknow.model.checkpoint import Checkpoint
from compressknow.model.loading import NameMapping
from compressknow.model.meta import rebuild_model
from compressknow.model.structure import LinearWeight, Structure
from compressknow.model.tensors import FLOAT_DTYPES, StoredTensor, view_bytes

# int4 and the kernels of all runtimes support multiples of this many columns.
MOST_MULTIPLE = 128
# A width is reduced in steps of at most an eighth.
FEWEST_STEPS = 8


@dataclass(frozen=True)
class DroppedNeurons:
    """Setting of the config, by its `keys`, that changes from `before` to `after`, and the feed-forward `networks`
    whose width it is, each by the Linear that reads its neurons."""

    keys: Keys
    before: int
    after: int
    networks: Mapping[LinearWeight, Cuts]


def select_neurons(step: DropNeurons, settings: Config, structure: Structure) -> list[DroppedNeurons]:
    """Select the settings and networks from which a step drops neurons.

    Raises UnsupportedError if no setting is only the width of the feed-forward blocks, or their layers are not plain
    Linears; UsageError if the amount would drop none or all, or if the step's scope names a side that the model lacks,
    or one of two that share one width.
    """
    linears = {w.parameter: w for w in structure.linears if w.group == "feed-forward" and w.layer is not None}
    biases = {f"{weight.module}.bias" for weight in linears.values()} & settings.shapes.keys()
    widths = find_widths(settings, linears.keys() | biases)
    if not widths:
        raise _explain(structure.architecture, "No setting of its config is only the width of its feed-forward blocks.")
    drops = []
    for keys, width, cuts in widths:
        networks = dict(_find_networks(cuts, linears, structure))
        inside = {step.where == Where() or down.stack in step.where.scope for down in networks}
        if inside == {True, False}:
            raise UsageError(
                f"The encoder and the decoder of {structure.architecture} share one width, {keys[-1]}: neurons cannot "
                "be dropped in only one of them.",
                hint="Leave out --scope.",
            )
        if inside == {True}:
            drops.append(DroppedNeurons(keys, width, count_remaining(width, step), networks))
    if not drops:
        raise UsageError(
            f"{structure.architecture} has no feed-forward blocks in its {' and '.join(step.where.scope)}.",
            hint="Leave out --scope.",
        )
    return drops


def _explain(architecture: str, why: str) -> UnsupportedError:
    hint = "Prune instead: --scope feed-forward --prune 0.2."
    return UnsupportedError(f"No neuron of {architecture} can be dropped.", why=why, hint=hint)


def count_remaining(width: int, step: DropNeurons) -> int:
    """Count how many of `width` neurons remain. Raises UsageError if that would be none, or all."""
    multiple = step.multiple or find_multiple(width)
    # Half a multiple is rounded up.
    remaining = int((width * (1 - step.amount)) / multiple + 0.5) * multiple
    if not 0 < remaining < width:
        raise UsageError(
            f"Dropping {step.amount:.6g} of {width} neurons, in steps of {multiple}, would drop "
            f"{'none' if remaining else 'all'} of them.",
            hint="Choose another amount, or set multiple = 1 in a recipe for the exact amount.",
        )
    return remaining


def find_multiple(width: int) -> int:
    """Find the largest power of two up to 128 that divides a width at least eight times.

    >>> find_multiple(1536), find_multiple(128), find_multiple(48), find_multiple(5461)
    (128, 16, 4, 1)
    """
    multiple = min(width & -width, MOST_MULTIPLE)
    while multiple > 1 and multiple * FEWEST_STEPS > width:
        multiple //= 2
    return multiple


def _find_networks(
    all_cuts: Cuts, linears: Mapping[str, LinearWeight], structure: Structure
) -> Iterator[tuple[LinearWeight, Cuts]]:
    """Find the feed-forward networks whose width a setting is, one per block."""
    blocks: dict[Any, Cuts] = {}
    for name, cut in all_cuts.items():
        block = parse_block(name)
        blocks.setdefault(block and block[:2], {})[name] = cut
    for cuts in blocks.values():
        downs = [
            weight
            for name, (axis, _) in cuts.items()
            if (weight := linears.get(name)) and axis == len(weight.shape) - (2 if weight.transposed else 1)
        ]
        if len(downs) != 1 or any(name in linears and linears[name].kind == "experts" for name in cuts):
            why = "Its blocks have several feed-forward networks each, as in a mixture of experts."
            raise _explain(structure.architecture, why)
        yield downs[0], cuts


@dataclass(frozen=True)
class Cut:
    """Stored tensor that loses rows or columns: `source` is the original tensor, of this `parameter`. Its `axis` has
    `each` entries per neuron of `drop`, one projection after the other; `down` is the Linear that reads the neurons."""

    source: StoredTensor
    parameter: str
    axis: int
    each: int
    drop: DroppedNeurons
    down: LinearWeight

    @property
    def is_down(self) -> bool:
        """Tell whether it is the weight that reads the neurons, which is refitted."""
        return self.parameter == self.down.parameter

    def select(self, neurons: torch.Tensor) -> Values:
        """Return its remaining values for these neurons (int64, ascending)."""
        numbers = torch.cat([neurons + self.drop.before * part for part in range(self.each)])
        return Values(self.source, axis=self.axis, numbers=tuple(numbers.tolist()))


def drop_neurons(
    checkpoint: Checkpoint, settings: Config, drops: Sequence[DroppedNeurons]
) -> tuple[Checkpoint, PreTrainedModel, dict[str, Cut]]:
    """Drop neurons before it is known which; return the checkpoint with fewer neurons, its module tree, and the cuts by
    stored name. The cut tensors of the checkpoint have the new shapes, but cannot be read.

    Raises UnsupportedError if the checkpoint does not store a float tensor for each projection.
    """
    whole = settings.whole
    for drop in drops:
        whole = set_at(whole, drop.keys, drop.after)
    config = settings.update_raw(whole)
    tree = rebuild_model(settings.tree, config, settings.path)
    cuts = dict(_find_cuts(checkpoint, settings.tree, drops))
    tensors = dict(checkpoint.tensors)
    for name, cut in cuts.items():
        shape = list(cut.source.shape)
        shape[cut.axis] = cut.drop.after * cut.each
        tensors[name] = replace(cut.source, shape=tuple(shape))
    return replace(checkpoint, config=config, tensors=tensors), tree, cuts


def _find_cuts(
    checkpoint: Checkpoint, tree: PreTrainedModel, drops: Sequence[DroppedNeurons]
) -> Iterator[tuple[str, Cut]]:
    shapes, stored_parameters = read_shapes(tree), set()
    cut_parameters = {
        name: (*cut, drop, down) for drop in drops for down, cuts in drop.networks.items() for name, cut in cuts.items()
    }
    for stored, binding in NameMapping(tree).bind(checkpoint.tensors).items():
        for parameter in set(binding.parameters) & cut_parameters.keys():
            tensor = checkpoint.tensors[stored]
            if binding.reshaped or tensor.dtype not in FLOAT_DTYPES or tensor.shape != shapes[parameter]:
                why = f"{stored} must be stored like {parameter}, as one tensor of 32-bit or 16-bit floats."
                raise _explain(type(tree).__name__, why)
            stored_parameters.add(parameter)
            yield stored, Cut(tensor, parameter, *cut_parameters[parameter])
    if missing := sorted(cut_parameters.keys() - stored_parameters):
        raise CheckpointError(
            f"The checkpoint lacks {missing[0]}, which its config says it has.", hint="Download or save it again."
        )


def choose_neurons(down: torch.Tensor, squares: torch.Tensor, number: int) -> torch.Tensor:
    """Choose the neurons that contribute most to the output, int64 [number], ascending.

    A neuron's score is the norm of its activations times the norm of the weights that read it,
    ||h_j||_2 * ||W[:, j]||_2: the Frobenius norm of its contribution to the output, over all tokens.

    Parameters
    ----------
    down : float [out, in], the weight of the down projection; `in` counts neurons.
    squares : float [in], the sum over tokens of each activation's square.
    number : number of remaining neurons; the first of equal ones are chosen.
    """
    scores = squares.to(torch.float64).sqrt() * torch.linalg.vector_norm(down.to(torch.float64), dim=0)
    best = torch.sort(scores, descending=True, stable=True).indices[:number]
    return torch.sort(best).values


def fit_down(down: torch.Tensor, products: torch.Tensor, selected: torch.Tensor, name: str = "") -> torch.Tensor:
    """Fit the down projection of selected neurons to approximate the output of all, float32 [out, selected].

    The least-squares solution over the calibration tokens is W' = W H[:, S] H[S, S]^-1, with H = X^T X. Damping pulls
    it towards the original weights, so that a neuron that the text never activates keeps them:
    W' = W[:, S] + W[:, D] H[D, S] (H[S, S] + damping)^-1, for selected neurons S and dropped ones D.

    Parameters
    ----------
    down : float [out, in]. products : float [in, in], H. selected : int64, ascending.
    name : the module's name, for errors.

    Raises CompressknowError if H[S, S] has no inverse even with a damping of 10 % of its mean diagonal.
    """
    dropped = torch.ones(down.shape[1], dtype=torch.bool)
    dropped[selected] = False
    weight = down.to(torch.float64)
    target = weight[:, dropped] @ products[dropped][:, selected].to(torch.float64)
    for damping in DAMPINGS:
        # Rebuilt for each: a second copy of so large a matrix would be most of the memory that this takes.
        inner = products[selected][:, selected].to(torch.float64)
        mean = float(inner.diagonal().mean())
        inner.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(inner)
        del inner
        if mean > 0 and not int(failed):
            change = torch.cholesky_solve(target.T, factor).T
            return (weight[:, selected] + change).to(torch.float32)
    raise CompressknowError(
        f"The statistics of the neurons of {name} cannot be inverted.",
        why="Their activations on the calibration text are zero, infinite, or all alike.",
        hint="Calibrate on more text.",
    )


def write_cut(
    checkpoint: Checkpoint, name: str, cut: Cut, pieces: Iterable[torch.Tensor], folder: Path
) -> StoredTensor:
    """Append the pieces of a cut tensor of a checkpoint to a file in `folder`, named like the tensor's weight file;
    return the tensor in its new place."""
    path = folder / cut.source.file.relative_to(checkpoint.folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        offset = file.tell()
        for piece in pieces:
            file.write(view_bytes(piece.contiguous()))
    return replace(checkpoint.tensors[name], file=path, offset=offset, loaded=None)
