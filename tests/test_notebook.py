"""Results at a prompt and in a notebook: a few lines or a small table, and no markup from a model's names or facts."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import compressknow
from compressknow.base.notebook import SummaryRepr
from compressknow.compress.manifest import Manifest
from tests.long import one_in
from tests.models import save_tiny
from tests.pages.answering import make_rows, make_runs
from tests.pages.card.cards import make_card_of_nothing, make_card_of_one, make_card_of_several
from tests.pages.diff.contrasts import make_comparison, make_identical_comparison
from tests.pages.hostile import HOSTILE_TEXTS, replace_texts
from tests.pages.maps import make_sensitivity
from tests.pages.search.searches import make_search
from tests.pages.study.studies import make_empty_study, make_failed_study, make_whole_grid

RESULTS = {
    "answers": make_runs(make_rows(both=3, lost=1))[0],
    "card": make_card_of_one(),
    "comparison": make_card_of_one().comparisons[0],
    "cards": make_card_of_several(),
    "card of nothing": make_card_of_nothing(),
    "contrast": make_comparison(),
    "identical": make_identical_comparison(),
    "search": make_search(),
    "sensitivity": make_sensitivity(),
    "study": make_whole_grid(),
    "failed": make_failed_study(),
    "empty": make_empty_study(),
}
TAGS = {"div", "p", "strong", "br", "table", "thead", "tbody", "tr", "th", "td"}


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def check_result(result: Any) -> tuple[str, Page]:
    """Check that a result is short and has no markup or control characters, and return its text and its HTML."""
    html = result._repr_html_()
    assert html is not None
    page, text = Page(html), str(result)
    assert len(repr(result)) < 200
    assert all(character.isprintable() for character in repr(result))
    assert page.tags <= TAGS
    assert page.attributes <= {"style", "scope"}
    assert len(text.splitlines()) < 25
    assert all(character.isprintable() or character == "\n" for character in text)
    return text, page


@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_result_is_a_few_lines(result: SummaryRepr) -> None:
    text, page = check_result(result)
    assert text.startswith(f"<{type(result).__name__}")
    assert page.text


@pytest.mark.parametrize("text", one_in(4, HOSTILE_TEXTS))
@pytest.mark.parametrize("result", RESULTS.values(), ids=RESULTS)
def test_names_and_facts_add_no_markup_or_control_characters(result: SummaryRepr, text: str) -> None:
    check_result(replace_texts(result, text) if not isinstance(result, compressknow.Search) else make_search(text))


def test_verdict_and_figures_are_in_text_and_html() -> None:
    card = make_card_of_one()
    text, page = check_result(card)
    for word in ("geography", "language", "B"):
        assert word in text
        assert word in page.text
    assert card.verdict in page.text
    assert " ".join(card.verdict.split()[:5]) in " ".join(text.split())
    assert "Att_GPQ 20%" in check_result(make_card_of_several())[1].text


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny("llama", folder / "plain")
    return Path(shutil.move(folder / "plain", folder / "<script>alert(1)<b>\x1b[31m"))


def test_results_for_a_folder_with_a_hostile_name(hostile_model: Path, tmp_path: Path) -> None:
    inspection = compressknow.inspect(hostile_model)
    manifest = compressknow.convert(hostile_model, tmp_path / "out", prune=0.5, quantize="int8")
    planned = compressknow.convert(hostile_model, tmp_path / "none", prune=0.5, dry_run=True)
    for result in (inspection, manifest, planned, compressknow.verify(tmp_path / "out")):
        check_result(result)
    assert "<script>alert(1)<b>⟨U+001B⟩[31m" in str(manifest)
    assert "&lt;script&gt;" in manifest._repr_html_()
    (tmp_path / "out" / "tokenizer<i>.json").write_text("{}")
    text, page = check_result(compressknow.verify(tmp_path / "out", check=False))
    assert "not in the manifest" in text
    assert "tokenizer<i>.json" in page.text


def test_manifest_is_the_dict_in_its_file(hostile_model: Path, tmp_path: Path) -> None:
    manifest = compressknow.convert(hostile_model, tmp_path / "out", prune=0.5)
    assert manifest == json.loads((tmp_path / "out" / "compressknow.json").read_text(encoding="utf-8"))
    assert manifest.recipe == compressknow.Recipe.from_dict(manifest["recipe"])
    names = ("setup", "source", "totals", "groups", "tensors", "runtimes")
    assert [getattr(manifest, name) for name in names] == [manifest[name] for name in names]


def test_incomplete_manifest_is_shown_as_a_dict() -> None:
    assert repr(Manifest({"setup": "x"})) == "{'setup': 'x'}"
    assert Manifest({"setup": "x"})._repr_html_() is None
