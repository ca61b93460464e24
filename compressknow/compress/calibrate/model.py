"""Model with one block in memory, and passes through it that stop before each block.

Each pass runs the model's own code in a thread, so nothing is assumed here about masks, positions, caches or encoders:
any model whose blocks are modules can be run this way, with many batches side by side.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from compressknow.base.errors import CompressknowError, UnsupportedError, is_out_of_memory
from compressknow.base.progress import silence_libraries
from compressknow.compress.blocks import Pool, Reader, check_finite, make_magnitude_keys
from compressknow.compress.sources import Sources
from compressknow.engine.load import find_reason
from compressknow.model.groups import list_block_names
from compressknow.model.meta import find_input_embedding
from compressknow.model.tensors import FLOAT_DTYPES, OpenFiles, StoredTensor, get_torch_dtype, view_bytes

WHOLE_IN_MEMORY = "Its blocks cannot be run one by one, so that the whole model must be in memory, in float32."


class PlaceholderTensor(torch.Tensor):
    """Weight that is not in memory, on the meta device. It raises RuntimeError when it is used with values: torch
    silently multiplies by a meta tensor, and returns what was in memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = (*args, *(kwargs or {}).values())
        if any(isinstance(each, torch.Tensor) and not isinstance(each, cls) and not each.is_meta for each in values):
            raise RuntimeError(f"{func.__name__} needs a weight that is not in memory")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class StreamedModel:
    """Checkpoint's model in float32, in evaluation mode, whose blocks hold weights only while they are loaded (`load`).

    Outside the blocks, embeddings and heads, which are large, are read when they run; other weights stay in memory.
    `model` is the module tree, which belongs to this object; `blocks` are the names of its transformer blocks, in tree
    order, `outside` those of the parameters and stored buffers in no block.
    """

    def __init__(self, tree: PreTrainedModel, sources: Sources, files: OpenFiles, *, whole: bool = False) -> None:
        self._sources, self._files = sources, files
        # Values written in place of stored tensors and parameters.
        self._replaced: dict[str, torch.Tensor] = {}
        self.model = _build_skeleton(tree)
        # The module and attribute that hold each parameter and stored buffer, under all its names.
        names = [*self.model.state_dict(), *dict(self.model.named_parameters(remove_duplicate=False))]
        parts = {name: name.rpartition(".") for name in names}
        self._owners = {name: (self.model.get_submodule(parent), leaf) for name, (parent, _, leaf) in parts.items()}
        self.blocks = list_block_names(self.model)
        prefixes = tuple(f"{block}." for block in self.blocks)
        self.outside = tuple(name for name in self._owners if not name.startswith(prefixes))
        self._reading = threading.Lock()
        self._held: set[str] = set()
        deferred = set() if whole else self._hook_vocabulary()
        # The parameters that stay in memory.
        self._resident = [name for name in (self._owners if whole else self.outside) if name not in deferred]
        self._drop(self._owners.keys() - set(self._resident))
        self._fill(self._resident)

    def find_block(self, module: str) -> str:
        """Return the block that contains a module, or the module itself if none does."""
        return next((block for block in self.blocks if f"{module}.".startswith(f"{block}.")), module)

    @contextmanager
    def load(self, module: str) -> Iterator[None]:
        """Hold the current weights of a block, or of a layer outside the blocks, in memory in this context, under all
        their names."""
        supply, inside = self._sources.supply, set(self._list_parameters(module))
        tied = {supply[name] for name in inside if name in supply}
        names = [name for name in self._owners if name in inside or supply.get(name) in tied]
        names = [name for name in names if name not in self._resident]
        self._fill(names)
        try:
            yield
        finally:
            self._drop(names)

    def _list_parameters(self, module: str) -> list[str]:
        return [name for name in self._owners if name.startswith(f"{module}.")]

    def _hook_vocabulary(self) -> set[str]:
        """Make embeddings and heads, which have a row per token, be read when they run; return their parameters."""
        embeddings = find_input_embedding(self.model)
        rows = getattr(embeddings, "weight", torch.empty(0)).shape[0]
        deferred: set[str] = set()
        for name, module in self.model.named_modules(remove_duplicate=False):
            if not isinstance(module, (nn.Embedding, nn.Linear)) or module.weight.shape[0] != rows:
                continue
            names = self._list_parameters(name)
            if set(self.outside).issuperset(names) and all(map(self._sources.is_supplied, names)):
                # Llama 4 moves token ids to the embedding's device before it calls it.
                for reader in (module, self.model) if module is embeddings else (module,):
                    reader.register_forward_pre_hook(lambda *_, names=names: self._hold(names))
                deferred.update(names)
        return deferred

    def _hold(self, names: list[str]) -> None:
        """Read weights that a pass needs now; passes run in several threads."""
        with self._reading:
            if any(self._get(name).is_meta for name in names):
                self._fill(names)
            self._held.update(names)

    def release(self) -> None:
        """Free the weights that passes have read outside the blocks; call this only while all passes wait."""
        self._drop(self._held)
        self._held.clear()

    def _drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._set(name, torch.empty(self._get(name).shape, device="meta").as_subclass(PlaceholderTensor))

    def run(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Run the whole model, which must hold all its weights, on a batch. Raises UnsupportedError if it fails."""
        try:
            with torch.no_grad():
                self.model(**batch)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, CompressknowError):
                raise
            what = f"{type(self.model).__name__} fails on the calibration text."
            raise UnsupportedError(what, find_reason(error), "It may need an input besides the text.") from error

    def replace(self, replacements: Sequence[tuple[str, StoredTensor, torch.Tensor]]) -> None:
        """Use values (float32, of its shape) instead of each stored tensor from now on, also in its parameter."""
        self._replaced.update((stored.name, values) for _, stored, values in replacements)
        # A stack of experts is built once, not once for each of the tensors that it is stored in.
        for parameter in dict.fromkeys(parameter for parameter, *_ in replacements):
            self._set(parameter, self._sources.values(parameter, self._read).reshape(self._get(parameter).shape))

    def forget(self, tensors: Iterable[StoredTensor]) -> None:
        """Free the replacements of stored tensors that are not read again."""
        for stored in tensors:
            self._replaced.pop(stored.name, None)

    def check_stored(self, pool: Pool) -> None:
        """Raise CheckpointError naming a stored weight that is NaN or infinite, if there is one."""
        reader, bound = Reader(pool, self._files, lambda _: None), self._sources.bound
        for stored in self._sources.distinct():
            # A mask stored with the weights may hold infinities.
            is_weight = stored.name in bound and not self._sources.weights.isdisjoint(bound[stored.name].parameters)
            for block in reader.blocks(stored) if is_weight and stored.dtype in FLOAT_DTYPES else ():
                check_finite(int(make_magnitude_keys(block.values).max(initial=0)), block.values.dtype, stored)

    def _fill(self, names: Sequence[str]) -> None:
        # Tied parameters stay one tensor.
        loaded: dict[str, torch.Tensor] = {}
        missing = [name for name in names if not self._sources.is_supplied(name)]
        for name in names:
            if name in missing:
                continue
            key = self._sources.supply.get(name, name)
            if key not in loaded:
                values = self._sources.values(name, self._read).reshape(self._get(name).shape)
                # Storage of its own, which distinguishes it from other parts of the same tensor.
                loaded[key] = values if values.untyped_storage().nbytes() == values.nbytes else values.clone()
            self._set(name, loaded[key])
        # The model computes values that no file holds (sinusoidal positions), as when transformers loads it.
        for name in missing:
            self._set(name, torch.zeros(self._get(name).shape))
        for module in dict.fromkeys(self._owners[name][0] for name in missing):
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
def explain_missing_memory(name: str, why: Callable[[], str]) -> Iterator[None]:
    """Turn a failure for lack of memory into a CompressknowError that names the module or model, and explains `why`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        hint = "Use fewer --calibration-tokens, a method without calibration, or a machine with more memory."
        raise CompressknowError(f"There is not enough memory to calibrate {name}.", why(), hint) from error


def read_tensor(files: OpenFiles, stored: StoredTensor) -> torch.Tensor:
    """Read a stored tensor's values, in its own dtype and shape."""
    values = torch.empty(stored.shape, dtype=get_torch_dtype(stored.dtype))
    if stored.nbytes:
        files.read_into(stored, view_bytes(values), 0)
    return values


def _build_skeleton(tree: PreTrainedModel) -> PreTrainedModel:
    """Build the model of a module tree again, with parameters on the meta device and buffers in memory."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(tree.config)

    def build(attention: str) -> PreTrainedModel:
        config._attn_implementation = attention
        # Run experts one after the other, so that each multiplies by its own weight.
        config._experts_implementation = "eager"
        with init_empty_weights(include_buffers=False), no_init_weights():
            return type(tree)(config).eval()

    with silence_libraries(), torch.random.fork_rng(devices=[]):
        try:
            model = build("sdpa")
        except (ValueError, ImportError):
            model = build("eager")
    # With a cache, a block that runs again would also read the keys of its first run. Not every model accepts
    # `use_cache` as an argument, or passes it on to the model that it wraps.
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config.use_cache = False
    return model


class Call(NamedTuple):
    """Module that a pass has reached, and the arguments of its call."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockwiseUnsupported(Exception):
    """Failure to run a model block by block, for example because it uses the weights of a block outside of it."""


@contextmanager
def translate_failures() -> Iterator[None]:
    """Raise BlockwiseUnsupported for errors that a model raises if weights are not in memory, except out-of-memory."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise BlockwiseUnsupported(str(error).rstrip(".") or "one of its own checks fails") from error


class _Ended(BaseException):
    """Signal that unwinds a pass that is no longer needed; not an Exception, because models catch these."""


_thread_state = threading.local()


class ForwardPass:
    """Forward pass of one batch, identified by its number, that stops before blocks."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], number: int) -> None:
        self._model, self._inputs, self.number = model, inputs, number
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def advance(self, output: Any = None) -> Any:
        """Continue to the next module to stop before, with the output of the current one, and return its call; None at
        the end. Raises BlockwiseUnsupported if the model fails."""
        if self._thread.is_alive():
            self._answers.put(output)
        else:
            self._thread.start()
        call = self._calls.get()
        if call is None or isinstance(call, BaseException):
            self._thread.join()
        if isinstance(call, BaseException):
            with translate_failures():
                raise call
        return call

    def close(self) -> None:
        if self._thread.is_alive():
            self._answers.put(_Ended)
            self._thread.join()

    def stop_before(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of a module that another thread runs. Called in the pass's own thread."""
        return self.hand_over(Call(module, args, kwargs))

    def hand_over(self, call: Any) -> Any:
        """Hand over a call, and wait for its output. Called in the pass's own thread."""
        self._calls.put(call)
        answer = self._answers.get()
        if answer is _Ended:
            raise _Ended
        return answer

    def compute(self) -> None:
        """Run the model up to its end, stopping before blocks."""
        torch.set_num_threads(1)
        with torch.no_grad():
            self._model(**self._inputs)

    def _run(self) -> None:
        _thread_state.forward_pass = self
        try:
            self.compute()
        except _Ended:
            pass
        except BaseException as error:
            self._calls.put(error)
        else:
            self._calls.put(None)


@contextmanager
def intercept(
    model: PreTrainedModel, names: Iterable[str], passes: Iterable[ForwardPass]
) -> Iterator[Mapping[str, Callable[..., Any]]]:
    """Make passes of a model stop before these modules, and end the passes on exit; yield the modules' original forward
    functions by name."""
    modules = {name: model.get_submodule(name) for name in names}
    forwards = {name: module.forward for name, module in modules.items()}
    for name, module in modules.items():
        module.forward = lambda *args, name=name, **kwargs: _thread_state.forward_pass.stop_before(name, args, kwargs)
    try:
        yield forwards
    finally:
        for each in passes:
            each.close()
        for module in set(modules.values()):
            del module.forward
