"""Measure the time and memory of a calibrated `convert`: relative to a floor, and with `--peers` to llm-compressor.

    python benchmarks/calibrate.py [--folder DIR] [--rounds 2] [--blocks 24] [--tokens 32768] [--skip floor,growth]
    python benchmarks/calibrate.py --peers MODEL

Each measurement runs in its own process. Its clock starts after torch and transformers are imported, and its memory is
the peak above what the process used at that moment. Each round measures everything once, so that all are affected alike
if the machine's speed drifts. Ratios are of medians: of seconds, and of CPU time, which other programs disturb less.

The models are Llamas with random weights, the text is the topics of Python's own help, and each byte is a token. The
floor is two forward passes of the model's blocks in float32 over the same tokens, and the product X^T X of each
different input of the block's layers (queries, keys and values share one, as do gate and up), with as many threads; the
model is loaded before its clock starts. Growth compares a narrow model with one of four times as many blocks.

`--peers` compresses a causal model (examples/smollm2.py makes one) with both tools in the same way, on the same tokens.
Time includes reading the checkpoint and writing the output. llm-compressor needs its own version of transformers, so it
is installed into an environment in `--folder`. The same code computes the perplexity of both outputs on this project's
manual.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert import SMALL, make_model, read_resident_mb, write_verdict

TIME_BOUND, MEMORY_BOUND_MB, GROWTH_BOUND = 2.0, 2500, 1.1
# Bounds of llm-compressor's time relative to ours, our memory relative to theirs, and our perplexity above theirs in %.
PEER_TIME_BOUND, PEER_MEMORY_BOUND, PEER_PERPLEXITY_BOUND = 1.5, 0.5, 0.5
NARROW = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
PEER = "llmcompressor==0.14.0.1"
# SmolLM2's 576 channels are not a multiple of 128.
PEER_GROUP = 64
SEQUENCE, BATCH = 512, 4
# Number of sequences for perplexity.
HELD_OUT = 64
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """Task of one process: `kind` of `KINDS` on the model `source`, calibrated on `text`; `rows` is a JSON file of the
    same tokens, one list per sequence."""

    kind: str
    source: Path
    output: Path
    text: Path
    rows: Path
    tokens: int


def make_conversion(**options: Any) -> Callable[[Job], None]:
    def run(job: Job) -> None:
        import compressknow

        compressknow.convert(
            job.source, job.output, calibration=str(job.text), calibration_tokens=job.tokens, **options
        )

    return run


def prepare_floor(job: Job) -> Callable[[], None]:
    """Load the model, and return the computation to time."""
    import torch
    from transformers import AutoModel

    from compressknow.compress.blocks import Pool

    model = AutoModel.from_pretrained(job.source, dtype=torch.float32).eval()
    batches = torch.tensor(json.loads(job.rows.read_text())).split(BATCH)
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    inputs = {width: torch.randn(BATCH * SEQUENCE, width) for width in (hidden, inner)}
    # In each block, the inputs of the queries, the attention's output, the gate and down.
    widths = [hidden, hidden, hidden, inner] * model.config.num_hidden_layers

    def forward(batch: torch.Tensor) -> None:
        with torch.no_grad():
            model(batch, use_cache=False)

    def multiply(width: int) -> None:
        products = torch.zeros(width, width)
        for batch in batches:
            rows = inputs[width][: batch.numel()]
            products.addmm_(rows.T, rows)

    def run() -> None:
        # One batch per thread and core, because torch's own threads wait for each other.
        with Pool() as pool:
            pool.map(forward, [*batches, *batches])
            pool.map(multiply, widths)

    return run


def make_oneshot(make_modifier: Callable[[], Any], *, packed: bool) -> Callable[[Job], None]:
    def run(job: Job) -> None:
        from datasets import Dataset
        from llmcompressor import oneshot
        from transformers import AutoModelForCausalLM

        rows = json.loads(job.rows.read_text())
        masks = [[1] * len(row) for row in rows]
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": masks})
        model = AutoModelForCausalLM.from_pretrained(job.source)
        oneshot(
            model=model,
            dataset=data,
            recipe=make_modifier(),
            max_seq_length=SEQUENCE,
            num_calibration_samples=len(rows),
            batch_size=BATCH,
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(job.output, save_compressed=packed)

    return run


def make_gptq_modifier() -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=4, group_size=PEER_GROUP, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def make_sparsegpt_modifier() -> Any:
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    return SparseGPTModifier(targets=["Linear"], ignore=["lm_head"], sparsity=0.5, mask_structure="0:0")


ALL_INT4, FLOOR = "gptq int4", "floor"
GPTQ, SPARSEGPT = f"gptq int4, groups of {PEER_GROUP}", "sparsegpt 50 %"
LLM_COMPRESSOR = "llm-compressor "
KINDS: dict[str, Callable[[Job], None]] = {
    ALL_INT4: make_conversion(quantize="int4", rounding="gptq"),
    GPTQ: make_conversion(quantize="int4", rounding="gptq", group_size=PEER_GROUP),
    SPARSEGPT: make_conversion(prune=0.5, prune_method="sparsegpt"),
    LLM_COMPRESSOR + GPTQ: make_oneshot(make_gptq_modifier, packed=True),
    LLM_COMPRESSOR + SPARSEGPT: make_oneshot(make_sparsegpt_modifier, packed=False),
}


def run_child(job: Job) -> None:
    """Run the job, and print its seconds, CPU seconds and peak memory."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if job.kind.startswith(LLM_COMPRESSOR):
        import llmcompressor.modifiers.gptq
        import llmcompressor.modifiers.pruning  # noqa: F401
    run = prepare_floor(job) if job.kind == FLOOR else lambda: KINDS[job.kind](job)
    before = read_resident_mb("VmRSS")
    start, used = time.perf_counter(), time.process_time()
    run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mb": read_resident_mb("VmHWM") - before}))


