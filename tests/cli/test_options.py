"""Options of `convert`, which fields of steps declare."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import compressknow
from compressknow.cli.convert import convert as command
from compressknow.compress.parameters import TAKEN, Option, Parameter
from compressknow.compress.recipe import OPTIONS, list_parameters
from compressknow.model.structure import ModuleMap

ROOT = Path(__file__).parents[2]
DECLARED: list[Option | Parameter] = [*OPTIONS.values(), *(first for first, *_ in list_parameters().values())]


@pytest.mark.parametrize("declared", DECLARED, ids=lambda declared: declared.name)
def test_signature_of_convert_matches_the_declared_options(declared: Option | Parameter) -> None:
    signature = inspect.signature(compressknow.convert).parameters
    assert declared.name in signature, f"Add it to the signature: {declared.name}: {format_annotation(declared)}"
    assert signature[declared.name].default == declared.default
    assert signature[declared.name].annotation == format_annotation(declared)


def test_parameters_of_methods_and_schemes_cannot_have_names_of_options() -> None:
    options = {name for each in OPTIONS.values() for name in (each.name, each.key)}
    options |= {str(each.name) for each in command.params} | inspect.signature(compressknow.convert).parameters.keys()
    assert options - list_parameters().keys() <= TAKEN


def format_annotation(declared: Option | Parameter) -> str:
    kind: Any = declared.kind
    text = "ModuleMap" if kind is ModuleMap else kind.__name__ if isinstance(kind, type) else str(kind)
    if isinstance(declared, Option) and declared.multiple:
        text = f"{text} | Sequence[{text}]"
    return f"{text} | None" if declared.default is None else text


# Adds a field to a step before any module reads the options of steps.
ADD_OPTION = """
import sys
from pathlib import Path

from compressknow.compress import steps
from compressknow.compress.parameters import has_options, option


@has_options
class Quantize(steps.Quantize):
    damping: float = option(default=0.01, help="Damping of GPTQ.", kind=float, is_share=True)


steps.Quantize = Quantize

from compressknow.cli import main
from compressknow.compress.recipe import Recipe, build_recipe, format_options
from compressknow.study.grid import read_grid

recipe = build_recipe(steps.Where(), quantize="int4", rounding="gptq", damping=0.02)
assert recipe.steps[0].damping == 0.02
assert recipe.to_dict()["steps"][0]["damping"] == 0.02
assert Recipe.from_dict(recipe.to_dict()) == recipe
assert format_options(recipe)[:6] == ["--quantize", "int4", "--rounding", "gptq", "--damping", "0.02"]
default = build_recipe(steps.Where(), quantize="int4", rounding="gptq")
assert "damping" not in default.to_dict()["steps"][0]
cells = read_grid(Path(sys.argv[1]))
assert [cell.settings["damping"] for cell in cells] == [0.01, 0.05]
main(["convert", "--help"])
"""


def test_field_of_a_step_is_an_option_of_the_command_line_recipes_and_grids(tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text('[axes]\nquantize = ["int4"]\nrounding = ["gptq"]\ndamping = [0.01, 0.05]\n')
    done = subprocess.run(
        [sys.executable, "-c", ADD_OPTION, str(grid)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "  --damping SHARE        Damping of GPTQ.\n" in done.stdout
