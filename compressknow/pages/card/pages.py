"""Write a report card as HTML, Markdown and JSON, with charts of several models.

All texts of models and facts go through `clean` here; the templates escape for their own syntax.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

from compressknow.base.format import (
    NONE,
    clean,
    clean_lines,
    count,
    dump_json,
    share,
    share_against,
    write_rate,
    write_size,
)
from compressknow.comparison.records import Counts, Estimate
from compressknow.compress.recipe import to_toml
from compressknow.evaluate.records import ModelRecord
from compressknow.pages import drawing, pages, parts
from compressknow.pages.card import gate
from compressknow.pages.card.sections import Limits, list_explained, show_sections
from compressknow.pages.card.verdict import LEGEND, SHORT_LEGEND, find_least, write_kept_against
from compressknow.pages.card.warnings import describe_mark, estimate_rounding_kept, list_probes, mark_rounding
from compressknow.pages.drawing import INK, SERIES, Line, Mark, Tradeoff, draw_tradeoff
from compressknow.pages.records import Card, Comparison, name_models, write_range
from compressknow.pages.texts import write_perplexity, write_text_headline

_FEWEST = 3  # models; for fewer, the table is clear at a glance
_SHAPES = (("o", SERIES[0]), ("s", SERIES[1]), ("^", SERIES[2]), ("v", SERIES[3]))
_MOST_BARS = 15
_AMOUNT = re.compile(r"(?P<scope>.*\S)\s+(?P<amount>\d+(?:\.\d+)?)\s*%")


def name_runtime(model: ModelRecord) -> str:
    """Return what ran a model, in a word or two."""
    return str(model.runtime["name"]) if model.runtime else "transformers"


def name_deployment(model: ModelRecord) -> str:
    """Return the runtime and the precision or build in which a model's speed was measured."""
    computed_in = str(model.speed.computed_in or "") if model.speed else ""
    name = name_runtime(model)
    return computed_in if computed_in.startswith(name) else ", ".join(filter(None, (name, computed_in)))


def chart_costs(card: Card, names: Sequence[str]) -> Iterator[Tradeoff]:
    """Yield charts of knowledge kept by size and by speed, each if three or more of the models differ in it."""
    for title, axis, get_cost in (
        ("size on disk", "size on disk, MB", _get_size),
        ("tokens per second", "tokens per second", _get_speed),
    ):
        marks = []
        for number, (comparison, name) in enumerate(zip(card.comparisons, names, strict=True), start=1):
            if comparison.kept.value is not None and (cost := get_cost(comparison.model)):
                amount, written, runtime = cost
                text = f"{name}: {write_kept_against(comparison.kept, card.gates)} kept, {written}"
                marks.append(Mark(amount, comparison.kept, f"in {runtime}", text, str(number)))
        if len({mark.cost for mark in marks}) < _FEWEST:
            continue
        kinds = list(dict.fromkeys(mark.kind for mark in marks))
        looks = {kind: (*shape, 6.0) for kind, shape in zip(kinds, cycle(_SHAPES), strict=False)}
        if cost := get_cost(card.original):
            amount, written, runtime = cost
            name = f"the original, in {runtime}"
            marks.append(Mark(amount, Estimate(1), name, f"{name}, {written}"))
            looks[name] = ("D", INK, 6.0)
        rounding = estimate_rounding_kept(list_probes(card.comparisons)).value
        has_speed, title = get_cost is _get_speed, f"Knowledge kept by {title}"
        yield Tradeoff(title, axis, marks, looks, edge=kinds, more_is_better=has_speed, rounding=rounding)


# Costs of a model: its value on the axis, the same as text, and the runtime.
def _get_size(model: ModelRecord) -> tuple[float, str, str] | None:
    return None if model.bytes is None else (model.bytes / 1e6, write_size(model.bytes), name_runtime(model))


