"""The terminal: the one place that prints, and streams that may close or break."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import click

from compressknow.format import is_seen, json_text, plain_lines


def show(text: str = "", *, err: bool = False) -> None:
    """Print text and a line's end; characters without a form of their own are named."""
    click.echo(plain_lines(text.replace("\t", " ").replace("\r\n", "\n")), err=err)


def show_json(values: Any) -> None:
    """Print values as JSON."""
    show_json_text(json_text(values))


def show_json_text(text: str) -> None:
    """Print a JSON text; what `show` would name is escaped, so that it stands for the same values."""
    # Outside its strings JSON holds nothing of the kind but its line ends.
    click.echo(re.sub(r"[^\x20-\x7e\n]", _escaped, text.rstrip("\n")))


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    if is_seen(character):
        return character
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


# How a character is written that a stream's encoding lacks: as in JSON, so that printed JSON stays JSON.
ESCAPE = "compressknow.escape"
STANDARD_OUTPUT = "standard output"
_SPELT_OUT = {"…": "...", "–": "-", "—": "-", "→": "->"}


def _escaped_bytes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_SPELT_OUT.get(c) or _code_units(c) for c in lacking), error.end


def _code_units(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


codecs.register_error(ESCAPE, _escaped_bytes)


@contextlib.contextmanager
def fit_streams() -> Iterator[None]:
    """Streams fit for a command: none is closed, none refuses a character, and what libraries write to standard output
    behind Python's back (Rust and C code, other programs) goes to standard error.
    """
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        # Tests and notebooks put streams of other kinds there.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)
    if _descriptor(sys.stdout) != 1:
        yield
        return
    printed, encoding = sys.stdout, _encoding_of(sys.stdout)
    printed.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    try:
        buffered = io.BufferedWriter(_Results(results, "w", closefd=False))
        sys.stdout = io.TextIOWrapper(buffered, encoding, ESCAPE, line_buffering=os.isatty(results))
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        sys.stdout = printed
        os.dup2(results, 1)
        os.close(results)


def _encoding_of(output: Any) -> str:
    """Encoding of the bytes that standard output takes. Python gives a Windows console text, not bytes: those it reads
    in its code page."""
    raw = getattr(getattr(output, "buffer", None), "raw", None)
    console = isinstance(raw, getattr(io, "_WindowsConsoleIO", ()))
    return (os.device_encoding(1) if console else None) or str(output.encoding)


class _Results(io.FileIO):
    """Standard output, named in errors."""

    def write(self, data: Any, /) -> int:
        """As a file does."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STANDARD_OUTPUT
            raise


def drop_output() -> None:
    """Let what is still to be printed go nowhere: whoever read it has gone, or the disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed() -> None:
    """Put the null device where a standard stream is closed: else the next file that is opened would take its number,
    and what a library prints would end up in that file.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.dup(null)
    os.close(null)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
