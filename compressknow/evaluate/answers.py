"""Answers and their record on disk: answers.parquet, with one row per fact, and probe.json."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import DamagedAnswers, OutputError
from compressknow.base.files import LOCK, claim_folder, is_no_folder, write_whole
from compressknow.base.format import clean, count, write_percent
from compressknow.base.notebook import Summary, SummaryRepr
from compressknow.base.reading import RECORD as RECORD_BYTES
from compressknow.base.reading import compute_sha256, read_json
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.records import TEXTS, Chunk, Record, open_rows, read_texts, write_rows
from compressknow.model.manifest import SEAL, hash_manifest, seal_manifest

if TYPE_CHECKING:
    import pyarrow as pa


SCHEMA_VERSION = 1
# Number of the original's most likely tokens whose probabilities are stored at the answer's first position; all others
# count as one.
REFERENCE_TOKENS = 256
# The default maximum of servers.
SERVER_TOKENS = 20
TABLE, RECORD = "answers.parquet", "probe.json"
# A little above where exp underflows in float32: log-probabilities are clamped to it, to keep KL finite.
LOGP_FLOOR = -100.0
# From best to worst; see `compressknow.evaluate.grades`.
GRADES = ("produced", "recognized", "demoted", "gone")
# Columns that tables of older versions lack.
NEWER = ("first_kl", "produced", "with_example", "grade", "template", "total_logp")


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of a model to one fact.

    Attributes
    ----------
    predicted : text of the most likely answer; `top5` are the five most likely ones, best first, and `top5_logp` their
        log-probabilities (natural logarithm). Of a free answer: the text with the log-probability of its first token,
        and the next most likely first tokens that read otherwise.
    rank : rank of the object, 1 for the most likely answer; None if it is not a possible answer or ranks do not apply.
        Of a free answer: 1 if it is right, else that of the object's first token.
    logp_gold : log-probability of the object; None if it is not a possible answer.
    choices : the number of possible answers, for chance; None if any text is possible.
    first_ids, first_logp : distribution at the answer's first position: ids of the original's most likely tokens, and
        their log-probabilities in this model; all other tokens have the remaining probability. Empty for lm-eval.
    first_kl : KL(original || this model) in nats at that position, over the whole vocabulary; None if not measured.
    produced : the greedily decoded answer: the candidate that the text begins with, else its first sentence; None if
        there is none (lm-eval, answers of older versions).
    with_example : the same after one solved example of the relation, if only the original knew the fact.
    grade : see `compressknow.evaluate.grades`; None if there is none.
    template : number of the wording, if each fact has several.
    total_logp : logarithm of the sum of the probabilities of all possible answers, at most 0.1 % too small; None if any
        text is possible, or if it is not known (answers of older versions, some servers).
    """

    probe: str
    fact_id: str
    relation: str
    subject: str
    sub_label: str
    prompt: str
    gold: str
    predicted: str
    correct: bool
    rank: int | None
    logp_gold: float | None
    top5: tuple[str, ...]
    top5_logp: tuple[float, ...]
    choices: int | None
    popularity: float | None
    first_ids: tuple[int, ...] | Any = ()
    first_logp: tuple[float, ...] | Any = ()
    first_kl: float | None = None
    produced: str | None = None
    with_example: str | None = None
    grade: str | None = None
    template: int | None = None
    total_logp: float | None = None


