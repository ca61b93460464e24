"""What the pages of all rooms share: HTML that asks nothing of any server, and Markdown."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from compressknow.report.templates import render, source


def html_page(template: str, *, styles: Sequence[str] = ("style.css",), **values: Any) -> str:
    """Fill in the template of that file name; the page holds its style sheets and its script, and allows no others."""
    style, script = "\n".join(source(name).strip() for name in styles), source("report.js").strip()
    return render(
        template,
        # Both come from this package and hold no text of anyone else; the policy names their hashes.
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        **values,
    )


def markdown_page(template: str, **values: Any) -> str:
    """Fill in the template of that file name; what it leaves out leaves no gap."""
    return re.sub(r"\n{3,}", "\n\n", render(template, **values))


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded; only this very style sheet and this very script may be used."""
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
