"""`compressknow sensitivity` on tiny models that know facts: output, files, stored results and errors."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.base.format import share
from compressknow.cli import main
from compressknow.compress.steps import Calibration
from compressknow.engine.identity import locate
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.sources.sets import read_atlas
from compressknow.model.manifest import seal_manifest
from compressknow.study.guides import measure_guides, select_known_facts
from compressknow.study.measuring import GgufRoundings
from compressknow.study.sensitivity import Sensitivity, can_guide
from tests.evaluate.layouts import open_probe
from tests.knowing import KNOWN_FACTS, save_trained, write_bear, write_facts
from tests.pages.answering import make_answer, make_answers

pytest.importorskip("llama_cpp_py_sync")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "bert"):
        save_trained(family, folder / family)
    write_facts(folder / "facts.jsonl")
    lines = (folder / "facts.jsonl").read_text().splitlines()
    (folder / "few.jsonl").write_text("\n".join(lines[:20]) + "\n")
    write_bear(folder / "bear")
    text = " ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS * 4)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    shutil.copytree(folder / "llama", folder / "quantized")
    config = json.loads((folder / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "quantized" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def out(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output folder; the working directory has the models, and the cache is empty."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


OPTIONS = ("--facts", "facts:facts.jsonl", "--calibration", "text.txt", "--calibration-tokens", "512")


def test_sensitivity_keeps_the_stored_answers_of_a_report(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressknow.study.guides.EVALUATED", 40)
    compressknow.convert("llama", out / "pruned", prune=0.3)

    def list_work_of_report() -> set[str]:
        works: set[str] = set()
        compressknow.report(
            "llama",
            out / "pruned",
            "facts:facts.jsonl",
            on_progress=lambda progress: works.add(progress.stage.work),
        )
        return works

    assert "evaluate" in list_work_of_report()
    monkeypatch.setattr("compressknow.study.guides.TOKENS", 256)
    result = compressknow.sensitivity(
        "llama", facts="facts:facts.jsonl", calibration="text.txt", calibration_tokens=512
    )
    assert (result.guidance.facts, result.guidance.tokens) == (40, 256)
    assert "evaluate" not in list_work_of_report()


def test_the_tokens_of_the_whole_text_are_known_by_a_map_stored_before_they_were_counted_too(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of a file states them with the hash of the text, which GPTQ reads whole."""
    monkeypatch.setattr("compressknow.study.guides.TOKENS", 256)
    options = {"facts": OPTIONS[1], "calibration": "text.txt", "calibration_tokens": 512}
    first = compressknow.sensitivity("llama", **options)
    assert (first.guidance.tokens, first.guidance.text_tokens) == (256, 512)
    (file,) = (out.parent / "cache" / "compressknow" / "sensitivity").iterdir()
    guidance = replace(first.guidance, text_tokens=0)
    assert file.stem.endswith(hashlib.sha256(repr(guidance).encode()).hexdigest()[:16])
    stored = first.as_json()
    del stored["guidance"]["text_tokens"]
    file.write_text(json.dumps(seal_manifest({"sensitivity": stored})))
    works: list[str] = []
    again = compressknow.sensitivity("llama", **options, on_progress=lambda progress: works.append(progress.stage.work))
    assert "sensitivity" not in works
    assert (again, again.guidance.text_tokens) == (first, 512)


def test_corrected_domains_are_those_of_the_map(models: Path, out: Path) -> None:
    facts = write_facts(out / "facts.jsonl")
    options = {"facts": f"facts:{facts}", "calibration": models / "text.txt", "calibration_tokens": 512}
    first = compressknow.sensitivity(models / "llama", **options)
    rows = [json.loads(line) for line in facts.read_text().splitlines()]
    facts.write_text("".join(json.dumps(row | {"subject": "astronomy"}) + "\n" for row in rows))
    again = compressknow.sensitivity(models / "llama", **options)
    assert again.guidance == first.guidance
    assert again.domains == {"astronomy": again.guidance.facts}
    assert list(again.rows[0].by_domain) == ["astronomy"]


