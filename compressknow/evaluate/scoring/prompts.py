"""Prompts: a fact as the text and the tokens that a model of each family reads, and their positions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import UsageError
from compressknow.evaluate.facts import BLANK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SUBJECT, OBJECT = "[X]", "[Y]"
# What a word follows without a space.
OPENING = ("(", "[", "{", "“", "‘", "«", "„", "¿", "¡")


def fill(template: str, subject: str) -> str:
    """Put the subject and the blank for the object into the template.

    >>> fill("[X] was born in [Y] .", "Allan Peiper")
    'Allan Peiper was born in [MASK] .'
    """
    # In one pass: a subject may itself hold "[Y]".
    return re.sub(r"\[X\]|\[Y\]", lambda match: subject if match[0] == SUBJECT else BLANK, template)


def capitalize(text: str) -> str:
    """Return the text with its first letter in upper case, the others as they are.

    >>> capitalize("the North Sea")
    'The North Sea'
    """
    return text[:1].upper() + text[1:]


def pick(templates: Sequence[str], number: int, where: str) -> str:
    """Return the template of that number, counted from 1. Raise UsageError where there is none."""
    if not 1 <= number <= len(templates):
        there = "There is 1 template" if len(templates) == 1 else f"There are {len(templates)} templates"
        raise UsageError(f"{where} has no template {number}.", hint=f"{there}, counted from 1.")
    return templates[number - 1]


def is_open(prompt: str) -> bool:
    """Return whether a prompt without a blank is the beginning of a sentence, so that its object comes next: it ends in
    a word or a comma, and marks no other place.

    >>> [is_open(prompt) for prompt in ("The capital of France is", "Paris is the capital of .", "___ is in France")]
    [True, False, False]
    """
    marked = re.search(r"\[\w+\]|<[^<>\s]+>|_{2,}|\{\w*\}|\.{3}|…", prompt)
    return marked is None and not prompt.rstrip().endswith((".", "!", "?", ";"))


def add_blank(prompt: str) -> str:
    """Return the prompt with a blank at its end.

    >>> add_blank("The capital of France is"), add_blank('France calls its capital "')
    ('The capital of France is [MASK]', 'France calls its capital "[MASK]')
    """
    prompt = prompt.rstrip()
    follows = prompt.endswith(OPENING) or (prompt.endswith('"') and prompt.count('"') % 2 == 1)
    return f"{prompt}{'' if follows else ' '}{BLANK}"


def check_blanks(prompt: str) -> str | None:
    """Return why the prompt cannot be used, as a reason to drop it; None where it holds one blank."""
    count = prompt.count(BLANK)
    return None if count == 1 else "no blank in the sentence" if count == 0 else "several blanks in the sentence"


class UniqueIds:
    """Ids that differ, by a number behind those that were there already.

    >>> unique = UniqueIds()
    >>> unique("a"), unique("b"), unique("a")
    ('a', 'b', 'a#2')
    """

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()

    def __call__(self, identifier: str) -> str:
        self._seen[identifier] += 1
        count = self._seen[identifier]
        return identifier if count == 1 else self(f"{identifier}#{count}")


Ids = tuple[int, ...]


class Encoder:
    """Token ids of texts, each distinct text tokenized once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids = cache(self._tokenize)
        self.continuation = cache(self._tokenize_after)
        self.spelled = cache(self._respell)

    def _tokenize(self, text: str, special: bool = False) -> Ids:
        """Return ids of `text`, with the tokenizer's special tokens around it if `special`."""
        return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _tokenize_after(self, context: str, text: str) -> Ids:
        """Return ids of `text` where it follows `context`: those of both together without those of the context.

        Where the boundary is not kept (a token reaches over it), `text` is tokenized by itself.
        """
        alone, together = self.ids(context), self.ids(context + text)
        if together[: len(alone)] == alone and len(together) > len(alone):
            return together[len(alone) :]
        return self.ids(text)

    def answer(self, context: str, text: str, gap: str = " ") -> Ids:
        """Return ids of an answer in running text after `context` and `gap`, or capitalized where that is empty."""
        if not context:
            return self.ids(capitalize(text))
        return self.continuation(context.rpartition(" ")[2], gap + text)

    def _respell(self, text: str) -> str:
        """Return the text as the tokenizer gives it back; as it is, where the tokenizer lacks a part of it.

        An uncased one gives "são tomé" back as "sao tome", and word pieces "Guinea-Bissau" as "guinea - bissau".
        """
        ids = self.ids(text)
        return text if self.tokenizer.unk_token_id in ids else self.decode(ids)

    def decode(self, ids: Ids | list[int] | Any) -> str:
        """Return the text of `ids`, special tokens left out, spaces at its ends removed."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def find_single(self, words: tuple[str, ...]) -> dict[int, str]:
        """Map ids to words, of those words that are one token in running text (the first word of an id)."""
        found: dict[int, str] = {}
        for word in words:
            ids = self.answer("is", word)
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                found.setdefault(ids[0], word)
        return found
