"""Names of devices are checked, and a device that this machine lacks is an error."""

from __future__ import annotations

import pytest
import torch

from compressknow.base.errors import UsageError
from compressknow.engine.language_model import check_device, resolve_device
from compressknow.evaluate.runtimes import Settings


def find_best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps", "xpu"])
def test_a_valid_device_name_is_accepted_without_the_device(name: str) -> None:
    check_device(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpu", "Did you mean cuda?"),
        ("cuda0", "Did you mean cuda?"),
        ("CPU", "Did you mean cpu?"),
        ("meta", "Choose from auto, cpu"),
        ("cuda:x", "Choose from auto, cpu"),
        ("cpu:1", "Choose from auto, cpu"),
        ("cpu:", "Choose from auto, cpu"),
        ("auto:", "Choose from auto, cpu"),
        ("cuda:", "Choose from auto, cpu"),
        ("cuda:00", "Choose from auto, cpu"),
        ("", "Choose from auto, cpu"),
    ],
)
def test_an_invalid_device_name_is_refused_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        Settings(device=name)
    assert hint in (error.value.hint or "")


def test_auto_is_the_default_and_the_best_device_of_this_machine() -> None:
    assert resolve_device("auto") == find_best_device() == Settings().here().device
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["cuda:9999", "mps:9", "xpu:9"])
def test_a_missing_device_is_an_error_with_a_hint(name: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_device(name)
    assert name in error.value.what
    assert error.value.hint


def test_the_dtype_of_computations_depends_on_the_device() -> None:
    assert Settings(device="cpu").computed_in == "float32"
    assert Settings(device="cuda").computed_in == "auto"
    assert Settings(device="cuda", dtype="float32").computed_in == "float32"
