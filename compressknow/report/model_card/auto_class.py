"""Which transformers class loads an architecture, told from its name: the report starts without transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_TEXT_ENCODER_DECODERS = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus
    pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5""".split()
)
_BY_ENDING = (("ForMaskedLM", "AutoModelForMaskedLM"), ("ForCausalLM", "AutoModelForCausalLM"))
_ENCODERS_THAT_CAN_DECODE = re.compile(
    r"bert|roformer|electra|prophetnet|bart|pegasus|blenderbot|marian|xlm|data2vec|ernie(?!\d)|mvp", re.IGNORECASE
)


def auto_class(architecture: str, model_type: str) -> str:
    """The Auto class for the architecture, or the architecture itself where no Auto class is sure to give it.

    >>> auto_class("BertForMaskedLM", "bert"), auto_class("T5ForConditionalGeneration", "t5")
    ('AutoModelForMaskedLM', 'AutoModelForSeq2SeqLM')
    """
    if is_encoder_decoder(architecture, model_type):
        return "AutoModelForSeq2SeqLM"
    if architecture.endswith("LMHeadModel") and not architecture.endswith("WithLMHeadModel"):
        return "AutoModelForCausalLM"
    return next((auto for ending, auto in _BY_ENDING if architecture.endswith(ending)), architecture)


def is_encoder_decoder(architecture: str, model_type: str) -> bool:
    """Whether it is a text-to-text model with an encoder of its own."""
    return model_type in _TEXT_ENCODER_DECODERS and architecture.endswith(("ForConditionalGeneration", "MTModel"))


def is_decoder_only(architecture: str, model_type: str) -> bool:
    """Whether it is a causal language model that an inference server would take."""
    return auto_class(architecture, model_type) == "AutoModelForCausalLM" and not _ENCODERS_THAT_CAN_DECODE.search(
        architecture
    )


def runtimes(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """What loads a converted checkpoint and computes what it says.

    vLLM takes symmetric 8-bit weights with 8-bit activations of decoder-only models, and has no int8 final layer.
    """
    source, schemes = manifest["source"], {row["scheme"] for row in manifest["tensors"] if row.get("scheme")}
    quantized_final = manifest["groups"].get("final", {}).get("quantized")
    served = is_decoder_only(str(source["architecture"]), str(source["model_type"]))
    vllm = served and schemes <= {"int8"} and not quantized_final
    return ("transformers", "compressknow", *(["vLLM"] if vllm else []))
