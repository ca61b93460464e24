"""Where a model runs: the names of devices, and the best one of this machine."""

from __future__ import annotations

import re

from compressknow.errors import UsageError, did_you_mean

AUTO, CPU = "auto", "cpu"
DEVICES = (AUTO, CPU, "cuda", "mps", "xpu")
_OTHER_WORDS = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "metal": "mps"}


def check_device(name: str) -> None:
    """Raise UsageError for what names no device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ``xpu`` or ``auto``. Whether
    the machine has it is not looked at: that takes torch.
    """
    kind, _, number = name.partition(":")
    if kind not in DEVICES or not re.fullmatch(r"[0-9]{0,4}", number) or (number and kind in (AUTO, CPU)):
        other = _OTHER_WORDS.get(kind.lower())
        near = f"Did you mean {other}? " if other else did_you_mean(kind, DEVICES)
        raise UsageError(f"There is no device {name!r}.", hint=f"{near}There is {', '.join(DEVICES)}, and cuda:1.")


def device_of(name: str) -> str:
    """The device that a name means on this machine: of ``auto`` cuda, else mps, else cpu.

    Raises UsageError where it names none, or one that this machine or this torch does not have.
    """
    import torch

    check_device(name)
    if name == AUTO:
        return next((kind for kind in ("cuda", "mps") if _count(kind)), CPU)
    kind, _, number = name.partition(":")
    count = 1 if kind == CPU else _count(kind)
    if int(number or 0) < count:
        return name
    if count:
        there = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise UsageError(f"There is no device {name}.", hint=f"This machine has {there}.")
    raise UsageError(
        f"--device {name}: no {kind} device is at hand.",
        why=f"torch {torch.__version__} finds none: there is none, its driver is missing, or torch is built without.",
        hint="Leave out --device for the best that there is, or say --device cpu.",
    )


def _count(kind: str) -> int:
    """How many devices of a kind torch can use."""
    import torch

    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return int(module.device_count()) if module.is_available() else 0
