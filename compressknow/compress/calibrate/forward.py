"""Forward passes that stop before each block: many batches go through a model side by side, one block after the other.

Whatever code a model runs between its blocks, it runs itself, each pass in a thread of its own: nothing is known here
of masks, positions, caches or encoders. So any model whose blocks are modules can be run with one block in memory.
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
    """A module that a pass has come to, and what it would be called with."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class NotApart(Exception):
    """A model cannot be run block by block: it uses the weights of a block outside it, or hands its parts round."""


@contextmanager
def failing_apart() -> Iterator[None]:
    """What a model fails with, when weights are not where it looks for them, as NotApart; missing memory as it is."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
        if lacks_memory(error):
            raise
        raise NotApart(str(error)) from error


class _Ended(BaseException):
    """Unwinds a pass that nobody needs any more; no Exception, for models catch these."""


_here = threading.local()


class ForwardPass:
    """One batch on its way through the model."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> None:
        self._model, self._inputs = model, inputs
        self._calls: SimpleQueue[Call | BaseException | None] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = self._over = False

    def advance(self, output: Any = None) -> Call | None:
        """Go on to the next module to stop before; None at the end.

        Parameters
        ----------
        output : of the module before which the pass stands.

        Raises NotApart where the model fails, and what else it raises.
        """
        if self._started:
            self._answers.put(output)
        else:
            self._started = True
            self._thread.start()
        found = self._calls.get()
        if not isinstance(found, Call):
            self._over = True
            self._thread.join()
        if isinstance(found, BaseException):
            with failing_apart():
                raise found
        return found

    def close(self) -> None:
        """End it where it stands."""
        if self._started and not self._over:
            self._over = True
            self._answers.put(_Ended)
            self._thread.join()

    def stop_before(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the pass's own thread: hand a call over, and wait for its output."""
        self._calls.put(Call(module, args, kwargs))
        answer = self._answers.get()
        if answer is _Ended:
            raise _Ended
        return answer

    def compute(self) -> None:
        """In the pass's own thread: run the model, for what is done before its blocks."""
        torch.set_num_threads(1)
        with torch.no_grad():
            self.run_model()

    def run_model(self) -> Any:
        """The model's output."""
        return self._model(**self._inputs, **_without_cache(self._model))

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


def _without_cache(model: PreTrainedModel) -> dict[str, Any]:
    takes = "use_cache" in inspect.signature(type(model).forward).parameters
    return {"use_cache": False} if takes else {}


@contextmanager
def stopping_before(model: PreTrainedModel, modules: Sequence[str]) -> Iterator[Mapping[str, Callable[..., Any]]]:
    """Passes of a model stop before each of these modules; their own forward functions, by name."""
    found = {name: model.get_submodule(name) for name in modules}
    forwards = {name: module.forward for name, module in found.items()}
    for name, module in found.items():
        module.forward = _stop(name)
    try:
        yield forwards
    finally:
        for module in {id(module): module for module in found.values()}.values():
            del module.forward


def _stop(name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _here.forward_pass.stop_before(name, args, kwargs)

    return forward
