"""Render pages as self-contained HTML and as Markdown, with escaping, and write them safely."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_eval_context
from jinja2.nodes import EvalContext
from markupsafe import Markup, escape

from compressknow.base.errors import OutputError, UsageError
from compressknow.base.files import check_links, check_writable, close_durably, open_whole
from compressknow.base.format import RIGHT_TO_LEFT, clean_lines, compare_sizes, count, number, write_percent, write_size
from compressknow.base.packages import require
from compressknow.base.reading import open_regular
from compressknow.base.system import hold_signals

if TYPE_CHECKING:
    # Writing a model card must not import `parts`.
    from compressknow.pages.parts import Page

_PACKAGE = Path(__file__).resolve().parent.parent
# Templates are inside an installed package, but at the top of a repository checkout.
_FOLDERS = (_PACKAGE / "templates", _PACKAGE.parent / "templates")

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]#|~$]|^[-+])")
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=%|(?:[kMG]B|dB|points)\b)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")  # an option in a sentence
_P_VALUE = re.compile(r"\bp (=|&[lg]t;) (?=\d)")  # a p-value, as HTML has it: p &lt; 0.001
# A person, an address, an issue.
_MENTION = re.compile(r"@(?=\w)|(?:#|\bGH-)(?=\d)", re.IGNORECASE)
_LIST_NUMBER = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")


def render(template: str, **values: Any) -> str:
    """Render the template of that file name; a missing value is an error."""
    return _make_environment().get_template(template).render(**values)


def read_source(name: str) -> str:
    """Return the unchanged text of a file next to the templates."""
    path = next(folder / name for folder in _FOLDERS if (folder / name).is_file())
    return path.read_text(encoding="utf-8")


def escape_markdown(text: object) -> str:
    r"""Return one line of Markdown that shows `text` literally, without links, images, HTML, emphasis, table cells or
    mentions.

    >>> print(escape_markdown("[x](http://y) <b>"))
    \[x\](http&#58;//y) &lt;b&gt;
    >>> escape_markdown("@me fixed a/b#12 and GH-7") == "@\u2060me fixed a/b\\#\u206012 and GH-\u20607"
    True
    """
    # GitHub looks for mentions in the rendered text, where backslashes and entities are gone.
    escaped = _MENTION.sub("\\g<0>\N{WORD JOINER}", _join_lines(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    escaped = _MARKDOWN_SPECIAL.sub(r"\\\1", escaped)
    escaped = _LIST_NUMBER.sub(r"\1\\\2", escaped)
    # A bare address would become a link.
    return re.sub(r"(?i)((?:https?|ftp):)(?=//)|www\.", lambda match: f"{match[0][:-1]}&#{ord(match[0][-1])};", escaped)


def to_code_span(text: object) -> str:
    """Return `text` as a Markdown code span, with any backticks; a bar would still end a table cell.

    >>> to_code_span("a`b")
    '``a`b``'
    """
    line = _join_lines(text)
    fence = _make_fence(line, least=1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def to_code_block(text: str, language: str = "") -> str:
    """Return `text` as a fenced Markdown block that nothing in it can close."""
    fence = _make_fence(text, least=3)
    return f"{fence}{language}\n{clean_lines(text.rstrip())}\n{fence}"


def _make_fence(text: str, least: int) -> str:
    return "`" * max([least, *(len(run) + 1 for run in re.findall(r"`+", text))])


def to_yaml(values: dict[str, Any]) -> str:
    """Return `values` as YAML; if any has invisible characters, all but ASCII is escaped."""

    # Without a width, PyYAML folds long values over lines; some readers of front matter go line by line.
    dump: Callable[..., str] = partial(yaml.safe_dump, values, sort_keys=False, width=float("inf"))
    text = dump(allow_unicode=True)
    return text if text == clean_lines(text) else dump(allow_unicode=False)


def isolate(sentence: object) -> Markup:
    """Return a sentence as HTML in which right-to-left names do not reorder the text around them, and a number stays
    on one line with its unit, or with the p before it.

    >>> print(isolate("<\u05d0\u05d1> 5 % of 2 MB"), isolate("p < 0.001"))
    &lt;<bdi>\u05d0\u05d1</bdi>&gt; 5\xa0% of 2\xa0MB p\xa0&lt;\xa00.001
    """
    isolated = RIGHT_TO_LEFT.sub(r"<bdi>\g<0></bdi>", str(escape(clean_lines(str(sentence)))))
    isolated = _P_VALUE.sub("p\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", isolated)
    return Markup(_BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", isolated))


def keep_options_whole(sentence: Markup) -> Markup:
    """Return a sentence in which no line breaks inside an option.

    >>> print(keep_options_whole(isolate("prune less: --prune 0.1")))
    prune less: <span class="option">--prune</span> 0.1
    """
    return Markup(_OPTION.sub(r'<span class="option">\g<0></span>', str(sentence)))


def to_markdown(sentence: str) -> str:
    """Return a sentence as Markdown, with right-to-left names isolated by Unicode marks."""
    return RIGHT_TO_LEFT.sub("\u2068\\g<0>\u2069", escape_markdown(sentence))


def _join_lines(text: object) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


@pass_eval_context
def _finish(context: EvalContext, value: object) -> object:
    # Texts of other packages may have invisible characters.
    return clean_lines(value) if context.autoescape and type(value) is str else value


@cache
def _make_environment() -> Environment:
    # HTML templates escape every value; Markdown templates apply a filter to each.
    environment = Environment(
        loader=FileSystemLoader(_FOLDERS),
        undefined=StrictUndefined,
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finish,
    )
    environment.filters.update(md=escape_markdown, code=to_code_span, block=to_code_block, yaml=to_yaml)
    environment.filters.update(isolated=isolate, options=keep_options_whole, sentence=to_markdown, count=count)
    environment.filters.update(number=number, percent=write_percent, size=write_size, smaller=compare_sizes)
    return environment


def render_html(page: Page) -> str:
    """Return the page as HTML with an inline style sheet and script; its policy allows no others."""
    style, script = read_source("style.css").strip(), read_source("report.js").strip()
    # Both come from this package and contain no foreign text. The page may load nothing and run nothing else.
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return render("page.html.j2", page=page, style=Markup(style), script=Markup(script), policy=policy)


def render_markdown(page: Page) -> str:
    """Return the page as GitHub-flavoured Markdown, without gaps for parts that it leaves out."""
    return re.sub(r"\n{3,}", "\n\n", render("page.md.j2", page=page)).rstrip("\n") + "\n"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


FORMATS = (".html", ".md", ".json")
# Marks that identify a page of this tool, within this many bytes of its beginning or end.
_MARKED_WITHIN = 1 << 16
_MARKS = {
    ".html": re.compile(rb'<p class="brand"><b>compressknow</b>'),
    ".md": re.compile(rb"^- Versions: compressknow ", re.MULTILINE),
    ".json": re.compile(rb'\A\{\s*"schema": ?\d+,\s*"verdict": ?"'),
    ".csv": re.compile(rb"\Aname,group,stack,layer,module,"),
    ".xml": re.compile(rb'<testsuites name="compressknow"'),
}


def require_for(outputs: Sequence[Path], *modules: str) -> None:
    """Raise CompressknowError if these libraries are missing, or matplotlib, which draws the charts of an HTML page."""
    drawn = any(path.suffix.lower() == ".html" for path in outputs)
    require(*modules, *(["matplotlib"] if drawn else []))


def check_outputs(outputs: Sequence[Path], *, overwrite: bool, formats: Sequence[str] = FORMATS) -> None:
    """Raise if an output has an unknown format, exists, would replace something else, or cannot be written."""
    for path in outputs:
        if path.suffix.lower() not in formats:
            raise UsageError(
                f"{path}: the name of a report must end in {', '.join(formats[:-1])} or {formats[-1]}.",
                hint="Give -o several times for several formats.",
            )
        check_links(path)
        if path.exists():
            _check_ours(path)
            if not overwrite:
                raise OutputError(f"{path} exists already.", hint="Choose another name, or pass --overwrite.")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: no such folder.", hint="Create it first, or choose another folder.")
        check_writable(path)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise UsageError("Two reports have the same name.", hint="Give each -o a different name.")


def _check_ours(path: Path) -> None:
    """Raise OutputError for a file that is not a report, or one in a checkpoint: not even --overwrite replaces it."""
    if (path.resolve().parent / "config.json").exists():
        hint = "Choose a name outside the checkpoint."
        raise OutputError(f"{path} is in a checkpoint folder: not overwritten.", hint=hint)
    if not path.is_file() or not _is_marked(path):
        hint = "Remove it yourself, or choose another name."
        raise OutputError(f"{path} exists already, and was not written by compressknow: not overwritten.", hint=hint)


def _is_marked(path: Path) -> bool:
    with open_regular(path) as file:
        beginning = file.read(_MARKED_WITHIN)
        file.seek(max(0, path.stat().st_size - _MARKED_WITHIN))
        return any(_MARKS[path.suffix.lower()].search(piece) for piece in (beginning, file.read()))


def write_files(texts: Mapping[str, Callable[[], str]], paths: Iterable[Path], *, overwrite: bool) -> None:
    """Write files atomically; `texts` has a function that returns the text for each file name or suffix. None appears
    until all are on the disk, which may be full.

    Raises OutputError if a file was created since `check_outputs` and must not be overwritten.
    """
    written = {path: (texts.get(path.name) or texts[path.suffix.lower()])() for path in paths}
    with hold_signals(), ExitStack() as files:
        for path, text in written.items():
            file = files.enter_context(open_whole(path))
            file.write(text.encode("utf-8"))
            close_durably(file)
        if not overwrite and (existing := next(filter(os.path.lexists, written), None)):
            raise OutputError(f"{existing} exists already.", hint="Choose another name, or pass --overwrite.")
