"""What rounding a weight does to facts: the first-order estimate against really rounding it and running the model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from scipy.stats import spearmanr

import compressknow
from compressknow.compress.calibrate.backward import ScoredBatch, choose_factors
from compressknow.compress.calibrate.model import BlockwiseUnsupported
from compressknow.engine.language_model import load_language_model
from compressknow.evaluate.evaluate import evaluate, make_prompts
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.model.loading import open_complete
from compressknow.study.guides import ScoredFact, batch_facts, batch_text
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
from tests.zoo import tiny_model


class FewSchemes(SchemeRoundings):
    types = ("int8-weights", "int4/32")


class FewTypes(GgufRoundings):
    types = ("q8_0", "q5_0", "q4_0", "q3_k")


SCHEMES, GGUF = FewSchemes(), FewTypes()


class Known(NamedTuple):
    folder: Path
    model: Any
    questions: FactBatches
    logp: torch.Tensor
    domains: list[str]


@pytest.fixture(scope="module")
def known_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Known]:
    folder = tmp_path_factory.mktemp("sensitivity")
    made: dict[tuple[str, str], Known] = {}

    def of(family: str, answers_are: str = "candidates") -> Known:
        if (family, answers_are) not in made:
            path = save_trained(family, folder / family)
            loaded = load_language_model(path)
            probe = open_probe(f"facts:{write_facts(folder / 'facts.jsonl')}")
            if answers_are != "candidates":
                facts = tuple(replace(fact, candidates=None) for fact in probe.facts)
                words = tuple(sorted({fact.obj_label for fact in facts})) if answers_are == "words" else ()
                probe = replace(probe, facts=facts, vocabulary=answers_are, words=words)
            scorer = make_scorer(loaded.model, loaded.tokenizer, loaded.family, probe)
            prompts = make_prompts(scorer)
            answers = {answer.fact_id: answer for batch in evaluate(prompts) for answer in batch}
            asked = [ScoredFact(scorer, query, answers[query.fact.id]) for batch in prompts.batches for query in batch]
            logp = torch.tensor([value for each in asked for value in likeliest(each.answer.top5_logp)])
            domains = [each.query.fact.subject for each in asked]
            made[family, answers_are] = Known(path, loaded.model, batch_facts(asked), logp, domains)
        return made[family, answers_are]

    return of


def likeliest(logp: Sequence[float]) -> Sequence[float]:
    """Those of the best answers that have 95 % of their probability, two at least."""
    p = [exp(value) for value in logp]
    return logp[: next(number for number in range(2, len(p) + 1) if sum(p[:number]) >= 0.95 * sum(p))]


def scores_of(known: Known) -> torch.Tensor:
    """Of all candidates, by the model as it is now: plain passes of transformers."""
    found = torch.zeros(len(known.questions.facts))
    for batch, owners in zip(known.questions.batches, known.questions.owners, strict=True):
        found.index_add_(0, owners.flatten(), batch.score(logits_of(known.model, batch)).flatten())
    return found


def logits_of(model: Any, batch: ScoredBatch) -> torch.Tensor:
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    own = logits[torch.arange(len(logits))[:, None], batch.positions]
    return own[:, None].expand(-1, batch.directions, -1, -1)


def rounded(known: Known, measured: ScoreChanges, roundings: Roundings, name: str, type: str) -> torch.Tensor:
    """The scores of the model with one weight rounded."""
    weight = dict(known.model.named_parameters())[name]
    before = weight.data
    weight.data = roundings.roundtrip(before, type, measured.importance.get(name))
    try:
        return scores_of(known)
    finally:
        weight.data = before


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
        own = {name: each for name, each in tensors.items() if name.startswith(f"{module}.")}
        nbytes = sum(each.nbytes for name, each in own.items() if not name.endswith("_shape"))
        shape = tiny("llama").get_submodule(module).weight.shape
        assert SchemeRoundings(dtype=stored).nbytes(type, shape) == nbytes


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
def test_scores_equal_those_of_the_evaluation(family: str, answers_are: str, known_by: Callable[..., Known]) -> None:
    known = known_by(family, answers_are)
    measured = measure(*open_complete(known.folder), SCHEMES, known.questions)
    torch.testing.assert_close(measured.scores, known.logp, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({}, torch.float32),
        ({"avx512_bf16"}, torch.bfloat16),
        ({"avx512_bf16", "avx512_fp16"}, torch.float32),
        ({"avx512_bf16", "avx512_fp16", "amx_bf16"}, torch.bfloat16),
    ],
    ids=["older", "AMD's", "Intel's without AMX", "Intel's"],
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
    known_by: Callable[..., Known],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("compress.calibrate.backward", "study.measuring"):
        monkeypatch.setattr(f"compressknow.{module}.FACTORS", factors)
    known = known_by(family, answers_are)
    measured = measure(*open_complete(known.folder), roundings, known.questions)
    ratios, cosines = [], []
    for (name, type), estimate in list(measured.facts.items())[::2]:
        change = rounded(known, measured, roundings, name, type) - measured.scores
        ratios.append(float(estimate.norm() / change.norm()))
        cosines.append(float(torch.nn.functional.cosine_similarity(change, estimate, dim=0)))
    near = sum(1 / 1.5 < ratio < 1.5 for ratio in ratios)
    assert near >= 0.95 * len(ratios), sorted(ratios)
    # And not in size alone.
    assert median(cosines) > 0.95, sorted(cosines)


def test_predicted_divergence_ranks_mixes_like_the_measured_one(known_by: Callable[..., Known]) -> None:
    known, generator = known_by("llama"), torch.Generator().manual_seed(0)
    measured = measure(*open_complete(known.folder), SCHEMES, known.questions)
    parameters, before = dict(known.model.named_parameters()), scores_of(known)
    predicted, real = [], []
    for share in (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0):
        draws = torch.rand(len(measured.weights), generator=generator)
        mix = {
            n: "int4/32" if draw < share else "int8-weights" for n, draw in zip(measured.weights, draws, strict=True)
        }
        kept = {name: parameters[name].data for name in mix}
        for name, type in mix.items():
            parameters[name].data = SCHEMES.roundtrip(kept[name], type, None)
        after = scores_of(known)
        for name, weight in kept.items():
            parameters[name].data = weight
        divergences = [
            compute_divergence(measured.scores, measured.facts[each], measured.owners) for each in mix.items()
        ]
        predicted.append(sum(float(each.mean()) for each in divergences))
        real.append(float(exact_divergence(before, after, measured.owners).mean()))
    assert spearmanr(predicted, real).statistic > 0.9


def exact_divergence(before: torch.Tensor, after: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    values = []
    for fact in range(int(owners.max()) + 1):
        one, other = (scores[owners == fact].double().log_softmax(0) for scores in (before, after))
        values.append((one.exp() * (one - other)).sum())
    return torch.stack(values)


def test_facts_at_risk_match_changed_answers(known_by: Callable[..., Known]) -> None:
    known = known_by("llama")
    measured = measure(*open_complete(known.folder), GGUF, known.questions)
    # The model is sure of what it knows: with margins as small as these, rounding one weight changes answers.
    objects, others, margins = measured.margins
    assert margins.min() > 0
    near = 0.03 * margins
    scores = measured.scores.double()
    close = replace(measured, scores=scores.index_put((objects,), scores[others] + near))
    torch.testing.assert_close(close.margins, (objects, others, near))
    rows = {row.name: row for row in close.build_rows(GGUF)}
    predicted, real = [], []
    for name, type in measured.facts:
        change = rounded(known, measured, GGUF, name, type) - measured.scores
        # The best other candidate alone, which margins are of.
        real.append(float((near + change[objects] - change[others] < 0).double().mean()))
        predicted.append(rows[name].by_type[type].at_risk or 0.0)
    assert 0.02 < sum(real) / len(real) < 0.5
    # Fewer by a third: what is so sure becomes less sure in the mean, which no first order tells.
    assert 0.5 < sum(predicted) / sum(real) < 1.5, (sum(predicted), sum(real))
    assert spearmanr(predicted, real).statistic > 0.85
    # More bits risk less.
    assert all(row.by_type["q8_0"].at_risk < row.by_type["q4_0"].at_risk for row in rows.values())  # type: ignore[operator]


def test_sensitivity_of_a_domain_matches_its_facts(known_by: Callable[..., Known]) -> None:
    known = known_by("llama")
    measured = measure(*open_complete(known.folder), SCHEMES, known.questions)
    rows = {row.name: row for row in measured.build_rows(SCHEMES, known.domains)}
    first = torch.tensor([domain == known.domains[0] for domain in known.domains])
    predicted, real = [], []
    for name, row in rows.items():
        kls = []
        for type in SCHEMES.types:
            after = rounded(known, measured, SCHEMES, name, type)
            kls.append(exact_divergence(measured.scores, after, measured.owners) / measured.errors[name, type])
        per_fact = torch.stack(kls).mean(0)
        real.append(float(per_fact[first].mean() / per_fact.mean()))
        predicted.append(row.by_domain[known.domains[0]])
        # As many facts each.
        assert sum(row.by_domain.values()) == pytest.approx(2)
    assert spearmanr(predicted, real).statistic > 0.9
    few = ["a"] * 4 + ["b"] * 60
    assert set(measured.build_rows(SCHEMES, few)[0].by_domain) == {"b"}


def test_second_order_divergence_matches_the_exact_one_of_small_changes() -> None:
    torch.manual_seed(0)
    owners = torch.tensor([0, 0, 0, 1, 1])
    scores, changes = torch.randn(5), torch.randn(5) * 1e-3
    near = compute_divergence(scores, changes, owners)
    torch.testing.assert_close(near, exact_divergence(scores, (scores + changes).double(), owners), rtol=0.02, atol=0)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_changes_of_text_estimate_the_divergence_of_the_next_token(family: str, known_by: Callable[..., Known]) -> None:
    known = known_by(family)
    texts = text_of(known, family)
    measured = measure(*open_complete(known.folder), SCHEMES, None, texts)
    name = next(name for name in measured.weights if "1" in name)
    parameters = dict(known.model.named_parameters())
    before, kept = [logits_of(known.model, text)[:, 0].double().log_softmax(2) for text in texts], parameters[name].data
    parameters[name].data = SCHEMES.roundtrip(kept, "int4/32", None)
    after = [logits_of(known.model, text)[:, 0].double().log_softmax(2) for text in texts]
    parameters[name].data = kept
    real = torch.cat([(p.exp() * (p - q)).sum(2).mean(1) for p, q in zip(before, after, strict=True)])
    estimate = measured.text[name, "int4/32"].double().square().mean(1) / 2
    # Draws are few, so that the mean alone is near.
    assert 0.5 < float(estimate.mean() / real.mean()) < 2


def test_experts_stored_one_by_one_are_left_out(tmp_path: Path) -> None:
    """They get some tokens of some rows."""
    model, _ = try_build("SwitchTransformersForConditionalGeneration")
    model.save_pretrained(tmp_path / "in")
    ids = torch.arange(5, 29).reshape(2, 12)
    texts = batch_text([{"input_ids": ids, "decoder_input_ids": ids[:, :7]}], "seq2seq", None, seed=0)
    names = measure(*open_complete(tmp_path / "in"), SCHEMES, None, texts).weights
    assert any(name.endswith("router.classifier.weight") for name in names)
    assert not any(".experts." in name for name in names)


def text_of(known: Known, family: str) -> list[ScoredBatch]:
    """The prompts of facts over and over, as text."""
    rows = [batch.inputs for batch in known.questions.batches if len(batch.positions) >= 4]
    picked = [{name: ids[:16] for name, ids in inputs.items() if name != "attention_mask"} for inputs in rows]
    kind = {"llama": "causal", "bert": "masked", "t5": "seq2seq"}[family]
    mask = 4 if family == "bert" else None
    return batch_text(picked, kind, mask, seed=0)


def test_block_that_cannot_run_alone_is_refused(tmp_path: Path) -> None:
    """Those of X-MOD read the languages of all copies of the rows, in a tensor of one dimension."""
    tiny_model("xmod", "XmodForMaskedLM").save_pretrained(tmp_path)
    ids = torch.full((2, 40), 9)
    ids[:, ::4] = 4
    texts = batch_text([{"input_ids": ids}], "masked", 4, seed=0)
    with pytest.raises(BlockwiseUnsupported, match="shape of the mask"):
        measure(*open_complete(tmp_path), SCHEMES, None, texts)


@pytest.mark.parametrize(
    ("of", "name", "said"),
    [
        ("xlnet", "XLNetLMHeadModel", "no gradient reaches its blocks"),
        ("fsmt", "FSMTForConditionalGeneration", "one of its own checks fails"),
        ("reformer", "ReformerModelWithLMHead", r"into training mode$"),
        ("ibert", "IBertForMaskedLM", r"layer\.0 reads comes from no embedding$"),
        ("musicgen_melody_decoder", "MusicgenMelodyForCausalLM", "is invalid for input"),
    ],
)
def test_model_without_blockwise_gradients_is_refused(of: str, name: str, said: str, tmp_path: Path) -> None:
    """XLNet and FSMT hand states of [tokens, rows] from block to block; Reformer goes back in a way of its own; the
    embedding of I-BERT is none of torch's, and MusicGen Melody has a list of them."""
    tiny_model(of, name).save_pretrained(tmp_path)
    ids = torch.arange(5, 41).reshape(3, 12)
    kind = "seq2seq" if of == "fsmt" else "causal"
    texts = batch_text([{"input_ids": ids, "decoder_input_ids": ids[:, :7]}], kind, None, seed=0)
    with pytest.raises(BlockwiseUnsupported, match=said):
        measure(*open_complete(tmp_path), SCHEMES, None, texts)


