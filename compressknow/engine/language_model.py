"""Language model ready for evaluation: its weights on a device, its tokenizer, its family."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError, UnsupportedError, UsageError, suggest_word
from compressknow.engine.load import Variant, find_family_of_class, load, load_tokenizer, load_variant
from compressknow.model.checkpoint import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


AUTO, CPU = "auto", "cpu"
DEVICES = (AUTO, CPU, "cuda", "mps", "xpu")
_OTHER_WORDS = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "metal": "mps"}


def check_device(name: str) -> None:
    """Raise UsageError unless it is a device's name; whether the machine has it is not checked, as that takes torch."""
    kind, colon, number = name.partition(":")
    is_numbered = kind not in (AUTO, CPU) and re.fullmatch("0|[1-9][0-9]{0,3}", number)
    if kind not in DEVICES or (colon and not is_numbered):
        other = _OTHER_WORDS.get(kind.lower())
        near = f"Did you mean {other}? " if other else suggest_word(kind, DEVICES)
        raise UsageError(f"There is no device {name!r}.", hint=f"{near}Choose from {', '.join(DEVICES)} or cuda:1.")


def resolve_device(name: str) -> str:
    """Return the device of that name; for ``auto`` cuda, mps or cpu. Raises UsageError if machine or torch lacks it."""
    import torch

    check_device(name)
    if name == AUTO:
        return next((kind for kind in ("cuda", "mps") if torch.get_device_module(kind).device_count()), CPU)
    kind, _, number = name.partition(":")
    count = torch.get_device_module(kind).device_count()
    if int(number or 0) < count:
        return name
    if count:
        available = f"{kind}:0" if count == 1 else f"{kind}:0 to {kind}:{count - 1}"
        raise UsageError(f"There is no device {name}.", hint=f"This machine has {available}.")
    raise UsageError(
        f"--device {name}: no {kind} device is available.",
        why=f"torch {torch.__version__} finds none: the machine has none, its driver is missing, "
        "or torch was built without support for it.",
        hint="Leave out --device to use the best available device, or pass --device cpu.",
    )


# Names of compressed-tensors' additional parameters in a quantized layer.
_QUANTIZATION_PARAMETERS = {"weight_g_idx", "weight_shape"} | {
    f"{kind}_{part}" for kind in ("weight", "input", "output") for part in ("scale", "zero_point")
}


@dataclass(frozen=True)
class LanguageModel:
    """Language model on a device; `family` is ``masked``, ``causal`` or ``seq2seq``."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: str

    @property
    def parameters(self) -> int:
        """Count the model's parameters, without those that quantization adds."""
        from compressknow.engine.layers import EngineLinear

        named = ((name.rpartition(".")[2], parameter) for name, parameter in self.model.named_parameters())
        listed = sum(parameter.numel() for name, parameter in named if name not in _QUANTIZATION_PARAMETERS)
        unlisted = (module.unlisted for module in self.model.modules() if isinstance(module, EngineLinear))
        return int(listed) + sum(unlisted)

    @property
    def dtype(self) -> str:
        """Return the dtype of its products: ``float32``, or ``float32 + int8`` if some layers multiply in int8."""
        from compressknow.engine.layers import EngineLinear

        words = {module.word for module in self.model.modules() if isinstance(module, EngineLinear)}
        return " + ".join([str(self.model.dtype).removeprefix("torch."), *sorted(words)])

    @property
    def vocabulary(self) -> str:
        """Return a short hash of the model's tokens and ids. (The tokenizer of a GGUF file may have one more, beyond
        the last row: the end of text that transformers adds to those of GPT-2's kind.)"""
        rows = count_embedding_rows(self.model)
        return hash_vocabulary(pair for pair in self.tokenizer.get_vocab().items() if pair[1] < rows)


def hash_vocabulary(tokens: Iterable[tuple[str, int]]) -> str:
    """Return a short hash of tokens and ids, without the names that llama.cpp's converter gives to unused rows."""
    named = sorted((token, number) for token, number in tokens if token != f"[PAD{number}]")
    return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def load_language_model(
    path: Path, *, device: str = "cpu", dtype: str | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """Load a checkpoint folder or a GGUF file with its head and its tokenizer. `dtype` is that of weights that are not
    quantized, such as ``float32``, or ``auto`` for the checkpoint's own. Raises CheckpointError if it lacks a head,
    weights or a tokenizer, which are never filled in at random, UnsupportedError if it is not a language model of text.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = load(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, language_model=True)
    _check_head(path, model)
    _make_batch_invariant(model)
    family = find_family(model)
    if family is None:
        raise UnsupportedError(
            f"{path} is a {type(model).__name__}, not a masked, causal or sequence-to-sequence language model.",
            hint="Give a checkpoint whose `architectures` names a language model.",
        )
    return LanguageModel(model, tokenizer, family)


def make_language_model(
    variant: Variant, tokenizer: PreTrainedTokenizerBase, *, device: str = "cpu", dtype: str
) -> LanguageModel:
    """Load a conversion in memory for evaluation; `tokenizer` is that of its source."""
    model = load_variant(variant, device=device, dtype=dtype)
    _make_batch_invariant(model)
    return LanguageModel(model, tokenizer, find_family(model) or "")


def _make_batch_invariant(model: PreTrainedModel) -> None:
    """Make float layers batch-invariant if others round their inputs: only for evaluation, as few rows take longer."""
    from compressknow.engine.layers import EngineLinear, has_rounded_activations, make_batch_invariant

    if has_rounded_activations(model) and any(isinstance(module, EngineLinear) for module in model.modules()):
        make_batch_invariant(model)


def count_embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model reads. Raises UnsupportedError if it reads no tokens."""
    from compressknow.model.meta import find_input_embedding

    weight = getattr(find_input_embedding(model), "weight", None)
    # Perceiver's embedding is part of its input preprocessor.
    rows = weight.shape[0] if weight is not None else getattr(model.config, "vocab_size", None)
    if isinstance(rows, int):
        return rows
    raise UnsupportedError(
        f"{type(model).__name__} has no embedding of text tokens.", hint="Give a language model of text."
    )


def check_tokens(largest: int, rows: int, where: str) -> None:
    """Raise CheckpointError for an id beyond the embedding; as ids may have gaps, their number does not show it."""
    if largest >= rows:
        raise CheckpointError(
            f"The tokenizer gives token {largest:,}, but the model's embedding has {rows:,} rows: they do not match.",
            f"The token is in {where}.",
            "Put the tokenizer that the model was trained with in its folder.",
        )


# Tokenizers without a maximum length have 10^30.
_NO_LIMIT = 1 << 24
_NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    "max_decoder_position_embeddings",  # In LED, fewer than those of the encoder.
)
_POSITIONS = ("position_embeddings", "embed_positions")


