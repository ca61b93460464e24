"""Layers of every masked, causal and sequence-to-sequence language model class of transformers are in the right group.

The checks use only names, with their own patterns, so that they do not repeat a mistake of the rules, which look at the
classes of the module tree first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from compressknow.model.groups import read_structure
from compressknow.model.structure import LinearWeight, Structure, list_scopes
from tests.long import long

# About 250 classes are built.
pytestmark = long
MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
ZOO = sorted({(model_type, name) for mapping in MAPPINGS for model_type, name in mapping.items()})
QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# Settings for types, or classes, whose default config describes no model.
SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": QWEN4_INDEXER},
    "qwen4_exp_text": QWEN4_INDEXER,
    "ReformerModelWithLMHead": {"is_decoder": True},
}
# Its vision tower needs the timm package; Gemma3nForCausalLM is the same language model.
NOT_BUILT = {"Gemma3nForConditionalGeneration"}
# Releases before 5.20 build none of these from a config without settings.
BUILT_SINCE_5_20 = {
    "EncoderDecoderModel",
    "Gemma4UnifiedAssistantForCausalLM",
    "MusicgenForCausalLM",
    "MusicgenMelodyForCausalLM",
}
BEFORE_5_20 = Version(transformers.__version__) < Version("5.20")

# Architectures whose attention or feed-forward multiplies by matrices that are not Linear layers.
PARTLY_OPAQUE = {
    "ConvBertForMaskedLM",
    "DbrxForCausalLM",
    "FunnelForMaskedLM",
    "Gemma3ForConditionalGeneration",
    "IBertForMaskedLM",
    "ModernVBertForMaskedLM",
    "Phi4MultimodalForCausalLM",
    "SqueezeBertForMaskedLM",
    "T5Gemma2ForConditionalGeneration",
    "XLNetLMHeadModel",
}
# Its forward pass multiplies by the embedding.
NO_FINAL_LAYER = {"PerceiverForMaskedLM"}
# Final layers other than the one of get_output_embeddings.
FURTHER_HEADS = {
    ("LukeForMaskedLM", "entity_predictions.decoder"),
    ("BltForCausalLM", "model.patcher.lm_head"),
    ("MobileBertForMaskedLM", "cls.predictions.dense"),
    ("FSMTForConditionalGeneration", "model.decoder.output_projection"),
}

ATTENTION_PART = re.compile(r"^(?:\w+_)?(?:attn|att|attention)s?$|^\w*Attention$|^crossattention$|^cross_attn_layers$")
FEED_FORWARD_PART = re.compile(
    r"^(?:mlps?|mlp_block|shared_mlp|ffns?|ff\d?|feed_forward(?:_in|_out)?|DenseReluDense|intermediate(?:_query)?"
    r"|shared_experts?|block_sparse_moe|output_query)$"
)
TOWER_PART = re.compile(
    r"\.(?:vision_tower|vision_model|image_encoder|img_processor|audio_tower|audio_embed\.encoder"
    r"|word_timestamp_encoder|(?:acoustic|semantic)_tokenizer_encoder)\."
)
GRANITE_TOWERS = re.compile(r"^model\.(?:encoder|projector\.qformer)\.")
MIXER_PART = re.compile(r"^(?:mamba|mixer|conv|mlstm_layer|temporal_block|\w*message_gate|adapter_modules|bottleneck)$")
ROUTER_PART = re.compile(r"^(?:router|gate|shared_expert_gate|router_mlp)$")
QKVO_LEAF = re.compile(
    r"^(?:[qkvo]|[qkvo]_(?:proj|lin|head)|(?:query|key|value)(?:_proj|_global)?|qkv|W?qkv(?:_proj)?|query_key_value"
    r"|c_attn|out_lin|to_(?:q|kv|out)|k?v_[ab]_proj\w*|q_[ab]_proj)$"
)
FEED_FORWARD_LEAF = re.compile(
    r"^(?:fc\d|fc_(?:in|out)|(?:gate|up|down|gate_up)_proj|wi|wo|wi_\d|Wi|lin\d|c_fc|dense_h_to_4h|dense_4h_to_h"
    r"|ffn|ffn_output)$"
)
# Large matrices that are neither Linear nor opaque belong to state-space mixers, to connections between layers, or to
# projectors outside the blocks.
OTHER_MATRICES = re.compile(
    r"mamba|rg_lru|_hc\.|hc_head|multi_modal_projector|upsampler|router|\.gate\.|embed|position|conv|subsampl|vision_tower"
    r"|audio_tower|time_mix|mask_emb|word_timestamp_head"
)


def build(model_type: str, name: str) -> PreTrainedModel:
    model_class = getattr(transformers, name)
    config = AutoConfig.for_model(model_type, **SETTINGS.get(name, SETTINGS.get(model_type, {})))
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)
        return model


@pytest.fixture(scope="module")
def structures() -> dict[str, Structure]:
    """The structure of each class; checks that need the model itself are made here."""
    found: dict[str, Structure] = {}
    failed = set()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    for model_type, name in ZOO:
        if name in found:
            continue
        try:
            model = build(model_type, name)
        except Exception:
            failed.add(name)
            continue
        found[name] = read_structure(model)
        check_every_linear_is_found_once(model, found[name])
        check_the_final_group(model, found[name])
    transformers.logging.set_verbosity(verbosity)
    assert failed - found.keys() <= NOT_BUILT | (BUILT_SINCE_5_20 if BEFORE_5_20 else set())
    return found


@pytest.mark.parametrize("name", sorted(BUILT_SINCE_5_20))
def test_classes_that_older_releases_cannot_build_are_built(structures: dict[str, Structure], name: str) -> None:
    if BEFORE_5_20:
        pytest.skip(f"transformers {transformers.__version__} builds no {name} from a config without settings")
    assert name in structures


def check_every_linear_is_found_once(model: PreTrainedModel, structure: Structure) -> None:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    known = [id(tensors[weight.parameter]) for weight in structure.linears]
    assert len(known) == len(set(known)), structure.architecture
    linears = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))}
    assert linears <= set(known), structure.architecture
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    tied = {id(tensors[weight.parameter]) for weight in structure.linears if weight.group == "final"}
    assert not embeddings & (set(known) - tied), structure.architecture
    check_no_large_matrix_is_missed(model, structure, set(known) | embeddings)


def check_no_large_matrix_is_missed(model: PreTrainedModel, structure: Structure, known: set[int]) -> None:
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", 0)
    for name, parameter in model.named_parameters():
        large = parameter.dim() > 1 and parameter.numel() >= width**2
        if large and id(parameter) not in known and name not in structure.opaque:
            assert OTHER_MATRICES.search(name), (structure.architecture, name, tuple(parameter.shape))


def check_the_final_group(model: PreTrainedModel, structure: Structure) -> None:
    named = model.get_output_embeddings()
    heads = {id(m) for m in named.modules() if isinstance(m, nn.Linear)} if named is not None else set()
    modules = dict(model.named_modules())
    final = {weight.module for weight in structure.linears if weight.group == "final"}
    further = {module for name, module in FURTHER_HEADS if name == structure.architecture}
    assert {id(modules[module]) for module in final - further} == heads, structure.architecture
    assert further <= final
    assert bool(final) == (structure.architecture not in NO_FINAL_LAYER), structure.architecture


def list_weights(structures: dict[str, Structure]) -> Iterator[tuple[str, LinearWeight]]:
    """Yield every weight outside vision towers, with the name of its class."""
    for name, structure in structures.items():
        yield from ((name, weight) for weight in structure.linears if weight.group != "vision")


def find_landmark(weight: LinearWeight) -> str | None:
    """Return the kind that the innermost known part of the name says; the weight's own module does not count."""
    for part in reversed(weight.module.split(".")[: None if weight.kind == "experts" else -1]):
        for kind, pattern in (
            ("router", ROUTER_PART),
            ("mixer", MIXER_PART),
            ("attention", ATTENTION_PART),
            ("feed-forward", FEED_FORWARD_PART),
        ):
            if pattern.search(part):
                return kind
    return None


