"""The figures in printed tables: each stands in its own row and column."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import compressknow
from compressknow.base.format import write_percent, write_size
from compressknow.cli import main
from compressknow.cli.compare import compare_page
from compressknow.cli.convert import build_manifest_page
from compressknow.cli.export import build_types_table
from compressknow.cli.report import report_page
from compressknow.comparison.paired import Standing
from compressknow.pages.records import Recommendation
from tests.models import save_tiny
from tests.pages.card.cards import make_card_of_one, make_card_of_several
from tests.pages.diff.contrasts import make_comparison


def has_row(lines: list[str], *cells: object) -> bool:
    """Return whether a line has these cells and no others."""
    return any(re.split(r" {2,}", line.strip()) == [str(cell) for cell in cells] for line in lines)


def test_report_prints_counts_before_and_after() -> None:
    card = make_card_of_one()
    lines = list(report_page(card))
    for grade in card.comparisons[0].grades:
        assert has_row(lines, grade.subject, grade.counts.known_before, grade.counts.both, grade.written, grade.mark)
    for probe in card.comparisons[0].probes:
        both, lost, gained, n = probe.counts.both, probe.counts.lost, probe.counts.gained, probe.counts.n
        before, after = (write_percent(both + only, n) for only in (lost, gained))
        at = lines.index(f"{probe.probe}: {n:,} facts, right before {before}, after {after}")
        assert lines[at + 1].startswith(f"  lost {lost}, gained {gained} (")
        if probe.knowing:
            for line, grades in zip(
                lines[at + 3 : at + 5], (probe.knowing.original, probe.knowing.compressed), strict=True
            ):
                assert line.endswith(", ".join(f"{facts} {grade}" for grade, facts in grades.items()))


def test_report_marks_the_models_that_no_other_beats() -> None:
    card = make_card_of_several((20,))
    standings = tuple(Standing(0.9, None if place % 2 else 1, False, ()) for place in range(len(card.comparisons)))
    lines = list(report_page(replace(card, decision=Recommendation(1, "Reason.", standings))))
    marked = [line.split()[0] for line in lines if line.endswith("*")]
    assert marked == [comparison.model.name for comparison in card.comparisons[1::2]]


def test_comparison_prints_the_figures_of_a_before_those_of_b() -> None:
    lines = list(compare_page(make_comparison()))
    assert has_row(lines, "Group", "Weights", "Zeros A", "Zeros B", "Error", "Cosine", "SNR Largest")
    assert has_row(lines, "attention", "18,000", "0 %", "20.0 %", "0.1232", "0.99339", "18.2", "0.3200")
    assert "B is 72.5 % smaller" in lines
    at = lines.index("Settings that differ")
    assert lines[at + 1 : at + 3] == ["  d_ff: 48 -> none", '  rope.theta: "x" -> 5']


def test_conversion_prints_what_was_done_to_each_group(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    manifest = compressknow.convert(
        tmp_path / "model", tmp_path / "out", scope="attention", include=r"layers\.0", prune=0.3, quantize="int8"
    )
    lines = list(build_manifest_page(manifest, "model", tmp_path / "out", dry_run=False))
    assert has_row(lines, "Group", "Parameters", "Pruned", "Zeros", "Int8", "Before", "After")
    tensors = [row for row in manifest["tensors"] if row["group"] == "attention"]
    changed = [row for row in tensors if row["scheme"]]
    parameters, quantized = (sum(row["numel"] for row in rows) for rows in (tensors, changed))
    assert 0 < quantized < parameters
    # A row of an int8 weight has a scale of four bytes.
    after = 4 * (parameters - quantized) + quantized + 4 * sum(row["shape"][0] for row in changed)
    pruned = round(0.3 * quantized)
    figures = [f"{parameters:,}", f"{pruned:,}", *(write_percent(part, parameters) for part in (pruned, quantized))]
    assert has_row(lines, "attention", *figures, write_size(4 * parameters), write_size(after))


def test_types_are_printed_with_their_bits_per_weight() -> None:
    counts = {"q8_0": (2, 6_400, 6_800), "f32": (1, 100, 400)}
    types = {kind: dict(zip(("tensors", "parameters", "bytes"), row, strict=True)) for kind, row in counts.items()}
    lines = list(build_types_table({"attention": types}))
    assert has_row(lines, "attention", "q8_0", 2, "6,400", "6.8 kB", "8.50")
    assert has_row(lines, "attention", "f32", 1, "100", "400 bytes", "32.00")
    assert has_row(lines, "total", 3, "6,500", "7.2 kB", f"{8 * 7_200 / 6_500:.2f}")


def test_inspect_prints_what_each_scope_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny("albert", tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    lines = capsys.readouterr().out.splitlines()
    summary = compressknow.inspect(tmp_path / "model")
    assert has_row(lines, "Group", "Modules", "Stored", "As used")
    for name, group in summary["groups"].items():
        assert has_row(lines, name, *(f"{group[key]:,}" for key in ("modules", "stored", "used")))
    assert has_row(lines, "Scope", "--prune takes", "--quantize takes")
    for name, takes in summary["scopes"].items():
        assert has_row(lines, name, f"{takes['prune']:,}", f"{takes['quantize']:,}")
    assert summary["groups"]["attention"]["stored"] < summary["groups"]["attention"]["used"]
    assert summary["scopes"]["overall"]["prune"] < summary["scopes"]["overall"]["quantize"]
    assert not any("cannot quantize" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "scope", "where"), [("gpt2", "blocks", "Conv1D layers"), ("mixtral", "feed-forward", "fused experts")]
)
def test_inspect_counts_the_parameters_that_convert_cannot_quantize(
    name: str, scope: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(name, tmp_path / "model")
    assert main(["inspect", str(tmp_path / "model")]) == 0
    page = capsys.readouterr().out
    parameters = compressknow.inspect(tmp_path / "model").scopes[scope]["quantize"]
    assert f"\n{parameters:,} of these parameters are in {where}.\n  convert cannot quantize them; export can" in page
