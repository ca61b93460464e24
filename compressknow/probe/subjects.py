"""Which school subject a relation belongs to, for the grades of the report card."""

from __future__ import annotations

from compressknow.probe.facts import SCHOOL_SUBJECTS

# For relations that belong to no subject, or to several: "is part of", "is owned by", sports.
GENERAL = "general"

_GEOGRAPHY, _LANGUAGE, _SCIENCE, _PEOPLE, _ARTS, _COMMON_SENSE = SCHOOL_SUBJECTS

# Wikidata's properties (T-REx, BEAR), the relations of Google-RE and ConceptNet, the properties of PopQA.
_RELATIONS = {
    _GEOGRAPHY: (
        "P17 P30 P36 P37 P47 P131 P159 P177 P190 P206 P276 P403 P530 P610 P740 P1001 P1376 P4552 P7959 "
        "capital capital_of country"
    ),
    _LANGUAGE: "P103 P364 P407 P1412 P6886",
    _SCIENCE: "P101 P105 P171 P176 P178 P185 P427",
    _PEOPLE: (
        "P6 P19 P20 P26 P27 P39 P53 P69 P102 P106 P108 P140 P166 P509 P611 P937 P1532 P2632 P3373 "
        "place_of_birth date_of_birth place_of_death father mother occupation religion"
    ),
    _ARTS: (
        "P50 P57 P58 P87 P98 P136 P162 P170 P175 P179 P264 P272 P291 P344 P412 P449 P495 P676 P1303 P1441 P7937 "
        "author composer director genre producer screenwriter"
    ),
    _COMMON_SENSE: (
        "AtLocation CapableOf Causes CausesDesire Desires HasA HasPrerequisite HasProperty HasSubevent IsA MadeOf "
        "MotivatedByGoal NotDesires PartOf ReceivesAction UsedFor"
    ),
}
_SUBJECT_OF = {relation: subject for subject, relations in _RELATIONS.items() for relation in relations.split()}


def subject_of(relation: str) -> str:
    """The school subject of a relation, `GENERAL` for one that is not in the table.

    >>> subject_of("P36"), subject_of("/people/person/place_of_birth"), subject_of("P361")
    ('geography', 'history and people', 'general')
    """
    return _SUBJECT_OF.get(relation.rpartition("/")[2].replace(" ", "_"), GENERAL)


def subject_of_set(name: str) -> str | None:
    """The school subject of all facts of a LAMA set, None for the sets whose relations have their own."""
    return {"conceptnet": _COMMON_SENSE, "squad": GENERAL}.get(name)
