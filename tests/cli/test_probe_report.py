"""`probe` and `report` on the command line: their output, their imports and their error messages."""

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
from compressknow.base.errors import GateNotMet, GateUndecided, UsageError
from compressknow.cli import main
from compressknow.cli.report import report_page
from compressknow.evaluate.answers import RECORD, read_answers
from compressknow.pages.records import Card
from tests.cli.conftest import Run, check_refused
from tests.evaluate.layouts import read_facts_file
from tests.knowing import save_trained, write_facts
from tests.pages.card.cards import make_card_of_one, make_card_of_several

PROGRAM = [sys.executable, "-c", "import sys; from compressknow.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `bert`, `llama` and `t5`, two compressed Llamas, and the answers of all to `facts.jsonl`."""
    folder = tmp_path_factory.mktemp("models")
    facts = write_facts(folder / "facts.jsonl")
    for family in ("bert", "llama", "t5"):
        save_trained(family, folder / family)
        assert main(["probe", str(folder / family), "-p", f"facts:{facts}", "-o", str(folder / f"on-{family}")]) == 0
    for amount in (5, 8):
        name = f"llama-{amount}"
        assert main(["convert", str(folder / "llama"), str(folder / name), "--prune", f"0.{amount}"]) == 0
        options = ["-p", f"facts:{facts}", "-o", folder / f"on-{name}", "--reference", folder / "on-llama"]
        assert main(["probe", str(folder / name), *map(str, options)]) == 0
    return folder


def check_nothing_written(folder: Path) -> None:
    assert not [path for path in folder.iterdir() if path.name != "model"]


def test_help_shows_a_line_of_facts(run: Run) -> None:
    for command in ("probe", "report"):
        shown = run(command, "--help").out
        for word in ("atlas", "lama:trex", "facts:FILE.jsonl", "lm-eval:TASK", '"obj_label": "Paris"', "candidates"):
            assert word in shown
        example = re.search(r"\{\"relation.*?\}", shown, re.DOTALL)
        assert example is not None
        assert {"prompt", "obj_label", "candidates", "popularity"} <= set(json.loads(example.group()))


def test_line_of_facts_in_the_help_is_valid(run: Run, tmp_path: Path) -> None:
    example = re.search(r"\{\"relation.*?\}", run("probe", "--help").out, re.DOTALL)
    assert example is not None
    (tmp_path / "mine.jsonl").write_text(example.group().replace("\n", " "))
    (fact,) = read_facts_file(tmp_path / "mine.jsonl").facts
    assert (fact.obj_label, fact.popularity) == ("Paris", 68000000)


def test_facts_with_indistinguishable_candidates_are_dropped(run: Run, tmp_path: Path, models: Path) -> None:
    unknown = {"prompt": "The capital of France is [MASK].", "obj_label": "Paris", "candidates": ["Paris", "Rome"]}
    spaced = unknown | {"obj_label": "the capital", "candidates": ["the capital", "the  capital"]}
    for fact, reason in ((unknown, "the unknown token of this model's tokenizer"), (spaced, "the same tokens")):
        (tmp_path / "mine.jsonl").write_text(json.dumps(fact))
        result = run("probe", "{models}/llama", "-p", "facts:mine.jsonl", "-o", "answers")
        assert result.code == 2
        assert f"1 dropped: the object and another candidate are {reason}" in result.err
    (tmp_path / "more.jsonl").write_text(json.dumps(unknown) + "\n" + (models / "facts.jsonl").read_text())
    result = run("probe", "{models}/llama", "-p", "facts:more.jsonl", "-o", "answers")
    assert "  1 of 65 read dropped: the object and another candidate" in result.out


PROBE, REPORT = ("probe", "{models}/llama", "-o", "answers"), ("report", "{models}/on-llama", "{models}/on-llama-5")
FACTS = ("-p", "facts:{models}/facts.jsonl")
BAD_INPUT: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "an unknown probe": ((*PROBE, "-p", "atlsa"), 2, ("Unknown probe 'atlsa'", "Did you mean atlas?")),
    "a set without its data": ((*PROBE, "-p", "lama:trex"), 2, ("lama:trex does not come with", "--data DIR")),
    "a data folder without the set": ((*PROBE, "-p", "bear", "--data", "."), 2, ("does not contain bear",)),
    "a missing data folder": ((*PROBE, "-p", "bear", "--data", "none"), 2, ("'none' does not exist",)),
    "a missing facts file": ((*PROBE, "-p", "facts:none.jsonl"), 2, ("There is no file none.jsonl",)),
    "facts in the home of an unknown user": (
        (*PROBE, "-p", "facts:~no-such-user/x.jsonl"),
        2,
        ("There is no file ~no-",),
    ),
    "a template that does not exist": ((*PROBE, "-p", "atlas", "--template", "9"), 2, ("template 9",)),
    "a limit of zero": ((*PROBE, *FACTS, "--limit", "0"), 2, ("--limit",)),
    "a wrong column": ((*PROBE, "-p", "hf:x", "--map", "subjekt=a"), 2, ("subjekt",)),
    "a missing model": (("probe", "./none", *FACTS, "-o", "answers"), 1, ("./none: no such folder",)),
    "a file for a model": (("probe", "{models}/facts.jsonl", "-o", "answers"), 1, ("is a file, not a checkpoint",)),
    "a missing GGUF file": (("probe", "none/x.gguf", "-o", "answers"), 1, ("no such file",)),
    "a model of the Hub without a network": (
        ("probe", "some/model", "-o", "answers"),
        1,
        ("some/model is not a local folder", "Hub"),
    ),
    "answers for a model": (("probe", "{models}/on-llama", "-o", "answers"), 1, ("config.json is missing",)),
    "a reference that is not an answers folder": (
        (*PROBE, *FACTS, "--reference", "{models}/bert"),
        1,
        ("bert is not an answers folder",),
    ),
    "a reference of another family": ((*PROBE, *FACTS, "--reference", "{models}/on-bert"), 1, ("differ in family",)),
    "options that no probe takes": (
        (*PROBE, *FACTS, "--template", "2", "--context", "64", "--map", "subject=a"),
        2,
        ("No probe here takes --template, --context, --map.", "--template is for atlas, bear; --context is for text;"),
    ),
    "data for probes that need none": (
        ("report", "{models}/llama", "{models}/llama-5", "--data", "{models}"),
        2,
        ("No probe here takes --data.", "--data is for lama, bear, lm-eval."),
    ),
    "a limit for stored answers": (
        (*REPORT, "--limit", "9"),
        2,
        ("--limit 9 decides what is evaluated", "have other answers"),
    ),
    "wordings for stored answers": (
        (*REPORT, "--templates", "2"),
        2,
        ("--templates 2 decides what is evaluated", "have other answers"),
    ),
    "a wording for stored answers without wordings": (
        (*REPORT, "--template", "2"),
        2,
        ("No probe here takes --template.",),
    ),
    "the speed of stored answers with an early gate": (
        (*REPORT, "--time", "--early", "--fail-under", "0.9"),
        2,
        ("--time measures models, and these are answers folders",),
    ),
    "a dtype for stored answers": ((*REPORT, "--dtype", "bfloat16"), 2, ("--dtype determines how models are run",)),
    "a runtime for stored answers": (
        (*REPORT, "--runtime", "transformers"),
        2,
        ("--runtime determines how models are run",),
    ),
    "the speed of stored answers": ((*REPORT, "--time"), 2, ("--time measures models, and these are answers folders",)),
    "a revision of a folder": ((*PROBE, *FACTS, "--revision", "v1"), 2, ("which has no revision v1",)),
    "a revision of answers": ((*REPORT, "--revision", "v1"), 2, ("which has no revision v1",)),
    "a revision of a server": (
        ("probe", "http://[::1]:9", "-o", "answers", "--revision", "v1"),
        2,
        ("This is a server, which has no revision v1.",),
    ),
    "parallel requests without a server": ((*PROBE, *FACTS, "--parallel", "8"), 2, ("--parallel is for a server",)),
    "a limit without a probe": (
        ("compare", "{models}/llama", "{models}/llama-5", "--limit", "9"),
        2,
        ("needs a probe",),
    ),
    "an empty model": (("report", "", "{models}/llama-5"), 2, ("The word after report is empty.", "variable")),
    "an empty folder": ((*PROBE, *FACTS, "--data", ""), 2, ("The word after --data is empty.",)),
    "an empty gate": ((*REPORT, "--fail-under="), 2, ("The value of --fail-under is empty.",)),
    "no compressed model": (("report", "{models}/on-llama"), 2, ("Missing argument 'COMPRESSED...'",)),
    "an early gate of several models": (
        (*REPORT, "{models}/on-llama-8", "--fail-under", "0.9", "--early"),
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
        ("report", "{models}/llama", "{models}/llama-5", "--templates", "3", "--fail-under", "0.9", "--early"),
        2,
        ("--early evaluates facts in one wording", "Leave out --early or --templates"),
    ),
    "a gate in percent": ((*REPORT, "--fail-under", "95"), 2, ("--fail-under must be between 0 and 1", "0.95")),
    "a gate without a name": ((*REPORT, "--fail-under", "=0.9"), 2, ("--fail-under =0.9 names no domain", "variable")),
    "a gate that is not a number": ((*REPORT, "--fail-under", "nan"), 2, ("--fail-under must be between 0 and 1",)),
    "a gate for an unknown relation": (
        ("report", "{models}/llama", "{models}/llama-5", *FACTS, "--fail-under", "captial=0.9", "--answers", "kept"),
        2,
        ("no facts have the domain or relation captial", "Did you mean capital?"),
    ),
    "a gate for an unknown relation of stored answers": (
        (*REPORT, "--fail-under", "captial=0.9"),
        2,
        ("no facts have the domain or relation captial", "Did you mean capital?"),
    ),
    "a gate for a text": (
        ("report", "{models}/llama", "{models}/llama-5", "-p", "text:{models}/facts.jsonl", "--fail-under", "0.9"),
        2,
        ("--fail-under needs facts, and text:facts.jsonl is a text", "-p atlas"),
    ),
    "an unknown format": ((*REPORT, "-o", "report.pdf"), 2, ("report.pdf", ".html, .md, .json or .xml")),
    "an output without a format": ((*REPORT, "-o", "report"), 2, (".html, .md, .json or .xml",)),
    "an output in a missing folder": ((*REPORT, "-o", "none/report.md"), 1, ("none: no such folder",)),
    # Nobody can create a file there; where there is no /proc, the folder is missing.
    "an output in a read-only folder": (
        ("report", "{models}/llama", "{models}/llama-5", *FACTS, "--answers", "kept", "-o", "/proc/report.html"),
        1,
        ("/proc",),
    ),
    "two outputs with the same name": ((*REPORT, "-o", "a.md", "-o", "./a.md"), 2, ("Two reports have the same name",)),
    "a probe without stored answers": (
        (*REPORT, "-p", "atlas"),
        2,
        ("was not evaluated on atlas", "facts:facts.jsonl"),
    ),
    "answers of another family": (
        ("report", "{models}/on-bert", "{models}/on-llama"),
        1,
        ("llama is not a compressed version of bert: they differ in family",),
    ),
    "models of different families": (
        ("report", "{models}/bert", "{models}/t5", *FACTS, "--answers", "kept", "-o", "report.html"),
        1,
        ("t5 is not a compressed version of bert: they differ in family",),
    ),
    "a missing compressed model": (
        ("report", "{models}/llama", "./none", "-o", "report.html"),
        1,
        ("./none: no such folder",),
    ),
    "answers to a missing facts file": (
        ("report", "{models}/on-llama", "{models}/llama-5"),
        2,
        ("There is no file facts.jsonl",),
    ),
    "other facts of the same probe": (
        ("report", "{models}/on-llama", "{models}/llama-5", *FACTS, "--limit", "9", "--answers", "kept"),
        2,
        ("was evaluated on other facts or prompts of facts:facts.jsonl", "--limit"),
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_message_and_writes_nothing(run: Run, tmp_path: Path, name: str) -> None:
    arguments, code, words = BAD_INPUT[name]
    check_refused(run(*arguments), code, *words)
    check_nothing_written(tmp_path)


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(models / family, tmp_path / "model"))


def test_encoder_without_a_head_is_refused(run: Run, models: Path, tmp_path: Path) -> None:
    hf.BertModel.from_pretrained(models / "bert").save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(models / "bert").save_pretrained(tmp_path / "model")
    result = run("probe", "model", *FACTS, "-o", "answers")
    check_refused(
        result, 1, "model has no language-modelling head: its config names BertModel", "cls.predictions", "random"
    )
    check_nothing_written(tmp_path)


def test_encoder_decoder_without_a_head_is_refused(run: Run, models: Path, tmp_path: Path) -> None:
    config = hf.AutoConfig.from_pretrained(models / "t5", tie_word_embeddings=False)
    hf.T5Model(config).save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(models / "t5").save_pretrained(tmp_path / "model")
    result = run("report", "{models}/on-t5", "model", *FACTS, "--answers", "kept")
    check_refused(result, 1, "no language-modelling head: its config names T5Model", "not tied to the embedding")
    check_nothing_written(tmp_path)


def test_classifier_is_refused(run: Run, models: Path, tmp_path: Path) -> None:
    hf.BertForSequenceClassification.from_pretrained(models / "bert").save_pretrained(tmp_path / "model")
    hf.AutoTokenizer.from_pretrained(models / "bert").save_pretrained(tmp_path / "model")
    check_refused(run("probe", "model", *FACTS, "-o", "answers"), 1, "no language-modelling head", "cls.predictions")
    check_nothing_written(tmp_path)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_model_without_a_tokenizer_is_refused(
    run: Run, model: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """For BERT and T5, transformers would make up a tokenizer to which every word is unknown."""
    folder = model(family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    check_refused(run("probe", "model", *FACTS, "-o", "answers"), 1, "model has no tokenizer", "tokenizer.json")
    check_nothing_written(tmp_path)


def test_masked_model_without_a_mask_token_is_refused(run: Run, model: Callable[[str], Path], tmp_path: Path) -> None:
    path = model("bert") / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["mask_token"]
    path.write_text(json.dumps(config))
    check_refused(run("probe", "model", *FACTS, "-o", "answers"), 1, "no mask token", "mask_token")
    check_nothing_written(tmp_path)


def test_compressed_model_with_another_vocabulary_is_refused(
    run: Run, model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = model("llama") / "tokenizer.json"
    path.write_text(path.read_text().replace('"capital"', '"Capital"'))
    result = run("report", "{models}/on-llama", "model", *FACTS, "--answers", "kept")
    check_refused(result, 1, "model is not a compressed version of llama: they differ in vocabulary")
    check_nothing_written(tmp_path)


def test_probe_without_usable_facts_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model").write_text('{"prompt": "The first [MASK] wins.", "obj_label": "never seen"}')
    result = run("probe", "{models}/bert", "-p", "facts:model", "-o", "answers")
    check_refused(result, 2, "facts:model has no fact that this model can be evaluated on", "1 dropped: ")
    check_nothing_written(tmp_path)


def test_model_that_computes_nan_is_reported_as_broken(run: Run, model: Callable[[str], Path]) -> None:
    """Its weights are finite but too large, so only its answers show it."""
    path = model("llama") / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        weights[name] = weights[name] * 3e38 if "down_proj" in name else weights[name]
    save_file({name: weight.clamp(-3e38, 3e38) for name, weight in weights.items()}, path, metadata={"format": "pt"})
    result = run("report", "{models}/on-llama", "model", *FACTS, "--answers", "kept", "-o", "report.json")
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "Keeps 0 of 64 facts" in text
    assert "it is broken" in text
    assert "find an intact copy of the model" in text
    assert "compress less" not in result.out


def test_existing_output_is_replaced_only_with_overwrite(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    mine = "report.md exists already, and was not written by compressknow"
    check_refused(run(*REPORT, "-o", "report.html", "-o", "report.md"), 1, mine)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    assert (tmp_path / "report.md").read_text() == "mine"
    check_refused(run(*REPORT, "-o", "report.md", "--overwrite"), 1, mine)
    assert (tmp_path / "report.md").read_text() == "mine"
    (tmp_path / "report.md").unlink()
    pages = [f"-oreport{suffix}" for suffix in (".html", ".md", ".json")]
    assert run(*REPORT, *pages).code == 0
    check_refused(run(*REPORT, *pages), 1, "report.html exists already", "--overwrite")
    (tmp_path / "report.md").write_text((tmp_path / "report.md").read_text().replace("Keeps", "Kept"))
    assert run(*REPORT, *pages, "--overwrite").code == 0
    assert "Keeps" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "report.md"])
def test_files_of_a_checkpoint_are_never_overwritten(run: Run, tmp_path: Path, name: str) -> None:
    assert run(*REPORT, "-o", "report.md").code == 0
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_text('{"schema": 1, "verdict": "mine"}')
    before = (tmp_path / name).read_bytes()
    check_refused(run(*REPORT, "-o", name, "--overwrite"), 1, f"{name} is in a checkpoint folder: not overwritten")
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["mine.json", "mine.html", "mine.md", "empty.json"])
def test_files_of_others_are_never_overwritten(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"schema": 1, "setup": "compressknow"}' if name.startswith("mine") else "")
    before = (tmp_path / name).read_bytes()
    check_refused(
        run(*REPORT, "-o", name, "--overwrite"),
        1,
        f"{name} exists already, and was not written by compressknow: not overwritten",
    )
    assert (tmp_path / name).read_bytes() == before


def test_output_that_is_a_dangling_link_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "report.md").symlink_to(tmp_path / "gone")
    check_refused(run(*REPORT, "-o", "report.md", "--overwrite"), 1, "report.md is a link that leads nowhere")


def test_damaged_answers_are_refused(run: Run, models: Path, tmp_path: Path) -> None:
    answers = Path(shutil.copytree(models / "on-llama-5", tmp_path / "model"))
    (answers / "answers.parquet").write_bytes(b"PAR1 no more")
    check_refused(run("report", "{models}/on-llama", "model"), 1, "its hash differs")
    (answers / RECORD).write_text("{}")
    check_refused(run("report", "{models}/on-llama", "model"), 1, "is not an answers folder")
    check_nothing_written(tmp_path)


def test_answers_to_other_facts_are_refused(run: Run, models: Path, tmp_path: Path) -> None:
    assert run("probe", "{models}/llama-5", *FACTS, "--limit", "30", "-o", "model").code == 0
    check_refused(
        run("report", "{models}/on-llama", "model"),
        1,
        "not evaluated on facts:facts.jsonl in the same way",
        "--limit None and 30",
    )


def test_stored_answers_and_a_model_give_the_same_report(run: Run, tmp_path: Path) -> None:
    evaluated = run("report", "{models}/on-llama", "{models}/llama-8", *FACTS, "--answers", "kept", "--json")
    stored = run("report", "{models}/on-llama", "{models}/on-llama-8", *FACTS, "--json")
    assert evaluated.code == stored.code == 0
    first, second = json.loads(evaluated.out), json.loads(stored.out)
    assert first["compressed"] == second["compressed"]
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_model_is_evaluated_with_the_settings_of_stored_answers(run: Run, tmp_path: Path) -> None:
    assert run("probe", "{models}/llama", *FACTS, "--limit", "20", "--seed", "3", "-o", "model").code == 0
    result = run("report", "model", "{models}/llama-8", *FACTS, "--answers", "kept", "--json")
    assert result.code == 0, result.err
    (probe,) = json.loads(result.out)["compressed"][0]["probes"].values()
    assert (probe["n"], probe["limit"], probe["seed"]) == (20, 20, 3)


@pytest.mark.parametrize("compressed", [["on-llama-8"], ["on-llama-5", "on-llama-8"]])
def test_report_is_printed_within_80_columns(run: Run, compressed: list[str]) -> None:
    result = run("report", "{models}/on-llama", *(f"{{models}}/{name}" for name in compressed))
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= 80
    for name in compressed:
        assert name.removeprefix("on-") in result.out or len(compressed) == 1
    assert result.err == ""


def test_models_with_the_same_name_and_setup_are_numbered(run: Run) -> None:
    result = run("report", "{models}/on-llama", "{models}/on-llama-8", "{models}/on-llama-8", "{models}/on-llama-5")
    names = re.findall(r"^(\S.*?)  +\d[\d.]* kB ", result.out, re.MULTILINE)
    assert [name[:2] for name in names[:2]] == ["1.", "2."]
    assert names[0][2:] == names[1][2:]
    assert not names[2].startswith("3.")


@pytest.mark.parametrize("card", [make_card_of_one(), make_card_of_several((20,))], ids=["one", "several"])
def test_speed_is_printed_within_80_columns(card: Card) -> None:
    lines = list(report_page(card))
    assert "HuggingFaceTB/SmolLM2-135M (bfloat16)              31.6          -       1.10 GB" in lines
    assert len([line for line in lines if re.search(r" \((bfloat16|llama.cpp b1)\) ", line)]) == 1 + len(
        card.comparisons
    )
    assert max(map(len, lines)) <= 80


def test_small_divergence_is_not_rounded_to_zero() -> None:
    card = make_card_of_one()
    (first, *others) = card.comparisons[0].probes
    assert first.movement is not None
    probe = replace(first, movement=replace(first.movement, kl_mean=0.000005, kl_p99=0.0))
    comparison = replace(card.comparisons[0], probes=(probe, *others))
    lines = list(report_page(replace(card, comparisons=(comparison,))))
    assert "  KL mean at least 0.000005, p99 at least 0 nats" in lines


def test_probe_prints_within_80_columns(run: Run, tmp_path: Path) -> None:
    long = tmp_path / f"{'long' * 30}.jsonl"
    long.write_text(
        '{"prompt": "The favourite food of the arlo is [MASK].", "obj_label": "honey", "subject": "S"}\n'
        '{"prompt": "The favourite food of the [MASK].", "obj_label": "never seen at all"}\n'
    )
    for model in ("bert", "llama"):
        result = run("probe", f"{{models}}/{model}", "-p", f"facts:{long}", *FACTS, "-o", f"answers-{model}")
        assert result.code == 0
        assert max(map(len, result.out.splitlines())) <= 80
        assert result.err == ""
        assert f"{model}: answers in answers-{model}" in result.out


def test_control_characters_of_names_are_not_printed(run: Run, models: Path, tmp_path: Path) -> None:
    name = "\x1b[31mred\u202e" + "x" * 100
    shutil.copytree(models / "llama", tmp_path / name)
    result = run("report", "{models}/on-llama", name, *FACTS, "--answers", "kept")
    printed = result.out + run("probe", name, *FACTS, "-o", "answers").out
    assert result.code == 0
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert max(map(len, printed.splitlines())) <= 160


def test_probe_prints_its_record_as_json(run: Run) -> None:
    record = json.loads(run(*PROBE, *FACTS, "--json").out)
    assert record["schema"] == 1
    assert record["model"]["family"] == "causal"
    entry = record["probes"]["facts:facts.jsonl"]
    assert (entry["asked"], entry["right"], entry["dropped"]) == (64, 64, {})


def test_report_prints_the_json_that_it_writes(run: Run, tmp_path: Path) -> None:
    result = run("report", "{models}/on-llama", "{models}/on-llama-8", "--json", "-o", "report.json")
    printed = json.loads(result.out, parse_constant=lambda value: pytest.fail(f"{value} is not JSON"))
    assert printed == json.loads((tmp_path / "report.json").read_text())
    assert {"schema", "verdict", "original", "compressed"} <= set(printed)
    (compressed,) = printed["compressed"]
    assert {"setup", "source", "probes", "grades"} <= set(compressed)
    (probe,) = compressed["probes"].values()
    expected = (
        "n both lost gained neither accuracy_original accuracy_compressed kept kept_interval mcnemar_p flips "
        "answer_changed kl_mean by_relation by_subject"
    )
    assert set(expected.split()) <= set(probe)
    assert probe["n"] == probe["both"] + probe["lost"] + probe["gained"] + probe["neither"] == 64


def test_unmet_gate_exits_with_3_and_prints_the_counts(run: Run) -> None:
    result = run("report", "{models}/on-llama", "{models}/on-llama-8", "--fail-under", "0.9", "--json")
    kept = json.loads(result.out)["compressed"][0]
    assert result.code == 3
    assert f"keeps {kept['both']} of 64" in result.err
    assert run("report", "{models}/on-llama", "{models}/on-llama", "--fail-under", "1").code == 0


def test_unmet_gate_in_python_raises_an_error_with_the_card(models: Path, tmp_path: Path) -> None:
    both, page = (models / "on-llama", models / "on-llama-8"), tmp_path / "card.json"
    with pytest.raises(GateNotMet, match="or lower `fail_under`") as unmet:
        compressknow.report(*both, fail_under=0.9, output=page)
    assert unmet.value.result.to_dict() == json.loads(page.read_text())
    with pytest.raises(GateUndecided):
        compressknow.report(both[0], both[0], fail_under=0.99, strict=True)
    assert compressknow.report(both[0], both[0], fail_under=1).comparisons[0].kept.value == 1


@pytest.mark.parametrize(
    ("compressed", "known", "message"),
    [([], "recognized", "There is no compressed model"), (["llama-5"], "guessed", "'guessed' is not a definition of")],
)
def test_wrong_arguments_in_python_are_refused_before_any_work(
    models: Path, tmp_path: Path, compressed: list[str], known: str, message: str
) -> None:
    paths, facts = [models / name for name in compressed], f"facts:{models / 'facts.jsonl'}"
    with pytest.raises(UsageError, match=message):
        compressknow.report(models / "llama", paths, facts, known=known, answers=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_undecided_strict_gate_exits_with_4(run: Run) -> None:
    gated = ("report", "{models}/on-llama", "{models}/on-llama", "--fail-under", "0.99")
    assert run(*gated).code == 0
    result = run(*gated, "--strict")
    assert result.code == 4
    assert "It is undecided whether 99 % of the knowledge is kept" in result.err
    assert run("report", "{models}/on-llama", "{models}/on-llama-8", "--fail-under", "0.99", "--strict").code == 3


def test_next_command_has_the_given_path(run: Run, models: Path) -> None:
    result = run("report", "{models}/llama", "{models}/llama-8", "-p", "facts:{models}/facts.jsonl", "--json")
    (compared,) = json.loads(result.out)["compressed"]
    command = compared["next"].partition(": ")[2].partition(": ")[2]
    words = shlex.split(command)
    assert words[:4] == ["compressknow", "convert", str(models / "llama"), "OUTPUT"]
    # The command is valid.
    assert run(*words[1:], "--dry-run").code == 0
    result = run("report", "{models}/on-llama", "{models}/on-llama-8", "--json")
    assert ": compressknow convert MODEL OUTPUT " in json.loads(result.out)["compressed"][0]["next"]


def test_next_step_is_printed_below_the_verdict(run: Run, models: Path) -> None:
    lines = run("report", "{models}/llama", "{models}/llama-8", *FACTS).out.split("\n")
    (line,) = [number for number, line in enumerate(lines) if line.startswith("Next: ")]
    assert lines[line - 1] == ""
    advice = " ".join(lines[line:])
    assert "less than 95 % is kept; prune 40 % of the weights instead of 80 %" in advice
    assert f"compressknow convert {models / 'llama'} OUTPUT --prune 0.4" in advice


def test_no_model_above_the_given_size_is_recommended(run: Run) -> None:
    several = ("report", "{models}/on-llama", "{models}/on-llama-5", "{models}/on-llama-8", "--json")
    recommended = json.loads(run(*several, "--within", "1kB").out)["recommended"]
    assert (recommended["within"], recommended["place"]) == (1000, None)
    assert json.loads(run(*several).out)["recommended"]["place"] is not None


def test_known_produced_counts_what_each_produces(run: Run, models: Path) -> None:
    names = ("on-llama", "on-llama-8")
    sides = [read_answers(models / name).answers for name in names]
    before, after = ({answer.fact_id for answer in side if answer.grade == "produced"} for side in sides)
    printed = json.loads(run("report", *(f"{{models}}/{name}" for name in names), "--known", "produced", "--json").out)
    counts = [printed["compressed"][0][name] for name in ("both", "lost", "gained")]
    assert counts == [len(before & after), len(before - after), len(after - before)]
    assert len(after) < sum(answer.correct for answer in sides[1])


def test_table_of_several_models_has_no_trailing_spaces(run: Run) -> None:
    lines = run(*REPORT, "{models}/on-llama-8").out.splitlines()
    assert any(line.startswith("Model ") for line in lines)
    assert lines == [line.rstrip() for line in lines]


def test_early_gate_prints_how_many_facts_it_took(run: Run) -> None:
    gated = ("report", "{models}/llama", "{models}/llama-8", *FACTS, "--early", "--json")
    result = run(*gated, "--fail-under", "0.99")
    compressed = json.loads(result.out)["compressed"][0]
    early = compressed["early"]
    assert result.code == 3
    assert (early["of"], early["gate"], early["met"]) == (64, 0.99, False)
    assert early["facts"] <= compressed["n"] == 32
    assert early["kept_interval"][1] < 0.99
    assert f"It took {early['facts']} of 64 facts in random order to know that less than 99 %" in compressed["verdict"]
    met = run(*gated, "--fail-under", "0.01")
    assert met.code == 0
    assert json.loads(met.out)["compressed"][0]["early"]["met"]
    # It recognizes some facts that it does not say.
    printed = [run(*gated, "--fail-under", "0.5", "--known", known).out for known in ("produced", "recognized")]
    produced, recognized = (json.loads(each)["compressed"][0]["early"]["kept"] for each in printed)
    assert produced < recognized


def test_report_on_stored_answers_loads_no_model_library(models: Path, tmp_path: Path) -> None:
    code = "import sys; from compressknow.cli import main; main(); print(*sys.modules, file=sys.stderr)"
    arguments = [models / "on-llama", models / "on-llama-5", "-o", tmp_path / "r.html", "-o", tmp_path / "r.json"]
    command = [sys.executable, "-c", code, "report", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "compressknow.pages.card.make" in loaded
    unwanted = {"torch", "transformers", "tokenizers", "safetensors", "lm_eval", "datasets", "pandas", "scipy.stats"}
    assert not loaded & unwanted


def test_reports_of_two_runs_are_the_same_bytes(models: Path, tmp_path: Path) -> None:
    formats = ("html", "md", "json")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        outputs = [word for suffix in formats for word in ("-o", f"report.{suffix}")]
        command = [*PROGRAM, "report", str(models / "on-llama"), str(models / "on-llama-8"), *outputs]
        subprocess.run(command, cwd=tmp_path / name, check=True, capture_output=True)
    for suffix in formats:
        one, two = ((tmp_path / name / f"report.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two


def test_command_in_the_json_repeats_the_report(run: Run, models: Path, tmp_path: Path) -> None:
    command = ("report", "{models}/on-llama", "{models}/on-llama-8", "-o", "report.json", *FACTS, "--no-facts")
    assert run(*command).code == 0
    first: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").unlink()
    program, *arguments = first["command"].split()
    assert program == "compressknow"
    assert run(*arguments).code == 0
    assert json.loads((tmp_path / "report.json").read_text()) == first


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_token_beyond_the_embedding_is_one_message(family: str, run: Run, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / family, tmp_path / "beyond")
    file = tmp_path / "beyond" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    # The word with the highest id: earlier facts do not need it.
    vocabulary[max((word for word in vocabulary if word.isalpha()), key=vocabulary.__getitem__)] = 100_000
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    check_refused(run("probe", "beyond", *FACTS, "-o", "answers"), 1, "gives token 100,000", "they do not match")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("file", "text", "arguments"),
    [
        ("deep.jsonl", f'{{"prompt": {DEEP}}}', ("probe", "{models}/bert", "-p", "facts:deep.jsonl", "-o", "a")),
        ("deep.toml", f"steps = {DEEP}", ("convert", "{models}/bert", "new", "--recipe", "deep.toml")),
        ("deep.json", DEEP, ("convert", "{models}/bert", "new", "--recipe", "deep.json")),
        ("deep.toml", f"axes = {DEEP}", ("sweep", "{models}/bert", "-o", "new", "--grid", "deep.toml")),
        ("config.json", DEEP, ("inspect", ".")),
        ("probe.json", DEEP, ("report", ".", "{models}/on-bert")),
        ("compressknow.json", DEEP, ("verify", ".")),
    ],
)
def test_too_deeply_nested_file_is_one_message(
    file: str, text: str, arguments: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    (tmp_path / file).write_text(text, encoding="utf-8")
    result = run(*arguments)
    assert result.code in (1, 2)
    check_refused(result, result.code)


def test_panicking_tokenizer_is_one_message(run: Run, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "llama", tmp_path / "panics")
    file = tmp_path / "panics" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "FixedLength", "length": 0}}), encoding="utf-8")
    check_refused(
        run("probe", "panics", *FACTS, "-o", "answers"), 1, "tokenizer of panics", "chunk size must be non-zero"
    )
