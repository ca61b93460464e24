"""Every masked, causal and sequence-to-sequence class of transformers, as a model of a few thousand weights.

The default configuration is shrunk by the names of its settings, which most architectures share. MORE has the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.model.test_zoo import SETTINGS
from tests.models import VOCABULARY

WIDTH, HEADS, LAYERS, HIDDEN, POSITIONS = 32, 4, 2, 64, 64
_NAMES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (
        VOCABULARY,
        (
            "vocab_size",
            "src_vocab_size",
            "tgt_vocab_size",
            "decoder_vocab_size",
            "unpadded_vocab_size",
            "vocab_size_per_layer_input",
        ),
    ),
    (
        WIDTH,
        (
            *(
                "hidden_size",
                "d_model",
                "n_embd",
                "dim",
                "embedding_size",
                "emb_dim",
                "input_embedding_size",
                "hidden_dim",
            ),
            *(
                "output_embedding_size",
                "word_embed_proj_dim",
                "attention_hidden_size",
                "pooler_hidden_size",
                "audio_hidden_size",
            ),
            *("true_hidden_size", "intra_bottleneck_size", "lru_width", "out_hidden_size", "prediction_head_size"),
        ),
    ),
    (
        HEADS,
        (
            *("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads", "n_head"),
            *("n_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads"),
            "swa_num_attention_heads",
        ),
    ),
    (
        LAYERS,
        (
            *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"),
            *("num_decoder_layers", "num_encoder_layers"),
        ),
    ),
    (
        WIDTH // HEADS,
        (
            *("head_dim", "d_kv", "d_head", "dim_head", "kv_channels", "swa_head_dim", "attention_head_size"),
            *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
            *("index_head_dim", "mamba_d_head", "mamba_head_dim", "linear_head_dim", "rotary_dim"),
            *("mamba_n_heads", "mamba_num_heads", "hidden_size_per_layer_input"),
        ),
    ),
    (2 * WIDTH // HEADS, ("qk_head_dim",)),
    (
        16,
        (
            "kv_lora_rank",
            "q_lora_rank",
            "mamba_d_state",
            "state_size",
            "ssm_state_size",
            "chunk_size",
            "mamba_chunk_size",
        ),
    ),
    (
        HIDDEN,
        (
            *("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_dim", "moe_intermediate_size"),
            *("shared_expert_intermediate_size", "ffn_hidden_size", "d_inner", "dim_ff", "dff", "feed_forward_size"),
            *("intermediate_size_mlp", "shared_intermediate_size", "dense_intermediate_size", "expert_ffn_hidden_size"),
        ),
    ),
    (POSITIONS, ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")),
    (4, ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_filters")),
    (2, ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "linear_num_key_heads")),
)
_ONE = ("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ZAMBA = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 16}
_SMALL = {name: value for value, names in _NAMES for name in names}
_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "blank_token_id": 3}
_IDS["mask_token_id"] = 4
_BLT = {
    **{"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": HEADS},
    **{"num_hidden_layers": LAYERS, "intermediate_size": HIDDEN},
}
# Further settings, by model type or class.
MORE: dict[str, dict[str, Any]] = {
    # Four models in one: the input of the global one is twice as wide as the others.
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "global_config": _BLT | {"hidden_size": 2 * WIDTH, "head_dim": 2 * WIDTH // HEADS},
        "decoder_config": _BLT | {"hidden_size_global": 2 * WIDTH, "vocab_size": VOCABULARY},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"o_lora_rank": 16},
    # Attention and feed-forward count as separate layers.
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 2),
    },
    "Dots3NoteForCausalLM": {"head_dim": 16, "swa_head_dim": 16},
    "esm": {"vocab_size": VOCABULARY},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [HIDDEN] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
    },
    "luke": {"entity_vocab_size": 9, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "neomme": {"head_dim": 16},
    "perceiver": {"d_latents": WIDTH, "num_latents": 8, "num_self_attends_per_block": 2},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "xlstm": {"embedding_dim": WIDTH},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        **_ZAMBA,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 8,
        **_ZAMBA,
    },
}
# Another setting names the first token of their decoders.
NO_DECODER_START = ("t5gemma", "t5gemma2")


def tiny_config(model_type: str, name: str) -> PreTrainedConfig:
    """Shrink the default configuration of a class."""
    model_class = getattr(transformers, name)
    default = AutoConfig.for_model(model_type, **SETTINGS.get(name, SETTINGS.get(model_type, {})))
    if not isinstance(default, model_class.config_class):
        default = default.get_text_config(decoder=True)
    settings = shrink(default.to_dict())
    settings.pop("model_type")
    settings |= MORE.get(name, MORE.get(model_type, {}))
    if default.is_encoder_decoder and model_type not in NO_DECODER_START:
        settings["decoder_start_token_id"] = 2
    if settings.get("is_decoder") is False and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        settings["is_decoder"] = True
    return type(default)(**settings)


def tiny_model(model_type: str, name: str, noise: float = 0.02) -> PreTrainedModel:
    """Build a tiny model of a class, in eval mode, from a fixed seed.

    Noise makes biases and norms random too, so that a lost one shows.
    """
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(tiny_config(model_type, name)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def make_inputs(model: PreTrainedModel) -> dict[str, Any]:
    ids = torch.arange(5, 29).reshape(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7]
    return inputs


def shrink(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink the settings of a configuration, and of the configurations in it."""
    layers = next((value for name in _DEPTH if (value := settings.get(name))), 0)
    kept_layers = _select_layers(settings, layers)
    return {
        key: _shrink_setting(key, value, settings, layers, kept_layers)
        for key, value in settings.items()
        if key not in ("transformers_version", "architectures", "dtype")
    }


def _select_layers(settings: Mapping[str, Any], layers: int) -> list[int]:
    """Return the indices of the first two layers and the first layer of each kind, eight at most."""
    lists = [v for v in settings.values() if isinstance(v, list) and len(v) == layers > LAYERS]
    kinds = list(zip(*lists, strict=True)) or [()] * layers
    first = {str(kind): index for index, kind in reversed(list(enumerate(kinds)))}
    return sorted({0, 1, *first.values()})[:8]


def _shrink_setting(key: str, value: Any, settings: Mapping[str, Any], layers: int, kept_layers: list[int]) -> Any:
    if key == "per_layer_config":
        # Its keys are indices of layers, such as "05".
        return {str(kept_layers.index(int(old))): shrink(v) for old, v in value.items() if int(old) in kept_layers}
    if isinstance(value, Mapping):
        return shrink(value)
    if isinstance(value, list) and len(value) == layers > LAYERS:
        return [_shrink_setting(key, value[index], settings, 0, []) for index in kept_layers]
    if key in _IDS and value is not None:
        return _IDS[key]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if key.endswith(("num_key_value_heads", "num_kv_heads")):
        heads = settings.get("num_attention_heads") or settings.get("n_heads") or value
        return HEADS if value == heads else 1 if value == 1 else HEADS // 2
    if key in _DEPTH and layers:
        return min(len(kept_layers), value)
    if key in _ONE:
        return 1
    small = _SMALL.get(key, value)
    return small if small in (WIDTH, VOCABULARY) and value > 0 else min(small, value)
