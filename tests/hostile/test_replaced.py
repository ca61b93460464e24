"""Checkpoints that are replaced while they are read: no result mixes two models."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.base.errors import CheckpointError, CompressknowError
from compressknow.evaluate.answers import TABLE
from tests.knowing import save_trained, write_facts
from tests.models import edit_config, save_tiny

_callbacks: list[Callable[[Path], None]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _callbacks and isinstance(arguments[0], (str, os.PathLike)):
        _callbacks[-1](Path(arguments[0]))


# An audit hook cannot be removed; without callbacks it does nothing.
sys.addaudithook(_hook)


@contextmanager
def replace_at(number: int, model: Path, other: Path, *names: str) -> Iterator[list[Path]]:
    """Replace `model` (or some of its files) by `other` when the file of this number is opened, counted from 0."""
    opened: list[Path] = []

    def callback(path: Path) -> None:
        if path.parent != model:
            return
        opened.append(path)
        if len(opened) == number + 1:
            for name in names or [path.name for path in other.iterdir()]:
                shutil.copyfile(other / name, model / f".{name}")
                (model / f".{name}").replace(model / name)

    _callbacks.append(callback)
    try:
        yield opened
    finally:
        _callbacks.remove(callback)


def save_variant(model: Path, other: Path) -> Path:
    """Write a model of the same shapes with other weights and another config."""
    shutil.copytree(model, other)
    weights = {name: torch.roll(weight, 1, 0) for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    edit_config(other, layer_norm_eps=0.5, rms_norm_eps=0.5)
    return other


@pytest.mark.parametrize("names", [(), ("model.safetensors",), ("config.json",)])
def test_convert_writes_one_of_both_models_or_nothing(tmp_path: Path, names: tuple[str, ...]) -> None:
    first = save_tiny("bert", tmp_path / "first")
    other = save_variant(first, tmp_path / "other")
    mixed = shutil.copytree(first, tmp_path / "mixed")
    for name in names or [path.name for path in other.iterdir()]:
        shutil.copyfile(other / name, mixed / name)

    def convert(source: Path, output: Path) -> dict[str, Any]:
        compressknow.convert(source, output, prune=0.3, quantize="int8", threads=1)
        manifest: dict[str, Any] = json.loads((output / "compressknow.json").read_text())
        return {key: manifest[key] for key in ("tensors", "files", "totals")} | {"of": manifest["source"]["files"]}

    expected = [convert(each, tmp_path / f"out-{each.name}") for each in (first, mixed)]
    model, outcomes, number = tmp_path / "model", set(), 0
    while True:
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(first, model)
        output = tmp_path / "outputs" / str(number)
        with replace_at(number, model, other, *names) as opened:
            try:
                outcome = expected.index(convert(model, output))
            except CheckpointError as error:
                assert "was replaced or changed" in error.what  # noqa: PT017
                outcome = -1
        if len(opened) <= number:
            break
        outcomes.add(outcome)
        assert output.exists() == (outcome >= 0)
        assert not (tmp_path / "outputs").exists() or not list((tmp_path / "outputs").glob(".*"))
        number += 1
    assert number > 5
    assert -1 in outcomes


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_trained("bert", folder / "first")
    save_variant(folder / "first", folder / "other")
    write_facts(folder / "facts.jsonl")
    return folder


def test_probe_stores_only_answers_of_the_hashed_model(models: Path, tmp_path: Path) -> None:
    facts, model = [f"facts:{models / 'facts.jsonl'}"], tmp_path / "model"
    settings = compressknow.Settings(noise_floor=False)
    expected = {}
    for name in ("first", "other"):
        answers = compressknow.probe(models / name, tmp_path / name, facts, settings=settings)
        expected[answers.record.model.sha256] = [answer.top5_logp for answer in answers.answers]
    refused = 0
    for number in range(0, 14, 2):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(models / "first", model)
        output = tmp_path / "answers" / str(number)
        with replace_at(number, model, models / "other"):
            try:
                answers = compressknow.probe(model, output, facts, settings=settings)
            except CompressknowError as error:
                assert "was replaced or changed" in str(error)  # noqa: PT017
                assert not output.exists()
                refused += 1
            else:
                assert expected[answers.record.model.sha256] == [answer.top5_logp for answer in answers.answers]
    assert refused


@pytest.mark.parametrize("how", ["another file", "in place"])
def test_report_stores_nothing_of_a_model_that_changes_during_the_run(models: Path, tmp_path: Path, how: str) -> None:
    model, weights = shutil.copytree(models / "first", tmp_path / "model"), models / "other" / "model.safetensors"

    def write(progress: Any) -> None:
        if progress.stage.work == "evaluate" and progress.stage.model == "model":
            if how == "in place":
                (model / "model.safetensors").write_bytes(weights.read_bytes())
            else:
                shutil.copyfile(weights, tmp_path / "new")
                (tmp_path / "new").replace(model / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced or changed while the model was read"):
        compressknow.report(
            models / "first",
            model,
            [f"facts:{models / 'facts.jsonl'}"],
            output=[tmp_path / "report.json"],
            settings=compressknow.Settings(noise_floor=False),
            answers=tmp_path / "kept",
            on_progress=write,
        )
    assert not (tmp_path / "report.json").exists()
    # Only the answers of the original are kept.
    assert len(list((tmp_path / "kept").rglob(TABLE))) == 1
