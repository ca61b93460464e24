"""Sequences of token ids as a model reads them: with its special tokens, and with part of the text hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressknow.base.errors import UnsupportedError
from compressknow.engine.language_model import (
    count_embedding_rows,
    count_positions,
    find_decoder_start,
    find_family,
    find_sentinels,
)

LENGTH = 512
# Share of the text that is hidden from models that fill blanks, and mean length of a hidden span (Raffel et al. 2020,
# 3.3.4).
HIDDEN, SPAN = 0.15, 3
# A shorter sequence has no room for a blank and its context.
_SHORTEST = 8

Ids = Sequence[int]
Span = tuple[int, int]
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class SequenceFormat:
    """Format of a model's sequences.

    Attributes
    ----------
    family : ``masked``, ``causal`` or ``seq2seq``; ``plain`` if a model has no head and no mask token.
    length : tokens of a sequence, including `prefix` and `suffix`.
    prefix, suffix : special tokens that the tokenizer puts around a text, and so around each sequence.
    separator : special tokens between two texts of a sequence.
    marks : ids that replace hidden tokens: the mask token, or T5's sentinels in their order; empty without either.
    known : ids of ordinary tokens that both the tokenizer and the embedding have.
    rows : rows of the embedding.
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
        """Number of text tokens in a sequence."""
        return self.length - len(self.prefix) - len(self.suffix)

    @property
    def has_sentinels(self) -> bool:
        return len(self.marks) > 1

    def frame(self, ids: Ids) -> list[int]:
        return [*self.prefix, *ids, *self.suffix]


def find_sequence_format(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SequenceFormat:
    """Find the format of a model's sequences; `model` may be a module tree on the meta device.

    Raises UnsupportedError if it reads no text or only a few tokens, or writes in another vocabulary than it reads.
    """
    if _has_two_vocabularies(tokenizer):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be calibrated: it writes in another vocabulary than it reads.",
            why="Its decoder reads the translation written so far, and a calibration text has no translation.",
            hint="Use methods that need no text: prune by magnitude, or round to nearest.",
        )
    mask = tokenizer.mask_token_id
    marks = find_sentinels(tokenizer) or ((mask,) if mask is not None else ())
    without_head = "masked" if mask is not None else "plain"
    family = find_family(model) or ("seq2seq" if model.config.is_encoder_decoder else without_head)
    # Find the special tokens before and after a text by example, as some tokenizers do not list them.
    plain, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
    prefix, suffix = tuple(framed[:start]), tuple(framed[start + len(plain) :])
    length = min(LENGTH, count_positions(model, tokenizer) or LENGTH)
    if family == "seq2seq" and len(marks) > 1:
        # Each span needs a sentinel, and one more ends the last span.
        length = min(length, int((len(marks) - 1) * SPAN / HIDDEN) + 1)
    end = suffix or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    rows, special = count_embedding_rows(model), {*tokenizer.all_special_ids, *marks}
    known = sorted(
        number
        for token, number in tokenizer.get_vocab().items()
        if number < rows and number not in special and "unused" not in token
    )
    form = SequenceFormat(
        family=family,
        length=length,
        prefix=prefix,
        suffix=suffix,
        # A decoder-only model is trained on texts that begin with the prefix.
        separator=(*end, *prefix) if family == "causal" else end,
        marks=marks if family in ("masked", "seq2seq") else (),
        known=tuple(known),
        rows=rows,
    )
    if form.body < _SHORTEST:
        raise UnsupportedError(f"{type(model).__name__} reads no more than {form.length} tokens at once.")
    return form


def _has_two_vocabularies(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether ids mean different tokens in inputs and outputs, as in FSMT and Marian's larger models."""
    read, written = (getattr(tokenizer, name, None) for name in ("encoder", "decoder"))
    # In other tokenizers, these attributes are not dicts.
    return (
        isinstance(read, dict)
        and isinstance(written, dict)
        and any(written.get(read[token]) != token for token in read)
    )


def build_inputs(
    bodies: torch.Tensor, form: SequenceFormat, model: PreTrainedModel, generator: torch.Generator
) -> Inputs:
    """Build the arguments of a forward pass over all sequences, int64 [sequences, tokens] each.

    Masked models read each sequence with the share `HIDDEN` of its tokens replaced by the mask token (Devlin et al.
    2019). Encoder-decoder models with sentinels (T5) read it with the same share hidden in spans, and their decoder
    reads the spans; those with a mask token (BART) read a mask for each span, and their decoder the whole text; those
    without either (Marian) read the whole text on both sides. Others read the unchanged text.
    """
    if form.family == "masked":
        masked = max(1, round(HIDDEN * form.body))
        positions = torch.rand(bodies.shape, generator=generator).argsort(dim=1, stable=True)[:, :masked]
        bodies = bodies.scatter(1, positions, form.marks[0])
    if form.family != "seq2seq":
        return {"input_ids": torch.tensor([form.frame(row) for row in bodies.tolist()])}
    read, written = [], []
    for row in bodies.tolist():
        spans = draw_spans(form.body, generator) if form.marks else []
        read.append(form.frame(blank_out(row, spans, form.marks)))
        written.append([*fill_in(row, spans, form.marks), *form.suffix] if form.has_sentinels else form.frame(row))
    # The decoder's input for these labels, by the model's own rule if it has one.
    labels = torch.tensor(written)
    if shift := getattr(model, "prepare_decoder_input_ids_from_labels", None):
        shifted = shift(labels=labels)
    else:
        shifted = torch.cat([torch.full_like(labels[:, :1], find_decoder_start(model)), labels[:, :-1]], dim=1)
    return {"input_ids": torch.tensor(read), "decoder_input_ids": shifted}


def draw_spans(length: int, generator: torch.Generator) -> list[Span]:
    """Draw the spans of a text to hide, each as (first, one past last), with at least one token before each.

    As in T5's `random_spans_noise_mask` (Raffel et al. 2020, 3.1.4), all ways to split are equally likely.
    """
    hidden = max(1, round(length * HIDDEN))
    count = max(1, round(hidden / SPAN))
    spans, position = [], 0
    gaps = _split(length - hidden, count, generator)
    for gap, size in zip(gaps, _split(hidden, count, generator), strict=True):
        spans.append((position + gap, position + gap + size))
        position += gap + size
    return spans


def _split(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Draw the sizes of `parts` non-empty parts of `total`."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: parts - 1] + 1).tolist())
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def blank_out(ids: Ids, spans: Sequence[Span], marks: Ids) -> list[int]:
    """Replace each span by a mark: the next sentinel, or the mask token.

    >>> blank_out([1, 2, 3, 4, 5, 6], [(1, 3), (5, 6)], [91, 92, 93])
    [1, 91, 4, 5, 92]
    """
    blanked, position = [], 0
    for number, (start, end) in enumerate(spans):
        blanked += [*ids[position:start], marks[number % len(marks)]]
        position = end
    return [*blanked, *ids[position:]]


def fill_in(ids: Ids, spans: Sequence[Span], marks: Ids) -> list[int]:
    """Return the tokens of the spans, each after its sentinel, and the sentinel after the last one.

    >>> fill_in([1, 2, 3, 4, 5, 6], [(1, 3), (5, 6)], [91, 92, 93])
    [91, 2, 3, 92, 6, 93]
    """
    written = [token for mark, (start, end) in zip(marks, spans, strict=False) for token in (mark, *ids[start:end])]
    return [*written, *marks[len(spans) : len(spans) + 1]]
