"""README.md and docs/ are true: every command that they show runs, and prints what they show where that is fixed.

The commands run on a small copy of the demo's world: models of a few thousand weights under the names that the pages
use, and a few facts of LAMA and BEAR. What only a network, a cluster or another package gives is parsed, not run.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from unittest.mock import MagicMock

import click
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import compressknow
from compressknow.cli import COMMANDS, cli, main
from compressknow.comparison.records import ChangedFact
from compressknow.compress.recipe import Recipe
from compressknow.evaluate.records import Speed
from compressknow.pages.card.make import make_card
from compressknow.pages.study.summary import Cliff, LossRanking
from compressknow.study.grid import read_grid
from tests.evaluate.layouts import WORDS, bear_folder, lama_folder
from tests.long import long
from tests.pages.answering import make_rows, make_runs
from tests.shown import PAGES, ROOT, Shown, blocks, commands, name_of

REPOSITORY = "https://github.com/compressknow/compressknow"
DOCUMENTS = sorted({*PAGES, *ROOT.glob("*.md"), *ROOT.glob("examples/**/README.md")})
SHOWN = [shown for page in PAGES for shown in commands(page)]
# Pages whose commands take long to run.
SLOW = {"choosing", "probes", "report", "search", "sensitivity", "sweep"}
# Run with fewer facts and trials than the pages show.
CHEAPER = {
    "probe": ["--limit", "8"],
    "report": ["--limit", "8"],
    "sweep": ["--limit", "8"],
    "search": ["--limit", "24", "--guide", "text", "--to", "checkpoint"],
    # The small model knows too few facts to be guided by.
    "sensitivity": ["--guide", "text", "--calibration-tokens", "512"],
}
# These take longest: they run on the page of their command alone.
LONG = ("sweep", "search", "sensitivity")
# Needs a network, a cluster, an accelerator, half a minute of imports, or a model of some size.
ELSEWHERE = re.compile(r"--size|https?:|hf:[A-Za-z]|lm-eval:|--ray|\.gguf|cuda|^[\w-]+/[\w.-]+$")
LOCAL = ("build", "examples", "data", "answers", "study", "found")
# Reads weights and no more than them: the same on every machine.
FIXED = ("inspect", "convert", "verify", "compare")


def is_run(shown: Shown) -> bool:
    if shown.words[1] in LONG and shown.page != f"docs/commands/{shown.words[1]}.md":
        return False
    return not any(ELSEWHERE.search(word) and word.split("/")[0] not in LOCAL for word in shown.words[2:])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pages' commands find what they name."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "examples").symlink_to(ROOT / "examples")
    lama_folder(folder / "data" / "lama")
    bear_folder(folder / "data" / "bear")
    (folder / "wiki.test.raw").write_text("\n".join(fact.prompt for fact in _atlas()[:1500]), encoding="utf-8")
    _small_llama(folder / "build" / "smollm2")
    compressknow.convert(
        folder / "build" / "smollm2", folder / "build" / "smollm2-att-int8", scope="attention", prune=0.2,
        quantize="int8",
    )  # fmt: skip
    return folder


def _small_llama(folder: Path) -> None:
    """A Llama of as many layers as the examples narrow to, with a tokenizer that has LAMA's words as one token each."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["</s>"], initial_alphabet=alphabet)
    facts = [fact.prompt for fact in _atlas()]
    backend.train_from_iterator([*facts, *[f"Say {word} {word}" for word in WORDS] * 500], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _atlas() -> tuple[compressknow.evaluate.facts.Fact, ...]:
    from compressknow.evaluate.sources.sets import read_atlas

    return read_atlas().facts


@pytest.fixture
def at_home(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world to be in, with a cache of its own."""
    home = tmp_path / "home"
    shutil.copytree(world, home, symlinks=True)
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return home


@pytest.mark.parametrize("page", [pytest.param(p, marks=[long] * (p.stem in SLOW), id=name_of(p)) for p in PAGES])
def test_commands_of_a_page_run_one_after_the_other(
    page: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shown in filter(lambda shown: shown.is_ours, commands(page)):
        if not is_run(shown):
            parse(shown)
            continue
        code = main(as_run(shown))
        said = capsys.readouterr()
        if shown.fails:
            assert said.err.strip() == shown.output, shown.line
            assert code in (1, 2), shown.line
        else:
            # A small model that knows little misses gates, and has no recipe that keeps what is wanted.
            gated = "--fail-under" in shown.words or shown.words[1] == "search"
            assert code in ((0, 3) if gated else (0,)), f"{shown.line}\n{said.err}"


def test_what_the_workflow_to_copy_does_after_the_gate_it_does_where_that_is_not_met() -> None:
    workflow = yaml.safe_load((ROOT / "examples" / "ci" / "knowledge-gate.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["gate"]["steps"]
    (gate,) = (place for place, step in enumerate(steps) if "--fail-under" in step.get("run", ""))
    assert all(step["if"].startswith("always()") for step in steps[gate + 1 :])
    saved = [step for step in steps[gate + 1 :] if step.get("uses", "").startswith("actions/cache/save@")]
    # The action that also restores saves nothing after a step that failed.
    assert [step["with"]["path"] for step in saved] == ["answers"]


@long
def test_the_workflow_to_copy_gates_a_conversion(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own steps by hand, in a shell with its own environment: packages and what only GitHub has are left out."""
    workflow = yaml.safe_load((ROOT / "examples" / "ci" / "knowledge-gate.yml").read_text(encoding="utf-8"))
    recipe = at_home / "compression" / "recipe.toml"
    recipe.parent.mkdir()
    shutil.copy(ROOT / "examples" / "recipes" / "att-prune20-int8.toml", recipe)
    given = {**workflow["env"], "MODEL": "build/smollm2", "KEEP": "0.2"}
    steps = [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    for step in steps:
        for line in step.splitlines():
            assert not line.startswith("compressknow") or shlex.split(line)[1] in COMMANDS
        if not step.startswith("compressknow"):
            continue
        words = shlex.split(re.sub(r"\$(\w+)", lambda found: given[found[1]], step))
        code = main(words[1:])
        assert code in ((0, 3) if words[1] == "report" else (0,)), capsys.readouterr().err
    assert {"summary.md", "junit.xml", "report.html", "report.json", "answers", "converted"} <= {
        path.name for path in at_home.iterdir()
    }
    assert "| at least 20 % |" in (at_home / "summary.md").read_text(encoding="utf-8")
    assert [step.split()[0] for step in steps] == ["pip", "pip", *["compressknow"] * 3, "cat", "gh"]


def parse(shown: Shown) -> None:
    """Have click read the options of a command that is not run."""
    context = click.Context(cli, info_name="compressknow")
    command = cli.get_command(context, shown.words[1])
    assert command is not None, shown.line
    command.make_context(shown.words[1], shown.words[2:], parent=context)


def as_run(shown: Shown) -> list[str]:
    """The command as the small world runs it."""
    words = shown.words[1:]
    if words[0].startswith("-") or "--help" in words or shown.fails:
        return words
    writes_over = words[0] == "convert" or (words[0] in ("report", "compare") and "-o" in words)
    over = ["--overwrite"] if writes_over and "--overwrite" not in words and "--dry-run" not in words else []
    facts = CHEAPER["report"] if words[0] == "compare" and "-p" in words else CHEAPER.get(words[0], [])
    return [*words, *facts, *over]


@pytest.mark.network
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_the_real_model_prints_is_what_a_page_shows(
    page: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the commands that read weights alone: what facts are answered may differ between CPUs."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "smollm2").symlink_to(smollm2)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for shown in commands(page):
        if not shown.is_ours or shown.words[1] not in FIXED or "-p" in shown.words or shown.fails:
            continue
        if "build/smollm2" not in shown.line or not shown.output or "..." in shown.output:
            continue
        if shown.words[1] in ("verify", "compare") and not Path(shown.words[-1]).exists():
            options = {"scope": "attention", "prune": 0.2, "quantize": "int8"}
            compressknow.convert("build/smollm2", shown.words[-1], **options)  # type: ignore[arg-type]
        assert main(shown.words[1:]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.strip("\n") == shown.output, shown.line


@pytest.mark.parametrize("shown", [s for s in SHOWN if not s.is_ours], ids=lambda s: f"{s.page}: {s.line}"[:120])
def test_other_commands_name_what_there_is(shown: Shown) -> None:
    words = shown.words
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).is_file() or words[1] in ("-m", "-c")
    else:
        assert words[0] in ("pip", "git", "cd", "export", "ray", "eval", "ollama", "llama-server"), shown.line
    extras = re.findall(r"compressknow\[([\w,]+)\]", shown.line)
    defined = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert all(extra in defined for named in extras for extra in named.split(","))


@pytest.mark.parametrize("page", [pytest.param(p, marks=[long] * (p.stem == "api"), id=name_of(p)) for p in PAGES])
def test_python_of_a_page_runs(page: Path, at_home: Path) -> None:
    # Trackers of experiments, which are not installed here, are stood in for below.
    code = "\n".join(
        block for block in blocks(page, "python") if not any(f"import {name}" in block for name in TRACKERS)
    )
    names: dict[str, object] = {}
    exec(compile(code, name_of(page), "exec"), names)


TRACKERS = ("mlflow", "wandb")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_card_goes_to_a_tracker_as_the_page_says(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = MagicMock()
    monkeypatch.setitem(sys.modules, tracker, recorder)
    original, compressed = make_runs(make_rows(95, 5))
    (code,) = (block for block in blocks(ROOT / "docs" / "api.md", "python") if f"import {tracker}" in block)
    exec(compile(code, tracker, "exec"), {"card": make_card(original, [compressed])})
    given = str(recorder.mock_calls)
    assert "{'recipe': 'Overall_GQ', 'known': 'recognized'}" in given
    assert "{'kept': 0.95, 'bytes': 1100000}" in given
    assert "tiny-bert-int8  Overall_GQ  atlas" in given
    assert "'report.html'" in given


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_grids_and_json_of_a_page_are_read(page: Path, tmp_path: Path) -> None:
    for text in blocks(page, "toml"):
        values = tomllib.loads(text)
        if "axes" in values or "cells" in values:
            (tmp_path / "grid.toml").write_text(text, encoding="utf-8")
            assert read_grid(tmp_path / "grid.toml")
        elif "steps" in values:
            assert Recipe.from_dict(values).steps
    for text in blocks(page, "json"):
        json.loads(text)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_stands_on_the_page_of_its_command(name: str) -> None:
    own = (ROOT / "docs" / "commands" / f"{name}.md").read_text(encoding="utf-8")
    shared = (ROOT / "docs" / "commands" / "shared.md").read_text(encoding="utf-8")
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            longest = max(parameter.opts, key=len)
            assert any(re.search(rf"`[^`]*{re.escape(longest)}\b", text) for text in (own, shared)), longest


def test_formats_page_names_every_key(at_home: Path) -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w-]+)`", page))
    # `mrr_...` stands for one key before and one after; figures have an interval each.
    families = tuple(re.findall(r"`(\w+_)\.\.\.`", page))
    facts, folders = ["facts:examples/facts.jsonl"], ("build/smollm2", "build/smollm2-att-int8")
    answers = compressknow.probe(folders[0], "answers", facts)
    card = compressknow.report(*folders, facts, output=["card.json"])
    compressknow.compare(*folders, output=["compare.json"])
    grid = '[axes]\nscope = ["attention", "feed-forward"]\nquantize = ["int8"]'
    (at_home / "grid.toml").write_text(grid, encoding="utf-8")
    compressknow.sweep(folders[0], "study", grid="grid.toml", probe=facts)
    manifest, report, compared, study = (
        json.loads((at_home / name).read_text(encoding="utf-8"))
        for name in ("build/smollm2-att-int8/compressknow.json", "card.json", "compare.json", "study/study.json")
    )
    entry, record = report["compressed"][0], answers.record.to_dict()
    shown = [
        manifest, manifest["source"], manifest["totals"], manifest["tensors"][0],
        record, record["model"], *record["probes"].values(),
        dict.fromkeys(field.name for field in dataclasses.fields(answers.answers[0])),
        report, report["original"], entry, *entry["probes"].values(), *entry["grade_details"].values(),
        *(group for probe in entry["probes"].values() for group in probe["by_relation"].values()),
        compared, compared["weights"], compared["weights"]["total"], compared["weights"]["tensors"][0],
        study, study["findings"]["F1"], study["cells"][0], *study["probes"].values(), *study["kept"].values(),
        study["findings"]["F6"]["comparisons"][0],
        *(
            dict.fromkeys(each.name for each in dataclasses.fields(kind))
            for kind in (ChangedFact, Speed, LossRanking, Cliff)
        ),
        compressknow.inspect(folders[0]),
    ]  # fmt: skip
    assert card.comparisons
    keys = {key if key in named else key.removesuffix("_interval") for values in shown for key in values}
    assert {key for key in keys - named if not key.startswith(families)} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_into_the_repository_lead_somewhere(path: Path) -> None:
    """Those by their address on the web; the manual's own are checked when it is built."""
    for name in re.findall(
        rf"{re.escape(REPOSITORY)}/(?:blob|tree)/main/([^)#\s>]+)", path.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_are_there(name: str) -> None:
    tops = [path for path in ROOT.iterdir() if path.name[0] != "." and path.name not in ("build", "dist")]
    there = [path.relative_to(ROOT).as_posix() for top in tops for path in (top, *top.rglob("*"))]
    for path in re.findall(r"`([\w/.-]+(?:/|\.(?:py|md|toml|j2|css)))`", (ROOT / name).read_text(encoding="utf-8")):
        assert path.endswith("/NAME.py") or any(f"/{each}".endswith(f"/{path.rstrip('/')}") for each in there), path


@pytest.mark.parametrize("path", [*ROOT.glob(".github/**/*.yml"), *ROOT.glob("examples/ci/*.yml")], ids=name_of)
def test_workflows_and_forms_are_yaml_with_commands_that_there_are(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for job in content.get("jobs", {}).values():
        for line in (step["run"] for step in job["steps"] if "run" in step):
            if line.startswith("compressknow "):
                values = {f"${name}": str(value) for name, value in content["env"].items()}
                words = [values.get(word, word) for word in shlex.split(line)]
                parse(Shown(name_of(path), shlex.join(words), ""))


def test_readme_is_short_and_reads_the_same_on_the_package_index() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 180
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links
    assert all(link.startswith("https://") for link in links)
    pictures = re.findall(r"https://raw\.githubusercontent\.com/compressknow/compressknow/main/([^)]+)", readme)
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_the_papers_page_answers_the_findings_as_the_studies_do() -> None:
    row = r"^\| \[.*/examples/studies/(.*?)/study\.md\).*? \|(.*)\|(.*)\|(.*)\|$"
    rows = re.findall(row, (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name, *_ in rows} == {"smollm2-atlas", "minilm-trex", "t5-facts"}
    for name, *told in rows:
        page = (ROOT / "examples" / "studies" / name / "study.md").read_text(encoding="utf-8")
        found = re.findall(r"^\| (F\d+) \| .*? \| ([a-z ]+) \|", page, re.MULTILINE)
        for answer, cell in zip(("holds", "does not hold", "cannot tell"), told, strict=True):
            assert re.findall(r"F\d+", cell) == [finding for finding, its in found if its == answer], (name, answer)


def test_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == compressknow.__version__
    assert citation["repository-code"] == REPOSITORY
    authors = [author["family-names"] for author in citation["references"][0]["authors"]]
    assert authors == ["Namburi", "Sreedhar", "Srinivasan", "Sala"]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2].partition("\nplugins:")[0]
    listed = re.findall(r": ([\w/-]+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in PAGES if p.parent != ROOT)
