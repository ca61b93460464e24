"""Compare how many facts per second llama.cpp answers from GGUF files and transformers in float32, in one run.

    python benchmarks/runtimes.py [--model DIR] [--facts 64] [--rounds 3] [--threads N] [--types f16,q8_0,q4_k_m,q4_0]

`export` writes the files of a causal model (examples/smollm2.py makes one). Each measurement runs in its own process.
Its clock starts after the model is loaded and has answered once, and stops at the last answer. Each round measures
everything once, so that all are affected alike if the machine's speed drifts; ratios are of medians. All answer the
same facts of atlas. CPU seconds are shown too, because other programs disturb them less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

SMOLLM2 = Path(__file__).resolve().parents[1] / "build" / "smollm2"
FLOAT32 = "float32"
# Lower bound of the speed relative to float32, and the types that it holds for.
BOUND, BOUNDED = 1.0, ("q8_0", "q4_k_m", "q4_0")


def run_child(model: str, facts: int, threads: int) -> None:
    """Answer the facts, and print facts per second, CPU seconds per fact, and the number of right answers."""
    import torch

    from compressknow.engine.identity import locate
    from compressknow.evaluate.evaluate import evaluate
    from compressknow.evaluate.handle import ModelHandle
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.sources import Options, open_all

    torch.set_num_threads(threads)
    (probe,) = open_all(["atlas"], Options(limit=facts))
    handle = ModelHandle(locate(model), Settings(device="cpu"))
    prompts = handle.make_prompts(probe)
    prompts.scorer.answer(prompts.batches[0][:2], None)
    start, used = time.perf_counter(), time.process_time()
    answers = [answer for batch in evaluate(prompts) for answer in batch]
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    right = sum(answer.correct for answer in answers)
    print(json.dumps({"speed": len(answers) / seconds, "cpu": cpu / len(answers), "right": right}))


def measure(model: Path, options: Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(model), str(options.facts), str(options.threads)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", default="f16,q8_0,q4_k_m,q4_0")
    options = parser.parse_args()
    if not options.model.is_dir():
        print(f"not measured: {options.model} is not a folder (examples/smollm2.py makes a model)")
        return 0
    import compressknow

    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {FLOAT32: options.model}
        for kind in options.types.split(","):
            models[kind] = Path(folder) / f"{kind}.gguf"
            compressknow.export(options.model, models[kind], type=kind)
        for _ in range(options.rounds):
            for name, model in models.items():
                runs.setdefault(name, []).append(measure(model, options))
    return report(runs)


def report(runs: dict[str, list[dict[str, float]]]) -> int:
    """Print the table; return 1 if a type is slower than its bound."""
    medians = {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in runs.items()
    }
    base, slow = medians[FLOAT32], []
    print(f"{'':<10}{'facts/s':>10}{'ratio':>8}{'CPU s/fact':>12}{'ratio':>8}{'right':>7}")
    for name, row in medians.items():
        ratio, cpu_ratio = row["speed"] / base["speed"], base["cpu"] / row["cpu"]
        print(f"{name:<10}{row['speed']:>10.1f}{ratio:>8.2f}{row['cpu']:>12.3f}{cpu_ratio:>8.2f}{row['right']:>7.0f}")
        if name in BOUNDED and ratio < BOUND:
            slow.append(name)
    if slow:
        print(f"Slower than transformers in float32: {', '.join(slow)}.")
    return 1 if slow else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.exit(main())
