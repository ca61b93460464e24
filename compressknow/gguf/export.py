"""Export of a checkpoint: the GGUF file and its record, step by step."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError
from compressknow.base.format import write_size
from compressknow.base.progress import Begin, Listener, count_progress, ignore_progress
from compressknow.base.reading import compute_sha256
from compressknow.base.system import move
from compressknow.compress.blocks import Pool, Reader
from compressknow.compress.calibrate.text import CalibrationText, read_calibration_text
from compressknow.compress.output import list_carried_files
from compressknow.compress.staging import make_scratch
from compressknow.compress.steps import Calibration
from compressknow.compress.weights import StoredWeights, Values, read_stored_weights
from compressknow.engine.identity import find_source, get_record_path, locate, read_contents
from compressknow.engine.load import find_family_of_class, load_tokenizer
from compressknow.gguf.choice import FLOATS, SizeFit, TypeChoice, estimate_bytes, find_base_type, list_file_types
from compressknow.gguf.converter import (
    check_architecture,
    convert,
    find_converter,
    quantize,
    read_planned_types,
    read_version,
)
from compressknow.gguf.gptq import round_file
from compressknow.gguf.importance import (
    Importance,
    Statistics,
    build_equal_importance,
    build_importance,
    check_model,
    check_source,
    gather_inputs,
    read_importance,
    write_importance,
)
from compressknow.gguf.plain import PLAIN_DTYPES, find_same_channels, get_dtype, list_plain_tensors, write_plain
from compressknow.gguf.record import (
    COUNTS,
    IMPORTANCE,
    MODELFILE,
    SCHEMA,
    ExportRecord,
    NewFile,
    build_metadata,
    check_room,
    collect_versions,
    compare_to_record,
    hash_record,
    read_record,
    write_with_metadata,
)
from compressknow.gguf.tensors import Tensors, count_by_group, describe_tensors, measure_overhead, resolve_types
from compressknow.model.checkpoint import Checkpoint, check_inside
from compressknow.model.gguf_file import read_gguf
from compressknow.model.loading import open_complete
from compressknow.model.manifest import CARD_NAME, MANIFEST_NAME, read_manifest
from compressknow.model.tensors import DTYPE_SIZES, OpenFiles

# Margin for headers, vocabularies, and rows that do not fill a block of a type.
_SPARE = 1.1
_PLAIN = "plain"
# Prompt of the final smoke test.
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class ExportPlan:
    """Plan of an export, checked against headers. The intermediate GGUF file holds every matrix exactly, in the type
    `exact`: ``f32``, ``f16`` or ``bf16``; `floats` is that file if it exists already, and is kept. `fit` chooses types
    for a size, in place of those of `choice`."""

    checkpoint: Checkpoint
    source: StoredWeights
    tensors: dict[str, Values]
    choice: TypeChoice
    converter: Path
    exact: str
    trust_remote_code: bool = False
    fit: SizeFit | None = None
    floats: Path | None = None

    @cached_property
    def is_plain(self) -> bool:
        """Return whether the converter can read the folder: floats in safetensors, all of this checkpoint."""
        files = {path.name for path in self.checkpoint.folder.glob("model*.safetensors")}
        return (
            self.checkpoint.revision is None
            and files == set(self.checkpoint.shards)
            and "quantization_config" not in self.checkpoint.config
            and all(tensor.dtype in PLAIN_DTYPES for tensor in self.checkpoint.tensors.values())
        )

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Return the fingerprint of the checkpoint and, if it was converted, of its original."""
        sha256, manifest = read_contents(locate(self.checkpoint.folder)).sha256, self.manifest
        return (sha256, find_source(manifest)["sha256"]) if manifest else (sha256,)

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest if the checkpoint was converted, otherwise None."""
        folder = self.checkpoint.folder
        return read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None

    @property
    def numel(self) -> int:
        return sum(values.tensor.numel for values in self.tensors.values())

    @property
    def exact_bytes(self) -> int:
        """Estimate the size of the intermediate file."""
        return estimate_bytes(self.exact, self.numel)

    @property
    def is_quantized(self) -> bool:
        """Return whether llama.cpp changes the intermediate file."""
        return self.fit is not None or bool(self.choice.types) or self.choice.type != self.exact

    @property
    def is_compensated(self) -> bool:
        """Tell whether GPTQ rounds tensors after llama.cpp."""
        return self.fit is not None and self.fit.rounding == "gptq"

    def measure_overhead(self, tensors: Tensors) -> int:
        """Return an upper bound of the bytes of all but the matrices, with the recipe of a converted checkpoint."""
        recipe = json.dumps([self.manifest["setup"], self.manifest["recipe"]]) if self.manifest else ""
        return measure_overhead(tensors) + len(recipe)

    @property
    def plain_bytes(self) -> int:
        """Return the size of the weights as floats, if the converter needs them unpacked."""
        if self.is_plain:
            return 0
        return sum(values.tensor.numel * DTYPE_SIZES[get_dtype(values)] for values in self.tensors.values())

    @property
    def needed_bytes(self) -> int:
        """Estimate the peak disk space, besides that of an intermediate file that exists."""
        output = self.fit.budget if self.fit else estimate_bytes(find_base_type(self.choice.type), self.numel)
        plain = self.plain_bytes if self.is_compensated else 0
        exact = 0 if self.floats else self.exact_bytes
        return int(_SPARE * max(self.plain_bytes + exact, plain + exact + output, 2 * output))


def prepare_export(
    model: str | Path,
    choice: TypeChoice,
    converter: str | Path | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Listener | None = None,
) -> ExportPlan:
    """Open a checkpoint and plan its export, with the `converter` that `find_converter` finds or fetches. Raises
    CheckpointError if it cannot be opened, lacks weights, or the importance matrix is of another model;
    UnsupportedError, before anything is fetched, if it is not a generating language model, and if the converter does
    not know it, or its weights are packed in an unknown way; and as `find_converter` does."""
    checkpoint, _ = open_complete(model, revision, trust_remote_code=trust_remote_code)
    # Listing the small files also rejects links out of the checkpoint, which the converter might follow.
    list(list_carried_files(checkpoint.folder))
    if (card := checkpoint.folder / CARD_NAME).is_file():
        check_inside(checkpoint.folder, card)
    weights = read_stored_weights(checkpoint, trust_remote_code=trust_remote_code)
    _check_family(weights.structure.architecture)
    script = find_converter(converter, fetch=True, on_progress=on_progress)
    check_architecture(weights.structure.architecture, script)
    tensors = list_plain_tensors(weights, checkpoint)
    # The smallest type that holds every matrix exactly.
    dtypes = {get_dtype(values) for values in tensors.values() if len(values.shape) > 1} & FLOATS.keys()
    exact = FLOATS[dtypes.pop()] if len(dtypes) == 1 and choice.type != "f32" else "f32"
    export = ExportPlan(checkpoint, weights, tensors, choice, script, exact, trust_remote_code)
    if choice.importance is not None:
        check_source(read_importance(choice.importance), export.sources, f"--imatrix {choice.importance}")
    return export


def find_made(export: ExportPlan, output: Path) -> ExportRecord | None:
    """Return the record of an existing file, if it is complete and what `write` would make. Raises CheckpointError if
    it has no record, and as `read_calibration_text` does."""
    record = read_record(output)
    if any(record.get(key) != value for key, value in _describe_export(export).items()):
        return None
    if not _is_same_importance(export, record.get("importance")) or compare_to_record(output).differences:
        return None
    return ExportRecord(record)


def _is_same_importance(export: ExportPlan, recorded: Mapping[str, Any] | None) -> bool:
    choice = export.choice
    if recorded is None:
        return choice.calibration is None and choice.importance is None
    if choice.importance is not None:
        return recorded.get("kind") == "imatrix" and recorded.get("sha256") == compute_sha256(choice.importance)
    text, stored = choice.calibration, tuple(recorded.get(key) for key in ("source", "asked", "seed"))
    if text is None or stored != (text.text, text.tokens, text.seed):
        return False
    # Samples are determined by the seed, but a file may have changed.
    return text.kind == "self" or _read_text(export, text).sha256 == recorded.get("sha256")


def _read_text(export: ExportPlan, text: Calibration) -> CalibrationText:
    folder, trusted = export.checkpoint.folder, export.trust_remote_code
    _, tree = open_complete(folder, trust_remote_code=trusted)
    return read_calibration_text(folder, tree, text, trust_remote_code=trusted)


def _check_family(architecture: str) -> None:
    """Raise UnsupportedError for models that llama.cpp could only use for embeddings."""
    import transformers

    family = find_family_of_class(architecture)
    if family == "masked" or (family is None and hasattr(transformers, architecture)):
        what = "is a masked language model" if family else "is not a language model"
        raise UnsupportedError(
            f"{architecture} {what}: it cannot be exported.",
            "llama.cpp only runs encoders for embeddings: it has no layer that fills masks, so the model could not be "
            "evaluated.",
            "Export a causal or a sequence-to-sequence language model.",
        )


def write(
    export: ExportPlan,
    output: Path,
    *,
    overwrite: bool = False,
    extras: Mapping[str, Path] | None = None,
    modelfile: str = "",
    smoke: bool = False,
    threads: int | None = None,
    begin: Begin = ignore_progress,
) -> ExportRecord:
    """Write a GGUF file that appears whole or not at all, and its record next to it.

    Parameters
    ----------
    extras : where to write the importance matrix, too (key `IMPORTANCE`), and `modelfile`, a text for Ollama (key
        `MODELFILE`).
    smoke : test the file of a decoder-only model on a prompt in llama.cpp before it is published.
    begin : begins the stages: ``unpack`` if the converter cannot read the checkpoint directly, ``sample`` or ``text``
        and ``gather`` for an importance matrix, ``export``, ``quantize`` if the type is not exact, and ``round`` for
        GPTQ.

    Raises
    ------
    OutputError : the output exists, or cannot be written.
    CompressknowError : the converter or llama.cpp fails.
    """
    check_room(output, export.needed_bytes)
    source = export.checkpoint.folder
    with NewFile(output, overwrite=overwrite, source=source, extras=extras or {}) as new:
        # A separate folder, since the output may be called like one of the intermediate files.
        work = new.folder / "work"
        work.mkdir()
        made, entries = _make_file(export, work, threads, begin)
        reader = read_gguf(made)
        record = _build_record(export, reader, entries)
        write_with_metadata(build_metadata(record), reader, new.file)
        del reader  # Windows cannot remove a mapped file.
        made.unlink()
        with new.file.open("rb+") as file:
            os.fsync(file.fileno())
        nbytes, sha256 = new.file.stat().st_size, compute_sha256(new.file)
        _check_size(export, nbytes)
        record = ExportRecord({**record, "bytes": nbytes, "sha256": sha256})
        record["record_sha256"] = hash_record(record)
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        new.write(get_record_path(new.file).name, text.encode("utf-8", "backslashreplace"))
        if extras and IMPORTANCE in extras:
            move(work / IMPORTANCE, new.folder / IMPORTANCE)
        if modelfile:
            new.write(MODELFILE, modelfile.encode())
        if smoke and find_family_of_class(export.source.structure.architecture) == "causal":
            from compressknow.gguf.context import complete_prompt, find_text_read_otherwise
            from compressknow.gguf.llama_cpp import GgufModel, check_no_crash

            with _name_output(new.file, output):
                check_no_crash(new.file)
                with closing(GgufModel(new.file, trial=True)) as model:
                    record.answer = PROMPT, complete_prompt(model, PROMPT)
                    with suppress(CheckpointError):  # The converter reads a tokenizer that transformers does not.
                        tokenizer = load_tokenizer(source, trust_remote_code=export.trust_remote_code)
                        record.read_otherwise = find_text_read_otherwise(model, tokenizer)
        export.checkpoint.check_unchanged()
        new.commit()
    return record


@contextmanager
def _name_output(file: Path, output: Path) -> Iterator[None]:
    """Name the output in errors of the file that is tried, which has another name until it is complete."""
    try:
        yield
    except CompressknowError as error:
        hint = "Nothing was written. Check that the model's weights and tokenizer are intact."
        raise type(error)(error.what.replace(str(file), str(output)), error.why, hint) from error


def _check_size(export: ExportPlan, nbytes: int) -> None:
    """Raise CompressknowError if the file is over its budget."""
    if export.fit is not None and nbytes > export.fit.budget:
        size, limit = write_size(nbytes), write_size(export.fit.budget)
        raise CompressknowError(
            f"The file has {size}, but the limit is {limit}: nothing was written.",
            "llama.cpp has stored a tensor in another type than the chosen one, or has written more metadata.",
            "Raise the limit a little, and report this.",
        )


# Settings with an entry per block: attention over a window or over all, with rotary positions or without.
_KINDS: dict[str, set[Any]] = {
    "layer_types": {"sliding_attention", "chunked_attention", "full_attention"},
    "no_rope_layers": {0, 1},
}
# Settings that transformers derives these from if they are missing, and llama.cpp may ignore.
_PATTERNS = ("sliding_window_pattern", "no_rope_layer_interval")


def _check_kinds(export: ExportPlan, file: Path) -> None:
    """Raise UnsupportedError if llama.cpp would run blocks as the wrong kind: for some architectures (Gemma 2 and 3,
    SmolLM3), it derives a block's kind from its position, as transformers' defaults do, and not from the file."""
    from transformers import CONFIG_MAPPING

    config = export.checkpoint.config.get("text_config") or export.checkpoint.config
    if config.get("model_type") not in CONFIG_MAPPING or config.keys().isdisjoint((*_KINDS, *_PATTERNS)):
        return
    build = CONFIG_MAPPING[config["model_type"]]
    values = {key: getattr(build(**config), key, None) for key in _KINDS}
    kinds = {key: each for key, each in values.items() if each and _KINDS[key].issuperset(each)}
    usual = build(**{key: value for key, value in config.items() if key not in (*kinds, *_PATTERNS)})
    changed = [key for key, each in kinds.items() if getattr(usual, key) != each]
    if changed and not any(name.endswith(".sliding_window_pattern") for name in read_gguf(file).fields):
        raise UnsupportedError(
            f"{export.checkpoint.name} cannot be exported: llama.cpp would run some of its blocks as another kind.",
            f"It derives the kinds of {export.source.structure.architecture} blocks from their positions, and "
            f"{changed[0]} of its config.json has others.",
            "If blocks were dropped: drop the last ones, or whole periods of the pattern, with --drop-blocks LIST.",
        )


def write_floats(export: ExportPlan, folder: Path, kind: str, *, begin: Begin = ignore_progress) -> Path:
    """Write an unquantized file (``f32``, ``f16`` or ``bf16``) to run, not to keep, into `folder`; return its path. It
    has no record and only the converter's metadata. Raises OutputError if the disk has no room for it,
    CompressknowError if the converter fails."""
    file, export = folder / "floats.gguf", replace(export, exact=kind)
    check_room(file, int(_SPARE * (export.plain_bytes + export.exact_bytes)))
    _write_exact(export, _unpack(export, folder, begin), file, begin)
    shutil.rmtree(folder / _PLAIN, ignore_errors=True)
    return file


def preview(
    export: ExportPlan, output: Path, *, threads: int | None = None, begin: Begin = ignore_progress
) -> ExportRecord:
    """Return what `write` would record, without the hash, by making a temporary file."""
    check_room(output, export.needed_bytes)
    with make_scratch(output) as folder:
        made, entries = _make_file(export, folder, threads, begin, dry_run=True)
        types = read_planned_types(folder) if export.is_quantized else {}
        return _build_record(export, read_gguf(made), entries, types)


def _make_file(
    export: ExportPlan, folder: Path, threads: int | None, begin: Begin, *, dry_run: bool = False
) -> tuple[Path, dict[str, Any]]:
    """Make a GGUF file without our metadata (in a dry run, the intermediate one), and entries of its record."""
    source = _unpack(export, folder, begin)
    inputs = None
    options: Any = {"threads": threads, "begin": begin, "trust_remote_code": export.trust_remote_code}
    if export.choice.calibration and not dry_run:
        inputs = gather_inputs(source, export.choice.calibration, **options)
    exact, output, matrix = export.floats or folder / "exact.gguf", folder / "quantized.gguf", None
    if export.floats is None:
        _write_exact(export, source, exact, begin)
    if not export.is_quantized:
        return exact, {}
    if not export.is_compensated:
        # Make room for llama.cpp's output.
        shutil.rmtree(folder / _PLAIN, ignore_errors=True)
    # Read once: it takes seconds if the vocabulary is large.
    reader = read_gguf(exact)
    tensors, floats = describe_tensors(reader, export.source), reader.tensors
    del reader
    kind, types, entries = _choose_types(export, tensors)
    importance = None
    if described := _find_importance(export, floats, tensors, inputs):
        importance, entries["importance"] = described
    elif export.choice.calibration:
        # A dry run: llama.cpp chooses types by whether there is a matrix, not by its values.
        importance = build_equal_importance(tensors)
    if importance is not None:
        matrix = folder / IMPORTANCE
        write_importance(importance, matrix)
    requested: Any = {"types": types, "importance": matrix, "threads": threads, "dry_run": dry_run}
    with begin("quantize") as advance:
        quantize(exact, output, kind, folder, **requested, advance=advance)
    if dry_run:
        return exact, entries
    if export.fit and export.is_compensated:
        names = find_same_channels(floats, tensors, export.tensors)
        entries["fit"]["compensated"] = round_file(output, floats, tensors, names, source, export.fit.texts, **options)
    del floats
    if export.floats is None:
        exact.unlink()
    return output, entries


def _choose_types(export: ExportPlan, tensors: Tensors) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Return the type of the file, the types of single tensors, and entries of the record about them."""
    if export.fit is None:
        return export.choice.type, resolve_types(tensors, export.choice.types), {}
    types, record = export.fit.choose(tensors, export.measure_overhead(tensors))
    kind = find_main_type(types, tensors)
    rules = [[f"^{re.escape(name)}$", chosen] for name, chosen in types.items()]
    return kind, dict(types), {"type": kind, "types": rules, "fit": dict(record)}


