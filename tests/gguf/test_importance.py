"""The importance matrix equals a plain reference, lowers the error, and has llama.cpp's names and format."""

from __future__ import annotations

import json
import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import compressknow
from compressknow.base.errors import CheckpointError, CompressknowError, OutputError, UsageError
from compressknow.cli import main
from compressknow.compress.calibrate.text import read_calibration_text
from compressknow.compress.steps import Calibration
from compressknow.compress.weights import Values, read_stored_weights
from compressknow.gguf.choice import NEED_IMPORTANCE, list_file_types
from compressknow.gguf.converter import quantize
from compressknow.gguf.importance import Importance, check_model, check_source, read_importance, write_importance
from compressknow.gguf.plain import find_same_channels, list_plain_tensors
from compressknow.gguf.record import read_record
from compressknow.gguf.tensors import Tensors, describe_tensors
from compressknow.model.gguf_file import Tensor, read_gguf
from compressknow.model.loading import open_complete
from compressknow.model.tensors import read_header
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
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, a text, the matrix of both, and `with.gguf`, which was rounded with the matrix."""
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


def read_batches(folder: Path) -> list[torch.Tensor]:
    _, tree = open_complete(folder / "model")
    text = read_calibration_text(folder / "model", tree, Calibration(str(folder / "text.txt"), 4096))
    return [batch["input_ids"] for batch in text.batches]


def sum_squares(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    """Return the sums of squares of inputs of each nn.Linear in transformers' model, and the number of tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    sums: dict[str, np.ndarray] = {}

    def make_hook(name: str):
        def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            squares = inputs[0].double().square().flatten(0, -2).sum(0).numpy()
            sums[name] = sums.get(name, 0) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(make_hook(get_llama_cpp_name(name)))
    tokens = 0
    with torch.no_grad():
        for batch in read_batches(folder):
            model(batch)
            tokens += batch.numel()
    return sums, tokens


@needs_converter
def test_the_matrix_equals_sums_by_hooks(files: Path) -> None:
    matrix, (expected, tokens) = read_importance(files / "matrix.gguf"), sum_squares(files)
    assert matrix.sums.keys() == expected.keys()
    assert "output.weight" in matrix.sums
    for name, squares in expected.items():
        np.testing.assert_allclose(matrix.sums[name][0], squares, rtol=1e-4, err_msg=name)
        assert matrix.counts[name].tolist() == [tokens]
    assert matrix.chunks * matrix.chunk == tokens
    text = read_record(files / "with.gguf")["importance"]["sha256"]
    assert matrix.datasets == (f"{files / 'text.txt'}, seed 0, sha256 {text}",)
    recipe = json.loads(str(read_metadata(files / "with.gguf")["compressknow.recipe"]))
    assert recipe["export"]["importance"] == read_record(files / "with.gguf")["importance"]


@needs_converter
def test_the_file_has_the_format_of_llama_imatrix(files: Path) -> None:
    """Names, shapes and keys of tools/imatrix/imatrix.cpp, which llama-quantize reads."""
    metadata = read_metadata(files / "matrix.gguf")
    assert metadata["general.type"] == "imatrix"
    assert {"imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"} <= metadata.keys()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(files / "matrix.gguf").tensors}
    assert list(stored["blk.0.ffn_down.weight.in_sum2"].shape) == [512, 1]
    assert list(stored["blk.0.ffn_down.weight.counts"].shape) == [1, 1]
    assert {tensor.tensor_type.name for tensor in stored.values()} == {"F32"}


