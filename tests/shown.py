"""Commands, code and files shown in README.md and docs/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = tuple(sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]))
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class ShownCommand:
    """A command line, and the output that the page shows below it."""

    page: str
    line: str
    output: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line)

    @property
    def is_ours(self) -> bool:
        return self.words[0] == "compressknow"

    @property
    def fails(self) -> bool:
        return self.output.startswith("Error: ")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def find_blocks(page: Path, *languages: str) -> Iterator[str]:
    """Yield the fenced blocks in these languages, without their indent."""
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["language"] in languages:
            yield re.sub(f"^{block['indent']}", "", block["text"], flags=re.MULTILINE)


def find_commands(page: Path) -> Iterator[ShownCommand]:
    """Yield the commands after `$ ` in the console blocks of a page, lines that end in a backslash joined."""
    for text in find_blocks(page, "console"):
        for part in re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            yield ShownCommand(name_of(page), line, output.strip("\n"))
