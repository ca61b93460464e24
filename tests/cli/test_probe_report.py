"""`probe` and `report` on the command line: what they print, what they import, and what they say of bad input."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from safetensors.torch import load_file, save_file

import compressknow
from compressknow.base.errors import GateNotMet, GateUndecided
from compressknow.cli import main
from compressknow.cli.report import report_page
from compressknow.evaluate.answers import RECORD
from compressknow.pages.records import Card
from tests.cli.conftest import Run, refused
from tests.evaluate.layouts import read_facts_file
from tests.knowing import facts_file, knowing
from tests.pages.card.cards import card_of_one, card_of_several

PROGRAM = [sys.executable, "-c", "import sys; from compressknow.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bert`, `llama` and `t5`, two compressed Llamas, answers of all of these to `facts.jsonl`."""
    folder = tmp_path_factory.mktemp("place")
    facts = facts_file(folder / "facts.jsonl")
    for family in ("bert", "llama", "t5"):
        knowing(family, folder / family)
        assert main(["probe", str(folder / family), "-p", f"facts:{facts}", "-o", str(folder / f"on-{family}")]) == 0
    for amount in (5, 8):
        name = f"llama-{amount}"
        assert main(["convert", str(folder / "llama"), str(folder / name), "--prune", f"0.{amount}"]) == 0
        options = ["-p", f"facts:{facts}", "-o", folder / f"on-{name}", "--reference", folder / "on-llama"]
        assert main(["probe", str(folder / name), *map(str, options)]) == 0
    return folder


def nothing_written(folder: Path) -> None:
    assert not [path for path in folder.iterdir() if path.name != "model"]


def test_the_help_of_probe_shows_what_a_line_of_facts_holds(run: Run) -> None:
    for command in ("probe", "report"):
        shown = run(command, "--help").out
        for word in ("atlas", "lama:trex", "facts:FILE.jsonl", "lm-eval:TASK", '"obj_label": "Paris"', "candidates"):
            assert word in shown
        example = re.search(r"\{\"relation.*?\}", shown, re.DOTALL)
        assert example is not None
        assert {"prompt", "obj_label", "candidates", "popularity"} <= set(json.loads(example.group()))


def test_the_line_of_facts_that_the_help_shows_is_read(run: Run, tmp_path: Path) -> None:
    example = re.search(r"\{\"relation.*?\}", run("probe", "--help").out, re.DOTALL)
    assert example is not None
    (tmp_path / "mine.jsonl").write_text(example.group().replace("\n", " "))
    (fact,) = read_facts_file(tmp_path / "mine.jsonl").facts
    assert (fact.obj_label, fact.popularity) == ("Paris", 68000000)


def test_candidates_that_a_model_cannot_tell_apart_are_no_question(run: Run, tmp_path: Path) -> None:
    unknown = {"prompt": "The capital of France is [MASK].", "obj_label": "Paris", "candidates": ["Paris", "Rome"]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(unknown))
    ended = run("probe", "{place}/llama", "-p", "facts:mine.jsonl", "-o", "answers")
    assert ended.code == 2
    assert "1 dropped: the object and another candidate are the same tokens for this model" in ended.err


