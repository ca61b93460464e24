"""`bear`: the probe of Wiland, Ploner and Akbik, "BEAR: A Unified Framework for Evaluating Relational Knowledge in
Causal and Masked Language Models" (2024), read as its library lm-pub-quiz reads it.

A folder holds ``metadata_relations.json``, {RELATION: {"templates": [TEXT, ...], "answer_space_labels": [TEXT, ...]}},
and for each relation ``RELATION.jsonl`` with rows {"sub_label", "obj_label", "answer_idx"}: the index of the object
among the labels, from 0. A model is right where it finds the sentence with the right label the most likely one of all.
The score is over all facts alike: lm-pub-quiz weights each relation's accuracy by its number of facts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressknow.base.errors import UsageError
from compressknow.base.reading import INDEX, read_json
from compressknow.evaluate.facts import WIKIDATA, Fact, Probe, find_domain
from compressknow.evaluate.scoring.prompts import OBJECT, capitalize, fill, pick
from compressknow.evaluate.sources import Options, ProbeSource
from compressknow.evaluate.sources.columns import hash_files, read_rows

PROTOCOL = "bear/1"
METADATA = "metadata_relations.json"
WHERE_FROM = "github.com/lm-pub-quiz/BEAR (CC BY-SA)"
_HINT = f"BEAR comes from {WHERE_FROM}; --data names its folder."


class Bear(ProbeSource):
    """``bear``, in one of several wordings."""

    help = "BEAR's 60 relations (--data DIR)"
    takes = frozenset({"data", "template"})
    folders = ("bear", "BEAR")
    origin = f"{WHERE_FROM}: the folder with {METADATA}"

    def holds(self, folder: Path, part: str) -> bool:  # noqa: ARG002
        return (folder / METADATA).is_file()

    def open(self, name: str, part: str, options: Options) -> Probe:
        return read_bear(self.find(name, part, options.data), options.template)


def read_bear(folder: Path, template: int = 1) -> Probe:
    """Read all facts of the folder; `template` chooses one of each relation's templates, counted from 1.

    Raises UsageError where a file is missing or damaged, and where there is no template of that number.
    """
    relations = _read_metadata(folder / METADATA)
    paths = [folder / f"{relation}.jsonl" for relation in relations]
    facts = tuple(
        fact
        for path, (relation, metadata) in zip(paths, relations.items(), strict=True)
        for fact in _read_facts(path, relation, metadata, template)
    )
    files = hash_files([folder / METADATA, *paths], folder)
    return Probe(
        "bear", PROTOCOL, facts, score_rest=True, source={"from": WHERE_FROM, "template": template, "files": files}
    )


def _read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    try:
        relations = read_json(path, INDEX)
        for metadata in relations.values():
            if not (metadata["templates"] and metadata["answer_space_labels"]):
                raise ValueError("a relation without templates or labels")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read as BEAR's list of relations: {error}.", hint=_HINT) from error
    return dict(relations)


def _read_facts(path: Path, relation: str, metadata: dict[str, Any], number: int) -> list[Fact]:
    template = pick(metadata["templates"], number, f"Relation {relation} of bear")
    # lm-pub-quiz writes the first letter of a whole sentence in upper case: the answer's, where that comes first.
    spell = capitalize if template.startswith(OBJECT) else str
    candidates = tuple(spell(label) for label in metadata["answer_space_labels"])
    facts = []
    for index, row in enumerate(read_rows(path)):
        answer, subject = row.get("answer_idx"), row.get("sub_label")
        if not isinstance(answer, int) or not 0 <= answer < len(candidates) or not isinstance(subject, str):
            raise UsageError(
                f"{path}, fact {index + 1}: no sub_label, or an answer_idx outside 0 to {len(candidates) - 1}.",
                hint=_HINT,
            )
        facts.append(
            Fact(
                id=f"{relation}/{index}",
                probe="bear",
                relation=relation,
                subject=find_domain(relation, WIKIDATA),
                sub_label=subject,
                obj_label=candidates[answer],
                prompt=capitalize(fill(template, subject)),
                candidates=candidates,
            )
        )
    return facts
