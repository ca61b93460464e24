"""Format numbers, and text of unknown origin, for display."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from compressknow.base.errors import UsageError

MINUS = "\N{MINUS SIGN}"
NONE = "-"  # shown if there is no value
_SMALLEST, _LARGEST = 1e-7, 1e9  # outside of these a number is written with an exponent


def count(number: int) -> str:
    """Write a count with thousands separators: ``134,515,008``."""
    return f"{number:,}"


# From this fraction of a unit, the smaller unit would round to 1,000.0.
_ROUNDED = 0.99995


def write_millions(number: int | None) -> str:
    """Write a count of parameters in short: ``134.5 M``; a dash if it is not known.

    >>> write_millions(134_515_008), write_millions(6_607_000_000), write_millions(950), write_millions(None)
    ('134.5 M', '6.61 B', '950', '-')
    >>> write_millions(999_940_000), write_millions(999_960_000)
    ('999.9 M', '1.00 B')
    >>> write_millions(99_999), write_millions(123_456)
    ('99,999', '0.1 M')
    """
    if number is None:
        return NONE
    if number < 100_000:
        return count(number)
    if number < _ROUNDED * 1_000_000_000:
        return f"{number / 1e6:,.1f} M"
    return f"{number / 1e9:,.2f} B"


def write_percent(part: int, whole: int) -> str:
    """Write a share as a percentage; 0 % and 100 % appear only if they are exact.

    >>> [write_percent(part, 10**6) for part in (333_333, 1, 10**6 - 1, 0, 10**6)], write_percent(0, 0)
    (['33.3 %', '< 0.1 %', '> 99.9 %', '0 %', '100 %'], '-')
    """
    return _write_hundredths(100 * part / whole) if whole else NONE


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
# A smaller number without a unit is probably one of MB.
_FEWEST_BYTES = 100_000
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)")


def parse_share(text: str) -> float:
    """Read a number such as 0.949, or the same in percent. Raises ArithmeticError or ValueError for anything
    else.

    >>> parse_share("0.949"), parse_share("94.9 %")
    (0.949, 0.949)
    """
    number = text.strip().removesuffix("%")
    # 94.9 / 100 would be 0.9490000000000001, which 949 of 1,000 miss.
    return float(Decimal(number) / 100 if number != text.strip() else Decimal(number))


def parse_size(text: str | int, option: str = "--size") -> int:
    """Return a size in bytes. Raises UsageError if the text is not a size.

    >>> [parse_size(text) for text in ("90MB", "1.005 GB", "64MiB", "100000", "2kB", "1GiB")]
    [90000000, 1005000000, 67108864, 100000, 2000, 1073741824]
    """
    match = _SIZE.fullmatch(str(text).strip().upper())
    size = int(Decimal(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if match is None or not size:
        raise UsageError(f"{option} {text}: that is not a size.", hint="Write 90MB, 1.5GB or a number of bytes.")
    if not match[2] and size < _FEWEST_BYTES:
        raise UsageError(f"{option} {text}: too few bytes for a model.", hint="Write it in units: 90MB, 1.5GB.")
    return size


def write_size(number: int | None) -> str:
    """Write bytes in decimal units, as disks and the Hub count them (1 MB is 10^6 bytes); a dash for None.

    >>> write_size(269_060_552), write_size(1_500_000_000), write_size(999), write_size(None)
    ('269.1 MB', '1.50 GB', '999 bytes', '-')
    >>> write_size(999_940_000), write_size(999_960_000)
    ('999.9 MB', '1.00 GB')
    """
    if number is None:
        return NONE
    for unit, factor, digits in (("GB", 10**9, 2), ("MB", 10**6, 1), ("kB", 10**3, 1)):
        if number >= _ROUNDED * factor:
            return f"{number / factor:,.{digits}f} {unit}"
    return f"{number} bytes"


def write_two_sizes(one: int, other: int) -> tuple[str, str]:
    """Write two sizes that are compared: to the byte if they would read alike.

    >>> write_two_sizes(29_760_000, 31_000_000), write_two_sizes(29_760_000, 29_800_448)
    (('29.8 MB', '31.0 MB'), ('29,760,000 bytes', '29,800,448 bytes'))
    """
    texts = write_size(one), write_size(other)
    return texts if texts[0] != texts[1] else (f"{count(one)} bytes", f"{count(other)} bytes")


def share(value: float | None) -> str:
    """Write a share of 1 as `write_percent` does; a dash for None.

    >>> share(0.9512), share(1.0), share(0.99999), share(0.0), share(-0.031), share(None)
    ('95.1 %', '100 %', '> 99.9 %', '0 %', '−3.1 %', '-')
    """
    return NONE if value is None else _write_hundredths(100 * value)


def share_against(value: float, limits: Iterable[float]) -> str:
    """Write a share as `share` does, with more digits if rounding would move it across a limit.

    >>> share_against(0.9296, [0.93]), share_against(0.93, [0.93]), share_against(0.9296, [0.95])
    ('92.96 %', '93.0 %', '93.0 %')
    >>> share_against(0.9296, [0.95, 0.93]), share_against(1.0, [0.93]), share_against(0.94 - 0.04, [0.9])
    ('92.96 %', '100 %', '90.0 %')
    """
    # The last digits of a float, such as those of 0.94 - 0.04, are on no side of a limit.
    percent, ends = 100 * value, [round(100 * limit, 9) for limit in limits]
    enough = (n for n in range(1, 7) if all((round(percent, n) >= end) == (round(percent, 9) >= end) for end in ends))
    digits = next(enough, 7)
    return share(value) if digits == 1 else f"{percent:.{digits}f} %"


def _write_hundredths(percent: float) -> str:
    if percent in (0, 100, -100):
        return f"{_write_signed(percent, '.0f')} %"
    if abs(percent) < 0.1:
        return "< 0.1 %" if percent > 0 else f"> {MINUS}0.1 %"
    return "> 99.9 %" if 99.9 < percent < 100 else f"{_write_signed(percent, '.1f')} %"


def write_points(value: float | None) -> str:
    """Write a difference of two shares, in percentage points with its sign.

    >>> [write_points(value) for value in (-0.0234, 0.5, -0.0004, 3.2e40, 0.0, None)]
    ['−2.3 points', '+50.0 points', '−0.04 points', '+3.2e+42 points', '0 points', '-']
    >>> write_points(-3e-7), write_points(0.00098)
    ('−0.00003 points', '+0.1 points')
    """
    if value is None:
        return NONE
    if not value:
        return "0 points"
    # Below a tenth of a point, show the first significant digit.
    decimals = 1 if abs(value) >= 0.001 else -math.floor(math.log10(float(f"{abs(100 * value):.1g}")))
    digits = "+.1e" if 100 * abs(value) >= _LARGEST else f"+.{decimals}f"
    return f"{_write_signed(100 * value, digits)} points"


# A change is called real below this p-value.
SIGNIFICANT = 0.05


def write_p_value(p: float | None) -> str:
    """Write a p-value with two digits, never rounded to 0 or 1; with more if rounding would move it across 0.05.

    >>> [write_p_value(p) for p in (0.0004, 0.03, 0.0472, 0.999, 1.0, None)]
    ['p < 0.001', 'p = 0.03', 'p = 0.047', 'p > 0.99', 'p = 1', '-']
    >>> write_p_value(0.0496), write_p_value(0.049997), write_p_value(0.0504), write_p_value(0.001)
    ('p = 0.0496', 'p = 0.049997', 'p = 0.05', 'p = 0.001')
    """
    if p is None:
        return NONE
    if p < 0.001:
        return "p < 0.001"
    if 0.99 < p < 1:
        return "p > 0.99"
    texts = (f"{p:.{digits}g}" for digits in range(2, 18))
    return f"p = {next(text for text in texts if (float(text) < SIGNIFICANT) == (p < SIGNIFICANT))}"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with this many decimals; with one significant digit if it would round to zero, and with an
    exponent if it is very large or very small.

    >>> [number(value) for value in (0.12345, -1.5, 0.0, 0.0000234, -3e-9, 2.7182e43, -5e9, None)]
    ['0.123', '−1.500', '0', '0.00002', '−3e-09', '2.72e+43', '−5.00e+09', '-']
    """
    if value is None:
        return NONE
    if not value:
        return "0"
    text = f"{value:.{digits}f}"
    if not float(text):
        one = f"{value:.0e}"
        text = f"{float(one):.7f}".rstrip("0").rstrip(".") if abs(value) >= _SMALLEST else one
    elif abs(value) >= _LARGEST:
        text = f"{value:.2e}"
    # The exponent keeps its hyphen.
    return text.replace("-", MINUS, 1) if value < 0 else text


