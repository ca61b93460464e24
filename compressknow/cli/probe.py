"""`compressknow probe`: evaluate one model on facts, and store its answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from compressknow.base.format import clean, count, share, write_percent
from compressknow.base.reading import group_by
from compressknow.cli import RESUMES, explain_interrupt
from compressknow.cli import options as opt
from compressknow.cli.report import describe_grades
from compressknow.cli.terminal import ProgressLines, pad, show, show_json, wrap
from compressknow.comparison.text import compute_perplexity
from compressknow.pages.as_json import dump_perplexity
from compressknow.pages.texts import write_measurement

if TYPE_CHECKING:
    from compressknow.evaluate.answers import Answers
    from compressknow.evaluate.records import Chunk, ProbeEntry

COLUMNS = f"{'Probe':<32}{'Facts':>10}{'Right':>10}{'Share':>10}{'Chance':>9}{'Dropped':>9}"


@opt.command()
@click.argument("model")
@opt.add_output_folder("Folder for the answers; a stopped run resumes.")
@opt.probe_options
@opt.server_options
@opt.option(
    "--reference",
    group=opt.EVALUATE,
    type=opt.FOLDER,
    help="Answers folder of the original, to measure how far the distributions moved.",
)
@opt.option("--overwrite", is_flag=True, help="Replace answers to other facts, or made with other settings.")
@opt.revision_option
@opt.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def probe(model: str, output: Path, probe: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Evaluate MODEL on facts, and store its answers in a folder.

    MODEL is a local folder, FOLDER/FILE.gguf, a Hub id or a server, http://HOST:PORT: a masked, causal or
    sequence-to-sequence language model. A stopped run resumes.

    \b
    compressknow probe MODEL -p atlas -o answers/original
    compressknow probe MODEL -p lama:trex --data DIR -o answers/original
    compressknow probe CONVERTED -o answers/converted --reference answers/original
    """
    from compressknow.api.probe import probe as run

    with explain_interrupt(RESUMES):
        answers = run(model, output, probe or None, on_progress=ProgressLines(), **options)
    if as_json:
        probes = {name: entry.to_dict() | _score(answers, name) for name, entry in answers.record.probes.items()}
        show_json(answers.record.to_dict() | {"probes": probes})
    else:
        show(*_build_page(answers, output))


def _build_page(answers: Answers, output: Path) -> Iterator[str]:
    from compressknow.evaluate.answers import GRADES
    from compressknow.evaluate.grades import merge_wordings
    from compressknow.pages.card.warnings import warn_of_changes

    answers = merge_wordings(answers)
    model = answers.record.model
    yield f"{clean(model.name)}: answers in {output}"
    for warning in warn_of_changes(model):
        yield from wrap(f"Warning: {warning}", indent="")
    yield from wrap(f"Computed on {clean(model.device, 80)} in {clean(model.computed_in, 40)}.", indent="")
    yield ""
    if len(answers.texts) < len(answers.probes):
        yield COLUMNS
        yield "-" * len(COLUMNS)
    for name, entry in answers.record.probes.items():
        if entry.text:
            continue
        facts = answers.of(name)
        right = sum(answer.correct for answer in facts)
        yield (
            f"{pad(name, 32)}{count(len(facts)):>10}{count(right):>10}{write_percent(right, len(facts)):>10}"
            f"{share(entry.chance):>9}{count(sum(entry.dropped.values())):>9}"
        )
        if entry.average == "macro":
            by_relation = group_by(facts, lambda answer: answer.relation).values()
            accuracy = fmean(fmean(answer.correct for answer in of_relation) for of_relation in by_relation)
            yield f"  {share(accuracy)} as the mean over relations, its headline figure"
        if grades := Counter(answer.grade for answer in facts if answer.grade):
            yield f"  {describe_grades({grade: grades[grade] for grade in GRADES})}"
        # More are read than a limit lets be evaluated.
        read = count(entry.facts * (entry.templates or 1))
        for reason, number in entry.dropped.items():
            yield from wrap(f"  {count(number)} of {read} read dropped: {reason}", indent="    ")
    for name, chunks in answers.texts.items():
        yield from wrap(_describe_text(name, chunks, answers.record.probes[name]))
    if len(answers.probes) == 1:
        yield from _list_domains(answers)


def _describe_text(name: str, chunks: Sequence[Chunk], entry: ProbeEntry) -> str:
    perplexity = compute_perplexity(chunks)
    bits, context = perplexity.bits_per_byte, (entry.text or {})["context"]
    per_byte = f", {write_measurement(bits, 4)} bits per byte" if bits else ""
    return (
        f"{clean(name, 31)}: perplexity {write_measurement(perplexity.value, 3)}{per_byte}; "
        f"{count(perplexity.tokens)} tokens scored in {count(len(chunks))} chunks of {count(context)}"
    )


def _list_domains(answers: Answers) -> Iterator[str]:
    subjects = group_by(answers.answers, lambda answer: answer.subject)
    if len(subjects) > 1:
        yield ""
        for subject, facts in sorted(subjects.items()):
            right = sum(answer.correct for answer in facts)
            share_right = write_percent(right, len(facts))
            yield f"{pad(subject, 32)}{count(len(facts)):>10}{count(right):>10}{share_right:>10}"


def _score(answers: Answers, name: str) -> dict[str, Any]:
    if chunks := answers.texts.get(name):
        return {"perplexity": dump_perplexity(compute_perplexity(chunks))}
    return {"right": sum(answer.correct for answer in answers.of(name))}
