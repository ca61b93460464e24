"""Run a Python program that ends with the process that started it: ``watched.py SCRIPT ARGS`` or ``-m MODULE ARGS``.

Whoever starts it holds the other end of its standard input as long as it lives, and however it ends.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _end_with_parent() -> None:
    # Not by sys.stdin, whose lock Python would wait for when it ends.
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    is_module = sys.argv[1] == "-m"
    del sys.argv[: 1 + is_module]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
