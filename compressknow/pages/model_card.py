"""Write model cards: for a conversion, for a GGUF file, and a report's results into an existing card."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from compressknow.base.errors import OutputError
from compressknow.base.files import write_whole
from compressknow.base.format import count, write_percent, write_two_sizes
from compressknow.base.reading import CARD as CARD_BYTES
from compressknow.base.reading import NotReadable, read_text
from compressknow.compress.recipe import to_toml
from compressknow.compress.schemes import (
    VLLM_ARCHITECTURES,
    choose_word,
    find_schemes,
    find_vllm_limit,
    find_vllm_obstacle,
    list_runtimes,
)
from compressknow.model.checkpoint import list_some, read_json
from compressknow.model.manifest import describe_calibration, describe_removed, summarize_calibration
from compressknow.pages.pages import render, to_code_span, to_yaml

if TYPE_CHECKING:
    from compressknow.evaluate.records import ModelRecord
    from compressknow.pages.records import Card, Comparison


# Metadata that stays true when a model is compressed.
_CARRIED_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_KEY = "model-index"
_REFILLED_SHARE = 0.01  # share of zeros that became non-zero above which a warning is given
_OURS = "knowledge-kept"  # the metric that distinguishes the results of an earlier report from the user's own


def make_model_card(manifest: Mapping[str, Any], source: Path) -> str:
    """Return the model card for a conversion of the checkpoint in the folder `source`, with metadata of its card."""
    # This imports torch, which a conversion has imported already.
    from compressknow.model.meta import needs_own_code, tokenizer_needs_own_code

    config = read_json(source / "config.json")
    auto_map = config["auto_map"] if needs_own_code(config, str(manifest["source"]["architecture"])) else None
    return render_model_card(
        manifest,
        source_card_metadata=read_card_metadata(source / "README.md"),
        auto_map=auto_map,
        tokenizer_has_code=bool(auto_map) or tokenizer_needs_own_code(source),
    )


def read_card_metadata(card: Path) -> dict[str, Any]:
    """Return the front matter of a model card; empty if there is none, or it is not valid YAML."""
    try:
        match = _FRONT_MATTER.match(read_text(card, CARD_BYTES))
        metadata = yaml.safe_load(match.group(1)) if match else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        # A conversion must not fail because its author's card is broken.
        return {}
    return metadata if isinstance(metadata, dict) else {}


def render_model_card(
    manifest: Mapping[str, Any],
    *,
    source_card_metadata: dict[str, Any],
    auto_map: Mapping[str, Any] | None = None,
    tokenizer_has_code: bool = False,
) -> str:
    """Return the model card as Markdown for the Hub, with the licence, language and so on of the source's; `auto_map`
    is the entry of its config.json if it loads only with the Python code in its repository."""
    source = manifest["source"]
    architecture, model_type = str(source["architecture"]), str(source["model_type"])
    # The name comes from an untrusted config, and goes into code that people paste.
    custom = (auto for auto, reference in (auto_map or {}).items() if str(reference).endswith(f".{architecture}"))
    name = next(custom, find_auto_class(architecture, model_type))
    auto_class = name if name.isidentifier() and name.isascii() else "AutoModel"
    schemes = _list_schemes(manifest)
    revision = ["--revision", str(source["revision"])] if source.get("revision") else []
    calibrated = list(describe_calibration(summarize_calibration(manifest)))
    # Calibration text goes through the tokenizer.
    trust = ["--trust-remote-code"] if auto_map or (calibrated and tokenizer_has_code) else []
    command = ["compressknow", "convert", str(source["name"]), "OUTPUT", "--recipe", "recipe.toml", *revision, *trust]
    return render(
        "model_card.md.j2",
        metadata=_make_metadata(manifest, source_card_metadata, schemes),
        manifest=manifest,
        groups={**manifest["groups"], "whole model": manifest["totals"]},
        changes=_list_changes(manifest, schemes),
        removed=" ".join(describe_removed(manifest.get("removed"))),
        quantized=bool(schemes),
        auto_class=auto_class,
        model_has_code=bool(auto_map),
        tokenizer_has_code=tokenizer_has_code,
        word=choose_word(find_schemes(schemes)),
        generate_needs_load=has_packed_encoder(manifest),
        warnings=list(list_warnings(manifest)),
        runs=describe_runtimes(manifest),
        vllm=find_vllm_obstacle(manifest) is None,
        vllm_limit=find_vllm_limit(manifest),
        calibrated=calibrated,
        recipe=to_toml(manifest["recipe"]),
        command=shlex.join(command),
    )


def _make_metadata(manifest: Mapping[str, Any], carried: dict[str, Any], schemes: set[str]) -> dict[str, Any]:
    metadata = {key: clean for key in _CARRIED_OVER if (clean := _clean(carried.get(key)))}
    metadata.setdefault("library_name", "transformers")
    source = manifest["source"]
    # A local folder has no Hub id, but its card may name one.
    if base := _clean(source["name"] if source.get("revision") else carried.get("base_model")):
        metadata["base_model"] = base
        if schemes:
            metadata["base_model_relation"] = "quantized"
    pruned = manifest["totals"]["pruned"] > 0 or "removed" in manifest
    metadata["tags"] = [
        "compressknow",
        *(["pruning"] if pruned else []),
        *(["quantization", *sorted({s.word for s in find_schemes(schemes)}), "compressed-tensors"] if schemes else []),
    ]
    return metadata


def _clean(value: object) -> str | list[str] | None:
    """Return a string or a list of strings, each on one line; None for anything else that a card may contain."""
    if isinstance(value, str):
        return " ".join(value.split()) or None
    if isinstance(value, list):
        return [" ".join(text.split()) for text in value if isinstance(text, str) and text.strip()] or None
    return None


def _list_schemes(manifest: Mapping[str, Any]) -> set[str]:
    return {str(tensor["scheme"]) for tensor in manifest["tensors"] if tensor.get("scheme")}


def _list_changes(manifest: Mapping[str, Any], schemes: set[str]) -> list[str]:
    """Return what was done, as the parts of a sentence."""
    changes, totals = [], manifest["totals"]
    if removed := manifest.get("removed"):
        changes.append(f"{count(removed['parameters'])} parameters left out")
    if totals["pruned"]:
        pruned, in_scope = totals["pruned"], totals["in_scope"]
        share = write_percent(pruned, in_scope)
        changes.append(f"{count(pruned)} weights pruned ({share} of the {count(in_scope)} in scope)")
    if totals["quantized"]:
        names = ", ".join(to_code_span(scheme) for scheme in sorted(schemes))
        nouns = " and ".join(sorted({scheme.noun for scheme in find_schemes(schemes)})) or "low-bit values"
        changes.append(f"{count(totals['quantized'])} weights quantized to {nouns} (scheme {names})")
    return changes or ["nothing changed"]


_TEXT_ENCODER_DECODERS = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus
    pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 umt5""".split()
)


