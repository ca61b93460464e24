"""The model card describes the conversion, and no text can break out of it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import compressknow
from compressknow.pages.model_card import read_card_metadata, render_model_card
from tests.knowing import save_trained, save_trained_custom_code
from tests.pages.model_card.manifests import make_manifest

GOLDEN = Path(__file__).parent / "golden"
SOURCE_CARD = {
    "license": "apache-2.0",
    "language": ["en"],
    "pipeline_tag": "text-generation",
    "widget": [{"text": "x"}],
}
HOSTILE = "a`b|c]\n---\n# <script>alert(1)</script> ![x](https://example.org/p.png)"


def read_metadata(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


def find_code_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


def make_manifest_of(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    manifest = make_manifest(**changes)
    return manifest | {"source": manifest["source"] | {"architecture": architecture, "model_type": model_type}}


@pytest.mark.parametrize("scheme", ["int8", None])
def test_card_equals_the_golden_file(scheme: str | None) -> None:
    card = render_model_card(make_manifest(scheme=scheme), source_card_metadata=SOURCE_CARD)
    golden = GOLDEN / f"model_card_{scheme or 'pruned'}.md"
    assert card == golden.read_text(encoding="utf-8"), "run tools/golden.py if the change is intended"


def test_hub_reads_the_front_matter() -> None:
    card = render_model_card(make_manifest(), source_card_metadata=SOURCE_CARD)
    assert read_metadata(card) == {
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "base_model": "someone/tiny-llama",
        "base_model_relation": "quantized",
        "tags": ["compressknow", "pruning", "quantization", "int8", "compressed-tensors"],
    }


def test_local_source_has_the_base_model_that_its_card_names() -> None:
    local = make_manifest(scheme=None)
    local["source"] |= {"name": "my-folder", "revision": None}
    assert "base_model" not in read_metadata(render_model_card(local, source_card_metadata={}))
    named = render_model_card(local, source_card_metadata={"base_model": ["someone/else"]})
    assert read_metadata(named)["base_model"] == ["someone/else"]
    assert "base_model_relation" not in read_metadata(named)


def test_hostile_names_stay_text() -> None:
    hostile = make_manifest(setup=HOSTILE, untied=[{"name": HOSTILE, "tied_to": HOSTILE, "bytes": 5}])
    hostile["source"] |= {"name": HOSTILE, "architecture": HOSTILE, "model_type": HOSTILE}
    card = render_model_card(hostile, source_card_metadata={"license": HOSTILE, "language": {"a": object()}})
    metadata, text = read_metadata(card), ModelCard(card).text
    assert metadata["license"] == " ".join(HOSTILE.split())
    assert "language" not in metadata
    tokens = [
        part
        for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text)
        for part in [token, *(token.children or [])]
    ]
    assert not {token.type for token in tokens} & {"link_open", "image", "html_inline", "html_block", "hr"}
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2", "h2", "h2"]
    # Bars are not escaped, since they have no meaning outside tables.
    assert " ".join(HOSTILE.split()) in {token.content for token in tokens if token.type == "code_inline"}
    for block in find_code_blocks(card, "python"):
        ast.parse(block)


def test_sizes_that_read_alike_are_written_to_the_byte() -> None:
    manifest = make_manifest()
    manifest["totals"] |= {"bytes_before": 1_000_000_000, "bytes_after": 1_000_100_000}
    card = render_model_card(manifest, source_card_metadata={})
    assert "larger than the input (1,000,100,000 bytes against 1,000,000,000 bytes): " in " ".join(card.split())


def test_untied_head_is_named_with_its_cost() -> None:
    untied = [{"name": "lm_head.weight", "tied_to": "model.embed_tokens.weight", "bytes": 28_311_552}]
    card = render_model_card(make_manifest(untied=untied), source_card_metadata={})
    assert "28.3 MB" in card
    assert "`lm_head.weight`" in card


@pytest.mark.parametrize(
    ("architecture", "model_type", "scheme", "expected"),
    [
        ("LlamaForCausalLM", "llama", "int8", True),
        ("LlamaForCausalLM", "llama", None, True),
        ("LlamaForCausalLM", "llama", "int8-paper", False),
        ("LlamaForCausalLM", "llama", "int8-weights", True),
        ("BertForMaskedLM", "bert", "int8", False),
        ("BertLMHeadModel", "bert", "int8", False),
        ("T5ForConditionalGeneration", "t5", "int8", False),
    ],
)
def test_vllm_is_named_only_where_it_would_run(
    architecture: str, model_type: str, scheme: str | None, expected: bool
) -> None:
    card = render_model_card(make_manifest_of(architecture, model_type, scheme=scheme), source_card_metadata={})
    assert ("vllm serve" in card) is expected


def test_card_of_an_int8_encoder_recommends_compressknow_load() -> None:
    manifest = make_manifest_of("T5ForConditionalGeneration", "t5")
    decoder = render_model_card(manifest, source_card_metadata={})
    assert "compressknow.load(" not in decoder
    assert "AutoModelForSeq2SeqLM.from_pretrained" in decoder
    for row in manifest["tensors"]:
        row["name"] = f"encoder.{row['name']}"
    assert "compressknow.load(" in render_model_card(manifest, source_card_metadata={})
    pruned = make_manifest_of("T5ForConditionalGeneration", "t5", scheme=None)
    assert "compressknow.load(" not in render_model_card(pruned, source_card_metadata={})


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no front matter",
        "---\n: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: mit\n",
        "---\n" + "[" * 3000 + "\n---\n",
    ],
)
def test_broken_source_card_has_no_metadata(tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_card_metadata(tmp_path / "README.md") == {}
    assert read_card_metadata(tmp_path / "missing.md") == {}


def test_metadata_of_the_source_card_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\r\nlicense: mit\r\n---\r\n# Title\r\n---\r\n", newline="")
    assert read_card_metadata(tmp_path / "README.md") == {"license": "mit"}


@pytest.mark.parametrize("architecture", ["OwnForCausalLM", "OwnWriter"])
def test_card_of_a_model_with_custom_code_loads_and_reproduces_it(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    source, out = save_trained_custom_code(tmp_path / "own"), tmp_path / "out"
    for name in ("config.json", "own.py"):
        (source / name).write_text((source / name).read_text().replace("OwnForCausalLM", architecture))
    compressknow.convert(source, out, prune=0.3, trust_remote_code=True)
    card = (out / "README.md").read_text(encoding="utf-8")
    (snippet,) = find_code_blocks(card, "python")
    names: dict[str, Any] = {}
    exec(snippet.replace("PATH/TO/THIS/FOLDER", out.as_posix()), names)
    assert type(names["model"]).__name__ == architecture
    command = "compressknow convert own OUTPUT --recipe recipe.toml --trust-remote-code\n"
    assert find_code_blocks(card, "sh")[-1] == command


def test_card_of_a_known_model_with_its_own_tokenizer_trusts_the_tokenizer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    source, out = save_trained("llama", tmp_path / "source"), tmp_path / "out"
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    path.write_text(json.dumps(config | {"tokenizer_class": "OwnTokenizer"}), encoding="utf-8")
    code = "from transformers import PreTrainedTokenizerFast\nclass OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    (source / "own.py").write_text(code, encoding="utf-8")
    compressknow.convert(source, out, quantize="int8")
    card = (out / "README.md").read_text(encoding="utf-8")
    (snippet,) = find_code_blocks(card, "python")
    names: dict[str, Any] = {}
    exec(snippet.replace("PATH/TO/THIS/FOLDER", out.as_posix()), names)
    assert type(names["tokenizer"]).__name__ == "OwnTokenizer"
    assert snippet.count("trust_remote_code=True") == 1
    serve, _, again = find_code_blocks(card, "sh")
    assert serve == "vllm serve PATH/TO/THIS/FOLDER --trust-remote-code\n"
    assert "--trust-remote-code" not in again
    # transformers prefers a class that it has.
    path.write_text(json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}), encoding="utf-8")
    compressknow.convert(source, tmp_path / "known", quantize="int8")
    assert "trust" not in (tmp_path / "known" / "README.md").read_text(encoding="utf-8")
