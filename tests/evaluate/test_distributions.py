"""KL divergences over the whole vocabulary, against plain torch, and when they are missing."""

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
from compressknow.evaluate.answers import LOGP_FLOOR, TABLE, read_table
from compressknow.evaluate.distributions import DistributionFile, Distributions, compute_divergence
from compressknow.evaluate.runtimes import Settings
from compressknow.pages.records import Card
from tests.evaluate.layouts import open_probe
from tests.evaluate.test_run import call_on_advance
from tests.knowing import save_trained, write_facts

FAMILIES = {"bert": AutoModelForMaskedLM, "llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
VOCABULARY = 600
SMALL = Settings(batch_size=8, device="cpu")
FACTS = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each family, with more tokens than answers store, two pruned ones of each, and facts."""
    folder = tmp_path_factory.mktemp("root")
    for family, loads in FAMILIES.items():
        model = loads.from_pretrained(save_trained(family, folder / family))
        torch.manual_seed(1)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        model.save_pretrained(folder / family)
        for percent in (30, 60):
            compressknow.convert(folder / family, folder / f"{family}-{percent}", prune=percent / 100)
    write_facts(folder / "facts.jsonl")
    return folder


def report(root: Path, compressed: Sequence[str], keep_in: Path, **more: Any) -> Card:
    return compressknow.report(
        root / compressed[0].partition("-")[0],
        [root / name for name in compressed],
        [f"facts:{root / 'facts.jsonl'}"],
        settings=SMALL,
        answers=keep_in,
        **more,
    )


def list_movements(card: Card) -> list[KlFigures]:
    movements = [comparison.probes[0].movement for comparison in card.comparisons]
    assert all(movements)
    return movements  # type: ignore[return-value]


def compute_log_probs(family: str, folder: Path, prompts: Sequence[str]) -> torch.Tensor:
    """Return log-probabilities of all tokens where the answer begins, one prompt at a time, [prompts, vocabulary]."""
    model = FAMILIES[family].from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for prompt in prompts:
        before, _, _ = prompt.partition(" [MASK]")
        text = {"bert": prompt, "llama": before, "t5": prompt.replace("[MASK]", "<extra_id_0>")}[family]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        decoder_inputs = {}
        if family == "t5":
            decoder = [model.config.decoder_start_token_id, tokenizer.convert_tokens_to_ids("<extra_id_0>")]
            decoder_inputs = {"decoder_input_ids": torch.tensor([decoder])}
        with torch.no_grad():
            logits = model(input_ids=ids, **decoder_inputs).logits[0]
        position = ids[0].tolist().index(tokenizer.mask_token_id) if family == "bert" else -1
        rows.append(logits[position].double().log_softmax(-1))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_report_gives_the_divergence_over_all_tokens(
    root: Path, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A batch of 8 facts is compared in parts of 3, 3 and 2, as it is if the vocabulary is large.
    monkeypatch.setattr(distributions, "AT_A_TIME", 3 * VOCABULARY)
    (movement,) = list_movements(report(root, [f"{family}-60"], tmp_path / "kept", output=[tmp_path / "report.json"]))
    prompts = [json.loads(line)["prompt"] for line in (root / "facts.jsonl").read_text().splitlines()]
    p, q = (compute_log_probs(family, root / name, prompts) for name in (family, f"{family}-60"))
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert movement.n == len(prompts) == FACTS
    assert movement.kl_mean == pytest.approx(float(expected.mean()), abs=1e-5)
    assert movement.kl_max == pytest.approx(float(expected.max()), abs=1e-5)
    assert not movement.is_lower_bound
    (written,) = json.loads((tmp_path / "report.json").read_text())["compressed"][0]["probes"].values()
    assert (written["kl_is_lower_bound"], written["kl_rest_original"]) == (False, None)
    # A report on the stored answers, without the models, has the same figures.
    folders = [path for path in (tmp_path / "kept").iterdir() if path.is_dir()]
    original, compressed = sorted(folders, key=lambda path: len(path.name))
    assert list_movements(compressknow.report(original, compressed)) == [movement]
    # From the tokens that answers store, it is a lower bound.
    facts = f"facts:{root / 'facts.jsonl'}"
    compressknow.probe(root / f"{family}-60", tmp_path / "alone", facts, reference=original, settings=SMALL)
    (bound,) = list_movements(compressknow.report(original, tmp_path / "alone"))
    assert bound.is_lower_bound
    assert 0 < bound.kl_mean <= movement.kl_mean + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_answers_do_not_change_the_figures(root: Path, family: str, tmp_path: Path) -> None:
    first, second = f"{family}-30", f"{family}-60"
    report(root, [first], tmp_path / "cached")
    events: list[Progress] = []
    cached = report(root, [first, second], tmp_path / "cached", on_progress=events.append)
    fresh = report(root, [first, second], tmp_path / "fresh")
    assert list_movements(cached) == list_movements(fresh)
    assert read_tables(tmp_path / "cached") == read_tables(tmp_path / "fresh")
    stages = [progress.stage for progress in events if progress.state == "begins"]
    assert [(stage.model, stage.again) for stage in stages] == [(family, True), (second, False)]


def read_tables(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.rglob(TABLE)}


@pytest.mark.parametrize("facts", [16, FACTS + 24])
def test_a_killed_run_resumes_with_the_same_figures(
    root: Path, facts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed while it evaluates the original or the compressed model."""
    monkeypatch.setattr(run, "SECONDS_BETWEEN_PARTS", 0.0)
    counts: list[int] = []

    def advance(done: int) -> None:
        counts.append(done)
        batches = sum(after > before for before, after in itertools.pairwise(counts))
        if batches * SMALL.batch_size >= facts:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(root, ["llama-60"], tmp_path / "killed", on_progress=call_on_advance(advance))
    resumed = report(root, ["llama-60"], tmp_path / "killed")
    assert list_movements(resumed) == list_movements(report(root, ["llama-60"], tmp_path / "whole"))
    assert read_tables(tmp_path / "killed") == read_tables(tmp_path / "whole")


def test_answers_without_an_exact_divergence_get_it_without_being_scored_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(distributions, "RESERVE", 1 << 60)
        (bound,) = list_movements(report(root, ["llama-60"], tmp_path / "kept"))
    assert bound.is_lower_bound
    monkeypatch.delattr("compressknow.evaluate.scoring.scorer.Scorer.answer")
    (exact,) = list_movements(report(root, ["llama-60"], tmp_path / "kept"))
    assert not exact.is_lower_bound
    monkeypatch.undo()
    assert [exact] == list_movements(report(root, ["llama-60"], tmp_path / "fresh"))


def raise_disk_full(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "where", ["tempfile.TemporaryFile", "compressknow.evaluate.distributions.DistributionFile._append"]
)
def test_a_full_disk_leaves_the_lower_bound(
    root: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, raise_disk_full)
    (bound,) = list_movements(report(root, ["bert-60"], tmp_path / "kept"))
    assert bound.is_lower_bound
    assert bound.rest is not None


def test_a_disk_that_fills_up_frees_the_stored_rows(tmp_path: Path, limit_file_size: Callable[[int], None]) -> None:
    """A limit on the size of files fails like a full disk."""
    rows = DistributionFile(tmp_path, most=64)
    log_probs = torch.randn(8, 1000).log_softmax(-1)
    assert rows.keep([f"{n}" for n in range(8)], log_probs) == [None] * 8
    assert rows.measure(["3"], log_probs[3:4]) == [0.0]
    limit_file_size(40_000)
    rows.keep([f"{n}" for n in range(8, 16)], log_probs)
    assert rows.gave_up
    assert not rows.holds(["3"])
    assert rows.measure(["3"], log_probs[3:4]) == [None]


@pytest.fixture
def limit_file_size() -> Any:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("tokens", [VOCABULARY - 40, VOCABULARY + 40])
def test_a_model_with_other_padding_has_the_divergence_and_is_not_evaluated_again(
    root: Path, tmp_path: Path, tokens: int, loads: list[Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "llama-60")
    model.resize_token_embeddings(tokens, mean_resizing=False)
    model.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(root / "llama").save_pretrained(tmp_path / "padded")

    def measure() -> KlFigures:
        facts = f"facts:{root / 'facts.jsonl'}"
        card = compressknow.report(
            root / "llama", tmp_path / "padded", facts, limit=8, settings=SMALL, answers=tmp_path / "kept"
        )
        return list_movements(card)[0]

    movement = measure()
    assert not movement.is_lower_bound
    answers = [answer for path in (tmp_path / "kept").rglob(TABLE) for answer in read_table(path)]
    prompts = list(dict.fromkeys(answer.prompt for answer in answers))
    rows = (compute_log_probs("llama", folder, prompts) for folder in (root / "llama", tmp_path / "padded"))
    p, q = (functional.pad(each, (0, VOCABULARY + 40 - each.shape[1]), value=LOGP_FLOOR) for each in rows)
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert movement.kl_mean == pytest.approx(float(expected.mean()), abs=1e-5)
    loads.clear()
    assert measure() == movement
    assert not loads


def test_both_directions_of_a_comparison_are_exact(root: Path, tmp_path: Path) -> None:
    prompts = [json.loads(line)["prompt"] for line in (root / "facts.jsonl").read_text().splitlines()]
    facts = f"facts:{root / 'facts.jsonl'}"
    result = compressknow.compare(root / "llama", root / "llama-60", facts, answers=tmp_path / "kept", settings=SMALL)
    a, b = (compute_log_probs("llama", root / name, prompts) for name in ("llama", "llama-60"))
    assert result.behaviour is not None
    for card, p, q in ((result.behaviour.b_against_a, a, b), (result.behaviour.a_against_b, b, a)):
        (movement,) = list_movements(card)
        assert not movement.is_lower_bound
        expected = float(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
        assert movement.kl_mean == pytest.approx(expected, abs=1e-5)


def test_a_study_has_the_figures_of_reports_and_says_that_they_are_exact(root: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text('[axes]\nscope = ["blocks"]\nprune = [0.3, 0.6]\n', encoding="utf-8")
    facts = f"facts:{root / 'facts.jsonl'}"
    study = compressknow.sweep(root / "t5", tmp_path / "study", grid=grid, probe=[facts], settings=SMALL)
    movements = [cell.comparison.probes[0].movement for cell in study.cells]
    expected = list_movements(report(root, ["t5-30", "t5-60"], tmp_path / "kept"))
    assert [m.kl_mean for m in movements if m] == pytest.approx([m.kl_mean for m in expected], rel=1e-6)
    rows = json.loads((tmp_path / "study" / "study.json").read_text())["cells"]
    assert [row["kl_is_lower_bound"] for row in rows] == [False, False]
    # A cell that is added later gets the same figures, although the answers of the original are stored.
    (stored,) = (tmp_path / "study" / "cells").glob("*60*")
    before = read_tables(tmp_path / "study")
    shutil.rmtree(stored)
    compressknow.sweep(root / "t5", tmp_path / "study", grid=grid, probe=[facts], settings=SMALL)
    assert read_tables(tmp_path / "study") == before


def test_no_temporary_file_is_left(root: Path, tmp_path: Path) -> None:
    report(root, ["llama-60"], tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").rglob("*")}
    assert not [name for name in names if name not in (".lock", TABLE, "probe.json") and "." in name]
    with Distributions(None, tmp_path) as store:  # type: ignore[arg-type]
        probe = open_probe(f"facts:{root / 'facts.jsonl'}")
        store.find_rows(probe).keep([probe.facts[0].id], torch.zeros(1, 5))
        file = store.find_rows(probe)._file
    assert file.closed
    assert not list(tmp_path.glob("tmp*"))


def test_a_table_without_divergences_is_read(root: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    report(root, ["llama-60"], tmp_path / "kept")
    path = next(path for path in (tmp_path / "kept").rglob(TABLE) if "-" in path.parent.name)
    assert all(answer.first_kl is not None for answer in read_table(path))
    pq.write_table(pq.read_table(path).drop_columns(["first_kl"]), path)
    assert {answer.first_kl for answer in read_table(path)} == {None}


def test_divergence_is_zero_for_equal_rows_and_finite_for_impossible_tokens() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).log()
    q = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]).log()
    same, other = compute_divergence(p, q).tolist()
    assert same == 0.0
    assert np.isfinite(other)
    assert other > 10
    assert torch.isnan(compute_divergence(p, torch.full_like(q, torch.nan))).all()
