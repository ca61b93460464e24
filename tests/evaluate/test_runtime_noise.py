"""The noise floor of a runtime: an original in transformers and in llama.cpp, compared with a GGUF file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

import compressknow
from compressknow import Progress, Settings, report
from compressknow.evaluate.answers import read_answers
from compressknow.evaluate.records import NoiseFloor
from compressknow.gguf import export as exporting
from compressknow.gguf.context import GgufTokenizer
from compressknow.gguf.llama_cpp import GgufModel, load_native
from compressknow.model.manifest import seal_manifest
from compressknow.pages.parts import list_identity
from tests.engine.gguf_files import Q8_0, write_gguf
from tests.gguf.making import needs_converter, save_checkpoint, train_sentencepiece
from tests.knowing import save_trained, write_facts
from tests.long import long

pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")


RAN_IN = f"llama.cpp {load_native().build}"


class Files(NamedTuple):
    """A checkpoint that llama.cpp's converter takes, files of it in f32 and q8_0, and facts."""

    model: Path
    f32: Path
    q8: Path
    facts: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("root")
    model = save_checkpoint("llama", folder / "llama")
    files = [folder / f"{kind}.gguf" for kind in ("f32", "q8_0")]
    for file in files:
        compressknow.export(model, file, type=file.stem)
    return Files(model, *files, f"facts:{write_facts(folder / 'facts.jsonl')}")


def read_floors(folder: Path) -> dict[str, NoiseFloor]:
    """Read the runtime noise floors of the original, whose answers folder has no reference in its name."""
    (answers,) = (read_answers(path) for path in folder.iterdir() if "-" not in path.name)
    (entry,) = answers.record.probes.values()
    return dict(entry.runtime_noise_floors)


def rename_build(folder: Path, build: str) -> None:
    """Give answers, or what was measured for them, another build of llama.cpp."""
    path = folder / "probe.json"
    record = json.loads(path.read_text(encoding="utf-8").replace(load_native().build, build))
    path.write_text(json.dumps(seal_manifest(record)), encoding="utf-8")


