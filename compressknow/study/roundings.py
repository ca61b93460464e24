"""Roundings of a weight: to the types of a GGUF file, or to the schemes of a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import ClassVar, Literal

import torch

from compressknow.compress.schemes import SCHEMES, Scheme, nearest
from compressknow.compress.schemes.builtin import GROUP_SIZES
from compressknow.gguf import grids
from compressknow.model.tensors import DTYPE_SIZES

# Types that ggml rounds to at once: coarse and fine ones.
_AT_ONCE = ("q8_0", "q6_k", "q5_0", "q4_0", "q3_k")


class Roundings(ABC):
    """Candidate types, the largest first, by default all `candidates`; weights are [out, in]."""

    form: ClassVar[Literal["gguf", "checkpoint"]]
    candidates: ClassVar[tuple[str, ...]]

    def __init__(self, types: tuple[str, ...] | None = None) -> None:
        self.types = self.candidates if types is None else types

    @abstractmethod
    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        """Return the types that a weight's rows fit."""

    def list_measured(self, shape: Sequence[int]) -> tuple[str, ...]:
        """Return the types by which a weight's sensitivity is measured."""
        return self.list_legal(shape)

    @abstractmethod
    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        """Return the bytes that a weight takes, its scales included."""

    @abstractmethod
    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        """Return what a runtime reads of a weight that was stored so, float32; `importance` [in] are the mean squares
        of its inputs."""


class GgufRoundings(Roundings):
    """Types of tensors, by llama.cpp's names."""

    form, candidates = "gguf", grids.CANDIDATES

    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        return grids.list_legal_types(shape[-1], self.types)

    def list_measured(self, shape: Sequence[int]) -> tuple[str, ...]:
        own = self.list_legal(shape)
        return tuple(name for name in own if name in _AT_ONCE) or own

    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        return grids.get_nbytes(name, shape)

    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        matrix = None if importance is None else importance.numpy()
        return torch.from_numpy(grids.roundtrip(weight.numpy(), name, matrix))


class SchemeRoundings(Roundings):
    """Schemes that leave activations as they are; ``int4/64`` is int4 in groups of 64."""

    form = "checkpoint"
    candidates = ("int8-weights", *(f"int4/{size}" for size in GROUP_SIZES))

    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        return tuple(name for name in self.types if parse_scheme(name).misfit(tuple(shape)) is None)

    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        # Scales are of the dtype of the weight: of 16 bits in what people compress. Shapes of what is packed are I64.
        stored = [each for each in parse_scheme(name).stored(tuple(shape), "BF16") if each.dtype != "I64"]
        return sum(prod(each.shape) * DTYPE_SIZES[each.dtype] for each in stored)

    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG002
        scheme = parse_scheme(name)
        per = scheme.scale_per
        groups = weight.reshape(len(weight), -1, per) if isinstance(per, int) else weight[:, None]
        scales = scheme.scales(groups.abs().amax(2))
        return scheme.dequantize(nearest(weight, scales, scheme), scales)


def parse_scheme(name: str) -> Scheme:
    """Return the scheme that a type of a checkpoint names."""
    kind, _, size = name.partition("/")
    return SCHEMES[kind].with_values({"group_size": int(size)}) if size else SCHEMES[kind]
