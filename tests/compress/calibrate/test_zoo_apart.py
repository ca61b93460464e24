"""Every architecture that can be built tiny: its blocks run apart, and every weight in scope is reached or named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compressknow.base.errors import CompressknowError, UnsupportedError
from compressknow.base.progress import silence_libraries
from compressknow.compress.blocks import Pool
from compressknow.compress.calibrate.compression import calibrate
from compressknow.compress.calibrate.gathering import InputStatistics, Key
from compressknow.compress.calibrate.text import CalibrationText
from compressknow.compress.calibrate.walk import observe
from compressknow.compress.plan import make_plan
from compressknow.compress.process import TensorConverter, TensorWriter
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Prune, Where
from compressknow.model.groups import read_structure
from compressknow.model.loading import open_complete
from compressknow.model.tensors import OpenFiles
from tests.compress.test_zoo_converts import CLASSES, try_build
from tests.long import one_in
from tests.zoo import make_inputs

PARTS = 6
# At least; all that is left runs as a whole.
SHARE = 0.85


class Nowhere:
    """An output that keeps nothing."""

    def writer(self, tensor_name: str) -> TensorWriter:  # noqa: ARG002
        return TensorWriter(lambda *_: None, 0)


def outcome_of(name: str, folder: Path) -> str:
    made = try_build(name)
    if made is None:
        return "not built"
    model, _ = made
    with silence_libraries():
        model.save_pretrained(folder)
    batch = {key: value for key, value in make_inputs(model).items() if isinstance(value, torch.Tensor)}
    text = CalibrationText("file", "drawn.txt", "0" * 64, 0, 24, 24, (batch, batch), ())
    checkpoint, tree = open_complete(folder)
    try:
        plan = make_plan(checkpoint, tree, read_structure(tree), Recipe((Prune(0.5, "wanda", Where(("overall",))),)))
    except UnsupportedError:
        return "refused"
    with Pool(1) as pool, OpenFiles() as files:
        done = calibrate(plan, TensorConverter(pool, files, lambda _: None, Nowhere().writer), {}, text)
    scope = {tensor.name for tensor in plan.tensors if tensor.in_scope and tensor.group != "vision"}
    assert set(done.measured) == scope, name
    assert not list_drifting(folder, batch), name
    return "apart" if done.is_blockwise else "together"


def list_drifting(folder: Path, batch: dict[str, torch.Tensor]) -> list[Key]:
    """Weights that a pair of passes shows otherwise than one pass, though nothing changes the model on the way."""
    alone: dict[Key, InputStatistics] = {}
    paired: dict[Key, InputStatistics] = {}
    for found, pairs in ((alone, False), (paired, True)):
        observe(
            *open_complete(folder),
            [[batch, batch]],
            lambda seen, *_, found=found: found.update(seen),
            products=True,
            pairs=pairs,
            threads=2,
        )
    assert alone.keys() == paired.keys()
    return [key for key in alone if not is_same(alone[key], paired[key])]


def is_same(alone: InputStatistics, paired: InputStatistics) -> bool:
    atol = 1e-5 * float(alone.products.abs().max())
    still = paired.drift is None or float(paired.drift.abs().max()) <= atol
    return still and torch.allclose(alone.products, paired.products, rtol=1e-4, atol=atol)


def outcomes(names: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, outcome_of(name, folder / name)
        except CompressknowError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("part", one_in(PARTS, range(PARTS)))
def test_blocks_of_nearly_all_architectures_run_apart(part: int, tmp_path: Path) -> None:
    found = dict(outcomes(sorted(CLASSES)[part::PARTS], tmp_path))
    counts = Counter(found.values())
    ran = counts["apart"] + counts["together"]
    print(f"{counts['apart']} of {ran} architectures apart; {dict(counts)}")
    print(sorted(name for name, outcome in found.items() if outcome == "together"))
    assert ran > 30
    assert counts["apart"] >= SHARE * ran
