"""The verdict and the report card in a converted checkpoint's own README.md, with the Hub's evaluation metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compressknow.errors import OutputError
from compressknow.files import write_whole
from compressknow.reading import CARD as CARD_BYTES
from compressknow.reading import NotReadable, read_text
from compressknow.report.figures import count, estimate, size
from compressknow.report.model_card.model_index import check_metadata, with_results
from compressknow.report.model_card.render import FRONT_MATTER
from compressknow.report.records import Card, Comparison, Estimate, ModelFacts
from compressknow.report.templates import render

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
