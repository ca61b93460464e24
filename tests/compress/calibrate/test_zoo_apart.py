"""Nearly all architectures that can be built tiny run block by block, and every weight in scope is measured."""

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
# The lowest share of architectures that run block by block; the others run as a whole.
SHARE = 0.85


class NullOutput:
    """An output that discards all bytes."""

    def writer(self, tensor_name: str) -> TensorWriter:  # noqa: ARG002
        return TensorWriter(lambda *_: None, 0)


def check_class(name: str, folder: Path) -> str:
    model_and_logits = try_build(name)
    if model_and_logits is None:
        return "not built"
    model, _ = model_and_logits
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
        calibration = calibrate(plan, TensorConverter(pool, files, lambda _: None, NullOutput().writer), {}, text)
    scope = {tensor.name for tensor in plan.tensors if tensor.in_scope and tensor.group != "vision"}
    assert set(calibration.measured) == scope, name
    assert not list_drifting(folder, batch), name
    return "blockwise" if calibration.is_blockwise else "whole"


def list_drifting(folder: Path, batch: dict[str, torch.Tensor]) -> list[Key]:
    """List the weights for which two passes over an unchanged model differ from one."""
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
    return [key for key in alone if not is_close(alone[key], paired[key])]


def is_close(alone: InputStatistics, paired: InputStatistics) -> bool:
    atol = 1e-5 * float(alone.products.abs().max())
    undrifted = paired.drift is None or float(paired.drift.abs().max()) <= atol
    return undrifted and torch.allclose(alone.products, paired.products, rtol=1e-4, atol=atol)


def check_classes(names: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, check_class(name, folder / name)
        except CompressknowError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("part", one_in(PARTS, range(PARTS)))
def test_blocks_of_nearly_all_architectures_run_one_by_one(part: int, tmp_path: Path) -> None:
    found = dict(check_classes(sorted(CLASSES)[part::PARTS], tmp_path))
    counts = Counter(found.values())
    ran = counts["blockwise"] + counts["whole"]
    print(f"{counts['blockwise']} of {ran} architectures run block by block; {dict(counts)}")
    print(sorted(name for name, outcome in found.items() if outcome == "whole"))
    assert ran > 30
    assert counts["blockwise"] >= SHARE * ran
