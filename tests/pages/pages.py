"""A parser of HTML pages: elements, their attributes and their text."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of the element, with no-break spaces as spaces."""
        text = "".join(child if isinstance(child, str) else child.text for child in self.children)
        return text.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag: str | None = None) -> list[Element]:
        """Return the descendants in order, or only those with this tag."""
        elements = []
        for child in self.children:
            if isinstance(child, Element):
                elements += [child] if tag in (None, child.tag) else []
                elements += child.all(tag)
        return elements

    def one(self, tag: str) -> Element:
        (only,) = self.all(tag)
        return only

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        """The tags and attribute names, which hostile text must not change."""
        # Right-to-left letters are isolated by an additional <bdi>.
        return [(element.tag, tuple(element.attributes)) for element in self.all() if element.tag != "bdi"]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.current = Element("", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"duplicate attribute: {tag} {attrs}"
        element = Element(tag, {name: value or "" for name, value in attrs}, self.current)
        self.current.children.append(element)
        if tag not in VOID:
            self.current = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.current.tag == tag, f"</{tag}> closes <{self.current.tag}>"
        assert self.current.parent is not None
        self.current = self.current.parent

    def handle_data(self, data: str) -> None:
        self.current.children.append(data)


def parse_html(page: str) -> Element:
    """Return the root element of a page; raise AssertionError if tags are not closed in order."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.current is reader.root, f"<{reader.current.tag}> is never closed"
    return reader.root
