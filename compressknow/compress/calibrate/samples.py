"""Texts that a model writes itself, to be calibrated on.

They lie in the model's domain whatever that is (a language, code, proteins) and need no download (Liu et al. 2023,
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
from compressknow.engine.language_model import find_decoder_start, load_language_model
from compressknow.engine.load import find_reason

Pieces = list[list[int]]


@dataclass
class Writer(abc.ABC):
    """Writer of texts in batches, each from one random generator, and of no more than the tokens `wanted` in all.
    `check` raises if the work is to stop; `on_written` is called with the tokens that were written since the last call.
    """

    model: PreTrainedModel
    form: SequenceFormat
    wanted: int
    check: Callable[[], None]
    on_written: Callable[[int], None]

    def __post_init__(self) -> None:
        form = self.form
        self.rows, self.tokens = self.choose_size()
        # Tokens that are never drawn, since they stand for no text: bool [rows of the embedding].
        self.barred = torch.ones(form.rows, dtype=torch.bool)
        sentinels = form.marks if form.has_sentinels else ()
        drawn = (*form.known, *(form.suffix + form.separator + sentinels if form.family != "masked" else ()))
        self.barred[list(drawn)] = False

    @abc.abstractmethod
    def choose_size(self) -> tuple[int, int]:
        """Choose how many texts a batch has, and about how many tokens are drawn for each."""

    def write(self, seed: int, batch: int) -> Pieces:
        """Write the batch of this number: texts as token ids, a separator behind each."""
        digest = hashlib.sha256(f"{seed}/{batch}".encode()).digest()
        with torch.inference_mode():
            texts = self._write(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        return [[*ids, *self.form.separator] for ids in texts if ids]

    @abc.abstractmethod
    def _write(self, generator: torch.Generator) -> Pieces: ...

    def draw_tokens(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ordinary tokens, each as likely, for each text of a batch: int64 [texts, tokens]."""
        places = torch.randint(len(self.form.known), (self.rows, tokens), generator=generator)
        return torch.tensor(self.form.known)[places]

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw a token for each row of logits [rows, vocabulary], by its probability: int64 [rows, 1]."""
        self.check()
        width = min(logits.shape[-1], len(self.barred))
        logits = logits[:, :width].float().masked_fill(self.barred[:width], -torch.inf)
        sums = logits.softmax(-1).cumsum(-1)
        if not sums[:, -1].isfinite().all():
            raise CompressknowError(
                f"{type(self.model).__name__} gives NaN while it writes its calibration text.",
                hint="Its weights may be damaged: look at what it generates.",
            )
        # A little below the last sum, above which there is no token.
        points = torch.rand(len(sums), 1, generator=generator) * sums[:, -1:] * (1 - 2**-20)
        return torch.searchsorted(sums, points, right=True)

    def generate(
        self, inputs: Mapping[str, torch.Tensor], config: Any, generator: torch.Generator, tokens: int
    ) -> torch.Tensor:
        """Run the model's own `generate`, with the cache that the architecture keeps, where `draw` chooses each token,
        to write about so many `tokens`."""
        # The model's own settings (beams, forced or forbidden tokens) are for answers; `generate` would mix them in.
        self.model.generation_config = config

        def leave_one(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Leave one drawn token per row, which a greedy search then takes."""
            drawn = self.draw(scores, generator)
            self.on_written(max(1, tokens // config.max_new_tokens))
            return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

        written: torch.Tensor = self.model.generate(**inputs, logits_processor=LogitsProcessorList([leave_one]))
        return written


class CausalWriter(Writer):
    """Writer that continues from a random token."""

    # Longer texts take longer: each token reads the keys and values of all before it.
    TOKENS = 256
    # Texts that are written together: each weight that is read is multiplied by as many.
    BATCH = 64
    # Keys and values that they may take.
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
    """Writer that fills masks: each stretch of a text continues from a random token, all stretches at the same time.

    After Wang and Cho 2019 ("BERT has a mouth, and it must speak"), with several tokens per pass. These are far from
    each other: neighbours that are drawn without seeing each other are often the same word twice.
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
            places = torch.arange(step, self.tokens, self.STRETCH)
            ids = torch.tensor([self.form.frame(row) for row in body.tolist()])
            logits = self.model(input_ids=ids).logits[:, start + places].flatten(0, 1)
            body[:, places] = self.draw(logits, generator).reshape(len(body), -1)
            self.on_written(self.rows * self.tokens // (self.STRETCH - 1))
        return body.tolist()


class FillingWriter(Writer):
    """Writer of encoder-decoder models, which fill blanks: first after random tokens, then within the text.

    T5 writes what goes into the blanks, each after its sentinel; BART the whole text.
    """

    BLANKS, PER_BLANK, PASSES = 16, 5, 3
    # Blanks that are filled together: texts of few sentinels are many.
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
        """Have the model write after tokens of texts, at most one per mark; return at most a sequence of each."""
        drawn = [torch.randperm(len(ids), generator=generator)[: self.blanks].sort().values + 1 for ids in texts]
        gaps = [places.tolist() for places in drawn]
        form, room = self.form, self.form.body - self.blanks
        blanked = [
            torch.tensor(form.frame(blank_out(ids[:room], [(at, at) for at in places], form.marks)))
            for ids, places in zip(texts, gaps, strict=True)
        ]
        inputs = {
            # Padding is masked: any token will do.
            "input_ids": pad_sequence(blanked, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in blanked], batch_first=True),
        }
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
        """Put what was written after each sentinel into its place in a text."""
        fills: list[list[int]] = [[] for _ in self.form.marks]
        places = {mark: place for place, mark in enumerate(self.form.marks)}
        at = 0
        for token in self._cut_at_end(written, marks=self.form.marks):
            at = places.get(token, at)
            if token not in places:
                fills[at].append(token)
        text, end = [], 0
        for fill, gap in zip(fills, gaps, strict=False):
            text += [*ids[end:gap], *fill]
            end = gap
        return [*text, *ids[end:]]

    def _cut_at_end(self, written: list[int], marks: Sequence[int] = ()) -> list[int]:
        """Return the ordinary tokens, and marks, before the first end of text that follows one."""
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
    """Return token ids of texts that the model of a checkpoint writes, `tokens` or more in all, without special tokens
    around them; on one machine the same whatever the number of threads. `advance` is called with the tokens done and in
    all, by one thread at a time.

    Raises UnsupportedError if the model cannot write, CheckpointError if it lacks its head, CompressknowError if it
    gives NaN.
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
                    raise UnsupportedError(f"{name} writes nothing by itself.", hint=HINT)
    except (CompressknowError, TaskStopped):
        raise
    except Exception as error:
        raise UnsupportedError(f"{name} cannot write a calibration text.", find_reason(error), HINT) from error
    return written


def choose_dtype() -> str:
    """Return what a model computes in while it writes: the faster one, if the CPU has instructions for it."""
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def _load_model(folder: Path, form: SequenceFormat, trust_remote_code: bool) -> PreTrainedModel:
    why = None
    if form.family not in WRITERS:
        why = "It has no language-modelling head."
    elif form.family != "causal" and not form.marks:
        why = "Its tokenizer has neither a mask token nor sentinels, so that it fills no blanks."
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
