"""Bad input: one clear message, exit code 1 or 2, nothing written, the input as it was."""

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

from compressknow.cli import main
from tests.compress.conftest import Refused, state
from tests.models import edit_config, edit_tensors, save_tiny

PRUNE = ["--prune", "0.2"]


@pytest.fixture
def source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = save_tiny("bert", tmp_path / "in")
    capsys.readouterr()
    return folder


def test_a_missing_folder_and_a_file_for_a_folder(source: Path, refused: Refused, tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "nowhere", *PRUNE)
    assert str(source) in refused(source / "config.json", *PRUNE)


def test_a_hub_id_out_of_reach_says_what_to_download(refused: Refused) -> None:
    assert "hf download some-author/some-model" in refused("some-author/some-model", *PRUNE)


def test_a_hub_id_is_no_folder_that_an_output_of_its_name_could_overlap(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "hf download author/model" in refused("author/model", *PRUNE, output=Path("author/model"))


def test_a_folder_without_weights(source: Path, refused: Refused) -> None:
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    assert "has a variant alone: rename model.fp16.safetensors to model.safetensors" in refused(source, *PRUNE)
    (source / "model.fp16.safetensors").unlink()
    assert "has no weights" in refused(source, *PRUNE)


@pytest.mark.parametrize("options", [["--drop-blocks", "1"], ["--quantize", "int8", "--smooth", "0.5"]])
def test_an_adapter_that_would_not_fit_what_is_left(source: Path, refused: Refused, options: list[str]) -> None:
    (source / "adapter_config.json").write_text("{}")
    assert "adapter (LoRA), which would no longer fit" in refused(source, *options)


def test_an_adapter_that_was_saved_with_its_model_is_to_be_merged(source: Path, refused: Refused) -> None:
    """As `state_dict` names the layers of a model that peft has wrapped."""

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("query.weight")]:
            layer, weight = f"base_model.model.{name.removesuffix('.weight')}", tensors.pop(name)
            tensors[f"{layer}.base_layer.weight"] = weight
            tensors[f"{layer}.lora_A.default.weight"] = torch.zeros(4, weight.shape[1])
            tensors[f"{layer}.lora_B.default.weight"] = torch.zeros(weight.shape[0], 4)

    edit_tensors(source, wrap)
    assert "merge_and_unload" in refused(source, *PRUNE)


def test_a_config_without_architectures(source: Path, refused: Refused) -> None:
    edit_config(source, "architectures")
    message = refused(source, *PRUNE)
    assert "names no architecture" in message
    assert "BertForMaskedLM" in message


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_truncated_weights(source: Path, refused: Refused, cut: int) -> None:
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    assert "model.safetensors is not a sound safetensors file" in refused(source, *PRUNE)


def test_a_header_that_is_no_json(source: Path, refused: Refused) -> None:
    raw = bytearray((source / "model.safetensors").read_bytes())
    raw[8:12] = b"\xff\xfe{{"
    (source / "model.safetensors").write_bytes(raw)
    assert "is not a sound safetensors file" in refused(source, *PRUNE)


@pytest.mark.parametrize("file", ["missing.safetensors", "../outside.safetensors", "/etc/passwd", "..\\outside"])
def test_an_index_that_names_what_is_not_in_the_folder(source: Path, refused: Refused, file: str) -> None:
    (source / "model.safetensors").rename(source / "part.safetensors")
    (source.parent / "outside.safetensors").write_bytes((source / "part.safetensors").read_bytes())
    index = {"weight_map": {"cls.predictions.bias": file}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(source, *PRUNE)
    assert "model.safetensors.index.json" in message
    assert ("is missing" in message) == (file == "missing.safetensors")


def test_shapes_that_disagree_with_the_config(source: Path, refused: Refused) -> None:
    edit_config(source, intermediate_size=52)
    message = refused(source, *PRUNE)
    assert "bert.encoder.layer.0.intermediate.dense." in message
    assert "has shape [48" in message
    assert "config.json says [52" in message


def test_shapes_out_of_scope_that_disagree_with_the_config(source: Path, refused: Refused) -> None:
    edit_config(source, vocab_size=120)
    message = refused(source, *PRUNE, "--scope", "attention")
    assert "has shape [99" in message
    assert "config.json says [120" in message


def test_a_weight_that_is_missing(source: Path, refused: Refused) -> None:
    edit_tensors(source, lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.weight"))
    assert "lacks a weight of BertForMaskedLM: bert.encoder.layer.1.output.dense.weight" in refused(source, *PRUNE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.1.output.dense.weight",
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.output.LayerNorm.bias",
    ],
)
@pytest.mark.parametrize("options", [PRUNE, ["--quantize", "int8"], [*PRUNE, "--prune-method", "ln-structured"]])
def test_a_weight_that_is_no_number_is_named(
    source: Path, refused: Refused, value: float, name: str, options: list[str]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    edit_tensors(source, spoil)
    message = refused(source, *options)
    assert name in message
    assert ("NaN" if value != value else "an infinity") in message


@pytest.mark.parametrize("amount", ["0", "1", "-0.1", "1.5", "nan", "inf"])
def test_an_amount_out_of_range(source: Path, refused: Refused, amount: str) -> None:
    assert "must be greater than 0 and less than 1" in refused(source, "--prune", amount, code=2)


@pytest.mark.parametrize("options", [["--prune", "much"], ["--quantize", "int3"], ["--threads", "0"], ["--dim", "2"]])
def test_an_option_that_makes_no_sense(source: Path, refused: Refused, options: list[str]) -> None:
    assert options[0] in refused(source, *options, code=2)


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        (["--scope", "atention"], "feed-forward"),
        (["--scope", "cross-attention"], "self-attention"),
        (["--layers", "7-9"], "0-1"),
        (["--include", "no_such_module"], "attention.self.query"),
        (["--exclude", "no_such_module"], "attention.self.query"),
    ],
)
def test_what_matches_nothing_lists_what_there_is(
    source: Path, refused: Refused, options: list[str], listed: str
) -> None:
    message = refused(source, *PRUNE, *options, code=2)
    assert options[1] in message
    assert listed in message


