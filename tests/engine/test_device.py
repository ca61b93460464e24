"""Names of devices, and what is said of one that this machine does not have."""

from __future__ import annotations

import pytest
import torch

from compressknow.base.errors import UsageError
from compressknow.engine.language_model import check_device, resolve_device
from compressknow.evaluate.runtimes import Settings


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:1", "mps", "xpu"])
def test_a_device_may_be_named_without_being_there(name: str) -> None:
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
def test_what_names_no_device_is_refused_with_what_was_probably_meant(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        Settings(device=name)
    assert hint in (error.value.hint or "")


def test_auto_is_the_best_device_of_this_machine_and_the_default() -> None:
    assert resolve_device("auto") == best_device() == Settings().here().device
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["cuda:9999", "mps:9", "xpu:9"])
def test_a_device_that_is_not_there_is_one_clear_message(name: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve_device(name)
    assert name in error.value.what
    assert error.value.hint


def test_auto_computes_in_what_its_device_computes_in() -> None:
    assert Settings(device="cpu").computed_in == "float32"
    assert Settings(device="cuda").computed_in == "auto"
    assert Settings(device="cuda", dtype="float32").computed_in == "float32"
