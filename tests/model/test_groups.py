"""Every Linear layer of the supported architectures is in its exact group."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from compressknow.model.groups import read_structure
from compressknow.model.structure import LinearWeight, ModuleMap, Structure, select
from tests.zoo import tiny_config

BERT = {
    "vocab_size": 90,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
T5 = {"vocab_size": 90, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
ALBERT = BERT | {"embedding_size": 8, "num_hidden_layers": 6, "num_hidden_groups": 2}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": False}
BART = {
    "vocab_size": 90,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
DISTILBERT = {"vocab_size": 90, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
OPT = BERT | {"ffn_dim": 24, "word_embed_proj_dim": 8}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertForMaskedLM", BERT),
    "BERT without a head": ("BertModel", BERT),
    "RoBERTa": ("RobertaForMaskedLM", BERT),
    "DistilBERT": ("DistilBertForMaskedLM", DISTILBERT),
    "ALBERT": ("AlbertForMaskedLM", ALBERT),
    "ELECTRA": ("ElectraForMaskedLM", BERT | {"embedding_size": 8}),
    "DeBERTa": ("DebertaForMaskedLM", DEBERTA),
    "DeBERTa v2": ("DebertaV2ForMaskedLM", DEBERTA),
    "ModernBERT": ("ModernBertForMaskedLM", BERT | {"pad_token_id": 0}),
    "T5": ("T5ForConditionalGeneration", T5),
    "Flan-T5": ("T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "BART": ("BartForConditionalGeneration", BART),
    "GPT-2": ("GPT2LMHeadModel", {"vocab_size": 90, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", BERT),
    "OPT": ("OPTForCausalLM", OPT),
    "BLOOM": ("BloomForCausalLM", {"vocab_size": 90, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Mistral": ("MistralForCausalLM", LLAMA),
    "Qwen2": ("Qwen2ForCausalLM", LLAMA),
    "Qwen3": ("Qwen3ForCausalLM", LLAMA),
    "Gemma 2": ("Gemma2ForCausalLM", LLAMA),
    "Gemma 3": ("Gemma3ForCausalLM", LLAMA),
    "Phi": ("PhiForCausalLM", BERT),
    "Mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 3}),
}

BERT_LAYERS = {
    "attention": ["encoder.layer.N.attention.{self.query,self.key,self.value,output.dense}"],
    "feed-forward": ["encoder.layer.N.{intermediate,output}.dense"],
}
LLAMA_GROUPS = {
    "attention": ["model.layers.N.self_attn.{q,k,v,o}_proj"],
    "feed-forward": ["model.layers.N.mlp.{gate,up,down}_proj"],
    "final": ["lm_head"],
}
NEOX_GROUPS = {
    "attention": ["gpt_neox.layers.N.attention.{query_key_value,dense}"],
    "feed-forward": ["gpt_neox.layers.N.mlp.{dense_h_to_4h,dense_4h_to_h}"],
    "final": ["lm_head"],
}


def add_prefix(prefix: str, groups: dict[str, list[str]], **others: list[str]) -> dict[str, list[str]]:
    return {group: [f"{prefix}.{name}" for name in names] for group, names in groups.items()} | others


def list_t5_groups(feed_forward: str) -> dict[str, list[str]]:
    return {
        "attention": [
            "encoder.block.N.layer.N.SelfAttention.{q,k,v,o}",
            "decoder.block.N.layer.N.{SelfAttention,EncDecAttention}.{q,k,v,o}",
        ],
        "feed-forward": [f"{{encoder,decoder}}.block.N.layer.N.DenseReluDense.{{{feed_forward},wo}}"],
        "final": ["lm_head"],
    }


PREDICTIONS = {"other": ["cls.predictions.transform.dense"], "final": ["cls.predictions.decoder"]}
EXPECTED: dict[str, dict[str, list[str]]] = {
    "BERT": add_prefix("bert", BERT_LAYERS, **PREDICTIONS),
    "BERT without a head": BERT_LAYERS | {"other": ["pooler.dense"]},
    "RoBERTa": add_prefix("roberta", BERT_LAYERS, other=["lm_head.dense"], final=["lm_head.decoder"]),
    "DistilBERT": {
        "attention": ["distilbert.transformer.layer.N.attention.{q,k,v,out}_lin"],
        "feed-forward": ["distilbert.transformer.layer.N.ffn.{lin1,lin2}"],
        "other": ["vocab_transform"],
        "final": ["vocab_projector"],
    },
    "ALBERT": {
        "attention": ["albert.encoder.albert_layer_groups.N.albert_layers.N.attention.{query,key,value,dense}"],
        "feed-forward": ["albert.encoder.albert_layer_groups.N.albert_layers.N.{ffn,ffn_output}"],
        "other": ["albert.encoder.embedding_hidden_mapping_in", "predictions.dense"],
        "final": ["predictions.decoder"],
    },
    "ELECTRA": add_prefix(
        "electra",
        BERT_LAYERS,
        other=["electra.embeddings_project", "generator_predictions.dense"],
        final=["generator_lm_head"],
    ),
    "DeBERTa": {
        "attention": ["deberta.encoder.layer.N.attention.{self.in_proj,self.pos_proj,self.pos_q_proj,output.dense}"],
        "feed-forward": ["deberta.encoder.layer.N.{intermediate,output}.dense"],
        **PREDICTIONS,
    },
    "DeBERTa v2": {
        "attention": [
            "deberta.encoder.layer.N.attention.self.{query,key,value,pos_key,pos_query}_proj",
            "deberta.encoder.layer.N.attention.output.dense",
        ],
        "feed-forward": ["deberta.encoder.layer.N.{intermediate,output}.dense"],
        **PREDICTIONS,
    },
    "ModernBERT": {
        "attention": ["model.layers.N.attn.{Wqkv,Wo}"],
        "feed-forward": ["model.layers.N.mlp.{Wi,Wo}"],
        "other": ["head.dense"],
        "final": ["decoder"],
    },
    "T5": list_t5_groups("wi"),
    "Flan-T5": list_t5_groups("wi_0,wi_1"),
    "BART": {
        "attention": [
            "model.encoder.layers.N.self_attn.{q,k,v,out}_proj",
            "model.decoder.layers.N.{self_attn,encoder_attn}.{q,k,v,out}_proj",
        ],
        "feed-forward": ["model.{encoder,decoder}.layers.N.{fc1,fc2}"],
        "final": ["lm_head"],
    },
    "GPT-2": {
        "attention": ["transformer.h.N.attn.{c_attn,c_proj}"],
        "feed-forward": ["transformer.h.N.mlp.{c_fc,c_proj}"],
        "final": ["lm_head"],
    },
    "GPT-NeoX": NEOX_GROUPS,
    "OPT": {
        "attention": ["model.decoder.layers.N.self_attn.{q,k,v,out}_proj"],
        "feed-forward": ["model.decoder.layers.N.{fc1,fc2}"],
        "other": ["model.decoder.{project_in,project_out}"],
        "final": ["lm_head"],
    },
    "BLOOM": {
        "attention": ["transformer.h.N.self_attention.{query_key_value,dense}"],
        "feed-forward": ["transformer.h.N.mlp.{dense_h_to_4h,dense_4h_to_h}"],
        "final": ["lm_head"],
    },
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3"), LLAMA_GROUPS),
    "Phi": {
        "attention": ["model.layers.N.self_attn.{q_proj,k_proj,v_proj,dense}"],
        "feed-forward": ["model.layers.N.mlp.{fc1,fc2}"],
        "final": ["lm_head"],
    },
    "Mixtral": LLAMA_GROUPS | {"feed-forward": ["model.layers.N.mlp.experts.{gate_up_proj,down_proj}"]},
}


def expand(pattern: str) -> list[str]:
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [name for choice in braces.group(1).split(",") for name in expand(before + choice + after)]


def build(name: str, module_map: ModuleMap = "structural", **settings: Any) -> Structure:
    architecture, config = CONFIGS[name]
    return build_class(architecture, module_map, **config | settings)


def build_class(architecture: str, module_map: ModuleMap = "structural", **config: Any) -> Structure:
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {architecture} yet")
    with torch.device("meta"):
        return read_structure(model_class(model_class.config_class(**config)), module_map)


def map_names_to_groups(structure: Structure) -> dict[str, str | None]:
    """Return the group of each module or stack of experts, by its name with N for every number."""
    names = {w.parameter if w.kind == "experts" else w.module: w.group for w in structure.linears}
    return {re.sub(r"(?<=\.)\d+(?=\.)", "N", name): group for name, group in names.items()}


def index_by_module(structure: Structure) -> dict[str, LinearWeight]:
    return {weight.module: weight for weight in structure.linears}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_layer_is_in_its_group(name: str) -> None:
    expected = {m: group for group, patterns in EXPECTED[name].items() for pattern in patterns for m in expand(pattern)}
    structure = build(name)
    assert map_names_to_groups(structure) == expected
    assert structure.opaque == {}


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "ELECTRA"])
def test_the_papers_map_moves_the_attention_output_to_feed_forward(name: str) -> None:
    structural, paper = index_by_module(build(name)), index_by_module(build(name, "paper"))
    moved = {module for module in structural if structural[module].group != paper[module].group}
    assert moved == {m for m in structural if m.endswith("attention.output.dense")}
    assert {paper[module].group for module in moved} == {"feed-forward"}


@pytest.mark.parametrize("name", ["DistilBERT", "ALBERT", "DeBERTa v2", "T5", "GPT-2", "Llama"])
def test_the_papers_map_changes_nothing_in_other_architectures(name: str) -> None:
    assert build(name, "paper").linears == build(name).linears


def test_layers_are_numbered_within_their_stack() -> None:
    weights = index_by_module(build("T5", num_layers=3, num_decoder_layers=2))
    assert {w.layer for w in weights.values() if w.stack == "encoder"} == {0, 1, 2}
    assert {w.layer for w in weights.values() if w.stack == "decoder"} == {0, 1}
    assert weights["lm_head"].layer is None
    assert weights["lm_head"].stack is None


def test_layers_of_a_single_stack_have_no_stack_name() -> None:
    for name in ("BERT", "OPT", "GPT-2"):
        assert {weight.stack for weight in build(name).linears} == {None}


@pytest.mark.parametrize(("name", "attribute"), [("T5", "EncDecAttention"), ("BART", "encoder_attn")])
def test_cross_attention_is_recognized(name: str, attribute: str) -> None:
    for weight in build(name).linears:
        assert weight.cross == (attribute in weight.module)


def test_cross_attention_is_recognized_by_its_class_too() -> None:
    name = "Pix2StructForConditionalGeneration"
    with torch.device("meta"):
        structure = read_structure(getattr(transformers, name)(tiny_config("pix2struct", name)))
    crossing = [weight.module for weight in structure.linears if weight.cross]
    assert crossing == [w.module for w in structure.linears if ".encoder_decoder_attention." in w.module] != []


def test_cross_attention_of_a_bert_decoder_is_recognized_in_the_papers_map() -> None:
    structure = build("BERT", "paper", is_decoder=True, add_cross_attention=True)
    weights = index_by_module(structure)
    assert weights["bert.encoder.layer.0.crossattention.self.query"].cross
    assert weights["bert.encoder.layer.0.crossattention.output.dense"].group == "feed-forward"
    assert not weights["bert.encoder.layer.0.crossattention.output.dense"].cross


def test_a_combination_of_two_models_has_an_encoder_and_a_decoder() -> None:
    encoder, decoder = (transformers.BertConfig(**BERT) for _ in range(2))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    with torch.device("meta"):
        structure = read_structure(transformers.EncoderDecoderModel(config))
    weights = index_by_module(structure)
    assert weights["encoder.encoder.layer.1.attention.self.key"].stack == "encoder"
    assert weights["decoder.bert.encoder.layer.1.attention.self.key"].stack == "decoder"
    assert weights["decoder.bert.encoder.layer.0.crossattention.self.key"].cross
    assert [w.module for w in structure.linears if w.group == "final"] == ["decoder.cls.predictions.decoder"]


def test_kinds_and_shapes_of_weights_are_recognized() -> None:
    assert {(w.kind, w.transposed) for w in build("BERT").linears} == {("linear", False)}
    assert {(w.kind, w.transposed) for w in build("GPT-2").linears if w.group != "final"} == {("conv1d", True)}
    experts = [w for w in build("Mixtral").linears if w.kind == "experts"]
    assert {w.shape for w in experts} == {(3, 48, 16), (3, 16, 24)}
    assert not any(w.transposed for w in experts)
    transposed = build_class("GptOssForCausalLM", **LLAMA, num_local_experts=3, num_experts_per_tok=2)
    assert [w.shape for w in transposed.linears if w.transposed][:2] == [(3, 16, 48), (3, 24, 16)]
    transposed = build_class("Llama4ForCausalLM", **LLAMA, num_local_experts=3, intermediate_size_mlp=24)
    assert [w.shape for w in transposed.linears if w.transposed][:2] == [(3, 16, 48), (3, 24, 16)]


@pytest.mark.parametrize("tied", [True, False])
def test_ties_follow_the_config(tied: bool) -> None:
    structure = build("Llama", tie_word_embeddings=tied)
    assert structure.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= structure.parameters.keys()


def test_of_two_tied_names_one_is_the_source_whichever_is_registered_first() -> None:
    structure = build_class("CamembertForMaskedLM", **BERT)
    embedding, head = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"
    assert list(structure.parameters).index(head) < list(structure.parameters).index(embedding)
    assert structure.tied == {head: embedding, "lm_head.decoder.bias": "lm_head.bias"}


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_uses_of_alberts_groups_of_layers_are_counted(groups: int) -> None:
    structure = build("ALBERT", num_hidden_layers=6, num_hidden_groups=groups)
    assert {w.uses for w in structure.linears if w.group == "attention"} == {6 // groups}
    assert {w.uses for w in structure.linears if w.group in ("other", "final")} == {1}
    assert {w.layer for w in structure.linears if w.layer is not None} == set(range(groups))


def test_uses_of_unequal_groups_of_albert_are_counted() -> None:
    structure = build("ALBERT", num_hidden_layers=5, num_hidden_groups=2)
    uses = {w.layer: w.uses for w in structure.linears if w.group == "attention"}
    assert uses == {0: 3, 1: 2}


def test_a_shared_block_appears_once_and_its_uses_are_counted() -> None:
    kinds = ["mamba", "hybrid", "mamba", "hybrid", "hybrid"]
    structure = build_class(
        "ZambaForCausalLM",
        **BERT | {"num_hidden_layers": 5, "num_key_value_heads": 2, "attention_hidden_size": 32, "pad_token_id": 0},
        layers_block_type=kinds,
        attention_head_dim=16,
        n_mamba_heads=2,
    )
    shared = [w for w in structure.linears if w.group == "attention"]
    assert {w.uses for w in shared} == {3}
    assert len(shared) == 4
    assert {w.layer for w in shared} == {1}
    assert {w.uses for w in structure.linears if ".mamba." in w.module} == {1}


def test_each_adapter_of_a_shared_block_is_used_once() -> None:
    structure = build_class(
        "Zamba2ForCausalLM",
        **BERT | {"num_hidden_layers": 3, "num_key_value_heads": 2, "attention_head_dim": 16, "pad_token_id": 0},
        layers_block_type=["mamba", "hybrid", "hybrid"],
        num_mem_blocks=1,
        n_mamba_heads=4,
        mamba_headdim=8,
        mamba_d_state=8,
        adapter_rank=4,
    )
    uses = {"adapter" in w.module: w.uses for w in structure.linears if w.group == "feed-forward"}
    assert uses == {True: 1, False: 2}


LOOPS: list[tuple[str, dict[str, Any], str, int]] = [
    ("FunnelForMaskedLM", {"block_sizes": [1, 1], "block_repeats": [1, 3]}, "funnel.encoder.blocks.1.0", 3),
    ("PerceiverForMaskedLM", {"num_blocks": 4, "num_self_attends_per_block": 1}, "perceiver.encoder.self_attends.0", 4),
    ("HrmTextForCausalLM", {"H_cycles": 2, "L_cycles": 3}, "model.L_module.layers.0", 6),
    ("HrmTextForCausalLM", {"H_cycles": 2, "L_cycles": 3}, "model.H_module.layers.0", 2),
    ("DoryForCausalLM", {"n_recurrent_loops": 5}, "model.layers.20", 5),
    ("DoryForCausalLM", {"n_recurrent_loops": 5}, "model.layers.0", 1),
]


@pytest.mark.parametrize(("architecture", "config", "block", "uses"), LOOPS)
def test_blocks_that_run_in_a_loop_count_once_per_turn(
    architecture: str, config: dict[str, Any], block: str, uses: int
) -> None:
    structure = build_class(architecture, **config)
    assert {w.uses for w in structure.linears if w.module.startswith(f"{block}.")} == {uses}


def test_xlnets_attention_matrices_are_opaque() -> None:
    structure = build_class("XLNetLMHeadModel", vocab_size=90, d_model=16, n_layer=1, n_head=2, d_inner=24)
    assert structure.opaque == {f"transformer.layer.0.rel_attn.{name}": "attention" for name in "qkvor"}
    assert {w.group for w in structure.linears} == {"feed-forward", "final"}


def test_a_layer_without_a_rule_stays_unplaced() -> None:
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
        model.bert.encoder.layer[0].unknown = torch.nn.Linear(16, 16)
    assert read_structure(model).unplaced == ("bert.encoder.layer.0.unknown",)


@pytest.mark.parametrize(
    ("model_type", "name", "tower", "between"),
    [
        # Idefics has a vision model that is a plain module, Idefics2 a projector of the class of a feed-forward block.
        ("idefics", "IdeficsForVisionText2Text", "model.vision_model.", ()),
        (
            "idefics2",
            "Idefics2ForConditionalGeneration",
            "model.vision_model.",
            ("model.connector.modality_projection.",),
        ),
        ("kosmos-2", "Kosmos2ForConditionalGeneration", "vision_model.", ("image_to_text_projection.",)),
    ],
)
def test_vision_towers_and_projectors_are_no_language_model_blocks(
    model_type: str, name: str, tower: str, between: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        structure = read_structure(getattr(transformers, name)(tiny_config(model_type, name)))
    tower_groups = {weight.group for weight in structure.linears if weight.module.startswith(tower)}
    projector_groups = {weight.group for weight in structure.linears if weight.module.startswith(between or "-")}
    assert tower_groups == {"vision"}
    assert projector_groups == ({"other"} if between else set())
    first = select(structure, ["attention", "feed-forward"], "prune", layers="0")
    assert not [weight.module for weight in first if weight.module.startswith((tower, *between))]
