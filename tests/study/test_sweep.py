"""`sweep`: cells equal the results of `convert` and `probe`; studies resume, record failures and refuse bad input."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import compressknow
from compressknow.base.errors import OutputError, UsageError
from compressknow.base.files import LOCK
from compressknow.base.format import write_size
from compressknow.cli import main
from compressknow.comparison.intervals import estimate_proportion
from compressknow.compress.calibrate import text
from compressknow.compress.calibrate.text import CalibrationText, load_or_make_text, read_calibration_text
from compressknow.compress.recipe import Recipe
from compressknow.compress.steps import Prune
from compressknow.engine.identity import locate
from compressknow.evaluate.answers import Answer, read_answers
from compressknow.evaluate.facts import strip_wording
from compressknow.evaluate.grades import PRODUCED
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from compressknow.study.cells import RECORD, CellResult, build_study, claim
from compressknow.study.grid import Cell
from tests.evaluate.layouts import make_trex, write_jsonl, write_lama
from tests.knowing import KNOWN_FACTS, save_trained, save_trained_custom_code, write_bear, write_facts
from tests.long import one_in
from tests.models import put_into_hub_cache
from tests.pages.answering import make_answer, make_runs

Capsys = pytest.CaptureFixture[str]
FAMILIES = ("bert", "llama", "t5")
GRID = """
[axes]
scope = ["attention", "overall"]
prune = [0, 0.3, 0.9]
quantize = ["none", "int8", "int8-paper"]
"""
CELLS = 16
ONE = "[axes]\nprune = [0.3]\n"


class Workspace:
    """A model that knows facts, and studies of it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        self.model = save_trained(family, folder / family)
        self.probe = f"facts:{write_facts(folder / 'facts.jsonl')}"
        self.grid = folder / "grid.toml"

    def sweep(self, name: str, *options: str, grid: str = GRID) -> int:
        self.grid.write_text(grid, encoding="utf-8")
        words = ["sweep", str(self.model), "-o", str(self.folder / name), "-p", self.probe, "--grid", str(self.grid)]
        return main([*words, *options])

    def read_rows(self, name: str) -> dict[str, dict[str, str]]:
        with (self.folder / name / "cells.csv").open(encoding="utf-8", newline="") as file:
            return {row["key"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module", params=one_in(3, FAMILIES))
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(request.param, tmp_path_factory.mktemp("workspace"))
    assert workspace.sweep("study") == 0
    return workspace


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace("llama", tmp_path_factory.mktemp("llama"))


def test_cells_answer_like_converted_checkpoints(workspace: Workspace, tmp_path: Path) -> None:
    rows = workspace.read_rows("study")
    assert len(rows) == CELLS
    scopes = (("attention", "att"), ("overall", "overall"))
    for (scope, short), scheme in itertools.product(scopes, ("int8", "int8-paper")):
        key = f"{short}-gpq-30-{scheme}"
        converted = tmp_path / key
        compressknow.convert(workspace.model, converted, scope=scope, prune=0.3, quantize=scheme)
        card = compressknow.report(workspace.model, converted, workspace.probe, answers=tmp_path / "answers")
        figures, row = card.comparisons[0].probes[0], rows[key]
        counts = {key: int(row[key]) for key in ("both", "lost", "gained", "neither")}
        assert counts == {key: getattr(figures.counts, key) for key in counts}
        assert int(row["bytes"]) == card.comparisons[0].model.bytes
        assert float(row["kl_mean"]) == pytest.approx(figures.movement.kl_mean, rel=1e-6)
        # Answers are equal to the bit: the same weights, loaded in the same way, in the same batches.
        (folder,) = (workspace.folder / "study" / "cells").glob(f"{key}-{'[0-9a-f]' * 8}/*")
        stored = next(
            f
            for f in (tmp_path / "answers").iterdir()
            if json.loads((f / "probe.json").read_text())["model"]["name"] == key
        )
        for a, b in zip(read_answers(folder).answers, read_answers(stored).answers, strict=True):
            assert (a.fact_id, a.predicted, a.top5_logp) == (b.fact_id, b.predicted, b.top5_logp)


def test_table_counts_match_the_stored_answers(workspace: Workspace) -> None:
    study = workspace.folder / "study"
    original = {answer.fact_id: answer.correct for answer in read_stored(study, "original")}
    for key, row in workspace.read_rows("study").items():
        (folder,) = (f for f in (study / "cells").iterdir() if f.name.rpartition("-")[0] == key)
        (answers,) = (read_answers(f) for f in folder.iterdir())
        right = {a.fact_id: a.correct for a in answers.answers}
        assert int(row["both"]) == sum(original[id] and right[id] for id in right)
        assert int(row["gained"]) == sum(right[id] and not original[id] for id in right)
        assert int(row["pruned"]) == answers.record.model.totals["pruned"]
    # A cell made in memory has no source files to compare with the original.
    assert "was not made from" not in (study / "study.md").read_text()


def test_knowledge_falls_as_more_is_pruned(workspace: Workspace) -> None:
    rows = workspace.read_rows("study")
    kept = [float(rows[f"overall-gp-{amount}"]["kept"]) for amount in (30, 90)]
    assert kept[0] > kept[1]
    assert int(rows["overall-gp-90"]["sparse_bytes"]) < int(rows["overall-gp-30"]["sparse_bytes"])


def test_cell_result_has_the_interval_over_relations_of_its_page() -> None:
    # Two of ten relations are lost entirely.
    rows = [
        [make_answer(number, correct=side == 0 or number >= 40, relation=f"r{number // 20}") for number in range(200)]
        for side in (0, 1)
    ]
    counts = dict.fromkeys(("in_scope", "pruned", "quantized", "nonzero", "sparse_bytes"), 0)
    original, after = make_runs(rows, totals=counts)
    result = CellResult(Cell("overall", Recipe((Prune(0.3),))), original, after)
    study = build_study(original, [result])
    (cell,), (probe,) = study.cells, study.probes
    assert (probe.accuracy, probe.n, sum(probe.correct), sum(cell.correct["atlas"])) == (1, 200, 200, 160)
    assert result.kept == cell.comparison.kept
    assert result.kept.low < estimate_proportion(160, 200).low - 0.1


def test_only_cells_of_the_first_module_map_are_plain() -> None:
    counts = dict.fromkeys(("in_scope", "pruned", "quantized", "nonzero", "sparse_bytes"), 0)
    original, after = make_runs(
        [[make_answer(number, correct=True) for number in range(20)] for _ in range(2)], totals=counts
    )
    maps = ("structural", "paper", "structural")
    results = [
        CellResult(Cell(f"cell-{amount}", Recipe((Prune(amount),), module_map=name)), original, after)
        for amount, name in zip((0.2, 0.2, 0.4), maps, strict=True)
    ]
    assert [cell.plain for cell in build_study(original, results).cells] == [True, False, True]


def test_second_run_evaluates_nothing_and_writes_the_same(workspace: Workspace, capsys: Capsys) -> None:
    study = workspace.folder / "study"
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    times = {path: path.stat().st_mtime_ns for path in study.rglob("answers.parquet")}
    assert workspace.sweep("study") == 0
    assert {path: path.stat().st_mtime_ns for path in study.rglob("answers.parquet")} == times
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before
    # The setup of the paper is the same for both 8-bit schemes.
    out = capsys.readouterr().out
    assert "Overall_GPQ 90% (int8) " in out
    assert "Overall_GPQ 90% (int8-paper) " in out


def read_stored(study: Path, key: str) -> list[Answer]:
    """Return the answers of a cell or of the original."""
    folders = [study / "original", *(study / "cells").iterdir()]
    (folder,) = (f for f in folders if f.name == key or f.name.rpartition("-")[0] == key)
    return [answer for each in folder.iterdir() for answer in read_answers(each).answers]


def test_known_produced_evaluates_nothing_again_and_counts_produced_facts(workspace: Workspace, capsys: Capsys) -> None:
    study = workspace.folder / "produced"
    shutil.copytree(workspace.folder / "study", study)
    times = {path: path.stat().st_mtime_ns for path in study.rglob("answers.parquet")}
    assert workspace.sweep("produced", "--known", "produced") == 0
    assert {path: path.stat().st_mtime_ns for path in study.rglob("answers.parquet")} == times
    assert "produces 64 of 64 facts (100 %)" in capsys.readouterr().out

    rows, recognized = workspace.read_rows("produced"), workspace.read_rows("study")
    original = {a.fact_id: a.grade == PRODUCED for a in read_stored(study, "original")}
    for key, row in rows.items():
        produced = {a.fact_id: a.grade == PRODUCED for a in read_stored(study, key)}
        assert int(row["both"]) == sum(original[id] and produced[id] for id in produced)
        assert int(row["gained"]) == sum(produced[id] and not original[id] for id in produced)
    # The two definitions of known must differ for this test to mean anything.
    assert any(rows[key]["both"] != recognized[key]["both"] for key in rows)
    assert {row["known"] for row in rows.values()} == {"produced"}
    assert {row["known"] for row in recognized.values()} == {"recognized"}

    values = json.loads((study / "study.json").read_text())
    assert values["known"] == "produced"
    assert values["cliffs"][0]["kept"] in [float(row["kept"]) for row in rows.values()]
    # Produced answers are never right by chance.
    assert {probe["chance"] for probe in values["probes"].values()} == {None}
    for name in ("study.html", "study.md"):
        assert "Known means produced here" in (study / name).read_text(encoding="utf-8")
        assert "Known means produced here" not in (workspace.folder / "study" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("known", ["recognized", "produced"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_fact_is_known_if_most_of_its_wordings_are_right(family: str, known: str, tmp_path: Path) -> None:
    data, model = write_bear(tmp_path / "bear"), save_trained(family, tmp_path / family)
    (tmp_path / "grid.toml").write_text('[axes]\nscope = ["overall"]\nprune = [0.5]\n', encoding="utf-8")
    options = compressknow.Options(data=data, templates=3)
    study = compressknow.sweep(
        model, tmp_path / "study", grid=tmp_path / "grid.toml", probe="bear", options=options, known=known
    )
    compressknow.convert(model, tmp_path / "pruned", scope="overall", prune=0.5)
    card = compressknow.report(
        model, tmp_path / "pruned", "bear", options=options, known=known, answers=tmp_path / "answers"
    )
    ((cell,), (comparison,)) = study.cells, card.comparisons
    assert cell.comparison.counts == comparison.counts
    assert cell.comparison.counts.n == 32
    assert cell.comparison.counts.both < cell.comparison.counts.known_before < 32

    right: dict[str, int] = {}
    for each in read_stored(tmp_path / "study", cell.key):
        fact, is_known = strip_wording(each.fact_id), each.correct if known == "recognized" else each.grade == PRODUCED
        right[fact] = right.get(fact, 0) + is_known
    assert sum(2 * number > 3 for number in right.values()) == cell.comparison.counts.known_after
    page = (tmp_path / "study" / "study.md").read_text(encoding="utf-8")
    assert "each in 3 wordings, and known if more than half are right" in page
    probe = json.loads((tmp_path / "study" / "study.json").read_text())["probes"]["bear"]
    assert [probe[key] for key in ("templates", "protocol", "limit", "seed")] == [3, "bear/1", None, 0]


def test_study_killed_before_its_record_was_complete_starts_again(llama: Workspace) -> None:
    study = llama.folder / "begun"
    study.mkdir()
    (study / LOCK).touch()
    (study / f".{RECORD}.compressknow-0123abcd").write_text("{")
    with claim(study, ModelHandle(locate(llama.model), Settings())):
        assert sorted(path.name for path in study.iterdir()) == [LOCK, RECORD]
        (study / "original").mkdir()
    with claim(study, ModelHandle(locate(llama.model), Settings())):
        pass
    (study / RECORD).unlink()
    with pytest.raises(OutputError, match="is not a study"), claim(study, ModelHandle(locate(llama.model), Settings())):
        pass


def test_original_and_cells_are_evaluated_with_the_given_options(llama: Workspace) -> None:
    assert llama.sweep("options", "--limit", "8", "--seed", "3", "--dtype", "bfloat16", grid=ONE) == 0
    folders = [*(llama.folder / "options" / "original").iterdir(), *(llama.folder / "options" / "cells").glob("*/*")]
    records = [read_answers(folder).record for folder in folders]
    entries = [entry for record in records for entry in record.probes.values()]
    assert [record.model.computed_in for record in records] == ["bfloat16", "bfloat16"]
    assert [(entry.limit, entry.seed) for entry in entries] == [(8, 3), (8, 3)]


def test_stopped_study_resumes(llama: Workspace) -> None:
    class Stop(BaseException):
        pass

    results = []

    def stop(result: CellResult) -> None:
        results.append(result)
        if len(results) == 3:
            raise Stop

    llama.grid.write_text(GRID, encoding="utf-8")
    with pytest.raises(Stop):
        compressknow.sweep(llama.model, llama.folder / "stopped", grid=llama.grid, probe=[llama.probe], on_result=stop)
    times = {p: p.stat().st_mtime_ns for p in (llama.folder / "stopped").rglob("answers.parquet")}
    assert len(times) == 4
    assert not (llama.folder / "stopped" / "cells.csv").exists()
    assert llama.sweep("stopped") == 0
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert len(llama.read_rows("stopped")) == CELLS


def test_failed_cell_is_recorded_and_the_others_are_evaluated(llama: Workspace, capsys: Capsys) -> None:
    text = llama.folder / "short.txt"
    text.write_text("Too few words.", encoding="utf-8")
    settings = f'method = "wanda"\nprune = 0.3\ncalibration = {json.dumps(str(text))}'
    grid = f'[[cells]]\nscope = "attention"\n{settings}\n[[cells]]\nscope = "attention"\nprune = 0.3\n'
    assert llama.sweep("failing", grid=grid) == 1
    rows = llama.read_rows("failing")
    assert rows["att-gp-30"]["status"] == "ok"
    assert rows["att-wanda-30-short.txt"]["status"] == "failed"
    assert "short.txt" in rows["att-wanda-30-short.txt"]["error"]
    recipe = [rows["att-wanda-30-short.txt"][name] for name in ("scope", "method", "amount", "calibration")]
    assert recipe == ["attention", "wanda", "0.3", str(text)]
    out = " ".join(capsys.readouterr().out.split())
    assert "Att wanda 30% [att-wanda-30-short.txt]: failed" in out
    advice = "Follow any advice in them, then repeat the command."
    assert f"1 of 2 cells failed; the study lists the reasons. {advice}" in out
    # The next run evaluates only this cell again.
    times = {path: path.stat().st_mtime_ns for path in (llama.folder / "failing").rglob("answers.parquet")}
    text.write_text("\n".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS * 8), encoding="utf-8")
    assert llama.sweep("failing", grid=grid) == 0
    assert {row["status"] for row in llama.read_rows("failing").values()} == {"ok"}
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_long_setup_is_printed_on_its_own_line(llama: Workspace, capsys: Capsys) -> None:
    grid = '[axes]\nscope = ["attention"]\nprune = [0.3]\nper_layer = [true]\nquantize = ["int8", "fp8"]\n'
    grid += '[[cells]]\nname = "Late layers"\nlayers = "1"\nprune = 0.3\n'
    assert llama.sweep("long", grid=grid) == 0
    lines = capsys.readouterr().out.splitlines()
    for scheme in ("int8", "fp8"):
        index = lines.index(f"Att L1-unstructured per layer 30% + Att_GQ ({scheme})")
        assert re.fullmatch(r" {34}\d.* % \(.*\) +\d.* % +\d.* kB", lines[index + 1])
    # The name in the grid distinguishes it from other cells. Pruning alone does not change the size on disk.
    pruned = lines[lines.index("Blocks[layers 1]_GP 30% [late-layers]") + 1]
    (original,) = (line for line in lines if line.startswith("original "))
    size = write_size((llama.model / "model.safetensors").stat().st_size)
    assert [line.endswith(f" %  {size}") for line in (original, pruned)] == [True, True]
    assert max(map(len, lines[: lines.index(pruned) + 1])) <= 80


def test_mean_over_relations_is_told_from_the_share_of_facts(llama: Workspace, tmp_path: Path, capsys: Capsys) -> None:
    data = write_lama(tmp_path)
    (data / "common_vocab_cased.txt").write_text("Velin\n")
    write_jsonl(data / "TREx" / "P36.jsonl", [make_trex("P36", "Avaland", "Velin", "a")])
    assert llama.sweep("lama", "-p", "lama:trex", "--data", str(data), grid=ONE) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "Right is the share of all facts; the study's accuracy on lama:trex is the mean over relations." in words


def test_study_that_cannot_be_written_stops_at_the_first_cell(llama: Workspace, capsys: Capsys) -> None:
    study = llama.folder / "unwritten"
    with claim(study, ModelHandle(locate(llama.model), Settings())):
        (study / "cells").symlink_to(llama.folder / "gone")
    assert llama.sweep("unwritten") == 1
    assert "cells is a link that leads nowhere" in capsys.readouterr().err
    (study / "cells").unlink()
    assert llama.sweep("unwritten", grid=ONE) == 0


def test_saved_checkpoints_equal_those_of_convert(llama: Workspace) -> None:
    assert llama.sweep("unsaved", grid=ONE) == 0
    assert llama.sweep("saving", "--save", grid=ONE) == 0
    assert llama.read_rows("saving") == llama.read_rows("unsaved")
    saved, unsaved = (read_stored(llama.folder / name, "blocks-gp-30") for name in ("saving", "unsaved"))
    assert [each.top5_logp for each in saved] == [each.top5_logp for each in unsaved]
    (saved,) = (llama.folder / "saving" / "models").iterdir()
    assert compressknow.verify(saved)
    compressknow.convert(llama.model, llama.folder / "same", prune=0.3)
    assert (saved / "model.safetensors").read_bytes() == (llama.folder / "same" / "model.safetensors").read_bytes()


def test_custom_code_checkpoint_is_saved(llama: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    (tmp_path / "one.toml").write_text(ONE, encoding="utf-8")
    source, study = save_trained_custom_code(tmp_path / "own"), tmp_path / "study"
    words = ["sweep", str(source), "-o", str(study), "-p", llama.probe, "--grid", str(tmp_path / "one.toml"), "--save"]
    assert main([*words, "--trust-remote-code"]) == 0
    (saved,) = (study / "models").iterdir()
    assert compressknow.verify(saved)
    compressknow.convert(source, tmp_path / "same", prune=0.3, trust_remote_code=True)
    assert (saved / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()


def test_saved_checkpoint_names_its_hub_id_and_commit(
    llama: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = put_into_hub_cache(llama.model, tmp_path / "hub", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "one.toml").write_text(ONE, encoding="utf-8")
    compressknow.sweep("org/tiny", tmp_path / "study", grid=tmp_path / "one.toml", probe=llama.probe, save=True)
    (saved,) = (tmp_path / "study" / "models").iterdir()
    source = json.loads((saved / "compressknow.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("org/tiny", commit)


CALIBRATED = """
[axes]
scope = ["attention"]
method = ["wanda", "sparsegpt"]
prune = [0, 0.5]
quantize = ["none", "int8"]
rounding = ["gptq"]
calibration_tokens = [512]
"""


def test_calibrated_cells_share_one_text_and_equal_those_of_convert(
    llama: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def read_and_count(*args: object, **options: object) -> CalibrationText:
        calls.append(options)
        return read_calibration_text(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("compressknow.compress.calibrate.text.read_calibration_text", read_and_count)
    results = []

    class Stop(BaseException):
        pass

    def stop(result: CellResult) -> None:
        results.append(result)
        if len(results) == 2:
            raise Stop

    llama.grid.write_text(CALIBRATED, encoding="utf-8")
    study, options = llama.folder / "calibrated", {"grid": llama.grid, "probe": [llama.probe]}
    with pytest.raises(Stop):
        compressknow.sweep(llama.model, study, on_result=stop, **options)
    (text_file,) = (study / "calibration").iterdir()
    before = text_file.stat().st_mtime_ns
    # Stored answers are kept, and the other cells read the same text.
    times = {p: p.stat().st_mtime_ns for p in study.rglob("answers.parquet")}
    assert llama.sweep("calibrated", "--save", grid=CALIBRATED) == 0
    assert len(calls) == 1
    assert text_file.stat().st_mtime_ns == before
    assert {p: p.stat().st_mtime_ns for p in times} == times
    rows = llama.read_rows("calibrated")
    assert {(row["calibration"], row["calibration_tokens"]) for row in rows.values()} == {("self", "512")}
    assert {(row["pruning"], row["quantization"]) for row in rows.values()} == {
        *(("", "int8 gptq"), ("wanda", ""), ("sparsegpt", ""), ("wanda", "int8 gptq"), ("sparsegpt", "int8 gptq")),
    }
    monkeypatch.undo()
    (saved,) = (study / "models").glob("att-sparsegpt-50-att-gq-gptq-int8-512-tokens-*")
    compressknow.convert(
        llama.model,
        tmp_path / "same",
        scope="attention",
        prune=0.5,
        prune_method="sparsegpt",
        quantize="int8",
        rounding="gptq",
        calibration_tokens=512,
    )
    assert (saved / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()


def test_study_reports_facts_in_its_calibration_text(llama: Workspace) -> None:
    text = llama.folder / "facts.txt"
    text.write_text("\n".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS[:16] * 64), encoding="utf-8")
    grid = f"""
    [axes]
    scope = ["attention", "feed-forward"]
    method = ["wanda"]
    prune = [0.3]
    calibration = ["self", {json.dumps(str(text))}]
    calibration_tokens = [512]
    """
    for _ in range(2):  # also when the study resumes
        assert llama.sweep("facts-in-text", grid=grid) == 0
        page = " ".join((llama.folder / "facts-in-text" / "study.md").read_text(encoding="utf-8").split())
        assert page.count("16 appear in the calibration") == page.count("> **Note:** Of 64 facts, 16 appear in") == 1
        assert "was calibrated on" not in page


def test_changed_calibration_text_is_read_again(llama: Workspace) -> None:
    grid = CALIBRATED.replace("[512]", f"[512]\ncalibration = ['{(file := write_text(llama))}']")
    grid = grid.replace('"wanda", "sparsegpt"', '"wanda"').replace('"none", "int8"', '"none"').replace("rounding", "#")
    kl = []
    for lines in (KNOWN_FACTS, KNOWN_FACTS[:16]):
        file.write_text("\n".join(fact.sentence(fact.obj_label) for fact in lines * 8), encoding="utf-8")
        assert llama.sweep("changed", grid=grid) == 0
        assert llama.sweep(f"new-{len(lines)}", grid=grid) == 0
        ((_, row),) = llama.read_rows("changed").items()
        assert row == next(iter(llama.read_rows(f"new-{len(lines)}").values()))
        kl.append(row["kl_mean"])
    assert kl[0] != kl[1]


def test_damaged_calibration_text_is_made_again(tmp_path: Path) -> None:
    batches = ({"input_ids": torch.arange(12).view(3, 4)},)
    made = CalibrationText("self", "self", text.hash_batches(batches), 0, 12, 12, batches, ("a", "b", "c"))
    calls: list[int] = []

    def make() -> CalibrationText:
        calls.append(1)
        return made

    def is_same(other: CalibrationText) -> bool:
        return other.sha256 == made.sha256 and torch.equal(other.batches[0]["input_ids"], batches[0]["input_ids"])

    file = tmp_path / "texts" / "text.json"
    for _ in range(2):
        assert is_same(load_or_make_text(file, make))
    assert len(calls) == 1
    for damage in ("", "{", "[]", file.read_text().replace("11", "10"), file.read_text()[:-4]):
        file.write_text(damage)
        before = len(calls)
        assert is_same(load_or_make_text(file, make))
        assert len(calls) == before + 1


def test_unsupported_cell_is_refused_and_the_study_succeeds(tmp_path: Path, capsys: Capsys) -> None:
    workspace = Workspace("bert", tmp_path)
    grid = '[axes]\nscope = ["attention"]\nquantize = ["int8"]\nsmooth = [0, 0.5]\ncalibration_tokens = [512]\n'
    assert workspace.sweep("study", grid=grid) == 0
    rows = workspace.read_rows("study")
    assert {key: row["status"] for key, row in rows.items()} == {
        "att-gq-int8": "ok",
        "att-gq-smooth-0.5-int8-512-tokens": "refused",
    }
    assert "can be smoothed" in rows["att-gq-smooth-0.5-int8-512-tokens"]["error"]
    printed = capsys.readouterr().out
    assert "Att_GQ smooth 0.5 (int8) [att-gq-smooth-0.5-int8-512-tokens]: refused" in " ".join(printed.split())
    # One cell gives no conclusions.
    assert "\n\nWritten: " in printed
    assert "\n\n\n" not in printed


def test_cell_of_a_scope_that_the_model_lacks_is_refused(llama: Workspace, capsys: Capsys) -> None:
    assert llama.sweep("lacking", grid='[axes]\nscope = ["cross-attention", "attention"]\nprune = [0.3]\n') == 0
    rows = llama.read_rows("lacking")
    assert rows["att-gp-30"]["status"] == "ok"
    assert rows["crossatt-gp-30"]["status"] == "refused"
    assert "empty" in rows["crossatt-gp-30"]["error"]
    out = " ".join(capsys.readouterr().out.split())
    assert "CrossAtt_GP 30%: refused" in out
    assert "Not supported by this model: 1 of 2 cells; the study lists the reasons." in out
    assert "repeat the command" not in out


def test_folder_of_another_study_is_refused(llama: Workspace, capsys: Capsys) -> None:
    assert llama.sweep("llama") == 1
    assert "is not a study" in capsys.readouterr().err
    other = save_trained("bert", llama.folder / "bert")
    assert llama.sweep("study", grid=ONE) == 0
    assert main(["sweep", str(other), "-o", str(llama.folder / "study"), "-p", llama.probe]) == 1
    assert "study of another model" in capsys.readouterr().err
    record = llama.folder / "study" / "sweep.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"version": "0.0.1"}))
    assert llama.sweep("study", grid=ONE) == 1
    assert "by another version (0.0.1" in capsys.readouterr().err


def test_study_of_other_facts_is_refused_unchanged_and_extended_by_cells_and_probes(
    llama: Workspace, capsys: Capsys
) -> None:
    def read_files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (llama.folder / "limited").rglob("*") if path.is_file()}

    assert llama.sweep("limited", "--limit", "8", grid=ONE) == 0
    before, _ = read_files(), capsys.readouterr()
    assert llama.sweep("limited", "--limit", "4", grid=ONE) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "It was made with --limit 8, --seed 0, 8 prompts, on cpu in float32, transformers" in error
    assert read_files() == before

    more = shutil.copy(llama.folder / "facts.jsonl", llama.folder / "more.jsonl")
    assert llama.sweep("limited", "--limit", "8", "-p", f"facts:{more}", grid=ONE.replace("0.3", "0.3, 0.9")) == 0
    answers = {path: content for path, content in before.items() if path.name == "answers.parquet"}
    assert answers.items() <= read_files().items()


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--grid", "none.toml"], "no such grid", 2),
        (["--quantize", "int8"], "--quantize does not apply to the grid", 2),
        (["--module-map", "paper"], "--module-map does not apply to the grid", 2),
        (["--calibration", "self"], "--calibration does not apply to the grid", 2),
        (["--calibration-tokens", "512"], "--calibration-tokens does not apply to the grid", 2),
        (["-p", "lama:nothing"], "lama:nothing", 2),
        (["--known", "produce"], "Did you mean produced?", 2),
        (["--templates", "3"], "has one wording per fact", 2),
        (["--num-cpus", "4"], "are for tasks on a Ray cluster", 2),
        (["--ray", "127.0.0.1:1"], "No Ray cluster answers at 127.0.0.1:1", 1),
        (["--ray", "auto", "--num-gpus", "1", "--device", "cpu"], "--num-gpus 1: the original runs on", 2),
    ],
)
def test_invalid_options_are_refused_and_leave_nothing(
    llama: Workspace, capsys: Capsys, options: list[str], message: str, code: int
) -> None:
    assert llama.sweep("bad", *options) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (llama.folder / "bad").exists()


def test_task_without_generated_text_is_refused_for_produced(llama: Workspace, capsys: Capsys) -> None:
    pytest.importorskip("lm_eval")
    assert llama.sweep("bad", "-p", "lm-eval:piqa", "--known", "produced") == 2
    assert "The answers to lm-eval:piqa have no generated text" in capsys.readouterr().err
    assert not (llama.folder / "bad").exists()
    for command in ("report", "compare"):
        words = [command, str(llama.model), str(llama.model), "-p", "lm-eval:piqa", "--known", "produced"]
        assert main(words) == 2
        assert "The answers to lm-eval:piqa have no generated text" in capsys.readouterr().err


def test_unknown_definition_of_known_is_refused(llama: Workspace) -> None:
    with pytest.raises(UsageError, match="is not a definition of known"):
        compressknow.sweep(llama.model, llama.folder / "bad", probe=llama.probe, known="guessed")
    assert not (llama.folder / "bad").exists()


def write_text(workspace: Workspace) -> Path:
    text = workspace.folder / "facts.txt"
    text.write_text("\n".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS) + "\n", encoding="utf-8")
    return text


def test_text_probe_gives_each_cell_its_perplexity(llama: Workspace, tmp_path: Path) -> None:
    text = write_text(llama)
    words = ("-p", f"text:{text}", "--context", "24", "--known", "produced")
    for _ in range(2):
        assert llama.sweep("text", *words, grid='[axes]\nscope = ["overall"]\nprune = [0.3, 0.9]\n') == 0
    with (llama.folder / "text" / "cells.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["key"], row["probe"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4
    study, options = llama.folder / "text", compressknow.Options(context=24)
    for amount in (30, 90):
        compressknow.convert(llama.model, tmp_path / str(amount), scope="overall", prune=amount / 100)
        card = compressknow.report(
            llama.model, tmp_path / str(amount), f"text:{text}", options=options, answers=tmp_path / "answers"
        )
        (figures,), row = card.comparisons[0].texts, rows[f"overall-gp-{amount}", "text:facts.txt"]
        assert float(row["perplexity_original"]) == pytest.approx(figures.original.value.value)
        assert float(row["perplexity_compressed"]) == pytest.approx(figures.compressed.value.value)
        assert float(row["kl_mean"]) == pytest.approx(figures.moved.kl.value)
        assert (row["n"], row["kept"], row["known"]) == ("", "", "")
        # Rows of facts have no perplexity.
        row = rows[f"overall-gp-{amount}", "facts:facts.jsonl"]
        assert (row["n"], row["perplexity_compressed"]) == ("64", "")
    values = json.loads((study / "study.json").read_text())
    assert list(values["probes"]) == ["facts:facts.jsonl"]
    table = (study / "study.md").read_text(encoding="utf-8").split("## All cells")[1].splitlines()
    header, _, original, *cells = [line.split(" | ") for line in table if line.startswith("|")][:5]
    column = header.index("Perplexity, text:facts.txt")
    assert [float(row[column].partition(" ±")[0]) for row in (original, *cells)] == [
        pytest.approx(float(rows[key, "text:facts.txt"][f"perplexity_{side}"]), abs=0.01)
        for key, side in (
            ("overall-gp-30", "original"),
            ("overall-gp-30", "compressed"),
            ("overall-gp-90", "compressed"),
        )
    ]


def test_sweep_without_facts_is_refused(llama: Workspace, capsys: Capsys) -> None:
    text = write_text(llama)
    assert main(["sweep", str(llama.model), "-o", str(llama.folder / "bad"), "-p", f"text:{text}"]) == 2
    assert "A sweep needs facts, and text:facts.txt is a text." in capsys.readouterr().err
    assert not (llama.folder / "bad").exists()


def test_text_is_refused_first_if_the_model_cannot_read_it(tmp_path: Path, capsys: Capsys) -> None:
    workspace = Workspace("bert", tmp_path)
    assert workspace.sweep("study", "-p", f"text:{write_text(workspace)}") != 0
    assert "Traceback" not in capsys.readouterr().err
    assert not list((tmp_path / "study").rglob("answers.parquet"))
