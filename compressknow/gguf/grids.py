"""Weights on the grids of GGUF's types: rounded by ggml itself, row by row, to the same bytes as by llama.cpp.

The packed form of a weight [out, in] is `out` rows of blocks; a block has `get_block_size` weights of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compressknow.gguf.choice import list_tensor_types
from compressknow.gguf.importance import Floats
from compressknow.gguf.llama_cpp import load_native

Bytes = npt.NDArray[np.uint8]

# Candidate types, the largest first. Left out are types with a minimum (q5_1, q4_1), which keep no more than the next
# one unless weights lie on such a grid, and those that ggml takes minutes to search for.
CANDIDATES = ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "iq4_nl", "q4_0", "q3_k", "q2_k")
# From ggml.h and ggml-quants.h, which llama-cpp-py-sync does not bind.
_HEADER = """
int64_t ggml_blck_size(int type);
size_t ggml_row_size(int type, int64_t ne);
size_t ggml_quantize_chunk(int type, const float * src, void * dst, int64_t start, int64_t nrows, int64_t n_per_row,
    const float * imatrix);
"""
_DEQUANTIZE = "void dequantize_row_{name}(const void * x, float * y, int64_t k);"
# Weights per thread and call.
_PIECE = 1 << 18


def list_legal_types(columns: int, types: Sequence[str] = CANDIDATES) -> tuple[str, ...]:
    """Return those of `types` whose blocks divide a row of `columns` weights.

    >>> list_legal_types(576)
    ('q8_0', 'q5_0', 'iq4_nl', 'q4_0')
    """
    return tuple(name for name in types if columns % get_block_size(name) == 0)


@cache
def get_block_size(type: str) -> int:
    """Return the number of weights in a block: 32 or 256."""
    return int(_load_ggml()[1].ggml_blck_size(list_tensor_types()[type]))


def get_nbytes(type: str, shape: Sequence[int]) -> int:
    """Return the bytes of a weight [..., in] of this type. Raises ValueError if blocks do not divide its rows.

    >>> get_nbytes("q8_0", (3, 2, 64))
    408
    """
    *rows, columns = shape
    if columns % (width := get_block_size(type)):
        raise ValueError(f"rows of {columns} weights are not a multiple of the {width} in a block of {type}")
    return int(np.prod(rows, dtype=np.int64)) * int(_load_ggml()[1].ggml_row_size(list_tensor_types()[type], columns))


def quantize(weight: Floats, type: str, importance: Floats | None = None) -> Bytes:
    """Pack a weight [out, in] as llama.cpp's quantizer does: uint8 [out, bytes per row].

    Parameters
    ----------
    importance : float32 [in], the mean square of each column's inputs.
    """
    rows, columns = weight.shape
    packed = np.empty((rows, get_nbytes(type, (1, columns))), np.uint8)
    weight = np.ascontiguousarray(weight, np.float32)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (columns,):
            raise ValueError(f"importance of shape {importance.shape} for {columns} columns")
    ffi, library = _load_ggml()
    number = list_tensor_types()[type]
    matrix = ffi.NULL if importance is None else ffi.from_buffer("float[]", importance)

    def round_rows(piece: slice) -> None:
        source, target = ffi.from_buffer("float[]", weight[piece]), ffi.from_buffer(packed[piece])
        library.ggml_quantize_chunk(number, source, target, 0, piece.stop - piece.start, columns, matrix)

    _run_in_pieces(round_rows, rows, columns)
    return packed


def dequantize(packed: Bytes, type: str, shape: Sequence[int]) -> Floats:
    """Unpack the bytes of a weight [out, in], float32."""
    rows, columns = shape
    packed = np.ascontiguousarray(packed).reshape(rows, -1)
    weight = np.empty((rows, columns), np.float32)
    ffi, library = _load_ggml()
    unpack = getattr(library, f"dequantize_row_{_spell(type)}")

    def unpack_rows(piece: slice) -> None:
        target = ffi.from_buffer("float[]", weight[piece])
        unpack(ffi.from_buffer(packed[piece]), target, (piece.stop - piece.start) * columns)

    _run_in_pieces(unpack_rows, rows, columns)
    return weight


def roundtrip(weight: Floats, type: str, importance: Floats | None = None) -> Floats:
    """Return the float32 values of a weight [out, in] after quantization to this type."""
    return dequantize(quantize(weight, type, importance), type, weight.shape)


def _run_in_pieces(work: Callable[[slice], None], rows: int, columns: int) -> None:
    # ggml runs without Python's global lock.
    step = max(1, _PIECE // columns)
    pieces = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if len(pieces) == 1:
        work(pieces[0])
        return
    with ThreadPoolExecutor() as pool:
        list(pool.map(work, pieces))


def _spell(type: str) -> str:
    """Return the name of a type in ggml's functions: ``q4_K`` for ``q4_k``."""
    return f"{type[:-2]}_K" if type.endswith("_k") else type


@cache
def _load_ggml() -> tuple[Any, Any]:
    """Open ggml's library, and return CFFI's interface and the library."""
    import llama_cpp_py_sync

    ffi: Any = type(load_native().ffi)()
    # There are no such functions for floats.
    packed = (_spell(name) for name in list_tensor_types() if name not in ("f32", "f16", "bf16"))
    ffi.cdef(_HEADER + "".join(_DEQUANTIZE.format(name=name) for name in packed))
    folder = Path(llama_cpp_py_sync.__file__).parent
    return ffi, ffi.dlopen(str(next(path for path in sorted(folder.iterdir()) if "ggml-base" in path.name)))
