"""Quantization schemes: how a weight is stored in few bits, in the layout of compressed-tensors.

The conversion asks a scheme for scales, has the weights rounded to its grid (`compressknow.compress.schemes.rounding`),
and writes what `pack` makes of the codes. Everything else that is to be known of a scheme it says itself: what runs
it, what it is called, what readers are to be warned of.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from compressknow.base.registry import Registry
from compressknow.compress.parameters import Parametric

if TYPE_CHECKING:
    import torch

Activations = Literal["token", "batch"]
SCALE = "_scale"


class Stored(NamedTuple):
    """A tensor that is stored for a weight: its name is that of the weight and `suffix`; `dtype` as safetensors calls
    it."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


class Scheme(Parametric, abc.ABC):
    """A way to store weights [rows, columns]; its parameters are its fields (`compressknow.compress.recipe`).

    Attributes
    ----------
    name : what a recipe calls it, and its entry point.
    help : a line of `convert --help`.
    word : the shortest name of what it makes of weights, such as ``int8``; `noun` what they are then, in the plural.
    bits : of a stored weight.
    lowest, highest : the ends of the grid, which is every whole number between them, unless `round` makes it another.
    scale_per : what shares a scale: a ``row``, the whole ``tensor``, or so many neighbouring columns of a row.
    format : compressed-tensors' name of the layout.
    rounds : activations are rounded as they come, with a scale for each ``token``, or one for all of a ``batch``; None
        where they stay floats.
    """

    word: ClassVar[str]
    noun: ClassVar[str]
    bits: ClassVar[int] = 8
    lowest: ClassVar[int] = -128
    highest: ClassVar[int] = 127
    format: ClassVar[str] = "int-quantized"
    rounds: ClassVar[Activations | None] = None

    @property
    def scale_per(self) -> Literal["row", "tensor"] | int:
        """What shares a scale."""
        return "row"

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        """What is stored for a weight of this shape and dtype, as `pack` gives it: first the one that holds its values,
        row by row, then its scales, then what `constants` gives."""
        return Stored("", "I8", shape), Stored(SCALE, dtype, self.scale_shape(shape))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales of a weight: [rows, 1], [1], or [rows, groups]."""
        if self.scale_per == "tensor":
            return (1,)
        return shape[0], 1 if self.scale_per == "row" else shape[1] // self.scale_per

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be stored so, as a sentence; None where it can."""
        if isinstance(self.scale_per, int) and shape[1] % self.scale_per:
            return f"Its {shape[1]} input channels are no multiple of the group size {self.scale_per}."
        return None

    def fit(self, shapes: Iterable[tuple[int, ...]]) -> dict[str, Any] | None:
        """Values of its parameters, as near as can be to those it has, by which weights of all these shapes can be
        stored; None where there are none."""
        return {} if all(self.misfit(shape) is None for shape in shapes) else None

    @abc.abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Its `weights` and `input_activations` in a group of `quantization_config`, as compressed-tensors names them;
        None for what stays as it is."""

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """Scales for largest magnitudes [rows, 1], [1] or [rows, groups], of their dtype and shape: these / half the
        range of the grid, as compressed-tensors has it. What is all zero gets the dtype's epsilon: finite, not 0."""
        import torch

        scales = absmax / ((self.highest - self.lowest) / 2)
        return torch.where(scales == 0, torch.finfo(absmax.dtype).eps, scales)

    def steps(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Weights in units of their scales, float32 [rows, columns], not yet rounded; a tensor of its own."""
        import torch

        scaled = torch.div(values.to(torch.float32), self.spread(scales, values.shape[-1]).to(torch.float32))
        # As a division in the dtype itself rounds. The passes that follow are exact, and faster in float32.
        return scaled if values.dtype == torch.float32 else scaled.to(values.dtype).to(torch.float32)

    def round(self, steps: torch.Tensor) -> torch.Tensor:
        """Round what `steps` gives, in place if it likes, to codes: the grid's nearest values, ties to even, int8 here.
        The code of zero is zero."""
        import torch

        return steps.clamp_(self.lowest, self.highest).round_().to(torch.int8)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 values of what was rounded."""
        from compressknow.compress.schemes.rounding import dequantize

        return dequantize(codes, self.spread(scales, codes.shape[-1]))

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """Scales that broadcast over [rows, columns]."""
        from compressknow.compress.schemes.rounding import per_column

        return per_column(scales, columns)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """The rows to store for rows of codes [rows, columns]."""
        return codes

    def constants(self, shape: tuple[int, ...]) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """By suffix, what is stored beside values and scales and does not depend on them."""
        return {}

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """Why vLLM does not run it with weights of these shapes, as the end of "It does not run in vLLM: "; None where
        it does."""
        return f"it has no kernel for {self.name}"

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """Where or how alone vLLM runs it with weights of these shapes; None where there is no such limit."""
        return None


SCHEMES: Registry[Scheme] = Registry(
    "compressknow.schemes",
    "scheme",
    Scheme,  # type: ignore[type-abstract]
    {
        "int8": "compressknow.compress.schemes.builtin:Int8",
        "int8-paper": "compressknow.compress.schemes.builtin:Int8Paper",
        "int8-weights": "compressknow.compress.schemes.builtin:Int8Weights",
        "fp8": "compressknow.compress.schemes.builtin:Fp8",
        "int4": "compressknow.compress.schemes.builtin:Int4",
    },
)


def known(names: Iterable[str]) -> list[Scheme]:
    """The schemes of these names, each once, but those that are not installed here."""
    return [SCHEMES[name] for name in sorted(set(names)) if name in SCHEMES]


def schemes_of(recipe: Mapping[str, Any] | None) -> list[Scheme]:
    """The schemes of a recipe, as a manifest holds it; of none where there is no recipe."""
    steps: Sequence[Mapping[str, Any]] = (recipe or {}).get("steps", ())
    return known(str(step["quantize"]) for step in steps if step.get("quantize"))


def word_of(schemes: Iterable[Scheme]) -> str:
    """One word for what schemes make of weights: ``int8``, or ``low-bit`` where they differ."""
    words = {scheme.word for scheme in schemes} or {SCHEMES[SCHEMES.first].word}
    return words.pop() if len(words) == 1 else "low-bit"
