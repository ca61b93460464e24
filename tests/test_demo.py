"""The demo, with its real model from the package index."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressknow.engine.identity import locate, read_contents
from tests.demo import ROOT, run


@pytest.mark.network
def test_demo_converts_verifies_and_completes_prompts(smollm2: Path, tmp_path: Path) -> None:
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
def test_demo_fetches_the_checkpoint_of_the_example_studies(smollm2: Path) -> None:
    study = (ROOT / "examples" / "studies" / "smollm2-atlas" / "study.md").read_text(encoding="utf-8")
    message = f"{smollm2} was made by another version of examples/smollm2.py: delete it."
    assert read_contents(locate(smollm2)).sha256 in study, message


def test_quickstart_converts_with_the_command_of_the_readme() -> None:
    quickstart = (ROOT / "examples" / "quickstart.sh").read_text(encoding="utf-8")
    convert = next(line for line in quickstart.splitlines() if "compressknow convert" in line)
    command = convert.removeprefix("show ").removesuffix(" --overwrite")
    assert f"$ {command}" in (ROOT / "README.md").read_text(encoding="utf-8")
