"""Tables of others: what the `datasets` library reads, from the hub or from disk, and Parquet files within bounds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.errors import CompressknowError, UsageError
from compressknow.libraries import require
from compressknow.reading import NotReadable, check_regular

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# Files of rows, and what `datasets` calls their kind.
SUFFIXES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def load_tables(dataset: str) -> dict[str, Any]:
    """The tables of a data set, by the name of their split: a folder (of data files, or written by `save_to_disk`), one
    file of rows, ``NAME`` or ``NAME:CONFIG`` on the hub.

    Raises UsageError where there is no such set, CompressknowError where the hub is not reached or the data cannot be
    read.
    """
    require("datasets", "pyarrow")
    path = Path(dataset).expanduser()
    if not path.exists() and _names_a_path(dataset):
        raise UsageError(f"There is no folder or file {path}.", hint="hf: is followed by a path, or a name on the hub.")
    if path.exists() and not path.is_dir():
        try:
            check_regular(path)
        except NotReadable as error:
            raise UsageError(f"{path} cannot be read: {error}.", hint="Give a file of rows, or a folder.") from None
    _check_tables(path)
    import datasets

    with _quiet():
        try:
            if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
                loaded = datasets.load_from_disk(str(path))
            elif path.is_file():
                loaded = datasets.load_dataset(_builder(path), data_files=str(path))
            elif path.is_dir():
                loaded = datasets.load_dataset(str(path))
            else:
                name, _, config = dataset.partition(":")
                loaded = datasets.load_dataset(name, config or None)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise _explained(dataset, error) from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


def _check_tables(path: Path) -> None:
    """Raise UsageError where a local file or folder has a Parquet file that would fill the memory."""
    for table in [path] if path.is_file() else sorted(path.rglob("*.parquet")) if path.is_dir() else ():
        if table.suffix.lower() == ".parquet":
            try:
                check_parquet(table)
            except NotReadable as error:
                raise UsageError(f"{table} cannot be read: {error}.", hint="Get the data set again.") from None
            except (OSError, ValueError):  # No Parquet file at all: `datasets` says what is wrong.
                continue


def _names_a_path(dataset: str) -> bool:
    """Whether this cannot be a name on the hub: those are NAME or OWNER/NAME, with a colon and a configuration."""
    name = dataset.partition(":")[0]
    return dataset.startswith((".", "/", "~")) or name.count("/") > 1 or Path(dataset).suffix.lower() in SUFFIXES


def _builder(path: Path) -> str:
    builder = SUFFIXES.get(path.suffix.lower())
    if builder is None:
        raise UsageError(f"{path}: no table of a known kind.", hint=f"Known are {', '.join(SUFFIXES)}.")
    return builder


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where stderr is no terminal, and no log lines of `datasets` beside the error that is raised."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _explained(dataset: str, error: Exception) -> CompressknowError:
    """The library's error in words that say what to do."""
    what, reason = f"hf:{dataset} cannot be read.", str(error.__cause__ or error).split("\n")[0]
    if isinstance(error, ConnectionError):
        page = f"huggingface.co/datasets/{dataset.partition(':')[0]}"
        hint = f"Download {page} where there is a network, and name the folder: hf:FOLDER."
        return CompressknowError(f"hf:{dataset} is not on this machine, and the Hub cannot be reached.", reason, hint)
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in reason:
        return UsageError(
            what,
            "It is loaded by a script of its own, which the datasets library has not run since version 4.",
            "Look for a copy in Parquet (a branch refs/convert/parquet often has one), download it, and say hf:FOLDER.",
        )
    if isinstance(error, ValueError) and "BuilderConfig" in reason:
        return UsageError(what, reason, "The configuration follows the name: hf:NAME:CONFIG.")
    if isinstance(error, ValueError) and "Config name is missing" in reason:
        return UsageError(what, str(error).replace("\n", " "), "The configuration follows the name: hf:NAME:CONFIG.")
    if isinstance(error, FileNotFoundError):
        return UsageError(what, reason, "hf: is followed by a name on the hub, a folder or a file.")
    return CompressknowError(what, reason)


# Beyond these, a file may hold so many values, and bytes of text and numbers, for each of its own bytes.
MOST_VALUES, MOST_BYTES, EXPANSION = 64_000_000, 512 << 20, 8
_ROWS, _ROWS_OF_LISTS = 65_536, 64


def check_parquet(path: Path) -> None:
    """Raise NotReadable where a Parquet file would take far more memory than it has bytes; pyarrow's errors where it is
    none."""
    import pyarrow.parquet as pq

    check_regular(path)
    size = path.stat().st_size
    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        texts = sorted({chunk.path_in_schema for chunk in chunks if chunk.physical_type == "BYTE_ARRAY"})
    if sum(chunk.num_values for chunk in chunks) > MOST_VALUES + size:
        raise NotReadable(f"it holds more than {MOST_VALUES:,} values in {size:,} bytes")
    if sum(chunk.total_uncompressed_size for chunk in chunks) > MOST_BYTES + EXPANSION * size:
        raise NotReadable(f"it would unpack from {size:,} bytes to more than {MOST_BYTES:,}")
    # As dictionaries, in which a text that is repeated is held once; pyarrow reads those in lists plainly alone.
    with pq.ParquetFile(path, read_dictionary=[text for text in texts if "." not in text]) as file:
        if _text_bytes(file, texts, most := MOST_BYTES + EXPANSION * size) > most:
            raise NotReadable(f"its texts would unpack from {size:,} bytes to more than {MOST_BYTES:,}")


def _text_bytes(file: pq.ParquetFile, texts: list[str], most: int) -> int:
    """Bytes of all texts, each counted as often as it stands; no more is counted once there are too many."""
    found = 0
    for text in texts:
        for batch in file.iter_batches(batch_size=_ROWS_OF_LISTS if "." in text else _ROWS, columns=[text]):
            found += _bytes_of(batch.column(0))
            if found > most:
                return found
    return found


def _bytes_of(column: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.binary_length(column.dictionary).cast(pa.int64())
    return int(pc.sum(lengths.take(column.indices)).as_py() or 0)