def find_auto_class(architecture: str, model_type: str) -> str:
    """Return the Auto class for the architecture, or the architecture itself if no Auto class is certain to load it.

    >>> find_auto_class("BertForMaskedLM", "bert"), find_auto_class("T5ForConditionalGeneration", "t5")
    ('AutoModelForMaskedLM', 'AutoModelForSeq2SeqLM')
    """
    if model_type in _TEXT_ENCODER_DECODERS and architecture.endswith(("ForConditionalGeneration", "MTModel")):
        return "AutoModelForSeq2SeqLM"
    if architecture.endswith("ForMaskedLM"):
        return "AutoModelForMaskedLM"
    is_causal = architecture.endswith(("ForCausalLM", "LMHeadModel")) and not architecture.endswith("WithLMHeadModel")
    return "AutoModelForCausalLM" if is_causal else architecture


def describe_runtimes(manifest: Mapping[str, Any]) -> str:
    """Say where the output runs and, if vLLM supports the decoder, why it does not run there."""
    limit, obstacle = find_vllm_limit(manifest), find_vllm_obstacle(manifest)
    text = f"Runs in {', '.join(list_runtimes(manifest))}{f' ({limit})' if limit else ''}."
    is_supported = manifest["source"]["architecture"] in VLLM_ARCHITECTURES
    return f"{text} It does not run in vLLM: {obstacle}." if obstacle and is_supported else text


def has_packed_encoder(manifest: Mapping[str, Any]) -> bool:
    """Return whether `generate` fails after plain `from_pretrained`: it calls the encoder without unpacking it."""
    source = manifest["source"]
    generates = find_auto_class(source["architecture"], source["model_type"]) == "AutoModelForSeq2SeqLM"
    in_encoder = (row["scheme"] and "encoder" in row["name"].split(".") for row in manifest["tensors"])
    return generates and any(in_encoder) and not manifest.get("unpacked")


