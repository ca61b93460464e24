"""What a Parquet file would take in memory, before it is read: 185 kB of one text, repeated, can be gigabytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.reading import NotReadable, check_regular

if TYPE_CHECKING:
    import pyarrow.parquet as pq

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
