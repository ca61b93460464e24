"""Terminal: the only module that prints. It also handles streams that are closed or break, and shows progress.

Progress goes to stderr: on a terminal as a changing line, elsewhere as a line per minute.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any
from unicodedata import combining, east_asian_width

import click

from compressknow.base.format import MINUS, clean, clean_lines, count, dump_json, is_seen, write_size
from compressknow.base.progress import Progress, RepeatingThread, Stage

# Work that ends sooner shows no line.
DELAY_SECONDS = 1.0
# How often the line is rewritten on a terminal, and how often a new one is written elsewhere.
SECONDS_ON_A_TERMINAL, SECONDS_ELSEWHERE = 0.5, 60.0
# Share of a stage's bytes or tokens after which its time is extrapolated: before, most of it went into opening files.
EXTRAPOLATE_FROM = 0.01
# Runs with at least this many seconds left are announced.
ANNOUNCED_SECONDS = 20.0
NAME = 32
# Columns of the output.
WIDTH = 80


def show(*lines: str, err: bool = False) -> None:
    """Print lines, an empty one for none; invisible characters are shown as code points."""
    # If standard error is full or closed, the exit code still tells what went wrong.
    with contextlib.suppress(*[OSError] * err):
        click.echo(clean_lines("\n".join(lines).replace("\t", " ").replace("\r\n", "\n")), err=err)


def show_written(files: Sequence[Path]) -> None:
    """Say which files were written, if any."""
    if files:
        show(f"\nWritten: {', '.join(map(str, files))}")


def wrap(text: str, indent: str = "  ", **options: Any) -> list[str]:
    """Return the lines of a text, those after the first indented; `options` are those of `textwrap`."""
    # A number and its % stay on one line.
    text = text.replace(" %", "\0%")
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, **options)
    return [line.replace("\0", " ") for line in lines]


def wrap_whole(text: str) -> list[str]:
    """Return the lines of a text without breaking words, such as those of a command."""
    return wrap(text, indent="", break_long_words=False)


def pad(name: str, width: int, after: str = "") -> str:
    """Return a name, cut off if it is too long, followed by `after`, in a column of `width` cells.

    >>> pad("geography", 12) + "|", pad("geography of Asia", 12) + "|", pad("\u5730\u7406", 12) + "|"
    ('geography   |', 'geography…  |', '\u5730\u7406        |')
    >>> pad("smollm2", 12, " (f32)") + "|"
    'smol… (f32) |'
    >>> pad("\u5730\u7406" * 9, 8) + "|", pad("cafe\u0301", 8) == "cafe\u0301    "
    ('\u5730\u7406\u5730… |', True)
    """
    room = width - 1 - len(after)
    text = clean(name, room)
    while _count_cells(text) > room:
        text = f"{text.rstrip('…')[:-1]}…"
    return text + after + " " * (width - len(after) - _count_cells(text))


def _count_cells(text: str) -> int:
    """Count the cells that a text takes: Chinese, Japanese and Korean characters take two, combining accents none."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def show_json(values: Any) -> None:
    """Print values as JSON."""
    show_json_text(dump_json(values))


def show_json_text(text: str) -> None:
    """Print a JSON text with the same values: characters that `show` would replace are escaped."""
    spelt_out = {c for c in _SPELT_OUT if not _can_encode(c)}

    def write(character: str) -> str:
        return character if is_seen(character) and character not in spelt_out else _escape(character)

    # Outside strings, JSON has no such characters but line breaks.
    click.echo(re.sub(r"[^\x20-\x7e\n]", lambda match: write(match[0]), text.rstrip("\n")))


def _can_encode(character: str) -> bool:
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


# Error handler for characters that a stream's encoding lacks: escaped as in JSON, so that printed JSON stays JSON.
ESCAPE = "compressknow.escape"
STANDARD_OUTPUT = "standard output"
_SPELT_OUT = {"…": "...", "–": "-", "—": "-", MINUS: "-", "→": "->"}


def _escape_unencodable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_SPELT_OUT.get(c) or _escape(c) for c in characters), error.end


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


codecs.register_error(ESCAPE, _escape_unencodable)


