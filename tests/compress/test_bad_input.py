"""Bad input gives one clear message and exit code 1 or 2; nothing is written and the input stays as it is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from packaging.version import Version

import compressknow
from compressknow.cli import main
from tests.compress.conftest import Refusal, hash_files
from tests.long import one_in
from tests.models import edit_config, edit_tensors, save_tiny

PRUNE = ["--prune", "0.2"]


@pytest.fixture
def source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = save_tiny("bert", tmp_path / "in")
    capsys.readouterr()
    return folder


def test_a_missing_folder_or_a_file_is_refused(source: Path, refusal: Refusal, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere", *PRUNE)
    assert str(source) in refusal(source / "config.json", *PRUNE)


def test_a_hub_id_that_cannot_be_reached_says_what_to_download(refusal: Refusal) -> None:
    assert "hf download some-author/some-model" in refusal("some-author/some-model", *PRUNE)


def test_an_output_may_have_the_name_of_a_hub_id(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hf download author/model" in refusal("author/model", *PRUNE, output=Path("author/model"))


def test_a_folder_without_weights_is_refused(source: Path, refusal: Refusal) -> None:
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    assert "has a variant alone: rename model.fp16.safetensors to model.safetensors" in refusal(source, *PRUNE)
    (source / "model.fp16.safetensors").unlink()
    assert "has no weights" in refusal(source, *PRUNE)


@pytest.mark.parametrize("options", [["--drop-blocks", "1"], ["--quantize", "int8", "--smooth", "0.5"]])
def test_an_adapter_that_would_no_longer_fit_is_refused(source: Path, refusal: Refusal, options: list[str]) -> None:
    (source / "adapter_config.json").write_text("{}")
    assert "adapter (LoRA), which would no longer fit" in refusal(source, *options)


def test_a_model_saved_with_its_adapter_must_be_merged_first(source: Path, refusal: Refusal) -> None:
    """Its tensors have the names that `state_dict` gives the layers of a model that peft has wrapped."""

    def add_adapter(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("query.weight")]:
            layer, weight = f"base_model.model.{name.removesuffix('.weight')}", tensors.pop(name)
            tensors[f"{layer}.base_layer.weight"] = weight
            tensors[f"{layer}.lora_A.default.weight"] = torch.zeros(4, weight.shape[1])
            tensors[f"{layer}.lora_B.default.weight"] = torch.zeros(weight.shape[0], 4)

    edit_tensors(source, add_adapter)
    assert "merge_and_unload" in refusal(source, *PRUNE)


def test_a_config_without_architectures_is_refused(source: Path, refusal: Refusal) -> None:
    edit_config(source, "architectures")
    message = refusal(source, *PRUNE)
    assert "names no architecture" in message
    assert "BertForMaskedLM" in message


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_truncated_weights_are_refused(source: Path, refusal: Refusal, cut: int) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    assert "model.safetensors is not a sound safetensors file" in refusal(source, *PRUNE)


def test_a_header_that_is_not_json_is_refused(source: Path, refusal: Refusal) -> None:
    raw = bytearray((source / "model.safetensors").read_bytes())
    raw[8:12] = b"\xff\xfe{{"
    (source / "model.safetensors").write_bytes(raw)
    assert "is not a sound safetensors file" in refusal(source, *PRUNE)


@pytest.mark.parametrize("file", ["missing.safetensors", "../outside.safetensors", "/etc/passwd", "..\\outside"])
def test_an_index_that_names_a_file_not_in_the_folder_is_refused(source: Path, refusal: Refusal, file: str) -> None:
    (source / "model.safetensors").rename(source / "part.safetensors")
    (source.parent / "outside.safetensors").write_bytes((source / "part.safetensors").read_bytes())
    index = {"weight_map": {"cls.predictions.bias": file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(source, *PRUNE)
    assert "model.safetensors.index.json" in message
    assert ("is missing" in message) == (file == "missing.safetensors")


def test_shapes_that_contradict_the_config_are_refused(source: Path, refusal: Refusal) -> None:
    edit_config(source, intermediate_size=52)
    message = refusal(source, *PRUNE)
    assert "bert.encoder.layer.0.intermediate.dense." in message
    assert "has shape [48" in message
    assert "config.json says [52" in message


def test_shapes_out_of_scope_that_contradict_the_config_are_refused(source: Path, refusal: Refusal) -> None:
    edit_config(source, vocab_size=120)
    message = refusal(source, *PRUNE, "--scope", "attention")
    assert "has shape [99" in message
    assert "config.json says [120" in message


def test_a_missing_weight_is_refused(source: Path, refusal: Refusal) -> None:
    edit_tensors(source, lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.weight"))
    assert "lacks a weight of BertForMaskedLM: bert.encoder.layer.1.output.dense.weight" in refusal(source, *PRUNE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.1.output.dense.weight",
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.output.LayerNorm.bias",
    ],
)
@pytest.mark.parametrize(
    "options", one_in(3, [PRUNE, ["--quantize", "int8"], [*PRUNE, "--prune-method", "ln-structured"]])
)
def test_a_weight_with_nan_or_infinity_is_named(
    source: Path, refusal: Refusal, value: float, name: str, options: list[str]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    edit_tensors(source, spoil)
    message = refusal(source, *options)
    assert name in message
    assert ("NaN" if value != value else "an infinity") in message
    # This holds for weights that are compressed, and for embeddings and biases, which are not.
    assert "The model is broken: its answers would be meaningless." in message


def test_a_mask_stored_with_the_weights_may_be_infinite(tmp_path: Path) -> None:
    mask = {"transformer.h.0.attn.masked_bias": torch.tensor(-torch.inf)}
    edit_tensors(save_tiny("gpt2", tmp_path / "in"), lambda tensors: tensors.update(mask))
    manifest = compressknow.convert(tmp_path / "in", tmp_path / "out", prune=0.3)
    assert 0 < manifest["totals"]["relative_error"] < 0.3


@pytest.mark.parametrize("amount", ["0", "1", "-0.1", "1.5", "nan", "inf"])
def test_an_amount_out_of_range_is_refused(source: Path, refusal: Refusal, amount: str) -> None:
    assert "must be a number greater than 0 and less than 1" in refusal(source, "--prune", amount, code=2)


@pytest.mark.parametrize("options", [["--prune", "much"], ["--quantize", "int3"], ["--threads", "0"], ["--dim", "2"]])
def test_an_invalid_option_is_refused(source: Path, refusal: Refusal, options: list[str]) -> None:
    assert options[0] in refusal(source, *options, code=2)


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        (["--scope", "atention"], "feed-forward"),
        (["--scope", "cross-attention"], "self-attention"),
        (["--layers", "7-9"], "0-1"),
        (["--include", "no_such_module"], "attention.self.query"),
        (["--exclude", "no_such_module"], "attention.self.query"),
    ],
)
def test_a_selection_that_matches_nothing_lists_the_choices(
    source: Path, refusal: Refusal, options: list[str], choice: str
) -> None:
    message = refusal(source, *PRUNE, *options, code=2)
    assert options[1] in message
    assert choice in message


def test_an_invalid_regular_expression_is_refused(source: Path, refusal: Refusal) -> None:
    assert "--include" in refusal(source, *PRUNE, "--include", "(", code=2)


def test_a_conversion_without_steps_is_refused(source: Path, refusal: Refusal) -> None:
    assert "--prune AMOUNT" in refusal(source, code=2)


def test_a_quantized_input_is_refused(
    source: Path, refusal: Refusal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "int8"), "--quantize", "int8"]) == 0
    capsys.readouterr()
    error = refusal(tmp_path / "int8", *PRUNE)
    assert "is quantized already (compressed-tensors)" in error
    assert "Compressing it again would add to its errors." in error
    assert f"Start from the original checkpoint, {source.name}." in error
    assert "dequantize" not in error
    edit_config(tmp_path / "int8", "quantization_config")
    assert "stored as I8" in refusal(tmp_path / "int8", *PRUNE)


@pytest.mark.parametrize(("method", "unpacker"), [("fp8", "FineGrainedFP8Config"), ("mxfp4", "Mxfp4Config")])
def test_a_model_published_quantized_must_be_dequantized_first(
    source: Path, refusal: Refusal, method: str, unpacker: str
) -> None:
    edit_config(source, quantization_config={"quant_method": method})
    assert f"transformers.{unpacker}(dequantize=True)" in " ".join(refusal(source, *PRUNE).split())
    assert getattr(hf, unpacker)(dequantize=True).dequantize


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("folder", "or pass --overwrite to replace it"),
        ("file", "out exists already, and was not written by compressknow"),
        ("link to nowhere", "out is a link"),
    ],
)
def test_an_existing_output_is_refused(source: Path, refusal: Refusal, tmp_path: Path, kind: str, message: str) -> None:
    if kind == "folder":
        (tmp_path / "out").mkdir()
    elif kind == "file":
        (tmp_path / "out").write_text("precious")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert message in refusal(source, *PRUNE)


def test_an_output_that_overlaps_the_input_is_refused(source: Path, refusal: Refusal, tmp_path: Path) -> None:
    for overwrite in ([], ["--overwrite"]):
        assert "is the input itself" in refusal(source, *PRUNE, *overwrite, output=source)
        assert "lies inside the input" in refusal(source, *PRUNE, *overwrite, output=source / "out")
        assert "contains the input" in refusal(source, *PRUNE, *overwrite, output=tmp_path)
    (tmp_path / "link").symlink_to(source)
    assert "lies inside the input" in refusal(source, *PRUNE, output=tmp_path / "link" / "out")


def test_an_output_below_a_file_is_refused(source: Path, refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "cannot be written" in refusal(source, *PRUNE, output=tmp_path / "file" / "out")


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody can write to; root could write to any but a read-only file system."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"root can write to any folder, and cannot mount a read-only one: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_output_in_a_read_only_folder_is_refused(source: Path, refusal: Refusal, read_only_folder: Path) -> None:
    for output in (read_only_folder / "out", read_only_folder / "new" / "out"):
        message = refusal(source, *PRUNE, output=output)
        assert message.startswith(f"Error: {output} cannot be written: ")
        assert "Make it writable, or choose another place." in message


def test_a_pickle_that_could_run_code_is_refused(source: Path, refusal: Refusal, tmp_path: Path) -> None:
    marker = tmp_path.parent / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    (source / "model.safetensors").unlink()
    torch.save({"weight": Harmful()}, source / "pytorch_model.bin")
    assert "loading it could run code" in refusal(source, *PRUNE)
    assert not marker.exists()


def test_code_in_the_checkpoint_is_refused_without_trust(source: Path, refusal: Refusal, tmp_path: Path) -> None:
    marker = tmp_path.parent / "ran"
    (source / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass OwnModel: ...\n")
    edit_config(source, architectures=["OwnModel"], auto_map={"AutoModelForMaskedLM": "modeling_own.OwnModel"})
    assert "--trust-remote-code" in refusal(source, *PRUNE)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "scope", "parts"),
    [
        (
            "gpt2",
            "feed-forward",
            ("cannot be quantized to int8", "Conv1D", "Nothing in the scope has an int8 form", "compressknow export"),
        ),
        # No --exclude helps: with experts stored one by one, transformers loads no quantized layer at all.
        ("mixtral", "feed-forward", ("cannot be quantized to int8", "fuses all experts", "compressknow export")),
        ("mixtral", "blocks", ("cannot be quantized to int8", "fuses all experts", "compressknow export")),
        pytest.param(
            *("mixtral", "attention", ("could not load the output", "It fuses or splits", "compressknow export")),
            marks=pytest.mark.skipif(
                Version(hf.__version__) < Version("5.23"),
                reason="older releases only report weights without values",
            ),
        ),
    ],
)
def test_weights_without_an_int8_form_are_refused(
    tmp_path: Path, capsys: Any, name: str, scope: str, parts: tuple[str, ...]
) -> None:
    folder = save_tiny(name, tmp_path / "in")
    capsys.readouterr()
    for options in (["--dry-run"], []):
        before = hash_files(tmp_path)
        arguments = ["--scope", scope, "--quantize", "int8", *options]
        assert main(["convert", str(folder), str(tmp_path / "out"), *arguments]) == 1
        message = " ".join(capsys.readouterr().err.split())
        assert all(part in message for part in (*parts, "rune only"))
        assert "--exclude" not in message
        assert hash_files(tmp_path) == before


def test_a_final_layer_that_must_stay_tied_is_refused(tmp_path: Path, refusal: Refusal, capsys: Any) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99, "num_experts": 2}
    hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**sizes)).save_pretrained(tmp_path / "in")
    capsys.readouterr()
    assert "cannot be untied" in refusal(tmp_path / "in", *PRUNE, "--scope", "final")


RECIPES = {
    "not toml": ("steps = [", "cannot be read"),
    "no steps": ("module_map = 'paper'", "no list of [[steps]]"),
    "unknown key": ("[[steps]]\nprune = 0.2\namout = 3", "amout"),
    "neither amount nor scheme": ("[[steps]]\nscope = ['attention']", "either prune = AMOUNT or quantize = SCHEME"),
    "wrong type": ("[[steps]]\nprune = '20 %'", "must be a number greater than 0 and less than 1"),
    "boolean in place of a number": (
        "[[steps]]\nquantize = 'int8'\nsmooth = true",
        "smooth must be a number greater than 0",
    ),
    "scope of numbers": ("[[steps]]\nprune = 0.2\nscope = [1]", "scope must be a name, or a list of names: [1]"),
    "pruned twice": ("[[steps]]\nprune = 0.2\n[[steps]]\nprune = 0.3\nscope = 'attention'", "Two steps would prune"),
    "quantize before prune": ("[[steps]]\nquantize = 'int8'\n[[steps]]\nprune = 0.3", "prunes before it quantizes"),
    "unknown scheme": (
        "[[steps]]\nquantize = 'int6'",
        "'int6'.\n  Choose from int8, int8-paper, int8-weights, fp8, int4, or install the package that adds it.",
    ),
    "not utf-8": (b"[[steps]]\nprune = 0.2 # \xff", "cannot be read"),
    "unknown key outside the steps": ("amount = 0.2\n[[steps]]\nprune = 0.2", "amount"),
    "steps of numbers": ("steps = [1, 2]", "no list of [[steps]]"),
    "steps is a table": ("[steps]\nprune = 0.2", "no list of [[steps]]"),
    "empty list of steps": ("steps = []", "Nothing to do"),
    "invalid module map": ("module_map = 3\n[[steps]]\nprune = 0.2", "structural"),
    "boolean amount": ("[[steps]]\nprune = true", "must be a number greater than 0 and less than 1"),
    "invalid method": ("[[steps]]\nprune = 0.2\nmethod = 3", "l1-unstructured"),
    "invalid norm": ("[[steps]]\nprune = 0.2\nnorm = 'big'", "norm"),
    "fractional seed": ("[[steps]]\nprune = 0.2\nseed = 1.5", "seed"),
    "fractional dimension": ("[[steps]]\nprune = 0.2\nmethod = 'ln-structured'\ndim = 1.0", "dimension"),
    "boolean dimension": ("[[steps]]\nprune = 0.2\nmethod = 'ln-structured'\ndim = true", "dimension"),
    "boolean seed": ("[[steps]]\nprune = 0.2\nseed = true", "seed"),
    "invalid per_layer": ("[[steps]]\nprune = 0.2\nper_layer = 'yes'", "per_layer must be true or false"),
    "list of layers": ("[[steps]]\nprune = 0.2\nlayers = ['1']", "is not a range of layers"),
    "amount and scheme": ("[[steps]]\nprune = 0.2\nquantize = 'int8'", "either prune = AMOUNT or quantize = SCHEME"),
    "norm in a quantize step": ("[[steps]]\nquantize = 'int8'\nnorm = 1", "norm"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_an_invalid_recipe_is_refused(source: Path, refusal: Refusal, tmp_path: Path, name: str) -> None:
    text, message = RECIPES[name]
    (tmp_path / "recipe.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    printed = refusal(source, "--recipe", str(tmp_path / "recipe.toml"), code=2)
    assert message in printed
    if name != "pruned twice":  # This is found only with the model.
        assert "recipe.toml" in printed


def test_a_recipe_missing_or_combined_with_options_is_refused(source: Path, refusal: Refusal, tmp_path: Path) -> None:
    assert "no such recipe" in refusal(source, "--recipe", str(tmp_path / "none.toml"), code=2)
    assert "compressknow.json: no such recipe" in refusal(source, "--recipe", str(source), code=2)
    assert "unknown key" in refusal(source, "--recipe", str(source / "config.json"), code=2)
    (tmp_path / "recipe.toml").write_text("[[steps]]\nprune = 0.2")
    message = refusal(
        source, "--recipe", str(tmp_path / "recipe.toml"), "--scope", "attention", "--prune", "0.1", code=2
    )
    assert "cannot be combined with --prune, --scope" in message
