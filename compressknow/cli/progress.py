"""A progress bar on stderr for work that takes a while; none where stderr is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

# Work that ends sooner shows no bar.
DELAY_SECONDS = 1.0


@contextmanager
def bytes_bar(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """A function to tell the bytes done and the bytes in all, or None where nobody would see the bar."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=label, unit="B", unit_scale=True, delay=DELAY_SECONDS, leave=False, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def facts_bar() -> Iterator[Callable[[str], AbstractContextManager[Callable[[int, int], None]]] | None]:
    """For the name of a probe, a bar of the facts done of it; None where nobody would see one."""
    yield _facts_bar if sys.stderr.isatty() else None


@contextmanager
def _facts_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    from tqdm import tqdm

    with tqdm(desc=label, unit=" facts", delay=DELAY_SECONDS, leave=False, file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
