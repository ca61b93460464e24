"""Every masked, causal and sequence-to-sequence class of transformers, made tiny: widths of a few dozen, two blocks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
ZOO = sorted({(model_type, name) for mapping in MAPPINGS for model_type, name in mapping.items()})
VOCABULARY, HEADS = 128, 4
# The first rule that matches a setting's name gives its size. Lists that follow from a size (layer_types) are left out:
# configs make them anew.
SMALL: tuple[tuple[str, int], ...] = (
    (r"vocab_size(?:_per_layer_input)?$", VOCABULARY),
    (r"(?:^|_)(?:num_(?:hidden_|encoder_|decoder_)?layers|n_layers?|(?:en|de)coder_layers|depth)$", 2),
    (r"(?:num_attention_heads|n_heads?|num_heads|(?:en|de)coder_attention_heads|^attention_heads)$", HEADS),
    (r"num_key_value_heads$|num_kv_heads$", 2),
    (r"^(?:hidden_size|d_model|n_embd|dim|embedding_size|input_embedding_size|output_embedding_size)$", 32),
    (r"^(?:emb_dim|d_embed|word_embed_proj_dim|attention_hidden_size|embedding_dim)$", 32),
    (r"intermediate_size|ffn_dim$|^d_ff$|^dff$|dim_ff$|ffn_hidden_size|d_inner|n_inner|mlp_dim|^hidden_dim$", 48),
    (r"^(?:d_kv|d_head|head_dim|dim_head|attention_head_size|qk_nope_head_dim|qk_rope_head_dim|v_head_dim)$", 8),
    (r"^(?:rotary_dim|swa_head_dim|kv_channels)$", 8),
    (r"num_(?:local_|routed_)?experts$|n_routed_experts", 4),
    (r"(?:q|kv)_lora_rank", 16),
    (r"num_experts_per_tok(?:en)?$|moe_topk$|moe_k$", 2),
    (r"first_k_dense_replace$", 1),
    (r"^(?:n_group|topk_group|num_expert_group)$", 1),
    (r"(?:max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(?:source|target)_positions)$", 128),
)
# For those whose sizes hang together otherwise.
ZAMBA: dict[str, Any] = {
    **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    **{"attention_hidden_size": 64, "attention_head_dim": 16},
}
TINY: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "nemotron_h": {"n_groups": 2},
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
}
TOKEN = re.compile(r"_token_(?:id|index)$")


def shrink(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What to set in a config for it to describe a tiny model."""
    return dict(_small(settings))


def _small(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and "model_type" in value:
            yield key, shrink(value) | {"model_type": value["model_type"]}
        elif type(value) is int and TOKEN.search(key) and value >= VOCABULARY:
            yield key, 3
        elif type(value) is int:
            size = next((size for rule, size in SMALL if re.search(rule, key)), value)
            if key == "num_key_value_heads" and value == settings.get("num_attention_heads"):
                size = HEADS
            if size < value:
                yield key, size


def tiny_config(model_type: str, name: str, settings: Mapping[str, Any]) -> PreTrainedConfig:
    default = AutoConfig.for_model(model_type, **settings)
    return AutoConfig.for_model(
        model_type, **merged(merged(shrink(default.to_dict()), settings), TINY.get(model_type, {}))
    )


def merged(sizes: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(sizes)
    for key, value in settings.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def tiny_model(model_type: str, name: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Random weights from a fixed seed; biases and norms are random too, so that a lost one shows."""
    model_class = getattr(transformers, name)
    config = tiny_config(model_type, name, settings)
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def inputs_of(model: PreTrainedModel) -> dict[str, Any]:
    ids = torch.arange(5, 29).reshape(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7]
    return inputs