def write_rate(value: float | None) -> str:
    """Write a number per second.

    >>> [write_rate(value) for value in (1234.56, 2, 0.0432, None)]
    ['1,234.6', '2.0', '0.043', '-']
    """
    if value is None:
        return NONE
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def compare_sizes(before: int | None, after: int | None) -> str:
    """Describe how a size changed; a dash if one is not known.

    >>> [compare_sizes(*each) for each in ((200, 150), (100, 103), (7, 7), (7, 0), (0, 7), (7, None))]
    ['25.0 % smaller', '3.0 % larger', 'the same size', '100 % smaller', '-', '-']
    """
    if not before or after is None:
        return NONE
    if before == after:
        return "the same size"
    return f"{share(abs(before - after) / before)} {'smaller' if after < before else 'larger'}"


def write_rank(rank: int | None) -> str:
    """Write a rank as an ordinal.

    >>> write_rank(1), write_rank(2), write_rank(13), write_rank(112), write_rank(1023), write_rank(None)
    ('1st', '2nd', '13th', '112th', '1,023rd', '-')
    """
    if rank is None:
        return NONE
    ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{count(rank)}{ending}"


def _write_signed(value: float, digits: str) -> str:
    return format(value, digits).replace("-", MINUS)


# Zero-width joiners, which Persian, Indic scripts and emoji need.
_JOINERS = {"\u200c", "\u200d"}
# Letters of scripts that are written from right to left; the expression includes spaces between words.
_RTL = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff"
RIGHT_TO_LEFT = re.compile(rf"[{_RTL}]+(?:\s+[{_RTL}]+)*")


