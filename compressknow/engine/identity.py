"""Identity of a model: its files, which are read once, their hashes, its size and quantization, and its conversion."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from compressknow.base.errors import CheckpointError, CompressknowError, UsageError
from compressknow.base.files import escape_name
from compressknow.base.packages import is_installed
from compressknow.base.reading import (
    MANIFEST,
    FileState,
    NotReadable,
    check_regular,
    find_mismatch,
    get_state,
    open_regular,
    read_json,
)
from compressknow.engine.load import Variant
from compressknow.model.checkpoint import (
    ADAPTER,
    ADAPTER_CONFIG,
    check_revision,
    find_weight_files,
    is_address,
    open_checkpoint,
    suggest_sibling,
)
from compressknow.model.manifest import (
    MANIFEST_NAME,
    SEAL,
    hash_manifest,
    list_expected_tensors,
    read_manifest,
    summarize_calibration,
)
from compressknow.model.tensors import (
    DTYPE_SIZES,
    StoredTensor,
    find_grid,
    find_not_finite,
    read_header,
    read_torch_file,
)

# What an export records of its source checkpoint; `original_sha256` is that of the source's own source.
SOURCE_FORM = {"name": str, "revision?": (str, None), "sha256": str, "original_sha256?": str}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("source.spm", "target.spm", "tekken.json", "spm.model", "spm_char.model", "sentencepiece.model", "bpe.codes"),
    *("dict.txt", "prophetnet.tokenizer", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "emoji.json"),
)
# Files other than the weights that affect the answers: transformers loads an adapter if peft is installed.
DECISIVE = ("config.json", *TOKENIZER_FILES, ADAPTER_CONFIG, f"{ADAPTER}.safetensors", f"{ADAPTER}.bin")


@dataclass(frozen=True)
class LocatedModel:
    """Model on this machine, with the `path` of a checkpoint folder or GGUF file, or on the server at `url`."""

    name: str
    path: Path
    revision: str | None = None
    url: str | None = None

    @property
    def files(self) -> list[Path]:
        """Return the files that affect the model's answers, weights first."""
        if self.path.suffix == ".gguf":
            from compressknow.model.gguf_file import list_parts

            return list_parts(self.path)
        # Modelling code too, which runs if the user trusts it.
        code = sorted(path.name for path in self.path.glob("*.py"))
        decisive = [*find_weight_files(self.path), *DECISIVE, *code]
        return [self.path / name for name in decisive if (self.path / name).is_file()]


def locate(model: str | Path, revision: str | None = None) -> LocatedModel:
    """Find a model: a local folder, ``FOLDER/FILE.gguf``, a hub id, which is downloaded, or the address of a server,
    which is not contacted yet. Raises CheckpointError if it is not found, UsageError for an invalid address,
    UnusedOptions for a revision of anything but a hub id."""
    if is_address(model):
        check_revision(model, revision)
        return locate_server(str(model))
    path = Path(model)
    if path.suffix == ".gguf":
        hint = f"{suggest_sibling(path)}Give FOLDER/FILE.gguf, or a checkpoint folder."
        try:
            check_regular(path)
        except FileNotFoundError:
            raise CheckpointError(f"{model}: no such file.", hint=hint) from None
        except (OSError, NotReadable) as error:
            raise CheckpointError(f"{model} cannot be read: {error}.", hint=hint) from None
        check_revision(model, revision)
        from compressknow.model.gguf_file import check_parts, check_whole, list_parts

        # Check now, since the file may be opened only after a minute's work on the original.
        check_parts(path)
        if is_installed("gguf"):
            for part in list_parts(path):
                check_whole(part)
        return LocatedModel(escape_name(path.name), path)
    checkpoint = open_checkpoint(model, revision)
    checkpoint.check_has_weights()
    return LocatedModel(checkpoint.name, checkpoint.folder, checkpoint.revision)