@contextlib.contextmanager
def fit_streams() -> Iterator[None]:
    """Make the streams safe for a command: none is closed, none rejects a character, and output that libraries write to
    standard output directly (Rust and C code, other programs) goes to standard error."""
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        # Tests and notebooks replace them by other kinds of streams.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)
    if _get_descriptor(sys.stdout) != 1:
        yield
        return
    printed, encoding = sys.stdout, _find_encoding(sys.stdout)
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


def _find_encoding(output: Any) -> str:
    """Return the encoding of standard output's bytes: for a Windows console, which takes text, its code page."""
    raw = getattr(getattr(output, "buffer", None), "raw", None)
    console = isinstance(raw, getattr(io, "_WindowsConsoleIO", ()))
    return (os.device_encoding(1) if console else None) or str(output.encoding)


class _Results(io.FileIO):
    """Standard output, named in errors."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STANDARD_OUTPUT
            raise


def drop_output() -> None:
    """Discard further output, because its reader has exited or the disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed() -> None:
    """Open the null device for each closed standard stream: otherwise the next opened file would get its descriptor,
    and output of a library would end up in that file."""
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.dup(null)
    os.close(null)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115


def _get_descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None


# Labels for work other than evaluation.
_LABELS = {
    **{"read": "Reading the text", "time": "Measuring the speed", "convert": "Converting"},
    **{"sample": "Writing the calibration text", "text": "Reading the calibration text"},
    **{"choose": "Choosing what to drop", "calibrate": "Compressing"},
    **{"verify": "Verifying", "hash": "Reading", "compare": "Comparing"},
    **{"fetch": "Fetching llama.cpp's converter", "unpack": "Unpacking", "gather": "Gathering what layers read"},
    **{"export": "Converting", "quantize": "Quantizing", "round": "Rounding"},
    "sensitivity": "Measuring the sensitivity",
}

# The original, evaluated again to measure noise floors.
_NOISE_FLOORS = {"noise": " in another precision", "runtime": " in llama.cpp"}


