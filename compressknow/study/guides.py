"""What decides which weights of a model get more bits: facts that it knows, and a text; and how sensitive weights are.

It is found once for a model, and kept: another size of the same model begins where types are chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.errors import CompressknowError
from compressknow.files import cache_folder, write_whole
from compressknow.reading import read_json
from compressknow.study.sensitivity import Guidance, Guide, Sensitivity

if TYPE_CHECKING:
    from compressknow.compress.calibrate.observe import Batches
    from compressknow.compress.steps import Calibration
    from compressknow.engine.language_model import LanguageModel
    from compressknow.evaluate.answers import Answer
    from compressknow.evaluate.facts import Probe
    from compressknow.evaluate.scoring.scorer import Query
    from compressknow.model.checkpoint import Checkpoint
    from compressknow.quiet import Advance, Begin

# Facts that decide, and the fewest of which that can be said; so many are evaluated at a time until they are found.
FACTS, FEWEST, STEP = 200, 30, 200
SCHEMA = 1
_MOST_BYTES = 256 << 20


@dataclass(frozen=True)
class Guides:
    """How sensitive weights are, and the token ids that told: of facts with their objects, and of the text."""

    sensitivity: Sensitivity
    facts: tuple[tuple[int, ...], ...]
    text: tuple[tuple[int, ...], ...]

    def texts(self) -> list[Batches]:
        """Return facts and text as batches, the facts first, if there are any."""
        from compressknow.gguf.gptq import batches_of

        return [batches_of(each) for each in (self.facts, self.text) if each]


def guides_of(
    checkpoint: Checkpoint,
    sha256: str,
    probes: Sequence[Probe],
    text: Calibration,
    guide: Guide,
    *,
    begin: Begin,
    trust_remote_code: bool = False,
) -> Guides:
    """Find what guides a GGUF file's types, or read what was found before.

    Parameters
    ----------
    sha256 : of the checkpoint.
    begin : begins the stages ``evaluate``, ``sample`` or ``text``, and ``sensitivity``.

    Raises CompressknowError where facts are to decide and the model knows fewer than 30.
    """
    request = {
        **{"schema": SCHEMA, "model": sha256, "facts": [probe.fingerprint() for probe in probes], "most": FACTS},
        "text": [text.text, text.tokens, text.seed, _content(text)],
    }
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "sensitivity" / f"{key[:32]}.json"
    guides = _read(file, request)
    if guides is None:
        guides = _find(checkpoint, sha256, probes, text, begin, trust_remote_code)
        file.parent.mkdir(parents=True, exist_ok=True)
        values = {"sensitivity": guides.sensitivity.as_json(), "facts": guides.facts, "text": guides.text}
        write_whole(file, json.dumps({**request, "found": values}, separators=(",", ":")).encode())
    if guide != "text" and len(guides.facts) < FEWEST:
        raise CompressknowError(
            f"{checkpoint.name} knows {len(guides.facts)} of the facts, too few to choose types by.",
            f"{FEWEST} are needed, of those that have candidates.",
            "Give other --facts, or --guide text.",
        )
    return guides


def _content(text: Calibration) -> str | None:
    from compressknow.reading import sha256_of

    path = Path(text.text)
    return sha256_of(path) if path.is_file() else None


def _read(file: Path, request: Mapping[str, Any]) -> Guides | None:
    try:
        stored = read_json(file, _MOST_BYTES)
        if {name: stored[name] for name in request} != request:
            return None
        found = stored["found"]
        facts, text = (tuple(tuple(map(int, ids)) for ids in found[name]) for name in ("facts", "text"))
        return Guides(Sensitivity.from_json(found["sensitivity"]), facts, text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _find(
    checkpoint: Checkpoint,
    sha256: str,
    probes: Sequence[Probe],
    calibration: Calibration,
    begin: Begin,
    trust_remote_code: bool,
) -> Guides:
    from compressknow.compress.calibrate.text import calibration_text
    from compressknow.engine.language_model import load_language_model
    from compressknow.model.meta import meta_model
    from compressknow.study.measuring import measure
    from compressknow.study.questions import Asked, fact_questions, text_batches
    from compressknow.study.roundings import GgufRoundings

    folder = checkpoint.folder
    tree = meta_model(folder, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
    with begin("evaluate") as advance:
        known = _Known(load_language_model(folder, trust_remote_code=trust_remote_code), probes, advance)
    with begin(calibration.work) as advance:
        text = calibration_text(
            folder,
            tree,
            text=calibration.text,
            tokens=calibration.tokens,
            seed=calibration.seed,
            trust_remote_code=trust_remote_code,
            advance=advance,
        )
    asked = [Asked(known.scorer, query, answer) for query, answer in known.pairs]
    questions = fact_questions(asked) if len(asked) >= FEWEST else None
    roundings = GgufRoundings()
    with begin("sensitivity") as advance:
        batches = text_batches(text.batches, "causal", None, calibration.seed)
        measured = measure(checkpoint, tree, roundings, questions, batches, advance)
    guidance = Guidance(
        "gguf", roundings.types, len(known.pairs), known.fingerprint, text.tokens, text.sha256, "facts and text"
    )
    rows = [tuple(map(int, ids)) for batch in text.batches for ids in batch["input_ids"].tolist()]
    return Guides(Sensitivity(sha256, guidance, measured.rows(roundings)), known.sequences, tuple(rows))


class _Known:
    """Facts that a model knows: of all relations alike, as far as it knows any."""

    def __init__(self, loaded: LanguageModel, probes: Sequence[Probe], advance: Advance | None) -> None:
        from compressknow.evaluate.evaluate import evaluate, prompts_of, scorer_for

        by_relation: dict[tuple[str, str], list[tuple[Query, Answer]]] = {}
        known, total = 0, sum(len(probe.facts) for probe in probes)
        for piece in _pieces(probes):
            self.scorer = scorer_for(loaded.model, loaded.tokenizer, loaded.family, piece)
            # What it would write beside the candidates is of no use here.
            self.scorer.says = False
            prompts = prompts_of(self.scorer)
            queries = {query.fact.id: query for batch in prompts.batches for query in batch}
            for answer in (answer for answers in evaluate(prompts) for answer in answers):
                if answer.correct and len(answer.top5) > 1:
                    own = by_relation.setdefault((answer.probe, answer.relation), [])
                    own.append((queries[answer.fact_id], answer))
                    known += 1
            if advance:
                advance(min(known, FACTS), min(FACTS, total))
            if known >= FACTS:
                break
        # One of each relation at a time, so that all have as many as they can.
        rows = by_relation.values()
        most = max(map(len, rows), default=0)
        self.pairs = [own[place] for place in range(most) for own in rows if place < len(own)][:FACTS]

    @property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """Each with its object, but for the last token, after which nothing is predicted."""
        return tuple(tuple(map(int, (*query.prompt, *query.gold[:-1]))) for query, _ in self.pairs)

    @property
    def fingerprint(self) -> str:
        """A hash of what was asked."""
        told = [[query.fact.id, query.fact.prompt, query.fact.candidates] for query, _ in self.pairs]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _pieces(probes: Sequence[Probe]) -> Iterator[Probe]:
    """Samples of the facts that have candidates, `STEP` of each probe at a time, even over relations."""
    for number in count(1):
        left = False
        for probe in probes:
            whole = replace(probe, facts=tuple(fact for fact in probe.facts if fact.candidates))
            before = {fact.id for fact in whole.limited((number - 1) * STEP).facts} if number > 1 else set()
            facts = tuple(fact for fact in whole.limited(number * STEP).facts if fact.id not in before)
            if facts:
                left = True
                yield replace(whole, facts=facts)
        if not left:
            return
