"""Tables of a comparison: what both models know of the same facts, weights, settings and structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from compressknow.base.format import NONE, answer, clean, count, number, share, write_p_value, write_percent, write_rank
from compressknow.comparison.diff import CheckpointDiff, StructureChange, Sums, TensorDiff
from compressknow.comparison.records import Group, ProbeFigures
from compressknow.model.structure import GROUPS, NOT_LINEAR
from compressknow.pages.card.sections.figures import write_movement, write_pair, write_rest
from compressknow.pages.diff.make import AnswerPair, Behaviour, sum_by
from compressknow.pages.parts import BLANK, Folded, Part, Table, make_fact_parts, make_rest_note, write_bare_p
from compressknow.pages.records import write_estimate
from compressknow.pages.svg import Grid, shorten_names

_COLUMNS = ("Prompt", "Right answer", "A answers", "B answers", "Known by", "Relation")
_GROUP_COLUMNS = ("Facts", "A knows", "of these B", "B knows", "of these A", "Answer differs", "p (Holm)")
_ANSWERS = "Facts that the two answer differently: the answers that each holds most likely, best first"
# Words for a page that is cut, and the file that has all of it.
_OF_COMPARISON = ("comparison", "compare.json")

# A probe's figures with A as the original, and with B.
Both = tuple[ProbeFigures, ProbeFigures]


def pair_probes(behaviour: Behaviour) -> tuple[Both, ...]:
    """Return each probe's figures in both directions."""
    there, back = behaviour.b_against_a.comparisons[0].probes, behaviour.a_against_b.comparisons[0].probes
    return tuple(zip(there, back, strict=True))


def build_figures_table(probes: tuple[Both, ...]) -> Table:
    """Return every figure that says something of two models on a level, one column per probe."""
    rows = tuple((name, *(write(both[side]) for both in probes)) for name, side, write in _FIGURES)
    columns = ("Figure", *(clean(there.probe, 60) for there, _ in probes))
    return Table("What each model knows, and how much their answers differ", columns, rows)


def group_tables(probes: tuple[Both, ...]) -> tuple[Table, ...]:
    """Return tables by domain and by relation, of each probe."""
    tables = [
        _build_groups_table(clean(there.probe, 60), kind, *groups)
        for there, back in probes
        for kind, groups in (
            ("Domain", (there.by_subject, back.by_subject)),
            ("Relation", (there.by_relation, back.by_relation)),
        )
    ]
    return tuple(table for table in tables if table.rows)


def answer_parts(answers: tuple[AnswerPair, ...], limit: int, shown: int) -> Iterator[Part]:
    """Yield the facts that are answered differently, `shown` of them at once."""
    rows = tuple(
        (
            clean(fact.prompt.replace(BLANK, "___"), 300),
            clean(fact.gold),
            _list_answers(fact.top_a, fact.rank_a),
            _list_answers(fact.top_b, fact.rank_b),
            fact.known_by,
            clean(fact.relation, 60),
        )
        for fact in answers[:limit]
    )
    return make_fact_parts(_ANSWERS, _COLUMNS, rows, shown, left_out=len(answers) - len(rows), of=_OF_COMPARISON)


def _list_answers(answers: tuple[str, ...], rank: int | None) -> str:
    """Return the answers, best first, and the right one's rank where it is none of them."""
    named = ", ".join(answer(clean(each, 60)) for each in answers)
    return f"{named} (the right one is {write_rank(rank)})" if rank and rank > len(answers) else named


def _build_groups_table(probe: str, kind: str, there: tuple[Group, ...], back: tuple[Group, ...]) -> Table:
    others = {group.name: group for group in back}
    rows = tuple(
        (
            clean(group.name, 80),
            count(group.counts.n),
            count(group.counts.known_before),
            share(group.kept.value),
            count(group.counts.known_after),
            share(others[group.name].kept.value),
            share(group.answer_changed),
            write_bare_p(group.p_holm),
        )
        for group in there
    )
    return Table(f"{probe} by {kind.lower()}", (kind, *_GROUP_COLUMNS), rows, sortable=len(rows) > 1)


