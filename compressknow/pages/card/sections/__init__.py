"""What a section of a report card is, and the sections by name: of facts, of groups of facts, of probes, of models.

A section of another package is tried out when the card is made, and its text made plain. One that fails is left out,
with a warning that names its package: what was evaluated for an hour must not be lost for it. Nothing that it says
reaches a page unescaped, whatever it is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressknow.base.registry import Registry
from compressknow.comparison.records import ProbeFigures
from compressknow.pages.parts import Part
from compressknow.pages.records import Comparison, ModelFacts

if TYPE_CHECKING:
    from compressknow.comparison.paired import Pair
    from compressknow.evaluate.records import ProbeEntry


@dataclass(frozen=True, slots=True)
class ProbeAnswers:
    """What both models answered to one probe.

    Attributes
    ----------
    pairs : of each fact the original's answer and the compressed model's (`compressknow.evaluate.answers.Answer`).
    entry_original, entry_compressed : the probe's entries in each ``probe.json``.
    """

    probe: str
    pairs: tuple[Pair, ...]
    entry_original: ProbeEntry
    entry_compressed: ProbeEntry


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a format shows of one comparison; the JSON has it all.

    Attributes
    ----------
    lost, gained : facts; `shown` of them at once, the others folded.
    relations : of a probe, those that lost most; None for all.
    charts : charts, and bars in tables.
    """

    lost: int
    gained: int
    shown: int = 20
    relations: int | None = None
    charts: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """What a section speaks of: one compressed model against the original.

    Attributes
    ----------
    measured : by probe, what the section's own `measure` gave; empty where it measures nothing.
    """

    original: ModelFacts
    comparison: Comparison
    measured: Mapping[str, Any]
    limits: Limits


class Section:
    """A section of the report card of each compressed model. Subclasses say what it shows; all but `parts` is optional.

    Another package adds one by an entry point of the group ``compressknow.sections``; its name, of small letters,
    digits, `-` and `_`, is the section's id on the page and the key of what it measures in ``report.json``.

    Attributes
    ----------
    title : its heading, and its name in the page's table of contents.
    order : where it stands: those built in have 10 to 80.
    shows_facts : it shows the text of facts, and is left out by ``--no-facts``.
    glossary : terms and their meanings, for readers who meet them for the first time.
    method : sentences: how its figures are computed, with their source.
    """

    title: str
    order: int = 100
    shows_facts: bool = False
    glossary: tuple[tuple[str, str], ...] = ()
    method: tuple[str, ...] = ()

    def measure(self, answers: ProbeAnswers) -> Any:  # noqa: ARG002
        """Figures of one probe that the card's records do not hold: values for JSON, or None for nothing.

        Called once, when the card is made. They are stored with it, and stand in ``report.json`` under
        ``probes[PROBE][NAME]``.
        """
        return None

    def parts(self, context: Context) -> Iterable[Part]:
        """What it shows, in order; a section of which nothing is shown is left out."""
        raise NotImplementedError

    def warnings(self, context: Context) -> Iterable[str]:  # noqa: ARG002
        """What a reader must know before trusting the figures, a sentence each."""
        return ()

    def to_json(self, comparison: Comparison) -> Mapping[str, Any]:  # noqa: ARG002
        """What ``report.json`` says of a section that is built in, beside the probes."""
        return {}

    def probe_to_json(self, probe: ProbeFigures) -> Mapping[str, Any]:  # noqa: ARG002
        """What ``report.json`` says of a section that is built in in each probe, beside what it measures."""
        return {}


SECTIONS: Registry[Section] = Registry(
    "compressknow.sections",
    "section",
    Section,
    {
        "lost": "compressknow.pages.card.sections.facts:Lost",
        "gained": "compressknow.pages.card.sections.facts:Gained",
        "knowing": "compressknow.pages.card.sections.facts:Grades",
        "relations": "compressknow.pages.card.sections.facts:Relations",
        "popularity": "compressknow.pages.card.sections.facts:Popularity",
        "wordings": "compressknow.pages.card.sections.facts:ByWording",
        "layers": "compressknow.pages.card.sections.figures:Layers",
        "text": "compressknow.pages.card.sections.facts:Text",
        "confidence": "compressknow.pages.card.sections.certainty:Confident",
        "certainty": "compressknow.pages.card.sections.certainty:HowSure",
        "figures": "compressknow.pages.card.sections.figures:Figures",
        "speed": "compressknow.pages.card.sections.figures:Speed",
        "dropped": "compressknow.pages.card.sections.facts:Dropped",
    },
)
