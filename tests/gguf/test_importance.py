"""The importance matrix: equal to a plain reference, under the right names, of use, and in llama.cpp's own form."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import compressknow
from compressknow.base.errors import CheckpointError, OutputError, UsageError
from compressknow.cli import main
from compressknow.compress.calibrate.text import read_calibration_text
from compressknow.compress.steps import Calibration
from compressknow.gguf.importance import read_importance, write_importance
from compressknow.model.loading import open_complete
from tests.gguf.making import (
    convert_to_llama_cpp,
    get_llama_cpp_name,
    needs_converter,
    read_metadata,
    read_tensors,
    read_types,
    read_weights,
    save_checkpoint,
    write_sentences,
)
from tests.long import long, one_in

pytest.importorskip("llama_cpp_py_sync")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and a text; `matrix.gguf` is what was made of these, and `with.gguf` was rounded with it."""
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint("llama", folder / "model")
    text = write_sentences(folder / "text.txt")
    compressknow.export(
        folder / "model",
        folder / "with.gguf",
        type="q2_k",
        calibration=str(text),
        calibration_tokens=4096,
        imatrix_out=folder / "matrix.gguf",
    )
    return folder


def _batches(world: Path) -> list[torch.Tensor]:
    _, tree = open_complete(world / "model")
    text = read_calibration_text(world / "model", tree, Calibration(str(world / "text.txt"), 4096))
    return [batch["input_ids"] for batch in text.batches]


def _reference(world: Path) -> tuple[dict[str, np.ndarray], int]:
    """Sums of squares of what each nn.Linear of transformers' own model reads, and the tokens."""
    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    sums: dict[str, np.ndarray] = {}

    def watch(name: str):
        def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            squares = inputs[0].double().square().flatten(0, -2).sum(0).numpy()
            sums[name] = sums.get(name, 0) + squares

        return see

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(get_llama_cpp_name(name)))
    tokens = 0
    with torch.no_grad():
        for batch in _batches(world):
            model(batch)
            tokens += batch.numel()
    return sums, tokens


@needs_converter
def test_it_is_that_of_a_plain_reference(world: Path) -> None:
    made, (expected, tokens) = read_importance(world / "matrix.gguf"), _reference(world)
    assert made.sums.keys() == expected.keys()
    assert "output.weight" in made.sums
    for name, squares in expected.items():
        np.testing.assert_allclose(made.sums[name][0], squares, rtol=1e-4, err_msg=name)
        assert made.counts[name].tolist() == [tokens]
    assert made.chunks * made.chunk == tokens
    assert made.datasets == (str(world / "text.txt"),)


@needs_converter
def test_the_file_has_the_form_of_llama_imatrix(world: Path) -> None:
    """Names, shapes and keys of tools/imatrix/imatrix.cpp, which llama-quantize reads."""
    said = read_metadata(world / "matrix.gguf")
    assert said["general.type"] == "imatrix"
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= said.keys()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(world / "matrix.gguf").tensors}
    assert list(stored["blk.0.ffn_down.weight.in_sum2"].shape) == [512, 1]
    assert list(stored["blk.0.ffn_down.weight.counts"].shape) == [1, 1]
    assert {tensor.tensor_type.name for tensor in stored.values()} == {"F32"}


