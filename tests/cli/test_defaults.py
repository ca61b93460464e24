"""A project's defaults: which file and which value is used, and what a file may not contain."""

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
def first(**values: Any) -> tuple[dict[str, Any], str]:
    return values, get_command()


@click.command()
@click.option("--seed", type=int)
@click.option("-p", "--probe")
def second(seed: int | None, probe: str | None) -> None: ...


def run_first(*words: str) -> tuple[dict[str, Any], str]:
    """Return the values of the options, and the command that is printed."""
    result: tuple[dict[str, Any], str] = first.main(
        ["M", *words],
        prog_name="first",
        standalone_mode=False,
        default_map=read_project_defaults("first", first, ["first", "second"], {"first": first, "second": second}.get),
    )
    return result


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    return tmp_path


def test_nearest_file_then_command_table_then_command_line_win(project: Path) -> None:
    assert run_first()[0] == {"model": "M", "probe": (), "limit": None, "answers": None, "trust_remote_code": False}
    (project / "pyproject.toml").write_text("[tool.compressknow]\nlimit = 1\n[tool.other]\nx = 1\n")
    assert run_first()[0]["limit"] == 1
    (project / "inner" / "pyproject.toml").write_text("[project]\nname = 'mine'\n")
    assert run_first()[0]["limit"] == 1
    file = project / "compressknow.toml"
    file.write_text(
        'limit = 2\nanswers = "kept"\nseed = 3\n[first]\nlimit = 4\nprobe = ["a", "b"]\n[second]\nprobe = "c"\n'
    )
    values, command = run_first()
    assert values["limit"] == 4
    assert values["probe"] == ("a", "b")
    assert values["answers"] == project / "kept"
    # The printed command does not depend on the file.
    assert command.startswith("compressknow first M -p a -p b --limit 4 --answers ")
    assert run_first("--limit", "5", "-p", "z")[0] == {**values, "limit": 5, "probe": ("z",)}
    # Of two files, only the nearest counts.
    (project / "inner" / "compressknow.toml").write_text("limit = 6\n")
    assert (run_first()[0]["limit"], run_first()[0]["answers"]) == (6, None)


def test_paths_in_the_file_are_relative_to_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "mine.jsonl").write_text('{"prompt": "Paris lies on the [MASK]."}\n')
    (project / "atlas").write_text("no probe\n")
    (project / "rows").mkdir()
    found, others = ["facts:mine.jsonl", "hf:rows:en"], ["facts:other.jsonl", "text:C:/x.txt", "atlas", "hf:a/b", "hf:"]
    (project / "compressknow.toml").write_text(f"probe = {found + others}\n")
    assert run_first()[0]["probe"] == (f"facts:{project / 'mine.jsonl'}", f"hf:{project / 'rows'}:en", *others)
    assert main(["report", "./a", "./b", "-p", "facts:mine.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("Error: There is no file mine.jsonl.")
    (project / "compressknow.toml").write_text('probe = ["facts:mine.jsonl"]\n')
    assert main(["report", "./a", "./b"]) == 2
    assert capsys.readouterr().err.startswith(f"Error: {project / 'mine.jsonl'} cannot be read as facts:")
    (project / "own.toml").write_text("axes = 3\n")
    (project / "compressknow.toml").write_text('[sweep]\ngrid = "own.toml"\n')
    assert main(["sweep", str(save_tiny("bert", project / "model")), "-o", "study"]) == 2
    assert f"Error: {project / 'own.toml'}" in capsys.readouterr().err


def test_tilde_in_the_file_is_the_home_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(project / "home"))
    (project / "home").mkdir()
    (project / "home" / "mine.jsonl").write_text("{}\n")
    (project / "compressknow.toml").write_text('answers = "~/kept"\nprobe = ["facts:~/mine.jsonl"]\n')
    values, _ = run_first()
    assert values["answers"] == project / "home" / "kept"
    assert values["probe"] == (f"facts:{project / 'home' / 'mine.jsonl'}",)


@click.command()
@click.option("--must", multiple=True, type=read_type_of)
@click.option("--no-facts", is_flag=True, expose_value=False)
def fit(must: tuple[tuple[str, str], ...]) -> tuple[Any, str]:
    return must, get_command()


def test_printed_command_can_be_repeated() -> None:
    words = ["--must", "attention=q8_0", "--must", "a=b=q4_k", "--no-facts"]
    values, command = fit.main(words, prog_name="fit", standalone_mode=False)
    assert values == (("attention", "q8_0"), ("a=b", "q4_k"))
    assert command == "compressknow fit --must attention=q8_0 --must a=b=q4_k"


@pytest.mark.parametrize(
    "text", ['[fit.must]\nattention = "q8_0"\nb = 4\n', '[fit]\nmust = {attention = "q8_0", b = 4}\n']
)
def test_table_gives_keys_and_values(text: str, project: Path) -> None:
    (project / "compressknow.toml").write_text(text)
    values = read_project_defaults("fit", fit, ["fit"], {"fit": fit}.get)
    found, _ = fit.main([], prog_name="fit", standalone_mode=False, default_map=values)
    assert found == (("attention", "q8_0"), ("b", "4"))


def test_flag_of_some_commands_may_be_above_the_tables(project: Path) -> None:
    (project / "compressknow.toml").write_text("no_facts = true\n")
    values = read_project_defaults("fit", fit, ["fit"], {"fit": fit}.get)
    assert fit.main([], prog_name="fit", standalone_mode=False, default_map=values) == ((), "compressknow fit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit = ", "cannot be read"),
        ("[firsts]\nlimit = 1", "there is no command firsts.*Did you mean first"),
        ("[first]\nlimits = 1", "first has no option limits.*Did you mean limit"),
        ("limits = 1", "no command has an option limits"),
        ("limit = [300]", "limit takes one value"),
        ('answers = ["x"]', "answers takes one value"),
        ("[first]\nlimit = {least = 3}", "limit takes one value"),
        ('converter = "theirs.py"', "converter can only be given on the command line"),
        ("trust-remote-code = true", "trust_remote_code can only be given on the command line"),
        ("[first]\ntrust_remote_code = true", "trust_remote_code can only be given on the command line"),
    ],
)
def test_invalid_file_is_one_message(project: Path, text: str, message: str) -> None:
    (project / "compressknow.toml").write_text(text)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        run_first()


