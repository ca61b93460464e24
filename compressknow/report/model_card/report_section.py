"""The verdict and the report card in a converted checkpoint's own README.md, with the Hub's evaluation metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from compressknow.errors import OutputError
from compressknow.files import write_whole
from compressknow.format import count, estimate, size
from compressknow.reading import CARD as CARD_BYTES
from compressknow.reading import NotReadable, read_text
from compressknow.report.model_card.render import FRONT_MATTER
from compressknow.report.pages import render, yaml_text
from compressknow.report.records import Card, Comparison, ModelFacts
from compressknow.stats.records import Estimate

KEY = "model-index"
# The metric by which results of an earlier report are told from the user's own.
_OURS = "knowledge-kept"


def check_metadata(front_matter: str) -> dict[str, Any]:
    """The metadata. Raises OutputError where it cannot be read."""
    try:
        metadata = yaml.safe_load(front_matter)
    except (yaml.YAMLError, ValueError) as error:
        raise OutputError(
            "the model card's metadata is no valid YAML, and would be lost.",
            why=str(error).splitlines()[0],
            hint="Correct the text between the --- lines.",
        ) from error
    if metadata is None:
        return {}
    index = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not (index is None or _is_index(index)):
        raise OutputError(
            "the model card's metadata is not of the form that the Hub reads, and would be lost.",
            hint="Correct the text between the --- lines: keys and values; `model-index` is a list of models.",
        )
    return metadata


def with_results(front_matter: str, comparison: Comparison) -> str:
    """The front matter with the comparison's results in it, in place of those of an earlier report."""
    metadata = check_metadata(front_matter)
    results = {KEY: _merged(metadata.get(KEY) or [], comparison)}
    added = yaml_text(results)
    kept = _without_index(front_matter)
    if kept is None:
        rest = {key: value for key, value in metadata.items() if key != KEY}
        kept = yaml_text(rest)
    return f"{kept.rstrip()}\n{added}" if kept.strip() else added


def _without_index(front_matter: str) -> str | None:
    """The text less its results: what the user wrote stays as written, comments too. None where it is in braces."""
    node = yaml.compose(front_matter, Loader=yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode):
        return front_matter
    if node.flow_style:
        return None
    keys = [key for key, _ in node.value]
    at = next((number for number, key in enumerate(keys) if key.value == KEY), None)
    if at is None:
        return front_matter
    lines = front_matter.splitlines(keepends=True)
    start = keys[at].start_mark.line
    end = keys[at + 1].start_mark.line if at + 1 < len(keys) else len(lines)
    # Comments that stand before the next key belong to that.
    while end > start + 1 and (lines[end - 1].startswith("#") or not lines[end - 1].strip()):
        end -= 1
    return "".join(lines[:start] + lines[end:])


def _merged(index: list[dict[str, Any]], comparison: Comparison) -> list[dict[str, Any]]:
    """The user's own results, and beside them the comparison's."""
    kept = [model | {"results": [r for r in model["results"] if not _is_ours(r)]} for model in index]
    kept = [model for model in kept if model["results"]]
    ours, name = _results(comparison), comparison.model.name
    if kept:
        # The Hub knows one model a card: its name is the user's.
        kept[0]["results"] += ours
        return kept
    return [{"name": name, "results": ours}]


def _results(comparison: Comparison) -> list[dict[str, Any]]:
    """Of each probe the accuracy and the knowledge kept."""
    results = []
    for probe in comparison.probes:
        metrics = [
            {"type": "accuracy", "value": probe.accuracy_compressed.value, "name": "accuracy"},
            {"type": _OURS, "value": probe.kept.value, "name": "knowledge kept"},
        ]
        results.append(
            {
                "task": {"type": "text-generation" if comparison.model.family != "masked" else "fill-mask"},
                "dataset": {"name": probe.probe, "type": probe.probe.partition(":")[0]},
                "metrics": [metric for metric in metrics if metric["value"] is not None],
            }
        )
    return [result for result in results if result["metrics"]]


