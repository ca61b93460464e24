"""How a study's own figures are computed, in sentences: what the method of its probes does not say."""

from __future__ import annotations

from compressknow.report.study.findings import MINIMAL, NEAR
from compressknow.report.study.levels import CLIFF

SENTENCES = (
    "Two cells are compared fact by fact, over all probes together: exact two-sided McNemar tests, adjusted by Holm's "
    "method over the comparisons of a finding. A finding holds where all comparisons that separate their cells "
    "(p < 0.05) point as claimed, with one at least for each part of the claim; it does not hold where one points the "
    "other way round; else nothing can be told.",
    "A comparison does not count where neither cell is clearly above the baseline (95 % interval), over the probes of "
    "which the original knows more than that: what is right there by chance or habit separates nothing. The baseline "
    "is that of always the same answer where there are at most five to choose from, of guessing among more, and zero "
    "where any text may be answered.",
    f"F1 calls a decline minimal where accuracy falls by less than {100 * MINIMAL:g} % of what it was. F5 asks that "
    "what is left beyond the baseline, on average over the amounts above 50 %, is less than the share of weights left, "
    f"and at the largest amount less than {100 * NEAR:g} %, as F10 does. The whole 95 % interval must lie below the "
    "limit; for a finding to fail, that of one figure, adjusted for their number (Bonferroni), must lie above it.",
    "Per million parameters, each form's loss of accuracy is divided by the number of parameters that it changed: "
    "those quantized, or those pruned where none were. p is of the mean paired difference (normal approximation).",
    f"The cliff is the first amount asked at which less than {100 * CLIFF:g} % of the knowledge is kept. 30 % counts "
    "as low, 50 % as medium. Charts show means over probes, then each probe, averaged as its protocol does.",
    "The sparse size is what a store would take that keeps only weights that are not zero, with one bit a weight to "
    "say which; no current runtime reads one, and on disk pruned weights are dense.",
)
