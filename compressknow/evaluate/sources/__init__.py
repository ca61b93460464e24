"""Sources of facts, tasks and texts: a registry, to which other packages add, and how a probe is opened by its name."""

from __future__ import annotations

import json
import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

from compressknow.base.errors import CompressknowError, UnusedOptions, UsageError, suggest_word
from compressknow.base.packages import Registry
from compressknow.base.reading import find_mismatch
from compressknow.engine.language_model import LanguageModel
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.facts import Probe, join_wordings
from compressknow.evaluate.records import ProbeEntry
from compressknow.evaluate.text import RunningText


@dataclass(frozen=True)
class Options:
    """Options of how probes are read; each applies to the probes that know it, of which there must be one.

    Attributes
    ----------
    data : where downloaded sets lie: the set's own folder, or one that holds `lama/`, `bear/`, `tasks/`.
    protocol : of LAMA: ``lama`` or ``paper``; of other probes, what they offer.
    template : which of a relation's templates is used, from 1 (atlas, BEAR).
    templates : in how many of a relation's templates each fact is put, from the first.
    limit, seed : a sample of at most so many facts per probe; of lm-eval's tasks the first so many items, of texts the
        first so many chunks.
    context : tokens per chunk of ``text:``; None for 512, or as many as the model has room for.
    columns, split : of ``hf:`` data sets.
    tasks : a folder of lm-eval tasks of the user's own.
    """

    data: Path | None = None
    protocol: str = "lama"
    template: int = 1
    templates: int = 1
    limit: int | None = None
    seed: int = 0
    context: int | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    tasks: Path | None = None

    def __post_init__(self) -> None:
        for name in ("template", "templates", "limit", "seed", "context"):
            value = getattr(self, name)
            try:
                # Convert numpy's integers, which JSON does not take.
                object.__setattr__(self, name, None if value is None else operator.index(value))
            except TypeError:
                raise UsageError(f"--{name} must be a whole number: {value!r}.") from None

    def list_changed(self) -> list[str]:
        """Return the names of the options that are not at their defaults."""
        default = Options()
        return [each.name for each in fields(self) if getattr(self, each.name) != getattr(default, each.name)]


# Fields of options that users know by another word.
WORDS = {"columns": "map"}


class Task(ABC):
    """Items that another harness puts to the model and judges one by one; what it says of each is kept as an answer.
    Its `name` is as the user names it, and it can be pickled."""

    name: str

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash all that decides what is evaluated: answers with the same hash can be compared."""

    @abstractmethod
    def run(self, loaded: LanguageModel) -> tuple[list[Answer], ProbeEntry]:
        """Return the answers of a model, and the task's entry in ``probe.json``."""

    def check_family(self, family: str) -> None:  # noqa: B027
        """Raise UnsupportedError if it cannot evaluate models of a family: ``masked``, ``causal`` or ``seq2seq``."""

    def check_data(self) -> None:  # noqa: B027
        """Raise CompressknowError if what it is made of cannot be had or read, as `run` does."""

    def list_names(self) -> list[str] | None:
        """Return the domains and relations of its answers; None if only its run tells them."""
        return None


Opened = Probe | Task | RunningText


class ProbeSource(ABC):
    """One kind of probe. Its name is that of its entry in the registry: ``atlas``, or ``lama`` of ``lama:trex``.

    Attributes
    ----------
    help : one line for ``--help``: which facts these are.
    form : what follows the name and a colon, in capitals as in ``FILE.jsonl``; empty if the name stands alone.
    parts : all that may follow, in lower case, where that is one of a few names: those of LAMA's sets.
    takes : the fields of `Options` that it reads, besides `limit` and `seed`.
    protocols : what ``--protocol`` may choose, in lower case, the default first; empty if it has one way alone.
    folders : where ``--data`` names a folder of several sets, the names that the set's own folder may have in there.
    origin : where its data can be downloaded, for the message that it is missing.
    held_out : whether some of its items can be held out, as a search does: of facts they can, of a `Task` they cannot.
    evaluated : how its answers come about, for the page's section on methods, where that is not by this package's own
        scorers.
    details : more lines for ``--help``, such as an example.
    """

    help: ClassVar[str]
    form: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[frozenset[str]] = frozenset()
    protocols: ClassVar[tuple[str, ...]] = ()
    folders: ClassVar[tuple[str, ...]] = ()
    origin: ClassVar[str] = ""
    held_out: ClassVar[bool] = True
    evaluated: ClassVar[str | None] = None
    details: ClassVar[str] = ""

    @abstractmethod
    def open(self, name: str, part: str, options: Options) -> Opened:
        """Read the probe.

        Parameters
        ----------
        name : of the whole probe, for `Probe.name` and `Fact.probe`: ``lama:trex``.
        part : what the user wrote after the colon, one of `parts` if there are any: ``trex``.
        options : `limit` and `seed` are of interest for tasks alone: facts are sampled afterwards.

        Raises UsageError if there is no such thing, where its data is missing or damaged, or where an option makes
        no sense. Its message goes to the user.
        """

    def usage(self, name: str) -> str:
        """Return how users write it: ``lama:SET``."""
        return f"{name}:{self.form}" if self.form else name

    def named(self, part: str) -> str:
        """Return what follows the colon in the name of the probe: the name of a file, not its path."""
        return part

    def meant(self, text: str) -> bool:
        """Return whether an unknown name is probably a part of this source, the name before the colon forgotten."""
        return text.lower().replace("_", "-") in self.parts

    def holds(self, folder: Path, part: str) -> bool:  # noqa: ARG002
        """Return whether a folder is that of the set."""
        return folder.is_dir()

    def find(self, name: str, part: str, data: Path | None) -> Path:
        """Return the folder of the set: `data` itself, or one of the `folders` in it. Raises UsageError that says where
        to get it and where to put it."""
        places = [data, *(data / folder for folder in self.folders)] if data else []
        for place in places:
            if self.holds(place, part):
                return place
        raise UsageError(
            f"{data} does not hold {name}." if data else f"{name} does not come with compressknow.",
            f"Download it from {self.origin}." if self.origin else None,
            f"Put it into DIR/{self.folders[0]} and pass --data DIR." if self.folders else "Pass --data DIR.",
        )


