"""How often tests and intervals of clustered facts are wrong, beside their rivals, on answers drawn by chance.

    python benchmarks/inference.py [--draws 1000]

Each relation has a chance of its own (beta distribution) at which its facts are kept, or lost rather than gained, such
that two of its facts have the intra-class correlation ICC. What is drawn is the truth, so that it can be counted how
often this project's functions, and others that do the same, are wrong:

1. tests that say that something changed where on the whole nothing did, at 5 %;
2. intervals of the share kept, and of the difference of accuracy, that hold the true one, at 95 %;
3. searches that select a file which keeps exactly what is asked for, and the share that a search tells;
4. studies (a quarter as many) that say anything of modules and methods that are all alike;
5. gates that decide early where the share kept is exactly the gate.

All is drawn from fixed seeds. Three standard errors of 5 % are 2 points of 1,000 draws.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap, norm, t, ttest_1samp, wilcoxon

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compressknow.base.format import SIGNIFICANT
from compressknow.comparison.intervals import (
    estimate_difference,
    estimate_difference_by_cluster,
    estimate_proportion,
    run_mcnemar,
    run_paired_test,
    share_by_cluster,
)
from compressknow.comparison.power import LEVEL, compute_capitals
from compressknow.comparison.records import Counts, Estimate
from compressknow.pages.study.claims import CANNOT_TELL
from compressknow.pages.study.findings import evaluate_findings
from compressknow.pages.study.records import Study
from compressknow.pages.study.summary import rank_cells
from compressknow.study.search import CONFIRMED, HALVINGS
from tests.comparison.test_clusters import draw_chances, draw_without_net_change
from tests.comparison.test_sequential import draw_orders
from tests.pages.study.studies import ProbeSpec, gp, gq, make_study
from tests.study.test_search_by_chance import count_facts_by_part, simulate_searches

ICC = (0.0, 0.1, 0.3)
RESAMPLES = 2000


def _changes(relations: Sequence[Counts]) -> np.ndarray:
    return np.array([each.gained - each.lost for each in relations])


def durkalski(relations: Sequence[Counts]) -> float:
    """Return the p-value of Durkalski et al. 2003: the mean of the relations' net rates, by its normal quantile."""
    rates = _changes(relations) / np.array([each.n for each in relations])
    return 2 * float(norm.sf(abs(rates.sum()) / np.sqrt((rates**2).sum()))) if rates.any() else 1.0


def signed_ranks(relations: Sequence[Counts]) -> float:
    changes = _changes(relations)
    return float(wilcoxon(changes, method="asymptotic").pvalue) if changes.any() else 1.0


def students_t(relations: Sequence[Counts]) -> float:
    changes = _changes(relations)
    return float(ttest_1samp(changes, 0).pvalue) if np.ptp(changes) else float(not changes.any())


TESTS: dict[str, Callable[[Sequence[Counts]], float | None]] = {
    "compressknow": lambda relations: run_paired_test(relations).p,
    "McNemar": lambda relations: run_mcnemar(sum(relations, Counts())),
    "Durkalski": durkalski,
    "signed ranks": signed_ranks,
    "t-test": students_t,
}


def false_alarms(draws: int) -> Iterator[tuple[str, ...]]:
    yield "relations x facts", "ICC", *TESTS
    for (number, facts), icc in product(((63, 64), (20, 20), (10, 20), (6, 40)), ICC):
        drawn = np.random.default_rng(1)
        alarms = dict.fromkeys(TESTS, 0)
        for _ in range(draws):
            relations = draw_without_net_change(drawn, number, facts, icc)
            for name, test in TESTS.items():
                alarms[name] += (p := test(relations)) is not None and p < SIGNIFICANT
        yield f"{number} x {facts}", f"{icc}", *(percent(number, draws) for number in alarms.values())


def resampled(parts: np.ndarray, wholes: np.ndarray, random: np.random.Generator) -> Estimate:
    """Return the share with the BCa interval of whole relations drawn with replacement."""

    def ratio(parts: np.ndarray, wholes: np.ndarray, axis: int = -1) -> np.ndarray:
        return parts.sum(axis=axis) / wholes.sum(axis=axis)

    found = bootstrap((parts, wholes), ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, rng=random)
    return Estimate(float(ratio(parts, wholes)), *map(float, found.confidence_interval))


