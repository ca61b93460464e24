"""What another package adds works by the command line as what is built in, and what is wrong with it is one message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressknow.cli import main
from compressknow.probe.sources import PROBES
from compressknow.registry import Registry
from tests.extending import package
from tests.knowing import KNOWN_FACTS, knowing
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
