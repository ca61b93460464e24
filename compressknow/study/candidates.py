"""The files of a search: each is made when it is first needed, and found again by what it is made of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow._version import __version__
from compressknow.compress.staging import clean, discard
from compressknow.engine.identity import Located, describe
from compressknow.engine.language_model import CPU
from compressknow.evaluate.handle import ModelHandle
from compressknow.files import write_whole
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.pages.search import Trial
from compressknow.quiet import Begin
from compressknow.stats.records import Estimate
from compressknow.study.allocation import Allocation
from compressknow.study.forms import GGUF, Form
from compressknow.system import move

if TYPE_CHECKING:
    from compressknow.evaluate.runtimes import Loaded

# In the folder of a file, how large it is; beside these folders, which of them has become the winner.
BYTES, PLACED = "bytes", "placed"


class Candidates:
    """The files of a search, in a folder of its own.

    Parameters
    ----------
    original : the model that they are made of.
    begin : begins the stages of making one.
    """

    def __init__(self, original: ModelHandle, form: Form, folder: Path, begin: Begin) -> None:
        self.original, self.form, self.folder, self.begin = original, form, folder, begin
        # llama.cpp computes on the processor, as its files say.
        settings = original.settings
        self.settings = replace(settings, device=CPU, dtype=None) if form.name == GGUF else settings

    def handle(self, found: Allocation) -> CandidateHandle:
        """Return a file as a model to evaluate."""
        return CandidateHandle(self, found)

    def trial(self, found: Allocation, kept: Estimate) -> Trial:
        """Return the record of a file, which is made unless it was before."""
        record = self.handle(found).made.parent / BYTES
        if not record.exists():
            self.handle(found).make()
        nbytes = int(record.read_text(encoding="ascii"))
        return Trial(self.form.mix(found.types), dict(found.types), nbytes, found.loss, kept)

    def place(self, found: Allocation, target: Path) -> None:
        """Put a file at its place, instead of an earlier one."""
        handle, placed = self.handle(found), self.folder / PLACED
        if placed.exists() and placed.read_text(encoding="ascii") == handle.sha256 and target.exists():
            return
        placed.unlink(missing_ok=True)
        made = handle.make()
        clean(target)
        remove(target)
        if _record_of(made).exists():  # First: what has no record is made again.
            move(_record_of(made), _record_of(target))
        move(made, target)
        write_whole(placed, handle.sha256.encode("ascii"))

    def remove(self) -> None:
        """Remove all that are not at that place; how large they are stays known."""
        for record in self.folder.glob(f"*/{BYTES}"):
            made = record.with_name(self.form.place)
            clean(made)
            remove(made)


class CandidateHandle(ModelHandle):
    """A file that is made when it is first needed: answers are found by what it would be made of."""

    def __init__(self, candidates: Candidates, found: Allocation) -> None:
        self._candidates, self._found = candidates, found
        form, original = candidates.form, candidates.original
        made_of: list[Any] = [__version__, original.sha256, form.name, *form.decides(), sorted(found.types.items())]
        self._key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        self.made = candidates.folder / self._key[:16] / form.place
        super().__init__(Located(form.name, self.made), candidates.settings)

    @cached_property
    def sha256(self) -> str:
        """A hash of what it is made of."""
        return self._key

    def make(self) -> Path:
        """Make it unless it is there."""
        if not is_made(self.made):
            self.made.parent.mkdir(parents=True, exist_ok=True)
            remove(self.made)
            self._candidates.form.make(self._found, self.made, self._candidates.begin)
        write_whole(self.made.parent / BYTES, str(describe(self.located)["bytes"]).encode("ascii"))
        return self.made

    @cached_property
    def loaded(self) -> Loaded:
        """It, made and in memory."""
        self.make()
        return super().loaded

    def check_sound(self) -> None:
        """Do nothing: it was made of what is sound."""

    def described(self) -> dict[str, Any]:
        """What its files tell, while they are there."""
        return describe(self.located) if self.made.exists() else {}


def is_made(place: Path) -> bool:
    """Whether a file, or folder, is one that was made here."""
    return _record_of(place).is_file() if place.suffix else (place / MANIFEST_NAME).is_file()


def remove(place: Path) -> None:
    """Remove a file or folder that was made here, if it is there."""
    if place.is_dir():
        discard(place)
    else:
        place.unlink(missing_ok=True)
    _record_of(place).unlink(missing_ok=True)


def _record_of(place: Path) -> Path:
    """What an export writes beside its file; a folder has none."""
    return place.with_name(f"{place.name}.json")