def _is_ours(result: Mapping[str, Any]) -> bool:
    return any(metric.get("type") == _OURS for metric in result["metrics"])


def _is_index(value: Any) -> bool:
    """Whether it is a list of models with results with metrics."""
    try:
        return all(isinstance(m, dict) for model in value for r in model["results"] for m in r["metrics"])
    except (TypeError, KeyError):
        return False


CARD = "README.md"
# What stands between these lines is written anew each time; the rest of the card is the user's.
BEGIN, END = "<!-- compressknow report: begin -->", "<!-- compressknow report: end -->"
# From the last line that begins one: a user may have deleted the line that ended another.
_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_NOT_MEASURED = "What the model forgot by this has not been measured here.\n"


def check_model_cards(models: Sequence[str | Path]) -> None:
    """Raise, before any work is done, where a model is no folder whose card could be written without loss."""
    for model in models:
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise OutputError(
                f"{model} is no checkpoint folder: there is no model card to write into.",
                hint="--into-model-card wants each COMPRESSED to be a local checkpoint folder.",
            )
        with _named(folder / CARD):
            _split(_read(folder / CARD))


def write_into_model_cards(card: Card, models: Sequence[str | Path]) -> None:
    """Write each comparison of `card` into the README.md of its model's folder, in the order of `models`."""
    for comparison, model in zip(card.comparisons, models, strict=True):
        path = Path(model) / CARD
        with _named(path):
            text = with_report(_read(path), card.original, comparison)
        write_whole(path, text.encode("utf-8"))


def with_report(text: str, original: ModelFacts, comparison: Comparison) -> str:
    """A model card with the report in it: its section replaced or added, its results in the metadata too.

    Raises OutputError where the card's metadata cannot be read: writing would lose it.
    """
    # The marks must not come from a name: it would cut the section short when it is replaced.
    inner = _section(original, comparison).replace("<!--", "<\u200b!--")
    section = f"{BEGIN}\n{inner}{END}"
    head, body = _split(text)
    body = body.lstrip("\n").replace(_NOT_MEASURED, "")
    if _SECTION.search(body):
        body = _SECTION.sub(lambda _: section, body, count=1)
    else:
        body = f"{body.rstrip()}\n\n{section}\n" if body.strip() else f"{section}\n"
    return f"---\n{with_results(head, comparison)}---\n\n{body}"


def _section(original: ModelFacts, comparison: Comparison) -> str:
    return render(
        "model_card_report.md.j2",
        verdict=comparison.verdict,
        grades=[
            {
                "subject": grade.subject,
                "known": count(grade.counts.known_before),
                "kept": _written(grade.kept),
                "grade": grade.range or grade.grade,
            }
            for grade in comparison.grades
        ],
        probes=[
            {
                "name": probe.probe,
                "facts": count(probe.counts.n),
                "before": _written(probe.accuracy_original),
                "after": _written(probe.accuracy_compressed),
            }
            for probe in comparison.probes
        ],
        original=original.name,
        sha256=original.sha256[:16],
        size_before=size(original.bytes),
        size_after=size(comparison.model.bytes),
        warnings=comparison.warnings,
    )


def _written(figure: Estimate) -> str:
    return estimate(figure.value, figure.low, figure.high)


def _split(text: str) -> tuple[str, str]:
    """The card's front matter, without its fences, and the rest."""
    match = FRONT_MATTER.match(text)
    head = match.group(1) if match else ""
    check_metadata(head)
    return head, text[match.end() :] if match else text


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of a card names its file."""
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{path}: {error.what}", why=error.why, hint=error.hint) from error


def _read(path: Path) -> str:
    try:
        return read_text(path, CARD_BYTES) if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise OutputError("the model card is no UTF-8 text.", why=str(error), hint="Save it as UTF-8.") from error
    except NotReadable as error:
        raise OutputError(f"the model card cannot be read: {error}.") from error
