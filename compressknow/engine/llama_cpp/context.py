"""Texts that llama.cpp reads side by side: sequences in one memory of keys and values, which may share beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compressknow.engine.llama_cpp.model import GgufModel
from compressknow.engine.llama_cpp.native import errors_logged, interruptible
from compressknow.errors import CompressknowError

# enum llama_flash_attn_type of llama.h.
_NO_FLASH_ATTENTION = 0


class Span(NamedTuple):
    """Tokens that a sequence reads next.

    Attributes
    ----------
    start : the position of the first one.
    wanted : so many of the last ones are to be given logits.
    """

    sequence: int
    start: int
    tokens: Sequence[int]
    wanted: int


class Context:
    """Sequences of one model.

    Parameters
    ----------
    cells : tokens that all sequences hold together; a beginning that several share counts once.
    sequences : numbered from 0.
    """

    def __init__(self, model: GgufModel, *, cells: int, sequences: int, threads: int) -> None:
        self._ffi, self._lib, _ = model.native
        self.cells, self._rows = cells, model.rows
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = cells
        parameters.n_seq_max, parameters.kv_unified = sequences, True
        # It adds in half precision, and in another order for few rows: with it, log-probabilities of a small Llama in
        # float32 depend on the batch by up to 0.011, without it by 0.000002.
        parameters.flash_attn_type = _NO_FLASH_ATTENTION
        parameters.n_threads = parameters.n_threads_batch = threads
        with errors_logged() as errors:
            self._handle: Any = self._lib.llama_init_from_model(model.handle, parameters)
        if self._handle == self._ffi.NULL:
            self._handle = None
            raise CompressknowError(
                f"llama.cpp cannot run {model.path}.", why=(errors or [""])[0].strip() or None, hint="Free some memory."
            )
        self._memory = self._lib.llama_get_memory(self._handle)
        # Called between the steps of a pass.
        self._stops, self._raised = interruptible("bool(void *)", go_on=False)
        self._lib.llama_set_abort_callback(self._handle, self._stops, self._ffi.NULL)

    def close(self) -> None:
        """Let go of the memory."""
        if self._handle is not None:
            self._lib.llama_free(self._handle)
            self._handle = None

    def clear(self) -> None:
        """Forget all sequences."""
        self._lib.llama_memory_clear(self._memory, False)

    def fork(self, sequence: int, into: int) -> None:
        """Let another sequence begin with all that this one has read; nothing is copied."""
        self._lib.llama_memory_seq_cp(self._memory, sequence, into, -1, -1)

    def forget(self, sequence: int) -> None:
        """Free what this sequence alone has read."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def read(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Logits where they are wanted, in the order of the spans, [wanted, vocabulary]; valid until the next call.

        Raises CompressknowError where the memory has no room, or a kernel fails; KeyboardInterrupt without waiting for
        the end of the pass.
        """
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
        with errors_logged() as errors:
            failed = self._lib.llama_decode(self._handle, batch[0])
        if self._raised:
            raise self._raised.pop()
        if failed:
            reason = "Its memory of keys and values is full." if failed == 1 else (errors or [""])[0].strip()
            raise CompressknowError("llama.cpp failed on a batch of prompts.", why=reason or f"It returned {failed}.")
        count = int(wanted.sum())
        values = ffi.buffer(self._lib.llama_get_logits(self._handle), 4 * count * self._rows)
        return np.frombuffer(values, dtype=np.float32).reshape(count, self._rows)
