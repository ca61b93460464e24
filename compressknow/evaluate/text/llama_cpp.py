"""A GGUF file as a reader of running text, in llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch

from compressknow.engine.llama_cpp.context import Context, Span
from compressknow.engine.llama_cpp.model import GgufModel
from compressknow.engine.llama_cpp.tokenizer import GgufTokenizer


class GgufReader:
    """See `compressknow.evaluate.text.reading.TextReader`."""

    def __init__(self, model: GgufModel, threads: int) -> None:
        self._model, self._threads, self._tokenizer = model, threads, GgufTokenizer(model)
        self.rows = model.rows
        self.most: int | None = model.most_tokens
        self._held: Context | None = None

    def release(self) -> None:
        """Let go of what was read."""
        if self._held is not None:
            self._held.close()
            self._held = None

    @cached_property
    def bos(self) -> int | None:
        """By what the file says."""
        return self._tokenizer.bos_token_id if self._tokenizer.begins_texts else None

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Names of special tokens are text like any other. None for bytes where the pieces do not spell the text, as
        where the tokenizer puts a space before it.
        """
        ids = self._tokenizer.ids(text, special=False, parse_special=False)
        pieces = [self._tokenizer.piece(number) for number in ids]
        return ids, list(accumulate(map(len, pieces))) if b"".join(pieces) == text.encode() else None

    def log_probs(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """See `TextReader`."""
        context = self._memory(len(ids))
        context.clear()
        logits = torch.from_numpy(context.read([Span(0, 0, ids, len(ids) - first)]))
        return logits[:-1].log_softmax(-1)

    def continued(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """A prompt at a time."""
        return [self._continued(prompt, tokens) for prompt in prompts]

    def ends(self, token: int) -> bool:
        """See `TextReader`."""
        return self._tokenizer.ends(token)

    def _continued(self, prompt: Sequence[int], tokens: int) -> list[int]:
        context = self._memory(len(prompt) + tokens)
        context.clear()
        written: list[int] = []
        fed, place = list(prompt), 0
        while len(written) < tokens:
            written.append(int(context.read([Span(0, place, fed, 1)])[0].argmax()))
            if self._tokenizer.ends(written[-1]):
                return written + written[-1:] * (tokens - len(written))
            fed, place = written[-1:], place + len(fed)
        return written

    def _memory(self, tokens: int) -> Context:
        if self._held is None or self._held.cells < tokens:
            self.release()
            self._held = Context(self._model, cells=-(-tokens // 256) * 256, sequences=1, threads=self._threads)
        return self._held
