"""Models that llama.cpp runs: held against transformers, and against a plain loop over llama.cpp itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from numpy.typing import NDArray

import compressknow
from compressknow import Settings
from compressknow.base.errors import CheckpointError, CompressknowError, OutputError, UnsupportedError, UsageError
from compressknow.evaluate.answers import Answer, read_answers
from compressknow.evaluate.sources import Options
from tests.engine.gguf_files import F16, F32, Q8_0, needs_gguf, write_gguf
from tests.evaluate.layouts import open_probe
from tests.gguf.making import needs_converter, save_checkpoint
from tests.knowing import KNOWN_FACTS, save_trained, write_facts
from tests.long import long, one_in

pytest.importorskip("llama_cpp_py_sync", reason="llama.cpp is not installed")

from compressknow.gguf import llama_cpp as native
from compressknow.gguf.context import GgufTokenizer, LlamaContext, Span
from compressknow.gguf.llama_cpp import GgufModel

UNPACKED = Settings(device="cpu", runtime="transformers")
# Keys and values are kept as float16.
CLOSE = 1e-2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint `llama`, files of it in F32, F16 and Q8_0, and facts with and without candidates."""
    folder = tmp_path_factory.mktemp("place")
    save_trained("llama", folder / "llama")
    for kind in (F32, F16, Q8_0):
        write_gguf(folder / "llama", folder / f"{kind.name}.gguf", kind)
    write_facts(folder / "facts.jsonl")
    facts = [json.loads(line) for line in (folder / "facts.jsonl").read_text().splitlines()]
    free = [{key: value for key, value in fact.items() if key != "candidates"} for fact in facts]
    (folder / "free.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in free))
    return folder


def ask(model: Path, folder: Path, facts: Path, settings: Settings | None = None) -> dict[str, Answer]:
    given = compressknow.probe(model, folder, [f"facts:{facts}"], settings=settings or Settings())
    return {answer.fact_id: answer for answer in given.answers}


@needs_gguf
@pytest.mark.parametrize("facts", ["facts.jsonl", "free.jsonl"])
@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_model_answers_as_it_does_unpacked(place: Path, tmp_path: Path, kind: str, facts: str) -> None:
    file = place / f"{kind}.gguf"
    unpacked, there = ask(file, tmp_path / "a", place / facts, UNPACKED), ask(file, tmp_path / "b", place / facts)
    assert len(unpacked) == len(KNOWN_FACTS)
    assert sum(answer.correct for answer in unpacked.values()) >= 60
    for fact, answer in unpacked.items():
        assert there[fact].predicted == answer.predicted
        assert there[fact].logp_gold == pytest.approx(answer.logp_gold, abs=CLOSE)
        assert there[fact].rank == answer.rank
        assert (there[fact].produced, there[fact].grade) == (answer.produced, answer.grade)


class Plain:
    """llama.cpp, one text at a time from its beginning, a token at a time."""

    def __init__(self, file: Path) -> None:
        self._model = GgufModel(file)
        self.tokenizer = GgufTokenizer(self._model)

    def log_probs(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """After each token, [tokens, vocabulary]."""
        context = LlamaContext(self._model, cells=256, sequences=1, threads=1)
        rows = []
        for place, token in enumerate(tokens):
            rows.append(context.read([Span(0, place, [token], 1)])[0].astype(np.float64))
        context.close()
        logits = np.array(rows)
        top = logits.max(-1, keepdims=True)
        return np.asarray(logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True)))

    def score(self, prompt: str, answer: str) -> float:
        """The log-probability of an answer after a prompt."""
        before = self.tokenizer(prompt)["input_ids"]
        more = self.tokenizer(prompt + answer)["input_ids"][len(before) :]
        rows = self.log_probs([*before, *more])
        return float(sum(rows[len(before) - 1 + place, token] for place, token in enumerate(more)))

    def written(self, prompt: str, tokens: int) -> str:
        """Greedy text, up to the end of the text."""
        ids, new = self.tokenizer(prompt)["input_ids"], []
        for _ in range(tokens):
            new.append(int(self.log_probs([*ids, *new])[-1].argmax()))
            if self.tokenizer.is_end(new[-1]):
                break
        return self.tokenizer.decode(new).strip()

    def close(self) -> None:
        self._model.close()


