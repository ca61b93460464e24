"""Sources of facts, tasks and texts: the registry, which other packages can extend, and opening a probe by its name."""

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
    """Options for reading probes; each applies to the probes that support it, of which there must be at least one.

    Attributes
    ----------
    data : folder of a downloaded set, or one that contains `lama/`, `bear/`, `tasks/`.
    protocol : ``lama`` or ``paper`` for LAMA; for other probes, one that they offer.
    template : number of the template of each relation to use, from 1 (atlas, BEAR).
    templates : number of templates of each relation to use, from the first.
    limit, seed : maximum size and seed of the sample of facts per probe; for lm-eval's tasks and texts, `limit` is the
        number of items or chunks to use, from the first.
    context : tokens per chunk of ``text:``; None for 512, or as many as the model has positions for.
    columns, split : columns and split of ``hf:`` data sets.
    tasks : folder of the user's own lm-eval tasks.
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
                if value is not None or name not in ("limit", "context"):
                    object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise UsageError(f"--{name} must be a whole number: {value!r}.") from None
        for name in ("data", "tasks"):
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(folder))

    def list_changed(self) -> list[str]:
        """Return the names of options that differ from their defaults."""
        default = Options()
        return [each.name for each in fields(self) if getattr(self, each.name) != getattr(default, each.name)]


# Names on the command line of fields of `Options`, if they differ.
WORDS = {"columns": "map"}


class Task(ABC):
    """Task whose items another harness evaluates and judges one by one; each result is stored as an answer. `name` is
    the one that the user gives. Must be picklable."""

    name: str

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash everything that determines what is evaluated: answers with the same hash are comparable."""

    @abstractmethod
    def run(self, loaded: LanguageModel) -> tuple[list[Answer], ProbeEntry]:
        """Evaluate a model; return its answers, and the task's entry in ``probe.json``."""

    def check_family(self, family: str) -> None:  # noqa: B027
        """Raise UnsupportedError if it cannot evaluate models of this family: ``masked``, ``causal`` or ``seq2seq``."""

    def check_data(self) -> None:  # noqa: B027
        """Raise CompressknowError if its data is not available or cannot be read, as `run` does."""

    def list_names(self) -> list[str] | None:
        """Return the domains and relations of its answers; None if they are known only after it has run."""
        return None


Opened = Probe | Task | RunningText


