"""The key-value caches of decoders: which can be split by rows, and whether going on from one gives what reading the
whole text gives. That is tried once, on the first prompts, rather than told by a list of model types.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Tokens by which a model is tried.
TRIED = 3
# Ids [batch, tokens], a cache or None, the number of positions, and whether caches are used -> logits of the last
# positions, [batch, positions, vocabulary], and the cache afterwards.
Forward = Callable[[torch.Tensor, Any, int, bool], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Reading:
    """How texts may be scored.

    Attributes
    ----------
    cached : from the cache of their beginning.
    spans : several tokens by one pass; else each token needs a pass over all before it, for what a model gives at a
        token depends on those after it, or on their number (ProphetNet, XLNet).
    """

    cached: bool
    spans: bool


def reading_of(forward: Forward, prefix: torch.Tensor, more: torch.Tensor) -> Reading:
    """How a model may read: tried on prefixes [batch, tokens] and what follows them, [batch, TRIED]."""
    whole, known = torch.cat([prefix, more], dim=1), prefix.shape[1]
    expected, _ = forward(whole, None, whole.shape[1], False)
    if not same_logits(forward(prefix, None, known, False)[0], expected[:, :known]):
        return Reading(cached=False, spans=False)
    try:
        cached = _cache_holds(forward, prefix, more, expected[:, known:])
    except Exception:
        # The architecture has none, or none that can be used like this.
        cached = False
    return Reading(cached=cached, spans=True)


def _cache_holds(forward: Forward, prefix: torch.Tensor, more: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether what follows gets from a cache, some rows of it taken twice, the logits that are expected."""
    rows = torch.arange(len(prefix), device=prefix.device)
    cache = splittable(forward(prefix, None, 1, True)[1])
    if cache is None:
        return False
    # What another text does with the cache must leave no trace.
    forward(more.flip(0)[:, -1:], select_rows(cache, rows), 1, True)
    rows = torch.cat([rows, rows.flip(0)])
    one, cache = forward(more[rows, :1], select_rows(cache, rows), 1, True)
    others, _ = forward(
        more[rows, 1:], select_rows(cache, torch.arange(len(rows), device=rows.device)), TRIED - 1, True
    )
    return same_logits(torch.cat([one, others], dim=1), expected[rows])


def same_logits(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same but for rounding, which grows with them and with the steps of their dtype; those of a
    broken model, that are no numbers, pass.
    """
    room = torch.finfo(logits.dtype).eps ** 0.5 * max(1.0, float(expected.abs().max()))
    return not bool(((logits - expected).abs() > room).any())


def splittable(cache: Any) -> Any:
    """The cache, if its rows can be taken apart; None for states of another kind (Mamba's, for one)."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        halves = splittable(cache.self_attention_cache), splittable(cache.cross_attention_cache)
        return cache if all(half is not None for half in halves) else None
    plain = isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )
    return cache if plain else None


def select_rows(cache: Any, rows: torch.Tensor) -> Any:
    """A new cache of these rows; the old one keeps its own."""
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
