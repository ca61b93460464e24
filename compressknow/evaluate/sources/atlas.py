"""`atlas`: the facts that come with the package, so that a first report needs no download.

The data is ``compressknow/evaluate/atlas/*.json``, one file a relation: {"relation", "subject", "definition",
"templates": [TEXT, ...], "source", "popularity": TEXT or null, "facts": [{"id", "sub_label", "obj_label",
"popularity"?}, ...]}. Where each file's facts come from, and under which licence, stands in ``ATTRIBUTION.md`` beside
them.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from typing import Any

from compressknow.base.errors import CompressknowError
from compressknow.evaluate.facts import Fact, Probe
from compressknow.evaluate.scoring.prompts import OBJECT, capitalize, fill, pick
from compressknow.evaluate.sources import Options, ProbeSource

PROTOCOL = "atlas/1"


class Atlas(ProbeSource):
    """``atlas``, in one of several wordings."""

    help = "built in: 4,002 facts of six domains; nothing to download"
    takes = frozenset({"template"})

    def open(self, name: str, part: str, options: Options) -> Probe:  # noqa: ARG002
        return read_atlas(options.template)


def read_atlas(template: int = 1) -> Probe:
    """Read all facts of the package. A relation's candidates are its distinct objects in alphabetical order.

    `template` chooses one of each relation's templates, counted from 1. Raises UsageError where there is none of that
    number, CompressknowError where the installation lacks the data.
    """
    contents = _read_files()
    if not contents:
        raise CompressknowError("This installation lacks the facts of atlas.", hint="Install compressknow again.")
    relations = [json.loads(content) for content in contents]
    return Probe(
        name="atlas",
        protocol=PROTOCOL,
        facts=tuple(fact for relation in relations for fact in _make_facts(relation, template)),
        source={
            "template": template,
            "files": len(contents),
            "sha256": hashlib.sha256(b"\0".join(contents)).hexdigest(),
            "sources": {relation["relation"]: relation["source"] for relation in relations},
            "popularity": {r["relation"]: r["popularity"] for r in relations if r.get("popularity")},
        },
    )


def _read_files() -> list[bytes]:
    """Read the files, ordered by name."""
    folder = files("compressknow.evaluate") / "atlas"
    if not folder.is_dir():
        return []
    entries = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".json")), key=lambda entry: entry.name
    )
    return [entry.read_bytes() for entry in entries]


def _make_facts(relation: dict[str, Any], number: int) -> list[Fact]:
    template = pick(relation["templates"], number, f"Relation {relation['relation']} of atlas")
    spell = capitalize if template.startswith(OBJECT) else str
    candidates = tuple(sorted({spell(fact["obj_label"]) for fact in relation["facts"]}))
    return [
        Fact(
            id=fact["id"],
            probe="atlas",
            relation=relation["relation"],
            subject=relation["subject"],
            sub_label=fact["sub_label"],
            obj_label=spell(fact["obj_label"]),
            prompt=capitalize(fill(template, fact["sub_label"])),
            candidates=candidates,
            popularity=fact.get("popularity"),
        )
        for fact in relation["facts"]
    ]
