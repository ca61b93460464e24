"""GGUF files that could crash llama.cpp or hang a reader are refused with one message, within 20 s and 2 GB."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from compressknow.base.errors import CheckpointError
from compressknow.base.reading import NotReadable
from compressknow.model.gguf_file import check_gguf, check_whole
from tests.engine.gguf_bytes import LIST, TEXT, Parts, parse_gguf
from tests.engine.gguf_files import needs_gguf, write_gguf
from tests.hostile.bounded import run_refused
from tests.knowing import save_trained, write_facts

U8, U32, F32, U64 = 0, 4, 6, 10


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_facts(folder / "facts.jsonl")
    return write_gguf(save_trained("llama", folder / "llama"), folder / "sound.gguf")


def edit(change: Callable[[Parts], Any]) -> Callable[[bytes], bytes]:
    def edited(content: bytes) -> bytes:
        parts = parse_gguf(content)
        change(parts)
        return parts.join()

    return edited


def edit_tensor(field: int, value: Any) -> Callable[[bytes], bytes]:
    return edit(lambda parts: parts.tensors[1].__setitem__(field, value))


# Headers on which a reader in Python would hang, or differ from llama.cpp.
UNSOUND = {
    "blocks": (edit(lambda p: p.set("llama.block_count", U32, 10**9)), "its block_count is 1,000,000,000"),
    "experts": (edit(lambda p: p.set("llama.expert_count", U32, 10**9)), "its expert_count is 1,000,000,000"),
    "fewer blocks": (
        edit(lambda p: p.set("llama.block_count", U32, 1)), "a tensor of block 1, but its block_count is 1"
    ),
    "tokens": (
        edit(lambda p: p.set("tokenizer.ggml.tokens", LIST, (U8, [0] * 3_000_000))), "a list in it has 3,000,000 values"
    ),
    "entries": (edit(lambda p: setattr(p, "counts", (1, 10**18))), "its header announces"),
    "more entries": (edit(lambda p: setattr(p, "counts", (len(p.tensors), 60_000))), "a name in it has"),
    "alignment": (edit(lambda p: p.set("general.alignment", U32, 7)), "aligned to 7"),
    "block": (edit_tensor(0, b"blk." + b"9" * 5000 + b".x"), "a tensor of block 999,999,999, but"),
    "offset": (edit_tensor(3, 32), "a tensor in it starts at 32"),
    "gap": (edit(lambda p: p.tensors[-1].__setitem__(3, p.tensors[-1][3] + 32)), "a tensor in it starts at"),
    "type": (edit_tensor(2, 999), "of type 999"),
    "dimensions": (edit_tensor(1, [1] * 9), "has 9 dimensions"),
    "shape": (edit_tensor(1, [1 << 40, 1 << 40]), "a tensor in it starts at"),
    "cut": (lambda content: content[:-1000], "it is cut short"),
    "cut header": (lambda content: content[:1000], "it is cut short"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSOUND)
def test_unsound_header_is_refused(name: str, sound: Path, tmp_path: Path) -> None:
    change, message = UNSOUND[name]
    (tmp_path / "x.gguf").write_bytes(change(sound.read_bytes()))
    with pytest.raises(NotReadable, match=message):
        check_gguf(tmp_path / "x.gguf")


def test_only_files_that_are_cut_are_not_left_to_the_runtime(sound: Path, tmp_path: Path) -> None:
    """llama.cpp reads files with more tokens than our limit, for example."""
    for change, message in UNSOUND.values():
        (tmp_path / "x.gguf").write_bytes(change(sound.read_bytes()))
        with pytest.raises(CheckpointError, match=message) if "cut short" in message else nullcontext():
            check_whole(tmp_path / "x.gguf")


def test_sound_header_is_accepted(sound: Path, tmp_path: Path) -> None:
    check_gguf(sound)
    edited = parse_gguf(sound.read_bytes()).set("general.name", TEXT, b"x").set("n", LIST, (LIST, [(U64, [1])]))
    (tmp_path / "x.gguf").write_bytes(edited.join())
    check_gguf(tmp_path / "x.gguf")


def test_header_with_another_alignment_is_accepted(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(64)
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_gguf(tmp_path / "x.gguf")


@needs_gguf
@pytest.mark.parametrize("name", ["blocks", "tokens", "fewer blocks", "cut"])
def test_unsound_file_is_refused_before_transformers_reads_it(
    name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = UNSOUND[name]
    file = tmp_path / "x.gguf"
    file.write_bytes(change(sound.read_bytes()))
    facts = f"facts:{sound.with_name('facts.jsonl')}"
    errors = run_refused(capsys, "probe", file, "-p", facts, "-o", tmp_path / "a", "--runtime", "transformers")
    assert f"{file} is damaged: " in errors
    assert message in errors


@needs_gguf
def test_report_checks_the_file_before_it_evaluates_the_original(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, kept = tmp_path / "x.gguf", tmp_path / "kept"
    file.write_bytes(UNSOUND["cut"][0](sound.read_bytes()))
    facts = f"facts:{sound.with_name('facts.jsonl')}"
    errors = run_refused(capsys, "report", sound.with_name("llama"), file, "-p", facts, "--answers", kept)
    assert f"{file} is damaged: it is cut short." in errors
    assert not kept.exists()


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("llama.block_count", U32, 0),
        ("llama.block_count", U32, 10**9),
        ("llama.attention.layer_norm_rms_epsilon", F32, float("nan")),
    ],
)
def test_crash_of_llama_cpp_is_one_message(
    key: str, kind: int, value: Any, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Assertions of llama.cpp end its process, while it loads a file or computes."""
    pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")
    file = tmp_path / "x.gguf"
    file.write_bytes(parse_gguf(sound.read_bytes()).set(key, kind, value).join())
    facts = f"facts:{sound.with_name('facts.jsonl')}"
    errors = run_refused(capsys, "probe", file, "-p", facts, "-o", tmp_path / "a")
    assert f"{file} makes llama.cpp crash." in errors
    assert "GGML_ASSERT" in errors
    assert not (tmp_path / "a").exists()


def test_huge_importance_matrix_is_refused(tmp_path: Path, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("llama_cpp_py_sync", "gguf"):
        pytest.importorskip(module)
    file = tmp_path / "i.gguf"
    file.write_bytes(UNSOUND["tokens"][0](sound.read_bytes()))
    script = tmp_path / "convert_hf_to_gguf.py"
    script.touch()
    words = ("export", sound.with_name("llama"), tmp_path / "out.gguf", "--type", "q4_k_m", "--imatrix", file)
    assert "is not an importance matrix: a list in it has" in run_refused(capsys, *words, "--converter", script)