class ProgressLine:
    """Line of a stage, rewritten by a thread from `start` to `end`; a terminal is left without it. `written` is the
    monotonic time of the last line: except on a terminal, the next comes a minute later, even of another stage."""

    def __init__(self, stage: Stage, written: float) -> None:
        self.written = written
        self._stage, self._start = stage, time.monotonic()
        # What comes before the first unit tells nothing about the time of the others.
        self._none_done = self._start
        self._number = f" ({stage.number} of {stage.of})" if stage.of > 1 else ""
        # None while the model is loaded.
        self._done_of_total: tuple[int, int] | None = None
        self._end: float | None = None
        self._terminal = sys.stderr.isatty()
        self._shown = 0
        # Guards output: a permanent line must not come in the middle of a changing one.
        self._writing = threading.Lock()

    def start(self) -> None:
        """Begin to write it repeatedly."""
        first, seconds = DELAY_SECONDS, SECONDS_ON_A_TERMINAL
        if not self._terminal:
            seconds = SECONDS_ELSEWHERE
            first = max(min(first, seconds), self.written + seconds - time.monotonic())
        self._repeating = RepeatingThread(self._show, chain([first], repeat(seconds)))

    def end(self) -> None:
        """Stop writing it, and clear it."""
        self._repeating.end()
        self._repeating.wait()
        with self._writing:
            self._write(self._clear())

    def update(self, progress: Progress) -> None:
        """Update it with the progress of the stage."""
        self._done_of_total = progress.done, progress.total
        if not progress.done:
            self._none_done = time.monotonic()
        self._end = None if progress.left is None else time.monotonic() + progress.left

    def say(self, text: str) -> None:
        """Write a permanent line."""
        with self._writing:
            self._write(f"{self._clear()}{text}\n")

    def text(self) -> str:
        """Return the line: model, probe, progress and time left."""
        return self._describe_facts() if self._stage.unit == "facts" else self._describe_work()

    def _describe_work(self) -> str:
        label, now = _LABELS[self._stage.work], time.monotonic()
        if self._stage.work == "time":
            label = f"{label} of {clean(self._stage.model, NAME)}"
        label += self._number
        done, total = self._done_of_total or (0, 0)
        if done <= total * EXTRAPOLATE_FROM:
            return f"{label}: {format_duration(now - self._start)} so far"
        amount = f"{write_size(done)} of {write_size(total)}"
        if self._stage.unit != "bytes":
            amount = f"{count(done)} of {count(total)} {self._stage.unit}"
        return f"{label}: {amount}, {format_duration((now - self._none_done) / done * (total - done))} left"

    def _describe_facts(self) -> str:
        stage, now = self._stage, time.monotonic()
        run = " again, for the KL over all tokens" if stage.again else self._number
        run = _NOISE_FLOORS.get(stage.work, run)
        name = f"{clean(stage.model, NAME)}{run}, {clean(stage.probe, NAME)}"
        if self._done_of_total is None:
            return f"{name}: {format_duration(now - self._start)} so far"
        done, total = self._done_of_total
        facts = f"{name}: {count(done)} of {count(total)} facts"
        return facts if self._end is None else f"{facts}, {format_duration(max(self._end - now, 0))} left"

    def _show(self) -> None:
        with self._writing:
            self._write(self._overwrite(self.text()) if self._terminal else f"{self.text()}\n")
            self.written = time.monotonic()

    def _overwrite(self, text: str) -> str:
        columns = 80
        with contextlib.suppress(OSError, ValueError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or columns
        while _count_cells(text) >= columns:
            text = text[:-1]
        before, self._shown = self._shown, _count_cells(text)
        surplus = max(before - self._shown, 0)
        return f"\r{text}{' ' * surplus}" + "\b" * surplus

    def _clear(self) -> str:
        before, self._shown = self._shown, 0
        return f"\r{' ' * before}\r" if before else ""

    def _write(self, text: str) -> None:
        # If its reader has exited, the work continues.
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


class ProgressLines:
    """Progress lines of a run, one per stage, after one that says how long a long run takes: an `on_progress`."""

    def __init__(self) -> None:
        self._announced = False
        self._written = time.monotonic()
        self._open: dict[Stage, ProgressLine] = {}

    def __call__(self, progress: Progress) -> None:
        stage = progress.stage
        if progress.state == "begins":
            line = self._open[stage] = ProgressLine(stage, self._written)
            line.start()
            if stage.work == "fetch":
                # Always say what is fetched from the network, which happens once.
                line.say(f"{_LABELS[stage.work]}, once, into {clean(stage.model, 200)}")
        elif progress.state == "ends":
            line = self._open.pop(stage)
            line.end()
            self._written = max(self._written, line.written)
        else:
            self._open[stage].update(progress)
            self._announce(progress)

    def _announce(self, progress: Progress) -> None:
        if progress.left is None or self._announced or progress.stage.again or progress.stage.work in _NOISE_FLOORS:
            return
        self._announced = True
        if (text := announce(progress)) is not None:
            self._open[progress.stage].say(text)


class TableRows:
    """Rows of a table, printed as results arrive; the lines of `write_head` for the first result come before them."""

    def __init__(self, write_head: Callable[[Any], Iterable[str]], write_row: Callable[[Any], Iterable[str]]) -> None:
        self._write_head, self._write_row, self._has_head = write_head, write_row, False

    def __call__(self, result: Any) -> None:
        if not self._has_head:
            self._has_head = True
            show(*self._write_head(result))
        show(*self._write_row(result))


def announce(progress: Progress) -> str | None:
    """Estimate how long a long run takes, from the time left in its first stage; None for a short one."""
    stage, done, total = progress.stage, progress.done, progress.total
    models = stage.of - stage.number + 1
    facts = max(stage.facts, total)
    seconds = (progress.left or 0.0) / max(total - done, 1) * (facts * models - done)
    if seconds < ANNOUNCED_SECONDS:
        return None
    times = f" x {count(models)} models" if models > 1 else ""
    return f"{count(facts)} facts{times} on {clean(stage.device, 20)}: about {format_duration(seconds)}."


def format_duration(seconds: float) -> str:
    """Write seconds in readable units.

    >>> [format_duration(seconds) for seconds in (0.2, 59.4, 95, 3 * 3600 + 250, 200_000)]
    ['0 s', '59 s', '2 min', '3 h 4 min', '56 h']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes and hours < 10 else f"{round(seconds / 3600)} h"
