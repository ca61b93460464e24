"""How many facts a second llama.cpp answers from GGUF files, beside transformers in float32, in one run.

    python benchmarks/runtimes.py [--model DIR] [--facts 64] [--rounds 3] [--threads N] [--types f16,q8_0,q4_k_m,q4_0]

The model is a causal one (examples/smollm2.py makes one); its files are made by `export`. Every measurement is a
process of its own. Its clock starts after the model is loaded and has answered once, and stops at the last answer.
Rounds alternate, so that a machine whose speed drifts does so for all; ratios are of medians. All are asked the same
facts of atlas. Beside the speed stand the processor's seconds, which suffer less from other programs.
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
# The ratio of facts a second that these types are held to.
BOUND, HELD = 1.0, ("q8_0", "q4_k_m", "q4_0")


def measured(model: str, facts: int, threads: int) -> dict[str, float]:
    """Facts a second, and seconds of all processors a fact."""
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
    start, began = time.perf_counter(), time.process_time()
    answers = [answer for batch in evaluate(prompts) for answer in batch]
    seconds, worked = time.perf_counter() - start, time.process_time() - began
    right = sum(answer.correct for answer in answers)
    return {"facts_per_second": len(answers) / seconds, "cpu_seconds": worked / len(answers), "right": right}


def child(model: Path, options: Namespace) -> dict[str, float]:
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
        print(f"There is no {options.model}: examples/smollm2.py makes it. Nothing was measured.")
        return 0
    import compressknow

    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {FLOAT32: options.model}
        for kind in options.types.split(","):
            models[kind] = Path(folder) / f"{kind}.gguf"
            compressknow.export(options.model, models[kind], type=kind)
        for _ in range(options.rounds):
            for name, model in models.items():
                found.setdefault(name, []).append(child(model, options))
    return told(found)


def told(found: dict[str, list[dict[str, float]]]) -> int:
    """Print the table; 1 where a type is slower than it may be."""
    medians = {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    first, slow = medians[FLOAT32], []
    print(f"{'':<10}{'facts/s':>10}{'ratio':>8}{'CPU s/fact':>12}{'ratio':>8}{'right':>7}")
    for name, own in medians.items():
        ratio, less = own["facts_per_second"] / first["facts_per_second"], first["cpu_seconds"] / own["cpu_seconds"]
        print(
            f"{name:<10}{own['facts_per_second']:>10.1f}{ratio:>8.2f}{own['cpu_seconds']:>12.3f}{less:>8.2f}"
            f"{own['right']:>7.0f}"
        )
        if name in HELD and ratio < BOUND:
            slow.append(name)
    if slow:
        print(f"Slower than transformers in float32: {', '.join(slow)}.")
    return 1 if slow else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measured(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
    else:
        sys.exit(main())
