"""The map of a sensitivity as a page, Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from compressknow.base.errors import OutputError
from compressknow.pages.pages import check_outputs
from compressknow.study.allocation import TypeOption
from compressknow.study.map import FORMATS, Map, compute_kl_per_mb, compute_risk, write_map, write_verdict
from compressknow.study.sensitivity import Sensitivity
from tests.long import one_in
from tests.pages.hostile import HOSTILE_TEXTS
from tests.pages.in_browser import find_cut_texts, find_overlaps, find_violations, measure_overflow, unfold
from tests.pages.maps import TYPES, make_row, make_sensitivity, render_map_html, render_map_markdown
from tests.pages.pages import parse_html

if TYPE_CHECKING:
    from playwright.sync_api import Page


def make_map(**changes: Any) -> Map:
    return Map("tiny", make_sensitivity(**changes), "both")


def test_page_has_maps_for_all_facts_text_and_each_domain_on_one_scale() -> None:
    page = parse_html(render_map_html(make_map(domains={"geography": 25, "science": 40})))
    maps = [svg for svg in page.all("svg") if "heat" in svg.attributes["class"]]
    assert [svg.attributes["id"] for svg in maps] == ["map-0", "map-1", "map-2", "map-3", "risk-map"]
    # Six layers have three cells each, and the head has one; the legend has seven shades.
    assert all(len(svg.all("rect")) == 6 * 3 + 1 + 7 for svg in maps)
    legends = [[text.text for text in svg.all("text")][-6:] for svg in maps]
    assert legends[0] == legends[1] == legends[2] == legends[3] != legends[4]
    # Larger losses are darker, on the same scale in all maps.
    darkest = [max(float(rect.attributes["opacity"]) for rect in svg.all("rect")[:-7]) for svg in maps[:4]]
    assert darkest[3] >= darkest[0] > darkest[1] >= darkest[2]
    titles = [each.text for each in page.all("figcaption")]
    assert titles == ["All 120 facts", "Text", "Science: 40 facts", "Geography: 25 facts"]
    assert page.one("h1").text == "Layer 2 self_attn.v_proj matters most for its size"


def test_page_lists_the_most_and_least_sensitive_weights() -> None:
    page, map = parse_html(render_map_html(make_map())), make_map()
    tables = {table.one("caption").text: table for table in page.all("table")}
    most, least = (
        [row.one("th").text for row in table.one("tbody").all("tr")]
        for caption, table in tables.items()
        if "sensitive weights" in caption
    )
    assert most[0] == "layer 2 self_attn.v_proj"
    assert least[0] == "layer 0 self_attn.q_proj"
    assert len(most) == 10
    assert set(most).isdisjoint(least)
    assert len(most) + len(least) == len(map.ranked)
    modules = tables["Modules, over all layers"].one("tbody").all("tr")
    assert [row.one("th").text for row in modules] == ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "final"]
    layers = tables["Layers, over all their modules"].one("tbody").all("tr")
    assert [row.one("th").text for row in layers] == [*(f"layer {n}" for n in range(6)), "final"]


def test_verdict_and_tables_have_the_figures_that_a_hand_computes() -> None:
    """In q4_0 the weights lose 390 times 0.96 thousandths of a nat, of which layer 2's v_proj has 160, the next one 48,
    the median 8 and the head 2. Each saves 0.376832 MB, and loses a share of 0.00192 of the facts 390 times in all.

    All change geography most, but layer 2's v_proj changes science more than others do: 0.8 times the mean, and all
    weights together 0.623 times (0.8 for 160 of 390 parts of the loss, 0.5 for the others)."""
    assert write_verdict(make_map()) == (
        "Rounding it to q4_0 costs a KL of 408 thousandths of a nat per MB saved, 20 times the median weight. The "
        "tenth of the bytes that matters most causes 52.1 % of the loss. For its size, layer 2 matters most of all "
        "layers, and final least."
    )
    other = {"geography": 1.2, "science": 0.8}
    rows = [
        replace(row, by_domain=other) if (row.place, row.module) == ("layer 2", "self_attn.v_proj") else row
        for row in make_sensitivity().rows
    ]
    text = render_map_markdown(make_map(rows=tuple(rows))).replace("\\_", "_")
    assert "x 2 means that, relative to all facts, it changes those of the domain twice as much as all weights" in text
    # Of 1 and a half, facts have 1.
    assert "Of the sum over all weights in q4_0, facts are 66.7 %." in text
    assert "66.7 %" not in render_map_markdown(Map("tiny", make_sensitivity(), "facts"))
    for row in (
        "layer 2 self_attn.v_proj | 408 | 30.7 % | 147.5 kB q4_0 | science (x 1.3)",
        "layer 5 self_attn.v_proj | 122 | 9.2 % | 147.5 kB q4_0 | geography (x 1.1)",
        "self_attn.v_proj | 129 | 58.4 % | 31.6 %",
        "q4_0 | 2.8 MB | 0.374 | 0.153",
        "2.2 MB | 1.755 | 1,682",
    ):
        assert f"| {row} |" in text
    head, *others = make_sensitivity().rows
    text = render_map_markdown(make_map(rows=(replace(head, shape=(1024, 1024)), *others)))
    # It saves 1.949696 of 8.732672 MB.
    assert "| final | 0.98 | 0.4 % | 22.3 % |" in text
    by_facts = Map("tiny", make_sensitivity(), "facts")
    assert by_facts.frontier[-1].loss == by_facts.uniform["q8_0"].loss == pytest.approx(390e-5)


def test_marks_and_figures_of_small_risks_differ() -> None:
    rows = make_sensitivity().rows
    shrunk = (
        replace(
            row, by_type={kind: replace(each, at_risk=(each.at_risk or 0) / 1000) for kind, each in row.by_type.items()}
        )
        for row in rows
    )
    page = parse_html(render_map_html(make_map(rows=tuple(shrunk))))
    risk_map = next(svg for svg in page.all("svg") if svg.attributes.get("id") == "risk-map")
    assert len({text.text for text in risk_map.all("text")[-6:]}) == 6
    table = next(each for each in page.all("table") if each.one("caption").text.startswith("Facts at risk by layer"))
    assert table.all("td")[0].text == "1.9e-04"


def test_frontier_has_the_least_loss_and_uniform_types_are_no_better() -> None:
    map = make_map()
    sizes, losses = zip(*map.frontier, strict=True)
    assert list(sizes) == sorted(sizes)
    assert list(losses) == sorted(losses, reverse=True)
    uniform = map.uniform
    assert list(uniform) == list(TYPES)
    rows = map.sensitivity.rows
    assert uniform["q4_0"] == TypeOption(
        2 * 5000 + sum(row.by_type["q4_0"].bytes for row in rows),
        pytest.approx(sum(row.by_type["q4_0"].kl() for row in rows)),
    )
    assert all(map.at(each.nbytes).loss <= each.loss for each in uniform.values())
    assert map.at(uniform["q4_0"].nbytes).loss < 0.9 * uniform["q4_0"].loss
    assert map.frontier[0].nbytes == uniform["q3_k"].nbytes
    assert map.frontier[-1].nbytes == uniform["q8_0"].nbytes


def test_next_mb_saves_what_the_best_file_of_one_mb_more_does_not_lose() -> None:
    """Also if sizes are less than 1 MB apart, as in 6 layers; in 60, they are up to 2.5 MB apart."""
    for layers in (6, 60):
        map = make_map(layers=layers)
        table = render_map_markdown(map).partition("The next MB saves")[2].partition("\n\n")[0]
        rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
        assert len(rows) == len(map.frontier) == 20
        assert rows[-1][2] == "\\-"
        for (size, loss), row in zip(map.frontier[:-1], rows, strict=False):
            saved = float(row[2].replace(",", "")) / 1000
            assert saved <= loss
            assert saved == pytest.approx(loss - map.at(size + 10**6).loss, rel=0.1 if layers == 6 else 0.35)


def test_types_of_a_checkpoint_are_chosen_as_in_a_search() -> None:
    guidance = replace(make_sensitivity().guidance, form="checkpoint")
    several, one = (make_map(guidance=replace(guidance, has_one_type=each)) for each in (False, True))
    # Two projections of a layer share a type; the head stays as it is.
    assert len(several.table) == 6 * 2
    blocks = make_sensitivity().rows[1:]
    q8_0 = 2 * (5000 + 256 * 1024) + sum(row.by_type["q8_0"].bytes for row in blocks)
    for map in (several, one):
        assert map.frontier[-1].nbytes == map.uniform["q8_0"].nbytes == q8_0
        assert map.frontier[0].nbytes == map.uniform["q3_k"].nbytes
    # Below, one weight of q6_k is enough if there may be several types; otherwise, none has more than 6.6 bits.
    assert one.at(q8_0 - 1).loss > 2 * several.at(q8_0 - 1).loss
    assert "transformers loads no two schemes" in render_map_markdown(one)
    assert "transformers loads no two schemes" not in render_map_markdown(several)


def test_type_that_does_not_fit_every_row_uses_llama_cpps_fallback_or_is_left_out() -> None:
    rows = make_sensitivity().rows
    narrow = {kind: each for kind, each in rows[1].by_type.items() if kind in ("q8_0", "q4_0")}
    map = make_map(rows=(rows[0], replace(rows[1], by_type=narrow)))
    uniform = map.uniform
    # q6_k falls back to q8_0; the fallbacks of q4_k and q3_k, q5_0 and iq4_nl, were not measured.
    assert list(uniform) == ["q8_0", "q6_k", "q4_0"]
    assert uniform["q6_k"].loss == pytest.approx(rows[0].by_type["q6_k"].kl() + narrow["q8_0"].kl())


def test_kl_per_mb_and_risk_of_several_weights_count_all_of_them() -> None:
    one, other = make_sensitivity().rows[1:3]
    # Rounding from 16 to 4.5 bits saves 11.5 bits.
    facts, text = (one.by_type["q4_0"].kl(guide) for guide in ("facts", "text"))
    assert one.per_mb() == pytest.approx((facts + text) / (256 * 1024 * 11.5 / 8 / 1e6))
    assert one.by_type["q4_0"].kl("both", 0.5) == pytest.approx(facts + 0.5 * text)
    assert compute_kl_per_mb([one], "both") == pytest.approx(one.per_mb())
    both = compute_kl_per_mb([one, other], "both")
    assert both == pytest.approx((one.per_mb() + other.per_mb()) / 2)
    assert compute_kl_per_mb([one], "facts", "geography") == pytest.approx(1.5 * one.per_mb("facts"))
    assert compute_risk([one] * 100) == 1.0
    assert compute_risk([one, other]) == pytest.approx(one.by_type["q4_0"].at_risk + other.by_type["q4_0"].at_risk)  # type: ignore[operator]


def test_map_without_facts_shows_only_text() -> None:
    rows = tuple(
        replace(
            row,
            by_domain={},
            by_type={kind: replace(each, facts=None, at_risk=None) for kind, each in row.by_type.items()},
        )
        for row in make_sensitivity().rows
    )
    guidance = replace(make_sensitivity().guidance, facts=0, fingerprint=None)
    map = Map("tiny", make_sensitivity(rows=rows, domains={}, guidance=guidance), "text")
    page = parse_html(render_map_html(map))
    assert [svg.attributes["id"] for svg in page.all("svg") if "heat" in svg.attributes["class"]] == ["map-0"]
    assert "Facts at risk" not in [each.text for each in page.all("h2")]
    assert "None" not in render_map_markdown(map)
    assert repr(map.sensitivity).startswith("<Sensitivity: 19 weights of ")


def test_grid_separates_encoder_and_decoder_layers() -> None:
    rows = tuple(
        make_row(name, layer=layer, base=1e-5, stack=stack)
        for stack in ("decoder", "encoder")
        for layer in (1, 0)
        for name in ("layer.SelfAttention.q", "layer.EncDecAttention.q")
        if stack == "decoder" or "Self" in name
    )
    map = make_map(rows=rows)
    grid = map.grid(lambda rows: compute_kl_per_mb(rows, "both"))
    assert grid.rows == ("encoder 0", "encoder 1", "decoder 0", "decoder 1")
    assert grid.columns == ("SelfAttention.q", "EncDecAttention.q")
    assert [cell is None for cell in grid.cells[0]] == [False, True]


def test_files_of_all_formats_are_written_and_recognized(tmp_path: Path) -> None:
    files = [tmp_path / f"map{suffix}" for suffix in FORMATS]
    write_map(make_map(), files, overwrite=False)
    check_outputs(files, overwrite=True, formats=FORMATS)
    values = json.loads((tmp_path / "map.json").read_text())
    assert Sensitivity.from_json(values) == make_sensitivity()
    assert values["verdict"] == write_verdict(make_map())
    assert len(values["uniform"]) == 5
    rows = list(csv.DictReader(io.StringIO((tmp_path / "map.csv").read_text())))
    assert len(rows) == len(make_sensitivity().rows) * len(TYPES)
    assert rows[0]["module"] == "lm_head"
    figures = [float(rows[0][name]) for name in ("kl_facts", "kl_text", "at_risk")]
    assert figures == pytest.approx([2e-5, 1e-5, 6e-5])
    assert "| layer 2 |" in (tmp_path / "map.md").read_text()


@pytest.mark.parametrize("text", one_in(8, HOSTILE_TEXTS))
def test_hostile_names_stay_text(text: str) -> None:
    hostile = make_map(domains={text: 40})
    plain, named = (
        parse_html(render_map_html(each)) for each in (make_map(domains={"x": 40}), replace(hostile, model=text))
    )
    assert named.shape == plain.shape


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    file: Path = tmp_path_factory.mktemp("pages") / "map.html"
    file.write_text(render_map_html(make_map()), encoding="utf-8")
    return file.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_accessible_and_fits_the_screen(page: Page, address: str, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    unfold(page, 9)
    assert find_violations(page) == []
    for width in (360, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert (measure_overflow(page) <= 0, find_overlaps(page), find_cut_texts(page)) == (True, [], []), width


def test_existing_file_is_kept_and_no_other_is_written(tmp_path: Path) -> None:
    files = [tmp_path / "map.html", tmp_path / "map.json"]
    files[1].write_text("the user's file")
    with pytest.raises(OutputError, match=r"map\.json exists already"):
        write_map(make_map(), files, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]
    assert files[1].read_text() == "the user's file"


def test_no_file_is_left_if_the_disk_is_full_at_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors: list[int] = []

    def fail_second(descriptor: int) -> None:
        descriptors.append(descriptor)
        if len(descriptors) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(OutputError, match="no space left"):
        write_map(make_map(), [tmp_path / "map.html", tmp_path / "map.json"], overwrite=False)
    assert list(tmp_path.iterdir()) == []
