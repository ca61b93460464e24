"""Scorers of the families of models: masked, causal, encoder-decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compressknow.base.errors import CheckpointError, UnsupportedError
from compressknow.base.reading import group_by
from compressknow.engine.language_model import count_embedding_rows, find_decoder_start, find_sentinels
from compressknow.evaluate.facts import BLANK, Fact, Probe
from compressknow.evaluate.scoring.decoding import DecodingScorer, Encoded, can_cut_logits, select_encoded
from compressknow.evaluate.scoring.ranking import Scores
from compressknow.evaluate.scoring.scorer import NO_BEGINNING, ROWS, Ids, Query, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Input of a pass that predicts the next token: index of the query, number of tokens of an option, and its beginning.
Step = tuple[int, int, Ids]
END_OF_TEXT = "<|endoftext|>"


class MaskedScorer(Scorer):
    """Scorer of masked language models: the answer is the prediction at the mask.

    A candidate of several tokens is scored by its pseudo-log-likelihood (Salazar et al. 2020) from left to right: each
    token is predicted with itself and all later ones masked, so that no part of a name reveals another (Kauf and
    Ivanova 2023; ``answer_l2r+word_l2r`` with conditional scores in lm-pub-quiz).
    """

    family = "masked"
    by_weights = ("_is_pointwise",)
    # Whether the head can be run on only the masked positions, with the same result; None until it is tested.
    _is_pointwise: bool | None = None

    @property
    def blank(self) -> str:
        return str(self.tokenizer.mask_token)

    def encode_prompt(self, fact: Fact) -> Ids:
        ids = self.encoder.ids(fact.prompt.replace(BLANK, self.blank), True)
        if ids.count(self.tokenizer.mask_token_id) != 1:
            raise CheckpointError(
                f"The tokenizer makes {ids.count(self.tokenizer.mask_token_id)} mask tokens of {fact.prompt!r}.",
                hint="Check that its mask token is one of its special tokens.",
            )
        if not fact.gap:
            return ids
        # Drop a token for the space before the mask, which is part of the answer's first token. There is none if the
        # tokenizer's mask includes this space, as in RoBERTa.
        blank = ids.index(self.tokenizer.mask_token_id)
        before = ids[blank - 1 : blank]
        is_space = before and before[0] not in self.tokenizer.all_special_ids and not self.encoder.decode(before)
        return ids[: blank - 1] + ids[blank:] if is_space else ids

    def encode_options(self, fact: Fact, texts: Sequence[str], *, rest: bool) -> tuple[Ids, ...]:  # noqa: ARG002
        # The model sees what follows anyway.
        return super().encode_options(fact, texts, rest=False)

    def find_obstacle(self, fact: Fact) -> str | None:  # noqa: ARG002
        return None

    def read_first(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        return self._compute_log_probs([(query.prompt, self._find_blank(query)) for query in batch]), batch

    def bound_options(self, batch: Sequence[Query], log_probs: torch.Tensor) -> list[Scores]:
        scores = [np.empty(len(query.options)) for query in batch]
        lengths = [np.array([len(ids) for ids in query.options]) for query in batch]
        for length in sorted({length for query in batch for length in map(len, query.options)}):
            selected = [index for index, each in enumerate(lengths) if length in each]
            rows = [self.step(batch[index], length, ()) for index in selected]
            masked = log_probs[selected] if length == 1 else self._compute_log_probs(rows)
            for row, index in zip(masked, selected, strict=True):
                options = np.flatnonzero(lengths[index] == length)
                heads = torch.tensor([batch[index].options[option][0] for option in options], device=row.device)
                scores[index][options] = row[heads].double().cpu().numpy()
        return scores

    def finish(self, state: Any, rows: Sequence[tuple[int, Ids]], scores: Scores, bars: Scores) -> Scores:
        batch: Sequence[Query] = state
        scores, known = scores.copy(), 1
        while active := [row for row, (_, ids) in enumerate(rows) if known < len(ids) and not scores[row] < bars[row]]:
            # Candidates with a common beginning share its passes.
            next_tokens: dict[Step, list[int]] = {}
            steps = [(rows[row][0], len(rows[row][1]), rows[row][1][:known]) for row in active]
            for step, row in zip(steps, active, strict=True):
                next_tokens.setdefault(step, []).append(rows[row][1][known])
            logp = self._score_steps(batch, next_tokens)
            scores[active] += [logp[step][rows[row][1][known]] for step, row in zip(steps, active, strict=True)]
            known += 1
        return scores

    def produce(self, batch: Sequence[Query], log_probs: torch.Tensor, state: Any) -> list[str]:  # noqa: ARG002
        """Return the most likely token at the mask; if the object has several tokens, fill as many masks from left to
        right. Thus the model knows the object's length, as it does when it scores candidates."""
        filled: list[Ids] = [(token,) for token in log_probs.argmax(-1).tolist()]
        for length in {len(query.gold) for query in batch} - {0, 1}:
            selected = [index for index, query in enumerate(batch) if len(query.gold) == length]
            for index, ids in zip(selected, self._fill_masks([batch[n] for n in selected], length), strict=True):
                filled[index] = ids
        return [self.encoder.decode(ids) for ids in filled]

    def _fill_masks(self, batch: Sequence[Query], length: int) -> list[Ids]:
        """Return the most likely token at each of `length` masks, filled from left to right."""
        filled: list[Ids] = [()] * len(batch)
        for _ in range(length):
            rows = [self.step(query, length, ids) for query, ids in zip(batch, filled, strict=True)]
            tokens = self._compute_log_probs(rows).argmax(-1).tolist()
            filled = [(*ids, token) for ids, token in zip(filled, tokens, strict=True)]
        return filled

    def _score_steps(self, batch: Sequence[Query], tokens: Mapping[Step, list[int]]) -> dict[Step, dict[int, float]]:
        sizes = group_by(tokens, lambda step: len(batch[step[0]].prompt) + step[1])
        logp = {}
        for steps in sizes.values():
            for start in range(0, len(steps), ROWS):
                chunk = steps[start : start + ROWS]
                rows = [self.step(batch[index], length, beginning) for index, length, beginning in chunk]
                for step, row in zip(chunk, self._compute_log_probs(rows), strict=True):
                    values = row[torch.tensor(tokens[step], device=row.device)].double().tolist()
                    logp[step] = dict(zip(tokens[step], values, strict=True))
        return logp

    def step(self, query: Query, length: int, beginning: Ids) -> tuple[Ids, int]:
        """Return the prompt with `beginning` and masks at its blank, `length` tokens in all, and the next position."""
        blank = self._find_blank(query)
        masks = (self.tokenizer.mask_token_id,) * (length - len(beginning))
        return (*query.prompt[:blank], *beginning, *masks, *query.prompt[blank + 1 :]), blank + len(beginning)

    def _find_blank(self, query: Query) -> int:
        return query.prompt.index(self.tokenizer.mask_token_id)

    def _compute_log_probs(self, rows: Sequence[tuple[Ids, int]]) -> torch.Tensor:
        """Return log-probabilities at one position of each row, [rows, vocabulary], float32, for rows of one length."""
        device = self.model.device
        ids = torch.tensor([row for row, _ in rows], device=device)
        positions = torch.tensor([position for _, position in rows], device=device)
        if self._is_pointwise is None:
            self._is_pointwise = self._test_head(ids[:2], positions[:2])
        if self._is_pointwise:
            logits = self._compute_logits_at(ids, positions)
        else:
            logits = self._forward(ids)[torch.arange(len(rows), device=device), positions]
        return logits.float().log_softmax(-1)

    def _compute_logits_at(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return logits at one position of each row, by passing only these hidden states to the head."""

        def select(module: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
            output.last_hidden_state = output.last_hidden_state[
                torch.arange(len(positions), device=positions.device), positions
            ].unsqueeze(1)
            return output

        hook = self.model.base_model.register_forward_hook(select)
        try:
            return self._forward(ids)[:, 0]
        finally:
            hook.remove()

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits

    def _test_head(self, ids: torch.Tensor, positions: torch.Tensor) -> bool:
        """Return whether the head's result is the same on only the masked positions, as for most models."""
        if self.model.base_model is self.model:
            return False
        expected = self._forward(ids)[torch.arange(len(ids), device=ids.device), positions]
        try:
            logits = self._compute_logits_at(ids, positions)
        except (AttributeError, RuntimeError, ValueError, IndexError, TypeError):
            return False
        return logits.shape == expected.shape and torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)


