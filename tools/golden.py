"""Write the golden files of the report tests again, after a change of a template that is meant."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compressknow.report.model_card import render_model_card  # noqa: E402
from tests.report.manifests import manifest  # noqa: E402
from tests.report.test_model_card import GOLDEN, SOURCE_CARD  # noqa: E402

GOLDEN.mkdir(exist_ok=True)
for scheme in ("int8", None):
    card = render_model_card(manifest(scheme=scheme), source_card_metadata=SOURCE_CARD)
    golden = GOLDEN / f"model_card_{scheme or 'pruned'}.md"
    golden.write_text(card, encoding="utf-8")
    print(golden.relative_to(ROOT))