class ProbeSource(ABC):
    """Kind of probe. Its name is that of its entry in the registry: ``atlas``, or ``lama`` for ``lama:trex``.

    Attributes
    ----------
    help : one line for ``--help`` that describes the facts.
    form : placeholder after the name and a colon, in capitals as in ``FILE.jsonl``; empty if nothing follows the name.
    parts : values of that placeholder, in lower case, if there are only a few, such as LAMA's sets.
    takes : fields of `Options` that it reads, besides `limit` and `seed`.
    protocols : values of ``--protocol``, in lower case, the default first; empty if there is only one.
    folders : names of the set's own folder in a folder of several sets that ``--data`` names.
    origin : where its data can be downloaded, for the message that it is missing.
    held_out : whether some of its items can be held out, as a search does: facts can, those of a `Task` cannot.
    evaluated : how it is evaluated, for the page's section on methods, if not by this package's scorers.
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
        name : name of the whole probe, for `Probe.name` and `Fact.probe`: ``lama:trex``.
        part : text after the colon, one of `parts` if there are any: ``trex``.
        options : options; only tasks need `limit` and `seed`, since facts are sampled afterwards.

        Raises UsageError, whose message is shown to the user, if the probe does not exist, its data is missing or
        damaged, or an option is invalid.
        """

    def usage(self, name: str) -> str:
        """Return the name as users write it: ``lama:SET``."""
        return f"{name}:{self.form}" if self.form else name

    def named(self, part: str) -> str:
        """Return the part for the name of the probe: for a file, its name without the path."""
        return part

    def meant(self, text: str) -> bool:
        """Return whether an unknown probe is probably a part of this source without its name and the colon."""
        return text.lower().replace("_", "-") in self.parts

    def holds(self, folder: Path, part: str) -> bool:  # noqa: ARG002
        """Return whether a folder contains the set."""
        return folder.is_dir()

    def find(self, name: str, part: str, data: Path | None) -> Path:
        """Return the folder of the set: `data`, or one of the `folders` in it. Raises UsageError with what to do."""

        def find_in(folder: Path) -> Path | None:
            candidates = (folder, *(folder / own for own in self.folders))
            return next((each for each in candidates if self.holds(each, part)), None)

        if data and (found := find_in(data)):
            return found
        if data and data.is_dir() and find_in(parent := data.resolve().parent):
            raise UsageError(
                f"{data} does not contain {name}; the folder above it does.", hint=f"Pass --data {parent}."
            )
        raise UsageError(
            f"{data} does not contain {name}." if data else f"{name} does not come with compressknow.",
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
    """Open the named probes in order, or atlas; each reads the options that it takes. Raises UsageError if one is
    unknown, missing or empty, UnusedOptions for options that no source takes, CompressknowError if one cannot be used.
    """
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
    """Return the source of a probe by its name; None if it is unknown, or cannot be used."""
    try:
        return PROBES[_split_name(name)[0]]
    except CompressknowError:
        return None


def normalize_name(name: str) -> str:
    """Return a probe's name as in its answers: in lower case, and with the name of a facts file for its path."""
    kind, part = _split_name(name)
    source = find_source(kind)
    return _join_name(kind, source.named(_normalize_part(source, part))) if source else name


def list_usable() -> Iterator[tuple[str, ProbeSource]]:
    """Yield the names and sources of all kinds of probes, without third-party ones that cannot be used."""
    for kind in PROBES:
        if source := find_source(kind):
            yield kind, source


def check_taken(names: Sequence[str], options: Options) -> None:
    """Raise UnusedOptions for options that none of the named probes takes; `data` may be given for any named probe."""
    sources = [find_source(name) for name in names or DEFAULT]
    general = {"limit", "seed", "templates"} | ({"data"} if names else set())
    unused = [
        field
        for field in options.list_changed()
        # Opening an unknown probe will report it.
        if field not in general and not any(source is None or _takes(source, field) for source in sources)
    ]
    if unused:
        words = [WORDS.get(field, field) for field in unused]
        takers = [
            f"--{word} is for {', '.join(kind for kind, source in list_usable() if _takes(source, field))}"
            for word, field in zip(words, unused, strict=True)
        ]
        raise UnusedOptions(
            f"No probe here takes {', '.join(f'--{word}' for word in words)}.",
            f"{'; '.join(takers)}.",
            "Leave them out, or name a probe that takes them with -p.",
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
        # The protocol was meant for another probe.
        options = replace(options, protocol=source.protocols[0])
    try:
        opened = source.open(full, part, options)
    except CompressknowError as error:
        if PROBES.is_added(kind):
            error.add_note(f"The probe {kind!r} comes from {PROBES.added_by(kind)}.")
        raise
    except Exception as error:
        if not PROBES.is_added(kind):
            raise
        # Third-party code may raise anything.
        raise PROBES.incompatible(kind, f"{type(error).__name__}: {error}") from error
    _check_opened(kind, full, opened)
    return opened.sample(options.limit, options.seed) if isinstance(opened, Probe) else opened


def _open_in_wordings(full: str, name: str, source: ProbeSource, options: Options) -> Probe:
    """Open the probe in its first `options.templates` wordings. Raise UsageError if its source has fewer."""
    if "template" not in source.takes:
        several = [name for name, each in list_usable() if "template" in each.takes]
        raise UsageError(
            f"{full} has one wording per fact, so --templates {options.templates} cannot be used.",
            hint=f"Leave --templates out, or choose {' or '.join(several)}.",
        )
    if options.template != 1:
        raise UsageError(
            "--template and --templates cannot be combined: they choose one wording, or a number of them.",
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
    """Return the part as in the source's `parts`, whatever its case; unchanged if it has none."""
    return part.lower().replace("_", "-") if source.parts else part


def _takes(source: ProbeSource, field: str) -> bool:
    return field in source.takes or (field == "protocol" and bool(source.protocols))


def _check_opened(kind: str, name: str, opened: object) -> None:
    """Raise CompressknowError if what a source returned cannot be evaluated."""
    if not isinstance(opened, Opened):
        raise PROBES.incompatible(kind, f"It returned a {type(opened).__name__}, not a Probe, Task or RunningText.")
    if isinstance(opened, Probe) and not opened.facts:
        reasons = [f"  {count} dropped: {reason}" for reason, count in opened.dropped.items()]
        raise UsageError(f"{opened.name} has no facts to evaluate.", "\n".join(reasons) or "It is empty.")
    if isinstance(opened, Probe) and PROBES.is_added(kind) and (problem := _find_problem(name, opened)):
        raise PROBES.incompatible(kind, problem)


# Fields of facts that are stored with answers, and their types.
_TEXTS = dict.fromkeys(("id", "relation", "subject", "sub_label", "obj_label", "prompt"), str)
_FACT = {**_TEXTS, "popularity": (float, None)}


def _find_problem(name: str, probe: Probe) -> str | None:
    """Return a problem of a third-party probe that would fail only after hours, or None; built-in sources have none."""
    if wrong := find_mismatch({"protocol": probe.protocol}, {"protocol": str}):
        return f"Its {wrong}."
    if probe.name != name or any(fact.probe != name for fact in probe.facts):
        return f"The probe or a fact of it does not have the name {name!r}."
    try:
        json.dumps(dict(probe.source))
    except (TypeError, ValueError) as error:
        return f"Its source cannot be written as JSON: {error}."
    for fact in probe.facts:
        if wrong := find_mismatch({key: getattr(fact, key) for key in _FACT}, _FACT):
            return f"In its fact {fact.id!r}, {wrong}."
        choices = fact.candidates
        is_tuple = isinstance(choices, tuple) and len(set(choices)) == len(choices) > 1
        if choices is not None and not (is_tuple and fact.obj_label in choices):
            return f"The candidates of its fact {fact.id!r} are not a tuple of different ones that includes the object."
    if duplicates := [fact for fact, times in Counter(fact.id for fact in probe.facts).items() if times > 1]:
        return f"Two of its facts have the id {duplicates[0]!r}."
    return None


def _make_unknown_error(name: str) -> UsageError:
    # Each part of a source that has parts, and the placeholder of others.
    names = [_join_name(kind, part) for kind, source in list_usable() for part in source.parts or (source.form,)]
    return UsageError(f"Unknown probe {name!r}.", hint=f"{_suggest(name)}Choose from {', '.join(names)}.")


def _suggest(name: str) -> str:
    """Return the beginning of a hint for a name that lacks its kind, or that is close to a known one; otherwise ""."""
    beginning, colon, part = name.partition(":")
    if colon and _split_name(name)[0] not in PROBES and (near := suggest_word(beginning, PROBES, cutoff=0.7)):
        return near.replace("?", f":{part}?")
    for kind, source in list_usable():
        if source.meant(name):
            return f"Did you mean {_join_name(kind, _normalize_part(source, name))}? "
        if name.lower() == kind and not source.parts:
            return f"Did you mean {_join_name(kind, source.form)}? "
    kinds = [kind for kind, source in list_usable() if not source.form]
    parts = [_join_name(kind, part) for kind, source in list_usable() for part in source.parts]
    return suggest_word(name, [*kinds, *parts], cutoff=0.5)
