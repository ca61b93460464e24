"""Small tokenizers of the kinds that real models have, trained on a few texts."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# The mask includes the space before it, as in RoBERTa and ALBERT.
_MASK = AddedToken("<mask>", lstrip=True, special=True)
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", _MASK]
_SENTINELS = ["<extra_id_0>", "<extra_id_1>"]


def train_byte_level(
    texts: Iterable[str], frame: str = "<s> $A </s>", size: int = 400, *, mask: AddedToken | str = _MASK
) -> PreTrainedTokenizerFast:
    """Train one like GPT-2's and RoBERTa's: byte-level BPE, in which a word's token includes the space before it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*_SPECIAL[:-1], mask],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _add_frame(backend, frame, mask=mask)


def train_metaspace(
    texts: Iterable[str], frame: str = "<s> $A", scheme: str = "first", *, unigram: bool = False
) -> PreTrainedTokenizerFast:
    """Train one like Llama's, or T5's if `unigram`: SentencePiece, which turns spaces into letters and adds a first."""
    special = [*_SPECIAL, *_SENTINELS]
    if unigram:
        backend = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    # A piece of SentencePiece does not mix letters and punctuation.
    backend.train_from_iterator((re.sub(r"\b(?=[^\w\s])|(?<=[^\w\s])\b", " ", text) for text in texts), trainer)
    return _add_frame(backend, frame, extra_special_tokens=_SENTINELS)


def train_word_piece(texts: Iterable[str], *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """Train one like BERT's: words and word pieces, without spaces."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return _add_frame(backend, "<s> $A </s>")


def _add_frame(
    backend: Tokenizer, frame: str, *, mask: AddedToken | str = _MASK, **more: object
) -> PreTrainedTokenizerFast:
    named = [(token, backend.token_to_id(token)) for token in frame.split() if token != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=named)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token=mask,
        **more,
    )