DEFAULT = ("atlas",)
PROBES = Registry(
    "compressknow.probes",
    "probe",
    ProbeSource,  # type: ignore[type-abstract]
    {
        "atlas": "compressknow.evaluate.sources.sets:Atlas",
        "lama": "compressknow.evaluate.sources.sets:Lama",
        "bear": "compressknow.evaluate.sources.sets:Bear",
        "facts": "compressknow.evaluate.sources.custom:OwnFacts",
        "hf": "compressknow.evaluate.sources.custom:Hub",
        "lm-eval": "compressknow.evaluate.sources.tasks:LmEval",
        "text": "compressknow.evaluate.sources.custom:Text",
    },
)


def open_all(names: Sequence[str], options: Options) -> list[Opened]:
    """Open the probes of these names in their order, atlas where none is named; each reads the options it takes. Raises
    UsageError for one that is unknown, missing or empty, UnusedOptions for options that no source takes,
    CompressknowError for one that cannot be used."""
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit must be at least 1: {options.limit}.")
    if "protocol" in options.list_changed():
        known = list(dict.fromkeys(protocol for _, source in list_usable() for protocol in source.protocols))
        if options.protocol not in known:
            near = suggest_word(options.protocol, known)
            raise UsageError(f"Unknown protocol {options.protocol!r}.", hint=f"{near}Choose {' or '.join(known)}.")
    check_taken(names, options)
    return [_open_by_name(name, options) for name in names or DEFAULT]


def find_source(name: str) -> ProbeSource | None:
    """Return the source of the probe of that name; None if there is none, or none that can be used here."""
    try:
        return PROBES[_split_name(name)[0]]
    except CompressknowError:
        return None


def normalize_name(name: str) -> str:
    """Return a probe's name as its answers have it: case does not matter, and a facts file goes by its own name."""
    kind, part = _split_name(name)
    source = find_source(kind)
    return _join_name(kind, source.named(_normalize_part(source, part))) if source else name


def list_usable() -> Iterator[tuple[str, ProbeSource]]:
    """Yield the names and sources of all kinds of probes, without those of other packages that cannot be used."""
    for kind in PROBES:
        if source := find_source(kind):
            yield kind, source


def check_taken(names: Sequence[str], options: Options) -> None:
    """Raise UnusedOptions for options that no probe of these names takes; a folder of data may wait for others."""
    sources = [find_source(name) for name in names or DEFAULT]
    general = {"limit", "seed", "templates"} | ({"data"} if names else set())
    idle = [
        field
        for field in options.list_changed()
        # Errors in names are raised when probes are opened.
        if field not in general and not any(source is None or _takes(source, field) for source in sources)
    ]
    if idle:
        words = [WORDS.get(field, field) for field in idle]
        takers = [
            f"--{word} is for {', '.join(kind for kind, source in list_usable() if _takes(source, field))}"
            for word, field in zip(words, idle, strict=True)
        ]
        raise UnusedOptions(
            f"No probe here takes {', '.join(f'--{word}' for word in words)}.",
            f"{'; '.join(takers)}.",
            "Leave out what no probe takes, or name one that does with -p.",
            names=words,
        )


def _open_by_name(name: str, options: Options) -> Opened:
    kind, part = _split_name(name)
    if kind not in PROBES:
        raise _make_unknown_error(name)
    source = PROBES[kind]
    part = _normalize_part(source, part)
    if part not in source.parts if source.parts else bool(part) != bool(source.form):
        raise _make_unknown_error(name)
    full = _join_name(kind, source.named(part))
    if options.templates > 1:
        return _open_in_wordings(full, name, source, options)
    if source.protocols and options.protocol not in source.protocols:
        # It is for another probe.
        options = replace(options, protocol=source.protocols[0])
    try:
        opened = source.open(full, part, options)
    except CompressknowError:
        raise
    except Exception as error:
        if not PROBES.is_added(kind):
            raise
        # Third-party code may raise anything.
        raise PROBES.incompatible(kind, f"{type(error).__name__}: {error}") from error
    _check_opened(kind, full, opened)
    return opened.sample(options.limit, options.seed) if isinstance(opened, Probe) else opened


