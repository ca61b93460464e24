"""The JSON of a card: stable keys, counts behind every ratio, and no text of hidden facts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from scipy.stats import binomtest

from compressknow.base.errors import CompressknowError
from compressknow.comparison.paired import Standing
from compressknow.pages.as_json import dump_model
from compressknow.pages.card.make import make_card
from compressknow.pages.records import Recommendation, name_models
from tests.pages.answering import make_answers, make_entry, make_model, make_rows, make_runs
from tests.pages.card.cards import make_card_of_one, make_card_of_several

# Programs rely on these keys.
PROBE_KEYS = {
    *("n", "both", "lost", "gained", "neither", "accuracy_original", "accuracy_compressed", "kept", "kept_interval"),
    *("mcnemar_p", "flips", "answer_changed", "kl_mean", "by_relation", "by_subject"),
}


def make_report(*cells: int, show_facts: bool = True, **changes: Any) -> dict[str, Any]:
    original, compressed = make_runs(make_rows(*cells, **changes))
    return make_card(original, [compressed], show_facts=show_facts).to_dict()


def test_json_has_the_documented_keys() -> None:
    report = make_report(80, 10, 5, 5)
    assert {"schema", "verdict", "original", "compressed"} <= set(report)
    (compressed,) = report["compressed"]
    assert {"setup", "source", "probes", "grades"} <= set(compressed)
    assert set(compressed["probes"]) == {"atlas"}
    assert set(compressed["probes"]["atlas"]) >= PROBE_KEYS
    assert compressed["grades"] == {"geography": "C"}
    assert report["schema"] == 1


def test_models_have_the_keys_that_they_have_in_other_pages() -> None:
    card = make_card_of_one()
    report = card.to_dict()
    for model, record in (
        (report["original"], card.original),
        (report["compressed"][0]["model"], card.comparisons[0].model),
    ):
        assert model == dump_model(record)
        assert model["runtime"] is None


def test_figures_follow_from_the_counts() -> None:
    probe = make_report(80, 10, 5, 5)["compressed"][0]["probes"]["atlas"]
    assert [probe[key] for key in ("n", "both", "lost", "gained", "neither")] == [100, 80, 10, 5, 5]
    assert (probe["accuracy_original"], probe["accuracy_compressed"]) == (0.9, 0.85)
    assert probe["kept"] == pytest.approx(80 / 90)
    assert probe["kept_interval"][0] < 80 / 90 < probe["kept_interval"][1]
    assert probe["flips"] == 0.15
    assert sum(group["n"] for group in probe["by_relation"].values()) == 100


def test_figures_are_under_their_own_names() -> None:
    card = make_card_of_one()
    probe = card.comparisons[0].probes[0]
    values = card.to_dict()["compressed"][0]["probes"]["atlas"]
    assert probe.knowing is not None
    assert values["knowing"]["with_example"] == {"n": probe.knowing.shown, "produced": probe.knowing.back}
    assert values["knowing"]["moved"]["produced>demoted"] == probe.knowing.moved["produced", "demoted"] > 0
    assert values["knowing"]["moved"]["demoted>produced"] == 0
    assert probe.confidence is not None
    for third in probe.confidence.thirds:
        assert values["by_confidence"][third.name]["confidence"] == [third.low, third.high]
    sides = (probe.confidence.reliability_original, probe.confidence.reliability_compressed)
    for name, bins in zip(("reliability_original", "reliability_compressed"), sides, strict=True):
        assert [(each["facts"], each["right"]) for each in values[name]] == [(each.facts, each.right) for each in bins]
    assert sides[0] != sides[1]
    # The smallest of several p-values is multiplied by their number.
    relations = values["by_relation"].values()
    exact = [binomtest(each["lost"], n).pvalue for each in relations if (n := each["lost"] + each["gained"])]
    adjusted = [each["mcnemar_p_holm"] for each in relations if each["mcnemar_p_holm"] is not None]
    assert min(adjusted) == pytest.approx(min(1, min(exact) * len(exact)))
    assert min(exact) < min(adjusted)


@pytest.mark.parametrize("cells", [(0, 0, 0, 0), (0, 0, 0, 5), (5, 0, 0, 0), (0, 5, 0, 0), (80, 10, 5, 5)])
def test_json_is_strict_for_any_counts(cells: tuple[int, ...]) -> None:
    report = make_report(*cells)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_json_is_strict_for_a_model_with_nan() -> None:
    before, after = make_rows(30, 5)
    broken = {"logp_gold": math.nan, "top5_logp": (math.nan,) * 5, "first_logp": (math.nan,) * 2}
    original, compressed = make_runs((before, [replace(row, **broken) for row in after]))
    report = make_card(original, [compressed]).to_dict()
    json.dumps(report, allow_nan=False)
    assert report["compressed"][0]["probes"]["atlas"]["kl_mean"] is None


def test_recommendation_names_all_models_that_no_test_distinguishes() -> None:
    card = make_card_of_several((20,))
    standings = [Standing(9, None, False, (1, 2)), *(Standing(8, 0, True, ()) for _ in card.comparisons[1:])]
    names = name_models(card)
    recommended = replace(card, decision=Recommendation(0, "Reason.", tuple(standings), 500)).to_dict()["recommended"]
    assert (recommended["model"], recommended["within"]) == (names[0], 500)
    first, second, *_ = recommended["standings"]
    assert (first["not_told_from"], first["beaten_by"]) == ([names[1], names[2]], None)
    assert (second["not_told_from"], second["beaten_by"], second["surely"]) == ([], names[0], True)


def test_order_of_answers_does_not_change_the_json() -> None:
    original, compressed = make_runs(make_rows(50, 10, 5, 20))
    reordered = [make_answers(reversed(side.answers), side.record.model) for side in (original, compressed)]
    pairs = ((original, compressed), reordered)
    texts = [json.dumps(make_card(before, [after]).to_dict()) for before, after in pairs]
    assert texts[0] == texts[1]


def test_json_lists_all_changed_facts() -> None:
    (compressed,) = make_report(5, 3, 2)["compressed"]
    assert len(compressed["lost_facts"]) == 3
    assert len(compressed["gained_facts"]) == 2
    assert compressed["lost_facts"][0]["gold"] == "Paris"


def test_hidden_facts_leave_no_text_in_the_json() -> None:
    secret = {
        "sub_label": "SECRET subject",
        "prompt": "SECRET prompt [MASK].",
        "gold": "SECRET gold",
        "predicted": "SECRET answer",
        "top5": ("SECRET answer",) * 5,
        "fact_id": "SECRET",
    }
    rows = [
        [replace(row, **secret | {"fact_id": f"SECRET {row.fact_id}"}) for row in side] for side in make_rows(5, 3, 2)
    ]
    original, compressed = make_runs(rows)
    text = json.dumps(make_card(original, [compressed], show_facts=False).to_dict())
    assert "SECRET" not in text
    assert '"by_relation": {"relation":' in text
    assert "SECRET" in json.dumps(make_card(original, [compressed]).to_dict())


def test_json_has_the_source_and_the_command() -> None:
    rows = make_rows(5)
    converted = make_model(sha256="b" * 64, setup="Att_GQ", source={"name": "tiny-bert", "revision": None}, zeros=7)
    answers = make_answers(rows[0]), [make_answers(rows[1], converted)]
    report = make_card(*answers, command="compressknow report a b").to_dict()
    assert report["compressed"][0]["source"] == {"name": "tiny-bert", "revision": None}
    assert report["compressed"][0]["model"]["zeros"] == 7
    assert report["command"] == "compressknow report a b"


def test_dropped_facts_are_counted_by_reason() -> None:
    rows = make_rows(5)
    probes = {"atlas": make_entry(facts=8, dropped={"several tokens": 2, "ambiguous": 1})}
    report = make_card(
        make_answers(rows[0], probes=probes), [make_answers(rows[1], make_model(sha256="b" * 64), probes)]
    ).to_dict()
    assert report["compressed"][0]["probes"]["atlas"]["dropped"] == {"ambiguous": 1, "several tokens": 2}


def test_data_frame_has_the_figures_of_the_json(monkeypatch: pytest.MonkeyPatch) -> None:
    card = make_card_of_several()
    assert [each["setup"] for each in card.to_dict()["compressed"]] == [each.model.setup for each in card.comparisons]
    frame = card.to_frame()
    assert list(zip(frame["model"], frame["probe"], frame["kept"], frame["lost"], strict=True)) == [
        (each.model.name, probe.probe, probe.kept.value, probe.counts.lost)
        for each in card.comparisons
        for probe in each.probes
    ]
    probes = [probe for each in card.to_dict()["compressed"] for probe in each["probes"].values()]
    for column in ("p", "mcnemar_p"):
        assert list(frame[column]) == [probe[column] for probe in probes]
    monkeypatch.setattr("compressknow.base.packages.is_installed", lambda _: False)
    with pytest.raises(CompressknowError, match="pip install pandas"):
        card.to_frame()