PROBE, REPORT = ("probe", "{place}/llama", "-o", "answers"), ("report", "{place}/on-llama", "{place}/on-llama-5")
FACTS = ("-p", "facts:{place}/facts.jsonl")
BAD_INPUT: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "an unknown probe": ((*PROBE, "-p", "atlsa"), 2, ("Unknown probe 'atlsa'", "Did you mean atlas?")),
    "a set that is not there": ((*PROBE, "-p", "lama:trex"), 2, ("lama:trex does not come with", "--data DIR")),
    "a folder that holds no set": ((*PROBE, "-p", "bear", "--data", "."), 2, ("does not contain bear",)),
    "a data folder that is missing": ((*PROBE, "-p", "bear", "--data", "none"), 2, ("'none' does not exist",)),
    "a facts file that is missing": ((*PROBE, "-p", "facts:none.jsonl"), 2, ("There is no file none.jsonl",)),
    "facts of a user that there is not": ((*PROBE, "-p", "facts:~no-such-user/x.jsonl"), 2, ("There is no file ~no-",)),
    "a template that is missing": ((*PROBE, "-p", "atlas", "--template", "9"), 2, ("template 9",)),
    "a limit of none": ((*PROBE, *FACTS, "--limit", "0"), 2, ("--limit",)),
    "a wrong column": ((*PROBE, "-p", "hf:x", "--map", "subjekt=a"), 2, ("subjekt",)),
    "a model that is missing": (("probe", "./none", *FACTS, "-o", "answers"), 1, ("./none: no such folder",)),
    "a file for a model": (("probe", "{place}/facts.jsonl", "-o", "answers"), 1, ("is a file, not a checkpoint",)),
    "a GGUF file that is missing": (("probe", "none/x.gguf", "-o", "answers"), 1, ("no such file",)),
    "a hub id that is not to be had": (
        ("probe", "some/model", "-o", "answers"),
        1,
        ("some/model is not a local folder", "Hub"),
    ),
    "answers for a model": (("probe", "{place}/on-llama", "-o", "answers"), 1, ("config.json is missing",)),
    "a reference that is not answers folder": (
        (*PROBE, *FACTS, "--reference", "{place}/bert"),
        1,
        ("bert is not an answers folder",),
    ),
    "a reference of another family": ((*PROBE, *FACTS, "--reference", "{place}/on-bert"), 1, ("differ in family",)),
    "options that no probe takes": (
        (*PROBE, *FACTS, "--template", "2", "--context", "64", "--map", "subject=a"),
        2,
        ("No probe here takes --template, --context, --map.", "--template is for atlas, bear; --context is for text;"),
    ),
    "data of a set that is not named": (
        ("report", "{place}/llama", "{place}/llama-5", "--data", "{place}"),
        2,
        ("No probe here takes --data.", "--data is for lama, bear, lm-eval."),
    ),
    "a sample of answers": (
        (*REPORT, "--limit", "9"),
        2,
        ("--limit 9 decides what is evaluated", "have other answers"),
    ),
    "wordings of answers": (
        (*REPORT, "--templates", "2"),
        2,
        ("--templates 2 decides what is evaluated", "have other answers"),
    ),
    "a wording of answers that have none": ((*REPORT, "--template", "2"), 2, ("No probe here takes --template.",)),
    "the speed of answers, early": (
        (*REPORT, "--time", "--early", "--fail-under", "0.9"),
        2,
        ("--time measures models, and these are answers folders",),
    ),
    "the precision of answers": ((*REPORT, "--dtype", "bfloat16"), 2, ("--dtype determines how models are run",)),
    "the runtime of answers": ((*REPORT, "--runtime", "transformers"), 2, ("--runtime determines how models are run",)),
    "the speed of answers": ((*REPORT, "--time"), 2, ("--time measures models, and these are answers folders",)),
    "a revision of a folder": ((*PROBE, *FACTS, "--revision", "v1"), 2, ("which has no revision v1",)),
    "a revision of answers": ((*REPORT, "--revision", "v1"), 2, ("which has no revision v1",)),
    "a revision of a server": (
        ("probe", "http://[::1]:9", "-o", "answers", "--revision", "v1"),
        2,
        ("This is a server, which has no revision v1.",),
    ),
    "requests to no server": ((*PROBE, *FACTS, "--parallel", "8"), 2, ("--parallel is for a server",)),
    "a sample of no facts": (("compare", "{place}/llama", "{place}/llama-5", "--limit", "9"), 2, ("needs a probe",)),
    "a model of no name": (("report", "", "{place}/llama-5"), 2, ("The word after report is empty.", "variable")),
    "a folder of no name": ((*PROBE, *FACTS, "--data", ""), 2, ("The word after --data is empty.",)),
    "a share of no number": ((*REPORT, "--fail-under="), 2, ("The value of --fail-under is empty.",)),
    "no compressed model": (("report", "{place}/on-llama"), 2, ("Missing argument 'COMPRESSED...'",)),
    "an early gate of several models": (
        (*REPORT, "{place}/on-llama-8", "--fail-under", "0.9", "--early"),
        2,
        ("--early decides for one compressed model, not for 2", "Give one"),
    ),
    "an early gate without a gate": ((*REPORT, "--early"), 2, ("--early needs a gate", "--fail-under")),
    "a strict gate without a gate": ((*REPORT, "--strict"), 2, ("--strict needs a gate", "--fail-under")),
    "an early and strict gate": (
        (*REPORT, "--fail-under", "0.9", "--early", "--strict"),
        2,
        ("--early and --strict cannot be combined",),
    ),
    "an early gate of several wordings": (
        ("report", "{place}/llama", "{place}/llama-5", "--templates", "3", "--fail-under", "0.9", "--early"),
        2,
        ("--early evaluates facts in one wording", "Leave out --early or --templates"),
    ),
    "a gate in percent": ((*REPORT, "--fail-under", "95"), 2, ("--fail-under must be between 0 and 1", "0.95")),
    "a gate without a name": ((*REPORT, "--fail-under", "=0.9"), 2, ("--fail-under =0.9 names no domain", "variable")),
    "a gate that is not a number": ((*REPORT, "--fail-under", "nan"), 2, ("--fail-under must be between 0 and 1",)),
    "a gate of what is not evaluated": (
        ("report", "{place}/llama", "{place}/llama-5", *FACTS, "--fail-under", "captial=0.9", "--answers", "kept"),
        2,
        ("no facts have the domain or relation captial", "Did you mean capital?"),
    ),
    "a gate of what no stored answer is of": (
        (*REPORT, "--fail-under", "captial=0.9"),
        2,
        ("no facts have the domain or relation captial", "Did you mean capital?"),
    ),
    "a gate of a text": (
        ("report", "{place}/llama", "{place}/llama-5", "-p", "text:{place}/facts.jsonl", "--fail-under", "0.9"),
        2,
        ("--fail-under needs facts, and text:facts.jsonl is a text", "-p atlas"),
    ),
    "an unknown format": ((*REPORT, "-o", "report.pdf"), 2, ("report.pdf", ".html, .md, .json or .xml")),
    "a format that is missing": ((*REPORT, "-o", "report"), 2, (".html, .md, .json or .xml",)),
    "an output in no folder": ((*REPORT, "-o", "none/report.md"), 1, ("none: no such folder",)),
    # Nobody can make a file there; without a /proc, the folder is missing.
    "an output where none can be written": (
        ("report", "{place}/llama", "{place}/llama-5", *FACTS, "--answers", "kept", "-o", "/proc/report.html"),
        1,
        ("/proc",),
    ),
    "two outputs of one name": ((*REPORT, "-o", "a.md", "-o", "./a.md"), 2, ("Two reports have the same name",)),
    "a probe that was not asked": ((*REPORT, "-p", "atlas"), 2, ("was not evaluated on atlas", "facts:facts.jsonl")),
    "answers of another family": (
        ("report", "{place}/on-bert", "{place}/on-llama"),
        1,
        ("llama is not a compressed version of bert: they differ in family",),
    ),
    "models of other families": (
        ("report", "{place}/bert", "{place}/t5", *FACTS, "--answers", "kept", "-o", "report.html"),
        1,
        ("t5 is not a compressed version of bert: they differ in family",),
    ),
    "a compressed model that is missing": (
        ("report", "{place}/llama", "./none", "-o", "report.html"),
        1,
        ("./none: no such folder",),
    ),
    "answers of a facts file that is not here": (
        ("report", "{place}/on-llama", "{place}/llama-5"),
        2,
        ("There is no file facts.jsonl",),
    ),
    "other facts of the same probe": (
        ("report", "{place}/on-llama", "{place}/llama-5", *FACTS, "--limit", "9", "--answers", "kept"),
        2,
        ("was evaluated on other facts or prompts of facts:facts.jsonl", "--limit"),
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_writes_nothing(run: Run, tmp_path: Path, name: str) -> None:
    arguments, code, words = BAD_INPUT[name]
    refused(run(*arguments), code, *words)
    nothing_written(tmp_path)


@pytest.fixture
def model(place: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(place / family, tmp_path / "model"))


def test_an_encoder_without_a_head_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    hf.BertModel.from_pretrained(place / "bert").save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(place / "bert").save_pretrained(tmp_path / "model")
    ended = run("probe", "model", *FACTS, "-o", "answers")
    refused(ended, 1, "model has no language-modelling head: its config names BertModel", "cls.predictions", "random")
    nothing_written(tmp_path)


def test_an_encoder_decoder_without_a_head_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    config = hf.AutoConfig.from_pretrained(place / "t5", tie_word_embeddings=False)
    hf.T5Model(config).save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(place / "t5").save_pretrained(tmp_path / "model")
    ended = run("report", "{place}/on-t5", "model", *FACTS, "--answers", "kept")
    refused(ended, 1, "no language-modelling head: its config names T5Model", "not tied to the embedding")
    nothing_written(tmp_path)


def test_a_classifier_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    hf.BertForSequenceClassification.from_pretrained(place / "bert").save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(place / "bert").save_pretrained(tmp_path / "model")
    refused(run("probe", "model", *FACTS, "-o", "answers"), 1, "no language-modelling head", "cls.predictions")
    nothing_written(tmp_path)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_model_without_tokenizer_is_refused(
    run: Run, model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """Of BERT and T5 transformers would make up a tokenizer to which every word is unknown."""
    folder = model(family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(run("probe", "model", *FACTS, "-o", "answers"), 1, "model has no tokenizer", "tokenizer.json")
    nothing_written(tmp_path)


def test_a_masked_model_without_a_mask_is_refused(run: Run, model: Callable[[str], Path], tmp_path: Path) -> None:
    path = model("bert") / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["mask_token"]
    path.write_text(json.dumps(config))
    refused(run("probe", "model", *FACTS, "-o", "answers"), 1, "no mask token", "mask_token")
    nothing_written(tmp_path)


def test_a_compressed_model_of_another_vocabulary_is_refused(
    run: Run, model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = model("llama") / "tokenizer.json"
    path.write_text(path.read_text().replace('"capital"', '"Capital"'))
    ended = run("report", "{place}/on-llama", "model", *FACTS, "--answers", "kept")
    refused(ended, 1, "model is not a compressed version of llama: they differ in vocabulary")
    nothing_written(tmp_path)


def test_a_probe_that_leaves_no_fact_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model").write_text('{"prompt": "The first [MASK] wins.", "obj_label": "never seen"}')
    ended = run("probe", "{place}/bert", "-p", "facts:model", "-o", "answers")
    refused(ended, 2, "facts:model has no fact that this model can be evaluated on", "1 dropped: ")
    nothing_written(tmp_path)


def test_a_model_that_computes_no_numbers_knows_nothing_and_is_told_as_broken(
    run: Run, model: Callable[[str], Path]
) -> None:
    """Its weights are numbers, and become too large: nothing but its answers shows it."""
    path = model("llama") / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        weights[name] = weights[name] * 3e38 if "down_proj" in name else weights[name]
    save_file({name: weight.clamp(-3e38, 3e38) for name, weight in weights.items()}, path, metadata={"format": "pt"})
    ended = run("report", "{place}/on-llama", "model", *FACTS, "--answers", "kept", "-o", "report.json")
    assert ended.code == 0
    text = " ".join(ended.out.split())
    assert "Keeps 0 of 64 facts" in text
    assert "it is broken" in text
    assert "find an intact copy of the model" in text
    assert "compress less" not in ended.out


def test_an_output_that_is_there_is_kept_until_it_may_be_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    refused(run(*REPORT, "-o", "report.html", "-o", "report.md"), 1, "report.md exists already", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "mine"
    refused(run(*REPORT, "-o", "report.md", "--overwrite"), 1, "report.md was not written by compressknow")
    assert (tmp_path / "report.md").read_text() == "mine"
    (tmp_path / "report.md").unlink()
    pages = [f"-oreport{suffix}" for suffix in (".html", ".md", ".json")]
    assert run(*REPORT, *pages).code == 0
    (tmp_path / "report.md").write_text((tmp_path / "report.md").read_text().replace("Keeps", "Kept"))
    assert run(*REPORT, *pages, "--overwrite").code == 0
    assert "Keeps" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "report.md"])
def test_a_file_of_a_checkpoint_is_never_replaced(run: Run, tmp_path: Path, name: str) -> None:
    assert run(*REPORT, "-o", "report.md").code == 0
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_text('{"schema": 1, "verdict": "mine"}')
    before = (tmp_path / name).read_bytes()
    refused(run(*REPORT, "-o", name, "--overwrite"), 1, f"{name} is in a checkpoint folder: not overwritten")
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["mine.json", "mine.html", "mine.md", "empty.json"])
def test_a_file_that_no_report_wrote_is_not_replaced(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"schema": 1, "setup": "compressknow"}' if name.startswith("mine") else "")
    before = (tmp_path / name).read_bytes()
    refused(run(*REPORT, "-o", name, "--overwrite"), 1, f"{name} was not written by compressknow: not overwritten")
    assert (tmp_path / name).read_bytes() == before


def test_an_output_that_is_a_link_to_nowhere_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.md").symlink_to(tmp_path / "gone")
    refused(run(*REPORT, "-o", "report.md", "--overwrite"), 1, "report.md is a link that leads nowhere")


def test_damaged_answers_are_refused(run: Run, place: Path, tmp_path: Path) -> None:
    answers = Path(shutil.copytree(place / "on-llama-5", tmp_path / "model"))
    (answers / "answers.parquet").write_bytes(b"PAR1 no more")
    refused(run("report", "{place}/on-llama", "model"), 1, "its hash differs")
    (answers / RECORD).write_text("{}")
    refused(run("report", "{place}/on-llama", "model"), 1, "is not an answers folder")
    nothing_written(tmp_path)


def test_answers_to_other_questions_are_refused(run: Run, place: Path, tmp_path: Path) -> None:
    assert run("probe", "{place}/llama-5", *FACTS, "--limit", "30", "-o", "model").code == 0
    refused(
        run("report", "{place}/on-llama", "model"),
        1,
        "not evaluated on facts:facts.jsonl in the same way",
        "--limit None and 30",
    )


def test_an_original_may_be_answers_and_the_compressed_a_model(run: Run, tmp_path: Path) -> None:
    """Wherever the facts file lies, and however its name is given."""
    asked = run("report", "{place}/on-llama", "{place}/llama-8", *FACTS, "--answers", "kept", "--json")
    stored = run("report", "{place}/on-llama", "{place}/on-llama-8", *FACTS, "--json")
    assert asked.code == stored.code == 0
    first, second = json.loads(asked.out), json.loads(stored.out)
    assert first["compressed"] == second["compressed"]
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_answers_are_asked_as_they_were_where_nothing_else_is_said(run: Run, tmp_path: Path) -> None:
    shown = ("-p", "facts:{place}/facts.jsonl")
    assert run("probe", "{place}/llama", *shown, "--limit", "20", "--seed", "3", "-o", "model").code == 0
    ended = run("report", "model", "{place}/llama-8", *shown, "--answers", "kept", "--json")
    assert ended.code == 0, ended.err
    (probe,) = json.loads(ended.out)["compressed"][0]["probes"].values()
    assert (probe["n"], probe["limit"], probe["seed"]) == (20, 20, 3)


@pytest.mark.parametrize("compressed", [["on-llama-8"], ["on-llama-5", "on-llama-8"]])
def test_the_report_is_printed_within_80_columns(run: Run, compressed: list[str]) -> None:
    ended = run("report", "{place}/on-llama", *(f"{{place}}/{name}" for name in compressed))
    assert ended.code == 0
    assert max(map(len, ended.out.splitlines())) <= 80
    for name in compressed:
        assert name.removeprefix("on-") in ended.out or len(compressed) == 1
    assert ended.err == ""


def test_models_of_one_name_and_setup_have_their_numbers_in_the_table_too(run: Run) -> None:
    ended = run("report", "{place}/on-llama", "{place}/on-llama-8", "{place}/on-llama-8", "{place}/on-llama-5")
    names = re.findall(r"^(\S.*?)  +\d[\d.]* kB ", ended.out, re.MULTILINE)
    assert [name[:2] for name in names[:2]] == ["1.", "2."]
    assert names[0][2:] == names[1][2:]
    assert not names[2].startswith("3.")


@pytest.mark.parametrize("card", [card_of_one(), card_of_several((20,))], ids=["one", "several"])
def test_what_was_timed_is_printed_within_80_columns(card: Card) -> None:
    lines = list(report_page(card))
    assert "HuggingFaceTB/SmolLM2-135M (bfloat16)              31.6          -       1.10 GB" in lines
    assert len([line for line in lines if re.search(r" \((bfloat16|llama.cpp b1)\) ", line)]) == 1 + len(
        card.comparisons
    )
    assert max(map(len, lines)) <= 80


def test_a_small_divergence_is_not_printed_as_none() -> None:
    card = card_of_one()
    (first, *others) = card.comparisons[0].probes
    assert first.movement is not None
    moved = replace(first, movement=replace(first.movement, kl_mean=0.000005, kl_p99=0.0))
    near = replace(card.comparisons[0], probes=(moved, *others))
    lines = list(report_page(replace(card, comparisons=(near,))))
    assert "  KL mean at least 0.000005, p99 at least 0 nats" in lines


def test_answers_are_printed_within_80_columns(run: Run, tmp_path: Path) -> None:
    long = tmp_path / f"{'long' * 30}.jsonl"
    long.write_text(
        '{"prompt": "The favourite food of the arlo is [MASK].", "obj_label": "honey", "subject": "S"}\n'
        '{"prompt": "The favourite food of the [MASK].", "obj_label": "never seen at all"}\n'
    )
    for model in ("bert", "llama"):
        ended = run("probe", f"{{place}}/{model}", "-p", f"facts:{long}", *FACTS, "-o", f"answers-{model}")
        assert ended.code == 0
        assert max(map(len, ended.out.splitlines())) <= 80
        assert ended.err == ""
        assert f"{model}: answers in answers-{model}" in ended.out


def test_a_hostile_name_is_shown_harmless(run: Run, place: Path, tmp_path: Path) -> None:
    name = "\x1b[31mred\u202e" + "x" * 100
    shutil.copytree(place / "llama", tmp_path / name)
    ended = run("report", "{place}/on-llama", name, *FACTS, "--answers", "kept")
    printed = ended.out + run("probe", name, *FACTS, "-o", "answers").out
    assert ended.code == 0
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_the_record_of_a_probe_is_printed_as_json(run: Run) -> None:
    record = json.loads(run(*PROBE, *FACTS, "--json").out)
    assert record["schema"] == 1
    assert record["model"]["family"] == "causal"
    entry = record["probes"]["facts:facts.jsonl"]
    assert (entry["asked"], entry["right"], entry["dropped"]) == (64, 64, {})


def test_the_report_is_printed_as_json(run: Run, tmp_path: Path) -> None:
    ended = run("report", "{place}/on-llama", "{place}/on-llama-8", "--json", "-o", "report.json")
    printed = json.loads(ended.out, parse_constant=lambda value: pytest.fail(f"{value} is not JSON"))
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert {"schema", "verdict", "original", "compressed"} <= set(printed)
    (compressed,) = printed["compressed"]
    assert {"setup", "source", "probes", "grades"} <= set(compressed)
    (probe,) = compressed["probes"].values()
    wanted = (
        "n both lost gained neither accuracy_original accuracy_compressed kept kept_interval mcnemar_p flips "
        "answer_changed kl_mean by_relation by_subject"
    )
    assert set(wanted.split()) <= set(probe)
    assert probe["n"] == probe["both"] + probe["lost"] + probe["gained"] + probe["neither"] == 64


def test_a_gate_ends_with_3_and_says_the_numbers(run: Run) -> None:
    ended = run("report", "{place}/on-llama", "{place}/on-llama-8", "--fail-under", "0.9", "--json")
    kept = json.loads(ended.out)["compressed"][0]
    assert ended.code == 3
    assert f"keeps {kept['both']} of 64" in ended.err
    assert run("report", "{place}/on-llama", "{place}/on-llama", "--fail-under", "1").code == 0


def test_a_gate_in_python_is_an_error_that_bears_the_card(place: Path, tmp_path: Path) -> None:
    both, page = (place / "on-llama", place / "on-llama-8"), tmp_path / "card.json"
    with pytest.raises(GateNotMet, match="or lower `fail_under`") as unmet:
        compressknow.report(*both, fail_under=0.9, output=page)
    assert unmet.value.result.to_dict() == json.loads(page.read_text())
    with pytest.raises(GateUndecided):
        compressknow.report(both[0], both[0], fail_under=0.99, strict=True)
    assert compressknow.report(both[0], both[0], fail_under=1).comparisons[0].kept.value == 1


def test_a_strict_gate_that_so_few_facts_cannot_tell_ends_with_4(run: Run) -> None:
    gated = ("report", "{place}/on-llama", "{place}/on-llama", "--fail-under", "0.99")
    assert run(*gated).code == 0
    ended = run(*gated, "--strict")
    assert ended.code == 4
    assert "It is undecided whether 99 % of the knowledge is kept" in ended.err
    assert run("report", "{place}/on-llama", "{place}/on-llama-8", "--fail-under", "0.99", "--strict").code == 3


def test_the_command_to_try_next_has_the_path_that_was_given(run: Run, place: Path) -> None:
    ended = run("report", "{place}/llama", "{place}/llama-8", "-p", "facts:{place}/facts.jsonl", "--json")
    (compared,) = json.loads(ended.out)["compressed"]
    command = compared["next"].partition(": ")[2].partition(": ")[2]
    words = shlex.split(command)
    assert words[:4] == ["compressknow", "convert", str(place / "llama"), "OUTPUT"]
    # It can be pasted.
    assert run(*words[1:], "--dry-run").code == 0
    ended = run("report", "{place}/on-llama", "{place}/on-llama-8", "--json")
    assert ": compressknow convert MODEL OUTPUT " in json.loads(ended.out)["compressed"][0]["next"]


def test_what_to_do_next_stands_below_the_verdict(run: Run, place: Path) -> None:
    lines = run("report", "{place}/llama", "{place}/llama-8", *FACTS).out.split("\n")
    (line,) = [number for number, line in enumerate(lines) if line.startswith("Next: ")]
    assert lines[line - 1] == ""
    said = " ".join(lines[line:])
    # The manifest has the recipe, and 80 % was too much.
    assert "less than 95 % is kept; prune 40 % of the weights instead of 80 %" in said
    assert f"compressknow convert {place / 'llama'} OUTPUT --prune 0.4" in said


def test_no_line_about_several_models_ends_in_spaces(run: Run) -> None:
    lines = run(*REPORT, "{place}/on-llama-8").out.splitlines()
    assert any(line.startswith("Model ") for line in lines)
    assert lines == [line.rstrip() for line in lines]


def test_a_gate_stops_early_and_says_how_many_facts_it_took(run: Run) -> None:
    models = ("report", "{place}/llama", "{place}/llama-8", *FACTS, "--early", "--json")
    ended = run(*models, "--fail-under", "0.99")
    compressed = json.loads(ended.out)["compressed"][0]
    early = compressed["early"]
    assert ended.code == 3
    assert (early["of"], early["gate"], early["met"]) == (64, 0.99, False)
    assert early["facts"] <= compressed["n"] == 32
    assert early["kept_interval"][1] < 0.99
    assert f"It took {early['facts']} of 64 facts in random order to know that less than 99 %" in compressed["verdict"]
    met = run(*models, "--fail-under", "0.01")
    assert met.code == 0
    assert json.loads(met.out)["compressed"][0]["early"]["met"]


def test_a_report_on_answers_loads_no_model_library(place: Path, tmp_path: Path) -> None:
    code = "import sys; from compressknow.cli import main; main(); print(*sys.modules, file=sys.stderr)"
    arguments = [place / "on-llama", place / "on-llama-5", "-o", tmp_path / "r.html", "-o", tmp_path / "r.json"]
    command = [sys.executable, "-c", code, "report", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "compressknow.pages.card.make" in loaded
    unwanted = {"torch", "transformers", "tokenizers", "safetensors", "lm_eval", "datasets", "pandas", "scipy.stats"}
    assert not loaded & unwanted


def test_the_same_report_twice_is_the_same_to_the_byte(place: Path, tmp_path: Path) -> None:
    formats = ("html", "md", "json")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        outputs = [word for suffix in formats for word in ("-o", f"report.{suffix}")]
        command = [*PROGRAM, "report", str(place / "on-llama"), str(place / "on-llama-8"), *outputs]
        subprocess.run(command, cwd=tmp_path / name, check=True, capture_output=True)
    for suffix in formats:
        one, two = ((tmp_path / name / f"report.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two


def test_the_command_that_the_report_shows_makes_it_again(run: Run, place: Path, tmp_path: Path) -> None:
    given = ("report", "{place}/on-llama", "{place}/on-llama-8", "-o", "report.json", *FACTS, "--no-facts")
    assert run(*given).code == 0
    first: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").unlink()
    program, *arguments = first["command"].split()
    assert program == "compressknow"
    assert run(*arguments).code == 0
    assert json.loads((tmp_path / "report.json").read_text()) == first


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_token_beyond_the_embedding_is_one_message(family: str, run: Run, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / family, tmp_path / "beyond")
    file = tmp_path / "beyond" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    # The last of them: the facts before it are evaluated as ever.
    vocabulary[max((word for word in vocabulary if word.isalpha()), key=vocabulary.__getitem__)] = 100_000
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    refused(run("probe", "beyond", *FACTS, "-o", "answers"), 1, "gives token 100,000", "they do not match")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("file", "text", "arguments"),
    [
        ("deep.jsonl", f'{{"prompt": {DEEP}}}', ("probe", "{place}/bert", "-p", "facts:deep.jsonl", "-o", "a")),
        ("deep.toml", f"steps = {DEEP}", ("convert", "{place}/bert", "new", "--recipe", "deep.toml")),
        ("deep.json", DEEP, ("convert", "{place}/bert", "new", "--recipe", "deep.json")),
        ("deep.toml", f"axes = {DEEP}", ("sweep", "{place}/bert", "-o", "new", "--grid", "deep.toml")),
        ("config.json", DEEP, ("inspect", ".")),
        ("probe.json", DEEP, ("report", ".", "{place}/on-bert")),
        ("compressknow.json", DEEP, ("verify", ".")),
    ],
)
def test_a_file_nested_too_deeply_is_one_message(
    file: str, text: str, arguments: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    ended = run(*arguments)
    assert ended.code in (1, 2)
    refused(ended, ended.code)


def test_a_tokenizer_that_panics_on_the_facts_is_one_message(run: Run, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "llama", tmp_path / "panics")
    file = tmp_path / "panics" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}), encoding="utf-8")
    refused(run("probe", "panics", *FACTS, "-o", "answers"), 1, "tokenizer of panics", "chunk size must be non-zero")
