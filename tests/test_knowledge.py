"""Reports on conversions of tiny models that know 64 facts, made with the command line."""

from __future__ import annotations

import html
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from compressknow.cli import main
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.long import one_in
from tests.pages.pages import parse_html

FAMILIES = ("bert", "llama", "t5")
SETUPS = {
    "p20": ["--prune", "0.2"],
    "p50": ["--prune", "0.5"],
    "p80": ["--prune", "0.8"],
    "int8": ["--quantize", "int8"],
}


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module", params=one_in(3, FAMILIES))
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the original, four conversions of it, the answers of all, and the report on them."""
    folder = tmp_path_factory.mktemp(request.param)
    original = save_trained(request.param, folder / "original")
    facts = write_facts(folder / "facts.jsonl")
    run("probe", original, "-p", f"facts:{facts}", "-o", folder / "answers-original")
    for name, options in SETUPS.items():
        run("convert", original, folder / name, *options)
        reference = ["--reference", folder / "answers-original"]
        run("probe", folder / name, "-p", f"facts:{facts}", "-o", folder / f"answers-{name}", *reference)
    answers = [folder / f"answers-{name}" for name in SETUPS]
    outputs = [word for suffix in ("html", "md", "json") for word in ("-o", folder / f"report.{suffix}")]
    run("report", folder / "answers-original", *answers, *outputs)
    return folder


def figures(study: Path) -> dict[str, dict[str, object]]:
    """Return the report's figures of each conversion."""
    compressed = json.loads((study / "report.json").read_text())["compressed"]
    return {name: next(iter(entry["probes"].values())) for name, entry in zip(SETUPS, compressed, strict=True)}


def read_correct(folder: Path) -> dict[str, bool]:
    """Return which facts the stored answers have right."""
    table = pq.read_table(folder / "answers.parquet").to_pylist()
    return {row["fact_id"]: row["predicted"] == row["gold"] for row in table}


def test_original_knows_all_facts(study: Path) -> None:
    assert sum(read_correct(study / "answers-original").values()) == len(KNOWN_FACTS)


def test_knowledge_falls_as_pruning_rises(study: Path) -> None:
    kept = {name: figure["kept"] for name, figure in figures(study).items()}

    assert kept["p20"] >= 0.95
    assert kept["p20"] >= kept["p50"] > kept["p80"]
    assert kept["p80"] < 0.5
    assert kept["int8"] >= 0.95


def test_divergence_grows_with_pruning(study: Path) -> None:
    moved = {name: figure["kl_mean"] for name, figure in figures(study).items()}

    assert 0 < moved["p20"] < moved["p50"] < moved["p80"]
    assert 0 < moved["int8"] < moved["p50"]


@pytest.mark.parametrize("name", SETUPS)
def test_report_counts_match_the_stored_answers(study: Path, name: str) -> None:
    before, after = read_correct(study / "answers-original"), read_correct(study / f"answers-{name}")
    cells = Counter((before[fact], after[fact]) for fact in before)
    figure = figures(study)[name]

    counted = [cells[True, True], cells[True, False], cells[False, True], cells[False, False]]
    assert [figure[key] for key in ("both", "lost", "gained", "neither")] == counted
    assert figure["kept"] == counted[0] / (counted[0] + counted[1])
    assert figure["accuracy_compressed"] == sum(after.values()) / len(after)


@pytest.mark.parametrize("name", SETUPS)
def test_report_grades_match_the_stored_answers(study: Path, name: str) -> None:
    before, after = (pq.read_table(study / f"answers-{side}" / "answers.parquet") for side in ("original", name))
    grades = {row["fact_id"]: row["grade"] for row in before.to_pylist()}
    moved = Counter(f"{grades[row['fact_id']]}>{row['grade']}" for row in after.to_pylist())
    figure = figures(study)[name]
    knowing = figure["knowing"]

    assert {move: facts for move, facts in knowing["moved"].items() if facts} == moved
    assert knowing["original"]["produced"] == len(KNOWN_FACTS)
    known = knowing["compressed"]["produced"] + knowing["compressed"]["recognized"]
    assert known == figure["both"] + figure["gained"]
    for fact in json.loads((study / "report.json").read_text())["compressed"][list(SETUPS).index(name)]["lost_facts"]:
        assert fact["grade_before"] == "produced"
        assert fact["grade_after"] in ("demoted", "gone")
        assert fact["with_example"] in (True, False)
        assert not (fact["with_example"] and fact["grade_after"] == "gone")
    assert knowing["with_example"]["n"] == figure["lost"]


def test_pages_show_grades_and_facts_that_an_example_brings_back(study: Path, tmp_path: Path) -> None:
    outputs = [word for suffix in ("html", "md") for word in ("-o", tmp_path / f"report.{suffix}")]
    run("report", study / "answers-original", study / "answers-p80", *outputs)
    back = figures(study)["p80"]["knowing"]["with_example"]
    for suffix in ("html", "md"):
        text = html.unescape((tmp_path / f"report.{suffix}").read_text())
        assert "Grades of knowing" in text
        assert f"brings back {back['produced']} (" in text
        assert f") of {back['n']} lost facts" in text
        assert text.count(", comes back with one example") == back["produced"]


def test_known_may_mean_produced(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    run("report", study / "answers-original", study / "answers-p50", "--known", "produced", "-o", path)
    report = json.loads(path.read_text())
    (figure,) = report["compressed"][0]["probes"].values()

    assert report["known"] == "produced"
    assert figure["both"] == figures(study)["p50"]["knowing"]["moved"]["produced>produced"]
    assert figure["chance"] is None
    assert "Known means produced here" in capsys.readouterr().out


def test_verdict_has_the_counts(study: Path) -> None:
    for entry in json.loads((study / "report.json").read_text())["compressed"]:
        figure = next(iter(entry["probes"].values()))
        known, kept = figure["both"] + figure["lost"], figure["both"]
        assert f"{kept} of {known} facts" in entry["verdict"]


def test_html_and_markdown_have_the_same_verdict(study: Path) -> None:
    page, text = parse_html((study / "report.html").read_text()).text, (study / "report.md").read_text()

    for entry in json.loads((study / "report.json").read_text())["compressed"]:
        assert entry["verdict"] in page
        assert entry["verdict"].replace("_", r"\_").replace("<", "&lt;") in text


def test_gate_fails_only_models_that_keep_too_little(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, good, bad = (study / f"answers-{name}" for name in ("original", "p20", "p80"))

    assert main(["report", str(original), str(good), "--fail-under", "0.9"]) == 0
    assert main(["report", str(original), str(bad), "--fail-under", "0.9"]) == 3
    assert "Less than 90 % of the knowledge is kept" in capsys.readouterr().err


def test_no_facts_leaves_facts_out_of_all_outputs(study: Path, tmp_path: Path) -> None:
    run("report", study / "answers-original", study / "answers-p80", "--no-facts", "-o", tmp_path / "report.html",
        "-o", tmp_path / "report.md", "-o", tmp_path / "report.json")  # fmt: skip

    for suffix in ("html", "md", "json"):
        text = (tmp_path / f"report.{suffix}").read_text()
        assert not [fact for fact in KNOWN_FACTS if fact.sub_label in text and len(fact.sub_label) > 4]
        assert "Velin" not in text
