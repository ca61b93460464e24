"""Gradients of scores computed block by block equal those of torch for the whole model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from compressknow.compress.calibrate.backward import Product, ScoredBatch, compute_gradients
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.compress.sources import Sources
from compressknow.model.groups import read_structure
from compressknow.model.loading import open_complete
from compressknow.model.tensors import OpenFiles
from compressknow.study.measuring import SchemeRoundings, measure
from tests.compress.test_zoo_converts import try_build
from tests.models import save_tiny
from tests.zoo import make_inputs

# Longformer divides its queries in place, blocks of Zamba share weights, and Moss does not pass `use_cache` on. Blocks
# read a bias per row and head (BLOOM), or per head, of which there are as many here as copies of rows (MPT). CTRL
# scales its embeddings in place.
CLASSES = (
    "BertForMaskedLM",
    "LongformerForMaskedLM",
    "ZambaForCausalLM",
    "MossTranscribeDiarizeForConditionalGeneration",
    "BloomForCausalLM",
    "MptForCausalLM",
    "CTRLLMHeadModel",
)


def score(logits: torch.Tensor) -> torch.Tensor:
    factors = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(0))
    return (logits.log_softmax(-1) * factors).sum((2, 3))


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_equal_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model, _ = try_build(name)
    model.save_pretrained(tmp_path / "in")
    inputs = {key: value for key, value in make_inputs(model).items() if isinstance(value, torch.Tensor)}
    positions = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
    found: dict[str, torch.Tensor] = {}

    def visit(_: str, products: Mapping[str, Sequence[Product]]) -> None:
        for parameter, parts in products.items():
            for part in parts:
                if part.inputs.is_floating_point():
                    gradient = torch.einsum("rdto,rti->oi", part.gradients.float(), part.inputs.float())
                    found[parameter] = found.get(parameter, torch.zeros(1)) + gradient

    checkpoint, tree = open_complete(tmp_path / "in")
    structure = read_structure(tree)
    weights = [weight for weight in structure.linears if weight.layer is not None and weight.group != "vision"]
    with OpenFiles() as files:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, structure), files)
        (scores,) = compute_gradients(streamed, weights, [ScoredBatch(inputs, 2, positions, score)], visit)
    expected_scores = score(model(**inputs).logits[:, None].expand(-1, 2, -1, -1))
    torch.testing.assert_close(scores, expected_scores.detach())
    expected_scores.sum().backward()
    for weight in weights:
        expected = model.get_parameter(weight.parameter).grad
        if expected is None:  # Longformer's for global attention, which no token of the text has.
            assert weight.parameter not in found
            continue
        # Inputs of blocks and gradients are kept in 16 bits.
        assert (found[weight.parameter] - expected).norm() < 0.05 * expected.norm(), weight.parameter


def test_layers_with_the_same_input_keep_it_once(tmp_path: Path) -> None:
    checkpoint, tree = open_complete(save_tiny("bert", tmp_path / "in"))
    structure, ids = read_structure(tree), torch.arange(5, 17)[None]
    kept: dict[str, int] = {}

    def visit(_: str, products: Mapping[str, Sequence[Product]]) -> None:
        kept.update({name: parts[0].inputs.data_ptr() for name, parts in products.items() if "attention" in name})

    with OpenFiles() as files:
        streamed = StreamedModel(tree, Sources(checkpoint, tree, structure), files)
        weights = [weight for weight in structure.linears if ".layer.1.attention.self." in weight.module]
        batch = ScoredBatch({"input_ids": ids}, 1, torch.arange(ids.shape[1])[None], score)
        compute_gradients(streamed, weights, [batch], visit)
    assert len(kept) == 3
    assert len(set(kept.values())) == 1


def test_a_matrix_multiplied_in_parts_is_left_out(tmp_path: Path) -> None:
    """DeepSeek V4 multiplies each group of its rows by a part of the heads."""
    model, _ = try_build("DeepseekV4ForCausalLM")
    model.save_pretrained(tmp_path / "in")
    ids = torch.arange(5, 29).reshape(2, 12)
    texts = [ScoredBatch({"input_ids": ids}, 1, torch.arange(12).expand(2, -1), score)]
    names = measure(*open_complete(tmp_path / "in"), SchemeRoundings(), None, texts).weights
    assert any(name.endswith("o_b_proj.weight") for name in names)
    assert not any(name.endswith("o_a_proj.weight") for name in names)
