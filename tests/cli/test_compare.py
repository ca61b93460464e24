"""`compare` on the command line: its output and pages in both directions, and its error messages."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.base.errors import UsageError
from compressknow.base.progress import Progress
from compressknow.evaluate.answers import Answers, read_answers
from tests.cli.conftest import Run, check_refused
from tests.engine.gguf_files import F32, Q8_0, needs_gguf, write_gguf
from tests.knowing import save_trained, write_facts
from tests.long import one_in
from tests.models import edit_config, edit_tensors, put_into_hub_cache, save_tiny
from tests.pages.pages import parse_html

FAMILIES = ("bert", "llama", "t5")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write models that know `facts.jsonl`, and compressed versions of them."""
    folder = tmp_path_factory.mktemp("models")
    write_facts(folder / "facts.jsonl")
    for family in FAMILIES:
        save_trained(family, folder / family)
        compressknow.convert(folder / family, folder / f"{family}-b", prune=0.7)
    compressknow.convert(folder / "llama", folder / "llama-int8", scope="attention", prune=0.6, quantize="int8")
    return folder


@pytest.fixture
def run(run: Run) -> Run:
    return lambda *arguments: run("compare", *arguments)


FACTS = ("-p", "facts:{models}/facts.jsonl", "--answers", "{models}/kept")
LLAMAS = ("{models}/llama", "{models}/llama-int8")
OUTPUTS = ("-o", "c.html", "-o", "c.md", "-o", "c.json")


def find_answers(models: Path, model: str, reference: str | None = None) -> Answers:
    """Return the stored answers of a model, with probabilities of the likeliest tokens of a reference or of itself."""
    folders = [folder for folder in (models / "kept").iterdir() if ("-" in folder.name) == (reference is not None)]
    candidates = [answers for folder in folders if (answers := read_answers(folder)).record.model.name == model]
    sha256 = reference and find_answers(models, reference).record.model.sha256
    (answers,) = [a for a in candidates if sha256 in (None, a.record.probes["facts:facts.jsonl"].reference)]
    return answers


def compute_kl_mean(p: Answers, q: Answers) -> float:
    """Compute KL(p || q) by its definition, over the stored tokens and the remaining probability."""
    total, q_by_fact = 0.0, {answer.fact_id: answer for answer in q.answers}
    for answer in p.answers:
        other = q_by_fact[answer.fact_id]
        assert list(answer.first_ids) == list(other.first_ids)
        stored = [np.exp(np.asarray(each.first_logp, dtype=np.float64)) for each in (answer, other)]
        ps, qs = (np.append(each, max(1 - each.sum(), 2.0**-21)) for each in stored)
        total += float((ps * np.log(ps / qs)).sum())
    return total / len(p.answers)


@pytest.mark.parametrize("family", one_in(3, FAMILIES))
def test_both_directions_match_the_stored_answers(run: Run, models: Path, family: str) -> None:
    a, b = family, f"{family}-b"
    result = run(f"{{models}}/{a}", f"{{models}}/{b}", *FACTS, "--json")
    assert result.code == 0, result.err
    behaviour = json.loads(result.out)["behaviour"]
    of_a, of_b = ({x.fact_id: x for x in find_answers(models, model).answers} for model in (a, b))
    knows_a, knows_b = ({fact for fact, x in of.items() if x.correct} for of in (of_a, of_b))
    assert knows_a - knows_b
    forward, backward = behaviour["b_against_a"], behaviour["a_against_b"]
    assert (forward["n"], forward["both"], forward["lost"], forward["gained"]) == (
        64,
        len(knows_a & knows_b),
        len(knows_a - knows_b),
        len(knows_b - knows_a),
    )
    assert (backward["both"], backward["lost"], backward["gained"]) == (
        forward["both"],
        forward["gained"],
        forward["lost"],
    )
    assert forward["kept"] == len(knows_a & knows_b) / len(knows_a)
    assert backward["kept"] == (len(knows_a & knows_b) / len(knows_b) if knows_b else None)
    (b_on_a,), (a_on_b,) = forward["probes"].values(), backward["probes"].values()
    assert b_on_a["flips"] == a_on_b["flips"] == len(knows_a ^ knows_b) / 64
    differing = {fact for fact in of_a if of_a[fact].predicted != of_b[fact].predicted}
    assert b_on_a["answer_changed"] == len(differing) / 64
    for probe, original, compressed in ((b_on_a, a, b), (a_on_b, b, a)):
        p, q = find_answers(models, original), find_answers(models, compressed, reference=original)
        assert probe["kl_mean"] == pytest.approx(compute_kl_mean(p, q), rel=1e-3)
    assert not math.isclose(b_on_a["kl_mean"], a_on_b["kl_mean"], rel_tol=1e-3)
    assert {row["fact_id"] for row in behaviour["answers"]} == differing | (knows_a ^ knows_b)
    for row in behaviour["answers"]:
        fact = row["fact_id"]
        assert row["top_a"] == list(of_a[fact].top5[:3])
        assert row["top_b"] == list(of_b[fact].top5[:3])
        known_by = ("neither", "only B", "only A")[(fact in knows_b) + 2 * (fact in knows_a)]
        assert row["known_by"] == known_by