def test_command_prints_and_writes_the_map_and_measures_once(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [out / f"map.{suffix}" for suffix in ("html", "md", "json", "csv")]
    assert main(["sensitivity", "llama", *OPTIONS, *(word for file in files for word in ("-o", str(file)))]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("16 weights by facts and text: 64 known facts, ")
    # The suggested command stays on one line, with all options given here.
    assert max(len(line) for line in lines[:-1] if not line.startswith("Next: ")) <= 80
    assert printed.count("layer 0 ") + printed.count("layer 1 ") == 14
    # The first list begins with the most sensitive weight, the second with the least sensitive one.
    rows = [line for line in lines if line.startswith(("layer ", "final", "embedding"))]
    ranks = [float(row[50:64].replace(",", "")) for row in rows]
    most, least = ranks[: len(ranks) // 2], ranks[len(ranks) // 2 :]
    assert most == sorted(most, reverse=True)
    assert least == sorted(least)
    assert min(most) >= max(least)
    size = int(printed.partition("--size ")[2].partition("kB")[0])
    weights = sum(each.numel() for each in compressknow.load("llama").parameters())
    assert size == round(weights * 5 / 8 / 1000)
    assert "Next: compressknow export llama small.gguf --size " in printed
    assert lines[-1] == f"Written: {', '.join(map(str, files))}"

    values = json.loads(files[2].read_text())
    assert values["domains"] == {"geography": 32, "science": 32}
    risks = {share(row["by_type"]["q4_0"]["at_risk"]) for row in values["rows"]}
    assert {row[64:].strip() for row in rows} <= risks
    assert {row["group"] for row in values["rows"]} == {"attention", "feed-forward", "final", "embedding"}
    assert all(0 <= each["at_risk"] <= 1 for row in values["rows"] for each in row["by_type"].values())
    assert all(sum(row["by_domain"].values()) == pytest.approx(2) for row in values["rows"])
    with files[3].open(newline="") as file:
        assert {row["type"] for row in csv.DictReader(file)} == {"q8_0", "q5_0", "iq4_nl", "q4_0"}
    model = compressknow.load("llama")
    assert values["others"] == sum(each.numel() for name, each in model.named_parameters() if "norm" in name)

    assert main(["sensitivity", "llama", *OPTIONS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == values
    stages: list[str] = []
    again = compressknow.sensitivity(
        "llama",
        facts="facts:facts.jsonl",
        calibration="text.txt",
        calibration_tokens=512,
        guide="facts",
        on_progress=lambda progress: stages.append(progress.stage.work),
    )
    assert not {"evaluate", "sensitivity"} & set(stages)
    assert json.loads(json.dumps(again.as_json()["rows"])) == values["rows"]
    assert repr(again).startswith("<Sensitivity: 16 weights of ")
    # For GPTQ, the model reads each fact up to the last token of its object, which predicts nothing; and the text.
    handle, text = ModelHandle(locate("llama"), Settings()), Calibration("text.txt", 512)
    _, texts, _ = measure_guides(handle, [open_probe(OPTIONS[1])], text, "both", GgufRoundings(), None)
    of_facts, of_text = ([row for batch in each for row in batch["input_ids"].tolist()] for each in texts)
    sentences = handle.loaded.language_model.tokenizer([fact.sentence(fact.obj_label) for fact in KNOWN_FACTS])
    assert sorted(of_facts) == sorted(ids[:-2] for ids in sentences["input_ids"])
    assert len(of_text) * len(of_text[0]) == 512
    # The model's own samples depend on the seed, and nothing else does.
    one, other = (compressknow.sensitivity("llama", facts=OPTIONS[1], calibration_tokens=64, seed=n) for n in (0, 1))
    assert one.guidance.text != other.guidance.text
    shutil.rmtree(out.parent / "cache" / "compressknow" / "sensitivity")
    assert main(["sensitivity", "llama", *OPTIONS, "--seed", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == values
    # An existing file is not overwritten by default.
    assert main(["sensitivity", "llama", *OPTIONS, "-o", str(files[3])]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["sensitivity", "llama", *OPTIONS, "-o", str(files[3]), "--overwrite"]) == 0


def test_masked_model_is_measured_with_the_schemes_of_checkpoints(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sensitivity", "bert", *OPTIONS, "--guide", "facts", "-o", str(out / "map.json")]) == 0
    printed = capsys.readouterr().out
    command = "compressknow search bert -o found --keep 0.95 --to checkpoint --guide facts --facts facts:facts.jsonl"
    assert f"Next: {command} --calibration text.txt --calibration-tokens 512\n" in printed
    values = json.loads((out / "map.json").read_text())
    assert (values["guide"], values["guidance"]["form"]) == ("facts", "checkpoint")
    row = values["rows"][0]
    assert next(iter(row["by_type"])) == "int8-weights"
    # Scales are stored as the weights are: in float32.
    parameters = prod(row["shape"])
    assert row["by_type"]["int4/32"]["bytes"] == parameters // 2 + parameters // 32 * 4


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_sizes_of_a_checkpoint_are_those_of_its_files(
    dtype: torch.dtype, bits: int, models: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = out / "bert"
    shutil.copytree(models / "bert", original)
    weights = {name: weight.to(dtype) for name, weight in load_file(original / "model.safetensors").items()}
    save_file(weights, original / "model.safetensors", {"format": "pt"})
    words = [*OPTIONS, "--guide", "text", "-o", str(out / "map.json"), "-o", str(out / "map.md")]
    assert main(["sensitivity", str(original), *words]) == 0
    assert f"saves against {bits} bits." in " ".join(capsys.readouterr().out.split())
    page, values = (out / "map.md").read_text(), json.loads((out / "map.json").read_text())
    assert f"counted with {bits} bits each" in page
    assert f"rounding from {bits} to 4 bits saves" in page
    compressknow.convert(original, out / "int8", quantize="int8-weights")
    converted = load_file(out / "int8" / "model.safetensors")
    # The map does not count the shapes of packed weights.
    nbytes = sum(each.nbytes for name, each in converted.items() if not name.endswith("_shape"))
    assert (values["uniform"][0]["type"], values["uniform"][0]["bytes"]) == ("int8-weights", nbytes)
    row = Sensitivity.from_json(values).rows[0]
    assert row.saved == weights[row.name].nbytes - row.by_type[row.compared].bytes


def test_too_few_known_facts_are_refused_unless_a_text_guides(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sensitivity", "llama", "--facts", "facts:few.jsonl", *OPTIONS[2:]]
    assert main(words) == 2
    assert "llama knows 20 of 20 facts, and 30 are needed to guide." in capsys.readouterr().err
    assert main([*words, "--guide", "text", "-o", str(out / "map.md")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("16 weights by text: 512 tokens.\n")
    warning = "The model knows fewer than 30 of the facts, too few to measure which are at risk"
    for text in (printed, (out / "map.md").read_text()):
        assert warning in " ".join(text.replace("> ", "").split())
    assert " --guide text --facts facts:few.jsonl --calibration text.txt --calibration-tokens 512\n" in printed
    assert "Facts at risk" not in (out / "map.md").read_text().partition("## The most")[0]


def test_facts_that_guide_are_known_ones_evenly_over_relations() -> None:
    probe = read_atlas()
    by_relation = {name: [each for each in probe.facts if each.relation == name] for name in probe.examples}
    known = {fact.id for facts in by_relation.values() for fact in facts[1::2]}
    rows = [make_answer(0, fact.id in known, fact_id=fact.id, relation=fact.relation) for fact in probe.facts]
    (selected,) = select_known_facts(make_answers(rows), [probe])
    assert len(selected.facts) == 200
    assert known.issuperset(fact.id for fact in selected.facts)
    assert set(Counter(fact.relation for fact in selected.facts).values()) == {3, 4}


def test_thirty_facts_are_enough_to_guide() -> None:
    assert [can_guide(number, "", "text", is_search=False) for number in (29, 30)] == [False, True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("./nowhere", "no such folder"),
        ("quantized", "is quantized already (gptq)"),
        ("bert --to gguf", "there is no GGUF file of it"),
        ("llama --to onnx", "'onnx' is not known. Choose one of gguf, checkpoint"),
        ("llama --to checkpont", "Did you mean checkpoint?"),
        ("llama --guide fact", "'fact' is not known. Did you mean"),
        ("llama --facts text:text.txt", "text.txt: it has no facts to guide by"),
        ("llama --facts atlass", "Did you mean atlas?"),
        ("llama --facts bear", "--data"),
        ("./nowhere --facts bear --data bear", "no such folder"),
        ("llama --calibration nowhere.txt", "There is no calibration text"),
        ("llama --calibration-tokens 0", "0 is not in the range"),
        ("llama -o map.pdf", "end in .html, .md, .json or .csv"),
        ("llama -o nowhere/map.html", "no such folder"),
        ("llama -o facts.jsonl", "end in .html"),
        ("llama -o text.csv --overwrite", "was not written by compressknow"),
    ],
)
def test_invalid_options_are_refused(words: str, message: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.csv").write_text("a,b\n", encoding="utf-8")
    before = sorted(out.parent.rglob("*"))
    assert main(["sensitivity", *words.split()]) in (1, 2)
    printed = capsys.readouterr()
    assert message in printed.err.replace("\n  ", " ")
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert sorted(out.parent.rglob("*")) == before
