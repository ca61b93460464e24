"""`text:FILE`: running text, on which a causal model's perplexity is measured, and how far each of its tokens moved."""

from __future__ import annotations

from pathlib import Path

from compressknow.errors import UsageError
from compressknow.evaluate.sources.source import Options, ProbeSource
from compressknow.evaluate.text.running import CONTEXT, RunningText
from compressknow.files import name_of
from compressknow.reading import NotReadable, check_regular, sha256_of

# A shorter chunk has hardly a second half.
LEAST_CONTEXT = 8


class Text(ProbeSource):
    """``text:FILE``."""

    help = "perplexity of a text, and KL by token, as llama.cpp has them (causal models)"
    form = "FILE.txt"
    takes = frozenset({"context"})
    held_out = False

    def named(self, part: str) -> str:
        """The file's own name: a text is the same wherever the file lies."""
        return name_of(Path(part))

    def meant(self, text: str) -> bool:
        """By the file's suffix."""
        return Path(text).suffix.lower() in (".txt", ".raw")

    def open(self, name: str, part: str, options: Options) -> RunningText:
        """The text of a file. Raises UsageError where there is none, where it is empty, or no text in UTF-8."""
        path = Path(part).expanduser()
        hint = "text: is followed by the path of a text in UTF-8."
        try:
            check_regular(path)
        except FileNotFoundError:
            raise UsageError(f"There is no file {path}.", hint=hint) from None
        except (OSError, NotReadable) as error:
            raise UsageError(f"{path} cannot be read: {error}.", hint=hint) from None
        if options.context is not None and options.context < LEAST_CONTEXT:
            raise UsageError(f"--context must be at least {LEAST_CONTEXT}: {options.context}.")
        text = RunningText(name, path, sha256_of(path), path.stat().st_size, options.context, options.limit)
        if not text.read(options.context or CONTEXT).strip():
            raise UsageError(f"{path} is empty.", hint="Give a text of a few thousand words.")
        return text
