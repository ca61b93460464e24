"""The original's answers, where a compressed model is asked for the tokens that the original held most likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressknow.errors import CompressknowError, UsageError
from compressknow.probe.answers import Answers
from compressknow.probe.ask import Questions
from compressknow.probe.encoding import Ids
from compressknow.probe.facts import Probe
from compressknow.probe.tasks import Task

if TYPE_CHECKING:
    from compressknow.engine.language_model import LanguageModel


def refuse_other_questions(reference: Answers, probe: Probe | Task) -> None:
    """Raise UsageError where the original was not asked this probe, or other questions of it."""
    asked = reference.record["probes"].get(probe.name)
    if asked is None and not isinstance(probe, Task):
        raise UsageError(
            f"The original was not asked {probe.name}, whose most likely tokens are wanted.",
            hint="Probe the original with the same -p PROBE first.",
        )
    if asked and asked.get("fingerprint") != probe.fingerprint():
        raise UsageError(
            f"The original was asked other questions of {probe.name}.",
            hint="Give the options that it was probed with (--limit, --seed, --template, --protocol, --data), or probe "
            "it again.",
        )


def refuse_other_model(reference: Answers, name: str, loaded: LanguageModel) -> None:
    """Raise CompressknowError where a model cannot be a compressed form of the original: its tokens are others."""
    before = reference.record["model"]
    for key, value in (("family", loaded.family), ("vocabulary", loaded.vocabulary)):
        if before.get(key) not in (None, value):
            raise CompressknowError(
                f"{name} is no compressed form of {before.get('name')}: they differ in {key}.",
                why=f"{before.get('name')} has {before[key]}, {name} has {value}.",
                hint="Compare a model with the checkpoint that it was made from.",
            )


def first_ids(reference: Answers, probe: Probe, questions: Questions) -> dict[str, Ids]:
    """Fact id -> the tokens that the original held most likely at the answer's first position.

    Raises CompressknowError where a fact that is to be asked is not among the original's answers.
    """
    ids = {answer.fact_id: answer.first_ids for answer in reference.of(probe.name)}
    wanted = [question.fact.id for batch in questions.batches for question in batch]
    if missing := [fact for fact in wanted if fact not in ids]:
        raise CompressknowError(
            f"The original's answers to {probe.name} lack {len(missing):,} of {len(wanted):,} facts "
            f"({missing[0]!r}, for one).",
            hint="Probe the original again.",
        )
    return ids
