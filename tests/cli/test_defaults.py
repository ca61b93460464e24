"""A project's defaults: which file counts, which value does, and what a file may not say."""

from __future__ import annotations

import json
import os
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import click
import pytest

from compressknow.base.errors import UnusedOptions, UsageError
from compressknow.base.packages import is_installed
from compressknow.cli import COMMANDS, cli, main
from compressknow.cli.options import Command, read_project_defaults, read_type_of
from compressknow.cli.report import get_command
from tests.models import save_tiny


@click.command()
@click.argument("model")
@click.option("-p", "--probe", multiple=True)
@click.option("--limit", type=int)
@click.option("--answers", type=click.Path(path_type=Path))
@click.option("--trust-remote-code", is_flag=True)
def ask(**given: Any) -> tuple[dict[str, Any], str]:
    return given, get_command()


@click.command()
@click.option("--seed", type=int)
@click.option("-p", "--probe")
def tell(seed: int | None, probe: str | None) -> None: ...


def called(*words: str) -> tuple[dict[str, Any], str]:
    found: tuple[dict[str, Any], str] = ask.main(
        ["M", *words],
        prog_name="ask",
        standalone_mode=False,
        default_map=read_project_defaults("ask", ask, ["ask", "tell"], {"ask": ask, "tell": tell}.get),
    )
    return found


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    return tmp_path


def test_the_nearest_file_the_commands_own_table_and_the_command_line_win(project: Path) -> None:
    assert called()[0] == {"model": "M", "probe": (), "limit": None, "answers": None, "trust_remote_code": False}
    (project / "pyproject.toml").write_text("[tool.compressknow]\nlimit = 1\n[tool.other]\nx = 1\n")
    assert called()[0]["limit"] == 1
    (project / "inner" / "pyproject.toml").write_text("[project]\nname = 'mine'\n")
    assert called()[0]["limit"] == 1
    file = project / "compressknow.toml"
    file.write_text(
        'limit = 2\nanswers = "kept"\nseed = 3\n[ask]\nlimit = 4\nprobe = ["a", "b"]\n[tell]\nprobe = "c"\n'
    )
    given, command = called()
    assert given["limit"] == 4
    assert given["probe"] == ("a", "b")
    assert given["answers"] == project / "kept"
    # What is printed to be repeated holds elsewhere too.
    assert command.startswith("compressknow ask M -p a -p b --limit 4 --answers ")
    assert called("--limit", "5", "-p", "z")[0] | {"answers": 0} == {**given, "limit": 5, "probe": ("z",), "answers": 0}


