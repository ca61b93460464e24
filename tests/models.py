"""Tiny models of real architectures, with random weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as hf
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compressknow.compress.convert import execute, make_calibration_text, prepare_plan
from compressknow.compress.manifest import Manifest
from compressknow.compress.output import NewFolder
from compressknow.compress.recipe import Recipe

# Before these releases, transformers cannot load a T5 in int4 or int8-weights.
_PACKED_T5 = {"transformers": "5.23", "compressed-tensors": "0.19"}
loads_packed_t5 = all(Version(version(name)) >= Version(lowest) for name, lowest in _PACKED_T5.items())
needs_packed_t5 = pytest.mark.skipif(not loads_packed_t5, reason=f"a T5 in int4 does not load before {_PACKED_T5}")

VOCABULARY = 99
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
}
_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": VOCABULARY}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 40}
_OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 24,
}

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_BERT)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_BERT)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(hf.DistilBertConfig(**_DISTILBERT)),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**_BERT, embedding_size=16)),
    "t5-gated": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "t5-tied": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_BART)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
    "llama-tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, head_dim=8)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(**{k: v for k, v in _LLAMA.items() if "value" not in k})
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT2)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_LLAMA, num_local_experts=4)),
}
# GPT-2 has Conv1D layers and Mixtral fused experts, which have no int8 form.
QUANTIZABLE = tuple(name for name in BUILDERS if name not in ("gpt2", "mixtral"))


@cache
def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model in eval mode, or return the one built before: do not change it.

    Biases and norms are random too, so that a lost one shows.
    """
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        if name == "t5-gated":
            # Like Flan-T5: untied, though its config says tied.
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight) * 0.2)
    return model


def tiny_of_groups(name: str) -> PreTrainedModel:
    """Build a tiny model whose feed-forward blocks are 64 wide instead of 48: groups of 32 divide all inputs."""
    with contextlib.ExitStack() as patches:
        for settings in (_BERT, _LLAMA, _T5, _BART, _DISTILBERT, _OPT):
            wider = {key: 64 for key, value in settings.items() if value == 48}
            patches.enter_context(patch.dict(settings, wider))
        return tiny.__wrapped__(name)


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    """Write a tiny model with transformers' save_pretrained."""
    source = tiny(name)
    model = BUILDERS[name]()
    if name == "t5-gated":
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    model.load_state_dict(source.state_dict())
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def convert(source: Path, output: Path, recipe: Recipe, *, threads: int | None = None) -> Manifest:
    """Convert a checkpoint into a new folder, without a card."""
    plan = prepare_plan(source, recipe)
    return execute(plan, NewFolder(output, plan.checkpoint), make_calibration_text(plan), threads=threads)


def load(folder: Path) -> PreTrainedModel:
    """Load a checkpoint with plain transformers; no tensor may be missing, unexpected or newly initialized."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(hf, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint with a single file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, *removed: str, **changes: Any) -> None:
    """Change and remove settings of a checkpoint's config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))


def put_into_hub_cache(source: Path, hub: Path, name: str) -> str:
    """Copy a checkpoint into a hub cache, laid out as by huggingface_hub, and return its commit."""
    repository, commit = hub / f"models--{name.replace('/', '--')}", "f" * 40
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in source.iterdir():
        (repository / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return commit


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits for a fixed batch of 2 x 12 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (2, 12), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7]
    with torch.no_grad():
        return model(**inputs).logits
