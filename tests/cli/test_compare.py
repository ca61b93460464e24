"""`compare` on the command line: what it prints and writes, in both directions, and what it says of bad input."""

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
from tests.cli.conftest import Run, refused
from tests.engine.gguf_files import F32, Q8_0, needs_gguf, write_gguf
from tests.knowing import save_trained, write_facts
from tests.long import one_in
from tests.models import edit_config, edit_tensors, put_into_hub_cache, save_tiny
from tests.pages.pages import parse_html

FAMILIES = ("bert", "llama", "t5")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that know `facts.jsonl`, each with two that were made from it; all their answers, in both directions."""
    folder = tmp_path_factory.mktemp("place")
    write_facts(folder / "facts.jsonl")
    for family in FAMILIES:
        save_trained(family, folder / family)
        compressknow.convert(folder / family, folder / f"{family}-b", prune=0.7)
    compressknow.convert(folder / "llama", folder / "llama-int8", scope="attention", prune=0.6, quantize="int8")
    return folder


@pytest.fixture
def run(run: Run) -> Run:
    return lambda *arguments: run("compare", *arguments)


FACTS = ("-p", "facts:{place}/facts.jsonl", "--answers", "{place}/kept")
LLAMAS = ("{place}/llama", "{place}/llama-int8")
OUTPUTS = ("-o", "c.html", "-o", "c.md", "-o", "c.json")


def answers_of(place: Path, model: str, like: str | None = None) -> Answers:
    """The kept answers of a model, with the probabilities of the most likely tokens of another, or of itself."""
    folders = [folder for folder in (place / "kept").iterdir() if ("-" in folder.name) == (like is not None)]
    found = [answers for folder in folders if (answers := read_answers(folder)).record.model.name == model]
    (only,) = [a for a in found if like is None or reference(a) == sha256(place, like)]
    return only


def reference(answers: Answers) -> str:
    return answers.record.probes["facts:facts.jsonl"].reference


def sha256(place: Path, model: str) -> str:
    return answers_of(place, model).record.model.sha256


def kl_mean(p: Answers, q: Answers) -> float:
    """KL(p || q) by its definition, over the tokens that both were asked for and the rest."""
    total, others = 0.0, {answer.fact_id: answer for answer in q.answers}
    for answer in p.answers:
        other = others[answer.fact_id]
        assert list(answer.first_ids) == list(other.first_ids)
        sides = [np.exp(np.asarray(side.first_logp, dtype=np.float64)) for side in (answer, other)]
        sides = [np.append(side, max(1 - side.sum(), 2.0**-21)) for side in sides]
        total += float((sides[0] * np.log(sides[0] / sides[1])).sum())
    return total / len(p.answers)


@pytest.mark.parametrize("family", one_in(2, FAMILIES))
def test_both_directions_are_as_recounted_from_the_answers(run: Run, place: Path, family: str) -> None:
    a, b = family, f"{family}-b"
    ended = run(f"{{place}}/{a}", f"{{place}}/{b}", *FACTS, "--json")
    assert ended.code == 0, ended.err
    behaviour = json.loads(ended.out)["behaviour"]
    of_a, of_b = ({x.fact_id: x for x in answers_of(place, model).answers} for model in (a, b))
    knows_a, knows_b = ({fact for fact, x in of.items() if x.correct} for of in (of_a, of_b))
    assert knows_a - knows_b
    there, back = behaviour["b_against_a"], behaviour["a_against_b"]
    assert (there["n"], there["both"], there["lost"], there["gained"]) == (
        64,
        len(knows_a & knows_b),
        len(knows_a - knows_b),
        len(knows_b - knows_a),
    )
    assert (back["both"], back["lost"], back["gained"]) == (there["both"], there["gained"], there["lost"])
    assert there["kept"] == len(knows_a & knows_b) / len(knows_a)
    assert back["kept"] == (len(knows_a & knows_b) / len(knows_b) if knows_b else None)
    (one,), (other,) = there["probes"].values(), back["probes"].values()
    assert one["flips"] == other["flips"] == len(knows_a ^ knows_b) / 64
    differing = {fact for fact in of_a if of_a[fact].predicted != of_b[fact].predicted}
    assert one["answer_changed"] == len(differing) / 64
    assert one["kl_mean"] == pytest.approx(kl_mean(answers_of(place, a), answers_of(place, b, like=a)), rel=1e-3)
    assert other["kl_mean"] == pytest.approx(kl_mean(answers_of(place, b), answers_of(place, a, like=b)), rel=1e-3)
    assert not math.isclose(one["kl_mean"], other["kl_mean"], rel_tol=1e-3)
    assert {row["fact_id"] for row in behaviour["answers"]} == differing | (knows_a ^ knows_b)
    for row in behaviour["answers"]:
        fact = row["fact_id"]
        assert row["top_a"] == list(of_a[fact].top5[:3])
        assert row["top_b"] == list(of_b[fact].top5[:3])
        known_by = ("neither", "only B", "only A")[(fact in knows_b) + 2 * (fact in knows_a)]
        assert row["known_by"] == known_by


def test_answers_that_are_kept_are_not_asked_again(run: Run, place: Path) -> None:
    first = run(*LLAMAS, *FACTS, "--json")
    times = {path: path.stat().st_mtime_ns for path in (place / "kept").rglob("answers.parquet")}
    assert run(*LLAMAS, *FACTS, "--json").out == first.out
    assert {path: path.stat().st_mtime_ns for path in (place / "kept").rglob("answers.parquet")} == times


def test_the_json_has_every_figure_and_its_totals_add_up(run: Run, tmp_path: Path) -> None:
    ended = run(*LLAMAS, "--json", "-o", "c.json")
    printed = json.loads(ended.out, parse_constant=lambda value: pytest.fail(f"{value} is not JSON"))
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


def test_what_is_printed_says_the_groups_and_the_layers_that_differ_most_within_80_columns(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 400, encoding="utf-8")
    text = ("-p", "text:text.txt", "--answers", "{place}/kept-text")
    for arguments in (LLAMAS, (*LLAMAS, *text), (*LLAMAS, *FACTS), ("{place}/t5", "{place}/t5-b")):
        ended = run(*arguments)
        assert ended.code == 0
        assert ended.err == ""
        lines = ended.out.splitlines()
        assert max(map(len, lines)) <= 80
        shown = [line.split()[0] for line in lines if re.match(r"(attention|feed-forward|final|not-linear|all) ", line)]
        assert shown[:2] == ["attention", "feed-forward"]
        assert "Layers with the largest error" in lines
    errors = [float(line.split()[-4]) for line in lines if re.match(r"(en|de)coder \d ", line)]
    assert len(errors) == 4
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("facts", [(), FACTS])
def test_a_checkpoint_and_itself_or_its_copy_are_identical(
    run: Run, place: Path, tmp_path: Path, facts: tuple[str, ...]
) -> None:
    shutil.copytree(place / "llama", tmp_path / "copy")
    for other in ("{place}/llama", "copy"):
        ended = run("{place}/llama", other, *facts, *OUTPUTS, "--overwrite", "--json")
        printed = json.loads(ended.out)
        assert (ended.code, printed["identical"], printed["weights"]) == (0, True, None)
        assert "identical" in printed["verdict"]
        assert "identical" in run("{place}/llama", other, *facts).out
        assert parse_html((tmp_path / "c.html").read_text()).one("h1").text == "Identical"
        if facts:
            assert printed["behaviour"]["b_against_a"]["kept"] == 1
            assert printed["behaviour"]["answers"] == []


def test_models_in_the_wrong_order_are_told_whatever_they_are_called_now(run: Run, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "llama", tmp_path / "renamed")
    for original in ("{place}/llama", "renamed"):
        assert "A was made from B" not in run(original, "{place}/llama-int8").out
        assert "A was made from B" in run("{place}/llama-int8", original).out


def test_each_side_may_be_of_a_revision_of_its_own(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_hub_cache(place / "llama", tmp_path / "hub", "org/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--org--tiny", "e" * 40
    shutil.copytree(place / "llama-b", repository / "snapshots" / commit)
    (repository / "refs" / "pruned").write_text(commit)

    def zeros(*options: str) -> list[int]:
        total = json.loads(run("org/tiny", "org/tiny", *options, "--json").out)["weights"]["total"]
        return [total["zeros_a"], total["zeros_b"]]

    of_a, of_b = zeros("--revision-b", "pruned")
    assert of_a < of_b
    assert zeros("--revision", "pruned", "--revision-b", "main") == [of_b, of_a]


def test_weights_alike_beside_another_tokenizer_are_told(run: Run, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "llama", tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("{", '{"clean_up_tokenization_spaces": true, ', 1))
    ended = run("{place}/llama", "copy", "-o", "c.md")
    assert "The weights of llama and copy are identical to the byte" in ended.out
    assert "tokenizer_config.json: differs" in ended.out
    assert "tokenizer\\_config.json" in (tmp_path / "c.md").read_text()


def test_a_gate_ends_with_3_and_says_the_numbers(run: Run) -> None:
    ended = run(*LLAMAS, *FACTS, "--fail-under", "1", "--json")
    kept = json.loads(ended.out)["behaviour"]["b_against_a"]
    assert kept["lost"] > 0
    assert ended.code == 3
    assert f"keeps {kept['both']} of {kept['both'] + kept['lost']}" in ended.err
    assert run("{place}/llama", "{place}/llama", *FACTS, "--fail-under", "1").code == 0


def test_a_gate_of_zero_needs_a_probe_as_any_other(place: Path) -> None:
    with pytest.raises(UsageError, match="needs a probe"):
        compressknow.compare(place / "llama", place / "llama-int8", fail_under=0.0)


def test_a_strict_gate_that_so_few_facts_cannot_tell_ends_with_4(run: Run) -> None:
    ended = run("{place}/llama", "{place}/llama", *FACTS, "--fail-under", "0.99", "--strict")
    assert ended.code == 4
    assert "It is undecided whether 99 % of the knowledge is kept" in ended.err


def test_the_text_of_facts_is_left_out_on_request(run: Run, place: Path, tmp_path: Path) -> None:
    assert run(*LLAMAS, *FACTS, *OUTPUTS).code == 0
    shown = (tmp_path / "c.json").read_text()
    prompts = [answer["prompt"] for answer in json.loads(shown)["behaviour"]["answers"]]
    assert prompts
    ended = run(*LLAMAS, *FACTS, *OUTPUTS, "--no-facts", "--overwrite")
    for name in ("c.html", "c.md", "c.json"):
        text = (tmp_path / name).read_text()
        for prompt in prompts:
            assert prompt.replace("[MASK]", "___") not in text
            assert prompt not in text
    assert "answers" not in json.loads((tmp_path / "c.json").read_text())["behaviour"]
    assert "Of what A knows, B keeps" in ended.out


def test_the_same_comparison_twice_is_the_same_to_the_byte(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for threads in (1, 3):
        assert run(*LLAMAS, *FACTS, *OUTPUTS, "--threads", threads, "--overwrite").code == 0
        texts = [(tmp_path / name).read_text() for name in ("c.html", "c.md", "c.json")]
        written.append([text.replace(f"--threads {threads}", "") for text in texts])
    assert written[0] == written[1]


def test_the_command_that_the_page_shows_makes_it_again(run: Run, place: Path, tmp_path: Path) -> None:
    assert run(*LLAMAS, *FACTS, "-o", "c.json").code == 0
    first: dict[str, Any] = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").unlink()
    program, command, *arguments = first["command"].split()
    assert (program, command) == ("compressknow", "compare")
    assert run(*arguments).code == 0
    assert json.loads((tmp_path / "c.json").read_text()) == first


def test_packed_weights_are_told_and_behaviour_is_pointed_to(run: Run, place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "llama", tmp_path / "packed"))
    module = "model.layers.0.mlp.down_proj"
    packed = {f"{module}.weight_packed": torch.ones(64, 16, dtype=torch.int32)}
    edit_tensors(folder, lambda tensors: (tensors.pop(f"{module}.weight"), tensors.update(packed)))
    edit_config(folder, quantization_config={"quant_method": "x"})
    ended = run("{place}/llama", "packed")
    said = " ".join(ended.out.split())
    assert ended.code == 0
    assert f"1 weight is packed in a form whose values cannot be read here (such as {module}.weight)" in said
    assert "-p PROBE" in said


def test_models_of_another_size_have_nothing_to_compare_and_are_told(run: Run, tmp_path: Path) -> None:
    for name, width in (("small", 32), ("large", 64)):
        config = hf.BertConfig(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, vocab_size=width)
        hf.BertForMaskedLM(config).save_pretrained(tmp_path / name)
        for file in (tmp_path / name).glob("*.safetensors"):
            kept = {key: value for key, value in load_file(file).items() if width in value.shape}
            save_file({key: value for key, value in kept.items() if "intermediate.dense.bias" not in key}, file)
    ended = run("small", "large", "-o", "c.html")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("No tensor of small and large can be compared: ")
    assert "hidden_size: 32 -> 64" in ended.out
    assert parse_html((tmp_path / "c.html").read_text()).one("h1").text == "Weights that cannot be compared"


def test_the_same_values_in_another_type_are_told(run: Run, place: Path, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "half", torch.bfloat16)
    hf.BertForMaskedLM.from_pretrained(tmp_path / "half", dtype=torch.float32).save_pretrained(tmp_path / "whole")
    ended = run("half", "whole", "-o", "c.html")
    assert "whole stores 42 of 42 tensors differently from half, but with the same" in ended.out
    assert parse_html((tmp_path / "c.html").read_text()).one("h1").text == "The same values"


@needs_gguf
def test_gguf_files_are_compared_by_their_weights(run: Run, place: Path, tmp_path: Path) -> None:
    """As the values that their types stand for: they differ as the checkpoints do that they were made of."""
    exact, pruned = (write_gguf(place / name, tmp_path / f"{name}.gguf", F32) for name in ("llama", "llama-b"))
    assert run(exact, pruned, "-o", "gguf.json").code == 0
    assert run("{place}/llama", "{place}/llama-b", "-o", "safetensors.json").code == 0
    found = [json.loads((tmp_path / f"{kind}.json").read_text())["weights"] for kind in ("gguf", "safetensors")]
    for group in ("attention", "feed-forward", "final"):
        one, other = (weights["groups"][group] for weights in found)
        assert one["relative_error"] == pytest.approx(other["relative_error"])
        assert one["largest_change"] == pytest.approx(other["largest_change"])
    write_gguf(place / "llama", tmp_path / "q8.gguf", Q8_0, tensors_per_part=6)
    ended = run(exact, next(tmp_path.glob("q8-00001-of-*")))
    assert "another type: f32 -> q8_0" in ended.out
    assert "relative error 0.00" in ended.out


@needs_gguf
def test_a_gguf_file_is_compared_by_what_it_knows(run: Run, place: Path, tmp_path: Path) -> None:
    a, b = (write_gguf(place / name, tmp_path / f"{name}.gguf") for name in ("llama", "llama-b"))
    ended = run("{place}/llama", b)
    assert ended.code == 0, ended.err
    assert "The weights of a GGUF file are only compared with those of another GGUF file." in ended.out
    assert "-p PROBE" in ended.out
    ended = run(a, b, *FACTS, *OUTPUTS)
    assert ended.code == 0, ended.err
    assert "llama-b.gguf knows" in ended.out
    assert "Of what B knows, A keeps" in ended.out
    assert json.loads((tmp_path / "c.json").read_text())["weights"]["total"]["relative_error"] > 0


def test_broken_weights_are_told(run: Run, place: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place / "llama", tmp_path / "broken"))
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"][0].fill_(float("inf")))
    ended = run("{place}/llama", "broken", *OUTPUTS)
    assert ended.code == 0
    assert "model.norm.weight holds NaN or infinity" in ended.out
    total = json.loads((tmp_path / "c.json").read_text())["weights"]["total"]
    assert total["relative_error"] is None


BAD_INPUT: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "other architectures": (
        ("{place}/bert", "{place}/llama", "-o", "c.html"),
        1,
        ("bert and llama cannot be compared: their architectures differ", "LlamaForCausalLM", "made from"),
    ),
    "a folder that is missing": (("{place}/bert", "./none"), 1, ("./none: no such folder",)),
    "a file for a folder": (("{place}/bert", "{place}/facts.jsonl"), 1, ("is a file, not a checkpoint",)),
    "a folder of answers": (
        ("{place}/bert", "{place}/on-bert"),
        2,
        ("on-bert is an answers folder", "compressknow report"),
    ),
    "no weights": (("{place}/bert", "{place}/hollow"), 1, ("hollow has no weights",)),
    "a damaged file": (("{place}/bert", "{place}/damaged"), 1, ("is not a sound safetensors file",)),
    "a damaged config": (("{place}/bert", "{place}/scrambled"), 1, ("config.json cannot be read",)),
    "one checkpoint": (("{place}/bert",), 2, ("Missing argument 'B'",)),
    "an unknown format": ((*LLAMAS, "-o", "c.pdf"), 2, (".html, .md or .json",)),
    "a gate without facts": ((*LLAMAS, "--fail-under", "0.9"), 2, ("--fail-under", "-p PROBE")),
    "a gate of what is not evaluated": (
        (*LLAMAS, *FACTS, "--fail-under", "captial=0.9", "--answers", "kept"),
        2,
        ("no facts have the domain or relation captial", "Did you mean capital?"),
    ),
    "a gate in percent": ((*LLAMAS, *FACTS, "--fail-under", "95"), 2, ("--fail-under must be between 0 and 1",)),
    "an unknown probe": ((*LLAMAS, "-p", "atlsa"), 2, ("Did you mean atlas?",)),
    "no threads": ((*LLAMAS, "--threads", "0"), 2, ("--threads",)),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_writes_nothing(run: Run, place: Path, tmp_path: Path, name: str) -> None:
    for folder, file, content in (
        ("hollow", "config.json", (place / "bert" / "config.json").read_bytes()),
        ("damaged", "config.json", (place / "bert" / "config.json").read_bytes()),
        ("damaged", "model.safetensors", (place / "bert" / "model.safetensors").read_bytes()[:-9]),
        ("scrambled", "config.json", b"{"),
        ("on-bert", "probe.json", b"{}"),
    ):
        (place / folder).mkdir(exist_ok=True)
        (place / folder / file).write_bytes(content)
    arguments, code, words = BAD_INPUT[name]
    refused(run(*arguments), code, *words)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_kept_until_it_may_be_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "c.md").write_text("mine")
    refused(run(*LLAMAS, "-o", "c.html", "-o", "c.md"), 1, "c.md exists already", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["c.md"]
    assert (tmp_path / "c.md").read_text() == "mine"
    refused(run(*LLAMAS, "-o", "c.md", "--overwrite"), 1, "c.md was not written by compressknow")
    (tmp_path / "c.md").unlink()
    pages = [f"-oc{suffix}" for suffix in (".html", ".md", ".json")]
    assert run(*LLAMAS, *pages).code == 0
    assert run(*LLAMAS, *pages, "--overwrite").code == 0
    assert "Relative error" in (tmp_path / "c.md").read_text()


def test_models_of_other_vocabularies_are_compared_by_weights_and_not_by_facts(
    run: Run, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "llama", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"capital"', '"Capital"'))
    assert "The weights of llama and other are identical" in run("{place}/llama", "other").out
    refused(run("{place}/llama", "other", *FACTS), 1, "they differ in vocabulary")


def test_hostile_names_are_shown_harmless(run: Run, tmp_path: Path) -> None:
    name = "\x1b[31mred\u202e<script>"
    save_tiny("bert", tmp_path / "a")
    folder = save_tiny("bert", tmp_path / name)
    added = {f"{name}|`x`": torch.ones(2), "bert.pooler.dense.bias": torch.ones(2)}
    edit_tensors(folder, lambda tensors: tensors.update(added))
    ended = run("a", name, "-o", "c.html", "-o", "c.md")
    assert ended.code == 0, ended.err
    for text in (ended.out, (tmp_path / "c.html").read_text(), (tmp_path / "c.md").read_text()):
        assert "\x1b" not in text
        assert "\u202e" not in text
    page = parse_html((tmp_path / "c.html").read_text())
    assert len(page.all("script")) == 1
    assert "⟨U+202E⟩<script>" in page.one("main").text
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse((tmp_path / "c.md").read_text())
    assert not [t for token in tokens for t in (token, *(token.children or ())) if t.type.startswith("html")]


def test_the_python_function_says_the_same(place: Path) -> None:
    found = compressknow.compare(place / "llama", place / "llama-int8")
    assert found.difference is not None
    assert found.behaviour is None
    assert found.difference.total.zeros_b > found.difference.total.zeros_a
    assert "llama-int8 differs from llama in 8 of " in found.verdict


def test_progress_is_told_of_hashing_and_of_the_weights(place: Path, tmp_path: Path) -> None:
    told: list[Progress] = []
    shutil.copytree(place / "llama", tmp_path / "copy")
    for other, stages in ((tmp_path / "copy", ["hash"]), (place / "llama-b", ["hash", "compare"])):
        told.clear()
        compressknow.compare(place / "llama", other, on_progress=told.append)
        assert [each.stage.work for each in told if each.state == "begins"] == stages
        # Each stage ends at its whole; the first reads every file that decides what a model answers.
        ends = [each for each in told if each.state == "ends"]
        assert [each.stage.work for each in ends if each.done == each.total] == stages
        weights = (place / "llama" / "model.safetensors").stat().st_size
        assert ends[0].total > 2 * weights
