"""Kinds of servers: what they return about a model, and the requests for it.

- llama-server (llama.cpp, tools/server/README.md): ``/completion`` returns the ``n_probs`` most likely tokens, and the
  log-probability of the token that it generates. A ``logit_bias`` can force any token without changing the returned
  log-probabilities, which come from the model's own logits.
- vLLM (docs, "OpenAI-Compatible Server"), and others with ``echo``: ``/v1/completions`` returns the log-probability of
  each token of a prompt.
- all others: ``/v1/completions`` generates text.
"""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar
from urllib.parse import quote

from compressknow.base.errors import CompressknowError
from compressknow.evaluate.answers import SERVER_TOKENS
from compressknow.evaluate.runtimes.client import Client, RequestRefused
from compressknow.evaluate.scoring.scorer import Ids

# Most likely tokens to request from llama-server: most candidates begin with one of them.
LLAMA_TOKENS = 1024
# Logit bias that makes any token the most likely.
FORCE = 1e5
# Bounds of log-probabilities: rounding may exceed 0 a little, and llama-server returns float32's lowest for impossible.
LEAST, ABOVE = -3.5e38, 1e-3
TRIAL = "The capital of France is Paris"
# Letters of two bytes, which nearly every tokenizer has as one token, and a short token at the end.
ACCENTS = "café, thé, bébé, fée."
# Prompts to compare what is written with what is echoed, and the largest difference of the same log-probability, which
# rounding may cause.
PROMPTS, CLOSE = ("The capital of France is", "Once upon a", "One, two, three,"), 0.2
# Forms of responses, limited to the values that are used (`compressknow.base.reading.find_mismatch`).
_TOKENS = {"tokens": [int]}
_STEP = {"id": int, "logprob": float, "top_logprobs": [{"id": int, "logprob": float, "token": str}]}
_STEPS = {"completion_probabilities?": [_STEP], "content?": str}
_PROPS = {"default_generation_settings": {"n_ctx": int}, "build_info?": str}
_VERSION = {"version": str}
_ECHO = {"tokens": [str], "token_logprobs": [(float, None)], "text_offset": [int]}


@dataclass(frozen=True)
class FirstToken:
    """Distribution at the answer's first position, as far as the server returns it: log-probabilities by token id, the
    most likely first, texts of the same tokens, and whether these are the whole vocabulary."""

    logp: Mapping[int, float] = field(default_factory=dict)
    texts: Mapping[int, str] = field(default_factory=dict)
    whole: bool = False

    @property
    def bound(self) -> float:
        """Return an upper bound of the log-probabilities of all other tokens."""
        return min(self.logp.values(), default=0.0)


