"""Whether a GGUF file still is what the record beside it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressknow.compress.pool import Pool
from compressknow.compress.process import hash_file
from compressknow.compress.verify import Difference, Verification
from compressknow.errors import CheckpointError
from compressknow.gguf.place import record_of
from compressknow.gguf.record import metadata_of, read_record
from compressknow.model.gguf_header import check_gguf
from compressknow.quiet import Advance, counted


def compare_to_record(path: str | Path, *, advance: Advance | None = None) -> Verification:
    """Rehash a GGUF file that export wrote, and compare what it says of itself with its record.

    Raises CheckpointError where it has no record, or one that this version cannot read.
    """
    path = Path(path)
    record = read_record(path)
    nbytes = path.stat().st_size
    with Pool(1) as pool:
        sha256 = hash_file(pool, path, counted(advance, nbytes))
    different = sha256 != record.get("sha256")
    found = [Difference(path.name, None, "its bytes differ (sha256)")] if different else list(_edited(path, record))
    return Verification(record["totals"]["tensors"], 1, nbytes, tuple(found))


def _edited(path: Path, record: Mapping[str, Any]) -> Iterator[Difference]:
    """What the record says otherwise than the file, whose bytes are as they were."""
    import gguf

    try:
        check_gguf(path)
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}.", hint="Export it again.") from None
    for key, value in metadata_of(record).items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            yield Difference(record_of(path).name, None, f"it was edited: {key} is another in the file")
