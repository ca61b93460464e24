"""An export to a given size keeps to it, chooses types, and loses less with GPTQ."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as hf

pytest.importorskip("llama_cpp_py_sync")

import compressknow
from compressknow.base.errors import OutputError, UnsupportedError, UsageError
from compressknow.base.files import find_cache_folder
from compressknow.base.format import parse_size
from compressknow.cli import main
from compressknow.gguf.choice import SizeFit, TypeChoice
from compressknow.gguf.converter import find_converter
from compressknow.gguf.export import prepare_export, write
from compressknow.gguf.gptq import batch_sequences
from compressknow.gguf.grids import get_nbytes, list_legal_types, roundtrip
from compressknow.gguf.record import read_record
from compressknow.study.allocation import SizeTarget, fit_types
from compressknow.study.sensitivity import Guidance, Rounding, Sensitivity, TensorSensitivity
from tests.evaluate.layouts import write_jsonl
from tests.gguf.making import (
    convert_to_llama_cpp,
    get_llama_cpp_name,
    needs_converter,
    read_tensors,
    read_types,
    read_weights,
    save_checkpoint,
    write_sentences,
)
from tests.knowing import KNOWN_FACTS
from tests.long import long, one_in

TEXTS = [
    batch_sequences(torch.randint(0, 400, (24, 40), generator=torch.Generator().manual_seed(0)).tolist()),
    batch_sequences(torch.randint(0, 400, (60, 9), generator=torch.Generator().manual_seed(1)).tolist()),
]


def make_sensitivity(source) -> Sensitivity:
    """Return a sensitivity by the error of each random weight; any figures will do."""
    rows = []
    for weight in source.structure.linears:
        name = source.structure.tied.get(weight.parameter, weight.parameter)
        exact = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(rows))).numpy()
        by_type = {
            kind: Rounding(get_nbytes(kind, weight.shape), float(np.square(roundtrip(exact, kind) - exact).mean()), 0.0)
            for kind in list_legal_types(weight.shape[-1])
        }
        rows.append(TensorSensitivity(name, weight.shape, weight.group, weight.layer, by_type))
    return Sensitivity("0" * 64, Guidance("gguf", ("q8_0",), 40, "1" * 64, 1000, "2" * 64), tuple(rows))


def export_to_size(source: Path, output: Path, target: SizeTarget):
    """Export to a size; return the record."""
    job = prepare_export(source, TypeChoice("f16"), find_converter(None, fetch=True))
    sensitivity = make_sensitivity(job.source)
    fit = SizeFit(
        target.label,
        target.budget(job.numel),
        lambda tensors, overhead: fit_types(sensitivity, tensors, overhead, target),
        target.rounding,
        TEXTS,
    )
    return write(replace(job, fit=fit), output)


@needs_converter
@pytest.mark.parametrize("name", one_in(2, ["llama-tied", "llama"]))
def test_a_file_keeps_to_its_size_and_gptq_lowers_the_error(name: str, tmp_path: Path) -> None:
    """Both roundings have the same size; the error is that of layers' outputs on the texts."""
    source = save_checkpoint(name, tmp_path / "model", torch.bfloat16)
    budget, errors = 800_000, {}
    for rounding in ("nearest", "gptq"):
        output = tmp_path / f"{rounding}.gguf"
        record = export_to_size(source, output, SizeTarget(budget, rounding=rounding))
        assert 0.97 * budget < output.stat().st_size == record["bytes"] <= budget
        chosen = {rule[0].replace("\\", "").strip("^$"): rule[1] for rule in record["types"]}
        assert {key: read_types(output)[key] for key in chosen} == chosen
        assert len(set(chosen.values())) > 2
        errors[rounding] = measure_output_errors(source, output)
    # An embedding that is no head multiplies nothing, so GPTQ does not round it.
    assert record["fit"]["compensated"] == len(chosen) - (name == "llama")
    better = [errors["gptq"][key] < errors["nearest"][key] for key in errors["gptq"]]
    assert sum(better) >= 0.9 * len(better)
    assert sum(errors["gptq"].values()) < 0.8 * sum(errors["nearest"].values())