def test_nine_in_ten_architectures_are_placed_completely(structures: dict[str, Structure]) -> None:
    partly = {name for name, structure in structures.items() if structure.unplaced or structure.opaque}
    share = 1 - len(partly) / len(structures)
    print(f"\n{len(structures)} classes, {share:.1%} placed in full")
    for name in sorted(partly):
        names = (*structures[name].unplaced, *structures[name].opaque)
        print(f"  {name}: {sorted({re.sub(r'[0-9]+', 'N', each) for each in names})}")
    assert share >= 0.9


def test_no_linear_layer_is_unplaced(structures: dict[str, Structure]) -> None:
    assert not {name: structure.unplaced for name, structure in structures.items() if structure.unplaced}


def test_only_towers_are_vision(structures: dict[str, Structure]) -> None:
    for name, structure in structures.items():
        # In Granite Speech the audio model is called encoder, and its output goes through a projector.
        tower = GRANITE_TOWERS if name.startswith("GraniteSpeech") else TOWER_PART
        for weight in structure.linears:
            assert (weight.group == "vision") == bool(tower.search(weight.module)), (name, weight.module)


def test_every_language_model_has_blocks_of_linear_layers(structures: dict[str, Structure]) -> None:
    without = {name for name, structure in structures.items() if "blocks" not in list_scopes(structure)}
    # Their blocks multiply by matrices that are not Linear layers.
    assert without == {"IBertForMaskedLM", "SqueezeBertForMaskedLM"}


