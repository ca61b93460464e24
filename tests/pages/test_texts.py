"""Figures of running text, compared with llama.cpp's formulas, and how pages show them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from compressknow.base.errors import CompressknowError, UsageError
from compressknow.comparison.records import Measurement
from compressknow.comparison.text import compare_text, compare_tokens, compute_perplexity
from compressknow.evaluate.answers import Answers
from compressknow.evaluate.records import ALONE, MEASURED, OTHER_TOKENS, Chunk, ModelRecord, ProbeEntry, Record
from compressknow.pages.as_json import dump_texts
from compressknow.pages.card.gate import hold_to_gates, parse_gates
from compressknow.pages.card.make import make_card
from compressknow.pages.card.pages import render_html, render_markdown
from compressknow.pages.parts import Beside
from compressknow.pages.texts import make_text_parts, summarize_text, write_joint_sentence, write_sentence

SCORED, CHUNKS = 15, 20


def make_chunks(
    seed: int, *, shift: float = 0.0, kl: bool = True, greedy: Callable[[int], list[int]] | None = None
) -> tuple[Chunk, ...]:
    """Return chunks of the same tokens for every seed, with similar log-likelihoods."""
    common, individual = np.random.default_rng(0), np.random.default_rng(seed)
    chunks = []
    for number in range(CHUNKS):
        logp = -common.gamma(2.0, 1.5, SCORED) - 0.2 * np.abs(individual.normal(size=SCORED)) - shift
        top = np.where(individual.random(SCORED) < 0.1, 7, 3)
        chunks.append(
            Chunk(
                number=number,
                ids=np.arange(SCORED, dtype=np.int32),
                logp=logp.astype(np.float32),
                top=top.astype(np.int32),
                kl=individual.gamma(0.5, 0.02, SCORED) if kl else None,
                bytes=4 * SCORED,
                greedy=np.array(greedy(number) if greedy and number < 4 else [], dtype=np.int32),
            )
        )
    return tuple(chunks)


def compute_like_llama_cpp(
    before: np.ndarray, after: np.ndarray, kl: np.ndarray, same: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Return the figures and errors that `kl_divergence` of tools/perplexity/perplexity.cpp prints."""
    n = len(after)

    def mean_and_uncertainty(total: float, squares: float) -> tuple[float, float]:
        mean = total / n
        variance = squares / n - mean * mean
        return mean, math.sqrt(variance / (n - 1)) if variance > 0 and n > 10 else 0.0

    nll, base = -after, -before
    log_ppl = mean_and_uncertainty(nll.sum(), (nll**2).sum())
    log_base = mean_and_uncertainty(base.sum(), (base**2).sum())
    covariance = ((nll * base).sum() / n - nll.sum() / n * base.sum() / n) / (n - 1)
    ratio = log_ppl[0] - log_base[0]
    ratio_error = math.sqrt(log_ppl[1] ** 2 + log_base[1] ** 2 - 2 * covariance)
    ppl, ppl_base = math.exp(log_ppl[0]), math.exp(log_base[0])
    ppl_error, base_error = ppl * log_ppl[1], ppl_base * log_base[1]
    difference_error = math.sqrt(ppl_error**2 + base_error**2 - 2 * ppl * ppl_base * covariance)
    change = np.exp(after) - np.exp(before)
    squared = mean_and_uncertainty((change**2).sum(), (change**4).sum())
    share = same.mean()
    return {
        "ppl": (ppl, ppl_error),
        "base": (ppl_base, base_error),
        "correlation": (covariance / (log_ppl[1] * log_base[1]), 0.0),
        "log_ratio": (ratio, ratio_error),
        "ratio": (math.exp(ratio), math.exp(ratio) * ratio_error),
        "difference": (ppl - ppl_base, difference_error),
        "kl": mean_and_uncertainty(kl.sum(), (kl**2).sum()),
        "change": mean_and_uncertainty(change.sum(), (change**2).sum()),
        "change_rms": (math.sqrt(squared[0]), 0.5 / math.sqrt(squared[0]) * squared[1]),
        "same_top": (share, math.sqrt(share * (1 - share) / (n - 1))),
    }