def _get_speed(model: ModelRecord) -> tuple[float, str, str] | None:
    rate = model.speed.tokens_per_second if model.speed else None
    return None if rate is None else (rate, f"{write_rate(rate)} tokens per second", name_deployment(model))


def chart_setups(comparisons: Sequence[Comparison], names: Sequence[str], id: str) -> tuple[str, ...]:
    """Return charts of what several models kept: lines where setups are amounts by scope, bars for the others."""
    lines, others = split_setups(comparisons)
    levels = mark_rounding(estimate_rounding_kept(list_probes(comparisons)).value)
    charts = []
    if lines:
        title = "Knowledge kept by how much was pruned"
        charts.append(drawing.draw_lines(lines, f"{id}-lines", title, start=1, levels=levels))
    bars = [drawing.Bar(names[i], comparisons[i].kept) for i in others if comparisons[i].kept.value is not None]
    # Many bars would only repeat those of the overview.
    if bars and len(others) <= _MOST_BARS:
        charts.append(drawing.draw_bars(bars, f"{id}-bars", "Knowledge kept by compressed model", levels=levels))
    return tuple(charts)


def split_setups(comparisons: Sequence[Comparison]) -> tuple[tuple[Line, ...], tuple[int, ...]]:
    """Return a line for each scope that was pruned by several amounts, up to the number of line styles, and the indices
    of all other comparisons."""
    amounts: dict[str, dict[float, int]] = {}
    for place, comparison in enumerate(comparisons):
        match = _AMOUNT.fullmatch(comparison.model.setup or "")
        if match and comparison.kept.value is not None:
            amounts.setdefault(match["scope"], {}).setdefault(float(match["amount"]), place)
    several = [(scope, by_amount) for scope, by_amount in amounts.items() if len(by_amount) > 1][: len(drawing.MARKERS)]
    lines = tuple(
        Line(
            scope,
            tuple((amount, comparisons[place].kept) for amount, place in sorted(by_amount.items())),
            all(comparisons[place].model.is_pruned_alone for place in by_amount.values()),
        )
        for scope, by_amount in several
    )
    drawn = {place for _, by_amount in several for place in by_amount.values()}
    return lines, tuple(place for place in range(len(comparisons)) if place not in drawn)


# Facts that a page shows for one model, and for several together: with 20 models and one probe it is under 400 KB.
_LOST, _GAINED, _LOST_IN_ALL, _GAINED_IN_ALL = 500, 200, 100, 50
_FEW, _RELATIONS_IN_ALL, _LEAST_RELATIONS = 5, 100, 3
# Facts that the Markdown holds of one comparison, and of all together.
_FACTS, _FACTS_IN_ALL = 50, 300
_VERDICT = 5000  # characters: it has a sentence per text
_NOTHING_TO_KEEP = "There was no knowledge to keep"
_COST_NOTE = (
    "Numbers are those of the models in the table. The line joins the models that no other as small, or as fast, "
    "exceeds; the stroke through a mark is its 95 % interval. Speed is measured in the runtime and precision that each "
    "model is deployed in."
)
_FINGERPRINT = (
    "A fingerprint is the SHA-256 over all files that determine a model's answers, not over a single one; of a server, "
    "over what it reports."
)
_ROUNDING_NOTE = " The dotted line shows what rounding alone keeps."


