"""The class that a model card names loads the architecture in transformers."""

from __future__ import annotations

import pytest
from transformers.models.auto import modeling_auto

from compressknow.pages.model_card import find_auto_class

MAPPINGS = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
ARCHITECTURES = sorted({(name, kind) for mapping in MAPPINGS.values() for kind, name in mapping.items()})


def test_class_loads_every_language_model_of_transformers() -> None:
    wrong = []
    for architecture, model_type in ARCHITECTURES:
        name = find_auto_class(architecture, model_type)
        if name != architecture and MAPPINGS[name].get(model_type) != architecture:
            wrong.append((architecture, model_type, name))
    assert not wrong


@pytest.mark.parametrize(
    ("architecture", "model_type", "expected"),
    [
        ("BertForMaskedLM", "bert", "AutoModelForMaskedLM"),
        ("LlamaForCausalLM", "llama", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "gpt2", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "t5", "AutoModelForSeq2SeqLM"),
        ("BartForConditionalGeneration", "bart", "AutoModelForSeq2SeqLM"),
        ("MarianMTModel", "marian", "AutoModelForSeq2SeqLM"),
        ("XLMWithLMHeadModel", "xlm", "XLMWithLMHeadModel"),
        ("BertForPreTraining", "bert", "BertForPreTraining"),
        ("Gemma3ForConditionalGeneration", "gemma3", "Gemma3ForConditionalGeneration"),
    ],
)
def test_class_by_architecture(architecture: str, model_type: str, expected: str) -> None:
    assert find_auto_class(architecture, model_type) == expected
