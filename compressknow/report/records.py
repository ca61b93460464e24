"""The typed records that a report card is made of: filled by the statistics, rendered to HTML, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compressknow.probe.records import Speed
from compressknow.stats.records import ChangedFact, Counts, Estimate, ProbeFigures


@dataclass(frozen=True, slots=True)
class Grade:
    """A line of the report card: knowledge kept of one school subject over all probes.

    `grade` is A+ (>= 99 % kept), A (>= 97), B (>= 93), C (>= 85), D (>= 70) or F; `-` where the original knew nothing.
    `unsure` says that the interval spans several grades, `range` names them ("A to C").
    """

    subject: str
    counts: Counts
    kept: Estimate
    grade: str
    unsure: bool = False
    range: str | None = None


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model: identity, size, and what was done to it.

    Attributes
    ----------
    setup : the paper's name of the setup (`Att_GPQ 20%`), or None for a checkpoint that compressknow did not make.
    quantization : the quantization that its config names, in words, or None.
    groups : by group of layers, as the manifest has it: parameters, zeros_after, pruned, quantized, relative_error.
    recipe : the recipe of the manifest, or None.
    """

    name: str
    revision: str | None
    sha256: str
    architecture: str
    family: str
    parameters: int
    bytes: int
    dtype: str
    setup: str | None = None
    quantization: str | None = None
    recipe: Mapping[str, Any] | None = None
    source: Mapping[str, Any] | None = None
    zeros: int | None = None
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    speed: Speed | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The original against one compressed model, over all probes.

    Attributes
    ----------
    measured : by section of the card, by probe: what the section itself measured, as values for JSON.
    left_out : sections of other packages that failed and are not shown, and why: a warning of the card.
    """

    model: ModelFacts
    verdict: str
    kept: Estimate  # over all probes' facts
    counts: Counts
    p: float | None
    grades: tuple[Grade, ...]
    probes: tuple[ProbeFigures, ...]
    lost: tuple[ChangedFact, ...]
    gained: tuple[ChangedFact, ...]
    warnings: tuple[str, ...]
    measured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Card:
    """A whole report card: one original against one or several compressed models."""

    verdict: str
    original: ModelFacts
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...]
    show_facts: bool
    versions: Mapping[str, str]
    command: str | None
    method: tuple[str, ...]  # sentences: how it was asked and judged, and the limits of that
