"""The grid of the paper, the grid of methods, and custom grids."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.compress.recipe import Recipe, build_recipe
from compressknow.compress.steps import Calibration, Prune, Quantize, Where
from compressknow.model.groups import read_structure
from compressknow.model.structure import ModuleMap, Structure
from compressknow.study.cells import name_folder
from compressknow.study.grid import Cell, build_paper_grid, fit_parameters, list_cells, read_grid
from tests.models import tiny, tiny_of_groups


def make_grid(path: Path, text: str) -> tuple[Cell, ...]:
    path.write_text(text, encoding="utf-8")
    return read_grid(path)


def list_setups(architecture: str) -> list[str]:
    return [cell.recipe.setup for cell in build_paper_grid(read_structure(tiny(architecture), "paper"))]


def test_paper_grid_has_every_setup_of_sections_2_3_to_2_6() -> None:
    pruned = [f"{name}_GP {amount}%" for name in ("Att", "FF", "Overall") for amount in range(10, 100, 10)]
    quantized = [f"{name}_{kind}" for name in ("Att", "FF", "Overall") for kind in ("GQ", "GPQ 20%", "GPQ 40%")]
    final = [f"FLP {method} {amount}%" for method in ("L1-structured", "L1-unstructured") for amount in (20, 40)]
    assert list_setups("llama") == list_setups("bert") == [*pruned, *quantized, *final]


def test_paper_grid_of_encoder_decoders_also_has_the_attentions_of_figure_8() -> None:
    additional = Counter(list_setups("t5-gated")) - Counter(list_setups("llama"))
    kinds = ("SelfAtt", "CrossAtt", "EncoderAtt", "DecoderAtt")
    assert set(additional) == {f"{name}_{kind}" for name in kinds for kind in ("GQ", "GPQ 20%", "GPQ 40%")}


def test_paper_grid_has_the_authors_scheme_and_module_map_by_default() -> None:
    structure = read_structure(tiny("bert"), "paper")
    schemes = {
        step.scheme for cell in build_paper_grid(structure) for step in cell.recipe.steps if isinstance(step, Quantize)
    }
    assert schemes == {"int8-paper"}
    assert {cell.recipe.module_map for cell in build_paper_grid(structure)} == {"paper"}
    cells = build_paper_grid(structure, module_map="structural", scheme="int8")
    assert {cell.recipe.module_map for cell in cells} == {"structural"}
    assert len({cell.key for cell in cells}) == len(cells) == 40
    assert all(cell.plain for cell in cells)


class OpenModel:
    """Tiny model that refuses recipes with one scheme."""

    def __init__(self, architecture: str, unsupported: str = "") -> None:
        self._tree, self._unsupported = tiny_of_groups(architecture), unsupported

    def structure(self, module_map: ModuleMap = "structural") -> Structure:
        return read_structure(self._tree, module_map)

    def plan(self, recipe: Recipe) -> None:
        if any(isinstance(step, Quantize) and step.scheme == self._unsupported for step in recipe.steps):
            raise UnsupportedError("not this model")


def test_methods_grid_has_the_same_cells_for_each_method() -> None:
    cells = list_cells("methods", lambda: OpenModel("llama"), calibration_tokens=512)
    pruned = {(c.pruning, step.amount) for c in cells if c.quantization is None for step in c.recipe.steps}
    assert pruned == {(m, a / 10) for m in ("l1-unstructured", "wanda", "sparsegpt") for a in range(2, 7)}
    gptq = "int4 group_size 32 gptq"
    quantized = {(None, scheme) for scheme in ("int8", "int8 smooth 0.5", "int4 group_size 32", gptq)}
    both = {(method, gptq) for method in ("l1-unstructured", "wanda", "sparsegpt")}
    assert {(c.pruning, c.quantization) for c in cells if c.quantization} == quantized | both
    assert len(cells) == len({cell.key for cell in cells}) == 3 * (15 + 4 + 3)
    assert {c.settings["prune"] for c in cells if c.quantization and c.pruning} == {0.5}
    assert all(cell.plain and cell.recipe.module_map == "paper" for cell in cells)
    assert {cell.recipe.calibration for cell in cells} == {None, Calibration(tokens=512)}


def test_paper_grid_in_int4_has_the_largest_groups_that_divide_all_layers() -> None:
    cells = list_cells("paper", lambda: OpenModel("llama"), quantize="int4")
    assert {cell.quantization for cell in cells} == {None, "int4 group_size 32"}
    # A model without such groups is refused cell by cell.
    narrow = build_paper_grid(read_structure(tiny("bert"), "paper"), scheme="int4")
    assert {cell.quantization for cell in narrow} == {None, "int4"}


def test_methods_grid_omits_unsupported_schemes() -> None:
    cells = list_cells("methods", lambda: OpenModel("llama", unsupported="int4"))
    assert len(cells) == 3 * (15 + 2)
    assert not any("int4" in cell.key for cell in cells)
    # 48 inputs cannot be divided into groups.
    assert fit_parameters(read_structure(tiny("bert")), "int4") is None
    # A vision tower is not quantized.
    llama = OpenModel("llama").structure()
    tower = replace(llama.linears[0], group="vision", shape=(64, 48))
    assert fit_parameters(replace(llama, linears=(*llama.linears, tower)), "int4") == {"group_size": 32}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("paper", {"calibration": "self"}),
        ("methods", {"quantize": "int8"}),
        ("x.toml", {"module_map": "paper"}),
    ],
)
def test_options_that_a_grid_does_not_have_are_refused(name: str, options: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"does not apply to the grid {name}"):
        list_cells(name, lambda: OpenModel("llama"), **options)


def test_grid_file_is_the_product_of_its_axes_and_its_named_cells(tmp_path: Path) -> None:
    cells = make_grid(
        tmp_path / "grid.toml",
        """
        [axes]
        scope = ["attention", ["feed-forward", "final"]]
        prune = [0, 0.5]
        quantize = ["none", "int8"]
        [[cells]]
        name = "First block"
        scope = "attention"
        layers = "0"
        prune = 0.5
        [[cells]]
        module_map = "paper"
        [[cells.steps]]
        prune = 0.1
        [[cells.steps]]
        quantize = "int8-weights"
        scope = ["feed-forward"]
        [[cells]]
        steps = [{ prune = 0.1 }, { prune = 0.2, method = "wanda" }]
        [[cells]]
        steps = [{ drop_blocks = 1 }, { prune = 0.1 }]
        """,
    )
    # 2 x 2 x 2 cells, less the two that do nothing, and four others.
    assert len(cells) == 10
    assert cells[0].recipe == build_recipe(Where(("attention",)), quantize="int8")
    assert cells[3].recipe.steps[0].where.scope == ("feed-forward", "final")
    assert (cells[6].key, cells[6].recipe.steps[0]) == (
        "first-block",
        Prune(0.5, where=Where(("attention",), layers="0")),
    )
    assert cells[7].recipe.module_map == "paper"
    assert [cell.plain for cell in cells] == [True] * 6 + [False] * 4


def test_grid_may_be_a_dict(tmp_path: Path) -> None:
    values = {"axes": {"prune": [0.2, 0.5]}, "cells": [{"name": "first", "layers": "0", "quantize": "int8"}]}
    text = '[axes]\nprune = [0.2, 0.5]\n[[cells]]\nname = "first"\nlayers = "0"\nquantize = "int8"\n'
    assert list_cells(values, lambda: OpenModel("llama")) == make_grid(tmp_path / "grid.toml", text)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    values["axes"] |= {"method": ["wanda"], "calibration": [str(tmp_path / "text.txt")]}
    hashes = {cell.text_sha256 for cell in list_cells(values, lambda: OpenModel("llama"))}
    assert hashes == {None, hashlib.sha256(text.encode()).hexdigest()}
    with pytest.raises(UsageError, match=r"The grid, \[axes\]: 'prun' is not a key here"):
        list_cells({"axes": {"prun": [0.2]}}, lambda: OpenModel("llama"))


def test_settings_have_layer_0_and_the_seed_of_a_calibrated_cell(tmp_path: Path) -> None:
    axes = make_grid(tmp_path / "axes.toml", "[axes]\nprune = [0.5]\nlayers = [0, 1, 2]")
    assert [cell.settings["layers"] for cell in axes] == ["0", "1", "2"]
    text = "[[cells]]\nprune = 0.5\nlayers = 0\n[[cells]]\nquantize = 'int8'\nrounding = 'gptq'\nseed = 3"
    one, calibrated = make_grid(tmp_path / "cells.toml", text)
    assert one.settings["layers"] == "0"
    assert calibrated.settings["seed"] == 3
    steps = "steps = [{prune = 0.5, method = 'random-unstructured', seed = 1}, {quantize = 'int8', rounding = 'gptq'}]"
    (both,) = make_grid(tmp_path / "both.toml", f"[[cells]]\n{steps}\ncalibration = {{seed = 2}}")
    assert both.settings["seed"] == "1 + 2"


def test_duplicate_recipes_are_dropped_and_keys_are_unique(tmp_path: Path) -> None:
    axes = '[axes]\nprune = [0, 0.5, 0.5]\nseed = [1, 2]\nmethod = ["random-unstructured", "l1-unstructured"]\n'
    named = '[[cells]]\nname = "a"\nprune = 0.1\n[[cells]]\nname = "A"\nprune = 0.2\n'
    cells = make_grid(tmp_path / "grid.toml", axes + named)
    assert [cell.key for cell in cells] == [
        "blocks-gp-random-unstructured-50-seed-1",
        "blocks-gp-50",  # does not depend on the seed
        "blocks-gp-random-unstructured-50-seed-2",
        "a",
        "a-2",
    ]


def test_a_recipe_of_the_axes_that_is_named_too_has_its_name(tmp_path: Path) -> None:
    axes = '[axes]\nscope = ["attention"]\nprune = [0.2, 0.5]\n'
    cell = '[[cells]]\nscope = "attention"\nprune = 0.2\n'
    cells = make_grid(tmp_path / "grid.toml", f'{axes}{cell}name = "heads"\n{cell}')
    assert [cell.key for cell in cells] == ["heads", "att-gp-50"]


@pytest.mark.parametrize("name", ["最初の層", "первый-слой", "schicht-ü"])
def test_cell_names_may_be_in_any_script(tmp_path: Path, name: str) -> None:
    (cell,) = make_grid(tmp_path / "grid.toml", f'[[cells]]\nname = "{name}"\nprune = 0.1\n')
    assert cell.key == name
    (long,) = make_grid(tmp_path / "grid.toml", f'[[cells]]\nname = "{name * 80}"\nprune = 0.1\n')
    (tmp_path / f"{long.key}-{'0' * 8}").mkdir()


def test_cells_omit_settings_that_their_method_or_scheme_lacks(tmp_path: Path) -> None:
    cells = make_grid(
        tmp_path / "grid.toml",
        """
        [axes]
        scope = ["attention"]
        method = ["l1-unstructured", "wanda", "ln-structured"]
        prune = [0, 0.5]
        pattern = ["none", "2:4"]
        quantize = ["none", "int8", "int8-paper", "int4"]
        group_size = [64]
        rounding = ["nearest", "gptq"]
        smooth = [0, 0.5]
        calibration = ["facts.txt"]
        calibration_tokens = [4096]
        """,
    )
    # int8 and int4 are rounded both ways, int8 is smoothed too, and int8-paper is only rounded to nearest.
    schemes = {"int8", "int8 gptq", "int8 smooth 0.5", "int8 gptq smooth 0.5", "int8-paper", "int4 group_size 64"}
    schemes |= {"int4 group_size 64 gptq"}
    methods = {"l1-unstructured", "wanda", "ln-structured"} | {f"{m} pattern 2:4" for m in ("l1-unstructured", "wanda")}
    assert {(c.pruning, c.quantization) for c in cells} == {
        (method, scheme) for method in (*methods, None) for scheme in (*schemes, None) if method or scheme
    }
    assert len(cells) == len({cell.key for cell in cells}) == len({cell.recipe for cell in cells}) == 47
    text = Calibration("facts.txt", 4096)
    for cell in cells:
        assert cell.plain
        is_calibrated = any(step.calibrated for step in cell.recipe.steps)
        assert cell.recipe.calibration == (text if is_calibrated else None)
        assert ("facts.txt-4096-tokens" in cell.key) is is_calibrated


def test_setups_and_keys_distinguish_methods_schemes_and_texts(tmp_path: Path) -> None:
    cells = make_grid(
        tmp_path / "grid.toml",
        """
        [[cells]]
        scope = "attention"
        quantize = "int4"
        rounding = "gptq"
        [[cells]]
        scope = "attention"
        prune = 0.5
        method = "wanda"
        pattern = "2:4"
        calibration = { text = "hf:some/set", tokens = 2048, seed = 3 }
        [[cells]]
        scope = "attention"
        prune = 0.5
        method = "sparsegpt"
        quantize = "int4"
        group_size = 32
        [[cells]]
        scope = "attention"
        prune = 0.2
        quantize = "int8"
        [[cells]]
        scope = "attention"
        prune = 0.2
        per_layer = true
        """,
    )
    assert [(cell.recipe.setup, cell.key) for cell in cells] == [
        ("Att_GQ int4 gptq", "att-gq-int4-gptq"),
        ("Att wanda 2:4 50%", "att-wanda-2-4-50-set-2048-tokens-seed-3"),
        ("Att sparsegpt 50% + Att_GQ int4 group_size 32", "att-sparsegpt-50-att-gq-int4-group-size-32"),
        ("Att_GPQ 20%", "att-gpq-20-int8"),
        ("Att L1-unstructured per layer 20%", "att-l1-unstructured-per-layer-20"),
    ]
    assert cells[1].recipe.calibration == Calibration("hf:some/set", 2048, 3)
    assert cells[4].pruning == "l1-unstructured per_layer"


def test_folders_of_cells_and_probes_have_valid_names(tmp_path: Path) -> None:
    long = "".join(f'[[cells]]\nname = "{"long:" * 80}{number}"\nprune = 0.{number}\n' for number in range(1, 4))
    folders = [f"{cell.key}-{'0' * 8}" for cell in make_grid(tmp_path / "grid.toml", long)]
    text = f'[[cells]]\nprune = 0.2\nmethod = "wanda"\ncalibration = "{"c" * 240}.txt"\ncalibration_tokens = 256'
    (tmp_path / f"{'c' * 240}.txt").write_text("One text.")
    folders += [f"{cell.key}-{'0' * 8}" for cell in make_grid(tmp_path / "calibrated.toml", text)]
    folders += [name_folder(f"facts:{'é' * 120}.jsonl"), name_folder(f"facts:{'x' * 249}.jsonl")]
    for folder in folders:
        (tmp_path / folder).mkdir()
        assert re.fullmatch(r"[A-Za-z0-9.-]+", folder)
    assert len({*folders}) == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no cell"),
        ("[axes]\nprune = [0]", "no cell"),
        ("[axes]\nprune = []", "must be a list, and not empty"),
        ("[axes]\nprune = 0.5", "must be a list"),
        ("[axes]\nprune = [2]", "greater than 0 and less than 1"),
        ('[axes]\nquantize = ["int3"]', "int3"),
        ("[axes]\namount = [0.1]", "'amount'"),
        ("[grid]\nprune = [0.1]", "'grid'"),
        ('[axes]\nquantize = ["int8"]\nmethod = ["l1-unstructured"]', "nothing is pruned"),
        ('[[cells]]\nname = "nothing"', "neither prunes nor quantizes"),
        ("[[cells]]\nprune = 0.1\n[[cells]]\nprune = 0.1\nlayer = 3", "grid.toml, cell 2: 'layer' is not a key here"),
        ("[[cells]]\nname = 3\nprune = 0.1", "name"),
        ("[axes\n", "cannot be read"),
        ('[axes]\nprune = [0.5]\nrounding = ["gptq"]', "rounding applies to quantization, and nothing is quantized"),
        ('[axes]\nprune = [0.5]\ncalibration = ["self"]', "calibration applies to methods that look at activations"),
        ('[axes]\nquantize = ["int8"]\nseed = [1]', "seed applies to what is drawn"),
        ("[axes]\nprune = [0.5]\nseed = [1, 2]", "seed applies to what is drawn"),
        ('[axes]\nprune = [0.3]\npattern = ["2:4"]', "prunes 0.5 of the weights, not 0.3"),
        ('[axes]\nquantize = ["int4"]\nrounding = ["up"]', "Unknown rounding 'up'"),
        ('[axes]\nprune = [0.5]\nmethod = ["wanda"]\ncalibration = [{txt = "self"}]', "calibration: unknown key 'txt'"),
        (
            '[axes]\nprune = [0.5]\nmethod = ["wanda"]\ncalibration_tokens = [9]\ncalibration = [{tokens = 9}]',
            "calibration already has tokens",
        ),
        ("[[cells]]\nprune = 0.5\nsmooth = 0.5", "smooth applies to quantization"),
        ('[[cells]]\nquantize = "int4"\nsmooth = 0.5', "nothing to smooth"),
        ('[[cells]]\nquantize = "int8-paper"\nrounding = "gptq"', "can only be rounded to nearest"),
        ('[[cells]]\nprune = 0.5\ncalibration = "self"', "applies to methods that look at activations"),
        ("[[cells]]\nprune = 0.5\nscope = []", "No scope is given"),
        ('[[cells]]\nquantize = "int8"\nmethod = "wanda"', "method applies to pruning, and nothing is pruned"),
        ('[[cells]]\nquantize = "int8"\nprune = 0\nmethod = "wanda"', "method applies to pruning"),
        ('[[cells]]\nquantize = "int8"\nseed = 3', "seed applies to what is drawn"),
        ("[[cells]]\nprune = 0.5\nseed = 3", "seed applies to what is drawn"),
        ("[[cells]]\nsteps = [{prune = 2}]", "grid.toml, cell 1: The pruning amount"),
        (
            '[[cells]]\nprune = 0.1\n[[cells]]\nsteps = [{quantize = "int8"}, {prune = 0.5}]',
            "grid.toml, cell 2: A recipe prunes before it quantizes",
        ),
    ],
)
def test_invalid_grid_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make_grid(tmp_path / "grid.toml", text)
    assert "grid.toml" in error.value.what


def test_error_for_a_key_suggests_alternatives(tmp_path: Path) -> None:
    for text, hint in (
        ('[axes]\nquantize = ["int8"]\npattern = ["2:4"]', "It needs l1-unstructured or wanda or sparsegpt."),
        ("[[cells]]\nprune = 0.1\nnam = 'first'", "Did you mean name?"),
        ("[[cells]]\nstep = []", "Choose from name, steps, scope"),
    ):
        with pytest.raises(UsageError) as error:
            make_grid(tmp_path / "grid.toml", text)
        assert hint in str(error.value)


def test_missing_grid_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such grid"):
        read_grid(tmp_path / "none.toml")
