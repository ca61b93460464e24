"""The types of `import compressknow`, as mypy checks them in a user's script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import compressknow

ROOT = Path(__file__).parents[1]
# Reading the types of these libraries takes minutes.
SETTINGS = """[mypy]
strict = true
[mypy-torch.*,transformers.*,numpy.*,pyarrow.*,matplotlib.*,click.*,jinja2.*,huggingface_hub.*]
follow_imports = skip
"""
# Lines of code, and mypy's errors.
WRONG = {
    'compressknow.convert("a", "b", quantise="int8")': 'Unexpected keyword argument "quantise"',
    'compressknow.convert("a", "b", prune="0.2")': 'incompatible type "str"; expected "float | None"',
    'compressknow.convert("a", "b", progress=print)': 'Unexpected keyword argument "progress"',
    'compressknow.convert("a", "b", on_progress="lines")': 'Argument "on_progress"',
    'compressknow.convert("a", "b").totls': '"Manifest" has no attribute "totls"',
    'compressknow.inspect("a").scope': '"Inspection" has no attribute "scope"',
    'compressknow.verify("a").diferences': '"Verification" has no attribute "diferences"',
    'compressknow.export("a", "b.gguf").grups': '"ExportRecord" has no attribute "grups"',
    'compressknow.report("a", "b", limt=3)': 'Unexpected keyword argument "limt"',
    'compressknow.report("a", "b", limit="3")': 'expected "int | None"',
    'compressknow.probe("a", "b").answer': '"Answers" has no attribute "answer"',
    'compressknow.report("a", "b").verdit': '"Card" has no attribute "verdit"',
    'compressknow.compare("a", "b").diff': '"CheckpointComparison" has no attribute "diff"',
    'compressknow.sweep("a", "b", on_result=lambda result: result.anwers)': '"CellResult" has no attribute "anwers"',
    'compressknow.sensitivity("a", guide="fact")': 'Argument "guide"',
    'compressknow.search("a", "b", keep="much")': 'incompatible type "str"',
    'compressknow.search("a", "b", keep=0.9).winer': '"Search" has no attribute "winer"',
    'compressknow.Settings(devise="cpu")': 'Unexpected keyword argument "devise"',
    "compressknow.forget": 'Module has no attribute "forget"',
}
RIGHT = '''"""A user's script with every function and every record."""

from pathlib import Path

import compressknow
from compressknow import (
    Answers,
    Card,
    CellResult,
    CheckpointError,
    CompressknowError,
    CheckpointComparison,
    ExportRecord,
    GateNotMet,
    GateUndecided,
    Inspection,
    Manifest,
    Options,
    OutputError,
    Progress,
    Prune,
    Quantize,
    RayOptions,
    Recipe,
    Search,
    Sensitivity,
    Settings,
    Stage,
    Study,
    Trial,
    UnsupportedError,
    Upload,
    UsageError,
    Verification,
    VerificationError,
    Where,
)

MODEL = Path("model")


def on_progress(progress: Progress) -> None:
    stage: Stage = progress.stage
    print(stage.work, stage.unit, progress.done, progress.total, progress.left)


def on_cell(result: CellResult) -> None:
    print(result.setup, result.kept.value, result.why)


def on_trial(trial: Trial) -> None:
    print(trial.setup, trial.kept.low)


def main() -> None:
    where = Where(("attention",))
    recipe = Recipe((Prune(0.2, where=where), Quantize("int8", where)))
    options, settings = Options(limit=20, seed=1), Settings(device="cpu", batch_size=8)
    inspection: Inspection = compressknow.inspect(MODEL)
    stored: int = inspection.parameters["stored"]
    manifest: Manifest = compressknow.convert(MODEL, "out", recipe=recipe, on_progress=on_progress)
    again: Recipe = manifest.recipe
    setup: str = manifest.setup
    verification: Verification = compressknow.verify("out", on_progress="bar")
    found: int = len(verification.differences)
    uploaded: Upload = compressknow.push("out", "me/out", private=True)
    record: ExportRecord = compressknow.export("out", "out.gguf", type="q4_k_m", type_of={"attention": "q8_0"})
    answers: Answers = compressknow.probe(MODEL, "answers", "atlas", options=options, settings=settings)
    card: Card = compressknow.report(MODEL, "out", ["atlas"], output=["report.html"], on_progress="bar")
    values: dict[str, object] = compressknow.report(MODEL, "out", limit=20, fail_under=0.9, time=True).to_dict()
    kept: float | None = card.comparisons[0].kept.value
    comparison: CheckpointComparison = compressknow.compare(MODEL, "out", on_progress=on_progress)
    error: float | None = comparison.difference.total.relative_error if comparison.difference else None
    sensitivity: Sensitivity = compressknow.sensitivity(MODEL, ["map.html"], guide="facts", to="checkpoint")
    most: float = sensitivity.ranked("facts")[0].per_mb("facts")
    study: Study = compressknow.sweep(MODEL, "study", ray=RayOptions("local"), on_result=on_cell)
    search: Search = compressknow.search(MODEL, "found", keep=0.98, on_result=on_trial)
    winner: Trial | None = search.winner
    groups: dict[str, dict[str, dict[str, int]]] = record.groups
    model = compressknow.load("out", device="cpu")
    print(uploaded.url, stored, again, setup, found, answers.probes, kept, error, study.cells, winner, groups, model)
    print(values, most)


try:
    main()
except (UsageError, CheckpointError, UnsupportedError, OutputError, VerificationError, GateNotMet) as error:
    print(error.what)
except CompressknowError as error:
    print(error.what, error.why, error.hint)
'''


@pytest.fixture(scope="module")
def mypy_output(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run mypy on two scripts outside the repository, and return its output."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mypy.ini").write_text(SETTINGS)
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text("\n".join(["import compressknow", "", *WRONG, ""]))
    command = [sys.executable, "-m", "mypy", "right.py", "wrong.py"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    return done.stdout.splitlines()


def test_correct_script_has_no_error(mypy_output: list[str]) -> None:
    assert [line for line in mypy_output if line.startswith("right.py")] == []


@pytest.mark.parametrize("line", WRONG)
def test_wrong_keyword_or_attribute_is_an_error(mypy_output: list[str], line: str) -> None:
    number = 3 + list(WRONG).index(line)
    errors = [error for error in mypy_output if error.startswith(f"wrong.py:{number}: error:")]
    assert any(WRONG[line] in error for error in errors), errors


def test_correct_script_uses_every_public_name() -> None:
    assert [name for name in compressknow.__all__ if name not in RIGHT and not name.startswith("_")] == []