def find_main_type(types: Mapping[str, str], tensors: Tensors) -> str:
    """Return the type that the file declares; not a float type, for which llama.cpp would round nothing."""
    sizes = Counter[str]()
    for name, kind in types.items():
        sizes[kind] += tensors.tensors[name].numel
    most = next(kind for kind, _ in sizes.most_common() if kind.upper() not in FLOATS)
    return most if most in list_file_types() else f"{most}_s"


def _write_exact(export: ExportPlan, source: Path, exact: Path, begin: Begin) -> None:
    """Write the intermediate file from the weights in the folder `source`."""
    name = export.checkpoint.name if export.checkpoint.revision else None
    convert(export.converter, source, exact, export.exact, name=name, expected=export.exact_bytes, begin=begin)
    _check_kinds(export, exact)


def _find_importance(
    export: ExportPlan, exact: Sequence[Any], tensors: Tensors, inputs: tuple[Statistics, CalibrationText] | None
) -> tuple[Importance, dict[str, Any]] | None:
    """Return the importance matrix from a text or a file, with its entry in the record; None without either."""
    if inputs is not None:
        _, text = inputs
        importance = build_importance(tensors, *inputs, find_same_channels(exact, tensors, export.tensors))
        origin = {key: getattr(text, key) for key in ("kind", "source", "sha256", "tokens", "asked", "seed")}
    elif (file := export.choice.importance) is not None:
        importance = read_importance(file)
        check_model(importance, tensors.tensors, f"--imatrix {file}")
        identified = bool(importance.models)
        origin = {"kind": "imatrix", "source": file.name, "sha256": compute_sha256(file), "identified": identified}
    else:
        return None
    without = sorted(name for name in tensors.weights if name not in importance.sums)
    described = {**origin, "tensors": len(importance.sums), "without": without}
    return replace(importance, models=export.sources), described


