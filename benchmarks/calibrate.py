"""Time and memory of a calibrated `convert`, beside the least that it must do and beside llm-compressor, in one run.

    python benchmarks/calibrate.py [--folder DIR] [--rounds 2] [--blocks 24] [--tokens 32768] [--skip floor,growth]
    python benchmarks/calibrate.py --peers MODEL

Every measurement is a process of its own. Its clock starts after torch and transformers are imported, and its memory
is the peak above what it held then. Rounds alternate, so that a machine whose speed drifts does so for all. Ratios are
of medians: of seconds, and of seconds of processor time, which others who use the machine disturb less.

The models are Llamas with random weights, the text is the topics of Python's own help, a token a byte. The floor is two
forward passes of the model's blocks in float32 over the same tokens, and the product X^T X of each input that a block
multiplies with (queries, keys and values read one, as gate and up do), on as many threads; the model is loaded before
its clock starts.
Growth is of a narrow model with as many blocks, and with four times as many.

`--peers` compresses a causal model (examples/smollm2.py makes one) by both in the same way, from the same tokens: what
is timed begins with reading the checkpoint and ends with the output on disk. llm-compressor wants a transformers of its
own; it goes into an environment that is made in `--folder`. Perplexity is that of this project's manual, computed from
both outputs by the same code.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import SMALL, make_model, resident_mb

TIME_BOUND, MEMORY_BOUND_MB, GROWTH_BOUND = 2.0, 2500, 1.1
# Of llm-compressor's time to ours, of our memory to theirs, and per cent of perplexity.
PEER_TIME_BOUND, PEER_MEMORY_BOUND, PEER_PERPLEXITY_BOUND = 1.5, 0.5, 0.5
NARROW = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
PEER = "llmcompressor==0.14.0.1"
# SmolLM2's 576 channels are not a multiple of 128.
PEER_GROUP = 64
SEQUENCE, BATCH = 512, 4
HELD_OUT = 64
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Job:
    """What a process of its own does: `kind` of `KINDS` with `source`, calibrated on `text`; `rows` are the same tokens
    as a list a sequence."""

    kind: str
    source: Path
    output: Path
    text: Path
    rows: Path
    tokens: int


def ours(**options: Any) -> Callable[[Job], None]:
    def run(job: Job) -> None:
        import compressknow

        compressknow.convert(
            job.source, job.output, calibration=str(job.text), calibration_tokens=job.tokens, **options
        )

    return run


def prepare_floor(job: Job) -> Callable[[], None]:
    """The model in memory, and what is computed with it."""
    import torch
    from transformers import AutoModel

    from compressknow.compress.blocks import Pool

    model = AutoModel.from_pretrained(job.source, dtype=torch.float32).eval()
    batches = torch.tensor(json.loads(job.rows.read_text())).split(BATCH)
    hidden, inner = model.config.hidden_size, model.config.intermediate_size
    inputs = {width: torch.randn(BATCH * SEQUENCE, width) for width in (hidden, inner)}
    # Before queries, the output of attention, gate, down; of each block.
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
        # A thread for each core and batch: torch's own threads wait for each other.
        with Pool() as pool:
            pool.map(forward, [*batches, *batches])
            pool.map(multiply, widths)

    return run


def theirs(modifier: Callable[[], Any], *, packed: bool) -> Callable[[Job], None]:
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
            recipe=modifier(),
            max_seq_length=SEQUENCE,
            num_calibration_samples=len(rows),
            batch_size=BATCH,
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(job.output, save_compressed=packed)

    return run


def their_gptq() -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=4, group_size=PEER_GROUP, strategy="group", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])


def their_sparsegpt() -> Any:
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    return SparseGPTModifier(targets=["Linear"], ignore=["lm_head"], sparsity=0.5, mask_structure="0:0")


OURS, FLOOR = "gptq int4", "floor"
GPTQ, SPARSEGPT = f"gptq int4, groups of {PEER_GROUP}", "sparsegpt 50 %"
THEIRS = "llm-compressor "
KINDS: dict[str, Callable[[Job], None]] = {
    OURS: ours(quantize="int4", rounding="gptq"),
    GPTQ: ours(quantize="int4", rounding="gptq", group_size=PEER_GROUP),
    SPARSEGPT: ours(prune=0.5, prune_method="sparsegpt"),
    THEIRS + GPTQ: theirs(their_gptq, packed=True),
    THEIRS + SPARSEGPT: theirs(their_sparsegpt, packed=False),
}


def child(job: Job) -> None:
    """Do it, and print seconds, seconds of processor time, and peak memory."""
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if job.kind.startswith(THEIRS):
        import llmcompressor.modifiers.gptq
        import llmcompressor.modifiers.pruning  # noqa: F401
    run = prepare_floor(job) if job.kind == FLOOR else lambda: KINDS[job.kind](job)
    before = resident_mb("VmRSS")
    start, used = time.perf_counter(), time.process_time()
    run()
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    print(json.dumps({"seconds": seconds, "processor": processor, "peak_mb": resident_mb("VmHWM") - before}))


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


def alternate(jobs: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of times, largest of memory; with the least and the most seconds."""
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in jobs}
    for _ in range(rounds):
        for kind, run in jobs.items():
            runs[kind].append(run())
    for kind, found in runs.items():
        seconds = [run["seconds"] for run in found]
        processor = statistics.median(run["processor"] for run in found)
        spread = f"({min(seconds):.1f}-{max(seconds):.1f})"
        peak = max(run["peak_mb"] for run in found)
        took = f"{statistics.median(seconds):>9.1f} s {spread}{processor:>9.1f} s of processor time"
        print(f"{kind:<42}{took}{peak:>8.0f} MB", flush=True)
    return {
        kind: {key: (max if key == "peak_mb" else statistics.median)([run[key] for run in found]) for key in found[0]}
        for kind, found in runs.items()
    }


