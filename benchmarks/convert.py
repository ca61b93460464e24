"""Measure the time and memory of `convert`, and compare them with plain I/O and with other tools, in one run.

    python benchmarks/convert.py [--folder DIR] [--rounds 5] [--dtypes fp32,bf16] [--skip paper,llmcompressor,large]

Each measurement runs in its own process. Its clock starts after torch and transformers are imported, and its memory is
the peak above what the process used at that moment. Plain I/O reads the input once, then writes and syncs as many bytes
as the output has, in pieces of 1 MiB; `hash` only computes SHA-256 of as many bytes, the minimum for any tool that
hashes them. Each round measures everything once, so that all are affected alike if the machine's speed drifts; ratios
are of medians. The models are Llamas with random weights. The paper's pipeline needs 20 GB of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PIECE = 1 << 20
SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 28, "num_attention_heads": 16}
# Upper bounds of the time of each conversion, relative to plain I/O.
BOUNDS = {"int8": 1.5, "prune40+int8": 2.5}
MEMORY_BOUND_MB = 256


def make_model(folder: Path, sizes: dict[str, int], dtype: str) -> Path:
    """Write a Llama with random weights, unless the folder exists."""
    if folder.exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    config = LlamaConfig(**sizes, vocab_size=32000, dtype=torch_dtype)
    model = LlamaForCausalLM(config).to(torch_dtype)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"writing {folder.name}: {millions:.0f} M parameters", flush=True)
    model.save_pretrained(folder, max_shard_size="100GB")
    return folder


def do_plain_io(source: Path, output: Path, size: int) -> None:
    piece = bytearray(PIECE)
    with (source / "model.safetensors").open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    output.mkdir()
    with (output / "model.safetensors").open("wb", buffering=0) as file:
        for start in range(0, size, PIECE):
            file.write(memoryview(piece)[: min(PIECE, size - start)])
        os.fsync(file.fileno())


def compute_hashes(source: Path, output: Path, size: int) -> None:  # noqa: ARG001
    """Hash as many bytes as the input and the output have, half of them on each of two cores."""
    total = (source / "model.safetensors").stat().st_size + size
    piece = bytes(PIECE)

    def hash_bytes(count: int) -> None:
        digest = hashlib.sha256()
        for _ in range(count // PIECE):
            digest.update(piece)

    with ThreadPoolExecutor() as pool:
        list(pool.map(hash_bytes, [total // 2] * 2))


def make_conversion(**options: Any) -> Callable[[Path, Path, int], None]:
    def run(source: Path, output: Path, size: int) -> None:  # noqa: ARG001
        import compressknow

        compressknow.convert(source, output, **options)

    return run


def run_papers_pipeline(source: Path, output: Path, size: int) -> None:  # noqa: ARG001
    """Do as the paper's authors: prune the loaded model, save it, load it again, and quantize it dynamically."""
    import torch
    from torch.nn.utils import prune
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layers = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.4)
    for layer in layers:
        prune.remove(layer, "weight")
    model.save_pretrained(output)
    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    torch.save(quantized.state_dict(), output / "quantized.pt")


def run_model_free_ptq(source: Path, output: Path, size: int) -> None:  # noqa: ARG001
    from llmcompressor import model_free_ptq

    model_free_ptq(str(source), str(output), scheme="W8A8", ignore=["model.embed_tokens"], device="cpu")


def run_oneshot(source: Path, output: Path, size: int) -> None:  # noqa: ARG001
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    scheme = {"W8A8": ["Linear"]}
    oneshot(model=model, recipe=QuantizationModifier(scheme=scheme))
    model.save_pretrained(output, save_compressed=True)


KINDS: dict[str, Callable[[Path, Path, int], None]] = {
    "plain I/O": do_plain_io,
    "hash": compute_hashes,
    "int8": make_conversion(quantize="int8"),
    "prune40+int8": make_conversion(prune=0.4, quantize="int8"),
    "paper's pipeline": run_papers_pipeline,
    "llm-compressor model_free_ptq": run_model_free_ptq,
    "llm-compressor oneshot": run_oneshot,
}


def run_child(kind: str, source: Path, output: Path, size: int) -> None:
    """Run one kind, and print its seconds and peak memory."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if kind.startswith("llm-compressor"):
        import llmcompressor  # noqa: F401
    before = read_resident_mb("VmRSS")
    start = time.perf_counter()
    KINDS[kind](source, output, size)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": read_resident_mb("VmHWM") - before}))


def read_resident_mb(field: str) -> float:
    """Return the memory of this process now (`VmRSS`) or at its peak (`VmHWM`)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith(field))