def test_figures_and_errors_match_llama_cpp() -> None:
    original, compressed = make_chunks(1, kl=False), make_chunks(2, shift=0.05)
    before, after = (np.concatenate([c.logp for c in side]).astype(np.float64) for side in (original, compressed))
    same = np.concatenate([a.top == b.top for a, b in zip(original, compressed, strict=True)])
    kl = np.concatenate([c.kl for c in compressed if c.kl is not None])
    expected = compute_like_llama_cpp(before, after, kl, same)
    change = compare_tokens(original, compressed)
    figures = {
        "ppl": compute_perplexity(compressed).value,
        "base": compute_perplexity(original).value,
        "log_ratio": change.log_ratio,
        "ratio": change.ratio,
        "difference": change.difference,
        "kl": change.kl,
        "change": change.change,
        "change_rms": change.change_rms,
        "same_top": change.same_top,
    }
    for name, figure in figures.items():
        assert figure is not None
        assert (figure.value, figure.error) == pytest.approx(expected[name], rel=1e-6), name
    assert change.correlation == pytest.approx(expected["correlation"][0])
    # The JSON has each under its own name.
    names = {
        **{"perplexity_original": "base", "perplexity_compressed": "ppl", "perplexity_ratio": "ratio"},
        **{"perplexity_difference": "difference", "log_perplexity_ratio": "log_ratio", "kl_mean": "kl"},
        **{"same_top": "same_top", "probability_change": "change", "probability_change_rms": "change_rms"},
    }
    values = dump_texts([compare_text("text:a.txt", 32, MEASURED, original, compressed)])["text:a.txt"]
    for name, key in names.items():
        assert (values[name], values[f"{name}_error"]) == pytest.approx(expected[key], rel=1e-6), name
    for side, logp in (("original", before), ("compressed", after)):
        assert values[f"bits_per_byte_{side}"] == pytest.approx(-logp.mean() / 4 / math.log(2), rel=1e-6)


def test_percentiles_are_interpolated_like_those_of_llama_cpp() -> None:
    percentiles = compare_tokens(make_chunks(1), make_chunks(2)).kl_percentiles
    values = np.sort(np.concatenate([c.kl for c in make_chunks(2) if c.kl is not None]))

    def percentile(fraction: float) -> float:
        position = fraction * (len(values) - 1)
        below = int(position)
        part = position - below
        return float((1 - part) * values[below] + part * values[min(below + 1, len(values) - 1)])

    assert percentiles is not None
    for name, fraction in (("p0_1", 0.001), ("p1", 0.01), ("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99_9", 0.999)):
        assert percentiles[name] == pytest.approx(percentile(fraction)), name
    assert (percentiles["min"], percentiles["max"]) == (values[0], values[-1])
    # If the disk had no room for some distributions, the other chunks would not represent the text.
    first, *others = make_chunks(2)
    partial = compare_tokens(make_chunks(1), [first, *(replace(chunk, kl=None) for chunk in others)])
    assert (partial.kl, partial.kl_percentiles) == (None, None)


def test_model_compared_with_itself_shows_no_change() -> None:
    change = compare_tokens(make_chunks(1), make_chunks(1))
    one, zero = Measurement(1, 0), Measurement(0, 0)
    assert (change.ratio, change.difference, change.same_top) == (one, zero, one)
    assert change.correlation == pytest.approx(1)


def test_a_model_that_computes_nan_has_no_perplexity() -> None:
    original = make_chunks(1)
    broken = [replace(chunk, logp=np.full_like(chunk.logp, np.nan)) for chunk in original]
    assert math.isnan(compute_perplexity(broken).value.value)
    assert math.isnan(compare_tokens(original, broken).ratio.value)


def test_bits_per_byte_count_all_tokens() -> None:
    perplexity = compute_perplexity(make_chunks(1))
    nll = -np.concatenate([c.logp for c in make_chunks(1)]).astype(np.float64)
    assert perplexity.bits_per_byte is not None
    assert perplexity.bits_per_byte.value == pytest.approx(nll.sum() / math.log(2) / (4 * SCORED * CHUNKS))
    assert compute_perplexity([replace(c, bytes=None) for c in make_chunks(1)]).bits_per_byte is None


@pytest.mark.parametrize(
    ("differs", "same", "first", "median"),
    [([], 4, (), None), ([2], 3, (3,), None), ([0, 1, 2], 1, (1, 2, 3), 2.5), ([0, 1, 2, 5], 0, (1, 2, 3, 6), 2.5)],
)
def test_first_divergent_tokens_are_counted(
    differs: list[int], same: int, first: tuple[int, ...], median: float | None
) -> None:
    def differ(number: int) -> list[int]:
        position = differs[number] if number < len(differs) else None
        return [1 if token == position else 0 for token in range(8)]

    divergent = compare_tokens(make_chunks(1, greedy=lambda _: [0] * 8), make_chunks(2, greedy=differ)).divergent
    assert divergent is not None
    assert (divergent.n, divergent.tokens, divergent.same, divergent.first) == (4, 8, same, first)
    assert divergent.middle == median


