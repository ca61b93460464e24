"""Calibration texts: what batches contain, that they are reproducible, and which texts are refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, MarianConfig, MarianMTModel, PreTrainedModel, PreTrainedTokenizerBase

import compressknow
from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError, UsageError
from compressknow.compress.calibrate.sequences import draw_spans
from compressknow.compress.calibrate.text import CalibrationText, count_facts, read_calibration_text
from compressknow.compress.steps import Calibration
from compressknow.engine.language_model import load_language_model
from compressknow.model.meta import build_meta_model
from tests.gguf.making import train_sentencepiece
from tests.knowing import KNOWN_FACTS, save_trained, save_trained_custom_code
from tests.long import long
from tests.models import edit_config, save_tiny

SHARED = Path(__file__).parents[4] / "shared" / "models"
FAMILIES = ("bert", "llama", "t5")
SENTENCES = [fact.sentence(fact.obj_label) for fact in KNOWN_FACTS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_trained(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A text file of a few thousand tokens."""
    path = tmp_path / "notes.txt"
    path.write_text("\n".join(SENTENCES * 8), encoding="utf-8")
    return path


def read_text(folder: Path, text: str | Path = "self", tokens: int = 640, seed: int = 0) -> CalibrationText:
    return read_calibration_text(folder, build_meta_model(folder), Calibration(str(text), tokens, seed))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def can_read(model: PreTrainedModel, text: CalibrationText) -> bool:
    """Return whether the model gives finite logits for every batch."""
    with torch.inference_mode():
        return all(bool(model(**batch).logits.isfinite().all()) for batch in text.batches)


def test_a_translator_with_separate_vocabularies_is_refused(tmp_path: Path, notes: Path) -> None:
    config = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "pad_token_id": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    MarianMTModel(MarianConfig(vocab_size=400, **config, **heads)).save_pretrained(tmp_path)
    pieces = train_sentencepiece("unigram", byte_fallback=False)
    names = SentencePieceProcessor(model_proto=pieces)
    words = ["</s>", "<unk>", "<pad>", *(names.id_to_piece(number) for number in range(3, len(names)))]
    for name in ("source.spm", "target.spm"):
        (tmp_path / name).write_bytes(pieces)
    for name, tokens in (("vocab.json", words), ("target_vocab.json", [*words[:3], *reversed(words[3:])])):
        (tmp_path / name).write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    settings = {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "fi"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_text(tmp_path, notes).tokens == 640
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "separate_vocabs": True}))
    with pytest.raises(UnsupportedError, match="writes in another vocabulary than it reads"):
        read_text(tmp_path, notes)


