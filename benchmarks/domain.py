"""What a file keeps whose types were chosen by the facts of one domain, beside one chosen by facts of all domains.

    python examples/smollm2.py --off-grid build/smollm2-off
    python benchmarks/domain.py build/smollm2-off build/domain [--domain geography] [--size 80MB] [--limit 2000]

A fifth of the facts of atlas may choose, the others judge, in llama.cpp. Both files have the same size, and are asked
the same facts that the original knows: of the domain, and of all others, which is what the choice costs elsewhere.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

import numpy as np

from compressknow.base.errors import CompressknowError
from compressknow.base.format import write_p_value
from compressknow.comparison.intervals import number_clusters, run_paired_test, tally
from compressknow.comparison.records import Counts

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, help="folder for the files and the answers")
    parser.add_argument("--domain", default="geography")
    parser.add_argument("--size", default="80MB")
    parser.add_argument("--limit", type=int, default=None, help="facts that judge  [default: all of them]")
    given = parser.parse_args()
    allocation = runpy.run_path(str(HERE / "allocation.py"))
    files = runpy.run_path(str(HERE.parent / "examples/frontier.py"))["divide_facts"](given.work)
    of_domain = given.work / f"choose-{given.domain}.jsonl"
    lines = files["choose"].read_text("utf-8").splitlines(keepends=True)
    of_domain.write_text("".join(line for line in lines if json.loads(line)["subject"] == given.domain), "utf-8")
    exact = allocation["_made"](given.model, given.work / "exact.gguf", {"type": "bf16"})
    original = allocation["_answers"](exact, given.work, files["judge"], None, given.limit)
    known = {fact: answer for fact, answer in original.items() if answer.correct}
    right = {}
    for name, facts in (("all", files["choose"]), (given.domain, of_domain)):
        file = given.work / f"{name}-{given.size}.gguf"
        allocation["_made"](given.model, file, {"size": given.size, "facts": f"facts:{facts}"})
        answers = allocation["_answers"](file, given.work, files["judge"], None, given.limit)
        right[name] = np.array([answers[fact].correct for fact in known])
        print(f"chosen by {name}: {file.stat().st_size / 1e6:.2f} MB, {right[name].mean():.1%} of {len(known)} known")
    is_domain = np.array([answer.subject == given.domain for answer in known.values()])
    clusters = number_clusters([(answer.probe, answer.relation) for answer in known.values()])
    for name, these in ((given.domain, is_domain), ("elsewhere", ~is_domain)):
        by_all, by_domain = (right[each][these] for each in ("all", given.domain))
        counts = tally(by_all, by_domain, np.unique(clusters[these], return_inverse=True)[1])
        total = sum(counts, Counts())
        print(
            f"{name}: {by_all.mean():.1%} -> {by_domain.mean():.1%} of {these.sum()}, {total.lost} worse, "
            f"{total.gained} better, {write_p_value(run_paired_test(counts).p)}"
        )


if __name__ == "__main__":
    try:
        main()
    except CompressknowError as error:
        sys.exit(f"Error: {error}")
