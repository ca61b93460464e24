"""What `import compressknow` gives, and that it gives it at once."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import compressknow
from compressknow.compress.recipe import Recipe
from compressknow.errors import CheckpointError, UsageError
from compressknow.model.scopes import DEFAULT_SCOPES
from tests.models import save_tiny

VERBS = [name for name in compressknow.__all__ if name.islower() and not name.startswith("_")]
RECORDS = [name for name in compressknow.__all__ if not name.islower()]


@pytest.mark.parametrize("name", VERBS)
def test_verbs_are_documented_and_typed(name: str) -> None:
    # `probe` and `report` are rooms too: what is called then is the verb.
    assert callable(getattr(compressknow, name))
    function = getattr(importlib.import_module(f"compressknow.commands.{name}"), name)
    assert inspect.isfunction(function)
    assert len(inspect.getdoc(function) or "") > 80
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_documented_classes(name: str) -> None:
    record = getattr(compressknow, name)
    assert inspect.isclass(record)
    assert len(inspect.getdoc(record) or "") > 20


@pytest.mark.parametrize("module", ["compressknow", "compressknow.cli", "compressknow.report.model_card"])
def test_import_brings_in_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "compressed_tensors", "huggingface_hub", "matplotlib"}
    code = f"import sys, {module}; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == []


@pytest.mark.parametrize(
    "option",
    [
        *({"scope": "attention"}, {"include": ["q"]}, {"exclude": ["q"]}, {"layers": "0"}, {"prune": 0.5}),
        *({"prune_method": "ln-structured"}, {"per_layer": True}, {"norm": 2}, {"dim": 1}, {"seed": 1}),
        *({"quantize": "int8"}, {"module_map": "paper"}, {"prune": 0.0}, {"drop_blocks": 0}, {"smooth": 0.5}),
    ],
    ids=lambda option: next(iter(option)),
)
def test_a_recipe_refuses_every_option_that_it_says_itself(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"cannot be combined with {next(iter(option))}"):
        compressknow.convert(tmp_path, tmp_path / "out", recipe={"steps": [{"prune": 0.2}]}, **option)


@pytest.mark.parametrize("scope", ["blocks", ["blocks"], ("blocks",)], ids=str)
def test_a_recipe_takes_a_scope_that_says_the_default(scope: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        compressknow.convert(tmp_path / "in", tmp_path / "out", recipe={"steps": [{"prune": 0.2}]}, scope=scope)


def test_one_pattern_and_one_block_may_be_given_by_themselves(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "in")
    found = compressknow.convert(source, tmp_path / "out", prune=0.2, include="q_proj", layers=1, dry_run=True)
    assert [row["name"] for row in found["tensors"] if row["in_scope"]] == ["model.layers.1.self_attn.q_proj.weight"]


def test_a_recipe_without_a_scope_means_the_blocks_and_says_so() -> None:
    recipe = Recipe.from_dict({"steps": [{"prune": 0.2}, {"quantize": "int8"}]})
    assert recipe.setup == "Blocks_GPQ 20%"
    assert [step["scope"] for step in recipe.to_dict()["steps"]] == [["blocks"], ["blocks"]]
    assert signature_of_convert()["scope"].default == DEFAULT_SCOPES


def signature_of_convert() -> Mapping[str, inspect.Parameter]:
    return inspect.signature(compressknow.convert).parameters
