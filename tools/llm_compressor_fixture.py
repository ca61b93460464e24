"""Make `tests/data/llm_compressor`: checkpoints quantized by llm-compressor, for tests that read them.

    python tools/llm_compressor_fixture.py

Run it in an environment with ``pip install llmcompressor==0.14.0.1``, which needs its own versions of transformers and
compressed-tensors. The original is the tiny Llama of `tests/knowing.py`, which knows 64 made-up facts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "data" / "llm_compressor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    make_checkpoints()


def make_checkpoints() -> None:
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(ROOT))
    from tests.knowing import save_trained

    with tempfile.TemporaryDirectory() as temporary:
        original = save_trained("llama", Path(temporary) / "knowing-llama")
        for name, modifier in make_modifiers().items():
            model = AutoModelForCausalLM.from_pretrained(original)
            oneshot(model=model, recipe=modifier)
            model.save_pretrained(FOLDER / name, save_compressed=True)
            AutoTokenizer.from_pretrained(original).save_pretrained(FOLDER / name)
            (FOLDER / name / "recipe.yaml").unlink(missing_ok=True)
            config = json.loads((FOLDER / name / "config.json").read_text())
            print(f"{name}: {config['quantization_config']['format']}")


def make_modifiers() -> dict[str, Any]:
    """Return the modifier that quantizes each checkpoint."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
    from llmcompressor.modifiers.quantization import QuantizationModifier

    # The preset for 4-bit weights has groups of 128, which is more than this model's rows have.
    weights = QuantizationArgs(num_bits=4, group_size=32, strategy=QuantizationStrategy.GROUP, symmetric=True)
    w4a16 = QuantizationScheme(targets=["Linear"], weights=weights)
    return {
        "w8a8": QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        "w4a16": QuantizationModifier(config_groups={"group_0": w4a16}, ignore=["lm_head"]),
    }


if __name__ == "__main__":
    main()
