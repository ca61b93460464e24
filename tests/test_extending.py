"""Third-party probes, sections, methods, schemes and layers work like built-in ones; their errors are one message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import compressknow
from compressknow.base.format import clean
from compressknow.base.packages import Registry
from compressknow.base.reading import compute_sha256
from compressknow.cli import main
from compressknow.compress.pruning import METHODS
from compressknow.compress.recipe import Recipe, format_options, read_recipe, to_toml
from compressknow.compress.schemes import SCHEMES
from compressknow.compress.steps import Prune
from compressknow.engine.layers import LAYERS
from compressknow.evaluate.answers import TABLE, write_record, write_table
from compressknow.evaluate.sources import PROBES, Options
from compressknow.pages.card.make import make_card
from compressknow.pages.card.sections import SECTIONS
from compressknow.pages.model_card import add_report
from compressknow.study.grid import build_grid
from tests.evaluate.layouts import open_probe
from tests.extending import install_package
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.long import long
from tests.pages.answering import WORDS, make_answer, make_entry, make_runs
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.pages import Element, parse_html
from tests.shown import ROOT

MANUAL = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def example(section: str, level: int = 2) -> str:
    """Return the code that the manual shows in a section."""
    text = MANUAL.partition(f"\n{'#' * level} {section}\n")[2]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Return a function that installs a package of one module with one entry point, for this test."""
    changed: list[tuple[Registry, str]] = []
    # The options of these depend on what is installed when they are imported.
    commands = [f"compressknow.cli.{name}" for name in ("convert", "sweep", "search")]

    def add(registry: Registry, name: str, code: str, attribute: str) -> None:
        module = f"toy_{name.replace('-', '_')}"
        entries = {registry.group: [f"{name} = {module}:{attribute}"]}
        monkeypatch.syspath_prepend(str(install_package(tmp_path / "site", module, code, entries)))
        changed.append((registry, name))
        registry.__dict__.pop("_added", None)
        for command in commands:
            sys.modules.pop(command, None)

    yield add
    for registry, name in changed:
        registry.__dict__.pop("_added", None)
        registry._loaded.pop(name, None)
        sys.modules.pop(f"toy_{name.replace('-', '_')}", None)
    for command in commands if changed else ():
        sys.modules.pop(command, None)


def run_subprocess(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in another process, with the packages in `site`."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", str(ROOT))])
    return subprocess.run(
        [sys.executable, "-m", "compressknow", *args],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=False,
    )


def run_refused(args: list[str], capsys: pytest.CaptureFixture[str], expected: str) -> str:
    """Run a command that fails with one message and leaves nothing behind, and return what it prints."""
    before = sorted(Path.cwd().iterdir())
    exit_code = main(args)
    errors = capsys.readouterr().err
    assert exit_code in (1, 2)
    assert [line for line in errors.splitlines() if line.startswith("Error: ")] == errors.splitlines()[:1]
    assert expected in " ".join(errors.split())
    assert "Traceback" not in errors
    assert "bug in compressknow" not in errors
    assert sorted(Path.cwd().iterdir()) == before
    return errors


@pytest.mark.parametrize(
    ("section", "level"),
    [
        *(("A probe", 2), ("A section of the report", 2), ("A pruning method", 2), ("A quantization scheme", 2)),
        ("A layer of the engine", 3),
    ],
)
def test_manuals_example_is_short(section: str, level: int) -> None:
    assert len(example(section, level).splitlines()) < 40