@needs_converter
def test_gptq_keeps_the_zeros_of_a_pruned_checkpoint(tmp_path: Path) -> None:
    source = save_checkpoint("llama-tied", tmp_path / "model", torch.bfloat16)
    compressknow.convert(source, tmp_path / "pruned", prune=0.5, scope="feed-forward")
    must = (("feed-forward", "q8_0"), ("ffn_down", "q3_k"))
    record = export_to_size(tmp_path / "pruned", tmp_path / "out.gguf", SizeTarget(1_200_000, must=must))
    assert record["fit"]["compensated"]
    stored, written = convert_to_llama_cpp(read_weights(tmp_path / "pruned")), read_tensors(tmp_path / "out.gguf")
    pruned = {name: stored[name] == 0 for name in stored if "ffn" in name and "norm" not in name}
    assert sum(map(np.sum, pruned.values())) >= 0.5 * sum(zero.size for zero in pruned.values())
    assert all((written[name][zero] == 0).all() for name, zero in pruned.items())


@needs_converter
def test_a_large_enough_file_keeps_weights_unrounded(tmp_path: Path) -> None:
    source = save_checkpoint("llama-tied", tmp_path / "model", torch.float32)
    nbytes = sum(array.nbytes for array in read_weights(source).values())
    record = export_to_size(source, tmp_path / "a.gguf", SizeTarget(int(0.9 * nbytes), rounding="nearest"))
    assert record["bytes"] <= 0.9 * nbytes
    assert "f32" in {read_types(tmp_path / "a.gguf")[name] for name in read_types(tmp_path / "a.gguf") if "ffn" in name}


@needs_converter
def test_a_long_recipe_in_the_metadata_counts_towards_the_size(tmp_path: Path) -> None:
    source = save_checkpoint("llama-tied", tmp_path / "model", torch.bfloat16)
    chosen = "|".join(f"layers.{layer}.self_attn" for layer in range(500))
    compressknow.convert(source, tmp_path / "pruned", prune=0.2, include=[chosen])
    record = export_to_size(tmp_path / "pruned", tmp_path / "out.gguf", SizeTarget(724_000, rounding="nearest"))
    assert record["bytes"] == (tmp_path / "out.gguf").stat().st_size <= 724_000


@needs_converter
def test_an_export_by_type_is_not_taken_for_one_by_size(tmp_path: Path) -> None:
    source = save_checkpoint("llama-tied", tmp_path / "model", torch.bfloat16)
    compressknow.export(source, tmp_path / "a.gguf")
    assert not compressknow.export(source, tmp_path / "a.gguf").is_new
    with pytest.raises(OutputError, match="exists already"):
        compressknow.export(source, tmp_path / "a.gguf", size=800_000)


@needs_converter
def test_gptq_rounds_both_halves_of_a_split_expert_weight(tmp_path: Path) -> None:
    """transformers has one weight for gate and up, llama.cpp two tensors."""
    source, output = save_checkpoint("mixtral", tmp_path / "model", torch.bfloat16), tmp_path / "out.gguf"
    text = str(write_sentences(tmp_path / "text.txt"))
    options = {"guide": "text", "calibration": text, "calibration_tokens": 512, "smoke": False}
    record = compressknow.export(source, output, bits=8.6, **options)
    # The embedding is left out, because it multiplies nothing.
    rounded = {name for name, kind in read_types(output).items() if kind not in ("bf16", "f32")} - {"token_embd.weight"}
    assert len([name for name in rounded if "_exps" in name]) == 6
    assert record["fit"]["compensated"] == len(rounded)
    compressknow.export(source, tmp_path / "nearest.gguf", recipe=tmp_path / "out.gguf.json", smoke=False)
    ours, theirs = read_tensors(output), read_tensors(tmp_path / "nearest.gguf")
    for name in rounded:
        change = np.abs(ours[name] - theirs[name]).reshape(len(ours[name]) if "_exps" in name else 1, -1).mean(axis=1)
        assert ((change > 0) & (change < 0.1 * np.abs(theirs[name]).mean())).all(), name


@needs_converter
def test_a_size_too_small_for_experts_is_refused_before_measuring(tmp_path: Path) -> None:
    source = save_checkpoint("mixtral", tmp_path / "model", torch.bfloat16)
    with pytest.raises(UsageError, match=r"too small(.|\n)*Experts are not measured"):
        compressknow.export(source, tmp_path / "out.gguf", bits=6, guide="text")


