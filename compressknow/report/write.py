"""Files of reports on disk: whether they may be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressknow.errors import OutputError, UsageError
from compressknow.files import interrupted, refuse_broken_links

FORMATS = (".html", ".md", ".json")


def check_outputs(outputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise, before any work is done, where an output could not be written: format unknown, file there already.

    A file that an interrupted run put there without the others is no reason.
    """
    unfinished = interrupted(outputs)
    for path in outputs:
        if path.suffix.lower() not in FORMATS:
            raise UsageError(
                f"{path}: the name of a report ends in .html, .md or .json.",
                hint="Give -o several times for several formats.",
            )
        refuse_broken_links(path)
        if path.is_dir() or (path.exists() and not overwrite and path not in unfinished):
            raise OutputError(f"{path} exists already.", hint="Choose another name, or pass --overwrite.")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: no such folder.", hint="Make it first, or choose another place.")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UsageError("Two reports have one name.", hint="Give each -o a name of its own.")
