"""The estimated effect of rounding a weight, compared with rounding it and running the model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers.pytorch_utils import Conv1D

import compressknow
from compressknow.compress.calibrate.backward import ScoredBatch, choose_factors
from compressknow.compress.calibrate.model import BlockwiseUnsupported
from compressknow.compress.calibrate.text import CalibrationText
from compressknow.engine.language_model import load_language_model
from compressknow.evaluate.evaluate import Prompts, evaluate
from compressknow.evaluate.facts import Fact, Probe
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.scorer import Query
from compressknow.model.loading import open_complete
from compressknow.study.guides import ScoredFact, _cut_text, batch_facts, batch_text, select_known_facts
from compressknow.study.measuring import (
    FactBatches,
    GgufRoundings,
    Roundings,
    SchemeRoundings,
    ScoreChanges,
    compute_divergence,
    measure,
)
from compressknow.study.sensitivity import (
    Guidance,
    Rounding,
    Sensitivity,
    TensorSensitivity,
    read_sensitivity,
    write_sensitivity,
)
from tests.compress.test_zoo_converts import try_build
from tests.evaluate.layouts import open_probe
from tests.knowing import save_trained, write_facts
from tests.long import long
from tests.models import save_tiny, tiny
from tests.pages.answering import make_answer, make_answers
from tests.zoo import tiny_config, tiny_model


class FewSchemes(SchemeRoundings):
    types = ("int8-weights", "int4/32")


class FewTypes(GgufRoundings):
    types = ("q8_0", "q5_0", "q4_0", "q3_k")


SCHEMES, GGUF = FewSchemes(), FewTypes()
GetModel = Callable[..., "TrainedModel"]


class TrainedModel(NamedTuple):
    folder: Path
    model: Any
    fact_batches: FactBatches
    logp: torch.Tensor
    domains: list[str]


@pytest.fixture(scope="module")
def get_model(tmp_path_factory: pytest.TempPathFactory) -> GetModel:
    folder = tmp_path_factory.mktemp("sensitivity")
    models: dict[tuple[str, str], TrainedModel] = {}

    def get(family: str, answers_are: str = "candidates") -> TrainedModel:
        if (family, answers_are) not in models:
            path = save_trained(family, folder / family)
            loaded = load_language_model(path)
            probe = open_probe(f"facts:{write_facts(folder / 'facts.jsonl')}")
            if answers_are != "candidates":
                facts = tuple(replace(fact, candidates=None) for fact in probe.facts)
                words = tuple(sorted({fact.obj_label for fact in facts})) if answers_are == "words" else ()
                probe = replace(probe, facts=facts, vocabulary=answers_are, words=words)
            scorer = make_scorer(loaded.model, loaded.tokenizer, loaded.family, probe)
            prompts = Prompts(scorer)
            answers = {answer.fact_id: answer for batch in evaluate(prompts) for answer in batch}
            scored = [ScoredFact(scorer, query, answers[query.fact.id]) for batch in prompts.batches for query in batch]
            logp = torch.tensor([value for each in scored for value in select_likeliest(each.answer.top5_logp)])
            domains = [each.query.fact.subject for each in scored]
            models[family, answers_are] = TrainedModel(path, loaded.model, batch_facts(scored), logp, domains)
        return models[family, answers_are]

    return get


def select_likeliest(logp: Sequence[float]) -> Sequence[float]:
    """Return the best answers that have 95 % of the probability, at least two."""
    p = [exp(value) for value in logp]
    return logp[: next(number for number in range(2, len(p) + 1) if sum(p[:number]) >= 0.95 * sum(p))]


def compute_scores(trained: TrainedModel) -> torch.Tensor:
    """Return the scores of all candidates by the current weights, from forward passes of transformers."""
    scores = torch.zeros(len(trained.fact_batches.facts))
    for batch, owners in zip(trained.fact_batches.batches, trained.fact_batches.owners, strict=True):
        scores.index_add_(0, owners.flatten(), batch.score(compute_logits(trained.model, batch)).flatten())
    return scores


def compute_logits(model: Any, batch: ScoredBatch) -> torch.Tensor:
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    scored = logits[torch.arange(len(logits))[:, None], batch.positions]
    return scored[:, None].expand(-1, batch.directions, -1, -1)


def score_rounded(
    trained: TrainedModel, measured: ScoreChanges, roundings: Roundings, name: str, type: str, transposed: bool = False
) -> torch.Tensor:
    """Return the scores of the model with one weight rounded, which may be stored `transposed`."""
    weight = dict(trained.model.named_parameters())[name]
    before = weight.data
    matrix = before.T.contiguous() if transposed else before
    rounded = roundings.roundtrip(matrix, type, measured.importance.get(name))
    weight.data = rounded.T if transposed else rounded
    try:
        return compute_scores(trained)
    finally:
        weight.data = before


def test_the_first_2048_tokens_of_a_text_guide() -> None:
    ids = torch.arange(3 * 3 * 512).reshape(3, 3, 512)
    text = CalibrationText(
        "file", "x.txt", "0" * 64, 0, ids.numel(), ids.numel(), tuple({"input_ids": n} for n in ids), ()
    )
    (first, second) = _cut_text(text)
    assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]]).flatten(), torch.arange(2048))


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, "F32"), (torch.bfloat16, "BF16")])
@pytest.mark.parametrize(("scheme", "type"), [("int8-weights", "int8-weights"), ("int4", "int4/32")])
def test_bytes_of_a_type_equal_those_of_the_converted_weight(
    scheme: str, type: str, dtype: torch.dtype, stored: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"group_size": 32} if scheme == "int4" else {}
    source = save_tiny("llama", tmp_path / "in", dtype)
    compressknow.convert(source, tmp_path / "out", quantize=scheme, scope="attention", **options)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.o_proj"):
        of_module = {name: each for name, each in tensors.items() if name.startswith(f"{module}.")}
        nbytes = sum(each.nbytes for name, each in of_module.items() if not name.endswith("_shape"))
        shape = tiny("llama").get_submodule(module).weight.shape
        assert SchemeRoundings([stored]).nbytes(type, shape) == nbytes


@pytest.mark.parametrize(
    ("family", "answers_are"),
    [
        ("llama", "candidates"),
        ("bert", "candidates"),
        ("t5", "candidates"),
        ("llama", "open"),
        ("bert", "full"),
        ("bert", "words"),
        ("t5", "open"),
    ],
)
def test_scores_equal_those_of_the_evaluation(family: str, answers_are: str, get_model: GetModel) -> None:
    trained = get_model(family, answers_are)
    measured = measure(*open_complete(trained.folder), SCHEMES, trained.fact_batches)
    torch.testing.assert_close(measured.scores, trained.logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512_bf16"}, torch.bfloat16),
        ({"avx512_bf16", "avx512_fp16"}, torch.float32),
        ({"avx512_bf16", "avx512_fp16", "amx_bf16"}, torch.bfloat16),
    ],
    ids=["older", "AMD", "Intel without AMX", "Intel"],
)
def test_factors_are_bfloat16_if_the_processor_multiplies_it_faster(
    features: set[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: dict.fromkeys(features, True))
    assert choose_factors() == dtype


@pytest.mark.parametrize("roundings", [SCHEMES, GGUF], ids=["checkpoint", "gguf"])
@pytest.mark.parametrize(
    ("family", "answers_are", "factors"),
    [
        ("llama", "candidates", torch.bfloat16),
        ("llama", "candidates", torch.float32),
        ("bert", "candidates", torch.float32),
        ("bert", "words", torch.float32),
        ("t5", "candidates", torch.bfloat16),
        ("t5", "open", torch.float32),
    ],
)
def test_estimated_changes_match_a_rounded_weight(
    family: str,
    answers_are: str,
    factors: torch.dtype,
    roundings: Roundings,
    get_model: GetModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("compress.calibrate.backward", "study.measuring"):
        monkeypatch.setattr(f"compressknow.{module}.FACTORS", factors)
    trained = get_model(family, answers_are)
    measured = measure(*open_complete(trained.folder), roundings, trained.fact_batches)
    ratios, cosines = [], []
    for (name, type), estimate in measured.facts.items():
        change = score_rounded(trained, measured, roundings, name, type) - measured.scores
        ratios.append(float(estimate.norm() / change.norm()))
        cosines.append(float(torch.nn.functional.cosine_similarity(change, estimate, dim=0)))
        # With 8 bits, changes are so small that no weight is an exception, nor is the embedding.
        assert "8" not in type or (cosines[-1] > 0.99 and 0.95 < ratios[-1] < 1.05), name
    near = sum(1 / 1.5 < ratio < 1.5 for ratio in ratios)
    assert near >= 0.95 * len(ratios), sorted(ratios)
    # The directions match too.
    assert median(cosines) > 0.95, sorted(cosines)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_small_changes_are_estimated_exactly(name: str, tmp_path: Path) -> None:
    """GPT-2 stores its matrices [in, out], Gemma scales its embedding, and the heads of both are tied to it."""
    model = tiny("gpt2") if name == "gpt2" else tiny_model("gemma3", "Gemma3ForCausalLM")
    model.save_pretrained(tmp_path)
    # Two facts of two candidates with seven tokens, and three with five.
    batches = [score_next_tokens(range(14), 2), score_next_tokens(range(30, 45), 3)]
    owners = torch.arange(4).reshape(2, 2), torch.arange(4, 10).reshape(3, 2)
    facts = FactBatches(tuple(batches), owners, torch.arange(5).repeat_interleave(2))
    trained = TrainedModel(tmp_path, model, facts, torch.empty(0), [])
    measured = measure(*open_complete(tmp_path), GGUF, facts)
    torch.testing.assert_close(measured.scores, compute_scores(trained))
    transposed = {f"{name}.weight" for name, each in model.named_modules() if isinstance(each, Conv1D)}
    matrices = {name for name, each in model.named_parameters() if each.dim() == 2 and "wpe" not in name}
    assert measured.weights.keys() == matrices
    for weight in measured.weights:
        change = score_rounded(trained, measured, GGUF, weight, "q8_0", weight in transposed) - measured.scores
        assert (measured.facts[weight, "q8_0"] - change).norm() < 0.05 * change.norm(), weight
    # In a checkpoint, rounding the head would untie it.
    assert measure(*open_complete(tmp_path), SCHEMES, facts).weights.keys() == matrices - set(
        model.all_tied_weights_keys.values()
    )


@pytest.mark.parametrize(("family", "total"), [("bert", 2), ("albert", 1)])
def test_progress_counts_each_block_once_and_ends_at_their_number(family: str, total: int, tmp_path: Path) -> None:
    """The layers of both heads, at first, and the embeddings are visited too, and ALBERT's only block twice."""
    tiny(family).save_pretrained(tmp_path)
    batch, owners = score_next_tokens(range(14), 2), torch.arange(4).reshape(2, 2)
    facts = FactBatches((batch,), (owners,), torch.tensor([0, 0, 1, 1]))
    calls: list[tuple[float | None, ...]] = []
    measure(*open_complete(tmp_path), SCHEMES, facts, advance=lambda *done: calls.append(done))
    assert list(dict.fromkeys(calls)) == [(number, total) for number in range(total + 1)]


