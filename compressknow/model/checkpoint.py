"""Checkpoint, a local folder or a hub id: its config and the headers of its weight files. Its code is never run."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from compressknow.base import reading
from compressknow.base.errors import CheckpointError, UnusedOptions, UsageError, find_nearest
from compressknow.base.files import escape_name
from compressknow.base.reading import CONFIG, TOKENIZER, FileState, check_regular, check_unchanged, get_state
from compressknow.model.tensors import StoredTensor, read_header, read_torch_file

MODULES = "modules.json"
# The first of these that exists has the settings for loading the model.
CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def list_module_folders(folder: Path) -> tuple[str, ...]:
    """Return the folders of sentence-transformers' modules after the model, such as ``2_Dense``; empty for others."""
    modules = _read_if_readable(folder / MODULES)
    paths = [entry.get("path") for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    return tuple(path for path in paths if isinstance(path, str) and PurePosixPath(path).parts)


def list_config_groups(quantization: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the groups of layers of a `quantization_config`, each with the settings of its weights."""
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def build_loading_settings(folder: Path, quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings file that makes sentence-transformers dequantize weights on loading, by name; empty for other
    checkpoints, and for several schemes, which transformers cannot load that way. Since 6.0 it calls a model's
    `forward` itself, past the hook in which transformers would dequantize."""
    if not (folder / MODULES).is_file() or len(quantization["config_groups"]) > 1:
        return {}
    name = next((name for name in CONFIGS if (folder / name).is_file()), CONFIGS[0])
    settings = _read_if_readable(folder / name)
    settings = dict(settings) if isinstance(settings, dict) else {}
    # The name in newer releases.
    key = "config_kwargs" if "config_kwargs" in settings else "config_args"
    config = settings[key] if isinstance(settings.get(key), dict) else {}
    return {name: {**settings, key: {**config, "quantization_config": {**quantization, "dequantize": True}}}}


def _read_if_readable(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or unreadable (it is copied anyway)."""
    try:
        return reading.read_json(path, reading.CONFIG)
    except (ValueError, OSError):
        return None


SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# File names of peft's adapter weights and config, which transformers loads onto the model.
ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"
MERGE = "Merge it into its base model (merge_and_unload of peft), and give the folder that you save that to."
SHOWN = 3
DOWNLOAD_AGAIN = "Download or save the checkpoint again."
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Files of a hub repository, besides its weights, that a conversion needs.
HUB_PATTERNS = (
    *("*.json", "*.txt", "*.model", "*.py", "*.jinja", "*.md", "LICENSE*", "*.spm", "*.tiktoken"),
    *("*.codes", "*.tokenizer", f"*{ADAPTER}.safetensors", f"*{ADAPTER}.bin"),
)


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint on disk. `tensors` has the tensors of its weight files by stored name, none if the folder only has a
    config. `shards` lists these files in order; `revision` is set for a checkpoint from the hub."""

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    shards: tuple[str, ...]
    revision: str | None = None
    # States of all its files, taken before the first was read.
    states: dict[Path, FileState] = field(default_factory=dict, repr=False, compare=False)

    def check_unchanged(self) -> None:
        """Raise CheckpointError if one of its files was replaced or written to since it was opened."""
        check_unchanged(self.states)

    def check_has_weights(self) -> None:
        """Raise CheckpointError if its folder has only a config, or an adapter."""
        if not self.tensors and has_adapter(self.folder):
            raise CheckpointError(f"{self.folder} is an adapter (LoRA), not a model.", hint=MERGE)
        if not self.tensors:
            variants = [path.name for path in self.folder.glob("model.*.safetensors")]
            raise CheckpointError(
                f"{self.folder} has no weights: no model.safetensors, no pytorch_model.bin, no index of either.",
                hint=f"It has a variant alone: rename {variants[0]} to {SAFETENSORS}."
                if len(variants) == 1
                else "Give the folder of a whole checkpoint.",
            )

    @property
    def index(self) -> str | None:
        """Return the name of the index of several weight files, if there is one."""
        if not self.shards or self.shards[0] in (SAFETENSORS, TORCH):
            return None
        return SAFETENSORS_INDEX if self.shards[0].endswith(".safetensors") else TORCH_INDEX


def open_checkpoint(model: str | Path, revision: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Open a local folder, or a hub id with its branch, tag or commit. Reads headers, never tensor data. Without
    `weights`, it reads only the config, and downloads only that and the model's own code. Raises CheckpointError if
    there is no such folder or id, if config.json is missing or not an object, or if weight files are missing or
    damaged."""
    check_is_checkpoint(model)
    check_revision(model, revision)
    folder, commit = (Path(model), None) if Path(model).is_dir() else _download(str(model), revision, weights)
    states = check_files(folder)
    if not (folder / "config.json").exists():
        _check_no_other_form(model, folder)
    config = read_json(folder / "config.json")
    files = find_weight_files(folder) if weights else {}
    # An index may name files in subfolders.
    states = {folder / file: get_state((folder / file).stat()) for file in files} | states
    tensors: dict[str, StoredTensor] = {}
    for file, expected in files.items():
        stored = read_header(folder / file) if file.endswith(".safetensors") else read_torch_file(folder / file)
        if missing := sorted(expected - stored.keys()):
            what = f"{folder / file} lacks {missing[0]}, which the index says it holds."
            raise CheckpointError(what, hint=DOWNLOAD_AGAIN)
        # Take all tensors, like transformers: an index may lack some.
        tensors |= stored
    name = str(model) if commit else _name_folder(folder.resolve())
    return Checkpoint(name, folder, config, tensors, tuple(files), commit, states)


def _name_folder(folder: Path) -> str:
    """Return the name of a local model: its folder's or, for a snapshot in the Hub's cache, its hub id."""
    repository = folder.parent.parent.name
    is_cached = folder.parent.name == "snapshots" and repository.startswith("models--")
    return escape_name(repository.removeprefix("models--").replace("--", "/") if is_cached else folder.name)


def has_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter (LoRA), which transformers loads onto a model in the same folder."""
    return (folder / ADAPTER_CONFIG).is_file()


def _check_no_other_form(model: str | Path, folder: Path) -> None:
    """Raise CheckpointError if a folder without a config.json holds an adapter or a GGUF file."""
    if has_adapter(folder):
        raise CheckpointError(f"{model} is an adapter (LoRA), not a model.", hint=MERGE)
    if files := sorted(folder.glob("*.gguf")):
        hint = f"`probe`, `report`, `compare` and `inspect` take the file itself: {files[0]}."
        raise CheckpointError(f"{model} holds a GGUF file, not a checkpoint.", hint=hint)


def list_some(names: Collection[str]) -> str:
    """Return the first few names, and how many more there are.

    >>> list_some(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more


def read_json(path: Path, most: int = reading.CONFIG) -> dict[str, Any]:
    """Return the object in a JSON file of at most `most` bytes. Raises CheckpointError if it is missing, not a regular
    file, larger, not JSON, or not an object."""
    try:
        content = reading.read_json(path, most)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.", hint="It must be in the same folder as the weights.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint=DOWNLOAD_AGAIN) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.", hint=DOWNLOAD_AGAIN)
    return content


def find_weight_files(folder: Path, *, fetched: bool = True) -> dict[str, set[str]]:
    """Return the weight files of a folder, in order, each with the names that an index expects in it.

    The order of preference is that of transformers: safetensors before .bin, one file before an index.

    Raises CheckpointError if an index names a file outside the folder or, if all were `fetched`, a missing one.
    """
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH, TORCH_INDEX)):
        if (folder / single).is_file():
            return {single: set()}
        if (folder / index).is_file():
            return _read_index(folder, folder / index, fetched)
    return {}


def _read_index(folder: Path, index: Path, fetched: bool) -> dict[str, set[str]]:
    weight_map = read_json(index, reading.INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map.", hint=DOWNLOAD_AGAIN)
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or is_outside(file):
            what = f"{index} places {name} outside the folder, in {file!r}: refused."
            raise CheckpointError(what, hint=DOWNLOAD_AGAIN)
        # Unlike Path.is_file, this returns False, not an error, for names that are too long.
        if fetched and not os.path.isfile(folder / file):  # noqa: PTH113
            raise CheckpointError(f"{index} names {file}, which is missing.", hint=DOWNLOAD_AGAIN)
        files.setdefault(file, set()).add(name)
    return dict(sorted(files.items()))


def is_outside(file: str) -> bool:
    """Return whether a file name in a checkpoint points outside its folder, on any system."""
    path = PurePosixPath(file.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in file or not path.parts


def is_address(model: str | Path) -> bool:
    """Return whether a model is named by the address of a server."""
    return isinstance(model, str) and model.lower().startswith(("http://", "https://"))


def build_server_error(model: str | Path) -> CheckpointError:
    """Return the error for a model on a server whose files are needed."""
    return CheckpointError(
        f"{model} is a server: the files of its model are not available here.",
        hint="Give the checkpoint folder. `probe` and `report` take the address of a server.",
    )


def check_is_checkpoint(model: str | Path) -> None:
    """Raise CheckpointError if `model` can be neither a checkpoint folder nor a hub id, without reading any file."""
    if is_address(model):
        raise build_server_error(model)
    path = Path(model)
    if path.is_dir():
        return
    if path.suffix == ".gguf":
        missing = "" if path.exists() else ", and there is no such file"
        raise CheckpointError(
            f"{model} is a GGUF file, which is quantized already{missing}.",
            hint="Give the checkpoint folder that it was made from. `probe` and `report` take GGUF files as they are.",
        )
    if path.exists():
        raise CheckpointError(f"{model} is a file, not a checkpoint folder.", hint=f"Give its folder: {path.parent}")
    if is_path(model):
        hint = "Give a checkpoint's folder, or a hub id (org/name)."
        raise CheckpointError(f"{model}: no such folder.", hint=f"{suggest_sibling(path)}{hint}")


def check_revision(model: str | Path, revision: str | None) -> None:
    """Raise UnusedOptions for a revision of a server, or of a local file or folder; UsageError for one that is not a
    text."""
    path = Path(model)
    if not isinstance(revision, str | None):
        raise UsageError(f"A revision must be the name of a branch, tag or commit: {revision!r}.")
    if revision is not None and (is_address(model) or path.exists()):
        # An address may contain a secret, so it is not shown.
        what = (
            "This is a server" if is_address(model) else f"{model} is a local {'folder' if path.is_dir() else 'file'}"
        )
        raise UnusedOptions(
            f"{what}, which has no revision {revision}.",
            hint="Leave it out, or give the model's id on the Hub.",
            names=("revision", "revision_b"),
        )


def is_convertible(model: str | Path) -> bool:
    """Return whether a model is named by a checkpoint folder or a hub id, not by a file, a server or its answers."""
    path = Path(model)
    return (path / "config.json").is_file() or not (is_address(model) or path.exists() or is_path(model))


def is_path(model: str | Path) -> bool:
    """Tell whether the name of a missing model is a path: it cannot be a hub id, or the part before its slash is a
    folder."""
    path = Path(model)
    if isinstance(model, Path) or not HUB_ID.fullmatch(model) or path.suffix in (".safetensors", ".bin", ".json"):
        return True
    return "/" in model and path.parent.is_dir()


def suggest_sibling(path: Path) -> str:
    """Return a hint with a similar name next to a missing file or folder; empty if there is none."""
    try:
        near = find_nearest(path.name, (each.name for each in path.parent.iterdir()))
    except OSError:
        return ""
    return f"Did you mean {path.parent / near}? " if near else ""


def _download(model: str, revision: str | None, weights: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    def fetch(*patterns: str) -> Path:
        get = partial(snapshot_download, model, revision=revision, allow_patterns=list(patterns))
        try:
            return Path(get())
        except OfflineModeIsEnabled:
            # For a commit, some releases (1.33) request the hub's list of files although all are cached.
            return Path(get(local_files_only=True))

    try:
        folder = fetch("config.json", "*.py")
        if weights:
            fetch(*HUB_PATTERNS, SAFETENSORS)
            if not any((folder / name).is_file() for name in (SAFETENSORS, SAFETENSORS_INDEX)):
                fetch(*HUB_PATTERNS, TORCH)
            # Include a file that exists, because patterns that match no file cause a warning.
            fetch("config.json", *map(escape, find_weight_files(folder, fetched=False)))
            if modules := list_module_folders(folder):
                fetch(*(f"{escape(module)}/*{suffix}" for module in modules for suffix in (".safetensors", ".bin")))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{model} is not a local folder, and it could not be downloaded from the Hub.",
            why=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            hint=f"{suggest_sibling(Path(model))}"
            f"Download it on a machine with access to the Hub (hf download {model}), then give the folder.",
        ) from None
    return folder, folder.name


# Files other than the weights that transformers reads, and their maximum bytes.
_READ = {
    **dict.fromkeys(("config.json", "generation_config.json", "preprocessor_config.json"), CONFIG),
    **dict.fromkeys(("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"), CONFIG),
    **dict.fromkeys(("chat_template.json", "chat_template.jinja", ADAPTER_CONFIG), CONFIG),
    **dict.fromkeys(("tokenizer.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model"), TOKENIZER),
    **dict.fromkeys(("sentencepiece.bpe.model", "source.spm", "target.spm", "tekken.json"), TOKENIZER),
}

_WATCHED = (".json", ".safetensors", ".bin", ".txt", ".model", ".py")


def check_files(folder: Path) -> dict[Path, FileState]:
    """Return the states of the files in a checkpoint folder. Raises CheckpointError for a pipe, socket or device, for a
    file that is too large, and for a folder in place of a file, which transformers would take for a missing file."""
    states: dict[Path, FileState] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name in _READ:
            raise CheckpointError(f"{path} cannot be read: it is a folder.", hint=DOWNLOAD_AGAIN)
        # Other folders do no harm, and a broken link is a missing file.
        if path.is_dir() or not path.exists():
            continue
        try:
            status = check_regular(path, _READ.get(path.name))
        except (ValueError, OSError) as error:
            hint = "Remove it, or download or save the checkpoint again."
            raise CheckpointError(f"{path} cannot be read: {error}.", hint=hint) from None
        # Other files, such as notes, logs and a model card, may change meanwhile.
        if path.suffix in _WATCHED:
            states[path] = get_state(status)
    return states


def check_inside(folder: Path, path: Path) -> None:
    """Raise CheckpointError if a file links out of the checkpoint, which nobody means to publish. In the hub's cache,
    all files of a snapshot link to blobs of the same repository, which count as inside."""
    inside, target = folder.resolve(), path.resolve()
    repository = inside.parent.parent
    is_cached = inside.parent.name == "snapshots" and (repository / "blobs").is_dir()
    if not target.is_relative_to(repository if is_cached else inside):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the checkpoint: not copied.",
            hint="Replace the link with the file if it belongs to the checkpoint, or remove it.",
        )