def test_a_pattern_that_is_no_regular_expression(source: Path, refused: Refused) -> None:
    assert "--include" in refused(source, *PRUNE, "--include", "(", code=2)


def test_nothing_to_do(source: Path, refused: Refused) -> None:
    assert "--prune AMOUNT" in refused(source, code=2)


def test_input_that_is_quantized_already(
    source: Path, refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "int8"), "--quantize", "int8"]) == 0
    capsys.readouterr()
    assert "is quantized already (compressed-tensors)" in refused(tmp_path / "int8", *PRUNE)
    assert "dequantize" not in refused(tmp_path / "int8", *PRUNE)
    edit_config(tmp_path / "int8", "quantization_config")
    assert "stored as I8" in refused(tmp_path / "int8", *PRUNE)


@pytest.mark.parametrize(("method", "unpacker"), [("fp8", "FineGrainedFP8Config"), ("mxfp4", "Mxfp4Config")])
def test_a_model_that_was_published_quantized_is_to_be_unpacked(
    source: Path, refused: Refused, method: str, unpacker: str
) -> None:
    edit_config(source, quantization_config={"quant_method": method})
    assert f"transformers.{unpacker}(dequantize=True)" in " ".join(refused(source, *PRUNE).split())
    assert getattr(hf, unpacker)(dequantize=True).dequantize


@pytest.mark.parametrize("kind", ["folder", "file", "link to nowhere"])
def test_an_output_that_exists(source: Path, refused: Refused, tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "out").mkdir()
    elif kind == "file":
        (tmp_path / "out").write_text("precious")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    assert "--overwrite" in refused(source, *PRUNE)


def test_an_output_that_overlaps_the_input(source: Path, refused: Refused, tmp_path: Path) -> None:
    for overwrite in ([], ["--overwrite"]):
        assert "is the input itself" in refused(source, *PRUNE, *overwrite, output=source)
        assert "lies inside the input" in refused(source, *PRUNE, *overwrite, output=source / "out")
        assert "contains the input" in refused(source, *PRUNE, *overwrite, output=tmp_path)