class ServedModel(abc.ABC):
    """Model on a server.

    Attributes
    ----------
    name : name of the kind of server.
    scores : whether it returns log-probabilities; otherwise it only generates text.
    greedy : options of a request for greedy text, without a penalty that the model or server may have by default.
    tokens : whether token ids are the model's; otherwise they are code points of characters.
    build : version of the server; None if it is not known.
    longest : maximum number of tokens in its context; None if it is not known.
    """

    name: ClassVar[str]
    scores: ClassVar[bool] = True
    greedy: ClassVar[Mapping[str, float]] = {"temperature": 0}
    tokens: ClassVar[bool] = True

    def __init__(
        self, client: Client, model: str, about: Mapping[str, Any], build: str | None = None, longest: int | None = None
    ) -> None:
        self.client, self.model, self.about = client, model, about
        self.build, self.longest = _replace_surrogates(build[:80]) if build else None, longest
        self.encode = cache(self._encode)

    @abc.abstractmethod
    def _encode(self, text: str, special: bool) -> Ids:
        """Return token ids, if `special` with those that begin every text."""

    @abc.abstractmethod
    def predict(self, prompt: Ids, wanted: Sequence[int]) -> FirstToken:
        """Return the most likely tokens after the prompt, and the `wanted` ones if the server can return them."""

    @abc.abstractmethod
    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:
        """Add the log-probabilities of `ids` after the prompt to `score`; may stop once that is below `bar`."""

    def write(self, prompt: Ids, tokens: int) -> str:
        """Return a greedy continuation of at most `tokens` tokens."""
        return _replace_surrogates(self.complete(prompt, {"text": str}, max_tokens=tokens)["text"])

    def complete(self, prompt: Ids, form: Mapping[str, Any], **options: Any) -> Mapping[str, Any]:
        """Return the completion of a prompt, checked for a form; `options` may override defaults, such as one token."""
        body = {"model": self.model, "prompt": self._make_prompt(prompt), **self.greedy, "max_tokens": 1, **options}
        response = self.client.request("/v1/completions", {"choices": [form], "model?": (str, None)}, body)
        if not response["choices"]:
            raise self.make_error("has no choices")
        # A date may follow the name.
        if not (model := response.get("model") or self.model).startswith(self.model):
            raise self.make_error(f"comes from another model, {model[:80]!r}")
        return dict(response["choices"][0])

    def _make_prompt(self, prompt: Ids) -> Any:
        return list(prompt)

    def _tokenize(self, **options: Any) -> Ids:
        body = {**options, "model": self.model}
        return tuple(map(self.check_token, self.client.request("/tokenize", _TOKENS, body)["tokens"]))

    def check_logp(self, value: float | None) -> float:
        """Return a log-probability, at most 0. Raise CompressknowError if the value cannot be one."""
        if value is None or not LEAST <= value <= ABOVE:
            raise self.make_error(f"has {value}, which is not a log-probability")
        return min(float(value), 0.0)

    def check_token(self, number: int) -> int:
        """Return a token id. Raise CompressknowError if the number cannot be one."""
        if not 0 <= number < 1 << 31:
            raise self.make_error(f"has {number} as a token id")
        return number

    def make_error(self, what: str) -> CompressknowError:
        """Return an error about an invalid response."""
        return CompressknowError(
            f"{self.client.url} returned an invalid response: it {what}.",
            why=f"The server was detected as {self.name}.",
            hint="Update the server, or ask its operator.",
        )


class LlamaServer(ServedModel):
    """llama.cpp's server."""

    name = "llama-server"
    greedy: ClassVar = {"temperature": 0, "repeat_penalty": 1.0}

    def _encode(self, text: str, special: bool) -> Ids:
        return self._tokenize(content=text, add_special=special)

    def predict(self, prompt: Ids, wanted: Sequence[int]) -> FirstToken:
        likeliest = self._find_likeliest(prompt, LLAMA_TOKENS)
        if likeliest.whole or all(number in likeliest.logp for number in wanted):
            return likeliest
        # Request all tokens, which takes a second and 5 MB, but is seldom needed.
        return self._find_likeliest(prompt, self._vocabulary)

    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:
        for position, number in enumerate(ids):
            context = (*prompt, *ids[:position])
            step = self._request_step(context, number, 1)
            if step is None:
                score += self._find_likeliest(context, self._vocabulary).logp.get(number, -math.inf)
            elif step["id"] != number:
                raise self.make_error(f"has token {step['id']} where {number} was forced")
            else:
                score += self.check_logp(step["logprob"])
            if score < bar:
                break
        return score

    def _find_likeliest(self, prompt: Ids, count: int) -> FirstToken:
        # Force a token that is complete text, as the server returns nothing for part of a character.
        step = self._request_step(prompt, next(iter(self.encode("a", False)), 0), count)
        top = step["top_logprobs"] if step else []
        if len(top) < min(count, self._vocabulary):
            raise self.make_error(f"has {len(top):,} tokens instead of {count:,}")
        logp = {self.check_token(each["id"]): self.check_logp(each["logprob"]) for each in top}
        texts = {each["id"]: _replace_surrogates(each["token"]) for each in top}
        return FirstToken(logp, texts, whole=len(logp) >= self._vocabulary)

    def _request_step(self, prompt: Ids, forced: int, count: int) -> Mapping[str, Any] | None:
        """Return the probabilities at the next position, where the server must generate the token `forced`; None if
        that token ends within a character, for which the server returns no probabilities."""
        options = {"n_predict": 1, "n_probs": count, "logit_bias": [[forced, FORCE]], "temperature": 0}
        options["response_fields"] = ["completion_probabilities", "content"]
        body = {"prompt": list(prompt), "model": self.model, **options}
        response = self.client.request("/completion", _STEPS, body)
        steps = response.get("completion_probabilities")
        content = response.get("content")
        if steps is None and content is not None and (not content or content.endswith("\ufffd")):
            return None
        if steps is None or len(steps) > 1:
            raise self.make_error("has no completion_probabilities of one token")
        return dict(steps[0]) if steps else None

    @property
    def _vocabulary(self) -> int:
        count = self.about.get("n_vocab")
        return count if isinstance(count, int) and count > 0 else 1 << 20


