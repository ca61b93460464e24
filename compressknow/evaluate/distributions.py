"""Distributions of the original over its whole vocabulary, kept during a run, so that KL divergences are exact.

Answers hold 256 tokens per fact, which only give a lower bound. All tokens of all facts would fill gigabytes, so they
are kept on disk while the run lasts, in unnamed files that vanish with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressknow.base.progress import Listener, Stage, report_progress
from compressknow.evaluate.answers import LOGP_FLOOR, Answers
from compressknow.evaluate.evaluate import evaluate
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.sources import Opened
from compressknow.evaluate.text import RunningText, choose_context, cut_chunks, list_keys, read_chunk

if TYPE_CHECKING:
    import torch

    from compressknow.evaluate.scoring.scorer import MeasureKl

# Bytes that must stay free on the disk, for the answers.
RESERVE = 256 << 20
# Log-probabilities that are compared at a time: 16 MB as float64, for any batch and vocabulary.
AT_A_TIME = 1 << 21


class Distributions(contextlib.AbstractContextManager["Distributions"]):
    """The original's log-probabilities of every token at the answer's first position, for each probe.

    If a run took the original's answers from a folder, the original is evaluated once more, at that position only.
    `folder` is on the disk to use, and need not exist yet.
    """

    def __init__(self, original: ModelHandle, folder: Path) -> None:
        self._original, self._folder = original, folder
        self._rows: dict[str, DistributionFile] = {}

    def find_rows(self, probe: Probe | RunningText) -> DistributionFile:
        """Return the rows of a probe, by its content: a search has two splits of one name."""
        if isinstance(probe, RunningText):
            rows = DistributionFile(self._folder, probe.most_scored, short=True)
        else:
            rows = DistributionFile(self._folder, len(probe.facts))
        return self._rows.setdefault(probe.fingerprint(), rows)

    def complete(self, probes: Sequence[Opened], answers: Answers, on_progress: Listener | None) -> None:
        """Have those of all facts and texts of these probes, as far as the disk has room; `answers` are the original's
        to them. Tasks have none. The original is in memory no longer than that."""
        kept = [probe for probe in probes if isinstance(probe, Probe | RunningText)]
        lacking = [probe for probe in kept if not self.find_rows(probe).holds(_list_keys(probe, answers))]
        try:
            for probe in lacking:
                if self.find_rows(probe).gave_up:
                    continue
                if isinstance(probe, RunningText):
                    self._read_text(probe, answers, on_progress)
                else:
                    self._evaluate_facts(probe, answers, on_progress)
        finally:
            if lacking:
                self._original.release()

    def _read_text(self, text: RunningText, answers: Answers, on_progress: Listener | None) -> None:
        original = self._original
        stage = Stage("read", original.located.name, text.name, device=original.settings.device, again=True)
        with report_progress(on_progress, stage) as advance:
            reader = original.make_reader()
            context = choose_context(reader, text, answers.record.probes.get(text.name))
            rows, chunks = self.find_rows(text), cut_chunks(reader, text, context)
            for number in range(len(chunks.ids)):
                if rows.gave_up:
                    return
                if not rows.holds(list_keys(number, context)):
                    read_chunk(reader, chunks, number, rows.keep)
                advance(number + 1, len(chunks.ids))

    def _evaluate_facts(self, probe: Probe, answers: Answers, on_progress: Listener | None) -> None:
        original, rows = self._original, self.find_rows(probe)
        name, device = original.located.name, original.settings.device
        stage = Stage("evaluate", name, probe.name, len(probe.facts), device, again=True)
        with report_progress(on_progress, stage) as advance:
            known = {answer.fact_id: answer for answer in answers.of(probe.name)}
            prompts = original.make_prompts(probe)
            for _ in evaluate(prompts, done=rows.facts, known=known, measure_kl=rows.keep, advance=advance):
                if rows.gave_up:
                    break

    def close(self) -> None:
        for rows in self._rows.values():
            rows.give_up()

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Context:
    """Context of answers: what they are compared with.

    Attributes
    ----------
    reference : the original's answers; the same tokens are scored at the answer's first position.
    known : this model's own answers, scored against another reference: what it answers is taken from these.
    distributions : the original's, over the whole vocabulary, to compare this model's with; without a `reference` this
        model is the original, and its own are kept there.
    """

    reference: Answers | None = None
    known: Answers | None = None
    distributions: Distributions | None = None

    @property
    def sha256(self) -> str | None:
        """Return the hash of the original; None if this model is the original."""
        return self.reference.record.model.sha256 if self.reference else None

    @property
    def runtime(self) -> str | None:
        """Return the name of what ran the original, where that was not transformers."""
        ran = self.reference.record.model.runtime if self.reference else None
        return str(ran["name"]) if ran else None

    def choose_measure(self, probe: Probe | RunningText) -> MeasureKl | None:
        """Return what takes a batch's distributions: the original's are kept, others are compared with them."""
        if self.distributions is None:
            return None
        rows = self.distributions.find_rows(probe)
        return rows.measure if self.reference else rows.keep


def _list_keys(probe: Probe | RunningText, answers: Answers) -> Iterator[str]:
    """Yield the keys of the distributions of a probe's facts, or of a text's tokens."""
    if isinstance(probe, Probe):
        yield from (answer.fact_id for answer in answers.of(probe.name))
    elif entry := answers.record.probes.get(probe.name):
        for chunk in answers.texts.get(probe.name, ()):
            yield from list_keys(chunk.number, int((entry.text or {})["context"]))


class DistributionFile:
    """Distributions of one probe's facts: a file of floats, [facts, vocabulary], in the order they came in; `short`,
    as those of a text's tokens are, it has 16 bits for each.

    Read and written, not mapped: a mapped file that outgrows its disk kills the process, and its pages count as its
    memory.
    """

    def __init__(self, folder: Path, most: int, *, short: bool = False) -> None:
        self._folder, self._most, self._short = folder, most, short
        self._file: Any = None
        self._places: dict[str, int] = {}
        # Of each row, in tokens and in bytes.
        self._width = self._row = 0
        self.gave_up = False

    @property
    def facts(self) -> frozenset[str]:
        return frozenset(self._places)

    def holds(self, facts: Iterable[str]) -> bool:
        return not self.gave_up and all(fact in self._places for fact in facts)

    def keep(self, facts: Sequence[str], log_probs: torch.Tensor) -> list[float | None]:
        """Keep the original's, [facts, vocabulary], as far as there is room. None has a divergence from itself."""
        if not self.gave_up:
            try:
                self._append(facts, log_probs.float().cpu().contiguous().numpy())
            except OSError:
                self.give_up()
        return [None] * len(facts)

    def measure(self, facts: Sequence[str], log_probs: torch.Tensor) -> list[float | None]:
        """Compute KL(original || model) in nats, over the whole vocabulary in float64, of each fact; `log_probs` are
        the model's, [facts, vocabulary]. None for all if one is not kept, or the vocabulary has another size."""
        if not self.holds(facts) or log_probs.shape[1] != self._width:
            return [None] * len(facts)
        found: list[float | None] = []
        step = max(1, AT_A_TIME // self._width)
        # Apple's GPUs have no float64.
        device = "cpu" if log_probs.device.type == "mps" else log_probs.device
        try:
            for start in range(0, len(facts), step):
                chosen = slice(start, start + step)
                original = self._read(facts[chosen]).to(device)
                found += compute_divergence(original, log_probs[chosen].to(device)).tolist()
        except OSError:
            self.give_up()
            return [None] * len(facts)
        return found

    def give_up(self) -> None:
        """Free the disk."""
        self.gave_up, self._places = True, {}
        if self._file is not None:
            # Buffered data that did not fit on the disk is flushed again here.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _append(self, facts: Sequence[str], rows: np.ndarray) -> None:
        if self._file is None:
            self._width = rows.shape[1]
            self._row = self._width * (2 if self._short else 4)
            if shutil.disk_usage(self._folder).free < self._most * self._row + RESERVE:
                self.give_up()
                return
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        start = self._file.seek(0, io.SEEK_END)
        self._file.write((shorten(rows) if self._short else rows).data)
        self._file.flush()
        self._places |= {fact: start + row * self._row for row, fact in enumerate(facts)}

    def _read(self, facts: Sequence[str]) -> torch.Tensor:
        import torch

        rows = np.empty((len(facts), self._width), dtype=np.uint16 if self._short else np.float32)
        for row, fact in zip(rows, facts, strict=True):
            self._file.seek(self._places[fact])
            if self._file.readinto(row.data) != row.nbytes:
                raise OSError("the file is cut short")
        return torch.from_numpy(lengthen(rows) if self._short else rows)


_STEPS = 65534 / math.sqrt(-LOGP_FLOOR)


def shorten(log_probs: np.ndarray) -> np.ndarray:
    """Store log-probabilities in 16 bits, uint16: their square roots in equal steps, so that those near 0 are the most
    exact. One of -1 is off by 0.00015 at most, one of -9 by 0.0005; 65,535 is not a number."""
    roots = np.rint(np.sqrt(-np.clip(log_probs, LOGP_FLOOR, 0)) * np.float32(_STEPS))
    return np.where(np.isnan(roots), np.float32(65535), roots).astype(np.uint16)


def lengthen(stored: np.ndarray) -> np.ndarray:
    """Return what `shorten` stored, as float32.

    >>> lengthen(shorten(np.array([0.0, -2.0, np.nan], dtype=np.float32))).round(3)
    array([-0., -2., nan], dtype=float32)
    """
    roots = stored.astype(np.float32) / np.float32(_STEPS)
    return np.where(stored == 65535, np.float32(np.nan), -(roots**2))


def compute_divergence(original: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """Compute KL(original || compressed) in nats of log-probabilities [facts, tokens]: float64, [facts].

    As p (q/p - 1 - log q/p), which is the same sum where both add up to 1, but has no negative terms, and takes no harm
    from the last digits by which float32 does not add up to 1.
    """
    before, after = (side.double().clamp(min=LOGP_FLOOR) for side in (original, compressed))
    change = after - before
    return (before.exp() * (change.expm1() - change)).clamp(min=0).sum(-1)