def _open_in_wordings(full: str, name: str, source: ProbeSource, options: Options) -> Probe:
    """Open the probe in the first wordings. Raise UsageError if its source has none, or too few."""
    if "template" not in source.takes:
        several = [name for name, each in list_usable() if "template" in each.takes]
        raise UsageError(
            f"{full} has one wording per fact: --templates {options.templates} has nothing to choose from.",
            hint=f"Leave --templates out, or choose {' or '.join(several)}.",
        )
    if options.template != 1:
        raise UsageError(
            "--template and --templates exclude each other: one wording, or the first so many.",
            hint="Leave one of them out.",
        )
    single = replace(options, templates=1)
    opened = [_open_by_name(name, replace(single, template=number)) for number in range(1, options.templates + 1)]
    return join_wordings([probe for probe in opened if isinstance(probe, Probe)])


def _split_name(name: str) -> tuple[str, str]:
    kind, _, part = name.partition(":")
    return kind.lower().replace("_", "-"), part


def _join_name(kind: str, part: str) -> str:
    return f"{kind}:{part}" if part else kind


def _normalize_part(source: ProbeSource, part: str) -> str:
    """Return the part as the source has it: one of a few parts whatever its case, else as it stands."""
    return part.lower().replace("_", "-") if source.parts else part


def _takes(source: ProbeSource, field: str) -> bool:
    return field in source.takes or (field == "protocol" and bool(source.protocols))


def _check_opened(kind: str, name: str, opened: object) -> None:
    """Raise CompressknowError if what a source gives cannot be evaluated."""
    if not isinstance(opened, Opened):
        raise PROBES.incompatible(kind, f"It gives a {type(opened).__name__}, not a Probe, Task or RunningText.")
    if isinstance(opened, Probe) and not opened.facts:
        reasons = [f"  {count} dropped: {reason}" for reason, count in opened.dropped.items()]
        raise UsageError(f"{opened.name} has no facts to evaluate.", "\n".join(reasons) or "It is empty.")
    if isinstance(opened, Probe) and PROBES.is_added(kind) and (flaw := _find_flaw(name, opened)):
        raise PROBES.incompatible(kind, flaw)


# What answers and their record hold of a fact, as it is.
_TEXTS = dict.fromkeys(("id", "relation", "subject", "sub_label", "obj_label", "prompt"), str)
_FACT = {**_TEXTS, "popularity": (float, None)}


def _find_flaw(name: str, probe: Probe) -> str | None:
    """Find what would go wrong with facts of another package after hours: this one's sources check it themselves."""
    if probe.name != name or any(fact.probe != name for fact in probe.facts):
        return f"The probe or a fact of it does not have the name {name!r}."
    try:
        json.dumps(dict(probe.source))
    except (TypeError, ValueError) as error:
        return f"Its source cannot be written as JSON: {error}."
    for fact in probe.facts:
        if wrong := find_mismatch({key: getattr(fact, key) for key in _FACT}, _FACT):
            return f"Of its fact {fact.id!r}, {wrong}."
        choices = fact.candidates
        is_tuple = isinstance(choices, tuple) and len(set(choices)) == len(choices) > 1
        if choices is not None and not (is_tuple and fact.obj_label in choices):
            return f"The candidates of its fact {fact.id!r} are no tuple of different ones, the object among them."
    if twins := [fact for fact, times in Counter(fact.id for fact in probe.facts).items() if times > 1]:
        return f"Two of its facts have the id {twins[0]!r}."
    return None


def _make_unknown_error(name: str) -> UsageError:
    # Each part of a source that has parts, and what follows the names of others.
    names = [_join_name(kind, part) for kind, source in list_usable() for part in source.parts or (source.form,)]
    return UsageError(f"Unknown probe {name!r}.", hint=f"{_suggest(name)}Choose from {', '.join(names)}.")


def _suggest(name: str) -> str:
    """Suggest what a name may be meant for: one without its kind, or one that is nearly known."""
    beginning, colon, part = name.partition(":")
    if colon and _split_name(name)[0] not in PROBES and (near := suggest_word(beginning, PROBES, cutoff=0.7)):
        return near.replace("?", f":{part}?")
    for kind, source in list_usable():
        if source.meant(name):
            return f"Did you mean {_join_name(kind, _normalize_part(source, name))}? "
        if name.lower() == kind and not source.parts:
            return f"Did you mean {_join_name(kind, source.form)}? "
    alone = [kind for kind, source in list_usable() if not source.form]
    parts = [_join_name(kind, part) for kind, source in list_usable() for part in source.parts]
    return suggest_word(name, [*alone, *parts], cutoff=0.5)
