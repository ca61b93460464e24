"""Facts in several wordings: each is evaluated separately, and a fact is known if most of its wordings are right."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import compressknow
from compressknow import Options
from compressknow.base.errors import UsageError
from compressknow.base.format import share, write_percent
from compressknow.cli import main
from compressknow.comparison.distributions import compare_wordings, measure_consistency
from compressknow.evaluate.evaluate import put_after_example
from compressknow.evaluate.facts import Probe, strip_wording
from compressknow.evaluate.grades import DEMOTED, GONE, PRODUCED, RECOGNIZED, merge_wordings
from compressknow.evaluate.sources import open_all
from tests.evaluate.layouts import open_probe
from tests.knowing import save_trained, write_bear
from tests.pages.answering import make_answer, make_answers, make_entry

N = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bear(tmp_path_factory.mktemp("bear"))


@pytest.fixture(scope="module")
def study(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that knows the first wording and the same model pruned, evaluated on three wordings, and their report."""
    folder = tmp_path_factory.mktemp("wordings")
    compressknow.convert(save_trained("llama", folder / "original"), folder / "pruned", scope="overall", prune=0.5)
    options = Options(data=data, templates=N)
    compressknow.probe(folder / "original", folder / "before", "bear", options=options)
    compressknow.probe(folder / "pruned", folder / "after", "bear", options=options, reference=folder / "before")
    outputs = [folder / f"report.{suffix}" for suffix in ("json", "html", "md")]
    compressknow.report(folder / "before", folder / "after", output=outputs)
    return folder


def read_rows(study: Path, side: str) -> list[dict]:
    return pq.read_table(study / side / "answers.parquet").to_pylist()


def find_known_by_majority(study: Path, side: str) -> dict[str, bool]:
    """Return, by fact, whether more than half of its wordings are right."""
    right: dict[str, int] = {}
    for row in read_rows(study, side):
        right[strip_wording(row["fact_id"])] = right.get(strip_wording(row["fact_id"]), 0) + row["correct"]
    return {fact: 2 * number > N for fact, number in right.items()}


def test_each_wording_is_answered_as_if_it_were_the_only_one(study: Path, data: Path, tmp_path: Path) -> None:
    for number in range(1, N + 1):
        single = compressknow.probe(
            study / "original", tmp_path / str(number), "bear", options=Options(data=data, template=number)
        )
        by_id = {row["fact_id"]: row for row in read_rows(study, "before") if row["template"] == number}
        assert len(by_id) == len(single.answers) == 32
        for expected in single.answers:
            row = by_id[f"{expected.fact_id}@{number}"]
            assert [row[key] for key in ("prompt", "gold", "predicted", "correct", "rank", "grade")] == [
                getattr(expected, key) for key in ("prompt", "gold", "predicted", "correct", "rank", "grade")
            ]


def test_the_report_counts_facts_by_majority_and_each_wording_separately(study: Path) -> None:
    (probe,) = json.loads((study / "report.json").read_text())["compressed"][0]["probes"].values()
    before, after = find_known_by_majority(study, "before"), find_known_by_majority(study, "after")
    assert probe["n"] == probe["facts_read"] == 32
    assert probe["both"] == sum(before[fact] and after[fact] for fact in before)
    assert probe["lost"] == sum(before[fact] and not after[fact] for fact in before)
    # The wordings do not agree; otherwise the test would show nothing.
    assert probe["both"] + probe["lost"] < 32

    assert list(probe["by_template"]) == ["1", "2", "3"]
    pairs = list(zip(read_rows(study, "before"), read_rows(study, "after"), strict=True))
    for number, figures in probe["by_template"].items():
        results = [(one["correct"], other["correct"]) for one, other in pairs if one["template"] == int(number)]
        assert figures["n"] == len(results) == 32
        assert figures["both"] == results.count((True, True))
        assert figures["lost"] == results.count((True, False))
        assert figures["kept"] == figures["both"] / (figures["both"] + figures["lost"])
    assert probe["by_template"]["1"]["both"] + probe["by_template"]["1"]["lost"] == 32