@needs_converter
def test_a_matrix_of_another_model_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A conversion of the model may use its matrix; a matrix that names no model is used with a warning."""
    matrix, other = files / "matrix.gguf", save_checkpoint("llama", files / "other", torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"matrix\.gguf is of another model: it names [0-9a-f]{16}"):
        compressknow.export(other, files / "other.gguf", type="q3_k_m", imatrix=matrix)
    compressknow.convert(files / "model", files / "pruned", prune=0.2)
    record = compressknow.export(files / "pruned", files / "pruned.gguf", type="q3_k_m", imatrix=matrix)
    assert record["importance"]["identified"] is True
    sums = dict(read_importance(matrix).sums)
    del sums["blk.0.attn_q.weight"]
    write_importance(replace(read_importance(matrix), models=(), sums=sums), files / "foreign.gguf")
    command = ["export", str(other), str(files / "other.gguf"), "--type", "q3_k_m"]
    assert main([*command, "--imatrix", str(files / "foreign.gguf")]) == 0
    assert "! foreign.gguf does not say which model it was made from" in capsys.readouterr().out
    importance = read_record(files / "other.gguf")["importance"]
    assert (importance["tensors"], importance["without"]) == (len(sums), ["blk.0.attn_q.weight"])


@needs_converter
def test_the_matrix_lowers_the_error_of_outputs(files: Path) -> None:
    compressknow.export(files / "model", files / "without.gguf", type="q2_k")
    exact, means = convert_to_llama_cpp(read_weights(files / "model")), read_importance(files / "matrix.gguf").means()
    with_matrix, without = read_tensors(files / "with.gguf"), read_tensors(files / "without.gguf")
    kinds = read_types(files / "with.gguf")
    assert kinds == read_types(files / "without.gguf")

    def measure_error(rounded: dict[str, np.ndarray], name: str) -> float:
        return float((means[name] * (rounded[name] - exact[name]) ** 2).sum())

    coarse = [name for name in means if kinds[name] in ("q2_k", "q3_k")]
    better = [measure_error(with_matrix, name) < measure_error(without, name) for name in coarse]
    assert len(better) >= 10
    assert all(better)


@needs_converter
def test_a_stored_matrix_gives_the_same_weights(files: Path) -> None:
    """`imatrix` reads what `imatrix_out` wrote, and the older .dat format."""
    matrix = read_importance(files / "matrix.gguf")
    old_form = files / "matrix.dat"
    with old_form.open("wb") as file:
        file.write(struct.pack("<i", len(matrix.sums)))
        for name, sums in matrix.sums.items():
            calls = int(matrix.counts[name][0])
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, sums.size))
            file.write(sums.astype("<f4").tobytes())
    expected = read_tensors(files / "with.gguf")
    for path in (files / "matrix.gguf", old_form):
        output = files / f"{path.suffix[1:]}-again.gguf"
        record = compressknow.export(files / "model", output, type="q2_k", imatrix=path)
        assert record["importance"]["source"] == path.name
        weights = read_tensors(output)
        assert all(np.array_equal(weights[name], weight) for name, weight in expected.items())
        assert not compressknow.export(files / "model", output, type="q2_k", imatrix=path).is_new
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(files / "model", output, type="q2_k", imatrix=files / "matrix.gguf")


@needs_converter
def test_types_that_need_a_matrix_are_refused_without(files: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only with an importance matrix"):
        compressknow.export(files / "model", tmp_path / "out.gguf", type="iq2_xxs")
    with pytest.raises(UsageError, match="only with an importance matrix"):
        compressknow.export(files / "model", tmp_path / "out.gguf", type_of={"attention": "iq1_s"})
    assert not list(tmp_path.iterdir())
    record = compressknow.export(files / "model", tmp_path / "out.gguf", type="iq2_xxs", imatrix=files / "matrix.gguf")
    assert "iq2_xxs" in record.groups["feed-forward"]
    assert record.setup == "iq2_xxs (imatrix)"


@long
@needs_converter
def test_the_types_that_need_a_matrix_are_those_of_llama_cpp(files: Path, tmp_path: Path) -> None:
    compressknow.export(files / "model", tmp_path / "exact.gguf", type="f32")
    for number, kind in enumerate(list_file_types()):
        reason = ""
        try:
            quantize(tmp_path / "exact.gguf", tmp_path / f"{number}.gguf", kind, tmp_path)
        except CompressknowError as error:
            reason = str(error)
        assert ("requires an imatrix" in reason) == bool(reason) == (kind in NEED_IMPORTANCE), (kind, reason)


@needs_converter
@pytest.mark.parametrize("name", one_in(2, ["mixtral", "t5", "llama-tied"]))
def test_experts_tied_embeddings_and_encoders_are_in_the_matrix(name: str, tmp_path: Path) -> None:
    """Each expert has a row, and a tied embedding is the final layer."""
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
        # Each token is routed to two of two experts.
        assert made.counts["blk.1.ffn_gate_exps.weight"].tolist() == [2048, 2048]
        np.testing.assert_array_equal(made.sums["blk.0.ffn_gate_exps.weight"], made.sums["blk.0.ffn_up_exps.weight"])
    if name == "t5":
        assert {
            "enc.blk.0.attn_q.weight",
            "dec.blk.1.cross_attn_k.weight",
            "dec.blk.0.ffn_down.weight",
        } <= made.sums.keys()


@needs_converter
def test_each_expert_has_the_sums_of_its_own_tokens_if_they_are_enough(tmp_path: Path) -> None:
    """The checkpoint stores experts one by one, in the order 0, 1, 10, 11, 2; llama.cpp stacks them by number."""
    source, path = save_checkpoint("mixtral-12", tmp_path / "model"), write_sentences(tmp_path / "text.txt")
    options = {"calibration": str(path), "calibration_tokens": 192, "imatrix_out": tmp_path / "matrix.gguf"}
    compressknow.export(source, tmp_path / "out.gguf", type="q4_0", **options)
    matrix = read_importance(tmp_path / "matrix.gguf")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2]))
    _, tree = open_complete(source)
    for batch in read_calibration_text(source, tree, Calibration(str(path), 192)).batches:
        with torch.no_grad():
            model(batch["input_ids"])
    hidden, chosen = (torch.cat(parts) for parts in zip(*seen, strict=True))
    reads = [hidden[(chosen == expert).any(dim=1)].square() for expert in range(12)]
    enough = np.array([len(each) >= 32 for each in reads])
    assert 0 < enough.sum() < 12
    name = "blk.0.ffn_gate_exps.weight"
    assert matrix.counts[name].tolist() == [len(each) if len(each) >= 32 else 0 for each in reads]
    expected = np.stack([each.sum(0) if len(each) >= 32 else torch.zeros(64) for each in reads])
    np.testing.assert_allclose(matrix.sums[name], expected, rtol=1e-4)
    # The others weigh all channels alike.
    means = matrix.means()[name].reshape(12, -1)
    assert (means[~enough] == 1).all()
    np.testing.assert_allclose(means[enough], np.stack([each.mean(0) for each in reads])[enough], rtol=1e-4)


@needs_converter
def test_a_quantized_checkpoint_has_a_matrix(files: Path, tmp_path: Path) -> None:
    compressknow.convert(files / "model", tmp_path / "small", quantize="int8", drop_blocks="1")
    record = compressknow.export(
        tmp_path / "small",
        tmp_path / "out.gguf",
        type="q4_k_m",
        calibration=str(files / "text.txt"),
        calibration_tokens=2048,
        imatrix_out=tmp_path / "matrix.gguf",
    )
    assert record["importance"]["tensors"] == 8
    assert record["importance"]["tokens"] == 2048
    source = record["source"]
    assert read_importance(tmp_path / "matrix.gguf").models == (source["sha256"], source["original_sha256"])


@needs_converter
def test_the_text_that_a_model_writes_gives_the_same_bytes_by_its_seed(files: Path, tmp_path: Path) -> None:
    options = {"type": "q4_0", "calibration": "self", "calibration_tokens": 1024, "seed": 3}
    source, one, other = files / "model", tmp_path / "a.gguf", tmp_path / "b.gguf"
    compressknow.export(source, one, **options)
    compressknow.export(source, other, **options, imatrix_out=tmp_path / "matrix.gguf")
    assert one.read_bytes() == other.read_bytes()
    assert not compressknow.export(source, other, **options, imatrix_out=tmp_path / "matrix.gguf").is_new
    # Another text would give another file.
    for change in ({"seed": 4}, {"calibration_tokens": 2048}, {"calibration": str(files / "text.txt")}):
        with pytest.raises(OutputError, match="exists already"):
            compressknow.export(source, other, **options | change)
    # Now the matrix of another model, or of another text of the model, is in its place.
    matrix = read_importance(tmp_path / "matrix.gguf")
    assert "self, seed 3, sha256 " in matrix.datasets[0]
    other_text = matrix.datasets[0].replace("seed 3", "seed 4")
    for replaced in (replace(matrix, models=("0" * 64,)), replace(matrix, datasets=(other_text,))):
        write_importance(replaced, tmp_path / "matrix.gguf")
        with pytest.raises(OutputError, match="exists already"):
            compressknow.export(source, other, **options, imatrix_out=tmp_path / "matrix.gguf")


@needs_converter
def test_a_missing_modelfile_is_written_by_the_same_export(files: Path, tmp_path: Path) -> None:
    text, output, modelfile = tmp_path / "text.txt", tmp_path / "out.gguf", tmp_path / "Modelfile"
    text.write_bytes((files / "text.txt").read_bytes())
    options = {"type": "q4_0", "calibration": str(text), "calibration_tokens": 1024, "modelfile": modelfile}
    compressknow.export(files / "model", output, **options)
    content = modelfile.read_text()
    modelfile.unlink()
    assert not compressknow.export(files / "model", output, **options).is_new
    assert modelfile.read_text() == content
    # Another text of the same name would give another file.
    text.write_text("What is " + text.read_text())
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(files / "model", output, **options)


@needs_converter
def test_tensors_with_reordered_channels_do_not_match(files: Path, tmp_path: Path) -> None:
    compressknow.export(files / "model", tmp_path / "exact.gguf", type="f32")
    source, _ = open_complete(files / "model")
    weights = read_stored_weights(source)
    reordered = {"blk.0.attn_output.weight"}
    writer = gguf.GGUFWriter(tmp_path / "turned.gguf", "llama")
    writer.add_block_count(2)
    for name, tensor in read_tensors(tmp_path / "exact.gguf").items():
        writer.add_tensor(name, np.ascontiguousarray(tensor[:, ::-1]) if name in reordered else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = list_plain_tensors(weights, source)
    reader = read_gguf(tmp_path / "turned.gguf")
    tensors = describe_tensors(reader, weights)
    same = find_same_channels(reader.tensors, tensors, plain)
    assert set(tensors.weights) - set(same) == reordered


def test_channels_are_compared_in_whatever_form_the_converter_stores_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may permute, join, stack and transpose; channels in another order never match. Weights span several blocks."""
    monkeypatch.setattr("compressknow.compress.blocks.BLOCK_ELEMENTS", 64)
    monkeypatch.setattr("compressknow.gguf.plain._BLOCK", 64)
    draw = np.random.default_rng(0).standard_normal
    shapes = {"permuted": (12, 40), "transposed": (40, 12), "key": (4, 40), "stacked": (3, 20, 8)}
    stored = {name: draw(shape, np.float32) for name, shape in (shapes | {"experts": (3, 8, 20)}).items()}
    save_file({name: torch.from_numpy(weight) for name, weight in stored.items()}, tmp_path / "weights.safetensors")
    plain = {name: Values(tensor) for name, tensor in read_header(tmp_path / "weights.safetensors").items()}
    forms = {
        "permuted": (("permuted",), stored["permuted"][::-1]),
        "transposed": (("transposed",), stored["transposed"].T),
        "joined": (("permuted", "key"), np.concatenate([stored["permuted"], stored["key"]])),
        "stacked": (("stacked",), stored["stacked"]),
        "stacked, transposed": (("experts",), stored["experts"].swapaxes(1, 2)),
    }
    writer = gguf.GGUFWriter(tmp_path / "exact.gguf", "llama")
    for name, (_, weight) in forms.items():
        writer.add_tensor(name, np.ascontiguousarray(weight))
        writer.add_tensor(f"{name}, reordered", np.ascontiguousarray(np.roll(weight, 1, axis=-1)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    exact = read_gguf(tmp_path / "exact.gguf").tensors
    parts = {each.name: forms[each.name.removesuffix(", reordered")][0] for each in exact}
    assert find_same_channels(exact, Tensors(None, {}, {}, parts), plain) == list(forms)


@needs_converter
def test_a_dry_run_predicts_the_types_that_depend_on_a_matrix(tmp_path: Path) -> None:
    """With a matrix, llama.cpp's q4_0 has a q4_1 in the first of eight blocks."""
    source, matrix = save_checkpoint("llama-8-blocks", tmp_path / "model"), tmp_path / "matrix.gguf"
    text = {"calibration": str(write_sentences(tmp_path / "text.txt")), "calibration_tokens": 512}
    options = {"type": "q4_0", "smoke": False}
    exported = compressknow.export(source, tmp_path / "out.gguf", **text, imatrix_out=matrix, **options)
    assert exported.groups["feed-forward"].keys() == {"q4_0", "q4_1"}
    stages: list[str] = []
    for each in (text, {"imatrix": matrix}):
        dry = compressknow.export(
            source,
            tmp_path / "dry.gguf",
            dry_run=True,
            on_progress=lambda progress: stages.append(progress.stage.work),
            **each,
            **options,
        )
        assert dry.groups == exported.groups
    assert "gather" not in stages


@needs_converter
def test_invalid_matrices_and_options_are_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_bytes(b"not a matrix at all")
    (tmp_path / "empty.dat").write_bytes(struct.pack("<i", 0))
    source, output = files / "model", tmp_path / "out.gguf"
    for name in ("text.gguf", "empty.dat"):
        with pytest.raises(CheckpointError, match="is not an importance matrix"):
            compressknow.export(source, output, type="q4_0", imatrix=tmp_path / name)
    with pytest.raises(CheckpointError, match="is not an importance matrix"):
        compressknow.export(source, output, type="q4_0", imatrix=files / "with.gguf")
    with pytest.raises(UsageError, match="no such file"):
        compressknow.export(source, output, type="q4_0", imatrix=tmp_path / "none.gguf")
    with pytest.raises(UsageError, match="cannot be combined"):
        compressknow.export(source, output, type="q4_0", imatrix=files / "matrix.gguf", calibration="self")
    with pytest.raises(UsageError, match="there is no importance matrix to write"):
        compressknow.export(source, output, type="q4_0", imatrix_out=tmp_path / "out")
    with pytest.raises(UsageError, match="nothing to calibrate"):
        compressknow.export(source, output, type="f16", calibration="self")
    with pytest.raises(UsageError, match="no calibration text"):
        compressknow.export(source, output, type="q4_0", calibration="nowhere.txt")
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, output, type="q4_0", calibration="self", imatrix_out=files / "matrix.gguf")
    assert not output.exists()


def test_a_matrix_in_the_older_form_holds_means_times_calls(tmp_path: Path) -> None:
    """The name of the text may follow the entries."""
    path, tail = tmp_path / "imatrix.gguf", struct.pack("<ii", 3, 8) + b"text.txt"

    def pack(name: str, calls: int, values: list[float]) -> bytes:
        return struct.pack(f"<i{len(name)}sii{len(values)}f", len(name), name.encode(), calls, len(values), *values)

    entries = pack("a.weight", 4, [2, 8]) + pack("b.weight", 0, [3])
    path.write_bytes(struct.pack("<i", 2) + entries + tail)
    assert {name: each.tolist() for name, each in read_importance(path).means().items()} == {
        "a.weight": [0.5, 2],
        "b.weight": [3],
    }
    for content, message in (
        (struct.pack("<i", 2) + entries[:-4], "it is cut short"),
        (struct.pack("<i", 3) + entries, "is not an importance matrix"),
        (struct.pack("<i", -1) + entries, "a number in it is -1"),
        (struct.pack("<i", 1) + pack("a.weight", -4, [2, 8]), "a number in it is -4"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_importance(path)


def test_a_matrix_fits_models_of_one_original_and_tensors_of_its_size() -> None:
    """Of experts, a tensor has one matrix each."""
    sums = {"blk.0.ffn_up_exps.weight": np.ones((3, 8), np.float32)}
    importance = Importance(sums, {}, models=("pruned", "original"))
    for sources in (("pruned", "original"), ("quantized", "original"), ("original",)):
        check_source(importance, sources, "m.gguf")
    with pytest.raises(CheckpointError, match="it names pruned, and this one is other"):
        check_source(importance, ("other",), "m.gguf")
    for shape, fits in (((8, 4, 3), True), ((8, 4, 2), False), ((8, 4, 4), False), ((24, 4), True), ((8, 4), False)):
        tensor = Tensor("blk.0.ffn_up_exps.weight", "f16", shape, 0)
        with nullcontext() if fits else pytest.raises(CheckpointError, match=r"24 channels in it, and \d+ here"):
            check_model(importance, {tensor.name: tensor}, "m.gguf")


@needs_converter
def test_a_matrix_of_other_widths_is_refused(files: Path, tmp_path: Path) -> None:
    other = save_checkpoint("t5", tmp_path / "t5")
    with pytest.raises(CheckpointError, match="of another model"):
        compressknow.export(other, tmp_path / "out.gguf", type="q4_0", imatrix=files / "matrix.gguf")
    # A matrix that names no model is known by its tensors.
    foreign = tmp_path / "foreign.gguf"
    write_importance(replace(read_importance(files / "matrix.gguf"), models=()), foreign)
    with pytest.raises(CheckpointError, match=r"foreign\.gguf is of another model: none of its tensors"):
        compressknow.export(other, tmp_path / "out.gguf", type="q4_0", imatrix=foreign)
    assert not (tmp_path / "out.gguf").exists()
