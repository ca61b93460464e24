"""Checkpoints in a real vLLM: each scheme that it is said to run on a CPU answers as plain transformers does, and a
report is made against its server.

    make test-vllm

vLLM lives in an environment of its own, of 3.4 GB. `python tests/vllm_cpu.py VLLM_PYTHON` runs this in the project's.
What is said to run on GPUs alone is named, and not run.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# What both compute in. vLLM's kernel for int8 takes bfloat16 alone; that for int4 loses much in it (0.32: first tokens
# 1.02 nats apart).
DTYPES = {"int8": "bfloat16"}
DTYPE = "float16"
TOKENS = 8
# The two add in another order, in 16 bits, and rounded activations amplify it. How much, transformers itself
# shows: it answers in float32 too. vLLM's answers are to be no further from it than so many times that, and nats.
TIMES, APART = 2, 0.1
PROMPTS = [
    f"The capital of {country} is"
    for country in "France Italy Japan Canada Egypt Spain Germany Poland Kenya Peru".split()
] + [
    *("Water freezes at", "The chemical symbol for gold is", "The largest planet in the solar system is"),
    *("Romeo and Juliet was written by", "The opposite of hot is", "A baby cat is called a", "Bees make"),
    *("The first president of the United States was", "Two plus two is", "The language spoken in Brazil is"),
]
# Run by vLLM's Python, with a checkpoint: one JSON list, of the text and the first token's log-probability of each.
ANSWER = """
import json, sys
from vllm import LLM, SamplingParams
def main():
    model, prompts, tokens, dtype = json.loads(sys.argv[1])
    llm = LLM(model=model, dtype=dtype, enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.1)
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, logprobs=1))
    answers = [each.outputs[0] for each in found]
    given = [[each.text, each.logprobs[0][each.token_ids[0]].logprob] for each in answers]
    print("ANSWERS" + json.dumps(given))
if __name__ == "__main__":
    main()
"""


def main() -> int:
    vllm = sys.argv[1]
    name_it_vllm(Path(vllm))
    source = Path("build/smollm2")
    subprocess.run([sys.executable, "examples/smollm2.py", str(source)], check=True)
    with TemporaryDirectory() as folder:
        return judge(vllm, source, Path(folder))


def judge(vllm: str, source: Path, folder: Path) -> int:
    import compressknow
    from compressknow.compress.schemes import SCHEMES, find_vllm_limit, find_vllm_obstacle

    wrong = 0
    print(f"vLLM {version_of(vllm)}, {len(PROMPTS)} prompts, {TOKENS} tokens each", flush=True)
    for scheme in (None, *SCHEMES):
        name = scheme or "unquantized"
        manifest = compressknow.convert(source, folder / name, quantize=scheme, prune=None if scheme else 0.01)
        obstacle, limit = find_vllm_obstacle(manifest), find_vllm_limit(manifest) or ""
        if obstacle or limit.startswith("on GPUs"):
            print(f"{name:<14}not run here: {obstacle or limit}", flush=True)
            continue
        dtype = DTYPES.get(name, DTYPE)
        theirs, ours = answers_of_vllm(vllm, folder / name, dtype), answers_of_transformers(folder / name, dtype)
        exact = answers_of_transformers(folder / name, "float32")
        (same, apart), (itself, floor) = differences(theirs, ours), differences(ours, exact)
        holds = apart <= TIMES * floor + APART
        wrong += not holds
        print(
            f"{name:<14}first tokens {apart:.3f} nats apart at most, {same} of {len(PROMPTS)} answers alike; "
            f"transformers in float32 and {dtype}: {floor:.3f}, {itself}",
            flush=True,
        )
    with served(vllm, folder / "int4") as address:
        command = ["report", str(source), address, "--limit", "50", "-o", str(folder / "report.json")]
        subprocess.run([sys.executable, "-m", "compressknow", *command], check=True)
    print("failed" if wrong else "passed")
    return wrong


def answers_of_vllm(vllm: str, model: Path, dtype: str) -> list[tuple[str, float]]:
    given = json.dumps([str(model), PROMPTS, TOKENS, dtype])
    found = subprocess.run([vllm, "-c", ANSWER, given], env=environment(), capture_output=True, text=True)
    line = next((line for line in found.stdout.splitlines() if line.startswith("ANSWERS")), None)
    if line is None:
        sys.exit(f"vLLM did not answer from {model.name}:\n{(found.stdout + found.stderr)[-3000:]}")
    return [(text, value) for text, value in json.loads(line.removeprefix("ANSWERS"))]


def differences(one: list[tuple[str, float]], other: list[tuple[str, float]]) -> tuple[int, float]:
    """How many answers are alike, and how far apart log-probabilities of first tokens are at most, in nats."""
    pairs = list(zip(one, other, strict=True))
    return sum(a[0] == b[0] for a, b in pairs), max(abs(a[1] - b[1]) for a, b in pairs)


def answers_of_transformers(folder: Path, dtype: str) -> list[tuple[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        inputs: Any = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].float()
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append((tokenizer.decode(ids, skip_special_tokens=True), float(logits.log_softmax(0).max())))
    return found


@contextmanager
def served(vllm: str, model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--port",
        str(port),
        "--dtype",
        DTYPE,
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--max-logprobs",
        "20",
    ]
    command = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    with (
        (model.parent / "server.log").open("w+") as log,
        subprocess.Popen(
            [*command, "--gpu-memory-utilization", "0.1"], env=environment(), stdout=log, stderr=log
        ) as server,
    ):
        try:
            until = time.monotonic() + 600
            while True:
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                if server.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    sys.exit(f"vLLM's server did not start:\n{log.read()[-3000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def environment() -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def version_of(vllm: str) -> str:
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    return subprocess.run([vllm, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def name_it_vllm(python: Path) -> None:
    """vllm-cpu's server looks for a distribution that is called vllm, with +cpu in its version."""
    site = next(python.parent.parent.glob("lib/python*/site-packages"))
    (metadata,) = site.glob("vllm_cpu-*.dist-info")
    version = metadata.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = site / f"vllm-{version}+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
