"""Scorer and reader for GGUF files in llama.cpp, by the rules for causal models, with llama.cpp's key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice
from typing import Any

import torch

from compressknow.evaluate.facts import Probe
from compressknow.evaluate.scoring.families import CausalScorer
from compressknow.evaluate.scoring.ranking import Scores
from compressknow.evaluate.scoring.scorer import SLACK_TOKENS, Ids, Query
from compressknow.gguf.context import GgufTokenizer, LlamaContext, Span
from compressknow.gguf.llama_cpp import GgufModel

# Maximum prompts at a time, and their tokens: the time of attention grows with all tokens in the cache.
PROMPTS, PROMPT_TOKENS = 64, 512
# The maximum of llama.cpp (LLAMA_MAX_SEQ of llama-cparams.h).
SEQUENCES = 256
# Room in the cache for tokens of candidates.
CANDIDATE_TOKENS = 1536
# Tokens of candidates that are finished in one pass, without dropping those below their bar.
WIDE = 64


class GrowingContext:
    """Context of llama.cpp that is replaced by a larger one when needed; it runs on as many threads as torch uses."""

    def __init__(self, model: GgufModel, sequences: int) -> None:
        self._model, self._sequences = model, sequences
        self._context: LlamaContext | None = None

    def reserve(self, cells: int) -> LlamaContext:
        """Return a context with room for `cells` tokens; the content of a smaller one is lost."""
        if self._context is None or self._context.cells < cells:
            self.release()
            cells = -(-cells // 256) * 256
            threads = torch.get_num_threads()
            self._context = LlamaContext(self._model, cells=cells, sequences=self._sequences, threads=threads)
        return self._context

    def release(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None


class LlamaCppScorer(CausalScorer):
    """Scorer of a GGUF file on the facts of one probe; each prompt is a sequence, from which candidates are forked."""

    def __init__(self, model: GgufModel, probe: Probe) -> None:
        # Neither is the class that the base class expects.
        tokenizer: Any = GgufTokenizer(model)
        untyped: Any = model
        super().__init__(untyped, tokenizer, probe)
        self._memory = GrowingContext(model, SEQUENCES)
        self.architecture, self._rows, self._most = model.architecture, model.rows, model.most_tokens

    def release(self) -> None:
        self._memory.release()
        super().release()

    def split(self, batch: Sequence[Query]) -> Sequence[Sequence[Query]]:
        """Split a batch of prompts of equal length into smaller ones that fit in the cache."""
        size = max(1, min(PROMPTS, PROMPT_TOKENS // len(batch[0].prompt)))
        return [batch[start : start + size] for start in range(0, len(batch), size)]

    def read_first(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        """Read the prompts; the state for scoring is the batch itself."""
        context = self._reserve(batch)
        context.clear()
        logits = context.read([Span(number, 0, query.prompt, 1) for number, query in enumerate(batch)])
        return torch.from_numpy(logits).log_softmax(-1), batch

    def _finish_rows(
        self, prefix: Any, rows: Sequence[tuple[int, Ids]], active: list[int], scores: Scores, bars: Scores
    ) -> None:
        batch: Sequence[Query] = prefix
        context, free = self._reserve(batch), SEQUENCES - len(batch)
        room = context.cells - sum(len(query.prompt) for query in batch)
        while active:
            size = max(1, min(free, room // (len(rows[active[0]][1]) - 1)))
            group, active = active[:size], active[size:]
            sequences = {row: len(batch) + number for number, row in enumerate(group)}
            for row, sequence in sequences.items():
                context.fork(rows[row][0], sequence)
            known = 1
            while group:
                known += self._advance(batch, [(sequences[row], row, *rows[row]) for row in group], known, scores)
                group = [row for row in group if known < len(rows[row][1]) and not scores[row] < bars[row]]
            for sequence in sequences.values():
                context.forget(sequence)

    def _advance(
        self, batch: Sequence[Query], rows: Sequence[tuple[int, int, int, Ids]], known: int, scores: Scores
    ) -> int:
        """Add the log-probabilities of the next tokens after `known` ones to `scores`; return the number of these. A
        row is (sequence, its index in `scores`, index of the query, ids of the option); all are finished in one pass if
        few tokens remain, as sequences do not affect each other."""
        remaining = sum(len(ids) - known for *_, ids in rows)
        width = max(len(ids) for *_, ids in rows) - known if remaining <= WIDE else 1
        spans = []
        for sequence, _, query, ids in rows:
            read = ids[known - 1 : known - 1 + width][: len(ids) - known]
            spans.append(Span(sequence, len(batch[query].prompt) + known - 1, read, len(read)))
        logits = torch.from_numpy(self._reserve(batch).read(spans))
        targets = torch.tensor([token for *_, ids in rows for token in ids[known : known + width]])
        values = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
        owners = torch.repeat_interleave(torch.tensor([len(span.tokens) for span in spans]))
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owners, values.double())
        scores[[row for _, row, *_ in rows]] += sums.numpy()
        return width

    def generate(self, batch: Sequence[Query], log_probs: torch.Tensor, state: Any) -> list[list[int]]:  # noqa: ARG002
        """Return the greedy continuations, each computed in a new sequence, to leave the prompts for candidates."""
        context = self._reserve(batch)
        written = [[int(token)] for token in log_probs.argmax(-1)]
        for number in range(len(batch)):
            context.fork(number, len(batch) + number)
        while active := [number for number, ids in enumerate(written) if self.needs_more(batch[number], ids)]:
            spans = [
                Span(len(batch) + number, len(batch[number].prompt) + len(ids) - 1, ids[-1:], 1)
                for number, ids in ((number, written[number]) for number in active)
            ]
            for number, token in zip(active, context.read(spans).argmax(-1), strict=True):
                written[number].append(int(token))
        for number in range(len(batch)):
            context.forget(len(batch) + number)
        return written

    def ends(self, token: int) -> bool:
        return bool(self.tokenizer.is_end(token))

    def _reserve(self, batch: Sequence[Query]) -> LlamaContext:
        """Return a context with room for a batch's prompts and their continuations."""
        longest = max(max(map(len, query.options), default=len(query.gold)) for query in batch) + SLACK_TOKENS
        prompts = sum(len(query.prompt) for query in batch)
        needed = prompts + max(CANDIDATE_TOKENS, longest * len(batch))
        return self._memory.reserve(max(needed, PROMPT_TOKENS + CANDIDATE_TOKENS))


class GgufReader:
    """GGUF file as a `compressknow.evaluate.text.TextReader`."""

    def __init__(self, model: GgufModel) -> None:
        self._memory, self._tokenizer = GrowingContext(model, 1), GgufTokenizer(model)
        self.rows = model.rows
        self.most: int | None = model.most_tokens
        self.bos: int | None = self._tokenizer.bos_token_id if self._tokenizer.adds_bos else None

    def release(self) -> None:
        self._memory.release()

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Tokenize, special tokens' names as text. The bytes are None if the pieces do not add up to the text."""
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
