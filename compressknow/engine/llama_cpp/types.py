"""How a GGUF file stores its parameters, by group of layers: read by llama.cpp's own reader of the format."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from compressknow.engine.llama_cpp.native import native
from compressknow.engine.llama_cpp.parts import gguf_parts
from compressknow.model.gguf_file import NAMED

# Of gguf.h and ggml.h, which llama-cpp-py-sync binds no part of.
_HEADER = """
struct gguf_context;
struct gguf_init_params { bool no_alloc; void ** ctx; };
struct gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params);
void gguf_free(struct gguf_context * ctx);
int64_t gguf_get_n_tensors(const struct gguf_context * ctx);
const char * gguf_get_tensor_name(const struct gguf_context * ctx, int64_t tensor_id);
int gguf_get_tensor_type(const struct gguf_context * ctx, int64_t tensor_id);
size_t gguf_get_tensor_size(const struct gguf_context * ctx, int64_t tensor_id);
const char * ggml_type_name(int type);
int64_t ggml_blck_size(int type);
size_t ggml_type_size(int type);
"""


def types_of(path: Path) -> dict[str, dict[str, int]]:
    """Numbers of parameters by group of layers and by type: ``{"attention": {"Q4_K": 7077888}}``, most first.

    Parameters
    ----------
    path : a GGUF file that llama.cpp has opened, or the first part of one.
    """
    found: dict[str, Counter[str]] = {name: Counter() for name in (*(name for name, _ in NAMED), "other")}
    for part in gguf_parts(path):
        for name, kind, parameters in _tensors(part):
            group = next((group for group, named in NAMED if named.match(name)), "other")
            found[group][kind] += parameters
    return {group: dict(types.most_common()) for group, types in found.items() if types}


def _tensors(path: Path) -> list[tuple[str, str, int]]:
    """Name, type and number of parameters of each tensor."""
    ffi, lib = _reader()
    parameters = ffi.new("struct gguf_init_params *", {"no_alloc": True, "ctx": ffi.NULL})
    file = lib.gguf_init_from_file(str(path).encode("utf-8", "surrogateescape"), parameters[0])
    if file == ffi.NULL:
        return []
    try:
        return [_tensor(ffi, lib, file, number) for number in range(lib.gguf_get_n_tensors(file))]
    finally:
        lib.gguf_free(file)


def _tensor(ffi: Any, lib: Any, file: Any, number: int) -> tuple[str, str, int]:
    kind = lib.gguf_get_tensor_type(file, number)
    blocks = lib.gguf_get_tensor_size(file, number) // lib.ggml_type_size(kind)
    name = ffi.string(lib.gguf_get_tensor_name(file, number)).decode("utf-8", "replace")
    # ggml spells some in small letters (q4_K), what people read has capitals.
    named = ffi.string(lib.ggml_type_name(kind)).decode().upper()
    return name, named, int(blocks * lib.ggml_blck_size(kind))


@cache
def _reader() -> tuple[Any, Any]:
    import llama_cpp_py_sync

    folder = Path(llama_cpp_py_sync.__file__).parent
    ffi: Any = type(native().ffi)()
    ffi.cdef(_HEADER)
    library = next(path for path in sorted(folder.iterdir()) if "ggml-base" in path.name)
    return ffi, ffi.dlopen(str(library))
