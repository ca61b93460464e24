"""Which transformers class loads an architecture, told from its name: the report starts without transformers."""

from __future__ import annotations

_TEXT_ENCODER_DECODERS = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus
    pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5""".split()
)
_BY_ENDING = (("ForMaskedLM", "AutoModelForMaskedLM"), ("ForCausalLM", "AutoModelForCausalLM"))


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
