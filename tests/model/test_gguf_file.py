"""Groups and layers of a GGUF file's tensors, by llama.cpp's names."""

from __future__ import annotations

from compressknow.model.gguf_file import Tensor, find_groups

# Group and layer of matrices, by name. Norms of single heads are matrices too.
PLACES = {
    "token_embd.weight": ("embedding", None),
    "output.weight": ("final", None),
    "blk.0.attn_q.weight": ("attention", 0),
    "blk.11.attn_qkv.weight": ("attention", 11),
    "dec.blk.0.cross_attn_o.weight": ("attention", 0),
    "enc.blk.0.attn_rel_b.weight": ("other", 0),
    "blk.0.attn_q_norm.weight": ("other", 0),
    "blk.0.ffn_down_exps.weight": ("feed-forward", 0),
    "enc.blk.3.ffn_up.weight": ("feed-forward", 3),
    "blk.0.ffn_gate_inp.weight": ("other", 0),
    "blk.0.ffn_sub_norm.weight": ("other", 0),
    "v.blk.2.ffn_up.weight": ("vision", 2),
    "a.blk.4.attn_q.weight": ("vision", 4),
}


def make_tensor(name: str, *shape: int) -> Tensor:
    return Tensor(name, "f16", shape, 0)


def test_a_tensor_has_the_group_and_layer_of_its_name() -> None:
    tensors = {name: make_tensor(name, 64, 64) for name in PLACES}
    groups = find_groups(tensors)
    assert {name: (groups[name], tensors[name].layer) for name in PLACES} == PLACES


def test_an_embedding_is_the_final_layer_if_there_is_no_other() -> None:
    """A norm of the output is not one."""
    tensors = [make_tensor("token_embd.weight", 64, 64), make_tensor("output_norm.weight", 64)]
    assert find_groups({each.name: each for each in tensors}) == {
        "token_embd.weight": "final",
        "output_norm.weight": "not-linear",
    }
