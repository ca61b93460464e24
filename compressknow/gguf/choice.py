"""Types of an export: llama.cpp's, those that the user names, and those that fit a size; checked before any work."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressknow.base.errors import UnusedOptions, UsageError, suggest_word
from compressknow.base.packages import require
from compressknow.base.reading import find_mismatch
from compressknow.compress.recipe import EXPORT, check_keys, read_calibration, read_values
from compressknow.compress.steps import Calibration
from compressknow.model.structure import SCOPES, compile_pattern

if TYPE_CHECKING:
    from compressknow.compress.calibrate.walk import Batches
    from compressknow.gguf.tensors import Tensors

Rounding = Literal["nearest", "gptq"]

# Half the size of 16 bits, with nearly all facts kept; smaller ones are the user's choice, to be measured.
DEFAULT = "q8_0"
# Types that llama.cpp refuses to write without an importance matrix.
NEED_IMPORTANCE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "q2_k_s"})
# The types that the converter writes, by the dtype of safetensors, whose values they represent exactly.
FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
# Maximum number of rules in a label; a record used as a recipe has one per tensor.
_NAMED = 6
_FILE = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
_TENSOR = "GGML_TYPE_"
# Not made by rounding weights: they need training, or are only for experts.
_NO_FILE = {"guessed", "mxfp4_moe", "nvfp4"}
# Integers and doubles, which weights do not use; types of activations; the number of types.
_NO_TENSOR = {"i8", "i16", "i32", "i64", "f64", "q8_1", "q8_k", "count"}


@cache
def list_file_types() -> dict[str, int]:
    """Return the numbers of the types of a whole file, by their names in llama-quantize."""
    return {name: number for name, number in _list_members("llama_ftype", *_FILE) if name not in _NO_FILE}


@cache
def list_tensor_types() -> dict[str, int]:
    """Return the numbers of the types of a single tensor, by name."""
    return {name: number for name, number in _list_members("ggml_type", _TENSOR) if name not in _NO_TENSOR}


def _list_members(enum: str, *prefixes: str) -> Iterator[tuple[str, int]]:
    require("llama_cpp_py_sync", "gguf")
    from llama_cpp_py_sync import _cffi_bindings

    numbers = _cffi_bindings.get_ffi().typeof(f"enum {enum}").relements
    for member, number in sorted(numbers.items(), key=lambda each: each[1]):
        yield from ((member.removeprefix(each).lower(), number) for each in prefixes if member.startswith(each))


def _check_type(name: str, known: Collection[str], option: str) -> str:
    """Return the type's name in lower case. Raises UsageError if it is not a `known` one."""
    lower = str(name).lower()
    if lower not in known:
        hint = f"{suggest_word(lower, known)}Choose from {', '.join(known)}."
        raise UsageError(f"{option} does not accept the type {name!r}.", hint=hint)
    return lower


def find_base_type(file_type: str) -> str:
    """Return the tensor type that most of a file's weights get.

    >>> [find_base_type(name) for name in ("q4_k_m", "q8_0", "f16", "iq3_xs")]
    ['q4_k', 'q8_0', 'f16', 'iq3_s']
    """
    # Mixes without a tensor type of their own are built around the small variant.
    mixed = f"{file_type.rpartition('_')[0]}_s"
    return max((name for name in list_tensor_types() if file_type.startswith(name)), key=len, default=mixed)


