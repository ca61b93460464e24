"""Results at a prompt and in a notebook: a few lines, a small table, and nothing that comes from a model as markup."""

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
from tests.models import save_tiny
from tests.pages.answering import make_rows, make_runs
from tests.pages.card.cards import make_card_of_nothing, make_card_of_one, make_card_of_several
from tests.pages.diff.contrasts import make_comparison, make_identical_comparison
from tests.pages.hostile import HOSTILE_TEXTS, replace_texts
from tests.pages.maps import make_sensitivity
from tests.pages.search.searches import make_search
from tests.pages.study.studies import make_empty_study, make_failed_study, make_whole_grid

MADE = {
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


class Tags(HTMLParser):
    """What a browser makes of a page: its tags, their attributes, and its text."""

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


def looked_at(result: Any) -> tuple[str, Tags]:
    """Both forms, held to what holds of every result."""
    html = result._repr_html_()
    assert html is not None
    page, text = Tags(html), str(result)
    # A line at a prompt, whatever a record holds.
    assert len(repr(result)) < 200
    assert all(character.isprintable() for character in repr(result))
    assert page.tags <= TAGS
    assert page.attributes <= {"style", "scope"}
    assert len(text.splitlines()) < 25
    assert all(character.isprintable() or character == "\n" for character in text)
    return text, page


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_a_result_is_a_few_lines(made: SummaryRepr) -> None:
    text, page = looked_at(made)
    assert text.startswith(f"<{type(made).__name__}")
    assert page.text


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_names_and_facts_are_no_markup_and_no_controls(made: SummaryRepr, text: str) -> None:
    looked_at(replace_texts(made, text) if not isinstance(made, compressknow.Search) else make_search(text))


def test_the_verdict_and_the_figures_are_in_both_forms() -> None:
    card = make_card_of_one()
    text, page = looked_at(card)
    for said in ("geography", "language", "B"):
        assert said in text
        assert said in page.text
    assert card.verdict in page.text
    assert " ".join(card.verdict.split()[:5]) in " ".join(text.split())
    assert "Att_GPQ 20%" in looked_at(make_card_of_several())[1].text


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny("llama", folder / "plain")
    return Path(shutil.move(folder / "plain", folder / "<script>alert(1)<b>\x1b[31m"))


def test_what_the_verbs_return_of_a_hostile_folder(hostile_model: Path, tmp_path: Path) -> None:
    inspection = compressknow.inspect(hostile_model)
    manifest = compressknow.convert(hostile_model, tmp_path / "out", prune=0.5, quantize="int8")
    planned = compressknow.convert(hostile_model, tmp_path / "none", prune=0.5, dry_run=True)
    for result in (inspection, manifest, planned, compressknow.verify(tmp_path / "out")):
        looked_at(result)
    assert "<script>alert(1)<b>⟨U+001B⟩[31m" in str(manifest)
    assert "&lt;script&gt;" in manifest._repr_html_()
    weights = tmp_path / "out" / "tokenizer<i>.json"
    weights.write_text("{}")
    text, page = looked_at(compressknow.verify(tmp_path / "out", check=False))
    assert "not in the manifest" in text
    assert "tokenizer<i>.json" in page.text


def test_a_manifest_is_the_dict_that_its_file_holds(hostile_model: Path, tmp_path: Path) -> None:
    manifest = compressknow.convert(hostile_model, tmp_path / "out", prune=0.5)
    assert manifest == json.loads((tmp_path / "out" / "compressknow.json").read_text(encoding="utf-8"))
    assert manifest.recipe == compressknow.Recipe.from_dict(manifest["recipe"])
    names = ("setup", "source", "totals", "groups", "tensors", "runtimes")
    assert [getattr(manifest, name) for name in names] == [manifest[name] for name in names]


def test_a_dict_that_is_no_longer_whole_is_shown_as_it_is() -> None:
    assert repr(Manifest({"setup": "x"})) == "{'setup': 'x'}"
    assert Manifest({"setup": "x"})._repr_html_() is None
