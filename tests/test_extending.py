"""What another package adds works by the command line as what is built in, and what is wrong with it is one message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from compressknow.cli import main
from compressknow.probe.answers import TABLE, write_record, write_table
from compressknow.probe.sources import PROBES
from compressknow.registry import Registry
from compressknow.report.card.sections import SECTIONS
from compressknow.report.format import plain
from tests.extending import package
from tests.knowing import KNOWN_FACTS, knowing
from tests.report.answering import WORDS, answer, entry, run
from tests.report.hostile import TEXTS
from tests.report.pages import Element, read
from tests.shown import ROOT

MANUAL = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def example(section: str) -> str:
    """The code that the manual shows for it: what users copy is what is tested."""
    text = MANUAL.partition(f"\n## {section}\n")[2]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Installs a package of one module that adds one entry, for this test."""
    changed: list[tuple[Registry, str]] = []

    def add(registry: Registry, name: str, code: str, attribute: str) -> None:
        module = f"toy_{name}"
        entries = {registry.group: [f"{name} = {module}:{attribute}"]}
        monkeypatch.syspath_prepend(str(package(tmp_path / "site", module, code, entries)))
        changed.append((registry, name))
        registry.__dict__.pop("_added", None)

    yield add
    for registry, name in changed:
        registry.__dict__.pop("_added", None)
        registry._loaded.pop(name, None)
        sys.modules.pop(f"toy_{name}", None)