def list_warnings(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield what to know before using the output."""
    totals = manifest["totals"]
    before, after = totals["bytes_before"], totals["bytes_after"]
    if after > before:
        cause = (
            "the final layer no longer shares its weight with the embedding, so the matrix is stored twice. The scope "
            "`blocks` excludes it"
            if manifest.get("untied")
            else "the scales of its narrow layers take more than "
            f"{choose_word(find_schemes(_list_schemes(manifest)))} saves"
        )
        larger, smaller = write_two_sizes(after, before)
        yield f"The output is larger than the input ({larger} against {smaller}): {cause}."
    # A dry run does not count zeros.
    if totals["pruned"] and totals.get("zeros_after", -1) == totals.get("zeros_before"):
        yield f"All {count(totals['pruned'])} pruned weights were zero already: pruning changed nothing."
    if unused := manifest.get("unused", []):
        tensors, are = ("A tensor has", "is") if len(unused) == 1 else (f"{len(unused)} tensors have", "are")
        architecture = manifest["source"]["architecture"]
        yield f"{tensors} no place in {architecture} and {are} copied unchanged: {list_some(unused)}."
    refilled = [row for row in manifest["tensors"] if row.get("refilled")]
    if rows := [row for row in refilled if row["refilled"] >= _REFILLED_SHARE * row["numel"]]:
        again, zeros = (count(sum(row[key] for row in rows)) for key in ("refilled", "zeros_before"))
        yield (
            f"The source is pruned, and {again} of {zeros} zeros became non-zero again in "
            f"{list_some([row['name'] for row in rows])}, which dropping neurons refits. A pattern such as 2:4 is "
            "lost there unless this recipe prunes to it again."
        )


def check_metadata(front_matter: str) -> dict[str, Any]:
    """Return the metadata. Raises OutputError if it cannot be read."""
    try:
        metadata = yaml.safe_load(front_matter)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise OutputError(
            "the model card's metadata is not valid YAML and would be lost.",
            why=str(error).splitlines()[0],
            hint="Correct the text between the --- lines.",
        ) from error
    if metadata is None:
        return {}
    index = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not (index is None or _is_index(index)):
        raise OutputError(
            "the model card's metadata is not in the form that the Hub reads and would be lost.",
            hint="Correct the text between the --- lines: keys and values; `model-index` is a list of models.",
        )
    return metadata


def add_results(front_matter: str, comparison: Comparison) -> str:
    """Return the front matter with the comparison's results, which replace those of an earlier report."""
    metadata = check_metadata(front_matter)
    index = _merge_results(metadata.get(_KEY) or [], comparison)
    added = to_yaml({_KEY: index}) if index else ""
    others = _cut_index(front_matter, metadata)
    return f"{others.rstrip()}\n{added}" if others.strip() else added


def _cut_index(front_matter: str, metadata: Mapping[str, Any]) -> str:
    """Return the text without its results. The user's text and comments stay, except if it is all in braces."""
    node = yaml.compose(front_matter, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        return front_matter
    if node.flow_style:
        return to_yaml({key: value for key, value in metadata.items() if key != _KEY})
    keys = [key for key, _ in node.value]
    at = next((number for number, key in enumerate(keys) if key.value == _KEY), None)
    if at is None:
        return front_matter
    lines = front_matter.splitlines(keepends=True)
    start = keys[at].start_mark.line
    end = keys[at + 1].start_mark.line if at + 1 < len(keys) else len(lines)
    # Comments before the next key belong to that key.
    while end > start + 1 and (lines[end - 1].startswith("#") or not lines[end - 1].strip()):
        end -= 1
    return "".join(lines[:start] + lines[end:])


def _merge_results(index: list[dict[str, Any]], comparison: Comparison) -> list[dict[str, Any]]:
    """Return the user's results, with accuracy and knowledge kept for each probe that the original knew."""
    # A conversion writes a card too, and needs no numpy.
    from compressknow.pages.parts import get_headline_accuracy

    task = "text-generation" if comparison.model.family != "masked" else "fill-mask"
    ours: list[dict[str, Any]] = []
    for probe in comparison.probes:
        # Without this metric, a later report could not distinguish this result from the user's.
        if probe.kept.value is not None:
            over = ", mean over relations" if probe.average == "macro" else ""
            metrics = [
                {"type": "accuracy", "value": get_headline_accuracy(probe)[1].value, "name": f"accuracy{over}"},
                {"type": _OURS, "value": probe.kept.value, "name": "knowledge kept"},
            ]
            dataset = {"name": probe.probe, "type": probe.probe.partition(":")[0]}
            ours.append({"task": {"type": task}, "dataset": dataset, "metrics": metrics})

    def is_ours(result: Mapping[str, Any]) -> bool:
        return any(metric.get("type") == _OURS for metric in result["metrics"])

    others = [model | {"results": [r for r in model["results"] if not is_ours(r)]} for model in index]
    others = [model for model in others if model["results"]]
    if not others:
        return [{"name": comparison.model.name, "results": ours}] if ours else []
    # The Hub reads one model per card; keep the user's name for it.
    others[0]["results"] += ours
    return others


def _is_index(value: Any) -> bool:
    """Return whether this is a list of models that have results with metrics."""
    try:
        return all(isinstance(m, dict) for model in value for r in model["results"] for m in r["metrics"])
    except (TypeError, KeyError):
        return False


CARD = "README.md"
# The text between these lines is rewritten each time; the rest of the card is the user's.
BEGIN, END = "<!-- compressknow report: begin -->", "<!-- compressknow report: end -->"
# From the last BEGIN line: a user may have deleted an END line before it.
_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_NOT_MEASURED = "What the model forgot by this has not been measured here.\n"


def check_model_cards(models: Sequence[str | Path]) -> None:
    """Raise OutputError, before any work, if a model is not a folder or its card cannot be rewritten without loss."""
    for model in models:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise OutputError(
                f"{model} is not a checkpoint folder, so it has no model card to write into.",
                hint="With --into-model-card, each COMPRESSED must be a local checkpoint folder.",
            )
        with _name_errors(folder / CARD):
            head, _ = _split(_read(folder / CARD))
            check_metadata(head)


def write_into_model_cards(card: Card, models: Sequence[str | Path]) -> None:
    """Write each comparison of `card` into the README.md of its model's folder, in the order of `models`."""
    for comparison, model in zip(card.comparisons, models, strict=True):
        path = Path(model) / CARD
        with _name_errors(path):
            text = add_report(_read(path), card.original, comparison)
        write_whole(path, text.encode("utf-8"))


def add_report(text: str, original: ModelRecord, comparison: Comparison) -> str:
    """Return a model card with the report and its results. Raises OutputError if its metadata cannot be read."""
    from compressknow.pages.records import write_estimate

    report = render("model_card_report.md.j2", original=original, comparison=comparison, write_estimate=write_estimate)
    # A name that contains the END line would cut the section short when it is replaced.
    inner = report.replace("<!--", "<\u200b!--")
    section = f"{BEGIN}\n{inner}{END}"
    head, body = _split(text)
    body = body.lstrip("\n").replace(_NOT_MEASURED, "")
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: section, body, count=1)
    else:
        body = f"{body.rstrip()}\n\n{section}\n" if body.strip() else f"{section}\n"
    metadata = add_results(head, comparison)
    return f"---\n{metadata}---\n\n{body}" if metadata else body


def _split(text: str) -> tuple[str, str]:
    """Return the card's front matter, without its fences, and the rest."""
    match = _FRONT_MATTER.match(text)
    return (match.group(1), text[match.end() :]) if match else ("", text)


@contextmanager
def _name_errors(path: Path) -> Iterator[None]:
    """Add the file's path to an error about a card."""
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{path}: {error.what}", why=error.why, hint=error.hint) from error


def _read(path: Path) -> str:
    try:
        return read_text(path, CARD_BYTES) if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise OutputError("the model card is not UTF-8 text.", why=str(error), hint="Save it as UTF-8.") from error
    except NotReadable as error:
        raise OutputError(f"the model card cannot be read: {error}.") from error


def render_gguf_card(record: Mapping[str, Any], file: str) -> str:
    """Return the card of a GGUF file as Markdown with front matter for the Hub; `record` is its ``FILE.gguf.json``."""
    source = record["source"]
    base = {"base_model": str(source["name"]), "base_model_relation": "quantized"} if source.get("revision") else {}
    return render(
        "gguf_card.md.j2",
        metadata={**base, "tags": ["compressknow", "gguf"]},
        record=record,
        file=file,
        quoted=shlex.quote(file),
    )
