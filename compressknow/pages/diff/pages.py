"""Page of a comparison of two checkpoints, in knowledge, weights, settings and structure: HTML, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from compressknow.base.format import (
    NONE,
    answer,
    clean,
    count,
    dump_json,
    number,
    share,
    write_p_value,
    write_percent,
    write_rank,
    write_size,
)
from compressknow.base.reading import group_by
from compressknow.comparison.diff import CheckpointDiff, DiffSums, TensorDiff
from compressknow.comparison.paired import Pair
from compressknow.comparison.records import Group, ProbeFigures
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.records import ModelRecord
from compressknow.model.manifest import describe_text
from compressknow.model.structure import GROUPS, NOT_LINEAR
from compressknow.pages import parts
from compressknow.pages.card.gate import tabulate_results
from compressknow.pages.card.sections.facts import make_grades_table
from compressknow.pages.card.sections.figures import write_movement, write_pair, write_rest
from compressknow.pages.diff.make import Behaviour, CheckpointComparison, name_both, name_knower, sum_by
from compressknow.pages.pages import render_html, render_markdown, write_files
from compressknow.pages.records import dump_comparison, write_estimate
from compressknow.pages.svg import Grid, draw_heat_map, shorten_names
from compressknow.pages.texts import make_text_parts, write_measurement, write_text_headline

# A probe's figures with A as the original, and with B.
Both = tuple[ProbeFigures, ProbeFigures]
_MAP_NOTE = (
    "Relative error of each Linear weight, from faint to full colour in equal ratios; grey means unchanged. The marks "
    "under the map are the errors at which the shades change."
)
METHOD = (
    "Weights are compared as numbers, tensor by tensor, in float64; int8 weights by the values they represent "
    "(stored integer times scale). The relative error is ‖B − A‖ / ‖A‖ by the Frobenius norm, signal to noise is 20 "
    "log10 ‖A‖ / ‖B − A‖ in decibels, and the cosine is that of the angle between A and B. A group or a layer is "
    "measured as one tensor of all its weights, so that large weights count for more than small ones.",
    "Layers and modules are those of Linear weights; biases, norms and embeddings are under not-linear. A weight that "
    "is tied on one side (a final layer tied to the embedding) is compared with the weight it is tied to.",
)


def make_comparison_page(
    comparison: CheckpointComparison, *, tensors: int, facts: int, shown: int, charts: bool
) -> parts.Page:
    """Return the comparison as a page, with at most so many tensors and facts; facts beyond `shown` are folded."""
    a, b = name_both(comparison.a, comparison.b)
    difference = comparison.difference
    forward = comparison.behaviour.b_against_a if comparison.behaviour else None
    sides = (("A", comparison.a), ("B", comparison.b))
    origin = tuple(parts.Entries(_describe_checkpoint(side), title) for title, side in sides)
    method = (*METHOD, *(clean(sentence, 2000) for sentence in (forward.method if forward else ())))
    how = parts.PageSection("how", "How it was made", parts.show_run(comparison.command, comparison.versions))
    weights: tuple[parts.PageSection, ...] = ()
    if difference and difference.tensors:
        groups = sum_groups(difference)
        table = build_sums_table("What differs by group of layers", "Group", groups, difference.total)
        weights = (parts.PageSection("groups", "Weights", (table,)),)
    behaviour, show_facts = comparison.behaviour, comparison.show_facts
    sections = (
        *(_show_behaviour(behaviour, facts, shown, show_facts=show_facts, charts=charts) if behaviour else ()),
        *(_show_difference(difference, comparison.files, tensors) if difference else ()),
        parts.PageSection("compare-method", "Method", (parts.Sentences(method),), look="text"),
    )
    return parts.Page(
        what="comparison",
        models=f"{a} and {b}",
        headline=_write_headline(comparison),
        verdict=clean(comparison.verdict, 5000),
        warnings=tuple(clean(warning, 1000) for warning in comparison.warnings),
        sections=tuple(section for section in sections if section.parts),
        counts=forward.comparisons[0].counts if forward else None,
        names=("both know", "only A", "only B", "neither"),
        front=(
            (*weights, how),
            (
                parts.PageSection("compare-size", "Size", (parts.Sizes(comparison.a.bytes, comparison.b.bytes),)),
                parts.PageSection("from", "Which checkpoints", origin),
            ),
        ),
    )


def _write_headline(comparison: CheckpointComparison) -> str:
    if comparison.identical:
        return "Identical"
    if comparison.behaviour:
        forward = comparison.behaviour.b_against_a.comparisons[0]
        if forward.texts and not forward.probes:
            return write_text_headline(forward.texts[0])
        if forward.kept.value is not None:
            return f"B knows {share(forward.kept.value)} of what A knows"
    if comparison.difference is None or not comparison.difference.tensors:
        return "Weights that cannot be compared"
    total = comparison.difference.total
    if not total.energy_change and total.finite:
        return "The same weights" if comparison.difference.same_weights else "The same values"
    return f"Relative error {number(total.relative_error, 4)}"


def _describe_checkpoint(side: ModelRecord) -> tuple[parts.Entry, ...]:
    entries = parts.list_origin(side)
    if side.calibration:
        entries.append(parts.Entry("Calibrated on", clean(describe_text(side.calibration), 200)))
    return (*entries, parts.Entry("Type", clean(side.dtype, 60)), parts.Entry("Size", write_size(side.bytes)))


def _show_behaviour(
    behaviour: Behaviour, facts: int, shown: int, *, show_facts: bool, charts: bool
) -> Iterator[parts.PageSection]:
    probes = pair_probes(behaviour)
    forward = behaviour.b_against_a
    gates = tabulate_results(forward, forward.comparisons[0])
    yield parts.PageSection("compare-knowledge", "Knowledge", (*gates, *_show_knowledge(probes)))
    texts = parts.draw_charts(_show_texts(behaviour), "compare-text", charts)
    yield parts.PageSection("compare-text", "Running text", tuple(texts))
    if probes:
        answers = _show_answers(behaviour.answers, facts, shown) if show_facts else (parts.NO_FACTS,)
        yield parts.PageSection("compare-answers", "Answers side by side", tuple(answers))


def _show_difference(
    difference: CheckpointDiff, files: Mapping[str, tuple[bool, bool]], tensors: int
) -> Iterator[parts.PageSection]:
    if difference.total.energy_change or not difference.total.finite:
        yield parts.PageSection("compare-map", "By layer and module", tuple(_show_map(difference)))
        if layers := sum_layers(difference):
            table = build_sums_table("Linear weights by layer", "Layer", layers)
            yield parts.PageSection("compare-layers", "By layer", (table,))
    yield parts.PageSection("compare-tensors", "By tensor", tuple(_show_tensors(difference, tensors)))
    stored = build_settings_table(difference, files), build_structure_table(difference)
    yield parts.PageSection("compare-structure", "Settings and structure", tuple(table for table in stored if table))


def _show_texts(behaviour: Behaviour) -> Iterator[parts.Part]:
    for figures in behaviour.b_against_a.comparisons[0].texts:
        yield from make_text_parts(figures, ("A", "B"))
    rows = []
    for figures in behaviour.a_against_b.comparisons[0].texts:
        kl, percentiles = (figures.moved.kl, figures.moved.kl_percentiles) if figures.moved else (None, None)
        p99 = number(percentiles["p99"], 4) if percentiles else NONE
        rows.append((clean(figures.text, 60), write_measurement(kl, 4), p99))
    if rows:
        yield parts.Table("KL(B‖A) per token, nats", ("Text", "Mean", "99th percentile"), tuple(rows))


def _show_knowledge(probes: tuple[Both, ...]) -> Iterator[parts.Part]:
    if probes:
        yield build_figures_table(probes)
    tables = []
    for forward, backward in probes:
        name = clean(forward.probe, 60)
        if forward.knowing:
            yield make_grades_table(forward.knowing, f"{name}: grades of knowing of A (rows) and of B", "A")
        for kind, groups, others in (
            ("Domain", forward.by_subject, backward.by_subject),
            ("Relation", forward.by_relation, backward.by_relation),
        ):
            tables += [_build_groups_table(f"{name} by {kind.lower()}", kind, groups, others)] if groups else []
    if tables:
        yield parts.Folded("By domain and by relation", tuple(tables))


def _show_map(difference: CheckpointDiff) -> Iterator[parts.Part]:
    grid = make_grid(difference)
    if grid is None:
        return
    title = "Relative error by layer and module"
    if drawn := tuple(parts.draw_twice(partial(draw_heat_map, grid, title), "heat")):
        yield from drawn
        yield parts.Note("", drawn=_MAP_NOTE)
    rows = tuple((row, *(number(cell, 4) for cell in cells)) for row, cells in zip(grid.rows, grid.cells, strict=True))
    table = parts.Table(title, ("Layer", *grid.columns), rows, sortable=len(rows) > 1)
    yield parts.Folded("The map as a table", (table,))


_COLUMNS = ("Prompt", "Right answer", "A answers", "B answers", "Known by", "Relation")
_GROUP_COLUMNS = ("Facts", "A knows", "of these B", "B knows", "of these A", "Answer differs", "p (Holm)")
_ANSWERS = "Facts that the two answer differently, with the most likely answers of each, best first"


def pair_probes(behaviour: Behaviour) -> tuple[Both, ...]:
    """Return each probe's figures in both directions."""
    forward, backward = behaviour.b_against_a.comparisons[0].probes, behaviour.a_against_b.comparisons[0].probes
    return tuple(zip(forward, backward, strict=True))


