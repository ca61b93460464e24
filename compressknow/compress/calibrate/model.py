"""A model that computes, and holds only the weights that it needs at the moment."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressknow.base.progress import quiet
from compressknow.compress.sources import Sources
from compressknow.model.groups import block_names
from compressknow.model.tensors import OpenFiles, StoredTensor, byte_view, torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StreamedModel:
    """A checkpoint's model in float32, in evaluation mode, whose blocks hold no weights but while they are `loaded`.

    Outside the blocks, embeddings and heads, which are large, are read when they run; the rest is there from the start.

    Attributes
    ----------
    model : the module tree; it is this object's own.
    blocks : names of the transformer blocks in it, in tree order.
    """

    def __init__(self, tree: PreTrainedModel, sources: Sources, files: OpenFiles, *, whole: bool = False) -> None:
        self._sources, self._files = sources, files
        # What was written in place of stored tensors, and of parameters.
        self._replaced: dict[str, torch.Tensor] = {}
        self.model = _skeleton(tree)
        self._owners = _owners(self.model)
        self.blocks = tuple(block_names(self.model))
        self._reading = threading.Lock()
        self._held: set[str] = set()
        late = {} if whole else self._by_vocabulary()
        for name in late:
            self.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: self._hold(name))
        at_once = tuple(self._owners) if whole else self.parameters_outside()
        self._fill(tuple(name for name in at_once if name not in {each for names in late.values() for each in names}))

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Names of the parameters and stored buffers in a module."""
        return tuple(name for name in self._owners if name.startswith(f"{module}."))

    def parameters_outside(self) -> tuple[str, ...]:
        """Those in no block."""
        starts = tuple(f"{block}." for block in self.blocks)
        return tuple(name for name in self._owners if not name.startswith(starts))

    @contextmanager
    def loaded(self, module: str) -> Iterator[None]:
        """The weights of a block, or of a layer outside all, are in memory meanwhile; what was replaced of them, as it
        is now.
        """
        names = self.parameters_of(module)
        self._fill(names)
        try:
            yield
        finally:
            self._drop(names)

    def _by_vocabulary(self) -> dict[str, tuple[str, ...]]:
        """Embeddings and heads: modules that have a row a token, outside all blocks, and their parameters."""
        rows = getattr(self.model.get_input_embeddings(), "weight", torch.empty(0)).shape[0]
        outside = set(self.parameters_outside())
        found = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            own = self.parameters_of(name)
            large = isinstance(module, (nn.Embedding, nn.Linear)) and module.weight.shape[0] == rows
            if large and outside.issuperset(own) and all(map(self._sources.is_supplied, own)):
                found[name] = own
        return found

    def _hold(self, module: str) -> None:
        """Weights that a pass has come to; passes run in several threads."""
        with self._reading:
            names = self.parameters_of(module)
            if any(self._get(name).is_meta for name in names):
                self._fill(names)
            self._held.update(names)

    def let_go(self) -> None:
        """Free what passes have come to outside the blocks; all of them stand still."""
        self._drop(self._held)
        self._held.clear()

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._set(name, torch.empty(self._get(name).shape, device="meta"))

    def run(self, batch: Mapping[str, torch.Tensor]) -> None:
        """The whole model on a batch, for what is seen of it; it must hold all its weights."""
        takes = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        with torch.no_grad():
            self.model(**batch, **takes)

    def replace(self, parameter: str, stored: StoredTensor, values: torch.Tensor) -> None:
        """From now on a stored tensor holds these values (float32, of its shape): in its parameter too."""
        self._replaced[stored.name] = values
        self._set(parameter, self._sources.values(parameter, self._read).reshape(self._get(parameter).shape))

    def forget(self, tensors: Iterable[StoredTensor]) -> None:
        """Free what stored tensors were replaced by; they are not read again."""
        for stored in tensors:
            self._replaced.pop(stored.name, None)

    def _fill(self, names: tuple[str, ...]) -> None:
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
        """Values that no file holds: the model computes them (sinusoidal positions), as it does when it is loaded."""
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
        found: torch.Tensor = getattr(owner, leaf)
        return found

    def _set(self, name: str, values: torch.Tensor) -> None:
        owner, leaf = self._owners[name]
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        else:
            owner._buffers[leaf] = values


def read_tensor(files: OpenFiles, stored: StoredTensor) -> torch.Tensor:
    """A stored tensor's values, in its own dtype and shape."""
    values = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
    if stored.nbytes:
        files.read_into(stored, byte_view(values), 0)
    return values


def _skeleton(tree: PreTrainedModel) -> PreTrainedModel:
    """The model of a module tree again, with parameters that have no memory and buffers that do."""
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


def _owners(model: PreTrainedModel) -> Mapping[str, tuple[nn.Module, str]]:
    """Which module holds a parameter or stored buffer, and under which attribute, by name; each under all its names."""
    names = list(model.state_dict())
    names += [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in set(names)]
    found = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        found[name] = (model.get_submodule(parent), leaf)
    return found
