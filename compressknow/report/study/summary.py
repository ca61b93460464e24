"""A study in plain sentences: its headline, its verdict, and a paragraph of what was found, all from its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from compressknow.report.figures import count, points, share
from compressknow.report.study.cell_contrasts import CANNOT_TELL, DOES_NOT_HOLD, HOLDS
from compressknow.report.study.findings import NOT_ASKED, Finding
from compressknow.report.study.grid import MODULES, names, quantized, schemes
from compressknow.report.study.levels import CLIFF, Cliff, Least, cliffs, module_that_hurts_least
from compressknow.report.study.records import Study
from compressknow.report.text import plain

_NAME = 80


def headline(study: Study) -> str:
    """What stands above everything: the range of what is kept."""
    kept = [cell.comparison.kept.value for cell in study.cells if cell.comparison.kept.value is not None]
    if not kept:
        return "There was no knowledge to keep"
    if len(kept) == 1 or share(min(kept)) == share(max(kept)):
        return f"{_forms(len(kept))} {share(max(kept))} of the knowledge"
    return f"{_forms(len(kept))} {share(min(kept)).removesuffix(' %')} to {share(max(kept))} of the knowledge"


def _forms(number: int) -> str:
    return "1 compressed form keeps" if number == 1 else f"{count(number)} compressed forms keep"


def verdict(study: Study) -> str:
    """Which module hurts least, and where the cliff is; of a study without pruned modules, the best and worst cell."""
    least, edges = module_that_hurts_least(study), cliffs(study)
    if not least and not edges:
        return _best_and_worst(study)
    parts = [_modules_in_short(least)] if least else []
    parts += [_cliffs_in_short(edges)] if edges else []
    return f"{plain(study.original.name, _NAME)}: {'; '.join(parts)}."


def _modules_in_short(least: Sequence[Least]) -> str:
    """Levels with the same answer are said together."""
    by_module: dict[str, list[str]] = {}
    for each in least:
        by_module.setdefault(each.module if each.clear else "", []).append(each.level)
    return "; ".join(
        f"pruned by {_listed(levels)}, {f'{module} hurts least' if module else 'no module clearly hurts least'}"
        for module, levels in by_module.items()
    )


def _cliffs_in_short(edges: Sequence[Cliff]) -> str:
    fallen = [f"{edge.below:g} % ({edge.module})" for edge in edges if edge.below is not None]
    if not fallen:
        return f"no amount that was asked keeps less than {share(CLIFF)}"
    return f"less than {100 * CLIFF:g} % is kept from {_listed(fallen)} on"


def _best_and_worst(study: Study) -> str:
    name, called = plain(study.original.name, _NAME), names(study)
    known = [(c.comparison.kept.value, called[c.key]) for c in study.cells if c.comparison.kept.value is not None]
    if not known:
        return f"Nothing can be said of what is left of {name}: it knew none of the facts, or no cell was made."
    best, worst = max(known, key=lambda pair: pair[0]), min(known, key=lambda pair: pair[0])
    if len(known) == 1:
        return f"{best[1]} keeps {share(best[0])} of what {name} knew."
    return (
        f"Of {count(len(known))} compressed forms of {name}, {best[1]} keeps most ({share(best[0])}) and {worst[1]} "
        f"least ({share(worst[0])})."
    )


def paragraph(study: Study, found: Sequence[Finding]) -> tuple[str, ...]:
    """Sentences: modules by level, cliffs, quantization, and how the paper's findings fare."""
    return (
        *map(_level, module_that_hurts_least(study)),
        *map(_cliff, cliffs(study)),
        *(_scheme(study, scheme) for scheme in schemes(study) if _by_module(study, scheme)),
        *_tally(found),
    )


def _level(least: Least) -> str:
    (best, kept), *others = least.kept.items()
    amounts = _listed([f"{amount:g} %" for amount in least.amounts])
    rest = _listed([f"{module} {share(value)}" for module, value in others])
    clear = "chance does not explain it" if least.clear else "chance could explain a difference"
    return (
        f"Pruned by {least.level}, {best} keeps most: {share(kept)} of what was known on average (at {amounts}), "
        f"against {rest}; {clear}."
    )


def _cliff(edge: Cliff) -> str:
    where = (
        f"keeps less than {100 * CLIFF:g} % from {edge.below:g} % on ({share(edge.kept)})"
        if edge.below is not None
        else f"keeps at least {100 * CLIFF:g} % at every amount that was asked"
    )
    start, end = edge.steepest
    steep = f" It falls fastest from {start:g} to {end:g} %, by {points(edge.fall).removeprefix('+')}."
    return f"Pruning {edge.module} {where}.{steep if edge.fall > 0 else ''}"


def _by_module(study: Study, scheme: str) -> dict[str, float]:
    cells = {module: quantized(study, module).get(scheme) for module in MODULES}
    kept = {module: cell.comparison.kept.value for module, cell in cells.items() if cell}
    return {module: value for module, value in kept.items() if value is not None}


def _scheme(study: Study, scheme: str) -> str:
    kept = _by_module(study, scheme)
    said = _listed([f"{module} keeps {share(kept[module])}" for module in sorted(kept, key=lambda m: -kept[m])])
    return f"Quantized by {plain(scheme, 20)}, {said}."


def _tally(found: Iterable[Finding]) -> Iterator[str]:
    """How many of the findings that are asked of this family hold."""
    asked = [each for each in found if each.answer != NOT_ASKED]
    parts = []
    for answer, one, several in _VERBS:
        ids = [each.id for each in asked if each.answer == answer]
        parts += [f"{_listed(ids)} {one if len(ids) == 1 else several}"] if ids else []
    if parts:
        yield f"Of the paper's findings for this family of models, {'; '.join(parts)}."


_VERBS = (
    (HOLDS, "holds", "hold"),
    (DOES_NOT_HOLD, "does not hold", "do not hold"),
    (CANNOT_TELL, "cannot be told", "cannot be told"),
)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
