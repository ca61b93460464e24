"""Two models on facts in random order: what they answer, where it stops, and that nothing is evaluated twice."""

from __future__ import annotations

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
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources import Options
from tests.knowing import KNOWN_FACTS, save_trained, write_facts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints `llama` and `llama-6`, which is pruned, and their facts."""
    folder = tmp_path_factory.mktemp("place")
    save_trained("llama", folder / "llama")
    compressknow.convert(folder / "llama", folder / "llama-6", prune=0.6)
    write_facts(folder / "facts.jsonl")
    return folder


def evaluation(place: Path, keep_in: Path, **options: int) -> Evaluation:
    return Evaluation([f"facts:{place / 'facts.jsonl'}"], Options(**options), Settings(batch_size=8), keep_in=keep_in)


def after(facts: int) -> Callable[[np.ndarray, np.ndarray, int], list[tuple[bool, bool]] | None]:
    """Stops when so many facts are done, and gives what both models know."""

    def decide(known: np.ndarray, kept: np.ndarray, of: int) -> list[tuple[bool, bool]] | None:
        assert of == len(KNOWN_FACTS)
        return list(zip(known.tolist(), kept.tolist(), strict=True)) if len(known) >= facts else None

    return decide


class Early(NamedTuple):
    original: Answers
    compressed: Answers
    found: list[tuple[bool, bool]] | None


def early(place: Path, keep_in: Path, facts: int = FIRST, **options: int) -> Early:
    asked = evaluation(place, keep_in, **options)
    return Early(*gather_early(place / "llama", place / "llama-6", asked, after(facts)))


def ids(found: Early) -> list[str]:
    return [answer.fact_id for answer in found.original.answers]


def test_the_answers_are_those_of_a_whole_run(place: Path, tmp_path: Path) -> None:
    before, (compressed,) = gather(place / "llama", [place / "llama-6"], evaluation(place, tmp_path / "whole"))
    found = early(place, tmp_path / "early")

    assert len(ids(found)) == FIRST < len(KNOWN_FACTS)
    for whole, part in ((before, found.original), (compressed, found.compressed)):
        of_whole = {answer.fact_id: answer for answer in whole.answers}
        for answer in part.answers:
            same = of_whole[answer.fact_id]
            assert (answer.predicted, answer.correct, answer.rank) == (same.predicted, same.correct, same.rank)
            assert answer.first_kl == pytest.approx(same.first_kl, abs=1e-5)


def test_a_probe_that_is_named_twice_is_refused_also_where_its_answers_are_kept(place: Path, tmp_path: Path) -> None:
    asked = evaluation(place, tmp_path)
    gather(place / "llama", [place / "llama-6"], asked)
    twice = replace(asked, probes=[*asked.probes, *asked.probes])
    with pytest.raises(UsageError, match="Two probes have the name facts:facts"):
        gather_early(place / "llama", place / "llama-6", twice, lambda *_: None)


def test_what_is_decided_on_is_what_was_answered(place: Path, tmp_path: Path) -> None:
    found = early(place, tmp_path)
    assert sorted(found.found) == sorted(
        (one.correct, other.correct)
        for one, other in zip(found.original.answers, found.compressed.answers, strict=True)
    )


def test_the_record_is_that_of_a_sample(place: Path, tmp_path: Path) -> None:
    found = early(place, tmp_path, seed=3)
    (entry,), (other,) = (side.record.probes.values() for side in (found.original, found.compressed))
    assert (entry.asked, entry.limit, entry.seed, entry.facts) == (FIRST, FIRST, 3, len(KNOWN_FACTS))
    assert (entry.fingerprint, entry.reference) == (other.fingerprint, other.reference)


def test_the_order_is_random_and_decided_by_the_seed(place: Path, tmp_path: Path) -> None:
    one, same, other = (early(place, tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2)))
    assert ids(one) == ids(same) != ids(other)
    relations = {answer.relation for answer in one.original.answers}
    assert len(relations) == 4


def test_nothing_is_evaluated_twice(place: Path, tmp_path: Path, loads: list[Path]) -> None:
    first = early(place, tmp_path)
    assert loads == [place / "llama", place / "llama-6"]
    # The sizes of many probes would make a name that no system takes.
    assert not any(tmp_path.rglob("*-limit*"))
    loads.clear()
    again = early(place, tmp_path)
    assert (ids(again), again.found) == (ids(first), first.found)
    # Only to read the facts as it does.
    assert loads == [place / "llama"]


def test_a_later_stop_goes_on_where_an_earlier_one_was(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressknow.evaluate.early.FIRST", 8)
    short, longer = early(place, tmp_path, facts=8), early(place, tmp_path, facts=30)
    assert set(ids(short)) < set(ids(longer))
    assert (len(ids(short)), len(ids(longer))) == (8, 32)
    assert longer.found[:8] == short.found


def test_without_an_answer_all_facts_are_evaluated(place: Path, tmp_path: Path) -> None:
    found = early(place, tmp_path, facts=len(KNOWN_FACTS) + 1)
    assert found.found is None
    assert len(ids(found)) == len(KNOWN_FACTS)


def test_stored_answers_are_not_evaluated_again(place: Path, tmp_path: Path, loads: list[Path]) -> None:
    wanted = early(place, tmp_path / "early")
    gather(place / "llama", [place / "llama-6"], evaluation(place, tmp_path / "whole"))
    loads.clear()
    found = early(place, tmp_path / "whole")
    assert loads == []
    assert found.found == wanted.found
    assert found.original.record.probes.keys() == wanted.original.record.probes.keys()


def test_answers_folders_in_place_of_models(place: Path, tmp_path: Path, loads: list[Path]) -> None:
    probe = f"facts:{place / 'facts.jsonl'}"
    wanted = early(place, tmp_path / "early")
    original, compressed = tmp_path / "original", tmp_path / "compressed"
    compressknow.probe(place / "llama", original, probe, settings=Settings(batch_size=8))
    loads.clear()
    *_, one = gather_early(original, place / "llama-6", evaluation(place, tmp_path / "one"), after(FIRST))
    assert loads == [place / "llama-6"]
    assert one == wanted.found
    compressknow.probe(place / "llama-6", compressed, probe, reference=original)
    loads.clear()
    *_, both = gather_early(original, compressed, evaluation(place, tmp_path / "both"), after(FIRST))
    assert both == wanted.found
    assert loads == []


def test_the_seed_orders_the_facts_of_stored_samples_too(place: Path, tmp_path: Path) -> None:
    models = [tmp_path / name for name in ("llama", "llama-6")]
    for model in models:
        compressknow.probe(place / model.name, model, f"facts:{place / 'facts.jsonl'}", limit=40)
    first, second = (
        gather_early(*models, evaluation(place, tmp_path / "early", seed=seed), lambda *_: "enough")[0]
        for seed in (0, 5)
    )
    assert len(first.answers) == len(second.answers)
    assert {answer.fact_id for answer in first.answers} != {answer.fact_id for answer in second.answers}


def test_the_time_of_stored_answers_counts_once(place: Path, tmp_path: Path) -> None:
    probe = f"facts:{place / 'facts.jsonl'}"
    for name in ("llama", "llama-6"):
        record = compressknow.probe(place / name, tmp_path / name, probe).record
        slow = {name: replace(entry, seconds=60.0) for name, entry in record.probes.items()}
        write_record(tmp_path / name, replace(record, probes=slow))
    models = (tmp_path / "llama", tmp_path / "llama-6")
    *sides, _ = gather_early(*models, evaluation(place, tmp_path / "early"), after(len(KNOWN_FACTS) + 1))
    assert [entry.seconds for side in sides for entry in side.record.probes.values()] == [60.0, 60.0]


@pytest.mark.parametrize("stored", [0, 1], ids=["original", "compressed"])
def test_answers_to_other_facts_are_refused(place: Path, tmp_path: Path, stored: int) -> None:
    models = [place / "llama", place / "llama-6"]
    compressknow.probe(models[stored], tmp_path / "stored", f"facts:{place / 'facts.jsonl'}", options=Options(limit=20))
    name, models[stored] = models[stored].name, tmp_path / "stored"
    with pytest.raises(UsageError, match=f"{name} was evaluated on other facts or prompts"):
        gather_early(*models, evaluation(place, tmp_path / "kept", limit=30), after(FIRST))


def test_tasks_are_refused(place: Path, tmp_path: Path) -> None:
    tasks = replace(evaluation(place, tmp_path), probes=["lm-eval:boolq"])
    with pytest.raises(UsageError, match="--early cannot stop lm-eval:boolq"):
        gather_early(place / "llama", place / "llama-6", tasks, after(FIRST))