def test_different_tokens_are_compared_only_in_bits_per_byte() -> None:
    shifted = tuple(replace(c, ids=c.ids + 1) for c in make_chunks(2))
    for divergence, compressed in ((MEASURED, shifted), (OTHER_TOKENS, make_chunks(2))):
        figures = compare_text("text:a.txt", 32, divergence, make_chunks(1), compressed)
        assert (figures.moved, figures.divergence) == (None, OTHER_TOKENS)
        *_, line = summarize_text(figures, ("before", "after"))
        bits = [side.bits_per_byte for side in (figures.original, figures.compressed)]
        before, after = (f"{each.value:.3f} ± {each.error:.3f}" for each in bits if each)
        assert line == f"  bits per byte before {before}, after {after}; different tokens, so no KL"


def test_figures_of_a_text_are_printed_before_and_after() -> None:
    figures = compare_text("text:a.txt", 32, MEASURED, make_chunks(1, kl=False), make_chunks(2, shift=0.5))
    first, second = summarize_text(figures, ("before", "after"))
    before, after = (f"{s.value.value:.3f} ± {s.value.error:.3f}" for s in (figures.original, figures.compressed))
    assert first == f"text:a.txt: perplexity before {before}, after {after}"
    assert figures.moved is not None
    assert figures.moved.kl_percentiles is not None
    assert f" nats, p99 {figures.moved.kl_percentiles['p99']:.4f}; same top token " in second


def test_greedy_continuations_that_stay_the_same_are_counted() -> None:
    one = make_chunks(1, kl=False, greedy=lambda _: [1, 2, 3])
    other = make_chunks(2, greedy=lambda number: [1, 2, 9] if number == 0 else [1, 2, 3])
    parts = make_text_parts(compare_text("text:a.txt", 32, MEASURED, one, other), ("original", "compressed"))
    (rows,) = (dict(part.table.rows) for part in parts if isinstance(part, Beside))
    assert rows["Continuations identical in all 3 tokens"] == "3 of 4 (75.0 %)"
    assert rows["First differing token in 4 greedy continuations, median"] == "more than 3"


def make_answers(side: tuple[Chunk, ...], name: str, divergence: str = MEASURED, fingerprint: str = "f") -> Answers:
    text = {"context": 32, "chunks": CHUNKS, "tokens": SCORED * CHUNKS, "bytes": 1, "divergence": divergence}
    entry = ProbeEntry(protocol="text/1", fingerprint=fingerprint, facts=0, asked=0, text=text)
    model = ModelRecord(
        name=name, sha256=name * 8, architecture="Llama", family="causal", parameters=10, bytes=20, dtype="F32"
    )  # fmt: skip
    record = Record(schema=1, model=model, probes={"text:<b>.txt": entry}, versions={"compressknow": "1"})
    return Answers(record, (), {"text:<b>.txt": side})


def test_all_formats_show_the_same_figures_and_no_facts() -> None:
    card = make_card(make_answers(make_chunks(1, kl=False), "a"), [make_answers(make_chunks(2), "b")])
    figures = card.comparisons[0].texts[0]
    html, markdown, values = render_html(card), render_markdown(card), card.to_dict()["compressed"][0]["texts"]
    assert figures.moved is not None
    assert figures.moved.kl is not None
    mean = f"{figures.moved.kl.value:.4f} ± {figures.moved.kl.error:.4f}"
    assert mean in html
    assert mean in markdown
    assert values["text:<b>.txt"]["kl_mean"] == figures.moved.kl.value
    assert values["text:<b>.txt"]["kl_percentiles"]["p99"] == figures.moved.kl_percentiles["p99"]  # type: ignore[index]
    assert "<b>.txt" not in html
    assert "99.9th" in html  # the chart
    assert "<h1" in html
    assert "Perplexity" in html.partition("<h1")[2][:300]
    for absent in ("Facts lost", "Known before", "McNemar"):
        assert absent not in html
        assert absent not in markdown
    assert json.dumps(values, allow_nan=False)


def test_headline_of_a_model_that_predicts_the_same_says_that_nothing_changed() -> None:
    same = make_chunks(1)
    card = make_card(make_answers(same, "a"), [make_answers(same, "b")])
    assert render_markdown(card).startswith("# Perplexity unchanged on text:")
    assert " (unchanged), and the most likely token" in card.verdict


def test_verdict_on_many_texts_is_whole_on_the_page() -> None:
    def read(seed: int, name: str) -> Answers:
        answers, chunks = make_answers(make_chunks(seed), name), make_chunks(seed)
        (entry,) = answers.record.probes.values()
        names = [f"text:{number}.txt" for number in range(12)]
        record = replace(answers.record, probes=dict.fromkeys(names, entry))
        return replace(answers, record=record, texts=dict.fromkeys(names, chunks))

    card = make_card(read(1, "a"), [read(2, "b")])
    assert len(card.verdict) > 1000
    assert card.verdict.count("its perplexity is") == render_markdown(card).count("its perplexity is") == 12


