"""A local server that completes texts with a real model in OpenAI's protocol, like several kinds of servers, and
misbehaves on request.

- ``vllm``: token ids, ``/tokenize``, ``/version`` and echo, as vLLM documents them.
- ``echo``: texts and ``text_offset``; the first token of every text counts in the offsets, as in vLLM.
- ``writes``: only text.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAME = "known-facts"
LONGEST = 64


class ModelServer(ThreadingHTTPServer):
    """`faults` : by path, what the first requests get instead of an answer of the model: a status, (status, headers),
    the body of a status 400, ``hang``, ``cut``, ``break`` (in the middle of an answer), ``trickle``, ``ok`` (the
    model's answer), or bytes.

    `change` : changes each completion before it is sent.
    """

    daemon_threads = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.kind = model, tokenizer, kind
        self.faults: dict[str, list[Any]] = {}
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.models = [NAME]
        self.key: str | None = None
        # As in the model's generation settings, from which vLLM takes it where a request has none.
        self.penalty = 1.0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.lengths: list[int] = []
        self.most_parallel = self._now = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, path: str) -> int:
        return sum(requested == path for requested, _ in self.requests)

    @contextmanager
    def count_parallel(self) -> Iterator[None]:
        with self.lock:
            self._now += 1
            self.most_parallel = max(self.most_parallel, self._now)
        try:
            yield
        finally:
            with self.lock:
                self._now -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect."""


@contextmanager
def serve_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str) -> Iterator[ModelServer]:
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
        """Print nothing."""

    def do_GET(self) -> None:
        if self._misbehaves():
            return
        rows = [
            {"id": name, "object": "model", "owned_by": "vllm" if self.server.kind == "vllm" else "me"}
            for name in self.server.models
        ]
        if self.path == "/v1/models":
            self._answer({"object": "list", "data": [row | {"max_model_len": LONGEST} for row in rows]})
        elif self.path == "/version" and self.server.kind == "vllm":
            self._answer({"version": "0.33.0"})
        else:
            self._answer({"error": "Not Found"}, 404)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)))
        if self._misbehaves():
            return
        with self.server.count_parallel():
            if self.path == "/tokenize" and self.server.kind == "vllm":
                ids = self.server.tokenizer(request["prompt"], add_special_tokens=request["add_special_tokens"])
                self._answer({"count": len(ids.input_ids), "tokens": ids.input_ids})
            elif self.path == "/v1/completions":
                self._complete(request)
            else:
                self._answer({"error": "Not Found"}, 404)

    def _complete(self, request: dict[str, Any]) -> None:
        if request.get("echo") and self.server.kind == "writes":
            self._answer({"error": {"message": "echo is not supported"}}, 400)
            return
        if request.get("logprobs", 0) > 20:
            self._answer({"error": {"message": "logprobs must be at most 20"}}, 400)
            return
        if self.server.kind == "vllm" and len(request["prompt"]) + request["max_tokens"] > LONGEST:
            self._answer({"error": {"message": f"the maximum context length is {LONGEST} tokens"}}, 400)
            return
        self.server.lengths.append(request["max_tokens"])
        answer = {"model": request["model"], "object": "text_completion", "choices": [self._make_choice(request)]}
        changed = self.server.change(answer)
        self._send(changed if isinstance(changed, bytes) else json.dumps(changed).encode())

    def _make_choice(self, request: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.server.tokenizer
        prompt, penalty = request["prompt"], request.get("repetition_penalty", self.server.penalty)
        ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt)
        words = self._split_into_words(prompt) if isinstance(prompt, str) else []
        with torch.no_grad():
            tokens = list(ids)
            for _ in range(request["max_tokens"]):
                logits = self.server.model(torch.tensor([tokens])).logits[0, -1].double()
                penalized = logits[tokens]
                logits[tokens] = torch.where(penalized > 0, penalized / penalty, penalized * penalty)
                tokens.append(int(logits.argmax()))
            log_probs = self.server.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        text = tokenizer.decode(tokens[len(ids) :], skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "text": f" {text}", "finish_reason": "length"}
        if "logprobs" in request and self.server.kind != "writes":
            first = 0 if request.get("echo") else len(ids)
            words += [self._get_word(position, number) for position, number in enumerate(tokens)][len(words) :]
            choice["logprobs"] = self._make_logprobs(tokens, words, log_probs, first, request)
        return choice

    def _split_into_words(self, prompt: str) -> list[str]:
        """Return the text of each token, even if the model does not know it; the first one begins every text."""
        encoded = self.server.tokenizer(prompt, return_offsets_mapping=True)
        _, *ends = (end for _, end in encoded.offset_mapping)
        return [self._get_word(0, encoded.input_ids[0]), *(prompt[start:end] for start, end in pairwise([0, *ends]))]

    def _make_logprobs(
        self, ids: list[int], words: list[str], log_probs: torch.Tensor, first: int, request: dict[str, Any]
    ) -> dict[str, Any]:
        as_ids = request.get("return_tokens_as_token_ids")
        starts = [sum(map(len, words[:position])) for position in range(len(words))]
        values = [None, *(float(log_probs[position - 1, ids[position]]) for position in range(1, len(ids)))]
        tops: list[Any] = [None]
        for position in range(1, len(ids)):
            best = log_probs[position - 1].topk(request["logprobs"])
            names = (f"token_id:{number}" if as_ids else self._get_word(9, number) for number in best.indices.tolist())
            # In no order: JSON objects have none.
            tops.append(dict(sorted(zip(names, best.values.tolist(), strict=True))))
        return {
            "tokens": words[first:],
            "token_logprobs": values[first:],
            "top_logprobs": tops[first:],
            "text_offset": starts[first:],
        }

    def _get_word(self, position: int, number: int) -> str:
        word = str(self.server.tokenizer.convert_ids_to_tokens(number))
        return word if position < 2 or word == "." else f" {word}"

    def _misbehaves(self) -> bool:
        self.server.requests.append((self.path, dict(self.headers)))
        if self.server.key and self.headers["authorization"] != f"Bearer {self.server.key}":
            # Like a careless server, repeat the key in the message.
            self._answer({"error": {"message": f"Wrong key: {self.headers['authorization']}"}}, 401)
            return True
        faults = self.server.faults.get(self.path)
        if not faults:
            return False
        fault = faults[0] if len(faults) == 1 and faults[0] in ("hang", "trickle") else faults.pop(0)
        if fault == "ok":
            return False
        if fault == "hang":
            self.server.closing.wait(30)
        elif fault == "cut":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "break":
            self._send_head(200, 1000)
            self.wfile.write(b'{"choices"')
            self.close_connection = True
        elif fault == "trickle":
            self._send_head(200, 1000)
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
        elif isinstance(fault, bytes):
            self._send(fault)
        elif isinstance(fault, dict):
            self._answer(fault, 400)
        else:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self._answer({"error": {"message": "not now"}}, status, headers)
        return True

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        # As proxies do.
        packed = gzip.compress(body, 1)
        self._send_head(status, len(packed), {"Content-Encoding": "gzip", **(headers or {})})
        self.wfile.write(packed)

    def _send_head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
