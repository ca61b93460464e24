"""Records, manifests and links in folders are checked when they are read."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import compressknow
from compressknow.base.errors import CheckpointError, CompressknowError
from compressknow.base.reading import compute_sha256, find_mismatch
from compressknow.cli import main
from compressknow.evaluate.answers import RECORD, TABLE, read_answers, write_record
from compressknow.evaluate.records import Record
from tests.hostile.bounded import bounded, run_refused
from tests.knowing import save_trained, write_facts
from tests.models import save_tiny

JUNK = (None, True, -1, 1.5, 1e400, float("nan"), "", "x", [], [None], {}, {"x": {}}, 10**30)


@pytest.fixture(scope="module")
def original_answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an answers folder with probe."""
    folder = tmp_path_factory.mktemp("answers")
    compressknow.probe(
        save_trained("bert", folder / "model"), folder / "a", [f"facts:{write_facts(folder / 'f.jsonl')}"]
    )
    return folder / "a"


@pytest.fixture
def answers(original_answers: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "answers"
    folder.mkdir()
    for name in (TABLE, RECORD):
        (folder / name).write_bytes((original_answers / name).read_bytes())
    return folder


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    source = save_tiny("bert", tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    compressknow.convert(source, tmp_path / "out", prune=0.3, quantize="int8")
    return tmp_path / "out"


def make_mutants(value: Any, seed: int, number: int) -> list[Any]:
    """Return copies of a JSON value with one entry, at any depth, replaced by junk or removed."""
    rng, mutants = random.Random(seed), []
    for _ in range(number):
        mutant = copy.deepcopy(value)
        inner, key = mutant, None
        while isinstance(inner, (dict, list)) and inner and (key is None or rng.random() < 0.8):
            container, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = container[key]
        if rng.random() < 0.2:
            del container[key]
        else:
            container[key] = rng.choice(JUNK)
        mutants.append(mutant)
    return mutants


def test_changed_answers_are_refused(answers: Path) -> None:
    assert json.loads((answers / RECORD).read_text())["answers_sha256"] == compute_sha256(answers / TABLE)
    table = pq.read_table(answers / TABLE)
    flipped = pa.array([not right for right in table["correct"].to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("correct"), "correct", flipped), answers / TABLE)
    with pytest.raises(CompressknowError, match="its hash differs"):
        read_answers(answers)


def test_answers_of_a_killed_run_are_refused_until_it_is_repeated(original_answers: Path, answers: Path) -> None:
    record = json.loads((answers / RECORD).read_text())
    del record["answers_sha256"]
    write_record(answers, Record.from_dict(record))
    with pytest.raises(CompressknowError, match="a run was killed while it wrote them"):
        read_answers(answers)
    folder = original_answers.parent
    compressknow.probe(folder / "model", answers, [f"facts:{folder / 'f.jsonl'}"])
    assert read_answers(answers).answers


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("probes", "facts:f.jsonl", "protocol"), "closed/0"),
        (("probes", "facts:f.jsonl", "facts"), 1_000),
        (("probes", "facts:f.jsonl", "fingerprint"), "0" * 64),
        (("model", "sha256"), "0" * 64),
        (("model", "bytes"), 1),
        (("versions", "torch"), "0"),
        (("mine",), True),
    ],
)
def test_edited_record_is_refused(
    answers: Path, path: tuple[str, ...], value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((answers / RECORD).read_text())
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    assert inner.get(path[-1]) != value
    inner[path[-1]] = value
    (answers / RECORD).write_text(json.dumps(record))
    assert "probe.json was edited: its sha256 does not match" in run_refused(capsys, "report", answers, answers)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_record_is_read_or_refused_with_one_message(
    answers: Path, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((answers / RECORD).read_text())
    for number, mutant in enumerate(make_mutants(record, seed, 12)):
        (answers / RECORD).write_text(json.dumps(mutant))
        capsys.readouterr()
        with bounded():
            code = main(["report", str(answers), str(answers), "-o", str(tmp_path / f"{number}.md")])
        errors = capsys.readouterr().err
        assert code in (0, 1), (mutant, errors)
        assert "bug in compressknow" not in errors, (mutant, errors)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_manifest_does_not_verify(converted: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    path = converted / "compressknow.json"
    manifest = json.loads(path.read_text())
    for mutant in make_mutants(manifest, seed, 25):
        path.write_text(json.dumps(mutant))
        capsys.readouterr()
        code = main(["verify", str(converted)])
        printed = capsys.readouterr()
        assert "bug in compressknow" not in printed.err, (mutant, printed.err)
        assert code == 1 or "sha256" not in mutant or mutant == manifest


def test_manifest_with_too_many_blocks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny("bert", tmp_path / "in")
    compressknow.convert(source, tmp_path / "out", drop_blocks="1")
    path = tmp_path / "out" / "compressknow.json"
    manifest = json.loads(path.read_text())
    manifest["removed"]["blocks"][0]["before"] = 10**12
    path.write_text(json.dumps(manifest))
    errors = run_refused(capsys, "compare", source, tmp_path / "out")
    assert "removed.blocks[0].before is not a number of blocks" in errors


@pytest.mark.parametrize("key", ["recipe", "source", "versions", "setup", "untied"])
def test_edited_manifest_does_not_verify(converted: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = converted / "compressknow.json"
    manifest = json.loads(path.read_text())
    edits = {"versions": {"torch": "0"}, "setup": "x", "untied": [1], "recipe": {"steps": []}}
    manifest[key] = edits.get(key, {**manifest["source"], "name": "another"})
    path.write_text(json.dumps(manifest))
    assert main(["verify", str(converted)]) == 1
    assert "compressknow.json: it was edited" in capsys.readouterr().err


def test_manifest_without_a_hash_is_reported(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = converted / "compressknow.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert main(["verify", str(converted)]) == 0
    assert "has no hash of itself" in capsys.readouterr().out


def test_verify_names_an_added_file(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("README.md", ".gitattributes"):
        (converted / name).write_text("mine")
    assert main(["verify", str(converted)]) == 0
    (converted / "modeling_bert.py").write_text("print(1)")
    assert main(["verify", str(converted)]) == 1
    errors = capsys.readouterr().err
    assert "differs from its manifest in 1 place." in errors
    assert "modeling_bert.py: not in the manifest" in errors


def test_convert_copies_nothing_from_outside_the_checkpoint_and_leaves_out_no_broken_link(tmp_path: Path) -> None:
    source = save_tiny("bert", tmp_path / "in")
    (tmp_path / "in-2").write_text("mine")
    (source / "notes.txt").symlink_to(tmp_path / "in-2")
    with pytest.raises(CheckpointError, match=r"notes.txt is a link to .*in-2, outside the checkpoint: not copied"):
        compressknow.convert(source, tmp_path / "out", prune=0.3)
    assert not (tmp_path / "out").exists()
    (source / "notes.txt").unlink()
    (source / "notes.txt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"notes.txt is a link that leads nowhere"):
        compressknow.convert(source, tmp_path / "out", prune=0.3)
    (source / "notes.txt").unlink()
    (source / "licence").write_text("free")
    (source / "LICENSE").symlink_to("licence")
    compressknow.convert(source, tmp_path / "out", prune=0.3)
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"


def test_export_reads_nothing_from_outside_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")
    source, script = save_tiny("llama", tmp_path / "in"), tmp_path / "convert_hf_to_gguf.py"
    script.touch()
    (tmp_path / "secret").write_text("mine")
    (source / "chat_template.jinja").symlink_to(tmp_path / "secret")
    errors = run_refused(capsys, "export", source, tmp_path / "out.gguf", "--converter", script)
    assert "chat_template.jinja is a link to " in errors


def test_links_to_blobs_of_the_hub_cache_are_copied(tmp_path: Path) -> None:
    saved = save_tiny("bert", tmp_path / "saved")
    (saved / "tokenizer.json").write_text("{}")
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in saved.iterdir():
        path.rename(repository / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    compressknow.convert(snapshot, tmp_path / "out", prune=0.3)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "secret").write_text("mine")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"vocab.txt is a link to .*, outside the checkpoint"):
        compressknow.convert(snapshot, tmp_path / "other", prune=0.3)


@pytest.mark.parametrize(
    ("value", "form", "wrong"),
    [
        (1, int, None),
        (True, int, "it is not a whole number"),
        (float("nan"), float, "it is not a number"),
        (10**400, float, "it is not a number"),
        (10**400, int, "it is not a whole number"),
        (None, (str, None), None),
        ({"a": [1, "x"]}, {"a": [int]}, "a[1] is not a whole number"),
        ({}, {"a": int, "b?": int}, "a is missing"),
        ({"a": 1, "b": None}, {"a": int, "b?": int}, "b is not a whole number"),
        ({"x": {"y": 1}}, {str: {"y": str}}, "x.y is not text"),
        ([], {"a": int}, "it is not an object"),
        ({"a": {"b": 1}}, {"a": ({str: str}, None)}, "a.b is not text"),
    ],
)
def test_mismatch_of_a_form_is_named(value: Any, form: Any, wrong: str | None) -> None:
    assert find_mismatch(value, form) == wrong