@dataclass(frozen=True, repr=False)
class Answers(SummaryRepr):
    """Answers of one model, the record of how they were obtained (the content of ``probe.json``), and results for
    running texts, which have no facts, by probe."""

    record: Record
    answers: tuple[Answer, ...]
    texts: Mapping[str, tuple[Chunk, ...]] = field(default_factory=dict)

    @property
    def probes(self) -> tuple[str, ...]:
        return tuple(self.record.probes)

    def of(self, probe: str) -> list[Answer]:
        """Return the answers to one probe, in the order of its facts."""
        return [answer for answer in self.answers if answer.probe == probe]

    def only(self, probes: Sequence[str]) -> Answers:
        """Return only the answers to these probes."""
        texts = {name: chunks for name, chunks in self.texts.items() if name in probes}
        record = replace(self.record, probes={name: self.record.probes[name] for name in probes})
        return Answers(record, tuple(answer for answer in self.answers if answer.probe in probes), texts)

    def restrict(self, probes: Sequence[Probe]) -> Answers:
        """Return the answers to these facts, as if only they had been evaluated."""
        facts = {(probe.name, fact.id) for probe in probes for fact in probe.facts}
        entries = {each.name: replace(self.record.probes[each.name], fingerprint=each.fingerprint()) for each in probes}
        answers = tuple(answer for answer in self.answers if (answer.probe, answer.fact_id) in facts)
        return Answers(replace(self.record, probes=entries), answers)

    def _summary(self) -> Summary:
        correct, total = sum(answer.correct for answer in self.answers), len(self.answers)
        return Summary(
            f"Answers of {clean(self.record.model.name, 60)}",
            f"{count(correct)} of {count(total)} facts right ({write_percent(correct, total)}).",
            ("Probe", "Facts", "Right", "Share"),
            tuple(map(self._row, self.probes)),
        )

    def _row(self, probe: str) -> tuple[str, ...]:
        correct = [answer.correct for answer in self.of(probe)]
        return probe, count(len(correct)), count(sum(correct)), write_percent(sum(correct), len(correct))


def change_model(answers: Answers, **changes: Any) -> Answers:
    """Return the answers with these fields of the model's record changed."""
    return replace(answers, record=replace(answers.record, model=replace(answers.record.model, **changes)))


