"""Answers folders from before records had types are read, reported and written as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressknow.cli import main
from compressknow.evaluate.answers import RECORD, read_answers, read_record, write_record

STORED = Path(__file__).parent / "stored"
# Sentences, whose wording may change.
SENTENCES = {"verdict", "warnings", "method", "command"}


def remove_sentences(value: Any, like: Any) -> Any:
    """Return a JSON value without sentences, and without keys that are newer than `like`; floats have 15 digits, since
    Python 3.12 rounds sums differently."""
    if isinstance(value, dict) and isinstance(like, dict):
        return {key: remove_sentences(value[key], like[key]) for key in like if key not in SENTENCES and key in value}
    if isinstance(value, list) and isinstance(like, list) and len(value) == len(like):
        return [remove_sentences(*pair) for pair in zip(value, like, strict=True)]
    return float(f"{value:.15g}") if isinstance(value, float) else value


def test_a_report_has_the_same_figures(tmp_path: Path) -> None:
    """Except for those of confidence, because these answers lack the sum over all candidates."""
    before = json.loads((STORED / "report.json").read_text(encoding="utf-8"))
    assert before["compressed"][0]["probes"]["facts:facts.jsonl"]["lost"] > 0
    path = tmp_path / "report.json"
    assert main(["report", str(STORED / "original"), str(STORED / "compressed"), "-o", str(path)]) == 0
    after = json.loads(path.read_text(encoding="utf-8"))
    assert remove_sentences(after, before) == remove_sentences(before, before)


@pytest.mark.parametrize("name", ["original", "compressed"])
def test_a_record_is_written_as_it_was_read(name: str, tmp_path: Path) -> None:
    write_record(tmp_path, read_record(STORED / name))
    written = json.loads((tmp_path / RECORD).read_bytes())
    # The hash of the record itself, which versions of that time did not write.
    del written["sha256"]
    assert json.dumps(written, indent=1, ensure_ascii=False) + "\n" == (STORED / name / RECORD).read_text("utf-8")


def test_a_record_is_read_with_types() -> None:
    record = read_answers(STORED / "compressed").record
    assert (record.model.name, record.model.family, record.model.setup) == ("pruned", "causal", "Blocks_GPQ 60%")
    entry = record.probes["facts:facts.jsonl"]
    assert (entry.protocol, entry.facts, entry.asked, entry.limit, entry.seed) == ("facts/1", 64, 24, 24, 3)
    assert entry.reference == read_record(STORED / "original").model.sha256
