"""The Jinja2 templates, and the filters that make untrusted text harmless in them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

_PACKAGE = Path(__file__).resolve().parent.parent
# Installed, the templates lie inside the package; in a checkout, at the top of the repository.
_FOLDERS = (_PACKAGE / "templates", _PACKAGE.parent / "templates")

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]#|~$]|^[-+])")


def render(template: str, **values: Any) -> str:
    """Fill in the template of that file name; a name that the template wants and does not get is an error."""
    return _environment().get_template(template).render(**values)


def escape_markdown(text: object) -> str:
    r"""One line of Markdown that shows `text` as it is: no link, image, HTML, emphasis or table cell comes of it.

    >>> print(escape_markdown("[x](http://y) <b>"))
    \[x\](http&#58;//y) &lt;b&gt;
    """
    escaped = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = _MARKDOWN_SPECIAL.sub(r"\\\1", escaped)
    # A bare address would become a link.
    return re.sub(r"(?i)(https?|ftp)://|www\.", _without_autolink, escaped)


def code_span(text: object) -> str:
    """`text` as a Markdown code span, whatever backticks are in it; fit for a table cell too.

    >>> code_span("a`b")
    '``a`b``'
    """
    line = _one_line(text).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str = "") -> str:
    """`text` as a fenced Markdown block that nothing in it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def front_matter(metadata: dict[str, Any]) -> str:
    """`metadata` as YAML front matter, fences included."""
    # Without a width, PyYAML folds long values over lines; some readers of front matter go line by line.
    text: str = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=float("inf"))
    return f"---\n{text}---"


def _one_line(text: object) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _without_autolink(match: re.Match[str]) -> str:
    return match.group().replace(":", "&#58;").replace("www.", "www&#46;").replace("WWW.", "WWW&#46;")


@cache
def _environment() -> Environment:
    # autoescape is for HTML; in Markdown each value goes through a filter of its own.
    environment = Environment(
        loader=FileSystemLoader(_FOLDERS),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(md=escape_markdown, code=code_span, block=code_block, front_matter=front_matter)
    return environment