def make_page(card: Card, limits: Limits, *, charts: bool) -> parts.Page:
    """Return the card as a page; `charts` says whether to draw those that compare several models."""
    names = name_models(card)
    models = [
        _make_model_page(card, comparison, f"m{i}", name, limits)
        for i, (comparison, name) in enumerate(zip(card.comparisons, names, strict=True), start=1)
    ]
    seeds = sorted({probe.seed for comparison in card.comparisons for probe in comparison.probes})
    run = parts.show_run(card.command, card.versions, [parts.Entry("Seed", ", ".join(map(str, seeds)) or NONE)])
    all_models = (card.original, *(comparison.model for comparison in card.comparisons))
    hashes = parts.Entries(
        tuple(parts.Entry(clean(each.name, 60), clean(each.sha256, 80), code=True) for each in all_models)
    )
    fingerprints = parts.Folded("Fingerprints in full", (hashes, parts.Note(_FINGERPRINT)), in_text=False)
    about = (_make_method_section(card), parts.PageSection("run", "The run", (*run, fingerprints), look="text"))
    if len(models) == 1:
        (page,) = models
        others = f"→ {clean(card.comparisons[0].model.name, 80)}"
        page = replace(page, sections=(*page.sections, *about))
    else:
        others = f"and {len(models)} compressed models"
        sections = (
            parts.PageSection("overview", "Overview", tuple(_show_overview(card, names, charts=charts)), look="wide"),
            parts.PageSection("from", "Where they came from", (parts.Entries(parts.list_identity(card.original)),)),
            parts.PageSection("models", "Each compressed model", tuple(models)),
            *about,
        )
        page = parts.Page(_write_joint_headline(card), sections, unlisted=2)
    decision = (clean(card.decision.reason, 1000),) if card.decision else ()
    return replace(
        page,
        what="report card",
        models=f"{clean(card.original.name, 80)} {others}",
        verdict=clean(card.verdict, _VERDICT),
        warnings=tuple(dict.fromkeys((*(clean(warning, 1000) for warning in card.warnings), *page.warnings))),
        next=(*page.next, *decision),
    )


def _make_method_section(card: Card) -> parts.PageSection:
    sentences = parts.Sentences(tuple(clean(sentence, 2000) for sentence in card.method))
    terms = (term for section in list_explained(card.comparisons) for term in section.glossary)
    plain_terms = dict.fromkeys((clean(name, 80), "", clean(meaning, 1000)) for name, meaning in terms)
    glossary = (parts.Folded("What the figures mean", (parts.Terms(tuple(plain_terms)),)),) if plain_terms else ()
    return parts.PageSection("method", "Method and limits", (sentences, *glossary), look="text")


def _write_headline(card: Card, comparison: Comparison) -> str:
    """Return the main figure: knowledge kept, or perplexity if only texts were read."""
    if comparison.only_texts:
        return write_text_headline(comparison.texts[0])
    if comparison.kept.value is None:
        return _NOTHING_TO_KEEP
    return f"{write_kept_against(Estimate(comparison.kept.value), card.gates)} of its knowledge kept"


def _write_joint_headline(card: Card) -> str:
    comparisons = card.comparisons
    kept = [c.kept.value for c in comparisons if c.kept.value is not None]
    if not kept and all(c.only_texts for c in comparisons):
        return f"Perplexity of {len(comparisons)} compressed models"
    if not kept:
        return _NOTHING_TO_KEEP
    write = partial(share_against, limits=[find_least(card.gates)])
    least, most = min(kept), max(kept)
    shares = write(most) if write(least) == write(most) else write_range(least, most, write)
    return f"{len(comparisons)} compressed models keep {shares} of the knowledge"


