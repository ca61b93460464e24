#!/usr/bin/env bash
# What `make demo` runs: convert and verify a real model, then evaluate both on the same facts and write the report.
set -euo pipefail
cd "$(dirname "$0")/.."

show() { printf '\n$ %s\n' "$*"; "$@"; }

show python examples/smollm2.py build/smollm2
show compressknow convert build/smollm2 build/smollm2-att-int8 --scope attention --prune 0.2 --quantize int8 --overwrite
show compressknow verify build/smollm2-att-int8
show python examples/complete.py build/smollm2 build/smollm2-att-int8
show compressknow report build/smollm2 build/smollm2-att-int8 --limit 300 --answers build/answers -o build/report.html -o build/report.md --overwrite
