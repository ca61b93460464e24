"""The noise floor: a model against itself in another precision, measured once and stored with its answers."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from compressknow import Options, Settings, probe, report
from compressknow.comparison.distributions import compute_kl
from compressknow.comparison.records import Counts
from compressknow.engine.identity import locate
from compressknow.evaluate import noise
from compressknow.evaluate.answers import Answer, Answers, read_answers
from compressknow.evaluate.facts import Fact, Probe, strip_wording
from compressknow.evaluate.grades import apply_reading, merge_wordings
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.records import NoiseFloor
from compressknow.evaluate.sources import open_all
from compressknow.pages.card.warnings import compare_with_rounding
from tests.knowing import save_trained, write_bear, write_facts
from tests.pages.answering import compare_rows, make_answer, make_answers, make_rows

BF16 = Settings(dtype="bfloat16", noise_floor=False)


def get_floor(answers: Answers) -> NoiseFloor:
    (entry,) = answers.record.probes.values()
    assert entry.noise_floor is not None
    return entry.noise_floor


@pytest.fixture(scope="module", params=["bert", "llama", "t5"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Answers]:
    """Answers of a model with its noise floor, and those of a separate run in the other precision."""
    folder = tmp_path_factory.mktemp(request.param)
    model, facts = save_trained(request.param, folder / "model"), f"facts:{write_facts(folder / 'facts.jsonl')}"
    original = probe(model, folder / "a", facts)
    return original, probe(model, folder / "b", facts, reference=folder / "a", settings=BF16)


def test_noise_floor_is_that_of_a_separate_run_in_the_other_precision(runs: tuple[Answers, Answers]) -> None:
    before, after = ({answer.fact_id: answer for answer in answers.answers} for answers in runs)
    floor = get_floor(runs[0])
    assert floor.computed_in == "bfloat16"
    assert floor.n == len(before)
    assert floor.changed == sum(before[fact].predicted != after[fact].predicted for fact in before)
    assert floor.known == sum(answer.correct for answer in before.values())
    assert floor.lost == sum(before[fact].correct and not after[fact].correct for fact in before)
    assert floor.kl_mean is not None
    # The vocabulary is so small that answers store the whole distribution.
    divergences = [float(compute_kl(before[fact].first_logp, after[fact].first_logp)) for fact in before]
    assert floor.kl_mean == pytest.approx(sum(divergences) / len(divergences), rel=1e-2, abs=1e-6)
    assert floor.kl_mean > 0


def test_noise_floor_counts_facts_that_are_lost_and_gained() -> None:
    kl = [0.1, 0.3] * 5
    before, after = make_rows(both=4, lost=3, gained=1, neither=2)
    after[9] = replace(after[9], predicted="Bern")
    after = [replace(answer, first_kl=value) for answer, value in zip(after, kl, strict=True)]
    before, after = ([replace(answer, produced=answer.predicted) for answer in side] for side in (before, after))

    def count(after: list[Answer]) -> NoiseFloor:
        return noise._count_noise(make_answers(before), make_answers(after), "bfloat16")

    floor = count(after)
    assert (floor.n, floor.changed, floor.known, floor.lost, floor.gained) == (10, 5, 7, 3, 1)
    assert floor.kl_mean == pytest.approx(0.2)
    # No mean of some of the facts.
    assert count([replace(after[0], first_kl=None), *after[1:]]).kl_mean is None
    assert count([replace(after[0], first_kl=math.nan), *after[1:]]).kl_mean is None


def test_noise_floor_of_a_model_in_its_stored_precision_is_in_another_one(tmp_path: Path) -> None:
    model, facts = save_trained("llama", tmp_path / "model"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    # "auto" is float32 here.
    for dtype, other in (("auto", "bfloat16"), ("bfloat16", "float32")):
        floor = get_floor(probe(model, tmp_path / dtype, facts, settings=Settings(dtype=dtype)))
        assert floor.computed_in == other


def test_noise_floor_of_known_as_produced_counts_generated_answers(runs: tuple[Answers, Answers]) -> None:
    before, after = ({answer.fact_id: answer for answer in answers.answers} for answers in runs)
    floor = get_floor(apply_reading(runs[0], "produced"))
    assert floor.n == len(before)
    assert floor.changed == sum(before[fact].produced != after[fact].produced for fact in before)
    assert floor.known == sum(answer.grade == "produced" for answer in before.values()) > 0
    assert floor.lost == sum(before[id].grade == "produced" != after[id].grade for id in before)
    assert floor.gained == sum(after[id].grade == "produced" != before[id].grade for id in before)
    assert floor.kl_mean == get_floor(runs[0]).kl_mean


def test_noise_floor_of_several_wordings_counts_majorities(tmp_path: Path) -> None:
    model, options = save_trained("llama", tmp_path / "model"), Options(data=write_bear(tmp_path / "data"), templates=3)
    first = probe(model, tmp_path / "a", "bear", options=options)
    second = probe(model, tmp_path / "b", "bear", options=options, reference=tmp_path / "a", settings=BF16)
    for known in ("recognized", "produced"):
        before, after = (find_known_by_majority(apply_reading(answers, known)) for answers in (first, second))
        floor = get_floor(merge_wordings(apply_reading(first, known)))
        assert (floor.n, floor.known) == (32, sum(before.values()))
        assert 0 < floor.known < 32
        assert floor.lost == sum(before[fact] > after[fact] for fact in before)
        assert floor.gained == sum(before[fact] < after[fact] for fact in before)
        card = report(tmp_path / "a", tmp_path / "b", known=known)
        (figures,) = card.comparisons[0].probes
        assert figures.noise_floor == floor
        assert figures.answer_changed == pytest.approx(floor.changed / floor.n)


def find_known_by_majority(answers: Answers) -> dict[str, bool]:
    right = Counter(strip_wording(answer.fact_id) for answer in answers.answers if answer.correct)
    return {strip_wording(answer.fact_id): right[strip_wording(answer.fact_id)] >= 2 for answer in answers.answers}


def test_noise_floor_of_a_sample_has_all_wordings_of_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = save_trained("llama", tmp_path / "model"), Options(data=write_bear(tmp_path / "data"), templates=3)
    monkeypatch.setattr(noise, "LEAST_FACTS", 3)
    monkeypatch.setattr(noise, "PART", 0.0)
    answers = probe(model, tmp_path / "a", "bear", options=options)
    (bear,) = open_all(["bear"], options)
    _, sample = noise._draw_sample(bear, answers)
    wordings = Counter(strip_wording(answer.fact_id) for answer in sample.answers)
    assert list(wordings.values()) == [3, 3, 3]
    # Such ids of the user's own are those of different facts.
    assert len(noise._draw_sample(replace(bear, templates=None), answers)[1].answers) == 3
    assert get_floor(answers).n == 3


def test_noise_floor_is_stored_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = save_trained("llama", tmp_path / "model"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    first = get_floor(probe(model, tmp_path / "a", facts))
    assert get_floor(read_answers(tmp_path / "a")) == first
    monkeypatch.setattr(ModelHandle, "copy_in_other_precision", pytest.fail)
    assert get_floor(probe(model, tmp_path / "a", facts)) == first


def test_noise_floor_of_a_large_probe_is_of_a_fixed_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = save_trained("llama", tmp_path / "model"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    monkeypatch.setattr(noise, "MOST_FACTS", 3)
    first, second = (get_floor(probe(model, tmp_path / name, facts)) for name in "ab")
    assert first.n == 3
    assert first == second


@pytest.mark.parametrize(("facts", "drawn"), [(60, 60), (500, 100), (2_000, 200), (5_000, 300)])
def test_noise_floor_is_of_a_tenth_of_the_facts_within_limits(facts: int, drawn: int) -> None:
    rows = [make_answer(number, correct=True) for number in range(facts)]
    answered = [
        Fact(row.fact_id, row.probe, row.relation, row.subject, row.sub_label, row.gold, row.prompt) for row in rows
    ]
    others = [replace(fact, id=f"{fact.id}-dropped") for fact in answered[:50]]
    sample, known = noise._draw_sample(Probe("atlas", "atlas/1", (*others, *answered)), make_answers(rows))
    ids = [fact.id for fact in sample.facts]
    assert ids == [answer.fact_id for answer in known.answers] == sorted(ids)
    assert len(ids) == drawn
    # Not the first ones, which are of one relation.
    assert drawn == facts or ids[-1] > f"fact-{drawn:04}"


def test_noise_floor_of_a_sample_is_not_stored_with_answers_to_another_one(tmp_path: Path) -> None:
    model, facts = save_trained("llama", tmp_path / "model"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    samples = [Options(limit=limit) for limit in (10, 30)]
    # The second run replaces the answers before the first one measures.
    runs = [
        probe(model, tmp_path / "a", facts, options=options, settings=Settings(noise_floor=False), overwrite=True)
        for options in samples
    ]
    floors = noise.NoiseFloors(ModelHandle(locate(model), Settings()), tmp_path / "a", None)
    assert get_floor(floors.add_precision(open_all([facts], samples[0]), runs[0])).n == 10
    assert read_answers(tmp_path / "a").record.probes == runs[1].record.probes


def test_noise_floor_is_optional_and_not_measured_for_compressed_models(tmp_path: Path) -> None:
    model, facts = save_trained("llama", tmp_path / "model"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    probe(model, tmp_path / "a", facts, settings=Settings(noise_floor=False))
    compressed = probe(model, tmp_path / "b", facts, reference=tmp_path / "a")
    for answers in (read_answers(tmp_path / "a"), compressed):
        assert [entry.noise_floor for entry in answers.record.probes.values()] == [None]


def test_every_format_of_the_card_shows_the_noise_floor(tmp_path: Path) -> None:
    model, facts = save_trained("llama", tmp_path / "model"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    outputs = [tmp_path / f"card.{kind}" for kind in ("json", "md", "html")]
    # Stored answers get one, too, although this run does not compute the original's distributions for other models.
    report(model, model, facts, answers=tmp_path / "kept", settings=Settings(noise_floor=False))
    card = report(model, model, facts, output=outputs, answers=tmp_path / "kept")
    (measured,) = json.loads(outputs[0].read_text(encoding="utf-8"))["compressed"][0]["probes"].values()
    assert measured["noise_floor"]["n"] == measured["n"]
    assert measured["noise_floor"]["kl_mean"] > 0
    assert "rounding alone" in card.verdict
    for page in outputs[1:]:
        assert "Top answer changed by rounding alone" in page.read_text(encoding="utf-8")


def test_the_verdict_compares_changes_with_the_noise_floor() -> None:
    figures = replace(compare_rows(*make_rows(80, 20)), answer_changed=0.25)
    few, many = (NoiseFloor(200, changed, 100, 1, 0, 0.001, "bfloat16") for changed in (4, 60))
    assert compare_with_rounding([replace(figures, noise_floor=None)]) == ""
    text = compare_with_rounding([replace(figures, noise_floor=few)])
    assert text == " Of its answers, 25.0 % differ; rounding alone changes 2.0 % (0.8 to 5.0 %)."
    text = compare_with_rounding([replace(figures, noise_floor=many, answer_changed=0.33)])
    assert text.endswith("; rounding alone changes 30.0 % (24.1 to 36.7 %), which could be all of it.")
    text = compare_with_rounding([replace(figures, noise_floor=few, runtime_noise_floor=replace(few, changed=7))])
    assert text.endswith("changes 2.0 % (0.8 to 5.0 %); the runtime alone changes 3.5 % (1.7 to 7.0 %).")
    text = compare_with_rounding([replace(figures, noise_floor=few, runtime_noise_floor=many)])
    assert text.endswith("the runtime alone changes 30.0 % (24.1 to 36.7 %), which could be all of it.")
    # Only the part whose interval allows it could be all of it, whatever the order.
    text = compare_with_rounding([replace(figures, noise_floor=many, runtime_noise_floor=few)])
    rounding = "rounding alone changes 30.0 % (24.1 to 36.7 %), which could be all of it"
    assert text.endswith(f"; {rounding}; the runtime alone changes 2.0 % (0.8 to 5.0 %).")
    text = compare_with_rounding([replace(figures, answer_changed=0.0, noise_floor=few)])
    assert text == " Of its answers, 0 % differ; rounding alone changes 2.0 % (0.8 to 5.0 %)."
    text = compare_with_rounding([replace(figures, noise_floor=None, runtime_noise_floor=few)])
    assert text.endswith("; the runtime alone changes 2.0 % (0.8 to 5.0 %).")
    # A probe of 4,000 facts, of which rounding changes none of 200, outweighs one of 100.
    large = replace(figures, counts=Counts(3500, 500), answer_changed=0.05, noise_floor=replace(few, changed=0))
    text = compare_with_rounding([large, replace(figures, noise_floor=many)])
    assert text == " Of its answers, 5.5 % differ; rounding alone changes 0.7 % (0.6 to 2.6 %)."
