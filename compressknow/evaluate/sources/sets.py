"""Sets of facts: atlas, which comes with the package, and BEAR and LAMA, read from the folders of their authors.

**atlas** is ``compressknow/evaluate/atlas/*.json``, one file per relation: {"relation", "subject", "definition",
"templates": [TEXT, ...], "source", "popularity": TEXT or null, "facts": [{"id", "sub_label", "obj_label",
"popularity"?}, ...]}. The source and licence of each file's facts are in ``ATTRIBUTION.md``.

**bear** is the probe of Wiland, Ploner and Akbik, "BEAR: A Unified Framework for Evaluating Relational Knowledge in
Causal and Masked Language Models" (2024), read as by its library lm-pub-quiz. A folder has
``metadata_relations.json``, {RELATION: {"templates": [TEXT, ...], "answer_space_labels": [TEXT, ...]}}, and for each
relation ``RELATION.jsonl`` with rows {"sub_label", "obj_label", "answer_idx"}: the index of the object among the
labels, from 0. A causal model is correct if the sentence with the right label is the most likely of all; for masked
models only the label is scored, whereas lm-pub-quiz by default scores each token of the sentence. All facts count
equally: lm-pub-quiz weights each relation's accuracy by its number of facts.

**lama** is LAMA (Petroni et al. 2019, "Language Models as Knowledge Bases?"). The folder is the content of
https://dl.fbaipublicfiles.com/LAMA/data.zip: ``TREx/P*.jsonl``, ``Google_RE/*_test.jsonl``,
``Squad/test.jsonl``, ``ConceptNet/test.jsonl`` and ``relations.jsonl``, a template for each relation of T-REx.
The `lama` protocol also needs ``common_vocab_cased.txt`` in it, with one word per line. T-REx and Google-RE are
evaluated by template, in both protocols, and SQuAD and ConceptNet by the first of their ``masked_sentences``. A prompt
has one blank, so sentences with several are dropped (3 of SQuAD's): the official code scores the first blank, the
paper's code each of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from compressknow.base.errors import UsageError
from compressknow.base.reading import INDEX, TOKENIZER, find_mismatch, read_json, read_text
from compressknow.evaluate.facts import (
    COMMON_SENSE,
    GENERAL,
    OBJECT,
    PEOPLE,
    WIKIDATA,
    Fact,
    Probe,
    capitalize,
    check_blanks,
    collect_facts,
    fill,
    find_domain,
    map_relations,
    pick,
)
from compressknow.evaluate.sources import Options, ProbeSource
from compressknow.evaluate.sources.columns import hash_files, read_rows

METADATA = "metadata_relations.json"
BEAR_FROM = "github.com/lm-pub-quiz/BEAR (CC BY-SA)"
_RELATIONS = {str: {"templates": [str], "answer_space_labels": [str]}}
_HINT = f"Get BEAR from {BEAR_FROM}; --data names its folder."

LAMA_FROM = "https://dl.fbaipublicfiles.com/LAMA/data.zip"
RELATIONS, VOCABULARY = "relations.jsonl", "common_vocab_cased.txt"
PROTOCOLS = {"lama": "lama/1", "paper": "lama-paper/1"}
_FOLDERS = {"trex": "TREx", "google-re": "Google_RE", "squad": "Squad", "conceptnet": "ConceptNet"}
# From the official scripts/run_experiments.py, since relations.jsonl has none.
_GOOGLE_RE = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}
CONCEPTNET = map_relations(
    {
        COMMON_SENSE: (
            "AtLocation CapableOf Causes CausesDesire Desires HasA HasPrerequisite HasProperty HasSubevent IsA MadeOf "
            "MotivatedByGoal NotDesires PartOf ReceivesAction UsedFor"
        )
    }
)
LAMA = WIKIDATA | dict.fromkeys(_GOOGLE_RE, PEOPLE)
# Sets whose relations all have the same domain.
_DOMAINS_OF_SETS = {"conceptnet": COMMON_SENSE, "squad": GENERAL}
# Forms of relations and of facts; facts without labels are dropped, not refused.
_TEMPLATE = {"relation": str, "template?": str}
_FACT = {"judgments?": [{"judgment?": (str, None)}], "masked_sentences?": ([str], str, None)}
# The official scripts' max_sentence_length, in words.
_LONGEST_SENTENCE = 100


class Atlas(ProbeSource):
    help = "built in: 4,002 facts of six domains; nothing to download"
    takes = frozenset({"template"})

    def open(self, name: str, part: str, options: Options) -> Probe:  # noqa: ARG002
        return read_atlas(options.template)


def read_atlas(template: int = 1) -> Probe:
    """Read all facts of the package, in one of each relation's templates, counted from 1. Raises UsageError without it.
    A relation's candidates are its distinct objects in alphabetical order."""
    entries = [each for each in (files("compressknow.evaluate") / "atlas").iterdir() if each.name.endswith(".json")]
    contents = [entry.read_bytes() for entry in sorted(entries, key=lambda entry: entry.name)]
    relations = [json.loads(content) for content in contents]
    return Probe(
        name="atlas",
        protocol="atlas/1",
        facts=tuple(fact for relation in relations for fact in _make_atlas_facts(relation, template)),
        source={
            "template": template,
            "files": len(contents),
            "sha256": hashlib.sha256(b"\0".join(contents)).hexdigest(),
            "sources": {relation["relation"]: relation["source"] for relation in relations},
            "popularity": {r["relation"]: r["popularity"] for r in relations if r.get("popularity")},
        },
    )