def coverage(draws: int) -> Iterator[tuple[str, ...]]:
    yield "relations", "kept", "ICC", "compressknow", "Wilson, simple", f"BCa, {RESAMPLES:,}"
    for number, kept, icc in product((63, 25, 12, 6), (0.85, 0.95), ICC):
        drawn, held = np.random.default_rng(14), np.zeros(3, dtype=int)
        for _ in range(draws):
            known = drawn.integers(10, 60, number)
            both = drawn.binomial(known, draw_chances(drawn, kept, icc, number))
            intervals = (
                share_by_cluster(both.tolist(), known.tolist()),
                estimate_proportion(int(both.sum()), int(known.sum())),
                resampled(both, known, drawn),
            )
            held += [holds(each, kept) for each in intervals]
        yield f"{number}", f"{kept}", f"{icc}", *(percent(each, draws) for each in held)


def linearized(relations: Sequence[Counts]) -> Estimate:
    """Return the difference with the interval of a ratio, linearized (Cochran 1977, section 9A.2)."""
    changes, sizes = _changes(relations), np.array([each.n for each in relations])
    value = changes.sum() / sizes.sum()
    apart = len(sizes) / (len(sizes) - 1) * ((changes - value * sizes) ** 2).sum()
    spread = t.ppf(0.975, max(1, sizes.sum() ** 2 / (sizes**2).sum() - 1)) * np.sqrt(apart) / sizes.sum()
    return Estimate(float(value), float(value - spread), float(value + spread))


def differences(draws: int) -> Iterator[tuple[str, ...]]:
    """Of 100 facts the original knows about 60, and this share of these is lost."""
    yield "relations", "lost", "ICC", "compressknow", "Newcombe, simple", "linearized"
    for number, loss, icc in product((63, 25, 12, 6), (0.05, 0.1), ICC):
        drawn, held = np.random.default_rng(14), np.zeros(3, dtype=int)
        for _ in range(draws):
            sizes = drawn.integers(10, 60, number)
            known = drawn.binomial(sizes, 0.6)
            lost = drawn.binomial(known, draw_chances(drawn, loss, icc, number))
            rows = zip(sizes.tolist(), known.tolist(), lost.tolist(), strict=True)
            made = [Counts(both=of - less, lost=less, neither=n - of) for n, of, less in rows]
            intervals = (
                estimate_difference_by_cluster(made),
                estimate_difference(sum(made, Counts())),
                linearized(made),
            )
            held += [holds(each, -0.6 * loss) for each in intervals]
        yield f"{number}", f"{loss}", f"{icc}", *(percent(each, draws) for each in held)


def selections(draws: int) -> Iterator[tuple[str, ...]]:
    """Files of which the search's own facts said that they keep enough, and eight of which these facts are drawn too;
    then eight that keep 10 points more than is asked for, of which the first that is selected is graded.
    """
    yield "relations x facts", "kept", "ICC", "one", "three", "eight tried", "share told"
    many, few = (63, 64), (20, 60)
    parts = {shape: count_facts_by_part(*shape, seed=0) for shape in (many, few)}
    for (shape, kept), icc in product(((many, 0.9), (many, 0.95), (many, 0.98), (few, 0.95)), ICC):
        wrong = []
        for files, found in ((1, True), (CONFIRMED, True), (HALVINGS + 1, False)):
            made = simulate_searches(draws, parts[shape], icc, share=kept, keep=kept, files=files, found=found)
            wrong.append(percent(sum(search.winner is not None for search in made), draws))
        better = simulate_searches(
            draws, parts[shape], icc, share=kept, keep=kept - 0.1, files=HALVINGS + 1, found=False
        )
        graded = [told for search in better if (told := search.grade())]
        told = percent(sum(holds(each, kept) for each in graded), len(graded)) if graded else "-"
        yield f"{shape[0]} x {shape[1]}", f"{kept}", f"{icc}", *wrong, told