def ratios(slower: dict[str, float], faster: dict[str, float]) -> tuple[float, float]:
    return slower["seconds"] / faster["seconds"], slower["processor"] / faster["processor"]


def verdict(holds: bool) -> str:
    return "met" if holds else "not met"


def write_tokenizer(folder: Path) -> None:
    """One that has a token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def calibration_job(source: Path, folder: Path, tokens: int) -> Job:
    """With the text, and the sequences that this project makes of it."""
    from pydoc_data.topics import topics

    from compressknow.compress.calibrate.text import read_calibration_text
    from compressknow.compress.steps import Calibration
    from compressknow.model.loading import open_complete

    text, rows = folder / "calibration.txt", folder / f"rows-{source.name}-{tokens}.json"
    text.write_text("\n".join(topics.values()), encoding="utf-8")
    made = read_calibration_text(source, open_complete(source)[1], Calibration(str(text), tokens))
    rows.write_text(json.dumps([row for batch in made.batches for row in batch["input_ids"].tolist()]))
    return Job(OURS, source, folder / "output", text, rows, tokens)


def llama(folder: Path, name: str, sizes: dict[str, int], blocks: int) -> Path:
    source = make_model(folder / name, {**sizes, "num_hidden_layers": blocks}, "bf16")
    write_tokenizer(source)
    return source


def kind_of(job: Job, kind: str) -> Job:
    return Job(kind, job.source, job.output, job.text, job.rows, job.tokens)


def report_floor(folder: Path, options: Namespace) -> None:
    job = calibration_job(llama(folder, f"llama-{options.blocks}", SMALL, options.blocks), folder, options.tokens)
    print(f"\n{options.blocks} blocks of a Llama of 0.4 B, {options.tokens:,} tokens, gptq int4 of everything")
    jobs = {kind: lambda kind=kind: measure(kind_of(job, kind)) for kind in (FLOOR, OURS)}  # type: ignore[misc]
    found = alternate(jobs, options.rounds)
    seconds, processor = ratios(found[OURS], found[FLOOR])
    print(f"{'to the floor':<42}{seconds:>9.2f}x, {processor:.2f}x of processor time", end="")
    print(f" (bound {TIME_BOUND}x: {verdict(seconds <= TIME_BOUND)})")
    peak = found[OURS]["peak_mb"]
    print(f"{'peak memory':<42}{peak:>9.0f} MB (bound {MEMORY_BOUND_MB} MB: {verdict(peak <= MEMORY_BOUND_MB)})")


def report_growth(folder: Path, options: Namespace) -> None:
    tokens = min(options.tokens, 4096)
    print(f"\na narrow Llama, {tokens:,} tokens, gptq int4 of everything")
    peaks = []
    for blocks in (options.blocks, 4 * options.blocks):
        job = calibration_job(llama(folder, f"narrow-{blocks}", NARROW, blocks), folder, tokens)
        peaks.append(measure(job)["peak_mb"])
    growth = peaks[1] / peaks[0]
    print(f"{'four times as many blocks':<42}{peaks[0]:>9.0f} MB -> {peaks[1]:.0f} MB, {growth:.2f}x", end="")
    print(f" (bound {GROWTH_BOUND}x: {verdict(growth <= GROWTH_BOUND)})", flush=True)


def make_environment(folder: Path) -> str:
    """The Python of an environment that has llm-compressor, made if it is not there."""
    place = folder / "llm-compressor"
    python, done = place / "bin" / "python", place / ".complete"
    if not done.exists():
        print(f"installing {PEER}", flush=True)
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True)
        done.touch()
    return str(python)


def report_peers(folder: Path, options: Namespace) -> None:
    python = make_environment(folder)
    job = calibration_job(options.peers, folder, options.tokens)
    for mine in (GPTQ, SPARSEGPT):
        other = THEIRS + mine
        print(f"\n{options.peers.name}, {job.tokens:,} tokens: {mine} of all blocks")
        kept = {kind: folder / f"output {kind}" for kind in (mine, other)}

        def run(kind: str, kept: dict[str, Path] = kept) -> dict[str, float]:
            at = Job(kind, job.source, kept[kind], job.text, job.rows, job.tokens)
            return measure(at, python if kind.startswith(THEIRS) else sys.executable)

        found = alternate({kind: lambda kind=kind: run(kind) for kind in kept}, options.rounds)  # type: ignore[misc]
        report_pair(found[mine], found[other], {kind: perplexity(path, job.source) for kind, path in kept.items()})


def report_pair(mine: dict[str, float], other: dict[str, float], perplexities: dict[str, float]) -> None:
    seconds, processor = ratios(other, mine)
    met = verdict(seconds >= PEER_TIME_BOUND)
    print(f"{'as fast':<42}{seconds:>9.2f}x, {processor:.2f}x of processor time (bound {PEER_TIME_BOUND}x: {met})")
    memory = mine["peak_mb"] / other["peak_mb"]
    met = verdict(memory <= PEER_MEMORY_BOUND)
    print(f"{'memory':<42}{memory:>9.2f}x (bound {PEER_MEMORY_BOUND}x: {met})")
    own, others = perplexities.values()
    worse = 100 * (own / others - 1)
    met = verdict(worse <= PEER_PERPLEXITY_BOUND)
    print(
        f"{'perplexity':<42}{own:>9.3f}, theirs {others:.3f}: {worse:+.2f} % (bound +{PEER_PERPLEXITY_BOUND} %: {met})"
    )


def perplexity(model: Path, tokenizer_of: Path) -> float:
    """Of the manual, in plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compressknow.base.progress import silence_libraries

    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    ids = AutoTokenizer.from_pretrained(tokenizer_of)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    rows = ids[: min(HELD_OUT, len(ids) // SEQUENCE) * SEQUENCE].view(-1, SEQUENCE)
    with silence_libraries():
        causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [float(causal(batch, labels=batch).loss) * len(batch) for batch in rows.split(BATCH)]
    return math.exp(sum(losses) / len(rows))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, source, output, text, rows, tokens = sys.argv[2:]
        child(Job(kind, Path(source), Path(output), Path(text), Path(rows), int(tokens)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where to keep models and the environment; a temporary one by default"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=24, help="of the model; fewer are quicker")
    parser.add_argument("--tokens", type=int, default=32768, help="of the text; fewer are quicker")
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