@click.command(cls=Command)
@click.option("--limit", type=int)
@click.option("--seed", type=int)
def pick(limit: int | None, seed: int) -> tuple[int, str]:
    if limit is not None:
        raise UnusedOptions("--limit changes nothing.", names=["limit"])
    return seed, get_command()


def test_unused_options_of_the_file_are_ignored(project: Path) -> None:
    def run(text: str, *words: str) -> object:
        (project / "compressknow.toml").write_text(text)
        values = read_project_defaults("pick", pick, ["pick"], {"pick": pick}.get)
        return pick.main(list(words), prog_name="pick", standalone_mode=False, default_map=values)

    for text in ("limit = 1\nseed = 2\n", "seed = 2\n[pick]\nlimit = 1"):
        assert run(text) == (2, "compressknow pick --seed 2")
        # On the command line it is an error.
        with pytest.raises(UnusedOptions) as caught:
            run(text, "--limit", "3")
        # Errors of workers are pickled.
        assert pickle.loads(pickle.dumps(caught.value)).names == ("limit",)


def test_calibration_text_for_all_commands_is_ignored_without_calibration(
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


def test_options_for_facts_or_a_cluster_are_ignored_without_them(
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
    # `probe` is the name of both an option and a command.
    (project / "compressknow.toml").write_text('probe = ["facts:none.jsonl"]\ncontext = 64\n')
    assert main(["probe", str(model), "-o", "out"]) == 2
    assert "There is no file none.jsonl." in capsys.readouterr().err


SHARED_OPTIONS = (Path(__file__).parents[2] / "docs" / "commands" / "shared.md").read_text(encoding="utf-8")
_, _, LIST_OF_OPTIONS = " ".join(SHARED_OPTIONS.split()).partition("can only be given on the command line: ")
ONLY_ON_THE_COMMAND_LINE = re.findall("`--(.+?)`", LIST_OF_OPTIONS.partition(". ")[0])
assert ONLY_ON_THE_COMMAND_LINE


@pytest.mark.parametrize("option", ONLY_ON_THE_COMMAND_LINE)
def test_file_may_not_have_options_that_the_manual_restricts_to_the_command_line(project: Path, option: str) -> None:
    commands = {name: cli.get_command(click.Context(cli), name) for name in COMMANDS}
    with_option = {
        name: each for name, each in commands.items() if each and any(f"--{option}" in p.opts for p in each.params)
    }
    assert with_option
    for name, command in with_option.items():
        (project / "compressknow.toml").write_text(f"[{name}]\n{option} = true\n")
        with pytest.raises(UsageError, match=f"{option.replace('-', '_')} can only be given on the command line"):
            read_project_defaults(name, command, COMMANDS, commands.get)


@pytest.mark.parametrize("table", ["", "[first]\n"])
def test_an_option_that_is_spelled_in_two_ways_is_given_twice(project: Path, table: str) -> None:
    (project / "compressknow.toml").write_text(f"{table}trust-me = 1\ntrust_me = 2\n")
    with pytest.raises(UsageError, match="trust-me is also given as trust_me"):
        run_first()


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
def test_errors_in_a_pyproject_without_our_table_are_ignored(project: Path, text: str) -> None:
    (project / "pyproject.toml").write_text(text)
    assert run_first()[0]["limit"] is None


def test_broken_pyproject_with_our_table_is_an_error(project: Path) -> None:
    (project / "pyproject.toml").write_text("<<<<<<< HEAD\n[tool.compressknow.report]\nfail-under = 0.9\n")
    with pytest.raises(UsageError, match=r"pyproject\.toml cannot be read"):
        run_first()


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
                run_first()
        finally:
            os.seteuid(user)
            monkeypatch.undo()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file modes")
def test_parent_folder_without_permission_has_no_defaults(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project / "inner")
    project.chmod(0)
    user = os.geteuid()
    if not user:
        os.seteuid(65534)  # Root may search any folder, the user "nobody" may not.
    try:
        assert run_first()[0]["limit"] is None
    finally:
        os.seteuid(user)
        project.chmod(0o700)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not remove a working directory")
def test_removed_working_directory_is_one_message(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "inner").rmdir()
    assert main(["inspect", "a"]) == 2
    assert capsys.readouterr().err == "Error: The working directory no longer exists.\n  Change to another one.\n"


@click.command()
@click.option("--model", "model_name")
@click.option("--json", "as_json", is_flag=True)
def serve(**values: Any) -> dict[str, Any]:
    return values


@pytest.mark.parametrize(
    "text", ['model = "x"\njson = true', '[serve]\nmodel = "x"\njson = true', 'model-name = "x"\nas_json = true']
)
def test_file_uses_the_option_names_of_the_command_line(project: Path, text: str) -> None:
    (project / "compressknow.toml").write_text(text)
    values = read_project_defaults("serve", serve, ["serve"], {"serve": serve}.get)
    assert serve.main([], standalone_mode=False, default_map=values) == {"model_name": "x", "as_json": True}


def test_value_of_the_wrong_type_is_one_message(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ('"many"', "1.5", "true", "2026-01-01"):
        (project / "compressknow.toml").write_text(f"[report]\nlimit = {value}\n")
        assert main(["report", "a", "b"]) == 2
        message = capsys.readouterr().err
        assert "Invalid value for '--limit'" in message
        assert message.endswith(f"\n  Options of {project / 'compressknow.toml'}: --limit.\n")
    (project / "compressknow.toml").write_text("[report]\nfail-under = 95\n")
    assert main(["report", "a", "b"]) == 2
    assert "--fail-under must be between 0 and 1: 95" in capsys.readouterr().err


def test_error_lists_the_options_of_the_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_data_folder_above_the_tables_is_ignored_if_not_needed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    (project / "compressknow.toml").write_text('data = "."\n')
    assert main(["export", "./nowhere", "out.gguf", "--type", "q8_0"]) == 1
    assert capsys.readouterr().err.startswith("Error: ./nowhere: no such folder.")
    assert main(["export", "./nowhere", "out.gguf", "--type", "q8_0", "--data", "."]) == 2
    assert capsys.readouterr().err.startswith("Error: --data needs --size or --bits")


def test_recipe_overrides_step_options_of_the_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        # A default value counts if it is given.
        assert main(["export", "./nowhere", "out.gguf", "--recipe", str(types), "--type", "q8_0"]) == 2
        assert capsys.readouterr().err.startswith("Error: --recipe cannot be combined with --type.\n")
