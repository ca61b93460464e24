"""`facts:FILE.jsonl`, or `facts:FILE.csv`: a user's own facts, one per line. `SCHEMA` says what it holds."""

from __future__ import annotations

import difflib
import itertools
import math
from pathlib import Path
from typing import Any

from compressknow.errors import UsageError
from compressknow.evaluate.facts import BLANK, GENERAL, Fact, Probe
from compressknow.evaluate.scoring.prompts import OBJECT, SUBJECT, ends_open, fill, with_blank
from compressknow.evaluate.sources.columns import csv_lines, json_lines
from compressknow.evaluate.sources.source import Options, ProbeSource
from compressknow.files import as_text, name_of
from compressknow.reading import sha256_of

PROTOCOL = "facts/1"
SCHEMA = f"""\
One JSON object per line, in UTF-8; blank lines are skipped. Each needs

  prompt      a sentence with the object's place as one {BLANK}: "The capital of France is {BLANK}."; for causal
              models its beginning is enough, "The capital of France is": the object comes next
  obj_label   the object: "Paris"

or, in place of the prompt,

  template    a sentence with {SUBJECT} for the subject and {OBJECT} for the object: "{SUBJECT} was born in {OBJECT}."
  sub_label   the subject: "Ada Lovelace"

and may have

  candidates  list of at least 2 answers to choose from, the object among them; without it, the model may give any
              answer
  relation    what the fact is about, for tables by relation (default: the file's name)
  subject     domain, for the grades: geography, language, science, history and people, arts and literature,
              common sense, or a text of your own (default: {GENERAL})
  sub_label   the subject's name, also beside a prompt
  popularity  a number above 0, greater for a better known subject, for figures by popularity
  id          unique name of the fact (default: relation/number of the line)

Other keys are ignored.

A file .csv has the same keys as columns, named in its first line; candidates are parted by |.
"""

_HINT = (
    f'A line needs at least {{"prompt": "The capital of France is {BLANK}.", "obj_label": "Paris"}}; '
    "compressknow probe --help shows all keys."
)
_TEXTS = ("prompt", "template", "obj_label", "sub_label", "relation", "subject")
_KEYS = (*_TEXTS, "id", "candidates", "popularity")
_SHOWN = 5
# Of a line's other keys, those that are looked at for a misspelling.
_COMPARED = 100


class OwnFacts(ProbeSource):
    """``facts:FILE.jsonl``."""

    help = "your own facts"
    form = "FILE.jsonl"
    details = """\
A line of facts:FILE.jsonl, for example:
  {"relation": "capital", "subject": "geography", "sub_label": "France",
   "obj_label": "Paris", "prompt": "The capital of France is [MASK].",
   "candidates": ["Paris", "Rome", "Madrid"], "popularity": 68000000}
`prompt` and `obj_label` are required, the rest is optional. Instead of
`prompt` it may have `template` ("The capital of [X] is [Y].") with
`sub_label`. Without `candidates` the answer may be any text (for masked
models, any single token). facts:FILE.csv has these as columns, and
candidates as Paris|Rome|Madrid."""

    def named(self, part: str) -> str:
        """The file's own name: a fact is the same wherever the file lies."""
        return name_of(Path(part))

    def meant(self, text: str) -> bool:
        """By the file's suffix."""
        return Path(text).suffix.lower() in (".jsonl", ".csv")

    def open(self, name: str, part: str, options: Options) -> Probe:  # noqa: ARG002
        """See `own_facts`."""
        path = Path(part).expanduser()
        if not path.exists():
            raise UsageError(
                f"There is no file {path}.", hint="facts: is followed by the path of a file of JSON lines, or of CSV."
            )
        return own_facts(path)


def own_facts(path: Path) -> Probe:
    """The facts of a file that follows `SCHEMA`.

    Raises UsageError that names file, line and key (or column, where a line is no JSON) of the first errors.
    """
    name = f"facts:{name_of(path)}"
    facts: dict[str, Fact] = {}
    lines: dict[str, int] = {}
    problems: list[str] = []
    # One tuple for all facts with the same candidates: files repeat a relation's list in each line.
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    for number, row in (csv_lines if path.suffix.lower() == ".csv" else json_lines)(path):
        found = [row] if isinstance(row, str) else _problems(row)
        if not found and isinstance(row, dict):
            fact = _fact(row, number, name, as_text(path.stem), shared)
            if fact.id in facts:
                found = [f"id: {fact.id!r} is the id of line {lines[fact.id]} too"]
            facts[fact.id], lines[fact.id] = fact, number
        problems += [f"line {number}, {problem}" for problem in found]
    if problems:
        raise _error(path, problems)
    if not facts:
        raise UsageError(f"{path} holds no facts.", hint=_HINT)
    closed = all(fact.candidates for fact in facts.values())
    sha256 = sha256_of(path)
    return Probe(
        name=name,
        protocol=PROTOCOL,
        facts=tuple(facts.values()),
        vocabulary="closed" if closed else "open",
        source={"files": {name_of(path): sha256}},
    )