class Vllm(ServedModel):
    """vLLM, with prompts and options as token ids."""

    name = "vLLM"
    greedy: ClassVar = {"temperature": 0, "repetition_penalty": 1.0}

    def _encode(self, text: str, special: bool) -> Ids:
        return self._tokenize(prompt=text, add_special_tokens=special)

    def predict(self, prompt: Ids, wanted: Sequence[int]) -> FirstToken:  # noqa: ARG002
        form = {"logprobs": {"top_logprobs": [{str: float}]}}
        answer = self.complete(prompt, form, logprobs=SERVER_TOKENS, return_tokens_as_token_ids=True)
        if not (top := answer["logprobs"]["top_logprobs"]):
            raise self.make_error("has no top_logprobs")
        logp: dict[int, float] = {}
        for name, value in top[0].items():
            # ``token_id:17``
            digits = name.removeprefix("token_id:")
            if not re.fullmatch("[0-9]{1,10}", digits):
                raise self.make_error(f"has {name[:40]!r} as a token id")
            logp[self.check_token(int(digits))] = self.check_logp(value)
        return FirstToken(dict(sorted(logp.items(), key=lambda pair: (-pair[1], pair[0]))))

    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:  # noqa: ARG002
        form = {"logprobs": {"token_logprobs": [(float, None)]}}
        logprobs = self.complete((*prompt, *ids), form, logprobs=1, echo=True)["logprobs"]["token_logprobs"]
        end = len(prompt) + len(ids)
        if len(logprobs) < end:
            raise self.make_error("has too few token_logprobs")
        return score + sum(map(self.check_logp, logprobs[len(prompt) : end]))


class WritingServer(ServedModel):
    """Server that returns no log-probabilities. Prompts and options are texts, with characters as tokens."""

    name = "a server without log-probabilities"
    scores = False
    tokens = False

    def _encode(self, text: str, special: bool) -> Ids:  # noqa: ARG002
        return tuple(map(ord, text))

    def _make_prompt(self, prompt: Ids) -> Any:
        return "".join(map(chr, prompt))

    def predict(self, prompt: Ids, wanted: Sequence[int]) -> FirstToken:  # noqa: ARG002
        return FirstToken()

    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:
        raise NotImplementedError


