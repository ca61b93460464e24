"""Numbers as people read them: counts, shares and sizes with their units."""

from __future__ import annotations


def count(number: int) -> str:
    """A count with thousands apart: ``134,515,008``."""
    return f"{number:,}"


def millions(number: int) -> str:
    """A count of parameters, short: ``134.5 M``.

    >>> millions(134_515_008), millions(6_607_000_000), millions(950)
    ('134.5 M', '6.61 B', '950')
    """
    if number < 100_000:
        return count(number)
    if number < 1_000_000_000:
        return f"{number / 1e6:,.1f} M"
    return f"{number / 1e9:,.2f} B"


def percent(part: int, whole: int) -> str:
    """A share; 0 % and 100 % appear only where they are exact.

    >>> percent(1, 3), percent(1, 10**6), percent(10**6 - 1, 10**6), percent(0, 5), percent(5, 5), percent(0, 0)
    ('33.3 %', '< 0.1 %', '> 99.9 %', '0 %', '100 %', '-')
    """
    if not whole:
        return "-"
    if part in (0, whole):
        return "100 %" if part else "0 %"
    share = 100 * part / whole
    if share < 0.1:
        return "< 0.1 %"
    return "> 99.9 %" if share > 99.9 else f"{share:.1f} %"


def size(number: int) -> str:
    """Bytes in decimal units, as disks and the Hub count them: 1 MB is 10^6 bytes (MiB would be 2^20).

    >>> size(269_060_552), size(1_500_000_000), size(999)
    ('269.1 MB', '1.50 GB', '999 bytes')
    """
    for unit, factor, digits in (("GB", 10**9, 2), ("MB", 10**6, 1), ("kB", 10**3, 1)):
        if number >= factor:
            return f"{number / factor:,.{digits}f} {unit}"
    return f"{number} bytes"
