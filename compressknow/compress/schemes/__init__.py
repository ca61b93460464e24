"""Quantization schemes: how a weight is stored in few bits, in the layout of compressed-tensors.

The conversion asks a scheme for scales, has the weights rounded to its grid (`nearest`, or
`calibrate.compensation.gptq`), and writes what `pack` makes of the codes. A scheme also says what runs it, what it is
called, and what to warn readers of.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from compressknow.base.registry import Registry
from compressknow.compress.parameters import Parametric

if TYPE_CHECKING:
    import torch

Activations = Literal["token", "batch"]
SCALE = "_scale"


class Stored(NamedTuple):
    """Tensor stored for a weight, under the weight's name and `suffix`; `dtype` is the name that safetensors uses."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]


class Scheme(Parametric, abc.ABC):
    """Way to store weights [rows, columns]; its parameters are its fields (`compressknow.compress.recipe`).

    Attributes
    ----------
    name : what a recipe calls it, and its entry point.
    help : a line of `convert --help`.
    word : shortest name of the stored weights, such as ``int8``; `noun` describes them, in the plural.
    bits : of a stored weight.
    lowest, highest : ends of the grid: every whole number between them, unless `round` makes other codes.
    format : name of the layout in compressed-tensors.
    rounds : how activations are rounded: with a scale per ``token`` or per ``batch``; None if they stay floats.
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
        """Unit that shares a scale: a ``row``, the ``tensor``, or so many neighbouring columns of a row."""
        return "row"

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        """List what is stored for a weight of this shape and dtype: its values as `pack` gives them, row by row; its
        scales; and what `constants` gives."""
        return Stored("", "I8", shape), Stored(SCALE, dtype, self.scale_shape(shape))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight's scales: [rows, 1], [1] or [rows, groups]."""
        if self.scale_per == "tensor":
            return (1,)
        return shape[0], 1 if self.scale_per == "row" else shape[1] // self.scale_per

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Say in a sentence why a weight of this shape cannot be stored so; None if it can."""
        if isinstance(self.scale_per, int) and shape[1] % self.scale_per:
            return f"Its {shape[1]} input channels are no multiple of the group size {self.scale_per}."
        return None

    def fit(self, shapes: Iterable[tuple[int, ...]]) -> dict[str, Any] | None:
        """Find parameter values, as near to its own as possible, that can store weights of all these shapes; None if
        there are none."""
        return {} if all(self.misfit(shape) is None for shape in shapes) else None

    @abc.abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return `weights` and `input_activations` of its group in `quantization_config`, as compressed-tensors names
        them; None for those that stay as they are."""

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """Compute scales of the dtype and shape of the largest magnitudes [rows, 1], [1] or [rows, groups].

        They are these magnitudes over half the range of the grid, as in compressed-tensors. Where all weights are zero,
        the scale is the dtype's epsilon, not 0.
        """
        import torch

        scales = absmax / ((self.highest - self.lowest) / 2)
        return torch.where(scales == 0, torch.finfo(absmax.dtype).eps, scales)

    def steps(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Express weights in units of their scales, unrounded: a new tensor, float32 [rows, columns]."""
        import torch

        scaled = torch.div(values.to(torch.float32), self.spread(scales, values.shape[-1]).to(torch.float32))
        # As a division in the dtype itself rounds. The passes that follow are exact, and faster in float32.
        return scaled if values.dtype == torch.float32 else scaled.to(values.dtype).to(torch.float32)

    def round(self, steps: torch.Tensor) -> torch.Tensor:
        """Round what `steps` gives, perhaps in place, to codes: the grid's nearest values, ties to even. The code of 0
        is 0."""
        import torch

        return steps.clamp_(self.lowest, self.highest).round_().to(torch.int8)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the float32 values of codes."""
        return dequantize(codes, self.spread(scales, codes.shape[-1]))

    def spread(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """Return scales that broadcast over [rows, columns]."""
        return repeat_scales(scales, columns)

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the rows to store for rows of codes [rows, columns]."""
        return codes

    def constants(self, shape: tuple[int, ...]) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """Return, by suffix, the stored tensors that depend on the shape alone."""
        return {}

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """Say why vLLM does not run weights of these shapes, to end "It does not run in vLLM: "; None if it does."""
        return f"it has no kernel for {self.name}"

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """Say where or how alone vLLM runs weights of these shapes; None if there is no such limit."""
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


def find_schemes(names: Iterable[str]) -> list[Scheme]:
    """Return the installed schemes of these names, each once."""
    return [SCHEMES[name] for name in sorted(set(names)) if name in SCHEMES]


def read_schemes(recipe: Mapping[str, Any] | None) -> list[Scheme]:
    """Return the installed schemes of a manifest's recipe; none without a recipe."""
    steps: Sequence[Mapping[str, Any]] = (recipe or {}).get("steps", ())
    return find_schemes(str(step["quantize"]) for step in steps if step.get("quantize"))


def choose_word(schemes: Iterable[Scheme]) -> str:
    """Return one word for weights of these schemes: ``int8``, or ``low-bit`` where the schemes differ."""
    words = {scheme.word for scheme in schemes} or {SCHEMES[SCHEMES.first].word}
    return words.pop() if len(words) == 1 else "low-bit"


# Takes the weights of a block [rows, columns], their scales, and the scheme whose grid they are to lie on; gives its
# codes, of the same shape. The block is left as it is.
Rounding = Callable[["torch.Tensor", "torch.Tensor", Scheme], "torch.Tensor"]


def nearest(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round each weight to the nearest value of the grid in units of its scale, ties to even."""
    return scheme.round(scheme.steps(values, scales))


def repeat_scales(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Repeat the scales that neighbouring columns share [rows, groups], so that they broadcast over [rows, columns]."""
    groups = scales.shape[-1]
    return scales if groups == 1 else scales.repeat_interleave(columns // groups, dim=-1)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply codes with scales that broadcast over them, float32."""
    import torch

    return codes.to(torch.float32).mul_(scales.to(torch.float32))
