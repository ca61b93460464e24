"""Start, help, errors, signals and exit codes of the command line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from compressknow import __version__
from compressknow.base.errors import CompressknowError, GateNotMet, GateUndecided, UsageError
from compressknow.cli import COMMANDS, RESUMES, SPIN_COUNT, LazyGroup, cli, explain_interrupt, main, run
from compressknow.cli.options import GROUPS
from tests.long import one_in

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = [sys.executable, "-c", "import sys; from compressknow.cli import main; sys.exit(main())"]


def build_group(callback: object) -> click.Group:
    """Return the real group of commands, but with this callback for `verify`."""
    group = LazyGroup(params=cli.params, callback=cli.callback)
    command = click.Command("verify", callback=callback)  # type: ignore[arg-type]
    group.get_command = lambda *_: command  # type: ignore[method-assign]
    return group


def build_failing_group(error: BaseException) -> click.Group:
    def callback() -> None:
        raise error

    return build_group(callback)


def test_help_lists_every_command_without_importing_one(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; from compressknow.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    for name, short_help in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert short_help in done.stdout
        assert f"compressknow.cli.{name}" not in loaded
    assert not loaded & {"torch", "transformers", "numpy", "jinja2", "huggingface_hub"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"compressknow {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help_and_is_in_the_readme(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert f"compressknow {name}" in README
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help text"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_json_option(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert any("--json" in parameter.opts for parameter in command.params)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_groups_all_options(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    headings = [line.removesuffix(":") for line in lines if line.removesuffix(":") in GROUPS]
    assert headings == [group for group in GROUPS if group in headings]
    assert "Options:" not in lines


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_does_not_import_torch(name: str) -> None:
    code = f"import sys; from compressknow.cli import main; main(['{name}', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: compressknow {name} ")
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("args", [["no-such-command"], ["--no-such-option"], ["inspect"], ["convert", "a", "b", "--x"]])
def test_wrong_usage_ends_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert "Error: " in capsys.readouterr().err


def test_error_of_an_unknown_command_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["prune"])
    assert "inspect, convert, export, verify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CompressknowError("It broke.", "Because.", "Mend it."), 1),
        (UsageError("It broke.", "Because.", "Mend it."), 2),
        (GateNotMet("It broke.", "Because.", "Mend it."), 3),
        (GateUndecided("It broke.", "Because.", "Mend it."), 4),
    ],
)
def test_error_is_one_message_on_stderr(
    error: CompressknowError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(build_failing_group(error), ["verify"]) == code
    assert capsys.readouterr() == ("", "Error: It broke.\n  Because.\n  Mend it.\n")


def test_traceback_is_printed_only_with_debug(capsys: pytest.CaptureFixture[str]) -> None:
    group = build_failing_group(ZeroDivisionError("by zero"))
    assert run(group, ["verify"]) == 1
    assert "Traceback" not in (message := capsys.readouterr().err)
    assert "unexpected ZeroDivisionError: by zero" in message
    assert run(group, ["--debug", "verify"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_error_of_the_system_names_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(build_group(lambda: open("/no/such/file", encoding="utf-8").close()), ["verify"]) == 1  # noqa: PTH123
    assert capsys.readouterr().err == "Error: No such file or directory: /no/such/file\n"


def test_error_without_a_temporary_folder_names_tmpdir(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/no/such/folder"])
    assert run(build_group(tempfile.gettempdir), ["verify"]) == 1
    assert capsys.readouterr().err.endswith("\n  Set TMPDIR to a folder that can be written to.\n")


def test_interrupt_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(build_failing_group(KeyboardInterrupt()), ["verify"]) == 130
    assert capsys.readouterr().err.split() == ["Interrupted"]


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Restore Python's signal handlers: an earlier test may have loaded a library that has its own (Ray)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_command_explains_the_state_of_its_output(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with explain_interrupt("Nothing was written."):
            os.kill(os.getpid(), number)
            time.sleep(60)

    assert run(build_group(work), ["verify"]) == code
    assert capsys.readouterr().err.strip() == "Interrupted. Nothing was written."


@pytest.mark.parametrize("verb", ["search", "sweep"])
def test_interrupted_study_resumes_only_if_its_folder_exists(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"compressknow.api.{verb}.{verb}", interrupt)
    for note in ("Nothing was written.", RESUMES):
        assert main([verb, "model", "-o", str(tmp_path / "study")]) == 130
        assert capsys.readouterr().err.strip() == f"Interrupted. {note}"
        (tmp_path / "study").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("settings", "count"),
    one_in(3, [({}, SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "passive"}, 0)]),
    ids=["default", "count of the user", "policy of the user"],
)
def test_waiting_threads_of_openmp_spin_only_briefly(settings: dict[str, str], count: int) -> None:
    """OpenMP prints its settings when torch loads it."""
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    script = "from compressknow.cli import main; main(['--version']); import torch"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**unset, **settings, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{count}'" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_request_to_end_lets_temporary_folders_be_removed(number: signal.Signals, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, tempfile, time, click
        from compressknow.cli import run

        def work():
            with tempfile.TemporaryDirectory(dir=sys.argv[1]):
                print("working", flush=True)
                time.sleep(60)

        sys.exit(run(click.Command("work", callback=work), []))
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    assert list(tmp_path.iterdir())
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert not list(tmp_path.iterdir())


def test_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""


def test_help_lists_every_exit_code_of_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "commands" / "shared.md").read_text(encoding="utf-8")
    codes = re.findall(r"^\| (\d+) \|", manual.partition("## Exit codes")[2], re.MULTILINE)
    assert main(["--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split()).partition("Exit codes: ")[2].partition(" Options:")[0]
    assert re.findall(r"\d+", listed) == codes


@pytest.mark.parametrize(
    ("words", "completion"),
    [("conv", "convert"), ("convert a b --prun", "--prune"), ("convert a b --quantize int4", "int4")],
)
def test_shell_completes_commands_options_and_values(
    words: str, completion: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_COMPRESSKNOW_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"compressknow {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    with pytest.raises(SystemExit, match="0"):
        main([])
    assert f"plain,{completion}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_script_is_printed(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_COMPRESSKNOW_COMPLETE", f"{shell}_source")
    with pytest.raises(SystemExit, match="0"):
        main([])
    assert f"_COMPRESSKNOW_COMPLETE={shell}_complete" in capsys.readouterr().out


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_during_the_deletion_of_an_object_is_not_lost(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class SignalsWhenDeleted:
        def __del__(self) -> None:
            signal.raise_signal(number)

    @click.command()
    def command() -> None:
        SignalsWhenDeleted()
        for _ in range(1000):
            time.sleep(0.01)

    assert run(command, []) == code
    assert capsys.readouterr().err.strip() == "Interrupted"


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_waits_for_the_end_of_an_import(number: signal.Signals, code: int, second: bool, tmp_path: Path) -> None:
    """Libraries catch what interrupts their imports: `except BaseException`, and another error later. A second signal
    ends the process at once."""
    source = f"""
        import os, time
        try:
            os.kill(os.getpid(), {int(number)})
            time.sleep(0.1)
            if {second}:
                os.kill(os.getpid(), {int(number)})
                time.sleep(60)
        except BaseException as error:
            raise ImportError("cannot load module more than once per process") from error
    """
    (tmp_path / "library.py").write_text(textwrap.dedent(source))
    script = """
        import sys, time, click
        from compressknow.cli import run

        def work():
            import library
            time.sleep(60)

        sys.exit(run(click.Command("work", callback=work), []))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stderr.strip()) == (code, "Interrupted")
