"""Running text: against a plain reference in float64, one token at a time; what is stored, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressknow
from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError, UsageError
from compressknow.base.progress import Listener, Progress
from compressknow.engine.language_model import load_language_model
from compressknow.evaluate import text
from compressknow.evaluate.answers import RECORD, read_answers
from compressknow.evaluate.distributions import DistributionFile
from compressknow.evaluate.records import ALONE, MEASURED, NO_ROOM, Chunk
from compressknow.evaluate.scoring.decoding import TransformersReader
from compressknow.evaluate.sources import Options, open_all
from compressknow.evaluate.text import GREEDY_TOKENS, RunningText, TextChunks
from compressknow.pages.records import Card
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.models import edit_config

CONTEXT = 24
SCORED = CONTEXT - 1 - CONTEXT // 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `llama`, which knows the facts, `pruned`, a BERT, a T5, and a text of the facts."""
    folder = tmp_path_factory.mktemp("root")
    for family in ("llama", "bert", "t5"):
        save_trained(family, folder / family)
    compressknow.convert(folder / "llama", folder / "pruned", prune=0.4)
    write_facts(folder / "facts.jsonl")
    sentences = [fact.sentence(fact.obj_label) for fact in KNOWN_FACTS]
    (folder / "facts.txt").write_text("\n".join(sentences[::3]) + "\n", encoding="utf-8")
    return folder


def read_chunks(model: Path, folder: Path, text: Path, **options: int) -> tuple[Chunk, ...]:
    answers = compressknow.probe(model, folder, f"text:{text}", options=Options(context=CONTEXT, **options))
    return answers.texts[f"text:{text.name}"]