def locate_server(address: str) -> LocatedModel:
    """Return a model on a server. Raises UsageError if the address names no host, or may contain a secret.

    >>> locate_server("http://localhost:8080/v1/").url
    'http://localhost:8080'
    """
    host = None
    with suppress(ValueError):
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    if not host:
        raise UsageError("The server's address cannot be read.", hint="Give it as http://HOST:PORT.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        # It may contain a secret, so it is not shown.
        raise UsageError(
            "The server's address contains more than host, port and path.",
            hint="Give it as http://HOST:PORT, and the key in the environment variable COMPRESSKNOW_API_KEY.",
        )
    path = parts.path.rstrip("/").removesuffix("/v1")
    return LocatedModel(parts.netloc, Path(), url=f"{parts.scheme}://{parts.netloc}{path}")


def compute_fingerprint(hashes: Iterable[tuple[str, str]]) -> str:
    """Return the SHA-256 over the names of files and the hashes of their contents."""
    return hashlib.sha256("".join(f"{name}\0{sha256}\n" for name, sha256 in hashes).encode()).hexdigest()


def find_source(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name, revision and fingerprint of a checkpoint's source; that is None if it was made in memory."""
    source = manifest["source"]
    hashes: Mapping[str, str] = source["files"]
    # Copied weights belong to modules that sentence-transformers runs after the model.
    weights = [n for n in hashes if n.endswith((".safetensors", ".bin")) and n not in manifest["files"]]
    decisive = [*sorted(weights), *DECISIVE, *sorted(n for n in hashes if n.endswith(".py") and "/" not in n)]
    sha256 = compute_fingerprint((name, hashes[name]) for name in decisive if name in hashes) if hashes else None
    return {"name": source.get("name"), "revision": source.get("revision"), "sha256": sha256}


def describe(located: LocatedModel) -> dict[str, Any]:
    """Describe a model by its files, for the record of its answers, reading only a few rows of its weights.

    Keys: name, revision, bytes (of the weights), dtype (of most weights), quantization (as text), grid (see
    `find_grid`) if there is one and, for a converted checkpoint, setup, recipe, source, zeros, groups and removed from
    its manifest, and calibration from `summarize_calibration`.
    """
    described: dict[str, Any] = {"name": located.name, "revision": located.revision}
    if located.url is not None:
        return described
    if located.path.suffix == ".gguf":
        size = sum(part.stat().st_size for part in located.files)
        source = read_export_record(located.path).get("source")
        described |= {"source": source} if source else {}
        return described | {"bytes": size, "dtype": "GGUF", "quantization": "GGUF"}
    checkpoint = open_checkpoint(located.path)
    if grid := find_grid(checkpoint.tensors.values()):
        described["grid"] = grid
    return described | {
        "bytes": sum((checkpoint.folder / shard).stat().st_size for shard in checkpoint.shards),
        "dtype": _name_dtypes((tensor.dtype, tensor.nbytes) for tensor in checkpoint.tensors.values()),
        "quantization": describe_quantization(checkpoint.config),
        **(_summarize_manifest(read_manifest(located.path)) if (located.path / MANIFEST_NAME).is_file() else {}),
    }


def _name_dtypes(sizes: Iterable[tuple[str, int]]) -> str:
    """Name the two dtypes with the most bytes."""
    totals: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        totals[dtype] += nbytes
    return " + ".join(dtype for dtype, _ in totals.most_common(2))


def get_record_path(output: Path) -> Path:
    """Return the path of a GGUF file's record."""
    return output.with_name(f"{output.name}.json")


def read_export_record(path: Path) -> dict[str, Any]:
    """Return "sha256", "source" and "guided_by" (probes and ids of facts) of the record that an export writes next to a
    GGUF file; empty without one."""
    try:
        record = read_json(get_record_path(path), MANIFEST)
    except (OSError, ValueError):
        return {}
    form = {"sha256": str, "source": SOURCE_FORM, "fit?": {"guided_by?": [[str]]}}
    if find_mismatch(record, form):
        return {}
    guided_by = record.get("fit", {}).get("guided_by", [])
    return {"sha256": record["sha256"], "source": record["source"], "guided_by": guided_by}


def describe_variant(name: str, variant: Variant) -> dict[str, Any]:
    """Describe a conversion in memory as `describe` does one on disk, with its manifest's "totals", the number of
    `nonzero` weights, and `sparse_bytes`, counting each tensor as dense or sparse, whichever is smaller."""
    totals, rows, sparse_bytes = variant.manifest["totals"], variant.manifest["tensors"], 0
    for row in rows:
        # Sparse storage has the non-zero values, one bit per weight, and the scales.
        bits = row.get("bits", 8 * DTYPE_SIZES[row["dtype_after"]])
        saved = row["zeros"] * bits // 8 - math.ceil(row["numel"] / 8)
        sparse_bytes += row["bytes_after"] - max(saved, 0)
    return {
        "name": name,
        "revision": None,
        "bytes": variant.bytes,
        "dtype": _name_dtypes((row["dtype_after"], row["bytes_after"]) for row in rows),
        "quantization": describe_quantization(variant.config),
        **_summarize_manifest(variant.manifest),
        "totals": {name: number for name, number in totals.items() if name != "relative_error"}
        | {"nonzero": totals["parameters"] - totals["zeros_after"], "sparse_bytes": sparse_bytes},
    }


def describe_quantization(config: Mapping[str, Any]) -> str | None:
    """Describe the quantization of a checkpoint by its config, whatever tool made it; None if it has none.

    >>> describe_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    'gptq, 4-bit weights, groups of 128'
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return None
    words = [str(quantization.get("quant_method", "unknown method"))]
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping) and groups:
        descriptions = set()
        # A preset is only a name, without details.
        for group in (each if isinstance(each, Mapping) else {} for each in groups.values()):
            weights, activations = group.get("weights") or {}, group.get("input_activations")
            rounded = f", {_describe_bits(activations)} activations" if activations else ""
            descriptions.add(f"{_describe_bits(weights)} weights ({weights.get('strategy', '?')}){rounded}")
        return f"{words[0]}, {'; '.join(sorted(descriptions))}"

    def get(*names: str) -> Any:
        return next((quantization[name] for name in names if quantization.get(name) is not None), None)

    # bitsandbytes uses flags.
    flag = 8 if get("load_in_8bit") else 4 if get("load_in_4bit") else None
    if bits := get("bits", "num_bits", "w_bit") or flag:
        words.append(f"{bits}-bit weights")
    elif weights := get("weights", "weight_dtype"):
        words.append(f"{weights} weights")
    elif kind := get("quant_type"):
        words.append(_shorten_type(kind))
    if activations := get("activations"):
        words.append(f"{activations} activations")
    if size := get("group_size", "q_group_size"):
        words.append(f"groups of {size}" if size != -1 else "a scale per channel")
    if blocks := get("weight_block_size"):
        words.append(f"blocks of {' × '.join(map(str, blocks))}")
    return ", ".join(words)


def _describe_bits(values: Mapping[str, Any]) -> str:
    return f"{values.get('num_bits', '?')}-bit{' float' if values.get('type') == 'float' else ''}"


def _shorten_type(value: Any) -> str:
    """Shorten the name of a nested type, as torchao writes it.

    >>> _shorten_type({"default": {"_type": "Int8DynamicActivationInt4WeightConfig", "_data": {}}})
    'int8 dynamic activation int4 weight'
    """
    if isinstance(value, Mapping):
        inner = value.get("_type") or next(iter(value.values()), "?")
        return _shorten_type(inner)
    words = re.findall(r"[A-Z]?[a-z]*\d*[a-z]*", str(value).removesuffix("Config"))
    return " ".join(filter(None, words)).lower()


def _summarize_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    # The list of dropped tensors would be longer than everything else.
    removed = {key: value for key, value in manifest.get("removed", {}).items() if key != "tensors"}
    if removed:
        removed["neurons"] = [{key: one[key] for key in one if key != "dropped"} for one in removed["neurons"]]
    calibration = summarize_calibration(manifest)
    return {
        "setup": manifest["setup"],
        "recipe": manifest["recipe"],
        "source": find_source(manifest),
        "zeros": manifest["totals"]["zeros_after"],
        # An older manifest has no errors of groups, which cannot be computed from those of tensors.
        "groups": {name: {"relative_error": None} | group for name, group in manifest["groups"].items()},
        **({"removed": removed} if removed else {}),
        **({"calibration": calibration} if calibration else {}),
    }


READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Contents:
    """Contents of a model's files.

    Attributes
    ----------
    sha256 : fingerprint of the names and contents of the files that affect the answers.
    states : states of the files when they were opened.
    not_finite : float tensors with values that are not finite, and the kind of value: "NaN" or "an infinity".
    changed : whether the files differ from the manifest of a conversion, or the record of an export. For tensors, all
        headers are compared, but only the bytes of those of at most a megabyte.
    """

    sha256: str
    states: Mapping[Path, FileState] = field(default_factory=dict, repr=False)
    not_finite: tuple[tuple[StoredTensor, str], ...] = ()
    changed: bool = False

    def check_finite(self, located: LocatedModel, *, trust_remote_code: bool = False) -> None:
        """Raise CheckpointError for a weight with NaN or infinity; a stored mask may have infinities."""
        for tensor, what in self.not_finite:
            if _is_weight(located, tensor, trust_remote_code):
                raise CheckpointError(
                    f"{tensor.name} in {tensor.file.name} holds {what}.",
                    why=f"{located.name} is broken: its answers would be meaningless.",
                    hint="Find an intact copy of the checkpoint, or repair the tensor.",
                )


def read_contents(located: LocatedModel, on_bytes: Callable[[int], None] | None = None) -> Contents:
    """Read each file of a model once; `on_bytes` gets the size of each piece. Raises CheckpointError for damage."""
    hashes: dict[str, str] = {}
    small: dict[str, str] = {}
    states: dict[Path, FileState] = {}
    not_finite: list[tuple[StoredTensor, str]] = []
    for path in located.files:
        hashes[path.name], states[path], faults = _read_file(path, on_bytes, small)
        not_finite += faults
    changed = _is_changed(located, hashes, small)
    return Contents(compute_fingerprint(hashes.items()), states, tuple(not_finite), changed)


def _list_tensors(path: Path) -> list[StoredTensor]:
    """Return the tensors of a weight file; for a GGUF file, only those of plain floats."""
    if path.suffix == ".safetensors":
        return list(read_header(path).values())
    if path.suffix == ".bin":
        return list(read_torch_file(path).values())
    if path.suffix == ".gguf":
        from compressknow.model.gguf_file import list_plain_tensors

        # The runtime reports faults of the file.
        with suppress(NotReadable):
            return list_plain_tensors(path)
    return []


def _read_file(
    path: Path, on_bytes: Callable[[int], None] | None, small: dict[str, str]
) -> tuple[str, FileState, list[tuple[StoredTensor, str]]]:
    """Return the hash of a file, its state, and which tensors have NaN or infinity; put the hashes of tensors of at
    most `READ_BYTES` into `small`, by name."""
    tensors = _list_tensors(path)
    not_finite = {t.name: what for t in tensors if t.loaded and (what := find_not_finite(t.loaded, t))}
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        for start, stop, tensor in _cut_at_tensors([t for t in tensors if t.loaded is None], status.st_size):
            for offset in range(start, stop, READ_BYTES):
                piece = buffer[: min(READ_BYTES, stop - offset)]
                piece = piece[: file.readinto(piece)]
                digest.update(piece)
                if tensor and (what := find_not_finite(piece, tensor)):
                    not_finite.setdefault(tensor.name, what)
                if on_bytes:
                    on_bytes(len(piece))
            if tensor and stop - start == tensor.nbytes <= READ_BYTES:
                small[tensor.name] = hashlib.sha256(piece).hexdigest()
    return digest.hexdigest(), get_state(status), [(t, not_finite[t.name]) for t in tensors if t.name in not_finite]


def _cut_at_tensors(tensors: Iterable[StoredTensor], size: int) -> Iterator[tuple[int, int, StoredTensor | None]]:
    """Split a file where its tensors begin and end; yield each piece with the longest tensor that begins there."""
    owners: dict[int, StoredTensor] = {}
    for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes):
        if tensor.nbytes:
            owners.setdefault(tensor.offset, tensor)
    ends = (tensor.offset + tensor.nbytes for tensor in owners.values())
    for start, stop in pairwise(sorted({0, size, *owners, *ends})):
        yield start, stop, owners.get(start)


def _is_weight(located: LocatedModel, tensor: StoredTensor, trust_remote_code: bool) -> bool:
    """Return whether a stored tensor is a weight of a model, by its module tree on the meta device."""
    if located.path.suffix == ".gguf":
        return True
    from compressknow.model.loading import NameMapping
    from compressknow.model.meta import build_meta_model

    try:
        checkpoint = open_checkpoint(located.path)
        tree = build_meta_model(located.path, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
        binding = NameMapping(tree).bind(checkpoint.tensors).get(tensor.name)
    except CompressknowError:
        return True
    if binding is None:
        # The tree of a quantized model lacks scales; otherwise it has everything that is read.
        return "quantization_config" in checkpoint.config
    weights = {name for name, _ in tree.named_parameters(remove_duplicate=False)}
    return not weights.isdisjoint(binding.parameters)


def _is_changed(located: LocatedModel, hashes: Mapping[str, str], small: Mapping[str, str]) -> bool:
    """Return whether files with these hashes, by name, differ from their manifest or record."""
    if located.path.suffix == ".gguf":
        recorded = read_export_record(located.path).get("sha256")
        return recorded is not None and len(hashes) == 1 and recorded not in hashes.values()
    if not (located.path / MANIFEST_NAME).is_file():
        return False
    manifest = read_manifest(located.path)
    stored, expected = open_checkpoint(located.path).tensors, dict(list_expected_tensors(manifest))
    return (
        manifest.get(SEAL, hash_manifest(manifest)) != hash_manifest(manifest)
        or any(manifest["files"].get(name, sha256) != sha256 for name, sha256 in hashes.items())
        or not (hashes.keys() ^ manifest["files"].keys()).isdisjoint(DECISIVE)
        or stored.keys() != expected.keys()
        or any(
            (stored[name].dtype, list(stored[name].shape)) != (row["dtype"], row["shape"])
            or small.get(name, row["sha256"]) != row["sha256"]
            for name, row in expected.items()
        )
    )