def test_a_file_of_facts_is_sought_beside_the_projects_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "mine.jsonl").write_text('{"prompt": "Paris lies on the [MASK]."}\n')
    (project / "atlas").write_text("no probe\n")
    probes = ["facts:mine.jsonl", "facts:other.jsonl", "text:C:/x.txt", "atlas", "hf:a/b", "hf:"]
    (project / "compressknow.toml").write_text(f"probe = {probes}\n")
    assert called()[0]["probe"] == (f"facts:{project / 'mine.jsonl'}", *probes[1:])
    assert main(["report", "./a", "./b", "-p", "facts:mine.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("Error: There is no file mine.jsonl.")
    (project / "compressknow.toml").write_text('probe = ["facts:mine.jsonl"]\n')
    assert main(["report", "./a", "./b"]) == 2
    assert capsys.readouterr().err.startswith(f"Error: {project / 'mine.jsonl'} cannot be read as facts:")
    (project / "own.toml").write_text("axes = 3\n")
    (project / "compressknow.toml").write_text('[sweep]\ngrid = "own.toml"\n')
    assert main(["sweep", str(save_tiny("bert", project / "model")), "-o", "study"]) == 2
    assert f"Error: {project / 'own.toml'}" in capsys.readouterr().err


def test_a_path_of_the_home_is_that_of_the_user(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(project / "home"))
    (project / "home").mkdir()
    (project / "home" / "mine.jsonl").write_text("{}\n")
    (project / "compressknow.toml").write_text('answers = "~/kept"\nprobe = ["facts:~/mine.jsonl"]\n')
    given, _ = called()
    assert given["answers"] == project / "home" / "kept"
    assert given["probe"] == (f"facts:{project / 'home' / 'mine.jsonl'}",)


@click.command()
@click.option("--must", multiple=True, type=read_type_of)
@click.option("--no-facts", is_flag=True, expose_value=False)
def fit(must: tuple[tuple[str, str], ...]) -> tuple[Any, str]:
    return must, get_command()


def test_a_command_is_printed_as_it_may_be_repeated() -> None:
    words = ["--must", "attention=q8_0", "--must", "a=b=q4_k", "--no-facts"]
    given, command = fit.main(words, prog_name="fit", standalone_mode=False)
    assert given == (("attention", "q8_0"), ("a=b", "q4_k"))
    assert command == "compressknow fit --must attention=q8_0 --must a=b=q4_k"


def test_a_flag_that_only_some_commands_heed_may_stand_above_the_tables_of_a_file(project: Path) -> None:
    (project / "compressknow.toml").write_text("no_facts = true\n")
    values = read_project_defaults("fit", fit, ["fit"], {"fit": fit}.get)
    assert fit.main([], prog_name="fit", standalone_mode=False, default_map=values) == ((), "compressknow fit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit = ", "cannot be read"),
        ("[asks]\nlimit = 1", "there is no command asks.*Did you mean ask"),
        ("[ask]\nlimits = 1", "ask has no option limits.*Did you mean limit"),
        ("limits = 1", "no command has an option limits"),
        ("limit = [300]", "limit takes one value"),
        ('answers = ["x"]', "answers takes one value"),
        ("[ask]\nlimit = {least = 3}", "limit takes one value"),
        ('converter = "theirs.py"', "converter can only be given on the command line"),
        ("trust-remote-code = true", "trust_remote_code can only be given on the command line"),
        ("[ask]\ntrust_remote_code = true", "trust_remote_code can only be given on the command line"),
    ],
)
def test_what_a_file_may_not_say(project: Path, text: str, message: str) -> None:
    (project / "compressknow.toml").write_text(text)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        called()


@click.command(cls=Command)
@click.option("--limit", type=int)
@click.option("--seed", type=int)
def pick(limit: int | None, seed: int) -> tuple[int, str]:
    if limit is not None:
        raise UnusedOptions("--limit changes nothing.", names=["limit"])
    return seed, get_command()


def test_what_the_file_says_is_left_out_where_it_changes_nothing(project: Path) -> None:
    def run(text: str, *words: str) -> object:
        (project / "compressknow.toml").write_text(text)
        values = read_project_defaults("pick", pick, ["pick"], {"pick": pick}.get)
        return pick.main(list(words), prog_name="pick", standalone_mode=False, default_map=values)

    for text in ("limit = 1\nseed = 2\n", "seed = 2\n[pick]\nlimit = 1"):
        assert run(text) == (2, "compressknow pick --seed 2")
        # Whoever says it on the command line is told.
        with pytest.raises(UnusedOptions) as caught:
            run(text, "--limit", "3")
        # As a worker's error reaches its caller.
        assert pickle.loads(pickle.dumps(caught.value)).names == ("limit",)