def _make_atlas_facts(relation: dict[str, Any], number: int) -> list[Fact]:
    template = pick(relation["templates"], number, f"Relation {relation['relation']} of atlas")
    candidates = tuple(sorted({fact["obj_label"] for fact in relation["facts"]}))
    return [
        Fact(
            id=fact["id"],
            probe="atlas",
            relation=relation["relation"],
            subject=relation["subject"],
            sub_label=fact["sub_label"],
            obj_label=fact["obj_label"],
            prompt=fill(template, fact["sub_label"]),
            candidates=candidates,
            popularity=fact.get("popularity"),
        )
        for fact in relation["facts"]
    ]


def _describe_folder(name: str, origin: str) -> str:
    """Say where facts came from: whether a local folder is a set's unchanged download is not known."""
    return f"a local folder in the layout of {name}, {origin}"


class Bear(ProbeSource):
    help = "BEAR's 60 relations (--data DIR)"
    takes = frozenset({"data", "template"})
    folders = ("bear", "BEAR")
    origin = f"{BEAR_FROM}: the folder with {METADATA}"

    def holds(self, folder: Path, part: str) -> bool:  # noqa: ARG002
        return (folder / METADATA).is_file()

    def open(self, name: str, part: str, options: Options) -> Probe:
        folder = self.find(name, part, options.data)
        try:
            relations: dict[str, dict[str, Any]] = read_json(folder / METADATA, INDEX)
            if wrong := find_mismatch(relations, _RELATIONS):
                raise ValueError(wrong)
            if not all(metadata["templates"] and metadata["answer_space_labels"] for metadata in relations.values()):
                raise ValueError("a relation without templates or labels")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{folder / METADATA} cannot be read as BEAR's list of relations: {error}.", hint=_HINT
            ) from error
        paths = [folder / f"{relation}.jsonl" for relation in relations]
        facts = tuple(
            fact
            for path, (relation, metadata) in zip(paths, relations.items(), strict=True)
            for fact in _read_bear_facts(path, relation, metadata, options.template)
        )
        hashes = hash_files([folder / METADATA, *paths], folder)
        return Probe(
            name,
            "bear/1",
            facts,
            score_rest=True,
            source={"from": _describe_folder("BEAR", BEAR_FROM), "template": options.template, "files": hashes},
        )


def _read_bear_facts(path: Path, relation: str, metadata: dict[str, Any], number: int) -> list[Fact]:
    template = pick(metadata["templates"], number, f"Relation {relation} of bear")
    # lm-pub-quiz capitalizes the whole sentence, so the answer if that comes first.
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


class Lama(ProbeSource):
    """``lama:SET``: one of LAMA's sets, by one of two protocols.

    `lama` follows the official code (facebookresearch/LAMA: run_experiments.py, batch_eval_KB_completion.py):
    - Answers are words of the common vocabulary. Facts whose object has a word outside of it are dropped; the scorers
      also drop those whose object is not one token of the model.
    - Facts of Google-RE that more raters rejected than accepted ("skip" counts as a rejection) are dropped.
    - With a template, each pair of subject and object counts once per relation; without one, duplicates are kept, and
      sentences of more than 100 words are dropped.
    - The score of T-REx and of Google-RE is the unweighted mean over relations; the other sets are one relation.

    `paper` follows the code of "The Cost of Compression" (NamburiSrinath/LLMCompression, utils.py): answers are tokens
    of the model's whole vocabulary, their case is ignored, each sentence is evaluated once per set, nothing else is
    dropped, and all facts count equally. This agrees with table 3 of the paper: its scores are fractions of 5,510 for
    Google-RE, whose templates give as many distinct sentences, and of 308 for SQuAD, whose sentences have 308 blanks.
    """

    help = "LAMA's trex, google-re, squad or conceptnet (--data DIR)"
    form = "SET"
    parts = tuple(_FOLDERS)
    takes = frozenset({"data", "protocol"})
    protocols = tuple(PROTOCOLS)
    folders = ("lama", "LAMA", "data")
    origin = f"{LAMA_FROM} (it unpacks to TREx/, Google_RE/, Squad/ and ConceptNet/)"

    def holds(self, folder: Path, part: str) -> bool:
        return (folder / _FOLDERS[part]).is_dir()

    def open(self, name: str, part: str, options: Options) -> Probe:
        folder = self.find(name, part, options.data)
        official, by_template = options.protocol == "lama", part in ("trex", "google-re")
        paths, rows = _read_lama_rows(folder, part)
        words = _read_vocabulary(folder / VOCABULARY) if official else ()
        allowed = frozenset(words) if official else None

        def get_key(fact: Fact) -> tuple[str, ...] | None:
            if not official:
                return (fact.prompt,)
            return (fact.relation, fact.sub_label, fact.obj_label) if by_template else None

        duplicate = "same subject and object" if official else "same sentence"
        facts, dropped = collect_facts((_make_lama_fact(part, row, allowed) for row in rows), get_key, duplicate)
        extra = [folder / VOCABULARY] if official else []
        templates = [folder / RELATIONS] if part == "trex" else []
        return Probe(
            name=name,
            protocol=PROTOCOLS[options.protocol],
            facts=facts,
            dropped=dropped,
            vocabulary="words" if official else "full",
            words=words,
            fold_case=not official,
            keep_unanswerable=not official,
            average="macro" if official and by_template else "micro",
            source={
                "from": _describe_folder("LAMA", f"{LAMA_FROM} (CC BY-NC 4.0)"),
                "asked by": "template" if by_template else "the first of masked_sentences",
                "files": hash_files([*extra, *templates, *paths], folder),
            },
        )


