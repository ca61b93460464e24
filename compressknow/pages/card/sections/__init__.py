"""The sections of a report card, by name: of facts, of groups of facts, of probes, and of the models themselves."""

from __future__ import annotations

from compressknow.pages.card.section import Section
from compressknow.registry import Registry

_HERE = __name__
SECTIONS: Registry[Section] = Registry(
    "compressknow.sections",
    "section",
    Section,
    {
        "lost": f"{_HERE}.facts:Lost",
        "gained": f"{_HERE}.facts:Gained",
        "knowing": f"{_HERE}.knowing:Grades",
        "relations": f"{_HERE}.groups:Relations",
        "popularity": f"{_HERE}.groups:Popularity",
        "wordings": f"{_HERE}.wordings:ByWording",
        "layers": f"{_HERE}.models:Layers",
        "text": f"{_HERE}.text:Text",
        "confidence": f"{_HERE}.confidence:Confident",
        "certainty": f"{_HERE}.certainty:HowSure",
        "figures": f"{_HERE}.figures:Figures",
        "speed": f"{_HERE}.models:Speed",
        "dropped": f"{_HERE}.facts:Dropped",
    },
)
