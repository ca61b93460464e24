"""Count how often tests and intervals for clustered facts are wrong on simulated answers, and compare alternatives.

    python benchmarks/inference.py [--draws 1000]

Each relation has its own probability (beta distribution) that a fact is kept, or lost rather than gained, such that two
of its facts have the intra-class correlation ICC. Since the truth is known, the errors of this project's functions, and
of others for the same purpose, can be counted:

1. tests that report a change, at 5 %, although there is no net change;
2. 95 % intervals that contain the true share kept, or the true difference of accuracy;
3. searches that select a file which keeps exactly the required share, and the coverage of graded shares;
4. studies (a quarter as many) that report any difference between modules or methods that are all alike;
5. gates that decide early although the share kept is exactly the gate.

All random numbers have fixed seeds. With 1,000 draws, three standard errors of 5 % are 2 points.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, product
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
# Number of runs whose capitals are in memory at the same time.
CHUNK = 50


def list_changes(relations: Sequence[Counts]) -> np.ndarray:
    return np.array([each.gained - each.lost for each in relations])


def run_durkalski(relations: Sequence[Counts]) -> float:
    """Return the p-value of Durkalski et al. 2003: the mean of the relations' net rates, by its normal quantile."""
    rates = list_changes(relations) / np.array([each.n for each in relations])
    return 2 * float(norm.sf(abs(rates.sum()) / np.sqrt((rates**2).sum()))) if rates.any() else 1.0


def run_signed_rank_test(relations: Sequence[Counts]) -> float:
    changes = list_changes(relations)
    return float(wilcoxon(changes, method="asymptotic").pvalue) if changes.any() else 1.0


def run_t_test(relations: Sequence[Counts]) -> float:
    changes = list_changes(relations)
    return float(ttest_1samp(changes, 0).pvalue) if np.ptp(changes) else float(not changes.any())


TESTS: dict[str, Callable[[Sequence[Counts]], float | None]] = {
    "compressknow": run_paired_test,
    "McNemar": lambda relations: run_mcnemar(sum(relations, Counts())),
    "Durkalski": run_durkalski,
    "signed ranks": run_signed_rank_test,
    "t-test": run_t_test,
}


def count_false_alarms(draws: int) -> Iterator[tuple[str, ...]]:
    yield "relations x facts", "ICC", *TESTS
    for (number, facts), icc in product(((63, 64), (20, 20), (10, 20), (6, 40)), ICC):
        rng = np.random.default_rng(1)
        alarms = dict.fromkeys(TESTS, 0)
        for _ in range(draws):
            relations = draw_without_net_change(rng, number, facts, icc)
            for name, test in TESTS.items():
                alarms[name] += (p := test(relations)) is not None and p < SIGNIFICANT
        yield f"{number} x {facts}", f"{icc}", *(write_percent(count, draws) for count in alarms.values())


def estimate_by_bootstrap(parts: np.ndarray, wholes: np.ndarray, rng: np.random.Generator) -> Estimate:
    """Return the share with the BCa interval from whole relations drawn with replacement."""

    def compute_ratio(parts: np.ndarray, wholes: np.ndarray, axis: int = -1) -> np.ndarray:
        return parts.sum(axis=axis) / wholes.sum(axis=axis)

    result = bootstrap((parts, wholes), compute_ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, rng=rng)
    return Estimate(float(compute_ratio(parts, wholes)), *map(float, result.confidence_interval))


def count_share_coverage(draws: int) -> Iterator[tuple[str, ...]]:
    yield "relations", "kept", "ICC", "compressknow", "Wilson, simple", f"BCa, {RESAMPLES:,}"
    for number, kept, icc in product((63, 25, 12, 6), (0.85, 0.95, 0.98), ICC):
        rng, covered = np.random.default_rng(14), np.zeros(3, dtype=int)
        for _ in range(draws):
            known = rng.integers(10, 60, number)
            both = rng.binomial(known, draw_chances(rng, kept, icc, number))
            intervals = (
                share_by_cluster(both.tolist(), known.tolist()),
                estimate_proportion(int(both.sum()), int(known.sum())),
                estimate_by_bootstrap(both, known, rng),
            )
            covered += [contains(each, kept) for each in intervals]
        yield f"{number}", f"{kept}", f"{icc}", *(write_percent(count, draws) for count in covered)


def estimate_linearized(relations: Sequence[Counts]) -> Estimate:
    """Return the difference of accuracy with the interval of a linearized ratio (Cochran 1977, section 9A.2)."""
    changes, sizes = list_changes(relations), np.array([each.n for each in relations])
    value = changes.sum() / sizes.sum()
    variance = len(sizes) / (len(sizes) - 1) * ((changes - value * sizes) ** 2).sum()
    margin = t.ppf(0.975, max(1, sizes.sum() ** 2 / (sizes**2).sum() - 1)) * np.sqrt(variance) / sizes.sum()
    return Estimate(float(value), float(value - margin), float(value + margin))


def count_difference_coverage(draws: int) -> Iterator[tuple[str, ...]]:
    """Yield rows for an original that knows 60 % of the facts, if a share of these is lost."""
    yield "relations", "lost", "ICC", "compressknow", "Newcombe, simple", "linearized"
    for number, loss, icc in product((63, 25, 12, 6), (0.05, 0.1), ICC):
        rng, covered = np.random.default_rng(14), np.zeros(3, dtype=int)
        for _ in range(draws):
            sizes = rng.integers(10, 60, number)
            known = rng.binomial(sizes, 0.6)
            lost = rng.binomial(known, draw_chances(rng, loss, icc, number))
            rows = zip(sizes.tolist(), known.tolist(), lost.tolist(), strict=True)
            relations = [Counts(both=before - less, lost=less, neither=n - before) for n, before, less in rows]
            intervals = (
                estimate_difference_by_cluster(relations),
                estimate_difference(sum(relations, Counts())),
                estimate_linearized(relations),
            )
            covered += [contains(each, -0.6 * loss) for each in intervals]
        yield f"{number}", f"{loss}", f"{icc}", *(write_percent(count, draws) for count in covered)


