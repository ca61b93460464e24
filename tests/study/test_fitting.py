"""The choice of GGUF types for a size, and invalid arguments of it. tests/gguf/test_fit.py makes the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp_py_sync")

import compressknow
from compressknow.api.export import OF_RECIPE, _read_types
from compressknow.base.errors import CheckpointError, OutputError, UsageError
from compressknow.base.format import parse_size
from compressknow.compress.steps import Calibration
from compressknow.compress.weights import read_stored_weights
from compressknow.gguf.choice import TypeChoice
from compressknow.gguf.export import find_main_type
from compressknow.gguf.grids import get_nbytes, list_legal_types
from compressknow.gguf.tensors import Tensors, align, resolve_types
from compressknow.model.gguf_file import Tensor
from compressknow.model.loading import open_complete
from compressknow.study.allocation import SizeTarget, check_budget, fit_types
from compressknow.study.sensitivity import Guidance, Rounding, Sensitivity, TensorSensitivity
from tests.gguf.making import get_llama_cpp_name, save_checkpoint
from tests.knowing import write_bear

IDS = (("atlas", "capital/1"),)
OVERHEAD = 50_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama-tied", tmp_path_factory.mktemp("fitting") / "model")


@pytest.fixture(scope="module")
def tensors(model: Path) -> Tensors:
    """The tensors of the 16-bit GGUF file of the model."""
    source = read_stored_weights(open_complete(model)[0])
    weights = {
        "token_embd.weight" if weight.group == "final" else get_llama_cpp_name(weight.module): (weight,)
        for weight in source.structure.linears
    }
    stored = {
        name: Tensor(name, "bf16", weight.shape[::-1], 2 * prod(weight.shape)) for name, (weight,) in weights.items()
    }
    stored["output_norm.weight"] = Tensor("output_norm.weight", "f32", (256,), 1024)
    return Tensors(source, stored, weights, {})


@pytest.fixture(scope="module")
def sensitivity(tensors: Tensors) -> Sensitivity:
    """A sensitivity in which attention matters more for facts, and the other weights for text."""
    rows = []
    for (weight,) in tensors.weights.values():
        facts, text = (8.0, 0.1) if weight.group == "attention" else (0.1, 8.0)
        by_type = {
            kind: Rounding(get_nbytes(kind, weight.shape), facts / nbytes, text / nbytes)
            for kind in list_legal_types(weight.shape[-1])
            for nbytes in [get_nbytes(kind, weight.shape) / prod(weight.shape)]
        }
        name = tensors.source.structure.tied.get(weight.parameter, weight.parameter)
        rows.append(TensorSensitivity(name, weight.shape, weight.group or "other", weight.layer, by_type))
    guidance = Guidance("gguf", ("q8_0",), 40, "1" * 64, 1000, "2" * 64, IDS, text_tokens=4000)
    return Sensitivity("0" * 64, guidance, tuple(rows))


def compute_bits(types: Mapping[str, str], tensors: Tensors, group: str) -> float:
    of_group = [tensors.tensors[name] for name in types if tensors.groups[name] == group]
    nbytes = sum(get_nbytes(types[tensor.name], tensor.shape[::-1]) for tensor in of_group)
    return 8 * nbytes / sum(tensor.numel for tensor in of_group)


def test_guide_decides_where_bits_go(sensitivity: Sensitivity, tensors: Tensors) -> None:
    targets = {guide: SizeTarget(700_000, guide=guide) for guide in ("facts", "text", "both")}
    fits = {guide: fit_types(sensitivity, tensors, OVERHEAD, target) for guide, target in targets.items()}
    attention = {guide: compute_bits(types, tensors, "attention") for guide, (types, _) in fits.items()}
    assert attention["facts"] > attention["both"] > attention["text"]
    types, record = fits["facts"]
    assert types.keys() == set(tensors.weights)
    by_name, tied = {row.name: row for row in sensitivity.rows}, tensors.source.structure.tied
    names = {name: tied.get(weight.parameter, weight.parameter) for name, (weight,) in tensors.weights.items()}
    loss = sum(by_name[names[name]].by_type[kind].facts or 0.0 for name, kind in types.items() if kind != "bf16")
    assert {guide: fit["guided_by"] for guide, (_, fit) in fits.items()} == dict.fromkeys(fits, IDS)
    by_text = SizeTarget(700_000, guide="text", rounding="nearest")
    assert fit_types(sensitivity, tensors, OVERHEAD, by_text)[1]["guided_by"] == ()
    assert record == {
        **{"budget": 700_000, "guide": "facts", "rounding": "gptq", "must": [], "predicted_kl": pytest.approx(loss)},
        **{"facts": 40, "facts_sha256": "1" * 64, "guided_by": IDS, "tokens": 4000, "text_sha256": "2" * 64},
    }


def test_tensor_of_several_weights_loses_what_all_of_them_do(sensitivity: Sensitivity, tensors: Tensors) -> None:
    """An embedding that is no head is no Linear weight, but was measured too."""
    target = SizeTarget(2_000_000, must=((".", "q8_0"),))
    _, separate = fit_types(sensitivity, tensors, OVERHEAD, target)
    weights, stored = dict(tensors.weights), dict(tensors.tensors)
    weights["blk.0.attn_q.weight"] += weights.pop("blk.0.attn_k.weight")
    del weights["token_embd.weight"], stored["blk.0.attn_k.weight"]
    embedding = "model.embed_tokens.weight"
    rows = tuple(replace(row, group="embedding") if row.name == embedding else row for row in sensitivity.rows)
    merged = replace(tensors, tensors=stored, weights=weights)
    _, joined = fit_types(replace(sensitivity, rows=rows), merged, OVERHEAD, target)
    assert joined["predicted_kl"] == pytest.approx(separate["predicted_kl"])


def test_must_sets_the_types(sensitivity: Sensitivity, tensors: Tensors) -> None:
    rules = (("attention", "q8_0"), ("blk.0.attn_v", "Q6_K"))
    types, record = fit_types(sensitivity, tensors, OVERHEAD, SizeTarget(800_000, guide="text", must=rules))
    chosen = {name: kind for name, kind in types.items() if "attn" in name}
    assert chosen.pop("blk.0.attn_v.weight") == "q6_k"
    assert set(chosen.values()) == {"q8_0"}
    assert record["must"] == [["attention", "q8_0"], ["blk.0.attn_v", "q6_k"]]
    used = sum(align(get_nbytes(kind, tensors.tensors[name].shape[::-1])) for name, kind in types.items())
    assert 0.98 * 800_000 < OVERHEAD + used <= 800_000


def test_bits_count_the_whole_file(sensitivity: Sensitivity, tensors: Tensors) -> None:
    numel = sum(tensor.numel for tensor in tensors.tensors.values())
    _, record = fit_types(sensitivity, tensors, OVERHEAD, SizeTarget(bits=4.5))
    assert record["budget"] == int(numel * 4.5 / 8)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (SizeTarget(300_000), r"300\.0 kB is too small: the smallest file has .*\n.*\(q2_k\).*50\.0 kB of vocabulary"),
        (
            SizeTarget(900_000, must=(("feed-forward", "f16"),)),
            r"--must f16: blk\.0\.ffn_\w+\.weight cannot be of that",
        ),
        (SizeTarget(2_700_000), r"2\.7 MB is not less than the whole model"),
        (SizeTarget(900_000, must=(("nowhere", "q8_0"),)), "'nowhere' is not a scope, and matches no tensor"),
    ],
)
def test_impossible_target_is_refused(
    target: SizeTarget, message: str, sensitivity: Sensitivity, tensors: Tensors
) -> None:
    with pytest.raises(UsageError, match=message):
        fit_types(sensitivity, tensors, OVERHEAD, target)


def test_every_size_below_the_unquantized_file_is_possible(sensitivity: Sensitivity, tensors: Tensors) -> None:
    whole = OVERHEAD + sum(align(tensors.tensors[name].nbytes) for name in tensors.weights)
    types, _ = fit_types(sensitivity, tensors, OVERHEAD, SizeTarget(whole - 1))
    assert set(types.values()) == {"bf16", "q8_0"}
    with pytest.raises(UsageError, match="is not less than the whole model"):
        fit_types(sensitivity, tensors, OVERHEAD, SizeTarget(whole))


def test_size_that_the_weights_alone_exceed_is_refused_before_anything_is_measured() -> None:
    # q2_k has 84 bytes per 256 weights, q4_0 18 and q8_0 34 per 32; rows of 30 stay in 16 bits; norms do not count.
    shapes, least = [(512, 256), (64, 96), (10, 30), (256,)], 512 * 84 + 64 * 3 * 18 + 10 * 30 * 2
    check_budget(least, shapes, 1_000_000)
    check_budget(least + 34, shapes, 1_000_000, experts=32)
    with pytest.raises(UsageError, match="the weights alone take"):
        check_budget(least - 1, shapes, 1_000_000)
    with pytest.raises(UsageError, match="Experts are not measured"):
        check_budget(least + 33, shapes, 1_000_000, experts=32)
    with pytest.raises(UsageError, match="is not less than the whole model"):
        check_budget(1_000_000, shapes, 1_000_000)


@pytest.mark.parametrize("text", ["", "MB", "90 MX", "-5MB", "0", "0.1B", "1e9", "five"])
def test_malformed_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="that is not a size"):
        parse_size(text)


@pytest.mark.parametrize("size", ["10", 99_999, "1.5"])
def test_number_of_hardly_any_bytes_is_taken_to_lack_its_unit(size: str | int) -> None:
    with pytest.raises(UsageError, match=r"--within .*: too few bytes for a model\.\nWrite it in units"):
        parse_size(size, "--within")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "90MB", "bits": 4.5}, "Give either `size` or `bits`"),
        ({"bits": 0.5}, "`bits=0.5`: give bits per weight, from 1 to less than 16"),
        ({"bits": 16}, "`bits=16`"),
        (
            {"size": "90MB", "must": {"attention": "q9_z"}},
            "not accept the type 'q9_z'.*\n.*q8_0, .*q2_k, f32, f16, bf16\\.$",
        ),
        ({"size": "90MB", "must": {"attention": "iq2_xxs"}}, "`must` does not accept the type 'iq2_xxs'"),
        ({"size": "90MB", "must": [5]}, "`must` must be a dict of types by scope or pattern, or pairs of both: 5"),
        ({"type_of": None}, "`type_of` must be a dict of types by scope or pattern, or pairs of both: None"),
        ({"type_of": {"attention": 8}}, r"`type_of` must be a dict of types .*: \('attention', 8\)"),
        ({"type": 5}, "`type` does not accept the type 5"),
        ({"bits": "4"}, "`bits` must be a number: '4'"),
        ({"size": "90MB", "type": "q8_0"}, "`type` and `size` cannot be combined"),
        ({"bits": 5, "type_of": {"attention": "q8_0"}}, "`type_of` and `bits` cannot be combined.*\n.*`bits` chooses"),
        ({"bits": 5, "type": "q4_k_m"}, "`type` and `bits` cannot be combined"),
        ({"size": "90MB", "type_of": {"attention": "q8_0"}}, "`type_of` and `size` cannot be combined"),
        ({"size": "90MB", "imatrix_out": "m.gguf"}, "`imatrix_out` and `size` cannot be .*\n.*give `type` instead of"),
        ({"size": "90MB", "imatrix": "m.gguf"}, "`imatrix` and `size` cannot be combined"),
        ({"bits": 5, "recipe": "recipe.toml"}, "`recipe` and `bits` cannot be combined"),
        ({"guide": "facts"}, "`guide` needs `size` or `bits`"),
        ({"facts": "atlas"}, "`facts` needs `size` or `bits`"),
        ({"must": {"attention": "q8_0"}}, "`must` needs `size` or `bits`"),
        ({"rounding": "nearest"}, "`rounding` needs `size` or `bits`"),
        ({"calibration_tokens": 4096}, "`calibration_tokens` needs `calibration`"),
        ({"size": "90MB", "calibration_tokens": 0}, "tokens must be a whole number of at least 1: 0"),
        ({"recipe": "recipe.toml", "calibration": "self"}, "`recipe` cannot be combined with `calibration`"),
        ({"recipe": "recipe.toml", "calibration_tokens": 64}, "`recipe` cannot be combined with `calibration_tokens`"),
        ({"recipe": "recipe.toml", "seed": 3}, "`recipe` cannot be combined with `seed`"),
        ({"recipe": "recipe.toml"}, "recipe.toml: no such recipe"),
        ({"calibration": "self", "imatrix_out": "m", "modelfile": "./m"}, "`imatrix_out` and `modelfile` have"),
        ({"size": "90MB", "guide": "taste"}, "`guide`: there is no guide 'taste'.*\n.*facts, text, both"),
        ({"size": "90MB", "rounding": "GPTQ"}, "`rounding=GPTQ`: choose gptq or nearest"),
        ({"size": "90MB", "facts": "nowhere"}, "nowhere"),
        ({"size": "90MB", "facts": "text:README.md"}, "it has no facts to guide by"),
    ],
)
def test_invalid_arguments_are_refused_before_any_work(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        compressknow.export(tmp_path / "missing", tmp_path / "out.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_options_give_the_types_and_the_text(tmp_path: Path) -> None:
    """For a size, the text is shorter, and the model's own by default."""
    options = {**OF_RECIPE, "recipe": None, "imatrix": None, "type": "q4_0", "type_of": {"final": "Q6_K"}, "seed": 3}
    rules = (("final", "q6_k"),)
    assert _read_types(options, sized=False) == TypeChoice("q4_0", rules)
    assert _read_types(options, sized=True) == TypeChoice("q4_0", rules, Calibration("self", 8192, 3))
    options |= {"calibration": "self"}
    assert _read_types(options, sized=False) == TypeChoice("q4_0", rules, Calibration("self", 32_768, 3))
    (tmp_path / "recipe.toml").write_text("[export]\ntype = 'q5_k_m'\n")
    options = {**OF_RECIPE, "recipe": tmp_path / "recipe.toml", "imatrix": "m.gguf"}
    assert _read_types(options, sized=False) == TypeChoice("q5_k_m", importance=Path("m.gguf"))


