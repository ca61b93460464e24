"""Models on a server: their answers are those of the same model run locally, and each fault is one error."""

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
from contextlib import ExitStack
from dataclasses import replace
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
from compressknow.evaluate.evaluate import Prompts, evaluate
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.handle import ModelHandle
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.runtimes import client as clients
from compressknow.evaluate.runtimes.kinds import detect_server
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.ranking import TAIL
from compressknow.evaluate.scoring.scorer import BLANK_NOT_LAST, NO_BEGINNING, TOO_LONG
from compressknow.evaluate.sources import Options
from tests.evaluate.layouts import open_probe
from tests.evaluate.references import evaluate_model, make_known_facts, make_probe
from tests.evaluate.serving.model_server import LONGEST, NAME, ModelServer, serve_model
from tests.knowing import save_trained, write_facts
from tests.long import long, one_in

KEY = "sk-aKeyThatNobodyMaySee"
SETTINGS = Settings(timeout=20.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trained("llama", tmp_path_factory.mktemp("known") / "llama")


@pytest.fixture(scope="module")
def lm(checkpoint: Path) -> LanguageModel:
    return load_language_model(checkpoint, device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _no_pauses_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in clients.KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(clients, "FIRST_PAUSE", 0.01)


@pytest.fixture
def serve(lm: LanguageModel) -> Iterator[Callable[[str], ModelServer]]:
    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(serve_model(lm.model, lm.tokenizer, kind))


def evaluate_server(url: str, probe: Probe, settings: Settings = SETTINGS) -> dict[str, Answer]:
    prompts = Prompts(ModelHandle(locate(url), settings).loaded.make_scorer(probe), 32)
    assert prompts.total == len(probe.facts)
    return {answer.fact_id: answer for answers in evaluate(prompts) for answer in answers}


def check_similar(answers: dict[str, Answer], expected: dict[str, Answer]) -> None:
    assert answers.keys() == expected.keys()
    for fact, answer in answers.items():
        other = expected[fact]
        assert (answer.predicted, answer.correct, answer.rank) == (other.predicted, other.correct, other.rank)
        assert answer.top5 == other.top5
        assert (answer.produced, answer.grade) == (other.produced, other.grade)
        assert answer.top5_logp == pytest.approx(other.top5_logp, abs=1e-4)
        assert answer.logp_gold == pytest.approx(other.logp_gold, abs=1e-4)


@pytest.mark.parametrize("kind", one_in(2, ["vllm", "echo"]))
@pytest.mark.parametrize("closed", [True, False])
def test_answers_are_those_of_the_model_run_locally(
    serve: Callable[[str], ModelServer], lm: LanguageModel, kind: str, closed: bool
) -> None:
    probe = make_probe(make_known_facts(closed=closed), vocabulary="closed" if closed else "open")
    expected = evaluate_model(lm.model, lm.tokenizer, "causal", probe)
    answers = evaluate_server(serve(kind).url, probe)
    if closed:
        check_similar(answers, expected)
        sums = [(answer.total_logp, expected[fact].total_logp) for fact, answer in answers.items()]
        # Where the server returns the likeliest tokens, not all candidates are scored.
        assert kind == "vllm" or all(remote == pytest.approx(local, abs=2 * TAIL) for remote, local in sums)
        assert kind == "echo" or any(remote is None for remote, _ in sums)
        return
    for fact, answer in answers.items():
        assert (answer.predicted, answer.correct) == (expected[fact].predicted, expected[fact].correct)
        assert answer.logp_gold == pytest.approx(expected[fact].logp_gold, abs=1e-4)
        # Other first tokens have no texts here.
        assert answer.top5 == (answer.predicted,)
        if kind == "vllm":
            assert answer.rank == expected[fact].rank
            assert answer.top5_logp == pytest.approx(expected[fact].top5_logp[:1], abs=1e-4)


def test_a_right_free_answer_has_rank_1_however_it_is_spelled(serve: Callable[[str], ModelServer]) -> None:
    facts = [replace(fact, obj_label=fact.obj_label.lower()) for fact in make_known_facts(closed=False)[:8]]
    answers = evaluate_server(serve("vllm").url, make_probe(facts, vocabulary="open"))
    assert {(answer.correct, answer.rank) for answer in answers.values()} == {(True, 1)}


@pytest.mark.parametrize("kind", ["vllm", "writes"])
def test_generated_answers_are_those_of_the_model_run_locally(
    serve: Callable[[str], ModelServer], lm: LanguageModel, kind: str
) -> None:
    probe, server = make_probe(make_known_facts()[::8]), serve(kind)
    scorers = [
        ModelHandle(locate(server.url), SETTINGS).loaded.make_scorer(probe),
        make_scorer(lm.model, lm.tokenizer, "causal", probe),
    ]
    server.lengths.clear()
    remote, local = (
        {
            query.fact.id: text
            for batch in Prompts(scorer).batches
            for query, text in zip(batch, scorer.generate_answers(batch), strict=True)
        }
        for scorer in scorers
    )
    assert remote == local == {fact.id: fact.obj_label for fact in probe.facts}
    # The longest candidate and 3 more, for an article, a quote and the end of the word; or, if the server does not tell
    # tokens, half of the object's characters and 4 more.
    assert set(server.lengths) == ({4, 5} if kind == "vllm" else {7, 8, 9})


def test_a_penalty_in_the_generation_settings_changes_no_text(
    serve: Callable[[str], ModelServer], lm: LanguageModel
) -> None:
    probe, server = make_probe(make_known_facts()[:4]), serve("vllm")
    server.penalty = 0.1
    check_similar(evaluate_server(server.url, probe), evaluate_model(lm.model, lm.tokenizer, "causal", probe))


def test_a_blank_that_begins_the_prompt_follows_the_first_token(
    serve: Callable[[str], ModelServer], lm: LanguageModel
) -> None:
    probe = make_probe([replace(make_known_facts()[0], prompt="[MASK] is the capital.")])
    check_similar(evaluate_server(serve("vllm").url, probe), evaluate_model(lm.model, lm.tokenizer, "causal", probe))
    scorer = ModelHandle(locate(serve("echo").url), SETTINGS).loaded.make_scorer(probe)
    assert Prompts(scorer).dropped == {NO_BEGINNING: 1}


def test_vllm_returns_twenty_tokens_of_the_distribution_and_echo_none(
    serve: Callable[[str], ModelServer], lm: LanguageModel
) -> None:
    probe = make_probe(make_known_facts()[:4])
    expected = evaluate_model(lm.model, lm.tokenizer, "causal", probe)
    for fact, answer in evaluate_server(serve("vllm").url, probe).items():
        assert list(answer.first_ids) == list(expected[fact].first_ids[:20])
        assert list(answer.first_logp) == pytest.approx(list(expected[fact].first_logp[:20]), abs=1e-5)
    assert all(len(answer.first_ids) == 0 for answer in evaluate_server(serve("echo").url, probe).values())


def test_a_server_without_log_probabilities_is_evaluated_by_its_text(
    serve: Callable[[str], ModelServer], lm: LanguageModel
) -> None:
    probe = make_probe(make_known_facts(closed=False), vocabulary="open")
    expected = evaluate_model(lm.model, lm.tokenizer, "causal", probe)
    answers = evaluate_server(serve("writes").url, make_probe(make_known_facts()))
    assert {fact: answer.correct for fact, answer in answers.items()} == {
        fact: answer.correct for fact, answer in expected.items()
    }
    assert {(answer.rank, answer.logp_gold, answer.choices) for answer in answers.values()} == {(None, None, None)}


def test_a_written_candidate_that_begins_with_the_object_is_wrong(serve: Callable[[str], ModelServer]) -> None:
    server = serve("writes")
    server.change = change_choice(lambda choice: choice.update(text=" Guinea-Bissau."))
    fact = replace(make_known_facts()[0], obj_label="Guinea", candidates=("Guinea", "Guinea-Bissau"))
    (answer,) = evaluate_server(server.url, make_probe([fact])).values()
    assert (answer.correct, answer.produced) == (False, "Guinea-Bissau")


@pytest.mark.parametrize(
    ("kind", "prompt", "reason"),
    [("vllm", f"{'The ' * 64}[MASK].", TOO_LONG), ("writes", "The [MASK] is the capital.", BLANK_NOT_LAST)],
)
def test_facts_that_a_server_cannot_be_asked_are_dropped(
    serve: Callable[[str], ModelServer], kind: str, prompt: str, reason: str
) -> None:
    fact, *others = make_known_facts()[:3]
    scorer = ModelHandle(locate(serve(kind).url), SETTINGS).loaded.make_scorer(
        make_probe([replace(fact, prompt=prompt), *others])
    )
    prompts = Prompts(scorer)
    assert (prompts.total, prompts.dropped) == (2, {reason: 1})


def test_facts_that_just_fit_in_the_context_are_evaluated(serve: Callable[[str], ModelServer]) -> None:
    (fact,) = make_known_facts()[:1]
    facts = [replace(fact, id=str(words), prompt=f"{'The ' * words}[MASK].") for words in range(55, 65)]
    prompts = Prompts(ModelHandle(locate(serve("vllm").url), SETTINGS).loaded.make_scorer(make_probe(facts)))
    answers = [answer for batch in evaluate(prompts) for answer in batch]
    longest = max(len(query.prompt) + max(map(len, query.options)) for batch in prompts.batches for query in batch)
    # A request for their scores asks for another token.
    assert longest == LONGEST - 1
    assert (len(answers), prompts.dropped) == (prompts.total, {TOO_LONG: len(facts) - prompts.total})


def test_a_probe_of_single_words_is_refused(serve: Callable[[str], ModelServer]) -> None:
    with pytest.raises(UnsupportedError, match="needs the probabilities of all words"):
        evaluate_server(serve("vllm").url, make_probe(make_known_facts(closed=False), vocabulary="full"))


def test_parallel_limits_the_requests_at_a_time(serve: Callable[[str], ModelServer]) -> None:
    probe = make_probe(make_known_facts()[:16])
    for parallel in (1, 3):
        server = serve("vllm")
        evaluate_server(server.url, probe, Settings(parallel=parallel, timeout=20.0))
        assert server.most_parallel == parallel


@pytest.mark.parametrize(
    "faults",
    [
        [429, 503, 500],
        [408, 502, 504],
        [(429, {"Retry-After": "0"})],
        [(503, {"Retry-After": "soon"})],
        ["cut"],
        ["break", "break"],
    ],
    ids=str,
)
def test_temporary_faults_are_retried(serve: Callable[[str], ModelServer], lm: LanguageModel, faults: Any) -> None:
    server = serve("vllm")
    probe = make_probe(make_known_facts()[:4])
    loaded = ModelHandle(locate(server.url), SETTINGS).loaded
    server.faults["/v1/completions"] = list(faults)
    prompts = Prompts(loaded.make_scorer(probe))
    answers = {answer.fact_id: answer for batch in evaluate(prompts) for answer in batch}
    assert server.faults["/v1/completions"] == []
    check_similar(answers, evaluate_model(lm.model, lm.tokenizer, "causal", probe))


def test_retry_after_is_respected_up_to_a_minute(
    serve: Callable[[str], ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib3.util.retry

    pauses: list[float] = []
    monkeypatch.setattr(urllib3.util.retry.time, "sleep", pauses.append)
    server = serve("vllm")
    server.faults["/v1/models"] = [(429, {"Retry-After": "7"}), (503, {"Retry-After": "86400"}), 500, 502, 504]
    assert ModelHandle(locate(server.url), SETTINGS).loaded.family == "causal"
    assert pauses[:2] == [7, 60]
    # Without it, pauses double; to each is added up to the first one.
    assert [pause // clients.FIRST_PAUSE for pause in pauses[2:]] == [4, 8, 16]


def test_requests_over_https_are_retried_too() -> None:
    session = clients.Client("", timeout=1.0)._session
    assert session.get_adapter("https://host") is session.get_adapter("http://host")


def test_the_pause_before_each_retry_doubles(
    serve: Callable[[str], ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(clients.time, "sleep", pauses.append)
    server = serve("vllm")
    server.faults["/v1/models"] = ["break", "break"]
    assert ModelHandle(locate(server.url), SETTINGS).loaded.family == "causal"
    assert pauses == [clients.FIRST_PAUSE, 2 * clients.FIRST_PAUSE]


def test_an_endless_answer_is_refused(serve: Callable[[str], ModelServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MOST_BYTES", 1 << 20)
    server = serve("vllm")
    server.faults["/v1/models"] = [b" " * (3 << 20)]
    with pytest.raises(CompressknowError, match="with more than 1 MB"):
        _ = ModelHandle(locate(server.url), SETTINGS).loaded


def change_choice(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    def changed(answer: dict[str, Any]) -> Any:
        change(answer["choices"][0])
        return answer

    return changed


def set_logprobs(value: Any) -> Callable[[dict[str, Any]], Any]:
    return change_choice(lambda choice: "logprobs" in choice and choice["logprobs"].update(value))


def set_all_logprobs(value: float) -> Callable[[dict[str, Any]], Any]:
    """Replace all log-probabilities by the same number."""

    def change(choice: dict[str, Any]) -> None:
        if logprobs := choice.get("logprobs"):
            logprobs["token_logprobs"] = [value] * len(logprobs["token_logprobs"])
            logprobs["top_logprobs"] = [dict.fromkeys(top or (), value) for top in logprobs["top_logprobs"]]

    return change_choice(change)


NO_JSON = "answers /v1/completions with something that is not JSON"
NUMBERS = "answers /v1/completions with unexpected JSON: choices[0].logprobs.token_logprobs"
INVALID = {
    "nan": (set_logprobs({"token_logprobs": [math.nan] * 40}), f"{NUMBERS}[0] is not a number"),
    "above 0": (set_logprobs({"token_logprobs": [0.5] * 40}), "0.5, which is not a log-probability"),
    "text": (set_logprobs({"token_logprobs": ["x"] * 40}), f"{NUMBERS}[0] is not a number"),
    "no list": (set_logprobs({"token_logprobs": 5}), f"{NUMBERS} is not a list"),
    "a huge number": (set_logprobs({"token_logprobs": [-(10**400)] * 40}), f"{NUMBERS}[0] is not a number"),
    "beyond float32": (set_logprobs({"token_logprobs": [-1e308] * 40}), "-1e+308, which is not a log-probability"),
    "nothing is likely": (set_all_logprobs(-math.inf), "is not a number"),
    "too few": (set_logprobs({"token_logprobs": [None, -1.0]}), "too few token_logprobs"),
    "top nan": (set_logprobs({"top_logprobs": [{"token_id:5": math.nan}]}), "token_id:5 is not a number"),
    "top none": (set_logprobs({"top_logprobs": []}), "has no top_logprobs"),
    "top names": (set_logprobs({"top_logprobs": [{"Paris": -1.0}]}), "has 'Paris' as a token id"),
    "top huge": (set_logprobs({"top_logprobs": [{"token_id:2147483648": -1.0}]}), "has 2147483648 as a token id"),
    "no logprobs": (change_choice(lambda choice: choice.pop("logprobs", None)), "choices[0].logprobs is missing"),
    "no choices": (lambda answer: answer | {"choices": []}, "has no choices"),
    "another model": (lambda answer: answer | {"model": "other"}, "comes from another model, 'other'"),
    "no json": (lambda _: b"<html>", NO_JSON),
    "half a json": (lambda _: b'{"choices": [', NO_JSON),
    "deep": (lambda _: b"[" * 100_000, NO_JSON),
    "many values": (lambda _: b'{"choices": [' + b"[]," * 9_000_000 + b"0]}", NO_JSON),
    "a list": (lambda _: [], "unexpected JSON: it is not an object"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_answer_is_refused(serve: Callable[[str], ModelServer], name: str) -> None:
    server = serve("vllm")
    loaded = ModelHandle(locate(server.url), SETTINGS).loaded
    server.change, message = INVALID[name]
    with pytest.raises(CompressknowError, match=re.escape(message)) as raised:
        list(evaluate(Prompts(loaded.make_scorer(make_probe(make_known_facts()[:3])))))
    assert raised.value.hint is not None


def test_rounding_makes_no_probability_exceed_one(serve: Callable[[str], ModelServer]) -> None:
    server = serve("vllm")
    server.change = set_all_logprobs(0.0005)
    answers = evaluate_server(server.url, make_probe(make_known_facts()[:2]))
    assert {answer.logp_gold for answer in answers.values()} == {0}


def test_a_gateway_may_forbid_other_paths(serve: Callable[[str], ModelServer]) -> None:
    server = serve("echo")
    server.faults = {f"/props?model={NAME}": [403], "/version": [403]}
    assert ModelHandle(locate(server.url), SETTINGS).loaded.architecture == "a server that echoes"


@pytest.mark.parametrize("value", [5, [-(10**400)] * 9, [-math.inf] * 9, [[[]]] * 9], ids=["5", "huge", "inf", "lists"])
def test_a_server_that_echoes_invalid_numbers_is_an_error(
    serve: Callable[[str], ModelServer], tmp_path: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve("echo")
    server.change = set_logprobs({"token_logprobs": value})
    assert main(["probe", server.url, "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"Error: {server.url} {NUMBERS}")
    assert not (tmp_path / "out").exists()


def leave_out_positions(choice: dict[str, Any]) -> None:
    """Change a choice to what SGLang returns."""
    if logprobs := choice.get("logprobs"):
        logprobs["text_offset"] = [-1] * len(logprobs["tokens"])


def shift_log_probabilities(choice: dict[str, Any]) -> None:
    """Change a choice to what llama-cpp-python returns if texts begin without a BOS token."""
    if (logprobs := choice.get("logprobs")) and len(logprobs["tokens"]) > 1:
        logprobs["token_logprobs"] = [None, *logprobs["token_logprobs"][2:], -5.0]


def number_tokens(choice: dict[str, Any]) -> None:
    """As mlx_lm did, which does not echo, before it took `logprobs` to be a boolean."""
    if "logprobs" in choice:
        choice["logprobs"] = {"tokens": [5], "token_logprobs": [-1.0], "top_logprobs": [[5, -1.0]]}


def count_bytes(choice: dict[str, Any]) -> None:
    """Give the positions of tokens in bytes."""
    if logprobs := choice.get("logprobs"):
        sizes = [len(word.encode()) for word in logprobs["tokens"]]
        logprobs["text_offset"] = [logprobs["text_offset"][0] + sum(sizes[:place]) for place in range(len(sizes))]


def make_certain(choice: dict[str, Any]) -> None:
    if logprobs := choice.get("logprobs"):
        logprobs["token_logprobs"] = [0.0] * len(logprobs["tokens"])


@pytest.mark.parametrize(
    "change", [leave_out_positions, shift_log_probabilities, number_tokens, count_bytes, make_certain]
)
def test_a_server_that_echoes_nothing_of_use_is_judged_by_what_it_writes(
    serve: Callable[[str], ModelServer], change: Callable[[dict[str, Any]], None]
) -> None:
    server, probe = serve("echo"), make_probe(make_known_facts()[:4])
    server.change = change_choice(change)
    answers, expected = evaluate_server(server.url, probe), evaluate_server(serve("writes").url, probe)
    assert {fact: (answer.predicted, answer.logp_gold) for fact, answer in answers.items()} == {
        fact: (answer.predicted, None) for fact, answer in expected.items()
    }


def test_an_echoed_token_that_begins_in_the_prompt_counts_as_part_of_the_answer(
    serve: Callable[[str], ModelServer],
) -> None:
    server = serve("echo")
    served = ModelHandle(locate(server.url), SETTINGS).loaded._served  # type: ignore[attr-defined]
    (fact,) = make_known_facts()[:1]
    before, _, last = f"{fact.before} {fact.obj_label}".rpartition(" ")
    prompt, answer = (served.encode(text, False) for text in (before, f" {last}"))
    expected = served.score_rest(prompt, answer, 0.0, -math.inf)

    def join_last_of_prompt(choice: dict[str, Any]) -> None:
        """Join the last token of the prompt and the answer, which precedes a token that the server writes."""
        logprobs = choice["logprobs"]
        for name, join in (
            ("tokens", "".join),
            ("token_logprobs", lambda two: two[1]),
            ("text_offset", lambda two: two[0]),
        ):
            logprobs[name][-3:-1] = [join(logprobs[name][-3:-1])]

    server.change = change_choice(join_last_of_prompt)
    assert served.score_rest(prompt, answer, 0.0, -math.inf) == expected < 0


def test_an_infinite_token_id_is_refused(serve: Callable[[str], ModelServer]) -> None:
    server = serve("vllm")
    server.faults["/tokenize"] = [b'{"tokens": [1e999]}']
    with pytest.raises(CompressknowError, match=r"tokens\[0\] is not a whole number"):
        ModelHandle(locate(server.url), SETTINGS).loaded.make_scorer(make_probe(make_known_facts()[:1])).make_query(
            make_known_facts()[0]
        )


def test_a_lone_surrogate_is_stored_as_a_replacement_character(
    serve: Callable[[str], ModelServer], tmp_path: Path
) -> None:
    server = serve("writes")
    server.change = change_choice(lambda choice: choice.update(text=" \ud83e"))
    facts, options = f"facts:{write_facts(tmp_path / 'f.jsonl')}", Options(limit=2)
    answers = compressknow.probe(server.url, tmp_path / "a", facts, options=options, settings=SETTINGS)
    assert {answer.produced for answer in answers.answers} == {"\ufffd"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("hang", "does not answer within 0.3 s"),
        ("trickle", "does not answer within 0.3 s"),
        (500, r"answers with an error \(HTTP 500\)\.\n  It says: not now\n  Wait, .*: answers so far are kept\.\n"),
        (403, r"requires a key \(HTTP 403\)"),
        (418, r"answers with an error \(HTTP 418\)"),
        ((307, {"Location": "http://127.0.0.1:9"}), r"redirects to another address \(HTTP 307\)"),
        ("cut", "closes the connection"),
        ("break", "closes the connection"),
    ],
)
def test_a_lasting_fault_is_one_error(
    serve: Callable[[str], ModelServer], tmp_path: Path, fault: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve("vllm")
    server.faults["/v1/models"] = [fault] * 50
    arguments = ["probe", server.url, "-p", f"facts:{write_facts(tmp_path / 'f.jsonl')}", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--timeout", "0.3"]) == 1
    printed = capsys.readouterr()
    assert re.match(f"Error: {server.url} {message}", printed.err)
    assert printed.err.count("\n") <= 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "not now"}},
        {"error": "not now"},
        {"object": "error", "message": "not now"},
        {"detail": "not now"},
    ],
)
def test_the_message_of_a_server_is_found_under_each_usual_key(
    serve: Callable[[str], ModelServer], body: dict[str, Any]
) -> None:
    server = serve("writes")
    server.faults["/v1/models"] = [body]
    with pytest.raises(CompressknowError, match=r"HTTP 400\)\.\n\s*It says: not now$"):
        clients.Client(server.url, timeout=20.0).request("/v1/models", dict)


def test_an_error_of_a_server_can_be_pickled(serve: Callable[[str], ModelServer]) -> None:
    server = serve("writes")
    server.faults["/v1/models"] = [418]
    with pytest.raises(CompressknowError, match=r"HTTP 418\)\.\n\s*It says: not now") as raised:
        _ = ModelHandle(locate(server.url), SETTINGS).loaded
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_the_error_on_a_chat_server_says_what_it_lacks(
    serve: Callable[[str], ModelServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve("writes")
    server.faults["/v1/completions"] = [404] * 9
    facts = f"facts:{write_facts(tmp_path / 'f.jsonl')}"
    assert main(["probe", server.url, "-p", facts, "-o", str(tmp_path / "out")]) == 1
    assert "It must have the model and /v1/completions" in " ".join(capsys.readouterr().err.split())


@long
@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_an_interrupt_does_not_wait_for_a_server_that_hangs(
    serve: Callable[[str], ModelServer], tmp_path: Path
) -> None:
    server = serve("vllm")
    # The server is detected twice and then answers some of the first facts.
    server.faults["/v1/completions"] = [*["ok"] * 60, "hang"]
    facts = f"facts:{write_facts(tmp_path / 'f.jsonl')}"
    program = "import sys; from compressknow.cli import main; sys.exit(main())"
    arguments = ["probe", server.url, "-p", facts, "-o", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while server.count("/v1/completions") < 64 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, printed = process.communicate(timeout=60)
    assert time.monotonic() - start < 15
    assert process.returncode == 130
    assert "Repeat the command to resume." in printed
    # Its answers are stored, although they are only a part of a batch.
    (parts,) = (tmp_path / "out" / PARTS).iterdir()
    assert 0 < sum(len(read_table(path)) for path in parts.iterdir()) < 32


@pytest.mark.parametrize("kind", ["vllm", "writes"])
def test_facts_are_counted_as_they_are_answered(serve: Callable[[str], ModelServer], tmp_path: Path, kind: str) -> None:
    counts: list[int] = []

    def listen(progress: Progress) -> None:
        if progress.state == "advances":
            counts.append(progress.done)

    facts, out = f"facts:{write_facts(tmp_path / 'f.jsonl')}", tmp_path / "out"
    answers = compressknow.probe(serve(kind).url, out, facts, settings=SETTINGS, on_progress=listen)
    assert counts == list(range(65))
    # Whatever the order in which they arrive, they are stored in the order of the probe.
    assert [answer.fact_id for answer in answers.answers] == [fact.id for fact in open_probe(facts, Options()).facts]


def test_a_missing_server_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["probe", "http://127.0.0.1:9", "-o", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("Error: There is no server at http://127.0.0.1:9.\n  Start it,")


def test_a_server_that_stops_answering_is_not_called_missing(serve: Callable[[str], ModelServer]) -> None:
    server = serve("vllm")
    scorer = ModelHandle(locate(server.url), SETTINGS).loaded.make_scorer(make_probe(make_known_facts()[:1]))
    server.shutdown()
    server.server_close()
    # Open connections would outlive it.
    server.faults["/tokenize"] = ["cut"]
    with pytest.raises(CompressknowError, match=f"^{server.url} no longer answers.\nStart .* answers so far are kept"):
        Prompts(scorer)


def test_errors_of_certificates_and_proxies_are_named(
    serve: Callable[[str], ModelServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve("vllm")
    with pytest.raises(CompressknowError, match="has no certificate that can be trusted, or does not speak https"):
        _ = ModelHandle(locate(server.url.replace("http:", "https:")), SETTINGS).loaded
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(CompressknowError, match=f"The proxy for {server.url} fails"):
        _ = ModelHandle(locate(server.url), SETTINGS).loaded


def test_a_missing_server_is_an_error_before_the_original_is_evaluated(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    assert main(["report", str(checkpoint), "http://127.0.0.1:9", "--answers", str(kept)]) == 1
    assert capsys.readouterr().err.startswith("Error: There is no server at http://127.0.0.1:9.")
    assert not kept.exists()


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_missing_or_wrong_key_is_an_error_that_does_not_show_it(
    serve: Callable[[str], ModelServer],
    tmp_path: Path,
    key: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve("vllm")
    server.key = KEY
    if key:
        monkeypatch.setenv("COMPRESSKNOW_API_KEY", key + KEY)
    assert main(["probe", server.url, "-o", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().err
    assert "does not accept the key (HTTP 401)" in printed if key else "requires a key (HTTP 401)" in printed
    assert "Set COMPRESSKNOW_API_KEY" in printed
    assert KEY not in printed


@pytest.mark.parametrize("variable", ["COMPRESSKNOW_API_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_stored_nowhere(
    serve: Callable[[str], ModelServer],
    tmp_path: Path,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = serve("vllm")
    server.key = KEY
    monkeypatch.setenv("OPENAI_API_KEY", "sk-aKeyOfAnotherServer")
    # A variable that is set from a file may end with a line break.
    monkeypatch.setenv(variable, f"{KEY}\n")
    # The user's .netrc is for other programs.
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    facts, out = write_facts(tmp_path / "f.jsonl"), tmp_path / "out"
    arguments = ["probe", server.url, "-p", f"facts:{facts}", "-o", str(out), "--limit", "8"]
    assert main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    assert {headers["Authorization"] for _, headers in server.requests} == {f"Bearer {KEY}"}
    assert KEY not in printed.out + printed.err
    assert all(KEY.encode() not in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_the_record_names_the_server_which_is_not_evaluated_again(
    serve: Callable[[str], ModelServer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = serve("vllm"), tmp_path / "out"
    arguments = ["probe", server.url, "-p", f"facts:{write_facts(tmp_path / 'f.jsonl')}", "-o", str(out)]
    assert main(arguments) == 0
    assert f"Computed on {server.url} in " in capsys.readouterr().out
    record = json.loads((out / "probe.json").read_text())["model"]
    assert record["name"] == NAME
    assert record["device"] == server.url
    assert record["runtime"] == {
        **{"name": "server", "build": "vLLM 0.33.0", "url": server.url, "model": NAME},
        **{"scores": True, "distribution": True},
    }
    answers = read_answers(out)
    assert answers.record.model.ran_in == "vLLM 0.33.0"
    assert all(answer.correct for answer in answers.answers)
    requests = server.count("/tokenize")
    assert main(arguments) == 0
    # The server is detected, but no fact is evaluated.
    assert server.count("/tokenize") == requests + 4
    # Another model with the same address and name is refused.
    server.change = change_choice(lambda choice: choice.update(text=" something else"))
    assert main(arguments) == 1


def test_a_model_is_chosen_by_name(serve: Callable[[str], ModelServer]) -> None:
    server = serve("vllm")
    server.models = [NAME, "other"]
    with pytest.raises(UsageError, match=f"has several models: {NAME}, other") as several:
        _ = ModelHandle(locate(server.url), SETTINGS).loaded
    assert several.value.hint == "Choose one with --model NAME."
    server.models = list("abcdefghij")
    with pytest.raises(UsageError, match="has several models: a, b, c, d, e, f, g, h and 2 more"):
        _ = ModelHandle(locate(server.url), SETTINGS).loaded
    server.models = [NAME, "other"]
    with pytest.raises(UsageError, match="has no model 'known-fact'") as wrong:
        _ = ModelHandle(locate(server.url), Settings(model="known-fact")).loaded
    assert wrong.value.hint == f"Did you mean {NAME}? It has {NAME}, other."
    assert ModelHandle(locate(f"{server.url}/v1/"), Settings(model=NAME)).loaded.make_record()["model"] == NAME
    # Some servers answer with the name and a date.
    server.change = lambda answer: answer | {"model": f"{answer['model']}-2026-01-31"}
    # They are different models even if they write the same.
    hashes = {ModelHandle(locate(server.url), Settings(model=name)).sha256 for name in server.models}
    assert len(hashes) == 2
    server.models = []
    with pytest.raises(CompressknowError, match="does not say which models it has"):
        _ = ModelHandle(locate(server.url), SETTINGS).loaded
    # Nor does a server that does not know the path.
    for faults in ([], [404]):
        server.faults["/v1/models"] = faults
        assert ModelHandle(locate(server.url), Settings(model=NAME)).loaded.make_record()["model"] == NAME


def test_the_context_length_of_a_router_is_that_of_the_model(serve: Callable[[str], ModelServer]) -> None:
    """llama-server with several models reports a context of 0 tokens for itself."""
    server = serve("writes")
    bodies = [b'{"default_generation_settings": {"n_ctx": %d}}' % tokens for tokens in (0, 64)]
    server.faults = {"/props": bodies[:1], "/props?model=some%2Fmodel%3AQ8_0": bodies[::-1]}
    client = clients.Client(server.url, timeout=20.0)
    assert [detect_server(client, "some/model:Q8_0", {}).longest for _ in bodies] == [64, None]


@pytest.mark.parametrize("seconds", [1e10, math.inf])
def test_very_long_timeouts_are_accepted(serve: Callable[[str], ModelServer], seconds: float) -> None:
    assert clients.Client(serve("writes").url, timeout=seconds).request("/v1/models", dict)["data"]


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
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="number above 0"):
        Settings(**wrong)


def test_devices_and_dtypes_of_torch_are_accepted() -> None:
    named: Any = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    assert Settings(**named) == Settings(device="cpu", dtype="bfloat16")
    for wrong in (None, 3):
        with pytest.raises(UsageError, match="There is no device"):
            Settings(device=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://", "cannot be read"),
        ("http://host:port", "cannot be read"),
        ("http://me:secret@host:8080", "more than host, port and path"),
        ("https://host/v1?api_key=secret", "more than host, port and path"),
    ],
)
def test_addresses_that_are_invalid_or_contain_a_secret_are_refused(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        locate_server(address)
    assert "secret" not in str(raised.value)


@long
def test_a_report_of_a_checkpoint_and_the_same_model_on_a_server(
    serve: Callable[[str], ModelServer], checkpoint: Path, tmp_path: Path
) -> None:
    server = serve("vllm")
    facts, card = f"facts:{write_facts(tmp_path / 'f.jsonl')}", tmp_path / "card.json"
    options = ["-p", facts, "--answers", str(tmp_path / "answers"), "-o", str(card), "-o", str(tmp_path / "card.html")]
    assert main(["report", str(checkpoint), server.url, *options]) == 0
    (probe,) = json.loads(card.read_text())["compressed"][0]["probes"].values()
    # The server does not return all tokens that the original's distribution has.
    assert (probe["both"], probe["lost"], probe["kl_mean"]) == (64, 0, None)
    # The other way round, the original has 20 tokens per distribution.
    again = [*options, "--overwrite"]
    assert main(["report", server.url, str(checkpoint), *again]) == 0
    (probe,) = json.loads(card.read_text())["compressed"][0]["probes"].values()
    assert (probe["both"], probe["lost"]) == (64, 0)
    assert probe["kl_mean"] == pytest.approx(0, abs=1e-6)
    # Nothing is evaluated again.
    requests = server.count("/tokenize")
    assert main(["report", server.url, str(checkpoint), *again]) == 0
    assert server.count("/tokenize") <= requests + 8


def test_an_original_on_a_server_is_evaluated_once_with_early(
    serve: Callable[[str], ModelServer], checkpoint: Path, tmp_path: Path
) -> None:
    events: list[Progress] = []
    compressknow.report(
        serve("vllm").url,
        checkpoint,
        [f"facts:{write_facts(tmp_path / 'f.jsonl')}"],
        answers=tmp_path / "answers",
        fail_under=0.5,
        early=True,
        on_progress=events.append,
    )
    assert events
    assert not any(progress.stage.again for progress in events)


def test_speed_on_a_server_is_refused_before_any_work(
    serve: Callable[[str], ModelServer], checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve("vllm")
    for arguments in (["--time"], ["--time", "--fail-under", "0.5", "--early"]):
        assert main(["report", str(checkpoint), server.url, *arguments]) == 2
        assert f"{server.url} is a server" in capsys.readouterr().err
    assert server.requests == []


def test_generated_and_chosen_answers_are_not_compared(
    serve: Callable[[str], ModelServer], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-p", f"facts:{write_facts(tmp_path / 'f.jsonl')}", "--answers", str(tmp_path / "answers")]
    writes, other = serve("writes"), serve("writes")
    assert main(["report", str(checkpoint), writes.url, *arguments]) == 1
    assert "were not evaluated in the same way" in capsys.readouterr().err
    assert main(["report", writes.url, other.url, *arguments, "--json"]) == 0
    (probe,) = json.loads(capsys.readouterr().out)["compressed"][0]["probes"].values()
    assert (probe["both"], probe["kl_mean"]) == (64, None)


@pytest.mark.parametrize("verb", ["inspect", "convert", "sweep", "compare"])
def test_other_commands_refuse_an_address(
    serve: Callable[[str], ModelServer], tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve("vllm").url
    arguments = {"convert": ["out", "--prune", "0.2"], "sweep": ["-o", "out"], "compare": [url], "inspect": []}[verb]
    assert main([verb, url, *(str(tmp_path / word) if word == "out" else word for word in arguments)]) == 1
    printed = capsys.readouterr().err
    assert "server" in printed
    assert printed.count("Error") == 1