def write_verdict(holds: bool) -> str:
    return "met" if holds else "not met"


def measure(kind: str, source: Path, folder: Path, size: int = 0) -> dict[str, float]:
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    command = [sys.executable, __file__, "--child", kind, str(source), str(output), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{kind} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    result["bytes"] = sum(path.stat().st_size for path in output.glob("*.safetensors")) if output.exists() else 0
    shutil.rmtree(output, ignore_errors=True)
    return result


def compare_with_io(source: Path, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    size = int(measure("int8", source, folder)["bytes"])
    kinds = ["plain I/O", "hash", "int8", "prune40+int8"]
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind in kinds:
            results[kind].append(measure(kind, source, folder, size))
    return {
        kind: {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "fastest": min(run["seconds"] for run in runs),
            "slowest": max(run["seconds"] for run in runs),
            "peak_mb": max(run["peak_mb"] for run in runs),
        }
        for kind, runs in results.items()
    }


def report_io(source: Path, medians: dict[str, dict[str, float]]) -> None:
    base = medians["plain I/O"]["seconds"]
    print(f"\n{source.name}: median (fastest-slowest) seconds, peak memory without torch, ratio to plain I/O")
    for kind, run in medians.items():
        spread = f"{run['fastest']:.2f}-{run['slowest']:.2f}"
        bound = f" (bound {BOUNDS[kind]})" if kind in BOUNDS else ""
        ratio = f"{run['seconds'] / base:.2f}x{bound}"
        print(f"{kind:<16}{run['seconds']:>8.2f} s ({spread}){run['peak_mb']:>8.0f} MB  {ratio}", flush=True)


def report_peers(source: Path, folder: Path, medians: dict[str, dict[str, float]], skipped: set[str]) -> None:
    print(f"\n{source.name}: the paper's pipeline, compared with prune40+int8; llm-compressor, compared with int8")
    for kind in list_peers(skipped):
        run, ours = measure(kind, source, folder), medians["prune40+int8" if "paper" in kind else "int8"]
        ratio = f"{run['seconds'] / ours['seconds']:.1f}x the time, {run['peak_mb'] / ours['peak_mb']:.1f}x the memory"
        print(f"{kind:<32}{run['seconds']:>8.2f} s{run['peak_mb']:>8.0f} MB: {ratio}", flush=True)


def list_peers(skipped: set[str]) -> Iterator[str]:
    if "paper" not in skipped:
        yield "paper's pipeline"
    if "llmcompressor" in skipped:
        return
    if importlib.util.find_spec("llmcompressor"):
        yield from ("llm-compressor model_free_ptq", "llm-compressor oneshot")
    else:
        print("llm-compressor: not measured: it is not installed (pip install llmcompressor)")


def report_growth(folder: Path, dtype: str, small: dict[str, dict[str, float]]) -> None:
    large = make_model(folder / f"llama-1.6B-{dtype}", LARGE, dtype)
    print(f"\n{large.name}: peak memory with four times as many parameters (bound {MEMORY_BOUND_MB} MB)")
    for kind in BOUNDS:
        run = measure(kind, large, folder)
        before, after = small[kind]["peak_mb"], run["peak_mb"]
        print(f"{kind:<16}{run['seconds']:>8.2f} s{before:>8.0f} MB -> {after:.0f} MB", flush=True)


def report_help() -> None:
    command = [sys.executable, "-m", "compressknow", "--help"]
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        runs.append(time.perf_counter() - start)
    print(f"\ncompressknow --help: {statistics.median(runs):.2f} s (bound 0.4)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to keep the models (12 GB)  [default: a temporary folder]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--skip", default="")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, source, output, size = options.child
        run_child(kind, Path(source), Path(output), int(size))
        return
    skipped = set(options.skip.split(","))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for dtype in options.dtypes.split(","):
            small = make_model(folder / f"llama-0.4B-{dtype}", SMALL, dtype)
            medians = compare_with_io(small, folder, options.rounds)
            report_io(small, medians)
            if dtype == "fp32":
                report_peers(small, folder, medians, skipped)
            if "large" not in skipped:
                report_growth(folder, dtype, medians)
        report_help()


if __name__ == "__main__":
    main()