class TestProbe:
    """The manual's almanac, with facts that a tiny model knows."""

    @pytest.fixture(autouse=True)
    def set_up_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for part in ("capital", "language"):
            facts = [fact for fact in KNOWN_FACTS if fact.relation == part]
            rows = [f"{fact.sub_label}\t{fact.obj_label}\t{fact.sentence('[MASK]')}" for fact in facts]
            path = Path("data", "almanac", f"{part}.tsv")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(rows) + "\n", encoding="utf-8")

    @pytest.fixture
    def almanac(self, install) -> None:
        install(PROBES, "almanac", example("A probe"), "Almanac")

    @pytest.fixture
    def models(self, almanac: None) -> None:  # noqa: ARG002
        """Write a model, and a copy pruned so that it forgets."""
        save_trained("llama", Path("model"))
        assert main(["convert", "model", "pruned", "--prune", "70%"]) == 0

    def test_example_for_contributors_is_complete(self, install) -> None:
        text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n### A probe\n")[2]
        install(PROBES, "rivers", re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "Rivers")
        probe = open_probe("Rivers", Options(limit=2, seed=1))
        assert [fact.probe for fact in probe.facts] == ["rivers", "rivers"]
        assert probe.read == 3

    @pytest.mark.usefixtures("models")
    def test_report_shows_it_on_the_card(self) -> None:
        options = ["-p", "almanac:capital", "-p", "Almanac:Language", "--data", "data"]
        assert main(["report", "model", "pruned", *options, "-o", "card.html", "-o", "card.json", "-o", "card.md"]) == 0
        probes = json.loads(Path("card.json").read_text(encoding="utf-8"))["compressed"][0]["probes"]
        assert {name: probe["n"] for name, probe in probes.items()} == {"almanac:capital": 16, "almanac:language": 16}
        assert all(probe["accuracy_original"] == 1 for probe in probes.values())
        assert probes["almanac:capital"]["lost"] > 0
        assert probes["almanac:language"]["by_subject"]["geography"]["n"] == 16
        for page in ("card.html", "card.md"):
            text = Path(page).read_text(encoding="utf-8")
            assert "protocol almanac/1, one of 16 answers" in text
            assert "The capital of " in text

    @pytest.mark.usefixtures("models")
    def test_stored_answers_are_found_by_a_name_in_any_case(self, capsys: pytest.CaptureFixture[str]) -> None:
        reference: list[str] = []
        for model in ("model", "pruned"):
            output = ["-o", f"answers/{model}", *reference]
            assert main(["probe", model, "-p", "almanac:capital", "--data", "data", "--limit", "10", *output]) == 0
            reference = ["--reference", "answers/model"]
        assert "almanac:capital" in capsys.readouterr().out
        assert main(["report", "answers/model", "answers/pruned", "-p", "ALMANAC:capital", "-o", "card.json"]) == 0
        probe = json.loads(Path("card.json").read_text(encoding="utf-8"))["compressed"][0]["probes"]["almanac:capital"]
        assert probe["n"] == 10

    @pytest.mark.usefixtures("models")
    def test_compare_evaluates_both_on_it(self) -> None:
        options = ["-p", "almanac:language", "--data", "data", "-o", "compare.json"]
        assert main(["compare", "model", "pruned", *options]) == 0
        assert "almanac:language" in Path("compare.json").read_text(encoding="utf-8")

    @pytest.mark.usefixtures("models")
    def test_sweep_and_search_run_on_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Path("grid.toml").write_text("[axes]\nscope = ['overall']\nprune = [0.1, 0.7]\n", encoding="utf-8")
        options = ["-p", "almanac:capital", "-p", "almanac:language", "--data", "data"]
        assert main(["sweep", "model", "-o", "study", "--grid", "grid.toml", *options]) == 0
        study = json.loads(Path("study", "study.json").read_text(encoding="utf-8"))
        assert list(study["probes"]) == ["almanac:capital", "almanac:language"]
        monkeypatch.setattr("compressknow.study.sensitivity.FEWEST", 8)
        text = ["--calibration", "text.txt", "--calibration-tokens", "128", "--to", "checkpoint"]
        Path("text.txt").write_text("The capital of Avaland is New Alba. " * 40, encoding="utf-8")
        assert main(["search", "model", "-o", "found", "--keep", "0.3", *text, *options]) == 0
        search = json.loads(Path("found", "search.json").read_text(encoding="utf-8"))
        assert (search["probes"], search["held_out"]) == (["almanac:capital", "almanac:language"], 10)

    @pytest.mark.usefixtures("almanac")
    @pytest.mark.parametrize("command", ["probe", "report", "compare", "sweep", "search"])
    def test_help_lists_it(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([command, "--help"]) == 0
        assert "almanac:TABLE       lands that are on no map: capital, language" in capsys.readouterr().out

    def test_new_process_finds_the_installed_package(self, tmp_path: Path) -> None:
        entries = {"compressknow.probes": ["almanac = other:Almanac"]}
        site = install_package(tmp_path / "other-site", "other", example("A probe"), entries)
        done = run_subprocess(site, "probe", "model", "-o", "a", "-p", "almanac:capitol")
        assert done.returncode == 2
        assert "Did you mean almanac:capital?" in done.stderr
        assert "almanac:capital, almanac:language" in done.stderr

    @pytest.mark.usefixtures("almanac")
    def test_error_of_missing_data_says_where_to_get_and_put_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("empty").mkdir()
        assert main(["probe", "model", "-o", "a", "-p", "almanac:capital", "--data", "empty"]) == 2
        errors = capsys.readouterr().err
        assert "empty does not contain almanac:capital." in errors
        assert "example.org/almanac.zip" in errors
        assert "Put it into DIR/almanac and pass --data DIR." in errors

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("holds(self, folder, part):", "holds(self):"), "TypeError"),
            (("path.read_text", "path.read_txt"), "AttributeError"),
            (('f"{part}/{subject}"', "part"), "Two of its facts have the id 'capital'"),
            (("for subject, obj, sentence in rows", "for subject, obj, sentence in ()"), "has no facts to evaluate"),
            (("probe=name", 'probe="almanac"'), "does not have the name 'almanac:capital'"),
            (("candidates=objects", "candidates=objects[1:]"), "candidates of its fact 'capital/Avaland'"),
            (("candidates=objects", "candidates=list(objects)"), "candidates of its fact 'capital/Avaland'"),
            (("candidates=objects", "popularity='9'"), "In its fact 'capital/Avaland', popularity is not a number"),
            (('f"{part}/{subject}"', "rows.index([subject, obj, sentence])"), "In its fact 0, id is not text"),
            (("prompt=sentence", "prompt=subject"), "The probe 'almanac' comes from toy_almanac."),
            (('"almanac/1"', "None"), "Its protocol is not text"),
            (("compute_sha256(path)", "path"), "source cannot be written as JSON"),
            (("return Probe(", "return (lambda *_, source: None)("), "not a Probe, Task or RunningText"),
            (("def open(", "def opened("), "abstract"),
            (("class Almanac(ProbeSource)", "class Almanac"), "not ProbeSource"),
            (("from compressknow.base.reading import compute_sha256", "import nothing_like_it"), "ModuleNotFoundError"),
        ],
        ids=lambda case: case[1][:24] if isinstance(case, tuple) else "",
    )
    def test_faulty_code_is_one_message(
        self, change: tuple[str, str], message: str, install, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = example("A probe")
        assert change[0] in code
        install(PROBES, "almanac", code.replace(*change), "Almanac")
        errors = run_refused(["probe", "model", "-o", "a", "-p", "almanac:capital", "--data", "data"], capsys, message)
        assert "toy_almanac" in errors or message == "has no facts to evaluate"

    def test_broken_package_does_not_affect_others(self, install, capsys: pytest.CaptureFixture[str]) -> None:
        install(PROBES, "broken", "import nothing_like_it\n", "Broken")
        assert main(["probe", "--help"]) == 0
        assert "atlas  " in capsys.readouterr().out
        assert main(["probe", "model", "-o", "a", "-p", "atlass"]) == 2
        assert "Did you mean atlas?" in capsys.readouterr().err


class TestSection:
    """The manual's section, on cards made from stored answers. The compressed model gives most facts one answer."""

    ANSWERS = (
        [make_answer(number, number < 40, predicted=WORDS[number % 8]) for number in range(50)],
        [make_answer(number, number < 10) for number in range(50)],
    )

    @pytest.fixture(autouse=True)
    def set_up_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name, answers in zip(("before", "after"), make_runs(self.ANSWERS), strict=True):
            Path(name).mkdir()
            write_table(Path(name, TABLE), answers.answers)
            sha256, probes = compute_sha256(Path(name, TABLE)), {"atlas": make_entry(facts=50, asked=50)}
            write_record(Path(name), replace(answers.record, probes=probes, answers_sha256=sha256))

    @pytest.fixture
    def favourites(self, install) -> None:
        install(SECTIONS, "favourites", example("A section of the report"), "Favourites")

    @staticmethod
    def report(*options: str) -> tuple[Element, str, dict[str, Any]]:
        """Write a card with the command line, and return its HTML, Markdown and JSON."""
        files = [Path("card.html"), Path("card.md"), Path("card.json")]
        assert main(["report", "before", "after", *options, "--overwrite", *(f"-o{file}" for file in files)]) == 0
        html, markdown, figures = (file.read_text(encoding="utf-8") for file in files)
        return parse_html(html), markdown, json.loads(figures)

    @staticmethod
    def sections_by_id(page: Element) -> dict[str, Element]:
        return {each.attributes.get("aria-labelledby", ""): each for each in page.all("section")}

    @pytest.mark.usefixtures("favourites")
    def test_report_shows_it_in_every_format(self, capsys: pytest.CaptureFixture[str]) -> None:
        page, markdown, figures = self.report()
        section = self.sections_by_id(page)["m1-favourites"]
        cells = [[cell.text for cell in row.children if isinstance(cell, Element)] for row in section.all("tr")]
        assert cells == [["Probe", "Original", "Compressed"], ["atlas", "14.0 %", "80.0 %"]]
        assert section.one("figure").one("desc").text == "atlas 80 %"
        titles = [each.text for each in page.one("nav").all("a")]
        assert titles[titles.index("By relation") + 1] == "Favourite answers"
        assert "## Favourite answers\n\nShare of facts that get the favourite answer:\n\n| Probe |" in markdown
        warning = "The compressed model gives one answer to 80.0 % of the facts of atlas."
        for text in (page.text, markdown):
            assert "A model that has forgotten a lot" in text
            assert "one that it gives to most of its facts" in text
            assert warning in text
        assert warning in capsys.readouterr().out
        assert figures["compressed"][0]["probes"]["atlas"]["favourites"] == [0.14, 0.8]

    def test_example_for_contributors_works(self, install) -> None:
        text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### A section of the report")[2]
        install(SECTIONS, "sureness", re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "Sureness")
        page, markdown, figures = self.report()
        assert figures["compressed"][0]["probes"]["atlas"]["sureness"] == [-0.5, -1.25]
        assert [cell.text for cell in self.sections_by_id(page)["m1-sureness"].all("td")] == ["−0.500", "−1.250"]
        assert "| atlas | −0.500 | −1.250 |" in markdown

    @pytest.mark.usefixtures("favourites")
    def test_section_of_each_of_several_models_has_no_chart(self) -> None:
        page, markdown, figures = self.report("after")
        headings = {each.attributes.get("id"): each for each in page.all("h4")}
        for model in ("m1", "m2"):
            section = headings[f"{model}-favourites"].parent
            assert section is not None
            assert [cell.text for cell in section.one("table").all("td")] == ["14.0 %", "80.0 %"]
            assert not section.all("figure")
        assert markdown.count("### Favourite answers") == 2
        assert [each["probes"]["atlas"]["favourites"] for each in figures["compressed"]] == [[0.14, 0.8]] * 2

    def test_no_facts_leaves_out_a_section_that_shows_facts(self, install) -> None:
        code = """
            from compressknow.pages.card.sections import Section
            from compressknow.pages.parts import Text

            class Prompts(Section):
                title = "Prompts"
                shows_facts = True

                def measure(self, answers):
                    return [before.prompt for before, _ in answers.pairs]

                def parts(self, context):
                    yield Text(context.measured["atlas"][7])
        """
        install(SECTIONS, "prompts", textwrap.dedent(code), "Prompts")
        page, markdown, figures = self.report()
        assert "capital of country 7" in self.sections_by_id(page)["m1-prompts"].text
        page, markdown, figures = self.report("--no-facts")
        for text in (page.text, markdown, json.dumps(figures)):
            assert "capital of country" not in text
        assert "left out on request" in self.sections_by_id(page)["m1-prompts"].text

    @pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
    def test_texts_cannot_inject_markup(self, text: str, install) -> None:
        code = """
            from markupsafe import Markup
            from compressknow.pages.card.sections import Section
            from compressknow.pages.parts import *

            class AllParts(Section):
                def __init__(self):
                    self.title, self.method, self.glossary = self.text, (self.text,), ((self.text, self.text),)

                def parts(self, context):
                    T = self.text
                    table = Table(T, (T, T), ((T, T), (T, T)), sortable=True)
                    facts = Facts(Table(T, (T, T, T), ((T, T, T),)), T)
                    yield from (Text(T), Note(T), Remarks(T, [T]), table, facts, Folded(T, (Note(T), table)))
                    yield Chart(T, T, lambda axes: axes.set_title(" ".join(T.split()).strip(chr(0xD800))))
                    yield Beside(None, table)

                def warnings(self, context):
                    yield self.text

            class Harmless(AllParts):
                order, text = 101, "harmless"

            class Hostile(AllParts):
                order, text = 102, Markup(TEXT)
        """
        code = textwrap.dedent(code).replace("TEXT", repr(text))
        install(SECTIONS, "harmless", code, "Harmless")
        install(SECTIONS, "hostile", code, "Hostile")
        page, markdown, figures = self.report()
        assert not [each for each in figures["warnings"] if "is left out" in each]
        sections = self.sections_by_id(page)
        assert sections["m1-hostile"].shape == sections["m1-harmless"].shape
        assert clean(text, 60)[:30] in sections["m1-hostile"].text
        tokens = [token.type for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)]
        headings = [index for index, kind in enumerate(tokens) if kind == "heading_open"][-4:]
        harmless, hostile = (tokens[start:end] for start, end in pairwise(headings[:3]))
        assert hostile == harmless
        assert not {"html_block", "link_open"} & set(tokens)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("most_common(1)[0][1] / len", "most_common(1)[0][9] / len"), "IndexError: tuple index out of range."),
            (("sides]", "sides], {0}"), "TypeError: Object of type set is not JSON serializable."),
            (("len(side) for", "len(side) * float('nan') for"), "ValueError: Out of range float values"),
            (('title = "Favourite answers"', 'title = ""'), "it has no title."),
            (("order = 46", "order = 'first'"), "its order is not a number."),
            (('most of its facts.",)', 'most of its facts.")'), "its method is not a tuple of sentences."),
            (("order = 46", "glossary = ('favourite', 'what is liked')"), "its glossary is not a tuple of pairs"),
            (("def warnings(", "warnings = lambda *_: 'Beware.'\n\n    def unused("), "`warnings` returns one string"),
            (("class Favourites(Section)", "class Favourites"), "not Section"),
            (("from collections import Counter", "import nothing_like_it"), "ModuleNotFoundError"),
        ],
        ids=lambda case: case[1][:24] if isinstance(case, tuple) else "",
    )
    def test_section_that_fails_is_left_out_with_a_warning(
        self, change: tuple[str, str], message: str, install, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = example("A section of the report")
        assert change[0] in code
        install(SECTIONS, "favourites", code.replace(*change), "Favourites")
        page, markdown, figures = self.report()
        assert "m1-favourites" not in self.sections_by_id(page)
        assert "m1-figures" in self.sections_by_id(page)
        assert "## Favourite answers" not in markdown
        assert "favourites" not in figures["compressed"][0]["probes"]["atlas"]
        (warning,) = [each for each in figures["warnings"] if "toy_favourites" in each]
        assert message in warning
        assert "Update or uninstall toy_favourites." in warning
        assert warning in page.text
        printed = capsys.readouterr()
        assert "The section 'favourites' that toy_favourites adds" in printed.out
        assert "Traceback" not in printed.err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("yield Note(", "yield str("), "TypeError: `parts` gives str, which is not part of a section."),
            (("yield Note(", "yield (lambda text: Drawn('<b>'))("), "TypeError: `parts` gives Drawn"),
            (("yield Note(", "yield (lambda text: Folded('', (text,)))("), "TypeError: `parts` gives str"),
            (("yield Note(", "yield (lambda text: Facts(Table('', ('', ''), ())))("), "ValueError: facts have fewer"),
            (('("Probe", "Original", "Compressed")', '("Probe", "Original")'), "ValueError: a row of the table"),
            (('"Compressed"), rows', '"Compressed"), rows, (None, None)'), "ValueError: the table"),
            (('"Compressed"), rows', '"Compressed"), rows, links=("a", "b")'), "fewer bars, or links, than rows"),
            (("yield Note(", "yield (lambda text: Beside(None, None))("), "UndefinedError"),
            (("yield Note(", "yield (lambda text: Remarks('', None))("), "TypeError: 'NoneType' object"),
            (("axes.barh(**bars)", "axes.barh(bars)"), "TypeError"),
            (("def parts(", "def part("), "NotImplementedError"),
        ],
        ids=lambda case: case[1][:24] if isinstance(case, tuple) else "",
    )
    def test_section_with_faulty_parts_is_left_out_of_the_page(self, change: tuple[str, str], message: str, install):
        imported = "Beside, Chart, Drawn, Facts, Folded, Note, Remarks"
        code = example("A section of the report").replace("Chart, Note", imported)
        install(SECTIONS, "favourites", code.replace(*change), "Favourites")
        page, _, figures = self.report()
        assert "m1-favourites" not in self.sections_by_id(page)
        assert "m1-figures" in self.sections_by_id(page)
        assert figures["compressed"][0]["probes"]["atlas"]["favourites"] == [0.14, 0.8]
        (warning,) = [each.text for each in page.all("li") if "that toy_favourites adds is left out" in each.text]
        assert message in warning

    def test_model_card_does_not_mention_a_section_that_fails(self, install) -> None:
        install(SECTIONS, "broken", "import nothing_like_it\n", "Broken")
        original, compressed = make_runs(self.ANSWERS)
        card = make_card(original, [compressed])
        assert any("toy_broken" in warning for warning in card.warnings)
        assert "toy_broken" not in add_report("", card.original, card.comparisons[0])

    @pytest.mark.parametrize("name", ["Favourites", "5favourites", "top"])
    def test_name_that_is_not_a_valid_id_is_refused(self, name: str, install) -> None:
        install(SECTIONS, name, example("A section of the report"), "Favourites")
        _, markdown, figures = self.report()
        assert "## Favourite answers" not in markdown
        assert any("its name must consist of lowercase letters" in each for each in figures["warnings"])

    @pytest.mark.parametrize(
        ("name", "why"),
        [("figures", "A built-in section has that name."), ("kept", "ValueError: report.json has that name")],
    )
    def test_built_in_names_and_keys_cannot_be_replaced(self, name: str, why: str, install) -> None:
        install(SECTIONS, name, example("A section of the report"), "Favourites")
        SECTIONS._loaded.pop(name, None)
        page, _, figures = self.report()
        assert "Knowledge kept" in self.sections_by_id(page)["m1-figures"].text
        assert figures["compressed"][0]["probes"]["atlas"]["kept"] == 0.25
        (warning,) = [each for each in figures["warnings"] if f"toy_{name}" in each]
        assert why in warning

    @pytest.mark.usefixtures("favourites")
    def test_two_sections_of_one_name_are_both_left_out(self, tmp_path: Path, monkeypatch) -> None:
        entries = {"compressknow.sections": ["favourites = second:Favourites"]}
        code = example("A section of the report")
        monkeypatch.syspath_prepend(str(install_package(tmp_path / "second-site", "second", code, entries)))
        SECTIONS.__dict__.pop("_added", None)
        page, _, figures = self.report()
        assert "m1-favourites" not in self.sections_by_id(page)
        (warning,) = [each for each in figures["warnings"] if "second" in each]
        assert "The section 'favourites' that second and toy_favourites add cannot be used." in warning
        assert "Uninstall one of them." in warning

    def test_new_process_finds_the_installed_package(self, tmp_path: Path) -> None:
        entries = {"compressknow.sections": ["favourites = other:Favourites"]}
        site = install_package(tmp_path / "other-site", "other", example("A section of the report"), entries)
        assert run_subprocess(site, "report", "before", "after", "-o", "card.md").returncode == 0
        assert "## Favourite answers" in Path("card.md").read_text(encoding="utf-8")


