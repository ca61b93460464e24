"""Causal language models: the answer is what the model writes after the prompt.

A candidate's score is its log-probability given what comes before. Where the probe says so (BEAR, Wiland et al. 2024),
where words follow the blank, or where one candidate begins another, what follows is scored too: the full stop tells
"Guinea" from the beginning of "Guinea-Bissau".
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from compressknow.errors import CheckpointError, UnsupportedError
from compressknow.probe.facts import Fact
from compressknow.probe.scoring.decoding import DecodingScorer, Encoded
from compressknow.probe.scoring.prompts import Ids
from compressknow.probe.scoring.scorer import Query


class CausalScorer(DecodingScorer):
    family = "causal"

    def prompt(self, fact: Fact) -> Ids:
        if not fact.before:
            return (self._start,)
        ids = self.encoder.ids(fact.before, True)
        # Some tokenizers close each text.
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def options(self, fact: Fact, texts: Sequence[str], *, rest: bool) -> tuple[Ids, ...]:
        after, context = fact.after if rest else "", self._context(fact)
        return tuple(self.encoder.answer(context, text + after, fact.gap) for text in texts)

    def first(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        read = self.read(batch, torch.tensor([query.prompt for query in batch], device=self.model.device))
        if self.reads_ahead and getattr(self.model.config, "is_decoder", None) is False:
            raise UnsupportedError(
                f"{type(self.model).__name__} sees the tokens after the one that it predicts.",
                why="Its configuration says that it is not a decoder.",
                hint="If it was trained to continue texts, set `is_decoder` to true in its config.json.",
            )
        return read

    def forward(self, ids: torch.Tensor, cache: Any, encoder: Encoded | None, keep: int) -> tuple[Any, Any]:  # noqa: ARG002
        more = {"logits_to_keep": keep} if self._cuts_logits else {}
        output = self.model(input_ids=ids, **self.cached(cache), **more)
        return output.logits[:, -keep:], self.cache_of(output)

    def ends(self, token: int) -> bool:
        return bool(token == self.tokenizer.eos_token_id)

    @cached_property
    def _cuts_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def _start(self) -> int:
        start = self.tokenizer.bos_token_id
        start = self.tokenizer.eos_token_id if start is None else start
        if start is None:
            raise CheckpointError(
                "A prompt begins with the blank, and the tokenizer has no token to begin a text with.",
                hint="Choose another template, with the object last.",
            )
        return int(start)

    def _context(self, fact: Fact) -> str:
        """A text before the answer that gives the same tokens as the prompt does: most often its last word."""
        context = fact.before.rpartition(" ")[2]
        return context if self._boundary_holds(fact, context) else fact.before

    def _boundary_holds(self, fact: Fact, context: str) -> bool:
        gold = self.encoder.answer(context, fact.obj_label, fact.gap)
        whole = fact.before + fact.gap + fact.obj_label
        ids = self.encoder.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return bool(tuple(ids) == self.encoder.ids(fact.before) + gold)
