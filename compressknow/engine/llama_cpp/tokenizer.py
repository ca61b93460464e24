"""llama.cpp's tokenizer of a GGUF file, with what `compressknow.evaluate.scoring` asks of one of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from compressknow.engine.llama_cpp.model import GgufModel

# llama.h: no token.
_NONE = -1


class GgufTokenizer:
    """Splits texts as llama.cpp does where the file is deployed."""

    def __init__(self, model: GgufModel) -> None:
        self._model, self._vocab = model, model.vocab
        self._ffi, self._lib, _ = model.native

    def __len__(self) -> int:
        return self._model.rows

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:  # noqa: ARG002
        """Ids of a text, with what the file says that every text begins or ends with, if `add_special_tokens`."""
        # Special tokens that a text spells are read as such, as tokenizers of transformers do.
        return {"input_ids": self.ids(text, special=add_special_tokens, parse_special=True)}

    def ids(self, text: str, *, special: bool, parse_special: bool) -> list[int]:
        """Ids of a text, with what every text begins or ends with if `special`; names of special tokens in it are these
        tokens if `parse_special`.
        """
        encoded = text.encode("utf-8", "replace")
        size = len(encoded) + 8
        while True:
            ids = self._ffi.new("llama_token[]", size)
            count = self._lib.llama_tokenize(self._vocab, encoded, len(encoded), ids, size, special, parse_special)
            if count >= 0:
                return list(self._ffi.unpack(ids, count)) if count else []
            size = -count

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that make no letter are replaced."""
        given = [int(number) for number in ids]
        size = 16 * len(given) + 16
        while True:
            text = self._ffi.new("char[]", size)
            count = self._lib.llama_detokenize(
                self._vocab, given, len(given), text, size, False, not skip_special_tokens
            )
            if count >= 0:
                return bytes(self._ffi.buffer(text, count)).decode("utf-8", "replace")
            size = -count

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        size = 256
        while True:
            text = self._ffi.new("char[]", size)
            count = self._lib.llama_token_to_piece(self._vocab, token, text, size, 0, True)
            if count >= 0:
                return bytes(self._ffi.buffer(text, count))
            size = -count

    @property
    def begins_texts(self) -> bool:
        """Whether `bos_token_id` is put before every text."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    def ends(self, token: int) -> bool:
        """Whether llama.cpp stops at this token: an end of text, of a turn, of a message."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def bos_token_id(self) -> int | None:
        """What a text begins with, where anything."""
        return _token(self._lib.llama_vocab_bos(self._vocab))

    @cached_property
    def eos_token_id(self) -> int | None:
        """What a text ends with."""
        return _token(self._lib.llama_vocab_eos(self._vocab))

    @cached_property
    def unk_token_id(self) -> int | None:
        """What stands for a text that the vocabulary cannot spell."""
        found = self._model.meta("tokenizer.ggml.unknown_token_id")
        return int(found) if found is not None else None


def _token(number: int) -> int | None:
    return None if number == _NONE else int(number)