def read_rows(folder: str) -> list[dict[str, object]]:
    """Return the manifest's rows of the weights in scope."""
    manifest = json.loads(Path(folder, "compressknow.json").read_text(encoding="utf-8"))
    return [row for row in manifest["tensors"] if row["in_scope"]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a folder with a model that knows the facts of facts.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    save_trained("llama", Path("model"))
    write_facts(Path("facts.jsonl"))
    return tmp_path


ACTIVATION_METHOD = """
import torch
from compressknow.compress.pruning import Calibrated

class Loud(Calibrated):
    name = "loud"
    help = "weights on the smallest inputs"
    needs = "norms"

    def prune(self, weight, inputs, amount):
        order = inputs.squares.argsort(stable=True).expand_as(weight)
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask.view(-1)[: round(amount * weight.numel())] = True
        return mask.gather(1, order.argsort(dim=1)), None
"""


class TestMethodWithActivations:
    OPTIONS = ("--prune", "50%", "--prune-method", "loud", "--calibration-tokens", "2048")

    @pytest.mark.usefixtures("home")
    def test_method_prunes_and_the_calibration_text_is_printed(
        self, install, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install(METHODS, "loud", ACTIVATION_METHOD, "Loud")
        assert main(["convert", "model", "pruned", *self.OPTIONS]) == 0
        shown = capsys.readouterr().out
        assert "Blocks loud 50%" in shown
        assert "tokens of the model's own text" in shown.replace("\n", " ")

    @pytest.mark.usefixtures("home")
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("return mask", "return 1 / 0, mask"), "ZeroDivisionError: division by zero. "),
            (("return mask.gather(1, order.argsort(dim=1))", "return mask[:1]"), "it gives [1, "),
            (("amount * weight.numel()", "amount * weight.numel() / 2"), "but announced"),
            (
                ("return mask.gather(1, order.argsort(dim=1))", "return mask.numpy()"),
                "is not boolean, or its values are not floats",
            ),
        ],
    )
    def test_error_names_the_package(
        self, install, capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str
    ) -> None:
        install(METHODS, "loud", ACTIVATION_METHOD.replace(*change), "Loud")
        assert main(["convert", "model", "pruned", *self.OPTIONS]) == 1
        shown = " ".join(capsys.readouterr().err.split())
        assert message in shown
        assert "'loud' that toy_loud adds failed" in shown
        assert "Traceback" not in shown
        assert not Path("pruned").exists()


