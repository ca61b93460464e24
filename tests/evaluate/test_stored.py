"""Answers folders from before the records had types are read, reported and written the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressknow.cli import main
from compressknow.evaluate.answers import RECORD, read_answers, read_record, write_record

STORED = Path(__file__).parent / "stored"
# Sentences, whose words may change.
WORDS = {"verdict", "warnings", "method", "command"}


def without_words(value: Any, like: Any) -> Any:
    """A JSON value without sentences, and without keys that are newer than `like`."""
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: without_words(value[key], like[key]) for key in like if key not in WORDS and key in value}
    if isinstance(value, list) and isinstance(like, list) and len(value) == len(like):
        return [without_words(*pair) for pair in zip(value, like, strict=True)]
    return value


def test_its_report_has_the_figures_that_it_had(tmp_path: Path) -> None:
    """But for those of confidence, for which such answers lack the sum over all candidates."""
    before = json.loads((STORED / "report.json").read_text(encoding="utf-8"))
    assert before["compressed"][0]["probes"]["facts:facts.jsonl"]["lost"] > 0
    path = tmp_path / "report.json"
    assert main(["report", str(STORED / "original"), str(STORED / "compressed"), "-o", str(path)]) == 0
    after = json.loads(path.read_text(encoding="utf-8"))
    assert without_words(after, before) == without_words(before, before)


@pytest.mark.parametrize("name", ["original", "compressed"])
def test_its_record_is_written_as_it_stands_there(name: str, tmp_path: Path) -> None:
    write_record(tmp_path, read_record(STORED / name))
    written = json.loads((tmp_path / RECORD).read_bytes())
    # The hash of the record itself, which versions of then did not write.
    del written["sha256"]
    assert json.dumps(written, indent=1, ensure_ascii=False) + "\n" == (STORED / name / RECORD).read_text("utf-8")


def test_its_record_has_types() -> None:
    record = read_answers(STORED / "compressed").record
    assert (record.model.name, record.model.family, record.model.setup) == ("pruned", "causal", "Blocks_GPQ 60%")
    entry = record.probes["facts:facts.jsonl"]
    assert (entry.protocol, entry.facts, entry.asked, entry.limit, entry.seed) == ("facts/1", 64, 24, 24, 3)
    assert entry.reference == read_record(STORED / "original").model.sha256
