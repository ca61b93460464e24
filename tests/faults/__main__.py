"""The campaigns, whole or one fault of them.

python -m tests.faults [FILES]                      every disturbance, and so many damaged files (20,000)
python -m tests.faults disturb SCENE WAY [N...]     a command disturbed at its changes N, or at each
python -m tests.faults mutants KIND FIRST [LAST]    damaged files of a kind, by seed
"""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tests.faults.disturb import WAYS, changes_of, disturb
from tests.faults.scenes import SCENES, Stage
from tests.faults.targets import TARGETS, Bench
from tests.faults.warm import Warm, warm
from tests.faults.watching import why_not

FILES = 20_000
# So many damaged files are one piece of work.
PIECE = 50


class Workplace:
    """A server of runs, with what the campaigns need beside it."""

    def __init__(self, folder: Path, server: Warm) -> None:
        self.server = server
        self.stage, self.bench = Stage(folder / "stage", server), Bench(folder / "bench", server)


# What is done of a campaign: its name, how many faults were put in, and what was wrong.
Piece = Callable[[Workplace], tuple[str, int, list[str]]]


def disturbed(scene: str, way: str, numbers: Sequence[int], place: Workplace) -> tuple[str, int, list[str]]:
    # As many seeds as there are changes.
    chosen = numbers or range(len(changes_of(place.stage, scene)))
    wrong = [line for number in chosen for line in disturb(place.stage, scene, way, number)]
    return f"{scene}, {way}", len(chosen), wrong


def damaged(kind: str, seeds: range, place: Workplace) -> tuple[str, int, list[str]]:
    return kind, len(seeds), [line for seed in seeds for line in place.bench.run(kind, seed)]


def everything(files: int) -> list[Piece]:
    """The pieces of all campaigns, the damaged files shared out evenly over their kinds."""
    pieces: list[Piece] = []
    if why_not():
        print(f"No command is disturbed: {why_not()}.")
    else:
        pieces += [partial(disturbed, scene, way, ()) for scene in SCENES for way in WAYS]
    each = -(-files // len(TARGETS))
    for first in range(0, each, PIECE):
        pieces += [partial(damaged, kind, range(first, min(first + PIECE, each))) for kind in TARGETS]
    return pieces


def run(pieces: list[Piece], workers: int) -> int:
    """Do the pieces on some workplaces at a time; the number of problems."""
    waiting: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    for piece in pieces:
        waiting.put(piece)
    counts: dict[str, tuple[int, int]] = {}
    start = time.monotonic()

    def work(place: Workplace) -> None:
        while True:
            try:
                name, count, wrong = waiting.get_nowait()(place)
            except queue.Empty:
                return
            before = counts.get(name, (0, 0))
            counts[name] = (before[0] + count, before[1] + len(wrong))
            print(
                "\n".join([*wrong, f"{time.monotonic() - start:7.0f} s  {name}: {len(wrong)} of {count}"]), flush=True
            )

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        # Made one after the other: the training of their tiny models is shared.
        servers = [warm() for _ in range(workers)]
        places = [Workplace(Path(folder, f"{n}"), server.__enter__()) for n, server in enumerate(servers)]
        threads = [threading.Thread(target=work, args=(place,)) for place in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for server in servers:
            server.__exit__(None, None, None)
    for name, (count, wrong) in counts.items():
        print(f"{name:<24}{count:>8,} faults{wrong:>8,} problems")
    runs = sum(place.server.runs for place in places)
    slowest, largest = max(p.server.slowest for p in places), max(p.server.largest for p in places)
    print(
        f"{runs:,} runs in {time.monotonic() - start:.0f} s; the longest took {slowest:.1f} s, "
        f"the largest {largest / 1e6:.0f} MB above the imports."
    )
    return sum(wrong for _, wrong in counts.values())


def main(args: list[str]) -> int:
    match args:
        case ["disturb", scene, way, *numbers]:
            return min(run([partial(disturbed, scene, way, [int(n) for n in numbers])], 1), 1)
        case ["mutants", kind, first, *last]:
            seeds = range(int(first), int(last[0]) if last else int(first) + 1)
            return min(run([partial(damaged, kind, seeds)], 1), 1)
        case [] | [_]:
            return min(run(everything(int(args[0]) if args else FILES), os.cpu_count() or 1), 1)
        case _:
            print(__doc__)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
