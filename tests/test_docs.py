"""README.md and docs/: every command shown runs, and prints the output shown if that is the same on every machine.

Commands run in a folder with the names that the pages use: models of a few thousand weights, and some facts of LAMA
and BEAR. Commands that need a network, a cluster or another package are parsed, not run.
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
from tests.evaluate.layouts import WORDS, write_bear, write_lama
from tests.long import long
from tests.pages.answering import make_rows, make_runs
from tests.shown import PAGES, ROOT, ShownCommand, find_blocks, find_commands, name_of

REPOSITORY = "https://github.com/compressknow/compressknow"
DOCUMENTS = sorted({*PAGES, *ROOT.glob("*.md"), *ROOT.glob("examples/**/README.md")})
SHOWN = [shown for page in PAGES for shown in find_commands(page)]
# Pages whose commands take long to run.
SLOW = {"choosing", "probes", "report", "search", "sensitivity", "sweep"}
# Options added to commands, to run them with fewer facts and trials.
CHEAPER = {
    "probe": ["--limit", "8"],
    "report": ["--limit", "8"],
    "sweep": ["--limit", "8"],
    "search": ["--limit", "24", "--guide", "text", "--to", "checkpoint"],
    # The small model knows too few facts to be guided by them.
    "sensitivity": ["--guide", "text", "--calibration-tokens", "512"],
}
# These take longest: they run only from their own page.
LONG = ("sweep", "search", "sensitivity")
# Arguments that need a network, a cluster, an accelerator, half a minute of imports, or a larger model.
NOT_RUN = re.compile(r"--size|https?:|hf:[A-Za-z]|lm-eval:|--ray|\.gguf|cuda|^[\w-]+/[\w.-]+$")
LOCAL = ("build", "examples", "data", "answers", "study", "found")
# These only read weights: they print the same on every machine.
FIXED = ("inspect", "convert", "verify", "compare")


def is_run(shown: ShownCommand) -> bool:
    if shown.words[1] in LONG and shown.page != f"docs/commands/{shown.words[1]}.md":
        return False
    return not any(NOT_RUN.search(word) and word.split("/")[0] not in LOCAL for word in shown.words[2:])


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with the files that the pages' commands name."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "examples").symlink_to(ROOT / "examples")
    write_lama(folder / "data" / "lama")
    write_bear(folder / "data" / "bear")
    (folder / "wiki.test.raw").write_text("\n".join(fact.prompt for fact in _read_facts()[:1500]), encoding="utf-8")
    _write_llama(folder / "build" / "smollm2")
    compressknow.convert(
        folder / "build" / "smollm2", folder / "build" / "smollm2-att-int8", scope="attention", prune=0.2,
        quantize="int8",
    )  # fmt: skip
    return folder


def _write_llama(folder: Path) -> None:
    """Write a Llama with the 8 layers that examples select from, whose tokenizer has one token per word of LAMA."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=["</s>"], initial_alphabet=alphabet)
    facts = [fact.prompt for fact in _read_facts()]
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


def _read_facts() -> tuple[compressknow.evaluate.facts.Fact, ...]:
    from compressknow.evaluate.sources.sets import read_atlas

    return read_atlas().facts


