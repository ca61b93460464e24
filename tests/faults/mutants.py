"""Damage files at random; the same seed gives the same damage."""

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
    """Flip bits; delete, insert, overwrite or repeat a piece; truncate, extend or replace the whole."""
    start = rng.randrange(len(data) or 1)
    length = min(rng.choice((1, 2, 8, 64, 512, 4096)), max(len(data) - start, 1))
    piece = data[start : start + length]
    match rng.randrange(9):
        case 0:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 1, 2, 8))):
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 1:
            return data[:start]
        case 2:
            return data + rng.randbytes(length)
        case 3:
            return data[:start] + rng.randbytes(length) + data[start:]
        case 4:
            return data[:start] + data[start + length :]
        case 5:
            return data[:start] + rng.choice((b"\0", b"\xff", b" ")) * length + data[start + length :]
        case 6:
            return data[:start] + piece + data[start:]
        case 7:
            return data[:start] + rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\xc3")) + data[start:]
        case _:
            return rng.choice((b"", b"\n", b"{}", b"[]", b"null", b"\x80\x04.", data * 2))


def mutate_json(text: str, rng: random.Random) -> bytes:
    """Change, remove, rename, move, repeat or nest one value of a JSON text."""
    content = json.loads(text)
    locations = list(_find_locations(content))
    if not locations:
        return mutate_bytes(text.encode(), rng)
    container, key = rng.choice(locations)
    choice = rng.randrange(9)
    if choice == 0:
        del container[key]
    elif choice == 1:
        container[key] = rng.choice(NUMBERS)
    elif choice == 2:
        container[key] = rng.choice(TEXTS)
    elif choice == 3:
        container[key] = rng.choice(OTHERS)
    elif choice == 4:
        other, other_key = rng.choice(locations)
        container[key], other[other_key] = other[other_key], container[key]
    elif choice == 5 and isinstance(container, dict):
        container[rng.choice(TEXTS)] = container.pop(key)
    elif choice == 6 and isinstance(number := container[key], (int, float)) and not isinstance(number, bool):
        container[key] = rng.choice((number + 1, number * 2, number - 1, -number, str(number)))
    elif choice == 7:
        container[key] = [container[key]] * rng.choice((0, 1, 2, 1000))
    else:
        return _mutate_json_text(content, container, key, rng)
    return _dump(content)


def _dump(content: Any) -> bytes:
    try:
        return json.dumps(content, indent=1).encode()
    except (ValueError, RecursionError):
        # A value contains itself.
        return b"{"


def _mutate_json_text(content: Any, container: Any, key: Any, rng: random.Random) -> bytes:
    """Replace a value by what no writer of JSON writes: a repeated key, a huge number, endless brackets."""
    mark = "\u0001here\u0001"
    value = json.dumps(container[key])
    container[key] = mark
    text = _dump(content).decode()
    quoted = json.dumps(mark)
    if isinstance(container, dict) and rng.randrange(2):
        repeated = f"{json.dumps(key)}: {json.dumps(rng.choice(OTHERS))}, {json.dumps(key)}: {value}"
        return text.replace(f"{json.dumps(key)}: {quoted}", repeated).encode()
    invalid = rng.choice(("9" * 5000, "[" * 100_000, '{"a":' * 50_000, "1e999", "-", "NaN", "[" * 900 + "]" * 900))
    return text.replace(quoted, invalid).encode()


def _find_locations(content: Any) -> Any:
    """Yield the container and the key or index of every value below a JSON value."""
    if isinstance(content, dict):
        locations = [(content, key) for key in content]
    elif isinstance(content, list):
        # Only the first and last few of a long list: the others are like them.
        locations = [(content, n) for n in range(len(content)) if n < 5 or n >= len(content) - 2]
    else:
        return
    for container, key in locations:
        yield container, key
        yield from _find_locations(container[key])


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """Mutate the header of a safetensors file as JSON or as bytes, or change its length field."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.randrange(6) == 0:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), 100_000_001, 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", wrong) + header + body
    if rng.randrange(4) == 0:
        header = mutate_bytes(header, rng)
    else:
        header = mutate_json(header.decode(), rng)
        if len(header) > 90_000_000:
            header = header[:90_000_000]
    return struct.pack("<Q", len(header)) + header + body


def mutate_lines(data: bytes, rng: random.Random) -> bytes:
    """Mutate one of several lines of JSON, or remove, repeat or swap lines."""
    return _mutate_line(data, rng, lambda line: mutate_json(line.decode(), rng).replace(b"\n", b" "))


def mutate_toml(data: bytes, rng: random.Random) -> bytes:
    """Change a value of a TOML text, or remove, repeat or swap lines."""
    values = ('"x"', "1e400", "-1", "nan", "9" * 400, "[]", "{}", '"\\u001b[31m"', "[" * 3000, "true", '"(a+)+$"')
    return _mutate_line(data, rng, lambda line: line.split(b"=")[0] + b"= " + rng.choice(values).encode())


def _mutate_line(data: bytes, rng: random.Random, mutate: Callable[[bytes], bytes]) -> bytes:
    lines = data.splitlines(keepends=True)
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[first]
        case 1:
            lines.insert(first, lines[second])
        case 2:
            lines[first], lines[second] = lines[second], lines[first]
        case _:
            lines[first] = mutate(lines[first]) + b"\n"
    return b"".join(lines)


def mutate_file(
    path: Path, swaps: list[Path], mutate: Callable[[bytes, random.Random], bytes], rng: random.Random
) -> str:
    """Damage a file in place, or put one of `swaps` or something else there, and return what was done."""
    data = path.read_bytes()
    choice = rng.randrange(24)
    if choice == 0:
        shutil.copyfile(rng.choice(swaps), path)
        return "another file in its place"
    if choice == 1:
        path.unlink()
        return _replace(path, rng)
    if choice < 8:
        path.write_bytes(mutate_bytes(data, rng))
        return "bytes"
    try:
        path.write_bytes(mutate(data, rng))
    except (UnicodeDecodeError, json.JSONDecodeError):
        path.write_bytes(mutate_bytes(data, rng))
    return mutate.__name__.removeprefix("mutate_")


def _replace(path: Path, rng: random.Random) -> str:
    """Put a folder, a link or a pipe in the place of a file, or nothing."""
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


def mutate_json_bytes(data: bytes, rng: random.Random) -> bytes:
    return mutate_json(data.decode(), rng)
