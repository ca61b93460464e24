"""Running text, cut into chunks of tokens; the second half of each chunk is scored.

Follows llama.cpp's perplexity tool (tools/perplexity/perplexity.cpp, functions `perplexity` and `kl_divergence`): the
text's tokens are cut into chunks of n_ctx, without an incomplete last one; each chunk is read from its beginning, with
its first token replaced by BOS if the vocabulary wants one; and all tokens of its second half but the first are scored,
n_ctx - 1 - n_ctx // 2, so that each has at least half a chunk of context.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from compressknow.base.errors import UnsupportedError, UsageError
from compressknow.base.format import count
from compressknow.base.progress import Advance
from compressknow.base.reading import NotReadable, hash_json, open_regular
from compressknow.engine.language_model import check_tokens
from compressknow.evaluate.records import ALONE, MEASURED, NO_ROOM, OTHER_SIZE, OTHER_TOKENS, Chunk, ProbeEntry

if TYPE_CHECKING:
    import torch

    from compressknow.evaluate.scoring.scorer import MeasureKl


PROTOCOL = "text/1"
# Default tokens per chunk, as in llama.cpp, and default chunks per text.
CONTEXT, CHUNKS = 512, 64
# Bytes that are read per token, more than any text needs.
_BYTES_PER_TOKEN = 64


class TextReader(Protocol):
    """Interface of runtimes to a causal model that reads running text. `bos` is the token that replaces the first one
    of each chunk, None if the vocabulary wants none; `most` the number of positions, None if it is not limited; `rows`
    the number of tokens that the model can read."""

    bos: int | None
    most: int | None
    rows: int

    def encode(self, text: str) -> tuple[list[int], list[int] | None]:
        """Return ids without special tokens, and the bytes (UTF-8) up to the end of each, or None if not known."""

    def compute_log_probs(self, ids: Sequence[int], first: int) -> torch.Tensor:
        """Return log-probabilities after the tokens from `first` to the last but one: float32, [tokens - 1 - first,
        vocabulary]."""

    def continue_texts(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Continue prompts of one length greedily: [prompts][tokens]; after a text ends, its end token is repeated."""

    def ends(self, token: int) -> bool:
        """Return whether a text ends with this token."""


@dataclass(frozen=True)
class RunningText:
    """Text to be read by a model chunk by chunk.

    Attributes
    ----------
    name : ``text:`` and the name of the file.
    sha256, size : hash, and size in bytes, of the whole file.
    context : tokens per chunk; None for 512, or as many as the model has positions for.
    limit : maximum number of chunks, from the beginning; None for 64.
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
        """Return the maximum number of scored tokens: half of each chunk, and of the file's bytes."""
        return min(self.chunks * (self.context or CONTEXT), self.size) // 2

    def fingerprint(self) -> str:
        """Hash everything that determines what is evaluated: answers with the same hash are comparable."""
        values = [PROTOCOL, self.name, self.sha256, self.context, self.chunks]
        return hash_json(values)

    def read(self, context: int) -> str:
        """Read as much as the chunks need, without a final line break, as llama.cpp. Raises UsageError if it cannot."""
        most = min(self.chunks * context * _BYTES_PER_TOKEN, self.size + 1)
        try:
            with open_regular(self.path) as file:
                content = file.read(most)
            # A character that is cut at the end is left out.
            text = codecs.getincrementaldecoder("utf-8")().decode(content, final=len(content) < most)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.path} is not UTF-8: byte {error.start:,}.", hint="Save it as UTF-8, and try again."
            ) from None
        except (OSError, NotReadable) as error:
            raise UsageError(f"{self.path} cannot be read: {error}.") from None
        return text.removesuffix("\n")


_WHY = {
    "masked": "It fills blanks from both sides, so it only has a pseudo-perplexity (Salazar et al. 2020), which takes "
    "a pass per token and cannot be compared with published perplexities.",
    "seq2seq": "Its decoder depends on an encoder, which would read nothing: the figure would say little of the model.",
}
# Number of chunks, from the first, that are continued from their middle, and of tokens to continue them by.
CONTINUED, GREEDY_TOKENS = 16, 32


def check_family(name: str, family: str) -> None:
    if family != "causal":
        raise UnsupportedError(
            f"text: takes causal models; {name} is {family}.",
            _WHY.get(family),
            "Evaluate it on facts: atlas, lama:..., bear, facts:... and hf:....",
        )


def find_first_scored(context: int) -> int:
    """Return the position of the last token before the scored ones.

    >>> find_first_scored(512), 512 - 1 - find_first_scored(512)
    (256, 255)
    """
    return context // 2


def list_keys(number: int, context: int) -> list[str]:
    """Return the keys of the distributions of a chunk's scored tokens."""
    return [f"{number}:{position}" for position in range(context - 1 - find_first_scored(context))]


