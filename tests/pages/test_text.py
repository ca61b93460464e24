"""JSON of values with unusual text or numbers."""

from __future__ import annotations

import json

import pytest

from compressknow.base.format import dump_json


def test_name_that_is_not_utf_8_is_escaped() -> None:
    values = {"name": "folder-\udcff é"}
    assert json.loads(dump_json(values).encode()) == values


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"kept": float("nan")})
