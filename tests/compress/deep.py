"""Tiny models of four blocks a stack, for tests of what is left out; and the same cut by hand, in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

from tests.models import _BART, _BERT, _DISTILBERT, _GPT2, _LLAMA, _OPT, _T5

DEPTH = 4
_DEEP = {"num_hidden_layers": DEPTH}
_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_WINDOW = {"layer_types": _TYPES, "sliding_window": 4, "head_dim": 8}
_NEOX = {key: value for key, value in _LLAMA.items() if "value" not in key}
_T5_DEEP = {**_T5, "num_layers": DEPTH, "num_decoder_layers": DEPTH}
_T5_OTHER = {**_T5, "num_layers": 3, "num_decoder_layers": DEPTH, "feed_forward_proj": "gated-gelu"}

Builder = Callable[[], PreTrainedModel]
BUILDERS: dict[str, Builder] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT | _DEEP)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_BERT | _DEEP)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**_DISTILBERT | {"n_layers": DEPTH})),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_BERT | _DEEP, embedding_size=16)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            **_BERT | _DEEP, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5_DEEP)),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**_T5_OTHER)),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**_BART | {"encoder_layers": 3, "decoder_layers": DEPTH, "decoder_ffn_dim": 64})
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2 | {"n_layer": DEPTH})),
    # All its blocks have one activation.
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**_GPT2 | {"n_layer": DEPTH})),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_NEOX | _DEEP)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT | _DEEP)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA | _DEEP)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA | _DEEP, sliding_window=4)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA | _DEEP, use_sliding_window=True, **_without_head())),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA | _DEEP, head_dim=8)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_LLAMA | _DEEP, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA | _DEEP | _WINDOW)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_LLAMA | _DEEP | _WINDOW)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_LLAMA | _DEEP)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA | _DEEP, pad_token_id=0)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA | _DEEP, num_local_experts=4)),
}
# Where the blocks of each stack hang.
STACKS = {
    "bert": ("bert.encoder.layer",),
    "roberta": ("roberta.encoder.layer",),
    "distilbert": ("distilbert.transformer.layer",),
    "electra": ("electra.encoder.layer",),
    "modernbert": ("model.layers",),
    "t5": ("encoder.block", "decoder.block"),
    "mt5": ("encoder.block", "decoder.block"),
    "bart": ("model.encoder.layers", "model.decoder.layers"),
    "gpt2": ("transformer.h",),
    "openai-gpt": ("transformer.h",),
    "gpt-neox": ("gpt_neox.layers",),
    "opt": ("model.decoder.layers",),
}


def _without_head() -> dict[str, object]:
    return {key: value for key, value in _WINDOW.items() if key != "head_dim"}


@cache
def deep(name: str) -> PreTrainedModel:
    """A model in eval mode; its biases and norms are random too, so that a lost one shows. Do not change it."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_deep(name: str, folder: Path, **options: object) -> Path:
    """The model as a checkpoint, by transformers' own save_pretrained."""
    deep(name).save_pretrained(folder, **options)
    return folder


def without_blocks(name: str, dropped: dict[str, Sequence[int]]) -> PreTrainedModel:
    """A model with blocks taken out of its lists of modules, by the list's name."""
    model = copy.deepcopy(deep(name))
    for module in model.modules():
        if hasattr(module, "config"):
            # A cache has a place for each block, by the number that it had before.
            module.config.use_cache = False
    for stack, numbers in dropped.items():
        parent, _, attribute = stack.rpartition(".")
        blocks = model.get_submodule(stack)
        kept = [i for i in range(len(blocks)) if i not in numbers]
        if hasattr(getattr(blocks[0], "layer", [None])[0], "SelfAttention") and 0 in numbers:
            first, old = blocks[kept[0]].layer[0].SelfAttention, blocks[0].layer[0].SelfAttention
            first.relative_attention_bias, first.has_relative_attention_bias = old.relative_attention_bias, True
        setattr(model.get_submodule(parent), attribute, nn.ModuleList([blocks[i] for i in kept]))
        for part in (model.config, getattr(model.get_submodule(parent), "config", model.config)):
            if len(types := getattr(part, "layer_types", None) or ()) == len(blocks):
                part.layer_types = [types[i] for i in kept]
            # What loops over the blocks may count them by the config.
            if getattr(part, "num_hidden_layers", None) == len(blocks):
                part.num_hidden_layers = len(kept)
    return model
