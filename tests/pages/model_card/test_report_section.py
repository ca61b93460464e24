"""The report in the model card of a checkpoint: the Hub reads it, and the text of the author is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt

from compressknow.base.errors import OutputError
from compressknow.cli import main
from compressknow.pages.card.make import make_card
from compressknow.pages.model_card import BEGIN, END, check_model_cards, write_into_model_cards
from compressknow.pages.pages import escape_markdown
from compressknow.pages.records import Card
from tests.knowing import save_trained, write_facts
from tests.pages.answering import make_answers, make_entry, make_model, make_rows, make_runs
from tests.pages.hostile import HOSTILE_TEXTS, number_texts

NOT_MEASURED = "has not been measured here"


def make_card_of_counts(**counts: int) -> Card:
    original, compressed = make_runs(make_rows(**counts))
    return make_card(original, [compressed])


@pytest.fixture
def card() -> Card:
    """A report on a model that keeps 90 of 100 facts."""
    return make_card_of_counts(both=90, lost=10, gained=4, neither=16)


@pytest.fixture
def worse() -> Card:
    return make_card_of_counts(both=30, lost=70, neither=20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def write(card: Card, folder: Path, text: str | None = None) -> str:
    """Write the report into the model card of a folder, and return the card."""
    if text is not None:
        (folder / "README.md").write_text(text, encoding="utf-8")
    write_into_model_cards(card, [folder])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json"]
    return (folder / "README.md").read_text(encoding="utf-8")


def read_results(folder: Path) -> dict[tuple[str, str], float]:
    """Return the results that huggingface_hub reads: (data set, metric) -> value."""
    results = ModelCard.load(folder / "README.md").data.eval_results
    return {(result.dataset_name, result.metric_type): result.metric_value for result in results}


def test_report_is_written_into_the_card_of_a_converted_checkpoint(tmp_path: Path) -> None:
    original, converted = save_trained("llama", tmp_path / "original"), tmp_path / "converted"
    facts = write_facts(tmp_path / "facts.jsonl")
    assert main(["convert", str(original), str(converted), "--prune", "0.7", "--quantize", "int8"]) == 0
    card = converted / "README.md"
    before = card.read_text()
    assert NOT_MEASURED in before

    command = ["report", original, converted, "-p", f"facts:{facts}", "--answers", tmp_path / "answers"]
    # A gate that is not met is an error only after everything is written.
    gated = [*map(str, command), "--into-model-card", "--fail-under", "1"]
    assert main(gated) == 3
    once = card.read_text()
    assert main(gated) == 3

    assert card.read_text() == once
    assert NOT_MEASURED not in once
    assert "| domain | known before | kept | grade |" in once
    for line in before.splitlines():
        assert line in once or NOT_MEASURED in line
    values = read_results(converted)
    assert 0 < values["facts:facts.jsonl", "knowledge-kept"] < 1
    assert values["facts:facts.jsonl", "accuracy"] == values["facts:facts.jsonl", "knowledge-kept"]
    data = ModelCard.load(card).data
    assert data.model_name == "converted"
    assert {"compressknow", "pruning", "int8"} <= set(data.tags)
    assert main(["verify", str(converted)]) == 0


def test_hub_reads_the_figures(card: Card, folder: Path) -> None:
    write(card, folder, "# A model\n")
    assert read_results(folder) == {("atlas", "accuracy"): 94 / 120, ("atlas", "knowledge-kept"): 0.9}
    first: EvalResult = ModelCard.load(folder / "README.md").data.eval_results[0]
    assert (first.task_type, first.dataset_type) == ("fill-mask", "atlas")


def test_hub_reads_the_macro_average_if_the_protocol_uses_it(folder: Path) -> None:
    """The mean over relations: 40 of 40 and 0 of 10 answers are right."""
    rows = make_rows(both=40, neither=10)
    before, after = ([replace(row, relation="a" if row.correct else "b") for row in side] for side in rows)
    probes = {"atlas": make_entry(average="macro")}
    original = make_answers(before, probes=probes)
    compressed = make_answers(after, make_model(sha256="b" * 64), probes)
    text = write(make_card(original, [compressed]), folder)
    assert read_results(folder)["atlas", "accuracy"] == 0.5
    assert "name: accuracy, mean over relations" in text


def test_verdict_grades_and_probes_are_in_the_text(card: Card, folder: Path) -> None:
    text = write(card, folder)
    assert escape_markdown(card.verdict) in text
    assert "| geography | 100 | 90.0 % (82.6 to 94.5 %) | C (B to D) |" in text
    assert "| atlas | 120 | " in text
    assert MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1]).count("<table>") == 2


def test_warnings_that_models_share_are_in_the_card_of_each(tmp_path: Path) -> None:
    original, facts = save_trained("llama", tmp_path / "original"), write_facts(tmp_path / "facts.jsonl")
    models = [tmp_path / name for name in ("pruned", "quantized")]
    for model, options in zip(models, (["--prune", "0.7"], ["--quantize", "int8"]), strict=True):
        assert main(["convert", str(original), str(model), *options]) == 0
    command = ["report", original, *models, "-p", f"facts:{facts}", "--known", "produced", "--into-model-card"]
    assert main([*map(str, command), "--no-noise-floor"]) == 0
    for model in models:
        text = (model / "README.md").read_text(encoding="utf-8")
        assert text.count("- Known means produced here") == text.count("- The original knew only ") == 1


def test_report_on_a_text_has_neither_tables_nor_results(folder: Path, tmp_path: Path) -> None:
    original, text = save_trained("llama", tmp_path / "original"), tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. " * 400, encoding="utf-8")
    shutil.copytree(original, folder, dirs_exist_ok=True)
    assert main(["report", str(original), str(folder), "-p", f"text:{text}", "--into-model-card"]) == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith(f"{BEGIN}\n## What it still knows\n\nOn text:text.txt, its perplexity is ")
    assert "| --- |" not in card
    assert "model-index" not in card


def test_later_report_replaces_the_earlier_one(card: Card, worse: Card, folder: Path) -> None:
    text = "---\nlicense: mit\n---\n\n# A model\n\nBefore.\n"
    first = write(card, folder, text)
    (folder / "README.md").write_text(f"{first}\nAfter.\n")
    second = write(worse, folder)
    assert second.count(BEGIN) == second.count(END) == 1
    assert escape_markdown(card.verdict) not in second
    assert escape_markdown(worse.verdict) in second
    assert second.index("Before.") < second.index(BEGIN) < second.index("After.")
    assert read_results(folder)["atlas", "knowledge-kept"] == 0.3
    (folder / "README.md").unlink()
    assert second.replace("\nAfter.\n", "") == write(worse, folder, text)


def test_report_without_known_facts_has_no_results(card: Card, folder: Path) -> None:
    nothing = make_card_of_counts(gained=2, neither=20)
    text = "---\nlicense: mit\n---\n\n# A model\n"
    assert write(nothing, folder, text) == write(nothing, folder)
    write(card, folder)
    assert read_results(folder) == {("atlas", "accuracy"): 94 / 120, ("atlas", "knowledge-kept"): 0.9}


def test_text_of_the_author_is_unchanged(card: Card, folder: Path) -> None:
    head = (
        "# Comments too\nlanguage:\n- no  # Norwegian, not false\nlicense:   'mit'\nwidget:\n- text: \"a: b\"\n"
        "date: 2024-02-30x\ntags: [x,   y]\n"
    )
    body = "# Title\n\n---\n\nText with `code`, <!-- a comment --> and ünïcödé.\n\n    indented\n"
    text = write(card, folder, f"---\n{head}---\n{body}")
    assert text.startswith(f"---\n{head}model-index:\n")
    assert body.strip() in text
    assert write(card, folder) == text


def test_results_of_the_author_are_kept(card: Card, worse: Card, folder: Path) -> None:
    existing = (
        "---\nmodel-index:\n- name: Mine\n  results:\n  - task:\n      type: text-generation\n    dataset:\n"
        "      name: MMLU\n      type: mmlu\n    metrics:\n    - type: accuracy\n      value: 0.5\n"
        "# About the licence.\nlicense: mit\n---\n"
    )
    write(card, folder, existing)
    text = write(worse, folder)
    assert read_results(folder) == {
        ("MMLU", "accuracy"): 0.5,
        ("atlas", "accuracy"): 0.25,
        ("atlas", "knowledge-kept"): 0.3,
    }
    assert ModelCard.load(folder / "README.md").data.model_name == "Mine"
    assert "# About the licence.\nlicense: mit\n" in text


@pytest.mark.parametrize("text", [None, "", "# A model\n\nText.\n", "---\n---\n\nText.\n", "---\nNo front matter.\n"])
def test_card_without_front_matter_gets_one(card: Card, folder: Path, text: str | None) -> None:
    after = write(card, folder, text)
    assert read_results(folder)["atlas", "knowledge-kept"] == 0.9
    assert (text or "").strip("-\n ") in after


def test_front_matter_in_braces_keeps_its_values(card: Card, folder: Path) -> None:
    write(card, folder, "---\n{license: mit, tags: [a]}\n---\nText.\n")
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    assert read_results(folder)["atlas", "knowledge-kept"] == 0.9


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"---\nlicense: [mit\n---\nText.\n", "not valid YAML"),
        (b"---\na: b: c\n---\nText.\n", "not valid YAML"),
        (b"---\n" + b"[" * 3000 + b"\n---\nText.\n", "not valid YAML"),
        (b"---\n- a list\n---\nText.\n", "not in the form"),
        (b"---\nmodel-index: mine\n---\nText.\n", "not in the form"),
        (b"---\nmodel-index:\n- name: x\n---\nText.\n", "not in the form"),
        (b"Caf\xe9\n", "not UTF-8"),
    ],
)
def test_unreadable_card_is_unchanged(card: Card, folder: Path, content: bytes, what: str) -> None:
    (folder / "README.md").write_bytes(content)
    for attempt in (lambda: check_model_cards([folder]), lambda: write_into_model_cards(card, [folder])):
        with pytest.raises(OutputError, match=what) as error:
            attempt()
        assert str(folder / "README.md") in error.value.what
    assert (folder / "README.md").read_bytes() == content


def test_unreadable_card_is_refused_before_any_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert main(["report", str(tmp_path / "no such original"), str(folder), "--into-model-card"]) == 1
    assert "not valid YAML" in capsys.readouterr().err


def test_output_that_is_not_a_checkpoint_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("answers", "someone/model"):
        assert main(["report", "original", str(tmp_path / name), "--into-model-card"]) == 1
        assert "it has no model card to write into" in capsys.readouterr().err


def test_missing_end_mark_loses_no_text(card: Card, worse: Card, folder: Path) -> None:
    first = write(card, folder, "# A model\n")
    broken = first.replace(END, "") + "\nText of the author.\n"
    write(card, folder, broken)
    assert "Text of the author." in write(worse, folder)
    assert "Text of the author." in write(card, folder)


@pytest.mark.parametrize("hostile", [*HOSTILE_TEXTS[:-2], END, f"{END} {BEGIN}", "a: b\n---\n# x"])
def test_hostile_names_stay_text(card: Card, folder: Path, hostile: str) -> None:
    hostile_card = number_texts(card, hostile)
    once = write(hostile_card, folder, "---\nlicense: mit\n---\n\n# A model\n\nText.\n")
    assert write(hostile_card, folder) == once
    body = once.split("\n---\n", 1)[1]
    assert body.count(BEGIN) == body.count(END) == 1
    data = ModelCard.load(folder / "README.md").data
    assert data.license == "mit"
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "knowledge-kept"}
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    for forbidden in ("<script", "<img", "<a ", "<b>", "</svg"):
        assert forbidden not in html
    assert html.count("<h1>") == 1
