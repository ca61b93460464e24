"""The types of an export: llama.cpp's own, those asked for, and what a size needs; checked before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from compressknow.base.errors import UsageError, did_you_mean
from compressknow.base.libraries import require
from compressknow.base.reading import MANIFEST, read_json, read_toml
from compressknow.compress.recipe import EXPORT, read_calibration
from compressknow.compress.steps import Calibration
from compressknow.model.scopes import SCOPES, Pattern

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


@dataclass(frozen=True)
class Choice:
    """The types of an export: `type` of the file, and `types` of some tensors of it, rules (scope or regular
    expression, tensor type) of which the last that names a tensor holds.

    An importance matrix is made of the text of `calibration`, or read from the file `importance`.

    Raises UsageError for a type that llama.cpp does not have, and for one that it refuses to write without an
    importance matrix.
    """

    type: str = DEFAULT
    types: tuple[tuple[str, str], ...] = ()
    calibration: Calibration | None = None
    importance: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", check_file_type(self.type))
        object.__setattr__(self, "types", check_types(self.types))
        given = self.calibration is not None or self.importance is not None
        if self.calibration is not None and self.importance is not None:
            raise UsageError("--calibration and --imatrix cannot be combined: both say the importance matrix.")
        rounded = [kind for kind in (self.type, *(kind for _, kind in self.types)) if kind not in FLOATS.values()]
        if given and not rounded:
            raise UsageError(
                f"There is nothing to calibrate: {self.type} has no need of an importance matrix.",
                hint="Leave it out, or choose a smaller --type.",
            )
        if needing := [kind for kind in rounded if kind in NEED_IMPORTANCE and not given]:
            raise UsageError(
                f"llama.cpp writes {needing[0]} with an importance matrix alone.",
                hint="Add --calibration self, --calibration FILE.txt or --imatrix FILE.",
            )

    @property
    def label(self) -> str:
        """``q4_k_m``, ``q4_k_m (attention q8_0, imatrix)``."""
        told = [f"{which} {chosen}" for which, chosen in self.types]
        told += ["imatrix"] if self.calibration or self.importance else []
        return f"{self.type} ({', '.join(told)})" if told else self.type


def check_types(types: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Rules ``(scope or regular expression, tensor type)`` with the types in small letters.

    Raises UsageError for a type that is none of a tensor, for a pattern that is none, and for a word that is nearly a
    scope and part of no tensor's name.
    """
    for which, _ in types:
        if which not in SCOPES:
            Pattern("--type-of", which)
            _refuse_typo(which)
    return tuple((which, check_tensor_type(chosen)) for which, chosen in types)


def _refuse_typo(which: str) -> None:
    near = did_you_mean(which, SCOPES, cutoff=0.8)
    if near and not _is_of_a_name(which):
        raise UsageError(
            f"--type-of: there is no scope {which!r}.",
            hint=f"{near}Or give a regular expression that matches names of tensors.",
        )


def _is_of_a_name(word: str) -> bool:
    import gguf

    return any(word in f"{name}.weight" for name in gguf.TENSOR_NAMES.values())


_KEYS = ("type", "types", "calibration", "imatrix")


def read_choice(path: Path) -> Choice:
    """That of the table ``[export]`` of a TOML file, or of the record beside a GGUF file.

    Raises UsageError where there is none, or one of another form.
    """
    try:
        values = _of_record(read_json(path, MANIFEST)) if path.suffix == ".json" else read_toml(path).get(EXPORT)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe.", hint="Give a TOML file or the record of an export.") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a recipe: {error}") from None
    if not isinstance(values, Mapping):
        raise UsageError(f"{path} has no table [export].", hint='Write [export] and type = "q4_k_m" under it.')
    return _choice_from(values, f"{path}, [export]")


def _choice_from(values: Mapping[str, Any], origin: str) -> Choice:
    if unknown := sorted(set(values) - set(_KEYS)):
        near = did_you_mean(unknown[0], _KEYS)
        raise UsageError(f"{origin}: unknown key {unknown[0]!r}.", hint=f"{near}There is {', '.join(_KEYS)}.")
    types, matrix = values.get("types", {}), values.get("imatrix")
    pairs = list(types.items()) if isinstance(types, Mapping) else types
    texts = [values.get("type", DEFAULT), *([matrix] if matrix is not None else [])]
    if not isinstance(pairs, list) or not all(isinstance(text, str) for text in texts) or not all(map(_is_rule, pairs)):
        raise UsageError(f"{origin}: type and imatrix are texts, types a table of texts.")
    calibration = read_calibration(values.get("calibration"), f"{origin}, calibration")
    rules = tuple((which, chosen) for which, chosen in pairs)
    return Choice(texts[0], rules, calibration, None if matrix is None else Path(matrix))


def _is_rule(rule: Any) -> bool:
    return isinstance(rule, list | tuple) and len(rule) == 2 and all(isinstance(part, str) for part in rule)


def _of_record(record: Any) -> dict[str, Any] | None:
    """What a record says, in the form of the table; a matrix that was read from a file is not in it."""
    if not isinstance(record, Mapping) or "type" not in record:
        return None
    seen = record.get("importance")
    values = {key: record[key] for key in ("type", "types") if key in record}
    if isinstance(seen, Mapping) and seen.get("kind") in ("self", "file", "hf"):
        text = {"text": seen.get("source"), "tokens": seen.get("tokens"), "seed": seen.get("seed")}
        return {**values, "calibration": text}
    return values
