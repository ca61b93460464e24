"""Facts, their prompts, the domains of their relations, and probes: sets of facts with a protocol."""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import islice
from typing import Any, Literal

from compressknow.base.errors import UsageError
from compressknow.base.reading import group_by

# Placeholder of the object in a prompt, as in LAMA; it is replaced by each model's mask or sentinel.
BLANK = "[MASK]"

# Placeholders of subject and object in a template.
SUBJECT, OBJECT = "[X]", "[Y]"
# Characters that a word follows without a space.
OPENING = ("(", "[", "{", "“", "‘", "«", "„", "¿", "¡", "（", "「", "『", "《", "〈", "【")
# Characters that end a sentence without a space after them.
STOPS = "。！？；｡।۔؟"
# Letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
UNSPACED = "\u0e01-\u0eff\u1000-\u109f\u1780-\u17d3\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
UNSPACED += "\uff66-\uff9d\U00020000-\U0003ffff"

# The domains of the report card's grades.
DOMAINS = ("geography", "language", "science", "history and people", "arts and literature", "common sense")
# For facts and relations that belong to none of the domains, or to several: "is part of", "is owned by", sports.
GENERAL = "general"
GEOGRAPHY, LANGUAGE, SCIENCE, PEOPLE, ARTS, COMMON_SENSE = DOMAINS


@dataclass(frozen=True, slots=True)
class Fact:
    """Fact as a sentence with a blank.

    `candidates` are the answers to choose from, including the object; if they are None, the answer is a word of the
    probe's vocabulary or, if that has none, any text. `popularity` is any positive number that increases with how well
    known the subject is. `template` is the number of the wording, if there are several.
    """

    id: str
    probe: str
    relation: str
    subject: str
    sub_label: str
    obj_label: str
    prompt: str
    candidates: tuple[str, ...] | None = None
    popularity: float | None = None
    template: int | None = None

    def __post_init__(self) -> None:
        if self.prompt.count(BLANK) != 1:
            raise UsageError(
                f"{self.id}: the prompt must contain {BLANK} exactly once: {self.prompt!r}.",
                hint=f"Write {BLANK} where the object belongs.",
            )

    @property
    def before(self) -> str:
        """Return the prompt up to the blank, without spaces before it, but with a line break; "" if nothing else."""
        before = self.prompt.partition(BLANK)[0]
        return before.rstrip(" ") if before.strip() else ""

    @property
    def gap(self) -> str:
        """Return the space before the blank; nothing if the blank follows a bracket, a quotation mark or a new line."""
        return " " if self.prompt.partition(BLANK)[0].endswith(" ") else ""

    @property
    def after(self) -> str:
        return self.prompt.partition(BLANK)[2]


