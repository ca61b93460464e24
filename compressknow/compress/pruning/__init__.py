"""TODO

A method that looks at weights alone decides first, over all tensors of its step (`PruningMethod.choose`), in passes
that read the weights. What comes out of that is small: a mask a tensor, which is expanded block by block while the
weights are written. One that looks at activations (`Calibrated`) prunes a whole matrix at a time, as its inputs are
known.
"""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.registry import Registry
from compressknow.compress.parameters import Parametric, parameter
from compressknow.model.tensors import StoredTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from compressknow.compress.blocks import Block, Reader
    from compressknow.compress.calibrate.statistics import InputStatistics
    from compressknow.compress.steps import Prune

    BoolArray = npt.NDArray[np.bool_]


Needs = Literal["nothing", "magnitudes", "norms", "products"]


@dataclass(frozen=True)
class Weights:
    """A stored tensor to be pruned; `transposed` says that its last axis is the output (GPT-2's Conv1D)."""

    tensor: StoredTensor
    transposed: bool = False

    @property
    def matrices(self) -> tuple[int, int, int]:
        """The tensor as stacked matrices: their number (fused experts have many), rows and columns of each."""
        shape = self.tensor.shape
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def axis(self, dim: int) -> int:
        """The axis of the stored matrices, 0 or 1, along which output (`dim` 0) or input channels (1) are counted."""
        return dim ^ self.transposed


class Pruned(NamedTuple):
    """What a method makes of a block when it changes more than it zeroes.

    Attributes
    ----------
    mask : the pruned weights, bool [rows, columns].
    values : of all weights of the block [rows, columns], in its dtype; those of the pruned ones do not matter.
    """

    mask: BoolArray
    values: torch.Tensor


# The pruned weights of a block, bool [rows, columns]; called for each block of a tensor, in order.
BlockMask = Callable[["Block"], "BoolArray | Pruned"]


class Mask(Protocol):
    """The pruned weights of one tensor."""

    def start(self) -> BlockMask:
        """Begin with the first block of the tensor; it may be begun several times."""
        ...


@dataclass(frozen=True)
class EachBlock:
    """A mask whose blocks do not depend on each other: `pruned` gives those of any block."""

    pruned: BlockMask

    def start(self) -> BlockMask:
        """The same for every tensor that it is begun for."""
        return self.pruned