PRUNED = "__import__('compressknow').compress.pruning.Pruned"


class TestPruningMethod:
    """The manual's l1-spans."""

    @pytest.fixture
    def spans(self, install, home: Path) -> None:  # noqa: ARG002
        install(METHODS, "l1-spans", example("A pruning method"), "Spans")

    @pytest.mark.usefixtures("spans")
    def test_method_zeroes_the_smallest_weights_of_each_span(self, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--prune", "50%", "--prune-method", "l1-spans", "--span", "4"]
        assert main(["convert", "model", "planned", *options, "--dry-run", "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert main(["convert", "model", "pruned", *options]) == 0
        assert "Blocks l1-spans span 4 50%" in capsys.readouterr().out
        before, after = (load_file(f"{name}/model.safetensors") for name in ("model", "pruned"))
        for row in read_rows("pruned"):
            spans, kept = (weights[row["name"]].view(-1, 4) for weights in (before, after))
            order = spans.abs().argsort(dim=1, stable=True)
            assert torch.equal(kept.gather(1, order[:, 2:]), spans.gather(1, order[:, 2:]))
            assert not kept.gather(1, order[:, :2]).any()
        # Half of each span: known from the shapes.
        assert sum(row["pruned"] for row in read_rows("pruned")) == planned["totals"]["pruned"] == 36_864
        assert main(["verify", "pruned"]) == 0

    @pytest.mark.usefixtures("spans")
    def test_bytes_are_the_same_with_any_threads_and_from_the_manifest(self) -> None:
        options = ["--prune", "0.3", "--prune-method", "l1-spans", "--span", "16", "--scope", "overall"]
        assert main(["convert", "model", "one", *options, "--threads", "1"]) == 0
        assert main(["convert", "model", "two", *options, "--threads", "2"]) == 0
        assert main(["convert", "model", "three", "--recipe", "one"]) == 0
        one, two, three = (Path(name, "model.safetensors").read_bytes() for name in ("one", "two", "three"))
        assert one == two == three
        (step,) = json.loads(Path("three", "compressknow.json").read_text(encoding="utf-8"))["recipe"]["steps"]
        assert (step["method"], step["span"]) == ("l1-spans", 16)

    @pytest.mark.usefixtures("spans")
    def test_recipe_python_and_grid_take_its_parameter(self) -> None:
        assert Prune(0.5, "l1-spans").parameters == {"span": 8}
        assert Prune(0.5, "l1-spans") != Prune(0.5, "l1-spans", parameters={"span": 4})
        recipe = Recipe((Prune(0.5, "l1-spans", parameters={"span": 4}),))
        Path("recipe.toml").write_text(to_toml(recipe.to_dict()), encoding="utf-8")
        assert read_recipe(Path("recipe.toml")) == recipe
        manifest = compressknow.convert(
            "model", "out", prune=0.5, prune_method="l1-spans", parameters={"span": 4}, dry_run=True
        )
        assert manifest["recipe"] == recipe.to_dict()
        axes = "[axes]\nprune = [0.5]\nmethod = ['l1-spans', 'l1-unstructured']\nspan = [4, 8]\n"
        Path("grid.toml").write_text(axes, encoding="utf-8")
        assert main(["sweep", "model", "-o", "study", "--grid", "grid.toml", "-p", "facts:facts.jsonl"]) == 0
        study = json.loads(Path("study", "study.json").read_text(encoding="utf-8"))
        # A method without a span is run once, not once per span.
        setups = [cell["setup"] for cell in study["cells"]]
        assert setups == ["Blocks l1-spans span 4 50%", "Blocks l1-spans 50%", "Blocks_GP 50%"]
        assert [cell["method"] for cell in study["cells"]] == ["l1-spans", "l1-spans", "l1-unstructured"]

    @pytest.mark.parametrize("default", ["True", "None, kind=bool"])
    def test_parameter_that_is_set_to_false_has_an_option_only_if_it_is_on_by_default(
        self,
        default: str,
        install,
        home: Path,  # noqa: ARG002
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        flag = f'stable: bool = parameter(default={default}, help="Keep ties in order.")\n\n    def count('
        install(METHODS, "l1-spans", example("A pruning method").replace("def count(", flag), "Spans")
        recipe = Recipe((Prune(0.5, "l1-spans", parameters={"stable": False}),))
        words = format_options(recipe)
        if default != "True":
            assert words is None
            named = Recipe((Prune(0.5, "l1-spans", parameters={"stable": True}),))
            assert named.setup == "Blocks l1-spans stable 50%"
            return
        assert words is not None
        assert main(["convert", "model", "out", *words, "--dry-run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["recipe"] == recipe.to_dict()

    @pytest.mark.usefixtures("spans")
    def test_help_and_report_show_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["convert", "--help"]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"--span INTEGER +Neighbours that compete in l1-spans\.  \[default: 8\]", shown)
        assert "l1-spans             the smallest among neighbours in a row (--span)" in shown
        assert main(["convert", "model", "pruned", "--prune", "75%", "--prune-method", "l1-spans"]) == 0
        assert main(["report", "model", "pruned", "-p", "facts:facts.jsonl", "-o", "card.json", "-o", "card.html"]) == 0
        (entry,) = json.loads(Path("card.json").read_text(encoding="utf-8"))["compressed"]
        assert entry["probes"]["facts:facts.jsonl"]["lost"] > 10
        assert "l1-spans 75%" in Path("card.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--prune-method", "l1-span"], "Did you mean l1-spans?"),
            (["--prune-method", "l1-spans", "--span", "1"], "span must be at least 2: 1"),
            (["--prune-method", "l1-spans", "--spam", "4"], "Did you mean --span?"),
            (["--span", "4"], "--span is not a parameter of l1-unstructured. It needs l1-spans."),
        ],
    )
    @pytest.mark.usefixtures("spans")
    def test_wrong_options_are_one_message(
        self, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["convert", "model", "out", "--prune", "0.5", *options]) == 2
        assert message in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[[steps]]\nprune = 0.5\nmethod = 'l1-spans'\nspam = 4\n", "Did you mean span?"),
            ("[[steps]]\nprune = 0.5\nmethod = 'l1-spans'\nspan = 4.5\n", "span must be at least 2: 4.5"),
            ("[[steps]]\nprune = 0.5\nspan = 4\n", "unknown key 'span'"),
        ],
    )
    @pytest.mark.usefixtures("spans")
    def test_wrong_recipe_is_one_message(self, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("recipe.toml").write_text(text, encoding="utf-8")
        assert main(["convert", "model", "out", "--recipe", "recipe.toml"]) == 2
        assert message in " ".join(capsys.readouterr().err.split())

    @pytest.mark.usefixtures("spans")
    def test_grid_with_a_parameter_of_no_method_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("grid.toml").write_text("[axes]\nprune = [0.5]\nspan = [4]\n", encoding="utf-8")
        assert main(["sweep", "model", "-o", "study", "--grid", "grid.toml"]) == 2
        assert "'span' is not a key here" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("scatter_(2", "scatter_(7"), "IndexError"),
            (("scatter_(2", "scatter_(exit(0)"), "ended the program (SystemExit: 0)"),
            (("[EachBlock(pruned)] * len(weights)", "[]"), "gives 0 masks for 14 tensors"),
            (("return mask.numpy()", "return mask"), "is not a boolean NumPy array of shape ["),
            ((".abs()", ".abs_()"), "changes `block.values` in place"),
            (("return mask.numpy()", "return mask.numpy()[1:]"), "is not a boolean NumPy array of shape ["),
            (
                ("return mask.numpy()", f"return {PRUNED}(mask.numpy(), block.values.int())"),
                "are not floats of shape [",
            ),
            (("def count(self, weights, amount)", "def count(self)"), "TypeError"),
            (("round(amount * self.span)\n\n", "1\n\n"), "prunes 36,864 weights, but announced"),
            (("def choose(", "def chosen("), "abstract"),
            (('name = "l1-spans"', 'name = "spans"'), "Its name attribute is 'spans'"),
            (("span: int = parameter(", "scope: int = parameter("), "No parameter can be called scope"),
            (("default=8", "default=(8,)"), "The parameter span is neither bool, int, float nor str"),
            (("from compressknow.compress.parameters import", "from nothing_like_it import"), "ModuleNotFoundError"),
            (("class Spans(PruningMethod)", "class Spans"), "not PruningMethod"),
        ],
        ids=lambda case: case[1][:24] if isinstance(case, tuple) else "",
    )
    def test_faulty_code_is_one_message(
        self,
        change: tuple[str, str],
        message: str,
        install,
        home: Path,  # noqa: ARG002
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        code = example("A pruning method")
        assert change[0] in code
        install(METHODS, "l1-spans", code.replace(*change), "Spans")
        options = ["--prune", "0.5", "--prune-method", "l1-spans"]
        assert "toy_l1_spans" in run_refused(["convert", "model", "out", *options], capsys, message)

    def test_broken_package_does_not_affect_others(
        self,
        install,
        home: Path,  # noqa: ARG002
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        install(METHODS, "broken", "import nothing_like_it\n", "Broken")
        assert main(["convert", "--help"]) == 0
        assert "broken               cannot be used" in capsys.readouterr().out
        assert main(["convert", "model", "out", "--prune", "0.5"]) == 0

    @long
    def test_new_process_finds_the_installed_package(self, home: Path) -> None:
        entries = {"compressknow.pruning": ["l1-spans = other:Spans"]}
        site = install_package(home / "site", "other", example("A pruning method"), entries)
        options = ["--prune", "0.5", "--prune-method", "l1-spans", "--span", "4"]
        done = run_subprocess(site, "convert", "model", "out", *options)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Blocks l1-spans span 4 50%: model -> out" in done.stdout
        # Its output can be read without the package.
        assert main(["verify", "out"]) == 0
        assert main(["compare", "model", "out"]) == 0
        assert main(["report", "model", "out", "-p", "facts:facts.jsonl", "-o", "card.md"]) == 0


# The pack-quantized format of compressed-tensors: eight integers in 32 bits, and the shape as a tensor.
INT4 = """
from compressknow.compress.schemes import SCALE, Scheme, Stored


class Int4(Scheme):
    name = "toy-int4"
    help = "4-bit weights in groups of 32"
    word, noun, format = "int4", "4-bit integers", "pack-quantized"
    bits, lowest, highest, scale_per = 4, -8, 7, 32

    def stored(self, shape, dtype):
        rows, columns = shape
        packed = Stored("_packed", "I32", (rows, columns // 8))
        return packed, Stored(SCALE, dtype, self.scale_shape(shape)), Stored("_shape", "I64", (2,))

    def arguments(self):
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        return {"weights": weights, "input_activations": None}

    def scales(self, absmax):
        return (absmax / 7.5).clamp(min=1e-30)

    def pack(self, integers):
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        return pack_to_int32(integers, 4)

    def constants(self, shape):
        import torch

        return {"_shape": torch.tensor(shape)}
"""


def load_weights_with_transformers(folder: str) -> dict[str, torch.Tensor]:
    """Return the weights that plain transformers computes with."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(torch.tensor([[1, 2, 3]]))  # the first call unpacks them
    return {name: weight.float() for name, weight in model.state_dict().items() if name.endswith("proj.weight")}


def test_manual_has_a_row_for_each_method_and_scheme() -> None:
    page = (ROOT / "docs" / "commands" / "convert.md").read_text(encoding="utf-8")
    named = {name for line in page.splitlines() if line.startswith("| `") for name in re.findall("`([^`]+)`", line)}
    assert {*METHODS, *SCHEMES} <= named


class TestScheme:
    """The manual's int6, and a scheme that packs its weights."""

    @pytest.fixture
    def int6(self, install, home: Path) -> None:  # noqa: ARG002
        install(SCHEMES, "int6", example("A quantization scheme"), "Int6")

    @pytest.fixture
    def int4(self, install, home: Path) -> None:  # noqa: ARG002
        install(SCHEMES, "toy-int4", INT4, "Int4")

    @pytest.mark.usefixtures("int6")
    def test_plain_transformers_loads_the_quantized_values(self) -> None:
        assert main(["convert", "model", "six", "--quantize", "int6", "--group", "32"]) == 0
        before, loaded = load_file("model/model.safetensors"), load_weights_with_transformers("six")
        for row in read_rows("six"):
            groups = before[row["name"]].view(-1, 32)
            scales = groups.abs().amax(1, keepdim=True) / 31.5
            expected = (groups / scales).round().clamp(-32, 31) * scales
            assert torch.allclose(loaded[row["name"]].view(-1, 32), expected, rtol=1e-6, atol=0)
            assert row["relative_error"] == pytest.approx(float((expected - groups).norm() / groups.norm()), rel=1e-4)

    @pytest.mark.usefixtures("int4")
    def test_packed_weights_are_loaded_verified_and_counted(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["convert", "model", "four", "--prune", "0.5", "--quantize", "toy-int4"]) == 0
        printed = capsys.readouterr().out
        assert "Int4    Before" in printed
        assert "It does not run in vLLM: it has no kernel for toy-int4." in " ".join(printed.split())
        written, loaded = load_file("four/model.safetensors"), load_weights_with_transformers("four")
        for row in read_rows("four"):
            shape, packed, scales = (written[row["name"] + end] for end in ("_shape", "_packed", "_scale"))
            assert shape.tolist() == row["shape"]
            integers = unpack_from_int32(packed, 4, torch.Size(row["shape"]))
            assert row["zeros"] == int((integers == 0).sum()) >= row["pruned"] > 0
            assert torch.equal(loaded[row["name"]], integers * scales.repeat_interleave(32, dim=1))
            assert row["bytes_after"] == row["numel"] // 2 + row["numel"] // 32 * 4 + 16
            assert row["bits"] == 4
        assert main(["verify", "four"]) == 0
        name = next(name for name in written if name.endswith("_packed"))
        written[name][0, 0] += 1
        save_file(written, "four/model.safetensors", metadata={"format": "pt"})
        assert main(["verify", "four"]) == 1
        assert f"{name}: its bytes differ" in capsys.readouterr().err

    @pytest.mark.usefixtures("int6")
    def test_pages_show_its_word_and_noun(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["convert", "model", "six", "--quantize", "int6", "--group", "64"]) == 0
        assert main(["inspect", "six"]) == 0
        assert main(["compare", "model", "six", "--json"]) == 0
        shown = capsys.readouterr().out
        assert "int8" in shown
        card = Path("six", "README.md").read_text(encoding="utf-8")
        assert "weights quantized to 6-bit integers (scheme `int6`)" in card
        assert "- int6" in card
        assert main(["probe", "six", "-p", "facts:facts.jsonl", "-o", "answers"]) == 0
        assert main(["report", "model", "six", "-p", "facts:facts.jsonl", "-o", "card.json", "-o", "card.md"]) == 0
        (entry,) = json.loads(Path("card.json").read_text(encoding="utf-8"))["compressed"]
        assert entry["probes"]["facts:facts.jsonl"]["n"] == 64
        assert entry["probes"]["facts:facts.jsonl"]["kept"] > 0.8
        text = Path("card.md").read_text(encoding="utf-8")
        assert "| int6 |" in text
        assert r"Blocks\_GQ int6 group 64" in text

    @pytest.mark.usefixtures("int6")
    def test_compare_dequantizes_its_groups(self) -> None:
        assert main(["convert", "model", "six", "--quantize", "int6"]) == 0
        tensors = compressknow.compare("model", "six").difference.tensors
        errors = {row["name"]: row["relative_error"] for row in read_rows("six")}
        compared = {each.name: each.sums.relative_error for each in tensors if each.name in errors}
        assert compared == pytest.approx(errors, rel=1e-4)

    @pytest.mark.usefixtures("int6")
    def test_sweep_runs_a_grid_of_its_parameter(self, capsys: pytest.CaptureFixture[str]) -> None:
        axes = "[axes]\nquantize = ['int6', 'int8']\ngroup = [8, 64]\n"
        Path("grid.toml").write_text(axes, encoding="utf-8")
        assert main(["sweep", "model", "-o", "study", "--grid", "grid.toml", "-p", "facts:facts.jsonl"]) == 0
        study = json.loads(Path("study", "study.json").read_text(encoding="utf-8"))
        assert [cell["setup"] for cell in study["cells"]] == [
            "Blocks_GQ int6 group 8", "Blocks_GQ int6 group 64", "Blocks_GQ"
        ]  # fmt: skip
        capsys.readouterr()
        assert main(["sweep", "model", "-o", "study", "--quantize", "int66"]) == 2
        assert "Did you mean int6?" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.usefixtures("home")
    def test_scheme_may_have_a_seed(self, install) -> None:
        seeded = "    seed: int = parameter(default=0, help='Of its scales.')\n\n    @property\n    def scale_per"
        code = example("A quantization scheme").replace("    @property\n    def scale_per", seeded)
        install(SCHEMES, "int6", code.replace("absmax / 31.5", "absmax / (31.5 + self.seed)"), "Int6")
        assert main(["convert", "model", "plain", "--quantize", "int6"]) == 0
        assert main(["convert", "model", "seeded", "--quantize", "int6", "--seed", "3"]) == 0
        assert main(["convert", "model", "again", "--recipe", "seeded"]) == 0
        plain, seeded, again = (
            load_file(f"{name}/model.safetensors")[f"{read_rows('plain')[0]['name']}_scale"]
            for name in ("plain", "seeded", "again")
        )
        torch.testing.assert_close(seeded, plain * 31.5 / 34.5)
        assert torch.equal(again, seeded)
        steps = [
            cell.recipe.steps[0].parameters
            for cell in build_grid({"axes": {"quantize": ["int6"], "seed": [0, 3]}}, "The grid")
        ]
        assert steps == [{"group": 16, "seed": 0}, {"group": 16, "seed": 3}]

    @pytest.mark.usefixtures("int6")
    def test_group_that_does_not_divide_the_inputs_is_refused_before_any_work(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ["--quantize", "int6", "--group", "48"]
        message = "64 input channels are not a multiple of the group size 48. Another value of --group may fit all"
        assert run_refused(["convert", "model", "out", *options], capsys, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("torch.finfo", "torch.info"), "AttributeError"),
            (("(absmax / 31.5)", "(absmax.double() / 31.5)"), "toy_int6 adds failed. ValueError: it stores"),
            (("return (absmax", "return 0 * (absmax"), "toy_int6 adds failed. ValueError: it returns scales that"),
            (("6, -32, 31", "8, 0, 255"), "its grid, 0 to 255, does not fit int8"),
            (('"strategy": "group"', '"strategy": "bunch"'), "could not load the output. Loading stops: "),
            (('"symmetric": True', '"symmetric": False'), "floats for integers, or the reverse, in "),
            (('"group_size": self.group', '"group_size": 32'), "It cannot convert what is stored"),
            (
                (
                    "    def scales(",
                    "    def stored(self, *weight):\n        values, scales = super().stored(*weight)\n"
                    "        return values, scales, scales._replace(suffix='_note')\n\n    def scales(",
                ),
                "It finds no place for ",
            ),
            (("def arguments", "def argument"), "abstract"),
            (("bits, lowest, highest = 6, -32, 31", "bits: int = 6"), "bits has a type, and is not a parameter(...)"),
        ],
        ids=lambda case: case[1][:24] if isinstance(case, tuple) else "",
    )
    def test_faulty_code_is_one_message(
        self,
        change: tuple[str, str],
        message: str,
        install,
        home: Path,  # noqa: ARG002
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        code = example("A quantization scheme")
        assert change[0] in code
        install(SCHEMES, "int6", code.replace(*change), "Int6")
        errors = run_refused(["convert", "model", "out", "--quantize", "int6"], capsys, message)
        assert "toy_int6" in errors

    @pytest.mark.usefixtures("int6")
    def test_layer_of_the_engine_computes_with_its_integers(self, install, capsys: pytest.CaptureFixture[str]) -> None:
        layer = example("A layer of the engine", level=3)
        install(LAYERS, "int6-layer", layer, "Kind")
        # The layer takes only groups of 16; others run as floats.
        for group, computed in {
            "16": "Computed on cpu in float32 + int6.",
            "32": "Computed on cpu in float32.",
        }.items():
            assert main(["convert", "model", "six", "--quantize", "int6", "--group", group, "--overwrite"]) == 0
            assert main(["probe", "six", "-p", "facts:facts.jsonl", "-o", f"answers-{group}"]) == 0
            assert computed in capsys.readouterr().out
        assert main(["convert", "model", "six", "--quantize", "int6", "--overwrite"]) == 0
        model, floats = compressknow.load("six"), AutoModelForCausalLM.from_pretrained("six")
        ids = torch.tensor([[5, 9, 17, 4]])
        assert torch.allclose(model(ids).logits, floats(ids).logits, atol=1e-4)

    @pytest.mark.usefixtures("int6")
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("torch.device(device)", "torch.devise(device)"), "AttributeError: module 'torch'"),
            (("weights.num_bits", "weights.bits"), "AttributeError: 'QuantizationArgs' object has no attribute 'bits'"),
            (("return Int6Linear(module) if", "return module if"), "`layer_of` returns something other"),
            (('    word = "int6"\n', ""), "has no attribute 'word'"),
            (("x.split(16, -1)", "x.split(16, -2)"), "adds failed. RuntimeError: "),
            # One channel would broadcast.
            (("return out if self.bias", "return out[..., :1] if self.bias"), "`forward` returns [2, "),
        ],
        ids=lambda case: case[1][:24] if isinstance(case, tuple) else "",
    )
    def test_faulty_layer_is_one_message(
        self, change: tuple[str, str], message: str, install, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = example("A layer of the engine", level=3)
        assert change[0] in code
        install(LAYERS, "int6-layer", code.replace(*change), "Kind")
        assert main(["convert", "model", "six", "--quantize", "int6"]) == 0
        errors = run_refused(["probe", "six", "-p", "facts:facts.jsonl", "-o", "answers"], capsys, message)
        assert "toy_int6_layer" in errors

    @long
    def test_new_process_finds_it_and_its_output_needs_no_package(self, home: Path) -> None:
        entries = {"compressknow.schemes": ["int6 = other:Int6"]}
        site = install_package(home / "site", "other", example("A quantization scheme"), entries)
        done = run_subprocess(site, "convert", "model", "out", "--quantize", "int6", "--group", "64")
        assert done.returncode == 0, done.stderr
        for command in (["verify", "out"], ["inspect", "out"], ["compare", "model", "out"]):
            assert main(command) == 0
        assert main(["report", "model", "out", "-p", "facts:facts.jsonl", "-o", "card.md"]) == 0
