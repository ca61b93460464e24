"""Griffe extension for the manual's API page: it rewrites this project's docstrings for numpydoc's parser.

Here a parameter's line is `name : description`, because types are in the signature; numpydoc would read the description
as the type. So the description moves to the line below, as does what is returned. `mkdocs.yml` names this file.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(
    r"^(Parameters|Attributes|Raises|Returns)\n-+\n(.*?)(?=^\w[^\n]*\n-+\n|\Z)", re.MULTILINE | re.DOTALL
)
_ENTRY = re.compile(r"^(\w[\w, .]*?) : (.*\n?(?:^ .*\n?)*)", re.M)


class HouseDocstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = convert_to_numpydoc(obj.docstring.value)


def convert_to_numpydoc(text: str) -> str:
    """Move each entry's description below its name.

    >>> print(convert_to_numpydoc("Do it.\\n\\nParameters\\n----------\\nwhat : the thing,\\n    all of it.").rstrip())
    Do it.
    <BLANKLINE>
    Parameters
    ----------
    what
        the thing,
        all of it.
    """
    return _SECTION.sub(_convert_section, text)


def _convert_section(match: re.Match[str]) -> str:
    name, body = match[1], match[2]
    if name == "Returns":
        # A colon with nothing before it means no name, and the type of the signature.
        return match[0].removesuffix(body) + ":\n" + re.sub(r"^(?=.)", "    ", body, flags=re.MULTILINE)
    return match[0].removesuffix(body) + _ENTRY.sub(_convert_entry, body)


def _convert_entry(match: re.Match[str]) -> str:
    """Return one entry per name, because numpydoc lets several names share a type, but not a description."""
    return "\n".join(f"{name}\n    {match[2].rstrip()}" for name in match[1].split(", ")) + "\n"