def make_schema() -> pa.Schema:
    """Return the columns of ``answers.parquet``: the fields of Answer, in their order."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    types = {
        "correct": pa.bool_(),
        "rank": pa.int32(),
        "logp_gold": number,
        "top5": pa.list_(text),
        "top5_logp": pa.list_(number),
        "choices": pa.int32(),
        "popularity": number,
        "first_ids": pa.list_(pa.int32()),
        "first_logp": pa.list_(pa.float32()),
        "first_kl": number,
        "template": pa.int32(),
        "total_logp": number,
    }
    return pa.schema([(each.name, types.get(each.name, text)) for each in fields(Answer)])


def write_table(path: Path, answers: Sequence[Answer]) -> None:
    """Write answers as Parquet; the file appears under its name only once it is complete."""
    write_rows(path, answers, make_schema())


def read_table(path: Path) -> list[Answer]:
    """Read the answers of a Parquet file. Raise DamagedAnswers if it is damaged, or has the wrong columns."""
    import pyarrow as pa

    hint = "Answers folders are written by `compressknow probe`; probe the model again."
    schema = make_schema()
    with open_rows(path, "answers", hint) as file:
        table = file.read(columns=schema.names)
        for name in set(NEWER) - set(table.column_names):
            table = table.append_column(name, pa.nulls(len(table), schema.field(name).type))
        table = table.select(schema.names).cast(schema)
        columns = [_read_column(table, name) for name in schema.names]
        answers = [Answer(*row) for row in zip(*columns, strict=True)]
    produced, _, demoted, _ = GRADES
    # Older versions graded wrong answers as produced if the object was generated.
    return [
        replace(answer, grade=demoted) if answer.grade == produced and not answer.correct else answer
        for answer in answers
    ]


def _read_column(table: pa.Table, name: str) -> Iterable[Any]:
    column = table[name]
    if name in ("first_ids", "first_logp"):
        import numpy as np

        # Views of one array instead of hundreds of Python objects per row. (to_numpy would import pandas.)
        lists = column.combine_chunks()
        offsets, values = np.from_dlpack(lists.offsets), np.from_dlpack(lists.values)
        return [values[start:end] for start, end in itertools.pairwise(offsets)]
    rows = column.to_pylist()
    return [tuple(row) for row in rows] if name.startswith("top5") else rows


def read_answers(folder: Path) -> Answers:
    """Read an answers folder of `compressknow probe`. Raise DamagedAnswers if it is not one, or damaged."""
    record = read_record(folder)
    check_table(folder, record)
    return gather_answers(folder, record)


def gather_answers(folder: Path, record: Record) -> Answers:
    """Read the answers to the probes of a record. Raise DamagedAnswers if they cannot be read."""
    rows = tuple(answer for answer in read_table(folder / TABLE) if answer.probe in record.probes)
    return Answers(record, rows, read_texts(folder, record))


def check_table(folder: Path, record: Record) -> None:
    """Raise DamagedAnswers if the table does not have the hash in the record."""
    if (folder / TABLE).is_file() and compute_sha256(folder / TABLE) != record.answers_sha256:
        raise DamagedAnswers(
            f"{folder / TABLE} does not match {RECORD}: its hash differs.",
            why="It was changed, a run was killed while it wrote them, or they come from different folders.",
            hint="Repeat the command that wrote it, or probe the model again, into another folder.",
        )


def read_record(folder: Path) -> Record:
    """Read ``probe.json`` of an answers folder. Raise DamagedAnswers if it is missing or damaged."""
    try:
        record = read_json(folder / RECORD, RECORD_BYTES)
        version = record["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedAnswers(
            f"{folder} is not an answers folder: its {RECORD} is missing or damaged.",
            hint="Give a checkpoint, or a folder that `compressknow probe` wrote.",
        ) from error
    if version != SCHEMA_VERSION:
        raise DamagedAnswers(
            f"{folder / RECORD} has schema {version}, but this version reads schema {SCHEMA_VERSION}.",
            hint="Probe the model again with this version.",
        )
    # Older versions wrote no seal.
    if SEAL in record and record[SEAL] != hash_manifest(record):
        raise DamagedAnswers(
            f"{folder / RECORD} was edited: its sha256 does not match its contents.",
            hint="Restore the file, or probe the model again, into another folder.",
        )
    try:
        return Record.from_dict({key: value for key, value in record.items() if key != SEAL})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedAnswers(
            f"{folder / RECORD} is damaged.",
            why=f"{type(error).__name__}: {error}",
            hint="Probe the model again, into another folder.",
        ) from error


def is_answers_folder(folder: Path) -> bool:
    return (folder / RECORD).is_file() and not (folder / "config.json").is_file()


def write_record(folder: Path, record: Record) -> None:
    """Write ``probe.json`` with the hash of its content; it appears under its name only once it is complete."""
    # Hash it as it will be read, with keys as texts.
    content = json.loads(json.dumps(record.to_dict()))
    text = json.dumps(seal_manifest(content), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / RECORD, text.encode("utf-8", "backslashreplace"))


# Folder of incomplete answers to probes, by their keys.
PARTS = ".parts"
# Files that were being written when a run was killed.
_UNFINISHED = (f".{TABLE}.", f".{RECORD}.")


@contextlib.contextmanager
def lock_folder(folder: Path, wait: bool) -> Iterator[None]:
    """Create the folder if it is missing, and lock it. Raise OutputError if it has foreign files, or is in use."""
    if is_no_folder(folder):
        raise OutputError(f"{folder} is a file.", hint="Answers are stored in a folder; choose another name.")
    if _is_foreign(folder):
        raise OutputError(
            f"{folder} already exists and is not an answers folder.", hint="Choose a new folder for the answers."
        )
    with claim_folder(folder, wait=wait):
        yield


def read_stored(folder: Path) -> list[Answer]:
    return read_table(folder / TABLE) if (folder / TABLE).is_file() else []


def _is_foreign(folder: Path) -> bool:
    """Return whether a folder holds anything other than answers and what an interrupted run leaves."""
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return False
    ours = {LOCK, PARTS, TABLE} if LOCK in names else {PARTS}
    unfinished = _UNFINISHED if LOCK not in names else (*_UNFINISHED, TEXTS, f".{TEXTS}")
    return RECORD not in names and any(name not in ours and not name.startswith(unfinished) for name in names)
