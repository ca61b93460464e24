"""Reports on disk, in the format that each file's name asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from compressknow.errors import OutputError, UsageError
from compressknow.report.records import Card

FORMATS = (".html", ".md", ".json")


def check_outputs(outputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise, before any work is done, where an output could not be written: format unknown, file there already."""
    for path in outputs:
        if path.suffix.lower() not in FORMATS:
            raise UsageError(
                f"{path}: the name of a report ends in .html, .md or .json.",
                hint="Give -o several times for several formats.",
            )
        if path.is_dir() or (path.exists() and not overwrite):
            raise OutputError(f"{path} exists already.", hint="Choose another name, or pass --overwrite.")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: no such folder.", hint="Make it first, or choose another place.")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UsageError("Two reports have one name.", hint="Give each -o a name of its own.")


def write_report(card: Card, path: Path) -> None:
    """Write the card as the format that the name asks for; the file appears only when it is whole."""
    write_whole(path, rendered(card, path.suffix.lower()).encode("utf-8"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def rendered(card: Card, suffix: str) -> str:
    """The card as text: ``.html``, ``.md`` or ``.json``."""
    if suffix == ".html":
        from compressknow.report.html import render_html

        return render_html(card)
    if suffix == ".md":
        from compressknow.report.markdown import render_markdown

        return render_markdown(card)
    from compressknow.report.json_report import to_json

    return json.dumps(to_json(card), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
