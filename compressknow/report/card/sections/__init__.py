"""The sections of a report card, each in a file of its own."""

from __future__ import annotations

from compressknow.registry import Registry
from compressknow.report.card.section import Section

_HERE = __name__
SECTIONS: Registry[Section] = Registry(
    "compressknow.sections",
    "section",
    Section,
    {
        "lost": f"{_HERE}.facts:Lost",
        "gained": f"{_HERE}.facts:Gained",
        "relations": f"{_HERE}.relations:Relations",
        "popularity": f"{_HERE}.popularity:Popularity",
        "layers": f"{_HERE}.layers:Layers",
        "figures": f"{_HERE}.figures:Figures",
        "speed": f"{_HERE}.speed:Speed",
        "dropped": f"{_HERE}.dropped:Dropped",
    },
)
