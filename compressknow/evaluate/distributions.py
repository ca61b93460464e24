"""Distributions of the original over its whole vocabulary, stored during a run, so that KL divergences are exact.

Answers store 256 tokens per fact, which only give a lower bound. All tokens of all facts would take gigabytes, so they
are stored on disk during the run, in unnamed files that vanish with the process, however it ends.
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
from compressknow.evaluate.text import RunningText, TextChunks, list_keys

if TYPE_CHECKING:
    import torch

    from compressknow.evaluate.scoring.scorer import MeasureKl

# Bytes that must remain free on the disk, for the answers.
RESERVE = 256 << 20
# Log-probabilities to compare at a time: 16 MB as float64, whatever the batch size and the vocabulary.
AT_A_TIME = 1 << 21


class Distributions(contextlib.AbstractContextManager["Distributions"]):
    """The original's log-probabilities of every token at the answer's first position, by probe, in files in `folder`,
    which must exist when they are stored. If a run read the original's answers, it is evaluated again, only at that
    position."""

    def __init__(self, original: ModelHandle, folder: Path) -> None:
        self._original, self._folder = original, folder
        self._rows: dict[str, DistributionFile] = {}

    def find_rows(self, probe: Probe | RunningText) -> DistributionFile:
        """Return the file of a probe, found by its content: the splits of a search have the same name."""
        if isinstance(probe, RunningText):
            rows = DistributionFile(self._folder, probe.most_scored, short=True)
        else:
            rows = DistributionFile(self._folder, len(probe.facts))
        return self._rows.setdefault(probe.fingerprint(), rows)

    def complete(self, probes: Sequence[Opened], answers: Answers, on_progress: Listener | None) -> None:
        """Store the missing distributions of these probes' facts and texts, if the disk has room; tasks have none.
        `answers` are the original's. The original is released afterwards."""
        eligible = [probe for probe in probes if isinstance(probe, Probe | RunningText)]
        incomplete = [probe for probe in eligible if not self.find_rows(probe).holds(_list_keys(probe, answers))]
        try:
            for probe in incomplete:
                if self.find_rows(probe).gave_up:
                    continue
                if isinstance(probe, RunningText):
                    self._read_text(probe, answers, on_progress)
                else:
                    self._evaluate_facts(probe, answers, on_progress)
        finally:
            if incomplete:
                self._original.release()

    def _read_text(self, text: RunningText, answers: Answers, on_progress: Listener | None) -> None:
        original = self._original
        stage = Stage("read", original.located.name, text.name, device=original.settings.device, again=True)
        with report_progress(on_progress, stage) as advance:
            rows = self.find_rows(text)
            chunks = TextChunks(original.make_reader(), text, answers.record.probes.get(text.name))
            for number in range(len(chunks.ids)):
                if rows.gave_up:
                    return
                if not rows.holds(list_keys(number, chunks.context)):
                    chunks.read(number, rows.keep)
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
    """Context of an evaluation: what its answers are compared with.

    Attributes
    ----------
    reference : the original's answers; the same tokens are scored at the answer's first position.
    known : this model's own answers, scored against another reference, which are not computed again.
    distributions : the original's distributions over the whole vocabulary, to compare this model's with; without a
        `reference` this model is the original, and its distributions are stored there.
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
        """Return the name of the original's runtime; None if that was transformers."""
        runtime = self.reference.record.model.runtime if self.reference else None
        return str(runtime["name"]) if runtime else None

    def choose_measure(self, probe: Probe | RunningText) -> MeasureKl | None:
        """Return the function for a batch's distributions: it stores the original's, or compares with these."""
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
    """Distributions of one probe's facts, or of a text's tokens: an array [rows, vocabulary] in a file, of float32 or,
    if `short`, 16 bits each, for up to `most` rows.

    The file is not mapped: if the disk fills up, a mapped file kills the process, whose memory also includes its pages.
    """

    def __init__(self, folder: Path, most: int, *, short: bool = False) -> None:
        self._folder, self._most, self._short = folder, most, short
        self._file: Any = None
        self._offsets: dict[str, int] = {}
        # Size of a row in tokens and in bytes.
        self._width = self._row = 0
        self.gave_up = False

    @property
    def facts(self) -> frozenset[str]:
        return frozenset(self._offsets)

    def holds(self, facts: Iterable[str]) -> bool:
        return not self.gave_up and all(fact in self._offsets for fact in facts)

    def keep(self, facts: Sequence[str], log_probs: torch.Tensor) -> list[float | None]:
        """Store log-probabilities of the original, [facts, vocabulary], if the disk has room. Return None for each
        fact, as the original has no divergence from itself."""
        if not self.gave_up:
            try:
                self._append(facts, log_probs.float().cpu().contiguous().numpy())
            except OSError:
                self.give_up()
        return [None] * len(facts)

    def measure(self, facts: Sequence[str], log_probs: torch.Tensor) -> list[float | None]:
        """Return KL(original || model) of each fact in nats, computed in float64 over the whole vocabulary; `log_probs`
        are the model's, [facts, vocabulary]. Tokens that only one of them has, such as those of padding, are impossible
        for the other. All are None if a fact is not stored."""
        from torch.nn import functional

        if not self.holds(facts):
            return [None] * len(facts)
        divergences: list[float | None] = []
        width = max(self._width, log_probs.shape[1])
        step = max(1, AT_A_TIME // width)
        # Apple's GPUs have no float64.
        device = "cpu" if log_probs.device.type == "mps" else log_probs.device
        try:
            for start in range(0, len(facts), step):
                part = slice(start, start + step)
                pair = (rows.to(device) for rows in (self._read(facts[part]), log_probs[part]))
                widened = (functional.pad(rows, (0, width - rows.shape[1]), value=LOGP_FLOOR) for rows in pair)
                divergences += compute_divergence(*widened).tolist()
        except OSError:
            self.give_up()
            return [None] * len(facts)
        return divergences

    def give_up(self) -> None:
        """Delete the file, and store no more."""
        self.gave_up, self._offsets = True, {}
        if self._file is not None:
            # Closing retries to write what the full disk did not take.
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
        self._offsets |= {fact: start + row * self._row for row, fact in enumerate(facts)}

    def _read(self, facts: Sequence[str]) -> torch.Tensor:
        import torch

        rows = np.empty((len(facts), self._width), dtype=np.uint16 if self._short else np.float32)
        for row, fact in zip(rows, facts, strict=True):
            self._file.seek(self._offsets[fact])
            if self._file.readinto(row.data) != row.nbytes:
                raise OSError("the file is cut short")
        return torch.from_numpy(lengthen(rows) if self._short else rows)


_STEPS = 65534 / math.sqrt(-LOGP_FLOOR)


def shorten(log_probs: np.ndarray) -> np.ndarray:
    """Return log-probabilities as uint16: the square roots of their negatives in equal steps, most exact near 0. The
    error is at most 0.00015 at -1, and 0.0005 at -9; 65,535 stands for NaN."""
    roots = np.rint(np.sqrt(-np.clip(log_probs, LOGP_FLOOR, 0)) * np.float32(_STEPS))
    return np.where(np.isnan(roots), np.float32(65535), roots).astype(np.uint16)


def lengthen(stored: np.ndarray) -> np.ndarray:
    """Return the log-probabilities that `shorten` stored, as float32.

    >>> lengthen(shorten(np.array([0.0, -2.0, np.nan], dtype=np.float32))).round(3)
    array([-0., -2., nan], dtype=float32)
    """
    roots = stored.astype(np.float32) / np.float32(_STEPS)
    return np.where(stored == 65535, np.float32(np.nan), -(roots**2))


def compute_divergence(original: torch.Tensor, compressed: torch.Tensor) -> torch.Tensor:
    """Compute KL(original || compressed) in nats from log-probabilities [facts, tokens]: float64, [facts]. Sums p (q/p
    - 1 - log q/p): no negative terms, and probabilities in float32 need not quite sum to 1."""
    before, after = (each.double().clamp(min=LOGP_FLOOR) for each in (original, compressed))
    change = after - before
    return (before.exp() * (change.expm1() - change)).clamp(min=0).sum(-1)
