"""Records of exports are checked when they are read, and shown with all their types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp_py_sync")

from compressknow.base.errors import CheckpointError
from compressknow.gguf.choice import TypeChoice
from compressknow.gguf.record import ExportRecord, is_recorded, read_record


def make_record() -> dict[str, Any]:
    groups = {
        "attention": {
            "q8_0": {"tensors": 8, "parameters": 393_216, "bytes": 417_792},
            "f16": {"tensors": 1, "parameters": 1_024, "bytes": 2_048},
        },
        "not-linear": {"f32": {"tensors": 5, "parameters": 1_280, "bytes": 5_120}},
    }
    return {
        "schema": 1,
        "setup": "q8_0 (attention q8_0)",
        "type": "q8_0",
        "types": [["attention", "q8_0"]],
        "versions": {"compressknow": "1.0"},
        "source": {"name": "model", "revision": None, "sha256": "0" * 64, "architecture": "LlamaForCausalLM"},
        "groups": groups,
        "totals": {"tensors": 14, "parameters": 395_520, "bytes": 424_960},
    }


def test_a_record_is_shown_with_each_type_of_each_group() -> None:
    first, *rows = str(ExportRecord(make_record())).splitlines()
    assert "q8_0 (attention q8_0) of model" in first
    text = "\n".join([first, *rows])
    assert "395,520 weights in 425.0 kB" in text
    cells = [row.split()[:4] for row in rows]
    for row in (["attention", "q8_0", "393,216", "417.8"], ["attention", "f16", "1,024", "2.0"]):
        assert row in cells, text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 0}, "has schema 0, but this version reads schema 1"),
        ({"schema": 2}, "has schema 2, but this version reads schema 1"),
        ({"totals": {"tensors": 14}}, "is damaged: totals.parameters is missing"),
        ({"types": [["attention", 8]]}, r"is damaged: types\[0\]\[1\] is not text"),
    ],
)
def test_a_record_of_another_form_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    record = tmp_path / "out.gguf.json"
    record.write_text(json.dumps(make_record() | change))
    with pytest.raises(CheckpointError, match=message):
        read_record(tmp_path / "out.gguf")
    record.write_text(json.dumps(make_record()))
    assert read_record(tmp_path / "out.gguf") == make_record()


def test_a_file_is_recorded_with_its_types(tmp_path: Path) -> None:
    choice = TypeChoice("q8_0", (("attention", "q8_0"),))
    assert not is_recorded(tmp_path / "out.gguf", choice)
    (tmp_path / "out.gguf.json").write_text(json.dumps(make_record()))
    assert not is_recorded(tmp_path / "out.gguf", choice)
    (tmp_path / "out.gguf").touch()
    assert is_recorded(tmp_path / "out.gguf", choice)
    assert not is_recorded(tmp_path / "out.gguf", TypeChoice("q8_0"))
    assert not is_recorded(tmp_path / "out.gguf", TypeChoice("q4_0", (("attention", "q8_0"),)))