@pytest.fixture
def plain(place: Path) -> Iterator[Plain]:
    found = Plain(place / "Q8_0.gguf")
    yield found
    found.close()


def test_candidates_score_as_in_a_plain_loop(place: Path, tmp_path: Path, plain: Plain) -> None:
    answers = ask(place / "Q8_0.gguf", tmp_path / "answers", place / "facts.jsonl")
    several = 0
    for answer in list(answers.values())[:24]:
        prompt = answer.prompt.partition(" [MASK]")[0]
        assert answer.logp_gold == pytest.approx(plain.score(prompt, f" {answer.gold}"), abs=CLOSE)
        scores = [plain.score(prompt, f" {text}") for text in answer.top5]
        assert list(answer.top5_logp) == pytest.approx(scores, abs=CLOSE)
        several += len(plain.tokenizer(f" {answer.gold}", add_special_tokens=False)["input_ids"]) > 1
    assert several >= 3


def test_greedy_text_is_that_of_a_plain_loop(place: Path, tmp_path: Path, plain: Plain) -> None:
    answers = ask(place / "Q8_0.gguf", tmp_path / "answers", place / "free.jsonl")
    for answer in list(answers.values())[:24]:
        written = plain.written(answer.prompt.partition(" [MASK]")[0], 8)
        assert written.startswith(answer.predicted)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_the_batch_decides_nothing(place: Path, tmp_path: Path, kind: str) -> None:
    file = place / f"{kind}.gguf"
    one = ask(file, tmp_path / "one", place / "facts.jsonl", Settings(batch_size=1))
    many = ask(file, tmp_path / "many", place / "facts.jsonl", Settings(batch_size=64))
    for fact, answer in one.items():
        assert many[fact].top5 == answer.top5
        assert list(many[fact].top5_logp) == pytest.approx(list(answer.top5_logp), abs=1e-3)
        assert many[fact].logp_gold == pytest.approx(answer.logp_gold, abs=1e-3)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Who starts the tests in the background may have them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_who_interrupts_does_not_wait_for_the_end_of_a_pass(place: Path) -> None:
    model, tokens = GgufModel(place / "F32.gguf"), 8192
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
    # What was read of it is forgotten, and the next pass is a whole one.
    context.clear()
    assert context.read([Span(0, 0, [5] * 600, 1)]).shape == (1, model.rows)
    context.close()
    model.close()


