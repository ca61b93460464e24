"""GGUF files in llama.cpp: scorer and reader by the causal ones' rules, with llama.cpp's memory of what was read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import torch

from compressknow.evaluate.facts import Probe
from compressknow.evaluate.scoring.families import CausalScorer
from compressknow.evaluate.scoring.ranking import Scores
from compressknow.evaluate.scoring.scorer import SLACK_TOKENS, Ids, Query
from compressknow.gguf.context import GgufTokenizer, LlamaContext, Span
from compressknow.gguf.llama_cpp import GgufModel

# Prompts that are read at a time, and their tokens: attention looks at every token that the memory holds.
PROMPTS, PROMPT_TOKENS = 64, 512
# llama.cpp takes no more (LLAMA_MAX_SEQ of llama-cparams.h).
SEQUENCES = 256
# Tokens of candidates that are held beside them.
CANDIDATE_TOKENS = 1536
# Tokens of candidates that one pass reads without a look at who has fallen behind.
WIDE = 64


class GrowingContext:
    """Memory of what a model has read: as large as was needed so far, read on as many threads as torch uses."""

    def __init__(self, model: GgufModel, sequences: int) -> None:
        self._model, self._sequences = model, sequences
        self._held: LlamaContext | None = None

    def reserve(self, cells: int) -> LlamaContext:
        """Return a context with room for so many tokens; what was in a smaller one is gone."""
        if self._held is None or self._held.cells < cells:
            self.release()
            cells = -(-cells // 256) * 256
            threads = torch.get_num_threads()
            self._held = LlamaContext(self._model, cells=cells, sequences=self._sequences, threads=threads)
        return self._held

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None


class LlamaCppScorer(CausalScorer):
    """Scores a GGUF file on the facts of one probe: each prompt is a sequence, which its candidates go on from."""

    def __init__(self, model: GgufModel, probe: Probe) -> None:
        tokenizer: Any = GgufTokenizer(model)
        anything: Any = model
        super().__init__(anything, tokenizer, probe)
        self._gguf, self._memory = model, GrowingContext(model, SEQUENCES)

    def release(self) -> None:
        self._memory.release()
        super().release()

    def split(self, batch: Sequence[Query]) -> Sequence[Sequence[Query]]:
        """Cut a batch, all of one length, into few enough prompts that all find room."""
        size = max(1, min(PROMPTS, PROMPT_TOKENS // len(batch[0].prompt)))
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def read_first(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        """Read the prompts; the batch itself is the state from which scoring goes on."""
        context = self._reserve(batch)
        context.clear()
        logits = context.read([Span(number, 0, query.prompt, 1) for number, query in enumerate(batch)])
        return torch.from_numpy(logits).log_softmax(-1), batch

    def _walk(
        self, prefix: Any, rows: Sequence[tuple[int, Ids]], walking: list[int], scores: Scores, bars: Scores
    ) -> None:
        batch: Sequence[Query] = prefix
        context, free = self._reserve(batch), SEQUENCES - len(batch)
        room = context.cells - sum(len(query.prompt) for query in batch)
        while walking:
            together = max(1, min(free, room // (len(rows[walking[0]][1]) - 1)))
            chosen, walking = walking[:together], walking[together:]
            sequences = {row: len(batch) + number for number, row in enumerate(chosen)}
            for row, sequence in sequences.items():
                context.fork(rows[row][0], sequence)
            known = 1
            while chosen:
                known += self._advance(batch, [(sequences[row], row, *rows[row]) for row in chosen], known, scores)
                chosen = [row for row in chosen if known < len(rows[row][1]) and not scores[row] < bars[row]]
            for sequence in sequences.values():
                context.forget(sequence)

    def _advance(
        self, batch: Sequence[Query], rows: Sequence[tuple[int, int, int, Ids]], known: int, scores: Scores
    ) -> int:
        """Add the log-probabilities of some tokens after `known` ones to `scores`; gives how many tokens these were.

        A row is (sequence, its index in `scores`, index of the query, ids of the option). No text sees another, so that
        rows go on as far as each is long where that takes no more passes than there are few tokens.
        """
        left = sum(len(ids) - known for *_, ids in rows)
        width = max(len(ids) for *_, ids in rows) - known if left <= WIDE else 1
        spans = []
        for sequence, _, query, ids in rows:
            read = ids[known - 1 : known - 1 + width][: len(ids) - known]
            spans.append(Span(sequence, len(batch[query].prompt) + known - 1, read, len(read)))
        logits = torch.from_numpy(self._reserve(batch).read(spans))
        wanted = torch.tensor([token for *_, ids in rows for token in ids[known : known + width]])
        values = logits.gather(1, wanted.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
        owners = torch.repeat_interleave(torch.tensor([len(span.tokens) for span in spans]))
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owners, values.double())
        scores[[row for _, row, *_ in rows]] += sums.numpy()
        return width

    def generate(self, batch: Sequence[Query], log_probs: torch.Tensor, state: Any) -> list[list[int]]:  # noqa: ARG002
        """Continue each text in a sequence of its own, so that candidates still find the prompts."""
        context = self._reserve(batch)
        written = [[int(token)] for token in log_probs.argmax(-1)]
        for number in range(len(batch)):
            context.fork(number, len(batch) + number)
        while going := [number for number, ids in enumerate(written) if self.needs_more(batch[number], ids)]:
            spans = [
                Span(len(batch) + number, len(batch[number].prompt) + len(ids) - 1, ids[-1:], 1)
                for number, ids in ((number, written[number]) for number in going)
            ]
            for number, token in zip(going, context.read(spans).argmax(-1), strict=True):
                written[number].append(int(token))
        for number in range(len(batch)):
            context.forget(len(batch) + number)
        return written

    def ends(self, token: int) -> bool:
        return bool(self.tokenizer.is_end(token))

    @property
    def architecture(self) -> str:
        return self._gguf.architecture

    @cached_property
    def _rows(self) -> int:
        return self._gguf.rows

    @cached_property
    def _most(self) -> int | None:
        return self._gguf.most_tokens

    def _reserve(self, batch: Sequence[Query]) -> LlamaContext:
        """Return a context with room for a batch and what follows its prompts."""
        longest = max(max(map(len, query.options), default=len(query.gold)) for query in batch) + SLACK_TOKENS
        prompts = sum(len(query.prompt) for query in batch)
        needed = prompts + max(CANDIDATE_TOKENS, longest * len(batch))
        return self._memory.reserve(max(needed, PROMPT_TOKENS + CANDIDATE_TOKENS))


class GgufReader:
    """See `compressknow.evaluate.text.TextReader`."""

    def __init__(self, model: GgufModel) -> None:
        self._memory, self._tokenizer = GrowingContext(model, 1), GgufTokenizer(model)
        self.rows = model.rows
        self.most: int | None = model.most_tokens
        self.bos: int | None = self._tokenizer.bos_token_id if self._tokenizer.adds_bos else None

    def release(self) -> None:
        self._memory.release()

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Tokenize; names of special tokens are text like any other. None for bytes where the pieces do not spell the
        text, as where the tokenizer puts a space before it."""
        ids = self._tokenizer.encode(text, special=False, parse_special=False)
        pieces = [self._tokenizer.decode_token(number) for number in ids]
        return ids, list(accumulate(map(len, pieces))) if b"".join(pieces) == text.encode() else None

    def compute_log_probs(self, ids: Sequence[int], first: int) -> torch.Tensor:
        context = self._memory.reserve(len(ids))
        context.clear()
        logits = torch.from_numpy(context.read([Span(0, 0, ids, len(ids) - first)]))
        return logits[:-1].log_softmax(-1)

    def continue_texts(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        return [self._continue(prompt, tokens) for prompt in prompts]

    def ends(self, token: int) -> bool:
        return self._tokenizer.is_end(token)

    def _continue(self, prompt: Sequence[int], tokens: int) -> list[int]:
        context = self._memory.reserve(len(prompt) + tokens)
        context.clear()
        written: list[int] = []
        for logits in islice(context.write(prompt), tokens):
            written.append(int(logits.argmax()))
            if self._tokenizer.is_end(written[-1]):
                break
        return written + written[-1:] * (tokens - len(written))
