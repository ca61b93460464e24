"""Standard streams that are closed, full, shared with other programs, or have a narrow encoding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from compressknow.api.verify import verify
from tests.knowing import save_trained, write_facts
from tests.long import long
from tests.models import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Zürich 😀"
    save_tiny("bert", folder)
    return folder


def run_shell(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a shell in which `$0` is Python, and `$1`, ... are the arguments."""
    return subprocess.run(
        ["sh", "-c", command, str(sys.executable), *map(str, arguments)],
        capture_output=True,
        check=False,
        env=os.environ | environment,
    )


@long
def test_closed_streams_do_not_change_the_output_folder(model: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    done = run_shell('"$0" -m compressknow convert "$1" "$2" --prune 20% <&- >&- 2>&-', model, converted)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert verify(converted).differences == ()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-"])
def test_closed_stream_does_not_affect_the_other_one(closed: str) -> None:
    done = run_shell(f'"$0" -m compressknow --help {closed}')
    assert (done.returncode, done.stderr) == (0, b"")
    assert bool(done.stdout) == (">&-" not in closed.split())


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_wrong_command_with_a_closed_stream_exits_with_2(closed: str, model: Path) -> None:
    done = run_shell(f'"$0" -m compressknow convert "$1" new --prune 20 {closed}', model)
    assert done.returncode == 2
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr
    assert (b"Did you mean 0.2, which is 20 %" in done.stderr) == (closed == ">&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_wrong_command_with_a_full_standard_error_exits_with_2() -> None:
    assert run_shell('"$0" -m compressknow report --no-such-option 2> /dev/full').returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_cannot_be_written_is_one_message() -> None:
    done = run_shell('"$0" -m compressknow --help > /dev/full')
    assert done.returncode == 1
    assert done.stderr == b"Error: No space left on device: standard output\n"


PRINTED = {
    "latin-1": "Zürich... -3.0 % \\ud83d\\ude00",
    "cp1252": "Zürich… -3.0 % \\ud83d\\ude00",
    "utf-8": "Zürich… −3.0 % 😀",
}


@pytest.mark.parametrize("encoding", PRINTED)
def test_any_text_is_printed_in_every_encoding(encoding: str) -> None:
    script = """
import sys, click
from compressknow.cli import run
text = "Z\u00fcrich\u2026 \u22123.0 % \U0001f600"
sys.exit(run(click.Command("say", callback=lambda: [click.echo(text), click.echo(text, err=True)]), []))
"""
    done = run_shell('"$0" -c "$1"', script, PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert done.stdout.decode(encoding) == done.stderr.decode(encoding) == PRINTED[encoding] + "\n"


def test_windows_console_gets_its_code_page() -> None:
    # Python has the class and the code page of a console only on Windows.
    script = """
import io, os, sys, click
from compressknow.cli import run
class Console(io.FileIO):
    pass
io._WindowsConsoleIO, os.device_encoding = Console, {1: "cp850"}.get
sys.stdout = io.TextIOWrapper(io.BufferedWriter(Console(1, "w", closefd=False)), "utf-8")
text = "Z\u00fcrich\u2026 \U0001f600"
sys.exit(run(click.Command("say", callback=lambda: click.echo(text)), []))
"""
    done = run_shell('"$0" -c "$1"', script)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode("cp850") == "Zürich... \\ud83d\\ude00\n"


@long
def test_json_stays_json_in_a_narrow_encoding(model: Path) -> None:
    done = run_shell('"$0" -m compressknow inspect "$1" --json', model, PYTHONIOENCODING="latin-1")
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode("latin-1"))["model"] == model.name


@pytest.mark.parametrize("encoding", PRINTED)
def test_json_has_the_same_values_in_every_encoding(encoding: str) -> None:
    script = """
import sys, click
from compressknow.cli import run
from compressknow.cli.terminal import show_json
sys.exit(run(click.Command("say", callback=lambda: show_json("1914\u20131918 \u2192 \u22123\u2026 \U0001f600")), []))
"""
    done = run_shell('"$0" -c "$1"', script, PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout.decode(encoding)) == "1914–1918 → −3… 😀"


def test_output_of_other_libraries_and_programs_goes_to_standard_error() -> None:
    script = textwrap.dedent("""
        import os, sys, click
        from tokenizers import AddedToken
        from compressknow.cli import run

        def work():
            AddedToken("x", unknown=1)  # Rust says so on standard output
            os.system("echo from another program")
            click.echo("the result")

        sys.exit(run(click.Command("work", callback=work), []))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "the result\n"
    assert "from another program" in done.stderr


def test_messages_of_a_tokenizer_are_not_printed(tmp_path: Path) -> None:
    save_trained("bert", tmp_path / "bert")
    facts = write_facts(tmp_path / "facts.jsonl")
    config = tmp_path / "bert" / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    token = {"content": "[PAD]", "special": True, "unknown_kwarg": True, "lstrip": False}
    config.write_text(json.dumps(settings | {"added_tokens_decoder": {"0": token}}), encoding="utf-8")
    done = run_shell(
        '"$0" -m compressknow probe "$1" -p "facts:$2" -o "$3" --json', tmp_path / "bert", facts, tmp_path / "a"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["probes"]
    # On a busy machine it takes so long that a line of progress is printed.
    assert [line for line in done.stderr.splitlines() if not line.endswith(b"so far")] == []


def test_warnings_of_compressed_tensors_are_not_seen(tmp_path: Path) -> None:
    """It enables its log when it is first imported."""
    folder = shutil.copytree(Path(__file__).parents[1] / "data" / "llm_compressor" / "w4a16", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Wider than the model's rows.
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = run_shell('"$0" -m compressknow inspect "$1"', folder)
    assert (done.returncode, done.stderr) == (0, b"")
