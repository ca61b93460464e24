"""Run all campaigns, or single faults.

python -m tests.faults [FILES]                      every disturbance, and this many damaged files (20,000)
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

from tests.faults.disturb import WAYS, disturb, list_changes
from tests.faults.scenes import SCENES, Stage
from tests.faults.targets import TARGETS, Bench
from tests.faults.warm import RunServer, start_server
from tests.faults.watching import find_obstacle

FILES = 20_000
FILES_PER_TASK = 50


class Worker:
    """Server of runs, and the folders of the campaigns."""

    def __init__(self, folder: Path, server: RunServer) -> None:
        self.server = server
        self.stage, self.bench = Stage(folder / "stage", server), Bench(folder / "bench", server)


# Returns a name, the number of faults, and the problems.
Task = Callable[[Worker], tuple[str, int, list[str]]]


def run_disturbances(scene: str, way: str, numbers: Sequence[int], worker: Worker) -> tuple[str, int, list[str]]:
    # There are as many random moments as changes.
    numbers = numbers or range(len(list_changes(worker.stage, scene)))
    problems = [line for number in numbers for line in disturb(worker.stage, scene, way, number)]
    return f"{scene}, {way}", len(numbers), problems


def run_damaged_files(kind: str, seeds: range, worker: Worker) -> tuple[str, int, list[str]]:
    return kind, len(seeds), [line for seed in seeds for line in worker.bench.run(kind, seed)]


def list_tasks(files: int) -> list[Task]:
    """Return the tasks of all campaigns, with as many damaged files of each kind."""
    tasks: list[Task] = []
    if find_obstacle():
        print(f"No command is disturbed: {find_obstacle()}.")
    else:
        tasks += [partial(run_disturbances, scene, way, ()) for scene in SCENES for way in WAYS]
    each = -(-files // len(TARGETS))
    for first in range(0, each, FILES_PER_TASK):
        seeds = range(first, min(first + FILES_PER_TASK, each))
        tasks += [partial(run_damaged_files, kind, seeds) for kind in TARGETS]
    return tasks


def run(tasks: list[Task], workers: int) -> int:
    """Run the tasks on several workers, and return the number of problems."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    counts: dict[str, tuple[int, int]] = {}
    start = time.monotonic()

    def work(worker: Worker) -> None:
        while True:
            try:
                name, count, problems = waiting.get_nowait()(worker)
            except queue.Empty:
                return
            before = counts.get(name, (0, 0))
            counts[name] = (before[0] + count, before[1] + len(problems))
            summary = f"{time.monotonic() - start:7.0f} s  {name}: {len(problems)} of {count}"
            print("\n".join([*problems, summary]), flush=True)

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        # One after the other, so that they share the training of the tiny models.
        servers = [start_server() for _ in range(workers)]
        pool = [Worker(Path(folder, f"{n}"), server.__enter__()) for n, server in enumerate(servers)]
        threads = [threading.Thread(target=work, args=(worker,)) for worker in pool]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for server in servers:
            server.__exit__(None, None, None)
    for name, (count, problems) in counts.items():
        print(f"{name:<24}{count:>8,} faults{problems:>8,} problems")
    runs = sum(worker.server.runs for worker in pool)
    slowest, largest = max(w.server.slowest for w in pool), max(w.server.largest for w in pool)
    print(
        f"{runs:,} runs in {time.monotonic() - start:.0f} s; the longest took {slowest:.1f} s, "
        f"the largest {largest / 1e6:.0f} MB above the imports."
    )
    return sum(problems for _, problems in counts.values())


def main(args: list[str]) -> int:
    match args:
        case ["disturb", scene, way, *numbers]:
            return min(run([partial(run_disturbances, scene, way, [int(n) for n in numbers])], 1), 1)
        case ["mutants", kind, first, *last]:
            seeds = range(int(first), int(last[0]) if last else int(first) + 1)
            return min(run([partial(run_damaged_files, kind, seeds)], 1), 1)
        case [] | [_]:
            return min(run(list_tasks(int(args[0]) if args else FILES), os.cpu_count() or 1), 1)
        case _:
            print(__doc__)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
