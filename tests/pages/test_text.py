"""Values as JSON, whatever text is in them."""

from __future__ import annotations

import json

import pytest

from compressknow.base.format import dump_json


def test_a_name_that_is_no_utf_8_is_written_as_an_escape() -> None:
    values = {"name": "folder-\udcff é"}
    assert json.loads(dump_json(values).encode()) == values


def test_what_is_no_number_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"kept": float("nan")})
