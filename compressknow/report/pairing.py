"""Two models' answers set side by side, fact by fact, or refused where they are answers to different questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressknow.errors import CompressknowError
from compressknow.probe.answers import Answer
from compressknow.report.records import Counts

# The original's and the compressed model's answer to one fact.
Pair = tuple[Answer, Answer]

# What may make two runs of one probe ask different questions, and how a user calls it.
_SETTINGS = {"protocol": "protocol", "limit": "--limit", "seed": "--seed", "facts": "facts read"}


def paired(
    probe: str,
    original: Sequence[Answer],
    compressed: Sequence[Answer],
    entry_original: Mapping[str, Any],
    entry_compressed: Mapping[str, Any],
) -> list[Pair]:
    """Answers to the same facts, in the order of the facts' ids.

    Raises CompressknowError where the two sides were not asked the same: by protocol, by fingerprint or by the facts.
    """
    _same_questions(probe, entry_original, entry_compressed)
    before, after = _by_id(probe, original), _by_id(probe, compressed)
    _same_facts(probe, before, after)
    return [(before[fact], after[fact]) for fact in sorted(before)]


def counts(pairs: Sequence[Pair]) -> Counts:
    """How many facts both know, were lost, were gained, and neither knows."""
    both = sum(a.correct and b.correct for a, b in pairs)
    before, after = sum(a.correct for a, _ in pairs), sum(b.correct for _, b in pairs)
    return Counts(both, before - both, after - both, len(pairs) - before - after + both)


def _same_questions(probe: str, original: Mapping[str, Any], compressed: Mapping[str, Any]) -> None:
    if all(original.get(key) == compressed.get(key) for key in ("protocol", "fingerprint")):
        return
    differing = [
        f"{label} {original.get(key)} and {compressed.get(key)}"
        for key, label in _SETTINGS.items()
        if original.get(key) != compressed.get(key)
    ]
    raise CompressknowError(
        f"The two models were not asked the same questions of {probe}, so their answers cannot be compared.",
        why=f"They differ in: {', '.join(differing) or 'the facts, prompts or candidates themselves'}.",
        hint="Probe both models again with the same data and the same options.",
    )


def _by_id(probe: str, answers: Sequence[Answer]) -> dict[str, Answer]:
    by_id = {answer.fact_id: answer for answer in answers}
    if len(by_id) != len(answers):
        raise CompressknowError(
            f"The answers to {probe} hold {len(answers) - len(by_id)} facts more than once.",
            hint="Probe the model again; each fact of a probe needs an id of its own.",
        )
    return by_id


def _same_facts(probe: str, original: Mapping[str, Answer], compressed: Mapping[str, Answer]) -> None:
    only_original, only_compressed = sorted(set(original) - set(compressed)), sorted(set(compressed) - set(original))
    if not only_original and not only_compressed:
        return
    example = (only_original or only_compressed)[0]
    raise CompressknowError(
        f"The two models did not answer the same facts of {probe}: {len(only_original)} only the original, "
        f"{len(only_compressed)} only the compressed model ({example!r}, for one).",
        why="Most often their tokenizers differ, so that different facts were left out, or one run was cut short.",
        hint="Compare models of one vocabulary, and probe both again with the same options.",
    )