def alike(relations: int, facts: int) -> Study:
    """Modules pruned by two methods and quantized by two schemes."""
    scopes, methods = ("attention", "feed-forward", "overall"), ("l1-unstructured", "wanda")
    pruned = [gp(s, a, range(1), method) for a, s, method in product((0.4, 0.5), scopes, methods)]
    quantized = [gq(scope, range(1), scheme) for scope, scheme in product(scopes, ("int8", "int8-paper"))]
    total = relations * facts
    return make_study([*pruned, *quantized], spec=ProbeSpec(n=total, known=total, relations=relations))


def false_findings(draws: int) -> Iterator[tuple[str, ...]]:
    yield "relations x facts", "ICC", "studies", "findings, by method too", "hurts least or most"
    relations, facts, studies = 20, 10, max(1, draws // 4)
    made = alike(relations, facts)
    for icc in ICC:
        drawn, wrong = np.random.default_rng(11), np.zeros(2, dtype=int)
        for _ in range(studies):
            wrong += says_anything(_drawn_anew(made, drawn, icc, relations, facts))
        yield f"{relations} x {facts}", f"{icc}", f"{studies:,}", *(percent(each, studies) for each in wrong)


def _drawn_anew(made: Study, drawn: np.random.Generator, icc: float, relations: int, facts: int) -> Study:
    cells = []
    for cell in made.cells:
        right = drawn.random(relations * facts) < np.tile(draw_chances(drawn, 0.8, icc, relations), facts)
        comparison = replace(cell.comparison, kept=Estimate(float(right.mean())))
        cells.append(replace(cell, comparison=comparison, correct={made.probes[0].name: tuple(right.tolist())}))
    return replace(made, cells=tuple(cells))


def says_anything(made: Study) -> tuple[bool, bool]:
    """Whether a study tells cells apart: in a finding, of one method or of the paper's; and of what hurts least."""
    findings, by_method = evaluate_findings(made)
    told = [*findings, *(finding for of in by_method.values() for finding in of.values())]
    ranked = rank_cells(made)
    orders = [*ranked["modules"], *ranked["methods"]]
    return (
        any(finding.comparisons and finding.answer != CANNOT_TELL for finding in told),
        any(order.clear or order.clear_worst for order in orders),
    )


def early_stops(draws: int) -> Iterator[tuple[str, ...]]:
    yield "facts", "known", "kept", "decided before the last fact"
    for facts, known, kept in ((4000, 2500, 2250), (4000, 3999, 3333), (1000, 600, 570), (300, 185, 169)):
        decided = 0
        for start in range(0, draws, _AT_ONCE):
            runs = draw_orders(facts, known, kept, min(_AT_ONCE, draws - start), seed=start)
            capital = np.maximum(*compute_capitals(*runs, kept / known, facts))
            decided += int((capital[:, :-1] >= np.log(2 / LEVEL)).any(axis=1).sum())
        yield f"{facts:,}", f"{known:,}", f"{kept:,}", percent(decided, draws)


# Runs whose capitals are in memory together.
_AT_ONCE = 50


def holds(estimate: Estimate, share: float) -> bool:
    return estimate.low is not None and estimate.high is not None and estimate.low <= share <= estimate.high


def percent(number: int, of: int) -> str:
    return f"{100 * number / of:.1f}"


TABLES = {
    "False alarms, %": false_alarms,
    "Intervals that hold the share kept, %": coverage,
    "Intervals that hold the difference of accuracy, %": differences,
    "Searches that select a recipe exactly on the limit, and shares told that hold the true one, %": selections,
    "Studies that say anything of what is all alike, %": false_findings,
    "Early gates that decide though the share is exactly the gate, %": early_stops,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    # A relation that lost nothing, or as much as all others, has no spread for the rivals to go by.
    warnings.simplefilter("ignore")
    for title, table in TABLES.items():
        print(f"\n{title} ({draws:,} draws)", flush=True)
        for number, row in enumerate(table(draws)):
            if not number:
                widths = [max(len(name), 8) for name in row]
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
