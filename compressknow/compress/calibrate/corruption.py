"""What a model that fills blanks is given to read: its text with a part of the tokens hidden, as when it learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from compressknow.compress.calibrate.passages import HIDDEN, SPAN, Form
from compressknow.engine.language_model import decoder_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Span = tuple[int, int]
Inputs = dict[str, torch.Tensor]


def inputs_of(bodies: torch.Tensor, form: Form, model: PreTrainedModel, generator: torch.Generator) -> Inputs:
    """The arguments of a forward pass over all sequences, int64 [sequences, tokens] each.

    Masked models read each sequence with `HIDDEN` of its tokens masked (Devlin et al. 2019, all of them by the mask
    token). Encoder-decoder models with sentinels (T5) read it with as much hidden in spans, and their decoder the
    spans; those with a mask token (BART) a mask for each span, and their decoder the whole text; those without either
    (Marian) the whole text on both sides. Others read the text as it is.
    """
    if form.family == "masked":
        bodies = _masked(bodies, form, generator)
    elif form.family == "seq2seq":
        return _both_sides(bodies, form, model, generator)
    return {"input_ids": torch.tensor([form.framed(row) for row in bodies.tolist()])}


def _masked(bodies: torch.Tensor, form: Form, generator: torch.Generator) -> torch.Tensor:
    """As many tokens of each row masked; the order in which they are drawn does not depend on threads."""
    count = max(1, round(HIDDEN * form.body))
    places = torch.rand(bodies.shape, generator=generator).argsort(dim=1, stable=True)[:, :count]
    return bodies.scatter(1, places, form.marks[0])


def _both_sides(bodies: torch.Tensor, form: Form, model: PreTrainedModel, generator: torch.Generator) -> Inputs:
    read, written = [], []
    hidden, count = hidden_of(form.body, HIDDEN)
    for row in bodies.tolist():
        spans = spans_of(form.body, count, hidden, generator) if form.marks else []
        read.append(form.framed(with_blanks(row, spans, form.marks)))
        written.append([*filled_in(row, spans, form.marks), *form.suffix] if form.has_sentinels else form.framed(row))
    return {"input_ids": torch.tensor(read), "decoder_input_ids": _shifted(torch.tensor(written), model)}


def hidden_of(length: int, share: float) -> tuple[int, int]:
    """How many of `length` tokens are hidden, and in how many spans.

    >>> hidden_of(512, 0.15)
    (77, 26)
    """
    hidden = max(1, round(length * share))
    return hidden, max(1, round(hidden / SPAN))


def spans_of(length: int, count: int, hidden: int, generator: torch.Generator) -> list[Span]:
    """`count` spans, each as (first, one past last), of `hidden` tokens in all, with a token or more before each.

    As T5's `random_spans_noise_mask` (Raffel et al. 2020, 3.1.4): all ways to split are equally likely.
    """
    spans, at = [], 0
    gaps = _split(length - hidden, count, generator)
    for gap, size in zip(gaps, _split(hidden, count, generator), strict=True):
        spans.append((at + gap, at + gap + size))
        at += gap + size
    return spans


def _split(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Sizes of `parts` parts of `total`, none empty."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: parts - 1] + 1).tolist())
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def with_blanks(ids: Sequence[int], spans: Sequence[Span], marks: Sequence[int]) -> list[int]:
    """The text with a mark for each span: the next sentinel, or the mask token.

    >>> with_blanks([1, 2, 3, 4, 5, 6], [(1, 3), (5, 6)], [91, 92, 93])
    [1, 91, 4, 5, 92]
    """
    blanked, at = [], 0
    for number, (start, end) in enumerate(spans):
        blanked += [*ids[at:start], marks[number % len(marks)]]
        at = end
    return [*blanked, *ids[at:]]


def filled_in(ids: Sequence[int], spans: Sequence[Span], marks: Sequence[int]) -> list[int]:
    """What stands in the spans, each after its sentinel, and the sentinel that closes the last.

    >>> filled_in([1, 2, 3, 4, 5, 6], [(1, 3), (5, 6)], [91, 92, 93])
    [91, 2, 3, 92, 6, 93]
    """
    written = [token for mark, (start, end) in zip(marks, spans, strict=False) for token in (mark, *ids[start:end])]
    return [*written, *marks[len(spans) : len(spans) + 1]]


def _shifted(labels: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """What a decoder reads while it learns to write `labels`, by the model's own rule where it has one."""
    if own := getattr(model, "prepare_decoder_input_ids_from_labels", None):
        shifted: torch.Tensor = own(labels=labels)
        return shifted
    return torch.cat([torch.full_like(labels[:, :1], decoder_start(model)), labels[:, :-1]], dim=1)
