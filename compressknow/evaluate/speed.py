"""Speed of a model on this machine, and its memory, measured in a separate process.

    python -m compressknow.evaluate.speed PATH SETTINGS

prints {"device", "computed_in", "facts_per_second", "tokens_per_second", "peak_bytes"} as JSON; SETTINGS are the fields
of `Settings`, as JSON. Unless they name a precision, a model runs in that of its checkpoint, as it is deployed, not in
float32, in which answers are compared. The facts are a sample of the default probe, which suits every family; tokens
are generated one by one by a causal model. The first round is a warm-up and is not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compressknow.base.errors import CompressknowError, UnsupportedError
from compressknow.base.system import measure_peak_memory
from compressknow.engine.identity import LocatedModel
from compressknow.engine.language_model import AUTO
from compressknow.evaluate.evaluate import evaluate
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.records import Speed
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import DEFAULT, Options, open_all
from compressknow.gguf.children import put_first
from compressknow.model.checkpoint import read_json

FACTS, TOKENS, ROUNDS = 96, 64, 3
# Seconds after which no further round begins.
LONG = 10.0
_TEXT = "A long time ago, in a small town by the sea, there lived a young woman who"


def measure(located: LocatedModel, settings: Settings) -> Speed:
    """Measure facts and tokens per second (medians), and peak memory. Raises CompressknowError if that fails."""
    arguments = [str(located.path), json.dumps(asdict(settings))]
    # Both processes use UTF-8 in any locale, and nothing is imported from the working directory.
    command = [sys.executable, "-P", "-X", "utf8", "-m", "compressknow.evaluate.speed", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",
        env=put_first(Path(__file__).parents[2]),
        check=False,
    )
    if done.returncode:
        default = f"The measuring process ended with exit code {done.returncode}."
        reason = (done.stderr.strip().splitlines() or [default])[-1]
        raise CompressknowError(f"The speed of {located.name} could not be measured.", why=reason)
    return Speed(**json.loads(done.stdout.strip().splitlines()[-1]))


def _measure_in_process(path: Path, settings: Settings) -> dict[str, Any]:
    import torch

    _import_libraries(path)
    libraries = measure_peak_memory()
    handle = ModelHandle(LocatedModel(path.name, path), replace(settings, dtype=settings.dtype or AUTO))
    computed_in = handle.loaded.computed_in
    (probe,) = open_all(DEFAULT, Options(limit=FACTS))
    assert isinstance(probe, Probe)
    prompts = handle.make_prompts(probe)
    device = settings.device
    on_gpu, threads = device.startswith("cuda"), torch.get_num_threads()

    def answer_all() -> int:
        # Answers are numbers on the CPU, so no work on a GPU is left unfinished.
        for _ in evaluate(prompts):
            pass
        return prompts.total

    facts_per_second = _measure_rate(answer_all)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device}, {threads} thread{'s' * (threads > 1)}",
        "computed_in": computed_in,
        "facts_per_second": facts_per_second,
        "tokens_per_second": _measure_tokens(handle),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else max(measure_peak_memory() - libraries, 0),
    }


def _measure_rate(work: Callable[[], int]) -> float:
    """Return the median over rounds of the count that `work` returns, per second; of fewer rounds if they take long."""
    work()
    rates: list[float] = []
    first = time.perf_counter()
    while len(rates) < ROUNDS and (not rates or time.perf_counter() - first < LONG):
        start = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - start))
    # As many digits as for a fast model: the largest may take minutes per fact.
    return float(f"{statistics.median(rates):.4g}")


def _measure_tokens(handle: ModelHandle) -> float | None:
    """Measure the greedy continuation of a text, not batch-invariant; None if the model does not continue text."""
    if model := handle.loaded.language_model:
        from compressknow.engine.layers import undo_batch_invariant

        undo_batch_invariant(model.model)
    try:
        reader = handle.make_reader()
    except UnsupportedError:
        return None
    prompt, _ = reader.encode(_TEXT)
    tokens = TOKENS if reader.most is None else min(TOKENS, reader.most - len(prompt))
    if tokens < 1:
        return None

    def write() -> int:
        # Tokens are numbers on the CPU, so no work on a GPU is left unfinished.
        (row,) = reader.continue_texts([prompt], tokens)
        return next((number for number, token in enumerate(row, start=1) if reader.ends(token)), tokens)

    return _measure_rate(write)


def _import_libraries(path: Path) -> None:
    """Import the libraries that loading a model would import, so that their memory is not counted as the model's."""
    import transformers

    import compressknow.evaluate.scoring.llama_cpp  # noqa: F401

    names = ["AutoTokenizer", "AutoModelForCausalLM"]
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        names += config.get("architectures") or []
        if "quantization_config" in config:
            import compressed_tensors  # noqa: F401
    for name in names:
        getattr(transformers, str(name), None)


if __name__ == "__main__":
    try:
        settings = Settings(**json.loads(sys.argv[2]))
        print(json.dumps(_measure_in_process(Path(sys.argv[1]), settings)))  # noqa: T201
    except CompressknowError as error:
        sys.exit(" ".join(part for part in (error.what, error.why) if part))