class TextChunks:
    """Chunks of a text as tokens of one model, `ids` [chunks, context] in int32, with BOS where it is read. The
    `context` is that of the text, else of the `reference`, else 512 or all positions of the model.

    Raises UsageError if the text is too short for one chunk, or the model for its tokens, CheckpointError if the model
    does not have one of these."""

    def __init__(self, reader: TextReader, text: RunningText, reference: ProbeEntry | None) -> None:
        self._reader, self._text = reader, text
        self.context = context = _choose_context(reader, text, reference)
        self._first = find_first_scored(context)
        ids, ends = reader.encode(text.read(context))
        if reader.bos is not None:
            # BOS precedes the text too, and is counted.
            ids, ends = [reader.bos, *ids], [0, *ends] if ends is not None else None
        number = min(text.chunks, len(ids) // context)
        if not number:
            raise UsageError(
                f"{text.path} is too short: {count(len(ids))} tokens, and a chunk takes {count(context)}.",
                hint="Give a longer text, or a smaller --context.",
            )
        self.ids = np.array(ids[: number * context], dtype=np.int32).reshape(number, context)
        if reader.bos is not None:
            self.ids[:, 0] = reader.bos
        check_tokens(int(self.ids.max()), reader.rows, text.name)
        # Bytes of the scored tokens of each chunk, which follow the first token of the second half.
        self._bytes: list[int] | None = None
        if ends is not None:
            table = np.array(ends[: number * context]).reshape(number, context)
            self._bytes = (table[:, -1] - table[:, self._first]).tolist()

    def read_all(
        self, *, done: Mapping[int, Chunk], known: Mapping[int, Chunk], measure_kl: MeasureKl | None, advance: Advance
    ) -> Iterator[Chunk]:
        """Yield the model's results for each chunk that is not `done`, in order. `known` chunks lack the divergences
        that `measure_kl` returns: their greedy continuations are reused."""
        total = len(self.ids)
        remaining = [number for number in range(total) if number not in done]
        advance(total - len(remaining), total)
        continued = [number for number in remaining if number < CONTINUED]
        greedy = {number: known[number].greedy.tolist() for number in continued if number in known}
        if new := [number for number in continued if number not in greedy]:
            most = self._reader.most
            tokens = GREEDY_TOKENS if most is None else min(GREEDY_TOKENS, most - self._first)
            prompts = [self.ids[number, : self._first].tolist() for number in new]
            greedy |= dict(zip(new, self._reader.continue_texts(prompts, tokens), strict=True))
        for read, number in enumerate(remaining, start=total - len(remaining) + 1):
            yield replace(self.read(number, measure_kl), greedy=np.array(greedy.get(number, []), dtype=np.int32))
            advance(read, total)

    def read(self, number: int, measure_kl: MeasureKl | None) -> Chunk:
        """Return the model's results for one chunk, without a continuation; `measure_kl` takes the distributions after
        each scored token, and returns their divergences (see `compressknow.evaluate.distributions`)."""
        import torch

        ids = self.ids[number]
        log_probs, scored = self._reader.compute_log_probs(ids.tolist(), self._first), ids[self._first + 1 :]
        targets = torch.tensor(scored.tolist(), device=log_probs.device).unsqueeze(1)
        divergences = measure_kl(list_keys(number, self.context), log_probs) if measure_kl else [None]
        return Chunk(
            number=number,
            ids=scored,
            logp=log_probs.gather(1, targets).squeeze(1).float().cpu().numpy(),
            top=log_probs.argmax(-1).cpu().numpy().astype(np.int32),
            kl=None if None in divergences else np.array(divergences, dtype=np.float64),
            bytes=None if self._bytes is None else self._bytes[number],
            greedy=np.array([], dtype=np.int32),
        )

    def make_entry(self, read: Sequence[Chunk], divergence: str) -> ProbeEntry:
        """Return the entry of ``probe.json``; `divergence` is what `describe_divergence` returns."""
        text = self._text
        return ProbeEntry(
            protocol=PROTOCOL,
            fingerprint=text.fingerprint(),
            facts=0,
            asked=0,
            limit=text.limit,
            source={"files": {text.path.name: text.sha256}},
            text={
                "context": self.context,
                "chunks": len(read),
                "tokens": sum(len(chunk.ids) for chunk in read),
                "bytes": None if self._bytes is None else sum(self._bytes),
                "divergence": divergence,
            },
        )


def _choose_context(reader: TextReader, text: RunningText, reference: ProbeEntry | None) -> int:
    context = text.context or (int((reference.text or {})["context"]) if reference else None)
    if context is None:
        return min(CONTEXT, reader.most or CONTEXT)
    if reader.most is not None and context > reader.most:
        raise UsageError(
            f"The model reads at most {count(reader.most)} tokens at once, not a chunk of {count(context)}.",
            hint=f"Pass --context {reader.most} or less.",
        )
    return context


def describe_divergence(read: tuple[Chunk, ...], *, reference: bool, same_tokens: bool, gave_up: bool | None) -> str:
    """Return `MEASURED`, or why a text has no divergences; `gave_up` is None if no distributions were stored at all."""
    if not reference or gave_up is None:
        return ALONE
    if all(chunk.kl is not None for chunk in read):
        return MEASURED
    if not same_tokens:
        return OTHER_TOKENS
    return NO_ROOM if gave_up else OTHER_SIZE