def count_positions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the number of positions that a model has; None if nothing bounds it (T5, ALiBi, Mamba)."""
    config = model.config.get_text_config()
    stated = [value for name in _NAMES if isinstance(value := getattr(config, name, None), int) and value > 0]
    named = (module for name, module in model.named_modules() if name.endswith(_POSITIONS))
    # RoBERTa and similar models number positions from the padding index + 1.
    padding: Any = getattr(next(named, None), "padding_idx", None)
    bounds = [length - (0 if padding is None else int(padding) + 1) for length in stated]
    if tokenizer.model_max_length and tokenizer.model_max_length < _NO_LIMIT:
        bounds.append(int(tokenizer.model_max_length))
    return min(bounds, default=None)


# In mT5, sentinels are ordinary tokens with a leading space.
_SENTINEL = re.compile(r"▁?<extra_id_(\d+)>")


def find_sentinels(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the tokens that represent blanks (T5), in order; empty if there are fewer than two."""
    # Reversed, so that of two tokens with one number, the one without a space is used.
    vocabulary = sorted(tokenizer.get_vocab().items(), reverse=True)
    ids = {int(match[1]): token_id for token, token_id in vocabulary if (match := _SENTINEL.fullmatch(token))}
    sentinels = tuple(ids[number] for number in range(len(ids)) if number in ids)
    return sentinels if len(sentinels) > 1 else ()


def find_decoder_start(model: PreTrainedModel) -> int:
    """Return the token that a decoder begins with, found as by `generate`. Raises UnsupportedError without one."""
    # generation_config.json has priority; without that file, the generation config comes from config.json.
    generation = getattr(model, "generation_config", None)  # A classifier has none.
    for holder, name in (
        (generation, "decoder_start_token_id"),
        (generation, "bos_token_id"),
        (model.config, "decoder_start_token_id"),
    ):
        if isinstance(token := getattr(holder, name, None), int):
            return token
    raise UnsupportedError(
        f"The configuration of {type(model).__name__} names no token that its decoder begins with.",
        hint="Set `decoder_start_token_id` in its config.json.",
    )


def _check_head(path: Path, model: PreTrainedModel) -> None:
    """Raise CheckpointError for a missing head that transformers ties to the embedding, in T5 even if the config says
    that they are separate: such a model answers at random."""
    from compressknow.model.meta import find_input_embedding

    config = read_json(path / "config.json") if path.is_dir() else {}
    named = str((config.get("architectures") or [None])[0])
    head = model.get_output_embeddings()
    if config.get("tie_word_embeddings") is not False or find_family_of_class(named) or head is None:
        return
    if head.weight is getattr(find_input_embedding(model), "weight", None):
        raise CheckpointError(
            f"{path} has no language-modelling head: its config names {named}, and says that the head is not tied to "
            "the embedding.",
            hint="Give a checkpoint of a masked, causal or sequence-to-sequence language model.",
        )


def find_named_family(config: Mapping[str, Any]) -> str | None:
    """Return the family of the class that a checkpoint's config names; None if the model has to be loaded first.

    >>> find_named_family({"architectures": ["BertForMaskedLM"]}), find_named_family({})
    ('masked', None)
    """
    names = config.get("architectures")
    family = find_family_of_class(str(names[0])) if names and isinstance(names, list) else None
    # As in `find_family`. A config may leave out `is_encoder_decoder` if it is the class's default.
    return family if family != "seq2seq" or config.get("is_encoder_decoder") else None


def find_family(model: PreTrainedModel) -> str | None:
    """Return ``masked``, ``causal``, ``seq2seq`` or None, by a model's class; for remote code, by names of classes."""
    name = type(model).__name__
    if family := find_family_of_class(name):
        # Some classes that transformers lists as sequence-to-sequence transcribe speech; they continue a given text.
        return family if family != "seq2seq" or model.config.is_encoder_decoder else "causal"
    if model.config.is_encoder_decoder and model.can_generate():
        return "seq2seq"
    auto_map = getattr(model.config, "auto_map", None) or {}
    names = [name, *(auto for auto, own in auto_map.items() if str(own).rpartition(".")[2] == name)]
    if any(each.endswith("ForMaskedLM") for each in names):
        return "masked"
    return "causal" if any(each.endswith(("ForCausalLM", "LMHeadModel")) for each in names) else None
