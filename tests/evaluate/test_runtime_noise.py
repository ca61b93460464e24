"""The noise floor of a runtime: an original in transformers and in llama.cpp, beside a GGUF file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoTokenizer

import compressknow
from compressknow import Progress, Settings, report
from compressknow.evaluate.answers import Answers, read_answers
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


class Place(NamedTuple):
    """A checkpoint that llama.cpp's converter takes, files of it in f32 and q8_0, and facts."""

    model: Path
    f32: Path
    q8: Path
    facts: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    model = save_checkpoint("llama", folder / "llama")
    files = [folder / f"{kind}.gguf" for kind in ("f32", "q8_0")]
    for file in files:
        compressknow.export(model, file, type=file.stem)
    return Place(model, *files, f"facts:{write_facts(folder / 'facts.jsonl')}")


def original_in(folder: Path) -> Answers:
    """The answers of the original, which no other model's tokens are in the folder's name of."""
    (own,) = (read_answers(each) for each in folder.iterdir() if "-" not in each.name)
    return own


def floors_in(folder: Path) -> dict[str, NoiseFloor]:
    (entry,) = original_in(folder).record.probes.values()
    return dict(entry.runtime_noise_floors)


@long
@needs_converter
def test_it_counts_what_differs_from_a_run_of_the_unquantized_file(place: Place, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    outputs = [tmp_path / f"card.{kind}" for kind in ("json", "md", "html")]
    card = report(place.model, place.q8, place.facts, output=outputs, answers=kept)
    (floor,) = floors_in(kept).values()
    (alone,) = report(place.model, place.f32, place.facts, answers=kept).comparisons[0].probes
    counts = alone.counts
    # The checkpoint does not say which token begins a text, so that the two read other prompts: much changes.
    assert (floor.n, floor.changed) == (counts.n, round((alone.answer_changed or 0) * counts.n)) != (64, 0)
    assert (floor.known, floor.lost, floor.gained) == (counts.known_before, counts.lost, counts.gained)
    assert alone.movement is not None
    assert floor.kl_mean == pytest.approx(alone.movement.kl_mean, rel=1e-3)
    assert floor.computed_in == RAN_IN
    # The file is gone.
    assert not [path for path in tmp_path.rglob("*") if ".in-llama-cpp" in str(path)]
    (figures,) = json.loads(outputs[0].read_text(encoding="utf-8"))["compressed"][0]["probes"].values()
    assert figures["runtime_noise_floor"]["changed"] == floor.changed
    assert figures["runtime_noise_floor"]["computed_in"] == RAN_IN
    for page in outputs[1:]:
        assert "Top answer changed by the runtime alone" in page.read_text(encoding="utf-8")
    assert f"the original answers {floor.changed} of 64 facts differently" in " ".join(said(card))
    (alone,) = report(place.model, place.f32, place.facts, answers=kept, known="produced").comparisons[0].probes
    assert floor.produced is not None
    assert (floor.produced.known, floor.produced.lost) == (alone.counts.known_before, alone.counts.lost)
    card = report(place.model, place.q8, place.facts, answers=kept, known="produced")
    assert f"the original answers {floor.produced.changed} of 64 facts differently" in " ".join(said(card))


@needs_converter
@pytest.mark.parametrize(("kind", "is_told"), [("bpe", False), ("unigram", True)])
def test_a_vocabulary_that_llama_cpp_splits_prompts_otherwise_by_is_told(
    place: Place, tmp_path: Path, kind: str, is_told: bool
) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    (source / "tokenizer.model").write_bytes(train_sentencepiece(kind, byte_fallback=True))
    # Nothing is put before a text, by either.
    (source / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    compressknow.export(source, file := tmp_path / "out.gguf")
    output = tmp_path / "card.json"
    card = report(source, file, place.facts, output=output)
    (figures,) = json.loads(output.read_text(encoding="utf-8"))["compressed"][0]["probes"].values()
    own, there = AutoTokenizer.from_pretrained(source), GgufTokenizer(GgufModel(file))
    facts = Path(place.facts.removeprefix("facts:")).read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"].partition("[MASK]")[0].rstrip() for line in facts]
    otherwise = sum(own(text)["input_ids"] != there(text)["input_ids"] for text in prompts)
    assert bool(otherwise) == is_told
    assert figures["runtime_noise_floor"]["read_otherwise"] == otherwise
    assert "read_otherwise" not in figures["noise_floor"]
    assert (f"{otherwise} are split into other tokens there" in " ".join(said(card))) == is_told
    assert ("the runtime alone, which splits text into other tokens, changes" in card.verdict) == is_told


def said(card: compressknow.Card) -> list[str]:
    return [*card.warnings, *card.comparisons[0].warnings]


@needs_converter
def test_a_file_given_as_the_original_of_its_source_is_told(place: Place, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(place.model, renamed)
    for model in (place.model, renamed):
        card = report(place.q8, model, place.facts, answers=tmp_path / "kept")
        (warning,) = [each for each in said(card) if "look swapped" in each]
        assert f"q8_0.gguf, given as the original, was made from {model.name}" in warning
        assert "look swapped" not in " ".join(said(report(model, place.q8, place.facts, answers=tmp_path / "kept")))
    assert ("Made from", "llama") in [(entry.label, entry.value) for entry in list_identity(card.original)]


@needs_converter
def test_it_is_kept_with_the_answers_and_has_stages_of_its_own(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Progress] = []
    card = report(place.model, place.q8, place.facts, answers=tmp_path, on_progress=told.append)
    begun = [(progress.stage.work, progress.stage.model) for progress in told if progress.state == "begins"]
    assert begun == [
        *((work, "llama") for work in ("evaluate", "noise", "export", "runtime")),
        ("evaluate", "q8_0.gguf"),
    ]
    monkeypatch.setattr(exporting, "write_floats", pytest.fail)
    again = report(place.model, place.q8, place.facts, answers=tmp_path)
    assert again.comparisons[0].probes[0].runtime_noise_floor == card.comparisons[0].probes[0].runtime_noise_floor
    # It is of this build alone, and of answers too.
    stored = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
    first, second = sorted(stored, key=lambda folder: len(folder.name))
    assert report(first, second).comparisons[0].probes[0].runtime_noise_floor is not None
    path = second / "probe.json"
    record = json.loads(path.read_text(encoding="utf-8").replace(load_native().build, "b1"))
    # As of another build.
    path.write_text(json.dumps(seal_manifest(record)), encoding="utf-8")
    other = report(first, second)
    assert other.comparisons[0].probes[0].runtime_noise_floor is None
    assert "How much was not measured: that needs checkpoints" in " ".join(said(other))


@needs_converter
def test_a_run_that_is_stopped_leaves_no_file(place: Place, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage.work == "runtime":
            assert list(tmp_path.rglob("floats.gguf"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(place.model, place.q8, place.facts, answers=tmp_path, on_progress=stop)
    assert not list(tmp_path.rglob("*.gguf"))
    assert not floors_in(tmp_path)


@needs_converter
def test_compare_says_it_too(place: Place, tmp_path: Path) -> None:
    comparison = compressknow.compare(place.model, place.q8, place.facts, answers=tmp_path / "kept")
    assert comparison.behaviour is not None
    floor = comparison.behaviour.b_against_a.comparisons[0].probes[0].runtime_noise_floor
    assert floor is not None
    assert floor.n == 64
    assert any("from an unquantized file" in text for text in comparison.warnings)
    # There is no other runtime in a pair of files.
    files = compressknow.compare(place.f32, place.q8, place.facts, answers=tmp_path / "kept")
    assert not any("runtime" in text for text in files.warnings)


@pytest.fixture
def untaken(tmp_path: Path) -> Place:
    """A checkpoint whose tokenizer no converter knows, and a file of it with other tokens."""
    model = save_trained("llama", tmp_path / "llama")
    file = write_gguf(model, tmp_path / "q8.gguf", Q8_0)
    return Place(model, file, file, f"facts:{write_facts(tmp_path / 'facts.jsonl')}")


@needs_converter
def test_a_model_that_the_converter_does_not_take_is_said(untaken: Place, tmp_path: Path) -> None:
    text = " ".join(said(report(untaken.model, untaken.q8, untaken.facts, answers=tmp_path / "kept")))
    assert "How much was not measured: llama.cpp's converter failed. Give an f16 GGUF file as the original." in text
    assert not list((tmp_path / "kept").rglob("*.gguf"))


def test_without_a_converter_the_card_says_how_to_have_it(
    untaken: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COMPRESSKNOW_CONVERTER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = report(untaken.model, untaken.q8, untaken.facts, answers=tmp_path / "kept")
    wanted = "How much was not measured: llama.cpp's converter is not installed. `compressknow export` fetches it;"
    assert wanted in " ".join(said(card))
    assert card.comparisons[0].probes[0].noise_floor is not None
    assert "the runtime" not in card.verdict


def test_it_can_be_left_out_and_early_has_none(untaken: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "prepare_export", pytest.fail)
    off = Settings(noise_floor=False)
    card = report(untaken.model, untaken.q8, untaken.facts, settings=off, answers=tmp_path / "kept")
    assert "How much was not measured: --no-noise-floor leaves it out." in " ".join(said(card))
    early = report(untaken.model, untaken.q8, untaken.facts, fail_under=0.1, early=True, answers=tmp_path / "early")
    assert "How much was not measured: --early leaves it out." in " ".join(said(early))
