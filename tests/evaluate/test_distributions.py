"""KL divergences over the whole vocabulary, against plain torch; and when there are none."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

import compressknow
from compressknow.base.progress import Progress
from compressknow.comparison.records import KlFigures
from compressknow.evaluate import distributions, run
from compressknow.evaluate.answers import TABLE, read_table
from compressknow.evaluate.distributions import DistributionFile, Distributions, compute_divergence
from compressknow.evaluate.runtimes import Settings
from compressknow.pages.records import Card
from tests.evaluate.test_run import call_on_advance
from tests.knowing import facts_file, knowing

FAMILIES = {"bert": AutoModelForMaskedLM, "llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
VOCABULARY = 600
FEW = Settings(batch_size=8, device="cpu")
ANSWERS = 64


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of each family whose vocabulary is larger than the tokens that answers hold, each pruned twice."""
    folder = tmp_path_factory.mktemp("place")
    for family, loads in FAMILIES.items():
        model = loads.from_pretrained(knowing(family, folder / family))
        torch.manual_seed(1)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        model.save_pretrained(folder / family)
        for percent in (30, 60):
            compressknow.convert(folder / family, folder / f"{family}-{percent}", prune=percent / 100)
    facts_file(folder / "facts.jsonl")
    return folder


def report(place: Path, compressed: Sequence[str], keep_in: Path, original: str | None = None, **more: Any) -> Card:
    original = original or compressed[0].partition("-")[0]
    return compressknow.report(
        place / original,
        [place / name for name in compressed],
        [f"facts:{place / 'facts.jsonl'}"],
        settings=FEW,
        answers=keep_in,
        **more,
    )


def movements(card: Card) -> list[KlFigures]:
    found = [comparison.probes[0].movement for comparison in card.comparisons]
    assert all(found)
    return found  # type: ignore[return-value]


