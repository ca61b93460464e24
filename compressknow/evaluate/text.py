"""Running text: cut into chunks of tokens, of which each second half is scored.

As llama.cpp's perplexity tool does it (tools/perplexity/perplexity.cpp, functions `perplexity` and `kl_divergence`):
the text's tokens in chunks of n_ctx, the last one dropped where it is not whole; each chunk read from its beginning,
with the BOS token in the place of its first one where the vocabulary wants it; and of its second half all tokens but
the first scored, n_ctx - 1 - n_ctx // 2, so that each has half a chunk before it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.base.format import count
from compressknow.base.progress import Advance
from compressknow.base.reading import NotReadable, open_regular
from compressknow.engine.language_model import check_tokens
from compressknow.evaluate.records import ALONE, MEASURED, NO_ROOM, OTHER_SIZE, OTHER_TOKENS, Chunk, ProbeEntry

if TYPE_CHECKING:
    import torch

    from compressknow.evaluate.scoring.scorer import MeasureKl


PROTOCOL = "text/1"
# Tokens of a chunk, as llama.cpp has them, and chunks of a text where no --limit says how many.
CONTEXT, CHUNKS = 512, 64
# No more of a file is read than these bytes per token, which no text has.
_BYTES_PER_TOKEN = 64


class TextReader(Protocol):
    """Causal model as a runtime gives it for running text.

    Attributes
    ----------
    bos : the token that takes the place of each chunk's first, where the vocabulary wants one; else None.
    most : positions that the model has, or None if nothing bounds them.
    rows : tokens that the model reads.
    """

    bos: int | None
    most: int | None
    rows: int

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Return ids, none of them special, and how many bytes (UTF-8) end with each; None if that is not told."""

    def compute_log_probs(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """Return log-probabilities of what follows each token from `first` to the last but one: float32, [tokens - 1 -
        first, vocabulary]."""

    def continue_texts(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Continue each of the prompts, which are of one length, with the likeliest token each time: [prompts][tokens];
        whatever follows the end of the text is the end again, and takes no time."""

    def ends(self, token: int) -> bool:
        """Return whether a text ends with this token."""


@dataclass(frozen=True)
class RunningText:
    """Text to be read by a model chunk by chunk.

    Attributes
    ----------
    name : ``text:`` and the file's own name.
    sha256, size : of the whole file; in bytes.
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
        return self.limit or CHUNKS

    @property
    def most_scored(self) -> int:
        """Return the most tokens that can be scored: half of each chunk, and no more than the file has bytes."""
        return min(self.chunks * (self.context or CONTEXT), self.size) // 2

    def fingerprint(self) -> str:
        """Hash all that decides what is evaluated: answers with the same hash can be compared."""
        decides = [PROTOCOL, self.name, self.sha256, self.context, self.chunks]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def read(self, context: int) -> str:
        """Read as much as the chunks can take, without the line end of the last line, as llama.cpp reads it. Raises
        UsageError if the file is not UTF-8, or cannot be read any more."""
        most = min(self.chunks * context * _BYTES_PER_TOKEN, self.size + 1)
        try:
            with open_regular(self.path) as file:
                content = file.read(most)
            # A character that is cut in half at the end is left out.
            text = codecs.getincrementaldecoder("utf-8")().decode(content, final=len(content) < most)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.path} is not UTF-8: byte {error.start:,}.", hint="Save it as UTF-8, and try again."
            ) from None
        except (OSError, NotReadable) as error:
            raise UsageError(f"{self.path} cannot be read: {error}.") from None
        return text.removesuffix("\n")


_WHY = {
    "masked": "It fills blanks from both sides: what it gives to a text (a pseudo-perplexity, Salazar et al. 2020) is "
    "not a perplexity, takes a pass per token, and cannot be compared with published figures.",
    "seq2seq": "Its decoder writes what an encoder was given, here nothing: the figure would say little of the model.",
}
# The first so many chunks are continued from their middle, by so many tokens.
CONTINUED, GREEDY_TOKENS = 16, 32


def check_family(name: str, family: str) -> None:
    if family != "causal":
        raise UnsupportedError(
            f"text: takes causal models; {name} is {family}.",
            _WHY.get(family),
            "Evaluate it on facts: atlas, lama:..., bear, facts:... and hf:....",
        )


@dataclass(frozen=True)
class TextChunks:
    """Text as one model's tokens, int32 [chunks, context], BOS in its place; and how many bytes of it the scored tokens
    of each chunk stand for, None if the tokenizer does not tell."""

    ids: np.ndarray
    bytes: tuple[int, ...] | None

    @property
    def context(self) -> int:
        return int(self.ids.shape[1])


def find_first_scored(context: int) -> int:
    """Return the place of the token after which the first one is scored.

    >>> find_first_scored(512), 512 - 1 - find_first_scored(512)
    (256, 255)
    """
    return context // 2


