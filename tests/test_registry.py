"""Registries of built-in and third-party entries, and entries that cannot be used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.packages import Registry
from tests.extending import install_package

BUILT_IN = {"ten": f"{__name__}:ten", "two": f"{__name__}:TWO"}
TWO = 2


def ten() -> int:
    return 10


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[int]:
    code = "NINE = 9\nFORTY = '40'\n"
    entries = ["nine = toy:NINE", "forty = toy:FORTY", "none = toy:NONE", "two = toy:NINE", "broken = toy.broken:X"]
    monkeypatch.syspath_prepend(str(install_package(tmp_path, "toy", code, {"compressknow.numbers": entries})))
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    return Registry("compressknow.numbers", "number", int, BUILT_IN)


def test_names_are_listed_without_imports_built_in_ones_first(registry: Registry[int]) -> None:
    assert list(registry) == ["ten", "two", "broken", "forty", "nine", "none"]
    assert "nine" in registry
    assert "eleven" not in registry
    assert "toy" not in sys.modules


def test_entry_may_be_an_instance_or_a_function_that_returns_one(registry: Registry[int]) -> None:
    assert (registry["ten"], registry["nine"]) == (10, 9)


def test_error_of_an_unknown_name_suggests_a_similar_one(registry: Registry[int]) -> None:
    with pytest.raises(UsageError, match=r"'nien' is not known. Did you mean nine\? The numbers are ten, two, broken"):
        registry["nien"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("forty", "It is of the type str, not int"),
        ("none", "AttributeError"),
        ("broken", "ModuleNotFoundError"),
        ("two", "A built-in number has that name"),
    ],
)
def test_error_of_an_unusable_entry_names_its_package(registry: Registry[int], name: str, reason: str) -> None:
    with pytest.raises(CompressknowError, match=f"(?s)The number '{name}' that toy adds cannot be used.*{reason}"):
        registry[name]


def test_entry_that_runs_out_of_memory_has_not_failed(registry: Registry[int]) -> None:
    failure = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes.")
    with pytest.raises(RuntimeError, match="allocate memory"), registry.explain_failures("nine"):
        raise failure


def test_usable_entries_are_found_despite_unusable_ones(registry: Registry[int]) -> None:
    usable, unusable = registry.usable()
    assert usable == {"ten": 10, "two": 2, "nine": 9}
    assert list(unusable) == ["two", "broken", "forty", "none"]
    assert registry.is_built_in("two")
    assert (registry.added_by("two"), registry.added_by("ten")) == ("toy", "")


def test_name_added_by_two_packages_is_unusable(
    registry: Registry[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {"compressknow.numbers": ["nine = other:NINE"]}
    monkeypatch.syspath_prepend(str(install_package(tmp_path / "other", "other", "NINE = 99", entries)))
    with pytest.raises(CompressknowError, match=r"(?s)'nine' that other and toy add cannot be used.*Uninstall one of"):
        registry["nine"]
    assert "nine" not in registry.usable()[0]