def measure(job: Job, python: str = sys.executable) -> dict[str, float]:
    shutil.rmtree(job.output, ignore_errors=True)
    os.sync()
    arguments = [job.kind, job.source, job.output, job.text, job.rows, job.tokens]
    command = [python, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ON_CPU})
    if done.returncode:
        sys.exit(f"{job.kind} failed:\n{done.stderr}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_alternately(jobs: dict[str, tuple[Job, str]], rounds: int) -> dict[str, dict[str, float]]:
    """Run each job with its Python once per round; print and return median times and peak memory by kind."""
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in jobs}
    for _ in range(rounds):
        for kind, (job, python) in jobs.items():
            runs[kind].append(measure(job, python))
    medians = {}
    for kind, results in runs.items():
        seconds = [run["seconds"] for run in results]
        median = {key: statistics.median(run[key] for run in results) for key in ("seconds", "cpu")}
        medians[kind] = median | {"peak_mb": max(run["peak_mb"] for run in results)}
        times = f"{median['seconds']:>9.1f} s ({min(seconds):.1f}-{max(seconds):.1f})"
        print(f"{kind:<42}{times}{median['cpu']:>9.1f} s of CPU time{medians[kind]['peak_mb']:>8.0f} MB", flush=True)
    return medians


def compute_ratios(slower: dict[str, float], faster: dict[str, float]) -> tuple[float, float]:
    return slower["seconds"] / faster["seconds"], slower["cpu"] / faster["cpu"]


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def make_job(source: Path, folder: Path, tokens: int) -> Job:
    """Write the text, and the sequences that this project cuts it into; return the job of quantizing all to int4."""
    from pydoc_data.topics import topics

    from compressknow.compress.calibrate.text import read_calibration_text
    from compressknow.compress.steps import Calibration
    from compressknow.model.loading import open_complete

    text, rows = folder / "calibration.txt", folder / f"rows-{source.name}-{tokens}.json"
    text.write_text("\n".join(topics.values()), encoding="utf-8")
    calibration = read_calibration_text(source, open_complete(source)[1], Calibration(str(text), tokens))
    rows.write_text(json.dumps([row for batch in calibration.batches for row in batch["input_ids"].tolist()]))
    return Job(ALL_INT4, source, folder / "output", text, rows, tokens)


def make_llama(folder: Path, name: str, sizes: dict[str, int], blocks: int) -> Path:
    source = make_model(folder / name, {**sizes, "num_hidden_layers": blocks}, "bf16")
    write_tokenizer(source)
    return source


def report_floor(folder: Path, options: Namespace) -> None:
    job = make_job(make_llama(folder, f"llama-{options.blocks}", SMALL, options.blocks), folder, options.tokens)
    print(f"\n{options.blocks} blocks of the 0.4B Llama, {options.tokens:,} tokens, gptq int4 of everything")
    jobs = {kind: (replace(job, kind=kind), sys.executable) for kind in (FLOOR, ALL_INT4)}
    medians = measure_alternately(jobs, options.rounds)
    seconds, cpu = compute_ratios(medians[ALL_INT4], medians[FLOOR])
    print(f"{'time relative to the floor':<42}{seconds:>9.2f}x, {cpu:.2f}x of CPU time", end="")
    print(f" (bound {TIME_BOUND}x: {write_verdict(seconds <= TIME_BOUND)})")
    peak = medians[ALL_INT4]["peak_mb"]
    print(f"{'peak memory':<42}{peak:>9.0f} MB (bound {MEMORY_BOUND_MB} MB: {write_verdict(peak <= MEMORY_BOUND_MB)})")


