"""Which column of a table holds what, for `hf:`: as the user says, or as known tables have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from compressknow.errors import UsageError, did_you_mean
from compressknow.probe.prompts import OBJECT

KEYS = (
    "subject",
    "object",
    "prompt",
    "template",
    "relation",
    "id",
    "popularity",
    "candidates",
    "school-subject",
)


@dataclass(frozen=True)
class Columns:
    """`of` is {one of `KEYS`: name of a column}; `of["template"]` may be a template itself. `templates` are those by
    relation, where no column holds any; `known_as` names the kind of table that was recognised."""

    of: Mapping[str, str]
    templates: Mapping[str, str] = field(default_factory=dict)
    known_as: str | None = None

    @property
    def fixed_template(self) -> str | None:
        template = self.of.get("template", "")
        return template if OBJECT in template else None

    @property
    def names(self) -> list[str]:
        """The columns to read, each once."""
        return list(dict.fromkeys(name for name in self.of.values() if name != self.fixed_template))


# PopQA asks questions ("What is Henry Feilden's occupation?"); these say the same with a blank at the end.
_POPQA_TEMPLATES = {
    "author": "The author of [X] is [Y].",
    "capital": "The capital of [X] is [Y].",
    "capital of": "[X] is the capital of [Y].",
    "color": "The color of [X] is [Y].",
    "composer": "The composer of [X] is [Y].",
    "country": "The country of [X] is [Y].",
    "director": "The director of [X] is [Y].",
    "father": "The father of [X] is [Y].",
    "genre": "The genre of [X] is [Y].",
    "mother": "The mother of [X] is [Y].",
    "occupation": "The occupation of [X] is [Y].",
    "place of birth": "The place where [X] was born is [Y].",
    "producer": "The producer of [X] is [Y].",
    "religion": "The religion of [X] is [Y].",
    "screenwriter": "The screenwriter of [X] is [Y].",
    "sport": "The sport that [X] plays is [Y].",
}

_LABELS = {"subject": "sub_label sub", "object": "obj_label", "relation": "predicate_id pred relation", "id": "uuid id"}
_OWN = {**_LABELS, "popularity": "popularity", "candidates": "candidates", "school-subject": "subject"}
# Kind of table: (columns by which it is known, the columns of each key in order of preference, templates by relation).
# LAMA's copies on the hub have the template and a sentence of the text in each row; the official code asks by template.
_KNOWN: dict[str, tuple[str, dict[str, str], dict[str, str]]] = {
    "PopQA": (
        "subj prop obj s_pop",
        {"subject": "subj", "object": "obj", "relation": "prop", "id": "id", "popularity": "s_pop"},
        _POPQA_TEMPLATES,
    ),
    "facts": ("prompt obj_label", {**_OWN, "prompt": "prompt"}, {}),
    "LAMA by template": ("template sub_label obj_label", {**_OWN, "template": "template"}, {}),
    "LAMA by sentence": ("masked_sentence obj_label", {**_LABELS, "prompt": "masked_sentence"}, {}),
}


def parse_columns(options: Iterable[str]) -> dict[str, str]:
    """``KEY=COLUMN`` texts as a mapping. Raises UsageError for another form, an unknown key and one given twice.

    >>> parse_columns(["object=obj_label", "template=[X] was born in [Y]."])
    {'object': 'obj_label', 'template': '[X] was born in [Y].'}
    """
    columns: dict[str, str] = {}
    for option in options:
        key, equals, column = (part.strip() for part in option.partition("="))
        if not equals or not column:
            raise UsageError(f"--map takes KEY=COLUMN: {option!r}.", hint=f"The keys are {', '.join(KEYS)}.")
        check_key(key)
        if key in columns:
            raise UsageError(f"--map names {key} twice.")
        columns[key] = column
    return columns


def check_key(key: str) -> None:
    """Raises UsageError for a key that is none of `KEYS`."""
    if key not in KEYS:
        near = did_you_mean(key, KEYS)
        raise UsageError(f"--map: unknown key {key!r}.", hint=f"{near}The keys are {', '.join(KEYS)}.")


def choose_columns(there: Iterable[str], given: Mapping[str, str], where: str) -> Columns:
    """The columns of a table that has those `there`: as for a table that is known, but what is `given` comes first.

    Raises UsageError, which lists the columns there are, where one is not there or too few are named to ask facts.
    """
    present = set(there)
    for key in given:
        check_key(key)
    chosen = _recognised(present)
    # Who names a prompt or a template does not want that of the known table.
    asked = {"prompt", "template"} & set(given)
    kept = {key: name for key, name in chosen.of.items() if not (asked and key in ("prompt", "template"))}
    columns = Columns({**kept, **given}, {} if asked else chosen.templates, chosen.known_as)
    listing = f"Its columns are {', '.join(sorted(present))}." if present else "It has no columns."
    missing = [name for name in columns.names if name not in present]
    if missing:
        raise UsageError(f"{where} has no column {missing[0]!r}.", listing)
    if lacking := _lacking(columns):
        raise UsageError(f"{where}: which column is the {lacking}?", listing, f"Say --map {lacking}=COLUMN.")
    return columns


def _recognised(present: set[str]) -> Columns:
    for kind, (known_by, keys, templates) in _KNOWN.items():
        if present.issuperset(known_by.split()):
            found = {
                key: next((name for name in names.split() if name in present), None) for key, names in keys.items()
            }
            return Columns({key: name for key, name in found.items() if name}, templates, kind)
    return Columns({})


def _lacking(columns: Columns) -> str | None:
    """The key without which no fact can be asked."""
    if "object" not in columns.of:
        return "object"
    if "prompt" in columns.of:
        return None
    if "template" not in columns.of and not columns.templates:
        return "prompt"
    return None if "subject" in columns.of else "subject"
