"""What a source of probes is: one kind of probe, such as `atlas` or `lama:SET`, in one file.

A source says what users call it, which options it takes and where its data comes from, and gives a `Probe` of facts,
a `Task` or a `RunningText`. It is registered by its name in `compressknow.evaluate.sources`, or by an entry point of
another package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compressknow.errors import UsageError
from compressknow.evaluate.facts import Probe

if TYPE_CHECKING:
    from compressknow.engine.language_model import LanguageModel
    from compressknow.evaluate.answers import Answer
    from compressknow.evaluate.records import ProbeEntry
    from compressknow.evaluate.text.running import RunningText


@dataclass(frozen=True)
class Options:
    """How probes are read; each applies to the probes that know it.

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

    def given(self) -> list[str]:
        """Names of the options that are not at their defaults."""
        default = Options()
        return [each.name for each in fields(self) if getattr(self, each.name) != getattr(default, each.name)]


class Task(ABC):
    """Items that another harness puts to the model and judges one by one; what it says of each is kept as an answer.

    A task has a `name`, as the user names it, and can be pickled.
    """

    name: str

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that decides what is evaluated: the same one means that answers can be set side by side."""

    @abstractmethod
    def run(self, loaded: LanguageModel) -> tuple[list[Answer], ProbeEntry]:
        """The answers of a model, and the task's entry in ``probe.json``. Raises CompressknowError where it cannot."""


class ProbeSource(ABC):
    """One kind of probe. Its name is that of its entry in the registry: ``atlas``, or ``lama`` of ``lama:trex``.

    Attributes
    ----------
    help : one line for ``--help``: which facts these are.
    form : what follows the name and a colon, in capitals as in ``FILE.jsonl``; empty where the name stands alone.
    parts : all that may follow, in lower case, where that is one of a few names: those of LAMA's sets.
    takes : the fields of `Options` that it reads, beside `limit` and `seed`.
    protocols : what ``--protocol`` may choose, in lower case, the default first; empty where it has one way alone.
    folders : where ``--data`` names a folder of several sets, the names that the set's own folder may have in there.
    origin : where its data can be downloaded, for the message that it is missing.
    held_out : whether half of its items can be held out, as a search does: of facts they can, of a `Task` they cannot.
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
    def open(self, name: str, part: str, options: Options) -> Probe | Task | RunningText:
        """Read the probe.

        Parameters
        ----------
        name : of the whole probe, for `Probe.name` and `Fact.probe`: ``lama:trex``.
        part : what the user wrote after the colon, one of `parts` if there are any: ``trex``.
        options : `limit` and `seed` are of interest for tasks alone: facts are sampled afterwards.

        Raises UsageError where there is no such thing, where its data is missing or damaged, or where an option makes
        no sense. Its message goes to the user.
        """

    def usage(self, name: str) -> str:
        """How users write it: ``lama:SET``."""
        return f"{name}:{self.form}" if self.form else name

    def named(self, part: str) -> str:
        """What stands after the colon in the name of the probe and of its answers: the name of a file, not its path."""
        return part

    def meant(self, text: str) -> bool:
        """Whether a name that nothing has is probably a part of this source, the name before the colon forgotten."""
        return text.lower().replace("_", "-") in self.parts

    def holds(self, folder: Path, part: str) -> bool:  # noqa: ARG002
        """Whether a folder is that of the set."""
        return folder.is_dir()

    def find(self, name: str, part: str, data: Path | None) -> Path:
        """The folder of the set: `data` itself, or one of the `folders` in it.

        Raises UsageError that says where to get it and where to put it.
        """
        places = [data, *(data / folder for folder in self.folders)] if data else []
        for place in places:
            if self.holds(place, part):
                return place
        raise UsageError(
            f"{data} does not hold {name}." if data else f"{name} does not come with compressknow.",
            f"Download it from {self.origin}." if self.origin else None,
            f"Put it into DIR/{self.folders[0]} and pass --data DIR." if self.folders else "Pass --data DIR.",
        )