def test_an_output_below_a_file(source: Path, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "cannot be written" in refused(source, *PRUNE, output=tmp_path / "file" / "out")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write to: for root, only a file system that is read-only is one."""
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
        pytest.skip(f"root can write to any folder, and none can be mounted read-only: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_an_output_where_nothing_may_be_written(source: Path, refused: Refused, read_only: Path) -> None:
    for output in (read_only / "out", read_only / "new" / "out"):
        message = refused(source, *PRUNE, output=output)
        assert message.startswith(f"Error: {output} cannot be written: ")
        assert "choose another place" in message


def test_a_pickle_that_wants_to_run_code(source: Path, refused: Refused, tmp_path: Path) -> None:
    marker = tmp_path.parent / "ran"

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    (source / "model.safetensors").unlink()
    torch.save({"weight": Harmful()}, source / "pytorch_model.bin")
    assert "loading it could run code" in refused(source, *PRUNE)
    assert not marker.exists()


def test_code_in_the_checkpoint_without_trust(source: Path, refused: Refused, tmp_path: Path) -> None:
    marker = tmp_path.parent / "ran"
    (source / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass OwnModel: ...\n")
    edit_config(source, architectures=["OwnModel"], auto_map={"AutoModelForMaskedLM": "modeling_own.OwnModel"})
    assert "--trust-remote-code" in refused(source, *PRUNE)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "scope", "said"),
    [
        ("gpt2", "feed-forward", ("cannot be quantized to int8", "Conv1D", "Nothing in the scope has an int8 form")),
        # No --exclude helps: experts that are stored one by one keep transformers from loading any quantized layer.
        ("mixtral", "feed-forward", ("cannot be quantized to int8", "fuses all experts", "compressknow export")),
        ("mixtral", "blocks", ("cannot be quantized to int8", "fuses all experts", "compressknow export")),
        ("mixtral", "attention", ("could not load the output", "It fuses or splits", "compressknow export")),
    ],
)
def test_int8_without_a_form_that_runs_right(
    tmp_path: Path, capsys: Any, name: str, scope: str, said: tuple[str, ...]
) -> None:
    folder = save_tiny(name, tmp_path / "in")
    capsys.readouterr()
    for options in (["--dry-run"], []):
        before = state(tmp_path)
        words = ["--scope", scope, "--quantize", "int8", *options]
        assert main(["convert", str(folder), str(tmp_path / "out"), *words]) == 1
        message = " ".join(capsys.readouterr().err.split())
        assert all(part in message for part in (*said, "rune only"))
        assert "--exclude" not in message
        assert state(tmp_path) == before


def test_a_final_layer_that_its_model_needs_tied(tmp_path: Path, refused: Refused, capsys: Any) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99, "num_experts": 2}
    hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**sizes)).save_pretrained(tmp_path / "in")
    capsys.readouterr()
    assert "cannot be untied" in refused(tmp_path / "in", *PRUNE, "--scope", "final")


RECIPES = {
    "not toml": ("steps = [", "cannot be read"),
    "no steps": ("module_map = 'paper'", "no list of [[steps]]"),
    "unknown key": ("[[steps]]\nprune = 0.2\namout = 3", "amout"),
    "neither": ("[[steps]]\nscope = ['attention']", "either prune = AMOUNT or quantize = SCHEME"),
    "wrong type": ("[[steps]]\nprune = '20 %'", "must be greater than 0 and less than 1"),
    "scope of numbers": ("[[steps]]\nprune = 0.2\nscope = [1]", "scope must be a list of text"),
    "twice": ("[[steps]]\nprune = 0.2\n[[steps]]\nprune = 0.3\nscope = 'attention'", "Two steps would prune"),
    "order": ("[[steps]]\nquantize = 'int8'\n[[steps]]\nprune = 0.3", "prunes before it quantizes"),
    "scheme": ("[[steps]]\nquantize = 'int3'", "int8-paper"),
    "no text": (b"[[steps]]\nprune = 0.2 # \xff", "cannot be read"),
    "unknown key above": ("amount = 0.2\n[[steps]]\nprune = 0.2", "amount"),
    "steps of numbers": ("steps = [1, 2]", "no list of [[steps]]"),
    "one step": ("[steps]\nprune = 0.2", "no list of [[steps]]"),
    "no step": ("steps = []", "Nothing to do"),
    "module map": ("module_map = 3\n[[steps]]\nprune = 0.2", "structural"),
    "a truth": ("[[steps]]\nprune = true", "must be greater than 0 and less than 1"),
    "a method": ("[[steps]]\nprune = 0.2\nmethod = 3", "l1-unstructured"),
    "a norm": ("[[steps]]\nprune = 0.2\nnorm = 'big'", "norm"),
    "a seed": ("[[steps]]\nprune = 0.2\nseed = 1.5", "seed"),
    "a dimension": ("[[steps]]\nprune = 0.2\nmethod = 'ln-structured'\ndim = 1.0", "dimension"),
    "a true dimension": ("[[steps]]\nprune = 0.2\nmethod = 'ln-structured'\ndim = true", "dimension"),
    "a true seed": ("[[steps]]\nprune = 0.2\nseed = true", "seed"),
    "per layer": ("[[steps]]\nprune = 0.2\nper_layer = 'yes'", "per_layer must be true or false"),
    "layers": ("[[steps]]\nprune = 0.2\nlayers = ['1']", "text such as 0-5"),
    "both in one": ("[[steps]]\nprune = 0.2\nquantize = 'int8'", "either prune = AMOUNT or quantize = SCHEME"),
    "of a quantize step": ("[[steps]]\nquantize = 'int8'\nnorm = 1", "norm"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_makes_no_sense(source: Path, refused: Refused, tmp_path: Path, name: str) -> None:
    text, message = RECIPES[name]
    (tmp_path / "recipe.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    shown = refused(source, "--recipe", str(tmp_path / "recipe.toml"), code=2)
    assert message in shown
    if name != "twice":  # that is found with the model
        assert "recipe.toml" in shown


def test_a_recipe_that_is_missing_or_given_beside_options(source: Path, refused: Refused, tmp_path: Path) -> None:
    assert "no such recipe" in refused(source, "--recipe", str(tmp_path / "none.toml"), code=2)
    assert "compressknow.json: no such recipe" in refused(source, "--recipe", str(source), code=2)
    assert "unknown key" in refused(source, "--recipe", str(source / "config.json"), code=2)
    (tmp_path / "recipe.toml").write_text("[[steps]]\nprune = 0.2")
    message = refused(
        source, "--recipe", str(tmp_path / "recipe.toml"), "--scope", "attention", "--prune", "0.1", code=2
    )
    assert "cannot be combined with --prune, --scope" in message