@pytest.mark.parametrize(("side", "name"), [("before", "original"), ("after", "compressed")])
def test_consistency_is_the_share_of_pairs_of_wordings_answered_alike(study: Path, side: str, name: str) -> None:
    (probe,) = json.loads((study / "report.json").read_text())["compressed"][0]["probes"].values()
    answers: dict[str, list[str]] = {}
    for row in read_rows(study, side):
        answers.setdefault(strip_wording(row["fact_id"]), []).append(row["predicted"])
    shares = [sum(a == b for a, b in combinations(texts, 2)) / 3 for texts in answers.values()]
    assert probe[f"consistency_{name}"] == pytest.approx(sum(shares) / len(shares))


def test_page_and_markdown_have_a_row_per_wording(study: Path) -> None:
    for suffix in ("html", "md"):
        text = (study / f"report.{suffix}").read_text()
        assert "By wording" in text
        assert "Consistency, the share of pairs of wordings" in text
        assert "majority" in text
    (probe,) = json.loads((study / "report.json").read_text())["compressed"][0]["probes"].values()
    for name, counts in {**probe["by_template"], "majority": probe}.items():
        known = [counts["both"] + counts[side] for side in ("lost", "gained")]
        shares = " | ".join(write_percent(each, counts["n"]) for each in known)
        assert f"| {name} | {counts['n']} | {shares} | {counts['lost']} | {counts['gained']} | " in text
    before, after = (share(probe[f"consistency_{side}"]) for side in ("original", "compressed"))
    assert f": {before} before, {after} after." in text


def test_a_sample_has_all_wordings_of_its_facts() -> None:
    probe = open_probe("atlas", Options(templates=3, limit=70))
    single = [open_probe("atlas", Options(template=number, limit=70)) for number in (1, 2, 3)]
    assert len(probe.facts) == 3 * len(single[0].facts)
    for number, wording in enumerate(single, 1):
        prompts = [fact.prompt for fact in probe.facts if fact.template == number]
        assert prompts == [fact.prompt for fact in wording.facts]
    assert len({fact.id for fact in probe.facts}) == len(probe.facts)
    assert probe.read == 3 * single[0].read
    assert probe.limit == 70


def test_an_example_has_the_wording_of_the_fact() -> None:
    probe = open_probe("atlas", Options(templates=2, limit=70))
    second = next(fact for fact in probe.facts if fact.relation == "capital" and fact.template == 2)
    shown = put_after_example(second, probe)
    assert shown is not None
    assert shown.prompt.startswith("The capital city of China is called Beijing. The capital city of ")


def test_a_probe_of_one_wording_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "The capital of France is [MASK].", "obj_label": "Paris"}', encoding="utf-8")
    with pytest.raises(UsageError, match="one wording per fact") as caught:
        open_all([f"facts:{facts}"], Options(templates=3))
    assert "atlas or bear" in str(caught.value.hint)
    assert main(["probe", "nowhere", "-p", f"facts:{facts}", "--templates", "3", "-o", str(tmp_path / "out")]) == 2
    assert "one wording per fact" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_many_wordings_and_both_options_are_refused() -> None:
    with pytest.raises(UsageError, match="no template 4"):
        open_probe("atlas", Options(templates=4))
    with pytest.raises(UsageError, match="cannot be combined"):
        open_probe("atlas", Options(templates=2, template=2))


def test_one_wording_is_the_probe_itself() -> None:
    probe = open_probe("atlas", Options(templates=1))
    assert isinstance(probe, Probe)
    assert probe.fingerprint() == open_probe("atlas").fingerprint()
    assert merge_wordings(make_answers([make_answer(0, True)])) == make_answers([make_answer(0, True)])
    assert compare_wordings([make_answer(0, True)], [make_answer(0, True)]) == {}


