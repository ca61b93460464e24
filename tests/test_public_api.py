"""What `import compressknow` gives, and that it gives it at once."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import compressknow

PUBLIC = [name for name in compressknow.__all__ if not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_are_documented_and_typed(name: str) -> None:
    function = getattr(compressknow, name)
    assert callable(function)
    # `probe` and `report` are rooms that can be called: what is called is the function of their name in them.
    function = getattr(function, name) if inspect.ismodule(function) else function
    assert inspect.isfunction(function)
    assert len(inspect.getdoc(function) or "") > 80
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


@pytest.mark.parametrize("module", ["compressknow", "compressknow.cli", "compressknow.report.model_card.render"])
def test_import_brings_in_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "numpy", "safetensors", "compressed_tensors", "huggingface_hub", "matplotlib"}
    code = f"import sys, {module}; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == []
