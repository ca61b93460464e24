"""Files of a search, each made when it is first needed, and the winner put in its place."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow._version import __version__
from compressknow.base.files import write_whole
from compressknow.base.progress import Begin
from compressknow.base.system import move
from compressknow.comparison.records import Estimate
from compressknow.compress.staging import clean, discard
from compressknow.engine.identity import Located, describe
from compressknow.engine.language_model import CPU
from compressknow.evaluate.handle import ModelHandle
from compressknow.gguf.place import get_record_path
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.pages.search import Trial
from compressknow.study.allocation import Allocation
from compressknow.study.forms import GGUF, Form

if TYPE_CHECKING:
    from compressknow.evaluate.runtimes import Loaded

# In the folder of a file, how large it is; beside these folders, which of them has become the winner.
BYTES, PLACED = "bytes", "placed"


class Candidates:
    """Files of a search, in a folder of its own.

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

    def trial(self, found: Allocation, kept: Estimate) -> Trial:
        """Return the record of a file, which is made unless it was before."""
        handle = CandidateHandle(self, found)
        record = handle.made.parent / BYTES
        if not record.exists():
            handle.make()
        nbytes = int(record.read_text(encoding="ascii"))
        return Trial(self.form.mix(found.types), dict(found.types), nbytes, found.loss, kept)

    def place(self, found: Allocation, target: Path) -> None:
        """Put a file at its place, instead of an earlier one."""
        handle, placed = CandidateHandle(self, found), self.folder / PLACED
        if placed.exists() and placed.read_text(encoding="ascii") == handle.sha256 and target.exists():
            return
        placed.unlink(missing_ok=True)
        made = handle.make()
        clean(target)
        remove(target)
        if get_record_path(made).exists():  # First: what has no record is made again.
            move(get_record_path(made), get_record_path(target))
        move(made, target)
        write_whole(placed, handle.sha256.encode("ascii"))

    def remove(self) -> None:
        """Remove all that are not at that place; how large they are stays known."""
        for record in self.folder.glob(f"*/{BYTES}"):
            made = record.with_name(self.form.place)
            clean(made)
            remove(made)


class CandidateHandle(ModelHandle):
    """File that is made when it is first needed: answers are found by what it would be made of."""

    def __init__(self, candidates: Candidates, found: Allocation) -> None:
        self._candidates, self._found = candidates, found
        form, original = candidates.form, candidates.original
        # No file is needed to tell one from another: the hash is of what it is made of.
        parts: list[Any] = [__version__, original.sha256, form.name, *form.decides(), sorted(found.types.items())]
        self.sha256 = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        self.made = candidates.folder / self.sha256[:16] / form.place
        super().__init__(Located(form.name, self.made), candidates.settings)

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
        """Return it, made and in memory."""
        self.make()
        return super().loaded

    def check_sound(self) -> None:
        """Do nothing: it was made of what is sound."""

    def describe(self) -> dict[str, Any]:
        """Return what its files tell, while they are there."""
        return describe(self.located) if self.made.exists() else {}


def is_made(place: Path) -> bool:
    """Return whether a file, or folder, is one that was made here."""
    return get_record_path(place).is_file() if place.suffix else (place / MANIFEST_NAME).is_file()


def remove(place: Path) -> None:
    """Remove a file or folder that was made here, if it is there."""
    if place.is_dir():
        discard(place)
    else:
        place.unlink(missing_ok=True)
    get_record_path(place).unlink(missing_ok=True)