class CausalScorer(DecodingScorer):
    """Scorer of causal language models: the answer is the continuation of the prompt.

    A candidate's score is its log-probability given the text before it. The text after the blank is scored too if the
    probe says so (BEAR, Wiland et al. 2024), if it has words, or if one candidate begins another: the full stop
    distinguishes "Guinea" from the beginning of "Guinea-Bissau".
    """

    family = "causal"

    def find_obstacle(self, fact: Fact) -> str | None:
        return super().find_obstacle(fact) or (NO_BEGINNING if not fact.before and self._start is None else None)

    def encode_prompt(self, fact: Fact) -> Ids:
        if not fact.before and self._start is not None:
            return (self._start,)
        # If the tokenizer drops the whole text, its special tokens are better than none.
        return self.encoder.begin(fact.before) or self.encoder.ids(fact.before, True)

    def read_first(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        read = self.read(batch, torch.tensor([query.prompt for query in batch], device=self.model.device))
        if self.reads_ahead and getattr(self.model.config, "is_decoder", None) is False:
            raise UnsupportedError(
                f"{type(self.model).__name__} sees the tokens that it is to predict.",
                why="Its configuration says that it is not a decoder.",
                hint="If it was trained to continue texts, set `is_decoder` to true in its config.json.",
            )
        return read

    def forward(self, ids: torch.Tensor, cache: Any, encoder: Encoded | None, keep: int) -> tuple[Any, Any]:  # noqa: ARG002
        return self.run(cache, keep, input_ids=ids, **({"logits_to_keep": keep} if self._cuts_logits else {}))

    def ends(self, token: int) -> bool:
        return bool(token == self.tokenizer.eos_token_id)

    @cached_property
    def _cuts_logits(self) -> bool:
        return can_cut_logits(self.model)

    @property
    def _start(self) -> int | None:
        start: int | None = self.tokenizer.bos_token_id
        end: int | None = self.tokenizer.eos_token_id
        return end if start is None else start


class Seq2SeqScorer(DecodingScorer):
    """Scorer of encoder-decoder models: the encoder reads the prompt with its blank, the decoder fills it.

    Models like T5 fill ``<extra_id_0>`` and end with ``<extra_id_1>`` (Raffel et al. 2020). Models like BART repeat the
    whole sentence with the mask filled (Lewis et al. 2020), so the answer follows the beginning of the sentence.
    """

    family = "seq2seq"

    @property
    def blank(self) -> str:
        if self._sentinels:
            return str(self.tokenizer.convert_ids_to_tokens(self._sentinels[0]).replace("▁", " "))
        return str(self.tokenizer.mask_token)

    def encode_prompt(self, fact: Fact) -> Ids:
        return self.encoder.ids(fact.prompt.replace(BLANK, self.blank), True)

    def encode_options(self, fact: Fact, texts: Sequence[str], *, rest: bool) -> tuple[Ids, ...]:
        if not self._sentinels:
            return super().encode_options(fact, texts, rest=rest)
        close = self._sentinels[1:] if rest else ()
        return tuple(ids + close for ids in super().encode_options(fact, texts, rest=False))

    def find_shape(self, fact: Fact, prompt: Ids) -> tuple[int, ...]:
        return len(prompt), len(self.begin(fact))

    def find_obstacle(self, fact: Fact) -> str | None:
        return None if self._sentinels else super().find_obstacle(fact)

    def read_first(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        device = self.model.device
        ids = torch.tensor([query.prompt for query in batch], device=device)
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        # FSMT applies its causal mask only if it also gets these.
        encoder = {**read, "encoder_outputs": self.model.get_encoder()(**read)}
        beginnings = torch.tensor([self.begin(query.fact) for query in batch], device=device)
        return self.read(batch, beginnings, select_encoded(encoder, slice(None)))

    def forward(self, ids: torch.Tensor, cache: Any, encoder: Encoded | None, keep: int) -> tuple[Any, Any]:
        return self.run(cache, keep, decoder_input_ids=ids, **(encoder or {}))

    def ends(self, token: int) -> bool:
        return token == self.tokenizer.eos_token_id or token in self._sentinels[1:]

    @cached_property
    def _sentinels(self) -> Ids:
        """Return the sentinels before and after an answer; empty if the mask token stands for a blank."""
        sentinels = find_sentinels(self.tokenizer)[:2]
        if not sentinels and self.tokenizer.mask_token is None:
            raise UnsupportedError(
                "The tokenizer has neither <extra_id_0> nor a mask token, so this model cannot fill blanks.",
                hint="T5, Flan-T5, BART and similar models can. Evaluate this one on lm-eval's tasks: -p lm-eval:TASK.",
            )
        return sentinels

    def begin(self, fact: Fact) -> Ids:
        """Return the decoder's tokens before the answer."""
        return (find_decoder_start(self.model), *(self._sentinels[:1] or self.encoder.begin(fact.before)))


def make_scorer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: str, probe: Probe) -> Scorer:
    """Return the scorer of a model family: ``masked``, ``causal`` or ``seq2seq``. Raises CheckpointError if the
    tokenizer does not fit the model, UnsupportedError if it cannot fill blanks."""
    rows, size = count_embedding_rows(model), len(tokenizer)
    # transformers may add this token to the tokenizer of a GGUF file that lacks it.
    unused = size == rows + 1 and END_OF_TEXT not in tokenizer.all_special_tokens
    if size > rows and not (unused and tokenizer.convert_ids_to_tokens(rows) == END_OF_TEXT):
        raise CheckpointError(
            f"The tokenizer has {size:,} tokens, the model's embedding {rows:,} rows: they do not match.",
            hint="Put the tokenizer that the model was trained with in the same folder as the weights.",
        )
    if family == "masked" and tokenizer.mask_token is None:
        raise UnsupportedError(
            "The tokenizer has no mask token, without which a masked language model cannot be evaluated.",
            hint="Set `mask_token` in its tokenizer_config.json.",
        )
    scorers: dict[str, type[Scorer]] = {each.family: each for each in (MaskedScorer, CausalScorer, Seq2SeqScorer)}
    return scorers[family](model, tokenizer, probe)
