"""GGUF files that were split: llama.cpp reads them by their first part."""

from __future__ import annotations

import re
from pathlib import Path

# ``model-00002-of-00005.gguf``, as llama.cpp's gguf-split names parts.
PART = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def gguf_parts(path: Path) -> list[Path]:
    """All files of a GGUF that was split, of its first part: those that are there, or the file alone.

    >>> [part.name for part in gguf_parts(Path("model.gguf"))]
    ['model.gguf']
    """
    named = PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named["count"])
    names = (f"{named['prefix']}-{number:05}-of-{count:05}.gguf" for number in range(1, min(count, 10_000) + 1))
    return [part for name in names if (part := path.with_name(name)).is_file()] or [path]
