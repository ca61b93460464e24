"""Readers of running text: a causal model's tokens, their log-probabilities, and what it writes after them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from compressknow.base.errors import UnsupportedError
from compressknow.engine.language_model import embedding_rows, most_tokens
from compressknow.engine.layers import disable_rounding
from compressknow.evaluate.scoring.decoding import find_cache_name, is_same

if TYPE_CHECKING:
    from compressknow.engine.language_model import LanguageModel


# Sequences that are continued at once.
_TOGETHER = 8


class TextReader(Protocol):
    """Causal model as a runtime gives it for running text.

    Attributes
    ----------
    bos : the token that takes the place of each chunk's first, where the vocabulary wants one; else None.
    most : positions that the model has, or None where nothing bounds them.
    rows : tokens that the model reads.
    """

    most: int | None
    rows: int

    @property
    def bos(self) -> int | None: ...

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Return ids of the text, without special tokens, and how many bytes of it (UTF-8) end with each; None where
        the tokenizer does not tell.
        """

    def compute_log_probs(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """Return log-probabilities of what follows each token from `first` to the last but one: float32, [tokens - 1 -
        first, vocabulary].
        """

    def continue_texts(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Continue each of the prompts, which are of one length, with the likeliest token each time: [prompts][tokens];
        whatever follows the end of the text is the end again, and takes no time.
        """

    def ends(self, token: int) -> bool:
        """Return whether a text ends with this token."""


class TransformersReader:
    """Causal model of transformers as a `TextReader`."""

    def __init__(self, loaded: LanguageModel) -> None:
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self.rows = embedding_rows(self._model)
        self.most = most_tokens(self._model, self._tokenizer)
        self._checked = False

    @cached_property
    def bos(self) -> int | None:
        """Find it by what the tokenizer puts before a text: llama.cpp's ``add_bos_token`` is made of the same."""
        bos = self._tokenizer.bos_token_id
        first = self._tokenizer("a", verbose=False)["input_ids"][:1]
        return int(bos) if bos is not None and first == [bos] else None

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            # Names of special tokens are text like any other, as in llama.cpp.
            split_special_tokens=True,
            return_offsets_mapping=fast,
            verbose=False,
        )
        ids = list(map(int, encoded["input_ids"]))
        return ids, _count_bytes(text, [end for _, end in encoded["offset_mapping"]]) if fast else None

    @torch.inference_mode()
    def compute_log_probs(self, ids: Sequence[int], first: int) -> torch.Tensor:
        if not self._checked:
            self._check_causal(ids)
            self._checked = True
        return self._compute_logits(ids, len(ids) - first)[0, :-1].float().log_softmax(-1)

    @torch.inference_mode()
    def continue_texts(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        together = _TOGETHER if self._cuts_logits else 1
        groups = (prompts[start : start + together] for start in range(0, len(prompts), together))
        return [row for group in groups for row in self._continue(torch.tensor(group), tokens)]

    def _continue(self, ids: torch.Tensor, tokens: int) -> list[list[int]]:
        ids = ids.to(self._model.device)
        fed, cache, written = ids, None, []
        end = -1 if self._end is None else self._end
        ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(tokens):
            output = self._model(input_ids=fed, use_cache=True, **{self._cache: cache}, **self._list_arguments(1))
            written.append(output.logits[:, -1].argmax(-1, keepdim=True))
            ended |= written[-1] == end
            if ended.all():
                break
            cache = getattr(output, self._cache, None)
            # Without keys and values of what is read, all of it is read again.
            fed = written[-1] if cache is not None else torch.cat([ids, *written], dim=1)
        rows = [list(takewhile(lambda token: token != end, row)) for row in torch.cat(written, dim=1).tolist()]
        return [row + [end] * (tokens - len(row)) for row in rows]

    def ends(self, token: int) -> bool:
        return token == self._end

    @property
    def _end(self) -> int | None:
        end: int | None = self._tokenizer.eos_token_id
        return end

    def _check_causal(self, ids: Sequence[int]) -> None:
        """Raise UnsupportedError for a model that sees the token that it is to predict: its figures would lie."""
        known = max(2, len(ids) // 2)
        with disable_rounding(self._model):
            whole, part = (self._compute_logits(some, len(some)) for some in (ids, ids[:known]))
        if not is_same(part, whole[:, :known]):
            name = type(self._model).__name__
            raise UnsupportedError(
                f"{name} sees the tokens after the one that it predicts: it has no perplexity.",
                hint="Evaluate it on facts: atlas, lama:..., bear, facts:... and hf:....",
            )

    def _compute_logits(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        row = torch.tensor([ids], device=self._model.device)
        logits: torch.Tensor = self._model(input_ids=row, use_cache=False, **self._list_arguments(keep)).logits
        return logits[:, -keep:]

    def _list_arguments(self, keep: int) -> dict[str, Any]:
        return {"logits_to_keep": keep} if self._cuts_logits else {}

    @cached_property
    def _cache(self) -> str:
        return find_cache_name(self._model)

    @cached_property
    def _cuts_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self._model.forward).parameters


def _count_bytes(text: str, ends: Sequence[int]) -> list[int]:
    """Return how many bytes of UTF-8 the first so many characters take, for each of `ends`. A token inside a character
    ends where the character does.
    """
    points = np.fromiter(map(ord, text), dtype=np.uint32, count=len(text))
    widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    until = np.concatenate([[0], np.cumsum(widths)])
    return [int(number) for number in until[np.asarray(ends, dtype=np.int64)]]