def test_card_of_texts_does_not_explain_figures_of_facts() -> None:
    card = make_card(make_answers(make_chunks(1), "a"), [make_answers(make_chunks(2), "b")])
    for page in (render_html(card), render_markdown(card)):
        assert "What the figures mean" not in page


def test_several_models_have_a_column_per_text() -> None:
    compressed = [make_answers(make_chunks(2), "b"), make_answers(make_chunks(3, shift=0.5), "c")]
    card = make_card(make_answers(make_chunks(1, kl=False), "a"), compressed)
    assert "b has the lowest" in card.verdict
    assert "c the highest" in card.verdict
    header, _, *rows = (line.split(" | ") for line in render_markdown(card).splitlines() if line.startswith("|"))
    assert header[-1].startswith("Perplexity, text:")
    texts = [comparison.texts[0] for comparison in card.comparisons]
    perplexities = [texts[0].original, *(text.compressed for text in texts)]
    assert [row[-1] for row in rows[:3]] == [f"{each.value.value:.2f} |" for each in perplexities]


def test_no_model_has_the_lowest_perplexity_if_there_is_one_or_all_are_equal() -> None:
    perplexity = compute_perplexity(make_chunks(1))
    sentences = [write_joint_sentence("a.txt", perplexity, [("b", perplexity), ("c", perplexity)][:n]) for n in (1, 2)]
    assert "perplexity is " in sentences[0]
    assert sentences[0].endswith(f", and that of b is {perplexity.value.value:.2f}.")
    assert sentences[1].endswith(f", and that of each compressed model is {perplexity.value.value:.2f}.")


def test_model_with_nan_has_neither_the_lowest_nor_the_highest_perplexity() -> None:
    perplexity = compute_perplexity(make_chunks(1))
    broken, larger = (replace(perplexity, value=Measurement(value, 0.0)) for value in (math.nan, 99.0))
    sentence = write_joint_sentence("a.txt", perplexity, [("b", broken), ("c", perplexity), ("d", larger)])
    lowest = f"{perplexity.value.value:.2f}"
    assert sentence.endswith(f"; of the others, c has the lowest ({lowest}) and d the highest (99.00).")
    sentence = write_joint_sentence("a.txt", perplexity, [("b", broken)] * 2)
    assert sentence.endswith(", and that of each compressed model is NaN or infinite.")


@pytest.mark.filterwarnings("ignore:invalid value")
def test_token_of_probability_zero_makes_the_perplexity_infinite() -> None:
    first, *others = make_chunks(2, kl=False)
    compressed = (replace(first, logp=np.where(np.arange(SCORED) == 3, -np.inf, first.logp)), *others)
    figures = compare_text("text:a.txt", 32, MEASURED, make_chunks(1), compressed)
    assert figures.moved is not None
    assert figures.moved.ratio.value == math.inf
    assert re.search(r"its perplexity is NaN or infinite \(from \d+\.\d\d\), and", write_sentence(figures))
    assert len(max(summarize_text(figures, ("a", "b")), key=len)) < 200


def test_huge_perplexity_is_written_as_a_power_of_ten() -> None:
    unlikely = tuple(replace(c, logp=c.logp - 230) for c in make_chunks(2))
    figures = compare_text("text:a.txt", 32, MEASURED, make_chunks(1), unlikely)
    assert re.search(r"its perplexity is \d\.\d\de\+10\d \(\+\d\.\de\+10\d %, from ", write_sentence(figures))
    assert len(max(summarize_text(figures, ("a", "b")), key=len)) < 120


def test_model_with_nan_gets_a_warning_and_a_report() -> None:
    broken = tuple(replace(c, logp=c.logp * np.nan) for c in make_chunks(2, kl=False))
    card = make_card(make_answers(make_chunks(1), "a"), [make_answers(broken, "b", ALONE)])
    assert any("its perplexity is NaN or infinite" in warning for warning in card.comparisons[0].warnings)
    assert json.dumps(card.to_dict(), allow_nan=False)
    assert render_html(card)


def test_different_texts_and_gates_without_facts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressknowError, match="different texts, or different chunks"):
        make_card(make_answers(make_chunks(1), "a"), [make_answers(make_chunks(2), "b", fingerprint="g")])
    card = make_card(make_answers(make_chunks(1), "a"), [make_answers(make_chunks(2), "b")])
    with pytest.raises(UsageError, match="needs facts"):
        hold_to_gates(card, replace(card, gates=parse_gates(0.9)))
