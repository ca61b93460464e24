"""`compressknow report`: a report card of what compressed models know, compared with the original."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from compressknow.base.files import escape_name
from compressknow.base.format import clean, count, number, share, write_p_value, write_rate, write_size
from compressknow.cli import RESUMES, explain_interrupt, show_before_error
from compressknow.cli import options as opt
from compressknow.cli.terminal import ProgressLines, pad, show, show_json, show_written, wrap, wrap_whole
from compressknow.comparison.records import TextFigures
from compressknow.pages.records import Card, Comparison, label_models, write_estimate
from compressknow.pages.texts import summarize_text


@opt.command()
@click.argument("original")
@click.argument("compressed", nargs=-1, required=True)
@opt.add_output_files("Report file, repeatable: .html, .md, .json, .xml (JUnit).")
@opt.probe_options
@opt.server_options
@opt.known_option
@opt.option(
    "--fail-under", multiple=True, metavar="[NAME=]SHARE", help="Exit with 3 if less is kept: 0.95, science=85%."
)
@opt.strict_option
@opt.option("--early", is_flag=True, help="Evaluate only as many facts as --fail-under needs.", group=opt.EVALUATE)
@opt.option("--within", metavar="SIZE", help="Recommend no model larger than this: 110MB.")
@opt.no_facts_option
@opt.option("--time", group=opt.EVALUATE, is_flag=True, help="Measure each model's speed and memory too.")
@opt.option("--into-model-card", is_flag=True, help="Add the verdict to each COMPRESSED README.md.")
@opt.answers_option
@opt.option("--overwrite", is_flag=True, help="Replace report files that compressknow wrote.")
@opt.option("--revision", group=opt.RUNS, help="Branch, tag or commit of ORIGINAL on the Hub.")
@opt.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def report(
    original: str,
    compressed: tuple[str, ...],
    output: tuple[Path, ...],
    probe: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Evaluate ORIGINAL and each COMPRESSED model on the same facts, and report which are kept, lost and gained.

    Each is a local folder, FOLDER/FILE.gguf, a Hub id, a server (http://HOST:PORT), or an answers folder that `probe`
    wrote.

    \b
    compressknow report MODEL CONVERTED -o report.html
    compressknow report MODEL CONVERTED -p lama:trex --data DIR -o report.html
    compressknow report MODEL CONVERTED --fail-under 0.95 --early
    """
    from compressknow.api.report import report as run

    with explain_interrupt(RESUMES), show_before_error(lambda card: _show(card, output, as_json=as_json)):
        options |= {"command": get_command(), "on_progress": ProgressLines()}
        card = run(original, compressed, probe or None, output=output, **options)
    _show(card, output, as_json=as_json)


def _show(card: Card, output: tuple[Path, ...], *, as_json: bool) -> None:
    if as_json:
        show_json(card.to_dict())
        return
    show(*report_page(card))
    show_written(output)


def get_command() -> str:
    """Return the command for the user to repeat, with its arguments in the order of the help page."""
    ctx = click.get_current_context()
    return shlex.join(map(escape_name, ["compressknow", str(ctx.command.name), *list_arguments(ctx.params)]))


def list_arguments(names: Collection[str]) -> Iterator[str]:
    """Yield the words that set these parameters, in the order of the help page."""
    ctx = click.get_current_context()
    for parameter in ctx.command.params:
        # Options that are accepted but ignored have a source, but no value.
        if (name := str(parameter.name)) not in names or ctx.get_parameter_source(name) not in _SET:
            continue
        value = ctx.params[name]
        values = value if isinstance(value, tuple) else (value,)
        if isinstance(parameter, click.Argument):
            yield from map(str, values)
        elif isinstance(value, bool):
            yield from [parameter.opts[-1]] if value else []
        else:
            for each in values:
                yield from (parameter.opts[0], "=".join(each) if isinstance(each, tuple) else str(each))


# By the user, or by the project's file.
_SET = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP)
GRADES = f"{'Domain':<22}{'Known before':>14}{'Kept':>8}   {'Share kept (95 % interval)':<27}{'Grade':>6}"
MODELS = f"{'Model':<40}{'Size':>10}  {'Kept (95 % interval)':<28}"
SPEEDS = f"{'Speed and memory':<44}{'Facts/s':>11}{'Tokens/s':>11}{'Peak memory':>14}"


