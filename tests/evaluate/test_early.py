"""Two models on facts in random order: what they answer, where they stop, and that nothing is evaluated twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import compressknow
from compressknow.base.errors import UsageError
from compressknow.evaluate.answers import Answers, write_record
from compressknow.evaluate.early import FIRST, gather_early
from compressknow.evaluate.gather import Evaluation, gather
from compressknow.evaluate.grades import KNOWN
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Options
from tests.knowing import KNOWN_FACTS, save_trained, write_facts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints `llama` and `llama-6`, which is pruned, and their facts."""
    folder = tmp_path_factory.mktemp("root")
    save_trained("llama", folder / "llama")
    compressknow.convert(folder / "llama", folder / "llama-6", prune=0.6)
    write_facts(folder / "facts.jsonl")
    return folder


def make_evaluation(root: Path, keep_in: Path, **options: int) -> Evaluation:
    return Evaluation([f"facts:{root / 'facts.jsonl'}"], Options(**options), Settings(batch_size=8), keep_in=keep_in)


def decide_after(facts: int) -> Callable[[np.ndarray, np.ndarray, int], list[tuple[bool, bool]] | None]:
    """Return a function that decides after so many facts, and returns what both models know."""

    def decide(known: np.ndarray, kept: np.ndarray, of: int) -> list[tuple[bool, bool]] | None:
        assert of == len(KNOWN_FACTS)
        return list(zip(known.tolist(), kept.tolist(), strict=True)) if len(known) >= facts else None

    return decide


class Early(NamedTuple):
    original: Answers
    compressed: Answers
    decision: list[tuple[bool, bool]] | None


def run_early(root: Path, keep_in: Path, facts: int = FIRST, **options: int) -> Early:
    evaluation = make_evaluation(root, keep_in, **options)
    return Early(*gather_early(root / "llama", root / "llama-6", evaluation, decide_after(facts)))


def list_ids(result: Early) -> list[str]:
    return [answer.fact_id for answer in result.original.answers]


def test_the_answers_are_those_of_a_whole_run(root: Path, tmp_path: Path) -> None:
    before, (compressed,) = gather(root / "llama", [root / "llama-6"], make_evaluation(root, tmp_path / "whole"))
    result = run_early(root, tmp_path / "early")

    assert len(list_ids(result)) == FIRST < len(KNOWN_FACTS)
    for whole, part in ((before, result.original), (compressed, result.compressed)):
        all_answers = {answer.fact_id: answer for answer in whole.answers}
        for answer in part.answers:
            full = all_answers[answer.fact_id]
            assert (answer.predicted, answer.correct, answer.rank) == (full.predicted, full.correct, full.rank)
            assert answer.first_kl == pytest.approx(full.first_kl, abs=1e-5)


def test_a_probe_that_is_named_twice_is_refused_even_if_its_answers_are_stored(root: Path, tmp_path: Path) -> None:
    evaluation = make_evaluation(root, tmp_path)
    gather(root / "llama", [root / "llama-6"], evaluation)
    twice = replace(evaluation, probes=[*evaluation.probes, *evaluation.probes])
    with pytest.raises(UsageError, match="Two probes have the name facts:facts"):
        gather_early(root / "llama", root / "llama-6", twice, lambda *_: None)


@pytest.mark.parametrize("known", KNOWN)
def test_the_decision_is_made_on_the_answers(root: Path, tmp_path: Path, known: str) -> None:
    evaluation = replace(make_evaluation(root, tmp_path), known=known)
    *sides, decision = gather_early(root / "llama", root / "llama-6", evaluation, decide_after(FIRST))
    grades = [[answer.grade for answer in side.answers] for side in sides]
    assert "recognized" in grades[1]
    counted = {"recognized", "produced"} if known == "recognized" else {"produced"}
    assert sorted(decision) == sorted((a in counted, b in counted) for a, b in zip(*grades, strict=True))


def test_the_record_is_that_of_a_sample(root: Path, tmp_path: Path) -> None:
    result = run_early(root, tmp_path, seed=3)
    (original,), (compressed,) = (side.record.probes.values() for side in (result.original, result.compressed))
    assert (original.asked, original.limit, original.seed, original.facts) == (FIRST, FIRST, 3, len(KNOWN_FACTS))
    assert original.fingerprint == compressed.fingerprint
    assert original.reference == compressed.reference is not None


def test_facts_that_cannot_be_evaluated_are_counted(root: Path, tmp_path: Path) -> None:
    unknown = {"prompt": "The capital of France is [MASK].", "obj_label": "Paris", "candidates": ["Paris", "Rome"]}
    file = tmp_path / "facts.jsonl"
    file.write_text(f"{(root / 'facts.jsonl').read_text()}{json.dumps(unknown)}\n")
    evaluation = replace(make_evaluation(root, tmp_path / "kept"), probes=[f"facts:{file}"])
    for models in ((root / "llama", root / "llama-6"), (tmp_path / "a", tmp_path / "b")):
        *sides, of = gather_early(*models, evaluation, lambda _, __, of: of)
        assert of == len(KNOWN_FACTS)
        for side, name in zip(sides, "ab", strict=True):
            (entry,) = side.record.probes.values()
            assert list(entry.dropped.values()) == [1]
            assert entry.facts == of + 1
            # The second time, the answers are stored.
            compressknow.probe(root / side.record.model.name, tmp_path / name, f"facts:{file}")


