"""A text to be read chunk by chunk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from compressknow.errors import UsageError
from compressknow.reading import NotReadable, open_regular

PROTOCOL = "text/1"
# Tokens of a chunk, as llama.cpp has them, and chunks of a text where no --limit says how many.
CONTEXT, CHUNKS = 512, 64
# No more of a file is read than these bytes per token, which no text has.
_BYTES_PER_TOKEN = 64


@dataclass(frozen=True)
class RunningText:
    """A text to be read by a model chunk by chunk.

    Attributes
    ----------
    name : ``text:`` and the file's own name.
    sha256 : of the whole file.
    size : of the file, in bytes.
    context : tokens per chunk; None for 512, or as many as the model has positions for.
    limit : at most so many chunks, the first ones; None for 64.
    """

    name: str
    path: Path
    sha256: str
    size: int
    context: int | None = None
    limit: int | None = None

    @property
    def chunks(self) -> int:
        """The most chunks that are read."""
        return self.limit or CHUNKS

    @property
    def most_scored(self) -> int:
        """The most tokens that can be scored: half of each chunk, and no more than the file has bytes."""
        return min(self.chunks * (self.context or CONTEXT), self.size) // 2

    def fingerprint(self) -> str:
        """A hash of all that decides what is evaluated: the same one means that answers can be set side by side."""
        return hashlib.sha256(
            json.dumps([PROTOCOL, self.name, self.sha256, self.context, self.chunks]).encode()
        ).hexdigest()

    def read(self, context: int) -> str:
        """As much of the text as the chunks can take, without the line end of its last line, as llama.cpp reads it.

        Raises UsageError where the file is not UTF-8, or cannot be read any more.
        """
        most = min(self.chunks * context * _BYTES_PER_TOKEN, self.size + 1)
        try:
            with open_regular(self.path) as file:
                content = file.read(most)
            text = _decoded(content, whole=len(content) < most)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.path} is not UTF-8: byte {error.start:,}.", hint="Save it as UTF-8, and try again."
            ) from None
        except (OSError, NotReadable) as error:
            raise UsageError(f"{self.path} cannot be read: {error}.") from None
        return text.removesuffix("\n")


def _decoded(content: bytes, *, whole: bool) -> str:
    """The text; where it is cut, a character that is cut with it is left out."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        if whole or error.start < len(content) - 3:
            raise
        return content[: error.start].decode("utf-8")
