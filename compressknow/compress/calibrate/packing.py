"""Sequences of one length, full of text: what a model reads at once while it is calibrated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressknow.engine.language_model import embedding_rows, family_of, most_tokens
from compressknow.errors import CompressknowError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTH = 512
# Of the text, hidden from a model that fills blanks; and the mean length of a hidden span (Raffel et al. 2020, 3.3.4).
HIDDEN, SPAN = 0.15, 3
# A model's text of fewer tokens has no room for a blank and what is around it.
_SHORTEST = 8
_SENTINEL = re.compile(r"<extra_id_(\d+)>")

Ids = Sequence[int]


@dataclass(frozen=True)
class Form:
    """What a sequence of a model looks like.

    Attributes
    ----------
    family : ``masked``, ``causal`` or ``seq2seq``; ``plain`` where a model has no head and no mask token.
    length : tokens of a sequence, `prefix` and `suffix` included.
    prefix, suffix : special tokens that the tokenizer puts around a text, and so around each sequence.
    separator : between two texts of a sequence.
    marks : what stands for hidden tokens: the mask token, or T5's sentinels in their order; none where a model has
        neither.
    known : ids of ordinary tokens that both the tokenizer and the embedding have.
    rows : of the embedding.
    """

    family: str
    length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: tuple[int, ...]
    marks: tuple[int, ...]
    known: tuple[int, ...]
    rows: int

    @property
    def body(self) -> int:
        """Tokens of a sequence that are text."""
        return self.length - len(self.prefix) - len(self.suffix)

    @property
    def has_sentinels(self) -> bool:
        return len(self.marks) > 1

    def framed(self, ids: Ids) -> list[int]:
        return [*self.prefix, *ids, *self.suffix]


def form_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Form:
    """The form of a model's sequences; `model` may be a module tree on the meta device.

    Raises UnsupportedError where it reads no text, or no more than a few tokens of it.
    """
    marks = _marks(tokenizer)
    family = family_of(model) or _family_without_head(model, tokenizer)
    prefix, suffix = _frame(tokenizer)
    rows = embedding_rows(model)
    form = Form(
        family=family,
        length=_length(model, tokenizer, marks if family == "seq2seq" else ()),
        prefix=prefix,
        suffix=suffix,
        separator=_separator(tokenizer, family, prefix, suffix),
        marks=marks if family in ("masked", "seq2seq") else (),
        known=_known(tokenizer, marks, rows),
        rows=rows,
    )
    if form.body < _SHORTEST:
        raise UnsupportedError(f"{type(model).__name__} reads no more than {form.length} tokens at once.")
    return form


def _family_without_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    if model.config.is_encoder_decoder:
        return "seq2seq"
    return "masked" if tokenizer.mask_token_id is not None else "plain"


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    found = {
        int(match[1]): number
        for token, number in tokenizer.get_vocab().items()
        if (match := _SENTINEL.fullmatch(token))
    }
    sentinels = tuple(found[place] for place in range(len(found)) if place in found)
    if len(sentinels) > 1:
        return sentinels
    return (tokenizer.mask_token_id,) if tokenizer.mask_token_id is not None else ()


def _known(tokenizer: PreTrainedTokenizerBase, marks: tuple[int, ...], rows: int) -> tuple[int, ...]:
    special = {*tokenizer.all_special_ids, *marks}
    tokens = tokenizer.get_vocab().items()
    return tuple(
        sorted(number for token, number in tokens if number < rows and number not in special and "unused" not in token)
    )


def _length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, marks: tuple[int, ...]) -> int:
    most = min(LENGTH, most_tokens(model, tokenizer) or LENGTH)
    # A sentinel for each span, and one that closes the last.
    return min(most, int((len(marks) - 1) * SPAN / HIDDEN) + 1) if len(marks) > 1 else most


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and after a text. Some tokenizers tell them only by what they do to one."""
    alone, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    place = next((at for at in range(len(framed)) if framed[at : at + len(alone)] == alone), 0)
    return tuple(framed[:place]), tuple(framed[place + len(alone) :])


def _separator(
    tokenizer: PreTrainedTokenizerBase, family: str, prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> tuple[int, ...]:
    """What ends a text; of a decoder also what begins one, as in the text that it has learned from."""
    end = suffix or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    return (*end, *prefix) if family == "causal" else end


def pack(pieces: Iterable[Ids], form: Form, most: int) -> tuple[torch.Tensor, int]:
    """Whole bodies of sequences, int64 [at most `most`, form.body], and how many tokens of text there were.

    No more pieces are taken than are needed; what is left of the last is dropped.
    """
    import torch

    ids: list[int] = []
    for piece in pieces:
        ids.extend(piece)
        if len(ids) >= most * form.body:
            break
    rows = min(most, len(ids) // form.body)
    return torch.tensor(ids[: rows * form.body], dtype=torch.int64).reshape(rows, form.body), len(ids)


def check_ids(bodies: torch.Tensor, form: Form, unknown: int | None, source: str) -> None:
    """Raise CompressknowError where a text has tokens that the model has no row for, or is mostly unknown tokens."""
    if (largest := int(bodies.max())) >= form.rows:
        raise CompressknowError(
            f"The tokenizer gives token {largest} for {source}, and the model's embedding has {form.rows:,} rows.",
            hint="Put the tokenizer that the model was trained with in its folder.",
        )
    share = float((bodies == unknown).double().mean()) if unknown is not None else 0.0
    if share > 0.5:
        raise CompressknowError(
            f"The tokenizer does not know {share:.0%} of the tokens of {source}.",
            hint="Give a text in the language that the model was trained on.",
        )
