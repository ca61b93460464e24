"""A checkpoint opens with the tensors that the reference loaders see; a damaged one is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compressknow.base.errors import CheckpointError
from compressknow.engine.identity import locate
from compressknow.model.checkpoint import open_checkpoint
from compressknow.model.tensors import OpenFiles, StoredTensor, read_header, read_torch_file
from tests.models import load, save_tiny

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool},
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read_values(stored: dict[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """Read the tensors at their offsets in a file."""
    with OpenFiles() as files:
        # With pieces of 7 bytes, some end within an element.
        content = {name: b"".join(bytes(piece) for piece in files.chunks(t, 7)) for name, t in stored.items()}
    return {
        name: torch.frombuffer(bytearray(content[name]), dtype=DTYPES[t.dtype]).reshape(t.shape)
        if content[name]
        else torch.empty(t.shape, dtype=DTYPES[t.dtype])
        for name, t in stored.items()
    }


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        # Bits are compared, because a flipped byte may give NaN.
        bits, expected_bits = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(bits, expected_bits), name


def get_error(read: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        read()
    return str(caught.value)


# --- safetensors headers ----------------------------------------------------------------------------------------------

MIXED = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.weight": torch.linspace(-1, 1, 10, dtype=torch.bfloat16),
    "half": torch.linspace(-1, 1, 4, dtype=torch.float16).reshape(2, 2),
    "ids": torch.arange(3),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "ключ": torch.arange(5, dtype=torch.int8),
}


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "model.safetensors"
    save_file(MIXED, path, metadata={"format": "pt"})
    return path


def test_a_header_gives_the_saved_values(sound_file: Path) -> None:
    check_same(read_values(read_header(sound_file)), MIXED)


def test_every_truncated_file_is_refused(sound_file: Path, tmp_path: Path) -> None:
    content, path = sound_file.read_bytes(), tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert str(path) in get_error(lambda: read_header(path))


def test_bytes_after_the_last_tensor_are_refused(sound_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(sound_file.read_bytes() + b"\0")
    assert "truncated or padded" in get_error(lambda: read_header(path))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_refused_or_read_as_by_the_reference(
    sound_file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content, path = bytearray(sound_file.read_bytes()), tmp_path / "flipped.safetensors"
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position in data.draw(st.lists(st.integers(0, header_end - 1), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        stored = read_header(path)
    except CheckpointError:
        return
    # The reference implementation must accept the file and read the same tensors.
    with safe_open(path, framework="pt") as reference:
        assert set(reference.keys()) == set(stored)
        for name, tensor in stored.items():
            part = reference.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (tensor.dtype, tensor.shape)
    known = {name: tensor for name, tensor in stored.items() if tensor.dtype in DTYPES}
    reference_values = load_file(path)
    check_same(read_values(known), {name: reference_values[name] for name in known})


def make_entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def make_safetensors(header: bytes, data: bytes = bytes(8)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


MALFORMED = {
    "not JSON": b"{",
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": json.dumps({"a": make_entry()}).encode("utf-16"),
    "a list": b"[1, 2]",
    "a number": b"3",
    "nested beyond all bounds": b"[" * 100_000,
    "entry is not an object": {"a": 3},
    "entry is a string": {"a": "dtype"},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "unknown dtype": {"a": make_entry("F33")},
    "dtype is a list": {"a": make_entry(["F32"])},
    "shape is a number": {"a": make_entry(shape=2)},
    "shape is a string": {"a": make_entry(shape="2")},
    "shape contains a string": {"a": make_entry(shape=["2"])},
    "shape contains a fraction": {"a": make_entry(shape=[2.0])},
    "shape contains a boolean": {"a": make_entry(shape=[2, True])},
    "shape is infinite": b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}',
    "shape is negative": {"a": make_entry(shape=[-1, -2])},
    "shape too large": {"a": make_entry(shape=[3])},
    "shape too small": {"a": make_entry(shape=[1])},
    "one offset": {"a": make_entry(offsets=[0])},
    "three offsets": {"a": make_entry(offsets=[0, 4, 8])},
    "offsets are strings": {"a": make_entry(offsets=["0", "8"])},
    "offsets are fractions": {"a": make_entry(offsets=[0.0, 8.0])},
    "offsets in reverse": {"a": make_entry(offsets=[8, 0])},
    "starts within the header": {"a": make_entry(offsets=[-8, 0])},
    "ends after the file": {"a": make_entry(shape=[4], offsets=[0, 16])},
    "gap at the start": {"a": make_entry(shape=[1], offsets=[4, 8])},
    "gap between tensors": {"a": make_entry("U8", [3], [0, 3]), "b": make_entry("U8", [4], [4, 8])},
    "overlap": {"a": make_entry(), "b": make_entry(shape=[1], offsets=[4, 8])},
    "two tensors at one offset": {"a": make_entry(), "b": make_entry()},
    "no entries": {},
    "same name twice": b'{"a": %s, "a": %s}' % ((json.dumps(make_entry()).encode(),) * 2),
    "half a surrogate pair": b'{"\\ud800": %s}' % json.dumps(make_entry()).encode(),
    "metadata is a list": {"__metadata__": [], "a": make_entry()},
    "metadata is not text": {"__metadata__": {"format": 3}, "a": make_entry()},
}


@pytest.mark.parametrize("header", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_header_is_refused(header: bytes | dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(make_safetensors(header if isinstance(header, bytes) else json.dumps(header).encode()))
    message = get_error(lambda: read_header(path))
    assert message.startswith(f"{path} is not a sound safetensors file: ")
    assert len(message) < 500


def test_a_header_without_these_faults_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(make_safetensors(json.dumps({"a": make_entry()}).encode()))
    check_same(read_values(read_header(path)), {"a": torch.zeros(2)})


def test_a_header_longer_than_the_reference_allows_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    assert "its header claims 200,000,000 bytes" in get_error(lambda: read_header(path))


def test_a_git_lfs_pointer_is_refused_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "Run `git lfs pull` in its folder" in get_error(lambda: read_header(path))


# --- shards and their index -------------------------------------------------------------------------------------------


@pytest.fixture
def sharded_folder(tmp_path: Path) -> Path:
    return save_tiny("llama", tmp_path / "sharded", max_shard_size="20KB")


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any], name: str = "model.safetensors.index.json") -> None:
    index = json.loads((folder / name).read_text())
    edit(index["weight_map"])
    (folder / name).write_text(json.dumps(index))


def test_shards_hold_the_same_tensors_as_one_file(sharded_folder: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(save_tiny("llama", tmp_path / "whole"))
    sharded = open_checkpoint(sharded_folder)
    assert whole.shards == ("model.safetensors",)
    assert len(sharded.shards) > 2
    assert list(sharded.shards) == sorted(path.name for path in sharded_folder.glob("*.safetensors"))
    check_same(read_values(sharded.tensors), read_values(whole.tensors))


def test_tensors_missing_from_the_index_or_stored_twice_are_those_transformers_loads(sharded_folder: Path) -> None:
    first, *_, last = sorted(sharded_folder.glob("*.safetensors"))
    omitted, twice = next(iter(load_file(first))), "model.norm.weight"
    save_file(load_file(first) | {twice: torch.full((32,), 2.0)}, first, {"format": "pt"})
    save_file(load_file(last) | {twice: torch.full((32,), 3.0)}, last, {"format": "pt"})
    edit_index(sharded_folder, lambda weight_map: (weight_map.pop(omitted), weight_map.update({twice: first.name})))
    found, loaded = read_values(open_checkpoint(sharded_folder).tensors), load(sharded_folder).state_dict()
    check_same({name: found[name] for name in (omitted, twice)}, {name: loaded[name] for name in (omitted, twice)})


def test_one_file_takes_precedence_over_an_index(sharded_folder: Path) -> None:
    # Transformers does so too; an index may remain after shards are merged.
    merged = {name: tensor + 1 for name, tensor in read_values(open_checkpoint(sharded_folder).tensors).items()}
    save_file(merged, sharded_folder / "model.safetensors")
    check_same(read_values(open_checkpoint(sharded_folder).tensors), merged)


def test_safetensors_take_precedence_over_bin(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "both")
    torch.save({"stray": torch.ones(2)}, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shards == ("model.safetensors",)
    assert "stray" not in checkpoint.tensors


def test_a_missing_shard_is_named(sharded_folder: Path) -> None:
    missing = sorted(sharded_folder.glob("*.safetensors"))[1]
    missing.unlink()
    message = get_error(lambda: open_checkpoint(sharded_folder))
    assert f"model.safetensors.index.json names {missing.name}, which is missing." in message


def test_a_tensor_that_is_not_in_its_shard_is_refused(sharded_folder: Path) -> None:
    first, second = (path.name for path in sorted(sharded_folder.glob("*.safetensors"))[:2])

    def move(weight_map: dict[str, str]) -> None:
        name = next(name for name, file in weight_map.items() if file == first)
        weight_map[name] = second

    edit_index(sharded_folder, move)
    assert f"{second} lacks " in get_error(lambda: open_checkpoint(sharded_folder))


@pytest.mark.parametrize(
    "file",
    [
        *("../model.safetensors", "sub/../../model.safetensors", "/etc/passwd", "..", ".", ""),
        *("..\\model.safetensors", "\\model.safetensors", "C:model.safetensors", "C:\\model.safetensors"),
        *("//server/share/model.safetensors", "\\\\server\\share\\model.safetensors", 3, None, ["model.safetensors"]),
    ],
)
def test_an_index_that_leaves_the_folder_is_refused(sharded_folder: Path, file: object) -> None:
    # The files exist, so they are refused for their names.
    for path in (sharded_folder.parent / "model.safetensors", sharded_folder / "..\\model.safetensors"):
        save_file({"stray": torch.ones(2)}, path)
    edit_index(sharded_folder, lambda weight_map: weight_map.update({"model.norm.weight": file}))  # type: ignore[dict-item]
    message = get_error(lambda: open_checkpoint(sharded_folder))
    assert "model.safetensors.index.json places model.norm.weight outside the folder" in message
    assert repr(file) in message


@pytest.mark.parametrize("file", ["model\0.safetensors", "\ud800.safetensors", "x" * 300])
def test_an_index_with_an_impossible_file_name_names_a_missing_file(sharded_folder: Path, file: str) -> None:
    edit_index(sharded_folder, lambda weight_map: weight_map.update({"model.norm.weight": file}))
    assert "which is missing." in get_error(lambda: open_checkpoint(sharded_folder))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[]", "{", "", "null"])
def test_an_index_without_a_weight_map_is_refused(sharded_folder: Path, content: str) -> None:
    (sharded_folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in get_error(lambda: open_checkpoint(sharded_folder))


# --- folders and their config -----------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    for model in (tmp_path / "none", f"{tmp_path}/none"):
        assert get_error(lambda model=model: open_checkpoint(model)).startswith(f"{tmp_path}/none: no such folder.\n")


def test_a_file_is_refused_with_the_name_of_its_folder(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    message = get_error(lambda: open_checkpoint(folder / "model.safetensors"))
    assert message.endswith(f"is a file, not a checkpoint folder.\nGive its folder: {folder}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is missing."),
        (b"", "cannot be read"),
        (b'{"model_type": "bert"', "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "holds no JSON object."),
        (b'"bert"', "holds no JSON object."),
        (b"null", "holds no JSON object."),
    ],
)
def test_an_invalid_config_is_refused_by_name(content: bytes | None, reason: str, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    message = get_error(lambda: open_checkpoint(folder))
    assert str(folder / "config.json") in message
    assert reason in message


@pytest.mark.parametrize(
    ("file", "message"), [("adapter_config.json", r"is an adapter \(LoRA\)"), ("model.gguf", r"holds a GGUF file")]
)
def test_adapters_and_gguf_files_are_named_as_such(file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_config_alone_opens_without_tensors(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.name, checkpoint.tensors, checkpoint.shards) == ("llama", {}, ())
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    with pytest.raises(CheckpointError, match="has no weights"):
        checkpoint.check_has_weights()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is an adapter \(LoRA\)"):
        checkpoint.check_has_weights()


# --- the Hub's cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A cache folder as huggingface_hub makes it: content stored by hash, and links to it in each snapshot."""
    original = save_tiny("llama", tmp_path / "original", max_shard_size="20KB")
    repository = tmp_path / "hf" / "hub" / "models--org--tiny-llama"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(original.iterdir())):
        path.rename(repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    return tmp_path / "hf" / "hub"


def test_a_snapshot_folder_of_links_opens_like_any_other(hub_cache: Path, tmp_path: Path) -> None:
    folder = hub_cache / "models--org--tiny-llama" / "snapshots" / COMMIT
    assert (folder / "config.json").is_symlink()
    checkpoint = open_checkpoint(folder)
    # The name is the id, not the commit that names the folder.
    assert (checkpoint.name, checkpoint.revision) == ("org/tiny-llama", None)
    assert len(checkpoint.shards) > 2
    expected = open_checkpoint(save_tiny("llama", tmp_path / "llama"))
    check_same(read_values(checkpoint.tensors), read_values(expected.tensors))


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_hub_id_is_found_in_the_cache_offline(hub_cache: Path, variable: str, revision: str | None) -> None:
    code = (
        "import json, sys; from compressknow.model.checkpoint import open_checkpoint; "
        f"c = open_checkpoint('org/tiny-llama', {revision!r}); "
        "print(json.dumps([c.name, c.revision, str(c.folder), sorted(c.tensors)]))"
    )
    folder_of_variable = hub_cache.parent if variable == "HF_HOME" else hub_cache
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {variable: str(folder_of_variable), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, commit, folder, tensors = json.loads(done.stdout)
    assert (name, commit) == ("org/tiny-llama", COMMIT)
    assert folder == str(hub_cache / "models--org--tiny-llama" / "snapshots" / COMMIT)
    assert tensors == sorted(open_checkpoint(folder).tensors)


def test_a_hub_id_that_cannot_be_reached_says_how_to_download_it() -> None:
    message = get_error(lambda: open_checkpoint("nobody/no-such-model-anywhere"))
    assert message.startswith(
        "nobody/no-such-model-anywhere is not a local folder, and it could not be downloaded from the Hub.\n"
    )
    assert "hf download nobody/no-such-model-anywhere" in message


@pytest.mark.parametrize("name", ["a/b/c", "./none", "../none", "~/none", "a b", "-x", "org/na--me"])
def test_a_name_that_is_no_hub_id_is_not_requested(name: str) -> None:
    message = get_error(lambda: open_checkpoint(name))
    assert "no such folder." in message or "is not a local folder" in message


def test_a_mistyped_folder_suggests_the_right_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build" / "smollm2").mkdir(parents=True)
    (tmp_path / "build" / "model.gguf").touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", pytest.fail)
    for read, name, suggestion in (
        (open_checkpoint, "build/smolm2", "build/smollm2"),
        (open_checkpoint, "build/smolm2/", "build/smollm2"),
        (locate, "build/smolm2", "build/smollm2"),
        (locate, "build/modl.gguf", "build/model.gguf"),
    ):
        message = get_error(lambda read=read, name=name: read(name))
        assert message.startswith(f"{name}: no such f")
        assert f"Did you mean {suggestion}? " in message
    assert "Did you mean" not in get_error(lambda: open_checkpoint("build/quite-another"))
    assert "no such folder" in get_error(lambda: open_checkpoint("model.safetensors"))


def test_an_id_whose_organisation_is_no_folder_is_requested_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = get_error(lambda: open_checkpoint("org/smollm2"))
    assert "could not be downloaded from the Hub" in message
    assert "Did you mean" not in message
    assert "Did you mean smollm2? " in get_error(lambda: open_checkpoint("smolm2"))


# --- PyTorch .bin files -----------------------------------------------------------------------------------------------


def make_state() -> dict[str, torch.Tensor]:
    """Return tensors that share memory, or leave some of it out, in all possible ways."""
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return {
        "whole": base,
        "shared": base,
        "rows": base[2:5],
        "one": base[5, 3],
        "reshaped": base.view(4, 6),
        "parameter": torch.nn.Parameter(torch.randn(3, 2)),
        "half": torch.randn(5, 3).half(),
        "brain": torch.randn(5, 3).bfloat16()[1:],
        "ids": torch.arange(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
    }


NOT_ROW_MAJOR = {
    "square": (square := torch.arange(9.0).reshape(3, 3)),
    "transposed": square.t(),
    "transposed again": square.t(),
    "every second": torch.arange(10.0)[::2],
    "column": torch.arange(12.0).reshape(3, 4)[:, 1],
    "expanded": torch.ones(1, 3).expand(2, 3),
    "parameter": torch.nn.Parameter(torch.randn(2, 3)).t(),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("state", [make_state(), NOT_ROW_MAJOR], ids=["row-major", "not-row-major"])
def test_a_bin_file_is_read_as_torch_loads_it(state: dict[str, torch.Tensor], zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    stored = read_torch_file(path)
    assert list(stored) == list(state)
    check_same(read_values(stored), torch.load(path, weights_only=True))
    check_same(read_values(stored), state)


def test_tensors_of_a_zip_file_are_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(make_state(), path)
    stored = read_torch_file(path)
    assert all(tensor.loaded is None and tensor.file == path for tensor in stored.values())
    assert stored["shared"].offset == stored["whole"].offset
    assert stored["rows"].offset == stored["whole"].offset + 2 * 4 * 4
    raw = path.read_bytes()[stored["ids"].offset :][: stored["ids"].nbytes]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.int64), torch.arange(7))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_shared_tensors_share_an_offset_and_transposed_ones_do_not(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    tensor = torch.randn(4, 4)
    torch.save({"one": tensor, "same": tensor, "turned": tensor.t()}, path, _use_new_zipfile_serialization=zipped)
    stored = read_torch_file(path)
    assert stored["one"].offset == stored["same"].offset
    assert stored["one"].offset != stored["turned"].offset


def rewrite_zip(path: Path, edit: Callable[[str, bytes], bytes] = lambda _, content: content, **options: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(name, edit(name, archive.read(name))) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records:
            archive.writestr(name, content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["plain", "compressed"])
@pytest.mark.parametrize("state", [{"a": torch.arange(64.0)}, make_state()], ids=["one", "many"])
def test_a_zip_file_of_another_tool_is_read_as_torch_loads_it(
    state: dict[str, torch.Tensor], compression: int, tmp_path: Path
) -> None:
    # On the meta device torch computes where its own writer would have put a record, not where it is.
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    rewrite_zip(path, compression=compression)
    check_same(torch.load(path, weights_only=True), state)
    check_same(read_values(read_torch_file(path)), state)


def test_a_file_of_the_other_byte_order_is_read_as_torch_loads_it(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    state = {"a": torch.arange(64.0), "b": torch.arange(30).half()}
    torch.save(state, path)
    byte_order = b"big" if sys.byteorder == "little" else b"little"
    widths = {"data/0": 4, "data/1": 2}

    def edit(name: str, content: bytes) -> bytes:
        if name.endswith("/byteorder"):
            return byte_order
        width = next((width for end, width in widths.items() if name.endswith(end)), 1)
        return b"".join(content[i : i + width][::-1] for i in range(0, len(content), width))

    rewrite_zip(path, edit)
    check_same(torch.load(path, weights_only=True), state)
    check_same(read_values(read_torch_file(path)), state)


def test_a_tensor_larger_than_its_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(64.0), "b": torch.ones(64)}, path)
    rewrite_zip(path, lambda name, content: content[:40] if name.endswith("data/0") else content)
    assert "is not a sound PyTorch checkpoint" in get_error(lambda: read_torch_file(path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_truncated_bin_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(6.0)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert str(path) in get_error(lambda: read_torch_file(path))


@cache
def save_tensors(zipped: bool) -> bytes:
    """Return a file of two tensors. A legacy file contains addresses, so its length differs from one to the next."""
    buffer = io.BytesIO()
    torch.save(
        {"a": torch.arange(6.0), "b": torch.ones(2, 3).bfloat16()}, buffer, _use_new_zipfile_serialization=zipped
    )
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_of_a_bin_file_are_refused_or_read_as_by_torch(
    zipped: bool, tmp_path: Path, data: st.DataObject
) -> None:
    content, path = bytearray(save_tensors(zipped)), tmp_path / "pytorch_model.bin"
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=2)):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        stored = read_torch_file(path)
    except CheckpointError:
        return
    # Values are not compared, because torch fills a tensor with zeros if a checksum of the archive is wrong.
    found = read_values({name: tensor for name, tensor in stored.items() if tensor.dtype in DTYPES})
    try:
        reference = torch.load(path, map_location="cpu", weights_only=True)
    except RuntimeError:  # The damage is in the names of an archive's records, not in tensors.
        assert zipped
        return
    assert set(stored) == set(reference)
    assert all((t.dtype, t.shape) == (reference[name].dtype, reference[name].shape) for name, t in found.items())


class Payload:
    """An object that creates a folder when it is unpickled without a check."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_could_run_code_is_refused_and_does_not_run_it(zipped: bool, tmp_path: Path) -> None:
    folder, marker = save_tiny("llama", tmp_path / "llama"), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    state = {"model.norm.weight": torch.ones(32), "payload": Payload(marker)}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    message = get_error(lambda: open_checkpoint(folder))
    assert "pytorch_model.bin is refused: its pickle contains more than tensors" in message
    assert "mkdir" in message
    assert "safetensors" in message
    # The message does not pass on torch's advice to load it without the check.
    assert "weights_only" not in message
    assert not marker.exists()
    # The payload is real: a loader without the check runs it.
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.is_dir()


@pytest.mark.parametrize(
    "content",
    [
        *([torch.ones(2)], torch.ones(2), {}, {"a": 3}, {"state_dict": {"a": torch.ones(2)}}),
        *({"a": torch.ones(2), "epoch": 3}, {"a": {"b": torch.ones(2)}}, {3: torch.ones(2)}, None),
        {"a": torch.ones(3, 3).to_sparse()},
    ],
    ids=["list", "tensor", "empty", "number", "nested", "with-epoch", "two-deep", "no-names", "none", "sparse"],
)
def test_a_bin_file_without_a_flat_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    message = get_error(lambda: read_torch_file(path))
    assert "holds no flat state dict" in message
    assert "without optimizer or trainer state" in message


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2, dtype=torch.complex128)}, path)
    assert "a has dtype torch.complex128" in get_error(lambda: read_torch_file(path))


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04"])
def test_a_bin_file_of_another_format_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    message = get_error(lambda: read_torch_file(path))
    assert message.startswith(f"{path} is not a sound PyTorch checkpoint: ")
    assert len(message.splitlines()) == 2


def save_bin_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Write a tiny Llama as two `.bin` files with an index; return its weights."""
    state = load_file(save_tiny("llama", folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, tensor_names in shards.items():
        torch.save({name: state[name] for name in tensor_names}, folder / file)
    index = {"weight_map": {name: file for file, tensor_names in shards.items() for name in tensor_names}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return state


def test_sharded_bin_files_hold_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    state = save_bin_shards(folder)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shards == ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    check_same(read_values(checkpoint.tensors), state)
    edit_index(folder, lambda weight_map: weight_map.update(extra="../x.bin"), "pytorch_model.bin.index.json")
    assert "places extra outside the folder" in get_error(lambda: open_checkpoint(folder))
