"""Loading without the chatter of the libraries that do it, and with their panics as errors."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from compressknow.errors import is_panic


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no load report, nothing printed, be it by Rust: what matters in it is checked and raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _no_bars(), _silent(1), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


class PanicError(Exception):
    """Rust code has panicked, with the panic's message."""


@contextlib.contextmanager
def no_panics() -> Iterator[None]:
    """A panic of tokenizers, which is no Exception, as PanicError; the pages that Rust prints of it are not seen."""
    try:
        with _silent(2):
            yield
    except BaseException as error:
        if is_panic(error):
            raise PanicError(str(error)) from error
        raise


@contextlib.contextmanager
def _silent(descriptor: int) -> Iterator[None]:
    """What is written to standard output (1) or standard error (2) itself, not by way of Python, goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    try:
        kept = os.dup(descriptor)
    except OSError:
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, descriptor)
    os.close(sink)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Bars of compressed-tensors have no switch of their own, and tqdm has none for a stretch of code."""
    from tqdm import tqdm

    init = tqdm.__init__

    def disabled(bar: tqdm, *args: Any, **kwargs: Any) -> None:
        init(bar, *args, **kwargs | {"disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = init