def test_a_calibration_text_for_all_commands_is_for_those_that_calibrate(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "compressknow.toml").write_text('calibration = "self"\ncalibration-tokens = 64\nrounding = "gptq"\n')
    model = save_tiny("bert", project / "model")
    words = ["convert", str(model), "out", "--dry-run", "--json", "--prune", "0.5"]
    assert main(words) == 0
    assert "calibration" not in json.loads(capsys.readouterr().out)["recipe"]
    assert main([*words, "--quantize", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["calibration"]["tokens"] == 64
    assert main([*words, "--calibration", "self"]) == 2
    assert "There is nothing to calibrate" in capsys.readouterr().err


def test_what_is_for_facts_or_a_cluster_is_for_commands_that_have_them(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "compressknow.toml").write_text("fail-under = 0.9\nstrict = true\nlimit = 9\nnum-gpus = 1\n")
    model = save_tiny("bert", project / "model")
    assert main(["compare", str(model), str(model)]) == 0
    assert main(["compare", str(model), str(model), "--limit", "9"]) == 2
    assert "--limit needs a probe." in capsys.readouterr().err
    (project / "compressknow.toml").write_text('answers = "kept"\ndevice = "cpu"\nbatch-size = 4\ndtype = "float32"\n')
    assert main(["compare", str(model), str(model)]) == 0
    capsys.readouterr()
    for words in (["--answers", "kept"], ["--device", "cpu"], ["--batch-size", "4"], ["--dtype", "float32"]):
        assert main(["compare", str(model), str(model), *words]) == 2
        assert f"{words[0]} needs a probe." in capsys.readouterr().err
    assert main(["sweep", str(model), "-o", "study", "--grid", "none.toml"]) == 2
    assert "none.toml: no such grid." in capsys.readouterr().err
    # An option and a command are called `probe`.
    (project / "compressknow.toml").write_text('probe = ["facts:none.jsonl"]\ncontext = 64\n')
    assert main(["probe", str(model), "-o", "out"]) == 2
    assert "There is no file none.jsonl." in capsys.readouterr().err


SHARED_OPTIONS = (Path(__file__).parents[2] / "docs" / "commands" / "shared.md").read_text(encoding="utf-8")
_, _, FROM_THERE = " ".join(SHARED_OPTIONS.split()).partition("can only be given on the command line: ")
ALONE = re.findall("`--(.+?)`", FROM_THERE.partition(". ")[0])
assert ALONE


@pytest.mark.parametrize("option", ALONE)
def test_what_the_manual_leaves_to_the_command_line_no_file_may_say(project: Path, option: str) -> None:
    commands = {name: cli.get_command(click.Context(cli), name) for name in COMMANDS}
    having = {
        name: each for name, each in commands.items() if each and any(f"--{option}" in p.opts for p in each.params)
    }
    assert having
    for name, command in having.items():
        (project / "compressknow.toml").write_text(f"[{name}]\n{option} = true\n")
        with pytest.raises(UsageError, match=f"{option.replace('-', '_')} can only be given on the command line"):
            read_project_defaults(name, command, COMMANDS, commands.get)


@pytest.mark.parametrize("table", ["", "[ask]\n"])
def test_an_option_that_is_spelled_in_two_ways_is_given_twice(project: Path, table: str) -> None:
    (project / "compressknow.toml").write_text(f"{table}trust-me = 1\ntrust_me = 2\n")
    with pytest.raises(UsageError, match="trust-me is also given as trust_me"):
        called()


@pytest.mark.parametrize("text", ["limt = 1", "[reprot]\nlimit = 1", "limit ="])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_a_file_that_is_wrong_does_not_keep_the_help_from_saying_what_is_right(
    project: Path, text: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "compressknow.toml").write_text(text)
    assert main(["report", "a", "b"]) == 2
    assert main(["report", option]) == 0
    assert "--limit" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["tool = 1", "[tool]\ncompressknow = 1", "limit = ", f"a = {'[' * 10_000}"])
def test_what_is_wrong_with_a_pyproject_is_other_tools_to_say(project: Path, text: str) -> None:
    (project / "pyproject.toml").write_text(text)
    assert called()[0]["limit"] is None


def test_a_broken_pyproject_that_has_our_table_is_not_passed_over(project: Path) -> None:
    (project / "pyproject.toml").write_text("<<<<<<< HEAD\n[tool.compressknow.report]\nfail-under = 0.9\n")
    with pytest.raises(UsageError, match=r"pyproject\.toml cannot be read"):
        called()


@pytest.mark.skipif(os.name == "nt", reason="files are locked to others, not by their mode")
def test_a_pyproject_that_may_not_be_read_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # Not pytest's, in which nobody else may look for files.
        Path(folder).chmod(0o755)
        (Path(folder) / "pyproject.toml").write_text("[tool.compressknow.report]\nfail-under = 0.9\n")
        (Path(folder) / "pyproject.toml").chmod(0)
        monkeypatch.chdir(folder)
        if not user:
            os.seteuid(65534)  # Root may read every file, nobody may not.
        try:
            with pytest.raises(UsageError, match=r"pyproject\.toml cannot be read"):
                called()
        finally:
            os.seteuid(user)
            monkeypatch.undo()


@pytest.mark.skipif(os.name == "nt", reason="folders are locked to others, not by their mode")
def test_a_folder_above_that_may_not_be_searched_has_no_defaults(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project / "inner")
    project.chmod(0)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)  # Root may search every folder, nobody may not.
    try:
        assert called()[0]["limit"] is None
    finally:
        os.seteuid(user)
        project.chmod(0o700)