@needs_converter
def test_a_matrix_is_of_the_model_that_it_says(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its shapes are; what was made of the same original may have it, and one that says none, with a word."""
    matrix, other = world / "matrix.gguf", save_checkpoint("llama", world / "other", torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"matrix\.gguf is of another model: it names [0-9a-f]{16}"):
        compressknow.export(other, world / "other.gguf", type="q3_k_m", imatrix=matrix)
    compressknow.convert(world / "model", world / "pruned", prune=0.2)
    record = compressknow.export(world / "pruned", world / "pruned.gguf", type="q3_k_m", imatrix=matrix)
    assert record["importance"]["identified"] is True
    write_importance(replace(read_importance(matrix), models=()), world / "foreign.gguf")
    words = ["export", str(other), str(world / "other.gguf"), "--type", "q3_k_m"]
    assert main([*words, "--imatrix", str(world / "foreign.gguf")]) == 0
    assert "! foreign.gguf does not say which model it was made from" in capsys.readouterr().out


@needs_converter
def test_what_counts_is_rounded_better(world: Path) -> None:
    """By the outputs of the layers on the text, the file that was rounded with the matrix is nearer."""
    compressknow.export(world / "model", world / "without.gguf", type="q2_k")
    exact, means = convert_to_llama_cpp(read_weights(world / "model")), read_importance(world / "matrix.gguf").means()
    with_it, without = read_tensors(world / "with.gguf"), read_tensors(world / "without.gguf")
    kinds = read_types(world / "with.gguf")
    assert kinds == read_types(world / "without.gguf")

    def lost(made: dict[str, np.ndarray], name: str) -> float:
        return float((means[name] * (made[name] - exact[name]) ** 2).sum())

    coarse = [name for name in means if kinds[name] in ("q2_k", "q3_k")]
    better = [lost(with_it, name) < lost(without, name) for name in coarse]
    assert len(better) >= 10
    assert all(better)


@needs_converter
def test_a_matrix_that_is_there_is_taken(world: Path) -> None:
    """`imatrix` with what `imatrix_out` wrote gives the same weights; so does the form of before."""
    matrix = read_importance(world / "matrix.gguf")
    old = world / "matrix.dat"
    with old.open("wb") as file:
        file.write(struct.pack("<i", len(matrix.sums)))
        for name, sums in matrix.sums.items():
            calls = int(matrix.counts[name][0])
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, sums.size))
            file.write(sums.astype("<f4").tobytes())
    expected = read_tensors(world / "with.gguf")
    for given in (world / "matrix.gguf", old):
        output = world / f"{given.suffix[1:]}-again.gguf"
        record = compressknow.export(world / "model", output, type="q2_k", imatrix=given)
        assert record["importance"]["source"] == given.name
        made = read_tensors(output)
        assert all(np.array_equal(made[name], weight) for name, weight in expected.items())


@needs_converter
def test_types_that_need_one(world: Path, tmp_path: Path) -> None:
    """llama.cpp refuses them without: so does export, before work."""
    with pytest.raises(UsageError, match="only with an importance matrix"):
        compressknow.export(world / "model", tmp_path / "out.gguf", type="iq2_xxs")
    with pytest.raises(UsageError, match="only with an importance matrix"):
        compressknow.export(world / "model", tmp_path / "out.gguf", type_of={"attention": "iq1_s"})
    assert not list(tmp_path.iterdir())
    record = compressknow.export(world / "model", tmp_path / "out.gguf", type="iq2_xxs", imatrix=world / "matrix.gguf")
    assert "iq2_xxs" in record.groups["feed-forward"]
    assert record.setup == "iq2_xxs (imatrix)"


@long
@needs_converter
def test_every_type_that_needs_one_is_known_and_no_other(world: Path, tmp_path: Path) -> None:
    """llama.cpp itself is asked, of each type that it has."""
    from compressknow.base.errors import CompressknowError
    from compressknow.gguf.choice import NEED_IMPORTANCE, list_file_types
    from compressknow.gguf.converter import quantize

    compressknow.export(world / "model", tmp_path / "exact.gguf", type="f32")
    for number, kind in enumerate(list_file_types()):
        refused = ""
        try:
            quantize(tmp_path / "exact.gguf", tmp_path / f"{number}.gguf", kind, tmp_path)
        except CompressknowError as error:
            refused = str(error)
        assert ("requires an imatrix" in refused) == bool(refused) == (kind in NEED_IMPORTANCE), (kind, refused)


@needs_converter
@pytest.mark.parametrize("name", one_in(2, ["mixtral", "t5", "llama-tied"]))
def test_other_families(name: str, tmp_path: Path) -> None:
    """Experts have a row each, a tied embedding is the final layer, and an encoder has its own names."""
    source = save_checkpoint(name, tmp_path / "model")
    record = compressknow.export(
        source,
        tmp_path / "out.gguf",
        type="q4_0",
        calibration=str(write_sentences(tmp_path / "text.txt")),
        calibration_tokens=2048,
        imatrix_out=tmp_path / "matrix.gguf",
    )
    made = read_importance(tmp_path / "matrix.gguf")
    assert record["importance"]["without"] == []
    if name == "llama-tied":
        assert "token_embd.weight" in made.sums
    if name == "mixtral":
        assert made.sums["blk.0.ffn_down_exps.weight"].shape == (2, 512)
        # Each token goes to two of two experts.
        assert made.counts["blk.1.ffn_gate_exps.weight"].tolist() == [2048, 2048]
        np.testing.assert_array_equal(made.sums["blk.0.ffn_gate_exps.weight"], made.sums["blk.0.ffn_up_exps.weight"])
    if name == "t5":
        assert {
            "enc.blk.0.attn_q.weight",
            "dec.blk.1.cross_attn_k.weight",
            "dec.blk.0.ffn_down.weight",
        } <= made.sums.keys()


@needs_converter
def test_a_converted_checkpoint(world: Path, tmp_path: Path) -> None:
    """The matrix of a quantized checkpoint is of what its own layers read."""
    compressknow.convert(world / "model", tmp_path / "small", quantize="int8", drop_blocks="1")
    record = compressknow.export(
        tmp_path / "small",
        tmp_path / "out.gguf",
        type="q4_k_m",
        calibration=str(world / "text.txt"),
        calibration_tokens=2048,
    )
    assert record["importance"]["tensors"] == 8
    assert record["importance"]["tokens"] == 2048


@needs_converter
def test_the_models_own_text(world: Path, tmp_path: Path) -> None:
    """`self` takes the model's samples, the same ones for the same seed."""
    words = {"type": "q4_0", "calibration": "self", "calibration_tokens": 1024, "seed": 3}
    source, one, other = world / "model", tmp_path / "a.gguf", tmp_path / "b.gguf"
    compressknow.export(source, one, **words)
    compressknow.export(source, other, **words, imatrix_out=tmp_path / "matrix.gguf")
    assert one.read_bytes() == other.read_bytes()
    assert not compressknow.export(source, other, **words, imatrix_out=tmp_path / "matrix.gguf").is_new
    # Another model's matrix has taken the place of this one's since.
    write_importance(replace(read_importance(tmp_path / "matrix.gguf"), models=("0" * 64,)), tmp_path / "matrix.gguf")
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, other, **words, imatrix_out=tmp_path / "matrix.gguf")


