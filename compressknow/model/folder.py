"""The files of a checkpoint folder: none that would hang or flood who reads it, transformers included."""

from __future__ import annotations

from pathlib import Path

from compressknow.errors import CheckpointError
from compressknow.reading import CONFIG, TOKENIZER, check_regular

# What transformers reads beside the weights, and the most bytes that it may have.
_READ = {
    **dict.fromkeys(("config.json", "generation_config.json", "preprocessor_config.json"), CONFIG),
    **dict.fromkeys(("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"), CONFIG),
    **dict.fromkeys(("chat_template.json", "chat_template.jinja", "adapter_config.json"), CONFIG),
    **dict.fromkeys(("tokenizer.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model"), TOKENIZER),
    **dict.fromkeys(("sentencepiece.bpe.model", "source.spm", "target.spm", "tekken.json"), TOKENIZER),
}


def check_files(folder: Path) -> None:
    """Raise CheckpointError where a pipe, a socket or a device lies in the folder, or a file too large for its name."""
    for path in sorted(folder.iterdir()):
        # A folder waits for nobody; a link that leads nowhere is a file that is missing.
        if path.is_dir() or not path.exists():
            continue
        try:
            check_regular(path, _READ.get(path.name))
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}.", hint="Remove it, or download or save the checkpoint again."
            ) from None


def refuse_leading_out(folder: Path, path: Path) -> None:
    """Raise CheckpointError where a file of a checkpoint is a link to one outside of it, which nobody means to publish.

    In the hub's cache all files of a snapshot are links to blobs of the same repository: these count as inside.
    """
    inside, target = folder.resolve(), path.resolve()
    repository = inside.parent.parent
    is_cached = inside.parent.name == "snapshots" and (repository / "blobs").is_dir()
    if not target.is_relative_to(repository if is_cached else inside):
        raise CheckpointError(
            f"{path} leads out of the checkpoint, to {target}: not copied.",
            hint="Put the file itself in its place if it belongs to the checkpoint, or remove the link.",
        )
