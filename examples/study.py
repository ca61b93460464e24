"""Convert a model in every way of a small study, and report on all of them against the original.

Attention, feed-forward and overall, each pruned by 10 to 90 % (or by `--amounts`) and quantized by both int8 schemes:
33 conversions, made in seconds and removed once they are asked. All other options go to `compressknow report`.

    python examples/study.py MODEL build/study -p atlas --limit 300 -o report.html

So the studies in examples/reports were made (DATA and MODELS are folders of one's own):

    python examples/study.py MODELS/minilm-facts build/study-minilm -p lama:trex --data DATA --limit 2000 --no-facts \\
        -o examples/reports/minilm-trex.html -o examples/reports/minilm-trex.md
    python examples/study.py build/smollm2 build/study-smollm2 -p atlas --limit 300 \\
        -o examples/reports/smollm2-atlas.html -o examples/reports/smollm2-atlas.md
    python examples/study.py build/smollm2 build/study-smollm2 -p lm-eval:winogrande -p lm-eval:piqa --data DATA \\
        --limit 100 --no-facts -o examples/reports/smollm2-tasks.html -o examples/reports/smollm2-tasks.md
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import compressknow
from compressknow.cli import main as cli
from compressknow.errors import CompressknowError

SCOPES = {"att": "attention", "ff": "feed-forward", "overall": "overall"}
AMOUNTS = "10,20,30,40,50,60,70,80,90"
SCHEMES = ["int8", "int8-paper"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path, help="folder for the conversions and the answers")
    parser.add_argument("--amounts", default=AMOUNTS, help="pruned shares in per cent  [default: %(default)s]")
    given, options = parser.parse_known_args()
    amounts = [int(amount) for amount in given.amounts.split(",")]
    variants = [*pruned(given.model, given.work, amounts), *quantized(given.model, given.work)]
    code = cli(["report", given.model, *map(str, variants), "--answers", str(given.work / "answers"), *options])
    if code == 0:
        # The answers stay, so that a second run asks nothing; the models are made again in seconds.
        for variant in variants:
            shutil.rmtree(variant)
    return code


def pruned(model: str, work: Path, amounts: list[int]) -> list[Path]:
    folders = []
    for short, scope in SCOPES.items():
        for amount in amounts:
            folders.append(work / f"{short}-{amount}")
            compressknow.convert(model, folders[-1], scope=scope, prune=amount / 100, overwrite=True)
    return folders


def quantized(model: str, work: Path) -> list[Path]:
    folders = []
    for short, scope in SCOPES.items():
        for scheme in SCHEMES:
            folders.append(work / f"{short}-{scheme}")
            compressknow.convert(model, folders[-1], scope=scope, quantize=scheme, overwrite=True)
    return folders


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CompressknowError as error:
        sys.exit(f"Error: {error}")