def test_errors_count_rows_and_inputs_by_their_squared_gradients(tmp_path: Path) -> None:
    """In the importance of inputs, facts and text have equal weight."""
    model, name = tiny("llama"), "model.layers.0.self_attn.o_proj"
    model.save_pretrained(tmp_path)
    batch = score_next_tokens(range(14), 2)
    facts = FactBatches((batch,), (torch.arange(4).reshape(2, 2),), torch.arange(2).repeat_interleave(2))
    texts = batch_text([{"input_ids": torch.arange(40).reshape(2, 20)}], "causal", None)
    measured, of_text, of_both = (
        measure(*open_complete(tmp_path), GGUF, *each) for each in ((facts,), (None, texts), (facts, texts))
    )
    seen: dict[str, torch.Tensor] = {}
    layer = model.get_submodule(name)
    with layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0].detach(), y=output)):
        logits = model(**batch.inputs).logits[:, -1:]
    scores = batch.score(logits[:, None].expand(-1, 2, -1, -1))
    gradients = [torch.autograd.grad(scores[:, n].sum(), seen["y"], retain_graph=True)[0] for n in range(2)]
    squares = torch.stack(gradients).square().sum(0)
    weights = squares.sum((0, 1))[:, None] * (squares.sum(2, keepdim=True) * seen["x"].square()).sum((0, 1))
    name, weight = f"{name}.weight", layer.weight.detach()
    rounded = (GGUF.roundtrip(weight, type, measured.importance[name]) for type in ("q4_0", "q8_0"))
    errors = [float((weights * (each - weight).square()).sum()) for each in rounded]
    ratio = measured.errors[name, "q4_0"] / measured.errors[name, "q8_0"]
    assert ratio == pytest.approx(errors[0] / errors[1], rel=1e-3)
    halves = [seen["x"].square().sum((0, 1)), of_text.importance[name]]
    expected = sum(each / each.mean() for each in halves) / 2
    torch.testing.assert_close(of_both.importance[name], expected, rtol=0.01, atol=0)


