"""Loading without the chatter of the libraries that do it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load report on stderr: what matters in them is checked and raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with _no_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


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
