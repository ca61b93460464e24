"""Check that checkpoints answer in vLLM on a CPU as in plain transformers, and make a report against its server.

    make test-vllm

vLLM has a separate environment of 3.4 GB. `python tests/vllm_cpu.py VLLM_PYTHON` runs in the project's environment.
Schemes that vLLM runs only on GPUs are named, not run.
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

# vLLM's int8 kernel takes only bfloat16, in which its int4 kernel is inexact (vLLM 0.32: first tokens 1.02 nats apart).
DTYPES = {"int8": "bfloat16"}
DTYPE = "float16"
TOKENS = 8
# The two add 16-bit numbers in different orders, and rounded activations amplify that. So vLLM may differ from
# transformers by this multiple of the difference between transformers in 16 bits and in float32, plus this many nats.
MULTIPLE, TOLERANCE = 2, 0.1
PROMPTS = [
    f"The capital of {country} is"
    for country in "France Italy Japan Canada Egypt Spain Germany Poland Kenya Peru".split()
] + [
    *("Water freezes at", "The chemical symbol for gold is", "The largest planet in the solar system is"),
    *("Romeo and Juliet was written by", "The opposite of hot is", "A baby cat is called a", "Bees make"),
    *("The first president of the United States was", "Two plus two is", "The language spoken in Brazil is"),
]
# Run by vLLM's Python: prints a JSON list of each answer's text and the log-probability of its first token.
ANSWER = """
import json, sys
from vllm import LLM, SamplingParams
def main():
    model, prompts, tokens, dtype = json.loads(sys.argv[1])
    llm = LLM(model=model, dtype=dtype, enforce_eager=True, max_model_len=256, gpu_memory_utilization=0.1)
    results = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, logprobs=1))
    outputs = [result.outputs[0] for result in results]
    answers = [[output.text, output.logprobs[0][output.token_ids[0]].logprob] for output in outputs]
    print("ANSWERS" + json.dumps(answers))
if __name__ == "__main__":
    main()
"""


def main() -> int:
    vllm = sys.argv[1]
    add_vllm_metadata(Path(vllm))
    source = Path("build/smollm2")
    subprocess.run([sys.executable, "examples/smollm2.py", str(source)], check=True)
    with TemporaryDirectory() as folder:
        return check_schemes(vllm, source, Path(folder))


def check_schemes(vllm: str, source: Path, folder: Path) -> int:
    """Return how many schemes differ too much."""
    import compressknow
    from compressknow.compress.schemes import SCHEMES, find_vllm_limit, find_vllm_obstacle

    failures = 0
    print(f"vLLM {read_version(vllm)}, {len(PROMPTS)} prompts, {TOKENS} tokens each", flush=True)
    for scheme in (None, *SCHEMES):
        name = scheme or "unquantized"
        manifest = compressknow.convert(source, folder / name, quantize=scheme, prune=None if scheme else 0.01)
        obstacle, limit = find_vllm_obstacle(manifest), find_vllm_limit(manifest) or ""
        if obstacle or limit.startswith("on GPUs"):
            print(f"{name:<14}not run here: {obstacle or limit}", flush=True)
            continue
        dtype = DTYPES.get(name, DTYPE)
        theirs, ours = answer_with_vllm(vllm, folder / name, dtype), answer_with_transformers(folder / name, dtype)
        exact = answer_with_transformers(folder / name, "float32")
        (same, difference), (same_as_exact, noise) = compare(theirs, ours), compare(ours, exact)
        holds = difference <= MULTIPLE * noise + TOLERANCE
        failures += not holds
        print(
            f"{name:<14}first tokens {difference:.3f} nats apart at most, {same} of {len(PROMPTS)} answers alike; "
            f"transformers in float32 and {dtype}: {noise:.3f}, {same_as_exact}",
            flush=True,
        )
    with serve(vllm, folder / "int4") as address:
        command = ["report", str(source), address, "--limit", "50", "-o", str(folder / "report.json")]
        subprocess.run([sys.executable, "-m", "compressknow", *command], check=True)
    print("failed" if failures else "passed")
    return failures


def answer_with_vllm(vllm: str, model: Path, dtype: str) -> list[tuple[str, float]]:
    arguments = json.dumps([str(model), PROMPTS, TOKENS, dtype])
    done = subprocess.run([vllm, "-c", ANSWER, arguments], env=environment(), capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS")), None)
    if line is None:
        sys.exit(f"vLLM did not answer from {model.name}:\n{(done.stdout + done.stderr)[-3000:]}")
    return [(text, value) for text, value in json.loads(line.removeprefix("ANSWERS"))]


def compare(first: list[tuple[str, float]], second: list[tuple[str, float]]) -> tuple[int, float]:
    """Return how many texts are equal, and the largest difference of the first tokens' log-probabilities, in nats."""
    pairs = list(zip(first, second, strict=True))
    return sum(a[0] == b[0] for a, b in pairs), max(abs(a[1] - b[1]) for a, b in pairs)


def answer_with_transformers(folder: Path, dtype: str) -> list[tuple[str, float]]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    answers = []
    for prompt in PROMPTS:
        inputs: Any = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].float()
            ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append((tokenizer.decode(ids, skip_special_tokens=True), float(logits.log_softmax(0).max())))
    return answers


@contextmanager
def serve(vllm: str, model: Path) -> Iterator[str]:
    """Start vLLM's server, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--port {port} --dtype {DTYPE} --enforce-eager --max-model-len 512 --max-logprobs 20".split()
    options += ["--gpu-memory-utilization", "0.1"]
    command = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *options]
    with (
        (model.parent / "server.log").open("w+") as log,
        subprocess.Popen(command, env=environment(), stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + 600
            while True:
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"vLLM's server did not start:\n{log.read()[-3000:]}")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def environment() -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def read_version(vllm: str) -> str:
    code = "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    return subprocess.run([vllm, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def add_vllm_metadata(python: Path) -> None:
    """Name the installed vllm-cpu also vllm, with +cpu in its version: its server looks for such a distribution."""
    site = next(python.parent.parent.glob("lib/python*/site-packages"))
    (metadata,) = site.glob("vllm_cpu-*.dist-info")
    version = metadata.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    added = site / f"vllm-{version}+cpu.dist-info"
    added.mkdir(exist_ok=True)
    (added / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