def build_figures_table(probes: tuple[Both, ...]) -> parts.Table:
    """Return every figure that treats the two models alike and was measured, one column per probe."""
    figures = {name: tuple(write(*both) for both in probes) for name, write in _FIGURES}
    rows = tuple((name, *cells) for name, cells in figures.items() if set(cells) != {NONE})
    columns = ("Figure", *(clean(forward.probe, 60) for forward, _ in probes))
    return parts.Table("What each model knows, and how much their answers differ", columns, rows)


def _show_answers(answers: tuple[Pair, ...], limit: int, shown: int) -> Iterator[parts.Part]:
    """Yield the facts that are answered differently, with those beyond `shown` folded."""
    rows = tuple(
        (
            parts.write_prompt(a.prompt),
            clean(a.gold),
            _write_best(a),
            _write_best(b),
            name_knower(a, b),
            clean(a.relation, 60),
        )
        for a, b in answers[:limit]
    )
    table = parts.Table(_ANSWERS, _COLUMNS, rows, prose=True)
    return parts.make_fact_parts(table, shown, left_out=len(answers) - len(rows))


def _list_best(answered: Answer) -> tuple[str, ...]:
    """Return a model's most likely answers, best first."""
    return answered.top5[:3] or (answered.predicted,)


def _write_best(answered: Answer) -> str:
    """Write the most likely answers, and the rank of the right one if it is not among them."""
    best, rank = _list_best(answered), answered.rank
    named = ", ".join(answer(clean(each, 60)) for each in best)
    is_further = rank and rank > len(best) and answered.gold not in best
    return f"{named} (the right one is {write_rank(rank)})" if is_further else named