# The direction that a figure is of, and the figure.
_THERE, _BACK = 0, 1
_FIGURES: tuple[tuple[str, int, Callable[[ProbeFigures], str]], ...] = (
    ("Facts evaluated", _THERE, lambda p: count(p.counts.n)),
    ("A is right", _THERE, lambda p: write_estimate(p.accuracy_original)),
    ("B is right", _THERE, lambda p: write_estimate(p.accuracy_compressed)),
    ("Both know", _THERE, lambda p: count(p.counts.both)),
    ("Only A knows", _THERE, lambda p: count(p.counts.lost)),
    ("Only B knows", _THERE, lambda p: count(p.counts.gained)),
    ("Neither knows", _THERE, lambda p: count(p.counts.neither)),
    ("Of what A knows, B keeps", _THERE, lambda p: write_estimate(p.kept)),
    ("Of what B knows, A keeps", _BACK, lambda p: write_estimate(p.kept)),
    ("Flips (known by one alone)", _THERE, lambda p: share(p.counts.flips)),
    ("Is one better?", _THERE, lambda p: write_p_value(p.certainty.test.p)),
    ("Top answer differs", _THERE, lambda p: share(p.answer_changed)),
    ("Mean reciprocal rank, A and B", _THERE, lambda p: write_pair(p.mrr, number, ", ")),
    ("Right answer among the top 5, A and B", _THERE, lambda p: write_pair(p.p_at_5, share, ", ")),
    ("KL(A‖B), nats, mean", _THERE, lambda p: write_movement(p.movement, lambda m: m.kl_mean, 4)),
    ("KL(A‖B), median", _THERE, lambda p: write_movement(p.movement, lambda m: m.kl_median, 4)),
    ("KL(A‖B), 99th percentile", _THERE, lambda p: write_movement(p.movement, lambda m: m.kl_p99, 4)),
    ("KL(A‖B): rest's probability, A and B", _THERE, lambda p: write_rest(p.movement, ", ")),
    ("KL(B‖A), nats, mean", _BACK, lambda p: write_movement(p.movement, lambda m: m.kl_mean, 4)),
    ("KL(B‖A), median", _BACK, lambda p: write_movement(p.movement, lambda m: m.kl_median, 4)),
    ("KL(B‖A), 99th percentile", _BACK, lambda p: write_movement(p.movement, lambda m: m.kl_p99, 4)),
    ("KL(B‖A): rest's probability, B and A", _BACK, lambda p: write_rest(p.movement, ", ")),
)


_WEIGHT_COLUMNS = ("Weights", "Zeros A", "Zeros B", "Relative error", "Cosine", "Signal to noise", "Largest change")
_NAME = 120
_EXAMPLES = 3


def sum_groups(difference: CheckpointDiff) -> dict[str, Sums]:
    """Return the sums of each group of layers that there is, in their usual order."""
    groups = sum_by(difference, lambda tensor: tensor.group)
    return {name: groups[name] for name in (*GROUPS, NOT_LINEAR) if name in groups}


def sum_layers(difference: CheckpointDiff) -> dict[str, Sums]:
    """Return the sums of the Linear weights of each block, in the order of the module tree."""
    return sum_by(difference, _name_block)


def make_grid(difference: CheckpointDiff) -> Grid | None:
    """Return what the heat map shows; None where no Linear weight lies in a block."""
    sums = sum_by(difference, lambda tensor: (_name_block(tensor) or "", tensor.module) if tensor.module else None)
    if not sums:
        return None
    rows, modules = (tuple(dict.fromkeys(names)) for names in zip(*sums, strict=True))
    errors = {key: each.relative_error for key, each in sums.items()}
    cells = tuple(tuple(errors.get((row, module)) for module in modules) for row in rows)
    return Grid(rows, tuple(clean(name, 40) for name in shorten_names(modules)), cells)


def build_sums_table(caption: str, kind: str, sums: Mapping[str, Sums], total: Sums | None = None) -> Table:
    """Return the figures of each part of the weights, and of all."""
    rows = tuple(build_sums_row(name, of) for name, of in {**sums, **({"all": total} if total else {})}.items())
    return Table(caption, (kind, *_WEIGHT_COLUMNS), rows, sortable=total is None and len(rows) > 1)


