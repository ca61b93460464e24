"""What a card says of a checkpoint that was calibrated, from the conversion to the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import compressknow
from compressknow.compress.steps import Prune
from compressknow.engine.identity import describe, locate
from compressknow.evaluate.records import FactsInText
from compressknow.model.manifest import summarize_calibration
from compressknow.pages.card import warnings
from compressknow.pages.card.pages import render_html, render_markdown
from compressknow.pages.records import Card
from tests.compress.calibrate.test_compression import BLOCKS
from tests.compress.calibrate.test_compression import compress as compress_on_drawn_text
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.models import save_tiny
from tests.pages.card.cards import make_compressed, make_original
from tests.pages.in_browser import find_violations, measure_overflow, unfold

if TYPE_CHECKING:
    from playwright.sync_api import Page

IN_TEXT = KNOWN_FACTS[:16]  # the capitals


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and what became of it when it was calibrated on a text of 16 of its 64 facts."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_facts(folder / "facts.jsonl")
    (folder / "text.txt").write_text(" ".join(fact.sentence(fact.obj_label) for fact in IN_TEXT) + "\n", "utf-8")
    (folder / "text.txt").write_text((folder / "text.txt").read_text("utf-8") * 30, "utf-8")
    save_trained("llama", folder / "original")
    convert(folder, "compressed", folder / "text.txt")
    return folder


def convert(place: Path, name: str, text: Path | str, original: str = "original", **more: Any) -> Path:
    options: dict[str, Any] = {"prune": 0.3, "prune_method": "wanda", "calibration_tokens": 2048} | more
    compressknow.convert(place / original, place / name, calibration=str(text), **options)
    return place / name


def report(place: Path, name: str = "compressed", **more: Any) -> Card:
    probes = [f"facts:{place / 'facts.jsonl'}"]
    return compressknow.report(place / "original", place / name, probes, answers=place / "answers", **more)


@pytest.fixture(scope="module")
def card(place: Path) -> Card:
    return report(place, output=[place / f"card.{suffix}" for suffix in ("html", "md", "json")])


def test_card_counts_facts_that_appear_in_the_calibration_text(card: Card, place: Path) -> None:
    told = json.loads((place / "card.json").read_text("utf-8"))["compressed"][0]
    assert told["model"]["in_calibration"] == {"facts": 64, "found": 16, "known": 64, "known_found": 16}
    said = told["model"]["calibration"]
    assert (said["kind"], said["source"], said["tokens"]) == ("file", str(place / "text.txt"), 2048)
    warning = "Of 64 facts, 16 appear in the calibration text "
    assert any(each.startswith(warning) for each in told["warnings"])
    for page in ("card.html", "card.md"):
        text = (place / page).read_text("utf-8")
        assert warning in text
        assert "Calibrated on 2,048 tokens of" in text
        assert "16 of 64 facts appear in this text" in text


def test_only_the_calibration_tokens_count_and_not_the_rest_of_the_file(place: Path) -> None:
    beyond = " ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS)
    (place / "longer.txt").write_text((place / "text.txt").read_text("utf-8") + beyond, "utf-8")
    convert(place, "longer", place / "longer.txt")
    found = report(place, "longer").comparisons[0].model.in_calibration
    assert found is not None
    assert found.found == 16


@pytest.mark.parametrize("text", ["self", "changed", "gone"])
def test_no_facts_are_counted_if_the_text_is_not_available(place: Path, text: str) -> None:
    file = place / f"{text}.txt"
    file.write_text((place / "text.txt").read_text("utf-8"), "utf-8")
    convert(place, text, "self" if text == "self" else file)
    if text == "changed":
        file.write_text("Avaland . " + file.read_text("utf-8"), "utf-8")
    elif text == "gone":
        file.unlink()
    card = report(place, text)
    assert card.comparisons[0].model.in_calibration is None
    assert not any("calibrated" in each for each in card.comparisons[0].warnings)
    said = render_markdown(card)
    assert "Calibrated on 2,048 tokens of " in said
    assert ("the model" in said.partition("Calibrated on")[2][:40]) == (text == "self")
    assert (f"{text}.txt" in said) == (text != "self")


def test_page_of_an_uncalibrated_model_does_not_mention_calibration(place: Path) -> None:
    compressknow.convert(place / "original", place / "plain", prune=0.3)
    card = report(place, "plain")
    assert card.comparisons[0].model.calibration is None
    assert "alibrated" not in render_html(card)


def test_stored_answers_keep_the_calibration_record(place: Path, card: Card) -> None:
    probes = [f"facts:{place / 'facts.jsonl'}"]
    for name in ("original", "compressed"):
        compressknow.probe(place / name, place / f"of-{name}", probes)
    stored = compressknow.report(place / "of-original", place / "of-compressed").comparisons[0].model
    assert (stored.calibration, stored.in_calibration) == (card.comparisons[0].model.calibration, None)


def test_compare_shows_the_calibration_text_and_counts_facts(place: Path) -> None:
    probes = [f"facts:{place / 'facts.jsonl'}"]
    outputs = [place / f"compare.{suffix}" for suffix in ("html", "md", "json")]
    compared = compressknow.compare(
        place / "original", place / "compressed", probes, output=outputs, answers=place / "answers"
    )
    assert sum("16 appear in the calibration text" in each for each in compared.warnings) == 1
    assert "2,048 tokens of" in (place / "compare.html").read_text("utf-8")
    assert "2,048 tokens of" in (place / "compare.md").read_text("utf-8")
    assert json.loads((place / "compare.json").read_text("utf-8"))["b"]["calibration"]["tokens"] == 2048


SAID = {
    **{"kind": "file", "source": "wiki.txt", "sha256": "0" * 64, "tokens": 2048, "seed": 0, "blocks_apart": True},
    **{"smoothed": 0, "unseen": 3, "unseen_share": 0.6, "examples": ["a", "b", "c"]},
}


def test_warning_if_the_text_does_not_reach_many_weights() -> None:
    (told,) = warnings.warn_of_calibration(make_original(), replace(make_compressed(), calibration=SAID))
    assert "did not reach 60.0 % of the parameters" in told
    few = replace(make_compressed(), calibration=SAID | {"unseen_share": 0.05})
    assert list(warnings.warn_of_calibration(make_original(), few)) == []


@pytest.mark.parametrize(("known_found", "warned"), [(1, 0), (2, 1)])
def test_no_warning_for_one_fact_in_a_hundred(known_found: int, warned: int) -> None:
    found = FactsInText(200, 3, 100, known_found)
    model = replace(make_compressed(), calibration=SAID | {"unseen_share": 0.0}, in_calibration=found)
    assert len(list(warnings.warn_of_calibration(make_original(), model))) == warned


def test_unseen_share_counts_each_expert_matrix() -> None:
    rows = [{"name": "experts", "numel": 80, "shape": [4, 4, 5]}, {"name": "query", "numel": 20, "shape": [4, 5]}]
    done = {key: SAID[key] for key in ("kind", "source", "sha256", "tokens", "seed", "blocks_apart")}
    manifest = {
        "tensors": rows,
        "totals": {"in_scope": 100},
        "calibration": {**done, "unseen": ["experts[3]", "query"]},
    }
    said = summarize_calibration(manifest)
    assert said is not None
    assert (said["unseen"], said["unseen_share"], said["examples"]) == (2, 0.4, ["experts[3]", "query"])


def test_warning_if_few_tokens_reach_the_experts(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path / "mixtral")
    compress_on_drawn_text(folder, tmp_path / "out", Prune(0.5, "wanda", BLOCKS), count=1)
    said = describe(locate(tmp_path / "out"))["calibration"]
    assert said["unseen_share"] == pytest.approx(share_of_unseen(tmp_path / "out"))
    (told,) = warnings.warn_of_calibration(make_original(), replace(make_compressed(), calibration=said))
    assert "did not reach" in told


def share_of_unseen(folder: Path) -> float:
    """Counted from the shapes of the weights in the module tree."""
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
    page: Page, place: Path, card: Card, scheme: Any, width: int
) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((place / "card.html").as_uri())
    unfold(page, 9)
    assert measure_overflow(page) <= 0
    assert find_violations(page) == []
