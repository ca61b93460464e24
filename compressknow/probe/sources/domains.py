"""Domains of relations, for the grades: those of Wikidata, which several sets share. Others stand with their set."""

from __future__ import annotations

from collections.abc import Mapping

from compressknow.probe.facts import DOMAINS, GENERAL

GEOGRAPHY, LANGUAGE, SCIENCE, PEOPLE, ARTS, COMMON_SENSE = DOMAINS


def table(relations: Mapping[str, str]) -> dict[str, str]:
    """Relation -> domain, of the names of each domain's relations with spaces between them.

    >>> table({"science": "P101 P105"})
    {'P101': 'science', 'P105': 'science'}
    """
    return {relation: domain for domain, names in relations.items() for relation in names.split()}


WIKIDATA = table(
    {
        GEOGRAPHY: "P17 P30 P36 P37 P47 P131 P159 P177 P190 P206 P276 P403 P530 P610 P740 P1001 P1376 P4552 P7959",
        LANGUAGE: "P103 P364 P407 P1412 P6886",
        SCIENCE: "P101 P105 P171 P176 P178 P185 P427",
        PEOPLE: ("P6 P19 P20 P26 P27 P39 P53 P69 P102 P106 P108 P140 P166 P509 P611 P937 P1532 P2632 P3373"),
        ARTS: (
            "P50 P57 P58 P87 P98 P136 P162 P170 P175 P179 P264 P272 P291 P344 P412 P449 P495 P676 P1303 P1441 P7937"
        ),
    }
)


def domain_of(relation: str, domains: Mapping[str, str]) -> str:
    """The domain of a relation, `GENERAL` for one that is not in the table; of a path its last name counts.

    >>> domain_of("P36", WIKIDATA), domain_of("/location/P36", WIKIDATA), domain_of("P361", WIKIDATA)
    ('geography', 'geography', 'general')
    """
    return domains.get(relation.rpartition("/")[2].replace(" ", "_"), GENERAL)