def _unpack(export: ExportPlan, folder: Path, begin: Begin) -> Path:
    """Return the folder that the converter reads: the checkpoint's, or a new one with its weights as floats."""
    if export.is_plain:
        return export.checkpoint.folder
    # The converter names the model after its folder.
    plain = folder / _PLAIN / (export.checkpoint.folder.resolve().name or "model")
    plain.parent.mkdir()
    with begin("unpack") as advance, Pool(1) as pool, OpenFiles() as files:
        total = sum(values.stored.nbytes for values in export.tensors.values())
        write_plain(export.checkpoint, export.tensors, Reader(pool, files, count_progress(advance, total)), plain)
    return plain


def _describe_export(export: ExportPlan) -> dict[str, Any]:
    """Return the part of the record that is known before the export."""
    checkpoint, choice, manifest = export.checkpoint, export.choice, export.manifest
    source = {"name": checkpoint.name, "revision": checkpoint.revision, "sha256": export.sources[0]}
    if manifest:
        source["original_sha256"] = export.sources[1]
    label = choice.label if export.fit is None else export.fit.label
    return {
        "schema": SCHEMA,
        "setup": f"{manifest['setup']} + {label}" if manifest else label,
        "type": choice.type,
        "types": [list(rule) for rule in choice.types],
        "versions": collect_versions(read_version(export.converter)),
        "source": {**source, "architecture": export.source.structure.architecture},
        **({"recipe": manifest["recipe"]} if manifest else {}),
    }


def _build_record(
    export: ExportPlan, made: Any, entries: Mapping[str, Any], types: Mapping[str, str] | None = None
) -> ExportRecord:
    groups = count_by_group(describe_tensors(made, export.source), types)
    every = [counts for by_type in groups.values() for counts in by_type.values()]
    totals = {key: sum(counts[key] for counts in every) for key in COUNTS}
    return ExportRecord({**_describe_export(export), **entries, "groups": groups, "totals": totals})
