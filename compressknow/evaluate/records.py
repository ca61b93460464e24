"""Records on disk next to answers, typed: probe.json, and what a model gave to a running text."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from compressknow.base.errors import DamagedAnswers
from compressknow.base.files import open_whole
from compressknow.base.reading import check_parquet, compute_sha256

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq


@dataclass(frozen=True, kw_only=True)
class _JsonRecord:
    """JSON object with fields of known names; `read` is the object that it was read from, if it was."""

    # Written even if null or empty in an object that is new; in one that was read, only if they stood there.
    always: ClassVar[frozenset[str]] = frozenset()
    read: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the record from a JSON object whose hash was checked; `to_dict` keeps keys that are not fields."""
        known = {each.name for each in fields(cls)} - {"read"}
        return cls(**{key: value for key, value in values.items() if key in known}, read=dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object: what was read, in its order, with the fields as they are now."""
        own = {each.name: _to_plain(getattr(self, each.name)) for each in fields(self) if each.name != "read"}
        kept = {key: own.pop(key, value) for key, value in self.read.items()}
        always = frozenset() if self.read else self.always
        return kept | {name: value for name, value in own.items() if value not in (None, {}) or name in always}


def _to_plain(value: Any) -> Any:
    if isinstance(value, _JsonRecord):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _to_plain(each) for key, each in value.items()}
    return value


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """Changes of a model's answers to `n` facts by another precision, or another runtime.

    Facts in several wordings are answered by majority.

    Attributes
    ----------
    changed : facts to which the answer differs; of the `known` ones `lost` are wrong then, of the others `gained` are
        right.
    kl_mean : mean divergence at the answer's first position, in nats over the whole vocabulary; None if the disk had
        no room for that, or the tokens are others.
    computed_in : that precision, or the runtime and its build.
    read_otherwise : prompts that the runtime splits into other tokens than the model's own tokenizer; None for
        a precision.
    produced : the same where known means produced; None if the model cannot write.
    """

    n: int
    changed: int
    known: int
    lost: int
    gained: int
    kl_mean: float | None
    computed_in: str
    read_otherwise: int | None = None
    produced: NoiseFloor | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build it from a JSON object whose hash was checked; other keys are left out."""
        produced = values.get("produced")
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**known | {"produced": cls.from_dict(produced) if produced else None})


