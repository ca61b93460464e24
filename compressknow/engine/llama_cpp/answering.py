"""One answer of a GGUF file in llama.cpp: that it loads, computes numbers, and writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compressknow.engine.llama_cpp.context import Context, Span
from compressknow.engine.llama_cpp.model import GgufModel
from compressknow.engine.llama_cpp.tokenizer import GgufTokenizer
from compressknow.errors import CompressknowError


def answer(path: Path, prompt: str, tokens: int = 8) -> str:
    """Return what llama.cpp writes after a prompt, the likeliest token each time; it may end early.

    The file is taken as sound: one that llama.cpp has just written.

    Raises
    ------
    CheckpointError, UnsupportedError : see `GgufModel`.
    CompressknowError : it computes no numbers, or fails.
    """
    model = GgufModel(path, trial=True)
    context = None
    try:
        tokenizer = GgufTokenizer(model)
        read: list[int] = tokenizer(prompt)["input_ids"] or [0]
        context = Context(model, cells=len(read) + tokens, sequences=1, threads=1)
        written: list[int] = []
        start, given = 0, read
        while len(written) < tokens:
            logits = context.read([Span(0, start, given, 1)])[0]
            if not np.isfinite(logits).all():
                raise CompressknowError(f"{path.name} computes no numbers in llama.cpp (NaN).")
            start, given = start + len(given), [int(logits.argmax())]
            if tokenizer.ends(given[0]):
                break
            written += given
        return tokenizer.decode(written)
    finally:
        if context is not None:
            context.close()
        model.close()
