"""A search that is killed repeatedly, before a change on disk or at a random moment, and resumed until it ends.

Run as a program: FORM MODEL FACTS FOLDER SEED... It makes FOLDER/undisturbed, and FOLDER/killed-SEED for each seed. It
imports everything that a search needs and forks a process for each attempt, so that attempts start quickly.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir")
KEEP = 0.6
# A search without progress would be killed forever.
MAX_ATTEMPTS = 100
# Forking a process does not copy its threads.
SINGLE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
IMPORTED = (
    *("matplotlib.figure", "pyarrow.parquet", "scipy.stats", "torch", "compressed_tensors"),
    *("transformers.models.llama.modeling_llama", "transformers.masking_utils", "transformers.generation.utils"),
    *("compressknow.compress.convert", "compressknow.pages.card.pages", "compressknow.pages.search"),
    *("compressknow.api.search", "compressknow.evaluate.scoring.families"),
)


def search(form: str, model: Path, facts: Path, folder: Path) -> None:
    import compressknow

    text = str(facts.with_suffix(".txt"))
    options: dict[str, Any] = {"probe": [f"facts:{facts}"], "calibration": text, "calibration_tokens": 256}
    compressknow.search(model, folder, keep=KEEP, to=form, **options)


def die_before_change(number: int) -> None:
    """Kill this process before it changes the disk for the `number`-th time."""
    remaining = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal remaining
        creates = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_EXCL
        if event in CHANGES or creates:
            remaining -= 1
            if not remaining:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def fork(run: Callable[[], None], changes: int | None) -> int:
    """Run `run` in a forked process, which dies before a change on disk if `changes` is given; return its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        if changes:
            die_before_change(changes)
        run()
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_until_it_ends(run: Callable[[], None], seconds: float, seed: int) -> int:
    """Return how often `run` was killed before it ended; undisturbed, it takes `seconds`."""
    chance = random.Random(seed)
    for kills in range(MAX_ATTEMPTS):
        by_change = chance.random() < 0.7
        process = fork(run, chance.randint(1, 400) if by_change else None)
        if not by_change:
            time.sleep(chance.uniform(0, 0.8 * seconds))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return kills
    raise AssertionError("it never ended")


def main(form: str, model: str, facts: str, folder: str, *seeds: str) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    import transformers

    from compressknow.gguf import children
    from compressknow.study import sensitivity
    from tests import forks

    assert transformers.AutoModelForCausalLM
    assert transformers.AutoTokenizer
    # The search split has a third of the 64 facts that a small model knows.
    sensitivity.FEWEST = 16
    children.Popen = forks.popen
    run_search = partial(search, form, Path(model), Path(facts))
    start = time.monotonic()
    _, status = os.waitpid(fork(partial(run_search, Path(folder) / "undisturbed"), None), 0)
    assert status == 0
    seconds = time.monotonic() - start
    for seed in seeds:
        print(kill_until_it_ends(partial(run_search, Path(folder) / f"killed-{seed}"), seconds, int(seed)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