@dataclass(frozen=True)
class ProbeEntry(_JsonRecord):
    """Entry of "probes": how the answers to one probe came about.

    Attributes
    ----------
    protocol, fingerprint : the way of evaluating, and a hash of the facts: answers compare where both are equal.
    facts : so many were read; `asked` so many were evaluated, `dropped` so many left out, by reason.
    truncated : items of a task that lost the beginning of their context; None of facts.
    templates : in how many wordings each fact was put, where several; facts are counted by wording then.
    average : ``micro`` over facts or ``macro`` over relations, for the probe's headline accuracy.
    chance, majority : accuracy of guessing, and of the most frequent answers, so averaged; None if there is none.
    limit, seed : of the sample, if one was drawn.
    source : where the facts come from.
    key : a hash of all that decides the answers; those of old versions have none.
    reference : sha256 of the model whose most likely tokens were evaluated, its own or the original's.
    seconds : wall time.
    text : of a running text: context, chunks, tokens scored and their bytes, whether there are divergences from the
        original (`compressknow.evaluate.records`), and the file that holds its tokens. None of facts.
    noise_floor : of an original, where it was found.
    runtime_noise_floors : of an original by the other runtime that it ran in too, name and build.
    """

    always: ClassVar[frozenset[str]] = frozenset({"dropped", "chance", "majority", "limit", "source"})

    protocol: str
    fingerprint: str
    facts: int
    asked: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    truncated: int | None = None
    templates: int | None = None
    average: str = "micro"
    chance: float | None = None
    majority: float | None = None
    limit: int | None = None
    seed: int | None = None
    source: Mapping[str, Any] | None = None
    key: str | None = None
    reference: str | None = None
    seconds: float | None = None
    text: Mapping[str, Any] | None = None
    noise_floor: NoiseFloor | None = None
    runtime_noise_floors: Mapping[str, NoiseFloor] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        floor, by_runtime = values.get("noise_floor"), values.get("runtime_noise_floors") or {}
        entry = super().from_dict(values)
        return replace(
            entry,
            noise_floor=NoiseFloor.from_dict(floor) if floor else None,
            runtime_noise_floors={runtime: NoiseFloor.from_dict(each) for runtime, each in by_runtime.items()},
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured on this machine, in the same run: facts per second, peak memory in bytes and, of a model that goes on
    with texts, the tokens per second that it writes. `computed_in` is what it was deployed in: ``bfloat16``, or the
    runtime and its build."""

    device: str
    facts_per_second: float
    peak_bytes: int | None
    tokens_per_second: float | None = None
    computed_in: str | None = None


@dataclass(frozen=True, slots=True)
class FactsInText:
    """Facts that have a subject and an object, and how many of them a sentence of the text holds that a model was
    calibrated on; the same of those that the other model knew, which it is compared with."""

    facts: int
    found: int
    known: int
    known_found: int


@dataclass(frozen=True)
class ModelRecord(_JsonRecord):
    """Object "model": the model that gave the answers.

    Attributes
    ----------
    parameters, bytes, zeros : numbers of weights, of bytes on disk, and of weights that are zero.
    vocabulary : the number of tokens, or a hash of them.
    dtype : of the weights as stored; `computed_in` what they were run in, on `device`.
    setup, recipe, source, groups, removed, calibration : of a converted checkpoint, what its manifest says.
    changed : whether its files differ from that manifest, or from the record of an export; None if they do not.
    grid : matrices that lie on a grid already, as `find_grid` counts them; None if none does.
    totals : of a cell of a study, which has no files: its manifest's totals, `nonzero` and `sparse_bytes`.
    runtime : what ran it where that was not transformers: name, build, and types by group of layers.
    speed, in_calibration : measured for one report; they are not stored.
    runtime_unmeasured : of an original, why the noise floor of its compressed model's runtime is not known, and what to
        try: sentences, the first without a capital. It is not stored.
    """

    name: str
    revision: str | None = None
    bytes: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    setup: str | None = None
    recipe: Mapping[str, Any] | None = None
    source: Mapping[str, Any] | None = None
    zeros: int | None = None
    groups: Mapping[str, Mapping[str, Any]] | None = None
    removed: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    changed: bool | None = None
    grid: Mapping[str, int] | None = None
    totals: Mapping[str, int] = field(default_factory=dict)
    sha256: str | None = None
    architecture: str | None = None
    family: str | None = None
    parameters: int | None = None
    vocabulary: str | int | None = None
    device: str | None = None
    computed_in: str | None = None
    runtime: Mapping[str, Any] | None = None
    speed: Speed | None = None
    in_calibration: FactsInText | None = None
    runtime_unmeasured: str | None = None

    @property
    def ran_in(self) -> str:
        """Return the runtime and its build."""
        runtime = self.runtime or {"name": "transformers"}
        return " ".join(filter(None, (runtime["name"], runtime.get("build"))))


# The dtype of weights if it is unknown.
UNKNOWN = "unknown"


def is_on_server(model: ModelRecord) -> bool:
    return (model.runtime or {}).get("name") == "server"


@dataclass(frozen=True)
class Record(_JsonRecord):
    """Content of ``probe.json``; `answers_sha256` is the hash of the table, None while that is rewritten."""

    always: ClassVar[frozenset[str]] = frozenset({"probes", "versions"})

    schema: int
    model: ModelRecord
    probes: Mapping[str, ProbeEntry]
    versions: Mapping[str, str]
    answers_sha256: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        parts = {
            "model": ModelRecord.from_dict(values["model"]),
            "probes": {name: ProbeEntry.from_dict(entry) for name, entry in values["probes"].items()},
        }
        return super().from_dict({**values, **parts})

    def without_hash(self, probes: Mapping[str, ProbeEntry]) -> Record:
        """Return the record with these probes, before the table is written that belongs to them."""
        read = {key: value for key, value in self.read.items() if key != "answers_sha256"}
        return replace(self, probes=probes, answers_sha256=None, read=read)


TEXTS = "text-"
# Why a text has no divergences from the original, or `MEASURED` where it has.
MEASURED, ALONE, NO_ROOM = "measured", "no original", "no room"
OTHER_TOKENS, OTHER_SIZE = "other tokens", "other size"


@dataclass(frozen=True)
class Chunk:
    """Log-probabilities and greedy text that a model gave to one chunk of a text.

    Attributes
    ----------
    number : of the chunk, from 0.
    ids : int32 [scored], the tokens scored: the second half of the chunk but for its first token.
    logp : float32 [scored], log-probability (natural logarithm) of each of them, given what stands before it.
    top : int32 [scored], the token that the model holds most likely there.
    kl : float64 [scored], KL(original || this model) in nats over the whole vocabulary; None if the original's
        distributions were not at hand.
    bytes : of the text that these tokens stand for, in UTF-8; None if the tokenizer does not tell.
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


def name_text_file(name: str) -> str:
    """Return the name of the file for a probe's tokens: no two probes of an answers folder share one.

    >>> name_text_file("text:wiki.txt")
    'text-8d05bc96caa7.parquet'
    """
    return f"{TEXTS}{hashlib.sha256(name.encode()).hexdigest()[:12]}.parquet"


def write_rows(path: Path, rows: Sequence[object], schema: pa.Schema) -> None:
    """Write records as Parquet, a field a column; the file appears under its name only when it is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # pyarrow takes numpy's arrays for lists.
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    with open_whole(path) as file:
        pq.write_table(pa.table(columns, schema=schema), file, compression="zstd")


@contextlib.contextmanager
def open_rows(path: Path, what: str, hint: str) -> Iterator[pq.ParquetFile]:
    """Open what `write_rows` wrote. Raise DamagedAnswers if it is none, or where the context finds it damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_parquet(path)
        # Not pq.read_table: it imports pandas, where that is installed.
        with pq.ParquetFile(path) as file:
            yield file
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedAnswers(f"{path} cannot be read as {what}.", why, hint) from error


def write_chunks(path: Path, chunks: Sequence[Chunk]) -> None:
    """Write chunks as Parquet; the file appears under its name only when it is whole."""
    write_rows(path, chunks, _make_schema())


def read_chunks(path: Path) -> tuple[Chunk, ...]:
    """Read the chunks of a file, in their order. Raise DamagedAnswers if it is none, or damaged."""
    schema = _make_schema()
    with open_rows(path, "the tokens of a text", "Probe the model again, into another folder.") as file:
        rows = file.read(columns=schema.names).cast(schema).to_pylist()
        return tuple(sorted(map(_parse_chunk, rows), key=lambda chunk: chunk.number))


def read_texts(folder: Path, record: Record) -> dict[str, tuple[Chunk, ...]]:
    """Read the chunks of each text, by probe. Raise DamagedAnswers if a file is not the one of the record."""
    texts = {}
    for probe, text in ((probe, entry.text) for probe, entry in record.probes.items() if entry.text):
        path = folder / name_text_file(probe)
        if not path.is_file() or compute_sha256(path) != text.get("sha256"):
            raise DamagedAnswers(
                f"{path} does not match probe.json: it is missing, or its hash differs.",
                hint="Probe the model again, into another folder.",
            )
        texts[probe] = read_chunks(path)
    return texts


def _make_schema() -> pa.Schema:
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    lists = {"ids": ids, "logp": pa.list_(pa.float32()), "top": ids, "kl": pa.list_(pa.float64())}
    return pa.schema({"number": pa.int32(), **lists, "bytes": pa.int64(), "greedy": ids})


def _parse_chunk(row: Mapping[str, Any]) -> Chunk:
    import numpy as np

    kinds = {"ids": "int32", "logp": "float32", "top": "int32", "greedy": "int32", "kl": "float64"}
    arrays: dict[str, Any] = {
        name: None if row[name] is None else np.array(row[name], dtype=kind) for name, kind in kinds.items()
    }
    return Chunk(row["number"], bytes=row["bytes"], **arrays)
