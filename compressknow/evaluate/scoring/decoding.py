"""Causal models and decoders: score candidates from the key-value cache of their prefix, and read running text."""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressknow.base.errors import UnsupportedError
from compressknow.engine.language_model import LanguageModel, count_embedding_rows, count_positions
from compressknow.engine.layers import disable_rounding, has_rounded_activations
from compressknow.evaluate.grades import find_opening
from compressknow.evaluate.scoring.ranking import Scores
from compressknow.evaluate.scoring.scorer import OPENING_TOKENS, ROWS, SLACK_TOKENS, Ids, Query, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Maximum logits of one forward pass: 256 MB in float32.
LOGITS = 1 << 26
# Tokens that one pass scores in about the time of a single one.
FEW_TOKENS = 64
# Tokens of a test of the model's cache.
TEST_TOKENS = 3
# Arguments of a decoder's forward pass: ids and mask [batch, encoder tokens], and the encoder's output, whose
# `last_hidden_state` is [batch, encoder tokens, hidden].
Encoded = dict[str, Any]


@dataclass(frozen=True)
class Prefix:
    """Batch of prefixes that a decoder has read: ids [batch, tokens], their key-value cache, or None if that cannot be
    split by rows, and the encoder's arguments of a forward pass."""

    ids: torch.Tensor
    cache: Any
    encoder: Encoded | None


