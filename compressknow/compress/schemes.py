"""Quantization schemes, which store weights in few bits in the layout of compressed-tensors, and the built-in ones.

The conversion gets scales from a scheme, rounds the weights to its grid (`round_to_nearest`, or
`calibrate.compensation.round_by_gptq`), and writes the codes as `pack` returns them. A scheme also has its names, and
its limits in vLLM. The manifest of a converted checkpoint determines what runs it (`list_runtimes`).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from compressknow.base.packages import Registry
from compressknow.base.reading import group_by
from compressknow.compress.parameters import Parametric, parameter

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
    """Way to store weights [rows, columns]; its parameters are its fields (`compressknow.compress.parameters`).

    Attributes
    ----------
    name : its name in recipes, and its entry point.
    help : its line of `convert --help`.
    word, noun : what the stored weights are, in a word such as ``int8`` and as a noun in the plural.
    bits : width of a stored weight.
    lowest, highest : ends of the grid: every whole number between them, unless `round` returns other codes.
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
        """Unit that shares a scale: a ``row``, the ``tensor``, or this many neighbouring columns of a row."""
        return "row"

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        """List the tensors stored for a weight of this shape and dtype: its values as `pack` returns them, row by row;
        its scales; and its `constants`."""
        return Stored("", "I8", shape), Stored(SCALE, dtype, self.scale_shape(shape))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight's scales: [rows, 1], [1] or [rows, groups]."""
        if self.scale_per == "tensor":
            return (1,)
        return shape[0], 1 if self.scale_per == "row" else shape[1] // self.scale_per

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Return a sentence on why a weight of this shape cannot be stored this way; None if it can."""
        if isinstance(self.scale_per, int) and shape[1] % self.scale_per:
            return f"Its {shape[1]} input channels are not a multiple of the group size {self.scale_per}."
        return None

    def fit(self, shapes: Iterable[tuple[int, ...]]) -> dict[str, Any] | None:
        """Find the parameter values closest to its own that suit weights of all these shapes; None if none do."""
        return {} if all(self.misfit(shape) is None for shape in shapes) else None

    @abc.abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Return `weights` and `input_activations` of its group in `quantization_config`, in the terms of
        compressed-tensors; None for those that are not quantized."""

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        """Compute scales from the largest magnitudes [rows, 1], [1] or [rows, groups], in their dtype and shape.

        They are the magnitudes divided by half the range of the grid, as in compressed-tensors. Where that is 0, the
        scale is the dtype's epsilon: all weights are zero, or so small that the quotient underflows (in float16).
        """
        import torch

        scales = absmax / ((self.highest - self.lowest) / 2)
        return torch.where(scales == 0, torch.finfo(absmax.dtype).eps, scales)

    def steps(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Express weights in units of their scales, unrounded: a new tensor, float32 [rows, columns]."""
        # Round as a division in the weight's dtype does. The later passes are exact in float32, and faster.
        return (values.float() / repeat_scales(scales, values.shape[-1]).float()).to(values.dtype).float()

    def round(self, steps: torch.Tensor) -> torch.Tensor:
        """Round the result of `steps`, perhaps in place, to the nearest codes of the grid, ties to even, and 0 to 0."""
        import torch

        if not -128 <= self.lowest < self.highest <= 127:
            raise ValueError(
                f"its grid, {self.lowest} to {self.highest}, does not fit int8: return other codes in `round`"
            )
        return steps.clamp_(self.lowest, self.highest).round_().to(torch.int8)

    def dequantize(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the float32 values of codes."""
        return dequantize(codes, repeat_scales(scales, codes.shape[-1]))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the rows to store for rows of codes [rows, columns]."""
        return codes

    def constants(self, shape: tuple[int, ...]) -> Mapping[str, torch.Tensor]:  # noqa: ARG002
        """Return, by suffix, the stored tensors that depend only on the shape."""
        return {}

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """Return why vLLM cannot run weights of these shapes, to follow "It does not run in vLLM: "; None if it can."""
        return f"it has no kernel for {self.name}"

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        """Return the only devices or settings with which vLLM runs weights of these shapes; None if all work."""
        return None


SCHEMES: Registry[Scheme] = Registry(
    "compressknow.schemes",
    "scheme",
    Scheme,  # type: ignore[type-abstract]
    {
        "int8": "compressknow.compress.schemes:Int8",
        "int8-paper": "compressknow.compress.schemes:Int8Paper",
        "int8-weights": "compressknow.compress.schemes:Int8Weights",
        "fp8": "compressknow.compress.schemes:Fp8",
        "int4": "compressknow.compress.schemes:Int4",
    },
)


def find_schemes(names: Iterable[str]) -> list[Scheme]:
    """Return the installed schemes of these names, each once."""
    return [SCHEMES[name] for name in sorted(set(names)) if name in SCHEMES]


def read_schemes(recipe: Mapping[str, Any] | None) -> list[Scheme]:
    """Return the installed schemes of a manifest's recipe; none without a recipe."""
    return find_schemes(str(step["quantize"]) for step in (recipe or {}).get("steps", ()) if step.get("quantize"))


def choose_word(schemes: Iterable[Scheme]) -> str:
    """Return one word for weights of these schemes, such as ``int8``; ``low-bit`` if they differ or there are none.

    >>> choose_word([SCHEMES["int8"]]), choose_word([])
    ('int8', 'low-bit')
    """
    words = {scheme.word for scheme in schemes}
    return words.pop() if len(words) == 1 else "low-bit"


# Takes the weights of a block [rows, columns], their scales, and the scheme whose grid they are rounded to. Returns
# codes of the same shape; the block stays unchanged.
Rounding = Callable[["torch.Tensor", "torch.Tensor", Scheme], "torch.Tensor"]


def round_to_nearest(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round each weight to the nearest value of the grid in units of its scale, ties to even."""
    return scheme.round(scheme.steps(values, scales))


def repeat_scales(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Repeat scales [rows, groups] that neighbouring columns share, so that they broadcast over [rows, columns]."""
    groups = scales.shape[-1]
    return scales if groups == 1 else scales.repeat_interleave(columns // groups, dim=-1)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply codes by scales that broadcast over them, float32."""
    return codes.float().mul_(scales.float())


_INT = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "group_size": None}
_DYNAMIC = {"type": "int", "dynamic": True, "group_size": None}


class Int8(Scheme):
    """Symmetric 8-bit weights, and 8-bit activations with a scale per token.

    Bit for bit what compressed-tensors computes (`calculate_qparams`, `quantize`): scale = absmax / 127.5 in the
    weight's own dtype, and division and rounding in that dtype too.
    """

    name = "int8"
    help = "8-bit weights and activations, to deploy"
    word = "int8"
    noun = "8-bit integers"
    rounds: ClassVar[Activations | None] = "token"

    def arguments(self) -> dict[str, Any]:
        """See `Scheme.arguments`; vLLM's W8A8 kernels accept these."""
        return {
            "weights": {**_INT, "strategy": "channel"},
            "input_activations": {**_DYNAMIC, "num_bits": 8, "strategy": "token", "symmetric": True},
        }

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        return None

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        return "not on Blackwell GPUs: no int8"


class Int8Paper(Scheme):
    """One scale per tensor, and 7-bit activations: torch's reduce_range is hard-coded, and 8 bits differ measurably.

    Bit for bit what torch computes for float32 weights: it multiplies by the inverse of the scale, in float32, and no
    scale is below float32's epsilon (`UniformQuantizationObserverBase._calculate_qparams`, `quantize_per_tensor`). The
    scale of a 16-bit weight has the weight's dtype here; torch accepts only float32.
    """

    name = "int8-paper"
    help = "as in the paper: per tensor, 7-bit activations"
    word = "int8"
    noun = "8-bit integers"
    rounds = "batch"

    @property
    def scale_per(self) -> Literal["row", "tensor"] | int:
        return "tensor"

    def arguments(self) -> dict[str, Any]:
        """See `Scheme.arguments`; all activations of a batch share a scale and a zero point."""
        return {
            "weights": {**_INT, "strategy": "tensor"},
            "input_activations": {**_DYNAMIC, "num_bits": 7, "strategy": "tensor", "symmetric": False},
        }

    def scales(self, absmax: torch.Tensor) -> torch.Tensor:
        import torch

        return (absmax / ((self.highest - self.lowest) / 2)).clamp(min=torch.finfo(torch.float32).eps)

    def steps(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return values.float() * scales.float().reciprocal()


class Packed(Scheme):
    """Integers of a row packed into words of 32 bits, as compressed-tensors packs them; unpacking needs the shape."""

    format = "pack-quantized"

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        rows, columns = shape
        packed = Stored("_packed", "I32", (rows, -(-columns * self.bits // 32)))
        return packed, Stored(SCALE, dtype, self.scale_shape(shape)), Stored("_shape", "I64", (2,))

    def constants(self, shape: tuple[int, ...]) -> Mapping[str, torch.Tensor]:
        import torch

        return {"_shape": torch.tensor(shape, dtype=torch.int64)}


class Int8Weights(Packed, Int8):
    """8-bit weights, packed as compressed-tensors packs them (`pack_to_int32`), which vLLM reads on GPUs.

    Four integers of a row, each plus 128, share 32 bits, the first in the lowest ones. Checkpoints that store them as
    int8 (``int-quantized``) are read too.
    """

    name = "int8-weights"
    help = "8-bit weights; activations stay float"
    rounds = None

    def arguments(self) -> dict[str, Any]:
        return {"weights": {**_INT, "strategy": "channel"}, "input_activations": None}

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pack codes into int32 [rows, columns / 4], rounded up; rows are padded with zeros."""
        import torch
        from torch.nn.functional import pad

        unsigned = codes.contiguous().view(torch.uint8) ^ 128
        return pad(unsigned, (0, -unsigned.shape[1] % 4)).view(torch.int32)

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        # vLLM 0.32 has no such kernel for CPUs (`MarlinLinearKernel`, `CPUWNA16LinearKernel`).
        return "on GPUs"


# The largest number of e4m3, which has no infinity.
LARGEST = 448
_FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}


class Fp8(Scheme):
    """Weights and activations as 8-bit floats (e4m3), whose values are denser near zero.

    Bit for bit what compressed-tensors computes (`calculate_qparams`, `quantize`): scale = absmax / 448 in the weight's
    own dtype, division in that dtype too, and the nearest of e4m3's values.
    """

    name = "fp8"
    help = "8-bit floats (e4m3), weights and activations"
    word = "fp8"
    noun = "8-bit floats"
    lowest, highest = -LARGEST, LARGEST
    format = "float-quantized"
    rounds: ClassVar[Activations | None] = "token"

    def stored(self, shape: tuple[int, ...], dtype: str) -> tuple[Stored, ...]:
        return Stored("", "F8_E4M3", shape), Stored(SCALE, dtype, self.scale_shape(shape))

    def arguments(self) -> dict[str, Any]:
        """See `Scheme.arguments`; vLLM's FP8 kernels accept these."""
        return {
            "weights": {**_FLOAT, "dynamic": False, "strategy": "channel"},
            "input_activations": {**_FLOAT, "dynamic": True, "strategy": "token"},
        }

    def round(self, steps: torch.Tensor) -> torch.Tensor:
        import torch

        return steps.clamp_(self.lowest, self.highest).to(torch.float8_e4m3fn)

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        return None

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        # Ada and Hopper are the first GPUs that can multiply these floats.
        return "on GPUs; before Ada and Hopper, activations stay floats"


GROUP_SIZES = (32, 64, 128)
# Added to 4-bit integers, so that none is negative.
OFFSET = 8
# Inputs and outputs must be multiples of this in vLLM's kernel for CPUs (0.32, `CPUWNA16LinearKernel.can_implement`);
# the one for GPUs (`MarlinLinearKernel`) pads.
VLLM_CPU = 32


class Int4(Packed):
    """Symmetric 4-bit weights with a scale per group of input channels.

    Bit for bit what compressed-tensors computes and packs (`calculate_qparams`, `quantize`, `pack_to_int32`): scale =
    absmax / 7.5 in the weight's own dtype (GPTQ fits it, `calibrate.compensation.fit_scales`). Eight integers of a row,
    each plus 8, share 32 bits, the first in the lowest ones.
    """

    name = "int4"
    help = "4-bit weights; activations stay float"
    word = "int4"
    noun = "4-bit integers"
    bits, lowest, highest = 4, -8, 7
    group_size: int | None = parameter(
        default=None,
        kind=int,
        help="Input channels that share a scale: 32, 64 or 128.  [default: the largest that divides all in scope]",
        must="32, 64 or 128",
        fits=lambda size: size in GROUP_SIZES,
    )

    @property
    def scale_per(self) -> int:
        """Size of a group of input channels: the smallest, unless one is chosen."""
        return self.group_size or GROUP_SIZES[0]

    def fit(self, shapes: Iterable[tuple[int, ...]]) -> dict[str, Any] | None:
        """Return the chosen group size if it divides the columns of all shapes, else the largest that does."""
        columns = {shape[1] for shape in shapes}
        sizes = (*([self.group_size] if self.group_size else []), *reversed(GROUP_SIZES))
        return next(({"group_size": size} for size in sizes if not any(n % size for n in columns)), None)

    def arguments(self) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
        return {
            "weights": {**weights, "strategy": "group", "group_size": self.scale_per},
            "input_activations": None,
        }

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Pack codes into int32 [rows, columns / 8]."""
        import torch

        # View two bytes as one 16-bit integer, the first in its lower half, and join their 4 bits into one byte.
        pairs = (codes + OFFSET).view(torch.int16)
        return (pairs | pairs >> 4).to(torch.uint8).view(torch.int32)

    def vllm_obstacle(self, shapes: Iterable[tuple[int, ...]]) -> str | None:  # noqa: ARG002
        return None

    def vllm_limit(self, shapes: Iterable[tuple[int, ...]]) -> str | None:
        # Only GPUs take other sizes; in bfloat16, the kernel for CPUs loses much accuracy (`make test-vllm`).
        if all(size % VLLM_CPU == 0 for shape in shapes for size in shape):
            return "on CPUs with --dtype float16"
        return f"on GPUs: its kernel for CPUs needs layer sizes that are multiples of {VLLM_CPU}"


TRANSFORMERS, ENGINE, VLLM = "transformers", "compressknow", "vLLM"
# Text models that vLLM implements itself, by their classes in transformers, without mixtures of experts: transformers
# fuses experts, which are therefore not quantized.
VLLM_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in (
        "Apertus Arcee Bloom Cohere Cohere2 Cwm Ernie4_5 Exaone4 Falcon Gemma Gemma2 Gemma3 GPTBigCode GPTJ GPTNeoX "
        "Glm Glm4 Granite Llama Mistral Mpt Nemotron OPT Olmo Olmo2 Olmo3 Persimmon Phi Phi3 Qwen2 Qwen3 SeedOss "
        "StableLm Starcoder2"
    ).split()
) | {"GPT2LMHeadModel"}
# Sibling layers that vLLM fuses into one (its `packed_modules_mapping`).
FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


def list_runtimes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the runtimes that load a converted checkpoint and compute with it correctly."""
    return (TRANSFORMERS, ENGINE, *([] if find_vllm_obstacle(manifest) else [VLLM]))


def find_vllm_limit(manifest: Mapping[str, Any]) -> str | None:
    """Return the only devices or settings with which vLLM runs a checkpoint; None if all work, or if none does."""
    shapes = {} if find_vllm_obstacle(manifest) else _collect_shapes(manifest)
    limits = {limit for scheme in find_schemes(shapes) if (limit := scheme.vllm_limit(shapes[scheme.name]))}
    if on_gpus := {limit for limit in limits if limit.startswith("on GPUs")}:
        # Without CPUs there is no condition for them, and one "on GPUs" with a reason is enough.
        limits = {limit for limit in limits if not limit.startswith("on CPUs")}
        limits -= {"on GPUs"} if len(on_gpus) > 1 else set()
    return "; ".join(sorted(limits)) or None


def find_vllm_obstacle(manifest: Mapping[str, Any]) -> str | None:
    """Return why vLLM does not run a checkpoint, to follow "It does not run in vLLM: "; None if it does."""
    architecture = str(manifest["source"]["architecture"])
    if architecture not in VLLM_ARCHITECTURES:
        return f"{architecture} is not among the text generation models that are known to run there"
    if unused := manifest.get("unused"):
        return f"{architecture} has no place for {unused[0]}, at which its loader stops"
    quantized = {_name_module(row): row for row in manifest["tensors"] if row.get("scheme")}
    shapes = _collect_shapes(manifest)
    obstacles = (
        SCHEMES[name].vllm_obstacle(shapes[name]) if name in SCHEMES else f"it has no kernel for {name}"
        for name in sorted(shapes)
    )
    if obstacle := next((obstacle for obstacle in obstacles if obstacle), None):
        return obstacle
    word = choose_word(find_schemes(shapes))
    for group, layer in (("final", "the final layer"), ("other", "a layer outside attention and feed-forward")):
        name = next((module for module, row in quantized.items() if row["group"] == group), None)
        if name:
            return f"{layer} ({name}) is {word}, but vLLM supports it only in floating point"
    modules = {_name_module(row) for row in manifest["tensors"] if row["name"].endswith(".weight")}
    return next((f"it fuses {split}" for split in _describe_split(modules, quantized, word)), None)


def _collect_shapes(manifest: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of the weights of each scheme."""
    by_scheme = group_by(manifest["tensors"], lambda row: row.get("scheme") or None)
    return {scheme: [tuple(row["shape"]) for row in rows] for scheme, rows in by_scheme.items()}


def _name_module(row: Mapping[str, Any]) -> str:
    return str(row["name"]).removesuffix(".weight")


def _describe_split(modules: set[str], quantized: Mapping[str, Mapping[str, Any]], word: str) -> Iterator[str]:
    """Describe sibling layers that vLLM would fuse, but that are not all quantized in the same way."""
    ways = {module: (row["scheme"], row.get("parameters")) for module, row in quantized.items()}
    for module, way in ways.items():
        parent, _, leaf = module.rpartition(".")
        fused = next((leaves for leaves in FUSED if leaf in leaves), ())
        siblings = [name for name in fused if f"{parent}.{name}" in modules]
        sibling_ways = [ways.get(f"{parent}.{name}") for name in siblings]
        if any(other != way for other in sibling_ways):
            all_or_none = f"all or none of these must be {word}"
            must = all_or_none if None in sibling_ways else "these must be quantized in the same way"
            yield f"{', '.join(siblings[:-1])} and {siblings[-1]} of {parent}, so {must}"