def _build_groups_table(
    caption: str, kind: str, forward: tuple[Group, ...], backward: tuple[Group, ...]
) -> parts.Table:
    kept_by_a, rows = {group.name: group.kept for group in backward}, []
    for group in forward:
        known_by_a = count(group.counts.known_before), share(group.kept.value)
        known_by_b = count(group.counts.known_after), share(kept_by_a[group.name].value)
        differ = share(group.answer_changed), parts.write_bare_p(group.p_holm)
        rows.append((clean(group.name, 80), count(group.counts.n), *known_by_a, *known_by_b, *differ))
    return parts.Table(caption, (kind, *_GROUP_COLUMNS), tuple(rows), sortable=len(rows) > 1)


_FIGURES: tuple[tuple[str, Callable[[ProbeFigures, ProbeFigures], str]], ...] = (
    ("Facts evaluated", lambda forward, _: count(forward.counts.n)),
    ("A is right", lambda forward, _: write_estimate(forward.accuracy_original)),
    ("B is right", lambda forward, _: write_estimate(forward.accuracy_compressed)),
    ("Both know", lambda forward, _: count(forward.counts.both)),
    ("Only A knows", lambda forward, _: count(forward.counts.lost)),
    ("Only B knows", lambda forward, _: count(forward.counts.gained)),
    ("Neither knows", lambda forward, _: count(forward.counts.neither)),
    ("Of what A knows, B keeps", lambda forward, _: write_estimate(forward.kept)),
    ("Of what B knows, A keeps", lambda _, backward: write_estimate(backward.kept)),
    ("Flips (known by only one)", lambda forward, _: share(forward.counts.flips)),
    ("Is one better?", lambda forward, _: write_p_value(forward.certainty.p)),
    ("Top answer differs", lambda forward, _: share(forward.answer_changed)),
    ("Mean reciprocal rank, A and B", lambda forward, _: write_pair(forward.mrr, number, ", ")),
    ("Right answer among the top 5, A and B", lambda forward, _: write_pair(forward.p_at_5, share, ", ")),
    ("KL(A‖B), nats, mean", lambda forward, _: write_movement(forward.movement, lambda m: m.kl_mean, 4)),
    ("KL(A‖B), median", lambda forward, _: write_movement(forward.movement, lambda m: m.kl_median, 4)),
    ("KL(A‖B), 99th percentile", lambda forward, _: write_movement(forward.movement, lambda m: m.kl_p99, 4)),
    ("KL(A‖B): rest's probability, A and B", lambda forward, _: write_rest(forward.movement, ", ")),
    ("KL(B‖A), nats, mean", lambda _, backward: write_movement(backward.movement, lambda m: m.kl_mean, 4)),
    ("KL(B‖A), median", lambda _, backward: write_movement(backward.movement, lambda m: m.kl_median, 4)),
    ("KL(B‖A), 99th percentile", lambda _, backward: write_movement(backward.movement, lambda m: m.kl_p99, 4)),
    ("KL(B‖A): rest's probability, B and A", lambda _, backward: write_rest(backward.movement, ", ")),
)


