"""One search that is killed again and again, before some change on disk or at any moment, and resumed until it ends.

Run as a program: FORM MODEL FACTS FOLDER SEED... It makes FOLDER/undisturbed, and FOLDER/killed-SEED for each seed. It
has imported all that a search needs, and each life is a fork of it, so that a life costs no more than what it computes.
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
# A search that never gets on would be killed forever.
MOST_LIVES = 100
# A process that has threads cannot be forked whole.
ALONE = {
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


def searched(form: str, model: Path, facts: Path, folder: Path) -> None:
    import compressknow

    text = str(facts.with_suffix(".txt"))
    options: dict[str, Any] = {"probe": [f"facts:{facts}"], "calibration": text, "calibration_tokens": 256}
    compressknow.search(model, folder, keep=KEEP, to=form, **options)


def die_before_change(number: int) -> None:
    """Kill this process before it changes the disk for so many a time."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        creates = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_EXCL
        if event in CHANGES or creates:
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def life(run: Callable[[], None], changes: int | None) -> int:
    """The process of one life, which does `run`."""
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


def live_until_the_end(run: Callable[[], None], seconds: float, seed: int) -> int:
    """The number of times that it was killed; undisturbed, it takes so many seconds."""
    chance = random.Random(seed)
    for lives in range(MOST_LIVES):
        by_change = chance.random() < 0.7
        process = life(run, chance.randint(1, 400) if by_change else None)
        if not by_change:
            time.sleep(chance.uniform(0, 0.8 * seconds))
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            return lives
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
    # A third of the facts that a small model knows.
    sensitivity.FEWEST = 16
    children.Popen = forks.popen
    searching = partial(searched, form, Path(model), Path(facts))
    start = time.monotonic()
    _, status = os.waitpid(life(partial(searching, Path(folder) / "undisturbed"), None), 0)
    assert status == 0
    seconds = time.monotonic() - start
    for seed in seeds:
        print(live_until_the_end(partial(searching, Path(folder) / f"killed-{seed}"), seconds, int(seed)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