def test_the_architectures_with_opaque_matrices_are_known(structures: dict[str, Structure]) -> None:
    assert {name for name, structure in structures.items() if structure.opaque} == PARTLY_OPAQUE


def test_layers_named_attention_are_attention(structures: dict[str, Structure]) -> None:
    wrong = [
        (name, weight.module, weight.group)
        for name, weight in list_weights(structures)
        if find_landmark(weight) == "attention"
        and weight.group != "attention"
        # RWKV has classes named attention but none; MobileBERT names a bottleneck layer after the layer that follows.
        and name != "RwkvForCausalLM"
        and "bottleneck.attention" not in weight.module
    ]
    assert not wrong


def test_a_projection_to_query_key_or_value_is_not_feed_forward(structures: dict[str, Structure]) -> None:
    wrong = [
        (name, weight.module)
        for name, weight in list_weights(structures)
        if QKVO_LEAF.search(weight.module.rpartition(".")[2])
        and weight.group in ("feed-forward", "final")
        # The channel mixing of RWKV has a key and a value.
        and name != "RwkvForCausalLM"
    ]
    assert not wrong


def test_attention_layers_have_known_names(structures: dict[str, Structure]) -> None:
    allowed = re.compile(r"att|mixer\.[qkvo]_proj|temporal_block\.[qkvo]_proj", re.IGNORECASE)
    wrong = [
        (n, w.module) for n, w in list_weights(structures) if w.group == "attention" and not allowed.search(w.module)
    ]
    assert not wrong


def test_layers_named_feed_forward_are_feed_forward(structures: dict[str, Structure]) -> None:
    wrong = [
        (name, weight.module, weight.group)
        for name, weight in list_weights(structures)
        if find_landmark(weight) == "feed-forward"
        and weight.group != "feed-forward"
        and not ROUTER_PART.search(weight.module.rpartition(".")[2])
        # This is a norm whose scale comes from a small MLP.
        and "layernorm.mlp" not in weight.module
    ]
    assert not wrong


def test_up_and_down_projections_inside_a_block_are_feed_forward(structures: dict[str, Structure]) -> None:
    wrong = [
        (name, weight.module, weight.group)
        for name, weight in list_weights(structures)
        if FEED_FORWARD_LEAF.search(weight.module.rpartition(".")[2])
        and weight.layer is not None
        and find_landmark(weight) in (None, "feed-forward")
        and "layernorm.mlp" not in weight.module
        and weight.group != "feed-forward"
    ]
    assert not wrong


def test_no_router_is_compressed_with_the_experts(structures: dict[str, Structure]) -> None:
    routers = [(n, w) for n, w in list_weights(structures) if any(map(ROUTER_PART.search, w.module.split(".")))]
    assert len(routers) > 100
    assert not [(name, w.module, w.group) for name, w in routers if w.group not in ("other", "attention")]
    assert not [(name, w.module) for name, w in routers if w.group == "attention" and "router" in w.module]


def test_vocabulary_sized_outputs_are_final(structures: dict[str, Structure]) -> None:
    wrong = []
    for name, structure in structures.items():
        vocabulary = max((w.shape[0] for w in structure.linears if w.group == "final"), default=None)
        outside = [w for w in structure.linears if w.layer is None and w.group != "final"]
        wrong += [(name, w.module) for w in outside if vocabulary in w.shape]
    assert not wrong


def test_experts_have_three_dimensions_and_other_weights_two(structures: dict[str, Structure]) -> None:
    for name, weight in list_weights(structures):
        assert len(weight.shape) == (3 if weight.kind == "experts" else 2), (name, weight.module)
        assert prod(weight.shape) > 0


def test_blocks_are_numbered_from_zero_without_gaps(structures: dict[str, Structure]) -> None:
    for name, structure in structures.items():
        layers = {w.layer for w in structure.linears if w.layer is not None}
        assert not layers or min(layers) == 0, name


def test_encoder_and_decoder_are_told_apart(structures: dict[str, Structure]) -> None:
    for model_type, name in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.items():
        if BEFORE_5_20 and name in BUILT_SINCE_5_20:
            continue
        structure = structures[name]
        stacks = {w.stack for w in structure.linears if w.group in ("attention", "feed-forward")}
        assert stacks in ({"encoder", "decoder"}, {None}), model_type
        if stacks != {None}:
            assert all(w.stack == "decoder" for w in structure.linears if w.cross), model_type
