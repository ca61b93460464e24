"""Let two checkpoints of one model complete the same sentences greedily, and print both completions.

python examples/complete.py build/smollm2 build/smollm2-att-int8
"""

from __future__ import annotations

import argparse
from typing import Any

PROMPTS = ("The capital of France is", "The chemical symbol for gold is", "The largest planet in our solar system is")
COLUMN = 43


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("original", help="a checkpoint, with its tokenizer")
    parser.add_argument("converted", help="a conversion of it")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    import compressknow

    tokenizer = AutoTokenizer.from_pretrained(arguments.original)
    models = [compressknow.load(folder) for folder in (arguments.original, arguments.converted)]
    print_row("", "original", "converted")
    for prompt in PROMPTS:
        print_row(prompt, *(complete(model, tokenizer, prompt) for model in models))


def complete(model: Any, tokenizer: Any, prompt: str, tokens: int = 10) -> str:
    """Return the greedy continuation of a prompt, `tokens` long, on one line."""
    import torch

    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return " ".join(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).split())


def print_row(*cells: str) -> None:
    print("".join(cell.ljust(COLUMN) for cell in cells).rstrip())


if __name__ == "__main__":
    main()
