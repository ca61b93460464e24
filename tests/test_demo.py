"""The demo's real model comes from the package index and converts as the demo says."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressknow.engine.identity import locate, read_contents
from tests.demo import ROOT, run


@pytest.mark.network
def test_demo_converts_verifies_and_completes(smollm2: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "att-int8")
    program = ("-c", "import sys; from compressknow.cli import main; sys.exit(main())")
    steps = [
        (*program, "convert", str(smollm2), output, "--scope", "attention", "--prune", "0.2", "--quantize", "int8"),
        (*program, "verify", output),
        ("examples/complete.py", str(smollm2), output),
    ]
    for step in steps:
        done = run(*step)
        assert done.returncode == 0, done.stderr
    for fact in ("Paris", "Au", "Jupiter"):
        assert done.stdout.count(fact) >= 2, done.stdout


@pytest.mark.network
def test_the_demo_is_the_checkpoint_of_the_finished_pages(smollm2: Path) -> None:
    study = (ROOT / "examples" / "studies" / "smollm2-atlas" / "study.md").read_text(encoding="utf-8")
    told = f"{smollm2} was made by another version of examples/smollm2.py: delete it."
    assert read_contents(locate(smollm2)).sha256 in study, told


def test_quickstart_names_the_same_conversion_as_the_readme() -> None:
    quickstart = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
    convert = next(line for line in quickstart.splitlines() if "compressknow convert" in line)
    command = convert.removeprefix("show ").removesuffix(" --overwrite")
    assert f"$ {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