def plainly(family: str, folder: Path, prompts: Sequence[str]) -> torch.Tensor:
    """Log-probabilities of all tokens where the answer begins, a prompt at a time, [prompts, vocabulary], float64."""
    model = FAMILIES[family].from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt in prompts:
        before, _, _ = prompt.partition(" [MASK]")
        text = {"bert": prompt, "llama": before, "t5": prompt.replace("[MASK]", "<extra_id_0>")}[family]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        more = {}
        if family == "t5":
            begun = [model.config.decoder_start_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>")]
            more = {"decoder_input_ids": torch.tensor([begun])}
        with torch.no_grad():
            logits = model(input_ids=ids, **more).logits[0]
        at = ids[0].tolist().index(tokenizer.mask_token_id) if family == "bert" else -1
        rows.append(logits[at].double().log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_report_gives_the_divergence_over_all_tokens(place: Path, family: str, tmp_path: Path) -> None:
    (moved,) = movements(report(place, [f"{family}-60"], tmp_path / "kept", output=[tmp_path / "report.json"]))
    prompts = [json.loads(line)["prompt"] for line in (place / "facts.jsonl").read_text().splitlines()]
    p, q = (plainly(family, place / name, prompts) for name in (family, f"{family}-60"))
    whole = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert moved.n == len(prompts) == ANSWERS
    assert moved.kl_mean == pytest.approx(float(whole.mean()), abs=1e-5)
    assert moved.kl_max == pytest.approx(float(whole.max()), abs=1e-5)
    assert not moved.is_lower_bound
    (written,) = json.loads((tmp_path / "report.json").read_text())["compressed"][0]["probes"].values()
    assert (written["kl_is_lower_bound"], written["kl_rest_original"]) == (False, None)
    # Answers alone, without the models, have what was computed when both were there.
    folders = [path for path in (tmp_path / "kept").iterdir() if path.is_dir()]
    original, compressed = sorted(folders, key=lambda path: len(path.name))
    assert movements(compressknow.report(original, compressed)) == [moved]
    # Of the tokens that answers hold it is a bound below that.
    compressknow.probe(
        place / f"{family}-60", tmp_path / "apart", f"facts:{place / 'facts.jsonl'}", reference=original, settings=FEW
    )
    (bound,) = movements(compressknow.report(original, tmp_path / "apart"))
    assert bound.is_lower_bound
    assert 0 < bound.kl_mean <= moved.kl_mean + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_cached_does_not_show(place: Path, family: str, tmp_path: Path) -> None:
    first, second = f"{family}-30", f"{family}-60"
    report(place, [first], tmp_path / "cached")
    told: list[Progress] = []
    cached = report(place, [first, second], tmp_path / "cached", on_progress=told.append)
    fresh = report(place, [first, second], tmp_path / "fresh")
    assert movements(cached) == movements(fresh)
    assert tables(tmp_path / "cached") == tables(tmp_path / "fresh")
    stages = [progress.stage for progress in told if progress.state == "begins"]
    assert [(stage.model, stage.again) for stage in stages] == [(family, True), (second, False)]


def tables(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.rglob(TABLE)}


@pytest.mark.parametrize("facts", [16, ANSWERS + 24])
def test_a_killed_run_resumes_with_the_same_figures(
    place: Path, facts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the original is evaluated, or the compressed model."""
    monkeypatch.setattr(run, "SECONDS_BETWEEN_PARTS", 0.0)
    told: list[int] = []

    def advance(done: int) -> None:
        told.append(done)
        batches = sum(after > before for before, after in itertools.pairwise(told))
        if batches * FEW.batch_size >= facts:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(place, ["llama-60"], tmp_path / "killed", on_progress=call_on_advance(advance))
    resumed = report(place, ["llama-60"], tmp_path / "killed")
    assert movements(resumed) == movements(report(place, ["llama-60"], tmp_path / "whole"))
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")


def test_answers_without_it_get_it_and_are_not_asked_whole_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(distributions, "RESERVE", 1 << 60)
        (bound,) = movements(report(place, ["llama-60"], tmp_path / "kept"))
    assert bound.is_lower_bound
    monkeypatch.delattr("compressknow.evaluate.scoring.scorer.Scorer.answer")
    (exact,) = movements(report(place, ["llama-60"], tmp_path / "kept"))
    assert not exact.is_lower_bound
    monkeypatch.undo()
    assert [exact] == movements(report(place, ["llama-60"], tmp_path / "fresh"))


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "where", ["tempfile.TemporaryFile", "compressknow.evaluate.distributions.DistributionFile._append"]
)
def test_a_full_disk_leaves_the_lower_bound(
    place: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, no_space)
    (bound,) = movements(report(place, ["bert-60"], tmp_path / "kept"))
    assert bound.is_lower_bound
    assert bound.rest is not None


def test_a_disk_that_fills_midway_frees_what_was_kept(tmp_path: Path, limited: Callable[[int], None]) -> None:
    """By the limit on a file's size, which the system answers like a full disk."""
    rows = DistributionFile(tmp_path, most=64)
    log_probs = torch.randn(8, 1000).log_softmax(-1)
    assert rows.keep([f"{n}" for n in range(8)], log_probs) == [None] * 8
    assert rows.measure(["3"], log_probs[3:4]) == [0.0]
    limited(40_000)
    rows.keep([f"{n}" for n in range(8, 16)], log_probs)
    assert rows.gave_up
    assert not rows.holds(["3"])
    assert rows.measure(["3"], log_probs[3:4]) == [None]


@pytest.fixture
def limited() -> Any:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_both_ways_of_a_comparison_are_exact(place: Path, tmp_path: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in (place / "facts.jsonl").read_text().splitlines()]
    facts = f"facts:{place / 'facts.jsonl'}"
    found = compressknow.compare(place / "llama", place / "llama-60", facts, answers=tmp_path / "kept", settings=FEW)
    a, b = (plainly("llama", place / name, prompts) for name in ("llama", "llama-60"))
    assert found.behaviour is not None
    for card, p, q in ((found.behaviour.b_against_a, a, b), (found.behaviour.a_against_b, b, a)):
        (moved,) = movements(card)
        assert not moved.is_lower_bound
        whole = float(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
        assert moved.kl_mean == pytest.approx(whole, abs=1e-5)


def test_a_study_has_the_figures_of_reports_and_says_that_they_are_exact(place: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text('[axes]\nscope = ["blocks"]\nprune = [0.3, 0.6]\n', encoding="utf-8")
    facts = f"facts:{place / 'facts.jsonl'}"
    study = compressknow.sweep(place / "t5", tmp_path / "study", grid=grid, probe=[facts], settings=FEW)
    moved = [cell.comparison.probes[0].movement for cell in study.cells]
    expected = movements(report(place, ["t5-30", "t5-60"], tmp_path / "kept"))
    assert [m.kl_mean for m in moved if m] == pytest.approx([m.kl_mean for m in expected], rel=1e-6)
    rows = json.loads((tmp_path / "study" / "study.json").read_text())["cells"]
    assert [row["kl_is_lower_bound"] for row in rows] == [False, False]
    # A cell that comes later is compared with the same distributions, though the original's answers are stored.
    (stored,) = (tmp_path / "study" / "cells").glob("*60*")
    before = tables(tmp_path / "study")
    shutil.rmtree(stored)
    compressknow.sweep(place / "t5", tmp_path / "study", grid=grid, probe=[facts], settings=FEW)
    assert tables(tmp_path / "study") == before


def test_nothing_stays_on_the_disk(place: Path, tmp_path: Path) -> None:
    report(place, ["llama-60"], tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").rglob("*")}
    assert not [name for name in names if name not in (".lock", TABLE, "probe.json") and "." in name]
    with Distributions(None, tmp_path) as kept:  # type: ignore[arg-type]
        probe = run_probe(place)
        kept.find_rows(probe).keep([probe.facts[0].id], torch.zeros(1, 5))
        held = kept.find_rows(probe)._file
    assert held.closed
    assert not list(tmp_path.glob("tmp*"))


def run_probe(place: Path) -> Any:
    from compressknow.evaluate.sources import Options, open_all

    return open_all([f"facts:{place / 'facts.jsonl'}"], Options())[0]


def test_a_table_of_an_older_version_is_read(place: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    report(place, ["llama-60"], tmp_path / "kept")
    path = next(path for path in (tmp_path / "kept").rglob(TABLE) if "-" in path.parent.name)
    assert all(answer.first_kl is not None for answer in read_table(path))
    pq.write_table(pq.read_table(path).drop_columns(["first_kl"]), path)
    assert {answer.first_kl for answer in read_table(path)} == {None}


def test_divergences_have_no_negative_terms_and_take_what_is_ruled_out() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]).log()
    same, other = compute_divergence(p, q).tolist()
    assert same == 0.0
    assert np.isfinite(other)
    assert other > 10
    assert torch.isnan(compute_divergence(p, torch.full_like(q, torch.nan))).all()
