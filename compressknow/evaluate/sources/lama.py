"""`lama:...`: LAMA (Petroni et al. 2019, "Language Models as Knowledge Bases?") from the folder of its authors.

The folder is what https://dl.fbaipublicfiles.com/LAMA/data.zip holds: ``TREx/P*.jsonl``, ``Google_RE/*_test.jsonl``,
``Squad/test.jsonl``, ``ConceptNet/test.jsonl`` and ``relations.jsonl``, a template for each relation of T-REx.
``common_vocab_cased.txt``, one word a line, lies beside them; the `lama` protocol needs it.

T-REx and Google-RE are evaluated by template, in both protocols, and SQuAD and ConceptNet by the first of their
``masked_sentences``. A prompt has one blank, so that sentences with several are dropped (3 of SQuAD's): the official
code scores the first of the blanks, the paper's code each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from compressknow.base.errors import UsageError
from compressknow.base.reading import TOKENIZER, read_text
from compressknow.evaluate.facts import COMMON_SENSE, GENERAL, PEOPLE, WIKIDATA, Fact, Probe, find_domain, map_relations
from compressknow.evaluate.scoring.prompts import UniqueIds, check_blanks, fill
from compressknow.evaluate.sources import Options, ProbeSource
from compressknow.evaluate.sources.columns import hash_files, read_rows

WHERE_FROM = "https://dl.fbaipublicfiles.com/LAMA/data.zip"
SETS = ("trex", "google-re", "squad", "conceptnet")
RELATIONS, VOCABULARY = "relations.jsonl", "common_vocab_cased.txt"
PROTOCOLS = {"lama": "lama/1", "paper": "lama-paper/1"}

_FOLDERS = {"trex": "TREx", "google-re": "Google_RE", "squad": "Squad", "conceptnet": "ConceptNet"}
# They stand in the official scripts/run_experiments.py, not in relations.jsonl.
_GOOGLE_RE = {
    "place_of_birth": "[X] was born in [Y] .",
    "date_of_birth": "[X] (born [Y]).",
    "place_of_death": "[X] died in [Y] .",
}
GOOGLE_RE = map_relations({PEOPLE: "place_of_birth date_of_birth place_of_death"})
CONCEPTNET = map_relations(
    {
        COMMON_SENSE: (
            "AtLocation CapableOf Causes CausesDesire Desires HasA HasPrerequisite HasProperty HasSubevent IsA MadeOf "
            "MotivatedByGoal NotDesires PartOf ReceivesAction UsedFor"
        )
    }
)
DOMAINS = WIKIDATA | GOOGLE_RE
# Of the sets that are of one domain, whatever the relation.
_DOMAINS_OF_SETS = {"conceptnet": COMMON_SENSE, "squad": GENERAL}
# The official scripts' max_sentence_length, in words.
_LONGEST_SENTENCE = 100


@dataclass(frozen=True)
class _Row:
    """One line of a file, with its relation and the template (None: the row has its own sentence; "": none)."""

    relation: str
    template: str | None
    number: int
    values: Mapping[str, Any]

    @property
    def obj_label(self) -> Any:
        return self.values.get("obj_label")

    @property
    def sub_label(self) -> Any:
        """Return the subject; SQuAD's rows have no other than the set's name, ConceptNet's call it `sub`."""
        label = self.values.get("sub_label", self.values.get("sub"))
        return "" if label == "Squad" else label

    @property
    def prompt(self) -> str:
        if self.template is not None:
            return fill(self.template.strip(), self.sub_label.strip())
        sentences = self.values.get("masked_sentences") or [""]
        return sentences if isinstance(sentences, str) else str(sentences[0])


# Says why a row is dropped, None where it is kept.
_Rule = Callable[[_Row], str | None]


class Lama(ProbeSource):
    """``lama:SET``, by one of two protocols."""

    help = "LAMA's trex, google-re, squad or conceptnet (--data DIR)"
    form = "SET"
    parts = SETS
    takes = frozenset({"data", "protocol"})
    protocols = tuple(PROTOCOLS)
    folders = ("lama", "LAMA", "data")
    origin = f"{WHERE_FROM} (unpacked, it holds TREx/, Google_RE/, Squad/ and ConceptNet/)"

    def holds(self, folder: Path, part: str) -> bool:
        return (folder / _FOLDERS[part]).is_dir()

    def open(self, name: str, part: str, options: Options) -> Probe:
        folder = self.find(name, part, options.data)
        return read_lama(folder, part, cast(Literal["lama", "paper"], options.protocol))