def clean(text: object, limit: int = 200) -> str:
    r"""Write `text` on one line, cut to `limit` characters, with invisible characters as their code points.

    Among these are direction controls, which could reverse the sentence around them.

    >>> clean("a\n b\u202ec"), clean("x" * 9, limit=4), clean(" \n")
    ('a b⟨U+202E⟩c', 'xxx…', '')
    >>> clean("ab cdef", limit=4), clean("ab\u202e", limit=3), clean("a\u200cb") == "a\u200cb"
    ('ab…', 'ab⟨U+202E⟩', True)
    """
    line = " ".join(str(text).split())
    if len(line) > limit:
        line = line[: limit - 1].rstrip() + "…"
    return _show_controls(line)


def clean_lines(text: str) -> str:
    """Write `text` with its line breaks, for code blocks, and with invisible characters as their code points."""
    return "\n".join(map(_show_controls, text.split("\n")))


def dump_json(values: Any) -> str:
    """Return `values` as the text of a JSON file, with lone surrogates escaped. Raises ValueError for NaN."""
    text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def answer(text: object) -> str:
    """Write a model's answer; "(nothing)" if it is empty."""
    return clean(text) or "(nothing)"


def _show_controls(line: str) -> str:
    return "".join(c if is_seen(c) else f"⟨U+{ord(c):04X}⟩" for c in line)


def is_seen(character: str) -> bool:
    """Return whether a character is visible, or a joiner that its script needs."""
    return character.isprintable() or character in _JOINERS


def slugify(text: str) -> str:
    """Return a text as part of a folder name.

    >>> slugify("Att_GPQ 20% (int8)"), slugify("\u6700\u521d\u306e\u5c64")
    ('att-gpq-20-int8', '\u6700\u521d\u306e\u5c64')
    >>> slugify("%"), len(slugify("\u00e9" * 300).encode())
    ('cell', 240)
    """
    slug = re.sub(r"(?:[^\w.]|_)+", "-", text.lower()).strip("-.")
    # The folder's name also gets a number and a hash, and may have at most 255 bytes.
    return slug.encode()[:240].decode(errors="ignore") or "cell"