def _error(path: Path, problems: list[str]) -> UsageError:
    shown = problems[:_SHOWN]
    rest = len(problems) - len(shown)
    more = [f"and {rest} more"] if rest else []
    return UsageError(f"{path} cannot be read as facts:", "\n".join(f"  {line}" for line in shown + more), _HINT)


def _problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with one line, each as ``KEY: what``; types first, since the other rules need them right."""
    wrong = [f"{key}: must be a non-empty string" for key in _TEXTS if key in row and not _is_text(row[key])]
    wrong += _wrong_types(row)
    return wrong or [*_misspelt(row), *_missing(row), *_wrong_prompt(row), *_wrong_candidates(row)]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _wrong_types(row: dict[str, Any]) -> list[str]:
    wrong = []
    if "id" in row and not _is_text(row["id"]) and type(row["id"]) is not int:
        wrong.append("id: must be a non-empty string")
    candidates = row.get("candidates")
    if candidates is not None and not (isinstance(candidates, list) and all(map(_is_text, candidates))):
        wrong.append("candidates: must be a list of texts, none empty")
    popularity = row.get("popularity")
    if popularity is not None and not (type(popularity) in (int, float) and 0 < popularity < math.inf):
        wrong.append("popularity: must be a number above 0")
    return wrong


def _misspelt(row: dict[str, Any]) -> list[str]:
    """Other keys are ignored, but one that nearly is a known one would go unnoticed."""
    others = itertools.islice((key for key in row if key not in _KEYS), _COMPARED)
    near = {key: difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85) for key in others}
    return [f"{key}: unknown; did you mean {match[0]}?" for key, match in near.items() if match]


def _missing(row: dict[str, Any]) -> list[str]:
    missing = [] if "obj_label" in row else ["obj_label: missing"]
    if "prompt" not in row and "template" not in row:
        missing.append("prompt: missing, and no template either")
    elif "prompt" not in row and "sub_label" not in row:
        missing.append("sub_label: missing; the template needs it")
    return missing


def _wrong_prompt(row: dict[str, Any]) -> list[str]:
    if "prompt" in row:
        count = row["prompt"].count(BLANK)
        if count == 1 or (count == 0 and ends_open(row["prompt"])):
            return []
        return [f"prompt: holds {BLANK} {count} times, not once"]
    if "template" not in row:
        return []
    if SUBJECT not in row["template"] or row["template"].count(OBJECT) != 1 or BLANK in row["template"]:
        return [f"template: must hold {SUBJECT}, and {OBJECT} once"]
    return [f"sub_label: holds {BLANK}"] if BLANK in row.get("sub_label", "") else []


def _wrong_candidates(row: dict[str, Any]) -> list[str]:
    candidates = row.get("candidates")
    if candidates is None:
        return []
    if len(candidates) < 2:
        return ["candidates: must be at least 2"]
    if len(set(candidates)) < len(candidates):
        return ["candidates: hold one answer twice"]
    if "obj_label" in row and row["obj_label"] not in candidates:
        return [f"candidates: the object {row['obj_label']!r} is not among them"]
    return []


def _prompt(prompt: str) -> str:
    return prompt if BLANK in prompt else with_blank(prompt)


def _fact(
    row: dict[str, Any], number: int, probe: str, stem: str, shared: dict[tuple[str, ...], tuple[str, ...]]
) -> Fact:
    relation, subject = row.get("relation", stem), row.get("sub_label", "")
    candidates = tuple(row["candidates"]) if row.get("candidates") is not None else None
    return Fact(
        id=str(row.get("id", f"{relation}/{number}")),
        probe=probe,
        relation=relation,
        subject=row.get("subject", GENERAL),
        sub_label=subject,
        obj_label=row["obj_label"],
        prompt=_prompt(row["prompt"]) if "prompt" in row else fill(row["template"], subject),
        candidates=shared.setdefault(candidates, candidates) if candidates else None,
        popularity=row.get("popularity"),
    )