def test_a_probe_without_a_fact_that_can_be_evaluated_is_refused(root: Path, tmp_path: Path) -> None:
    unknown = {"prompt": "The capital of France is [MASK].", "obj_label": "Paris", "candidates": ["Paris", "Rome"]}
    file = tmp_path / "others.jsonl"
    file.write_text(f"{json.dumps(unknown)}\n")
    evaluation = make_evaluation(root, tmp_path / "kept")
    for probes in ([f"facts:{file}"], [*evaluation.probes, f"facts:{file}"]):
        with pytest.raises(UsageError, match="no fact that this model can be evaluated on"):
            gather_early(root / "llama", root / "llama-6", replace(evaluation, probes=probes), decide_after(FIRST))


def test_the_seed_gives_a_random_order(root: Path, tmp_path: Path) -> None:
    first, repeated, second = (run_early(root, tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert list_ids(first) == list_ids(repeated) != list_ids(second)
    relations = {answer.relation for answer in first.original.answers}
    assert len(relations) == 4


def test_nothing_is_evaluated_twice(root: Path, tmp_path: Path, loads: list[Path]) -> None:
    first = run_early(root, tmp_path)
    assert loads == [root / "llama", root / "llama-6"]
    # A name with the sizes of many probes would be too long for a file system.
    assert not any(tmp_path.rglob("*-limit*"))
    loads.clear()
    again = run_early(root, tmp_path)
    assert (list_ids(again), again.decision) == (list_ids(first), first.decision)
    # It is loaded only to read the facts.
    assert loads == [root / "llama"]


def test_a_later_stop_continues_an_earlier_one(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressknow.evaluate.early.FIRST", 8)
    short, longer = run_early(root, tmp_path, facts=8), run_early(root, tmp_path, facts=30)
    assert set(list_ids(short)) < set(list_ids(longer))
    assert (len(list_ids(short)), len(list_ids(longer))) == (8, 32)
    assert longer.decision[:8] == short.decision


def test_without_a_decision_all_facts_are_evaluated(root: Path, tmp_path: Path) -> None:
    result = run_early(root, tmp_path, facts=len(KNOWN_FACTS) + 1)
    assert result.decision is None
    assert len(list_ids(result)) == len(KNOWN_FACTS)


def test_stored_answers_are_not_evaluated_again(root: Path, tmp_path: Path, loads: list[Path]) -> None:
    expected = run_early(root, tmp_path / "early")
    gather(root / "llama", [root / "llama-6"], make_evaluation(root, tmp_path / "whole"))
    loads.clear()
    result = run_early(root, tmp_path / "whole")
    assert loads == []
    assert result.decision == expected.decision
    assert result.original.record.probes.keys() == expected.original.record.probes.keys()


def test_answers_folders_can_replace_models(root: Path, tmp_path: Path, loads: list[Path]) -> None:
    probe = f"facts:{root / 'facts.jsonl'}"
    expected = run_early(root, tmp_path / "early")
    original, compressed = tmp_path / "original", tmp_path / "compressed"
    compressknow.probe(root / "llama", original, probe, settings=Settings(batch_size=8))
    loads.clear()
    *_, decision = gather_early(original, root / "llama-6", make_evaluation(root, tmp_path / "a"), decide_after(FIRST))
    assert loads == [root / "llama-6"]
    assert decision == expected.decision
    compressknow.probe(root / "llama-6", compressed, probe, reference=original)
    loads.clear()
    *_, decision = gather_early(original, compressed, make_evaluation(root, tmp_path / "b"), decide_after(FIRST))
    assert decision == expected.decision
    assert loads == []


def test_the_seed_orders_the_facts_of_stored_samples_too(root: Path, tmp_path: Path) -> None:
    models = [tmp_path / name for name in ("llama", "llama-6")]
    for model in models:
        compressknow.probe(root / model.name, model, f"facts:{root / 'facts.jsonl'}", limit=40)
    first, second = (
        gather_early(*models, make_evaluation(root, tmp_path / "early", seed=seed), lambda *_: "enough")[0]
        for seed in (0, 5)
    )
    assert len(first.answers) == len(second.answers)
    assert {answer.fact_id for answer in first.answers} != {answer.fact_id for answer in second.answers}


def test_the_time_of_stored_answers_counts_once(root: Path, tmp_path: Path) -> None:
    probe = f"facts:{root / 'facts.jsonl'}"
    for name in ("llama", "llama-6"):
        record = compressknow.probe(root / name, tmp_path / name, probe).record
        slow = {name: replace(entry, seconds=60.0) for name, entry in record.probes.items()}
        write_record(tmp_path / name, replace(record, probes=slow))
    models = (tmp_path / "llama", tmp_path / "llama-6")
    *sides, _ = gather_early(*models, make_evaluation(root, tmp_path / "early"), decide_after(len(KNOWN_FACTS) + 1))
    assert [entry.seconds for side in sides for entry in side.record.probes.values()] == [60.0, 60.0]


@pytest.mark.parametrize("stored", [0, 1], ids=["original", "compressed"])
def test_answers_to_other_facts_are_refused(root: Path, tmp_path: Path, stored: int) -> None:
    models = [root / "llama", root / "llama-6"]
    compressknow.probe(models[stored], tmp_path / "stored", f"facts:{root / 'facts.jsonl'}", options=Options(limit=20))
    name, models[stored] = models[stored].name, tmp_path / "stored"
    with pytest.raises(UsageError, match=f"{name} was evaluated on other facts or prompts"):
        gather_early(*models, make_evaluation(root, tmp_path / "kept", limit=30), decide_after(FIRST))


def test_tasks_are_refused(root: Path, tmp_path: Path) -> None:
    tasks = replace(make_evaluation(root, tmp_path), probes=["lm-eval:boolq"])
    with pytest.raises(UsageError, match="--early cannot stop lm-eval:boolq"):
        gather_early(root / "llama", root / "llama-6", tasks, decide_after(FIRST))
