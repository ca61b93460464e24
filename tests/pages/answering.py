"""Answers made by hand: rows of answers and their records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compressknow.comparison.paired import compare_probe
from compressknow.comparison.records import ProbeFigures
from compressknow.evaluate.answers import SCHEMA_VERSION, Answer, Answers
from compressknow.evaluate.records import ModelRecord, ProbeEntry, Record

ORIGINAL_HASH, COMPRESSED_HASH = "a" * 64, "b" * 64
WORDS = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Quito", "Bern", "Riga")


def make_answer(number: int, correct: bool, **changes: Any) -> Answer:
    """Return an answer to a numbered fact: one of eight words, of which the first is right."""
    logp = (-0.5, -1.5, -2.5, -3.5, -4.5)
    values: dict[str, Any] = {
        "probe": "atlas",
        "fact_id": f"fact-{number:04}",
        "relation": "relation",
        "subject": "geography",
        "sub_label": f"Country {number}",
        "prompt": f"The capital of country {number} is [MASK].",
        "gold": WORDS[0],
        "predicted": WORDS[0] if correct else WORDS[1],
        "correct": correct,
        "rank": 1 if correct else 2,
        "logp_gold": logp[0] if correct else logp[1],
        "top5": WORDS[:5] if correct else (WORDS[1], WORDS[0], *WORDS[2:5]),
        "top5_logp": logp,
        "choices": len(WORDS),
        "popularity": None,
        "total_logp": 0.0,
        "first_ids": (5, 7),
        "first_logp": (math.log(0.5), math.log(0.25)),
    }
    return Answer(**values | changes)


def make_rows(
    both: int = 0, lost: int = 0, gained: int = 0, neither: int = 0, **changes: Any
) -> tuple[list[Answer], ...]:
    """Return answers of the original and of the compressed model with these numbers of facts."""
    cells = [(True, True)] * both + [(True, False)] * lost + [(False, True)] * gained + [(False, False)] * neither
    return tuple([make_answer(number, cell[side], **changes) for number, cell in enumerate(cells)] for side in (0, 1))


def make_entry(**changes: Any) -> ProbeEntry:
    """Return the entry of a probe in probe.json."""
    values = {
        "protocol": "closed/1",
        "fingerprint": "f" * 64,
        "facts": 100,
        "asked": 100,
        "dropped": {},
        "average": "micro",
        "chance": 0.125,
        "majority": 0.2,
        "seed": 0,
        "limit": None,
        "seconds": 1.0,
        "source": {},
        "reference": ORIGINAL_HASH,
    }
    return ProbeEntry.from_dict(values | changes)


def make_model(**changes: Any) -> ModelRecord:
    """Return the entry of the model in probe.json."""
    values = {
        "name": "tiny-bert",
        "revision": "main",
        "sha256": ORIGINAL_HASH,
        "architecture": "BertForMaskedLM",
        "family": "masked",
        "parameters": 1_000_000,
        "bytes": 4_000_000,
        "dtype": "float32",
    }
    return ModelRecord.from_dict(values | changes)


def make_answers(
    rows: Iterable[Answer],
    model_entry: ModelRecord | None = None,
    probes: Mapping[str, ProbeEntry] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Answers:
    record = Record(
        schema=SCHEMA_VERSION,
        model=model_entry or make_model(),
        probes=dict(probes or {"atlas": make_entry()}),
        versions=dict(versions or {"compressknow": "0.1.0", "torch": "2.9.0"}),
    )
    return Answers(record, tuple(rows))


def make_runs(rows: Sequence[Sequence[Answer]], **changes: Any) -> tuple[Answers, Answers]:
    """Return the stored answers of an original and of a compressed model."""
    compressed = make_model(
        name="tiny-bert-int8", sha256=COMPRESSED_HASH, bytes=1_100_000, setup="Overall_GQ", **changes
    )
    return make_answers(rows[0]), make_answers(rows[1], compressed)


def compare_rows(
    before: Sequence[Answer], after: Sequence[Answer], entry: ProbeEntry | None = None, other: ProbeEntry | None = None
) -> ProbeFigures:
    """Return the figures of one probe; by default, both models have the same entry."""
    probe, entry = before[0].probe if before else "atlas", entry or make_entry()
    return compare_probe(
        make_answers(before, probes={probe: entry}), make_answers(after, probes={probe: other or entry}), probe
    )
