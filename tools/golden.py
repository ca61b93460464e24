"""Regenerate the golden files of the page tests, after an intended change of a template."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for path, text in render_pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


def render_pages() -> dict[Path, str]:
    """Return the text of each golden file."""
    sys.path.insert(0, str(ROOT))
    from compressknow.pages.card.pages import render_html, render_markdown
    from compressknow.pages.model_card import render_model_card
    from tests.pages.card.cards import make_card_of_one
    from tests.pages.card.test_html import GOLDEN as CARD_PAGE
    from tests.pages.card.test_markdown import GOLDEN as CARD_MARKDOWN
    from tests.pages.model_card.manifests import make_manifest
    from tests.pages.model_card.test_render import GOLDEN as MODEL_CARDS
    from tests.pages.model_card.test_render import SOURCE_CARD

    model_cards = {
        MODEL_CARDS / f"model_card_{scheme or 'pruned'}.md": render_model_card(
            make_manifest(scheme=scheme), source_card_metadata=SOURCE_CARD
        )
        for scheme in ("int8", None)
    }
    card = make_card_of_one()
    return model_cards | {CARD_PAGE: render_html(card), CARD_MARKDOWN: render_markdown(card)}


if __name__ == "__main__":
    main()
