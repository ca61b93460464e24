"""Texts that a model writes itself, for its calibration.

They are in the model's domain, whatever that is (a language, code, proteins), and need no download (Liu et al. 2023,
"LLM-QAT: Data-Free Quantization Aware Training for Large Language Models", 2.1).
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError
from compressknow.base.progress import Advance, count_progress
from compressknow.compress.blocks import Pool, TaskStopped
from compressknow.compress.calibrate.sequences import SequenceFormat, blank_out
from compressknow.engine.identity import locate, read_contents
from compressknow.engine.language_model import find_decoder_start, load_language_model
from compressknow.engine.load import find_reason

Pieces = list[list[int]]


@dataclass
class Writer(abc.ABC):
    """Writer of texts in batches, each with its own random generator; `wanted` is the number of tokens needed in total.
    `check` raises if the work must stop; `on_written` is called with the number of tokens written since the last call.
    """

    model: PreTrainedModel
    form: SequenceFormat
    wanted: int
    check: Callable[[], None]
    on_written: Callable[[int], None]

    def __post_init__(self) -> None:
        form = self.form
        self.rows, self.tokens = self.choose_size()
        # Tokens that are never drawn, since they are not text: bool [rows of the embedding].
        self.barred = torch.ones(form.rows, dtype=torch.bool)
        sentinels = form.marks if form.has_sentinels else ()
        drawn = (*form.known, *(form.suffix + form.separator + sentinels if form.family != "masked" else ()))
        self.barred[list(drawn)] = False

    @abc.abstractmethod
    def choose_size(self) -> tuple[int, int]:
        """Choose the number of texts in a batch, and about how many tokens are drawn for each."""

    def write(self, seed: int, batch: int) -> Pieces:
        """Write the batch of this number: texts as token ids, each followed by a separator."""
        digest = hashlib.sha256(f"{seed}/{batch}".encode()).digest()
        with torch.inference_mode():
            texts = self._write(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        return [[*ids, *self.form.separator] for ids in texts if ids]

    @abc.abstractmethod
    def _write(self, generator: torch.Generator) -> Pieces: ...

    def draw_tokens(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ordinary tokens uniformly for each text of a batch: int64 [texts, tokens]."""
        indices = torch.randint(len(self.form.known), (self.rows, tokens), generator=generator)
        return torch.tensor(self.form.known)[indices]

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a token by its probability for each row of logits [rows, vocabulary]: int64 [rows, 1]. Raises
        FloatingPointError for NaN."""
        self.check()
        width = min(logits.shape[-1], len(self.barred))
        logits = logits[:, :width].float().masked_fill(self.barred[:width], -torch.inf)
        sums = logits.softmax(-1).cumsum(-1)
        if not sums[:, -1].isfinite().all():
            raise FloatingPointError
        # Stay a little below the last sum, above which there is no token.
        points = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:] * (1 - 2**-20)
        return torch.searchsorted(sums, points, right=True)

    def generate(
        self, inputs: Mapping[str, torch.Tensor], config: Any, generator: torch.Generator, tokens: int
    ) -> torch.Tensor:
        """Run the model's own `generate`, with the cache of its architecture, to write about this many `tokens`, each
        chosen by `draw`."""
        # Otherwise `generate` would apply the model's own settings (beams, forced or forbidden tokens).
        self.model.generation_config = config

        def select_drawn(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Allow only one drawn token per row, which a greedy search then selects."""
            drawn = self.draw(scores, generator)
            self.on_written(max(1, tokens // config.max_new_tokens))
            return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

        written: torch.Tensor = self.model.generate(**inputs, logits_processor=LogitsProcessorList([select_drawn]))
        return written


class CausalWriter(Writer):
    """Writer that continues a random token."""

    # Longer texts take longer per token: each reads the keys and values of all tokens before it.
    TOKENS = 256
    # Texts that are written together, so that each weight is read once for all of them.
    BATCH = 64
    # Limit on the keys and values of a batch.
    CACHE_BYTES = 512 << 20

    def choose_size(self) -> tuple[int, int]:
        tokens = min(self.TOKENS, self.form.body)
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", None) or 1
        share = (getattr(config, "num_key_value_heads", None) or heads) / heads
        token = 2 * config.num_hidden_layers * config.hidden_size * share * self.model.dtype.itemsize
        needed = -(-self.wanted // tokens)
        return max(1, min(self.BATCH, needed, int(self.CACHE_BYTES / (token * tokens)))), tokens

    def _write(self, generator: torch.Generator) -> Pieces:
        begin = torch.tensor(self.form.prefix, dtype=torch.int64).expand(self.rows, -1)
        ids = torch.cat([begin, self.draw_tokens(1, generator)], dim=1)
        config = GenerationConfig(do_sample=False, max_new_tokens=max(1, self.tokens - 1), pad_token_id=0)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        written = self.generate(inputs, config, generator, self.rows * self.tokens)
        return written[:, begin.shape[1] :][:, : self.tokens].tolist()


class MaskedWriter(Writer):
    """Writer that fills masks: each stretch of a text continues a random token, all stretches at the same time.

    After Wang and Cho 2019 ("BERT has a mouth, and it must speak"), with several tokens per pass. These are far apart,
    since neighbours that are drawn independently are often the same word twice.
    """

    STRETCHES, STRETCH, BATCH = 16, 6, 8

    def choose_size(self) -> tuple[int, int]:
        return self.BATCH, min(self.STRETCHES * self.STRETCH, self.form.body)

    def _write(self, generator: torch.Generator) -> Pieces:
        body = torch.full((self.rows, self.tokens), self.form.marks[0])
        first = range(0, self.tokens, self.STRETCH)
        body[:, first] = self.draw_tokens(len(first), generator)
        start = len(self.form.prefix)
        for step in range(1, min(self.STRETCH, self.tokens)):
            positions = torch.arange(step, self.tokens, self.STRETCH)
            ids = torch.tensor([self.form.frame(row) for row in body.tolist()])
            logits = self.model(input_ids=ids).logits[:, start + positions].flatten(0, 1)
            body[:, positions] = self.draw(logits, generator).reshape(len(body), -1)
            self.on_written(self.rows * self.tokens // (self.STRETCH - 1))
        return body.tolist()


class FillingWriter(Writer):
    """Writer for encoder-decoder models, which fill blanks: first after random tokens, then within the text.

    T5 writes the contents of the blanks, each after its sentinel; BART writes the whole text.
    """

    BLANKS, PER_BLANK, PASSES = 16, 5, 3
    # Blanks that are filled together, in as many texts as that takes.
    BATCH = 256

    def __post_init__(self) -> None:
        self.ordinary = frozenset(self.form.known)
        self.blanks = min(self.BLANKS, len(self.form.marks) - 1) if self.form.has_sentinels else self.BLANKS
        super().__post_init__()

    def choose_size(self) -> tuple[int, int]:
        tokens = self.blanks * self.PASSES
        return min(self.BATCH // self.blanks, -(-self.wanted // tokens)), tokens

    def _write(self, generator: torch.Generator) -> Pieces:
        texts: Pieces = self.draw_tokens(self.blanks, generator).tolist()
        for _ in range(self.PASSES):
            texts = self._fill(texts, generator)
        return texts

    def _fill(self, texts: Pieces, generator: torch.Generator) -> Pieces:
        """Have the model fill blanks after random tokens of each text; return the texts, cut to a sequence's body."""
        drawn = [torch.randperm(len(ids), generator=generator)[: self.blanks].sort().values + 1 for ids in texts]
        gaps = [positions.tolist() for positions in drawn]
        form, room = self.form, self.form.body - self.blanks
        blanked = [
            torch.tensor(form.frame(blank_out(ids[:room], [(gap, gap) for gap in text_gaps], form.marks)))
            for ids, text_gaps in zip(texts, gaps, strict=True)
        ]
        inputs = {
            # Padding is masked: any token will do.
            "input_ids": pad_sequence(blanked, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in blanked], batch_first=True),
        }
        # The model writes its sentinels, or the whole text, in addition to the contents of the blanks.
        repeated = self.blanks if form.has_sentinels else max(map(len, blanked))
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=min(form.length - 1, repeated + self.blanks * self.PER_BLANK),
            decoder_start_token_id=find_decoder_start(self.model),
            eos_token_id=form.suffix[-1] if form.suffix else None,
            pad_token_id=0,
        )
        written = self.generate(inputs, config, generator, self.rows * self.blanks)[:, 1:].tolist()
        if form.has_sentinels:
            rows = [self._insert_fills(*row) for row in zip(texts, gaps, written, strict=True)]
        else:
            rows = [self._cut_at_end(row) for row in written]
        return [row[: form.body] for row in rows]

    def _insert_fills(self, ids: list[int], gaps: list[int], written: list[int]) -> list[int]:
        """Insert the tokens that were written after each sentinel at its position in a text."""
        fills: list[list[int]] = [[] for _ in self.form.marks]
        blanks = {mark: blank for blank, mark in enumerate(self.form.marks)}
        blank = 0
        for token in self._cut_at_end(written, marks=self.form.marks):
            blank = blanks.get(token, blank)
            if token not in blanks:
                fills[blank].append(token)
        text, end = [], 0
        for fill, gap in zip(fills, gaps, strict=False):
            text += [*ids[end:gap], *fill]
            end = gap
        return [*text, *ids[end:]]

    def _cut_at_end(self, written: list[int], marks: Sequence[int] = ()) -> list[int]:
        """Return the ordinary tokens and `marks`, up to the first end of text after one of them."""
        text: list[int] = []
        for token in written:
            if token in self.ordinary or token in marks:
                text.append(token)
            elif text and token in self.form.suffix:
                break
        return text


WRITERS: dict[str, type[Writer]] = {"causal": CausalWriter, "masked": MaskedWriter, "seq2seq": FillingWriter}
HINT = "Give a text to calibrate it on: FILE.txt, FILE.jsonl or hf:DATASET."


def write_samples(
    folder: Path, form: SequenceFormat, tokens: int, seed: int, trust_remote_code: bool, advance: Advance
) -> Pieces:
    """Return token ids of texts that the model of a checkpoint writes, `tokens` or more in total, without special
    tokens around them. On one machine, they do not depend on the number of threads. `advance` is called with the
    numbers of tokens written and needed, by one thread at a time.

    Raises UnsupportedError if the model cannot write, CheckpointError if its head is missing or a weight is NaN or
    infinite, CompressknowError if it gives NaN although all weights are finite.
    """
    model = _load_model(folder, form, trust_remote_code)
    name = type(model).__name__
    written: Pieces = []
    try:
        with Pool() as pool:
            writer = WRITERS[form.family](model, form, tokens, pool.check, count_progress(advance, tokens))
            batches = 0
            while (missing := tokens - sum(map(len, written))) > 0:
                more = min(pool.threads, -(-missing // (writer.rows * writer.tokens)))
                wave = range(batches, batches + more)
                for pieces in pool.map(partial(writer.write, seed), wave):
                    written += pieces
                batches += more
                if not any(written):
                    raise UnsupportedError(f"{name} writes no text by itself.", hint=HINT)
    except (CompressknowError, TaskStopped):
        raise
    except FloatingPointError:
        located = locate(folder)
        read_contents(located).check_finite(located, trust_remote_code=trust_remote_code)
        raise CompressknowError(
            f"{name} gives NaN while it writes its calibration text.",
            hint="Its weights may be damaged: check what it generates.",
        ) from None
    except Exception as error:
        raise UnsupportedError(f"{name} cannot write a calibration text.", find_reason(error), HINT) from error
    return written


def choose_dtype() -> str:
    """Return the dtype in which a model writes: bfloat16 if the CPU has instructions for it, else float32."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def _load_model(folder: Path, form: SequenceFormat, trust_remote_code: bool) -> PreTrainedModel:
    why = None
    if form.family not in WRITERS:
        why = "It has no language-modelling head."
    elif form.family != "causal" and not form.marks:
        why = "Its tokenizer has neither a mask token nor sentinels, so that it cannot fill blanks."
    if why:
        raise UnsupportedError(f"{folder} cannot write a calibration text.", why, HINT)
    try:
        loaded = load_language_model(folder, dtype=choose_dtype(), trust_remote_code=trust_remote_code)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(error.what, error.why, HINT) from error
    if loaded.family != form.family:
        name = type(loaded.model).__name__
        raise UnsupportedError(f"{name} is not a {form.family} language model, as its config says.", hint=HINT)
    return loaded.model