def report_page(card: Card) -> Iterator[str]:
    """Yield the lines: the verdict, the grades or, for several models, one line each; then the warnings."""
    yield from wrap(card.verdict, indent="")
    yield ""
    is_single, first = len(card.comparisons) == 1, card.comparisons[0]
    # It may contain a command, whose words must not be broken.
    if advice := first.next if is_single else card.decision and card.decision.reason:
        yield from wrap_whole(advice)
        yield ""
    if is_single:
        if first.probes:
            yield from _list_grades(first)
        yield from _list_probes(first)
        yield from list_texts(first.texts, ("before", "after"))
    else:
        yield from _list_models(card)
    yield from _list_speeds(card)
    for warning in _list_warnings(card):
        yield ""
        yield from wrap(f"! {warning}")


def _list_warnings(card: Card) -> Iterator[str]:
    """Yield the warnings of the whole card, then those of its models, without repetition."""
    yield from card.warnings
    models: dict[str, list[str]] = {}
    for comparison in card.comparisons:
        for warning in comparison.warnings:
            models.setdefault(warning, []).append(clean(comparison.model.name, 40))
    for warning, names in models.items():
        yield f"{', '.join(names)}: {warning}" if len(card.comparisons) > 1 else warning


def _list_grades(comparison: Comparison) -> Iterator[str]:
    yield GRADES
    yield "-" * len(GRADES)
    for grade in comparison.grades:
        yield (
            f"{pad(grade.subject, 22)}{count(grade.counts.known_before):>14}{count(grade.counts.both):>8}   "
            f"{grade.written:<27}{grade.mark:>6}"
        )
    if any(grade.range for grade in comparison.grades):
        yield "? the interval spans several grades"


def _list_probes(comparison: Comparison) -> Iterator[str]:
    for probe in comparison.probes:
        counts = probe.counts
        yield ""
        yield from wrap(
            f"{clean(probe.probe, 40)}: {count(counts.n)} facts, right before {share(probe.accuracy_original.value)}, "
            f"after {share(probe.accuracy_compressed.value)}"
        )
        yield from wrap(
            f"  lost {count(counts.lost)}, gained {count(counts.gained)} ({write_p_value(probe.certainty.p)}); "
            f"answers changed {share(probe.answer_changed)}"
        )
        if probe.movement:
            bound = "at least " if probe.movement.is_lower_bound else ""
            mean, p99 = (number(value, 4) for value in (probe.movement.kl_mean, probe.movement.kl_p99))
            yield f"  KL mean {bound}{mean}, p99 {bound}{p99} nats"
        if probe.knowing:
            yield f"  before: {describe_grades(probe.knowing.original)}"
            yield f"  after:  {describe_grades(probe.knowing.compressed)}"


def describe_grades(grades: Mapping[str, int]) -> str:
    """Say how many facts have each grade of knowing."""
    return ", ".join(f"{count(facts)} {grade}" for grade, facts in grades.items())


def list_texts(texts: Iterable[TextFigures], names: tuple[str, str]) -> Iterator[str]:
    """Yield a paragraph on each text; `names` are those of the two models."""
    for figures in texts:
        yield ""
        for line in summarize_text(figures, names):
            yield from wrap(line)


def _list_models(card: Card) -> Iterator[str]:
    yield MODELS.rstrip()
    yield "-" * len(MODELS)
    standings = card.decision.standings if card.decision else ()
    for place, (comparison, label) in enumerate(zip(card.comparisons, label_models(card.comparisons), strict=True)):
        model = comparison.model
        name = f"{model.name} ({model.setup})" if model.setup else model.name
        # Labels number models that have the same name and setup.
        name = f"{number}{name}" if label.startswith(number := f"{place + 1}. ") else name
        mark = "*" if standings and standings[place].beaten_by is None else ""
        kept = write_estimate(comparison.kept)
        yield f"{pad(name, 40)}{write_size(model.bytes):>10}  {kept:<27}{mark}".rstrip()
    if standings:
        yield "* none of these keeps more in as few bytes, or as much in fewer (within 1 %)"


def _list_speeds(card: Card) -> Iterator[str]:
    """Yield a line for each model that was timed, with its precision; nothing if none was."""
    timed = [
        (model.name, model.speed)
        for model in (card.original, *(comparison.model for comparison in card.comparisons))
        if model.speed
    ]
    if timed:
        yield from ("", SPEEDS, "-" * len(SPEEDS))
    for name, speed in timed:
        ran_in = f" ({clean(speed.computed_in, 20)})" if speed.computed_in else ""
        rates = f"{write_rate(speed.facts_per_second):>11}{write_rate(speed.tokens_per_second):>11}"
        yield f"{pad(name, 44, ran_in)}{rates}{write_size(speed.peak_bytes):>14}"
