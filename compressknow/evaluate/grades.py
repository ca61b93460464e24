"""Grades of knowledge, the majority over several wordings, and the answer in a generated text.

Choosing the right candidate and generating it are different: a compressed model often still chooses an object that it
no longer generates.

| grade | |
| --- | --- |
| ``produced`` | correct, and its greedy text begins with the object (masked: first of the whole vocabulary) |
| ``recognized`` | correct, but not produced |
| ``demoted`` | not correct, but generated, among the best five, or generated after one solved example of the relation |
| ``gone`` | none of these |

The probe's rules define correct, usually as first among the candidates. Known is either produced or recognized.
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
from compressknow.base.reading import group_by
from compressknow.evaluate.answers import GRADES, Answer, Answers
from compressknow.evaluate.facts import STOPS, UNSPACED, Fact, strip_wording

PRODUCED, RECOGNIZED, DEMOTED, GONE = GRADES
# What may count as known: everything correct by the probe's rules, or only what is produced.
KNOWN = (RECOGNIZED, PRODUCED)
# A wrong answer is demoted if the object has this rank or better, and there are more candidates.
NEAR = 5
_END_OF_ANSWER = re.compile(rf"\n|[.!?;](?:\s|$)|[{STOPS}]")
# A word boundary in scripts without spaces: between any two characters, except two katakana.
_UNSPACED_BOUNDARY = re.compile(rf"(?=.[{UNSPACED}]|[{UNSPACED}])(?![\u30a1-\u30ff]{{2}})", re.DOTALL)
# Ignored before an answer: articles, quotes and other punctuation, except the signs of a number.
_OPENING = re.compile(r"(?:[^\w\n+.$€£-]|_|(?:an?|the)(?=[\W_]))*", re.IGNORECASE)

# A text that continues with this after a label has a longer word or number instead.
_CONTINUATION = re.compile(r"\w|(?<=\d)[.,]\d")


def find_opening(text: str) -> str:
    """Return what precedes the answer in a text: articles, quotes and other punctuation, which SQuAD's normalization
    of answers drops too (Rajpurkar et al. 2016).

    >>> find_opening(' the "South America"'), find_opening("another")
    (' the "', '')
    """
    opening = _OPENING.match(text)
    return opening[0] if opening else ""


def find_end(text: str, label: str) -> int | None:
    """Return where a label ends if the text begins with it as whole words, otherwise None. Case and the openings of
    both are ignored. In scripts without spaces, any character may begin the next word.

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
    # Case folding may change the number of characters (ß, ss).
    end = next((n for n in range(1, len(text) + 1) if text[:n].casefold() == folded), None)
    if end is None or (_CONTINUATION.match(text, end) and not _UNSPACED_BOUNDARY.match(text, end - 1)):
        return None
    return end


def _compose(text: str) -> str:
    """Return the text with composed characters: models hardly write combining accents, but files may have them."""
    return unicodedata.normalize("NFC", text)


def cut(text: str, start: int = 0) -> str:
    """Cut the text at the first end of a sentence or line after `start`.

    >>> cut("the Nile. It flows")
    'the Nile'
    """
    end = _END_OF_ANSWER.search(text, start)
    return (text[: end.start()] if end else text).strip()


def find_choice(text: str, choices: Sequence[str], spelled: Callable[[str], str] = str) -> str:
    """Return the longest choice that a greedy text begins with, preferring an exact match among equals; its first
    sentence if there is none. `spelled` returns a choice as the tokenizer decodes it ("são tomé" as "sao tome").

    >>> find_choice("New York City, of course", ["New York", "New York City"]), find_choice("a city. It", ["Paris"])
    ('New York City', 'a city')
    """
    text = _compose(text.strip())

    def match(choice: str) -> tuple[int, bool]:
        """Return where the choice ends in the text, and whether it matches without dropping an opening."""
        labels = {choice, spelled(choice)}
        return max((find_end(text, label) or 0, _match_label(text, label) is not None) for label in labels)

    choice = max(choices, key=match)
    return choice if any(match(choice)) else cut(text)


def judge(text: str, gold: str, spelled: Callable[[str], str] = str) -> tuple[str, bool]:
    """Cut a free answer at its end, and return with it whether it begins with the object, as whole words. Case, and an
    article or quotes before it, are ignored; `spelled` is that of `find_choice`.

    >>> judge("Paris, the city of", "Paris"), judge("Parisian food", "Paris"), judge("the Nile. It", "Nile")
    (('Paris, the city of', True), ('Parisian food', False), ('the Nile', True))
    >>> judge("1.5 km", "1"), judge("1,000", "1"), judge("1. The", "1"), judge("1, or 2", "1")
    (('1.5 km', False), ('1,000', False), ('1', True), ('1, or 2', True))
    """
    text = _compose(text.strip())
    ends = (find_end(text, label) for label in (gold, spelled(gold)))
    after = next((end for end in ends if end is not None), None)
    return cut(text, after or 0), after is not None


