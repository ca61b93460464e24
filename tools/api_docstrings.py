"""A Griffe extension for the manual's API page: the house's docstrings as numpydoc reads them.

Here a parameter's line is `name : what it is`, since the types stand in the signature; numpydoc would take the text for
the type. So the text goes to the line below, and so does what is returned. `mkdocs.yml` names
this file.
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
            obj.docstring.value = as_numpydoc(obj.docstring.value)


def as_numpydoc(text: str) -> str:
    """The docstring with each entry's text below its name.

    >>> print(as_numpydoc("Do it.\\n\\nParameters\\n----------\\nwhat : the thing,\\n    all of it.").rstrip())
    Do it.
    <BLANKLINE>
    Parameters
    ----------
    what
        the thing,
        all of it.
    """
    return _SECTION.sub(_section, text)


def _section(match: re.Match[str]) -> str:
    name, body = match[1], match[2]
    if name == "Returns":
        # A colon alone: no name, and the type of the signature.
        return match[0].removesuffix(body) + ":\n" + re.sub(r"^(?=.)", "    ", body, flags=re.MULTILINE)
    return match[0].removesuffix(body) + _ENTRY.sub(_entries, body)


def _entries(match: re.Match[str]) -> str:
    """One entry per name: several names share a text, not a type."""
    return "\n".join(f"{name}\n    {match[2].rstrip()}" for name in match[1].split(", ")) + "\n"
