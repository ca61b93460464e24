"""A GGUF file of a given size: its bytes, its types, and what GPTQ makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp_py_sync")

from compressknow.gguf.choice import Choice
from compressknow.gguf.converter import find_converter
from compressknow.gguf.export import prepare, write
from compressknow.gguf.fit import Fit
from compressknow.gguf.gptq import batches_of
from compressknow.gguf.grids import legal_types, roundtrip, type_bytes
from compressknow.study.fitting import Target, fit_types
from compressknow.study.sensitivity import Guidance, Rounding, Sensitivity, TensorSensitivity
from tests.export.making import checkpoint, needs_converter, types

TEXTS = [
    batches_of(torch.randint(0, 400, (24, 40), generator=torch.Generator().manual_seed(0)).tolist()),
    batches_of(torch.randint(0, 400, (60, 9), generator=torch.Generator().manual_seed(1)).tolist()),
]


def sensitivity_of(side) -> Sensitivity:
    """By the error of each weight alone: any figures will do."""
    rows = []
    for weight in side.structure.linears:
        name = side.structure.tied.get(weight.parameter, weight.parameter)
        exact = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(rows))).numpy()
        by_type = {
            kind: Rounding(type_bytes(kind, weight.shape), float(np.square(roundtrip(exact, kind) - exact).mean()), 0.0)
            for kind in legal_types(weight.shape[-1])
        }
        rows.append(TensorSensitivity(name, weight.shape, weight.group, weight.layer, by_type))
    return Sensitivity("0" * 64, Guidance("gguf", ("q8_0",), 40, "1" * 64, 1000, "2" * 64), tuple(rows))


def fitted(source: Path, output: Path, target: Target):
    """The record of an export to a size."""
    job = prepare(source, Choice("f16"), find_converter(None, fetch=True))
    sensitivity = sensitivity_of(job.side)
    fit = Fit(
        target.label,
        target.budget(job.numel),
        lambda tensors, overhead: fit_types(sensitivity, tensors, overhead, target),
        target.rounding,
        TEXTS,
    )
    from dataclasses import replace

    return write(replace(job, fit=fit), output)


@needs_converter
@pytest.mark.parametrize("name", ["llama-tied", "llama"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_file_keeps_to_its_bytes(name: str, rounding: str, tmp_path: Path) -> None:
    source = checkpoint(name, tmp_path / "model", torch.bfloat16)
    for budget in (700_000, 900_000):
        output = tmp_path / f"{budget}.gguf"
        record = fitted(source, output, Target(budget, rounding=rounding))
        assert 0.9 * budget < output.stat().st_size == record["bytes"] <= budget
        chosen = {rule[0].replace("\\", "").strip("^$"): rule[1] for rule in record["types"]}
        made = types(output)
        assert all(made[key] == kind for key, kind in chosen.items())
        assert len(set(chosen.values())) > 1
