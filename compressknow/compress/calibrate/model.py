"""Model that computes, and holds only the weights that it needs at the moment."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressknow.base.errors import CompressknowError, lacks_memory
from compressknow.base.progress import quiet
from compressknow.compress.sources import Sources
from compressknow.model.groups import block_names
from compressknow.model.tensors import OpenFiles, StoredTensor, byte_view, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_IN_MEMORY = "Its blocks cannot be run one by one, so that all of it must be in memory, in float32."


class StreamedModel:
    """Checkpoint's model in float32, in evaluation mode, whose blocks hold weights only while they are loaded (`load`).

    Outside the blocks, embeddings and heads, which are large, are read when they run; the rest is there from the start.

    Attributes
    ----------
    model : the module tree; it belongs to this object.
    blocks : names of the transformer blocks in it, in tree order.
    outside : names of the parameters and stored buffers in no block.
    """

    def __init__(self, tree: PreTrainedModel, sources: Sources, files: OpenFiles, *, whole: bool = False) -> None:
        self._sources, self._files = sources, files
        # What was written in place of stored tensors, and of parameters.
        self._replaced: dict[str, torch.Tensor] = {}
        self.model = _build_skeleton(tree)
        self._owners = _find_owners(self.model)
        self.blocks = tuple(block_names(self.model))
        prefixes = tuple(f"{block}." for block in self.blocks)
        self.outside = tuple(name for name in self._owners if not name.startswith(prefixes))
        self._reading = threading.Lock()
        self._held: set[str] = set()
        late = set() if whole else self._hook_vocabulary()
        self._fill([name for name in (self._owners if whole else self.outside) if name not in late])

    def find_block(self, module: str) -> str:
        """Return the block that holds a module; the module itself if none does."""
        return next((block for block in self.blocks if f"{module}.".startswith(f"{block}.")), module)

    @contextmanager
    def load(self, module: str) -> Iterator[None]:
        """Hold the weights of a block, or of a layer outside the blocks, in memory meanwhile; replaced ones as they are
        now."""
        names = self._list_parameters(module)
        self._fill(names)
        try:
            yield
        finally:
            self._drop(names)

    def _list_parameters(self, module: str) -> list[str]:
        return [name for name in self._owners if name.startswith(f"{module}.")]

    def _hook_vocabulary(self) -> set[str]:
        """Have embeddings and heads outside the blocks, which have a row per token, read when they run; return the
        names of their parameters."""
        rows = getattr(self.model.get_input_embeddings(), "weight", torch.empty(0)).shape[0]
        late: set[str] = set()
        for name, module in self.model.named_modules(remove_duplicate=False):
            names = self._list_parameters(name)
            is_large = isinstance(module, (nn.Embedding, nn.Linear)) and module.weight.shape[0] == rows
            if is_large and set(self.outside).issuperset(names) and all(map(self._sources.is_supplied, names)):
                module.register_forward_pre_hook(lambda *_, names=names: self._hold(names))
                late.update(names)
        return late

    def _hold(self, names: list[str]) -> None:
        """Read weights that a pass has come to; passes run in several threads."""
        with self._reading:
            if any(self._get(name).is_meta for name in names):
                self._fill(names)
            self._held.update(names)

    def release(self) -> None:
        """Free what passes have come to outside the blocks; call it while all of them stand still."""
        self._drop(self._held)
        self._held.clear()

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._set(name, torch.empty(self._get(name).shape, device="meta"))

    def run(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Run the whole model, which must hold all its weights, on a batch, for what is seen of it."""
        takes = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        with torch.no_grad():
            self.model(**batch, **takes)

    def replace(self, parameter: str, stored: StoredTensor, values: torch.Tensor) -> None:
        """Use these values (float32, of its shape) for a stored tensor from now on, in its parameter too."""
        self._replaced[stored.name] = values
        self._set(parameter, self._sources.values(parameter, self._read).reshape(self._get(parameter).shape))

    def forget(self, tensors: Iterable[StoredTensor]) -> None:
        """Free the replacements of stored tensors, which are not read again."""
        for stored in tensors:
            self._replaced.pop(stored.name, None)

    def _fill(self, names: Sequence[str]) -> None:
        # Tied ones stay one tensor.
        made: dict[str, torch.Tensor] = {}
        lacking = []
        for name in names:
            if not self._sources.is_supplied(name):
                lacking.append(name)
                continue
            key = self._sources.supply.get(name, name)
            if key not in made:
                values = self._sources.values(name, self._read).reshape(self._get(name).shape)
                # A memory of its own: by that it is told from others that were cut from the same tensor.
                made[key] = values if values.untyped_storage().nbytes() == values.nbytes else values.clone()
            self._set(name, made[key])
        self._initialise(lacking)

    def _initialise(self, names: list[str]) -> None:
        """Have the model compute values that no file holds (sinusoidal positions), as it does when it is loaded."""
        modules = {id(self._owners[name][0]): self._owners[name][0] for name in names}
        for name in names:
            self._set(name, torch.zeros(self._get(name).shape))
        for module in modules.values():
            self.model._init_weights(module)

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        if stored.name in self._replaced:
            return self._replaced[stored.name]
        values = read_tensor(self._files, stored)
        return values.to(torch.float32) if values.is_floating_point() else values

    def _get(self, name: str) -> torch.Tensor:
        owner, leaf = self._owners[name]
        tensor: torch.Tensor = getattr(owner, leaf)
        return tensor

    def _set(self, name: str, values: torch.Tensor) -> None:
        owner, leaf = self._owners[name]
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        else:
            owner._buffers[leaf] = values


@contextmanager
def explain_missing_memory(what: str, why: Callable[[], str]) -> Iterator[None]:
    """Raise CompressknowError for missing memory, that says what takes so much, and why."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        hint = "Take fewer --calibration-tokens, a method that looks at weights alone, or another machine."
        raise CompressknowError(f"There is no memory to calibrate {what}.", why(), hint) from error


def read_tensor(files: OpenFiles, stored: StoredTensor) -> torch.Tensor:
    """Read a stored tensor's values, in its own dtype and shape."""
    values = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
    if stored.nbytes:
        files.read_into(stored, byte_view(values), 0)
    return values


def _build_skeleton(tree: PreTrainedModel) -> PreTrainedModel:
    """Build the model of a module tree again, with parameters that have no memory and buffers that do."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(tree.config)
    config.use_cache = False
    with quiet(), torch.random.fork_rng(devices=[]):
        for attention in ("sdpa", "eager"):
            config._attn_implementation = attention
            # Experts one after the other: so each multiplies with a weight of its own.
            config._experts_implementation = "eager"
            try:
                with init_empty_weights(include_buffers=False), no_init_weights():
                    return type(tree)(config).eval()
            except (ValueError, ImportError):
                if attention == "eager":
                    raise
    raise AssertionError


def _find_owners(model: PreTrainedModel) -> Mapping[str, tuple[nn.Module, str]]:
    """Return the module and attribute that hold each parameter and stored buffer, under all its names."""
    names = list(model.state_dict())
    names += [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in set(names)]
    places = {name: name.rpartition(".") for name in names}
    return {name: (model.get_submodule(parent), leaf) for name, (parent, _, leaf) in places.items()}
