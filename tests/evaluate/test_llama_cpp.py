"""Models in llama.cpp, against transformers and against a plain loop over llama.cpp itself."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import AutoTokenizer

import compressknow
from compressknow import Settings
from compressknow.base.errors import CheckpointError, CompressknowError, OutputError, UnsupportedError, UsageError
from compressknow.evaluate.answers import Answer, read_answers
from compressknow.evaluate.scoring.llama_cpp import GgufReader
from compressknow.evaluate.sources import Options
from tests.engine.gguf_files import F16, F32, Q8_0, needs_gguf, write_gguf
from tests.evaluate.layouts import open_probe
from tests.gguf.making import needs_converter, save_checkpoint
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.long import long, one_in

pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")

from compressknow.gguf import llama_cpp as native
from compressknow.gguf.context import GgufTokenizer, LlamaContext, Span, complete_prompt
from compressknow.gguf.llama_cpp import GgufModel

UNPACKED = Settings(device="cpu", runtime="transformers")
# llama.cpp stores keys and values as float16.
CLOSE = 1e-2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `llama`, files of it in F32, F16 and Q8_0, and facts with and without candidates."""
    folder = tmp_path_factory.mktemp("root")
    save_trained("llama", folder / "llama")
    for kind in (F32, F16, Q8_0):
        write_gguf(folder / "llama", folder / f"{kind.name}.gguf", kind)
    write_facts(folder / "facts.jsonl")
    facts = [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]
    free = [{key: value for key, value in fact.items() if key != "candidates"} for fact in facts]
    (folder / "free.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in free))
    return folder


def evaluate(model: Path, folder: Path, facts: Path, settings: Settings | None = None) -> dict[str, Answer]:
    answers = compressknow.probe(model, folder, [f"facts:{facts}"], settings=settings or Settings()).answers
    return {answer.fact_id: answer for answer in answers}


@needs_gguf
@pytest.mark.parametrize("facts", ["facts.jsonl", "free.jsonl"])
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_file_answers_as_it_does_unpacked(root: Path, tmp_path: Path, kind: str, facts: str) -> None:
    file = root / f"{kind}.gguf"
    unpacked = evaluate(file, tmp_path / "a", root / facts, UNPACKED)
    direct = evaluate(file, tmp_path / "b", root / facts)
    assert len(unpacked) == len(KNOWN_FACTS)
    assert sum(answer.correct for answer in unpacked.values()) >= 60
    for fact, answer in unpacked.items():
        assert direct[fact].predicted == answer.predicted
        assert direct[fact].logp_gold == pytest.approx(answer.logp_gold, abs=CLOSE)
        assert direct[fact].rank == answer.rank
        assert (direct[fact].produced, direct[fact].grade) == (answer.produced, answer.grade)


class PlainLoop:
    """llama.cpp, one text at a time, one token at a time."""

    def __init__(self, file: Path) -> None:
        self._model = GgufModel(file)
        self.tokenizer = GgufTokenizer(self._model)

    def log_probs(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Return log-probabilities after each token, [tokens, vocabulary]."""
        context = LlamaContext(self._model, cells=256, sequences=1, threads=1)
        rows = []
        for position, token in enumerate(tokens):
            rows.append(context.read([Span(0, position, [token], 1)])[0].astype(np.float64))
        context.close()
        logits = np.array(rows)
        top = logits.max(-1, keepdims=True)
        return np.asarray(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))

    def score(self, prompt: str, answer: str) -> float:
        """Return the log-probability of an answer after a prompt."""
        before = self.tokenizer(prompt)["input_ids"]
        rest = self.tokenizer(prompt + answer)["input_ids"][len(before) :]
        rows = self.log_probs([*before, *rest])
        return float(sum(rows[len(before) - 1 + position, token] for position, token in enumerate(rest)))

    def write(self, prompt: str, tokens: int) -> str:
        """Return the greedy text, up to the end of the text."""
        ids, new = self.tokenizer(prompt)["input_ids"], []
        for _ in range(tokens):
            new.append(int(self.log_probs([*ids, *new])[-1].argmax()))
            if self.tokenizer.is_end(new[-1]):
                break
        return self.tokenizer.decode(new).strip()

    def close(self) -> None:
        self._model.close()


@pytest.fixture
def loop(root: Path) -> Iterator[PlainLoop]:
    loop = PlainLoop(root / "Q8_0.gguf")
    yield loop
    loop.close()


def test_candidates_score_as_in_a_plain_loop(root: Path, tmp_path: Path, loop: PlainLoop) -> None:
    answers = evaluate(root / "Q8_0.gguf", tmp_path / "answers", root / "facts.jsonl")
    several = 0
    for answer in list(answers.values())[:24]:
        prompt = answer.prompt.partition(" [MASK]")[0]
        assert answer.logp_gold == pytest.approx(loop.score(prompt, f" {answer.gold}"), abs=CLOSE)
        scores = [loop.score(prompt, f" {text}") for text in answer.top5]
        assert list(answer.top5_logp) == pytest.approx(scores, abs=CLOSE)
        several += len(loop.tokenizer(f" {answer.gold}", add_special_tokens=False)["input_ids"]) > 1
    assert several >= 3


def test_greedy_text_is_that_of_a_plain_loop(root: Path, tmp_path: Path, loop: PlainLoop) -> None:
    answers = evaluate(root / "Q8_0.gguf", tmp_path / "answers", root / "free.jsonl")
    for answer in list(answers.values())[:24]:
        written = loop.write(answer.prompt.partition(" [MASK]")[0], 8)
        assert written.startswith(answer.predicted)


def test_the_answer_that_tries_a_file_is_its_greedy_text(root: Path, tmp_path: Path, loop: PlainLoop) -> None:
    prompts = [prompt.partition(" [MASK]")[0] for prompt in read_prompts(root)[:3]]
    assert [complete_prompt(loop._model, prompt).strip() for prompt in prompts] == [
        loop.write(prompt, 8) for prompt in prompts
    ]
    # As if a full stop ended the turn of a chat.
    (end,) = loop.tokenizer(".", add_special_tokens=False)["input_ids"]
    key, value = b"tokenizer.ggml.eot_token_id", (4).to_bytes(4, "little") + end.to_bytes(4, "little")
    _write_with_entry(tmp_path / "chat.gguf", (root / "Q8_0.gguf").read_bytes(), key, value)
    model = GgufModel(tmp_path / "chat.gguf", trial=True)
    assert f"{complete_prompt(model, prompts[0]).strip()}." == loop.write(prompts[0], 3)
    model.close()
    file = shutil.copy(root / "F32.gguf", tmp_path / "broken.gguf")
    (norm,) = (tensor for tensor in gguf.GGUFReader(file, "r+").tensors if tensor.name == "output_norm.weight")
    norm.data[0] = math.nan
    model = GgufModel(file, trial=True)
    with pytest.raises(CompressknowError, match=r"broken\.gguf produces NaN in llama\.cpp"):
        complete_prompt(model, prompts[0])
    model.close()


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_answers_do_not_depend_on_the_batch(root: Path, tmp_path: Path, kind: str) -> None:
    file = root / f"{kind}.gguf"
    single = evaluate(file, tmp_path / "one", root / "facts.jsonl", Settings(batch_size=1))
    batched = evaluate(file, tmp_path / "many", root / "facts.jsonl", Settings(batch_size=64))
    for fact, answer in single.items():
        assert batched[fact].top5 == answer.top5
        assert list(batched[fact].top5_logp) == pytest.approx(list(answer.top5_logp), abs=1e-3)
        assert batched[fact].logp_gold == pytest.approx(answer.logp_gold, abs=1e-3)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Tests that run in the background may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_does_not_wait_for_the_end_of_a_pass(root: Path) -> None:
    model, tokens = GgufModel(root / "F32.gguf"), 8192
    context = LlamaContext(model, cells=tokens, sequences=1, threads=1)

    def last_position() -> int:
        return int(model.native.lib.llama_memory_seq_pos_max(context._memory, 0))

    def interrupt() -> None:
        while last_position() < 0:
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        context.read([Span(0, 0, [5] * tokens, 1)])
    thread.join()
    assert last_position() < tokens - 1
    # What was read is dropped, and the next pass is complete.
    context.clear()
    assert context.read([Span(0, 0, [5] * 600, 1)]).shape == (1, model.rows)
    context.close()
    model.close()


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_does_not_wait_until_a_file_is_loaded(root: Path) -> None:
    def interrupt(frame: FrameType, event: str, _: object) -> None:
        # Between tensors, llama.cpp calls back to ask whether to go on.
        if event == "call" and frame.f_code.co_name == "<lambda>" and frame.f_code.co_filename == native.__file__:
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            GgufModel(root / "F32.gguf", trial=True)
    finally:
        sys.setprofile(None)
    # The file can still be loaded.
    GgufModel(root / "F32.gguf", trial=True).close()


def test_llama_cpp_loads_without_the_openmp_of_the_system() -> None:
    # In its own mount namespace, a process sees an empty file in place of the library.
    library = next((path.resolve() for path in Path("/usr/lib").glob("*/libgomp.so.1")), None)
    hide = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount --bind /dev/null "$0" && exec "$@"', library]
    if not library or not shutil.which("unshare") or subprocess.run([*hide, "true"], capture_output=True).returncode:
        pytest.skip("the system's OpenMP cannot be hidden here")
    code = "from compressknow.gguf.llama_cpp import load_native; print(load_native().build)"
    done = subprocess.run([*hide, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == native.load_native().build, done.stderr


@pytest.mark.usefixtures("scripts")
def test_a_trial_runs_no_script_of_the_working_directory(root: Path, tmp_path: Path) -> None:
    native.check_no_crash(shutil.copy(root / "Q8_0.gguf", tmp_path / "copy.gguf"))


def test_divergences_are_over_all_tokens(root: Path, tmp_path: Path) -> None:
    card = compressknow.report(
        root / "F16.gguf", root / "Q8_0.gguf", [f"facts:{root / 'facts.jsonl'}"], answers=tmp_path / "kept"
    )
    (probe,) = card.comparisons[0].probes
    assert probe.movement is not None
    assert probe.movement.rest is None
    assert 0 < probe.movement.kl_mean < 0.1
    assert card.comparisons[0].counts.both >= 60


def test_the_record_has_the_runtime_and_the_types_of_the_layers(root: Path, tmp_path: Path) -> None:
    evaluate(root / "Q8_0.gguf", tmp_path / "answers", root / "facts.jsonl")
    model = read_answers(tmp_path / "answers").record.model
    assert model.runtime is not None
    assert model.runtime["name"] == "llama.cpp"
    assert model.computed_in == f"llama.cpp {model.runtime['build']}"
    types = model.runtime["types"]
    counts: Counter[str] = sum(map(Counter, types.values()), Counter())
    assert set(counts) == {"Q8_0", "F32"}
    # A block of Q8_0 has 32 weights of 8 bits and a scale of 16.
    bits = (8.5 * counts["Q8_0"] + 32 * counts["F32"]) / counts.total()
    assert model.quantization == f"GGUF Q8_0, {bits:.3g} bits per weight"
    assert {group: list(kinds) for group, kinds in types.items()} == {
        "attention": ["Q8_0"],
        "feed-forward": ["Q8_0"],
        "final": ["Q8_0"],
        "other": ["Q8_0", "F32"],
    }
    assert sum(sum(kinds.values()) for kinds in types.values()) == model.parameters


def test_the_card_names_the_runtime_and_its_differences(root: Path, tmp_path: Path) -> None:
    facts = [f"facts:{root / 'facts.jsonl'}"]
    card = compressknow.report(
        root / "llama", root / "Q8_0.gguf", facts, output=[tmp_path / "card.md"], answers=tmp_path / "kept"
    )
    text = (tmp_path / "card.md").read_text()
    assert "Stored as" in text
    assert r"attention Q8\_0; feed-forward Q8\_0; final Q8\_0; other Q8\_0 98.9 %, F32 1.1 %" in text
    assert r"llama ran in transformers, Q8\_0.gguf in llama.cpp b" in text
    # The file has pieces of words that the checkpoint does not have.
    assert "answers were compared as texts" in text
    assert card.comparisons[0].probes[0].movement is None
    assert card.comparisons[0].counts.both >= 60
    again = compressknow.report(root / "llama", root / "Q8_0.gguf", facts, answers=tmp_path / "kept")
    assert again.verdict == card.verdict


def test_a_file_with_other_tokens_gets_its_lost_facts_after_an_example(root: Path, tmp_path: Path) -> None:
    compressknow.convert(root / "llama", tmp_path / "pruned", prune=0.7)
    write_gguf(tmp_path / "pruned", tmp_path / "pruned.gguf", F32)
    facts, kept = [f"facts:{root / 'facts.jsonl'}"], tmp_path / "kept"
    compressknow.report(root / "llama", tmp_path / "pruned.gguf", facts, answers=kept)
    before, after = sorted(
        map(read_answers, kept.iterdir()), key=lambda answers: answers.record.model.runtime is not None
    )
    known = {answer.fact_id for answer in before.answers if answer.correct}
    lost = {answer.fact_id for answer in after.answers if not answer.correct} & known
    assert lost
    assert {answer.fact_id for answer in after.answers if answer.with_example is not None} == lost


def test_two_files_are_compared(root: Path, tmp_path: Path) -> None:
    facts = [f"facts:{root / 'facts.jsonl'}"]
    comparison = compressknow.compare(root / "F16.gguf", root / "Q8_0.gguf", facts, answers=tmp_path / "kept")
    assert comparison.behaviour is not None
    assert comparison.behaviour.b_against_a.comparisons[0].counts.both >= 60


@needs_gguf
def test_answers_of_one_runtime_are_not_taken_for_those_of_another(root: Path, tmp_path: Path) -> None:
    evaluate(root / "F16.gguf", tmp_path / "answers", root / "facts.jsonl")
    with pytest.raises(OutputError, match=r" in llama\.cpp, not in transformers"):
        evaluate(root / "F16.gguf", tmp_path / "answers", root / "facts.jsonl", UNPACKED)
    facts = [f"facts:{root / 'facts.jsonl'}"]
    for settings in (Settings(), UNPACKED):
        compressknow.report(root / "F16.gguf", root / "Q8_0.gguf", facts, settings=settings, answers=tmp_path / "kept")
    ran = [read_answers(folder).record.model.runtime for folder in sorted((tmp_path / "kept").iterdir())]
    assert len(ran) == 4
    assert sum(runtime is None for runtime in ran) == 2


def test_another_build_evaluates_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(root / "Q8_0.gguf", tmp_path / "answers", root / "facts.jsonl")
    other = native.load_native()._replace(build="b1")
    monkeypatch.setattr(native, "load_native", lambda: other)
    compressknow.probe(root / "Q8_0.gguf", tmp_path / "answers", f"facts:{root / 'facts.jsonl'}", overwrite=True)
    model = read_answers(tmp_path / "answers").record.model
    assert model.runtime is not None
    assert model.runtime["build"] == "b1"


@needs_gguf
def test_a_file_is_unpacked_without_llama_cpp(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressknow.evaluate.handle.is_installed", lambda _: False)
    evaluate(root / "F16.gguf", tmp_path / "answers", root / "facts.jsonl")
    model = read_answers(tmp_path / "answers").record.model
    assert model.runtime is None
    assert model.computed_in == "float32"


def test_a_split_file_is_read_from_its_first_part(root: Path, tmp_path: Path) -> None:
    write_gguf(root / "llama", tmp_path / "split.gguf", Q8_0, tensors_per_part=8)
    first, *others = sorted(tmp_path.glob("split-*.gguf"))
    whole = evaluate(root / "Q8_0.gguf", tmp_path / "a", root / "facts.jsonl")
    parts = evaluate(first, tmp_path / "b", root / "facts.jsonl")
    assert [(a.top5, a.top5_logp) for a in parts.values()] == [(a.top5, a.top5_logp) for a in whole.values()]
    model = read_answers(tmp_path / "b").record.model
    assert model.bytes == sum(part.stat().st_size for part in (first, *others))
    assert model.runtime is not None
    assert sum(sum(kinds.values()) for kinds in model.runtime["types"].values()) == model.parameters
    with pytest.raises(CheckpointError, match=r"is part 2 of \d of a split GGUF file") as error:
        evaluate(others[0], tmp_path / "c", root / "facts.jsonl")
    assert first.name in str(error.value)


def test_a_split_file_that_lacks_a_part_is_refused_before_any_work(root: Path, tmp_path: Path) -> None:
    write_gguf(root / "llama", tmp_path / "split.gguf", Q8_0, tensors_per_part=8)
    first, *others = sorted(tmp_path.glob("split-*.gguf"))
    assert compressknow.inspect(first)["parameters"] == compressknow.inspect(root / "Q8_0.gguf")["parameters"]
    others[-1].unlink()
    facts = [f"facts:{root / 'facts.jsonl'}"]
    for call in (
        lambda: compressknow.inspect(first),
        lambda: compressknow.compare(root / "Q8_0.gguf", first),
        lambda: compressknow.probe(first, tmp_path / "a", facts),
        lambda: compressknow.report(root / "llama", first, facts, answers=tmp_path / "a"),
    ):
        with pytest.raises(CheckpointError, match=r"its folder lacks 1 of them"):
            call()
    assert not (tmp_path / "a").exists()


def get_error(file: Path, tmp_path: Path, facts: Path) -> CompressknowError:
    with pytest.raises(CompressknowError) as error:
        evaluate(file, tmp_path / "answers", facts)
    assert not (tmp_path / "answers").exists()
    return error.value


def test_a_damaged_file_is_one_error(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, file = (root / "Q8_0.gguf").read_bytes(), tmp_path / "damaged.gguf"
    wrong = {
        "is damaged: it is cut short": content[: len(content) // 2],
        "is not a GGUF file": b"JUNK" + content[4:],
        "of a version that llama.cpp b": content[:4] + (99).to_bytes(4, "little") + content[8:],
        "does not know the architecture 'lamma'": content.replace(b"llama", b"lamma"),
        "cannot load": content.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokuns"),
    }
    for message, damaged in wrong.items():
        file.write_bytes(damaged)
        error = get_error(file, tmp_path, root / "facts.jsonl")
        assert message in str(error)
    # llama.cpp's first message says what is wrong, without the names of its functions.
    assert str(error.why).startswith("error loading model vocabulary: ")
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_a_decoder_is_refused(root: Path, tmp_path: Path) -> None:
    """Attention in both directions, as in encoders, or the last token as the embedding of a text."""
    file = tmp_path / "encoder.gguf"
    content = (root / "Q8_0.gguf").read_bytes()
    causal = b"llama.attention.causal", (7).to_bytes(4, "little") + b"\0"
    pooling = b"llama.pooling_type", (4).to_bytes(4, "little") + (3).to_bytes(4, "little")
    for key, value in (causal, pooling):
        _write_with_entry(file, content, key, value)
        error = get_error(file, tmp_path, root / "facts.jsonl")
        assert isinstance(error, UnsupportedError)
        assert "which does not generate text: in llama.cpp only decoder-only models" in str(error)
    # No pooling at all.
    _write_with_entry(file, content, pooling[0], (4).to_bytes(4, "little") + (0).to_bytes(4, "little"))
    GgufModel(file, trial=True).close()


def _write_with_entry(file: Path, content: bytes, key: bytes, value: bytes) -> None:
    """Write the file with another entry of its metadata, whose value follows its type."""
    entry = len(key).to_bytes(8, "little") + key + value
    # Tensors must begin at a multiple of 32; another key, of the right length, keeps them there.
    key = b"general.padding." + b"x" * ((-(len(entry) + 8 + 16 + 5)) % 32)
    padding = len(key).to_bytes(8, "little") + key + (7).to_bytes(4, "little") + b"\0"
    count = int.from_bytes(content[16:24], "little") + 2
    file.write_bytes(content[:16] + count.to_bytes(8, "little") + entry + padding + content[24:])


def test_an_unsuitable_runtime_is_refused(root: Path, tmp_path: Path) -> None:
    facts = [f"facts:{root / 'facts.jsonl'}"]
    with pytest.raises(UsageError, match=r"There is no runtime 'lama\.cpp'"):
        Settings(runtime="lama.cpp")
    settings = Settings(runtime="llama.cpp")
    with pytest.raises(UsageError, match=r"`runtime=\"llama\.cpp\"` cannot run llama"):
        compressknow.probe(root / "llama", tmp_path / "answers", facts, settings=settings)
    with pytest.raises(UsageError, match="GGUF files run only on the CPU"):
        compressknow.probe(
            root / "F16.gguf", tmp_path / "answers", facts, settings=dataclasses.replace(settings, device="cuda")
        )
    with pytest.raises(UnsupportedError, match=r"lm-eval:boolq cannot evaluate F16\.gguf in llama\.cpp"):
        compressknow.probe(root / "F16.gguf", tmp_path / "answers", ["lm-eval:boolq"])
    assert not (tmp_path / "answers").exists()
    # The checkpoint next to the file runs in transformers.
    card = compressknow.report(root / "llama", root / "Q8_0.gguf", facts, settings=settings, answers=tmp_path / "kept")
    assert card.original.runtime is None


def test_prompts_of_atlas_have_tokens_of_the_file(root: Path) -> None:
    model = GgufModel(root / "F16.gguf")
    tokenizer = GgufTokenizer(model)
    for fact in open_probe("atlas", Options(limit=50)).facts:
        ids = tokenizer(fact.prompt)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert max(ids) < len(tokenizer)
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert tokenizer.decode([]) == ""
    model.close()


def test_special_tokens_of_a_file_are_those_of_its_checkpoint(root: Path, tmp_path: Path) -> None:
    """Their names in a text are read as these tokens, and left out of what is decoded."""
    model = GgufModel(root / "F16.gguf")
    tokenizer, original = GgufTokenizer(model), AutoTokenizer.from_pretrained(root / "llama")
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(tokenizer, name) == getattr(original, name)
    word, end = read_prompts(root)[0].split()[0], tokenizer.eos_token_id
    ids = tokenizer(word + original.eos_token, add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert ids[1] == end
    assert tokenizer.decode([tokenizer.bos_token_id, *ids]) == word
    assert tokenizer.decode_token(end).decode() == original.eos_token
    assert [tokenizer.is_end(each) for each in ids] == [False, True]
    model.close()
    # A turn of a chat ends with another token than a text; an answer ends at either.
    key, value = b"tokenizer.ggml.eot_token_id", (4).to_bytes(4, "little") + ids[0].to_bytes(4, "little")
    _write_with_entry(tmp_path / "chat.gguf", (root / "F16.gguf").read_bytes(), key, value)
    model = GgufModel(tmp_path / "chat.gguf", trial=True)
    assert all(map(GgufTokenizer(model).is_end, ids))
    model.close()


def read_prompts(root: Path) -> list[str]:
    """Return the prompts of the facts."""
    return [json.loads(line)["prompt"] for line in (root / "facts.jsonl").read_text().splitlines()]


def test_running_text_is_split_into_ordinary_tokens_of_known_bytes(root: Path, tmp_path: Path) -> None:
    model = GgufModel(root / "F16.gguf")
    reader = GgufReader(model)
    ids, ends = reader.encode("The capital of Avaland is New Alba.")
    assert (len(ids), ends) == (8, [3, 11, 14, 22, 25, 29, 34, 35])
    ids, ends = reader.encode("Tarsk <s> ä")
    assert reader.bos not in ids
    # No tokens of the file are ä.
    assert ends is None
    assert reader.most == 64
    model.close()
    # Models like Qwen's begin texts with no token.
    key, file = b"tokenizer.ggml.add_bos_token" + (7).to_bytes(4, "little"), tmp_path / "bare.gguf"
    file.write_bytes((root / "F16.gguf").read_bytes().replace(key + b"\1", key + b"\0"))
    model = GgufModel(file, trial=True)
    assert GgufReader(model).bos is None
    model.close()


def make_checkpoint(name: str, folder: Path) -> Path:
    """Make a checkpoint whose tokenizer begins texts as llama.cpp does by default."""
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | words
    save_checkpoint(name, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@needs_converter
@pytest.mark.parametrize("name", one_in(3, ["llama-tied", "llama", "mixtral"]))
def test_an_exported_file_answers_as_its_checkpoint(name: str, root: Path, tmp_path: Path) -> None:
    """The weights are random, the tokenizer is that of SentencePiece; tokens and scores of candidates agree."""
    folder, file = make_checkpoint(name, tmp_path / "model"), tmp_path / "model.gguf"
    compressknow.export(folder, file, type="f32")
    before = evaluate(folder, tmp_path / "before", root / "facts.jsonl")
    after = evaluate(file, tmp_path / "after", root / "facts.jsonl")
    assert sum(after[fact].predicted == answer.predicted for fact, answer in before.items()) >= 63
    for fact, answer in before.items():
        assert after[fact].logp_gold == pytest.approx(answer.logp_gold, abs=2e-2)
    records = [read_answers(tmp_path / side).record.model for side in ("before", "after")]
    assert records[0].vocabulary == records[1].vocabulary
    card = compressknow.report(folder, file, [f"facts:{root / 'facts.jsonl'}"], answers=tmp_path / "kept")
    movement = card.comparisons[0].probes[0].movement
    assert movement is not None
    assert movement.kl_mean < 1e-3


@needs_converter
def test_running_text_is_read_as_in_transformers(root: Path, tmp_path: Path) -> None:
    folder, file = make_checkpoint("llama", tmp_path / "model"), tmp_path / "model.gguf"
    compressknow.export(folder, file, type="f32")
    (tmp_path / "text.txt").write_text(" ".join(read_prompts(root)), encoding="utf-8")
    options = Options(context=32)
    sides = [
        compressknow.probe(
            model, tmp_path / f"answers-{model.name}", [f"text:{tmp_path / 'text.txt'}"], options=options
        )
        for model in (folder, file)
    ]
    chunks = [next(iter(side.texts.values())) for side in sides]
    assert len(chunks[0]) == len(chunks[1]) > 3
    for original, exported in zip(*chunks, strict=True):
        assert np.asarray(exported.logp) == pytest.approx(np.asarray(original.logp), abs=2e-2)


@long
@needs_converter
@pytest.mark.network
def test_a_real_model_in_16_bits_answers_as_in_transformers(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: the checkpoint in float32 and its file in llama.cpp, on facts of atlas."""
    compressknow.export(smollm2, tmp_path / "f16.gguf", type="f16")
    options = Options(limit=24)
    sides = [
        compressknow.probe(model, tmp_path / f"answers-{model.name}", options=options).answers
        for model in (smollm2, tmp_path / "f16.gguf")
    ]
    same = sum(one.predicted == other.predicted for one, other in zip(*sides, strict=True))
    assert len(sides[0]) == 24
    assert same >= 23
