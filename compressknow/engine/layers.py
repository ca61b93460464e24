"""Layers that compute with the integers of a quantized Linear, in place of compressed-tensors' own.

What no layer here is for is unpacked to floats when it is loaded: a scheme needs none to run.
"""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import nn

from compressknow.registry import Registry


class EngineLinear(nn.Module):
    """A Linear of the engine.

    Attributes
    ----------
    word : what it multiplies in, such as ``int8``.
    rounds : whether it rounds what comes in; None where it never does.
    unlisted : weights that it holds in another form than a parameter.
    """

    word: ClassVar[str]
    rounds: bool | None = None

    @property
    def unlisted(self) -> int:
        """None."""
        return 0


class LayerKind(abc.ABC):
    """A kind of such layers, by the scheme that a module has in compressed-tensors' config, whoever wrote it."""

    @abc.abstractmethod
    def runs_on(self, device: str | torch.device) -> bool:
        """Whether it is fast and exact there."""

    @abc.abstractmethod
    def layer_of(self, module: nn.Module) -> EngineLinear | None:
        """The layer for a module that compressed-tensors has prepared and that still holds what is stored; None where
        its scheme is another one."""


LAYERS: Registry[LayerKind] = Registry(
    "compressknow.layers",
    "engine layer",
    LayerKind,  # type: ignore[type-abstract]
    {"int8": "compressknow.engine.int8:Int8Kind", "int4": "compressknow.engine.int4:Int4Kind"},
)


def kinds_on(device: str | torch.device) -> list[LayerKind]:
    """Those that run there. Raises CompressknowError where one of another package cannot be used."""
    return [LAYERS[name] for name in LAYERS if LAYERS[name].runs_on(device)]


def layer_of(module: nn.Module, kinds: list[LayerKind]) -> EngineLinear | None:
    """The layer of the first kind that has one for a module."""
    return next((layer for kind in kinds if (layer := kind.layer_of(module))), None)