def test_stored_answers_are_reused(run: Run, models: Path) -> None:
    first = run(*LLAMAS, *FACTS, "--json")
    times = {path: path.stat().st_mtime_ns for path in (models / "kept").rglob("answers.parquet")}
    assert run(*LLAMAS, *FACTS, "--json").out == first.out
    assert {path: path.stat().st_mtime_ns for path in (models / "kept").rglob("answers.parquet")} == times


def test_json_has_every_figure_and_its_totals_add_up(run: Run, tmp_path: Path) -> None:
    result = run(*LLAMAS, "--json", "-o", "c.json")
    printed = json.loads(result.out, parse_constant=lambda value: pytest.fail(f"{value} is not JSON"))
    assert printed == json.loads((tmp_path / "c.json").read_text())
    assert (printed["schema"], printed["identical"], printed["behaviour"]) == (1, False, None)
    weights = printed["weights"]
    assert set(weights["groups"]) == {"attention", "feed-forward", "final", "not-linear"}
    assert weights["groups"]["attention"]["relative_error"] > 0.1
    assert weights["groups"]["feed-forward"]["relative_error"] == 0
    assert [(layer["stack"], layer["layer"]) for layer in weights["layers"]] == [(None, 0), (None, 1)]
    for parts in (weights["groups"].values(), weights["tensors"]):
        for key in ("numel", "zeros_a", "zeros_b"):
            assert sum(part[key] for part in parts) == weights["total"][key]
    (module,) = (m for m in weights["modules"] if (m["layer"], m["module"]) == (1, "self_attn.v_proj"))
    (tensor,) = (t for t in weights["tensors"] if t["name"] == "model.layers.1.self_attn.v_proj.weight")
    assert module["relative_error"] == tensor["relative_error"]
    assert (tensor["dtype_a"], tensor["dtype_b"], tensor["group"]) == ("F32", "I8", "attention")
    assert [change["kind"] for change in printed["structure"]] == ["retyped"] * 8
    assert [change["key"] for change in printed["config"]] == ["quantization_config"]


def test_output_of_80_columns_lists_groups_and_the_layers_that_differ_most(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 400, encoding="utf-8")
    text = ("-p", "text:text.txt", "--answers", "{models}/kept-text")
    for arguments in (LLAMAS, (*LLAMAS, *text), (*LLAMAS, *FACTS), ("{models}/t5", "{models}/t5-b")):
        result = run(*arguments)
        assert result.code == 0
        assert result.err == ""
        lines = result.out.splitlines()
        assert max(map(len, lines)) <= 80
        shown = [line.split()[0] for line in lines if re.match(r"(attention|feed-forward|final|not-linear|all) ", line)]
        assert shown[:2] == ["attention", "feed-forward"]
        assert "Layers with the largest error" in lines
    errors = [float(line.split()[-4]) for line in lines if re.match(r"(en|de)coder \d ", line)]
    assert len(errors) == 4
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("facts", [(), FACTS])
def test_checkpoint_is_identical_to_itself_and_its_copy(
    run: Run, models: Path, tmp_path: Path, facts: tuple[str, ...]
) -> None:
    shutil.copytree(models / "llama", tmp_path / "copy")
    for other in ("{models}/llama", "copy"):
        result = run("{models}/llama", other, *facts, *OUTPUTS, "--overwrite", "--json")
        printed = json.loads(result.out)
        assert (result.code, printed["identical"], printed["weights"]) == (0, True, None)
        assert "identical" in printed["verdict"]
        assert "identical" in run("{models}/llama", other, *facts).out
        assert parse_html((tmp_path / "c.html").read_text()).one("h1").text == "Identical"
        if facts:
            assert printed["behaviour"]["b_against_a"]["kept"] == 1
            assert printed["behaviour"]["answers"] == []