@pytest.fixture
def workspace(demo_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a copy of that folder, with an empty cache."""
    folder = tmp_path / "home"
    shutil.copytree(demo_files, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return folder


@pytest.mark.parametrize("page", [pytest.param(p, marks=[long] * (p.stem in SLOW), id=name_of(p)) for p in PAGES])
def test_commands_of_a_page_run_one_after_the_other(
    page: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shown in filter(lambda shown: shown.is_ours, find_commands(page)):
        if not is_run(shown):
            parse(shown)
            continue
        code = main(cheaper(shown))
        errors = capsys.readouterr().err
        if shown.fails:
            assert errors.strip() == shown.output, shown.line
            assert code in (1, 2), shown.line
        else:
            # The small model knows too little to pass gates, or for a search to succeed.
            gated = "--fail-under" in shown.words or shown.words[1] == "search"
            assert code in ((0, 3) if gated else (0,)), f"{shown.line}\n{errors}"


def test_example_workflow_runs_the_steps_after_the_gate_even_if_it_fails() -> None:
    workflow = yaml.safe_load((ROOT / "examples" / "ci" / "knowledge-gate.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["gate"]["steps"]
    (gate,) = (index for index, step in enumerate(steps) if "--fail-under" in step.get("run", ""))
    assert all(step["if"].startswith("always()") for step in steps[gate + 1 :])
    saved = [step for step in steps[gate + 1 :] if step.get("uses", "").startswith("actions/cache/save@")]
    # actions/cache, which also restores, saves nothing after a failed step.
    assert [step["with"]["path"] for step in saved] == ["answers"]


@long
def test_example_workflow_gates_a_conversion(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the compressknow commands of its steps, with its environment."""
    workflow = yaml.safe_load((ROOT / "examples" / "ci" / "knowledge-gate.yml").read_text(encoding="utf-8"))
    recipe = workspace / "compression" / "recipe.toml"
    recipe.parent.mkdir()
    shutil.copy(ROOT / "examples" / "recipes" / "att-prune20-int8.toml", recipe)
    environment = {**workflow["env"], "MODEL": "build/smollm2", "KEEP": "0.2"}
    steps = [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    for step in steps:
        for line in step.splitlines():
            assert not line.startswith("compressknow") or shlex.split(line)[1] in COMMANDS
        if not step.startswith("compressknow"):
            continue
        words = shlex.split(re.sub(r"\$(\w+)", lambda match: environment[match[1]], step))
        code = main(words[1:])
        assert code in ((0, 3) if words[1] == "report" else (0,)), capsys.readouterr().err
    assert {"summary.md", "junit.xml", "report.html", "report.json", "answers", "converted"} <= {
        path.name for path in workspace.iterdir()
    }
    assert "| at least 20 % |" in (workspace / "summary.md").read_text(encoding="utf-8")
    assert [step.split()[0] for step in steps] == ["pip", "pip", *["compressknow"] * 3, "cat", "gh"]


def parse(shown: ShownCommand) -> None:
    """Parse the arguments of a command with click, without running it."""
    context = click.Context(cli, info_name="compressknow")
    command = cli.get_command(context, shown.words[1])
    assert command is not None, shown.line
    command.make_context(shown.words[1], shown.words[2:], parent=context)


def cheaper(shown: ShownCommand) -> list[str]:
    """Return the command's arguments, with options that make it fast and repeatable."""
    words = shown.words[1:]
    if words[0].startswith("-") or "--help" in words or shown.fails:
        return words
    writes = words[0] == "convert" or (words[0] in ("report", "compare") and "-o" in words)
    overwrite = ["--overwrite"] if writes and "--overwrite" not in words and "--dry-run" not in words else []
    facts = CHEAPER["report"] if words[0] == "compare" and "-p" in words else CHEAPER.get(words[0], [])
    return [*words, *facts, *overwrite]


@pytest.mark.network
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_show_the_output_for_the_real_model(
    page: Path, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check the commands that only read weights: answers to facts may differ between CPUs."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "smollm2").symlink_to(smollm2)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for shown in find_commands(page):
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
def test_other_commands_name_files_targets_and_extras_that_exist(shown: ShownCommand) -> None:
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
def test_python_of_a_page_runs(page: Path, workspace: Path) -> None:
    # Trackers of experiments are not installed; see the next test.
    code = "\n".join(
        block for block in find_blocks(page, "python") if not any(f"import {name}" in block for name in TRACKERS)
    )
    names: dict[str, object] = {}
    exec(compile(code, name_of(page), "exec"), names)


TRACKERS = ("mlflow", "wandb")


@pytest.mark.parametrize("tracker", TRACKERS)
def test_python_of_a_page_logs_a_card_to_a_tracker(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = MagicMock()
    monkeypatch.setitem(sys.modules, tracker, recorder)
    original, compressed = make_runs(make_rows(95, 5))
    (code,) = (block for block in find_blocks(ROOT / "docs" / "api.md", "python") if f"import {tracker}" in block)
    exec(compile(code, tracker, "exec"), {"card": make_card(original, [compressed])})
    calls = str(recorder.mock_calls)
    assert "{'recipe': 'Overall_GQ', 'known': 'recognized'}" in calls
    assert "{'kept': 0.95, 'bytes': 1100000}" in calls
    assert "tiny-bert-int8  Overall_GQ  atlas" in calls
    assert "'report.html'" in calls


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_recipes_grids_and_json_of_a_page_are_valid(page: Path, tmp_path: Path) -> None:
    for text in find_blocks(page, "toml"):
        values = tomllib.loads(text)
        if "axes" in values or "cells" in values:
            (tmp_path / "grid.toml").write_text(text, encoding="utf-8")
            assert read_grid(tmp_path / "grid.toml")
        elif "steps" in values:
            assert Recipe.from_dict(values).steps
    for text in find_blocks(page, "json"):
        json.loads(text)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_on_the_page_of_its_command(name: str) -> None:
    page = (ROOT / "docs" / "commands" / f"{name}.md").read_text(encoding="utf-8")
    shared = (ROOT / "docs" / "commands" / "shared.md").read_text(encoding="utf-8")
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            longest = max(parameter.opts, key=len)
            assert any(re.search(rf"`[^`]*{re.escape(longest)}\b", text) for text in (page, shared)), longest


def test_formats_page_names_every_key(workspace: Path) -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w-]+)`", page))
    # The page writes `mrr_...` for two keys, before and after, and does not repeat `_interval` for each figure.
    families = tuple(re.findall(r"`(\w+_)\.\.\.`", page))
    facts, folders = ["facts:examples/facts.jsonl"], ("build/smollm2", "build/smollm2-att-int8")
    answers = compressknow.probe(folders[0], "answers", facts)
    card = compressknow.report(*folders, facts, output=["card.json"])
    compressknow.compare(*folders, output=["compare.json"])
    grid = '[axes]\nscope = ["attention", "feed-forward"]\nquantize = ["int8"]'
    (workspace / "grid.toml").write_text(grid, encoding="utf-8")
    compressknow.sweep(folders[0], "study", grid="grid.toml", probe=facts)
    manifest, report, compared, study = (
        json.loads((workspace / name).read_text(encoding="utf-8"))
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
def test_links_to_files_on_github_exist(path: Path) -> None:
    """Relative links are checked when the manual is built."""
    for name in re.findall(
        rf"{re.escape(REPOSITORY)}/(?:blob|tree)/main/([^)#\s>]+)", path.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    tops = [path for path in ROOT.iterdir() if path.name[0] != "." and path.name not in ("build", "dist")]
    files = [path.relative_to(ROOT).as_posix() for top in tops for path in (top, *top.rglob("*"))]
    for path in re.findall(r"`([\w/.-]+(?:/|\.(?:py|md|toml|j2|css)))`", (ROOT / name).read_text(encoding="utf-8")):
        assert path.endswith("/NAME.py") or any(f"/{each}".endswith(f"/{path.rstrip('/')}") for each in files), path


@pytest.mark.parametrize("path", [*ROOT.glob(".github/**/*.yml"), *ROOT.glob("examples/ci/*.yml")], ids=name_of)
def test_workflows_and_forms_are_yaml_with_valid_commands(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for job in content.get("jobs", {}).values():
        for line in (step["run"] for step in job["steps"] if "run" in step):
            if line.startswith("compressknow "):
                values = {f"${name}": str(value) for name, value in content["env"].items()}
                words = [values.get(word, word) for word in shlex.split(line)]
                parse(ShownCommand(name_of(path), shlex.join(words), ""))


def test_readme_is_short_and_its_links_work_on_the_package_index() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 180
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links
    assert all(link.startswith("https://") for link in links)
    pictures = re.findall(r"https://raw\.githubusercontent\.com/compressknow/compressknow/main/([^)]+)", readme)
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_paper_page_has_the_findings_of_the_studies() -> None:
    row = r"^\| \[.*/examples/studies/(.*?)/study\.md\).*? \|(.*)\|(.*)\|(.*)\|$"
    rows = re.findall(row, (ROOT / "docs" / "paper.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name, *_ in rows} == {"smollm2-atlas", "minilm-trex", "t5-facts"}
    for name, *cells in rows:
        page = (ROOT / "examples" / "studies" / name / "study.md").read_text(encoding="utf-8")
        findings = re.findall(r"^\| (F\d+) \| .*? \| ([a-z ]+) \|", page, re.MULTILINE)
        for verdict, cell in zip(("holds", "does not hold", "cannot tell"), cells, strict=True):
            assert re.findall(r"F\d+", cell) == [key for key, answer in findings if answer == verdict], (name, verdict)


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
