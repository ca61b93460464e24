"""Typed records that are stored with answers: probe.json, and the results for a running text."""

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
    """JSON object with known fields; `read` is the object that it was read from, if any."""

    # Fields that a new object is written with even if they are null or empty.
    always: ClassVar[frozenset[str]] = frozenset()
    read: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the record from a JSON object whose hash was checked; `to_dict` preserves keys that are not fields."""
        known = {each.name for each in fields(cls)} - {"read"}
        return cls(**{key: value for key, value in values.items() if key in known}, read=dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object: the keys that were read, in their order and updated, then any other fields."""
        new = {each.name: _to_plain(getattr(self, each.name)) for each in fields(self) if each.name != "read"}
        updated = {key: new.pop(key, value) for key, value in self.read.items()}
        always = frozenset() if self.read else self.always
        return updated | {name: value for name, value in new.items() if value not in (None, {}) or name in always}


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
    """Changes in a model's answers to `n` facts when it runs in another precision or runtime.

    The answer to a fact with several wordings is that of the majority.

    Attributes
    ----------
    changed : facts whose answer changes; `lost` of the `known` ones become wrong, `gained` others become right.
    kl_mean : mean KL divergence at the answer's first position, in nats over the whole vocabulary; None if the disk was
        too full to measure it, or the tokens differ.
    computed_in : the other precision, or the other runtime and its build.
    read_otherwise : prompts that the runtime tokenizes differently from the model's tokenizer; None for a precision.
    produced : the same with known meaning produced; None if the model cannot generate text.
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
        """Build the record from a JSON object whose hash was checked; other keys are ignored."""
        produced = values.get("produced")
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        return cls(**known | {"produced": cls.from_dict(produced) if produced else None})


@dataclass(frozen=True)
class ProbeEntry(_JsonRecord):
    """Entry of "probes": how the answers to one probe were obtained.

    Attributes
    ----------
    protocol, fingerprint : version of the evaluation, and a hash of the facts: answers with both equal are comparable.
    facts, asked : number of facts read, and of facts evaluated.
    dropped : number of facts left out, by reason.
    truncated : items of a task whose context lost its beginning; None for facts.
    templates : number of wordings of each fact, if several; `facts` and `asked` then count wordings.
    average : ``micro`` over facts or ``macro`` over relations, for the probe's headline accuracy.
    chance, majority : accuracy of guessing and of the most frequent answers, averaged as `average` says, or None.
    limit, seed : size and seed of the sample, if one was drawn.
    source : origin of the facts.
    key : hash of everything that determines the answers; old versions wrote none.
    reference : sha256 of the model whose most likely tokens were scored: this one or the original.
    seconds : wall time.
    text : for a running text: context, chunks, scored tokens and their bytes, whether divergences from the original
        were measured (one of the constants from `MEASURED`), and the hash of the file with its tokens. None for facts.
    noise_floor : noise floor of an original, if it was measured.
    runtime_noise_floors : noise floors of an original by the name and build of the other runtime.
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
    """Speed of a model on this machine, with its peak memory in bytes and, if it continues text, the tokens per second
    that it generates. `computed_in` is the precision it is deployed in, such as ``bfloat16``, or the runtime and build.
    """

    device: str
    facts_per_second: float
    peak_bytes: int | None
    tokens_per_second: float | None = None
    computed_in: str | None = None


@dataclass(frozen=True, slots=True)
class FactsInText:
    """Number of facts with a subject and an object, and of those found in a sentence of the text that a model was
    calibrated on; then the same two numbers for the facts that the model it is compared with knew."""

    facts: int
    found: int
    known: int
    known_found: int


@dataclass(frozen=True, slots=True)
class Guides:
    """Of the facts that the original knew, the number that guided how a GGUF file was rounded, and how many of them the
    file keeps; then the same two numbers for all others."""

    known: int
    kept: int
    others: int
    others_kept: int


