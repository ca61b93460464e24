"""Names of folders, facts files and outputs that are not UTF-8, which Linux allows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from compressknow.api.verify import verify
from compressknow.cli import main
from tests.knowing import save_trained, write_facts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode on this system")
ODD = os.fsdecode(b"odd\xff")


def test_folder_whose_name_is_not_utf8_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_trained("bert", tmp_path / "bert")
    (tmp_path / "bert").rename(tmp_path / ODD)
    assert main(["convert", str(tmp_path / ODD), str(tmp_path / f"{ODD}-new"), "--prune", "20%"]) == 0
    assert verify(tmp_path / f"{ODD}-new").differences == ()
    assert r"odd\udcff" in (tmp_path / f"{ODD}-new" / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["probe", str(tmp_path / ODD), "-o", str(tmp_path / "answers")]) == 1
    assert "Rename the folder" in capsys.readouterr().err


def test_facts_and_reports_may_have_names_that_are_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_trained("bert", tmp_path / "bert")
    facts = write_facts(tmp_path / f"{ODD}.jsonl")
    outputs = [f"{ODD}.{suffix}" for suffix in ("html", "md", "json")]
    options = [word for output in outputs for word in ("-o", output)]
    assert main(["report", "bert", "bert", "-p", f"facts:{facts}", "--answers", "kept", *options]) == 0
    card = json.loads((tmp_path / f"{ODD}.json").read_text(encoding="utf-8"))
    assert list(card["compressed"][0]["probes"]) == [r"facts:odd\udcff.jsonl"]
    for output in outputs:
        assert "udcff" in (tmp_path / output).read_text(encoding="utf-8")


def test_answers_are_kept_in_a_folder_whose_name_is_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_trained("bert", tmp_path / "bert")
    facts = write_facts(tmp_path / "facts.jsonl")
    assert main(["probe", "bert", "-p", f"facts:{facts}", "-o", ODD]) == 0
    assert main(["report", ODD, "bert", "--answers", f"{ODD}-kept"]) == 0
