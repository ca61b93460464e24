"""llama.cpp's own quantization of a GGUF file, in a process of its own: its library ends the process where it fails."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compressknow.base.progress import Advance
from compressknow.gguf.children import check_exit, join_packages, read_tail, run_python

_COUNTED = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
_PLANNED = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+-.*?type =\s*(\w+)(?:.*\((\w+)\))?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Request:
    """Quantization of a file.

    Attributes
    ----------
    source, output : GGUF files.
    file_type : a name of `compressknow.gguf.choice.list_file_types`.
    types : the type of single tensors, by name.
    importance : a GGUF file with the importance matrix.
    """

    source: str
    output: str
    file_type: str
    types: Mapping[str, str] = field(default_factory=dict)
    importance: str | None = None
    threads: int = 0
    dry_run: bool = False


def quantize(request: Request, scratch: Path, advance: Advance | None = None) -> None:
    """Carry a request out; `scratch` is a folder to write into.

    Raises CompressknowError, with llama.cpp's reason, where it fails.
    """
    file, log = scratch / "quantize.json", scratch / "quantize.log"
    file.write_text(json.dumps(asdict(request)), "utf-8")

    def look() -> None:
        if advance and (counted := _COUNTED.findall(read_tail(log))):
            advance(*map(int, counted[-1]))

    code = run_python(
        ["-m", __name__, file],
        log,
        environment={**os.environ, "PYTHONPATH": join_packages(Path(__file__).parents[2])},
        look=look,
    )
    check_exit(f"llama.cpp could not quantize to {request.file_type}", log, code, "Choose another --type.")


def read_planned_types(scratch: Path) -> dict[str, str]:
    """Return the type of each tensor, by name, from the log of a dry run."""
    log = (scratch / "quantize.log").read_text("utf-8", "replace")
    return {name: (chosen or stored).lower() for name, stored, chosen in _PLANNED.findall(log)}


def _call_llama_cpp(request: Request) -> int:
    """Call llama.cpp, and return its exit code."""
    from compressknow.gguf.choice import list_file_types, list_tensor_types, load_bindings

    ffi, library = load_bindings().get_ffi(), load_bindings().get_lib()
    # What is handed over lives as long as it is named here.
    alive: list[Any] = []
    parameters = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    parameters.ftype = list_file_types()[request.file_type]
    parameters.nthread, parameters.dry_run = request.threads, request.dry_run
    if request.types:
        numbers = list_tensor_types()
        overrides = ffi.new("struct llama_model_tensor_override[]", len(request.types) + 1)
        for place, (name, chosen) in enumerate(request.types.items()):
            alive.append(ffi.new("char[]", f"^{re.escape(name)}$".encode()))
            overrides[place].pattern, overrides[place].type = alive[-1], numbers[chosen]
        # A pattern that is none ends the list.
        overrides[len(request.types)].pattern = ffi.NULL
        parameters.tt_overrides = overrides
    if request.importance:
        alive.append(_build_matrix(ffi, request.importance, alive))
        parameters.imatrix = alive[-1]
    return int(library.llama_model_quantize(os.fsencode(request.source), os.fsencode(request.output), parameters))


def _build_matrix(ffi: Any, path: str, alive: list[Any]) -> Any:
    """Return llama.cpp's list of structs, which an entry without a name ends."""
    from compressknow.gguf.importance import read_importance

    matrices = read_importance(Path(path)).means()
    entries = ffi.new("struct llama_model_imatrix_data[]", len(matrices) + 1)
    for place, (name, values) in enumerate(matrices.items()):
        alive += [ffi.new("char[]", name.encode()), values, ffi.from_buffer("float[]", values)]
        entries[place].name, entries[place].data, entries[place].size = alive[-3], alive[-1], values.size
    entries[len(matrices)].name = ffi.NULL
    return entries


if __name__ == "__main__":
    code = _call_llama_cpp(Request(**json.loads(Path(sys.argv[1]).read_text("utf-8"))))
    sys.stdout.flush()
    os._exit(code)