@dataclass(frozen=True)
class ModelRecord(_JsonRecord):
    """Object "model": the model that gave the answers.

    Attributes
    ----------
    parameters, bytes, zeros : number of weights, of bytes on disk, and of weights that are zero.
    vocabulary : the number of tokens, or a hash of them.
    dtype : type of the stored weights; `computed_in` is the type it ran in, on `device`.
    setup, recipe, source, groups, removed, calibration : from the manifest of a converted checkpoint.
    changed : True if its files differ from that manifest, or from the record of an export; otherwise None.
    grid : matrices whose weights are already on a grid, as `find_grid` counts them; None if there are none.
    totals : for a cell of a study, which has no files: its manifest's totals, `nonzero` and `sparse_bytes`.
    runtime : what ran it if that was not transformers: name, build, and types by group of layers.
    speed, in_calibration, guides : measured for one report, and not stored.
    runtime_unmeasured : for an original, why the noise floor of the compressed model's runtime is not known, and what
        to try: sentences, the first without a capital. Not stored.
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
    guides: Guides | None = None
    runtime_unmeasured: str | None = None

    @property
    def is_pruned_alone(self) -> bool:
        """Return whether one step, such as pruning, was all that was done, and nothing is quantized."""
        return self.quantization is None and len((self.recipe or {}).get("steps", ())) == 1

    @property
    def ran_in(self) -> str:
        """Return the runtime and its build; for a server only its build, which names the kind of server."""
        runtime = self.runtime or {"name": "transformers"}
        name = None if is_on_server(self) else runtime["name"]
        return " ".join(filter(None, (name, runtime.get("build"))))


# Name of an unknown type of weights.
UNKNOWN = "unknown"


def is_on_server(model: ModelRecord) -> bool:
    return (model.runtime or {}).get("name") == "server"


@dataclass(frozen=True)
class Record(_JsonRecord):
    """Content of ``probe.json``; `answers_sha256` is the hash of the table, None until that is written."""

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
        """Return the record with these probes and no hash, as the table of their answers is not written yet."""
        read = {key: value for key, value in self.read.items() if key != "answers_sha256"}
        return replace(self, probes=probes, answers_sha256=None, read=read)


TEXTS = "text-"
# `MEASURED` if a text has divergences from the original, otherwise the reason why not.
MEASURED, ALONE, NO_ROOM = "measured", "no original", "no room"
OTHER_TOKENS, OTHER_SIZE = "other tokens", "other size"


@dataclass(frozen=True)
class Chunk:
    """A model's log-probabilities and greedy continuation for one chunk of a text.

    Attributes
    ----------
    number : number of the chunk, from 0.
    ids : int32 [scored], the scored tokens: the second half of the chunk without its first token.
    logp : float32 [scored], natural log-probability of each of them, given the tokens before it.
    top : int32 [scored], the most likely token at each position.
    kl : float64 [scored], KL(original || this model) in nats over the whole vocabulary; None if not measured.
    bytes : bytes of UTF-8 text in these tokens; None if the tokenizer does not tell.
    greedy : int32, greedy continuation of the first half of the chunk; empty for all but the first chunks.
    """

    number: int
    ids: np.ndarray
    logp: np.ndarray
    top: np.ndarray
    kl: np.ndarray | None
    bytes: int | None
    greedy: np.ndarray


def name_text_file(name: str) -> str:
    """Return the name of the file for a probe's tokens, which is unique in an answers folder.

    >>> name_text_file("text:wiki.txt")
    'text-8d05bc96caa7.parquet'
    """
    return f"{TEXTS}{hashlib.sha256(name.encode()).hexdigest()[:12]}.parquet"


def write_rows(path: Path, rows: Sequence[object], schema: pa.Schema) -> None:
    """Write records as Parquet, one column per field; the file appears under its name only once it is complete."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # pyarrow accepts numpy arrays as lists.
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    with open_whole(path) as file:
        pq.write_table(pa.table(columns, schema=schema), file, compression="zstd")


@contextlib.contextmanager
def open_rows(path: Path, what: str, hint: str) -> Iterator[pq.ParquetFile]:
    """Open a file of `write_rows`. Raise DamagedAnswers if it cannot be opened, or if the context fails to read it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        check_parquet(path)
        # Not pq.read_table, which imports pandas if it is installed, nor the path, which may not be UTF-8.
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            yield file
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedAnswers(f"{path} cannot be read as {what}.", why, hint) from error


def write_chunks(path: Path, chunks: Sequence[Chunk]) -> None:
    """Write chunks as Parquet; the file appears under its name only once it is complete."""
    write_rows(path, chunks, _make_schema())


def read_chunks(path: Path) -> tuple[Chunk, ...]:
    """Read the chunks of a file, sorted by number. Raise DamagedAnswers if it is not such a file, or damaged."""
    schema = _make_schema()
    with open_rows(path, "the tokens of a text", "Probe the model again, into another folder.") as file:
        rows = file.read(columns=schema.names).cast(schema).to_pylist()
        return tuple(sorted(map(_parse_chunk, rows), key=lambda chunk: chunk.number))


def read_texts(folder: Path, record: Record) -> dict[str, tuple[Chunk, ...]]:
    """Read the chunks of each text, by probe. Raise DamagedAnswers if a file does not match the record."""
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
