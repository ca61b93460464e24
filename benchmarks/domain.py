"""Compare what two files keep: types chosen by the facts of one domain, and by the facts of all domains.

    python examples/smollm2.py --off-grid build/smollm2-off
    python benchmarks/domain.py build/smollm2-off build/domain [--domain geography] [--size 80MB] [--limit 2000]

A fifth of the facts of atlas choose types, the others evaluate the files, in llama.cpp. Both files have the same size.
They are compared on facts that the original knows: those of the domain, and all others, which show what the choice
costs elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from allocation import divide_facts, evaluate, export_once

from compressknow.base.errors import CompressknowError
from compressknow.base.format import write_p_value
from compressknow.comparison.intervals import number_clusters, run_paired_test, tally
from compressknow.comparison.records import Counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path, help="folder for the files and the answers")
    parser.add_argument("--domain", default="geography")
    parser.add_argument("--size", default="80MB")
    parser.add_argument("--limit", type=int, default=None, help="maximum facts to evaluate  [default: all]")
    arguments = parser.parse_args()
    model, work, domain, size = arguments.model, arguments.work, arguments.domain, arguments.size
    files = divide_facts(work)
    of_domain = work / f"choose-{domain}.jsonl"
    lines = files["choose"].read_text("utf-8").splitlines(keepends=True)
    of_domain.write_text("".join(line for line in lines if json.loads(line)["subject"] == domain), "utf-8")
    exact = export_once(model, work / "exact.gguf", {"type": "bf16"})
    original = evaluate(exact, work, files["judge"], limit=arguments.limit)
    known = {fact: answer for fact, answer in original.items() if answer.correct}
    right = {}
    for name, facts in (("all", files["choose"]), (domain, of_domain)):
        file = export_once(model, work / f"{name}-{size}.gguf", {"size": size, "facts": f"facts:{facts}"})
        answers = evaluate(file, work, files["judge"], limit=arguments.limit)
        right[name] = np.array([answers[fact].correct for fact in known])
        megabytes = file.stat().st_size / 1e6
        print(f"chosen by {name}: {megabytes:.2f} MB, keeps {right[name].mean():.1%} of {len(known)} known facts")
    is_domain = np.array([answer.subject == domain for answer in known.values()])
    clusters = number_clusters([(answer.probe, answer.relation) for answer in known.values()])
    for name, selected in ((domain, is_domain), ("elsewhere", ~is_domain)):
        by_all, by_domain = (right[each][selected] for each in ("all", domain))
        counts = tally(by_all, by_domain, np.unique(clusters[selected], return_inverse=True)[1])
        total = sum(counts, Counts())
        print(
            f"{name}: {by_all.mean():.1%} -> {by_domain.mean():.1%} of {selected.sum()}, {total.lost} worse, "
            f"{total.gained} better, {write_p_value(run_paired_test(counts))}"
        )


if __name__ == "__main__":
    try:
        main()
    except CompressknowError as error:
        sys.exit(f"Error: {error}")
