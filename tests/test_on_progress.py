"""`on_progress` and `on_result` of the API: calls of a function, and progress bars."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest
import torch

import compressknow
from compressknow import Progress, Stage
from compressknow.base.progress import Bars, count_progress, relabel_progress, report_progress, resolve_progress
from compressknow.cli.terminal import ProgressLine
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.models import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_trained("llama", folder / "llama")
    write_facts(folder / "facts.jsonl")
    (folder / "grid.toml").write_text('[axes]\nscope = ["attention", "feed-forward"]\nprune = [0.3]\n')
    compressknow.convert(folder / "llama", folder / "pruned", prune=0.5)
    return folder


def check_stages(calls: list[Progress]) -> list[tuple[str, str, int, int]]:
    """Check that each stage begins, completes and ends before the next begins, and return the stages."""
    stages: list[tuple[str, str, int, int]] = []
    open_stage: Stage | None = None
    for progress in calls:
        if progress.state == "begins":
            assert open_stage is None
            assert (progress.done, progress.total) == (0, 0)
            open_stage = progress.stage
        assert progress.stage == open_stage
        assert 0 <= progress.done <= progress.total
        if progress.state == "ends":
            assert progress.done == progress.total > 0
            stage = progress.stage
            stages.append((stage.work, stage.model, stage.number, stage.of))
            open_stage = None
    assert open_stage is None
    return stages


# The original is evaluated, and again in another precision for the noise floor.
ORIGINAL = ("evaluate", "noise")


def test_each_function_reports_its_stages(models: Path, tmp_path: Path) -> None:
    calls: list[Progress] = []
    model, facts = models / "llama", f"facts:{models / 'facts.jsonl'}"
    compressknow.convert(model, tmp_path / "out", prune=0.5, on_progress=calls.append)
    compressknow.verify(tmp_path / "out", on_progress=calls.append)
    assert check_stages(calls) == [("convert", str(model), 1, 1), ("verify", str(tmp_path / "out"), 1, 1)]
    assert {progress.stage.unit for progress in calls} == {"bytes"}
    calls.clear()
    compressknow.probe(model, tmp_path / "answers", facts, on_progress=calls.append)
    # probe stores no distributions over all tokens, so those of a sample are computed again.
    assert check_stages(calls) == [(work, "llama", 1, 1) for work in ("evaluate", "evaluate", "noise")]
    assert {progress.stage.unit for progress in calls} == {"facts"}
    calls.clear()
    compressknow.report(model, models / "pruned", facts, answers=tmp_path / "kept", on_progress=calls.append)
    assert check_stages(calls) == [*((work, "llama", 1, 2) for work in ORIGINAL), ("evaluate", "pruned", 2, 2)]
    assert {(progress.stage.probe, progress.stage.facts) for progress in calls} == {("facts:facts.jsonl", 64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prune_method": "ln-structured"},
        {"prune_method": "random-unstructured"},
        {"prune_method": "random-structured"},
        {"pattern": "2:4"},
        {"quantize": "int8-paper"},
    ],
)
def test_conversion_reads_as_many_bytes_as_announced(
    options: dict[str, str], dtype: torch.dtype, tmp_path: Path
) -> None:
    calls: list[Progress] = []
    model = save_tiny("llama", tmp_path / "llama", dtype)
    compressknow.convert(model, tmp_path / "out", prune=0.5, **options, on_progress=calls.append)
    read = [progress.done for progress in calls if progress.state == "advances"]
    assert read[-2] < read[-1] == calls[-1].total


def test_stages_of_a_calibration_text_from_a_file_and_from_the_model(models: Path, tmp_path: Path) -> None:
    calls: list[Progress] = []
    (tmp_path / "notes.txt").write_text(" ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS) * 10)
    for text, works in ((tmp_path / "notes.txt", ["text", "calibrate"]), ("self", ["sample", "calibrate"])):
        compressknow.convert(
            models / "llama",
            tmp_path / Path(text).stem,
            prune=0.5,
            prune_method="wanda",
            calibration=str(text),
            calibration_tokens=256,
            on_progress=calls.append,
        )
        assert [progress.stage.work for progress in calls if progress.state == "begins"] == works
        labels = [ProgressLine(progress.stage, 0.0).text() for progress in calls if progress.state == "begins"]
        assert labels[0].startswith("Writing" if text == "self" else "Reading"), labels
        calls.clear()


def test_sweep_reports_each_cell_and_its_result(models: Path, tmp_path: Path) -> None:
    calls: list[Progress] = []
    results: list[compressknow.CellResult] = []
    study = compressknow.sweep(
        models / "llama",
        tmp_path / "study",
        grid=models / "grid.toml",
        probe=f"facts:{models / 'facts.jsonl'}",
        on_progress=calls.append,
        on_result=results.append,
    )
    first, second = (cell.key for cell in study.cells)
    assert check_stages(calls) == [
        *((work, "llama", 1, 3) for work in ORIGINAL),
        *((work, first, 2, 3) for work in ("convert", "evaluate")),
        *((work, second, 3, 3) for work in ("convert", "evaluate")),
    ]
    assert [result.setup for result in results] == [cell.setup for cell in study.cells]
    assert [result.kept for result in results] == [cell.comparison.kept for cell in study.cells]


def test_sweep_reports_the_calibration_of_a_saved_cell(models: Path, tmp_path: Path) -> None:
    calls: list[Progress] = []
    step = 'prune = 0.5\nscope = ["attention"]\nmethod = "wanda"\n'
    (tmp_path / "grid.toml").write_text(
        f"[[cells]]\ncalibration = {{tokens = 256}}\nsteps = [{{drop_blocks = 1}}]\n[[cells]]\n{step}"
        "calibration_tokens = 256\n"
    )
    grid, facts = tmp_path / "grid.toml", f"facts:{models / 'facts.jsonl'}"
    study = compressknow.sweep(
        models / "llama", tmp_path / "study", grid=grid, probe=facts, save=True, on_progress=calls.append
    )
    dropped, pruned = (cell.key for cell in study.cells)
    stages = [progress.stage for progress in calls if progress.state == "begins"]
    assert [(stage.work, stage.model) for stage in stages] == [
        *((work, "llama") for work in ORIGINAL),
        *((work, dropped) for work in ("sample", "choose", "convert", "evaluate")),
        *((work, pruned) for work in ("calibrate", "evaluate")),
    ]
    assert next(ProgressLine(stage, 0.0).text() for stage in stages if stage.work == "calibrate").startswith(
        "Compressing (3 of 3): "
    )


def test_stage_that_fails_ends() -> None:
    calls: list[Progress] = []
    stage = Stage("verify", "x")

    def work() -> None:
        with report_progress(calls.append, stage) as advance:
            assert advance is not None
            advance(1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert [(progress.state, progress.done) for progress in calls] == [("begins", 0), ("advances", 1), ("ends", 1)]


def test_progress_of_several_threads_adds_up() -> None:
    calls: list[tuple[int, int]] = []
    add = count_progress(lambda *progress: calls.append(progress[:2]), 4000)
    threads = [threading.Thread(target=lambda: [add(1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [(done, 4000) for done in range(1, 4001)]


def test_progress_may_be_ignored() -> None:
    assert resolve_progress(None) is None
    assert relabel_progress(None, number=2) is None
    with report_progress(None, Stage("verify", "x")) as advance:
        advance(1, 2)


@pytest.mark.parametrize("wrong", ["bars", "", 3])
def test_wrong_on_progress_is_refused(wrong: object, models: Path, tmp_path: Path) -> None:
    with pytest.raises(compressknow.UsageError, match="on_progress cannot be"):
        compressknow.convert(models / "llama", tmp_path / "out", prune=0.5, on_progress=wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_bars_show_each_stage(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    compressknow.convert(models / "llama", tmp_path / "out", prune=0.5, on_progress="bar")
    facts = f"facts:{models / 'facts.jsonl'}"
    compressknow.probe(tmp_path / "out", tmp_path / "answers", facts, on_progress="bar")
    bars = screen.getvalue()
    assert "convert " in bars
    assert "evaluate out on facts:facts.jsonl: 100%" in bars
    assert "64/64" in bars


def test_bar_shows_no_control_characters_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with report_progress(Bars(), Stage("evaluate", "\x1b[31mred", "atlas")) as advance:
        assert advance is not None
        advance(30, 40)
        advance(40, 40, 0.0)
    assert "40/40" in screen.getvalue()
    assert "\x1b[31m" not in screen.getvalue()