def count_wrong_selections(draws: int) -> Iterator[tuple[str, ...]]:
    """Yield rows for files that keep exactly the required share: one or three that keep all facts of the search split,
    and eight for which these are drawn too. The last column grades the winners of eight that keep 10 points more.
    """
    yield "relations x facts", "kept", "ICC", "one", "three", "eight tried", "share covered"
    many, few = (63, 64), (20, 60)
    parts = {shape: count_facts_by_part(*shape, seed=0) for shape in (many, few)}
    for (shape, kept), icc in product(((many, 0.9), (many, 0.95), (many, 0.98), (few, 0.95)), ICC):
        wrong = []
        for files, found in ((1, True), (CONFIRMED, True), (HALVINGS + 1, False)):
            searches = simulate_searches(draws, parts[shape], icc, share=kept, keep=kept, files=files, found=found)
            wrong.append(write_percent(sum(search.winner is not None for search in searches), draws))
        searches = simulate_searches(
            draws, parts[shape], icc, share=kept, keep=kept - 0.1, files=HALVINGS + 1, found=False
        )
        shares = [share for search in searches if (share := search.grade())]
        covered = write_percent(sum(contains(each, kept) for each in shares), len(shares)) if shares else "-"
        yield f"{shape[0]} x {shape[1]}", f"{kept}", f"{icc}", *wrong, covered


def make_uniform_study(relations: int, facts: int) -> Study:
    """Make a study of modules pruned by two methods and quantized by two schemes."""
    scopes, methods = ("attention", "feed-forward", "overall"), ("l1-unstructured", "wanda")
    pruned = [gp(s, a, range(1), method) for a, s, method in product((0.4, 0.5), scopes, methods)]
    quantized = [gq(scope, range(1), scheme) for scope, scheme in product(scopes, ("int8", "int8-paper"))]
    total = relations * facts
    return make_study([*pruned, *quantized], spec=ProbeSpec(n=total, known=total, relations=relations))


def count_false_findings(draws: int) -> Iterator[tuple[str, ...]]:
    yield "relations x facts", "ICC", "studies", "findings, by method too", "hurts least or most"
    relations, facts, studies = 20, 10, max(1, draws // 4)
    study = make_uniform_study(relations, facts)
    for icc in ICC:
        rng, wrong = np.random.default_rng(11), np.zeros(2, dtype=int)
        for _ in range(studies):
            wrong += find_differences(draw_answers(study, rng, icc, relations, facts))
        yield f"{relations} x {facts}", f"{icc}", f"{studies:,}", *(write_percent(count, studies) for count in wrong)


def draw_answers(study: Study, rng: np.random.Generator, icc: float, relations: int, facts: int) -> Study:
    """Return the study with random answers, of which each cell keeps 80 % on average."""
    cells = []
    for cell in study.cells:
        right = rng.random(relations * facts) < np.tile(draw_chances(rng, 0.8, icc, relations), facts)
        comparison = replace(cell.comparison, kept=Estimate(float(right.mean())))
        cells.append(replace(cell, comparison=comparison, correct={study.probes[0].name: tuple(right.tolist())}))
    return replace(study, cells=tuple(cells))


def find_differences(study: Study) -> tuple[bool, bool]:
    """Return whether a study tells cells apart in a finding (of one method, too), or in what hurts least or most."""
    findings, by_method = evaluate_findings(study)
    everywhere = [*findings, *(finding for of in by_method.values() for finding in of.values())]
    ranked = rank_cells(study)
    orders = [*ranked["modules"], *ranked["methods"]]
    return (
        any(finding.comparisons and finding.answer != CANNOT_TELL for finding in everywhere),
        any(order.clear or order.clear_worst for order in orders),
    )


def count_early_stops(draws: int) -> Iterator[tuple[str, ...]]:
    yield "facts", "known", "kept", "decided before the last fact"
    for facts, known, kept in ((4000, 2500, 2250), (4000, 3999, 3333), (1000, 600, 570), (300, 185, 169)):
        decided = 0
        for start in range(0, draws, CHUNK):
            runs = draw_orders(facts, known, kept, min(CHUNK, draws - start), seed=start)
            capital = np.maximum(*compute_capitals(*runs, kept / known, facts))
            decided += int((capital[:, :-1] >= np.log(2 / LEVEL)).any(axis=1).sum())
        yield f"{facts:,}", f"{known:,}", f"{kept:,}", write_percent(decided, draws)


def contains(estimate: Estimate, share: float) -> bool:
    return estimate.low is not None and estimate.high is not None and estimate.low <= share <= estimate.high


def write_percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f}"


TABLES = {
    "False alarms, %": count_false_alarms,
    "Intervals that contain the share kept, %": count_share_coverage,
    "Intervals that contain the difference of accuracy, %": count_difference_coverage,
    "Searches that select a file exactly at the limit, and share covered, %": count_wrong_selections,
    "Studies that report a difference although all cells are alike, %": count_false_findings,
    "Early gates that decide although the share is exactly the gate, %": count_early_stops,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    # The alternatives warn if all relations change equally, which leaves them no variance.
    warnings.simplefilter("ignore")
    for title, make_rows in TABLES.items():
        print(f"\n{title} ({draws:,} draws)", flush=True)
        rows = make_rows(draws)
        header = next(rows)
        widths = [max(len(name), 8) for name in header]
        for row in chain([header], rows):
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