@needs_converter
def test_a_run_that_died_before_it_wrote_the_modelfile_is_repeated(world: Path, tmp_path: Path) -> None:
    text, output, modelfile = tmp_path / "text.txt", tmp_path / "out.gguf", tmp_path / "Modelfile"
    text.write_bytes((world / "text.txt").read_bytes())
    words = {"type": "q4_0", "calibration": str(text), "calibration_tokens": 1024, "modelfile": modelfile}
    compressknow.export(world / "model", output, **words)
    made = modelfile.read_text()
    modelfile.unlink()
    assert not compressknow.export(world / "model", output, **words).is_new
    assert modelfile.read_text() == made
    # Another text of that name makes another file.
    text.write_text("What is " + text.read_text())
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(world / "model", output, **words)


@needs_converter
def test_other_channels_are_found(world: Path, tmp_path: Path) -> None:
    """A tensor whose input channels the converter has put into another order is not a match."""
    from compressknow.compress.weights import read_stored_weights
    from compressknow.gguf.plain import find_same_channels, list_plain_tensors
    from compressknow.gguf.tensors import describe_tensors
    from compressknow.model.gguf_file import read_gguf

    compressknow.export(world / "model", tmp_path / "exact.gguf", type="f32")
    loaded, _ = open_complete(world / "model")
    side = read_stored_weights(loaded)
    turned = {"blk.0.attn_output.weight"}
    writer = gguf.GGUFWriter(tmp_path / "turned.gguf", "llama")
    writer.add_block_count(2)
    for name, tensor in read_tensors(tmp_path / "exact.gguf").items():
        writer.add_tensor(name, np.ascontiguousarray(tensor[:, ::-1]) if name in turned else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = list_plain_tensors(side, loaded)
    reader = read_gguf(tmp_path / "turned.gguf")
    tensors = describe_tensors(reader, side)
    same = find_same_channels(reader.tensors, tensors, plain)
    assert set(tensors.weights) - set(same) == turned


@needs_converter
def test_refused(world: Path, tmp_path: Path) -> None:
    """What is not a matrix, or of another model, or of no use."""
    (tmp_path / "text.gguf").write_bytes(b"not a matrix at all")
    (tmp_path / "empty.dat").write_bytes(struct.pack("<i", 0))
    source, output = world / "model", tmp_path / "out.gguf"
    for given in ("text.gguf", "empty.dat"):
        with pytest.raises(CheckpointError, match="is not an importance matrix"):
            compressknow.export(source, output, type="q4_0", imatrix=tmp_path / given)
    with pytest.raises(CheckpointError, match="is not an importance matrix"):
        compressknow.export(source, output, type="q4_0", imatrix=world / "with.gguf")
    with pytest.raises(UsageError, match="no such file"):
        compressknow.export(source, output, type="q4_0", imatrix=tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="cannot be combined"):
        compressknow.export(source, output, type="q4_0", imatrix=world / "matrix.gguf", calibration="self")
    with pytest.raises(UsageError, match="nothing to calibrate"):
        compressknow.export(source, output, type="f16", calibration="self")
    with pytest.raises(UsageError, match="no calibration text"):
        compressknow.export(source, output, type="q4_0", calibration="nowhere.txt")
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, output, type="q4_0", calibration="self", imatrix_out=world / "matrix.gguf")
    assert not output.exists()


@needs_converter
def test_of_another_model(world: Path, tmp_path: Path) -> None:
    """A matrix of other widths is refused, by the name of a tensor."""
    other = save_checkpoint("t5", tmp_path / "t5")
    with pytest.raises(CheckpointError, match="of another model"):
        compressknow.export(other, tmp_path / "out.gguf", type="q4_0", imatrix=world / "matrix.gguf")
