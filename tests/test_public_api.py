"""The names of `import compressknow`, and what it imports."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressknow
from compressknow.api.keywords import ServerKeywords, build_run_options
from compressknow.api.report import report
from compressknow.base.errors import CheckpointError, UnsupportedError, UsageError
from compressknow.cli import COMMANDS, cli, main
from compressknow.compress.recipe import Recipe
from compressknow.model.structure import DEFAULT_SCOPES
from tests.gguf.making import needs_converter
from tests.knowing import KNOWN_FACTS, save_trained_custom_code, write_facts
from tests.models import put_into_hub_cache, save_tiny

VERBS = [name for name in compressknow.__all__ if name.islower() and not name.startswith("_")]
RECORDS = [name for name in compressknow.__all__ if not name.islower()]


@pytest.mark.parametrize("name", VERBS)
def test_verbs_are_documented_and_typed(name: str) -> None:
    # Importing a package with this name would replace the function.
    assert not (Path(compressknow.__file__).parent / name).exists(), name
    assert inspect.isfunction(getattr(compressknow, name))
    function = getattr(importlib.import_module(f"compressknow.api.{name}"), name)
    assert inspect.isfunction(function)
    assert len(inspect.getdoc(function) or "") > 80
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


# Options without a parameter, and parameters without an option.
ONLY_ON_THE_COMMAND_LINE = {"json", "push", "private", "no_facts of sweep", "model of probe", "model of report"}
ONLY_IN_PYTHON = {"on_progress", "on_result", "command", "options", "settings", "parameters", "check", "model_name"}


@pytest.mark.parametrize("name", COMMANDS)
def test_parameters_are_the_options_of_the_command(name: str) -> None:
    command = getattr(importlib.import_module(f"compressknow.cli.{name}"), name)
    words = set()
    for each in command.params:
        option = next((option for option in each.opts if option.startswith("--")), each.name)
        words.add(option.removeprefix("--").replace("-", "_"))
    verb = getattr(importlib.import_module(f"compressknow.api.{name}"), name)
    parameters = set(inspect.signature(verb).parameters)
    assert {
        word for word in words - parameters if {word, f"{word} of {name}"}.isdisjoint(ONLY_ON_THE_COMMAND_LINE)
    } == set()
    assert parameters - words - ONLY_IN_PYTHON == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_of_the_command_line_are_those_of_python(name: str) -> None:
    command = getattr(importlib.import_module(f"compressknow.cli.{name}"), name)
    verb = getattr(importlib.import_module(f"compressknow.api.{name}"), name)
    defaults = {word: each.default for word, each in inspect.signature(verb).parameters.items()}
    # click keeps the help option of the first context, with that context's names for it.
    given = command.make_context(name, [], resilient_parsing=True, **cli.context_settings).params
    both = {word: (value, defaults[word]) for word, value in given.items() if word in defaults}
    # On the command line, an argument that is required has no value here, and an option without a value may be ().
    alike = {word for word, (value, default) in both.items() if value == default or (not value and not default)}
    assert {word for word in both.keys() - alike if defaults[word] is not inspect.Parameter.empty} == set()


def test_defaults_of_a_signature_are_those_of_the_records() -> None:
    defaults = {name: each.default for name, each in inspect.signature(report).parameters.items()}
    options, settings = build_run_options({name: defaults[name] for name in ServerKeywords.__annotations__})
    assert (options, settings) == (compressknow.Options(), compressknow.Settings())


def test_error_of_an_unknown_keyword_suggests_the_right_one() -> None:
    with pytest.raises(TypeError, match=r"report\(\) got an unexpected keyword argument 'limt'. Did you mean limit\?"):
        report("a", "b", limt=3)  # type: ignore[call-arg]


def test_numpy_numbers_are_accepted_and_texts_for_numbers_refused_before_any_work(tmp_path: Path) -> None:
    assert json.dumps(asdict(compressknow.Options(seed=np.int64(3)))["seed"]) == "3"  # type: ignore[arg-type]
    settings = compressknow.Settings(batch_size=np.int64(4), timeout=np.float32(2))  # type: ignore[arg-type]
    assert json.dumps([settings.batch_size, settings.timeout]) == "[4, 2.0]"
    for word, value in (("seed", "x"), ("limit", "3"), ("templates", 2.5), ("template", None)):
        with pytest.raises(UsageError, match=f"^`{word}` must be a whole number: {value!r}"):
            compressknow.probe("a", tmp_path / "answers", **{word: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        ("original", 5, "`original` must be a name or a path: 5."),
        ("compressed", None, "`compressed` must be a name or a path: None."),
        ("compressed", ["a", 5], "`compressed` must be a name or a path: 5."),
        ("compressed", [], "There is no compressed model to compare."),
        ("compressed", "", "`compressed` is empty."),
        ("original", torch.nn.Sequential(torch.nn.ReLU()), "`original` must be a name or a path: Sequential object."),
        ("fail_under", {"science": 0.9}, "`fail_under` must be between 0 and 1: {'science': 0.9}."),
        ("options", {"limit": 20}, "`options` must be a compressknow.Options: {'limit': 20}."),
        ("settings", {}, "`settings` must be a compressknow.Settings: {}."),
        ("output", [5], "`output` must be a name or a path: 5."),
        ("answers", 5, "`answers` must be a name or a path: 5."),
        ("data", 3, "`data` must be a name or a path: 3."),
        ("tasks", 3, "`tasks` must be a name or a path: 3."),
        ("map", 5, "`map` must be a mapping, or texts like KEY=COLUMN: 5."),
        ("map", [5], "`map` must be a mapping, or texts like KEY=COLUMN: 5."),
        ("protocol", 3, "Unknown protocol '3'."),
        ("known", 3, "3 is not a definition of known."),
        ("runtime", 5, "There is no runtime 5."),
        ("probe", 5, "A probe must be a name, such as atlas: 5."),
        ("probe", ["atlas", 5], "A probe must be a name, such as atlas: 5."),
        ("revision", 5, "A revision must be the name of a branch, tag or commit: 5."),
    ],
)
def test_values_of_other_types_are_one_message(word: str, value: object, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        report(**{"original": "a", "compressed": "b", word: value})  # type: ignore[arg-type]
    assert raised.value.what == message


def test_arguments_of_other_types_are_named_too() -> None:
    with pytest.raises(UsageError, match=r"^`model` must be a name or a path: 5\.$"):
        compressknow.inspect(5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^`grid` must be a name, a path or a dict: \[\]\.$"):
        compressknow.sweep("a", "out", grid=[])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^None is not a valid repository name on the Hub\.\nIt must be text\."):
        compressknow.push("out", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        ("scope", 5, "scope must be a name, or a list of names: 5."),
        ("include", [None], "include must be a pattern, or a list of patterns: [None]."),
        ("exclude", None, "exclude must be a pattern, or a list of patterns: None."),
        ("layers", 1.5, "1.5 is not a range of layers."),
        ("recipe", 5, "`recipe` must be a Recipe, its dict, or a path: 5."),
        ("recipe", compressknow.Recipe, f"`recipe` must be a Recipe, its dict, or a path: {compressknow.Recipe}."),
        ("parameters", 5, "`parameters` must be a dict: 5."),
        ("prune", "20%", "`prune` must be a number: '20%'."),
        ("drop_neurons", "0.2", "`drop_neurons` must be a number: '0.2'."),
        ("threads", 0, "threads must be a whole number of at least 1: 0."),
        ("model", "", "`model` is empty."),
    ],
)
def test_values_of_other_types_are_one_message_of_convert(word: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        compressknow.convert(**{"model": tmp_path, "output": "out", "prune": 0.2, "dry_run": True, word: value})
    assert raised.value.what == message


def test_a_single_scope_pattern_or_block_of_where_needs_no_tuple() -> None:
    plain: Any = {"scope": "attention", "include": "q", "exclude": "k", "layers": 3}
    assert compressknow.Where(**plain) == compressknow.Where(("attention",), ("q",), ("k",), "3")


def test_error_names_the_parameter_in_python_and_the_option_on_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UsageError) as raised:
        report("a", "b", early=True)
    assert str(raised.value) == "`early` needs a gate.\nAdd `fail_under=SHARE`, or leave out `early`."
    assert raised.value.hint == "Add `fail_under=SHARE`, or leave out `early`."
    assert main(["report", "a", "b", "--early"]) == 2
    assert "--early needs a gate.\n  Add --fail-under SHARE, or leave out --early." in capsys.readouterr().err


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_documented_classes(name: str) -> None:
    record = getattr(compressknow, name)
    assert inspect.isclass(record)
    assert len(inspect.getdoc(record) or "") > 20
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"::: {record.__module__}.{name}\n" in page or (issubclass(record, Exception) and name in page)


@pytest.mark.parametrize("module", ["compressknow", "compressknow.cli", "compressknow.pages.model_card"])
def test_import_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "compressed_tensors", "huggingface_hub", "matplotlib"}
    code = f"import sys, {module}; print(*({heavy} & set(sys.modules)))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert imported.split() == []


@pytest.mark.parametrize(
    "option",
    [
        *({"scope": "attention"}, {"include": ["q"]}, {"exclude": ["q"]}, {"layers": "0"}, {"prune": 0.5}),
        *({"prune_method": "ln-structured"}, {"per_layer": True}, {"norm": 2}, {"dim": 1}, {"seed": 1}),
        *({"quantize": "int8"}, {"module_map": "paper"}, {"prune": 0.0}, {"drop_blocks": 0}, {"smooth": 0.5}),
    ],
    ids=lambda option: next(iter(option)),
)
def test_recipe_cannot_be_combined_with_options_of_steps(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"cannot be combined with `{next(iter(option))}`"):
        compressknow.convert(tmp_path, tmp_path / "out", recipe={"steps": [{"prune": 0.2}]}, **option)


@pytest.mark.parametrize("scope", ["blocks", ["blocks"], ("blocks",)], ids=str)
def test_recipe_may_be_combined_with_the_default_scope(scope: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        compressknow.convert(tmp_path / "in", tmp_path / "out", recipe={"steps": [{"prune": 0.2}]}, scope=scope)


def test_single_pattern_and_layer_need_no_list(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "in")
    manifest = compressknow.convert(source, tmp_path / "out", prune=0.2, include="q_proj", layers=1, dry_run=True)
    assert [row["name"] for row in manifest["tensors"] if row["in_scope"]] == ["model.layers.1.self_attn.q_proj.weight"]


def test_default_scope_of_a_recipe_is_blocks() -> None:
    recipe = Recipe.from_dict({"steps": [{"prune": 0.2}, {"quantize": "int8"}]})
    assert recipe.setup == "Blocks_GPQ 20%"
    assert [step["scope"] for step in recipe.to_dict()["steps"]] == [["blocks"], ["blocks"]]
    assert inspect.signature(compressknow.convert).parameters["scope"].default == DEFAULT_SCOPES


def test_setup_names_the_scope_of_each_step_if_they_differ() -> None:
    recipe = Recipe.from_dict({"steps": [{"prune": 0.2, "scope": "attention"}, {"quantize": "int8"}]})
    assert recipe.setup == "Att_GP 20% + Blocks_GQ"


def test_seed_is_also_that_of_the_calibration_text(tmp_path: Path) -> None:
    options = {"quantize": "int8", "rounding": "gptq", "seed": 3, "dry_run": True}
    manifest = compressknow.convert(save_tiny("llama", tmp_path / "in"), tmp_path / "out", **options)
    assert manifest["recipe"]["calibration"]["seed"] == 3


def test_a_dry_run_leaves_the_random_state_of_the_caller(tmp_path: Path) -> None:
    source, before = save_tiny("llama", tmp_path / "in"), torch.get_rng_state()
    compressknow.convert(source, tmp_path / "out", drop_blocks=1, dry_run=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_load_takes_a_device_and_a_dtype(tmp_path: Path) -> None:
    model = compressknow.load(save_tiny("llama", tmp_path), device="meta", dtype="bfloat16")
    assert (model.device.type, model.dtype) == ("meta", torch.bfloat16)


# What each function needs besides a model; only `main` of it is in the cache.
OTHERS: dict[str, dict[str, Any]] = {
    **{"inspect": {}, "load": {}, "probe": {"output": "out"}, "sensitivity": {}, "report": {"compressed": "in"}},
    **{"compare": {"b": "in"}, "convert": {"output": "out", "prune": 0.5}, "sweep": {"output": "out"}},
    **{"search": {"output": "out", "keep": 0.9, "to": "checkpoint"}},
    "export": {"output": "out.gguf"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_revision_is_the_one_that_is_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if name == "export":
        request.getfixturevalue("converter")
    monkeypatch.chdir(tmp_path)
    put_into_hub_cache(save_tiny("llama", tmp_path / "in"), tmp_path / "hub", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="for the specified revision"):
        getattr(compressknow, name)("org/tiny", **OTHERS[name], revision="v9")
    if name == "compare":
        with pytest.raises(CheckpointError, match="for the specified revision"):
            compressknow.compare("in", "org/tiny", revision_b="v9")
    if name == "report":
        with pytest.raises(CheckpointError, match="for the specified revision"):
            compressknow.report("org/tiny", "in", revision="v9", early=True, fail_under=0.9)


@needs_converter
def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, text = save_trained_custom_code(tmp_path / "own"), tmp_path / "text.txt"
    text.write_text(" ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS), encoding="utf-8")
    facts, output = f"facts:{write_facts(tmp_path / 'facts.jsonl')}", tmp_path / "out.gguf"
    guided: dict[str, Any] = {"to": "checkpoint", "facts": facts, "calibration": str(text), "calibration_tokens": 256}
    for call in (
        lambda **trust: compressknow.load(source, **trust),
        lambda **trust: compressknow.sensitivity(source, **guided, **trust),
        lambda **trust: compressknow.export(source, output, **trust),
    ):
        with pytest.raises(CheckpointError, match="`trust_remote_code=True`"):
            call()
    assert type(compressknow.load(source, trust_remote_code=True)).__name__ == "OwnForCausalLM"
    assert compressknow.sensitivity(source, **guided, trust_remote_code=True).guidance.facts == len(KNOWN_FACTS)
    with pytest.raises(UnsupportedError, match="does not know OwnForCausalLM"):
        compressknow.export(source, output, trust_remote_code=True)