# Measures a model of some blocks on text, and says the most memory that the process had.
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
texts = batch_text(text, "causal", None, 0)
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
        done = subprocess.run([sys.executable, "-c", PEAK, folder], capture_output=True, text=True, check=True)
        weights, peak = map(int, done.stdout.split())
        assert weights == 7 * blocks + 1
        peaks.append(peak)
    # Twelve blocks more are 500 MB in float32.
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_stored_sensitivity_is_read_only_for_the_same_guidance(tmp_path: Path) -> None:
    types = {"q8_0": Rounding(68, 0.1, None, 0.02)}
    rows = (TensorSensitivity("a", (2, 32), "attention", 0, types, "encoder", "q", {"science": 1.5}),)
    guidance = Guidance("gguf", ("q8_0",), 64, "facts")
    written = Sensitivity("model", guidance, rows, {"science": 9}, 128)
    write_sensitivity(written, tmp_path / "found.json")
    assert read_sensitivity(tmp_path / "found.json", "model", guidance) == written
    assert read_sensitivity(tmp_path / "found.json", "model", replace(guidance, facts=65)) is None
    assert read_sensitivity(tmp_path / "none.json", "model", guidance) is None
    assert written.predict({"a": "q8_0"}, "facts") == 0.1
    with pytest.raises(ValueError, match="to text was not measured"):
        rows[0].by_type["q8_0"].kl("both")


@pytest.mark.parametrize("content", [b"[]", b"{}", b"\xff", b'{"sensitivity": {}, "sha256": ""}', None])
def test_damaged_sensitivity_is_ignored(tmp_path: Path, content: bytes | None) -> None:
    file, guidance = tmp_path / "found.json", Guidance("gguf", ("q8_0",))
    rows = (TensorSensitivity("w", (2, 32), "other", None, {"q8_0": Rounding(68, text=0.25)}),)
    write_sensitivity(Sensitivity("model", guidance, rows), file)
    file.write_bytes(file.read_bytes().replace(b"0.25", b"0.75") if content is None else content)
    assert read_sensitivity(file, "model", guidance) is None
