"""Forward passes that stop before each block: many batches go through a model side by side, one block after the other.

A model runs whatever code it has between its blocks itself, each pass in a thread of its own: nothing is known here of
masks, positions, caches or encoders. So any model whose blocks are modules can be run with one block in memory.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compressknow.base.errors import lacks_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Call(NamedTuple):
    """Module that a pass has come to, and the arguments that it would be called with."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockwiseUnsupported(Exception):
    """Failure to run a model block by block: it uses the weights of a block outside it, or hands its parts round."""


@contextmanager
def translate_failures() -> Iterator[None]:
    """Raise BlockwiseUnsupported for what a model raises if its weights are not in place; not for missing memory."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
        if lacks_memory(error):
            raise
        raise BlockwiseUnsupported(str(error)) from error


class _Ended(BaseException):
    """Signal that unwinds a pass nobody needs any more; no Exception, for models catch these."""


_here = threading.local()


class ForwardPass:
    """Forward pass of one batch, which stops before blocks."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> None:
        self._model, self._inputs = model, inputs
        self._calls: SimpleQueue[Call | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = self._over = False

    def advance(self, output: Any = None) -> Call | None:
        """Go on to the next module to stop before, and return the call of it; None at the end.

        Parameters
        ----------
        output : of the module before which the pass stands.

        Raises BlockwiseUnsupported if the model fails, and whatever else it raises.
        """
        if self._started:
            self._answers.put(output)
        else:
            self._started = True
            self._thread.start()
        call = self._calls.get()
        if not isinstance(call, Call):
            self._over = True
            self._thread.join()
        if isinstance(call, BaseException):
            with translate_failures():
                raise call
        return call

    def close(self) -> None:
        """End the pass where it stands."""
        if self._started and not self._over:
            self._over = True
            self._answers.put(_Ended)
            self._thread.join()

    def stop_before(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand a call over, and wait for its output; in the pass's own thread."""
        self._calls.put(Call(module, args, kwargs))
        answer = self._answers.get()
        if answer is _Ended:
            raise _Ended
        return answer

    def compute(self) -> None:
        """Run the model, for what happens before its blocks; in the pass's own thread."""
        torch.set_num_threads(1)
        with torch.no_grad():
            self.run_model()

    def run_model(self) -> Any:
        """Return the model's output."""
        takes_cache = "use_cache" in inspect.signature(type(self._model).forward).parameters
        return self._model(**self._inputs, **({"use_cache": False} if takes_cache else {}))

    def _run(self) -> None:
        _here.forward_pass = self
        try:
            self.compute()
        except _Ended:
            pass
        except BaseException as error:
            self._calls.put(error)
        else:
            self._calls.put(None)


@contextmanager
def intercept(model: PreTrainedModel, names: Sequence[str]) -> Iterator[Mapping[str, Callable[..., Any]]]:
    """Make passes of a model stop before these modules meanwhile; give the modules' own forward functions, by name."""
    modules = {name: model.get_submodule(name) for name in names}
    forwards = {name: module.forward for name, module in modules.items()}
    for name, module in modules.items():
        module.forward = _make_stop(name)
    try:
        yield forwards
    finally:
        for module in {id(module): module for module in modules.values()}.values():
            del module.forward


def _make_stop(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _here.forward_pass.stop_before(name, args, kwargs)