def compute_reference(model: Path, text: Path) -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """Return, by chunk, the scored tokens and the log-probabilities at each, by separate passes in float64."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    ids = tokenizer(text.read_text(encoding="utf-8").removesuffix("\n"))["input_ids"]
    scored, log_probs = [], []
    for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        chunk = [tokenizer.bos_token_id, *ids[start + 1 : start + CONTEXT]]
        scored.append(chunk[CONTEXT // 2 + 1 :])
        with torch.no_grad():
            rows = [
                loaded(input_ids=torch.tensor([chunk[:end]])).logits[0, -1].log_softmax(-1)
                for end in range(CONTEXT // 2 + 1, CONTEXT)
            ]
        log_probs.append(rows)
    return scored, log_probs


def test_log_likelihoods_top_tokens_and_divergences_match_a_plain_reference(root: Path, tmp_path: Path) -> None:
    text = root / "facts.txt"
    card = compressknow.report(
        root / "llama", root / "pruned", f"text:{text}", options=Options(context=CONTEXT), answers=tmp_path
    )
    tokens, before = compute_reference(root / "llama", text)
    _, after = compute_reference(root / "pruned", text)
    folders = sorted(tmp_path.iterdir(), key=lambda folder: len(folder.name))
    original, compressed = (read_answers(folder).texts["text:facts.txt"] for folder in folders)
    assert len(original) == len(tokens) > 4
    for first, second, ids, p, q in zip(original, compressed, tokens, before, after, strict=True):
        assert first.ids.tolist() == second.ids.tolist() == ids
        assert len(ids) == SCORED
        for side, rows in ((first, p), (second, q)):
            assert side.logp == pytest.approx(
                [float(row[token]) for row, token in zip(rows, ids, strict=True)], abs=2e-4
            )
            assert side.top.tolist() == [int(row.argmax()) for row in rows]
        kl = [float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True)]
        assert second.kl == pytest.approx(kl, rel=1e-3, abs=2e-5)
        assert first.kl is None
    nll = [
        -float(row[token])
        for ids, rows in zip(tokens, before, strict=True)
        for row, token in zip(rows, ids, strict=True)
    ]
    (figures,) = card.comparisons[0].texts
    assert figures.original.value.value == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    assert figures.divergence == MEASURED


def test_continuations_are_those_of_generate(root: Path, tmp_path: Path) -> None:
    file = root / "facts.txt"
    chunks = read_chunks(root / "llama", tmp_path / "answers", file)
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    model = AutoModelForCausalLM.from_pretrained(root / "llama").eval()
    ids = tokenizer(file.read_text(encoding="utf-8").removesuffix("\n"))["input_ids"]
    for chunk in chunks[: text.CONTINUED]:
        start = chunk.number * CONTEXT
        prompt = [tokenizer.bos_token_id, *ids[start + 1 : start + CONTEXT // 2]]
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=GREEDY_TOKENS, eos_token_id=-1)
        expected = output[0, len(prompt) :].tolist()
        if tokenizer.eos_token_id in expected:
            end = expected.index(tokenizer.eos_token_id)
            expected[end:] = [tokenizer.eos_token_id] * (len(expected) - end)
        assert chunk.greedy.tolist() == expected


def test_model_whose_activations_share_a_scale_is_measured_like_others(root: Path, tmp_path: Path) -> None:
    """A scale for all tokens of a batch depends on later tokens, which the model itself does not see."""
    compressknow.convert(root / "llama", tmp_path / "int8", quantize="int8-paper")
    assert read_chunks(tmp_path / "int8", tmp_path / "answers", root / "facts.txt", limit=1)


def test_bytes_are_those_of_the_scored_text(root: Path, tmp_path: Path) -> None:
    text = tmp_path / "wide.txt"
    text.write_text("The arlo lives in the forest . Drenn é 你 𝄞 speak Avish . " * 4, encoding="utf-8")
    chunks = read_chunks(root / "llama", tmp_path / "answers", text)
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    spans = tokenizer(text.read_text(encoding="utf-8"), return_offsets_mapping=True)["offset_mapping"]
    content = text.read_text(encoding="utf-8")
    for chunk in chunks:
        first, last = chunk.number * CONTEXT + CONTEXT // 2, (chunk.number + 1) * CONTEXT - 1
        assert chunk.bytes == len(content[spans[first][1] : spans[last][1]].encode())


def test_a_text_is_not_evaluated_twice(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_chunks(root / "llama", tmp_path / "answers", root / "facts.txt")
    monkeypatch.setattr("compressknow.evaluate.run.TextChunks", None)
    again = read_chunks(root / "llama", tmp_path / "answers", root / "facts.txt")
    assert [chunk.logp.tolist() for chunk in first] == [chunk.logp.tolist() for chunk in again]


def test_a_stopped_run_resumes_at_its_last_chunk(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressknow.evaluate.run.SECONDS_BETWEEN_PARTS", -1.0)
    read, numbers = text.TextChunks.read, []

    def read_and_fail(chunks: text.TextChunks, number: int, measure_kl: None) -> Chunk:
        numbers.append(number)
        if len(numbers) == 3:
            raise KeyboardInterrupt
        return read(chunks, number, measure_kl)

    monkeypatch.setattr(text.TextChunks, "read", read_and_fail)
    with pytest.raises(KeyboardInterrupt):
        read_chunks(root / "llama", tmp_path / "answers", root / "facts.txt")
    resumed = read_chunks(root / "llama", tmp_path / "answers", root / "facts.txt")
    assert numbers[:4] == [0, 1, 2, 2]
    assert len(numbers) == len(resumed) + 1
    whole = read_chunks(root / "llama", tmp_path / "others", root / "facts.txt")
    assert [(c.logp.tolist(), c.greedy.tolist()) for c in resumed] == [
        (c.logp.tolist(), c.greedy.tolist()) for c in whole
    ]


def test_limit_counts_chunks_and_longer_contexts_are_refused(root: Path, tmp_path: Path) -> None:
    for limit in (2, 3):
        assert len(read_chunks(root / "llama", tmp_path / str(limit), root / "facts.txt", limit=limit)) == limit
    with pytest.raises(UsageError, match="64 tokens at once"):
        compressknow.probe(root / "llama", tmp_path / "no", f"text:{root / 'facts.txt'}", options=Options(context=65))
    answers = compressknow.probe(root / "llama", tmp_path / "most", f"text:{root / 'facts.txt'}")
    # The default of 512 is limited by the model's positions.
    assert (answers.record.probes["text:facts.txt"].text or {})["context"] == 64


@pytest.mark.parametrize(("family", "why"), [("bert", "pseudo-perplexity"), ("t5", "encoder")])
def test_models_that_do_not_continue_text_are_refused_before_any_fact(
    root: Path, tmp_path: Path, family: str, why: str
) -> None:
    with pytest.raises(UnsupportedError, match=why):
        compressknow.probe(root / family, tmp_path / "answers", ["atlas", f"text:{root / 'facts.txt'}"])
    assert not (tmp_path / "answers" / RECORD).exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "There is no file"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"Drenn \xff\xfe speak", "is not UTF-8: byte 6"),
        (b"Drenn speak \xc3", "is not UTF-8: byte 12"),
        (b"The arlo lives in the forest .", "too short: 8 tokens, and a chunk takes 24"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(root: Path, tmp_path: Path, content: bytes | None, error: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=error):
        read_chunks(root / "llama", tmp_path / "answers", path)


def test_a_large_limit_reads_only_the_file(root: Path) -> None:
    path = root / "facts.txt"
    text = RunningText("text:facts.txt", path, "0", path.stat().st_size, limit=10**15)
    assert text.read(CONTEXT) == path.read_text(encoding="utf-8").removesuffix("\n")


def test_chunks_begin_with_bos_only_if_the_tokenizer_begins_texts_with_it(root: Path) -> None:
    """GPT-2's does not, although it has such a token."""
    loaded = load_language_model(root / "llama")
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    readers = (TransformersReader(each) for each in (loaded, replace(loaded, tokenizer=tokenizer)))
    assert [reader.bos for reader in readers] == [tokenizer.bos_token_id, None]