_WEIGHT_COLUMNS = ("Weights", "Zeros A", "Zeros B", "Relative error", "Cosine", "Signal to noise", "Largest change")
_EXAMPLES = 3


def sum_groups(difference: CheckpointDiff) -> dict[str, DiffSums]:
    """Return the sums of each group of layers, in the usual order."""
    groups = sum_by(difference, lambda tensor: tensor.group)
    return {name: groups[name] for name in (*GROUPS, NOT_LINEAR) if name in groups}


def sum_layers(difference: CheckpointDiff) -> dict[str, DiffSums]:
    """Return the sums of the Linear weights of each block, in the order of the module tree."""
    return sum_by(difference, _name_block)


def make_grid(difference: CheckpointDiff) -> Grid | None:
    """Return the heat map's figures; None if no block has Linear weights."""
    sums = sum_by(difference, lambda tensor: (_name_block(tensor) or "", tensor.module) if tensor.module else None)
    if not sums:
        return None
    rows, modules = (tuple(dict.fromkeys(names)) for names in zip(*sums, strict=True))
    errors = {key: each.relative_error for key, each in sums.items()}
    cells = tuple(tuple(errors.get((row, module)) for module in modules) for row in rows)
    return Grid(rows, tuple(clean(name, 40) for name in shorten_names(modules)), cells)


def build_sums_table(
    caption: str, kind: str, sums: Mapping[str, DiffSums], total: DiffSums | None = None
) -> parts.Table:
    """Return the figures of each group of weights and, if given, their total."""
    rows = tuple(build_sums_row(name, of) for name, of in {**sums, **({"all": total} if total else {})}.items())
    return parts.Table(caption, (kind, *_WEIGHT_COLUMNS), rows, sortable=total is None and len(rows) > 1)