@dataclass(frozen=True)
class Probe:
    """Set of facts with a protocol for their evaluation.

    Attributes
    ----------
    name : name that the user gives: ``atlas``, ``lama:trex``, ``facts:mine.jsonl``.
    protocol : name and version of the evaluation; answers of different protocols are not compared.
    dropped : reason -> number of facts that the reader dropped. Scorers add theirs.
    vocabulary : ``closed`` (the facts have candidates), ``words`` (one word out of `words`), ``full`` (one token out of
        the model's whole vocabulary), ``open`` (free text for causal and seq2seq models, one token for masked models).
    words : possible answers for ``words``.
    fold_case : whether case is ignored in answers (the paper's protocol).
    keep_unanswerable : whether objects of several tokens count as wrong (the paper's protocol); otherwise their facts
        are dropped, as in the official LAMA code.
    score_rest : whether causal and seq2seq models are also scored on the text after the blank (BEAR's sentence scores);
        otherwise only if it has words, or if one candidate begins another (then on a full stop if it is empty).
    average : ``micro`` over facts or ``macro`` over relations, for the probe's headline accuracy.
    source : origin of the facts: file names with sha256, the set's licence, the template.
    read : number of facts in the set, including dropped ones and those beyond a limit.
    limit, seed : size and seed of the sample, if one was drawn.
    most_frequent : each relation's most frequent object in the whole set, of which `facts` may be a sample.
    examples : each relation's first facts with different objects in the whole set; see `find_example`.
    templates : number of wordings of each fact, if several; each wording is then a separate fact.
    """

    name: str
    protocol: str
    facts: tuple[Fact, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    vocabulary: Literal["closed", "words", "full", "open"] = "closed"
    words: tuple[str, ...] = ()
    fold_case: bool = False
    keep_unanswerable: bool = False
    score_rest: bool = False
    average: Literal["micro", "macro"] = "micro"
    source: Mapping[str, Any] = field(default_factory=dict)
    read: int = -1
    limit: int | None = None
    seed: int = 0
    most_frequent: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, tuple[Fact, ...]] = field(default_factory=dict)
    templates: int | None = None

    def __post_init__(self) -> None:
        if not self.most_frequent:
            object.__setattr__(self, "most_frequent", find_most_frequent(self.facts))
        if not self.examples:
            object.__setattr__(self, "examples", _choose_examples(self.facts))
        if self.read < 0:
            object.__setattr__(self, "read", len(self.facts) + sum(self.dropped.values()))

    def fingerprint(self) -> str:
        """Hash everything that determines what is evaluated: answers with the same hash are comparable."""
        digest = hashlib.sha256()
        settings = [self.name, self.protocol, self.vocabulary, self.words, self.fold_case, self.keep_unanswerable]
        settings.append(self.score_rest)
        digest.update(json.dumps(settings).encode())
        candidates: dict[tuple[str, ...] | None, int] = {}
        for fact in self.facts:
            number = candidates.setdefault(fact.candidates, len(candidates))
            digest.update(json.dumps([fact.id, fact.relation, fact.obj_label, fact.prompt, number]).encode())
        digest.update(json.dumps(list(candidates)).encode())
        return digest.hexdigest()

    def find_example(self, fact: Fact) -> Fact | None:
        """Return the relation's first fact in the same wording with another subject and object, or None."""
        same_wording = (each for each in self.examples.get(fact.relation, ()) if each.template == fact.template)
        others = (each for each in same_wording if each.sub_label != fact.sub_label)
        return next((each for each in others if each.obj_label.casefold() != fact.obj_label.casefold()), None)

    def sample(self, limit: int | None, seed: int = 0) -> Probe:
        """Return a sample of at most `limit` facts, in proportion to the size of relations, with at least one each if
        `limit` allows. A larger sample contains a smaller one, as far as the proportions allow."""
        if limit is None or limit >= len(self.facts):
            return self
        drawn = _draw_stratified(self.facts, limit, seed)
        facts = tuple(fact for fact in self.facts if fact.id in drawn)
        return replace(self, facts=facts, limit=limit, seed=seed)


def fill(template: str, subject: str) -> str:
    """Fill the template with the subject, and with a blank for the object.

    >>> fill("[X] was born in [Y] .", "Allan Peiper")
    'Allan Peiper was born in [MASK] .'
    """
    # In one pass, since a subject may contain "[Y]".
    return re.sub(r"\[X\]|\[Y\]", lambda match: subject if match[0] == SUBJECT else BLANK, template)


def capitalize(text: str) -> str:
    """Return the text with its first letter in upper case, and the others unchanged.

    >>> capitalize("the North Sea")
    'The North Sea'
    """
    return text[:1].upper() + text[1:]


def pick(templates: Sequence[str], number: int, where: str) -> str:
    """Return the template of that number, counted from 1. Raise UsageError if there is none."""
    if not 1 <= number <= len(templates):
        available = "There is 1 template" if len(templates) == 1 else f"There are {len(templates)} templates"
        raise UsageError(f"{where} has no template {number}.", hint=f"{available}, counted from 1.")
    return templates[number - 1]


def add_blank(prompt: str) -> str:
    """Add a blank to the end of a prompt that is the beginning of a sentence; return any other prompt unchanged. A
    beginning does not end with a full stop or the like, and has no other placeholder.

    >>> add_blank("The capital of France is"), add_blank('France calls its capital "')
    ('The capital of France is [MASK]', 'France calls its capital "[MASK]')
    >>> add_blank("法国的首都是"), add_blank("Paris is the capital of ."), add_blank("___ is in France")
    ('法国的首都是[MASK]', 'Paris is the capital of .', '___ is in France')
    """
    marked = re.search(r"\[\w+\]|<[^<>\s]+>|_{2,}|\{\w*\}|\.{3}|…", prompt)
    if marked or not prompt.strip() or prompt.rstrip().endswith((".", "!", "?", ";", *STOPS)):
        return prompt
    prompt = prompt.rstrip()
    follows = prompt.endswith(OPENING) or (prompt.endswith('"') and prompt.count('"') % 2 == 1)
    follows = follows or re.search(f"[{UNSPACED}，：、]$", prompt) is not None
    return f"{prompt}{'' if follows else ' '}{BLANK}"


