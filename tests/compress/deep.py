"""Tiny models of four blocks a stack, for tests that drop blocks; and the same models cut by hand, in memory."""

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
_SLIDING = {"layer_types": _TYPES, "sliding_window": 4}
_WINDOW = {**_SLIDING, "head_dim": 8}
_NEOX = {key: value for key, value in _LLAMA.items() if "value" not in key}
_T5_DEEP = {**_T5, "num_layers": DEPTH, "num_decoder_layers": DEPTH}
_T5_UNEQUAL = {**_T5, "num_layers": 3, "num_decoder_layers": DEPTH, "feed_forward_proj": "gated-gelu"}

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
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**_T5_UNEQUAL)),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**_BART | {"encoder_layers": 3, "decoder_layers": DEPTH, "decoder_ffn_dim": 64})
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2 | {"n_layer": DEPTH})),
    # All its blocks share one activation module.
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**_GPT2 | {"n_layer": DEPTH})),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_NEOX | _DEEP)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT | _DEEP)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA | _DEEP)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA | _DEEP, sliding_window=4)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA | _DEEP, use_sliding_window=True, **_SLIDING)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA | _DEEP, head_dim=8)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_LLAMA | _DEEP, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA | _DEEP | _WINDOW)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_LLAMA | _DEEP | _WINDOW)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_LLAMA | _DEEP)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_LLAMA | _DEEP, pad_token_id=0)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA | _DEEP, num_local_experts=4)),
    # Its blocks are of two sizes.
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**_LLAMA | _DEEP, layer_types=["conv", "full_attention"] * 2, block_multiple_of=16)
    ),
}
# The module list of each stack's blocks.
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


@cache
def build_deep(name: str) -> PreTrainedModel:
    """Build a model in eval mode; biases and norms are random too, so that a lost one shows. Do not change it."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_deep(name: str, folder: Path, **options: object) -> Path:
    """Write the model as a checkpoint with `save_pretrained`."""
    build_deep(name).save_pretrained(folder, **options)
    return folder


def remove_blocks(name: str, dropped: dict[str, Sequence[int]]) -> PreTrainedModel:
    """Return a copy of a model without the numbered blocks of each module list."""
    model = copy.deepcopy(build_deep(name))
    for module in model.modules():
        if hasattr(module, "config"):
            # A cache is indexed by the numbers that the blocks had before.
            module.config.use_cache = False
    for stack, numbers in dropped.items():
        parent, _, attribute = stack.rpartition(".")
        blocks = model.get_submodule(stack)
        remaining = [i for i in range(len(blocks)) if i not in numbers]
        if hasattr(getattr(blocks[0], "layer", [None])[0], "SelfAttention") and 0 in numbers:
            first, old = blocks[remaining[0]].layer[0].SelfAttention, blocks[0].layer[0].SelfAttention
            first.relative_attention_bias, first.has_relative_attention_bias = old.relative_attention_bias, True
        setattr(model.get_submodule(parent), attribute, nn.ModuleList([blocks[i] for i in remaining]))
        for part in (model.config, getattr(model.get_submodule(parent), "config", model.config)):
            if len(types := getattr(part, "layer_types", None) or ()) == len(blocks):
                part.layer_types = [types[i] for i in remaining]
            # Some models loop over as many blocks as the config says.
            if getattr(part, "num_hidden_layers", None) == len(blocks):
                part.num_hidden_layers = len(remaining)
    return model