def build_sums_row(name: str, sums: Sums) -> tuple[str, ...]:
    """Return the name of some weights, and their figures."""
    return clean(name, _NAME), *_format_figures(sums)


def tensor_parts(difference: CheckpointDiff, limit: int) -> Iterator[Part]:
    """Yield the tensors that differ, those first that changed most, if there are any."""
    changed = [t for t in difference.tensors if not t.same_bytes]
    changed.sort(key=lambda t: -(t.sums.relative_error if t.sums.relative_error is not None else float("inf")))
    rows = tuple(
        (
            clean(t.name, _NAME),
            t.dtype_a if t.dtype_a == t.dtype_b else f"{t.dtype_a} → {t.dtype_b}",
            *_format_figures(t.sums),
        )
        for t in changed[:limit]
    )
    if rows:
        table = Table("Tensors that differ", ("Tensor", "Type", *_WEIGHT_COLUMNS), rows, sortable=len(rows) > 1)
        left_out = len(changed) - len(rows)
        rest = (make_rest_note(left_out, *_OF_COMPARISON),) if left_out else ()
        yield Folded(f"{count(len(rows))} tensors that differ, those first that differ most", (table, *rest))


def build_settings_table(difference: CheckpointDiff, files: tuple[str, ...]) -> Table | None:
    """Return the settings that differ, and the files beside config and weights that do."""
    rows = tuple(
        (clean(change.key, 80), *(NONE if value is None else clean(value, 200) for value in (change.a, change.b)))
        for change in difference.config
    ) + tuple((clean(name, 80), "differs", "differs") for name in files)
    return Table("Settings that differ", ("Setting", "A", "B"), rows, prose=True) if rows else None


_KINDS = {
    "added": "only in B",
    "missing": "only in A",
    "retyped": "another type",
    "reshaped": "another shape",
    "untied": "tied in A, untied in B",
    "tied": "untied in A, tied in B",
    "packed": "packed: not compared",
}


def build_structure_table(difference: CheckpointDiff) -> Table | None:
    """Return what the two store otherwise, tensors alike in that on one line."""
    alike: dict[tuple[str, str, str], list[StructureChange]] = {}
    for change in difference.structure:
        alike.setdefault((change.kind, _drop_shape(change.a), _drop_shape(change.b)), []).append(change)
    rows = tuple(
        (
            _KINDS[kind],
            count(len(changes)),
            # In full of one tensor, else what the kind has in common.
            clean(changes[0].a if len(changes) == 1 else a),
            clean(changes[0].b if len(changes) == 1 else b),
            ", ".join(clean(change.name, 80) for change in changes[:_EXAMPLES])
            + (", …" if len(changes) > _EXAMPLES else ""),
        )
        for (kind, a, b), changes in alike.items()
    )
    columns = ("What", "Tensors", "A", "B", "Which")
    return Table("Tensors that are not stored alike", columns, rows, prose=True) if rows else None


def _drop_shape(form: str) -> str:
    return form.partition(" [")[0]


def _name_block(tensor: TensorDiff) -> str | None:
    return None if tensor.layer is None else f"{tensor.stack or 'layer'} {tensor.layer}"


def _format_figures(sums: Sums) -> tuple[str, ...]:
    return (
        count(sums.numel),
        write_percent(sums.zeros_a, sums.numel),
        write_percent(sums.zeros_b, sums.numel),
        number(sums.relative_error, 4),
        format_cosine(sums.cosine),
        NONE if sums.snr_db is None else f"{number(sums.snr_db, 1)} dB",
        number(sums.largest_change, 4),
    )


def format_cosine(value: float | None) -> str:
    """Return a cosine as text; 1 is shown only where it is exact.

    >>> [format_cosine(value) for value in (1.0, 0.999999, 0.99875, None)]
    ['1', '> 0.99999', '0.99875', '-']
    """
    if value is not None and 0.999995 <= value < 1:
        return "> 0.99999"
    return "1" if value == 1 else number(value, 5)
