"""The table of dtypes agrees with safetensors and torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressknow.model.tensors import DTYPE_SIZES, TORCH_NAMES, get_torch_dtype, read_header, read_torch_file


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_a_dtype_has_the_same_name_in_safetensors_and_torch_files(name: str, tmp_path: Path) -> None:
    tensor = torch.zeros(3, 5, dtype=get_torch_dtype(name))
    save_file({"x": tensor}, tmp_path / "a.safetensors")
    torch.save({"x": tensor}, tmp_path / "a.bin")
    assert read_header(tmp_path / "a.safetensors")["x"].dtype == name
    assert read_torch_file(tmp_path / "a.bin")["x"].dtype == name
    assert DTYPE_SIZES[name] == tensor.element_size()
