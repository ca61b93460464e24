"""Write the golden files of the report tests again, after a change of a template that is meant."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressknow.report.card.pages import render_html, render_markdown  # noqa: E402
from compressknow.report.model_card import render_model_card  # noqa: E402
from tests.report.card.cards import card_of_one  # noqa: E402
from tests.report.card.test_html import GOLDEN as CARD_PAGE  # noqa: E402
from tests.report.card.test_markdown import GOLDEN as CARD_MARKDOWN  # noqa: E402
from tests.report.model_card.manifests import manifest  # noqa: E402
from tests.report.model_card.test_render import GOLDEN as MODEL_CARDS  # noqa: E402
from tests.report.model_card.test_render import SOURCE_CARD  # noqa: E402

files = {
    MODEL_CARDS / f"model_card_{scheme or 'pruned'}.md": render_model_card(
        manifest(scheme=scheme), source_card_metadata=SOURCE_CARD
    )
    for scheme in ("int8", None)
}
files |= {CARD_PAGE: render_html(card_of_one()), CARD_MARKDOWN: render_markdown(card_of_one())}
for path, text in files.items():
    path.write_text(text, encoding="utf-8")
    print(path.relative_to(ROOT))
