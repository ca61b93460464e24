"""A manifest as a page for the terminal, 80 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressknow.report.figures import count, percent, size
from compressknow.report.model_card.remarks import growth, where_it_runs

COLUMNS = f"{'Group':<14}{'Parameters':>15}{'Pruned':>15}{'Zeros':>9}{'Int8':>8}{'Before':>10}{'After':>9}"


def manifest_page(manifest: Mapping[str, Any], model: str, output: Path, *, dry_run: bool) -> Iterator[str]:
    """Lines that say what was done, or with `dry_run` would be done, by group."""
    yield f"{manifest['setup']}: {model} -> {output}"
    yield ""
    yield COLUMNS
    yield "-" * len(COLUMNS)
    for name, counts in manifest["groups"].items():
        yield _row(name, counts)
    yield "-" * len(COLUMNS)
    yield _row("total", manifest["totals"])
    for tie in manifest["untied"]:
        shared = f"{tie['name']} no longer shares its weight with {tie['tied_to']}"
        yield "\n" + fill(f"{shared}: {size(tie['bytes'])} more.")
    for warning in growth(manifest):
        yield "\n" + fill(f"Warning: {warning}")
    yield "\n" + fill(where_it_runs(manifest))
    if dry_run:
        yield "\nDry run: nothing was written."


def fill(text: str) -> str:
    return textwrap.fill(text, len(COLUMNS), break_long_words=False, break_on_hyphens=False)


def _row(name: str, counts: Mapping[str, Any]) -> str:
    parameters, pruned, zeros = counts["parameters"], counts["pruned"], counts.get("zeros_after")
    return (
        f"{name:<14}{count(parameters):>15}{'?' if pruned is None else count(pruned):>15}"
        f"{'?' if zeros is None else percent(zeros, parameters):>9}{percent(counts['quantized'], parameters):>8}"
        f"{size(counts['bytes_before']):>10}{size(counts['bytes_after']):>9}"
    )
