"""The types that llama.cpp gives a file, and a tensor in it: read from its own header, so new ones come with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

from compressknow.errors import UsageError, did_you_mean
from compressknow.libraries import require

# Half the size of 16 bits, with nearly all facts kept: smaller ones are a choice, to be measured.
DEFAULT = "q8_0"
# What `llama-quantize` and `llama_model_quantize` refuse to write without an importance matrix.
NEED_IMPORTANCE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"})
# The types that a converter writes itself, by the dtype of safetensors; all are exact for their own.
FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_FILE = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
_TENSOR = "GGML_TYPE_"
# Made on another way than by rounding weights: by training for it, or of experts alone.
_NO_FILE = {"guessed", "mxfp4_moe", "nvfp4"}
# Integers and doubles, which no weight is stored in; what llama.cpp rounds activations to; the count of them.
_NO_TENSOR = {"i8", "i16", "i32", "i64", "f64", "q8_1", "q8_k", "count"}


def bindings() -> Any:
    """The module that binds llama.h. Raises CompressknowError where the extra is not installed."""
    require("llama_cpp_py_sync", "gguf")
    from llama_cpp_py_sync import _cffi_bindings

    return _cffi_bindings


@cache
def file_types() -> dict[str, int]:
    """The numbers of the types of a whole file, by the names that llama-quantize takes."""
    return {name: number for name, number in _members("llama_ftype", _FILE) if name not in _NO_FILE}


@cache
def tensor_types() -> dict[str, int]:
    """The types of a single tensor."""
    return {name: number for name, number in _members("ggml_type", (_TENSOR,)) if name not in _NO_TENSOR}


def _members(enum: str, prefixes: Collection[str]) -> Iterator[tuple[str, int]]:
    numbers = bindings().get_ffi().typeof(f"enum {enum}").relements
    for member, number in sorted(numbers.items(), key=lambda each: each[1]):
        for prefix in prefixes:
            if member.startswith(prefix):
                yield member.removeprefix(prefix).lower(), number


def check_file_type(name: str) -> str:
    """The type's name in small letters. Raises UsageError where llama.cpp has none of that name."""
    return _checked(name, file_types(), "--type")


def check_tensor_type(name: str) -> str:
    """The type's name in small letters; the mixtures of files, such as q4_k_m, are none of a tensor."""
    return _checked(name, tensor_types(), "--type-of")


def _checked(name: str, known: Collection[str], option: str) -> str:
    small = name.lower()
    if small not in known:
        hint = f"{did_you_mean(small, known)}There is {', '.join(known)}."
        raise UsageError(f"{option}: llama.cpp has no type {name!r}.", hint=hint)
    return small


def base_type(file_type: str) -> str:
    """The tensor type that most of a file's weights get.

    >>> [base_type(name) for name in ("q4_k_m", "q8_0", "f16")]
    ['q4_k', 'q8_0', 'f16']
    """
    return max((name for name in tensor_types() if file_type.startswith(name)), key=len, default="f16")


def bytes_of(tensor_type: str, numel: int) -> int:
    """The bytes of so many weights, without what rows that do not fill a block add."""
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, tensor_type.upper(), gguf.GGMLQuantizationType.F16)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return -(-numel // int(block)) * int(size)