def cut_chunks(reader: TextReader, text: RunningText, context: int) -> TextChunks:
    """Cut the text into chunks of `context` tokens. Raises UsageError if it is too short for one, CheckpointError
    if a token is none of the model's."""
    ids, ends = reader.encode(text.read(context))
    if reader.bos is not None:
        # It stands before the text too, and is counted.
        ids, ends = [reader.bos, *ids], [0, *ends] if ends is not None else None
    number = min(text.chunks, len(ids) // context)
    if not number:
        raise UsageError(
            f"{text.path} is too short: {count(len(ids))} tokens, and a chunk takes {count(context)}.",
            hint="Give a longer text, or a smaller --context.",
        )
    cut = np.array(ids[: number * context], dtype=np.int32).reshape(number, context)
    if reader.bos is not None:
        cut[:, 0] = reader.bos
    check_tokens(int(cut.max()), reader.rows, text.name)
    lengths = None
    if ends is not None:
        # Bytes of the scored tokens, which come after the first token of the second half.
        table = np.array(ends[: number * context]).reshape(number, context)
        lengths = tuple((table[:, -1] - table[:, find_first_scored(context)]).tolist())
    return TextChunks(cut, lengths)


def choose_context(reader: TextReader, text: RunningText, reference: ProbeEntry | None) -> int:
    """Choose the tokens per chunk: those asked for, else the original's, else 512 or as many as there is room for."""
    wanted = text.context or (int((reference.text or {})["context"]) if reference else None)
    if wanted is None:
        return min(CONTEXT, reader.most or CONTEXT)
    if reader.most is not None and wanted > reader.most:
        raise UsageError(
            f"The model reads {count(reader.most)} tokens at once: no chunk of {count(wanted)} fits.",
            hint=f"Pass --context {reader.most} or less.",
        )
    return wanted


def read_text(
    reader: TextReader,
    chunks: TextChunks,
    *,
    done: Mapping[int, Chunk],
    known: Mapping[int, Chunk],
    measure_kl: MeasureKl | None,
    advance: Advance,
) -> Iterator[Chunk]:
    """Yield what the model gives to each chunk that is not `done`, one after the other.

    Parameters
    ----------
    known : chunks that this model has read already, without the divergences that are wanted now: what it writes after
        them is taken from there.
    measure_kl : takes the distributions after each scored token, and returns their divergences; see
        `compressknow.evaluate.distributions`.
    """
    total = len(chunks.ids)
    left = [number for number in range(total) if number not in done]
    advance(total - len(left), total)
    first = [number for number in left if number < CONTINUED]
    written = {number: known[number].greedy.tolist() for number in first if number in known}
    if new := [number for number in first if number not in written]:
        middle = find_first_scored(chunks.context)
        room = GREEDY_TOKENS if reader.most is None else min(GREEDY_TOKENS, reader.most - middle)
        texts = reader.continue_texts([chunks.ids[number, :middle].tolist() for number in new], room)
        written |= dict(zip(new, texts, strict=True))
    for read, number in enumerate(left, start=total - len(left) + 1):
        chunk = read_chunk(reader, chunks, number, measure_kl)
        yield replace(chunk, greedy=np.array(written.get(number, []), dtype=np.int32))
        advance(read, total)


def read_chunk(reader: TextReader, chunks: TextChunks, number: int, measure_kl: MeasureKl | None) -> Chunk:
    import torch

    first = find_first_scored(chunks.context)
    ids = chunks.ids[number]
    log_probs, scored = reader.compute_log_probs(ids.tolist(), first), ids[first + 1 :]
    places = torch.tensor(scored.tolist(), device=log_probs.device).unsqueeze(1)
    divergences = measure_kl(list_keys(number, chunks.context), log_probs) if measure_kl else [None]
    return Chunk(
        number=number,
        ids=scored,
        logp=log_probs.gather(1, places).squeeze(1).float().cpu().numpy(),
        top=log_probs.argmax(-1).cpu().numpy().astype(np.int32),
        kl=None if None in divergences else np.array(divergences, dtype=np.float64),
        bytes=chunks.bytes[number] if chunks.bytes is not None else None,
        greedy=np.array([], dtype=np.int32),
    )


def list_keys(number: int, context: int) -> list[str]:
    """Return what the distributions of a chunk are kept under."""
    return [f"{number}:{place}" for place in range(context - 1 - find_first_scored(context))]


def make_text_entry(text: RunningText, chunks: TextChunks, read: tuple[Chunk, ...], compared: str) -> ProbeEntry:
    """Return the entry of ``probe.json``; `compared` says whether there are divergences, and if not, why."""
    return ProbeEntry(
        protocol=PROTOCOL,
        fingerprint=text.fingerprint(),
        facts=0,
        asked=0,
        limit=text.limit,
        source={"files": {text.path.name: text.sha256}},
        text={
            "context": chunks.context,
            "chunks": len(read),
            "tokens": sum(len(chunk.ids) for chunk in read),
            "bytes": None if chunks.bytes is None else sum(chunks.bytes),
            "divergence": compared,
        },
    )


def describe_divergence(read: tuple[Chunk, ...], *, reference: bool, same_tokens: bool, gave_up: bool | None) -> str:
    """Say whether a text has divergences, or why not; `gave_up` is None if no distributions were kept at all."""
    if not reference or gave_up is None:
        return ALONE
    if all(chunk.kl is not None for chunk in read):
        return MEASURED
    if not same_tokens:
        return OTHER_TOKENS
    return NO_ROOM if gave_up else OTHER_SIZE