@needs_converter
def test_a_size_too_small_for_the_vocabulary_is_refused_before_measuring(tmp_path: Path) -> None:
    """It is a little above that of the weights, which the first message gives."""
    source, output = save_checkpoint("llama-tied", tmp_path / "model", torch.bfloat16), tmp_path / "out.gguf"
    stages: list[str] = []
    with pytest.raises(UsageError, match="Give more than that, since vocabulary and norms count too") as refused:
        compressknow.export(source, output, size=300_000)
    weights = parse_size(re.search(r"the weights alone take (.*)\.", refused.value.what)[1])
    with pytest.raises(UsageError, match=r"the smallest file has (.|\n)* of vocabulary, norms and metadata"):
        compressknow.export(
            source, output, size=int(1.01 * weights), on_progress=lambda progress: stages.append(progress.stage.work)
        )
    assert set(stages) == {"export"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@needs_converter
def test_must_gives_experts_fewer_than_8_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = save_checkpoint("mixtral", tmp_path / "model", torch.bfloat16), tmp_path / "out.gguf"
    text = str(write_sentences(tmp_path / "text.txt"))
    options = ["--guide", "text", "--calibration", text, "--calibration-tokens", "512"]
    assert main(["export", str(source), str(output), "--bits", "6", "--must", "_exps=q3_k", *options]) == 0
    assert "Predicted KL of text without the experts: " in capsys.readouterr().out
    record = read_record(output)
    assert {kind for name, kind in read_types(output).items() if "_exps" in name} == {"q3_k"}
    assert record["bytes"] == output.stat().st_size <= record["totals"]["parameters"] * 6 / 8


@needs_converter
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("attention", "f16"), r"`must` f16: blk.0.attn_q.weight(.|\n)*the only float type is its own"),
        (("nowhere", "q8_0"), "'nowhere' is not a scope, and matches no tensor"),
    ],
    ids=["type", "name"],
)
def test_a_rule_that_no_weight_can_follow_is_refused_before_anything_is_measured(
    rule: tuple[str, str], message: str, tmp_path: Path
) -> None:
    source = save_checkpoint("llama", tmp_path / "model", torch.float32)
    stages: list[str] = []
    with pytest.raises(UsageError, match=message):
        compressknow.export(
            source,
            tmp_path / "out.gguf",
            size=2_000_000,
            must=[rule],
            on_progress=lambda progress: stages.append(progress.stage.work),
        )
    assert set(stages) == {"export"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def measure_output_errors(source: Path, output: Path) -> dict[str, float]:
    """Return ||X (W - W')^T||^2 over ||X W^T||^2 of each Linear layer, X being its inputs on the texts."""
    model = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    stored, written = convert_to_llama_cpp(read_weights(source)), read_tensors(output)
    products: dict[str, torch.Tensor] = {}

    def make_hook(name: str) -> Callable[..., None]:
        def add(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
            rows = arguments[0].flatten(0, 1)
            products[name] = products.get(name, torch.zeros(rows.shape[1], rows.shape[1])) + rows.T @ rows

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and get_llama_cpp_name(name) in stored:
            module.register_forward_hook(make_hook(get_llama_cpp_name(name)))
    with torch.no_grad():
        for batch in (*TEXTS[0], *TEXTS[1]):
            model(**batch)
    errors = {}
    for name, product in products.items():
        weight, change = (torch.from_numpy(array) for array in (stored[name], written[name] - stored[name]))
        errors[name] = float(((change @ product) * change).sum() / ((weight @ product) * weight).sum())
    return errors


def save_model_and_facts(folder: Path) -> tuple[Path, str]:
    """Write a model, and facts with two candidates, about half of which even a random model answers correctly."""
    facts = [
        {
            "id": f"{verb}{number}",
            "prompt": f"{fact.sub_label} {verb} [MASK].",
            "obj_label": obj,
            "candidates": [obj, other],
        }
        for verb in ("likes", "sees", "knows")
        for number, (fact, next_fact) in enumerate(pairwise(KNOWN_FACTS))
        for obj, other in [(fact.obj_label, next_fact.obj_label)]
        if obj != other
    ]
    write_jsonl(folder / "facts.jsonl", facts)
    return save_checkpoint("llama-tied", folder / "model", torch.bfloat16), f"facts:{folder / 'facts.jsonl'}"


@needs_converter
def test_the_command_line_prints_the_choice_and_measures_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, facts = save_model_and_facts(tmp_path)
    text = write_sentences(tmp_path / "text.txt")
    options = ["--facts", facts, "--calibration", str(text), "--must", "attention=q8_0"]
    assert main(["export", str(source), str(tmp_path / "a.gguf"), "--size", "900kB", *options]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("900.0 kB by facts and text, gptq, attention q8_0: ")
    assert lines[2].split()[:3] == ["Layer", "attn_k", "attn_output"]
    assert [line.split()[0] for line in lines[3:5]] == ["0", "1"]
    assert "Predicted KL of facts plus text: 0." in printed
    record = read_record(tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").stat().st_size <= 900_000
    assert record["fit"]["must"] == [["attention", "q8_0"]]
    # Only llama.cpp's own rounding uses a matrix.
    assert "importance" not in record
    assert record["fit"]["facts"] >= 30
    # For another size nothing is evaluated or measured again.
    stages = []
    compressknow.export(
        source,
        tmp_path / "b.gguf",
        bits=8.0,
        facts=options[1],
        calibration=str(text),
        rounding="nearest",
        on_progress=lambda progress: stages.append(progress.stage.work),
    )
    assert "evaluate" not in stages
    by_size, by_bits = (set(read_types(tmp_path / f"{name}.gguf").values()) - {"f32"} for name in "ab")
    assert by_size != by_bits
    # Each rule names one tensor: that of output.weight, no attn_output.weight.
    names = read_types(tmp_path / "a.gguf")
    assert all(sum(bool(re.search(rule, name)) for name in names) == 1 for rule, _ in record["types"])
    # The record is a recipe for the same types, rounded by llama.cpp.
    again = compressknow.export(source, tmp_path / "c.gguf", recipe=tmp_path / "a.gguf.json")
    assert read_types(tmp_path / "c.gguf") == read_types(tmp_path / "a.gguf")
    assert again.setup == f"{record['type']} ({len(record['types'])} rules)"


@needs_converter
def test_a_quantized_checkpoint_is_refused_before_it_is_evaluated(tmp_path: Path) -> None:
    source, facts = save_model_and_facts(tmp_path)
    compressknow.convert(source, tmp_path / "int8", quantize="int8-weights")
    stages = []
    options = {"size": "900kB", "facts": facts, "on_progress": lambda progress: stages.append(progress.stage.work)}
    with pytest.raises(UnsupportedError, match="is quantized already"):
        compressknow.export(tmp_path / "int8", tmp_path / "a.gguf", **options)
    with pytest.raises(UnsupportedError, match="is quantized already"):
        compressknow.search(tmp_path / "int8", tmp_path / "found", **options)
    assert set(stages) <= {"fetch", "hash"}


@needs_converter
def test_a_place_without_room_for_the_file_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has room for the floats that come first, but not for two copies of the file."""
    source, stages = save_checkpoint("llama-tied", tmp_path / "model", torch.bfloat16), list[str]()
    numel = sum(array.size for array in read_weights(source).values())
    free = int(1.2 * 2 * numel)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OutputError, match=r"needs about .* of disk while it is made"):
        compressknow.export(
            source,
            tmp_path / "out.gguf",
            size=int(0.9 * 2 * numel),
            on_progress=lambda progress: stages.append(progress.stage.work),
        )
    assert set(stages) == {"export"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"out\.gguf cannot be written"):
        compressknow.export(source, tmp_path / "file" / "out.gguf", size=int(0.9 * 2 * numel))


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (["--size", "90MB"], "Any answers so far are saved. Repeat the command to resume."),
        (["--bits", "4"], "Any answers so far are saved. Repeat the command to resume."),
        (["--type", "q4_k_m"], "Nothing was written."),
    ],
)
def test_an_interrupted_export_says_whether_it_resumes(
    options: list[str], note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compressknow.api.export.check_is_checkpoint", interrupt)
    assert main(["export", "model", str(tmp_path / "a.gguf"), *options]) == 130
    assert capsys.readouterr().err.strip() == f"Interrupted. {note}"


@needs_converter
@long
@pytest.mark.parametrize("stage", ["round", "sensitivity"])
def test_a_killed_export_leaves_nothing_and_its_repetition_gives_the_same_bytes(stage: str, tmp_path: Path) -> None:
    source, facts = save_model_and_facts(tmp_path)
    options = {"size": "900kB", "facts": facts, "calibration": str(write_sentences(tmp_path / "text.txt"))}
    program = (
        "import os, sys, compressknow\n"
        "def dies(progress):\n"
        "    if (progress.stage.work, progress.state) == (sys.argv[3], 'advances'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "compressknow.export(sys.argv[1], sys.argv[2], **eval(sys.argv[4]), on_progress=dies)\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    shutil.copytree(find_cache_folder() / "converter", tmp_path / "cache" / "compressknow" / "converter")
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "a.gguf"
    for number, killed_at in enumerate([stage, "nothing"]):
        done = subprocess.run(
            [sys.executable, "-c", program, source, output, killed_at, repr(options)], env=environment, check=False
        )
        assert done.returncode == (-9 if number == 0 else 0)
        assert output.exists() == bool(number)
    assert {path.name for path in output.parent.iterdir()} == {"a.gguf", "a.gguf.json"}
    compressknow.export(source, tmp_path / "b.gguf", **options)
    assert (tmp_path / "b.gguf").read_bytes() == output.read_bytes()
