"""What ``probe.json`` holds, as typed records. They are written as they were read: unknown keys, order and all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Self


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A JSON object with fields of known names; `read` is the object that it was read from, if it was."""

    # Written even if null or empty in an object that is new; in one that was read, only if they stood there.
    always: ClassVar[frozenset[str]] = frozenset()
    read: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Of a JSON object whose form was checked; keys that are no fields are kept for `to_dict`."""
        known = {each.name for each in fields(cls)} - {"read"}
        return cls(**{key: value for key, value in values.items() if key in known}, read=dict(values))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: what was read, in its order, with the fields as they are now."""
        own = {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name != "read"}
        kept = {key: own.pop(key, value) for key, value in self.read.items()}
        always = frozenset() if self.read else self.always
        return kept | {name: value for name, value in own.items() if value not in (None, {}) or name in always}


def _plain(value: Any) -> Any:
    if isinstance(value, _Part):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """What of a model's answers to `n` facts another precision, or another runtime, changes.

    Facts in several wordings are answered by majority.

    Attributes
    ----------
    changed : facts to which the answer differs; of the `known` ones `lost` are wrong then, of the others `gained` are
        right.
    kl_mean : mean divergence at the answer's first position, in nats over the whole vocabulary; None where the disk had
        no room for that, or the tokens are others.
    computed_in : that precision, or the runtime and its build.
    produced : the same where known means produced; None where the model cannot write.
    """

    n: int
    changed: int
    known: int
    lost: int
    gained: int
    kl_mean: float | None
    computed_in: str
    produced: NoiseFloor | None = None

    @property
    def kept(self) -> float | None:
        """The share of the known facts that are right then too (0 to 1); None where none is known."""
        return 1 - self.lost / self.known if self.known else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Of a JSON object whose form was checked; other keys are left out."""
        produced = values.get("produced")
        given = {each.name: values[each.name] for each in fields(cls) if each.name != "produced"}
        return cls(**given, produced=cls.from_dict(produced) if produced else None)


@dataclass(frozen=True)
class ProbeEntry(_Part):
    """How the answers to one probe came about: an entry of "probes".

    Attributes
    ----------
    protocol, fingerprint : the way of evaluating, and a hash of the facts: answers compare where both are equal.
    facts : so many were read; `asked` so many were evaluated, `dropped` so many left out, by reason.
    truncated : items of a task that lost the beginning of their context; None of facts.
    templates : in how many wordings each fact was put, where several; facts are counted by wording then.
    average : ``micro`` over facts or ``macro`` over relations, for the probe's headline accuracy.
    chance, majority : accuracy of guessing, and of the most frequent answers; None where there is none.
    limit, seed : of the sample, if one was drawn.
    source : where the facts come from.
    key : a hash of all that decides the answers; those of old versions have none.
    reference : sha256 of the model whose most likely tokens were evaluated, its own or the original's.
    seconds : wall time.
    text : of a running text: context, chunks, tokens scored and their bytes, whether there are divergences from the
        original (`compressknow.evaluate.text.records`), and the file that holds its tokens. None of facts.
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
        """Of an entry."""
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
    runtime and its build.
    """

    device: str
    facts_per_second: float
    peak_bytes: int | None
    tokens_per_second: float | None = None
    computed_in: str | None = None


@dataclass(frozen=True, slots=True)
class FactsInText:
    """Facts that stand in the text that a model was calibrated on: subject and object in one of its sentences.

    Attributes
    ----------
    facts, found : facts that have a subject and an object, and how many of them stand in the text.
    known, known_found : the same of those that the other model knew, which it is compared with.
    """

    facts: int
    found: int
    known: int
    known_found: int


@dataclass(frozen=True)
class ModelRecord(_Part):
    """The model that gave the answers: the object "model". Old records and other tools' lack some of it.

    Attributes
    ----------
    parameters, bytes, zeros : numbers of weights, of bytes on disk, and of weights that are zero.
    vocabulary : the number of tokens, or a hash of them.
    dtype : of the weights as stored; `computed_in` what they were run in, on `device`.
    setup, recipe, source, groups, removed, calibration : of a converted checkpoint, what its manifest says.
    changed : whether its files differ from that manifest, or from the record of an export; None where they do not.
    grid : matrices that lie on a grid already, as `compressknow.model.grid.Grid` counts them; None where none does.
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
        """The runtime and its build."""
        runtime = self.runtime or {"name": "transformers"}
        return " ".join(filter(None, (runtime["name"], runtime.get("build"))))


# What stands for the type of weights that nobody knows.
UNKNOWN = "unknown"


def on_server(model: ModelRecord) -> bool:
    """Whether a server gave the answers."""
    return (model.runtime or {}).get("name") == "server"


@dataclass(frozen=True)
class Record(_Part):
    """All of ``probe.json``; `answers_sha256` is the hash of the table, which old versions did not write."""

    always: ClassVar[frozenset[str]] = frozenset({"probes", "versions"})

    schema: int
    model: ModelRecord
    probes: Mapping[str, ProbeEntry]
    versions: Mapping[str, str]
    answers_sha256: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Of the whole object."""
        parts = {
            "model": ModelRecord.from_dict(values["model"]),
            "probes": {name: ProbeEntry.from_dict(entry) for name, entry in values["probes"].items()},
        }
        return super().from_dict({**values, **parts})

    def without_hash(self, probes: Mapping[str, ProbeEntry]) -> Record:
        """The record with these probes, before the table is written that belongs to them."""
        read = {key: value for key, value in self.read.items() if key != "answers_sha256"}
        return replace(self, probes=probes, answers_sha256=None, read=read)
