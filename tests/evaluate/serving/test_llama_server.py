"""A real llama-server, from the package xllamacpp, with the tiny Llama that knows 64 facts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compressknow.cli import main
from compressknow.engine.identity import locate
from compressknow.engine.language_model import load_language_model
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from tests.engine.gguf_files import needs_gguf, write_gguf
from tests.evaluate.references import evaluate_model, make_known_facts, make_probe
from tests.evaluate.serving.test_servers import evaluate_server
from tests.knowing import save_trained, write_facts

xllamacpp = pytest.importorskip("xllamacpp")
# Unlike transformers, the kernels of llama.cpp for Q8_0 round activations to 8 bits.
CLOSE = 0.12


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return write_gguf(save_trained("llama", folder / "llama"), folder / "known.gguf")


@pytest.fixture(scope="module", params=[1.0, 0.2], ids=["plain", "with a penalty"])
def url(gguf: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    parameters = xllamacpp.CommonParams()
    # Below 1, tokens of the prompt are likely to be repeated.
    parameters.sampling.penalty_repeat = request.param
    parameters.model.path = str(gguf)
    parameters.n_ctx, parameters.n_parallel, parameters.port = 256, 4, 0
    parameters.cpuparams.n_threads, parameters.warmup, parameters.verbosity = 1, False, 0
    server = xllamacpp.Server(parameters)
    yield server.listening_address
    del server


@needs_gguf
@pytest.mark.parametrize("closed", [True, False])
def test_answers_are_those_of_the_unpacked_file(url: str, gguf: Path, closed: bool) -> None:
    probe = make_probe(make_known_facts(closed=closed), vocabulary="closed" if closed else "open")
    lm = load_language_model(gguf, device="cpu", dtype="float32")
    expected = evaluate_model(lm.model, lm.tokenizer, "causal", probe)
    answers = evaluate_server(url, probe)
    assert [answers[fact].predicted for fact in expected] == [answer.predicted for answer in expected.values()]
    assert [answers[fact].rank for fact in expected] == [answer.rank for answer in expected.values()]
    for fact, answer in expected.items():
        assert answers[fact].produced == answer.produced
        assert answers[fact].logp_gold == pytest.approx(answer.logp_gold, abs=CLOSE)
        assert answers[fact].top5_logp[0] == pytest.approx(answer.top5_logp[0], abs=CLOSE)


@needs_gguf
def test_any_tokens_of_the_original_can_be_requested(url: str, gguf: Path) -> None:
    probe = make_probe(make_known_facts()[:2])
    lm = load_language_model(gguf, device="cpu", dtype="float32")
    expected = evaluate_model(lm.model, lm.tokenizer, "causal", probe)
    scorer = ModelHandle(locate(url), Settings()).loaded.make_scorer(probe)
    for fact, other in zip(probe.facts, expected.values(), strict=True):
        (answer,) = scorer.answer([scorer.make_query(fact)], [other.first_ids])
        assert list(answer.first_ids) == list(other.first_ids)
        probabilities = (
            np.exp(np.array(answer.first_logp, dtype=np.float64)),
            np.exp(np.array(other.first_logp, dtype=np.float64)),
        )
        assert probabilities[0] == pytest.approx(probabilities[1], abs=0.02)


def test_probe_and_report_with_a_server(url: str, tmp_path: Path) -> None:
    facts, out = f"facts:{write_facts(tmp_path / 'f.jsonl')}", tmp_path / "answers"
    assert main(["probe", url, "-p", facts, "-o", str(out), "--parallel", "2"]) == 0
    record = json.loads((out / "probe.json").read_text())["model"]
    assert record["architecture"] == "llama-server"
    assert record["runtime"]["build"].startswith("llama-server b")
    assert record["computed_in"] == record["dtype"] == "Q8_0"
    assert record["quantization"].startswith("Q8_0, 8.")
    assert record["parameters"] > 0
    assert record["bytes"] > 0
    card = tmp_path / "card.json"
    assert main(["report", str(out), url, "-p", facts, "-o", str(card), "--answers", str(tmp_path / "kept")]) == 0
    (probe,) = json.loads(card.read_text())["compressed"][0]["probes"].values()
    assert (probe["both"], probe["lost"]) == (64, 0)
    assert probe["kl_mean"] == pytest.approx(0, abs=1e-4)