class TestProbe:
    """The manual's almanac, of facts that a tiny model knows."""

    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for part in ("capital", "language"):
            known = [fact for fact in KNOWN_FACTS if fact.relation == part]
            rows = [f"{fact.sub_label}\t{fact.obj_label}\t{fact.sentence('[MASK]')}" for fact in known]
            path = Path("data", "almanac", f"{part}.tsv")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(rows) + "\n", encoding="utf-8")

    @pytest.fixture
    def almanac(self, install) -> None:
        install(PROBES, "almanac", example("A probe"), "Almanac")

    @pytest.fixture
    def models(self, almanac: None) -> None:  # noqa: ARG002
        """The model, and one that was pruned until it forgot."""
        knowing("llama", Path("model"))
        assert main(["convert", "model", "pruned", "--prune", "70%"]) == 0

    def test_the_example_is_short(self) -> None:
        assert len(example("A probe").splitlines()) < 40

    @pytest.mark.usefixtures("models")
    def test_report_puts_it_on_the_card(self) -> None:
        given = ["-p", "almanac:capital", "-p", "Almanac:Language", "--data", "data"]
        assert main(["report", "model", "pruned", *given, "-o", "card.html", "-o", "card.json", "-o", "card.md"]) == 0
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
    def test_probe_keeps_its_answers_and_report_reads_them_by_any_case(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
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
        given = ["-p", "almanac:language", "--data", "data", "-o", "compare.json"]
        assert main(["compare", "model", "pruned", *given]) == 0
        assert "almanac:language" in Path("compare.json").read_text(encoding="utf-8")

    @pytest.mark.usefixtures("models")
    def test_sweep_and_search_run_on_it(self) -> None:
        Path("grid.toml").write_text("[axes]\nscope = ['overall']\nprune = [0.1, 0.7]\n", encoding="utf-8")
        given = ["-p", "almanac:capital", "-p", "almanac:language", "--data", "data"]
        assert main(["sweep", "model", "-o", "study", "--grid", "grid.toml", *given]) == 0
        study = json.loads(Path("study", "study.json").read_text(encoding="utf-8"))
        assert list(study["probes"]) == ["almanac:capital", "almanac:language"]
        pytest.importorskip("optuna")
        assert main(["search", "model", "-o", "found", "--keep", "0.5", "--trials", "1", *given]) == 0
        found = json.loads(Path("found", "search.json").read_text(encoding="utf-8"))
        assert (found["probes"], found["held_out"]) == (["almanac:capital", "almanac:language"], 16)

    @pytest.mark.usefixtures("almanac")
    @pytest.mark.parametrize("command", ["probe", "report", "compare", "sweep", "search"])
    def test_help_lists_it(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([command, "--help"]) == 0
        assert "almanac:TABLE       lands that are on no map: capital, language" in capsys.readouterr().out

    def test_a_process_of_its_own_finds_what_pip_has_installed(self, tmp_path: Path) -> None:
        entries = {"compressknow.probes": ["almanac = other:Almanac"]}
        site = package(tmp_path / "other-site", "other", example("A probe"), entries)
        path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", str(ROOT))])
        done = subprocess.run(
            [sys.executable, "-m", "compressknow", "probe", "model", "-o", "a", "-p", "almanac:capitol"],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "Did you mean almanac:capital?" in done.stderr
        assert "almanac:capital, almanac:language" in done.stderr

    @pytest.mark.usefixtures("almanac")
    def test_missing_data_says_where_to_get_and_to_put_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("empty").mkdir()
        assert main(["probe", "model", "-o", "a", "-p", "almanac:capital", "--data", "empty"]) == 2
        said = capsys.readouterr().err
        assert "empty does not hold almanac:capital." in said
        assert "example.org/almanac.zip" in said
        assert "Put it into DIR/almanac and say --data DIR." in said

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (("holds(self, folder, part):", "holds(self):"), "TypeError"),
            (("path.read_text", "path.read_txt"), "AttributeError"),
            (('f"{part}/{subject}"', "part"), "Two of its facts have the id 'capital'"),
            (("for subject, obj, sentence in rows", "for subject, obj, sentence in ()"), "has no facts left"),
            (("probe=name", 'probe="almanac"'), "does not have the name 'almanac:capital'"),
            (("candidates=objects", "candidates=objects[1:]"), "candidates of its fact 'capital/Avaland'"),
            (("return Probe(", "return (lambda *_, source: None)("), "neither a Probe nor a Task"),
            (("def open(", "def opened("), "abstract"),
            (("class Almanac(ProbeSource)", "class Almanac"), "not ProbeSource"),
            (("from compressknow.reading import sha256_of", "import nothing_like_it"), "ModuleNotFoundError"),
        ],
        ids=lambda case: case[1][:24] if isinstance(case, tuple) else "",
    )
    def test_what_is_wrong_with_it_is_one_message(
        self, change: tuple[str, str], says: str, install, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = example("A probe")
        assert change[0] in code
        install(PROBES, "almanac", code.replace(*change), "Almanac")
        exit_code = main(["probe", "model", "-o", "a", "-p", "almanac:capital", "--data", "data"])
        said = capsys.readouterr().err
        assert exit_code in (1, 2)
        assert [line for line in said.splitlines() if line.startswith("Error: ")] == said.splitlines()[:1]
        assert says in said
        assert "Traceback" not in said
        assert "fault of compressknow" not in said
        assert "toy_almanac" in said or says == "has no facts left"
        assert not Path("a").exists()

    def test_one_that_cannot_be_used_does_not_keep_others_from_working(
        self, install, capsys: pytest.CaptureFixture[str]
    ) -> None:
        install(PROBES, "broken", "import nothing_like_it\n", "Broken")
        assert main(["probe", "--help"]) == 0
        assert "atlas  " in capsys.readouterr().out
        assert main(["probe", "model", "-o", "a", "-p", "atlass"]) == 2
        assert "Did you mean atlas?" in capsys.readouterr().err


class TestSection:
    """The manual's section, on cards made from stored answers: of a model, and of one that says Rome of most facts."""

    ANSWERS = (
        [answer(number, number < 40, predicted=WORDS[number % 8]) for number in range(50)],
        [answer(number, number < 10) for number in range(50)],
    )

    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name, answers in zip(("before", "after"), run(self.ANSWERS), strict=True):
            Path(name).mkdir()
            write_table(Path(name, TABLE), answers.answers)
            write_record(Path(name), answers.record | {"probes": {"atlas": entry(facts=50, asked=50)}})

    @pytest.fixture
    def favourites(self, install) -> None:
        install(SECTIONS, "favourites", example("A section of the report"), "Favourites")

    @staticmethod
    def report(*given: str) -> tuple[Element, str, dict[str, Any]]:
        """The card by the command line: HTML, Markdown, JSON."""
        files = [Path("card.html"), Path("card.md"), Path("card.json")]
        assert main(["report", "before", "after", *given, "--overwrite", *(f"-o{file}" for file in files)]) == 0
        html, markdown, figures = (file.read_text(encoding="utf-8") for file in files)
        return read(html), markdown, json.loads(figures)

    @staticmethod
    def sections(page: Element) -> dict[str, Element]:
        """By id."""
        return {each.attributes.get("aria-labelledby", ""): each for each in page.all("section")}

    def test_the_example_is_short(self) -> None:
        assert len(example("A section of the report").splitlines()) < 40

    @pytest.mark.usefixtures("favourites")
    def test_report_shows_it_in_every_format(self, capsys: pytest.CaptureFixture[str]) -> None:
        page, markdown, figures = self.report()
        section = self.sections(page)["m1-favourites"]
        cells = [[cell.text for cell in row.children if isinstance(cell, Element)] for row in section.all("tr")]
        assert cells == [["Probe", "Original", "Compressed"], ["atlas", "14.0 %", "80.0 %"]]
        assert section.one("figure").one("desc").text == "atlas 80 %"
        titles = [each.text for each in page.one("nav").all("a")]
        assert titles[titles.index("By relation") + 1] == "Favourite answers"
        assert "## Favourite answers\n\nShare of facts that get the favourite answer:\n\n| Probe |" in markdown
        warned = "The compressed model gives one answer to 80.0 % of the facts of atlas."
        for text in (page.text, markdown):
            assert "A model that has forgotten a lot" in text
            assert "one that it gives to most of its facts" in text
            assert warned in text
        assert warned in capsys.readouterr().out
        assert figures["compressed"][0]["probes"]["atlas"]["favourites"] == [0.14, 0.8]

    @pytest.mark.usefixtures("favourites")
    def test_each_of_several_models_has_it_without_its_chart(self) -> None:
        page, markdown, figures = self.report("after")
        headings = {each.attributes.get("id"): each for each in page.all("h4")}
        for model in ("m1", "m2"):
            section = headings[f"{model}-favourites"].parent
            assert section is not None
            assert [cell.text for cell in section.one("table").all("td")] == ["14.0 %", "80.0 %"]
            assert not section.all("figure")
        assert markdown.count("### Favourite answers") == 2
        assert [each["probes"]["atlas"]["favourites"] for each in figures["compressed"]] == [[0.14, 0.8]] * 2

    @pytest.mark.parametrize("says", [True, False], ids=["shows_facts", "forgets to say so"])
    def test_no_facts_leaves_out_what_shows_them(self, says: bool, install) -> None:
        code = """
            from compressknow.report.card.section import Section
            from compressknow.report.parts import Text

            class Prompts(Section):
                title = "Prompts"
                shows_facts = SAYS

                def measure(self, answers):
                    return [before.prompt for before, _ in answers.pairs]

                def parts(self, context):
                    yield Text(context.measured["atlas"][7])
        """
        install(SECTIONS, "prompts", textwrap.dedent(code).replace("SAYS", str(says)), "Prompts")
        page, markdown, figures = self.report()
        assert "capital of country 7" in self.sections(page)["m1-prompts"].text
        page, markdown, figures = self.report("--no-facts")
        for text in (page.text, markdown, json.dumps(figures)):
            assert "capital of country" not in text
        assert ("m1-prompts" in self.sections(page)) is says
        assert any("it shows the text of facts" in each for each in figures["compressed"][0]["warnings"]) is not says

    @pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
    def test_no_text_of_it_breaks_out(self, text: str, install) -> None:
        code = """
            from markupsafe import Markup
            from compressknow.report.card.section import Section
            from compressknow.report.parts import *

            class Said(Section):
                def __init__(self):
                    self.title, self.method, self.glossary = self.text, (self.text,), ((self.text, self.text),)

                def parts(self, context):
                    T = self.text
                    table = Table(T, (T, T), ((T, T), (T, T)), sortable=True)
                    yield from (Text(T), Note(T), Remarks(T, [T]), table, Facts(table, T), Folded(T, (Note(T), table)))
                    yield Chart(T, T, lambda axes: axes.set_title(" ".join(T.split()).strip(chr(0xD800))))
                    yield Beside(None, table)
                    yield LeftOut(3, T, T)

                def warnings(self, context):
                    yield self.text

            class Harmless(Said):
                order, text = 101, "harmless"

            class Hostile(Said):
                order, text = 102, Markup(TEXT)
        """
        code = textwrap.dedent(code).replace("TEXT", repr(text))
        install(SECTIONS, "harmless", code, "Harmless")
        install(SECTIONS, "hostile", code, "Hostile")
        page, markdown, figures = self.report()
        assert not [each for each in figures["compressed"][0]["warnings"] if "is left out" in each]
        sections = self.sections(page)
        assert sections["m1-hostile"].shape == sections["m1-harmless"].shape
        assert plain(text, 60)[:30] in sections["m1-hostile"].text
        tokens = [token.type for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)]
        headings = [place for place, kind in enumerate(tokens) if kind == "heading_open"][-4:]
        harmless, hostile = (tokens[start:end] for start, end in pairwise(headings[:3]))
        assert hostile == harmless
        assert not {"html_block", "link_open"} & set(tokens)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (("most_common(1)[0][1] / len", "most_common(1)[0][9] / len"), "IndexError: tuple index out of range."),
            (("sides]", "sides], {0}"), "TypeError: Object of type set is not JSON serializable."),
            (("len(side) for", "len(side) * float('nan') for"), "ValueError: Out of range float values"),
            (("yield Note(", "yield str("), "TypeError: `parts` gives str, which is no part of a section."),
            (("yield Note(", "yield (lambda text: Drawn('<b>'))("), "TypeError: `parts` gives Drawn"),
            (('("Probe", "Original", "Compressed")', '("Probe", "Original")'), "ValueError: a row of the table"),
            (("axes.barh(**bars)", "axes.barh(bars)"), "TypeError"),
            (("def parts(", "def part("), "NotImplementedError"),
            (('title = "Favourite answers"', 'title = ""'), "it has no title."),
            (("order = 45", "order = 'first'"), "its order is no number."),
            (("class Favourites(Section)", "class Favourites"), "not Section"),
            (("from collections import Counter", "import nothing_like_it"), "ModuleNotFoundError"),
        ],
        ids=lambda case: case[1][:24] if isinstance(case, tuple) else "",
    )
    def test_one_that_fails_is_left_out_with_a_warning(
        self, change: tuple[str, str], says: str, install, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = example("A section of the report").replace("Chart, Note", "Chart, Drawn, Note")
        assert change[0] in code
        install(SECTIONS, "favourites", code.replace(*change), "Favourites")
        page, markdown, figures = self.report()
        assert "m1-favourites" not in self.sections(page)
        assert "m1-figures" in self.sections(page)
        assert "## Favourite answers" not in markdown
        assert "favourites" not in figures["compressed"][0]["probes"]["atlas"]
        (warning,) = [each for each in figures["compressed"][0]["warnings"] if "toy_favourites" in each]
        assert says in warning
        assert "Update or uninstall toy_favourites." in warning
        assert warning in page.text
        said = capsys.readouterr()
        assert "The section 'favourites' that toy_favourites adds" in said.out
        assert "Traceback" not in said.err

    @pytest.mark.parametrize("name", ["Favourites", "5favourites", "top"])
    def test_a_name_that_is_no_id_is_refused(self, name: str, install) -> None:
        install(SECTIONS, name, example("A section of the report"), "Favourites")
        _, markdown, figures = self.report()
        assert "## Favourite answers" not in markdown
        assert any("its name must be of small letters" in each for each in figures["compressed"][0]["warnings"])

    @pytest.mark.parametrize(
        ("name", "why"),
        [("figures", "The name is taken by a built-in one."), ("kept", "ValueError: report.json has that name")],
    )
    def test_a_name_that_is_taken_takes_nothing_away(self, name: str, why: str, install) -> None:
        install(SECTIONS, name, example("A section of the report"), "Favourites")
        SECTIONS._loaded.pop(name, None)
        page, _, figures = self.report()
        assert "Knowledge kept" in self.sections(page)["m1-figures"].text
        assert figures["compressed"][0]["probes"]["atlas"]["kept"] == 0.25
        (warning,) = [each for each in figures["compressed"][0]["warnings"] if f"toy_{name}" in each]
        assert why in warning

    @pytest.mark.usefixtures("favourites")
    def test_of_two_packages_with_one_name_neither_is_shown(self, tmp_path: Path, monkeypatch) -> None:
        entries = {"compressknow.sections": ["favourites = second:Favourites"]}
        code = example("A section of the report")
        monkeypatch.syspath_prepend(str(package(tmp_path / "second-site", "second", code, entries)))
        SECTIONS.__dict__.pop("_added", None)
        page, _, figures = self.report()
        assert "m1-favourites" not in self.sections(page)
        (warning,) = [each for each in figures["compressed"][0]["warnings"] if "second" in each]
        assert "The section 'favourites' that second and toy_favourites add cannot be used." in warning
        assert "Uninstall one of them." in warning

    def test_a_process_of_its_own_finds_what_pip_has_installed(self, tmp_path: Path) -> None:
        entries = {"compressknow.sections": ["favourites = other:Favourites"]}
        site = package(tmp_path / "other-site", "other", example("A section of the report"), entries)
        path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", str(ROOT))])
        command = [sys.executable, "-m", "compressknow", "report", "before", "after", "-o", "card.md"]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=True)
        assert "## Favourite answers" in Path("card.md").read_text(encoding="utf-8")
