"""Methods that use activations keep more facts than one that sees only weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import compressknow
from compressknow.comparison.intervals import run_mcnemar, tally
from compressknow.evaluate.sources import Options
from tests.knowing import save_trained, write_facts
from tests.long import long

SHARED = Path(__file__).parents[3] / "shared"
METHODS = ("l1-unstructured", "wanda", "sparsegpt")


def answer(folder: Path, output: Path, probe: str, options: Options | None = None) -> np.ndarray:
    """Probe a model, and return whether each fact is answered correctly, in the order of facts."""
    answers = compressknow.probe(folder, output, probe, options=options).answers
    return np.array([answer.correct for answer in sorted(answers, key=lambda answer: answer.fact_id)])


def prune_model(source: Path, output: Path, method: str, amount: float, **more: object) -> Path:
    calibration = {} if method == "l1-unstructured" else {"calibration_tokens": 2048}
    compressknow.convert(source, output, scope="overall", prune=amount, prune_method=method, **calibration, **more)  # type: ignore[arg-type]
    return output


def compute_p_value(fewer: np.ndarray, more: np.ndarray) -> float:
    """Return McNemar's p of two models' answers to the same facts."""
    (counts,) = tally(fewer, more, np.zeros(len(fewer), dtype=int))
    return run_mcnemar(counts) or 0.0


def test_sparsegpt_keeps_more_facts_of_tiny_models(tmp_path: Path) -> None:
    """All families are counted together, because each has only 64 facts.

    Wanda and magnitude are not compared: in rows of 64 channels wanda has little choice, and it keeps fewer facts of
    the BERT and the Llama.
    """
    facts = write_facts(tmp_path / "facts.jsonl")
    correct: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    for family in ("bert", "llama", "t5"):
        source = save_trained(family, tmp_path / family)
        for method in METHODS:
            name = f"{family}-{method}"
            output = prune_model(source, tmp_path / name, method, 0.5, parameters={"pattern": "2:4"})
            correct[method].append(answer(output, tmp_path / f"answers-{name}", f"facts:{facts}"))
    print({method: [int(each.sum()) for each in found] for method, found in correct.items()})
    l1, wanda, sparsegpt = (np.concatenate(correct[method]) for method in METHODS)
    for other in (l1, wanda):
        assert sparsegpt.sum() > other.sum()
        assert compute_p_value(other, sparsegpt) < 0.001


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data does not exist")
@long
@pytest.mark.parametrize(
    ("name", "probe", "amount"),
    [("minilm-facts", "lama:trex", 0.6), ("t5-facts", f"facts:{SHARED}/models/t5-facts/facts.jsonl", 0.6)],
)
def test_sparsegpt_keeps_more_facts_than_wanda_and_wanda_than_magnitude(
    name: str, probe: str, amount: float, tmp_path: Path
) -> None:
    """At 60 % the methods differ most; at 50 % these two models have forgotten little."""
    source = SHARED / "models" / name
    options = Options(data=SHARED / "data" / "lama" if probe.startswith("lama") else None, limit=300)
    correct = {
        method: answer(prune_model(source, tmp_path / method, method, amount), tmp_path / f"a-{method}", probe, options)
        for method in METHODS
    }
    print({method: int(each.sum()) for method, each in correct.items()})
    l1, wanda, sparsegpt = (correct[method] for method in METHODS)
    assert l1.sum() < wanda.sum() < sparsegpt.sum()
    assert compute_p_value(l1, sparsegpt) < 0.001