def _make_model_page(card: Card, comparison: Comparison, id: str, name: str, limits: Limits) -> parts.Page:
    """Return one compressed model against the original: the report card itself, and the sections below it."""
    model, is_single = comparison.model, len(card.comparisons) == 1
    sections, failures = show_sections(card.original, comparison, id, limits, show_facts=card.show_facts)
    result = f"{write_kept_against(Estimate(comparison.kept.value), card.gates)} kept"
    if comparison.only_texts:
        result = f"perplexity {write_perplexity(comparison.texts[0].compressed)}"
    recipe = parts.Code(clean_lines(to_toml(dict(model.recipe))), "toml") if model.recipe else None
    origin = (
        *((parts.Entries(parts.list_identity(card.original), "Original"),) if is_single else ()),
        parts.Entries(parts.list_identity(model), "Compressed" if is_single else ""),
        *((parts.Folded("Recipe", (recipe,)),) if recipe else ()),
    )
    sizes = (card.original.bytes, model.bytes)
    return parts.Page(
        models=f"{result}, {write_size(model.bytes)}",
        headline=_write_headline(card, comparison) if is_single else name,
        verdict=clean(comparison.verdict, _VERDICT),
        warnings=tuple(clean(warning, 1000) for warning in (*comparison.warnings, *failures)),
        sections=sections,
        next=(clean(comparison.next, 1000),) if comparison.next else (),
        counts=comparison.counts,
        front=(
            () if comparison.only_texts else (_make_grades_section(card, comparison, id),),
            (
                # Servers do not report sizes.
                *((parts.PageSection(f"{id}-size", "Size", (parts.Sizes(*sizes),)),) if any(sizes) else ()),
                parts.PageSection(f"{id}-from", "Where it came from", origin),
            ),
        ),
        id=id,
    )


def _make_grades_section(card: Card, comparison: Comparison, id: str) -> parts.PageSection:
    rows = []
    for grade in comparison.grades:
        letters = clean(grade.grade, 4), clean(grade.range or "", 20)
        rows.append((clean(grade.subject, 80), *_write_kept(grade.counts, grade.written), *letters))
    # The same digits as in the verdict, because the advice depends on this share.
    kept = write_kept_against(comparison.kept, card.gates)
    rows.append(("All domains", *_write_kept(comparison.counts, kept), "", ""))
    bars = (*(grade.kept for grade in comparison.grades), comparison.kept)
    graded = parts.Graded(tuple(rows), bars, estimate_rounding_kept(comparison.probes).value)
    mark = describe_mark(comparison.probes, "The long line on the bar of all domains")
    note = parts.Note(LEGEND, drawn=" ".join(filter(None, (parts.BAR, mark))))
    gates = gate.tabulate_results(card, comparison)
    return parts.PageSection(f"{id}-card", "Report card", (graded, note, *gates), look="card")


def _write_kept(counts: Counts, kept: str) -> tuple[str, str, str]:
    """Return the facts known before, the share kept and its interval, separate so that a narrow screen wraps there."""
    value, opening, interval = kept.partition("(")
    return f"{count(counts.known_before)} of {count(counts.n)}", value.rstrip(), opening + interval


def _show_overview(card: Card, names: tuple[str, ...], *, charts: bool) -> Iterator[parts.Part]:
    by_setup = chart_setups(card.comparisons, names, "overview-chart") if charts else ()
    by_cost = tuple(chart_costs(card, names)) if charts else ()
    mark = describe_mark(list_probes(card.comparisons), "The line across the charts")
    if by_setup:
        yield parts.Charts(tuple(parts.Drawn(chart) for chart in by_setup))
    for i, chart in enumerate(by_cost, start=1):
        yield from parts.draw_twice(partial(draw_tradeoff, chart), f"cost-{i}", chart.title)
    if by_cost:
        yield parts.Note("", drawn=_COST_NOTE + (_ROUNDING_NOTE if mark else ""))
    yield _tabulate_overview(card, names)
    yield parts.Note(SHORT_LEGEND, drawn=" ".join(filter(None, (parts.BAR, mark if by_setup or by_cost else ""))))


def _tabulate_overview(card: Card, names: tuple[str, ...]) -> parts.Table:
    marks = gate.mark_models(card.decision, names) if card.decision else [NONE] * len(names)
    models, kept = [card.original, *(each.model for each in card.comparisons)], [each.kept for each in card.comparisons]
    columns = [
        ("Model", ["original", *names]),
        ("Size", [write_size(model.bytes) for model in models]),
        ("Kept", ["", *(write_kept_against(each, card.gates) for each in kept)]),
        ("Among these", ["", *marks]),
        *_list_gate_columns(card),
        *_list_run_columns(models),
        *_list_result_columns(card.comparisons),
    ]
    links = ("", *(f"m{i}-top" for i in range(1, len(names) + 1)))
    return parts.make_overview_table("Every compressed model at a glance", columns, kept, bars_after=2, links=links)