# Relation of a row, its template (None if the row has its own sentence, "" if there is none), number of the row in the
# file, and its values.
_Row = tuple[str, str | None, int, Mapping[str, Any]]


def _read_lama_rows(folder: Path, name: str) -> tuple[list[Path], Iterator[_Row]]:
    """Return the files of a set in the official order, and their rows."""
    subset = folder / _FOLDERS[name]
    relations: dict[str, tuple[Path, str | None]]
    if name == "trex":
        # The file also has relations without facts; facts of relations that it lacks are dropped.
        templates = {row["relation"]: row.get("template", "") for row in _read_checked(folder / RELATIONS, _TEMPLATE)}
        relations = {each: (subset / f"{each}.jsonl", template) for each, template in templates.items()}
        relations |= {path.stem: (path, "") for path in sorted(subset.glob("*.jsonl")) if path.stem not in templates}
    elif name == "google-re":
        relations = {each: (subset / f"{each}_test.jsonl", template) for each, template in _GOOGLE_RE.items()}
    else:
        relations = {name: (subset / "test.jsonl", None)}
    present = {relation: entry for relation, entry in relations.items() if entry[0].is_file()}
    if not present:
        raise UsageError(f"{subset} has no facts of lama:{name}.", hint=f"Get them from {LAMA_FROM}.")
    rows = (
        (str(values.get("pred", name)) if template is None else relation, template, number, values)
        for relation, (path, template) in present.items()
        for number, values in enumerate(_read_checked(path, _FACT))
    )
    return [path for path, _ in present.values()], rows


def _read_checked(path: Path, form: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = read_rows(path)
    if wrong := find_mismatch(rows, [form], path.name):
        raise UsageError(f"{path} cannot be read as LAMA's: {wrong}.", hint=f"Get LAMA from {LAMA_FROM}.")
    return rows


def _read_vocabulary(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise UsageError(
            f"There is no {path}.",
            "The lama protocol ranks the words of LAMA's common vocabulary.",
            "Get https://dl.fbaipublicfiles.com/LAMA/common_vocab_cased.txt, or use --protocol paper.",
        )
    try:
        lines = read_text(path, TOKENIZER).split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", hint="The file is damaged: get it again.") from None
    return tuple(dict.fromkeys(word for line in lines if (word := line.strip())))


def _make_lama_fact(name: str, row: _Row, words: frozenset[str] | None) -> Fact | str:
    """Return the row's fact, or the reason to drop it: by the official rules with a vocabulary, else by the paper's."""
    relation, template, number, values = row
    # The subject of SQuAD's rows is the set's name; that of ConceptNet's is in `sub`.
    obj_label, sub_label = values.get("obj_label"), values.get("sub_label", values.get("sub"))
    if not (isinstance(obj_label, str) and isinstance(sub_label, str)):
        return "no label of subject or object"
    sub_label = "" if sub_label == "Squad" else sub_label
    if template == "":
        return f"no template for its relation in {RELATIONS}"
    if template is not None:
        prompt = fill(template.strip(), sub_label.strip())
    else:
        sentences = values.get("masked_sentences") or [""]
        prompt = sentences if isinstance(sentences, str) else sentences[0]
    if words is not None:
        if template is None and len(prompt.split()) > _LONGEST_SENTENCE:
            return f"sentence of more than {_LONGEST_SENTENCE} words"
        if not words.issuperset(obj_label.split(" ")):
            return "object outside the common vocabulary"
        judgments = [judgment.get("judgment") == "yes" for judgment in values.get("judgments", [])]
        if judgments.count(False) > judgments.count(True):
            return "rejected by its raters"
    if reason := check_blanks(prompt):
        return reason
    return Fact(
        id=f"{relation}/{values.get('uuid', values.get('id', number))}",
        probe=f"lama:{name}",
        relation=relation,
        subject=_DOMAINS_OF_SETS.get(name) or find_domain(relation, LAMA),
        sub_label=sub_label,
        obj_label=obj_label,
        prompt=prompt,
    )