def estimate_bytes(tensor_type: str, numel: int) -> int:
    """Return the bytes of `numel` weights, without the padding of incomplete blocks in rows.

    >>> estimate_bytes("q4_k", 257), estimate_bytes("bf16", 257)
    (288, 514)
    """
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, tensor_type.upper(), gguf.GGMLQuantizationType.F16)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return -(-numel // int(block)) * int(size)


@dataclass(frozen=True)
class TypeChoice:
    """Types of an export: the `type` of the file, and `types` of some of its tensors as rules (scope or regular
    expression, tensor type), of which the last one that matches a tensor applies.

    An importance matrix is computed from the text of `calibration`, or read from the file `importance`.

    Raises UsageError for a type that llama.cpp does not have, or that needs an importance matrix if there is none.
    """

    type: str = DEFAULT
    types: tuple[tuple[str, str], ...] = ()
    calibration: Calibration | None = None
    importance: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", _check_type(self.type, list_file_types(), "--type"))
        object.__setattr__(self, "types", check_types(self.types))
        has_matrix = self.calibration is not None or self.importance is not None
        if self.calibration is not None and self.importance is not None:
            raise UsageError("--calibration and --imatrix cannot be combined: each provides an importance matrix.")
        rounded = [kind for kind in (self.type, *(kind for _, kind in self.types)) if kind not in FLOATS.values()]
        if has_matrix and not rounded:
            raise UnusedOptions(
                f"There is nothing to calibrate: {self.type} does not need an importance matrix.",
                hint="Leave it out, or choose a smaller --type.",
                names=("calibration", "calibration_tokens", "imatrix"),
            )
        if needing := [kind for kind in rounded if kind in NEED_IMPORTANCE and not has_matrix]:
            raise UsageError(
                f"llama.cpp writes {needing[0]} only with an importance matrix.",
                hint="Add --calibration self, --calibration FILE.txt or --imatrix FILE.",
            )

    @property
    def label(self) -> str:
        """Return ``q4_k_m``, ``q4_k_m (attention q8_0, imatrix)``, ``q4_k_s (211 rules)``."""
        parts = [f"{target} {kind}" for target, kind in self.types]
        parts = parts if len(parts) <= _NAMED else [f"{len(parts)} rules"]
        # llama.cpp looks at a matrix only for fewer bits.
        weighted = {self.type, *(kind for _, kind in self.types)} - {"q8_0", *FLOATS.values()}
        parts += ["imatrix"] if weighted and (self.calibration or self.importance) else []
        return f"{self.type} ({', '.join(parts)})" if parts else self.type


def check_types(
    types: Sequence[tuple[str, str]], option: str = "--type-of", known: Collection[str] | None = None
) -> tuple[tuple[str, str], ...]:
    """Return rules ``(scope or regular expression, tensor type)`` with lowercase types. Raises UsageError for a type
    that is not among the `known`, an invalid pattern, and a misspelled scope that is in no tensor's name."""
    for target, _ in types:
        if target not in SCOPES:
            compile_pattern(option, target)
            _check_typo(target, option)
    return tuple((target, _check_type(kind, known or list_tensor_types(), option)) for target, kind in types)


def _check_typo(target: str, option: str) -> None:
    import gguf

    near = suggest_word(target, SCOPES, cutoff=0.8)
    if near and not any(target in f"{name}.weight" for name in gguf.TENSOR_NAMES.values()):
        raise UsageError(
            f"{option}: there is no scope {target!r}.",
            hint=f"{near}Or give a regular expression that matches names of tensors.",
        )


_KEYS = ("type", "types", "calibration", "imatrix")


def read_choice(path: Path, importance: Path | None = None) -> TypeChoice:
    """Read the table ``[export]`` of a TOML file, or the record of an export; `importance` is a matrix to use in place
    of its own. Raises UsageError if there is none or it is malformed, or if the recorded export read a matrix, which no
    record holds, and none is given."""
    values = read_values(path, "Give a TOML file or the record of an export.")
    table = _parse_record(values, importance) if path.suffix == ".json" else values.get(EXPORT)
    if not isinstance(table, Mapping):
        raise UsageError(f"{path} has no table [export].", hint='Write [export] and type = "q4_k_m" under it.')
    matrix = {} if importance is None else {"imatrix": str(importance)}
    return _parse_choice({**table, **matrix}, f"{path}, [export]")


def _parse_choice(values: Mapping[str, Any], origin: str) -> TypeChoice:
    check_keys(values, _KEYS, origin)
    kind, types, matrix = values.get("type", DEFAULT), values.get("types", {}), values.get("imatrix")
    rules = list(map(list, types.items())) if isinstance(types, Mapping) else types
    form = {"type": str, "imatrix": (str, None), "types": [[str]]}
    wrong = find_mismatch({"type": kind, "imatrix": matrix, "types": rules}, form)
    if wrong or any(len(rule) != 2 for rule in rules):
        raise UsageError(f"{origin}: type and imatrix are texts, types a table of texts.")
    pairs = tuple((target, tensor_type) for target, tensor_type in rules)
    calibration = read_calibration(values.get("calibration"), f"{origin}, calibration")
    return TypeChoice(kind, pairs, calibration, None if matrix is None else Path(matrix))


def _parse_record(record: Mapping[str, Any], matrix: Path | None) -> dict[str, Any] | None:
    """Return the choice in a record as values of the table ``[export]``; None if there is none."""
    if "type" not in record:
        return None
    values = {key: record[key] for key in ("type", "types") if key in record}
    importance = record.get("importance")
    if isinstance(importance, Mapping) and importance.get("kind") in ("self", "file", "hf"):
        keys = {"text": "source", "tokens": "asked", "seed": "seed"}
        values["calibration"] = {name: importance.get(key) for name, key in keys.items()}
    elif importance and matrix is None:
        raise UsageError("The record is of a file that was made with --imatrix.", hint="Pass that matrix again.")
    return values


# The type of each matrix of a file, and what a record says about the choice.
Fitted = tuple[Mapping[str, str], Mapping[str, Any]]


@dataclass(frozen=True)
class SizeFit:
    """Method to fit a file to a size.

    Attributes
    ----------
    label : ``90.0 MB by facts and text, gptq``.
    budget : maximum bytes of the file.
    choose : takes the file's content in 32 or 16 bits, and the bytes of everything but matrices; returns types.
    rounding : ``gptq``, or ``nearest`` for llama.cpp's, with the importance matrix of the export, if it has one.
    texts : texts for GPTQ, with equal weights.
    """

    label: str
    budget: int
    choose: Callable[[Tensors, int], Fitted]
    rounding: Rounding = "nearest"
    texts: Sequence[Batches] = ()