def score_next_tokens(ids: range, rows: int) -> ScoredBatch:
    """Return rows of these ids, scored by the log-probabilities of two next tokens."""
    inputs = torch.tensor(ids).reshape(rows, -1)

    def score(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(3)[:, torch.arange(2), 0, torch.arange(2) + 50]

    return ScoredBatch({"input_ids": inputs}, 2, torch.full((rows, 1), inputs.shape[1] - 1), score)


def test_predicted_divergence_ranks_mixes_like_the_measured_one(get_model: GetModel) -> None:
    trained, generator = get_model("llama"), torch.Generator().manual_seed(0)
    measured = measure(*open_complete(trained.folder), SCHEMES, trained.fact_batches)
    parameters, before = dict(trained.model.named_parameters()), compute_scores(trained)
    predicted, real = [], []
    for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0):
        draws = torch.rand(len(measured.weights), generator=generator)
        mix = {
            n: "int4/32" if draw < share else "int8-weights" for n, draw in zip(measured.weights, draws, strict=True)
        }
        original = {name: parameters[name].data for name in mix}
        for name, type in mix.items():
            parameters[name].data = SCHEMES.roundtrip(original[name], type, None)
        after = compute_scores(trained)
        for name, weight in original.items():
            parameters[name].data = weight
        divergences = [
            compute_divergence(measured.scores, measured.facts[each], measured.owners) for each in mix.items()
        ]
        predicted.append(sum(float(each.mean()) for each in divergences))
        real.append(float(compute_exact_divergence(before, after, measured.owners).mean()))
    assert spearmanr(predicted, real).statistic > 0.9


