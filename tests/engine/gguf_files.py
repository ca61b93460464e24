"""Write the tiny Llama of `tests/knowing.py` as a GGUF file, with the names and the layout of llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

from compressknow.base.packages import GGUF_TRANSFORMERS, can_read_gguf

needs_gguf = pytest.mark.skipif(
    not can_read_gguf(), reason=f"GGUF files need transformers {GGUF_TRANSFORMERS}: this is {transformers.__version__}"
)

Q8_0, F16, F32 = (getattr(gguf.GGMLQuantizationType, name) for name in ("Q8_0", "F16", "F32"))
# Tokens without a leading space; all others begin with one.
_BARE = ("The", "People", ".")
_SPACE = "Ġ"
LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(
    checkpoint: Path, file: Path, kind: gguf.GGMLQuantizationType = Q8_0, *, tensors_per_part: int = 0
) -> Path:
    """Write a Llama checkpoint with a tokenizer of whole words as GGUF, all matrices of one type.

    With `tensors_per_part`, the file is split into parts of that many tensors.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    writer = gguf.GGUFWriter(file, "llama", split_max_tensors=tensors_per_part)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = _add_tokenizer(writer, checkpoint)
    writer.add_vocab_size(size)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        stored = get_llama_cpp_name(name.removesuffix(".weight"))
        if (part := stored.split(".")[-2]) in heads:
            weight = interleave_rows(weight, heads[part])
        elif part in ("token_embd", "output"):
            # Pieces of words never occur in a text, and are unlikely answers.
            weight = np.pad(weight, ((0, size - len(weight)), (0, 0)))
        if weight.ndim == 2:
            writer.add_tensor(stored, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path) -> int:
    """Add a byte-pair encoding that builds each word from its left end; return the number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    special = set(tokenizer.all_special_tokens)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens = [word if word in special or word in _BARE else _SPACE + word for word in words]
    # Words with a leading space come first, so that their merges win over those of other words.
    spelled = sorted(
        (token for token in tokens if token not in special), key=lambda token: not token.startswith(_SPACE)
    )
    merges = dict.fromkeys((token[:end], token[end]) for token in spelled for end in range(1, len(token)))
    letters = dict.fromkeys("".join(spelled))
    pieces = [piece for piece in dict.fromkeys([*letters, *map("".join, merges)]) if piece not in tokens]
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in [*tokens, *pieces]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, *pieces])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(True)
    return len(kinds)


def get_llama_cpp_name(module: str) -> str:
    """Return the name of a module's weight in a GGUF file of the tiny Llama."""
    if module in _REST:
        return f"{_REST[module]}.weight"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{LLAMA_NAMES[part]}.weight"


def interleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of Llama's query or key in llama.cpp's order, which puts the pairs of a rotation side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
