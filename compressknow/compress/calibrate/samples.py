"""A model's own texts, to calibrate it on: what it writes when it draws each token from its own distribution.

They lie in the model's domain whatever that is (a language, code, proteins) and need no download (Liu et al. 2023,
"LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", 2.1).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from compressknow.compress.calibrate.packing import Form
from compressknow.compress.calibrate.writers import WRITERS, Pieces
from compressknow.compress.pool import Pool, Stopped
from compressknow.engine.language_model import LanguageModel
from compressknow.engine.load import reason_of
from compressknow.errors import CompressknowError, UnsupportedError
from compressknow.quiet import Advance, counted

HINT = "Give a text to calibrate it on: FILE.txt, FILE.jsonl or hf:DATASET."


def compute_dtype() -> str:
    """What texts are written in: bfloat16 where the CPU has instructions for it, which is faster, else float32."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def check_writes(folder: Path, form: Form) -> None:
    """Raise UnsupportedError where a model of this form writes no text by itself, before it is loaded."""
    if form.family not in WRITERS:
        why = "It has no language-modelling head."
    elif form.family != "causal" and not form.marks:
        why = "Its tokenizer has neither a mask token nor sentinels, so that it fills no blanks."
    else:
        return
    raise UnsupportedError(f"{folder} cannot write a text to be calibrated on.", why, HINT)


def samples(language_model: LanguageModel, form: Form, tokens: int, seed: int, advance: Advance | None) -> Pieces:
    """Token ids of texts that the model writes, `tokens` or more in all, without special tokens around them.

    The same on one machine whatever the number of threads: each batch of texts is written by one thread, from numbers
    that the seed and the batch's place alone determine. `advance` is told tokens done and in all, by one thread at
    a time, not always the same.

    Raises UnsupportedError where the model cannot write, CompressknowError where it gives NaN.
    """
    name = type(language_model.model).__name__
    if language_model.family != form.family:
        raise UnsupportedError(f"{name} is no {form.family} language model, as its config says.", hint=HINT)
    found: Pieces = []
    try:
        with Pool() as pool:
            writer = WRITERS[form.family](language_model.model, form, tokens, pool.check, counted(advance, tokens))
            batches = 0
            while (missing := tokens - sum(map(len, found))) > 0:
                more = min(pool.threads, -(-missing // writer.batch_tokens))
                wave = range(batches, batches + more)
                for pieces in pool.map(lambda batch: writer.write(_generator(seed, batch)), wave):
                    found += pieces
                batches += more
                if not any(found):
                    raise UnsupportedError(f"{name} writes nothing by itself.", hint=HINT)
    except (CompressknowError, Stopped):
        raise
    except Exception as error:
        raise UnsupportedError(f"{name} cannot write a text to be calibrated on.", reason_of(error), HINT) from error
    return found


def _generator(seed: int, batch: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{batch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