@pytest.mark.parametrize("source", ["self", "file"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_consists_of_full_sequences_that_the_model_can_read(
    family: str, source: str, folders: dict[str, Path], notes: Path
) -> None:
    text = read_text(folders[family], "self" if source == "self" else notes)
    length = 64 if family != "t5" else 21  # This T5 has two sentinels, enough for one span.
    assert text.tokens == 640 // length * length
    assert text.kind == source
    assert len(text.texts) == sum(len(batch["input_ids"]) for batch in text.batches) == 640 // length
    assert {ids.dtype for batch in text.batches for ids in batch.values()} == {torch.int64}
    assert can_read(load_language_model(folders[family]).model, text)


def test_a_causal_model_reads_the_file_after_a_bos_token(folders: dict[str, Path], notes: Path) -> None:
    tokenizer = load_tokenizer(folders["llama"])
    text = read_text(folders["llama"], notes)
    ids = torch.cat([batch["input_ids"] for batch in text.batches])
    assert set(ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    whole = tokenizer(notes.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    assert ids[:, 1:].flatten().tolist() == whole[: 10 * 63]


def test_texts_of_a_jsonl_file_are_separated_by_special_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # Notepad writes a byte order mark.
    rows = "\n\n".join(json.dumps({"text": sentence}) for sentence in SENTENCES * 2)
    path.write_text(rows, encoding="utf-8-sig")
    tokenizer = load_tokenizer(folders["llama"])
    batches = read_text(folders["llama"], path).batches
    ids = torch.cat([batch["input_ids"] for batch in batches])[:, 1:].flatten().tolist()
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in SENTENCES[:2])
    between = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    assert ids[: len(first) + 2 + len(second)] == [*first, *between, *second]


def test_a_masked_model_reads_text_with_15_percent_masked(folders: dict[str, Path], notes: Path) -> None:
    tokenizer = load_tokenizer(folders["bert"])
    ids = torch.cat([batch["input_ids"] for batch in read_text(folders["bert"], notes).batches])
    assert (ids == tokenizer.mask_token_id).sum(1).tolist() == [round(0.15 * 62)] * 10
    assert set(ids[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(ids[:, -1].tolist()) == {tokenizer.sep_token_id}
    whole = torch.tensor(
        tokenizer(notes.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][: 10 * 62]
    ).reshape(10, 62)
    seen = ids[:, 1:-1] != tokenizer.mask_token_id
    assert torch.equal(ids[:, 1:-1][seen], whole[seen])


def test_t5_reads_text_without_spans_and_its_decoder_the_spans(folders: dict[str, Path], notes: Path) -> None:
    tokenizer = load_tokenizer(folders["t5"])
    batch = read_text(folders["t5"], notes).batches[0]
    whole = tokenizer(notes.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    first, second = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    encoder_ids, decoder_ids = batch["input_ids"][0].tolist(), batch["decoder_input_ids"][0].tolist()
    # As in training, the decoder reads its start token and the labels without the final </s>.
    assert decoder_ids[:2] == [tokenizer.pad_token_id, first]
    assert decoder_ids[-1] == second
    place = encoder_ids.index(first)
    assert encoder_ids[-1] == tokenizer.eos_token_id
    assert [*encoder_ids[:place], *decoder_ids[2:-1], *encoder_ids[place + 1 : -1]] == whole[:20]


@pytest.mark.parametrize("architecture", ["BartForConditionalGeneration", "BartModel"])
def test_bart_reads_masked_text_and_its_decoder_the_whole_text(architecture: str, tmp_path: Path, notes: Path) -> None:
    folder = save_tiny("bart", tmp_path / "bart")
    edit_config(folder, architectures=[architecture])
    tokenizer = load_tokenizer(save_trained("bert", tmp_path / "bert"))
    tokenizer.save_pretrained(folder)
    # Only words of BERT for which the tiny embedding has rows.
    text = " ".join(word for word in " ".join(SENTENCES * 4).split() if tokenizer.get_vocab().get(word, 99) < 99)
    notes.write_text(text, encoding="utf-8")
    batch = read_text(folder, notes, tokens=400).batches[0]
    encoder_ids, decoder_ids = batch["input_ids"][0].tolist(), batch["decoder_input_ids"][0].tolist()
    # 15 % of 38 tokens, in spans of three.
    assert encoder_ids.count(tokenizer.mask_token_id) == 2
    assert len(encoder_ids) == 40 - 6 + 2
    assert len(decoder_ids) == 40
    assert decoder_ids[0] == 2
    assert decoder_ids[1] == tokenizer.cls_token_id
    assert tokenizer.mask_token_id not in decoder_ids
    assert decoder_ids[2:] == tokenizer(text, add_special_tokens=False)["input_ids"][:38]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_a_model_writes_depends_on_the_seed_and_not_on_threads(family: str, folders: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = read_text(folders[family], seed=3)
        torch.set_num_threads(4)
        again, other = read_text(folders[family], seed=3), read_text(folders[family], seed=4)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert first.texts == again.texts
    assert first.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize("cores", [1, 3])
def test_the_text_a_model_writes_does_not_depend_on_the_number_of_cores(
    cores: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_text(folders["bert"], tokens=3200).sha256
    monkeypatch.setattr("compressknow.compress.blocks.count_cores", lambda: cores)
    assert read_text(folders["bert"], tokens=3200).sha256 == expected


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_writes_facts_that_it_knows(family: str, folders: dict[str, Path]) -> None:
    """Its text pairs subjects with their own objects more often than with others."""
    pairs = [(fact.sub_label, fact.obj_label) for fact in KNOWN_FACTS]
    texts = read_text(folders[family], tokens=4096).texts
    wrong = [(subject, obj) for (subject, _), (_, obj) in zip(pairs, pairs[5:] + pairs[:5], strict=True)]
    assert count_facts(texts, pairs) > count_facts(texts, wrong)


def test_a_model_draws_tokens_by_their_probability(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_language_model(folders["llama"])
    with torch.no_grad():
        # All tokens are equally likely, but for special ones, which are never drawn.
        loaded.model.model.norm.weight.zero_()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    ids = torch.cat([batch["input_ids"].flatten() for batch in read_text(tmp_path, tokens=8192).batches])
    ordinary = sorted({*loaded.tokenizer.get_vocab().values()} - {*loaded.tokenizer.all_special_ids})
    assert chisquare(torch.bincount(ids, minlength=ordinary[-1] + 1)[ordinary]).pvalue > 0.001


def test_spans_have_the_given_sizes_and_never_touch() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        spans = draw_spans(80, generator)
        assert (len(spans), sum(end - start for start, end in spans)) == (4, 12)
        assert spans[0][0] > 0
        assert spans[-1][1] == 80
        assert all(start > end for (_, end), (start, _) in pairwise(spans))


def test_a_text_shorter_than_requested_is_used_entirely(folders: dict[str, Path], notes: Path) -> None:
    text = read_text(folders["llama"], notes, tokens=1_000_000)
    words = len(
        load_tokenizer(folders["llama"])(notes.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    )
    assert text.tokens == words // 63 * 64
    assert text.asked == 1_000_000


def test_progress_ends_at_all_tokens(folders: dict[str, Path]) -> None:
    calls: list[tuple[int, int]] = []

    def advance(done: int, total: int, left: float | None = None) -> None:
        calls.append((done, total))

    read_calibration_text(
        folders["llama"], build_meta_model(folders["llama"]), Calibration(tokens=640), advance=advance
    )
    assert calls == sorted(calls)
    assert calls[-1][0] >= 0.95 * calls[-1][1]


def test_a_data_set_on_disk_is_read_row_by_row(folders: dict[str, Path], tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"title": ["a"] * 128, "text": [*SENTENCES, "", *SENTENCES[1:]]})
    rows.save_to_disk(tmp_path / "set")
    text = read_text(folders["llama"], f"hf:{tmp_path / 'set'}", tokens=640)
    assert (text.kind, text.source) == ("hf", f"hf:{tmp_path / 'set'}")
    assert text.texts[0].startswith(SENTENCES[0].removesuffix("."))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "has 0 tokens of this model, but 630 are needed"),
        ("short.txt", b"The capital of Drenn is Velin.", "has 7 tokens of this model, but 630 are needed"),
        ("latin.txt", "Caf\xe9".encode("latin-1"), "latin.txt is not UTF-8"),
        ("broken.jsonl", b'{"text": "Velin."}\n{"text": ', "broken.jsonl, line 2 is not JSON"),
        ("other.jsonl", b'{"text": "Velin."}\n\n{"body": "Velin."}', 'other.jsonl, line 3 has no text under "text"'),
        ("number.jsonl", b'{"text": 1}', 'number.jsonl, line 1 has no text under "text"'),
        ("half.jsonl", b'{"text": "Velin \\ud83e"}', r"half.jsonl, line 1: \\ud83e is half of a character"),
        ("foreign.txt", b"quux " * 2000, "does not know 100% of the tokens"),
    ],
)
def test_an_invalid_text_is_refused_with_its_path(
    name: str, content: bytes, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressknowError, match=message) as caught:
        read_text(folders["llama"], tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "tokens", "message"),
    [
        ("none.txt", 640, "There is no calibration text none.txt"),
        ("notes.pdf", 640, "A calibration text cannot be 'notes.pdf'"),
        ("hf:", 640, "A calibration text cannot be 'hf:'"),
        ("hf:./nothing", 640, "There is no folder or file"),
        ("self", 0, "calibration: tokens must be a whole number of at least 1: 0"),
        ("self", 63, "63 calibration tokens do not fill a sequence of this model, of 64"),
    ],
)
def test_an_invalid_request_is_refused(text: str, tokens: int, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=message):
        read_text(folders["llama"], text, tokens)


def test_tokens_without_a_row_in_the_embedding_are_refused(tmp_path: Path, notes: Path) -> None:
    folder = save_tiny("llama", tmp_path / "tiny")
    tokenizer = load_tokenizer(save_trained("llama", tmp_path / "known"))
    tokenizer.add_tokens(["quux"])
    tokenizer.save_pretrained(folder)
    notes.write_text("quux " * 800, encoding="utf-8")
    with pytest.raises(CompressknowError, match=r"The tokenizer gives token(.|\n)*the model's embedding has 99 rows"):
        read_text(folder, notes)


@pytest.mark.parametrize(
    ("factor", "message"),
    [(torch.nan, r"model\.layers\.0\.mlp\.up_proj\.weight in .* holds NaN"), (1e38, "gives NaN while it writes")],
    ids=["weight", "overflow"],
)
def test_a_model_that_gives_nan_while_it_writes_is_refused(
    factor: float, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    loaded = load_language_model(folders["llama"])
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight.mul_(factor)
        loaded.model.model.layers[0].mlp.down_proj.weight.mul_(1e20)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CompressknowError, match=message):
        read_text(tmp_path)


def test_a_model_without_head_can_be_calibrated_only_on_a_file(
    folders: dict[str, Path], tmp_path: Path, notes: Path
) -> None:
    loaded = load_language_model(folders["bert"])
    loaded.model.bert.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert read_text(tmp_path, notes).tokens == 640
    with pytest.raises((CheckpointError, UnsupportedError), match=r"FILE\.txt"):
        read_text(tmp_path)


def test_custom_code_without_get_input_embeddings_is_calibrated_and_loaded(tmp_path: Path, notes: Path) -> None:
    """NeoBERT's is such code; transformers only knows the usual names of embeddings."""
    folder = save_trained_custom_code(tmp_path / "own")
    edit_config(folder, tie_word_embeddings=False)
    with (folder / "own.py").open("a") as code:
        code.write("\n    def get_input_embeddings(self):\n        raise NotImplementedError\n")
    trust = {"trust_remote_code": True}
    compressknow.convert(
        folder,
        tmp_path / "out",
        prune=0.3,
        prune_method="wanda",
        calibration=str(notes),
        calibration_tokens=256,
        **trust,
    )
    assert load_language_model(tmp_path / "out", **trust).family == "causal"


def test_a_fact_counts_if_one_sentence_names_subject_and_object() -> None:
    texts = ["In St. Louis lives Ana.\nCafé Zoé is in Paris . rome has none", "Ana likes New York."]
    pairs = [
        ("Ana", "St. Louis"), ("cafe zoe", "PARIS"), ("Ana", "new york"),
        ("Rome", "Paris"), ("Ana", "York New"), ("An", "New York"), ("Ana", ""), ("?", "Ana"),
    ]  # fmt: skip
    assert [count_facts(texts, [pair]) for pair in pairs] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert count_facts(texts, pairs) == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data does not exist")
@pytest.mark.parametrize("name", ["minilm-facts", "t5-facts"])
def test_trained_models_write_texts_of_many_words(name: str) -> None:
    text = read_text(SHARED / name, tokens=2048)
    assert len({word for sequence in text.texts for word in sequence.split()}) > 150
    assert can_read(load_language_model(SHARED / name).model, text)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the folder of shared data does not exist")
def test_a_masked_model_finds_its_own_text_likelier_than_random_tokens() -> None:
    model = load_language_model(SHARED / "minilm-facts")
    ids = torch.cat([batch["input_ids"] for batch in read_text(SHARED / "minilm-facts", tokens=2048).batches])
    masked = ids.clone()
    masked[:, 3::6] = model.tokenizer.mask_token_id
    with torch.no_grad():
        logp = model.model(input_ids=masked).logits.float().log_softmax(-1)[:, 3::6]
    assert logp.gather(-1, ids[:, 3::6, None]).mean() > -math.log(logp.shape[-1])


@long
@pytest.mark.network
def test_smollm2_writes_english(smollm2: Path) -> None:
    text = read_text(smollm2, tokens=1024)
    words = " ".join(text.texts).casefold().split()
    assert {"the", "and", "of", "to"} <= set(words)
    assert len(set(words)) > 200
