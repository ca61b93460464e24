"""Library of llama.cpp, bound by llama-cpp-py-sync (CFFI over ``llama.h``); what it logs is kept, not printed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from compressknow.base.errors import CompressknowError
from compressknow.base.libraries import OPTIONAL, is_installed, require

MODULE = "llama_cpp_py_sync"
# enum ggml_log_level of ggml.h.
_ERROR, _CONTINUED = 4, 5


class Native(NamedTuple):
    """CFFI's two halves, and llama.cpp's build, such as ``b11739``."""

    ffi: Any
    lib: Any
    build: str


class _Log:
    """Lines that llama.cpp logged as errors."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._open = False

    def add(self, level: int, text: str) -> None:
        if level == _CONTINUED:
            if self._open and self.lines:
                self.lines[-1] += text
            return
        self._open = level == _ERROR
        if self._open:
            self.lines.append(text)


_log = _Log()
# The callback must live as long as the library.
_kept: list[Any] = []


def is_there() -> bool:
    """Return whether the extra is installed, without importing anything."""
    return is_installed(MODULE)


@cache
def load_native() -> Native:
    """Return the library, loaded once. Raises CompressknowError where it is not installed, or does not load here."""
    require(MODULE)
    # Where it ends the process, it would first have a debugger print where it was, if there is one.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    try:
        from llama_cpp_py_sync import _cffi_bindings as bindings
        from llama_cpp_py_sync import _version

        ffi, lib = bindings.ffi, bindings.get_lib()
    except (ImportError, OSError, RuntimeError) as error:
        raise CompressknowError(
            "llama.cpp does not load on this machine.",
            why=(str(error).splitlines() or [type(error).__name__])[0],
            hint=f"Install it anew: pip install --force-reinstall {OPTIONAL[MODULE]}; or pass --runtime transformers.",
        ) from error

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")  # type: ignore[untyped-decorator]
    def logged(level: int, text: Any, _: Any) -> None:
        _log.add(level, ffi.string(text).decode("utf-8", "replace"))

    _kept.append(logged)
    lib.llama_log_set(logged, ffi.NULL)
    lib.llama_backend_init()
    return Native(ffi, lib, str(getattr(_version, "__llama_cpp_tag__", "") or version("llama-cpp-py-sync")))


@cache
def open_ggml(declarations: str) -> tuple[Any, Any]:
    """Open ggml itself, which llama-cpp-py-sync binds no part of; return CFFI's two halves of these C declarations."""
    import llama_cpp_py_sync

    ffi: Any = type(load_native().ffi)()
    ffi.cdef(declarations)
    folder = Path(llama_cpp_py_sync.__file__).parent
    return ffi, ffi.dlopen(str(next(path for path in sorted(folder.iterdir()) if "ggml-base" in path.name)))


def make_interruptible(declaration: str, *, go_on: bool) -> tuple[Any, list[BaseException]]:
    """Return a callback in which llama.cpp asks whether to go on, and the list of what was raised in it: Python, which
    sees to signals there, raises KeyboardInterrupt, and llama.cpp is told to stop. `go_on` is the answer that means
    yes.
    """
    raised: list[BaseException] = []
    callback = load_native().ffi.callback(
        declaration, lambda *_: go_on, error=not go_on, onerror=lambda _, error, __: raised.append(error)
    )
    return callback, raised


@contextmanager
def collect_errors() -> Iterator[list[str]]:
    """Collect what llama.cpp logs as errors meanwhile: the list is filled as it does, one message per entry."""
    before, _log.lines = _log.lines, []
    try:
        yield _log.lines
    finally:
        _log.lines = before
