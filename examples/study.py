"""Convert a model in every way of a small study, and report on all of them against the original.

Attention, feed-forward and overall, each pruned by 10 to 90 % and quantized by both int8 schemes: 33 conversions, which
are made in seconds and removed once they are asked. Everything after the work folder goes to `compressknow report`.

    python examples/study.py MODEL build/study -p atlas --limit 300 -o report.html

The reports in examples/reports were made by (DATA and MODELS are folders of one's own):

    python examples/study.py MODELS/minilm-facts build/study-minilm -p lama:trex --data DATA --limit 2000 --no-facts \\
        -o examples/reports/minilm-trex.html -o examples/reports/minilm-trex.md
    python examples/study.py build/smollm2 build/study-smollm2 -p atlas -p lm-eval:winogrande -p lm-eval:piqa \\
        --data DATA --limit 200 -o examples/reports/smollm2.html -o examples/reports/smollm2.md
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import compressknow
from compressknow.cli import main as cli

SCOPES = {"att": "attention", "ff": "feed-forward", "overall": "overall"}
AMOUNTS = [tenth / 10 for tenth in range(1, 10)]
SCHEMES = ["int8", "int8-paper"]


def main() -> int:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model, work, options = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    variants = [*pruned(model, work), *quantized(model, work)]
    code = cli(["report", model, *map(str, variants), "--answers", str(work / "answers"), *options])
    if code == 0:
        # The answers stay, so that a second run asks nothing; the models are made again in seconds.
        for variant in variants:
            shutil.rmtree(variant)
    return code


def pruned(model: str, work: Path) -> list[Path]:
    folders = []
    for short, scope in SCOPES.items():
        for amount in AMOUNTS:
            folders.append(work / f"{short}-{amount:.0%}".replace("%", ""))
            compressknow.convert(model, folders[-1], scope=scope, prune=amount, overwrite=True)
    return folders


def quantized(model: str, work: Path) -> list[Path]:
    folders = []
    for short, scope in SCOPES.items():
        for scheme in SCHEMES:
            folders.append(work / f"{short}-{scheme}")
            compressknow.convert(model, folders[-1], scope=scope, quantize=scheme, overwrite=True)
    return folders


if __name__ == "__main__":
    sys.exit(main())
