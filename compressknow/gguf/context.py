"""Contexts of llama.cpp with several sequences, its tokenizer, and an answer that shows that a file works."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compressknow.base.errors import CompressknowError
from compressknow.gguf.llama_cpp import GgufModel, collect_errors, make_interruptible

# enum llama_flash_attn_type of llama.h.
_NO_FLASH_ATTENTION = 0
# Size of a context that reads one token, to see whether a file crashes llama.cpp.
_TRIAL_CELLS = 8


class Span(NamedTuple):
    """Next tokens of a sequence, from position `start`; logits are returned for the last `wanted` of them."""

    sequence: int
    start: int
    tokens: Sequence[int]
    wanted: int


class LlamaContext:
    """Sequences of one model, numbered from 0, with at most `cells` tokens together; a shared beginning counts once."""

    def __init__(self, model: GgufModel, *, cells: int, sequences: int, threads: int) -> None:
        self._ffi, self._lib, _ = model.native
        self.cells, self._rows = cells, model.rows
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = cells
        parameters.n_seq_max, parameters.kv_unified = sequences, True
        # Flash attention adds in half precision, and in another order for few rows: with it, log-probabilities of a
        # small Llama in float32 depend on the batch by up to 0.011, without it by 0.000002.
        parameters.flash_attn_type = _NO_FLASH_ATTENTION
        parameters.n_threads = parameters.n_threads_batch = threads
        errors = collect_errors()
        self._handle: Any = self._lib.llama_init_from_model(model.handle, parameters)
        if self._handle == self._ffi.NULL:
            raise CompressknowError(
                f"llama.cpp cannot run {model.path}.", why=(errors or [""])[0].strip() or None, hint="Free some memory."
            )
        self._memory = self._lib.llama_get_memory(self._handle)
        # Called between the steps of a pass.
        self._stops, self._raised = make_interruptible("bool(void *)", go_on=False)
        self._lib.llama_set_abort_callback(self._handle, self._stops, self._ffi.NULL)

    def close(self) -> None:
        """Free the context."""
        if self._handle is not None:
            self._lib.llama_free(self._handle)
            self._handle = None

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._memory, False)

    def fork(self, sequence: int, into: int) -> None:
        """Start another sequence with the tokens of this one, without a copy."""
        self._lib.llama_memory_seq_cp(self._memory, sequence, into, -1, -1)

    def forget(self, sequence: int) -> None:
        """Remove a sequence; tokens that it shares with others are kept."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def read(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Return the wanted logits in the order of the spans, [wanted, vocabulary], valid until the next call. Raises
        CompressknowError if the memory is full or a kernel fails, and KeyboardInterrupt during the pass."""
        ffi = self._ffi
        tokens = np.concatenate([np.asarray(span.tokens, dtype=np.int32) for span in spans])
        positions = np.concatenate([np.arange(span.start, span.start + len(span.tokens)) for span in spans])
        positions = positions.astype(np.int32)
        sequences = np.repeat([span.sequence for span in spans], [len(span.tokens) for span in spans]).astype(np.int32)
        wanted = np.concatenate([np.arange(len(span.tokens), 0, -1) <= span.wanted for span in spans]).astype(np.int8)
        counts, addresses = np.ones_like(tokens), sequences.ctypes.data + 4 * np.arange(len(tokens), dtype=np.uintp)
        batch = ffi.new("struct llama_batch *")
        batch.n_tokens = len(tokens)
        batch.token = ffi.cast("llama_token *", tokens.ctypes.data)
        batch.pos = ffi.cast("llama_pos *", positions.ctypes.data)
        batch.n_seq_id = ffi.cast("int32_t *", counts.ctypes.data)
        batch.seq_id = ffi.cast("llama_seq_id **", addresses.ctypes.data)
        batch.logits = ffi.cast("int8_t *", wanted.ctypes.data)
        errors = collect_errors()
        failed = self._lib.llama_decode(self._handle, batch[0])
        if self._raised:
            raise self._raised.pop()
        if failed:
            reason = "Its key-value cache is full." if failed == 1 else (errors or [""])[0].strip()
            raise CompressknowError("llama.cpp failed on a batch of prompts.", why=reason or f"It returned {failed}.")
        count = int(wanted.sum())
        values = ffi.buffer(self._lib.llama_get_logits(self._handle), 4 * count * self._rows)
        return np.frombuffer(values, dtype=np.float32).reshape(count, self._rows)

    def write(self, prompt: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """Yield logits after a prompt, then after each token of its greedy continuation; see `read`."""
        start, tokens = 0, list(prompt)
        while True:
            (logits,) = self.read([Span(0, start, tokens, 1)])
            start, tokens = start + len(tokens), [int(logits.argmax())]
            yield logits


# llama.h: no token.
_NONE = -1


class GgufTokenizer:
    """llama.cpp's tokenizer of a GGUF file.

    Attributes
    ----------
    adds_bos : whether `bos_token_id` is put before every text.
    bos_token_id, eos_token_id, unk_token_id : tokens that begin a text, end it, and stand for text that the vocabulary
        cannot represent; None if there is none.
    """

    def __init__(self, model: GgufModel) -> None:
        self._model, self._vocab = model, model.vocab
        self._ffi, self._lib, _ = model.native
        self.adds_bos = bool(self._lib.llama_vocab_get_add_bos(self._vocab))
        numbers = self._lib.llama_vocab_bos(self._vocab), self._lib.llama_vocab_eos(self._vocab)
        self.bos_token_id, self.eos_token_id = (None if number == _NONE else int(number) for number in numbers)
        unknown = model.meta("tokenizer.ggml.unknown_token_id")
        self.unk_token_id = None if unknown is None else int(unknown)

    def __len__(self) -> int:
        return self._model.rows

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:  # noqa: ARG002
        """Return ids of a text, with the tokens that begin and end every text if `add_special_tokens`."""
        # Names of special tokens are read as these tokens, as tokenizers of transformers do.
        return {"input_ids": self.encode(text, special=add_special_tokens, parse_special=True)}

    def encode(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        """Return the ids of a text, with the tokens that begin and end every text if `special`; parse names of special
        tokens in it if `parse_special`."""
        encoded = text.encode("utf-8", "replace")
        ids, count = self._fill(
            "llama_token[]",
            len(encoded) + 8,
            lambda *buffer: self._lib.llama_tokenize(
                self._vocab, encoded, len(encoded), *buffer, special, parse_special
            ),
        )
        return list(self._ffi.unpack(ids, count)) if count else []

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that are not UTF-8 are replaced."""
        tokens = [int(number) for number in ids]
        text, count = self._fill(
            "char[]",
            16 * len(tokens) + 16,
            lambda *buffer: self._lib.llama_detokenize(
                self._vocab, tokens, len(tokens), *buffer, False, not skip_special_tokens
            ),
        )
        return bytes(self._ffi.buffer(text, count)).decode("utf-8", "replace")

    def decode_token(self, token: int) -> bytes:
        """Return the bytes of a token."""
        text, count = self._fill(
            "char[]", 256, lambda *buffer: self._lib.llama_token_to_piece(self._vocab, token, *buffer, 0, True)
        )
        return bytes(self._ffi.buffer(text, count))

    def _fill(self, kind: str, size: int, fill: Callable[[Any, int], int]) -> tuple[Any, int]:
        """Return a buffer that llama.cpp has filled, and the number of its elements. For a buffer that is too small,
        `fill` returns the negative of the size that it needs."""
        while (count := fill(buffer := self._ffi.new(kind, size), size)) < 0:
            size = -count
        return buffer, count

    def is_end(self, token: int) -> bool:
        """Return whether llama.cpp stops at this token: an end of text, of a turn, of a message."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))


# Length of an answer that shows that a file works.
_ANSWER_TOKENS = 8
# Texts in several scripts, with names and numbers, to compare tokenizers.
_TEXTS = (
    "The capital of France is",
    "In 1998, São Paulo's 9,839,066 people didn't speak Māori.",
    "Photosynthesis was described by a Dutch physiologist.",
    "北京是中国的首都。 القاهرة عاصمة مصر.",
)


def complete_prompt(model: GgufModel, prompt: str) -> str:
    """Return llama.cpp's greedy continuation of a prompt. Raises CompressknowError if it produces NaN."""
    tokenizer = GgufTokenizer(model)
    ids: list[int] = tokenizer(prompt)["input_ids"] or [0]
    written: list[int] = []
    with closing(LlamaContext(model, cells=len(ids) + _ANSWER_TOKENS, sequences=1, threads=1)) as context:
        for logits in islice(context.write(ids), _ANSWER_TOKENS):
            if not np.isfinite(logits).all():
                raise CompressknowError(f"{model.path.name} produces NaN in llama.cpp.")
            written.append(int(logits.argmax()))
            if tokenizer.is_end(written[-1]):
                return tokenizer.decode(written[:-1])
    return tokenizer.decode(written)


def find_text_read_otherwise(model: GgufModel, tokenizer: Any) -> str | None:
    """Return a text that llama.cpp tokenizes differently from the checkpoint's tokenizer; None if none is found."""
    gguf_tokenizer = GgufTokenizer(model)
    return next((text for text in _TEXTS if gguf_tokenizer(text)["input_ids"] != tokenizer(text)["input_ids"]), None)


def _try_file(path: Path) -> None:
    """Tokenize a character that no vocabulary has, and read a token, in a separate process, since both may crash."""
    model = GgufModel(path, trial=True)
    GgufTokenizer(model)("\ue000")
    context = LlamaContext(model, cells=_TRIAL_CELLS, sequences=1, threads=1)
    context.read([Span(0, 0, [0], 1)])


if __name__ == "__main__":
    try:
        _try_file(Path(sys.argv[1]))
    finally:
        # Only crashes matter: Python errors will be raised again when the file is loaded.
        os._exit(0)