def check_blanks(prompt: str) -> str | None:
    """Return the reason to drop a prompt; None if it has exactly one blank."""
    count = prompt.count(BLANK)
    return None if count == 1 else "no blank in the sentence" if count == 0 else "several blanks in the sentence"


def collect_facts(
    rows: Iterable[Fact | str], get_key: Callable[[Fact], Hashable], duplicate: str
) -> tuple[tuple[Fact, ...], dict[str, int]]:
    """Return the facts in `rows` with unique ids, and the number of dropped rows by reason. A row is a fact or the
    reason why there is none; `duplicate` is the reason for a fact whose key, unless None, occurred before."""
    facts, dropped, ids = [], Counter[str](), Counter[str]()
    seen: set[Hashable] = set()
    # Share one tuple among facts with the same candidates, which tables repeat in each row of a relation.
    shared: dict[tuple[str, ...] | None, tuple[str, ...] | None] = {}
    for fact in rows:
        key = get_key(fact) if isinstance(fact, Fact) else None
        if isinstance(fact, str) or (key is not None and key in seen):
            dropped[fact if isinstance(fact, str) else duplicate] += 1
            continue
        seen.add(key)
        candidates = shared.setdefault(fact.candidates, fact.candidates)
        facts.append(replace(fact, id=_make_unique(fact.id, ids), candidates=candidates))
    return tuple(facts), dict(dropped)


def _make_unique(identifier: str, seen: Counter[str]) -> str:
    """Return the id, followed by a number if it occurred before.

    >>> seen = Counter()
    >>> [_make_unique(identifier, seen) for identifier in "aba"]
    ['a', 'b', 'a#2']
    """
    seen[identifier] += 1
    count = seen[identifier]
    return identifier if count == 1 else _make_unique(f"{identifier}#{count}", seen)


def strip_wording(identifier: str) -> str:
    """Return the id of a fact from the id of one of its wordings.

    >>> strip_wording("capital/france@2"), strip_wording("capital/france")
    ('capital/france', 'capital/france')
    """
    return re.sub(r"@[0-9]+$", "", identifier)


def join_wordings(probes: Sequence[Probe]) -> Probe:
    """Merge probes of the same facts, one per wording, fact by fact; dropped and read facts are counted by wording."""
    first = probes[0]
    facts = zip(*(_number(probe.facts, number) for number, probe in enumerate(probes, 1)), strict=True)
    examples = {
        relation: tuple(
            fact for number, probe in enumerate(probes, 1) for fact in _number(probe.examples.get(relation, ()), number)
        )
        for relation in first.examples
    }
    return replace(
        first,
        facts=tuple(fact for wordings in facts for fact in wordings),
        dropped={reason: len(probes) * facts for reason, facts in first.dropped.items()},
        read=first.read * len(probes),
        source={**first.source, "template": list(range(1, len(probes) + 1))},
        examples=examples,
        templates=len(probes),
    )


def _number(facts: Iterable[Fact], number: int) -> Iterator[Fact]:
    return (replace(fact, id=f"{fact.id}@{number}", template=number) for fact in facts)


# With this many facts of different objects, each fact of a relation has an example.
_EXAMPLES = 3


def _choose_examples(facts: Iterable[Fact]) -> dict[str, tuple[Fact, ...]]:
    examples: dict[str, dict[str, Fact]] = {}
    for fact in facts:
        by_object = examples.setdefault(fact.relation, {})
        if len(by_object) < _EXAMPLES:
            by_object.setdefault(fact.obj_label.casefold(), fact)
    return {relation: tuple(by_object.values()) for relation, by_object in examples.items()}


