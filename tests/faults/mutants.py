"""Damaged files, each from a seed: the same seed gives the same damage."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 0.5, -0.0, 1e-320, 1e308, 255, 65_537, 10**5, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "\0",
    "\n", "\x1b[31mred\x1b[0m", "\x9b2J", "\u202etxt", "\ud800", "é", "../../etc/passwd", "/dev/zero", "{}",
    "[MASK]", "None", "a" * 100_000, "%s%n", "<script>", "(a+)+$",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": {}}, "text", 7)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, pieces cut out, put in, overwritten, said twice; the file shorter, longer or empty."""
    place = rng.randrange(len(data) or 1)
    length = min(rng.choice((1, 2, 8, 64, 512, 4096)), max(len(data) - place, 1))
    piece = data[place : place + length]
    match rng.randrange(9):
        case 0:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 1:
            return data[:place]
        case 2:
            return data + rng.randbytes(length)
        case 3:
            return data[:place] + rng.randbytes(length) + data[place:]
        case 4:
            return data[:place] + data[place + length :]
        case 5:
            return data[:place] + rng.choice((b"\0", b"\xff", b" ")) * length + data[place + length :]
        case 6:
            return data[:place] + piece + data[place:]
        case 7:
            return data[:place] + rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\xc3")) + data[place:]
        case _:
            return rng.choice((b"", b"\n", b"{}", b"[]", b"null", b"\x80\x04.", data * 2))


def mutate_json(text: str, rng: random.Random) -> bytes:
    """One value of a JSON text of another type, of another size, gone, there twice, or too deep to be read."""
    content = json.loads(text)
    places = list(_places(content))
    if not places:
        return mutate_bytes(text.encode(), rng)
    holder, key = rng.choice(places)
    how = rng.randrange(9)
    if how == 0:
        del holder[key]
    elif how == 1:
        holder[key] = rng.choice(NUMBERS)
    elif how == 2:
        holder[key] = rng.choice(TEXTS)
    elif how == 3:
        holder[key] = rng.choice(OTHERS)
    elif how == 4:
        other, place = rng.choice(places)
        holder[key], other[place] = other[place], holder[key]
    elif how == 5 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = holder.pop(key)
    elif how == 6 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = rng.choice((holder[key] + 1, holder[key] * 2, holder[key] - 1, -holder[key], str(holder[key])))
    elif how == 7:
        holder[key] = [holder[key]] * rng.choice((0, 1, 2, 1000))
    else:
        return _by_text(content, holder, key, rng)
    return _written(content)


def _written(content: Any) -> bytes:
    try:
        return json.dumps(content, indent=1).encode()
    except (ValueError, RecursionError):
        # A value put into itself.
        return b"{"


def _by_text(content: Any, holder: Any, key: Any, rng: random.Random) -> bytes:
    """What no writer of JSON gives: a key twice, a number of a thousand digits, brackets without end."""
    mark = "\u0001here\u0001"
    value = json.dumps(holder[key])
    holder[key] = mark
    written = _written(content).decode()
    quoted = json.dumps(mark)
    if isinstance(holder, dict) and rng.randrange(2):
        twice = f"{json.dumps(key)}: {json.dumps(rng.choice(OTHERS))}, {json.dumps(key)}: {value}"
        return written.replace(f"{json.dumps(key)}: {quoted}", twice).encode()
    instead = rng.choice(("9" * 5000, "[" * 100_000, '{"a":' * 50_000, "1e999", "-", "NaN", "[" * 900 + "]" * 900))
    return written.replace(quoted, instead).encode()


def _places(content: Any) -> Any:
    """Every place of a value below a JSON value: what holds it, and its key or number there."""
    if isinstance(content, dict):
        places = [(content, key) for key in content]
    elif isinstance(content, list):
        # Of a long list the first and last few: all else is alike.
        places = [(content, n) for n in range(len(content)) if n < 5 or n >= len(content) - 2]
    else:
        return
    for holder, key in places:
        yield holder, key
        yield from _places(holder[key])


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file: its header mutated as JSON, or the length that it gives for it."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.randrange(6) == 0:
        said = rng.choice((0, 1, length - 1, length + 1, len(data), 100_000_001, 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", said) + header + body
    if rng.randrange(4) == 0:
        header = mutate_bytes(header, rng)
    else:
        header = mutate_json(header.decode(), rng)
        if len(header) > 90_000_000:
            header = header[:90_000_000]
    return struct.pack("<Q", len(header)) + header + body


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of JSON: one mutated, or lines gone, twice, or changed about."""
    return _mutate_line(data, rng, lambda line: mutate_json(line.decode(), rng).replace(b"\n", b" "))


def mutate_toml(data: bytes, rng: random.Random) -> bytes:
    """A TOML text: a value of another type or size, or lines gone, twice or changed about."""
    values = ('"x"', "1e400", "-1", "nan", "9" * 400, "[]", "{}", '"\\u001b[31m"', "[" * 3000, "true", '"(a+)+$"')
    return _mutate_line(data, rng, lambda line: line.split(b"=")[0] + b"= " + rng.choice(values).encode())


def _mutate_line(data: bytes, rng: random.Random, mutate: Callable[[bytes], bytes]) -> bytes:
    lines = data.splitlines(keepends=True)
    place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[place]
        case 1:
            lines.insert(place, lines[other])
        case 2:
            lines[place], lines[other] = lines[other], lines[place]
        case _:
            lines[place] = mutate(lines[place]) + b"\n"
    return b"".join(lines)


def mutate_file(
    path: Path, swaps: list[Path], mutate: Callable[[bytes, random.Random], bytes], rng: random.Random
) -> str:
    """Damage a file in place, or put one of `swaps` or something else there; what was done, in a word."""
    data = path.read_bytes()
    way = rng.randrange(24)
    if way == 0:
        shutil.copyfile(rng.choice(swaps), path)
        return "another file in its place"
    if way == 1:
        path.unlink()
        return _in_place_of(path, rng)
    if way < 8:
        path.write_bytes(mutate_bytes(data, rng))
        return "bytes"
    try:
        path.write_bytes(mutate(data, rng))
    except (UnicodeDecodeError, json.JSONDecodeError):
        path.write_bytes(mutate_bytes(data, rng))
    return mutate.__name__.removeprefix("mutate_")


def _in_place_of(path: Path, rng: random.Random) -> str:
    """What else can stand under a file's name."""
    match rng.randrange(6):
        case 0:
            return "gone"
        case 1:
            path.mkdir()
            return "a folder"
        case 2:
            path.symlink_to("nowhere")
            return "a link to nowhere"
        case 3:
            path.symlink_to(path.name)
            return "a link to itself"
        case 4:
            os.mkfifo(path)
            return "a pipe"
        case _:
            path.symlink_to("/dev/zero")
            return "a link to an endless device"


def as_json(data: bytes, rng: random.Random) -> bytes:
    """`mutate_json` of a file's bytes."""
    return mutate_json(data.decode(), rng)