def _list_gate_columns(card: Card) -> Iterator[tuple[str, list[str]]]:
    results = [gate.list_results(card, comparison) for comparison in card.comparisons]
    for place, each in enumerate(card.gates):
        yield f"Keeps {clean(each.in_words, 80)}", ["", *(of_model[place][-1] for of_model in results)]


def _list_run_columns(models: Sequence[ModelRecord]) -> Iterator[tuple[str, list[str]]]:
    """Yield what ran each, unless transformers ran all; where tokens per second were measured, in what."""
    if any(model.runtime for model in models):
        yield "Runs in", [clean(name_runtime(model), 30) for model in models]
    speeds = [model.speed.tokens_per_second if model.speed else None for model in models]
    if any(speed is not None for speed in speeds):
        yield "Timed in", [clean(name_deployment(model), 40) if model.speed else NONE for model in models]
        yield "Tokens per second", list(map(write_rate, speeds))


def _list_result_columns(comparisons: Sequence[Comparison]) -> Iterator[tuple[str, list[str]]]:
    """Yield accuracy by probe, grade by domain and perplexity by text, of the original and of each other."""
    accuracies = [{probe.probe: parts.get_headline_accuracy(probe) for probe in each.probes} for each in comparisons]
    for probe in list_probes(comparisons):
        before, _ = parts.get_headline_accuracy(probe)
        after = [of_model[probe.probe][1].value if probe.probe in of_model else None for of_model in accuracies]
        yield parts.name_accuracy(probe.probe, probe.average), [share(before.value), *map(share, after)]
    domains = [{grade.subject: grade for grade in each.grades} for each in comparisons]
    for name in dict.fromkeys(name for of_model in domains for name in of_model):
        grades = [of_model.get(name) for of_model in domains]
        letters = [clean(grade.mark, 4) if grade else NONE for grade in grades]
        yield clean(name, 40), ["", *letters]
    texts = [{figures.text: figures for figures in each.texts} for each in comparisons]
    for name in dict.fromkeys(name for of_model in texts for name in of_model):
        original = next(of_model[name].original for of_model in texts if name in of_model)
        compressed = [of_model[name].compressed if name in of_model else None for of_model in texts]
        yield f"Perplexity, {clean(name, 40)}", [write_perplexity(each) for each in (original, *compressed)]


def write_reports(card: Card, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Write the card in the formats that the names ask for."""
    texts = {
        gate.SUMMARY: lambda: gate.render_job_summary(card),
        ".xml": lambda: gate.render_junit(card),
        ".html": lambda: render_html(card),
        ".md": lambda: render_markdown(card),
        ".json": lambda: dump_json(card.to_dict()),
    }
    pages.write_files(texts, paths, overwrite=overwrite)


def render_html(card: Card) -> str:
    """Return the page: the same card gives the same bytes."""
    models = len(card.comparisons)
    limits = Limits(
        lost=_LOST if models <= 1 else _LOST_IN_ALL // models,
        gained=min(_GAINED, _GAINED_IN_ALL // max(1, models)),
        relations=None if models <= _FEW else max(_LEAST_RELATIONS, _RELATIONS_IN_ALL // models),
        # Charts for each of several models would take seconds.
        charts=models == 1,
    )
    return pages.render_html(make_page(card, limits, charts=True))


def render_markdown(card: Card) -> str:
    """Return the page, without charts and with fewer facts, as GitHub-flavoured Markdown."""
    facts = min(_FACTS, _FACTS_IN_ALL // max(1, len(card.comparisons)))
    return pages.render_markdown(make_page(card, Limits(lost=facts, gained=facts, shown=facts), charts=False))
