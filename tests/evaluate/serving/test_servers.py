"""Models behind an address: their answers are those of the same model run here, and each fault is one message."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import compressknow
from compressknow.base.errors import CompressknowError, UnsupportedError, UsageError
from compressknow.base.progress import Progress
from compressknow.cli import main
from compressknow.engine.identity import locate, locate_server
from compressknow.engine.language_model import LanguageModel, load_language_model
from compressknow.evaluate.answers import PARTS, Answer, read_answers, read_table
from compressknow.evaluate.evaluate import evaluate, make_prompts
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.runtimes import client as clients
from compressknow.evaluate.runtimes.kinds import detect_server
from compressknow.evaluate.scoring.ranking import TAIL
from compressknow.evaluate.sources import Options
from tests.evaluate.layouts import open_probe
from tests.evaluate.references import answers_to, as_probe, known_facts
from tests.evaluate.serving.model_server import NAME, ModelServer, serving
from tests.knowing import facts_file, knowing
from tests.long import long

KEY = "sk-aKeyThatNobodyMaySee"
FAST = Settings(timeout=20.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return knowing("llama", tmp_path_factory.mktemp("known") / "llama")


@pytest.fixture(scope="module")
def known(checkpoint: Path) -> LanguageModel:
    return load_language_model(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in clients.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(clients, "FIRST_PAUSE", 0.01)


@pytest.fixture
def served(known: LanguageModel) -> Iterator[Callable[[str], ModelServer]]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(serving(known.model, known.tokenizer, kind))


def answers_from(url: str, probe: Probe, settings: Settings = FAST) -> dict[str, Answer]:
    prompts = make_prompts(ModelHandle(locate(url), settings).loaded.make_scorer(probe), 32)
    assert prompts.total == len(probe.facts)
    return {answer.fact_id: answer for answers in evaluate(prompts) for answer in answers}


def check_like(found: dict[str, Answer], expected: dict[str, Answer], close: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for fact, answer in found.items():
        other = expected[fact]
        assert (answer.predicted, answer.correct, answer.rank) == (other.predicted, other.correct, other.rank)
        assert answer.top5 == other.top5
        assert (answer.produced, answer.grade) == (other.produced, other.grade)
        assert answer.top5_logp == pytest.approx(other.top5_logp, abs=close)
        assert answer.logp_gold == pytest.approx(other.logp_gold, abs=close)


@pytest.mark.parametrize("kind", ["vllm", "echo"])
@pytest.mark.parametrize("closed", [True, False])
def test_answers_are_those_of_the_model_run_here(
    served: Callable[[str], ModelServer], known: LanguageModel, kind: str, closed: bool
) -> None:
    probe = as_probe(known_facts(closed=closed), vocabulary="closed" if closed else "open")
    expected = answers_to(known.model, known.tokenizer, "causal", probe)
    found = answers_from(served(kind).url, probe)
    if closed:
        check_like(found, expected)
        sums = [(answer.total_logp, expected[fact].total_logp) for fact, answer in found.items()]
        # Where the likeliest tokens are told, not all candidates are read.
        assert kind == "vllm" or all(there == pytest.approx(here, abs=2 * TAIL) for there, here in sums)
        assert kind == "echo" or any(there is None for there, _ in sums)
        return
    for fact, answer in found.items():
        assert (answer.predicted, answer.correct) == (expected[fact].predicted, expected[fact].correct)
        assert answer.logp_gold == pytest.approx(expected[fact].logp_gold, abs=1e-4)


def test_a_penalty_in_the_generation_settings_changes_no_text(
    served: Callable[[str], ModelServer], known: LanguageModel
) -> None:
    probe, server = as_probe(known_facts()[:4]), served("vllm")
    server.penalty = 0.1
    check_like(answers_from(server.url, probe), answers_to(known.model, known.tokenizer, "causal", probe))


def test_vllm_tells_twenty_tokens_of_the_distribution_and_echo_none(
    served: Callable[[str], ModelServer], known: LanguageModel
) -> None:
    probe = as_probe(known_facts()[:4])
    expected = answers_to(known.model, known.tokenizer, "causal", probe)
    for fact, answer in answers_from(served("vllm").url, probe).items():
        assert list(answer.first_ids) == list(expected[fact].first_ids[:20])
        assert list(answer.first_logp) == pytest.approx(list(expected[fact].first_logp[:20]), abs=1e-5)
    assert all(len(answer.first_ids) == 0 for answer in answers_from(served("echo").url, probe).values())


def test_a_server_without_log_probabilities_is_judged_by_what_it_writes(
    served: Callable[[str], ModelServer], known: LanguageModel
) -> None:
    written = answers_to(known.model, known.tokenizer, "causal", as_probe(known_facts(closed=False), vocabulary="open"))
    found = answers_from(served("writes").url, as_probe(known_facts()))
    assert {fact: answer.correct for fact, answer in found.items()} == {
        fact: answer.correct for fact, answer in written.items()
    }
    assert {(answer.rank, answer.logp_gold, answer.choices) for answer in found.values()} == {(None, None, None)}


def test_a_probe_of_single_words_is_refused(served: Callable[[str], ModelServer]) -> None:
    with pytest.raises(UnsupportedError, match="needs the probabilities of all words"):
        answers_from(served("vllm").url, as_probe(known_facts(closed=False), vocabulary="full"))


def test_as_many_requests_at_a_time_as_the_user_says(served: Callable[[str], ModelServer]) -> None:
    probe = as_probe(known_facts()[:16])
    for parallel in (1, 3):
        server = served("vllm")
        answers_from(server.url, probe, Settings(parallel=parallel, timeout=20.0))
        assert server.most_at_a_time == parallel


@pytest.mark.parametrize(
    "faults",
    [[429, 503, 500], [(429, {"Retry-After": "0"})], [(503, {"Retry-After": "soon"})], ["cut"], ["break", "break"]],
    ids=str,
)
def test_what_passes_is_tried_again(served: Callable[[str], ModelServer], known: LanguageModel, faults: Any) -> None:
    server = served("vllm")
    probe = as_probe(known_facts()[:4])
    loaded = ModelHandle(locate(server.url), FAST).loaded
    server.faults["/v1/completions"] = list(faults)
    found = {answer.fact_id: answer for each in evaluate(make_prompts(loaded.make_scorer(probe))) for answer in each}
    assert server.faults["/v1/completions"] == []
    check_like(found, answers_to(known.model, known.tokenizer, "causal", probe))


def test_a_pause_that_a_server_asks_for_is_kept_up_to_a_minute(
    served: Callable[[str], ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib3.util.retry

    pauses: list[float] = []
    monkeypatch.setattr(urllib3.util.retry.time, "sleep", pauses.append)
    server = served("vllm")
    server.faults["/v1/models"] = [(429, {"Retry-After": "7"}), (503, {"Retry-After": "86400"})]
    assert ModelHandle(locate(server.url), FAST).loaded.family == "causal"
    assert pauses == [7, 60]


def test_a_pause_before_a_broken_answer_is_asked_for_again_doubles(
    served: Callable[[str], ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(clients.time, "sleep", pauses.append)
    server = served("vllm")
    server.faults["/v1/models"] = ["break", "break"]
    assert ModelHandle(locate(server.url), FAST).loaded.family == "causal"
    assert pauses == [clients.FIRST_PAUSE, 2 * clients.FIRST_PAUSE]


def test_an_answer_without_end_is_refused(
    served: Callable[[str], ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "MOST_BYTES", 1 << 20)
    server = served("vllm")
    server.faults["/v1/models"] = [b" " * (3 << 20)]
    with pytest.raises(CompressknowError, match="with more than 1 MB"):
        _ = ModelHandle(locate(server.url), FAST).loaded


def lie(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def changed(answer: dict[str, Any]) -> Any:
        change(answer["choices"][0])
        return answer

    return changed


def in_logprobs(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lie(lambda choice: "logprobs" in choice and choice["logprobs"].update(value))


def in_all_logprobs(value: float) -> Callable[[dict[str, Any]], Any]:
    """The same number in place of each."""

    def change(choice: dict[str, Any]) -> None:
        if told := choice.get("logprobs"):
            told["token_logprobs"] = [value] * len(told["token_logprobs"])
            told["top_logprobs"] = [dict.fromkeys(top or (), value) for top in told["top_logprobs"]]

    return lie(change)


NO_JSON = "answers /v1/completions with something that is not JSON"
NUMBERS = "answers /v1/completions with unexpected JSON: choices[0].logprobs.token_logprobs"
LIES = {
    "nan": (in_logprobs({"token_logprobs": [math.nan] * 40}), f"{NUMBERS}[0] is not a number"),
    "above 0": (in_logprobs({"token_logprobs": [0.5] * 40}), "0.5, which is not a log-probability"),
    "text": (in_logprobs({"token_logprobs": ["x"] * 40}), f"{NUMBERS}[0] is not a number"),
    "no list": (in_logprobs({"token_logprobs": 5}), f"{NUMBERS} is not a list"),
    "a huge number": (in_logprobs({"token_logprobs": [-(10**400)] * 40}), f"{NUMBERS}[0] is not a number"),
    "beyond float32": (in_logprobs({"token_logprobs": [-1e308] * 40}), "-1e+308, which is not a log-probability"),
    "nothing is likely": (in_all_logprobs(-math.inf), "is not a number"),
    "too few": (in_logprobs({"token_logprobs": [None, -1.0]}), "too few token_logprobs"),
    "top nan": (in_logprobs({"top_logprobs": [{"token_id:5": math.nan}]}), "token_id:5 is not a number"),
    "top none": (in_logprobs({"top_logprobs": []}), "has no top_logprobs"),
    "top names": (in_logprobs({"top_logprobs": [{"Paris": -1.0}]}), "has 'Paris' as a token id"),
    "no logprobs": (lie(lambda choice: choice.pop("logprobs", None)), "choices[0].logprobs is missing"),
    "no choices": (lambda answer: answer | {"choices": []}, "has no choices"),
    "another model": (lambda answer: answer | {"model": "other"}, "comes from another model, 'other'"),
    "no json": (lambda _: b"<html>", NO_JSON),
    "half a json": (lambda _: b'{"choices": [', NO_JSON),
    "deep": (lambda _: b"[" * 100_000, NO_JSON),
    "many values": (lambda _: b'{"choices": [' + b"[]," * 9_000_000 + b"0]}", NO_JSON),
    "a list": (lambda _: [], "unexpected JSON: it is not an object"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_lies_is_not_believed(served: Callable[[str], ModelServer], name: str) -> None:
    server = served("vllm")
    loaded = ModelHandle(locate(server.url), FAST).loaded
    server.changed, said = LIES[name]
    with pytest.raises(CompressknowError, match=re.escape(said)) as raised:
        list(evaluate(make_prompts(loaded.make_scorer(as_probe(known_facts()[:3])))))
    assert raised.value.hint is not None


@pytest.mark.parametrize("value", [5, [-(10**400)] * 9, [-math.inf] * 9, [[[]]] * 9], ids=["5", "huge", "inf", "lists"])
def test_what_echoes_nonsense_is_neither_taken_for_a_server_that_writes_nor_a_bug(
    served: Callable[[str], ModelServer], tmp_path: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = served("echo")
    server.changed = in_logprobs({"token_logprobs": value})
    assert main(["probe", server.url, "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"Error: {server.url} {NUMBERS}")
    assert not (tmp_path / "out").exists()


def leave_out_positions(choice: dict[str, Any]) -> None:
    """As SGLang does."""
    if told := choice.get("logprobs"):
        told["text_offset"] = [-1] * len(told["tokens"])


def shift_log_probabilities(choice: dict[str, Any]) -> None:
    """As llama-cpp-python does where texts begin without a BOS token."""
    if (told := choice.get("logprobs")) and len(told["tokens"]) > 1:
        told["token_logprobs"] = [None, *told["token_logprobs"][2:], -5.0]


def number_tokens(choice: dict[str, Any]) -> None:
    """As mlx_lm did, which does not echo, before it took `logprobs` to be a boolean."""
    if "logprobs" in choice:
        choice["logprobs"] = {"tokens": [5], "token_logprobs": [-1.0], "top_logprobs": [[5, -1.0]]}


@pytest.mark.parametrize("change", [leave_out_positions, shift_log_probabilities, number_tokens])
def test_a_server_that_echoes_nothing_of_use_is_judged_by_what_it_writes(
    served: Callable[[str], ModelServer], change: Callable[[dict[str, Any]], None]
) -> None:
    server, probe = served("echo"), as_probe(known_facts()[:4])
    server.changed = lie(change)
    found, written = answers_from(server.url, probe), answers_from(served("writes").url, probe)
    assert {fact: (answer.predicted, answer.logp_gold) for fact, answer in found.items()} == {
        fact: (answer.predicted, None) for fact, answer in written.items()
    }


def test_a_token_beyond_all_numbers_is_not_believed(served: Callable[[str], ModelServer]) -> None:
    server = served("vllm")
    server.faults["/tokenize"] = [b'{"tokens": [1e999]}']
    with pytest.raises(CompressknowError, match=r"tokens\[0\] is not a whole number"):
        ModelHandle(locate(server.url), FAST).loaded.make_scorer(as_probe(known_facts()[:1])).make_query(
            known_facts()[0]
        )


def test_half_a_letter_that_a_server_writes_is_stored_as_none(
    served: Callable[[str], ModelServer], tmp_path: Path
) -> None:
    server = served("writes")
    server.changed = lie(lambda choice: choice.update(text=" \ud83e"))
    facts, few = f"facts:{facts_file(tmp_path / 'f.jsonl')}", Options(limit=2)
    given = compressknow.probe(server.url, tmp_path / "a", facts, options=few, settings=FAST)
    assert {answer.produced for answer in given.answers} == {"\ufffd"}


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("hang", "does not answer within 0.3 s"),
        ("trickle", "does not answer within 0.3 s"),
        (500, r"answers with an error \(HTTP 500\)"),
        (418, r"answers with an error \(HTTP 418\)"),
        ((307, {"Location": "http://127.0.0.1:9"}), r"redirects to another address \(HTTP 307\)"),
        ("cut", "closes the connection"),
        ("break", "closes the connection"),
    ],
)
def test_what_does_not_pass_is_one_message(
    served: Callable[[str], ModelServer], tmp_path: Path, fault: Any, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = served("vllm")
    server.faults["/v1/models"] = [fault] * 50
    words = ["probe", server.url, "-p", f"facts:{facts_file(tmp_path / 'f.jsonl')}", "-o", str(tmp_path / "out")]
    assert main([*words, "--timeout", "0.3"]) == 1
    printed = capsys.readouterr()
    assert re.match(f"Error: {server.url} {what}", printed.err)
    assert printed.err.count("\n") <= 3
    assert not (tmp_path / "out").exists()


def test_a_refusal_reaches_the_process_that_waits_for_it(served: Callable[[str], ModelServer]) -> None:
    server = served("writes")
    server.faults["/v1/models"] = [418]
    with pytest.raises(CompressknowError, match="HTTP 418") as raised:
        _ = ModelHandle(locate(server.url), FAST).loaded
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_a_server_for_chats_alone_is_told_what_it_lacks(
    served: Callable[[str], ModelServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = served("writes")
    server.faults["/v1/completions"] = [404] * 9
    facts = f"facts:{facts_file(tmp_path / 'f.jsonl')}"
    assert main(["probe", server.url, "-p", facts, "-o", str(tmp_path / "out")]) == 1
    assert "It must have the model and /v1/completions" in " ".join(capsys.readouterr().err.split())


@long
@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_who_interrupts_a_run_does_not_wait_for_a_server_that_hangs(
    served: Callable[[str], ModelServer], tmp_path: Path
) -> None:
    server = served("vllm")
    # It is asked who it is, twice, and then the first facts, some of which it answers.
    server.faults["/v1/completions"] = [*["ok"] * 60, "hang"]
    facts = f"facts:{facts_file(tmp_path / 'f.jsonl')}"
    program = "import sys; from compressknow.cli import main; sys.exit(main())"
    words = ["probe", server.url, "-p", facts, "-o", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while server.count("/v1/completions") < 64 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - start < 15
    assert process.returncode == 130
    assert "Repeat the command to resume." in said
    # What it answered is stored, though it was answered to a part of a batch.
    (parts,) = (tmp_path / "out" / PARTS).iterdir()
    assert 0 < sum(len(read_table(path)) for path in parts.iterdir()) < 32


@pytest.mark.parametrize("kind", ["vllm", "writes"])
def test_facts_are_counted_as_they_are_answered(
    served: Callable[[str], ModelServer], tmp_path: Path, kind: str
) -> None:
    counts: list[int] = []

    def listen(progress: Progress) -> None:
        if progress.state == "advances":
            counts.append(progress.done)

    facts, out = f"facts:{facts_file(tmp_path / 'f.jsonl')}", tmp_path / "out"
    given = compressknow.probe(served(kind).url, out, facts, settings=FAST, on_progress=listen)
    assert counts == list(range(65))
    # They came as they were answered, and lie in the order of the probe.
    assert [answer.fact_id for answer in given.answers] == [fact.id for fact in open_probe(facts, Options()).facts]


def test_no_server_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["probe", "http://127.0.0.1:9", "-o", str(tmp_path / "out")]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("Error: There is no server at http://127.0.0.1:9.\n  Start it,")


def test_that_no_server_is_there_is_told_before_its_original_is_evaluated(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    assert main(["report", str(checkpoint), "http://127.0.0.1:9", "--answers", str(kept)]) == 1
    assert capsys.readouterr().err.startswith("Error: There is no server at http://127.0.0.1:9.")
    assert not kept.exists()


@pytest.mark.parametrize("given", [None, "wrong"])
def test_a_server_that_wants_a_key(
    served: Callable[[str], ModelServer],
    tmp_path: Path,
    given: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = served("vllm")
    server.key = KEY
    if given:
        monkeypatch.setenv("COMPRESSKNOW_API_KEY", given + KEY)
    assert main(["probe", server.url, "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "does not accept the key (HTTP 401)" in said if given else "requires a key (HTTP 401)" in said
    assert "Set COMPRESSKNOW_API_KEY" in said
    assert KEY not in said


@pytest.mark.parametrize("variable", ["COMPRESSKNOW_API_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_stored_nowhere(
    served: Callable[[str], ModelServer],
    tmp_path: Path,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = served("vllm")
    server.key = KEY
    monkeypatch.setenv(variable, KEY)
    # A .netrc of the user's is for other programs.
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    out = tmp_path / "out"
    words = ["probe", server.url, "-p", f"facts:{facts_file(tmp_path / 'f.jsonl')}", "-o", str(out), "--limit", "8"]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    assert {headers["Authorization"] for _, headers in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in printed.out + printed.err
    assert all(KEY.encode() not in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_the_record_says_what_answered_and_the_same_server_is_not_asked_again(
    served: Callable[[str], ModelServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = served("vllm"), tmp_path / "out"
    words = ["probe", server.url, "-p", f"facts:{facts_file(tmp_path / 'f.jsonl')}", "-o", str(out)]
    assert main(words) == 0
    assert f"Computed on {server.url} in " in capsys.readouterr().out
    record = json.loads((out / "probe.json").read_text())["model"]
    assert record["name"] == NAME
    assert record["device"] == server.url
    assert record["runtime"] == {
        **{"name": "server", "build": "vLLM 0.33.0", "url": server.url, "model": NAME},
        **{"scores": True, "distribution": True},
    }
    assert all(answer.correct for answer in read_answers(out).answers)
    asked = server.count("/tokenize")
    assert main(words) == 0
    # It is asked who it is, and no fact.
    assert server.count("/tokenize") == asked + 4
    # Another model behind the same address and name is not taken for it.
    server.changed = lie(lambda choice: choice.update(text=" something else"))
    assert main(words) == 1


def test_models_by_name(served: Callable[[str], ModelServer]) -> None:
    server = served("vllm")
    server.models = [NAME, "other"]
    with pytest.raises(UsageError, match=f"has several models: {NAME}, other") as several:
        _ = ModelHandle(locate(server.url), FAST).loaded
    assert several.value.hint == "Choose one with --model NAME."
    with pytest.raises(UsageError, match="has no model 'known-fact'") as wrong:
        _ = ModelHandle(locate(server.url), Settings(model="known-fact")).loaded
    assert wrong.value.hint == f"Did you mean {NAME}? It has {NAME}, other."
    assert ModelHandle(locate(f"{server.url}/v1/"), Settings(model=NAME)).loaded.make_record()["model"] == NAME
    server.models = []
    with pytest.raises(CompressknowError, match="does not say which models it has"):
        _ = ModelHandle(locate(server.url), FAST).loaded


def test_a_router_is_asked_about_the_model_by_its_name(served: Callable[[str], ModelServer]) -> None:
    """llama-server with several models says of itself that it reads no token."""
    server, bodies = (
        served("writes"),
        [b'{"default_generation_settings": {"n_ctx": %d}}' % tokens for tokens in (0, 64)],
    )
    server.faults = {"/props": bodies[:1], "/props?model=some%2Fmodel%3AQ8_0": bodies[::-1]}
    client = clients.Client(server.url, timeout=20.0)
    assert [detect_server(client, "some/model:Q8_0", {}).longest for _ in bodies] == [64, None]


@pytest.mark.parametrize("seconds", [1e10, math.inf])
def test_a_server_may_take_as_long_as_it_needs(served: Callable[[str], ModelServer], seconds: float) -> None:
    assert clients.Client(served("writes").url, timeout=seconds).get("/v1/models", dict)["data"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"parallel": 0},
        {"timeout": math.nan},
        {"batch_size": 2.5},
        {"parallel": "4"},
        {"timeout": None},
    ],
)
def test_settings_that_run_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="number above 0"):
        Settings(**wrong)


def test_devices_and_dtypes_of_torch_are_taken_by_their_names() -> None:
    named: Any = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    assert Settings(**named) == Settings(device="cpu", dtype="bfloat16")
    for wrong in (None, 3):
        with pytest.raises(UsageError, match="There is no device"):
            Settings(device=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://", "cannot be read"),
        ("http://host:port", "cannot be read"),
        ("http://me:secret@host:8080", "more than host, port and path"),
        ("https://host/v1?api_key=secret", "more than host, port and path"),
    ],
)
def test_addresses_that_cannot_be_one_or_hold_a_secret(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        locate_server(address)
    assert "secret" not in str(raised.value)


@long
def test_a_report_of_a_checkpoint_and_the_same_model_on_a_server(
    served: Callable[[str], ModelServer], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = served("vllm")
    facts, card = f"facts:{facts_file(tmp_path / 'f.jsonl')}", tmp_path / "card.json"
    words = ["-p", facts, "--answers", str(tmp_path / "answers"), "-o", str(card), "-o", str(tmp_path / "card.html")]
    assert main(["report", str(checkpoint), server.url, *words]) == 0
    (probe,) = json.loads(card.read_text())["compressed"][0]["probes"].values()
    assert (probe["both"], probe["lost"]) == (64, 0)
    # And the other way round; the original's likeliest tokens are 20 then.
    again = [*words, "--overwrite"]
    assert main(["report", server.url, str(checkpoint), *again]) == 0
    (probe,) = json.loads(card.read_text())["compressed"][0]["probes"].values()
    assert (probe["both"], probe["lost"]) == (64, 0)
    assert probe["kl_mean"] == pytest.approx(0, abs=1e-6)
    # Nothing is asked again.
    asked = server.count("/tokenize")
    assert main(["report", server.url, str(checkpoint), *again]) == 0
    assert server.count("/tokenize") <= asked + 8


def test_an_original_on_a_server_is_asked_once_for_an_early_end(
    served: Callable[[str], ModelServer], checkpoint: Path, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    compressknow.report(
        served("vllm").url,
        checkpoint,
        [f"facts:{facts_file(tmp_path / 'f.jsonl')}"],
        answers=tmp_path / "answers",
        fail_under=0.5,
        early=True,
        on_progress=seen.append,
    )
    assert seen
    assert not any(progress.stage.again for progress in seen)


def test_speed_on_a_server_is_refused_before_any_work(
    served: Callable[[str], ModelServer], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = served("vllm")
    for words in (["--time"], ["--time", "--fail-under", "0.5", "--early"]):
        assert main(["report", str(checkpoint), server.url, *words]) == 2
        assert f"{server.url} is a server" in capsys.readouterr().err
    assert server.requests == []


def test_what_is_written_and_what_is_chosen_are_not_compared(
    served: Callable[[str], ModelServer], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-p", f"facts:{facts_file(tmp_path / 'f.jsonl')}", "--answers", str(tmp_path / "answers")]
    writes, other = served("writes"), served("writes")
    assert main(["report", str(checkpoint), writes.url, *words]) == 1
    assert "were not evaluated in the same way" in capsys.readouterr().err
    assert main(["report", writes.url, other.url, *words, "--json"]) == 0
    (probe,) = json.loads(capsys.readouterr().out)["compressed"][0]["probes"].values()
    assert (probe["both"], probe["kl_mean"]) == (64, None)


@pytest.mark.parametrize("verb", ["inspect", "convert", "sweep", "compare"])
def test_other_commands_refuse_an_address(
    served: Callable[[str], ModelServer], tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = served("vllm").url
    more = {"convert": ["out", "--prune", "0.2"], "sweep": ["-o", "out"], "compare": [url], "inspect": []}[verb]
    assert main([verb, url, *(str(tmp_path / word) if word == "out" else word for word in more)]) == 1
    said = capsys.readouterr().err
    assert "server" in said
    assert said.count("Error") == 1