def test_only_as_much_is_read_as_the_chunks_need_without_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" + "é" * 1000, encoding="utf-8")
    text = RunningText("text:text.txt", path, "0", path.stat().st_size, limit=1)
    # 64 bytes per token.
    assert text.read(8) == "x" + "é" * 255


def test_a_token_beyond_the_embedding_is_refused(root: Path) -> None:
    class Reader:
        bos, most, rows = None, None, 10

        def encode(self, text: str) -> tuple[list[int], None]:
            return [ord(character) % 16 for character in text], None

    text = RunningText("text:facts.txt", root / "facts.txt", "0", 1000, CONTEXT)
    with pytest.raises(CheckpointError, match="the model's embedding has 10 rows"):
        TextChunks(Reader(), text, None)  # type: ignore[arg-type]


def test_models_with_other_tokens_have_bits_per_byte_but_no_divergence(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_trained("llama", other)
    tokenizer = (other / "tokenizer.json").read_text(encoding="utf-8")
    assert '"reeds"' in tokenizer
    (other / "tokenizer.json").write_text(tokenizer.replace('"reeds"', '"rushes"'), encoding="utf-8")
    text, options = f"text:{root / 'facts.txt'}", Options(context=CONTEXT)
    card = compressknow.report(root / "llama", other, text, options=options, answers=tmp_path / "kept")
    (figures,) = card.comparisons[0].texts
    assert figures.divergence == "other tokens"
    assert figures.original.bits_per_byte is not None
    assert figures.moved is None or figures.moved.kl is None
    assert any("other tokens" in warning or "different tokens" in warning for warning in card.comparisons[0].warnings)
    with pytest.raises(CompressknowError, match="differ in vocabulary"):
        compressknow.report(
            root / "llama", other, ["facts:" + str(root / "facts.jsonl"), text], answers=tmp_path / "kept"
        )


def test_answers_of_separate_runs_have_all_but_the_divergence(root: Path, tmp_path: Path) -> None:
    text = root / "facts.txt"
    for name in ("llama", "pruned"):
        read_chunks(root / name, tmp_path / name, text)
    with pytest.raises(UsageError, match="`context=32` decides what is evaluated"):
        compressknow.report(tmp_path / "llama", tmp_path / "pruned", options=Options(context=32))
    (figures,) = compressknow.report(tmp_path / "llama", tmp_path / "pruned").comparisons[0].texts
    assert figures.divergence == ALONE
    assert figures.moved is not None
    assert figures.moved.kl is None
    assert figures.moved.same_top.value < 1


def test_a_disk_without_room_leaves_the_divergence_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressknow.evaluate.distributions.RESERVE", 1 << 62)
    text, options = f"text:{root / 'facts.txt'}", Options(context=CONTEXT)
    card = compressknow.report(root / "llama", root / "pruned", text, options=options, answers=tmp_path)
    (without,) = card.comparisons[0].texts
    assert without.divergence == NO_ROOM
    monkeypatch.undo()
    card = compressknow.report(root / "llama", root / "pruned", text, options=options, answers=tmp_path)
    (figures,) = card.comparisons[0].texts
    assert figures.divergence == MEASURED
    assert figures.moved is not None
    assert without.moved is not None
    assert figures.moved.divergent == without.moved.divergent


def test_a_model_with_more_positions_reads_the_chunks_of_the_original(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "pruned", tmp_path / "longer")
    edit_config(tmp_path / "longer", max_position_embeddings=128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "longer")
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(tmp_path / "longer")
    text = f"text:{root / 'facts.txt'}"
    card = compressknow.report(root / "llama", tmp_path / "longer", text, answers=tmp_path / "kept")
    (figures,) = card.comparisons[0].texts
    assert (figures.context, figures.divergence) == (64, MEASURED)


def test_a_run_that_was_stopped_without_room_resumes_with_the_divergence(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, options = f"text:{root / 'facts.txt'}", Options(context=CONTEXT)

    def stop_after_two_chunks(progress: Progress) -> None:
        if progress.stage.model == "pruned" and progress.done == 2:
            raise KeyboardInterrupt

    def report(on_progress: Listener | None = None) -> Card:
        return compressknow.report(
            root / "llama", root / "pruned", text, options=options, answers=tmp_path, on_progress=on_progress
        )

    with monkeypatch.context() as patched:
        patched.setattr("compressknow.evaluate.distributions.RESERVE", 1 << 62)
        with pytest.raises(KeyboardInterrupt):
            report(stop_after_two_chunks)
    assert list(tmp_path.rglob("00000.parquet"))
    assert report().comparisons[0].texts[0].divergence == MEASURED


def test_sixteen_bits_change_the_mean_divergence_by_less_than_a_millionth(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = (torch.randn(20, 5000) * 3).log_softmax(-1)
    after = (before + torch.randn_like(before) * 0.03).log_softmax(-1)
    names = [str(number) for number in range(20)]
    divergences = []
    for short in (False, True):
        rows = DistributionFile(tmp_path, 20, short=short)
        rows.keep(names, before)
        divergences.append(np.array(rows.measure(names, after), dtype=float))
        rows.give_up()
    assert divergences[0].mean() > 1e-4
    assert divergences[1] == pytest.approx(divergences[0], abs=5e-6)
    assert divergences[1].mean() == pytest.approx(divergences[0].mean(), abs=1e-6)
    assert divergences[1].mean() != divergences[0].mean()


def test_a_damaged_file_of_tokens_is_an_error(root: Path, tmp_path: Path) -> None:
    read_chunks(root / "llama", tmp_path / "answers", root / "facts.txt")
    (file,) = (tmp_path / "answers").glob("text-*.parquet")
    file.write_bytes(file.read_bytes()[:-10] + b"0123456789")
    with pytest.raises(CompressknowError, match="it is missing, or its hash differs"):
        read_answers(tmp_path / "answers")
    file.unlink()
    with pytest.raises(CompressknowError, match="it is missing, or its hash differs"):
        read_answers(tmp_path / "answers")


def test_a_record_without_a_seal_and_without_the_hash_of_a_text_is_refused(root: Path, tmp_path: Path) -> None:
    read_chunks(root / "llama", tmp_path, root / "facts.txt")
    record = json.loads((tmp_path / RECORD).read_text(encoding="utf-8"))
    del record["sha256"], record["probes"]["text:facts.txt"]["text"]["sha256"]
    (tmp_path / RECORD).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CompressknowError, match="it is missing, or its hash differs"):
        read_answers(tmp_path)


def test_texts_and_facts_can_be_evaluated_together(root: Path, tmp_path: Path) -> None:
    probes = [f"facts:{root / 'facts.jsonl'}", f"text:{root / 'facts.txt'}"]
    options = Options(context=CONTEXT, limit=6)
    card = compressknow.report(root / "llama", root / "pruned", probes, options=options, answers=tmp_path)
    (comparison,) = card.comparisons
    assert [probe.probe for probe in comparison.probes] == ["facts:facts.jsonl"]
    assert [figures.text for figures in comparison.texts] == ["text:facts.txt"]
    assert open_all(probes, options)[1].name == "text:facts.txt"


@pytest.mark.parametrize("verb", ["sweep", "search"])
def test_studies_refuse_texts(root: Path, tmp_path: Path, verb: str) -> None:
    keep = {"keep": 0.9} if verb == "search" else {}
    text = f"text:{root / 'facts.txt'}"
    with pytest.raises(UsageError, match=r"text:facts\.txt"):
        getattr(compressknow, verb)(root / "llama", tmp_path / "study", probe=text, **keep)
    assert not (tmp_path / "study" / "study.json").exists()