@pytest.mark.usefixtures("_interruptible")
def test_who_interrupts_does_not_wait_until_a_file_is_loaded(place: Path) -> None:
    def interrupt(frame: FrameType, event: str, _: object) -> None:
        # llama.cpp asks between tensors whether to go on.
        if event == "call" and frame.f_code.co_name == "<lambda>" and frame.f_code.co_filename == native.__file__:
            signal.raise_signal(signal.SIGINT)

    sys.setprofile(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            GgufModel(place / "F32.gguf", trial=True)
    finally:
        sys.setprofile(None)
    # The next one loads.
    GgufModel(place / "F32.gguf", trial=True).close()


def test_it_loads_in_a_small_image_that_has_no_openmp() -> None:
    # A process that does not see the system's: in a name space of its own, an empty file lies over it.
    library = next((path.resolve() for path in Path("/usr/lib").glob("*/libgomp.so.1")), None)
    hide = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount --bind /dev/null "$0" && exec "$@"', library]
    if not library or not shutil.which("unshare") or subprocess.run([*hide, "true"], capture_output=True).returncode:
        pytest.skip("the system's OpenMP cannot be hidden here")
    code = "from compressknow.gguf.llama_cpp import load_native; print(load_native().build)"
    done = subprocess.run([*hide, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == native.load_native().build, done.stderr


@pytest.mark.usefixtures("scripts")
def test_a_trial_runs_no_script_of_the_working_directory(place: Path, tmp_path: Path) -> None:
    native.check_no_crash(shutil.copy(place / "Q8_0.gguf", tmp_path / "copy.gguf"))


def test_distributions_are_those_over_all_tokens(place: Path, tmp_path: Path) -> None:
    card = compressknow.report(
        place / "F16.gguf", place / "Q8_0.gguf", [f"facts:{place / 'facts.jsonl'}"], answers=tmp_path / "kept"
    )
    (probe,) = card.comparisons[0].probes
    assert probe.movement is not None
    assert probe.movement.rest is None
    assert 0 < probe.movement.kl_mean < 0.1
    assert card.comparisons[0].counts.both >= 60


def test_the_record_says_what_ran_it_and_how_layers_are_stored(place: Path, tmp_path: Path) -> None:
    ask(place / "Q8_0.gguf", tmp_path / "answers", place / "facts.jsonl")
    model = read_answers(tmp_path / "answers").record.model
    assert model.runtime is not None
    assert model.runtime["name"] == "llama.cpp"
    assert model.computed_in == f"llama.cpp {model.runtime['build']}"
    assert model.quantization == "GGUF Q8_0"
    types = model.runtime["types"]
    assert {group: list(kinds) for group, kinds in types.items()} == {
        "attention": ["Q8_0"],
        "feed-forward": ["Q8_0"],
        "final": ["Q8_0"],
        "other": ["Q8_0", "F32"],
    }
    assert sum(sum(kinds.values()) for kinds in types.values()) == model.parameters


def test_the_card_names_the_runtime_and_what_is_its_own(place: Path, tmp_path: Path) -> None:
    facts = [f"facts:{place / 'facts.jsonl'}"]
    card = compressknow.report(
        place / "llama", place / "Q8_0.gguf", facts, output=[tmp_path / "card.md"], answers=tmp_path / "kept"
    )
    text = (tmp_path / "card.md").read_text()
    assert "Stored as" in text
    assert r"attention Q8\_0; feed-forward Q8\_0; final Q8\_0; other Q8\_0 98.9 %, F32 1.1 %" in text
    assert r"llama ran in transformers, Q8\_0.gguf in llama.cpp b" in text
    # The file has pieces of words that the checkpoint has not.
    assert "answers were compared as texts" in text
    assert card.comparisons[0].probes[0].movement is None
    assert card.comparisons[0].counts.both >= 60
    again = compressknow.report(place / "llama", place / "Q8_0.gguf", facts, answers=tmp_path / "kept")
    assert again.verdict == card.verdict


def test_a_file_with_tokens_of_its_own_is_asked_after_an_example_for_what_it_lost(place: Path, tmp_path: Path) -> None:
    compressknow.convert(place / "llama", tmp_path / "pruned", prune=0.7)
    write_gguf(tmp_path / "pruned", tmp_path / "pruned.gguf", F32)
    facts, kept = [f"facts:{place / 'facts.jsonl'}"], tmp_path / "kept"
    compressknow.report(place / "llama", tmp_path / "pruned.gguf", facts, answers=kept)
    before, after = sorted(
        map(read_answers, kept.iterdir()), key=lambda answers: answers.record.model.runtime is not None
    )
    known = {answer.fact_id for answer in before.answers if answer.correct}
    lost = {answer.fact_id for answer in after.answers if not answer.correct} & known
    assert lost
    assert {answer.fact_id for answer in after.answers if answer.with_example is not None} == lost


def test_two_files_are_compared(place: Path, tmp_path: Path) -> None:
    facts = [f"facts:{place / 'facts.jsonl'}"]
    comparison = compressknow.compare(place / "F16.gguf", place / "Q8_0.gguf", facts, answers=tmp_path / "kept")
    assert comparison.behaviour is not None
    assert comparison.behaviour.b_against_a.comparisons[0].counts.both >= 60


@needs_gguf
def test_answers_of_one_runtime_are_not_taken_for_those_of_another(place: Path, tmp_path: Path) -> None:
    ask(place / "F16.gguf", tmp_path / "answers", place / "facts.jsonl")
    with pytest.raises(OutputError, match=r" in llama\.cpp, not in transformers"):
        ask(place / "F16.gguf", tmp_path / "answers", place / "facts.jsonl", UNPACKED)
    facts = [f"facts:{place / 'facts.jsonl'}"]
    for settings in (Settings(), UNPACKED):
        compressknow.report(
            place / "F16.gguf", place / "Q8_0.gguf", facts, settings=settings, answers=tmp_path / "kept"
        )
    ran = [read_answers(folder).record.model.runtime for folder in sorted((tmp_path / "kept").iterdir())]
    assert len(ran) == 4
    assert sum(runtime is None for runtime in ran) == 2


@needs_gguf
def test_without_the_extra_a_file_is_unpacked(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressknow.evaluate.handle.is_installed", lambda _: False)
    ask(place / "F16.gguf", tmp_path / "answers", place / "facts.jsonl")
    model = read_answers(tmp_path / "answers").record.model
    assert model.runtime is None
    assert model.computed_in == "float32"


def test_a_file_in_parts_is_read_by_its_first(place: Path, tmp_path: Path) -> None:
    write_gguf(place / "llama", tmp_path / "split.gguf", Q8_0, tensors_per_part=8)
    first, *others = sorted(tmp_path.glob("split-*.gguf"))
    whole = ask(place / "Q8_0.gguf", tmp_path / "a", place / "facts.jsonl")
    parts = ask(first, tmp_path / "b", place / "facts.jsonl")
    assert [(a.top5, a.top5_logp) for a in parts.values()] == [(a.top5, a.top5_logp) for a in whole.values()]
    model = read_answers(tmp_path / "b").record.model
    assert model.bytes == sum(part.stat().st_size for part in (first, *others))
    assert model.runtime is not None
    assert sum(sum(kinds.values()) for kinds in model.runtime["types"].values()) == model.parameters
    with pytest.raises(CheckpointError, match=r"is part 2 of \d of a split GGUF file") as error:
        ask(others[0], tmp_path / "c", place / "facts.jsonl")
    assert first.name in str(error.value)
    others[-1].unlink()
    with pytest.raises(CheckpointError, match=r"its folder lacks 1 of them"):
        ask(first, tmp_path / "d", place / "facts.jsonl")


def refused(file: Path, tmp_path: Path, facts: Path) -> CompressknowError:
    with pytest.raises(CompressknowError) as error:
        ask(file, tmp_path / "answers", facts)
    assert not (tmp_path / "answers").exists()
    return error.value


def test_damaged_files_are_one_message(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, file = (place / "Q8_0.gguf").read_bytes(), tmp_path / "damaged.gguf"
    wrong = {
        "is damaged: it is cut short": content[: len(content) // 2],
        "is not a GGUF file": b"JUNK" + content[4:],
        "of a version that llama.cpp b": content[:4] + (99).to_bytes(4, "little") + content[8:],
        "does not know the architecture 'lamma'": content.replace(b"llama", b"lamma"),
        "cannot load": content.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokuns"),
    }
    for message, damaged in wrong.items():
        file.write_bytes(damaged)
        assert message in str(refused(file, tmp_path, place / "facts.jsonl"))
    assert capfd.readouterr() == ("", "")


def test_what_is_no_decoder_is_refused(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "encoder.gguf"
    content = (place / "Q8_0.gguf").read_bytes()
    # A flag of the same length in place of one that llama.cpp does not need.
    shutil.copy(place / "Q8_0.gguf", file)
    _add_flag(file, content)
    error = refused(file, tmp_path, place / "facts.jsonl")
    assert isinstance(error, UnsupportedError)
    assert "only decoder-only models" in str(error)


def _add_flag(file: Path, content: bytes) -> None:
    """Say in the metadata that attention sees what follows, as encoders do."""
    key, false = b"llama.attention.causal", (7).to_bytes(4, "little") + b"\0"
    entry = len(key).to_bytes(8, "little") + key + false
    count = int.from_bytes(content[16:24], "little") + 1
    header, rest = content[:16] + count.to_bytes(8, "little") + entry, content[24:]
    # Tensors begin at a multiple of 32: the header grows by a key of the length that keeps them there.
    key = b"general.padding." + b"x" * ((-(len(entry) + 8 + 16 + 5)) % 32)
    padding = len(key).to_bytes(8, "little") + key + false
    header = content[:16] + (count + 1).to_bytes(8, "little") + entry + padding
    file.write_bytes(header + rest)


def test_a_runtime_that_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    facts = [f"facts:{place / 'facts.jsonl'}"]
    with pytest.raises(UsageError, match=r"There is no runtime 'lama\.cpp'"):
        Settings(runtime="lama.cpp")
    there = Settings(runtime="llama.cpp")
    with pytest.raises(UsageError, match=r"`runtime=\"llama\.cpp\"` cannot run llama"):
        compressknow.probe(place / "llama", tmp_path / "answers", facts, settings=there)
    with pytest.raises(UsageError, match="GGUF files run only on the CPU"):
        compressknow.probe(
            place / "F16.gguf", tmp_path / "answers", facts, settings=dataclasses.replace(there, device="cuda")
        )
    with pytest.raises(UnsupportedError, match=r"lm-eval:boolq cannot evaluate F16\.gguf in llama\.cpp"):
        compressknow.probe(place / "F16.gguf", tmp_path / "answers", ["lm-eval:boolq"])
    assert not (tmp_path / "answers").exists()
    # Beside a file, a folder runs in what reads it.
    card = compressknow.report(place / "llama", place / "Q8_0.gguf", facts, settings=there, answers=tmp_path / "kept")
    assert card.original.runtime is None


def test_a_sample_of_atlas_has_the_tokens_of_the_file(place: Path) -> None:
    model = GgufModel(place / "F16.gguf")
    tokenizer = GgufTokenizer(model)
    for fact in open_probe("atlas", Options(limit=50)).facts:
        ids = tokenizer(fact.prompt)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert max(ids) < len(tokenizer)
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert tokenizer.decode([]) == ""
    model.close()


def made(name: str, folder: Path) -> Path:
    """A checkpoint whose tokenizer begins texts as llama.cpp does where nothing else is said."""
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | words
    save_checkpoint(name, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@needs_converter
@pytest.mark.parametrize("name", one_in(3, ["llama-tied", "llama", "mixtral"]))
def test_an_exported_file_answers_as_its_checkpoint(name: str, place: Path, tmp_path: Path) -> None:
    """Random weights, and a tokenizer of sentencepiece: tokens, and what each candidate scores."""
    folder, file = made(name, tmp_path / "model"), tmp_path / "model.gguf"
    compressknow.export(folder, file, type="f32")
    before = ask(folder, tmp_path / "before", place / "facts.jsonl")
    after = ask(file, tmp_path / "after", place / "facts.jsonl")
    assert sum(after[fact].predicted == answer.predicted for fact, answer in before.items()) >= 63
    for fact, answer in before.items():
        assert after[fact].logp_gold == pytest.approx(answer.logp_gold, abs=2e-2)
    records = [read_answers(tmp_path / side).record.model for side in ("before", "after")]
    assert records[0].vocabulary == records[1].vocabulary
    card = compressknow.report(folder, file, [f"facts:{place / 'facts.jsonl'}"], answers=tmp_path / "kept")
    movement = card.comparisons[0].probes[0].movement
    assert movement is not None
    assert movement.kl_mean < 1e-3


@needs_converter
def test_running_text_is_read_as_in_transformers(place: Path, tmp_path: Path) -> None:
    folder, file = made("llama", tmp_path / "model"), tmp_path / "model.gguf"
    compressknow.export(folder, file, type="f32")
    facts = [json.loads(line)["prompt"] for line in (place / "facts.jsonl").read_text().splitlines()]
    (tmp_path / "text.txt").write_text(" ".join(facts), encoding="utf-8")
    options = Options(context=32)
    sides = [
        compressknow.probe(
            model, tmp_path / f"answers-{model.name}", [f"text:{tmp_path / 'text.txt'}"], options=options
        )
        for model in (folder, file)
    ]
    chunks = [next(iter(side.texts.values())) for side in sides]
    assert len(chunks[0]) == len(chunks[1]) > 3
    for one, other in zip(*chunks, strict=True):
        assert np.asarray(other.logp) == pytest.approx(np.asarray(one.logp), abs=2e-2)


@long
@needs_converter
@pytest.mark.network
def test_a_real_model_in_16_bits_answers_as_in_transformers(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: the checkpoint in float32, and its file in llama.cpp, on facts of atlas."""
    compressknow.export(smollm2, tmp_path / "f16.gguf", type="f16")
    options = Options(limit=24)
    sides = [
        compressknow.probe(model, tmp_path / f"answers-{model.name}", options=options).answers
        for model in (smollm2, tmp_path / "f16.gguf")
    ]
    same = sum(one.predicted == other.predicted for one, other in zip(*sides, strict=True))
    assert len(sides[0]) == 24
    assert same >= 23
