"""Tiny checkpoints with tokenizers that llama.cpp's converter accepts, and readers of GGUF files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers as hf
from safetensors.torch import load_file

from compressknow.base.packages import OPTIONAL  # noqa: F401  # the package is importable without the extra
from tests.engine.gguf_files import get_llama_cpp_name, interleave_rows
from tests.knowing import KNOWN_FACTS, train_llama

VOCABULARY = 400
needs_converter = pytest.mark.usefixtures("converter")
# Rows of 256, which all types take.
_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCABULARY}
_MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "llama-8-blocks": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**_LLAMA | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 8})
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **_LLAMA | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 7},
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA, num_local_experts=2)),
    "mixtral-12": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_LLAMA | {"hidden_size": 64, "intermediate_size": 64}, num_local_experts=12)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=4,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=VOCABULARY)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "bert-classes": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_BERT)),
}


@cache
def train_sentencepiece(kind: str, *, byte_fallback: bool) -> bytes:
    """Train sentencepiece, ``bpe`` or ``unigram``, on the sentences of the facts of `tests.knowing`."""
    buffer = io.BytesIO()
    sentences = [fact.sentence(fact.obj_label) for fact in KNOWN_FACTS]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=buffer,
        model_type=kind,
        vocab_size=VOCABULARY,
        byte_fallback=byte_fallback,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return buffer.getvalue()


def save_checkpoint(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    """Write a tiny model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    model = _MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(folder, **options)
    if name == "t5":
        (folder / "spiece.model").write_bytes(train_sentencepiece("unigram", byte_fallback=False))
    else:
        (folder / "tokenizer.model").write_bytes(train_sentencepiece("bpe", byte_fallback=True))
    return folder


def save_trained_llama(folder: Path) -> Path:
    """Write a tiny Llama that knows the facts of `tests.knowing`, and that llama.cpp's converter accepts."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece("bpe", byte_fallback=True))
    config = hf.LlamaConfig(**_LLAMA, initializer_range=0.05, dtype=torch.float32)
    config.save_pretrained(folder)
    return train_llama(folder, config)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a GGUF file as float32, by name."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for tensor in gguf.GGUFReader(path).tensors
    }


def read_types(path: Path) -> dict[str, str]:
    """Return the type of each tensor of a GGUF file, by name."""
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors}


def read_metadata(path: Path) -> dict[str, object]:
    """Return the metadata of a GGUF file, by key."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the float weights of a single-file checkpoint, by name."""
    return {name: tensor.to(torch.float32).numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def write_sentences(path: Path) -> Path:
    """Write a calibration text of some thousand tokens, in words that the tokenizers know."""
    path.write_text(" ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS * 8), encoding="utf-8")
    return path


def convert_to_llama_cpp(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights of the tiny Llama with the names and the order of rows of llama.cpp."""
    heads = {"attn_q": _LLAMA["num_attention_heads"], "attn_k": _LLAMA["num_key_value_heads"]}
    converted = {}
    for name, weight in stored.items():
        name_in_gguf = get_llama_cpp_name(name.removesuffix(".weight"))
        leaf = name_in_gguf.split(".")[-2]
        converted[name_in_gguf] = interleave_rows(weight, heads[leaf]) if leaf in heads else weight
    return converted