def read_lama(folder: Path, name: str, protocol: Literal["lama", "paper"] = "lama") -> Probe:
    """Read one of `SETS`, by one of two protocols.

    `lama` follows the official code (facebookresearch/LAMA: run_experiments.py, batch_eval_KB_completion.py):
    - Answers are words of the common vocabulary. Facts whose object has a word outside of it are dropped, and so are,
      by the scorers, those whose object is not one token of the model.
    - Facts of Google-RE that more raters rejected than accepted ("skip" counts as a rejection) are dropped.
    - With a template, each pair of subject and object counts once in a relation; without one, duplicates stay, and
      sentences of more than 100 words are dropped.
    - The score of T-REx and of Google-RE is the unweighted mean over relations; the other sets are one relation.

    `paper` follows the code of "The Cost of Compression" (NamburiSrinath/LLMCompression, utils.py): answers are tokens
    of the model's whole vocabulary, their case is ignored, each sentence is evaluated once in a set, nothing else is
    dropped, and all facts count alike. Table 3 of the paper tells how: its scores are fractions of 5,510 for
    Google-RE, the number of distinct sentences that the templates make of it (the set's own first sentences hold 5,262
    blanks), and of 308 for SQuAD, whose 305 sentences hold 308 blanks.

    Raises UsageError where a file is missing or damaged.
    """
    paths, rows = _read_rows(folder, name)
    extra = [folder / VOCABULARY] if protocol == "lama" else []
    words = _read_vocabulary(folder / VOCABULARY) if protocol == "lama" else ()
    rules = (
        _make_official_rules(frozenset(words))
        if protocol == "lama"
        else [
            _check_labels,
            _check_template,
            _check_blanks,
            _make_repeat_rule(lambda row: (row.prompt,), "same sentence"),
        ]
    )
    facts, dropped = _select_facts(name, rows, rules)
    templates = [folder / RELATIONS] if name == "trex" else []
    return Probe(
        name=f"lama:{name}",
        protocol=PROTOCOLS[protocol],
        facts=facts,
        dropped=dropped,
        vocabulary="words" if protocol == "lama" else "full",
        words=words,
        fold_case=protocol == "paper",
        keep_unanswerable=protocol == "paper",
        average="macro" if protocol == "lama" and name in ("trex", "google-re") else "micro",
        source={
            "from": f"{WHERE_FROM} (CC BY-NC 4.0)",
            "asked by": "template" if name in ("trex", "google-re") else "the first of masked_sentences",
            "files": hash_files([*extra, *templates, *paths], folder),
        },
    )


def _read_rows(folder: Path, name: str) -> tuple[list[Path], Iterator[_Row]]:
    """Return the files of a set in the official order, and what they hold."""
    files = folder / _FOLDERS[name]
    relations: dict[str, tuple[Path, str | None]]
    if name == "trex":
        # The file names relations that have no facts, too; facts of a relation that it does not name are dropped.
        templates = {row.get("relation"): row.get("template", "") for row in read_rows(folder / RELATIONS)}
        relations = {str(relation): (files / f"{relation}.jsonl", template) for relation, template in templates.items()}
        relations |= {path.stem: (path, "") for path in sorted(files.glob("*.jsonl")) if path.stem not in templates}
    elif name == "google-re":
        relations = {each: (files / f"{each}_test.jsonl", template) for each, template in _GOOGLE_RE.items()}
    else:
        relations = {name: (files / "test.jsonl", None)}
    found = {relation: entry for relation, entry in relations.items() if entry[0].is_file()}
    if not found:
        raise UsageError(f"{files} holds no facts of lama:{name}.", hint=f"Get them from {WHERE_FROM}.")
    rows = (
        _Row(str(values.get("pred", name)) if template is None else relation, template, number, values)
        for relation, (path, template) in found.items()
        for number, values in enumerate(read_rows(path))
    )
    return [path for path, _ in found.values()], rows


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


def _select_facts(name: str, rows: Iterator[_Row], rules: list[_Rule]) -> tuple[tuple[Fact, ...], dict[str, int]]:
    facts, dropped, unique = [], Counter[str](), UniqueIds()
    for row in rows:
        if reason := next((reason for rule in rules if (reason := rule(row))), None):
            dropped[reason] += 1
            continue
        identifier = row.values.get("uuid", row.values.get("id", row.number))
        facts.append(
            Fact(
                id=unique(f"{row.relation}/{identifier}"),
                probe=f"lama:{name}",
                relation=row.relation,
                subject=_DOMAINS_OF_SETS.get(name) or find_domain(row.relation, DOMAINS),
                sub_label=row.sub_label,
                obj_label=row.obj_label,
                prompt=row.prompt,
            )
        )
    return tuple(facts), dict(dropped)


def _make_official_rules(words: frozenset[str]) -> list[_Rule]:
    def check_vocabulary(row: _Row) -> str | None:
        outside = not words.issuperset(row.obj_label.split(" "))
        return "object outside the common vocabulary" if outside else None

    def make_pair(row: _Row) -> tuple[str, ...] | None:
        return (row.relation, row.sub_label, row.obj_label) if row.template is not None else None

    return [
        _check_labels,
        _check_template,
        _check_length,
        check_vocabulary,
        _check_raters,
        _make_repeat_rule(make_pair, "same subject and object"),
        _check_blanks,
    ]


def _check_labels(row: _Row) -> str | None:
    named = isinstance(row.obj_label, str) and isinstance(row.sub_label, str)
    return None if named else "no label of subject or object"


def _check_template(row: _Row) -> str | None:
    return f"no template for its relation in {RELATIONS}" if row.template == "" else None


def _check_length(row: _Row) -> str | None:
    long = row.template is None and len(row.prompt.split()) > _LONGEST_SENTENCE
    return f"sentence of more than {_LONGEST_SENTENCE} words" if long else None


def _check_raters(row: _Row) -> str | None:
    judgments = [judgment.get("judgment") == "yes" for judgment in row.values.get("judgments", [])]
    return "rejected by its raters" if judgments.count(False) > judgments.count(True) else None


def _check_blanks(row: _Row) -> str | None:
    return check_blanks(row.prompt)


def _make_repeat_rule(key: Callable[[_Row], tuple[str, ...] | None], reason: str) -> _Rule:
    """Return the rule that keeps the first row of each key; None as a key is no repetition."""
    seen: set[tuple[str, ...]] = set()

    def rule(row: _Row) -> str | None:
        this = key(row)
        if this is None:
            return None
        if this in seen:
            return reason
        seen.add(this)
        return None

    return rule