@pytest.mark.parametrize(
    ("right", "ranks", "known", "rank"),
    [
        ((True, True, False), (1, 1, 9), True, 1),
        ((True, False, False), (1, 4, 2), False, 2),
        ((True, True), (1, 1), True, 1),
        # Half is not a majority, and the rank is the worse of the middle two.
        ((True, False), (1, 3), False, 3),
        ((False, False, False), (2, None, None), False, None),
    ],
)
def test_a_fact_is_known_if_most_of_its_wordings_are_right(
    right: tuple[bool, ...], ranks: tuple[int | None, ...], known: bool, rank: int | None
) -> None:
    wordings = [
        make_answer(0, each, fact_id=f"fact@{number}", template=number, rank=position)
        for number, (each, position) in enumerate(zip(right, ranks, strict=True), 1)
    ]
    probes = {"atlas": make_entry(facts=len(wordings), asked=len(wordings), templates=len(wordings))}
    (merged,) = merge_wordings(make_answers(wordings, probes=probes)).answers
    assert (merged.fact_id, merged.correct, merged.rank, merged.template) == ("fact", known, rank, None)
    # Otherwise a fact could be lost although its answer is unchanged.
    assert (merged.predicted == merged.gold) is known


@pytest.mark.parametrize(
    ("grades", "shown", "grade", "recovers"),
    [
        # The majority of the wordings after an example; in a tie, the wrong answer.
        ((GONE, DEMOTED, DEMOTED), ("Paris", "Oslo", "Paris"), DEMOTED, True),
        ((GONE, GONE, DEMOTED), ("Paris", "Oslo", "Oslo"), GONE, False),
        ((DEMOTED, GONE), ("Paris", "Oslo"), GONE, False),
        # The middle grade; known wordings get no example.
        ((RECOGNIZED, PRODUCED, GONE), (None, None, "Paris"), RECOGNIZED, True),
        ((PRODUCED, PRODUCED, RECOGNIZED), (None, None, None), PRODUCED, None),
        ((PRODUCED, None, RECOGNIZED), (None, None, None), None, None),
    ],
)
def test_a_fact_has_the_middle_grade_and_the_majority_after_an_example(
    grades: tuple[str | None, ...], shown: tuple[str | None, ...], grade: str | None, recovers: bool | None
) -> None:
    wordings = [
        make_answer(0, False, fact_id=f"fact@{number}", template=number, grade=each, with_example=text)
        for number, (each, text) in enumerate(zip(grades, shown, strict=True), 1)
    ]
    probes = {"atlas": make_entry(facts=len(wordings), asked=len(wordings), templates=len(wordings))}
    (merged,) = merge_wordings(make_answers(wordings, probes=probes)).answers
    assert merged.grade == grade
    assert (None if merged.with_example is None else merged.with_example == merged.gold) is recovers


def test_a_fact_has_the_mean_log_probability_and_divergence_of_its_wordings() -> None:
    wordings = [
        make_answer(0, n > 1, fact_id=f"fact@{n}", template=n, logp_gold=-1.0 * n, first_kl=n / 10, total_logp=-n / 4)
        for n in (1, 2, 3)
    ]
    probes = {"atlas": make_entry(facts=3, asked=3, templates=3)}
    (merged,) = merge_wordings(make_answers(wordings, probes=probes)).answers
    assert (merged.logp_gold, merged.first_kl) == pytest.approx((-2, 0.2))
    # The confidence is that of the wording whose answer is taken.
    assert merged.total_logp == -0.5
    wordings[2] = replace(wordings[2], first_kl=None)
    assert merge_wordings(make_answers(wordings, probes=probes)).answers[0].first_kl is None


def test_consistency_of_equal_different_and_single_wordings() -> None:
    assert measure_consistency([make_answer(0, True, fact_id=f"fact@{n}") for n in (1, 2)]) == 1
    assert measure_consistency([make_answer(0, n == 1, fact_id=f"fact@{n}") for n in (1, 2)]) == 0
    assert measure_consistency([make_answer(0, True)]) is None
    # One pair of one fact is equal, and one of three of another, for which more wordings could be used.
    ids = [("a@1", True), ("a@2", True), ("b@1", True), ("b@2", True), ("b@3", False)]
    answers = [make_answer(0, right, fact_id=name) for name, right in ids]
    assert measure_consistency(answers) == pytest.approx((1 + 1 / 3) / 2)
