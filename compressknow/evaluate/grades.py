"""Grades of knowing, the majority of several wordings, and what a text says.

Picking the right candidate and saying it are two things: a compressed model often still picks what it no longer says.

| grade | |
| --- | --- |
| ``produced`` | right, and its greedy text begins with the object (masked: first of the whole vocabulary) |
| ``recognized`` | right, but not produced |
| ``demoted`` | not right, but said, among the best five, or said after one solved example of the same relation |
| ``gone`` | none of these |

Right is what the probe's rules say: most often, first among the candidates. So known is produced and recognized.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median_high

from compressknow.base.errors import CompressknowError, UsageError, suggest_word
from compressknow.evaluate.answers import GRADES, Answer, Answers
from compressknow.evaluate.facts import STOPS, UNSPACED, Fact, strip_wording

PRODUCED, RECOGNIZED, DEMOTED, GONE = GRADES
# What can count as known: right by the probe's rules, or also produced.
KNOWN = (RECOGNIZED, PRODUCED)
# Being among the best so many makes a fact demoted, where there are more to choose from.
NEAR = 5
_END_OF_ANSWER = re.compile(rf"\n|[.!?;](?:\s|$)|[{STOPS}]")
# Boundaries between words written without spaces; kana of one kind run on.
_SEAM = re.compile(rf"(?=.[{UNSPACED}]|[{UNSPACED}])(?![\u30a1-\u30ff]{{2}})", re.DOTALL)
# What may stand before an answer and is not part of it: articles, quotes and other punctuation, but for the signs of a
# number.
_OPENING = re.compile(r"(?:[^\w\n+.$€£-]|_|(?:an?|the)(?=[\W_]))*", re.IGNORECASE)

# A label is not an answer where a text goes on so after it: in a longer word, or number.
_GOES_ON = re.compile(r"\w|(?<=\d)[.,]\d")


def find_opening(text: str) -> str:
    """Return what stands before a text's first word: articles, quotes and other punctuation, which SQuAD's
    normalization of answers drops too (Rajpurkar et al. 2016).

    >>> find_opening(' the "South America"'), find_opening("another")
    (' the "', '')
    """
    opening = _OPENING.match(text)
    return opening[0] if opening else ""


def find_end(text: str, label: str) -> int | None:
    """Return where a label ends with which the text begins, as whole words, whatever their case and what opens either;
    None if it does not. Where a script has no space between words, any letter may begin the next one.

    >>> find_end("Paris, the city", "paris"), find_end("Parisian food", "Paris"), find_end('"Gambia"', "the Gambia")
    (5, None, 7)
    >>> find_end("パリです", "パリ"), find_end("北京是首都", "北京"), find_end("ローマン", "ローマ")
    (2, 2, None)
    """
    if (end := _match_label(text, label)) is not None:
        return end
    start, bare = len(find_opening(text)), label[len(find_opening(label)) :]
    end = _match_label(text[start:], bare)
    return None if end is None else start + end


def _match_label(text: str, label: str) -> int | None:
    folded = _compose(label).casefold()
    if not folded or not text.casefold().startswith(folded):
        return None
    # Folding may change the number of letters (ß, ss): the place where the label ends is looked for.
    end = next((n for n in range(1, len(text) + 1) if text[:n].casefold() == folded), None)
    return None if end is None or (_GOES_ON.match(text, end) and not _SEAM.match(text, end - 1)) else end


def _compose(text: str) -> str:
    """Return the text with its letters and accents composed: files may have them apart, and models hardly write so."""
    return unicodedata.normalize("NFC", text)


def cut(text: str, start: int = 0) -> str:
    """Cut the text at the end of its first sentence or line, which is looked for from `start` on.

    >>> cut("the Nile. It flows")
    'the Nile'
    """
    end = _END_OF_ANSWER.search(text, start)
    return (text[: end.start()] if end else text).strip()


def find_choice(text: str, choices: Sequence[str], spelled: Callable[[str], str] = str) -> str:
    """Return the choice that a greedy text says: the longest one with which it begins, of equal ones that to the
    letter; its first sentence where it says none.

    Parameters
    ----------
    spelled : a choice as the model's tokenizer gives it back ("são tomé" as "sao tome").

    >>> find_choice("New York City, of course", ["New York", "New York City"]), find_choice("a city. It", ["Paris"])
    ('New York City', 'a city')
    """
    text = _compose(text.strip())

    def find_place(choice: str) -> tuple[int, bool]:
        """Return where it ends in the text, and whether it stands there to the letter."""
        labels = {choice, spelled(choice)}
        return max((find_end(text, label) or 0, _match_label(text, label) is not None) for label in labels)

    choice = max(choices, key=find_place)
    return choice if any(find_place(choice)) else cut(text)


def judge(text: str, gold: str) -> tuple[str, bool]:
    """Cut a free answer at its end, and return whether it is the object: it begins with it, as whole words, whatever
    their case and the article or quotes before it.

    >>> judge("Paris, the city of", "Paris"), judge("Parisian food", "Paris"), judge("the Nile. It", "Nile")
    (('Paris, the city of', True), ('Parisian food', False), ('the Nile', True))
    >>> judge("1.5 km", "1"), judge("1,000", "1"), judge("1. The", "1"), judge("1, or 2", "1")
    (('1.5 km', False), ('1,000', False), ('1', True), ('1, or 2', True))
    """
    text = _compose(text.strip())
    after = find_end(text, gold)
    return cut(text, after or 0), after is not None


def grade_answer(answer: Answer) -> str:
    """Grade an answer: without a greedy text recognized at best; among five candidates, ranks tell nothing."""
    if answer.correct:
        return PRODUCED if answer.produced == answer.gold else RECOGNIZED
    few = answer.choices is not None and answer.choices <= NEAR
    near = answer.rank is not None and answer.rank <= NEAR and not few
    return DEMOTED if near or answer.gold in (answer.produced, answer.with_example) else GONE


def add_grade(answer: Answer, fact: Fact, text: str, spelled: Callable[[str], str] = str) -> Answer:
    """Add what the model says greedily, and its grade."""
    answer = replace(answer, produced=find_choice(text, list_choices(fact), spelled))
    return replace(answer, grade=grade_answer(answer))


def list_choices(fact: Fact) -> tuple[str, ...]:
    """Return what a greedy text may say: the candidates, or the object where there are none."""
    return fact.candidates or (fact.obj_label,)


def check_known(known: str) -> None:
    if known not in KNOWN:
        raise UsageError(
            f"Unknown reading of knowing: {known!r}.",
            hint=f"{suggest_word(known, KNOWN)}Choose {' or '.join(KNOWN)}.",
        )


def apply_reading(answers: Answers, known: str) -> Answers:
    """Return the answers, right where the fact is known in this reading: ``recognized`` as they are, ``produced`` where
    it is said too. What is said is then the answer, and none is right by chance. Raises UsageError for another reading,
    CompressknowError if the answers do not tell what is said."""
    check_known(known)
    if known == RECOGNIZED:
        return answers
    for probe in answers.probes:
        if any(answer.produced is None for answer in answers.of(probe)):
            raise CompressknowError(
                f"The answers of {answers.record.model.name} to {probe} do not tell what it says.",
                why="Those of lm-eval's tasks, of older versions and of models that cannot write do not.",
                hint="Evaluate it again, choose other probes, or leave out --known produced.",
            )
    entries = {}
    for name, entry in answers.record.probes.items():
        floors = {runtime: floor.produced for runtime, floor in entry.runtime_noise_floors.items() if floor.produced}
        floor = entry.noise_floor and entry.noise_floor.produced
        entries[name] = replace(entry, chance=None, noise_floor=floor, runtime_noise_floors=floors)
    restricted = []
    for answer in answers.answers:
        assert answer.produced is not None
        # One that says the object though another candidate is likelier is not right: that candidate is its answer.
        predicted = answer.predicted if answer.grade == DEMOTED and answer.produced == answer.gold else answer.produced
        restricted.append(replace(answer, correct=answer.grade == PRODUCED, predicted=predicted, choices=None))
    return replace(answers, record=replace(answers.record, probes=entries), answers=tuple(restricted))


def merge_wordings(answers: Answers) -> Answers:
    """Merge the wordings of each fact into one answer: known if more than half of them are.

    The rank is the middle one, log-probability and divergence are means, and what is answered is what most of those
    wordings give that are right, or wrong, as the fact is; of equally many the first.
    """
    split = {name: entry for name, entry in answers.record.probes.items() if entry.templates}
    if not split:
        return answers
    kept = [answer for answer in answers.answers if answer.probe not in split]
    probes = dict(answers.record.probes)
    for name, entry in split.items():
        merged = [_merge(wordings) for wordings in group_by_fact(answers.of(name)).values()]
        dropped = {f"{reason} (counted by wording)": prompts for reason, prompts in entry.dropped.items()}
        # As if facts, not wordings, had been evaluated.
        probes[name] = replace(entry, facts=entry.facts // (entry.templates or 1), asked=len(merged), dropped=dropped)
        kept += merged
    return replace(answers, record=replace(answers.record, probes=probes), answers=tuple(kept))


def group_by_fact(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Group the answers to the wordings of each fact, by its id."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(strip_wording(answer.fact_id), []).append(answer)
    return found


def _merge(wordings: Sequence[Answer]) -> Answer:
    first, correct = wordings[0], 2 * sum(answer.correct for answer in wordings) > len(wordings)
    predicted = Counter(answer.predicted for answer in wordings if answer.correct == correct).most_common(1)[0][0]
    shown = next(answer for answer in wordings if answer.predicted == predicted)
    rank = median_high(math.inf if answer.rank is None else answer.rank for answer in wordings)
    tried = [answer.with_example for answer in wordings if answer.with_example is not None]
    with_example = next((text for text in tried if text != first.gold), None)
    if 2 * tried.count(first.gold) > len(tried) or (tried and with_example is None):
        with_example = first.gold
    # The middle grade, the worse of two.
    grades = [GRADES.index(answer.grade) for answer in wordings if answer.grade is not None]
    return replace(
        first,
        fact_id=strip_wording(first.fact_id),
        template=None,
        correct=correct,
        predicted=predicted,
        produced=shown.produced,
        top5=shown.top5,
        top5_logp=shown.top5_logp,
        total_logp=shown.total_logp,
        rank=int(rank) if math.isfinite(rank) else None,
        logp_gold=_average(answer.logp_gold for answer in wordings),
        first_kl=_average(answer.first_kl for answer in wordings),
        with_example=with_example,
        grade=GRADES[median_high(grades)] if len(grades) == len(wordings) else None,
    )


def _average(values: Iterable[float | None]) -> float | None:
    numbers = list(values)
    known = [value for value in numbers if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(numbers) else None
