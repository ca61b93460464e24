"""Read foreign files and tables, with limits on their size, and check, hash and group records."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import sys
import tomllib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from compressknow.base.errors import CheckpointError, CompressknowError, UsageError
from compressknow.base.files import expand_home
from compressknow.base.packages import require
from compressknow.base.progress import disable_bars

MIB = 1 << 20
# The maximum size of a file in bytes, by its kind. For a model of 100,000 tensors, the index has 15 MB and the manifest
# 70 MB; the largest tokenizers have 35 MB.
CONFIG, CARD, TABLE_OF_OPTIONS = 16 * MIB, MIB, MIB // 4
INDEX, MANIFEST, TOKENIZER = 64 * MIB, 256 * MIB, 256 * MIB
RECORD = 64 * MIB
FACTS, LINE = 1024 * MIB, MIB
# Values in a JSON file, or in all lines of a facts file: each takes up to 100 bytes of memory besides its text.
MOST_VALUES = 8_000_000
# The largest integer in records: larger ones could overflow a float in calculations.
LARGEST = 1 << 256
# How much of a file is copied or hashed at a time.
COPY_BYTES = MIB
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


class NotReadable(ValueError):
    """File that is not a regular one, exceeds a limit, or is nested too deeply; the message says which."""


def open_regular(path: Path, most: int | None = None) -> BufferedReader:
    """Open a file for reading, without blocking on a pipe. Raises NotReadable if it is not a regular file, or has more
    than `most` bytes; OSError if it cannot be opened."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check(os.fstat(descriptor), most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: Path, most: int | None = None) -> os.stat_result:
    """Return the status of a file that another library will read. Raises NotReadable as `open_regular` does."""
    status = path.stat()
    _check(status, most)
    return status