def report_growth(folder: Path, options: Namespace) -> None:
    tokens = min(options.tokens, 4096)
    print(f"\nnarrow Llama, {tokens:,} tokens, gptq int4 of everything")
    peaks = []
    for blocks in (options.blocks, 4 * options.blocks):
        job = make_job(make_llama(folder, f"narrow-{blocks}", NARROW, blocks), folder, tokens)
        peaks.append(measure(job)["peak_mb"])
    growth = peaks[1] / peaks[0]
    print(f"{'peak memory, four times as many blocks':<42}{peaks[0]:>9.0f} MB -> {peaks[1]:.0f} MB", end="")
    print(f", {growth:.2f}x (bound {GROWTH_BOUND}x: {write_verdict(growth <= GROWTH_BOUND)})", flush=True)


def make_environment(folder: Path) -> str:
    """Install llm-compressor into an environment in this folder, unless it is there; return its Python."""
    environment = folder / "llm-compressor"
    python, done = environment / "bin" / "python", environment / ".complete"
    if not done.exists():
        print(f"installing {PEER}", flush=True)
        venv.create(environment, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True)
        done.touch()
    return str(python)


def report_peers(folder: Path, options: Namespace) -> None:
    pythons = {"": sys.executable, LLM_COMPRESSOR: make_environment(folder)}
    job = make_job(options.peers, folder, options.tokens)
    for method in (GPTQ, SPARSEGPT):
        print(f"\n{options.peers.name}, {job.tokens:,} tokens: {method} of all blocks")
        jobs = {
            tool + method: (replace(job, kind=tool + method, output=folder / f"output {tool}{method}"), python)
            for tool, python in pythons.items()
        }
        ours, theirs = measure_alternately(jobs, options.rounds).values()
        report_pair(ours, theirs, [compute_perplexity(each.output, job.source) for each, _ in jobs.values()])


def report_pair(ours: dict[str, float], theirs: dict[str, float], perplexities: list[float]) -> None:
    seconds, cpu = compute_ratios(theirs, ours)
    verdict = write_verdict(seconds >= PEER_TIME_BOUND)
    print(f"{'speed':<42}{seconds:>9.2f}x, {cpu:.2f}x in CPU time (bound {PEER_TIME_BOUND}x: {verdict})")
    memory = ours["peak_mb"] / theirs["peak_mb"]
    print(f"{'memory':<42}{memory:>9.2f}x (bound {PEER_MEMORY_BOUND}x: {write_verdict(memory <= PEER_MEMORY_BOUND)})")
    worse = 100 * (perplexities[0] / perplexities[1] - 1)
    print(f"{'perplexity':<42}{perplexities[0]:>9.3f}, llm-compressor's {perplexities[1]:.3f}: {worse:+.2f} %", end="")
    print(f" (bound +{PEER_PERPLEXITY_BOUND} %: {write_verdict(worse <= PEER_PERPLEXITY_BOUND)})")


def compute_perplexity(model: Path, tokenizer: Path) -> float:
    """Compute a model's perplexity on the manual, in plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compressknow.base.progress import silence_libraries

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    ids = AutoTokenizer.from_pretrained(tokenizer)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: min(HELD_OUT, len(ids) // SEQUENCE) * SEQUENCE].view(-1, SEQUENCE)
    with silence_libraries():
        causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(causal(batch, labels=batch).loss) * len(batch) for batch in rows.split(BATCH)]
    return math.exp(sum(losses) / len(rows))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, source, output, text, rows, tokens = sys.argv[2:]
        run_child(Job(kind, Path(source), Path(output), Path(text), Path(rows), int(tokens)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where to keep models and the environment  [default: a temporary folder]"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=24, help="blocks of the model; fewer are faster")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of the text; fewer are faster")
    parser.add_argument("--peers", type=Path, metavar="MODEL", help="compare with llm-compressor on this checkpoint")
    parser.add_argument("--skip", default="", help="`floor`, `growth`, or both")
    options = parser.parse_args()
    skipped = set(options.skip.split(","))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "floor" not in skipped:
            report_floor(folder, options)
        if "growth" not in skipped:
            report_growth(folder, options)
        if options.peers:
            report_peers(folder, options)


if __name__ == "__main__":
    main()