def test_a_dry_run_leaves_what_a_killed_run_left(tmp_path: Path) -> None:
    """An export removes it, even if it fails."""
    model, staging = save_checkpoint("llama-tied", tmp_path / "model"), tmp_path / ".out.gguf.compressknow-new-00000000"
    staging.mkdir()
    (tmp_path / "out.gguf").touch()
    for dry_run in (True, False):
        with pytest.raises(OutputError, match="exists already"):
            compressknow.export(model, tmp_path / "out.gguf", dry_run=dry_run)
        assert staging.exists() == dry_run


def test_rules_match_the_tensors_of_a_scope_and_matrices_by_name(tensors: Tensors) -> None:
    """Norms are not matched, since llama.cpp does not quantize them."""
    assert resolve_types(tensors, [("overall", "q8_0")]).keys() == tensors.weights.keys()
    assert resolve_types(tensors, [("output", "q8_0"), (r"1\.attn_output", "f16")]) == {
        "blk.0.attn_output.weight": "q8_0",
        "blk.1.attn_output.weight": "f16",
    }
    with pytest.raises(UsageError, match=r"'output_norm' is not a scope.*\n.*Tensors .*: .*blk\.N\.attn_q\.weight"):
        resolve_types(tensors, [("output_norm", "q8_0")])


def test_facts_may_be_those_of_a_downloaded_data_set(tmp_path: Path) -> None:
    data = write_bear(tmp_path / "bear")
    with pytest.raises(CheckpointError, match="no such folder"):
        compressknow.export(tmp_path / "missing", tmp_path / "out.gguf", size="90MB", facts="bear", data=data)


def test_a_file_declares_the_quantized_type_of_most_parameters() -> None:
    sizes = {"a": ("f16", 100), "b": ("q4_k", 30), "c": ("q8_0", 10), "d": ("q8_0", 10)}
    rows = {name: Tensor(name, "bf16", (numel,), 2 * numel) for name, (_, numel) in sizes.items()}
    types = {name: kind for name, (kind, _) in sizes.items()}
    assert find_main_type(types, Tensors(None, rows, {}, {})) == "q4_k_s"
    assert find_main_type(types | {"b": "q8_0"}, Tensors(None, rows, {}, {})) == "q8_0"