class DecodingScorer(Scorer):
    """Scorer of continuations of a prefix, which share the prefix's cache."""

    by_weights = ("_is_rounding",)
    # Whether the output at a token depends on later tokens, or on their number (ProphetNet, XLNet), so that each token
    # needs a pass over all tokens before it; None until it is tested.
    reads_ahead: bool | None = None
    # Whether the model can continue from its cache.
    _caches = False

    @abstractmethod
    def forward(self, ids: torch.Tensor, cache: Any, encoder: Encoded | None, keep: int) -> tuple[Any, Any]:
        """Return logits of the last `keep` positions, [batch, keep, vocabulary], and the cache, if it can be split."""

    @abstractmethod
    def ends(self, token: int) -> bool:
        """Return whether a free answer ends with this token."""

    def bound_options(self, batch: Sequence[Query], log_probs: torch.Tensor) -> list[Scores]:
        heads = [torch.tensor([ids[0] for ids in query.options], device=log_probs.device) for query in batch]
        return [row[head].double().cpu().numpy() for row, head in zip(log_probs, heads, strict=True)]

    def finish(self, state: Any, rows: Sequence[tuple[int, Ids]], scores: Scores, bars: Scores) -> Scores:
        scores = scores.copy()
        longer = sorted((row for row, (_, ids) in enumerate(rows) if len(ids) > 1), key=lambda row: -len(rows[row][1]))
        size = max(1, min(ROWS, LOGITS // self._rows))
        for start in range(0, len(longer), size):
            self._finish_rows(state, rows, longer[start : start + size], scores, bars)
        return scores

    def _finish_rows(
        self, prefix: Prefix, rows: Sequence[tuple[int, Ids]], active: list[int], scores: Scores, bars: Scores
    ) -> None:
        """Finish the `active` rows, one token per pass, so that a row stops once it is below its bar; `scores` are
        changed in place. A few rows are finished in one pass, whose time is that of reading all weights. Not if
        activations are rounded, as scores would depend on the number of rows (see `_is_rounding`)."""
        cache, indices, known = prefix.cache, [rows[row][0] for row in active], 1
        while active:
            remaining = max(len(rows[row][1]) for row in active) - known
            one_pass = not self.reads_ahead and not self._is_rounding and len(active) * remaining <= FEW_TOKENS
            width = remaining if one_pass else 1
            cache = select_rows(cache, torch.tensor(indices, device=prefix.ids.device))
            log_probs, cache = self._score_more(prefix, [rows[row] for row in active], cache, known, width)
            scores[active] += log_probs
            known += width
            indices = [n for n, row in enumerate(active) if known < len(rows[row][1]) and not scores[row] < bars[row]]
            active = [active[index] for index in indices]

    def produce(self, batch: Sequence[Query], log_probs: torch.Tensor, state: Any) -> list[str]:
        written = self.generate(batch, log_probs, state)
        return [self.encoder.decode(list(takewhile(lambda token: not self.ends(token), ids))) for ids in written]

    def generate(self, batch: Sequence[Query], log_probs: torch.Tensor, state: Any) -> list[list[int]]:
        """Return the greedy continuation of each prompt, as long as it `needs_more`."""
        written = [[token] for token in log_probs.argmax(-1).tolist()]
        cache, rows = None, list(range(len(batch)))
        while active := [index for index, row in enumerate(rows) if self.needs_more(batch[row], written[row])]:
            # Copy the prefix's cache, which others use too.
            if cache is None or len(active) < len(rows):
                rows = [rows[index] for index in active]
                cache = select_rows(
                    state.cache if cache is None else cache, torch.tensor(active, device=state.ids.device)
                )
            last = torch.tensor([written[row] for row in rows], device=state.ids.device)
            read = last[:, -1:] if cache is not None else torch.cat([state.ids[rows], last], dim=1)
            logits, cache = self.forward(read, cache, select_encoded(state.encoder, rows), 1)
            for row, token in zip(rows, logits[:, -1].argmax(-1).tolist(), strict=True):
                written[row].append(token)
        return written

    def needs_more(self, query: Query, written: Sequence[int]) -> bool:
        """Return whether a greedy text needs more tokens to show its answer: at most as many as the longest candidate,
        and one more, which shows whether the last word has ended; two more if it begins with quotes or an article."""
        if len(written) >= self._count_room(query, written) or self.ends(written[-1]):
            return False
        return tuple(written[:-1]) not in query.options

    def _count_room(self, query: Query, written: Sequence[int]) -> int:
        if query.options:
            room = max(map(len, query.options)) + 1
            if len(written) >= room:
                first = self.encoder.decode(written[:1])
                room += OPENING_TOKENS if find_opening(f"{first} ").strip() == first.strip() else 0
        elif self.one_token:
            (ids,) = self.encode_options(query.fact, [query.fact.obj_label], rest=False)
            room = len(ids) + 1
        else:
            room = len(query.gold) + SLACK_TOKENS
        # The last token is generated but not read.
        return room if self._most is None else max(1, min(room, self._most - max(query.shape) + 1))

    def read(
        self, batch: Sequence[Query], ids: torch.Tensor, encoder: Encoded | None = None
    ) -> tuple[torch.Tensor, Prefix]:
        """Read a batch of prefixes; return log-probabilities of the next token, [batch, vocabulary], and a `Prefix`."""
        if self.reads_ahead is None:
            self._test_model(batch[:2], ids[:2], select_encoded(encoder, slice(2)))
        logits, cache = self.forward(ids, None, encoder, 1)
        return logits[:, -1].float().log_softmax(-1), Prefix(ids, cache, encoder)

    def run(self, cache: Any, keep: int, **inputs: Any) -> tuple[Any, Any]:
        """Run the model from a cache, if it has a usable one; return what `forward` does."""
        options = {self._cache_name: cache, "use_cache": True} if self._caches else {"use_cache": False}
        output = self.model(**inputs, **options)
        updated = check_splittable(getattr(output, self._cache_name, None)) if self._caches else None
        return output.logits[:, -keep:], updated

    @cached_property
    def _is_rounding(self) -> bool:
        """Return whether activations are rounded, which amplifies differences in the last bit. Attention over several
        tokens in one pass adds in another order than over one, so each pass then reads one."""
        return has_rounded_activations(self.model)

    def _test_model(self, batch: Sequence[Query], ids: torch.Tensor, encoder: Encoded | None) -> None:
        """Test with two queries whether this model reads ahead and, if not, whether it can continue from its cache."""
        # Long prompts may end at the model's last position, so do not exceed them.
        prefix = ids[:, :-TEST_TOKENS] if ids.shape[1] > TEST_TOKENS else ids
        tokens = [(query.gold + query.prompt * TEST_TOKENS)[:TEST_TOKENS] for query in batch]
        more = torch.tensor(tokens, device=ids.device)
        whole, known = torch.cat([prefix, more], dim=1), prefix.shape[1]
        # Rounding activations to 8 bits causes larger differences than those to detect.
        with disable_rounding(self.model):
            self._caches = False
            expected, _ = self.forward(whole, None, encoder, whole.shape[1])
            self.reads_ahead = not is_same(self.forward(prefix, None, encoder, known)[0], expected[:, :known])
            if self.reads_ahead:
                return
            self._caches = True
            try:
                self._caches = self._is_cache_sound(prefix, more, encoder, expected[:, known:])
            except Exception:
                # The architecture has no such cache.
                self._caches = False

    def _is_cache_sound(
        self, prefix: torch.Tensor, more: torch.Tensor, encoder: Encoded | None, expected: torch.Tensor
    ) -> bool:
        """Return whether continuing from a cache, with each row selected twice, gives the expected logits."""
        rows = torch.arange(len(prefix), device=prefix.device)
        _, cache = self.forward(prefix, None, encoder, 1)
        if cache is None:
            return False
        # Another text's use of the cache must leave no trace.
        self.forward(more.flip(0)[:, -1:], select_rows(cache, rows), encoder, 1)
        every, twice = torch.arange(2 * len(rows), device=rows.device), torch.cat([rows, rows.flip(0)])
        encoder = select_encoded(encoder, every % len(rows))
        first, cache = self.forward(more[twice, :1], select_rows(cache, twice), encoder, 1)
        others, _ = self.forward(more[twice, 1:], select_rows(cache, every), encoder, TEST_TOKENS - 1)
        return is_same(torch.cat([first, others], dim=1), expected[twice])

    @cached_property
    def _cache_name(self) -> str:
        return find_cache_name(self.model)

    def _score_more(
        self, prefix: Prefix, rows: Sequence[tuple[int, Ids]], cache: Any, known: int, width: int
    ) -> tuple[Scores, Any]:
        """Return the summed log-probabilities of the next `width` tokens after `known` ones, [rows], and the updated
        cache. Shorter options are padded at their ends, which does not affect the tokens before."""
        device, end = prefix.ids.device, known + width
        ids = torch.tensor([option[:end] + option[-1:] * (end - len(option)) for _, option in rows], device=device)
        real = torch.tensor([[n < len(option) for n in range(known, end)] for _, option in rows], device=device)
        queries = torch.tensor([index for index, _ in rows], device=device)
        read = ids[:, known - 1 : -1]
        if cache is None:
            read = torch.cat([prefix.ids[queries], ids[:, :-1]], dim=1)
        logits, updated = self.forward(read, cache, select_encoded(prefix.encoder, queries), width)
        logits = logits.float()
        log_probs = logits.gather(2, ids[:, known:].unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
        scores: Scores = log_probs.double().where(real, 0.0).sum(1).cpu().numpy()
        return scores, None if cache is None else updated


def find_cache_name(model: PreTrainedModel) -> str:
    """Return the name of the cache argument of `forward`; code in a checkpoint may use the older name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def can_cut_logits(model: PreTrainedModel) -> bool:
    """Return whether `forward` can compute logits of only the last positions."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def is_same(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether logits are the same except for rounding; NaN, from a broken model, counts as the same."""
    tolerance = torch.finfo(logits.dtype).eps ** 0.5 * max(1.0, float(expected.abs().max()))
    return not bool(((logits - expected).abs() > tolerance).any())


def check_splittable(cache: Any) -> Any:
    """Return the cache if its rows can be selected; None for other kinds of states, such as Mamba's."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        halves = check_splittable(cache.self_attention_cache), check_splittable(cache.cross_attention_cache)
        return cache if all(half is not None for half in halves) else None
    plain = isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )
    return cache if plain else None


def select_encoded(encoder: Encoded | None, rows: Any) -> Encoded | None:
    """Return these rows of an encoder's output, in its own class, since decoders look for its fields."""
    if encoder is None:
        return None
    output = encoder["encoder_outputs"]
    inputs = {name: encoder[name][rows] for name in ("input_ids", "attention_mask")}
    return {**inputs, "encoder_outputs": type(output)(last_hidden_state=output.last_hidden_state[rows])}


def select_rows(cache: Any, rows: torch.Tensor) -> Any:
    """Return a new cache with these rows; the old one is unchanged."""
    from transformers.cache_utils import EncoderDecoderCache

    if cache is None:
        return None
    if isinstance(cache, EncoderDecoderCache):
        halves = (select_rows(half, rows) for half in (cache.self_attention_cache, cache.cross_attention_cache))
        selected = EncoderDecoderCache(*halves)
        selected.is_updated = dict(cache.is_updated)
        return selected
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


# Texts to continue in one batch.
_BATCH_SIZE = 8


class TransformersReader:
    """Causal model of transformers as a `compressknow.evaluate.text.TextReader`."""

    def __init__(self, loaded: LanguageModel) -> None:
        self._model, self._tokenizer = model, tokenizer = loaded.model, loaded.tokenizer
        self.rows = count_embedding_rows(model)
        self.most = count_positions(model, tokenizer)
        # Whether the tokenizer puts BOS before a text also determines llama.cpp's ``add_bos_token``.
        bos, first = tokenizer.bos_token_id, tokenizer("a", verbose=False)["input_ids"][:1]
        self.bos: int | None = bos if bos is not None and first == [bos] else None
        self._end: int | None = tokenizer.eos_token_id
        self._cache, self._cuts_logits = find_cache_name(model), can_cut_logits(model)
        self._checked = False

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            # Read the names of special tokens as ordinary text, as in llama.cpp.
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
        size = _BATCH_SIZE if self._cuts_logits else 1
        batches = (prompts[start : start + size] for start in range(0, len(prompts), size))
        return [row for batch in batches for row in self._continue(torch.tensor(batch), tokens)]

    def _continue(self, ids: torch.Tensor, tokens: int) -> list[list[int]]:
        ids = ids.to(self._model.device)
        inputs, cache, written = ids, None, []
        end = -1 if self._end is None else self._end
        ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for _ in range(tokens):
            output = self._model(input_ids=inputs, use_cache=True, **{self._cache: cache}, **self._list_arguments(1))
            written.append(output.logits[:, -1].argmax(-1, keepdim=True))
            ended |= written[-1] == end
            if ended.all():
                break
            cache = getattr(output, self._cache, None)
            # Without a cache, the whole text must be read again.
            inputs = written[-1] if cache is not None else torch.cat([ids, *written], dim=1)
        rows = [list(takewhile(lambda token: token != end, row)) for row in torch.cat(written, dim=1).tolist()]
        return [row + [end] * (tokens - len(row)) for row in rows]

    def ends(self, token: int) -> bool:
        return token == self._end

    def _check_causal(self, ids: Sequence[int]) -> None:
        """Raise UnsupportedError if the model sees the tokens that it is to predict, so that figures would be wrong."""
        known = max(2, len(ids) // 2)
        with disable_rounding(self._model):
            whole, part = (self._compute_logits(each, len(each)) for each in (ids, ids[:known]))
        if not is_same(part, whole[:, :known]):
            name = type(self._model).__name__
            raise UnsupportedError(
                f"{name} sees the tokens that it is to predict, so it has no perplexity.",
                hint="Evaluate it on facts: atlas, lama:..., bear, facts:... and hf:....",
            )

    def _compute_logits(self, ids: Sequence[int], keep: int) -> torch.Tensor:
        row = torch.tensor([ids], device=self._model.device)
        logits: torch.Tensor = self._model(input_ids=row, use_cache=False, **self._list_arguments(keep)).logits
        return logits[:, -keep:]

    def _list_arguments(self, keep: int) -> dict[str, Any]:
        return {"logits_to_keep": keep} if self._cuts_logits else {}


def _count_bytes(text: str, ends: Sequence[int]) -> list[int]:
    """Return the UTF-8 bytes before each character position in `ends`; a token's last character counts as a whole."""
    points = np.fromiter(map(ord, text), dtype=np.uint32, count=len(text))
    widths = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
    offsets = np.concatenate([[0], np.cumsum(widths)])
    return [int(offset) for offset in offsets[np.asarray(ends, dtype=np.int64)]]