def build_sums_row(name: str, sums: DiffSums) -> tuple[str, ...]:
    """Return a row of the name of some weights and their figures."""
    zeros = (write_percent(part, sums.numel) for part in (sums.zeros_a, sums.zeros_b))
    noise = NONE if sums.snr_db is None else f"{number(sums.snr_db, 1)} dB"
    change = number(sums.relative_error, 4), format_cosine(sums.cosine), noise, number(sums.largest_change, 4)
    return clean(name, 120), count(sums.numel), *zeros, *change


def _show_tensors(difference: CheckpointDiff, limit: int) -> Iterator[parts.Part]:
    """Yield the tensors that differ, largest change first."""
    changed = [t for t in difference.tensors if t.differs]
    changed.sort(key=lambda t: -(t.sums.relative_error if t.sums.relative_error is not None else float("inf")))
    rows = []
    for tensor in changed[:limit]:
        name, *figures = build_sums_row(tensor.name, tensor.sums)
        a, b = tensor.dtype_a, tensor.dtype_b
        rows.append((name, a if a == b else f"{a} → {b}", *figures))
    if rows:
        table = parts.Table(
            "Tensors that differ", ("Tensor", "Type", *_WEIGHT_COLUMNS), tuple(rows), sortable=len(rows) > 1
        )
        left_out = len(changed) - len(rows)
        rest = (parts.make_rest_note(left_out),) if left_out else ()
        several = f"{count(len(rows))} tensors that differ, largest differences first"
        yield parts.Folded("1 tensor that differs" if len(rows) == 1 else several, (table, *rest))


def build_settings_table(difference: CheckpointDiff, files: Mapping[str, tuple[bool, bool]]) -> parts.Table | None:
    """Return the settings that differ, and the files besides config and weights that do."""
    rows = tuple(
        (clean(change.key, 80), *(NONE if value is None else clean(value, 200) for value in (change.a, change.b)))
        for change in difference.config
    ) + tuple(
        (clean(name, 80), *(("differs" if all(has) else "exists") if each else NONE for each in has))
        for name, has in files.items()
    )
    return parts.Table("Settings that differ", ("Setting", "A", "B"), rows, prose=True) if rows else None


_KINDS = {
    "added": "only in B",
    "missing": "only in A",
    "retyped": "another type",
    "reshaped": "another shape",
    "untied": "tied in A, untied in B",
    "tied": "untied in A, tied in B",
    "packed": "packed: not compared",
}


def build_structure_table(difference: CheckpointDiff) -> parts.Table | None:
    """Return differences in how the two store tensors, with a row for all tensors that share one."""
    by_form = group_by(
        difference.structure, lambda change: (change.kind, change.a.partition(" [")[0], change.b.partition(" [")[0])
    )
    rows = []
    for (kind, *shared), changes in by_form.items():
        # The full form for one tensor; for several, what they share.
        forms = (changes[0].a, changes[0].b) if len(changes) == 1 else shared
        names = [clean(change.name, 80) for change in changes[:_EXAMPLES]]
        names += ["…"] if len(changes) > _EXAMPLES else []
        rows.append((_KINDS[kind], count(len(changes)), *map(clean, forms), ", ".join(names)))
    columns = ("What", "Tensors", "A", "B", "Which")
    return parts.Table("Tensors that are stored differently", columns, tuple(rows), prose=True) if rows else None


def _name_block(tensor: TensorDiff) -> str | None:
    return None if tensor.layer is None else f"{tensor.stack or 'layer'} {tensor.layer}"


def format_cosine(value: float | None) -> str:
    """Return a cosine as text; 1 is shown only if it is exact.

    >>> [format_cosine(value) for value in (1.0, 0.999999, 0.99875, None)]
    ['1', '> 0.99999', '0.99875', '-']
    """
    if value is not None and 0.999995 <= value < 1:
        return "> 0.99999"
    return "1" if value == 1 else number(value, 5)


SCHEMA = 1


def render_comparison_html(comparison: CheckpointComparison) -> str:
    """Return the page: the same comparison gives the same bytes."""
    return render_html(make_comparison_page(comparison, tensors=500, facts=500, shown=20, charts=True))


