"""Contents of a model's files, read once: hashes, weights that are no numbers, deviations from a manifest, and the
state by which to tell later that the files are still the ones that were read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compressknow.base.errors import CheckpointError, CompressknowError
from compressknow.base.reading import FileState, NotReadable, check_unchanged, open_regular
from compressknow.engine.identity import DECISIVE, MANIFEST, Located, fingerprint_of, record_beside
from compressknow.model.checkpoint import open_checkpoint
from compressknow.model.gguf_file import plain_tensors
from compressknow.model.manifest import SEAL, expected_tensors, hash_manifest, read_manifest
from compressknow.model.tensors import StoredTensor, not_finite, read_header
from compressknow.model.torch_bin import read_torch_file

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Contents:
    """Contents of a model's files.

    Attributes
    ----------
    sha256 : of the names and contents of the files that decide the answers; the folder's name is not in it.
    states : of the files that were read, as they were when they were opened.
    not_finite : tensors of floats that hold what is no number, and what that is: "NaN" or "an infinity".
    changed : whether they differ from what the manifest of a conversion, or the record of an export, says of them, as
        far as that costs no further reading: of tensors, all headers, and the bytes of those of at most a megabyte.
    """

    sha256: str
    states: Mapping[Path, FileState] = field(default_factory=dict, repr=False)
    not_finite: tuple[tuple[StoredTensor, str], ...] = ()
    changed: bool = False

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file was replaced or written to since it was read."""
        check_unchanged(self.states)

    def check_finite(self, located: Located, *, trust_remote_code: bool = False) -> None:
        """Raise CheckpointError naming a weight that holds NaN or infinity, as `convert` does.

        What is no weight, such as a mask that is stored beside them, may hold infinities.
        """
        for tensor, what in self.not_finite:
            if _is_weight(located, tensor, trust_remote_code):
                raise CheckpointError(
                    f"{tensor.name} in {tensor.file.name} holds {what}.",
                    why=f"{located.name} is broken: its answers would mean nothing.",
                    hint="Find a sound copy of the checkpoint, or repair the tensor.",
                )


def read_contents(located: Located, on_bytes: Callable[[int], None] | None = None) -> Contents:
    """Read each file of a model once; `on_bytes` is called with the number of bytes of each piece.

    Raises CheckpointError where a weight file is damaged.
    """
    hashes: dict[str, str] = {}
    small: dict[str, str] = {}
    states: dict[Path, FileState] = {}
    flaws: list[tuple[StoredTensor, str]] = []
    for path in located.files:
        tensors = _list_tensors(path)
        hashes[path.name], states[path], found, hashes_of_small = _read_file(path, tensors, on_bytes)
        flaws += [(tensor, found[tensor.name]) for tensor in tensors if tensor.name in found]
        small |= hashes_of_small
    changed = _is_changed(located, hashes, small)
    return Contents(fingerprint_of(hashes.items()), states, tuple(flaws), changed)


def _list_tensors(path: Path) -> list[StoredTensor]:
    """Return the tensors of a weight file; of a GGUF file those of plain floats."""
    if path.suffix == ".safetensors":
        return list(read_header(path).values())
    if path.suffix == ".bin":
        return list(read_torch_file(path).values())
    if path.suffix == ".gguf":
        try:
            return plain_tensors(path)
        except NotReadable:
            # Its runtime says what is wrong with it.
            return []
    return []


def _read_file(
    path: Path, tensors: Iterable[StoredTensor], on_bytes: Callable[[int], None] | None
) -> tuple[str, FileState, dict[str, str], dict[str, str]]:
    """Return the hash of a file, its state, by name which tensors hold what is no number, and hashes of those of at
    most `READ_BYTES`.
    """
    in_place = [tensor for tensor in tensors if tensor.loaded is None]
    flaws = {tensor.name: what for tensor in tensors if tensor.loaded and (what := not_finite(tensor.loaded, tensor))}
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    small: dict[str, str] = {}
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        for start, stop, tensor in _cut_at_tensors(in_place, status.st_size):
            for place in range(start, stop, READ_BYTES):
                piece = buffer[: min(READ_BYTES, stop - place)]
                piece = piece[: file.readinto(piece)]
                digest.update(piece)
                if tensor and (what := not_finite(piece, tensor)):
                    flaws.setdefault(tensor.name, what)
                if on_bytes:
                    on_bytes(len(piece))
            if tensor and stop - start == tensor.nbytes <= READ_BYTES:
                small[tensor.name] = hashlib.sha256(piece if tensor.nbytes else b"").hexdigest()
    return digest.hexdigest(), FileState.of(status), flaws, small


def _cut_at_tensors(tensors: Iterable[StoredTensor], size: int) -> Iterator[tuple[int, int, StoredTensor | None]]:
    """Cut a file at the ends of its tensors, from its first byte to its last; bytes that two of them share belong to
    one."""
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if position < tensor.offset:
            yield position, tensor.offset, None
        start, stop = max(position, tensor.offset), tensor.offset + tensor.nbytes
        if start < stop or not tensor.nbytes:
            # What begins within an element of it, as no tensor of the same dtype does, is not looked at.
            yield start, stop, tensor if (start - tensor.offset) % tensor.itemsize == 0 else None
        position = max(position, stop)
    yield position, size, None


def _is_weight(located: Located, tensor: StoredTensor, trust_remote_code: bool) -> bool:
    """Return whether a model computes with a stored tensor, as its module tree on the meta device says."""
    if located.path.suffix == ".gguf":
        return True
    from compressknow.model.meta import meta_model
    from compressknow.model.naming import Naming

    try:
        checkpoint = open_checkpoint(located.path)
        tree = meta_model(located.path, trust_remote_code=trust_remote_code, tensor_names=checkpoint.tensors)
        binding = Naming(tree).bind(checkpoint.tensors).get(tensor.name)
    except CompressknowError:
        return True
    if binding is None:
        # Of a quantized model the tree has no scales; of others it has all that is read.
        return "quantization_config" in checkpoint.config
    weights = {name for name, _ in tree.named_parameters(remove_duplicate=False)}
    return not weights.isdisjoint(binding.parameters)


def _is_changed(located: Located, hashes: Mapping[str, str], small: Mapping[str, str]) -> bool:
    """Return whether files that were read with these hashes, by name, differ from their manifest or record."""
    if located.path.suffix == ".gguf":
        recorded = record_beside(located.path).get("sha256")
        return recorded is not None and len(hashes) == 1 and recorded not in hashes.values()
    if located.url is not None or not (located.path / MANIFEST).is_file():
        return False
    manifest = read_manifest(located.path)
    stored, expected = open_checkpoint(located.path).tensors, dict(expected_tensors(manifest))
    return (
        manifest.get(SEAL, hash_manifest(manifest)) != hash_manifest(manifest)
        or any(manifest["files"].get(name, sha256) != sha256 for name, sha256 in hashes.items())
        or any(not (located.path / name).is_file() for name in manifest["files"] if name in DECISIVE)
        or any(name in DECISIVE and name not in manifest["files"] for name in hashes)
        or stored.keys() != expected.keys()
        or any(
            (stored[name].dtype, list(stored[name].shape)) != (row["dtype"], row["shape"])
            or small.get(name, row["sha256"]) != row["sha256"]
            for name, row in expected.items()
        )
    )