@pytest.mark.parametrize("facts", [(), FACTS])
def test_model_changed_since_its_conversion_is_reported(
    run: Run, models: Path, tmp_path: Path, facts: tuple[str, ...]
) -> None:
    shutil.copytree(models / "llama-int8", tmp_path / "changed")
    edit_tensors(tmp_path / "changed", lambda t: t["model.layers.0.self_attn.q_proj.weight_scale"].mul_(100))
    result = run("{models}/llama", "changed", *facts, "--json")
    assert result.code == 0, result.err
    says = "changed changed since it was converted: run `compressknow verify`"
    assert [text[: len(says)] for text in json.loads(result.out)["warnings"]].count(says) == 1


def test_wrong_order_is_reported_even_after_a_rename(run: Run, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "renamed")
    for original in ("{models}/llama", "renamed"):
        assert "A was made from B" not in run(original, "{models}/llama-int8").out
        assert "A was made from B" in run("{models}/llama-int8", original).out


def test_each_model_may_have_its_own_revision(
    run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_hub_cache(models / "llama", tmp_path / "hub", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--org--tiny", "e" * 40
    shutil.copytree(models / "llama-b", repository / "snapshots" / commit)
    (repository / "refs" / "pruned").write_text(commit)

    def count_zeros(*options: str) -> list[int]:
        total = json.loads(run("org/tiny", "org/tiny", *options, "--json").out)["weights"]["total"]
        return [total["zeros_a"], total["zeros_b"]]

    original, pruned = count_zeros("--revision-b", "pruned")
    assert original < pruned
    assert count_zeros("--revision", "pruned", "--revision-b", "main") == [pruned, original]


def test_identical_weights_with_different_tokenizers_are_reported(run: Run, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{", '{"clean_up_tokenization_spaces": true, ', 1))
    result = run("{models}/llama", "copy", "-o", "c.md")
    assert "The weights of llama and copy are identical to the byte" in result.out
    assert "tokenizer_config.json: differs" in result.out
    assert "tokenizer\\_config.json" in (tmp_path / "c.md").read_text()


def test_unmet_gate_exits_with_3_and_prints_the_counts(run: Run) -> None:
    result = run(*LLAMAS, *FACTS, "--fail-under", "1", "--json")
    kept = json.loads(result.out)["behaviour"]["b_against_a"]
    assert kept["lost"] > 0
    assert result.code == 3
    assert f"keeps {kept['both']} of {kept['both'] + kept['lost']}" in result.err
    assert run("{models}/llama", "{models}/llama", *FACTS, "--fail-under", "1").code == 0


def test_gate_of_zero_needs_a_probe(models: Path) -> None:
    with pytest.raises(UsageError, match="needs a probe"):
        compressknow.compare(models / "llama", models / "llama-int8", fail_under=0.0)


def test_undecided_strict_gate_exits_with_4(run: Run) -> None:
    result = run("{models}/llama", "{models}/llama", *FACTS, "--fail-under", "0.99", "--strict")
    assert result.code == 4
    assert "It is undecided whether 99 % of the knowledge is kept" in result.err


def test_both_are_evaluated_with_the_given_options(run: Run, models: Path, tmp_path: Path) -> None:
    options = [
        "--limit",
        "8",
        "--seed",
        "3",
        "--dtype",
        "bfloat16",
        "--no-noise-floor",
        "--answers",
        str(tmp_path / "a"),
    ]
    assert run(*LLAMAS, *FACTS, *options).code == 0
    records = [read_answers(folder).record for folder in (tmp_path / "a").iterdir()]
    assert {record.model.computed_in for record in records} == {"bfloat16", "bfloat16 + int8"}
    entries = [entry for record in records for entry in record.probes.values()]
    assert {(entry.limit, entry.seed, entry.noise_floor) for entry in entries} == {(8, 3, None)}


def test_known_produced_counts_what_each_produces(run: Run, models: Path) -> None:
    result = run(*LLAMAS, *FACTS, "--known", "produced", "--json")
    behaviour = json.loads(result.out)["behaviour"]
    sides = [find_answers(models, name, other) for name, other in (("llama", None), ("llama-int8", "llama"))]
    a, b = ({answer.fact_id for answer in side.answers if answer.grade == "produced"} for side in sides)
    assert len(b) < sum(answer.correct for answer in sides[1].answers)
    for way, (one, other) in {"b_against_a": (a, b), "a_against_b": (b, a)}.items():
        assert [behaviour[way][name] for name in ("both", "lost", "gained")] == [
            len(one & other),
            len(one - other),
            len(other - one),
        ]


def test_no_facts_leaves_out_prompts(run: Run, models: Path, tmp_path: Path) -> None:
    assert run(*LLAMAS, *FACTS, *OUTPUTS).code == 0
    shown = (tmp_path / "c.json").read_text()
    prompts = [answer["prompt"] for answer in json.loads(shown)["behaviour"]["answers"]]
    assert prompts
    result = run(*LLAMAS, *FACTS, *OUTPUTS, "--no-facts", "--overwrite")
    for name in ("c.html", "c.md", "c.json"):
        text = (tmp_path / name).read_text()
        for prompt in prompts:
            assert prompt.replace("[MASK]", "___") not in text
            assert prompt not in text
    assert "answers" not in json.loads((tmp_path / "c.json").read_text())["behaviour"]
    assert "Of what A knows, B keeps" in result.out


def test_pages_are_the_same_bytes_with_any_threads(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for threads in (1, 3):
        assert run(*LLAMAS, *FACTS, *OUTPUTS, "--threads", threads, "--overwrite").code == 0
        texts = [(tmp_path / name).read_text() for name in ("c.html", "c.md", "c.json")]
        written.append([text.replace(f"--threads {threads}", "") for text in texts])
    assert written[0] == written[1]


def test_command_in_the_json_repeats_the_comparison(run: Run, models: Path, tmp_path: Path) -> None:
    assert run(*LLAMAS, *FACTS, "-o", "c.json").code == 0
    first: dict[str, Any] = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").unlink()
    program, command, *arguments = first["command"].split()
    assert (program, command) == ("compressknow", "compare")
    assert run(*arguments).code == 0
    assert json.loads((tmp_path / "c.json").read_text()) == first


def test_unreadable_packed_weights_are_reported_with_a_hint(run: Run, models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "packed"))
    module = "model.layers.0.mlp.down_proj"
    packed = {f"{module}.weight_packed": torch.ones(64, 16, dtype=torch.int32)}
    edit_tensors(folder, lambda tensors: (tensors.pop(f"{module}.weight"), tensors.update(packed)))
    edit_config(folder, quantization_config={"quant_method": "x"})
    result = run("{models}/llama", "packed")
    printed = " ".join(result.out.split())
    assert result.code == 0
    assert f"1 weight is packed in a form whose values cannot be read here (such as {module}.weight)" in printed
    assert "-p PROBE" in printed


def test_models_of_different_sizes_have_no_weights_to_compare(run: Run, tmp_path: Path) -> None:
    for name, width in (("small", 32), ("large", 64)):
        config = hf.BertConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, vocab_size=width)
        hf.BertForMaskedLM(config).save_pretrained(tmp_path / name)
        for file in (tmp_path / name).glob("*.safetensors"):
            kept = {key: value for key, value in load_file(file).items() if width in value.shape}
            save_file({key: value for key, value in kept.items() if "intermediate.dense.bias" not in key}, file)
    result = run("small", "large", "-o", "c.html")
    assert result.code == 0, result.err
    assert result.out.startswith("No tensor of small and large can be compared: ")
    assert "hidden_size: 32 -> 64" in result.out
    assert parse_html((tmp_path / "c.html").read_text()).one("h1").text == "Weights that cannot be compared"


def test_same_values_in_another_dtype_are_reported(run: Run, models: Path, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "half", torch.bfloat16)
    hf.BertForMaskedLM.from_pretrained(tmp_path / "half", dtype=torch.float32).save_pretrained(tmp_path / "whole")
    result = run("half", "whole", "-o", "c.html")
    assert "whole stores 42 of 42 tensors differently from half, but with the same" in result.out
    assert parse_html((tmp_path / "c.html").read_text()).one("h1").text == "The same values"
    edit_tensors(tmp_path / "whole", lambda tensors: tensors["bert.embeddings.LayerNorm.weight"].add_(1))
    printed = " ".join(run("half", "whole", "-o", "c.html", "--overwrite").out.split())
    assert printed.startswith("whole differs from half in 1 of 42 tensors (0.2 % of the weights): relative error ")
    assert "; 41 more are stored differently, but with the same values. A: " in printed
    page = parse_html((tmp_path / "c.html").read_text())
    assert "1 tensor that differs" in [summary.text for summary in page.all("summary")]


@needs_gguf
def test_gguf_files_are_compared_by_their_weights(run: Run, models: Path, tmp_path: Path) -> None:
    """Their dequantized values differ like those of the checkpoints that they were made from."""
    exact, pruned = (write_gguf(models / name, tmp_path / f"{name}.gguf", F32) for name in ("llama", "llama-b"))
    assert run(exact, pruned, "-o", "gguf.json").code == 0
    assert run("{models}/llama", "{models}/llama-b", "-o", "safetensors.json").code == 0
    gguf, safetensors = (json.loads((tmp_path / f"{kind}.json").read_text()) for kind in ("gguf", "safetensors"))
    for group in ("attention", "feed-forward", "final"):
        for key in ("relative_error", "largest_change"):
            expected = safetensors["weights"]["groups"][group][key]
            assert gguf["weights"]["groups"][group][key] == pytest.approx(expected)
    write_gguf(models / "llama", tmp_path / "q8.gguf", Q8_0, tensors_per_part=6)
    result = run(exact, next(tmp_path.glob("q8-00001-of-*")))
    assert "another type: f32 -> q8_0" in result.out
    assert "relative error 0.00" in result.out


@needs_gguf
def test_gguf_files_are_compared_by_facts(run: Run, models: Path, tmp_path: Path) -> None:
    a, b = (write_gguf(models / name, tmp_path / f"{name}.gguf") for name in ("llama", "llama-b"))
    result = run("{models}/llama", b)
    assert result.code == 0, result.err
    assert "The weights of a GGUF file are only compared with those of another GGUF file." in result.out
    assert "-p PROBE" in result.out
    result = run(a, b, *FACTS, *OUTPUTS)
    assert result.code == 0, result.err
    assert "llama-b.gguf knows" in result.out
    assert "Of what B knows, A keeps" in result.out
    assert json.loads((tmp_path / "c.json").read_text())["weights"]["total"]["relative_error"] > 0


def test_weights_with_infinity_are_reported(run: Run, models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "llama", tmp_path / "broken"))
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"][0].fill_(float("inf")))
    result = run("{models}/llama", "broken", *OUTPUTS)
    assert result.code == 0
    assert "model.norm.weight holds NaN or infinity" in result.out
    total = json.loads((tmp_path / "c.json").read_text())["weights"]["total"]
    assert total["relative_error"] is None


BAD_INPUT: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "other architectures": (
        ("{models}/bert", "{models}/llama", "-o", "c.html"),
        1,
        ("bert and llama cannot be compared: their architectures differ", "LlamaForCausalLM", "made from"),
    ),
    "a missing folder": (("{models}/bert", "./none"), 1, ("./none: no such folder",)),
    "a file instead of a folder": (("{models}/bert", "{models}/facts.jsonl"), 1, ("is a file, not a checkpoint",)),
    "a folder of answers": (
        ("{models}/bert", "{models}/on-bert"),
        2,
        ("on-bert is an answers folder", "compressknow report"),
    ),
    "no weights": (("{models}/bert", "{models}/hollow"), 1, ("hollow has no weights",)),
    "a damaged file": (("{models}/bert", "{models}/damaged"), 1, ("is not a sound safetensors file",)),
    "a damaged config": (("{models}/bert", "{models}/scrambled"), 1, ("config.json cannot be read",)),
    "one checkpoint": (("{models}/bert",), 2, ("Missing argument 'B'",)),
    "an unknown format": ((*LLAMAS, "-o", "c.pdf"), 2, (".html, .md or .json",)),
    "a gate without facts": ((*LLAMAS, "--fail-under", "0.9"), 2, ("--fail-under", "-p PROBE")),
    "a gate for an unknown relation": (
        (*LLAMAS, *FACTS, "--fail-under", "captial=0.9", "--answers", "kept"),
        2,
        ("no facts have the domain or relation captial", "Did you mean capital?"),
    ),
    "a gate in percent": ((*LLAMAS, *FACTS, "--fail-under", "95"), 2, ("--fail-under must be between 0 and 1",)),
    "an unknown probe": ((*LLAMAS, "-p", "atlsa"), 2, ("Did you mean atlas?",)),
    "no threads": ((*LLAMAS, "--threads", "0"), 2, ("--threads",)),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_writes_nothing(run: Run, models: Path, tmp_path: Path, name: str) -> None:
    for folder, file, content in (
        ("hollow", "config.json", (models / "bert" / "config.json").read_bytes()),
        ("damaged", "config.json", (models / "bert" / "config.json").read_bytes()),
        ("damaged", "model.safetensors", (models / "bert" / "model.safetensors").read_bytes()[:-9]),
        ("scrambled", "config.json", b"{"),
        ("on-bert", "probe.json", b"{}"),
    ):
        (models / folder).mkdir(exist_ok=True)
        (models / folder / file).write_bytes(content)
    arguments, code, words = BAD_INPUT[name]
    check_refused(run(*arguments), code, *words)
    assert not list(tmp_path.iterdir())


def test_existing_output_is_replaced_only_with_overwrite(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.md").write_text("mine")
    mine = "c.md exists already, and was not written by compressknow"
    check_refused(run(*LLAMAS, "-o", "c.html", "-o", "c.md"), 1, mine)
    assert [path.name for path in tmp_path.iterdir()] == ["c.md"]
    assert (tmp_path / "c.md").read_text() == "mine"
    check_refused(run(*LLAMAS, "-o", "c.md", "--overwrite"), 1, mine)
    (tmp_path / "c.md").unlink()
    pages = [f"-oc{suffix}" for suffix in (".html", ".md", ".json")]
    assert run(*LLAMAS, *pages).code == 0
    check_refused(run(*LLAMAS, *pages), 1, "c.html exists already", "--overwrite")
    assert run(*LLAMAS, *pages, "--overwrite").code == 0
    assert "Relative error" in (tmp_path / "c.md").read_text()


def test_models_of_different_vocabularies_are_compared_only_by_weights(run: Run, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"capital"', '"Capital"'))
    assert "The weights of llama and other are identical" in run("{models}/llama", "other").out
    check_refused(run("{models}/llama", "other", *FACTS), 1, "they differ in vocabulary")
    path.unlink()
    assert "  tokenizer.json: exists -> none" in run("{models}/llama", "other").out


def test_control_characters_and_markup_of_names_are_escaped(run: Run, tmp_path: Path) -> None:
    name = "\x1b[31mred\u202e<script>"
    save_tiny("bert", tmp_path / "a")
    folder = save_tiny("bert", tmp_path / name)
    added = {f"{name}|`x`": torch.ones(2), "bert.pooler.dense.bias": torch.ones(2)}
    edit_tensors(folder, lambda tensors: tensors.update(added))
    result = run("a", name, "-o", "c.html", "-o", "c.md")
    assert result.code == 0, result.err
    for text in (result.out, (tmp_path / "c.html").read_text(), (tmp_path / "c.md").read_text()):
        assert "\x1b" not in text
        assert "\u202e" not in text
    page = parse_html((tmp_path / "c.html").read_text())
    assert len(page.all("script")) == 1
    assert "⟨U+202E⟩<script>" in page.one("main").text
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse((tmp_path / "c.md").read_text())
    assert not [t for token in tokens for t in (token, *(token.children or ())) if t.type.startswith("html")]


def test_python_function_returns_the_comparison(models: Path) -> None:
    comparison = compressknow.compare(models / "llama", models / "llama-int8")
    assert comparison.difference is not None
    assert comparison.behaviour is None
    assert comparison.difference.total.zeros_b > comparison.difference.total.zeros_a
    assert "llama-int8 differs from llama in 8 of " in comparison.verdict


def test_progress_of_hashing_and_comparing_is_reported(models: Path, tmp_path: Path) -> None:
    calls: list[Progress] = []
    shutil.copytree(models / "llama", tmp_path / "copy")
    for other, stages in ((tmp_path / "copy", ["hash"]), (models / "llama-b", ["hash", "compare"])):
        calls.clear()
        compressknow.compare(models / "llama", other, on_progress=calls.append)
        assert [each.stage.work for each in calls if each.state == "begins"] == stages
        # Every stage completes; hashing reads all files that determine a model's answers.
        ends = [each for each in calls if each.state == "ends"]
        assert [each.stage.work for each in ends if each.done == each.total] == stages
        weights = (models / "llama" / "model.safetensors").stat().st_size
        assert ends[0].total > 2 * weights