def _check(status: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise NotReadable(f"it is {kind}, not a regular file")
    if most is not None and status.st_size > most:
        raise NotReadable(f"it has {status.st_size:,} bytes, and such a file has at most {most:,}")


# Device, inode, size and modification time, which differ if a file was replaced or changed.
FileState = tuple[int, int, int, int]


def get_state(status: os.stat_result) -> FileState:
    """Return the state of a file from its status."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(states: Mapping[Path, FileState]) -> None:
    """Raise CheckpointError if any of these files is no longer in the state in which it was opened."""
    for path, state in states.items():
        with suppress(OSError):
            if get_state(path.stat()) == state:
                continue
        raise CheckpointError(
            f"{path} was replaced or changed while the model was read, so nothing was kept.",
            hint="Repeat the command once nothing writes to the folder.",
        )


def read_bytes(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes. Raises NotReadable or OSError."""
    with open_regular(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise NotReadable(f"it has more than {most:,} bytes")
    return content


def read_text(path: Path, most: int) -> str:
    """Return the text of a UTF-8 file. Raises NotReadable, UnicodeDecodeError (a ValueError too) or OSError."""
    return read_bytes(path, most).decode("utf-8")


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a facts file, without their ends, of at most `LINE` bytes. Raises NotReadable or OSError."""
    with open_regular(path, FACTS) as file:
        number = 0
        while line := file.readline(LINE + 2):
            number += 1
            if len(line) > LINE + 1 or (len(line) == LINE + 1 and not line.endswith(b"\n")):
                raise NotReadable(f"line {number} is longer than {LINE:,} bytes")
            yield line.removesuffix(b"\n")


def read_json(path: Path, most: int) -> Any:
    """Return the value of a JSON file. Raises NotReadable, json.JSONDecodeError (a ValueError too) or OSError."""
    return parse_json(read_bytes(path, most))


def parse_json(
    content: bytes, *, most_values: int = MOST_VALUES, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return the value of JSON in UTF-8; `pairs` makes an object from its keys and values. Raises NotReadable if it
    holds more than `most_values` values or is nested too deeply, ValueError if it is not JSON."""
    # Each value except the first follows one of these.
    if sum(content.count(mark) for mark in (b",", b":", b"[", b"{")) > most_values:
        raise NotReadable(f"it holds more than {most_values:,} values")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=pairs)
    except RecursionError:
        raise NotReadable("it is nested too deeply") from None


def find_lone_surrogate(text: str) -> str | None:
    r"""Return the escape of the first lone surrogate in a text; JSON can contain one as an escape, UTF-8 cannot.

    >>> find_lone_surrogate("a\ud83e"), find_lone_surrogate("a\U0001f999")
    ('\\ud83e', None)
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return None


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file of options. Raises NotReadable, OSError or another ValueError."""
    try:
        # Some editors on Windows write a byte order mark.
        return tomllib.loads(read_text(path, TABLE_OF_OPTIONS).removeprefix("\ufeff"))
    except RecursionError:
        raise NotReadable("it is nested too deeply") from None


def compute_sha256(path: Path, on_piece: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of a regular file in hexadecimal; `on_piece` is called with the number of bytes after each
    piece. Raises NotReadable or OSError, or what `on_piece` raises."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(COPY_BYTES))
    with open_regular(path) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_piece(count)
    return digest.hexdigest()


Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


def group_by(items: Iterable[Item], get_key: Callable[[Item], Key | None]) -> dict[Key, list[Item]]:
    """Return the items of each key, in the order in which keys first occur; items whose key is None are left out.

    >>> group_by(["one", "two", "three", ""], lambda word: len(word) or None)
    {3: ['one', 'two'], 5: ['three']}
    """
    groups: dict[Key, list[Item]] = {}
    for item in items:
        if (key := get_key(item)) is not None:
            groups.setdefault(key, []).append(item)
    return groups


def hash_json(values: object) -> str:
    """Return the SHA-256, in hexadecimal, of values as JSON."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "a boolean", list: "a list", dict: "an object"}


def find_mismatch(value: Any, form: Any, where: str = "it") -> str | None:
    """Return the first mismatch of a value with a form, and its place; None if there is none.

    >>> find_mismatch({"n": [1, 2.5]}, {"n": [int], "name?": str})
    'n[1] is not a whole number'
    >>> find_mismatch({"a": 1, "b": True}, {str: int}), find_mismatch({"a": 1, "b": math.nan}, {str: float})
    ('b is not a whole number', 'b is not a number')
    >>> [find_mismatch({"a": {"b": value}}, {"a": {"b": (int, [str])}}) for value in (None, [1])]
    ['a.b is not a whole number', 'a.b[0] is not text']
    >>> find_mismatch([], (str, None)), find_mismatch(1, None)
    ('it is not text', 'it is not null')
    """
    if isinstance(form, tuple):
        wrong = [find_mismatch(value, each, where) for each in form]
        # Probably meant is the first form that is a container if the value is one, and a scalar otherwise.
        kinds = [isinstance(value, (dict, list)) == isinstance(each, (dict, list)) for each in form]
        return None if None in wrong else wrong[kinds.index(True) if True in kinds else 0]
    if form is None or isinstance(form, type):
        return None if _matches_type(value, form) else f"{where} is not {_NAMES[form] if form else 'null'}"
    if isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        mismatches = (find_mismatch(entry, form[0], f"{where}[{i}]") for i, entry in enumerate(value))
        return next(filter(None, mismatches), None)
    if not isinstance(value, Mapping):
        return f"{where} is not an object"
    return _find_mismatch_in_object(value, form, "" if where == "it" else f"{where}.")


def _find_mismatch_in_object(value: Mapping[str, Any], form: Mapping[Any, Any], prefix: str) -> str | None:
    if str in form:
        pairs = [(key, form[str]) for key in value]
    else:
        if missing := next((key for key in form if not key.endswith("?") and key not in value), None):
            return f"{prefix}{missing} is missing"
        pairs = [(name, form[key]) for key in form if (name := key.removesuffix("?")) in value]
    mismatches = (find_mismatch(value[key], each, f"{prefix}{key}") for key, each in pairs)
    return next(filter(None, mismatches), None)


def _matches_type(value: Any, form: type | None) -> bool:
    if form is None or value is None:
        return value is form
    if isinstance(value, bool) or form is bool:
        return isinstance(value, bool) and form is bool
    if form in (int, float) and isinstance(value, int):
        return abs(value) <= LARGEST
    return math.isfinite(value) if form is float and isinstance(value, float) else isinstance(value, form)


# Builders of `datasets` by the suffix of a file.
SUFFIXES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def load_tables(dataset: str) -> dict[str, Any]:
    """Load the tables of a data set by split: from a folder (of data files, or written by `save_to_disk`), a file, or
    ``NAME`` on the Hub; the name, or that of a folder of data files, may be followed by ``:CONFIG``. Raises UsageError
    if there is no such data set, CompressknowError if the Hub cannot be reached or the data cannot be read."""
    require("datasets", "pyarrow")
    path, config = expand_home(dataset), None
    name, colon, last = dataset.rpartition(":")
    if colon and not path.exists() and expand_home(name).is_dir():
        path, config = expand_home(name), last
    if not path.exists() and is_path(dataset):
        raise UsageError(f"There is no folder or file {path}.", hint="hf: is followed by a path, or a name on the Hub.")
    if path.exists() and not path.is_dir():
        try:
            check_regular(path)
        except NotReadable as error:
            raise UsageError(f"{path} cannot be read: {error}.", hint="Give a file of rows, or a folder.") from None
    _check_tables(path)
    import datasets

    with _silence():
        try:
            if config is None and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
                loaded = datasets.load_from_disk(str(path))
            elif path.is_file():
                if (builder := SUFFIXES.get(path.suffix.lower())) is None:
                    raise UsageError(f"{path} is not a table.", hint=f"Tables are files in {', '.join(SUFFIXES)}.")
                options = _get_csv_options(path) if builder == "csv" else {}
                loaded = datasets.load_dataset(builder, data_files=str(path), **options)
            elif path.is_dir():
                # It needs the folder's name, which "." lacks.
                loaded = datasets.load_dataset(str(path.resolve()), config)
            else:
                name, _, config = dataset.partition(":")
                loaded = datasets.load_dataset(name, config or None)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise _explain(dataset, error) from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _get_csv_options(path: Path) -> dict[str, Any]:
    """Return options that read each cell of a CSV file as text: 007 is not a number, nor NA a missing value."""
    import datasets
    import pandas as pd

    names = pd.read_csv(path, nrows=0).columns
    return {"features": datasets.Features({name: datasets.Value("string") for name in names}), "keep_default_na": False}


def _check_tables(path: Path) -> None:
    """Raise UsageError if `path` is, or contains, a Parquet file that would need far too much memory."""
    for table in [path] if path.is_file() else sorted(path.rglob("*.parquet")) if path.is_dir() else ():
        if table.suffix.lower() == ".parquet":
            try:
                check_parquet(table)
            except NotReadable as error:
                raise UsageError(f"{table} cannot be read: {error}.", hint="Get the data set again.") from None
            except (OSError, ValueError):  # Not a Parquet file: `datasets` will report it.
                continue


def is_path(dataset: str) -> bool:
    """Return whether a data set is on this machine, or cannot be a name on the Hub: [OWNER/]NAME[:CONFIG]."""
    name = dataset.partition(":")[0]
    if name and any(expand_home(each).exists() for each in (dataset, name)):
        return True
    return dataset.startswith((".", "/", "~")) or name.count("/") > 1 or Path(dataset).suffix.lower() in SUFFIXES


@contextmanager
def _silence() -> Iterator[None]:
    """Hide progress bars if stderr is not a terminal, and what `datasets` logs in addition to raising an error."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with nullcontext() if sys.stderr.isatty() else disable_bars():
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _explain(dataset: str, error: Exception) -> CompressknowError:
    """Return our error for one of the library, with what to do."""
    what, reason = f"hf:{dataset} cannot be read.", str(error.__cause__ or error).split("\n")[0]
    if isinstance(error, ConnectionError):
        page = f"huggingface.co/datasets/{dataset.partition(':')[0]}"
        hint = f"Download {page} where there is a network, and name the folder: hf:FOLDER."
        return CompressknowError(f"hf:{dataset} is not on this machine, and the Hub cannot be reached.", reason, hint)
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in reason:
        return UsageError(
            what,
            "It needs its own loading script, which the datasets library has not run since version 4.",
            "Download a copy in Parquet (the branch refs/convert/parquet often has one), and pass hf:FOLDER.",
        )
    if isinstance(error, ValueError) and "BuilderConfig" in reason:
        return UsageError(what, reason, "The configuration follows the name: hf:NAME:CONFIG.")
    if isinstance(error, ValueError) and "Config name is missing" in reason:
        return UsageError(what, str(error).replace("\n", " "), "The configuration follows the name: hf:NAME:CONFIG.")
    if isinstance(error, FileNotFoundError):
        return UsageError(what, reason, "hf: is followed by a name on the Hub, a folder or a file.")
    return CompressknowError(what, reason)


# A Parquet file of n bytes may hold TABLE_VALUES + n values, and unpack to MOST_BYTES + EXPANSION * n bytes.
TABLE_VALUES, MOST_BYTES, EXPANSION = 64_000_000, 512 << 20, 8
_ROWS, _ROWS_OF_LISTS = 65_536, 64


def check_parquet(path: Path) -> None:
    """Raise NotReadable if a Parquet file would unpack to far more than its size; pyarrow's errors if it is invalid."""
    import pyarrow.parquet as pq

    size = check_regular(path).st_size
    most = MOST_BYTES + EXPANSION * size
    # pyarrow itself cannot open a path that is not UTF-8.
    with path.open("rb") as opened, pq.ParquetFile(opened) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        texts = sorted({chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"})
    if sum(chunk.num_values for chunk in chunks) > TABLE_VALUES + size:
        raise NotReadable(f"it holds more than {TABLE_VALUES:,} values in {size:,} bytes")
    if sum(chunk.total_uncompressed_size for chunk in chunks) > most:
        raise NotReadable(f"it would unpack from {size:,} bytes to more than {MOST_BYTES:,}")
    # Dictionaries hold a repeated text once; pyarrow cannot read texts in lists as dictionaries.
    dictionaries = [text for text in texts if "." not in text]
    with path.open("rb") as opened, pq.ParquetFile(opened, read_dictionary=dictionaries) as file:
        for text in texts:
            for batch in file.iter_batches(batch_size=_ROWS_OF_LISTS if "." in text else _ROWS, columns=[text]):
                most -= _count_bytes(batch.column(0))
                if most < 0:
                    raise NotReadable(f"its texts would unpack from {size:,} bytes to more than {MOST_BYTES:,}")


def _count_bytes(column: Any) -> int:
    """Count the bytes of all texts of a column, repeated ones each time."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
