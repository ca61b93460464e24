"""`sweep`: every cell is what `convert` and `probe` would have given, and a study resumes, records and refuses."""

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
from tests.knowing import KNOWN_FACTS, save_trained, save_trained_custom_code, write_bear, write_facts
from tests.models import put_into_hub_cache
from tests.pages.answering import make_answer, make_runs

FAMILIES = ("bert", "llama", "t5")
GRID = """
[axes]
scope = ["attention", "overall"]
prune = [0, 0.3, 0.9]
quantize = ["none", "int8", "int8-paper"]
"""
CELLS = 16
ONE = "[axes]\nprune = [0.3]\n"


class Place:
    """A model that knows, facts to ask, and a grid."""

    def __init__(self, family: str, folder: Path) -> None:
        self.folder = folder
        self.model = save_trained(family, folder / family)
        self.probe = f"facts:{write_facts(folder / 'facts.jsonl')}"
        self.grid = folder / "grid.toml"

    def sweep(self, name: str, *options: str, grid: str = GRID) -> int:
        self.grid.write_text(grid, encoding="utf-8")
        words = ["sweep", str(self.model), "-o", str(self.folder / name), "-p", self.probe, "--grid", str(self.grid)]
        return main([*words, *options])

    def rows(self, name: str) -> dict[str, dict[str, str]]:
        with (self.folder / name / "cells.csv").open(encoding="utf-8", newline="") as file:
            return {row["key"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module", params=FAMILIES)
def swept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(request.param, tmp_path_factory.mktemp("place"))
    assert place.sweep("study") == 0
    return place


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place("llama", tmp_path_factory.mktemp("llama"))


def test_cells_answer_like_converted_checkpoints(swept: Place, tmp_path: Path) -> None:
    rows = swept.rows("study")
    assert len(rows) == CELLS
    scopes = (("attention", "att"), ("overall", "overall"))
    for (scope, short), scheme in itertools.product(scopes, ("int8", "int8-paper")):
        key = f"{short}-gpq-30-{scheme}"
        converted = tmp_path / key
        compressknow.convert(swept.model, converted, scope=scope, prune=0.3, quantize=scheme)
        card = compressknow.report(swept.model, converted, swept.probe, answers=tmp_path / "answers")
        figures, row = card.comparisons[0].probes[0], rows[key]
        counts = {key: int(row[key]) for key in ("both", "lost", "gained", "neither")}
        assert counts == {key: getattr(figures.counts, key) for key in counts}
        assert int(row["bytes"]) == card.comparisons[0].model.bytes
        assert float(row["kl_mean"]) == pytest.approx(figures.movement.kl_mean, rel=1e-6)
        # The very answers, to the bit: the same weights, loaded the same way, in the same batches.
        (folder,) = (swept.folder / "study" / "cells").glob(f"{key}-{'[0-9a-f]' * 8}/*")
        stored = next(
            f
            for f in (tmp_path / "answers").iterdir()
            if json.loads((f / "probe.json").read_text())["model"]["name"] == key
        )
        for mine, other in zip(read_answers(folder).answers, read_answers(stored).answers, strict=True):
            assert (mine.fact_id, mine.predicted, mine.top5_logp) == (other.fact_id, other.predicted, other.top5_logp)


def test_table_counts_match_the_stored_answers(swept: Place) -> None:
    original = {
        a.fact_id: a.correct for f in (swept.folder / "study" / "original").iterdir() for a in read_answers(f).answers
    }
    for key, row in swept.rows("study").items():
        (folder,) = (f for f in (swept.folder / "study" / "cells").iterdir() if f.name.rpartition("-")[0] == key)
        (answers,) = (read_answers(f) for f in folder.iterdir())
        right = {a.fact_id: a.correct for a in answers.answers}
        assert int(row["both"]) == sum(original[id] and right[id] for id in right)
        assert int(row["gained"]) == sum(right[id] and not original[id] for id in right)
        assert int(row["pruned"]) == answers.record.model.totals["pruned"]
    # Made in memory, a cell has no files of a source that could be another than the original.
    assert "was not made from" not in (swept.folder / "study" / "study.md").read_text()


def test_knowledge_falls_as_more_is_pruned(swept: Place) -> None:
    rows = swept.rows("study")
    kept = [float(rows[f"overall-gp-{amount}"]["kept"]) for amount in (30, 90)]
    assert kept[0] > kept[1]
    assert int(rows["overall-gp-90"]["sparse_bytes"]) < int(rows["overall-gp-30"]["sparse_bytes"])


def test_cell_result_has_the_interval_over_relations_of_its_page() -> None:
    # Of ten relations, two are lost as a whole.
    rows = [
        [make_answer(number, correct=side == 0 or number >= 40, relation=f"r{number // 20}") for number in range(200)]
        for side in (0, 1)
    ]
    counts = dict.fromkeys(("in_scope", "pruned", "quantized", "nonzero", "sparse_bytes"), 0)
    original, after = make_runs(rows, totals=counts)
    result = CellResult(Cell("overall", Recipe((Prune(0.3),))), original, after)
    (cell,) = build_study(original, [result]).cells
    assert result.kept == cell.comparison.kept
    assert result.kept.low < estimate_proportion(160, 200).low - 0.1


def test_only_cells_of_the_first_module_map_are_plain() -> None:
    counts = dict.fromkeys(("in_scope", "pruned", "quantized", "nonzero", "sparse_bytes"), 0)
    original, after = make_runs(
        [[make_answer(number, correct=True) for number in range(20)] for _ in range(2)], totals=counts
    )
    maps = ("structural", "paper", "structural")
    results = [
        CellResult(Cell(f"cell-{amount}", Recipe((Prune(amount),), module_map=of)), original, after)
        for amount, of in zip((0.2, 0.2, 0.4), maps, strict=True)
    ]
    assert [cell.plain for cell in build_study(original, results).cells] == [True, False, True]


def test_second_run_evaluates_nothing_and_writes_the_same(swept: Place, capsys: pytest.CaptureFixture[str]) -> None:
    study = swept.folder / "study"
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    asked = {path: path.stat().st_mtime_ns for path in study.rglob("answers.parquet")}
    assert swept.sweep("study") == 0
    assert {path: path.stat().st_mtime_ns for path in study.rglob("answers.parquet")} == asked
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before
    # Of two schemes of 8 bits, which the paper's name does not tell apart.
    out = capsys.readouterr().out
    assert "Overall_GPQ 90% (int8) " in out
    assert "Overall_GPQ 90% (int8-paper) " in out


def stored_in(study: Path, key: str) -> list[Answer]:
    """What a cell answered, or the original."""
    folders = [study / "original", *(study / "cells").iterdir()]
    (folder,) = (f for f in folders if f.name == key or f.name.rpartition("-")[0] == key)
    return [answer for each in folder.iterdir() for answer in read_answers(each).answers]


def test_known_produced_evaluates_nothing_again_and_counts_produced_facts(
    swept: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    study = swept.folder / "said"
    shutil.copytree(swept.folder / "study", study)
    asked = {path: path.stat().st_mtime_ns for path in study.rglob("answers.parquet")}
    assert swept.sweep("said", "--known", "produced") == 0
    assert {path: path.stat().st_mtime_ns for path in study.rglob("answers.parquet")} == asked
    assert "produces 64 of 64 facts (100 %)" in capsys.readouterr().out

    rows, recognized = swept.rows("said"), swept.rows("study")
    original = {a.fact_id: a.grade == PRODUCED for a in stored_in(study, "original")}
    for key, row in rows.items():
        says = {a.fact_id: a.grade == PRODUCED for a in stored_in(study, key)}
        assert int(row["both"]) == sum(original[id] and says[id] for id in says)
        assert int(row["gained"]) == sum(says[id] and not original[id] for id in says)
    # The readings do not agree, else the test shows nothing.
    assert any(rows[key]["both"] != recognized[key]["both"] for key in rows)
    assert {row["known"] for row in rows.values()} == {"produced"}
    assert {row["known"] for row in recognized.values()} == {"recognized"}

    told = json.loads((study / "study.json").read_text())
    assert told["known"] == "produced"
    by_amount = told["cliffs"][0]["kept"]
    assert by_amount in [float(row["kept"]) for row in rows.values()]
    # Nothing that is said is right by chance.
    assert {probe["chance"] for probe in told["probes"].values()} == {None}
    for name in ("study.html", "study.md"):
        assert "Known means produced here" in (study / name).read_text(encoding="utf-8")
        assert "Known means produced here" not in (swept.folder / "study" / name).read_text(encoding="utf-8")


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

    most: dict[str, int] = {}
    for each in stored_in(tmp_path / "study", cell.key):
        right = each.correct if known == "recognized" else each.grade == PRODUCED
        most[strip_wording(each.fact_id)] = most.get(strip_wording(each.fact_id), 0) + right
    assert sum(2 * right > 3 for right in most.values()) == cell.comparison.counts.known_after
    page = (tmp_path / "study" / "study.md").read_text(encoding="utf-8")
    assert "each in 3 wordings, and known if more than half are right" in page
    told = json.loads((tmp_path / "study" / "study.json").read_text())["probes"]["bear"]
    assert [told[key] for key in ("templates", "protocol", "limit", "seed")] == [3, "bear/1", None, 0]


def test_study_killed_before_its_record_was_complete_starts_again(llama: Place) -> None:
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


def test_stopped_study_resumes(llama: Place) -> None:
    class Stop(BaseException):
        pass

    seen = []

    def stop(result: CellResult) -> None:
        seen.append(result.cell.key)
        if len(seen) == 3:
            raise Stop

    llama.grid.write_text(GRID, encoding="utf-8")
    with pytest.raises(Stop):
        compressknow.sweep(llama.model, llama.folder / "stopped", grid=llama.grid, probe=[llama.probe], on_result=stop)
    tables = {p: p.stat().st_mtime_ns for p in (llama.folder / "stopped").rglob("answers.parquet")}
    assert len(tables) == 4
    assert not (llama.folder / "stopped" / "cells.csv").exists()
    assert llama.sweep("stopped") == 0
    assert {p: p.stat().st_mtime_ns for p in tables} == tables
    assert len(llama.rows("stopped")) == CELLS


def test_failed_cell_is_recorded_and_the_others_are_evaluated(llama: Place, capsys: pytest.CaptureFixture[str]) -> None:
    text = llama.folder / "short.txt"
    text.write_text("Too few words.", encoding="utf-8")
    calibrated = f'method = "wanda"\nprune = 0.3\ncalibration = {json.dumps(str(text))}'
    grid = f'[[cells]]\nscope = "attention"\n{calibrated}\n[[cells]]\nscope = "attention"\nprune = 0.3\n'
    assert llama.sweep("failing", grid=grid) == 1
    rows = llama.rows("failing")
    assert rows["att-gp-30"]["status"] == "ok"
    assert rows["att-wanda-30-short.txt"]["status"] == "failed"
    assert "short.txt" in rows["att-wanda-30-short.txt"]["error"]
    recipe = [rows["att-wanda-30-short.txt"][name] for name in ("scope", "method", "amount", "calibration")]
    assert recipe == ["attention", "wanda", "0.3", str(text)]
    out = " ".join(capsys.readouterr().out.split())
    assert "Att wanda 30% [att-wanda-30-short.txt]: failed" in out
    assert "1 of 2 cells failed" in out
    # The next run tries it again, and it alone.
    answered = {path: path.stat().st_mtime_ns for path in (llama.folder / "failing").rglob("answers.parquet")}
    text.write_text("\n".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS * 8), encoding="utf-8")
    assert llama.sweep("failing", grid=grid) == 0
    assert {row["status"] for row in llama.rows("failing").values()} == {"ok"}
    assert {path: path.stat().st_mtime_ns for path in answered} == answered


def test_long_setup_is_printed_on_its_own_line(llama: Place, capsys: pytest.CaptureFixture[str]) -> None:
    grid = '[axes]\nscope = ["attention"]\nprune = [0.3]\nper_layer = [true]\nquantize = ["int8", "fp8"]\n'
    grid += '[[cells]]\nname = "Late layers"\nlayers = "1"\nprune = 0.3\n'
    assert llama.sweep("long", grid=grid) == 0
    lines = capsys.readouterr().out.splitlines()
    for scheme in ("int8", "fp8"):
        place = lines.index(f"Att L1-unstructured per layer 30% + Att_GQ ({scheme})")
        assert re.fullmatch(r" {34}\d.* % \(.*\) +\d.* % +\d.* kB", lines[place + 1])
    # So that it can be told from others, with the name that the grid gives it.
    assert "Blocks[layers 1]_GP 30% [late-layers]" in lines


def test_study_that_cannot_be_written_stops_at_the_first_cell(llama: Place, capsys: pytest.CaptureFixture[str]) -> None:
    study = llama.folder / "unwritten"
    with claim(study, ModelHandle(locate(llama.model), Settings())):
        (study / "cells").symlink_to(llama.folder / "gone")
    assert llama.sweep("unwritten") == 1
    assert "cells is a link that leads nowhere" in capsys.readouterr().err
    (study / "cells").unlink()
    assert llama.sweep("unwritten", grid=ONE) == 0


def test_saved_checkpoints_equal_those_of_convert(llama: Place) -> None:
    assert llama.sweep("unsaved", grid=ONE) == 0
    assert llama.sweep("saving", "--save", grid=ONE) == 0
    assert llama.rows("saving") == llama.rows("unsaved")
    saved, unsaved = (stored_in(llama.folder / name, "blocks-gp-30") for name in ("saving", "unsaved"))
    assert [each.top5_logp for each in saved] == [each.top5_logp for each in unsaved]
    (saved,) = (llama.folder / "saving" / "models").iterdir()
    assert compressknow.verify(saved)
    compressknow.convert(llama.model, llama.folder / "same", prune=0.3)
    assert (saved / "model.safetensors").read_bytes() == (llama.folder / "same" / "model.safetensors").read_bytes()


def test_checkpoint_with_custom_code_is_saved(llama: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    (tmp_path / "one.toml").write_text(ONE, encoding="utf-8")
    own, study = save_trained_custom_code(tmp_path / "own"), tmp_path / "study"
    words = ["sweep", str(own), "-o", str(study), "-p", llama.probe, "--grid", str(tmp_path / "one.toml"), "--save"]
    assert main([*words, "--trust-remote-code"]) == 0
    (saved,) = (study / "models").iterdir()
    assert compressknow.verify(saved)
    compressknow.convert(own, tmp_path / "same", prune=0.3, trust_remote_code=True)
    assert (saved / "model.safetensors").read_bytes() == (tmp_path / "same" / "model.safetensors").read_bytes()


def test_saved_checkpoint_names_its_hub_id_and_commit(
    llama: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    llama: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = []

    def counted(*args: object, **options: object) -> CalibrationText:
        made.append(options)
        return read_calibration_text(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("compressknow.compress.calibrate.text.read_calibration_text", counted)
    seen = []

    class Stop(BaseException):
        pass

    def stop(result: CellResult) -> None:
        seen.append(result)
        if len(seen) == 2:
            raise Stop

    llama.grid.write_text(CALIBRATED, encoding="utf-8")
    study, options = llama.folder / "calibrated", {"grid": llama.grid, "probe": [llama.probe]}
    with pytest.raises(Stop):
        compressknow.sweep(llama.model, study, on_result=stop, **options)
    (kept,) = (study / "calibration").iterdir()
    before = kept.stat().st_mtime_ns
    # What was answered stays, and what is left reads the same text.
    tables = {p: p.stat().st_mtime_ns for p in study.rglob("answers.parquet")}
    assert llama.sweep("calibrated", "--save", grid=CALIBRATED) == 0
    assert len(made) == 1
    assert kept.stat().st_mtime_ns == before
    assert {p: p.stat().st_mtime_ns for p in tables} == tables
    rows = llama.rows("calibrated")
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


def test_study_reports_facts_in_its_calibration_text(llama: Place) -> None:
    text = llama.folder / "facts.txt"
    told = KNOWN_FACTS[:16]
    text.write_text("\n".join(fact.sentence(fact.obj_label) for fact in told * 64), encoding="utf-8")
    grid = f"""
    [axes]
    scope = ["attention", "feed-forward"]
    method = ["wanda"]
    prune = [0.3]
    calibration = ["self", {json.dumps(str(text))}]
    calibration_tokens = [512]
    """
    for _ in range(2):  # a study that resumes says so too
        assert llama.sweep("told", grid=grid) == 0
        page = " ".join((llama.folder / "told" / "study.md").read_text(encoding="utf-8").split())
        assert page.count("16 appear in the calibration") == page.count("> **Note:** Of 64 facts, 16 appear in") == 1
        assert "was calibrated on" not in page


def test_changed_calibration_text_is_read_again(llama: Place) -> None:
    grid = CALIBRATED.replace("[512]", f"[512]\ncalibration = ['{(file := text_of(llama))}']")
    grid = grid.replace('"wanda", "sparsegpt"', '"wanda"').replace('"none", "int8"', '"none"').replace("rounding", "#")
    kept = []
    for lines in (KNOWN_FACTS, KNOWN_FACTS[:16]):
        file.write_text("\n".join(fact.sentence(fact.obj_label) for fact in lines * 8), encoding="utf-8")
        assert llama.sweep("changed", grid=grid) == 0
        assert llama.sweep(f"new-{len(lines)}", grid=grid) == 0
        ((_, row),) = llama.rows("changed").items()
        assert row == next(iter(llama.rows(f"new-{len(lines)}").values()))
        kept.append(row["kl_mean"])
    assert kept[0] != kept[1]


def test_damaged_calibration_text_is_made_again(tmp_path: Path) -> None:
    batches = ({"input_ids": torch.arange(12).view(3, 4)},)
    whole = CalibrationText("self", "self", text.hash_batches(batches), 0, 12, 12, batches, ("a", "b", "c"))
    made: list[int] = []

    def make() -> CalibrationText:
        made.append(1)
        return whole

    def same(other: CalibrationText) -> bool:
        return other.sha256 == whole.sha256 and torch.equal(other.batches[0]["input_ids"], batches[0]["input_ids"])

    file = tmp_path / "texts" / "text.json"
    for _ in range(2):
        assert same(load_or_make_text(file, make))
    assert len(made) == 1
    for damage in ("", "{", "[]", file.read_text().replace("11", "10"), file.read_text()[:-4]):
        file.write_text(damage)
        before = len(made)
        assert same(load_or_make_text(file, make))
        assert len(made) == before + 1


def test_unsupported_cell_is_refused_and_the_study_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place("bert", tmp_path)
    grid = '[axes]\nscope = ["attention"]\nquantize = ["int8"]\nsmooth = [0, 0.5]\ncalibration_tokens = [512]\n'
    assert place.sweep("study", grid=grid) == 0
    rows = place.rows("study")
    assert {key: row["status"] for key, row in rows.items()} == {
        "att-gq-int8": "ok",
        "att-gq-smooth-0.5-int8-512-tokens": "refused",
    }
    assert "can be smoothed" in rows["att-gq-smooth-0.5-int8-512-tokens"]["error"]
    printed = capsys.readouterr().out
    assert "Att_GQ smooth 0.5 (int8) [att-gq-smooth-0.5-int8-512-tokens]: refused" in " ".join(printed.split())
    # Of one cell there is nothing to conclude.
    assert "\n\nWritten: " in printed
    assert "\n\n\n" not in printed


def test_cell_of_a_scope_that_the_model_lacks_is_refused(llama: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert llama.sweep("lacking", grid='[axes]\nscope = ["cross-attention", "attention"]\nprune = [0.3]\n') == 0
    rows = llama.rows("lacking")
    assert rows["att-gp-30"]["status"] == "ok"
    assert rows["crossatt-gp-30"]["status"] == "refused"
    assert "empty" in rows["crossatt-gp-30"]["error"]
    out = " ".join(capsys.readouterr().out.split())
    assert "CrossAtt_GP 30%: refused" in out
    assert "Not supported by this model: 1 of 2 cells; the study lists the reasons." in out
    assert "Repeat the command" not in out


def test_folder_of_another_study_is_refused(llama: Place, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize(
    ("options", "says", "code"),
    [
        (["--grid", "none.toml"], "no such grid", 2),
        (["--quantize", "int8"], "--quantize does not apply to the grid", 2),
        (["-p", "lama:nothing"], "lama:nothing", 2),
        (["--known", "produce"], "Did you mean produced?", 2),
        (["--templates", "3"], "has one wording per fact", 2),
        (["--num-cpus", "4"], "are for tasks on a Ray cluster", 2),
        (["--ray", "127.0.0.1:1"], "No Ray cluster answers at 127.0.0.1:1", 1),
        (["--ray", "auto", "--num-gpus", "1", "--device", "cpu"], "--num-gpus 1: the original runs on", 2),
    ],
)
def test_invalid_options_are_refused_and_leave_nothing(
    llama: Place, capsys: pytest.CaptureFixture[str], options: list[str], says: str, code: int
) -> None:
    assert llama.sweep("bad", *options) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert not (llama.folder / "bad").exists()


def test_task_without_generated_text_is_refused_for_produced(llama: Place, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    assert llama.sweep("bad", "-p", "lm-eval:piqa", "--known", "produced") == 2
    assert "The answers to lm-eval:piqa have no generated text" in capsys.readouterr().err
    assert not (llama.folder / "bad").exists()
    for verb in ("report", "compare"):
        again = [verb, str(llama.model), str(llama.model), "-p", "lm-eval:piqa", "--known", "produced"]
        assert main(again) == 2
        assert "The answers to lm-eval:piqa have no generated text" in capsys.readouterr().err


def test_unknown_definition_of_known_is_refused(llama: Place) -> None:
    with pytest.raises(UsageError, match="is not a definition of known"):
        compressknow.sweep(llama.model, llama.folder / "bad", probe=llama.probe, known="said")
    assert not (llama.folder / "bad").exists()


def text_of(place: Place) -> Path:
    text = place.folder / "facts.txt"
    text.write_text("\n".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS) + "\n", encoding="utf-8")
    return text


def test_text_probe_gives_each_cell_its_perplexity(llama: Place, tmp_path: Path) -> None:
    text = text_of(llama)
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
        # What is kept of the facts is as it is without the text.
        of_facts = rows[f"overall-gp-{amount}", "facts:facts.jsonl"]
        assert (of_facts["n"], of_facts["perplexity_compressed"]) == ("64", "")
    told = json.loads((study / "study.json").read_text())
    assert list(told["probes"]) == ["facts:facts.jsonl"]
    table = (study / "study.md").read_text(encoding="utf-8").split("## All cells")[1].splitlines()
    header, _, original, *cells = [line.split(" | ") for line in table if line.startswith("|")][:5]
    place = header.index("Perplexity, text:facts.txt")
    assert [float(row[place].partition(" ±")[0]) for row in (original, *cells)] == [
        pytest.approx(float(rows[key, "text:facts.txt"][f"perplexity_{side}"]), abs=0.01)
        for key, side in (
            ("overall-gp-30", "original"),
            ("overall-gp-30", "compressed"),
            ("overall-gp-90", "compressed"),
        )
    ]


def test_sweep_without_facts_is_refused(llama: Place, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_of(llama)
    assert main(["sweep", str(llama.model), "-o", str(llama.folder / "bad"), "-p", f"text:{text}"]) == 2
    assert "A sweep needs facts, and text:facts.txt is a text." in capsys.readouterr().err
    assert not (llama.folder / "bad").exists()


def test_text_is_refused_first_if_the_model_cannot_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place("bert", tmp_path)
    assert place.sweep("study", "-p", f"text:{text_of(place)}") != 0
    assert "Traceback" not in capsys.readouterr().err
    assert not list((tmp_path / "study").rglob("answers.parquet"))
