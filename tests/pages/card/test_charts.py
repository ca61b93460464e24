"""The charts of a report card: what they show, their colours, and how they show names."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from compressknow.base.format import clean, share
from compressknow.comparison.records import Counts, Estimate, Group
from compressknow.evaluate.records import NoiseFloor
from compressknow.pages.card.pages import chart_costs, chart_setups, render_html, split_setups
from compressknow.pages.card.sections.facts import chart_popularity
from compressknow.pages.card.warnings import estimate_rounding_kept
from compressknow.pages.records import Comparison, name_models
from tests.pages.card.cards import POPULARITY, make_card_of_several, make_group
from tests.pages.hostile import HOSTILE_TEXTS


def make_bins(name: str = "{}") -> tuple[Group, ...]:
    return tuple(make_group(name.replace("{}", bin), counts) for bin, counts in POPULARITY)


def read_texts(chart: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(chart).iter("text")]


def draw_popularity(groups: tuple[Group, ...], id: str, name: str) -> str:
    chart = chart_popularity(groups, name)
    assert chart is not None
    return chart.draw_svg(id).svg


def draw_setups(name: str | None = None) -> tuple[str, ...]:
    comparisons = make_card_of_several((20, 40)).comparisons
    if name is not None:
        comparisons = tuple(replace(c, model=replace(c.model, setup=name)) for c in comparisons)
    names = [clean(c.model.setup, 80) for c in comparisons]
    return chart_setups(comparisons, names, "overview")


def test_popularity_chart_has_the_bins_and_their_figures() -> None:
    chart = draw_popularity(make_bins(), "p1", "atlas")
    assert {"top 20 %", "bottom 20 %", "79.4 %", "97.9 %"} <= set(read_texts(chart))
    description = str(ElementTree.fromstring(chart).findtext("desc"))
    assert description.startswith("From left to right: top 20 % 97.9 %, 20 to 40 % 95.5 %")


def test_no_popularity_chart_for_fewer_than_two_bins() -> None:
    nothing_known = Group("x", Counts(neither=3), (), Estimate(None), None, None, None)
    assert chart_popularity((make_bins()[0], nothing_known), "atlas") is None
    assert chart_popularity((), "atlas") is None


def test_pruned_amounts_are_lines_and_other_setups_are_bars() -> None:
    comparisons = make_card_of_several((20, 40)).comparisons
    lines, others = split_setups(comparisons)
    assert [line.scope for line in lines] == ["Att_GP", "Att_GPQ", "FF_GP", "FF_GPQ", "All_GP", "All_GPQ"]
    assert [[amount for amount, _ in line.points] for line in lines] == [[20, 40]] * 6
    # At 0 %, a model that is quantized too is not the original.
    assert [line.is_from_original for line in lines] == [True, False] * 3
    # Whatever the order of the models, a line runs from the smallest amount to the largest.
    backwards, _ = split_setups(comparisons[::-1])
    assert {line.scope: line.points for line in backwards} == {line.scope: line.points for line in lines}
    assert [comparisons[index].model.setup for index in others] == ["Att_GQ", "FF_GQ", "All_GQ"]
    by_amount, bars = draw_setups()
    assert {"Att_GP", "All_GPQ", "40 %"} <= set(read_texts(by_amount))
    assert {"Att_GQ", "97.8 %"} <= set(read_texts(bars))


def test_each_comparison_is_drawn_once() -> None:
    comparisons = make_card_of_several((20, 40)).comparisons
    twice = (*comparisons, *comparisons)
    lines, others = split_setups(twice)
    assert sum(len(line.points) for line in lines) + len(others) == len(twice)
    assert len(name_models(replace(make_card_of_several((20, 40)), comparisons=twice))) == len(twice)


def test_too_many_bars_are_not_drawn() -> None:
    comparisons = make_card_of_several((20, 40)).comparisons[:1] * 20
    comparisons = tuple(replace(c, model=replace(c.model, setup=None)) for c in comparisons)
    assert chart_setups(comparisons, ["x"] * 20, "overview") == ()
    assert len(chart_setups(comparisons[:5], ["x"] * 5, "overview")) == 1


def make_comparisons(*floors: NoiseFloor | None) -> tuple[Comparison, ...]:
    """Return several compressed models whose two probes have these noise floors."""
    comparisons = make_card_of_several((20, 40)).comparisons
    return tuple(
        replace(c, probes=tuple(replace(p, noise_floor=floor) for p, floor in zip(c.probes, floors, strict=True)))
        for c in comparisons
    )


def test_chart_of_speeds_names_the_runtimes() -> None:
    card = make_card_of_several()
    sized, timed = chart_costs(card, name_models(card))
    assert (sized.more_is_better, timed.more_is_better) == (False, True)
    assert list(timed.looks) == ["in transformers, bfloat16", "in llama.cpp b1"]
    assert list(sized.looks) == ["in transformers", "in llama.cpp", "the original, in transformers"]
    # The original is not among the models that the line joins.
    assert list(sized.edge) == ["in transformers", "in llama.cpp"]
    (mark,) = [mark for mark in timed.marks if mark.kind == "in llama.cpp b1"]
    kept = card.comparisons[int(mark.label) - 1].kept
    assert mark.kept == kept
    assert f"({share(kept.low).removesuffix(' %')} to {share(kept.high)})" in mark.tooltip
    assert '<th scope="col">Timed in</th>' in render_html(card)


def test_chart_of_sizes_has_the_models_of_every_runtime() -> None:
    card = make_card_of_several()
    runtimes = [{"name": f"runtime {i % 6}", "build": None} for i in range(len(card.comparisons))]
    pairs = zip(card.comparisons, runtimes, strict=True)
    card = replace(card, comparisons=tuple(replace(c, model=replace(c.model, runtime=runtime)) for c, runtime in pairs))
    sized, _ = chart_costs(card, name_models(card))
    assert {mark.kind for mark in sized.marks} == set(sized.looks)


def test_rounding_line_needs_a_noise_floor_of_every_probe() -> None:
    few, many = (NoiseFloor(100, 9, 40, lost, 0, None, "float32") for lost in (1, 4))
    comparisons = make_comparisons(few, many)
    known = [probe.counts.known_before for probe in comparisons[0].probes]
    kept = sum(each * share for each, share in zip(known, (0.975, 0.9), strict=True)) / sum(known)
    for chart in chart_setups(comparisons, name_models(make_card_of_several((20, 40))), "overview"):
        assert "rounding alone" in read_texts(chart)
        assert f"rounding alone: {100 * kept:.1f} %." in "".join(ElementTree.fromstring(chart).itertext())
    nothing_known = replace(few, known=0, lost=0)
    for floors in ((few, None), (None, many), (None, None), (few, nothing_known)):
        without = make_comparisons(*floors)
        assert estimate_rounding_kept(without[0].probes).value is None
        assert "rounding" not in "".join(chart_setups(without, name_models(make_card_of_several((20, 40))), "overview"))


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_names_stay_text(text: str) -> None:
    shown = draw_popularity(make_bins(text + "{}"), "p1", text)
    harmless = draw_popularity(make_bins("harmless {}"), "p1", "atlas")
    tags = [[element.tag for element in ElementTree.fromstring(chart).iter()] for chart in (shown, harmless)]
    assert tags[0] == tags[1]
    assert clean(text + "top 20 %", 16) in read_texts(shown)
    assert clean(text, 60) in "".join(ElementTree.fromstring(shown).itertext())
    if "%" not in text:
        assert len(draw_setups(text)) == 1


def test_dollar_signs_are_not_read_as_a_formula() -> None:
    chart = draw_popularity(make_bins("$x^2$ \\$ {}"), "p1", "atlas")
    assert clean("$x^2$ \\$ top 20 %", 16) in read_texts(chart)


def test_colours_are_classes_and_nothing_is_styled_inline() -> None:
    for chart in draw_setups():
        root = ElementTree.fromstring(chart)
        for element in root.iter():
            assert "style" not in element.attrib
            assert not [value for value in element.attrib.values() if re.fullmatch("#[0-9a-f]{6}", value)]
            assert set(element.get("class", "").split()) <= {
                "chart",
                *(f"{kind}-{name}" for kind in "fs" for name in "ink muted rule paper c1 c2 c3 c4 c5 c6".split()),
            }
        assert not root.findall(".//style")
        assert not root.findall(".//metadata")


def test_ids_begin_with_that_of_the_chart_and_every_reference_resolves() -> None:
    for id in ("p1", "p2"):
        chart = draw_popularity(make_bins(), id, "atlas")
        ids = re.findall(r' id="(.*?)"', chart)
        assert len(ids) == len(set(ids))
        assert all(each.startswith(id) for each in ids)
        assert set(re.findall(r'href="#(.*?)"', chart)) | set(re.findall(r"url\(#(.*?)\)", chart)) <= set(ids)


def test_same_figures_give_the_same_bytes_in_another_process() -> None:
    code = "from tests.pages.card.test_charts import *; print(draw_popularity(make_bins(), 'p', 'a'), *draw_setups())"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert "matplotlib" not in runs[0].lower()


def test_matplotlib_is_not_imported_until_a_chart_is_drawn() -> None:
    code = "import sys, compressknow.pages.card.pages; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_charts_of_costs_have_a_rounding_line() -> None:
    card = make_card_of_several()
    names = name_models(card)
    assert [chart.rounding for chart in chart_costs(card, names)] == [
        estimate_rounding_kept(card.comparisons[0].probes).value
    ] * 2
    assert "The dotted line shows what rounding alone keeps." in render_html(card)
    assert "The line across the charts shows what rounding alone keeps" in render_html(card)
    without = tuple(
        replace(each, probes=tuple(replace(probe, noise_floor=None) for probe in each.probes))
        for each in card.comparisons
    )
    assert "what rounding alone keeps" not in render_html(replace(card, comparisons=without))