def _draw_stratified(facts: Iterable[Fact], limit: int, seed: int) -> set[str]:
    """Draw ids of facts: within a relation by a hash of seed and id, between relations by largest remainder. If there
    are more relations than `limit`, those of the first facts by that hash are drawn."""
    ranked = sorted(facts, key=lambda fact: hashlib.sha256(f"{seed}/{fact.id}".encode()).digest())
    relations = dict(islice(group_by(ranked, lambda fact: fact.relation).items(), limit))
    shares = _apportion({relation: len(members) for relation, members in relations.items()}, limit)
    return {fact.id for relation, members in relations.items() for fact in members[: shares[relation]]}


def _apportion(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """Divide `limit` among groups in proportion to their sizes, with at most its size for each."""
    total = sum(sizes.values())
    exact = {name: Fraction(limit * size, total) for name, size in sizes.items()}
    shares = {name: max(int(share), 1) for name, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: (shares[name] - exact[name], -sizes[name], name))
    while (remaining := limit - sum(shares.values())) > 0:
        for name in [name for name in by_remainder if shares[name] < sizes[name]][:remaining]:
            shares[name] += 1
    largest = [(-share, name) for name, share in shares.items()]
    heapq.heapify(largest)
    for _ in range(sum(shares.values()) - limit):
        share, name = largest[0]
        shares[name] -= 1
        heapq.heapreplace(largest, (share + 1, name))
    return shares


def compute_chance(choices: Iterable[int | None]) -> float | None:
    """Return the accuracy of guessing: the mean of 1 / number of possible answers; None if any text is possible.

    >>> compute_chance([2, 4]), compute_chance([2, None]), compute_chance([])
    (0.375, None, None)
    """
    numbers = list(choices)
    known = [1 / number for number in numbers if number]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None


def find_most_frequent(facts: Iterable[Fact]) -> dict[str, str]:
    """Return each relation's most frequent object, the first of equally frequent ones; none for a relation of one fact
    (in any number of wordings), which would be right by definition."""
    relations = group_by(facts, lambda fact: fact.relation)
    return {
        name: Counter(fact.obj_label for fact in each).most_common(1)[0][0]
        for name, each in relations.items()
        if sum(fact.template in (None, 1) for fact in each) > 1
    }


def compute_majority(facts: Sequence[Fact], answers: Mapping[str, str], average: str) -> float | None:
    """Return the accuracy of always answering a relation's object in `answers`, its most frequent one: ``micro`` over
    facts or ``macro`` over relations. Without one, none of a relation's facts is right.

    For a sample, `answers` come from the whole set: with one fact per relation, the sample's own are always right.
    """
    groups = group_by(facts, lambda fact: fact.relation if average == "macro" else "").values()
    shares = [sum(fact.obj_label == answers.get(fact.relation) for fact in group) / len(group) for group in groups]
    return sum(shares) / len(shares) if shares else None


def map_relations(relations: Mapping[str, str]) -> dict[str, str]:
    """Map relations to domains, given the space-separated relations of each domain.

    >>> map_relations({"science": "P101 P105"})
    {'P101': 'science', 'P105': 'science'}
    """
    return {relation: domain for domain, names in relations.items() for relation in names.split()}


WIKIDATA = map_relations(
    {
        GEOGRAPHY: "P17 P30 P36 P37 P47 P131 P159 P177 P190 P206 P276 P403 P530 P610 P740 P1001 P1376 P4552 P7959",
        LANGUAGE: "P103 P364 P407 P1412 P6886",
        SCIENCE: "P101 P105 P171 P176 P178 P185 P427",
        PEOPLE: ("P6 P19 P20 P26 P27 P39 P53 P69 P102 P106 P108 P140 P166 P509 P611 P937 P1532 P2632 P3373"),
        ARTS: (
            "P50 P57 P58 P87 P98 P136 P162 P170 P175 P179 P264 P272 P291 P344 P412 P449 P495 P676 P1303 P1441 P7937"
        ),
    }
)


def find_domain(relation: str, domains: Mapping[str, str]) -> str:
    """Return the domain of a relation, `GENERAL` if it is not in the table; for a path, of its last component.

    >>> find_domain("P36", WIKIDATA), find_domain("/location/P36", WIKIDATA), find_domain("P361", WIKIDATA)
    ('geography', 'geography', 'general')
    """
    return domains.get(relation.rpartition("/")[2].replace(" ", "_"), GENERAL)