def render_comparison_markdown(comparison: CheckpointComparison) -> str:
    """Return the same as GitHub-flavoured Markdown, with fewer tensors and facts."""
    return render_markdown(make_comparison_page(comparison, tensors=30, facts=50, shown=50, charts=False))


def write_comparisons(comparison: CheckpointComparison, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Write the comparison in the formats of the paths' suffixes."""
    texts = {
        ".html": lambda: render_comparison_html(comparison),
        ".md": lambda: render_comparison_markdown(comparison),
        ".json": lambda: dump_json(diff_json(comparison)),
    }
    write_files(texts, paths, overwrite=overwrite)


def diff_json(comparison: CheckpointComparison) -> dict[str, Any]:
    """Return plain values for ``json.dumps(..., allow_nan=False)``, in a fixed order; unknown values are None."""
    behaviour = comparison.behaviour
    return {
        "schema": SCHEMA,
        "verdict": comparison.verdict,
        "identical": comparison.identical,
        "a": _dump_checkpoint(comparison.a),
        "b": _dump_checkpoint(comparison.b),
        "files": list(comparison.files),
        "files_in": {
            name: [side for side, exists in zip("ab", each, strict=True) if exists]
            for name, each in comparison.files.items()
        },
        **_dump_difference(comparison.difference),
        "behaviour": _dump_behaviour(behaviour, comparison.show_facts) if behaviour else None,
        "warnings": list(comparison.warnings),
        "versions": dict(comparison.versions),
        "command": comparison.command,
    }


def _dump_checkpoint(side: ModelRecord) -> dict[str, Any]:
    names = "name revision sha256 bytes dtype quantization setup source calibration".split()
    return {name: getattr(side, name) for name in names}


def _dump_difference(difference: CheckpointDiff | None) -> dict[str, Any]:
    if difference is None:
        return {"architecture": None, "config": [], "structure": [], "weights": None}
    blocks = sum_by(difference, lambda t: (t.stack, t.layer) if t.layer is not None else None)
    modules = sum_by(difference, lambda t: (t.stack, t.layer, t.module) if t.module else None)
    return {
        "architecture": difference.architecture,
        "config": [asdict(change) for change in difference.config],
        "structure": [asdict(change) for change in difference.structure],
        "weights": {
            "total": _dump_sums(difference.total),
            "groups": {name: _dump_sums(sums) for name, sums in sum_groups(difference).items()},
            "layers": [{"stack": stack, "layer": layer, **_dump_sums(sums)} for (stack, layer), sums in blocks.items()],
            "modules": [
                {"stack": stack, "layer": layer, "module": module, **_dump_sums(sums)}
                for (stack, layer, module), sums in modules.items()
            ],
            "tensors": [
                {key: value for key, value in asdict(tensor).items() if key != "sums"}
                | {"shape": list(tensor.shape), **_dump_sums(tensor.sums)}
                for tensor in difference.tensors
            ],
        },
    }


def _dump_sums(sums: DiffSums) -> dict[str, Any]:
    names = ("numel", "zeros_a", "zeros_b", "relative_error", "cosine", "snr_db", "largest_change")
    return {name: getattr(sums, name) for name in names}


def _dump_behaviour(behaviour: Behaviour, show_facts: bool) -> dict[str, Any]:
    forward, backward = behaviour.b_against_a, behaviour.a_against_b
    values: dict[str, Any] = {
        "known": behaviour.known,
        "b_against_a": dump_comparison(forward.comparisons[0], show_facts=show_facts),
        "a_against_b": dump_comparison(backward.comparisons[0], show_facts=show_facts),
        "method": list(forward.method),
    }
    return values | ({"answers": [_dump_answers(*pair) for pair in behaviour.answers]} if show_facts else {})


def _dump_answers(a: Answer, b: Answer) -> dict[str, Any]:
    return {
        **{name: getattr(a, name) for name in ("probe", "fact_id", "relation", "subject", "prompt", "gold")},
        "known_by": name_knower(a, b),
        "top_a": list(_list_best(a)),
        "top_b": list(_list_best(b)),
        "rank_a": a.rank,
        "rank_b": b.rank,
    }