@long
@needs_converter
def test_runtime_noise_floor_is_that_of_a_run_of_the_unquantized_file(files: Files, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    outputs = [tmp_path / f"card.{kind}" for kind in ("json", "md", "html")]
    card = report(files.model, files.q8, files.facts, output=outputs, answers=kept)
    (floor,) = read_floors(kept).values()
    (alone,) = report(files.model, files.f32, files.facts, answers=kept).comparisons[0].probes
    counts = alone.counts
    # The checkpoint does not say which token begins a text, so that both read different prompts and much changes.
    assert (floor.n, floor.changed) == (counts.n, round((alone.answer_changed or 0) * counts.n)) != (64, 0)
    assert (floor.known, floor.lost, floor.gained) == (counts.known_before, counts.lost, counts.gained)
    assert alone.movement is not None
    assert floor.kl_mean == pytest.approx(alone.movement.kl_mean, rel=1e-3)
    assert floor.computed_in == RAN_IN
    # The unquantized file is removed.
    assert not [path for path in tmp_path.rglob("*") if ".in-llama-cpp" in str(path)]
    (figures,) = json.loads(outputs[0].read_text(encoding="utf-8"))["compressed"][0]["probes"].values()
    assert figures["runtime_noise_floor"]["changed"] == floor.changed
    assert figures["runtime_noise_floor"]["computed_in"] == RAN_IN
    for page in outputs[1:]:
        assert "Top answer changed by the runtime alone" in page.read_text(encoding="utf-8")
    assert f"the original answers {floor.changed} of 64 facts differently" in get_warnings(card)
    (alone,) = report(files.model, files.f32, files.facts, answers=kept, known="produced").comparisons[0].probes
    assert floor.produced is not None
    assert (floor.produced.known, floor.produced.lost) == (alone.counts.known_before, alone.counts.lost)
    card = report(files.model, files.q8, files.facts, answers=kept, known="produced")
    assert f"the original answers {floor.produced.changed} of 64 facts differently" in get_warnings(card)


@needs_converter
@pytest.mark.parametrize(("kind", "differs"), [("bpe", False), ("unigram", True)])
def test_prompts_that_llama_cpp_splits_differently_are_a_warning(
    files: Files, tmp_path: Path, kind: str, differs: bool
) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    (source / "tokenizer.model").write_bytes(train_sentencepiece(kind, byte_fallback=True))
    # Neither adds a token before a text.
    (source / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    compressknow.export(source, file := tmp_path / "out.gguf")
    output = tmp_path / "card.json"
    card = report(source, file, files.facts, output=output, answers=tmp_path / "kept")
    (figures,) = json.loads(output.read_text(encoding="utf-8"))["compressed"][0]["probes"].values()
    tokenizer, gguf_tokenizer = AutoTokenizer.from_pretrained(source), GgufTokenizer(GgufModel(file))
    facts = Path(files.facts.removeprefix("facts:")).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"].partition("[MASK]")[0].rstrip() for line in facts]
    different = sum(tokenizer(text)["input_ids"] != gguf_tokenizer(text)["input_ids"] for text in prompts)
    assert bool(different) == differs
    assert figures["runtime_noise_floor"]["read_otherwise"] == different
    assert "read_otherwise" not in figures["noise_floor"]
    produced = report(source, file, files.facts, answers=tmp_path / "kept", known="produced")
    for each in (card, produced):
        assert (f"{different} are split into other tokens there" in get_warnings(each)) == differs
    assert ("the runtime alone, which splits text into other tokens, changes" in card.verdict) == differs


def get_warnings(card: compressknow.Card) -> str:
    return "\n".join([*card.warnings, *card.comparisons[0].warnings])


@needs_converter
def test_a_file_given_as_the_original_of_its_source_is_a_warning(files: Files, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(files.model, renamed)
    for model in (files.model, renamed):
        card = report(files.q8, model, files.facts, answers=tmp_path / "kept")
        (warning,) = [each for each in get_warnings(card).splitlines() if "look swapped" in each]
        assert f"q8_0.gguf, given as the original, was made from {model.name}" in warning
        assert "look swapped" not in get_warnings(report(model, files.q8, files.facts, answers=tmp_path / "kept"))
    assert ("Made from", "llama") in [(entry.label, entry.value) for entry in list_identity(card.original)]


@needs_converter
def test_runtime_noise_floor_is_stored_with_the_answers_and_has_its_own_stages(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Progress] = []
    card = report(files.model, files.q8, files.facts, answers=tmp_path, on_progress=events.append)
    stages = [(progress.stage.work, progress.stage.model) for progress in events if progress.state == "begins"]
    assert stages == [
        *((work, "llama") for work in ("evaluate", "noise", "export", "runtime")),
        ("evaluate", "q8_0.gguf"),
    ]
    stored = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
    first, second = sorted(stored, key=lambda folder: len(folder.name))
    # As if another build had measured it; each has its own.
    rename_build(first, "b1")
    report(files.model, second, files.facts, answers=tmp_path)
    assert read_floors(tmp_path).keys() == {"llama.cpp b1", RAN_IN}
    monkeypatch.setattr(exporting, "write_floats", pytest.fail)
    again = report(files.model, files.q8, files.facts, answers=tmp_path)
    assert again.comparisons[0].probes[0].runtime_noise_floor == card.comparisons[0].probes[0].runtime_noise_floor
    # A report on the stored answers has it too.
    assert report(first, second).comparisons[0].probes[0].runtime_noise_floor is not None
    rename_build(second, "b2")
    other = report(first, second)
    assert other.comparisons[0].probes[0].runtime_noise_floor is None
    assert "How much was not measured: that needs checkpoints" in get_warnings(other)


@needs_converter
def test_a_stopped_run_leaves_no_file(files: Files, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage.work == "runtime":
            assert list(tmp_path.rglob("floats.gguf"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(files.model, files.q8, files.facts, answers=tmp_path, on_progress=stop)
    assert not list(tmp_path.rglob("*.gguf"))
    assert not read_floors(tmp_path)


@needs_converter
def test_compare_has_the_runtime_noise_floor_too(files: Files, tmp_path: Path) -> None:
    comparison = compressknow.compare(files.model, files.q8, files.facts, answers=tmp_path / "kept")
    assert comparison.behaviour is not None
    floor = comparison.behaviour.b_against_a.comparisons[0].probes[0].runtime_noise_floor
    assert floor is not None
    assert floor.n == 64
    assert any("from an unquantized file" in text for text in comparison.warnings)
    # Two files have the same runtime.
    files = compressknow.compare(files.f32, files.q8, files.facts, answers=tmp_path / "kept")
    assert not any("runtime" in text for text in files.warnings)


@pytest.fixture
def unsupported(tmp_path: Path) -> Files:
    """A checkpoint whose tokenizer the converter does not support, and a file of it with other tokens."""
    model = save_trained("llama", tmp_path / "llama")
    file = write_gguf(model, tmp_path / "q8.gguf", Q8_0)
    return Files(model, file, file, f"facts:{write_facts(tmp_path / 'facts.jsonl')}")


@needs_converter
def test_a_model_that_the_converter_does_not_support_is_a_warning(unsupported: Files, tmp_path: Path) -> None:
    text = get_warnings(report(unsupported.model, unsupported.q8, unsupported.facts, answers=tmp_path / "kept"))
    assert "How much was not measured: llama.cpp's converter failed. Give an f16 GGUF file as the original." in text
    assert not list((tmp_path / "kept").rglob("*.gguf"))


def test_without_a_converter_the_card_says_how_to_get_it(
    unsupported: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPRESSKNOW_CONVERTER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = report(unsupported.model, unsupported.q8, unsupported.facts, answers=tmp_path / "kept")
    warning = "How much was not measured: llama.cpp's converter is not installed. `compressknow export` fetches it;"
    assert warning in get_warnings(card)
    assert card.comparisons[0].probes[0].noise_floor is not None
    assert "the runtime" not in card.verdict
    monkeypatch.setenv("COMPRESSKNOW_CONVERTER", str(tmp_path / "none"))
    card = report(unsupported.model, unsupported.q8, unsupported.facts, answers=tmp_path / "kept")
    assert "leave COMPRESSKNOW_CONVERTER out to fetch it; or give an f16 GGUF file" in get_warnings(card)


def test_runtime_noise_floor_can_be_left_out(
    unsupported: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "prepare_export", pytest.fail)
    off = Settings(noise_floor=False)
    card = report(unsupported.model, unsupported.q8, unsupported.facts, settings=off, answers=tmp_path / "kept")
    assert "How much was not measured: --no-noise-floor leaves it out." in get_warnings(card)
    early = report(
        unsupported.model, unsupported.q8, unsupported.facts, fail_under=0.1, early=True, answers=tmp_path / "early"
    )
    assert "How much was not measured: --early leaves it out." in get_warnings(early)
