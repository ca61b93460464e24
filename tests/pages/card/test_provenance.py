"""Provenance on a report card: models made from another original, or changed since their conversion."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.cli import main
from compressknow.engine.identity import describe, locate, read_contents
from compressknow.pages.card.make import make_card
from compressknow.pages.card.pages import render_markdown
from tests.engine.gguf_files import F32, write_gguf
from tests.knowing import save_trained, write_facts
from tests.models import edit_tensors
from tests.pages.answering import ORIGINAL_HASH, make_answers, make_model, make_rows, make_runs

CHANGED = "changed since it was converted: run `compressknow verify`"
NOT_MADE_FROM = "was not made from"
Report = Callable[[Path, Path], dict[str, Any]]
SETTINGS = compressknow.Settings(noise_floor=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Llamas of one architecture, `first` and `second`, and a conversion of the first."""
    folder = tmp_path_factory.mktemp("provenance")
    write_facts(folder / "facts.jsonl")
    save_trained("llama", folder / "first")
    shutil.copytree(folder / "first", folder / "second")
    weights = load_file(folder / "second" / "model.safetensors")
    save_file({n: w * 1.01 for n, w in weights.items()}, folder / "second" / "model.safetensors", {"format": "pt"})
    compressknow.convert(folder / "first", folder / "converted", scope="attention", prune=0.1, quantize="int8")
    return folder


@pytest.fixture
def converted(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder / "converted", tmp_path / "converted")


@pytest.fixture
def report(folder: Path) -> Report:
    """A function that returns the report on an original and a compressed model as JSON."""

    def report(original: Path, compressed: Path) -> dict[str, Any]:
        facts = f"facts:{folder / 'facts.jsonl'}"
        card = compressknow.report(original, compressed, facts, settings=SETTINGS, answers=folder / "answers")
        values: dict[str, Any] = json.loads(json.dumps(card.to_dict()))
        return values

    return report


def test_no_warning_if_the_model_was_made_from_the_original(folder: Path, report: Report) -> None:
    (comparison,) = report(folder / "first", folder / "converted")["compressed"]
    assert comparison["source_matches"] is True
    assert comparison["model"]["changed"] is None
    assert not [warning for warning in comparison["warnings"] if NOT_MADE_FROM in warning or CHANGED in warning]


def test_warning_if_the_model_was_made_from_another_original(folder: Path, tmp_path: Path, report: Report) -> None:
    (comparison,) = report(folder / "second", folder / "converted")["compressed"]
    assert comparison["source_matches"] is False
    warning = "converted was not made from second: its record names first (fingerprint "
    assert comparison["warnings"][0].startswith(warning)
    facts = f"facts:{folder / 'facts.jsonl'}"
    compressknow.probe(folder / "second", tmp_path / "answers", facts, settings=SETTINGS)
    (comparison,) = report(tmp_path / "answers", folder / "converted")["compressed"]
    assert comparison["source_matches"] is False


def test_changed_manifest_overrides_stored_answers(folder: Path, converted: Path, report: Report) -> None:
    report(folder / "first", converted)
    path = converted / "compressknow.json"
    manifest = json.loads(path.read_text())
    manifest["source"]["files"]["model.safetensors"] = "0" * 64
    path.write_text(json.dumps(manifest))
    (comparison,) = report(folder / "first", converted)["compressed"]
    assert comparison["source_matches"] is False
    assert NOT_MADE_FROM in comparison["warnings"][0]
    assert CHANGED in comparison["warnings"][1]