class EchoingServer(WritingServer):
    """Any server that echoes prompts with log-probabilities, and with the positions of tokens (``text_offset``)."""

    name = "a server that echoes"
    scores = True

    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:  # noqa: ARG002
        end = len(prompt) + len(ids)
        # A token that spans the beginning of the answer counts as part of it.
        pairs = self._echo((*prompt, *ids))
        logprobs = [value for (start, stop), value in pairs if len(prompt) < stop and start < end]
        if not logprobs:
            raise self.make_error("has no token for the answer")
        return score + sum(map(self.check_logp, logprobs))

    def _echo(self, prompt: Ids) -> list[tuple[tuple[int, int], float | None]]:
        """Return where each token of a prompt begins and ends, and its log-probability."""
        echo = self.complete(prompt, {"logprobs": _ECHO}, logprobs=1, echo=True)["logprobs"]
        tokens, values, offsets = (echo[key] for key in _ECHO)
        if not len(tokens) == len(values) == len(offsets) > 0:
            raise self.make_error("has a text_offset that does not match its tokens")
        return list(zip(_find_spans(self._make_prompt(prompt), tokens, offsets), values, strict=True))

    def is_consistent(self) -> bool:
        """Return whether positions count characters, not bytes, and a token that the server writes has the same
        log-probability when it is echoed: llama-cpp-python may give it that of the position after it, some servers 0
        for every token."""
        echo = self._echo(self.encode(ACCENTS, True))
        (last, _), _ = echo[-1]
        if last > len(ACCENTS) or not any(value for _, value in echo):
            return False
        form = {"text": str, "logprobs?": ({"token_logprobs?": ([(float, None)], None)}, None)}
        for prompt in (self.encode(text, True) for text in PROMPTS):
            written = self.complete(prompt, form, logprobs=1)
            values = (written.get("logprobs") or {}).get("token_logprobs")
            if written["text"] and values and values[0] is not None:
                echoed = self.score_rest(prompt, self.encode(written["text"], False), 0.0, -math.inf)
                if abs(echoed - values[0]) < CLOSE:
                    return True
        return False


def _find_spans(text: str, tokens: Sequence[str], offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Return where in the text each token begins and ends. Some servers include a BOS token, which is not in the text,
    in their offsets.

    >>> _find_spans("a b", ["<s>", "a", " b"], [0, 3, 4])
    [(-3, 0), (0, 1), (1, 3)]
    >>> _find_spans("é.", ["bytes:\\xc3", "bytes:\\xa9", "."], [0, 0, 1])
    [(0, 1), (0, 1), (1, 2)]
    """
    begins = [offset - offsets[0] for offset in offsets]
    ahead = begins[1] if len(begins) > 1 and not text.startswith(tokens[0]) else 0
    starts = [begin - ahead for begin in begins]
    # A token ends where the next one begins, since servers spell out the bytes of a partial character.
    ends = [start + len(token) for start, token in zip(starts, tokens, strict=True)]
    later = [next((other for other in starts[index:] if other > start), None) for index, start in enumerate(starts)]
    return [(start, end if other is None else other) for start, end, other in zip(starts, ends, later, strict=True)]


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which may occur if a text is cut within a character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def detect_server(client: Client, model: str, listed: Mapping[str, Any]) -> ServedModel:
    """Detect the kind of server from what it says about itself, otherwise from a completion. `listed` is the model's
    entry in ``/v1/models``. Raises CompressknowError if the server does not answer."""
    # A router forwards this to the model's server; its own n_ctx is 0.
    if about := _request_about(client, f"/props?model={quote(model, safe='')}", _PROPS):
        longest = about["default_generation_settings"]["n_ctx"] or None
        listed = {**about, **(listed.get("meta") or {})}
        return LlamaServer(client, model, listed, build=about.get("build_info"), longest=longest)
    version = _request_about(client, "/version", _VERSION)
    if version and listed.get("owned_by") == "vllm":
        return Vllm(client, model, listed, build=version["version"], longest=listed.get("max_model_len"))
    echoing, writing = EchoingServer(client, model, {}), WritingServer(client, model, {})
    # The server may not support log-probabilities; one that does not echo may have numbers as tokens (mlx_lm).
    trial = writing.encode(TRIAL, True)
    form = {f"{key}?": (_ECHO[key], None) for key in ("token_logprobs", "text_offset")}
    try:
        logprobs = echoing.complete(trial, {"logprobs?": (form, None)}, logprobs=1, echo=True).get("logprobs") or {}
        # SGLang gives -1 for every position.
        has_positions = len(set(logprobs.get("text_offset") or ())) > 1
        if len(logprobs.get("token_logprobs") or ()) > 2 and has_positions and echoing.is_consistent():
            return echoing
    except RequestRefused as refused:
        if refused.status not in (400, 422, 501):
            raise
    return writing


def _request_about(client: Client, path: str, form: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a server says about itself at a path, checked for a form; {} if it does not."""
    try:
        return dict(client.request(path, form))
    except RequestRefused:
        # Some gateways forbid unknown paths. A missing key is an error of the next request.
        return {}
