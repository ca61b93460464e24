"""Values as JSON, whatever text is in them."""

from __future__ import annotations

import json

import pytest

from compressknow.base.format import json_text


def test_a_name_that_is_no_utf_8_is_written_as_an_escape() -> None:
    values = {"name": "folder-\udcff é"}
    assert json.loads(json_text(values).encode()) == values


def test_what_is_no_number_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"kept": float("nan")})