def remove_quantization(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def change_bits(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_bits": 8', '"num_bits": 4'))


SCALE = "model.layers.0.self_attn.q_proj.weight_scale"


@pytest.mark.parametrize(
    "change",
    [
        remove_quantization,
        change_bits,
        lambda folder: edit_tensors(folder, lambda tensors: tensors[SCALE].mul_(100)),
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update(more=torch.ones(2))),
        lambda folder: edit_tensors(folder, lambda tensors: tensors.update({SCALE: tensors[SCALE].half()})),
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        lambda folder: (folder / "vocab.txt").write_text("a"),
    ],
    ids=["no quantization", "other bits", "other scale", "new tensor", "other dtype", "missing file", "new file"],
)
def test_change_since_the_conversion_is_detected_on_reading(converted: Path, change: Callable[[Path], object]) -> None:
    assert not read_contents(locate(converted)).changed
    change(converted)
    assert read_contents(locate(converted)).changed


def test_probe_and_report_warn_first_of_a_changed_folder(
    folder: Path,
    converted: Path,
    tmp_path: Path,
    report: Report,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_tensors(converted, lambda tensors: tensors[SCALE].mul_(100))
    (comparison,) = report(folder / "first", converted)["compressed"]
    assert comparison["model"]["changed"] is True
    assert CHANGED in comparison["warnings"][0]
    words = ["probe", str(converted), "-o", str(tmp_path / "answers"), "-p", f"facts:{folder / 'facts.jsonl'}"]
    assert main(words) == 0
    assert "Warning: converted changed since it was converted" in capsys.readouterr().out
    stored = json.loads((tmp_path / "answers" / "probe.json").read_text())
    assert stored["model"]["changed"] is True


def test_gguf_file_is_compared_with_its_record(folder: Path, tmp_path: Path) -> None:
    file = write_gguf(folder / "first", tmp_path / "model.gguf", F32)
    record = tmp_path / "model.gguf.json"
    source = {"name": "first", "sha256": "1" * 64}
    assert not read_contents(locate(file)).changed
    record.write_text(json.dumps({"sha256": "0" * 64, "source": source}))
    assert read_contents(locate(file)).changed
    assert describe(locate(file))["source"] == source
    record.write_text("[]")
    assert not read_contents(locate(file)).changed


def test_export_of_a_conversion_matches_the_original() -> None:
    original, compressed = make_runs(make_rows(20))
    for source, matches in (
        ({"sha256": ORIGINAL_HASH}, True),
        ({"sha256": "c" * 64, "original_sha256": ORIGINAL_HASH}, True),
        ({"sha256": "c" * 64, "original_sha256": "d" * 64}, False),
        ({"sha256": "c" * 64}, False),
        ({"name": "tiny-bert"}, None),
        (None, None),
    ):
        converted = make_answers(compressed.answers, make_model(sha256="e" * 64, source=source))
        assert make_card(original, [converted]).comparisons[0].source_matches is matches


def test_warning_if_the_original_is_itself_compressed(folder: Path, tmp_path: Path, report: Report) -> None:
    compressknow.convert(folder / "first", tmp_path / "int4", scope="attention", quantize="int4")
    (comparison,) = report(folder / "converted", tmp_path / "int4")["compressed"]
    assert comparison["source_matches"] is False
    assert comparison["warnings"][0] == (
        "converted, given as the original, is itself compressed: Att_GPQ 10%, made from first. What it lost by that is "
        "not counted here; to count it, give the model that it was made from as the original."
    )
    assert not [warning for warning in comparison["warnings"] if NOT_MADE_FROM in warning]
    # Nor does a second step count what the first one lost.
    compressknow.convert(folder / "first", tmp_path / "pruned", scope="attention", prune=0.1)
    compressknow.convert(tmp_path / "pruned", tmp_path / "small", scope="attention", quantize="int8")
    (comparison,) = report(tmp_path / "pruned", tmp_path / "small")["compressed"]
    assert comparison["source_matches"] is True
    assert comparison["warnings"][0].startswith("pruned, given as the original, is itself compressed: Att_GP 10%, made")


@pytest.mark.parametrize(
    ("kind", "source", "made_from"),
    [
        ("F16", {}, None),
        ("Q8_0", {}, "GGUF Q8_0, made from m."),
        ("F16", {"original_sha256": "f" * 64}, "GGUF F16, made from m, a converted checkpoint."),
    ],
)
def test_original_in_gguf_is_compressed_unless_it_has_the_floats_of_the_checkpoint(
    kind: str, source: dict[str, str], made_from: str | None
) -> None:
    original, compressed = make_runs(make_rows(20))
    source = {"name": "m", "sha256": "c" * 64, **source}
    runtime = {"name": "llama.cpp", "types": {"attention": {kind: 6}, "not-linear": {"F32": 1}}}
    exports = [
        make_answers(
            side.answers,
            make_model(
                name=f"{number}.gguf", sha256=number * 64, source=source, quantization=f"GGUF {kind}", runtime=runtime
            ),
        )
        for number, side in zip("de", (original, compressed), strict=True)
    ]
    (comparison,) = make_card(exports[0], exports[1:]).comparisons
    assert comparison.source_matches is False
    assert not [warning for warning in comparison.warnings if NOT_MADE_FROM in warning]
    warned = [warning for warning in comparison.warnings if "is itself compressed" in warning]
    assert len(warned) == (made_from is not None)
    assert all(f"d.gguf, given as the original, is itself compressed: {made_from} " in warning for warning in warned)


def test_record_that_names_neither_the_source_nor_what_was_done_is_not_quoted() -> None:
    original, compressed = make_runs(
        make_rows(40, 60), source={"original_sha256": "d" * 64}, groups={"attention": {"parameters": 100, "pruned": 50}}
    )
    unnamed = replace(compressed, record=replace(compressed.record, model=replace(compressed.record.model, setup=None)))
    card = make_card(original, [unnamed])
    first, *_ = card.comparisons[0].warnings
    assert "its record names another model, but the original's fingerprint is aaaaaaaaaaaa…. " in first
    assert "the step from another model, which this model was made from, not from" in render_markdown(card)
    further = make_answers(original.answers, make_model(sha256="e" * 64))
    first, *_ = make_card(unnamed, [further]).comparisons[0].warnings
    assert "is itself compressed: made from another model, a converted checkpoint. What" in first


@pytest.mark.parametrize("made_from_it", [True, False])
def test_last_step_of_several_is_not_taken_for_all_that_was_done(made_from_it: bool) -> None:
    source = {"name": "pruned", "sha256": ORIGINAL_HASH if made_from_it else "c" * 64}
    recipe, groups = {"steps": [{"quantize": "int8"}]}, {"attention": {"parameters": 100, "relative_error": 0.01}}
    original, compressed = make_runs(make_rows(40, 60), source=source, recipe=recipe, groups=groups)
    card = make_card(original, [compressed])
    assert ("int8-weights instead of int8" in card.comparisons[0].next) is made_from_it
    assert card.comparisons[0].next.startswith("Next: ")
    noted = "step from pruned, which this model was made from, not from the original." in render_markdown(card)
    assert noted is not made_from_it


def test_model_with_nan_is_not_to_be_deployed() -> None:
    original, compressed = make_runs(make_rows(240))
    assert "deploy it" in make_card(original, [compressed]).comparisons[0].next
    first, *others = compressed.answers
    broken = replace(compressed, answers=(replace(first, logp_gold=math.nan), *others))
    for pair in ((original, broken), (broken, original)):
        advice = make_card(pair[0], [pair[1]]).comparisons[0].next
        assert advice.startswith("Next: find an intact copy")
