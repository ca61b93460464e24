"""Studies on a Ray cluster: they equal those of this machine, even if a worker is killed."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

import compressknow
from compressknow.base.errors import OutputError, UnusedOptions, UsageError
from compressknow.base.progress import Progress
from compressknow.compress.convert import VariantMaker
from compressknow.engine.identity import locate
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from compressknow.study.cells import CellResult, claim
from compressknow.study.running import RayOptions
from tests.gguf.making import write_sentences
from tests.knowing import save_trained, write_facts
from tests.long import long

GRID = '[axes]\nscope = ["attention", "feed-forward"]\nprune = [0.2, 0.8]\nquantize = ["none", "int8"]\n'


def find_workers() -> list[psutil.Process]:
    """Return the Ray workers that are running a task."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("ray::_run" in word for word in child.cmdline())]


@long
def test_killed_worker_does_not_change_the_study(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    model, probe = save_trained("llama", tmp_path / "llama"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    grid = tmp_path / "grid.toml"
    grid.write_text(GRID, encoding="utf-8")
    killed: list[int] = []
    updates: list[Progress] = []

    def kill_one(result: CellResult) -> None:
        assert result.answers is not None, result.why
        if not killed and (workers := find_workers()):
            killed.append(workers[0].pid)
            workers[0].kill()

    compressknow.sweep(
        model,
        tmp_path / "ray",
        grid=grid,
        probe=[probe],
        ray=RayOptions("local", num_cpus=1),
        on_result=kill_one,
        on_progress=updates.append,
    )
    assert killed
    done = [each.done for each in updates if each.stage.model == "8 cells on Ray" and each.total == 8 * 64]
    assert done == sorted(done)
    assert {*done} == {64 * number for number in range(8)}
    compressknow.sweep(model, tmp_path / "local", grid=grid, probe=[probe])
    for name in ("cells.csv", "cells.parquet"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@long
def test_study_that_cannot_be_written_stops_at_the_first_cell(tmp_path: Path) -> None:
    model, probe = save_trained("llama", tmp_path / "llama"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    (tmp_path / "grid.toml").write_text(GRID, encoding="utf-8")
    study, results = tmp_path / "study", []
    with claim(study, ModelHandle(locate(model), Settings())):
        (study / "cells").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="cells"):
        compressknow.sweep(
            model, study, grid=tmp_path / "grid.toml", probe=probe, ray=RayOptions("local"), on_result=results.append
        )
    assert results == []


@long
def test_task_that_the_machine_cannot_start_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    model, probe = save_trained("llama", tmp_path / "llama"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    with pytest.raises(UsageError, match="num_cpus=4096`: Ray finds"):
        compressknow.sweep(model, tmp_path / "study", probe=probe, ray="local", num_cpus=4096)


def test_resources_of_a_task_need_a_cluster_and_are_set_in_one_place(tmp_path: Path) -> None:
    with pytest.raises(UnusedOptions, match=r"are for tasks on a Ray cluster\.\nAdd `ray=ADDRESS`"):
        compressknow.sweep("model", tmp_path / "study", num_cpus=2)
    with pytest.raises(UnusedOptions, match=r"Set them in the RayOptions\."):
        compressknow.sweep("model", tmp_path / "study", ray=RayOptions("local"), num_cpus=2)


@long
def test_workers_make_the_calibration_text_if_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    model, probe = save_trained("llama", tmp_path / "llama"), f"facts:{write_facts(tmp_path / 'facts.jsonl')}"
    grid, text = tmp_path / "grid.toml", write_sentences(tmp_path / "text.txt")
    recipe = f"calibration = ['{text}']\ncalibration_tokens = [256]\n"
    grid.write_text(f'[axes]\nscope = ["attention"]\nmethod = ["wanda"]\nprune = [0.2]\n{recipe}', encoding="utf-8")

    def run_out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(VariantMaker, "get_text", run_out_of_memory)  # only in this process
    study = compressknow.sweep(model, tmp_path / "study", grid=grid, probe=probe, ray=RayOptions("local"))
    assert [len(study.cells), len(study.failed)] == [1, 0]
