"""Write the golden files of the report tests again, after a change of a template that is meant."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressknow.report.html import render_html  # noqa: E402
from compressknow.report.markdown import render_markdown  # noqa: E402
from compressknow.report.model_card import render_model_card  # noqa: E402
from tests.report.cards import card_of_one  # noqa: E402
from tests.report.manifests import manifest  # noqa: E402
from tests.report.test_model_card import GOLDEN, SOURCE_CARD  # noqa: E402

GOLDEN.mkdir(exist_ok=True)
texts = {
    f"model_card_{scheme or 'pruned'}.md": render_model_card(manifest(scheme=scheme), source_card_metadata=SOURCE_CARD)
    for scheme in ("int8", None)
}
texts |= {"report.html": render_html(card_of_one()), "report.md": render_markdown(card_of_one())}
for name, text in texts.items():
    (GOLDEN / name).write_text(text, encoding="utf-8")
    print((GOLDEN / name).relative_to(ROOT))