def compute_exact_divergence(before: torch.Tensor, after: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    values = []
    for fact in range(int(owners.max()) + 1):
        p, q = (scores[owners == fact].double().log_softmax(0) for scores in (before, after))
        values.append((p.exp() * (p - q)).sum())
    return torch.stack(values)


def test_facts_at_risk_match_changed_answers(get_model: GetModel) -> None:
    trained = get_model("llama")
    measured = measure(*open_complete(trained.folder), GGUF, trained.fact_batches)
    # The margins of the model are large; with much smaller ones, rounding one weight changes answers.
    objects, others, margins = measured.margins
    assert margins.min() > 0
    small = 0.03 * margins
    scores = measured.scores.double()
    close = replace(measured, scores=scores.index_put((objects,), scores[others] + small))
    torch.testing.assert_close(close.margins, (objects, others, small))
    rows = {row.name: row for row in close.build_rows(GGUF)}
    predicted, real = [], []
    for name, type in measured.facts:
        change = score_rounded(trained, measured, GGUF, name, type) - measured.scores
        # Margins are those to the best other candidate.
        real.append(float((small + change[objects] - change[others] < 0).double().mean()))
        predicted.append(rows[name].by_type[type].at_risk or 0.0)
    assert 0.02 < sum(real) / len(real) < 0.5
    # Answers as sure as these become less sure on average, which a first-order estimate does not capture.
    assert 0.5 < sum(predicted) / sum(real) < 1.5, (sum(predicted), sum(real))
    assert spearmanr(predicted, real).statistic > 0.85
    # More bits risk less.
    assert all(row.by_type["q8_0"].at_risk < row.by_type["q4_0"].at_risk for row in rows.values())  # type: ignore[operator]


def test_sensitivity_of_a_domain_matches_its_facts(get_model: GetModel) -> None:
    trained = get_model("llama")
    measured = measure(*open_complete(trained.folder), SCHEMES, trained.fact_batches)
    rows = {row.name: row for row in measured.build_rows(SCHEMES, trained.domains)}
    first = torch.tensor([domain == trained.domains[0] for domain in trained.domains])
    predicted, real, kl_predicted, kl_real = [], [], [], []
    for name, row in rows.items():
        kls = []
        for type in SCHEMES.types:
            after = score_rounded(trained, measured, SCHEMES, name, type)
            divergences = compute_exact_divergence(measured.scores, after, measured.owners)
            kls.append(divergences / measured.errors[name, type])
            kl_predicted.append(row.by_type[type].facts)
            kl_real.append(float(divergences.mean()))
        per_fact = torch.stack(kls).mean(0)
        real.append(float(per_fact[first].mean() / per_fact.mean()))
        predicted.append(row.by_domain[trained.domains[0]])
        # Each domain has as many facts.
        assert sum(row.by_domain.values()) == pytest.approx(2)
    assert spearmanr(predicted, real).statistic > 0.9
    # So does the KL of each type over all facts.
    assert spearmanr(kl_predicted, kl_real).statistic > 0.9
    assert 0.5 < sum(kl_predicted) / sum(kl_real) < 2
    few = ["a"] * 4 + ["b"] * 5 + ["c"] * 55
    assert set(measured.build_rows(SCHEMES, few)[0].by_domain) == {"b", "c"}


def test_second_order_divergence_matches_the_exact_one_of_small_changes() -> None:
    torch.manual_seed(0)
    owners = torch.tensor([0, 0, 0, 1, 1])
    scores, changes = torch.randn(5), torch.randn(5) * 1e-3
    near = compute_divergence(scores, changes, owners)
    exact = compute_exact_divergence(scores, (scores + changes).double(), owners)
    torch.testing.assert_close(near, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_changes_of_text_estimate_the_divergence_of_the_next_token(family: str, get_model: GetModel) -> None:
    trained = get_model(family)
    texts = make_texts(trained, family)
    for ids, positions in ((text.inputs["input_ids"], text.positions) for text in texts):
        # Masked models predict hidden tokens; the first quarter of a text has too little context.
        assert family != "bert" or ids.gather(1, positions).eq(4).all()
        assert family != "llama" or positions.min() >= ids.shape[1] // 4
    measured = measure(*open_complete(trained.folder), SCHEMES, None, texts)
    name = next(name for name in measured.weights if "1" in name)
    # There are few draws, so that only the mean is close.
    assert 0.5 < compare_with_text(trained.model, measured, texts, SCHEMES, name, "int4/32") < 2


def test_facts_and_text_have_equal_weight_in_the_importance_of_inputs(get_model: GetModel) -> None:
    trained = get_model("llama")
    texts, facts = make_texts(trained, "llama"), trained.fact_batches
    both, *alone = (
        measure(*open_complete(trained.folder), SCHEMES, *each).importance
        for each in ((facts, texts), (facts,), (None, texts))
    )
    for name, importance in both.items():
        torch.testing.assert_close(importance, (alone[0][name] + alone[1][name]) / 2)


def test_a_head_is_rounded_in_bands_of_rows(get_model: GetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = get_model("llama")
    whole = measure(*open_complete(trained.folder), SCHEMES, trained.fact_batches)
    monkeypatch.setattr("compressknow.study.measuring.BAND", 24)
    for each, changes in measure(*open_complete(trained.folder), SCHEMES, trained.fact_batches).facts.items():
        assert (changes - whole.facts[each]).norm() < 0.02 * changes.norm()


def test_looked_up_rows_count_with_the_scale_of_the_embedding(tmp_path: Path) -> None:
    """Gemma multiplies them by the root of their width."""
    config = tiny_config("gemma3", "Gemma3ForCausalLM")
    config.tie_word_embeddings = False
    model = hf.Gemma3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(5, 37).repeat(4, 2)
    texts = batch_text([{"input_ids": ids}], "causal", None)
    measured = measure(*open_complete(tmp_path), GGUF, None, texts)
    assert 0.3 < compare_with_text(model, measured, texts, GGUF, "model.embed_tokens.weight", "q8_0") < 3


def compare_with_text(
    model: Any, measured: ScoreChanges, texts: Sequence[ScoredBatch], roundings: Roundings, name: str, type: str
) -> float:
    """Return the estimated divergence of the next token if a weight is rounded, relative to the measured one."""
    weight = dict(model.named_parameters())[name]
    original = weight.data
    before = [compute_logits(model, text)[:, 0].double().log_softmax(2) for text in texts]
    weight.data = roundings.roundtrip(original, type, measured.importance.get(name))
    after = [compute_logits(model, text)[:, 0].double().log_softmax(2) for text in texts]
    weight.data = original
    real = torch.cat([(p.exp() * (p - q)).sum(2).mean(1) for p, q in zip(before, after, strict=True)])
    return float(measured.text[name, type].double().square().mean() / 2 / real.mean())


def test_loss_of_a_type_is_its_error_times_the_mean_loss_per_error() -> None:
    """One fact with two candidates, of p = 0.8 and 0.2, and ten pieces of text, of which one changes most."""
    text = torch.ones(10, 2)
    text[0], text[3] = 2, 1000
    measured = ScoreChanges(
        weights={"w": TensorSensitivity("w", (2, 32), "other", None, {})},
        scores=torch.tensor([0.8, 0.2]).log(),
        owners=torch.tensor([0, 0]),
        facts={("w", "int8-weights"): torch.tensor([0.1, -0.1]), ("w", "int4/32"): torch.tensor([0.4, -0.4])},
        text={("w", "int8-weights"): text, ("w", "int4/32"): 4 * text},
        errors={("w", "int8-weights"): 1.0, ("w", "int4/32"): 4.0},
        importance={},
    )
    (row,) = measured.build_rows(SCHEMES)
    # KL of the fact: (0.01 - 0.06^2) / 2 and 16 times that. Of nine pieces, all but the one that changes
    # most: (8 x 1^2 + 2^2) / 9 / 2 and 16 times that.
    per_error, per_token = 0.0032 * (1 + 16 / 4) / 2, 12 / 9 / 2 * (1 + 16 / 4) / 2
    # The margin is log 4, and changes by 0.2 and 0.8.
    spread = (0.2**2 / 1 + 0.8**2 / 4) / 2
    for kind, error in (("int8-weights", 1), ("int4/32", 4)):
        rounding = row.by_type[kind]
        assert rounding.facts == pytest.approx(error * per_error, rel=1e-5)
        assert rounding.text == pytest.approx(error * per_token, rel=1e-5)
        assert rounding.at_risk == pytest.approx(NormalDist().cdf(-log(4) / sqrt(error * spread)), rel=1e-5)


@pytest.mark.parametrize(("p", "number"), [([0.96, 0.01, 0.01], 2), ([0.5, 0.3, 0.12, 0.05, 0.03], 4)])
def test_candidates_of_a_fact_have_most_of_the_probability(
    p: Sequence[float], number: int, get_model: GetModel
) -> None:
    folder = get_model("llama").folder
    loaded, probe = load_language_model(folder), open_probe(f"facts:{folder.parent / 'facts.jsonl'}")
    scorer = make_scorer(loaded.model, loaded.tokenizer, loaded.family, probe)
    query = scorer.make_query(probe.facts[0])
    assert isinstance(query, Query)
    best = query.fact.candidates[: len(p)]
    answer = make_answer(0, True, top5=best, top5_logp=[log(each) for each in p])
    assert len(batch_facts([ScoredFact(scorer, query, answer)]).facts) == number


def test_experts_stored_one_by_one_are_left_out(tmp_path: Path) -> None:
    """An expert sees only some tokens of some rows."""
    model, _ = try_build("SwitchTransformersForConditionalGeneration")
    model.save_pretrained(tmp_path / "in")
    ids = torch.arange(5, 29).reshape(2, 12)
    texts = batch_text([{"input_ids": ids, "decoder_input_ids": ids[:, :7]}], "seq2seq", None)
    names = measure(*open_complete(tmp_path / "in"), SCHEMES, None, texts).weights
    assert any(name.endswith("router.classifier.weight") for name in names)
    assert not any(".experts." in name for name in names)


def test_facts_that_guide_are_even_over_relations() -> None:
    facts = [Fact(f"{n}", "p", f"r{n // 100}", "science", "s", "o", f"{n} is [MASK].") for n in range(300)]
    answers = [make_answer(n, True, probe="p", fact_id=fact.id) for n, fact in enumerate(facts)]
    (known,) = select_known_facts(make_answers(answers), [Probe("p", "closed/1", tuple(facts))])
    assert Counter(fact.relation for fact in known.facts) == {"r0": 67, "r1": 67, "r2": 66}


def test_text_is_scored_in_context_and_by_its_probabilities() -> None:
    logits, scores = torch.randn(4, 2, 16, 50), []
    for constant in (0.0, 3.0):
        (batch,) = batch_text([{"input_ids": torch.arange(256).reshape(4, 64)}], "causal", None)
        assert (batch.positions >= 16).all()
        scores.append(batch.score(logits + constant))
    # A constant that is added to all logits changes no probability.
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


def make_texts(trained: TrainedModel, family: str) -> list[ScoredBatch]:
    """Return the prompts of facts as batches of text."""
    rows = [batch.inputs for batch in trained.fact_batches.batches if len(batch.positions) >= 4]
    batches = [{name: ids[:16] for name, ids in inputs.items() if name != "attention_mask"} for inputs in rows]
    kind = {"llama": "causal", "bert": "masked", "t5": "seq2seq"}[family]
    mask = 4 if family == "bert" else None
    return batch_text(batches, kind, mask)


def test_block_that_cannot_run_alone_is_refused(tmp_path: Path) -> None:
    """Blocks of X-MOD read the languages of all rows from a one-dimensional tensor."""
    tiny_model("xmod", "XmodForMaskedLM").save_pretrained(tmp_path)
    ids = torch.full((2, 40), 9)
    ids[:, ::4] = 4
    texts = batch_text([{"input_ids": ids}], "masked", 4)
    with pytest.raises(BlockwiseUnsupported, match="shape of the mask"):
        measure(*open_complete(tmp_path), SCHEMES, None, texts)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("xlnet", "XLNetLMHeadModel", "no gradient reaches its blocks"),
        ("fsmt", "FSMTForConditionalGeneration", "one of its own checks fails"),
        ("reformer", "ReformerModelWithLMHead", r"into training mode$"),
        ("ibert", "IBertForMaskedLM", r"layer\.0 reads comes from no embedding$"),
        ("musicgen_melody_decoder", "MusicgenMelodyForCausalLM", "is invalid for input"),
    ],
)
def test_model_without_blockwise_gradients_is_refused(module: str, name: str, message: str, tmp_path: Path) -> None:
    """XLNet and FSMT pass states of [tokens, rows] between blocks, Reformer has its own backward pass, and I-BERT and
    MusicGen Melody do not have a single torch embedding."""
    tiny_model(module, name).save_pretrained(tmp_path)
    ids = torch.arange(5, 41).reshape(3, 12)
    kind = "seq2seq" if module == "fsmt" else "causal"
    texts = batch_text([{"input_ids": ids, "decoder_input_ids": ids[:, :7]}], kind, None)
    with pytest.raises(BlockwiseUnsupported, match=message):
        measure(*open_complete(tmp_path), SCHEMES, None, texts)


# Measures a model on text, and prints the peak memory of the process.
PEAK = """
import sys, torch
from compressknow.model.groups import read_structure
from compressknow.model.loading import open_complete
from compressknow.model.tensors import OpenFiles
from compressknow.study.measuring import measure
from compressknow.study.guides import batch_text
from compressknow.study.measuring import SchemeRoundings
from compressknow.base.system import measure_peak_memory
text = [{"input_ids": torch.arange(256).reshape(4, 64)}]
texts = batch_text(text, "causal", None)
SchemeRoundings.types = ("int8-weights",)
measured = measure(*open_complete(sys.argv[1]), SchemeRoundings(), None, texts)
print(len(measured.weights), measure_peak_memory())
"""


@long
def test_four_times_the_blocks_need_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for blocks in (4, 16):
        config = hf.LlamaConfig(
            vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=blocks, num_attention_heads=8
        )
        folder = tmp_path / str(blocks)
        hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        process = subprocess.run([sys.executable, "-c", PEAK, folder], capture_output=True, text=True, check=True)
        weights, peak = map(int, process.stdout.split())
        assert weights == 7 * blocks + 1
        peaks.append(peak)
    # Twelve more blocks have 500 MB in float32.
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_stored_sensitivity_is_read_only_for_the_same_guidance(tmp_path: Path) -> None:
    types = {"q8_0": Rounding(68, 0.1, None, 0.02)}
    rows = (TensorSensitivity("a", (2, 32), "attention", 0, types, "encoder", "q", {"science": 1.5}),)
    guidance = Guidance("gguf", ("q8_0",), 64, "facts")
    written = Sensitivity("model", guidance, rows, {"science": 9}, 128)
    write_sensitivity(written, tmp_path / "sensitivity.json")
    assert read_sensitivity(tmp_path / "sensitivity.json", "model", guidance) == written
    assert read_sensitivity(tmp_path / "sensitivity.json", "model", replace(guidance, facts=65)) is None
    assert read_sensitivity(tmp_path / "none.json", "model", guidance) is None
    assert written.predict({"a": "q8_0"}, "facts") == 0.1
    with pytest.raises(ValueError, match="to text was not measured"):
        rows[0].by_type["q8_0"].kl("both")


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff", b'{"sensitivity": {}, "sha256": ""}', None])
def test_damaged_sensitivity_is_ignored(tmp_path: Path, content: bytes | None) -> None:
    file, guidance = tmp_path / "sensitivity.json", Guidance("gguf", ("q8_0",))
    rows = (TensorSensitivity("w", (2, 32), "other", None, {"q8_0": Rounding(68, text=0.25)}),)
    write_sensitivity(Sensitivity("model", guidance, rows), file)
    file.write_bytes(file.read_bytes().replace(b"0.25", b"0.75") if content is None else content)
    assert read_sensitivity(file, "model", guidance) is None
