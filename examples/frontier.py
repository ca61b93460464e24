"""Make SmolLM2 small in every way that people deploy, and report what each file keeps against its size and its speed.

GGUF files of llama.cpp's types, plain, with an importance matrix and with types of their own by module; checkpoints in
8 and 4 bits; pruned ones; and one with fewer neurons. Each is a real file, run in the runtime that reads it: GGUF files
in llama.cpp, checkpoints in transformers with compressknow's layers. All other options go to `compressknow report`.

    python examples/frontier.py build/smollm2 build/frontier -p atlas --limit 300 \\
        -o examples/reports/smollm2-frontier.html -o examples/reports/smollm2-frontier.md

Files that are there are taken as they are, so that a run that was stopped goes on. Speeds are of this machine: leave it
alone meanwhile. It needs `pip install 'compressknow[gguf]'`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compressknow
from compressknow.base.errors import CompressknowError
from compressknow.cli import main as cli

TOKENS = 8192
HALF: dict[str, Any] = {"prune": 0.5, "prune_method": "sparsegpt", "calibration_tokens": TOKENS}
INT4: dict[str, Any] = {"quantize": "int4", "parameters": {"group_size": 64}}
GPTQ: dict[str, Any] = INT4 | {"rounding": "gptq", "calibration_tokens": TOKENS}
CONVERTED: dict[str, dict[str, Any]] = {
    "int8": {"quantize": "int8"},
    "int8-weights": {"quantize": "int8-weights"},
    "int4": INT4,
    "int4-gptq": GPTQ,
    "half": HALF,
    "half-int4": HALF | GPTQ,
    "att-20-int8": {"scope": "attention", "prune": 0.2, "quantize": "int8"},
    "fewer-neurons": {"drop_neurons": 0.1, "calibration_tokens": TOKENS},
}
MATRIX: dict[str, Any] = {"calibration": "self", "calibration_tokens": TOKENS}
# From which checkpoint (the original where none is named), and how.
EXPORTED: dict[str, tuple[str | None, dict[str, Any]]] = {
    **{kind: (None, {"type": kind}) for kind in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")},
    "q4_k_m-imatrix": (None, {"type": "q4_k_m", **MATRIX}),
    "q3_k_m-imatrix": (None, {"type": "q3_k_m", **MATRIX}),
    "mixed": (None, {"type": "q4_k_m", "type_of": {"attention": "q8_0", "feed-forward": "q5_k"}}),
    "fewer-neurons-q8_0": ("fewer-neurons", {"type": "q8_0"}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path, help="folder for the files and the answers")
    given, options = parser.parse_known_args()
    checkpoints = {name: given.work / name for name in CONVERTED}
    for name, recipe in CONVERTED.items():
        made(checkpoints[name], compressknow.convert, given.model, recipe)
    files = []
    for name, (source, chosen) in EXPORTED.items():
        files.append(given.work / f"{name}.gguf")
        made(files[-1], compressknow.export, checkpoints[source] if source else given.model, chosen)
    models = [given.model, *map(str, files), *map(str, checkpoints.values())]
    return cli(["report", *models, "--time", "--answers", str(given.work / "answers"), *options])


def made(path: Path, make: Callable[..., Any], source: str | Path, how: dict[str, Any]) -> None:
    if not path.exists():
        print(f"Making {path.name}.", flush=True)
        make(source, path, **how)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompressknowError as error:
        sys.exit(f"Error: {error}")
