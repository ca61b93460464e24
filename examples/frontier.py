"""Make SmolLM2 small in every way that people deploy, and report what each file keeps against its size and its speed.

GGUF files of llama.cpp's types, plain, with an importance matrix, with types by module, and with a type for each tensor
at the same size; checkpoints in 8 and 4 bits; pruned ones; and one with fewer neurons. Each is a real file, run in the
runtime that reads it: GGUF files in llama.cpp, checkpoints in transformers with compressknow's layers.
All other options go to `compressknow report`.

    python examples/smollm2.py --off-grid build/smollm2-off
    python examples/frontier.py build/smollm2-off build/frontier --limit 300 --time \\
        -o examples/reports/smollm2-frontier.html -o examples/reports/smollm2-frontier.md

A fifth of the facts of atlas choose the types of tensors, and the others evaluate all files. Existing files are reused,
so that a stopped run resumes. Speeds are measured on this machine, so run nothing else meanwhile. It needs
`pip install 'compressknow[gguf]'`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import compressknow
from compressknow.base.errors import CompressknowError
from compressknow.cli import main as cli
from compressknow.evaluate.sources.sets import read_atlas

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
# The source checkpoint (None: the original) and the options of each export.
EXPORTED: dict[str, tuple[str | None, dict[str, Any]]] = {
    **{kind: (None, {"type": kind}) for kind in ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")},
    "q4_k_m-imatrix": (None, {"type": "q4_k_m", **MATRIX}),
    "q3_k_m-imatrix": (None, {"type": "q3_k_m", **MATRIX}),
    "mixed": (None, {"type": "q4_k_m", "type_of": {"attention": "q8_0", "feed-forward": "q5_k"}}),
    "fewer-neurons-q8_0": ("fewer-neurons", {"type": "q8_0"}),
}
# Sizes for files with a type for each tensor: those of these files.
SIZED = ("q4_k_m", "q3_k_m", "q2_k")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path, help="folder for the files and the answers")
    arguments, options = parser.parse_known_args()
    model, work = arguments.model, arguments.work
    checkpoints = {name: work / name for name in CONVERTED}
    for name, recipe in CONVERTED.items():
        make_once(checkpoints[name], compressknow.convert, model, recipe)
    facts = divide_facts(work)
    files = []
    for name, (source, types) in EXPORTED.items():
        files.append(work / f"{name}.gguf")
        make_once(files[-1], compressknow.export, checkpoints[source] if source else model, types)
    for name in SIZED:
        size = (work / f"{name}.gguf").stat().st_size
        files.append(work / f"size-of-{name}.gguf")
        make_once(files[-1], compressknow.export, model, {"size": size, "facts": f"facts:{facts['choose']}", **MATRIX})
    models = [model, *map(str, files), *map(str, checkpoints.values())]
    evaluation = ["-p", f"facts:{facts['judge']}", "--answers", str(work / "answers")]
    return cli(["report", *models, *evaluation, *options])


def divide_facts(folder: Path) -> dict[str, Path]:
    """Write the facts of atlas into two files by a hash of their ids: one in five chooses, the others evaluate."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"choose": [], "judge": []}
    for fact in read_atlas().facts:
        values = {key: value for key, value in asdict(fact).items() if value is not None}
        lines["judge" if hashlib.sha256(fact.id.encode()).digest()[0] % 5 else "choose"].append(json.dumps(values))
    files = {name: folder / f"{name}.jsonl" for name in lines}
    for name, file in files.items():
        file.write_text("\n".join(lines[name]) + "\n", "utf-8")
    return files


def make_once(path: Path, make: Callable[..., Any], source: str | Path, options: dict[str, Any]) -> None:
    if not path.exists():
        print(f"Making {path.name}.", flush=True)
        make(source, path, **options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompressknowError as error:
        sys.exit(f"Error: {error}")
