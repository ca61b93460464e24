"""A server on this machine that completes texts with a real model in OpenAI's protocol, as several kinds of servers do,
and misbehaves where it is told to.

- ``vllm``: token ids, ``/tokenize``, ``/version``, echo, as vLLM documents them.
- ``echo``: texts and ``text_offset``; a token that begins every text counts in the offsets, as vLLM has it.
- ``writes``: text alone.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "known-facts"


class ModelServer(ThreadingHTTPServer):
    """`faults` : by path a list of what comes first, one a request, before the model answers: a status, (status,
    headers), ``hang``, ``cut``, ``break`` (in the middle of an answer), ``trickle``, ``ok``, or bytes: the
    answer.

    `changed` : what becomes of each completion before it is sent.
    """

    daemon_threads = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.faults: dict[str, list[Any]] = {}
        self.changed: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.models = [NAME]
        self.key: str | None = None
        # As in the model's generation settings, from which vLLM takes it where a request has none.
        self.penalty = 1.0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.most_at_a_time = self._now = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.requests)

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self._now += 1
            self.most_at_a_time = max(self.most_at_a_time, self._now)
        try:
            yield
        finally:
            with self.lock:
                self._now -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go are not an error."""


@contextmanager
def serving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str) -> Iterator[ModelServer]:
    server = ModelServer(model, tokenizer, kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ModelServer
    disable_nagle_algorithm = True
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        if self._misbehaves():
            return
        rows = [
            {"id": name, "object": "model", "owned_by": "vllm" if self.server.kind == "vllm" else "me"}
            for name in self.server.models
        ]
        if self.path == "/v1/models":
            self._answer({"object": "list", "data": [row | {"max_model_len": 64} for row in rows]})
        elif self.path == "/version" and self.server.kind == "vllm":
            self._answer({"version": "0.33.0"})
        else:
            self._answer({"error": "Not Found"}, 404)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)))
        if self._misbehaves():
            return
        with self.server.counted():
            if self.path == "/tokenize" and self.server.kind == "vllm":
                ids = self.server.tokenizer(asked["prompt"], add_special_tokens=asked["add_special_tokens"])
                self._answer({"count": len(ids.input_ids), "tokens": ids.input_ids})
            elif self.path == "/v1/completions":
                self._complete(asked)
            else:
                self._answer({"error": "Not Found"}, 404)

    def _complete(self, asked: dict[str, Any]) -> None:
        if asked.get("echo") and self.server.kind == "writes":
            self._answer({"error": {"message": "echo is not supported"}}, 400)
            return
        if asked.get("logprobs", 0) > 20:
            self._answer({"error": {"message": "logprobs must be at most 20"}}, 400)
            return
        answer = {"model": asked["model"], "object": "text_completion", "choices": [self._choice(asked)]}
        changed = self.server.changed(answer)
        self._send(changed if isinstance(changed, bytes) else json.dumps(changed).encode())

    def _choice(self, asked: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.server.tokenizer
        prompt, penalty = asked["prompt"], asked.get("repetition_penalty", self.server.penalty)
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt)
        words = self._words_of(prompt) if isinstance(prompt, str) else []
        with torch.no_grad():
            written = list(ids)
            for _ in range(asked["max_tokens"]):
                logits = self.server.model(torch.tensor([written])).logits[0, -1].double()
                seen = logits[written]
                logits[written] = torch.where(seen > 0, seen / penalty, seen * penalty)
                written.append(int(logits.argmax()))
            log_probs = self.server.model(torch.tensor([written])).logits[0].double().log_softmax(-1)
        shown = tokenizer.decode(written[len(ids) :], skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "text": f" {shown}", "finish_reason": "length"}
        if "logprobs" in asked and self.server.kind != "writes":
            first = 0 if asked.get("echo") else len(ids)
            words += [self._word(place, number) for place, number in enumerate(written)][len(words) :]
            choice["logprobs"] = self._logprobs(written, words, log_probs, first, asked)
        return choice

    def _words_of(self, prompt: str) -> list[str]:
        """The text of each token, even where the model does not know it; the first one begins every text."""
        _, *ends = (end for _, end in self.server.tokenizer(prompt, return_offsets_mapping=True).offset_mapping)
        starts = [0, *ends]
        return [self._word(0, self.server.tokenizer(prompt).input_ids[0])] + [
            prompt[start:end] for start, end in zip(starts, ends, strict=False)
        ]

    def _logprobs(
        self, ids: list[int], words: list[str], log_probs: torch.Tensor, first: int, asked: dict[str, Any]
    ) -> dict[str, Any]:
        named = asked.get("return_tokens_as_token_ids")
        starts = [sum(map(len, words[:place])) for place in range(len(words))]
        values = [None, *(float(log_probs[place - 1, ids[place]]) for place in range(1, len(ids)))]
        tops: list[Any] = [None]
        for place in range(1, len(ids)):
            best = log_probs[place - 1].topk(asked["logprobs"])
            names = (f"token_id:{number}" if named else self._word(9, number) for number in best.indices.tolist())
            tops.append(dict(zip(names, best.values.tolist(), strict=True)))
        return {
            "tokens": words[first:],
            "token_logprobs": values[first:],
            "top_logprobs": tops[first:],
            "text_offset": starts[first:],
        }

    def _word(self, place: int, number: int) -> str:
        word = str(self.server.tokenizer.convert_ids_to_tokens(number))
        return word if place < 2 or word == "." else f" {word}"

    def _misbehaves(self) -> bool:
        self.server.requests.append((self.path, dict(self.headers)))
        if self.server.key and self.headers["authorization"] != f"Bearer {self.server.key}":
            # As a careless server might: what it was sent, in its message.
            self._answer({"error": {"message": f"Wrong key: {self.headers['authorization']}"}}, 401)
            return True
        left = self.server.faults.get(self.path)
        if not left:
            return False
        fault = left[0] if len(left) == 1 and left[0] in ("hang", "trickle") else left.pop(0)
        if fault == "ok":
            return False
        if fault == "hang":
            self.server.closing.wait(30)
        elif fault == "cut":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "break":
            self._head(200, 1000)
            self.wfile.write(b'{"choices"')
            self.close_connection = True
        elif fault == "trickle":
            self._head(200, 1000)
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
        elif isinstance(fault, bytes):
            self._send(fault)
        else:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._answer({"error": {"message": "not now"}}, status, headers)
        return True

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(body), headers)
        self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
