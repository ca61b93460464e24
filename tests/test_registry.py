"""Names to things: those built in, those that other packages add, and those that cannot be used."""

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


def test_built_in_names_come_first_and_nothing_is_imported_for_them(registry: Registry[int]) -> None:
    assert list(registry) == ["ten", "two", "broken", "forty", "nine", "none"]
    assert "nine" in registry
    assert "eleven" not in registry
    assert "toy" not in sys.modules


def test_an_entry_is_an_instance_or_gives_one(registry: Registry[int]) -> None:
    assert (registry["ten"], registry["nine"]) == (10, 9)


def test_an_unknown_name_is_told_what_it_may_have_meant(registry: Registry[int]) -> None:
    with pytest.raises(UsageError, match=r"'nien' is not known. Did you mean nine\? The numbers are ten, two, broken"):
        registry["nien"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("forty", "It is of the type str, not int"),
        ("none", "AttributeError"),
        ("broken", "ModuleNotFoundError"),
        ("two", "A built-in number has that name"),
    ],
)
def test_what_cannot_be_used_names_the_package_that_adds_it(registry: Registry[int], name: str, why: str) -> None:
    with pytest.raises(CompressknowError, match=f"(?s)The number '{name}' that toy adds cannot be used.*{why}"):
        registry[name]


def test_where_one_must_not_stop_the_others_all_that_can_be_used_are_given(registry: Registry[int]) -> None:
    found, unusable = registry.usable()
    assert found == {"ten": 10, "two": 2, "nine": 9}
    assert list(unusable) == ["two", "broken", "forty", "none"]
    assert registry.is_built_in("two")
    assert (registry.added_by("two"), registry.added_by("ten")) == ("toy", "")


def test_of_two_packages_that_add_one_name_neither_is_taken(
    registry: Registry[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {"compressknow.numbers": ["nine = other:NINE"]}
    monkeypatch.syspath_prepend(str(install_package(tmp_path / "other", "other", "NINE = 99", entries)))
    with pytest.raises(CompressknowError, match=r"(?s)'nine' that other and toy add cannot be used.*Uninstall one of"):
        registry["nine"]
    assert "nine" not in registry.usable()[0]
