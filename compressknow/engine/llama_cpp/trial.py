"""Whether llama.cpp can take a GGUF file, tried in a process of its own: what it asserts of a file, and a damaged or
hostile one does not hold, ends the process that it runs in.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import compressknow
from compressknow.errors import CheckpointError

# What llama.cpp prints before it ends: the file and the line of its source, and what did not hold.
_ASSERTED = re.compile(r"GGML_ASSERT\(.*\) failed")
_TOKENS = 8


def refuse_crash(path: Path) -> None:
    """Raise CheckpointError where a process in which llama.cpp loads the file and reads a token of it ends there.

    All else that is wrong with a file is no matter of this: llama.cpp says it where it is loaded.
    """
    status = path.stat()
    code, said = _tried(path.absolute(), status.st_size, status.st_mtime_ns)
    if code == 0:
        return
    found = _ASSERTED.search(said)
    why = f"llama.cpp says: {found[0]}" if found else f"The process that tried it ended with {code}."
    raise CheckpointError(f"{path} makes llama.cpp crash.", why, "Download it again: it is damaged, or not sound.")


@cache
def _tried(path: Path, size: int, changed: int) -> tuple[int, str]:  # noqa: ARG001
    """How such a process ended, and what it printed; `size` and `changed` tell one state of a file from another."""
    packages = [str(Path(compressknow.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}
    ended = subprocess.run(
        [sys.executable, "-m", __name__, path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        check=False,
    )
    return ended.returncode, ended.stdout.decode("utf-8", "replace")


def _try(path: Path) -> None:
    from compressknow.engine.llama_cpp.context import Context, Span
    from compressknow.engine.llama_cpp.model import GgufModel

    context = Context(GgufModel(path, trial=True), cells=_TOKENS, sequences=1, threads=1)
    context.read([Span(0, 0, [0], 1)])


if __name__ == "__main__":
    try:
        _try(Path(sys.argv[1]))
    finally:
        # What Python meets here it meets again where the file is loaded, and is told there.
        os._exit(0)