class PruningMethod(Parametric, abc.ABC):
    """A way to choose the weights to zero; its parameters are its fields (`compressknow.compress.options`).

    Attributes
    ----------
    name : what a recipe calls it, and its entry point.
    help : a line of `convert --help`.
    needs : what it looks at before a weight is written: ``nothing``, ``magnitudes`` (a pass over the weights), or, of
        a Linear's inputs X [tokens, in] on the calibration text, ``norms`` (of its columns) or ``products`` (X^T X).
    structured : it takes whole channels, not single weights.
    """

    needs: ClassVar[Needs] = "nothing"
    structured: ClassVar[bool] = False

    @property
    def over_scope(self) -> bool:
        """Whether one choice is made over all tensors of the step together: then it, not their shapes, decides how many
        fall in which."""
        return False

    @property
    def label(self) -> str:
        """The method in the paper's words (`L1-structured`): what a setup is called."""
        return " ".join([self.name, *(f"{name} {value}" for name, value in self.changed().items())])

    def count(self, weights: Weights, amount: float) -> int:
        """How many weights of a tensor fall, from its shape alone."""
        return round(amount * weights.tensor.numel)

    def check(self, amount: float) -> None:
        """Raise UsageError where the method cannot prune this amount; most can prune any."""

    def misfit(self, weights: Weights) -> str | None:  # noqa: ARG002
        """Why a tensor of this shape cannot be pruned so, as a sentence; None where it can."""
        return None

    @abc.abstractmethod
    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """A mask for each tensor. They are F32, F16 or BF16, in the order in which ties are broken.

        The masks of one step zero exactly as many weights as `pruned_count` says, whatever the number of threads.
        `reader` gives the blocks of a tensor, and its pool maps a function over the tensors.
        """

    def prune(
        self, weight: torch.Tensor, inputs: InputStatistics, amount: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Calibrated.prune`; no other method has it."""
        raise NotImplementedError(f"{self.name} does not look at activations.")


class Calibrated(PruningMethod):
    """A method that looks at activations; `needs` is ``norms`` or ``products``."""

    needs: ClassVar[Needs] = "norms"

    def choose(self, reader: Reader, weights: Sequence[Weights], amount: float) -> Sequence[Mask]:
        """Weights alone do not tell it: see `prune`."""
        raise NotImplementedError(f"{self.name} looks at activations.")

    @abc.abstractmethod
    def prune(
        self, weight: torch.Tensor, inputs: InputStatistics, amount: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prune one matrix, float32 [out, in] however it is stored, and leave it as it is.

        Gives the pruned weights, bool [out, in], exactly as many as `count` says; and new values of all, float32
        [out, in], where it changes those that stay (the pruned ones do not matter). The result must not depend on the
        number of threads; ties go in the order of the index.
        """


METHODS: Registry[PruningMethod] = Registry(
    "compressknow.pruning",
    "pruning method",
    PruningMethod,  # type: ignore[type-abstract]
    {
        "l1-unstructured": "compressknow.compress.pruning.magnitude:L1Unstructured",
        "ln-structured": "compressknow.compress.pruning.magnitude:LnStructured",
        "random-unstructured": "compressknow.compress.pruning.magnitude:RandomUnstructured",
        "random-structured": "compressknow.compress.pruning.magnitude:RandomStructured",
        "wanda": "compressknow.compress.pruning.calibrated:Wanda",
        "sparsegpt": "compressknow.compress.pruning.calibrated:SparseGPT",
    },
)


def pruned_count(step: Prune, weights: Sequence[Weights]) -> tuple[list[int] | None, int]:
    """How many weights a step zeroes, from shapes alone: in each tensor, and in all (`None` where one choice over all
    tensors decides how many fall in which)."""
    if step.is_global:
        return None, round(step.amount * sum(each.tensor.numel for each in weights))
    with METHODS.explain_failures(step.method):
        counts = [step.chosen.count(each, step.amount) for each in weights]
    return counts, sum(counts)


def choose(reader: Reader, step: Prune, weights: Sequence[Weights]) -> list[Mask]:
    """Decide what a step prunes.

    Raises CheckpointError naming a tensor that holds NaN or an infinity, and CompressknowError where a method of
    another package fails.
    """
    with METHODS.explain_failures(step.method):
        masks = step.chosen.choose(reader, weights, step.amount)
        if len(masks) != len(weights):
            raise CompressknowError(f"{step.method} gives {len(masks)} masks for {len(weights)} tensors.")
    return [_Foreign(step.method, mask) if METHODS.is_added(step.method) else mask for mask in masks]


def pruned_matrix(
    step: Prune, weight: torch.Tensor, inputs: InputStatistics
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the method of a step makes of one matrix, float32 [out, in]: see `Calibrated.prune`.

    Raises CompressknowError where a method of another package fails, or gives something of another form.
    """
    with METHODS.explain_failures(step.method):
        mask, values = step.chosen.prune(weight, inputs, step.amount)
        shapes = [tuple(made.shape) for made in (mask, values) if made is not None]
        if any(shape != tuple(weight.shape) for shape in shapes):
            raise CompressknowError(
                f"{step.method} gives {list(shapes[-1])} for the weight of {inputs.name}, {list(weight.shape)}."
            )
    return mask, values


@dataclass(frozen=True)
class _Foreign:
    """A mask of another package: it may fail in any way."""

    method: str
    mask: Mask

    def start(self) -> BlockMask:
        block_mask = self._begun()

        def answered(block: Block) -> BoolArray | Pruned:
            with METHODS.explain_failures(self.method):
                return block_mask(block)

        return answered

    def _begun(self) -> BlockMask:
        with METHODS.explain_failures(self.method):
            return self.mask.start()


# As far as an amount may be off, so that 0.6667 will do for 1:3.
CLOSE = 1e-4


class Pattern(NamedTuple):
    """Of each `of` neighbouring weights `keep` stay."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: Any) -> Pattern | None:
        """``2:4`` as a pattern; None where it is none.

        >>> Pattern.parse("2:4"), Pattern.parse("4:2")
        (Pattern(keep=2, of=4), None)
        """
        found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text) if isinstance(text, str) else None
        pattern = cls(*map(int, found.groups())) if found else None
        return pattern if pattern and pattern.keep < pattern.of else None

    @property
    def pruned(self) -> int:
        """How many of each group fall."""
        return self.of - self.keep


class Patterned(PruningMethod):
    """A method that prunes by N:M where its `pattern` says so: in each group by itself."""

    pattern: str | None = parameter(
        default=None,
        kind=str,
        help="Keep N of each M neighbouring inputs, as in 2:4.",
        must="N:M with N below M, such as 2:4",
        fits=lambda text: Pattern.parse(text) is not None,
    )

    @property
    def label(self) -> str:
        """Its name, and the pattern as it is written."""
        further = [f"{name} {value}" for name, value in self.changed().items() if name != "pattern"]
        return " ".join([self.name, *further, *([self.pattern] if self.pattern else [])])

    @property
    def groups(self) -> Pattern | None:
        """The pattern, if there is one."""
        return Pattern.parse(self.pattern)

    @property
    def over_scope(self) -> bool:
        """Not with a pattern."""
        return self.pattern is None and super().over_scope

    def count(self, weights: Weights, amount: float) -> int:
        """With a pattern, that of its groups."""
        if self.groups is None:
            return super().count(weights, amount)
        return weights.tensor.numel // self.groups.of * self.groups.pruned

    def check(self, amount: float) -> None:
        """Raise UsageError where the amount is not the pattern's."""
        if self.groups is None:
            return
        right = self.groups.pruned / self.groups.of
        if abs(amount - right) > CLOSE:
            raise UsageError(
                f"The pattern {self.pattern} prunes {right:.4g} of the weights, not {amount:.4g}.",
                hint=f"Pass --prune {right:.4g}, or leave out the pattern.",
            )

    def misfit(self, weights: Weights) -> str | None:
        """Where the inputs make no whole groups."""
        inputs = weights.matrices[1 + weights.axis(1)]
        if self.groups is None or inputs % self.groups.of == 0:
            return None
        return f"Its {inputs:,} input channels are no multiple of {self.groups.of}."