@pytest.mark.skipif(os.name == "nt", reason="the working directory cannot be removed")
def test_a_working_directory_that_is_gone_is_one_message(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "inner").rmdir()
    assert main(["inspect", "a"]) == 2
    assert capsys.readouterr().err == "Error: The working directory no longer exists.\n  Change to another one.\n"


@click.command()
@click.option("--model", "model_name")
@click.option("--json", "as_json", is_flag=True)
def serve(**given: Any) -> dict[str, Any]:
    return given


@pytest.mark.parametrize(
    "text", ['model = "x"\njson = true', '[serve]\nmodel = "x"\njson = true', 'model-name = "x"\nas_json = true']
)
def test_an_option_is_known_by_what_the_command_line_calls_it(project: Path, text: str) -> None:
    (project / "compressknow.toml").write_text(text)
    values = read_project_defaults("serve", serve, ["serve"], {"serve": serve}.get)
    assert serve.main([], standalone_mode=False, default_map=values) == {"model_name": "x", "as_json": True}


def test_a_value_of_the_wrong_kind_is_one_message(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ('"many"', "1.5", "true", "2026-01-01"):
        (project / "compressknow.toml").write_text(f"[report]\nlimit = {value}\n")
        assert main(["report", "a", "b"]) == 2
        message = capsys.readouterr().err
        assert "Invalid value for '--limit'" in message
        assert message.endswith(f"\n  Options of {project / 'compressknow.toml'}: --limit.\n")
    (project / "compressknow.toml").write_text("[report]\nfail-under = 95\n")
    assert main(["report", "a", "b"]) == 2
    assert "--fail-under must be between 0 and 1: 95" in capsys.readouterr().err


def test_wrong_usage_is_told_with_what_the_file_gives(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "compressknow.toml").write_text("strict = true\nlimit = 9\n")
    for words in (["report", "a", "b"], ["--debug", "report", "a", "b"]):
        assert main(words) == 2
        *_, gate, hint, source = capsys.readouterr().err.splitlines()
        assert (gate, hint) == ("Error: --strict needs a gate.", "  Add --fail-under SHARE, or leave out --strict.")
        assert source == f"  Options of {project / 'compressknow.toml'}: --strict, --limit."
    assert main(["report", "--strit"]) == 2
    assert "Options of" not in capsys.readouterr().err
    (project / "compressknow.toml").write_text("limit = 9\n")
    assert main(["report", "./a", "./b"]) == 1
    assert "Options of" not in capsys.readouterr().err


def test_a_folder_of_data_above_the_tables_is_for_all_commands_that_may_need_it(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    (project / "compressknow.toml").write_text('data = "."\n')
    assert main(["export", "./nowhere", "out.gguf", "--type", "q8_0"]) == 1
    assert capsys.readouterr().err.startswith("Error: ./nowhere: no such folder.")
    assert main(["export", "./nowhere", "out.gguf", "--type", "q8_0", "--data", "."]) == 2
    assert capsys.readouterr().err.startswith("Error: --data needs --size or --bits")


def test_a_recipe_comes_before_what_the_file_says_of_its_steps(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "compressknow.toml").write_text("seed = 1\n[convert]\nprune = 0.5\nscope = 'attention'\n")
    recipe, types = project / "recipe.toml", project / "types.toml"
    recipe.write_text("[[steps]]\nprune = 0.25\n")
    types.write_text("[export]\ntype = 'q4_0'\n")
    model = save_tiny("bert", project / "model")
    assert main(["convert", str(model), "out", "--recipe", str(recipe), "--dry-run", "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["recipe"]["steps"]
    assert (step["prune"], step["scope"]) == (0.25, ["blocks"])
    assert main(["convert", str(model), "out", "--recipe", str(recipe), "--prune", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("Error: --recipe cannot be combined with --prune.\n")
    if is_installed("llama_cpp_py_sync"):
        assert main(["export", "./nowhere", "out.gguf", "--recipe", str(types)]) == 1
        assert capsys.readouterr().err.startswith("Error: ./nowhere: no such folder.")
        # What is given as it is when left out is given, too.
        assert main(["export", "./nowhere", "out.gguf", "--recipe", str(types), "--type", "q8_0"]) == 2
        assert capsys.readouterr().err.startswith("Error: --recipe cannot be combined with --type.\n")
