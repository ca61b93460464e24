"""What guides the fitting of a size: facts that the model knows, and its own text; and the sensitivity to both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compressknow.files import cache_folder
from compressknow.study.sensitivity import Guidance, Sensitivity, read_sensitivity, write_sensitivity

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressknow.compress.calibrate.text import CalibrationText
    from compressknow.evaluate.answers import Answers
    from compressknow.evaluate.facts import Fact, Probe
    from compressknow.quiet import Advance
    from compressknow.study.questions import Asked
    from compressknow.study.roundings import Roundings

# Facts that guide, and the fewest that tell one weight from another.
FACTS, FEWEST = 200, 30
# Tokens of text that guide: more tell little more, and take as long as so many more facts.
TOKENS = 2_048


def known_facts(answers: Answers, probes: Iterable[Probe], most: int = FACTS) -> dict[str, list[Fact]]:
    """Return facts with candidates that a model answered right, by probe: evenly over relations, the first of each in
    the probe's order; at most so many in all."""
    right = {(answer.probe, answer.fact_id) for answer in answers.answers if answer.correct}
    by_relation: dict[tuple[str, str], list[Fact]] = {}
    for probe in probes:
        for fact in probe.facts:
            if fact.candidates and (probe.name, fact.id) in right:
                by_relation.setdefault((probe.name, fact.relation), []).append(fact)
    found: dict[str, list[Fact]] = {}
    depth = max(map(len, by_relation.values()), default=0)
    turns = [
        (name, facts[turn]) for turn in range(depth) for (name, _), facts in by_relation.items() if turn < len(facts)
    ]
    for name, fact in turns[:most]:
        found.setdefault(name, []).append(fact)
    return found


def fingerprint_of_facts(facts: Mapping[str, Sequence[Fact]]) -> str:
    """A hash of their ids, prompts and candidates."""
    told = [(name, fact.id, fact.prompt, fact.candidates) for name, own in facts.items() for fact in own]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def sensitivity_of(
    folder: Path,
    sha256: str,
    roundings: Roundings,
    *,
    answers: Answers | None,
    probes: Sequence[Probe] = (),
    facts: Mapping[str, Sequence[Fact]] | None = None,
    text: CalibrationText | None = None,
    trust_remote_code: bool = False,
    advance: Advance | None = None,
) -> Sensitivity:
    """Return the sensitivity of a checkpoint of floats, measured now, or as it was stored when it was measured.

    Parameters
    ----------
    sha256 : the model's.
    answers : the model's to `probes`; `facts` of these guide, see `known_facts`.
    text : the first `TOKENS` of it guide.
    """
    facts = facts or {}
    guidance = Guidance(
        roundings.form,
        roundings.types,
        facts=sum(map(len, facts.values())),
        fingerprint=fingerprint_of_facts(facts) if facts else None,
        tokens=min(text.tokens, TOKENS) if text else 0,
        text=text.sha256 if text else None,
    )
    place = _place_of(sha256, guidance)
    if (stored := read_sensitivity(place, sha256, guidance)) is not None:
        return stored
    from compressknow.engine.language_model import family_of, load_whole_tokenizer
    from compressknow.model.loading import open_complete
    from compressknow.study.measuring import measure
    from compressknow.study.questions import fact_questions, text_batches

    checkpoint, tree = open_complete(folder, trust_remote_code=trust_remote_code)
    tokenizer = load_whole_tokenizer(folder, trust_remote_code=trust_remote_code)
    family = family_of(tree) or ""
    asked = _asked(tree, tokenizer, family, answers, probes, facts) if answers else []
    texts = text_batches(_beginning(text), family, tokenizer.mask_token_id, text.seed) if text else []
    measured = measure(checkpoint, tree, roundings, fact_questions(asked) if asked else None, texts, advance)
    found = Sensitivity(sha256, guidance, measured.rows(roundings))
    place.parent.mkdir(parents=True, exist_ok=True)
    write_sensitivity(found, place)
    return found


def _place_of(sha256: str, guidance: Guidance) -> Path:
    key = hashlib.sha256(repr(guidance).encode()).hexdigest()
    return cache_folder() / "sensitivity" / f"{sha256[:16]}-{key[:16]}.json"


def _asked(
    tree: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    answers: Answers,
    probes: Sequence[Probe],
    facts: Mapping[str, Sequence[Fact]],
) -> list[Asked]:
    from compressknow.evaluate.evaluate import scorer_for
    from compressknow.study.questions import Asked

    asked: list[Asked] = []
    for probe in probes:
        scorer = scorer_for(tree, tokenizer, family, probe)
        own = {answer.fact_id: answer for answer in answers.of(probe.name)}
        queries = [scorer.query(fact) for fact in facts.get(probe.name, ())]
        asked += [Asked(scorer, query, own[query.fact.id]) for query in queries if not isinstance(query, str)]
    return asked


def _beginning(text: CalibrationText) -> list[dict[str, torch.Tensor]]:
    """Batches of the first tokens of a text."""
    found: list[dict[str, torch.Tensor]] = []
    left = TOKENS
    for batch in text.batches:
        length = batch["input_ids"].shape[1]
        rows = min(len(batch["input_ids"]), max(left // length, 0 if found else 1))
        if rows:
            found.append({name: ids[:rows] for name, ids in batch.items()})
            left -= rows * length
    return found
