"""TODO

Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", section 4,
equation 4: channel j of the activations is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and column j of the
weights multiplied with it. The norm that gives the activations takes the division, so it may feed nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from compressknow.base.errors import UnsupportedError
from compressknow.compress.calibrate.gathering import OPERANDS
from compressknow.compress.calibrate.statistics import InputStatistics
from compressknow.compress.calibrate.walk import tensors_in
from compressknow.compress.plan import Plan, PlannedTensor

if TYPE_CHECKING:
    pass


SMALLEST = 1e-5


@dataclass(frozen=True)
class Norm:
    """A norm whose outputs are read by some Linear weights and by nothing else.

    Attributes
    ----------
    module : its name in the model.
    readers : the parameters that multiply with its outputs.
    offset : what it adds to its weight before it multiplies with it (1 in Gemma's, else 0).
    """

    module: str
    readers: tuple[str, ...]
    offset: float


def norms_before(
    block: str, module: nn.Module, weights: Mapping[str, torch.Tensor], run: Callable[[], Any]
) -> Iterator[Norm]:
    """The norms in a block that can take the division for Linear weights that read them.

    Parameters
    ----------
    block : its name in the model; `module` is that block, with its weights.
    weights : those that may be smoothed, by name.
    run : runs the block on some text, and gives its output.
    """
    with _Outputs(module) as outputs, _Readers(weights, outputs) as readers:
        given = tensors_in(run())
    leaving = {tensor.untyped_storage().data_ptr() for tensor in given}
    for name, norm in outputs.norms.items():
        read = readers.of(name)
        if read and not outputs.places[name] & (leaving | readers.elsewhere):
            offset = _offset(norm, outputs.inputs[name])
            if offset is not None:
                yield Norm(f"{block}.{name}" if name else block, tuple(read), offset)


class _Outputs:
    """Notes what the norms of a block are given, and where their outputs lie, while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = {name: child for name, child in module.named_modules() if _is_norm(child)}
        self.inputs: dict[str, torch.Tensor] = {}
        # The tensors are kept, so that no other comes to lie in the same place.
        self._kept: list[torch.Tensor] = []
        self.places: dict[str, set[int]] = {name: set() for name in self.norms}
        self._stack = ExitStack()

    def __enter__(self) -> _Outputs:
        for name, norm in self.norms.items():
            self._stack.callback(norm.register_forward_hook(self._noting(name)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _noting(self, name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(output, torch.Tensor):
                self.inputs[name] = args[0]
                self._kept.append(output)
                self.places[name].add(output.untyped_storage().data_ptr())

        return note


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.dim() == 1 and type(module).__name__.endswith("Norm")


class _Readers(TorchFunctionMode):
    """Notes what computes with the outputs of norms: Linear weights by name, and `elsewhere` the outputs that anything
    else reads."""

    def __init__(self, weights: Mapping[str, torch.Tensor], outputs: _Outputs) -> None:
        super().__init__()
        self._names = {tensor.untyped_storage().data_ptr(): name for name, tensor in weights.items()}
        self._outputs = outputs
        self._read: dict[int, list[str]] = {}
        self.elsewhere: set[int] = set()

    def of(self, norm: str) -> list[str]:
        """The weights that read a norm's outputs, each once."""
        found = [name for place in self._outputs.places[norm] for name in self._read.get(place, ())]
        return list(dict.fromkeys(found))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in([*args, *(kwargs or {}).values()])}
        outputs = {place for places in self._outputs.places.values() for place in places}
        result = func(*args, **kwargs or {})
        for place in given & outputs:
            # A view is no use yet: what reads it will be seen.
            made = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(result)}
            if made and place not in made:
                self._note(func, args, place)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], place: int) -> None:
        places = OPERANDS.get(func)
        weight = args[places[1]] if places and len(args) > places[1] else None
        name = None if weight is None else self._names.get(weight.untyped_storage().data_ptr())
        if name is None:
            self.elsewhere.add(place)
        else:
            self._read.setdefault(place, []).append(name)


def _offset(norm: nn.Module, inputs: torch.Tensor) -> float | None:
    """What a norm adds to its weight, tried out: so divided, its output is; None where it is neither 0 nor 1."""
    with torch.no_grad():
        before = norm(inputs)
        factors = torch.linspace(0.5, 2, before.shape[-1])
        for offset in (0.0, 1.0):
            with divided(norm, factors, offset):
                after = norm(inputs)
            if torch.allclose(after * factors, before, rtol=1e-3, atol=1e-5):
                return offset
    return None


@contextmanager
def divided(norm: nn.Module, factors: torch.Tensor, offset: float) -> Iterator[None]:
    """Meanwhile a norm's outputs are divided by `factors` [channels]."""
    kept = {name: parameter.data for name, parameter in norm.named_parameters(recurse=False)}
    try:
        for name, parameter in norm.named_parameters(recurse=False):
            own = offset if name == "weight" else 0.0
            parameter.data = (parameter.data + own) / factors - own
        yield
    finally:
        for name, parameter in norm.named_parameters(recurse=False):
            parameter.data = kept[name]


def factors_of(statistics: InputStatistics, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """s [channels], float32, by equation 4; 1 where a channel is always zero.

    Parameters
    ----------
    weights : all that read these inputs, float32 [out, channels].
    """
    assert statistics.peaks is not None
    peaks = statistics.peaks
    largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    factors = peaks.clamp(min=SMALLEST) ** alpha / largest.clamp(min=SMALLEST) ** (1 - alpha)
    return torch.where((peaks > 0) & (largest > 0), factors.clamp(min=SMALLEST), 1.0)


def stored_division(weight: torch.Tensor, factors: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weight divided, in its own dtype, and the factors that this comes to after its rounding: what the
    weights behind it are multiplied with, so that nothing is lost in between."""
    original = weight.to(torch.float32) + offset
    divided = (original / factors - offset).to(weight.dtype)
    written = divided.to(torch.float32) + offset
    usable = (written != 0) & (original != 0)
    return torch.where(usable, divided, weight), torch.where(usable, original / written, 1.0)


def smoothed(statistics: InputStatistics, factors: torch.Tensor) -> InputStatistics:
    """What would have been seen of inputs that are divided by `factors`."""
    products = statistics.products
    return replace(
        statistics,
        squares=statistics.squares / factors.square(),
        peaks=None if statistics.peaks is None else statistics.peaks / factors,
        products=None if products is None else products / factors[:, None] / factors[None, :],
    )


SHARING = "Its blocks share their weights, and each use wants other factors."
TOGETHER = "Its blocks cannot be run one by one."


def to_smooth(plan: Plan, tensors: Iterable[PlannedTensor]) -> dict[str, float]:
    """Alpha by parameter."""
    steps = {tensor.parameter: plan.quantize_step(tensor) for tensor in tensors}
    return {name: step.smooth for name, step in steps.items() if step and step.smooth}


def nothing_to_smooth(module: str) -> UnsupportedError:
    """The error for a block without a norm that can take it."""
    return UnsupportedError(
        f"Nothing in {module} can be smoothed.",
        why="Only a norm that feeds quantized layers and nothing else can take what leaves its outputs.",
        hint="Leave --smooth out, or widen --scope to all layers that read a norm.",
    )


def refuse_smoothing(plan: Plan, why: str) -> None:
    """Raise UnsupportedError where the recipe smooths."""
    if plan.recipe.smooths:
        raise UnsupportedError(
            f"{plan.structure.architecture} cannot be smoothed.", why=why, hint="Leave --smooth out."
        )