def grade_answer(answer: Answer) -> str:
    """Grade an answer: without a greedy text at most as recognized, and by rank only with more than five candidates."""
    if answer.correct:
        return PRODUCED if answer.produced == answer.gold else RECOGNIZED
    few = answer.choices is not None and answer.choices <= NEAR
    near = answer.rank is not None and answer.rank <= NEAR and not few
    return DEMOTED if near or answer.gold in (answer.produced, answer.with_example) else GONE


def add_grade(answer: Answer, fact: Fact, text: str, spelled: Callable[[str], str] = str) -> Answer:
    """Add the choice in the model's greedy text, and the grade."""
    answer = replace(answer, produced=find_choice(text, list_choices(fact), spelled))
    return replace(answer, grade=grade_answer(answer))


def list_choices(fact: Fact) -> tuple[str, ...]:
    """Return the choices for a greedy text: the candidates, or the object if there are none."""
    return fact.candidates or (fact.obj_label,)


def check_known(known: str) -> None:
    if known not in KNOWN:
        raise UsageError(
            f"{known!r} is not a definition of known.",
            hint=f"{suggest_word(known, KNOWN)}Choose {' or '.join(KNOWN)}.",
        )


def apply_reading(answers: Answers, known: str) -> Answers:
    """Return the answers, correct if the fact is known in this reading: ``recognized`` leaves them unchanged; for
    ``produced`` the object must be generated too, the answer is the generated one, and chance is None. Raises
    UsageError for another reading, CompressknowError if the answers have no generated text."""
    check_known(known)
    if known == RECOGNIZED:
        return answers
    for probe in answers.probes:
        if any(answer.produced is None for answer in answers.of(probe)):
            raise CompressknowError(
                f"The answers of {answers.record.model.name} to {probe} have no generated text.",
                why="Tasks of lm-eval, older versions, and models that cannot generate text store none.",
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
        # If the object was generated, but another candidate is more likely, that candidate is the (wrong) answer.
        predicted = answer.predicted if answer.grade == DEMOTED and answer.produced == answer.gold else answer.produced
        restricted.append(replace(answer, correct=answer.grade == PRODUCED, predicted=predicted, choices=None))
    return replace(answers, record=replace(answers.record, probes=entries), answers=tuple(restricted))


def merge_wordings(answers: Answers) -> Answers:
    """Merge the wordings of each fact into one answer: known if more than half of them are.

    The rank is the median, and log-probability and divergence are means. The answer is the most frequent one among the
    wordings that are correct, or wrong, like the fact; the first of equally frequent ones.
    """
    worded = {name: entry for name, entry in answers.record.probes.items() if entry.templates}
    if not worded:
        return answers
    rows = [answer for answer in answers.answers if answer.probe not in worded]
    probes = dict(answers.record.probes)
    for name, entry in worded.items():
        merged = [_merge(wordings) for wordings in group_by_fact(answers.of(name)).values()]
        dropped = {f"{reason} (counted by wording)": prompts for reason, prompts in entry.dropped.items()}
        # Count facts, not wordings.
        probes[name] = replace(entry, facts=entry.facts // (entry.templates or 1), asked=len(merged), dropped=dropped)
        rows += merged
    return replace(answers, record=replace(answers.record, probes=probes), answers=tuple(rows))


def group_by_fact(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Group the answers to the wordings of each fact, by its id."""
    return group_by(answers, lambda answer: strip_wording(answer.fact_id))


def _merge(wordings: Sequence[Answer]) -> Answer:
    first, correct = wordings[0], 2 * sum(answer.correct for answer in wordings) > len(wordings)
    predicted = Counter(answer.predicted for answer in wordings if answer.correct == correct).most_common(1)[0][0]
    shown = next(answer for answer in wordings if answer.predicted == predicted)
    rank = median_high(math.inf if answer.rank is None else answer.rank for answer in wordings)
    texts = [answer.with_example for answer in wordings if answer.with_example is not None]
    with_example = next((text for text in texts if text != first.gold), None)
    if 2 * texts.count(first.gold) > len(texts) or (texts and with_example is None):
        with_example = first.gold
    # The median grade, the worse one of two.
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
        logp_gold=average_known(answer.logp_gold for answer in wordings),
        first_kl=average_known(answer.first_kl for answer in wordings),
        with_example=with_example,
        grade=GRADES[median_high(grades)] if len(grades) == len(wordings) else None,
    )


def average_known(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if there are no values, or one is unknown."""
    numbers = list(values)
    known = [value for value in numbers if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(numbers) else None
