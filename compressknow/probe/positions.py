"""How many tokens a model reads at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokenizers without a length of their own say 10^30.
_NO_LIMIT = 1 << 24
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


def most_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The number of tokens that a model has positions for, or None where nothing bounds it (T5, ALiBi, Mamba)."""
    config = model.config.get_text_config()
    stated = [value for name in _NAMES if isinstance(value := getattr(config, name, None), int) and value > 0]
    bounds = [length - _reserved(model) for length in stated]
    if tokenizer.model_max_length and tokenizer.model_max_length < _NO_LIMIT:
        bounds.append(int(tokenizer.model_max_length))
    return min(bounds, default=None)


def _reserved(model: PreTrainedModel) -> int:
    """Positions that no token gets: RoBERTa and its kin count from the one after padding's."""
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "embed_positions")):
            padding: Any = getattr(module, "padding_idx", None)
            return int(padding) + 1 if padding is not None else 0
    return 0
