"""Files that could hang a reader or fill its memory are refused with one message, within 20 s and 2 GB."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressknow.base.errors import CompressknowError
from compressknow.base.reading import MOST_VALUES, NotReadable, parse_json, read_lines
from compressknow.model.checkpoint import open_checkpoint
from compressknow.model.tensors import read_header
from tests.hostile.bounded import bounded, run_refused
from tests.models import save_tiny


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    # A socket's path must be short: bind its name from within its folder.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(before)


def link_to_device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_tiny("bert", tmp_path / "model")


@pytest.mark.parametrize("make", [make_pipe, make_socket, link_to_device])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_files_of_a_checkpoint_must_be_regular(checkpoint: Path, make: Callable[[Path], None], name: str) -> None:
    make(checkpoint / name)
    with pytest.raises(CompressknowError, match=f"{name} cannot be read: it is a (pipe|socket|device)"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_folder_in_the_place_of_a_file_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).mkdir()
    with pytest.raises(CompressknowError, match=f"{name} cannot be read: it is a folder"):
        open_checkpoint(checkpoint)


def test_pipe_as_any_input_is_refused_at_once(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("answers", "converted"):
        Path(folder).mkdir()
    for name in ("r.toml", "r.json", "f.jsonl", "c.txt", "m.gguf", "answers/probe.json", "converted/compressknow.json"):
        make_pipe(Path(name))
    Path("converted/config.json").write_text("{}", encoding="utf-8")
    for command in (
        ("convert", checkpoint, "out", "--recipe", "r.toml"),
        ("convert", checkpoint, "out", "--recipe", "r.json"),
        ("convert", checkpoint, "out", "--recipe", "converted"),
        ("verify", "converted"),
        ("report", "answers", "answers", "-o", "x.html"),
        ("probe", checkpoint, "-p", "facts:f.jsonl", "-o", "a"),
        ("probe", checkpoint, "-p", "text:c.txt", "-o", "a"),
        ("probe", checkpoint, "-p", "hf:f.jsonl", "-o", "a"),
        ("sweep", checkpoint, "-o", "s", "--grid", "r.toml"),
        ("convert", checkpoint, "out", "--prune", "50%", "--prune-method", "wanda", "--calibration", "c.txt"),
        ("sweep", checkpoint, "-o", "s", "--grid", "methods", "--calibration", "c.txt"),
        ("search", checkpoint, "-o", "s", "--keep", "90%", "--calibration", "c.txt"),
        ("export", checkpoint, "x.gguf", "--recipe", "r.toml"),
    ):
        run_refused(capsys, *command)
    for command in (
        ("probe", checkpoint, "-p", "facts:f.jsonl", "-o", "a"),
        ("probe", checkpoint, "-p", "text:c.txt", "-o", "a"),
        ("probe", "m.gguf", "-o", "a"),
        ("report", checkpoint, "m.gguf"),
    ):
        assert re.search(r"cannot be read: it is a pipe \(FIFO\), not a regular file", run_refused(capsys, *command))
    assert "m.gguf is not a regular file" in run_refused(capsys, "verify", "m.gguf")


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b"[" + b"[]," * 5_000_000 + b"[]]", b'{"a":' + b"1" * 5000 + b"}"],
    ids=["deep", "many", "long-number"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_deep_or_huge_json_is_refused(
    checkpoint: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / name).write_bytes(content)
    if name.endswith("index.json"):
        (checkpoint / "model.safetensors").unlink()
    assert f"{name} cannot be read: " in run_refused(capsys, "inspect", checkpoint)


def test_json_is_limited_by_its_number_of_values() -> None:
    with pytest.raises(NotReadable, match="more than"):
        parse_json(b"[" + b"[]," * MOST_VALUES + b"0]")
    assert parse_json(json.dumps(list(range(1000))).encode()) == list(range(1000))


@pytest.mark.parametrize("header", [b"[" * 90_000_000, b'{"a":[' + b"[]," * 30_000_000 + b"[]]}"], ids=["deep", "many"])
def test_huge_safetensors_header_is_refused(
    checkpoint: Path, header: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "model.safetensors is not a sound safetensors file" in run_refused(capsys, "inspect", checkpoint)


def test_largest_allowed_safetensors_header_is_read(tmp_path: Path) -> None:
    """It has as many tensors as are allowed."""
    entry = {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]}
    header = json.dumps({f"model.layers.{i}.mlp.weight": entry for i in range(190_000)}, separators=(",", ":")).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with bounded():
        assert len(read_header(tmp_path / "model.safetensors")) == 190_000


@pytest.mark.parametrize("entry", ["data.pkl", "data/0"])
def test_compressed_bin_file_is_refused(
    tmp_path: Path, checkpoint: Path, entry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(4)}, tmp_path / "sound.bin")
    bin_file = checkpoint / "pytorch_model.bin"
    with zipfile.ZipFile(tmp_path / "sound.bin") as sound, zipfile.ZipFile(bin_file, "w") as bomb:
        for name in sound.namelist():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            megabytes = 400 if name.endswith(entry) else 0
            with bomb.open(info, "w", force_zip64=True) as record:
                record.write(sound.read(name))
                for _ in range(megabytes):
                    record.write(bytes(1 << 20))
    assert bin_file.stat().st_size < 1 << 20
    assert "would unpack to" in run_refused(capsys, "inspect", checkpoint)


def test_bin_tensor_with_stride_zero_is_refused(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1).expand(1_000_000_000)}, checkpoint / "pytorch_model.bin")
    assert "far more than the file holds" in run_refused(capsys, "inspect", checkpoint)


def test_too_long_line_of_facts_is_refused(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "f.jsonl"
    facts.write_bytes(b'\n{"prompt": "x [MASK]", "obj_label": "y", "z": [' + b"[]," * 30_000_000 + b"1]}")
    errors = run_refused(capsys, "probe", checkpoint, "-p", f"facts:{facts}", "-o", tmp_path / "answers")
    assert "line 2 is longer than 1,048,576 bytes" in errors


def test_only_newlines_end_lines(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\r\n\nb\xe2\x80\xa8c")
    assert list(read_lines(tmp_path / "f")) == [b"a\r", b"", b"b\xe2\x80\xa8c"]


def test_file_that_was_touched_replaced_or_removed_since_it_was_opened_has_changed(checkpoint: Path) -> None:
    file, second = checkpoint / "model.safetensors", 10**18
    os.utime(file, ns=(second, second))
    opened = open_checkpoint(checkpoint)
    opened.check_unchanged()
    os.utime(file, ns=(second, second + 10**6))
    with pytest.raises(CompressknowError, match=r"model\.safetensors was replaced or changed"):
        opened.check_unchanged()
    os.utime(file, ns=(second, second))
    opened.check_unchanged()
    # A copy with the same size and time.
    shutil.copy2(file, checkpoint / "copy").replace(file)
    with pytest.raises(CompressknowError, match=r"model\.safetensors was replaced or changed"):
        opened.check_unchanged()
    file.unlink()
    with pytest.raises(CompressknowError, match=r"model\.safetensors was replaced or changed"):
        opened.check_unchanged()


def test_shard_in_a_subfolder_that_was_touched_has_changed(checkpoint: Path) -> None:
    shard = checkpoint / "weights" / "part.safetensors"
    shard.parent.mkdir()
    (checkpoint / "model.safetensors").rename(shard)
    index = {"weight_map": dict.fromkeys(read_header(shard), "weights/part.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    opened = open_checkpoint(checkpoint)
    opened.check_unchanged()
    os.utime(shard, ns=(10**18, 10**18))
    with pytest.raises(CompressknowError, match=r"part\.safetensors was replaced or changed"):
        opened.check_unchanged()
