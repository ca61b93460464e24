"""Encoder-decoder models: the encoder reads the prompt with its blank, the decoder fills it.

T5 and its kin fill ``<extra_id_0>`` and close with ``<extra_id_1>`` (Raffel et al. 2020). BART and its kin write the
whole sentence anew with the mask filled (Lewis et al. 2020), so that the answer follows the beginning of the sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from compressknow.errors import UnsupportedError
from compressknow.probe.facts import BLANK, Fact
from compressknow.probe.scoring.decoding import DecodingScorer, Encoded
from compressknow.probe.scoring.prompts import Ids
from compressknow.probe.scoring.scorer import Query

FIRST_SENTINEL, NEXT_SENTINEL = "<extra_id_0>", "<extra_id_1>"


class Seq2SeqScorer(DecodingScorer):
    family = "seq2seq"

    def prompt(self, fact: Fact) -> Ids:
        blank = FIRST_SENTINEL if self._has_sentinels else self.tokenizer.mask_token
        return self.encoder.ids(fact.prompt.replace(BLANK, blank), True)

    def options(self, fact: Fact, texts: Sequence[str], *, rest: bool) -> tuple[Ids, ...]:
        if self._has_sentinels:
            close = (self._id(NEXT_SENTINEL),) if rest else ()
            return tuple(self.encoder.answer(fact.before, text, fact.gap) + close for text in texts)
        after = fact.after if rest else ""
        return tuple(self.encoder.answer(fact.before, text + after, fact.gap) for text in texts)

    def shape(self, fact: Fact, prompt: Ids) -> tuple[int, ...]:
        return len(prompt), len(self._beginning(fact))

    def unaskable(self, fact: Fact) -> str | None:
        return None if self._has_sentinels else super().unaskable(fact)

    def first(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        device = self.model.device
        ids = torch.tensor([query.prompt for query in batch], device=device)
        encoder = self.model.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids))
        begun = torch.tensor([self._beginning(query.fact) for query in batch], device=device)
        return self.read(batch, begun, Encoded(ids, encoder).rows(slice(None)))

    def forward(self, ids: torch.Tensor, cache: Any, encoder: Encoded | None, keep: int) -> tuple[Any, Any]:
        assert encoder is not None
        output = self.model(
            # FSMT masks what follows only where it is given these too.
            input_ids=encoder.ids,
            encoder_outputs=encoder.output,
            attention_mask=torch.ones_like(encoder.ids),
            decoder_input_ids=ids,
            **self.cached(cache),
        )
        return output.logits[:, -keep:], self.cache_of(output)

    def ends(self, token: int) -> bool:
        return token == self.tokenizer.eos_token_id or (self._has_sentinels and token == self._id(NEXT_SENTINEL))

    @cached_property
    def _has_sentinels(self) -> bool:
        vocabulary = self.tokenizer.get_vocab()
        if FIRST_SENTINEL in vocabulary and NEXT_SENTINEL in vocabulary:
            return True
        if self.tokenizer.mask_token is None:
            raise UnsupportedError(
                f"The tokenizer has neither {FIRST_SENTINEL} nor a mask token: this model cannot fill in blanks.",
                hint="T5, Flan-T5, BART and similar models can. Evaluate this one on lm-eval's tasks: -p lm-eval:TASK.",
            )
        return False

    def _beginning(self, fact: Fact) -> Ids:
        """What the decoder has written before the answer."""
        start = (self._start,)
        if self._has_sentinels:
            return (*start, self._id(FIRST_SENTINEL))
        whole = self.encoder.ids(fact.before, True)
        return (*start, *(whole[:-1] if whole[-1:] == (self.tokenizer.eos_token_id,) else whole))

    @cached_property
    def _start(self) -> int:
        """The token that the decoder begins with, as `generate` finds it."""
        config, generation = self.model.config, self.model.generation_config
        named = (
            (config, "decoder_start_token_id"),
            (generation, "decoder_start_token_id"),
            (generation, "bos_token_id"),
            (config.get_text_config(decoder=True), "bos_token_id"),
        )
        for holder, name in named:
            if isinstance(token := getattr(holder, name, None), int):
                return token
        raise UnsupportedError(
            f"The configuration of {type(self.model).__name__} names no token that its decoder begins with.",
            hint="Set `decoder_start_token_id` in its config.json.",
        )

    def _id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))
