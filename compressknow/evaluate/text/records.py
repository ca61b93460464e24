"""What a model gave to a running text, on disk: a row per chunk in a Parquet file beside ``answers.parquet``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressknow.errors import DamagedAnswers
from compressknow.evaluate.records import ProbeEntry, Record
from compressknow.files import written
from compressknow.reading import sha256_of
from compressknow.tables import check_parquet

if TYPE_CHECKING:
    import pyarrow as pa

FILES = "text-"
# Why a text has no divergences from the original, or `MEASURED` where it has.
MEASURED, ALONE, NO_ROOM = "measured", "no original", "no room"
OTHER_TOKENS, OTHER_SIZE = "other tokens", "other size"
# What reports read of the entry "text" of a probe.
FORM: dict[str, Any] = {"context": int, "chunks": int, "tokens": int, "bytes": (int, None), "divergence": str}
FORM |= {"file?": str, "sha256?": str}


@dataclass(frozen=True)
class Chunk:
    """What a model gave to one chunk of a text.

    Attributes
    ----------
    number : of the chunk, from 0.
    ids : int32 [scored], the tokens scored: the second half of the chunk but for its first token.
    logp : float32 [scored], log-probability (natural logarithm) of each of them, given what stands before it.
    top : int32 [scored], the token that the model holds most likely there.
    kl : float64 [scored], KL(original || this model) in nats over the whole vocabulary; None where the original's
        distributions were not at hand.
    bytes : of the text that these tokens stand for, in UTF-8; None where the tokenizer does not tell.
    greedy : int32, what the model writes after the first half of the chunk, the likeliest token each time; empty for
        all but the first chunks.
    """

    number: int
    ids: np.ndarray
    logp: np.ndarray
    top: np.ndarray
    kl: np.ndarray | None
    bytes: int | None
    greedy: np.ndarray


def file_of(name: str) -> str:
    """The file's name for a probe's: no two probes of an answers folder have one.

    >>> file_of("text:wiki.txt")
    'text-8d05bc96caa7.parquet'
    """
    return f"{FILES}{hashlib.sha256(name.encode()).hexdigest()[:12]}.parquet"


def write_chunks(path: Path, chunks: Sequence[Chunk]) -> None:
    """Write chunks as Parquet; the file appears under its name only when it is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {field.name: [_stored(getattr(chunk, field.name)) for chunk in chunks] for field in _schema()}
    with written(path) as file:
        pq.write_table(pa.table(columns, schema=_schema()), file, compression="zstd")


def read_chunks(path: Path) -> tuple[Chunk, ...]:
    """The chunks of a file, in their order. Raises DamagedAnswers where it is none, or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_parquet(path)
        with pq.ParquetFile(path) as file:
            rows = file.read(columns=_schema().names).cast(_schema()).to_pylist()
        return tuple(sorted(map(_chunk, rows), key=lambda chunk: chunk.number))
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DamagedAnswers(
            f"{path} cannot be read as the tokens of a text.",
            why=(str(error).splitlines() or [type(error).__name__])[0],
            hint="Probe the model again, into another folder.",
        ) from error


def read_texts(folder: Path, record: Record) -> dict[str, tuple[Chunk, ...]]:
    """Probe -> its chunks, of the texts of an answers folder. Raises DamagedAnswers where one is missing or damaged,
    or is not the one of the record.
    """
    return {name: _checked(folder, entry) for name, entry in record.probes.items() if entry.text}


def entry_with_file(entry: ProbeEntry, path: Path) -> ProbeEntry:
    """The entry with the name and the hash of its file."""
    return replace(entry, text=dict(entry.text or {}) | {"file": path.name, "sha256": sha256_of(path)})


def _checked(folder: Path, entry: ProbeEntry) -> tuple[Chunk, ...]:
    text: Mapping[str, Any] = entry.text or {}
    name = str(text.get("file", ""))
    # A name of a folder elsewhere is none of ours.
    if not name.startswith(FILES) or name != Path(name).name or not (folder / name).is_file():
        raise DamagedAnswers(
            f"{folder} lacks the tokens of a text.", hint="The folder is damaged: probe the model again."
        )
    if sha256_of(folder / name) != text.get("sha256"):
        raise DamagedAnswers(
            f"{folder / name} does not match probe.json: its hash differs.",
            hint="Probe the model again, into another folder.",
        )
    return read_chunks(folder / name)


def _stored(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _schema() -> pa.Schema:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        [
            ("number", pa.int32()),
            ("ids", ids),
            ("logp", pa.list_(pa.float32())),
            ("top", ids),
            ("kl", pa.list_(pa.float64())),
            ("bytes", pa.int64()),
            ("greedy", ids),
        ]
    )


def _chunk(row: Mapping[str, Any]) -> Chunk:
    lists: dict[str, np.ndarray] = {name: np.array(row[name], dtype=kind) for name, kind in _KINDS.items()}
    kl = None if row["kl"] is None else np.array(row["kl"], dtype=np.float64)
    scored = [len(lists["ids"]), len(lists["logp"]), len(lists["top"]), *([] if kl is None else [len(kl)])]
    if row["number"] is None or not scored[0] or len(set(scored)) != 1:
        raise ValueError("a row is empty, or its lists are not of one length")
    return Chunk(int(row["number"]), kl=kl, bytes=row["bytes"], **lists)


_KINDS: dict[str, type[np.generic]] = {"ids": np.int32, "logp": np.float32, "top": np.int32, "greedy": np.int32}
