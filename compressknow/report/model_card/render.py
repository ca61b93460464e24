"""The README.md of a converted checkpoint: what was done to it, what it cost, where it runs, how to load, verify and
repeat it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from compressknow.compress.recipe import to_toml
from compressknow.compress.runtimes import VLLM_ARCHITECTURES, runtimes, vllm_limit, vllm_obstacle
from compressknow.compress.schemes import known, word_of
from compressknow.format import count, number, percent, size
from compressknow.reading import CARD, read_text
from compressknow.report.pages import code_span, render

# What stays true of a model when it is compressed.
_CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
_FOLDER = "PATH/TO/THIS/FOLDER"
FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def model_card_for(manifest: Mapping[str, Any], source: Path) -> str:
    """The model card for a conversion of the checkpoint in the folder `source`, whose own card it draws on."""
    return render_model_card(manifest, source_card_metadata=read_card_metadata(source / "README.md"))


def read_card_metadata(card: Path) -> dict[str, Any]:
    """The front matter of a model card; empty where there is no card, no front matter, or it is no valid YAML."""
    try:
        match = FRONT_MATTER.match(read_text(card, CARD))
        metadata = yaml.safe_load(match.group(1)) if match else None
    except (OSError, ValueError, yaml.YAMLError):
        # A conversion must not fail for the sake of a card that its author broke.
        return {}
    return metadata if isinstance(metadata, dict) else {}


def render_model_card(manifest: Mapping[str, Any], *, source_card_metadata: dict[str, Any]) -> str:
    """The model card as Markdown with front matter for the Hub.

    Parameters
    ----------
    manifest : the content of compressknow.json.
    source_card_metadata : front matter of the source's own card; its licence, language and the like are carried over.
    """
    source, totals = manifest["source"], manifest["totals"]
    architecture, model_type = str(source["architecture"]), str(source["model_type"])
    schemes = _schemes(manifest)
    return render(
        "model_card.md.j2",
        metadata=_metadata(manifest, source_card_metadata, schemes),
        name=source["name"],
        revision=source.get("revision"),
        architecture=architecture,
        setup=manifest["setup"],
        version=manifest["versions"]["compressknow"],
        deeds=_deeds(totals, schemes),
        size_before=size(totals["bytes_before"]),
        size_after=size(totals["bytes_after"]),
        zeros_before=count(totals["zeros_before"]),
        zeros_after=count(totals["zeros_after"]),
        rows=_rows(manifest),
        pruned=totals["pruned"] > 0,
        quantized=bool(schemes),
        untied=[tie | {"size": size(tie["bytes"])} for tie in manifest.get("untied", [])],
        transformers_code=_transformers_code(architecture, model_type),
        word=word_of(known(schemes)),
        generate_needs_load=bool(schemes) and is_encoder_decoder(architecture, model_type),
        load_code=f'import compressknow\n\nmodel = compressknow.load("{_FOLDER}")',
        warnings=list(growth(manifest)),
        runs=where_it_runs(manifest),
        vllm=vllm_obstacle(manifest) is None,
        vllm_limit=vllm_limit(manifest),
        recipe=to_toml(manifest["recipe"]),
        command=_command(source),
    )


def _metadata(manifest: Mapping[str, Any], carried: dict[str, Any], schemes: set[str]) -> dict[str, Any]:
    metadata = {key: clean for key in _CARRIED_OVER if (clean := _clean(carried.get(key)))}
    metadata.setdefault("library_name", "transformers")
    if base := _base_model(manifest["source"], carried):
        metadata["base_model"] = base
        if schemes:
            metadata["base_model_relation"] = "quantized"
    pruned = manifest["totals"]["pruned"] > 0
    metadata["tags"] = [
        "compressknow",
        *(["pruning"] if pruned else []),
        *(["quantization", *sorted({s.word for s in known(schemes)}), "compressed-tensors"] if schemes else []),
    ]
    return metadata


def _base_model(source: dict[str, Any], carried: dict[str, Any]) -> str | list[str] | None:
    """The hub id that was converted or, for a local folder, the one that its own card names."""
    if source.get("revision"):
        return _clean(source["name"])
    return _clean(carried.get("base_model"))


def _clean(value: object) -> str | list[str] | None:
    """A text, or a list of texts, of one line each; None for all else that a foreign card may hold."""
    if isinstance(value, str):
        return " ".join(value.split()) or None
    if isinstance(value, list):
        return [" ".join(text.split()) for text in value if isinstance(text, str) and text.strip()] or None
    return None


def _schemes(manifest: Mapping[str, Any]) -> set[str]:
    return {str(tensor["scheme"]) for tensor in manifest["tensors"] if tensor.get("scheme")}


def _deeds(totals: dict[str, Any], schemes: set[str]) -> list[str]:
    """What was done, as the parts of a sentence."""
    deeds = []
    if totals["pruned"]:
        share = percent(totals["pruned"], totals["in_scope"])
        deeds.append(f"{count(totals['pruned'])} weights pruned ({share} of the {count(totals['in_scope'])} in scope)")
    if totals["quantized"]:
        names = ", ".join(code_span(scheme) for scheme in sorted(schemes))
        deeds.append(f"{count(totals['quantized'])} weights quantized to {_nouns(schemes)} (scheme {names})")
    return deeds or ["nothing changed"]


def _nouns(schemes: set[str]) -> str:
    nouns = sorted({scheme.noun for scheme in known(schemes)})
    return " and ".join(nouns) or "low-bit values"


def _rows(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    groups = {**manifest["groups"], "whole model": manifest["totals"]}
    return [
        {
            "group": group,
            "parameters": count(figures["parameters"]),
            "pruned": count(figures["pruned"]),
            "zeros": percent(figures["zeros_after"], figures["parameters"]),
            "quantized": percent(figures["quantized"], figures["parameters"]),
            "error": number(figures.get("relative_error"), 4),
            "before": size(figures["bytes_before"]),
            "after": size(figures["bytes_after"]),
        }
        for group, figures in groups.items()
        if figures["parameters"]
    ]


def _transformers_code(architecture: str, model_type: str) -> str:
    # The name comes from a config that anyone may have written, and goes into code that people paste.
    name = auto_class(architecture, model_type)
    name = name if name.isidentifier() and name.isascii() else "AutoModel"
    return (
        f"from transformers import {', '.join(sorted([name, 'AutoTokenizer']))}\n\n"
        f'model = {name}.from_pretrained("{_FOLDER}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{_FOLDER}")'
    )


def _command(source: dict[str, Any]) -> str:
    revision = ["--revision", str(source["revision"])] if source.get("revision") else []
    return shlex.join(["compressknow", "convert", str(source["name"]), "OUTPUT", "--recipe", "recipe.toml", *revision])


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


def where_it_runs(manifest: Mapping[str, Any]) -> str:
    """A sentence, or two where a decoder that vLLM knows does not run there."""
    limit, obstacle = vllm_limit(manifest), vllm_obstacle(manifest)
    told = f"Runs in {', '.join(runtimes(manifest))}{f' ({limit})' if limit else ''}."
    known = manifest["source"]["architecture"] in VLLM_ARCHITECTURES
    return f"{told} It does not run in vLLM: {obstacle}." if obstacle and known else told


def growth(manifest: Mapping[str, Any]) -> Iterator[str]:
    """That the output is larger than the input, and why; nothing where it is not."""
    before, after = (manifest["totals"][key] for key in ("bytes_before", "bytes_after"))
    if after <= before:
        return
    cause = (
        "the final layer no longer shares its weight with the embedding, so the matrix is stored twice. The scope "
        "`blocks` leaves it out"
        if manifest.get("untied")
        else f"the scales of its narrow layers take more than {word_of(known(_schemes(manifest)))} saves"
    )
    yield f"The output is larger than the input ({size(after)} against {size(before)}): {cause}."
