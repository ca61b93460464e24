"""Prompts and answers as token ids, the way each tokenizer writes them in running text."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]


class Encoder:
    """Token ids of texts, each distinct text tokenized once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids = cache(self._ids)
        self.continuation = cache(self._continuation)

    def _ids(self, text: str, special: bool = False) -> Ids:
        """Ids of `text`, with the tokenizer's special tokens around it if `special`."""
        return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _continuation(self, context: str, text: str) -> Ids:
        """Ids of `text` where it follows `context`: those of both together without those of the context.

        Where the boundary is not kept (a token reaches over it), `text` is tokenized by itself.
        """
        alone, together = self.ids(context), self.ids(context + text)
        if together[: len(alone)] == alone and len(together) > len(alone):
            return together[len(alone) :]
        return self.ids(text)

    def answer(self, context: str, text: str, gap: str = " ") -> Ids:
        """Ids of an answer in running text after `context`, or at the start of a sentence, where it is capitalized.

        `gap` is what stands between both: a space, or nothing.
        """
        if not context:
            return self.ids(text[:1].upper() + text[1:])
        return self.continuation(context.rpartition(" ")[2], gap + text)

    def decode(self, ids: Ids | list[int] | Any) -> str:
        """The text of `ids`, special tokens left out, spaces at its ends removed."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def single(self, words: tuple[str, ...]) -> dict[int, str]:
        """Of these words, those that are one token in running text: id -> word (the first word of an id)."""
        found: dict[int, str] = {}
        for word in words:
            ids = self.answer("is", word)
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                found.setdefault(ids[0], word)
        return found
