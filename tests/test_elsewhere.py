"""Every command on an emulated Windows and in an ASCII locale, and the file handling of Windows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compressknow.base.files import LOCK
from compressknow.evaluate.answers import SEAL
from tests.knowing import save_trained, write_facts
from tests.long import long
from tests.test_files import DEADLINE, list_names, list_strays
from tests.windows import ROOT, windows_environment

COMMANDS = """
    convert model new --prune 30% --quantize int8
    convert model new --prune 50% --overwrite
    convert modèle sécond --prune 20% --quantize int8
    verify new
    verify sécond
    probe model -p facts:faits-é.jsonl -o answers
    report model new -p facts:faits-é.jsonl --answers kept -o é.html -o r.md -o r.json --into-model-card
    report model new -p facts:faits-é.jsonl --answers kept -o timed.json --time
    compare model new -p facts:faits-é.jsonl --answers kept -o compared.html
    sweep model -p facts:faits-é.jsonl --grid grid.toml -o study
    sweep model -p facts:faits-é.jsonl --grid grid.toml -o study
"""
# One process for all commands: most of the time goes into importing libraries.
RUN = """
import os, sys
from compressknow.cli import main
for line in sys.argv[1].splitlines():
    if words := line.split():
        print(f"{line.strip()!a}: {main(['--debug', *words])}", flush=True)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="it needs locks and /proc of Linux")
ELSEWHERE = ("windows", "ascii")
# Timings, and the hash of a record that has them.
_TIMING_KEYS = {"seconds", "speed", SEAL}
_STRICT = """
import warnings
warnings.filterwarnings("error", category=EncodingWarning, module="compressknow")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("model", "modèle"):
        save_trained("llama", folder / name)
    write_facts(folder / "faits-é.jsonl")
    (folder / "grid.toml").write_text('[axes]\nscope = ["attention"]\nprune = [0.2]\n', encoding="utf-8")
    return folder


def make_environment(kind: str, folder: Path) -> dict[str, str]:
    if kind == "windows":
        return windows_environment(folder)
    if kind == "ascii":
        (folder / "sitecustomize.py").write_text(_STRICT, encoding="utf-8")
        locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "", "PYTHONWARNDEFAULTENCODING": "1"}
        return os.environ | locale | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return os.environ | {"PYTHONPATH": str(ROOT)}


def run_commands(kind: str, models: Path, folder: Path) -> Path:
    """Run all commands in a copy of the models, and return that folder."""
    work, before = folder / "work", folder / "before"
    shutil.copytree(models, work)
    before.mkdir()
    # Bytes, as from a shell: the locale cannot encode them.
    command = [os.fsencode(sys.executable), b"-c", RUN.encode(), COMMANDS.encode()]
    done = subprocess.run(command, cwd=work, env=make_environment(kind, before), capture_output=True, check=False)
    lines = [line for line in done.stdout.decode("ascii", "replace").splitlines() if line.startswith("'")]
    codes = [line.rpartition(" ")[2] for line in lines]
    assert codes == ["0"] * len(COMMANDS.split("\n    ")[1:]), (lines, done.stderr)
    return work


@pytest.fixture(scope="module")
def reference(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_commands("linux", models, tmp_path_factory.mktemp("reference"))


def read_files(folder: Path) -> dict[str, Any]:
    """Return the bytes of every file, and those that have timings as JSON without them."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            timed = path.name in ("probe.json", "timed.json")
            files[str(path.relative_to(folder))] = (
                _drop_timings(json.loads(path.read_bytes())) if timed else path.read_bytes()
            )
    return files


def _drop_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_timings(item) for key, item in value.items() if key not in _TIMING_KEYS}
    return [_drop_timings(item) for item in value] if isinstance(value, list) else value


@linux
@long
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_every_command_writes_the_same_bytes_elsewhere(
    kind: str, reference: Path, models: Path, tmp_path: Path
) -> None:
    files, expected = read_files(run_commands(kind, models, tmp_path)), read_files(reference)
    assert sorted(files) == sorted(expected)
    assert [name for name, file in expected.items() if files[name] != file] == []
    assert "facts:faits-é.jsonl".encode() in files["é.html"]
    assert '"modèle"'.encode() in files["sécond/compressknow.json"]


@linux
def test_tests_of_files_and_locks_pass_on_windows(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_files.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=windows_environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


OWNER = """
import sys, time
from pathlib import Path
from compressknow.base.files import claim_folder, open_whole, write_whole
with claim_folder(Path(sys.argv[1]), wait=len(sys.argv) > 2), open_whole(Path(sys.argv[1]) / "a") as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(0 if len(sys.argv) > 2 else 60)
"""


@linux
def test_folder_is_locked_on_windows_until_the_run_is_killed(tmp_path: Path) -> None:
    environment, folder = windows_environment(tmp_path), tmp_path / "folder"

    def start_owner(*wait: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OWNER, str(folder), *wait]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    first = start_owner()
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    second, waiting = start_owner(), start_owner("wait")
    assert "folder is in use by another run." in second.communicate(timeout=DEADLINE)[1]
    assert second.returncode == 1
    # Its temporary file, and the lock of that.
    assert len(list_strays(folder)) == 2
    time.sleep(0.5)
    assert waiting.poll() is None
    first.kill()
    assert waiting.communicate(timeout=DEADLINE)[0] == "writing\n"
    assert waiting.returncode == 0
    assert list_names(folder) == [LOCK, "a"]
    first.communicate()


FORBIDDEN = """
import errno, os, sys
from pathlib import Path
import compressknow.base.files as files
here = Path(sys.argv[1])
(here / "full").mkdir()
(here / "full" / "a").touch()
file = (here / "full" / "a").open("rb")
def number(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
actions = (
    (here / "full" / "a").unlink,
    lambda: (here / "full").rename(here / "b"),
    lambda: (here / "full" / "a").rename(here / "b"),
    lambda: (here / "con.txt").touch(),
    lambda: (here / "a:b").mkdir(),
)
print([number(action) for action in actions], [hasattr(os, name) for name in ("pwrite", "O_CLOEXEC")])
file.close()
print([number(action) for action in actions[:1]])
"""


@linux
def test_emulation_forbids_what_windows_forbids(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORBIDDEN, str(tmp_path)]
    done = subprocess.run(command, env=windows_environment(tmp_path), capture_output=True, text=True, check=True)
    assert done.stdout == "['EACCES', 'EACCES', 'EACCES', 'EINVAL', 'EINVAL'] [False, False]\n[None]\n"


REPLACE = """
import sys, threading
from pathlib import Path
from compressknow.base.errors import OutputError
from compressknow.base.files import write_whole
path = Path(sys.argv[1])
file = path.open("rb")
threading.Timer(float(sys.argv[2]), file.close).start()
try:
    write_whole(path, b"new")
except OutputError as error:
    print(error.what)
"""


@linux
@pytest.mark.parametrize("seconds", [0.3, 5])
def test_file_is_replaced_on_windows_once_nobody_has_it_open(tmp_path: Path, seconds: float) -> None:
    environment, path = windows_environment(tmp_path), tmp_path / "folder" / "a"
    path.parent.mkdir()
    path.write_bytes(b"old")
    command = [sys.executable, "-c", REPLACE, str(path), str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    replaced = seconds < 1
    assert done.stdout == ("" if replaced else f"{path} cannot be written: It is used by a process.\n")
    assert path.read_bytes() == (b"new" if replaced else b"old")
    assert list_names(path.parent) == ["a"]
