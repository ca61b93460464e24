"""The calibration of a checkpoint on its report card, from the conversion to the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import compressknow
from compressknow.compress.steps import Prune
from compressknow.engine.identity import describe, locate
from compressknow.evaluate.gather import find_facts_in_text
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.records import FactsInText
from compressknow.model.manifest import summarize_calibration
from compressknow.pages.card import warnings
from compressknow.pages.card.pages import render_html, render_markdown
from compressknow.pages.records import Card
from tests.compress.calibrate.test_compression import BLOCKS
from tests.compress.calibrate.test_compression import compress as calibrate_on_few_tokens
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.models import save_tiny
from tests.pages.card.cards import make_compressed, make_original
from tests.pages.in_browser import find_violations, measure_overflow, unfold

if TYPE_CHECKING:
    from playwright.sync_api import Page

IN_TEXT = KNOWN_FACTS[:16]  # the capitals


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and the same model calibrated on a text of 16 of its 64 facts."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_facts(folder / "facts.jsonl")
    (folder / "text.txt").write_text(" ".join(fact.sentence(fact.obj_label) for fact in IN_TEXT) + "\n", "utf-8")
    (folder / "text.txt").write_text((folder / "text.txt").read_text("utf-8") * 30, "utf-8")
    save_trained("llama", folder / "original")
    convert(folder, "compressed", folder / "text.txt")
    return folder


def convert(folder: Path, name: str, text: Path | str) -> None:
    options = {"prune": 0.3, "prune_method": "wanda", "calibration_tokens": 2048}
    compressknow.convert(folder / "original", folder / name, calibration=str(text), **options)


def report(folder: Path, name: str = "compressed", output: Sequence[Path] = ()) -> Card:
    probe = f"facts:{folder / 'facts.jsonl'}"
    return compressknow.report(folder / "original", folder / name, probe, answers=folder / "answers", output=output)


@pytest.fixture(scope="module")
def card(folder: Path) -> Card:
    return report(folder, output=[folder / f"card.{suffix}" for suffix in ("html", "md", "json")])


def test_card_counts_facts_that_appear_in_the_calibration_text(card: Card, folder: Path) -> None:
    values = json.loads((folder / "card.json").read_text("utf-8"))["compressed"][0]
    assert values["model"]["in_calibration"] == {"facts": 64, "found": 16, "known": 64, "known_found": 16}
    calibration = [values["model"]["calibration"][key] for key in ("kind", "source", "tokens")]
    assert calibration == ["file", str(folder / "text.txt"), 2048]
    warning = "Of 64 facts, 16 appear in the calibration text "
    assert any(each.startswith(warning) for each in values["warnings"])
    for page in ("card.html", "card.md"):
        text = (folder / page).read_text("utf-8")
        assert warning in text
        assert "Calibrated on 2,048 tokens of" in text
        assert "16 of 64 facts appear in this text" in text


def test_only_the_calibration_tokens_count_and_not_the_rest_of_the_file(folder: Path) -> None:
    unread = " ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS)
    (folder / "longer.txt").write_text((folder / "text.txt").read_text("utf-8") + unread, "utf-8")
    convert(folder, "longer", folder / "longer.txt")
    counts = report(folder, "longer").comparisons[0].model.in_calibration
    assert counts is not None
    assert counts.found == 16


@pytest.mark.parametrize("text", ["self", "changed", "gone"])
def test_no_facts_are_counted_if_the_text_is_not_available(folder: Path, text: str) -> None:
    file = folder / f"{text}.txt"
    file.write_text((folder / "text.txt").read_text("utf-8"), "utf-8")
    convert(folder, text, "self" if text == "self" else file)
    if text == "changed":
        file.write_text("Avaland . " + file.read_text("utf-8"), "utf-8")
    elif text == "gone":
        file.unlink()
    card = report(folder, text)
    assert card.comparisons[0].model.in_calibration is None
    assert not any("calibrated" in each for each in card.comparisons[0].warnings)
    markdown = render_markdown(card)
    assert "Calibrated on 2,048 tokens of " in markdown
    assert ("the model" in markdown.partition("Calibrated on")[2][:40]) == (text == "self")
    assert (f"{text}.txt" in markdown) == (text != "self")


def test_page_of_an_uncalibrated_model_does_not_mention_calibration(folder: Path) -> None:
    compressknow.convert(folder / "original", folder / "plain", prune=0.3)
    card = report(folder, "plain")
    assert card.comparisons[0].model.calibration is None
    assert "alibrated" not in render_html(card)


def test_stored_answers_keep_the_calibration_record(folder: Path, card: Card) -> None:
    for name in ("original", "compressed"):
        compressknow.probe(folder / name, folder / f"of-{name}", f"facts:{folder / 'facts.jsonl'}")
    stored = compressknow.report(folder / "of-original", folder / "of-compressed").comparisons[0].model
    assert (stored.calibration, stored.in_calibration) == (card.comparisons[0].model.calibration, None)


def test_facts_that_the_original_knows_are_counted_among_all(folder: Path) -> None:
    answers = compressknow.probe(folder / "original", folder / "of-original", f"facts:{folder / 'facts.jsonl'}")
    handle = ModelHandle(locate(folder / "compressed"), compressknow.Settings())
    for label, number in (("", 32), (None, 64)):
        # Every second fact is not known, and may have no subject.
        rows = [
            replace(row, correct=bool(index % 2), sub_label=row.sub_label if index % 2 or label is None else label)
            for index, row in enumerate(answers.answers)
        ]
        in_text = find_facts_in_text(handle.describe()["calibration"], handle, replace(answers, answers=tuple(rows)))
        assert in_text == FactsInText(number, number // 4, 32, 8)


def test_card_of_facts_in_random_order_counts_them_too(folder: Path) -> None:
    probe = f"facts:{folder / 'facts.jsonl'}"
    card = compressknow.report(
        folder / "original", folder / "compressed", probe, answers=folder / "early", fail_under=0.1, early=True
    )
    in_text = card.comparisons[0].model.in_calibration
    assert in_text is not None
    assert in_text.facts == card.comparisons[0].counts.n


def test_compare_shows_the_calibration_text_and_counts_facts(folder: Path) -> None:
    probes = [f"facts:{folder / 'facts.jsonl'}"]
    outputs = [folder / f"compare.{suffix}" for suffix in ("html", "md", "json")]
    compared = compressknow.compare(
        folder / "original", folder / "compressed", probes, output=outputs, answers=folder / "answers"
    )
    assert sum("16 appear in the calibration text" in each for each in compared.warnings) == 1
    assert "2,048 tokens of" in (folder / "compare.html").read_text("utf-8")
    assert "2,048 tokens of" in (folder / "compare.md").read_text("utf-8")
    assert json.loads((folder / "compare.json").read_text("utf-8"))["b"]["calibration"]["tokens"] == 2048


CALIBRATION = {
    **{"kind": "file", "source": "wiki.txt", "sha256": "0" * 64, "tokens": 2048, "seed": 0, "blocks_apart": True},
    **{"smoothed": 0, "unseen": 3, "unseen_share": 0.6, "examples": ["a", "b", "c"]},
}


def test_warning_if_the_text_does_not_reach_many_weights() -> None:
    (warning,) = warnings.warn_of_calibration(make_original(), replace(make_compressed(), calibration=CALIBRATION))
    assert "did not reach 60.0 % of the parameters" in warning
    few = replace(make_compressed(), calibration=CALIBRATION | {"unseen_share": 0.05})
    assert list(warnings.warn_of_calibration(make_original(), few)) == []


@pytest.mark.parametrize(("known_found", "warned"), [(1, 0), (2, 1)])
def test_no_warning_for_one_fact_in_a_hundred(known_found: int, warned: int) -> None:
    counts = FactsInText(200, 3, 100, known_found)
    model = replace(make_compressed(), calibration=CALIBRATION | {"unseen_share": 0.0}, in_calibration=counts)
    assert len(list(warnings.warn_of_calibration(make_original(), model))) == warned


def test_unseen_share_counts_each_expert_matrix() -> None:
    rows = [{"name": "experts", "numel": 80, "shape": [4, 4, 5]}, {"name": "query", "numel": 20, "shape": [4, 5]}]
    record = {key: CALIBRATION[key] for key in ("kind", "source", "sha256", "tokens", "seed", "blocks_apart")}
    manifest = {
        "tensors": rows,
        "totals": {"in_scope": 100},
        "calibration": {**record, "unseen": ["experts[3]", "query"]},
    }
    summary = summarize_calibration(manifest)
    assert summary is not None
    assert (summary["unseen"], summary["unseen_share"], summary["examples"]) == (2, 0.4, ["experts[3]", "query"])


def test_warning_if_few_tokens_reach_the_experts(tmp_path: Path) -> None:
    source = save_tiny("mixtral", tmp_path / "mixtral")
    calibrate_on_few_tokens(source, tmp_path / "out", Prune(0.5, "wanda", BLOCKS), count=1)
    calibration = describe(locate(tmp_path / "out"))["calibration"]
    assert calibration["unseen_share"] == pytest.approx(compute_unseen_share(tmp_path / "out"))
    (warning,) = warnings.warn_of_calibration(make_original(), replace(make_compressed(), calibration=calibration))
    assert "did not reach" in warning


def compute_unseen_share(folder: Path) -> float:
    """Return the share of unseen parameters, counted from the sizes in the manifest."""
    manifest = json.loads((folder / "compressknow.json").read_text("utf-8"))
    unseen = manifest["calibration"]["unseen"]
    assert unseen
    assert unseen == sorted(unseen)
    sizes = {row["name"]: row["numel"] for row in manifest["tensors"] if row["in_scope"]}
    parts = [sizes[name.partition("[")[0]] / (4 if "[" in name else 1) for name in unseen]
    return sum(parts) / sum(sizes.values())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_of_a_calibrated_model_is_accessible_and_fits_the_screen(
    page: Page, folder: Path, card: Card, scheme: Any, width: int
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((folder / "card.html").as_uri())
    unfold(page, 9)
    assert measure_overflow(page) <= 0
    assert find_violations(page) == []
