"""How far long work is: pieces added up for whoever is told."""

from __future__ import annotations

from collections.abc import Callable


def counted(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """A function to tell each piece that is done; `progress` is told what is done so far, and the total."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    return report
