"""Kinds of servers: what they tell of a model, and how they are asked for it.

- llama-server (llama.cpp, tools/server/README.md): ``/completion`` gives the ``n_probs`` likeliest tokens, and the
  log-probability of the token that it writes. A ``logit_bias`` makes it write any token, and does not change what is
  told of it: log-probabilities are of the model's own logits.
- vLLM (docs, "OpenAI-Compatible Server"), and others that echo: ``/v1/completions`` with ``echo`` gives the
  log-probability of each token of a prompt.
- all others: ``/v1/completions`` writes text.
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

# Likeliest tokens that llama-server is asked for: most candidates begin with one of them.
LLAMA_TOKENS = 1024
# A bias that makes any token the likeliest.
FORCE = 1e5
# Rounding may give a certain token a little above 0; llama-server gives an impossible one float32's minimum.
LEAST, ABOVE = -3.5e38, 1e-3
TRIAL = "The capital of France is Paris"
# The parts of servers' answers that are read (`compressknow.base.reading.find_mismatch`).
_TOKENS = {"tokens": [int]}
_STEP = {"id": int, "logprob": float, "top_logprobs": [{"id": int, "logprob": float, "token": str}]}
_STEPS = {"completion_probabilities?": [_STEP], "content?": str}
_PROPS = {"default_generation_settings": {"n_ctx": int}, "build_info?": str}
_VERSION = {"version": str}
_ECHO = {"tokens": [str], "token_logprobs": [(float, None)], "text_offset": [int]}


@dataclass(frozen=True)
class FirstToken:
    """Distribution at the answer's first position, as far as the server tells it: log-probabilities by token id, the
    likeliest first, texts of the same tokens, and whether these are all that there are."""

    logp: Mapping[int, float] = field(default_factory=dict)
    texts: Mapping[int, str] = field(default_factory=dict)
    whole: bool = False

    @property
    def bound(self) -> float:
        """Return what no other token exceeds."""
        return -math.inf if self.whole else min(self.logp.values(), default=0.0)


class ServedModel(abc.ABC):
    """Model on a server.

    Attributes
    ----------
    name : of the kind of server.
    scores : whether it gives log-probabilities; without, it only writes.
    tokens : whether token ids are the model's own; else texts are told apart by character.
    build : its version, where it says so.
    longest : how many tokens it reads at most, where it says so.
    """

    name: ClassVar[str]
    scores: ClassVar[bool] = True
    tokens: ClassVar[bool] = True

    def __init__(
        self, client: Client, model: str, about: Mapping[str, Any], build: str | None = None, longest: int | None = None
    ) -> None:
        self.client, self.model, self.about = client, model, about
        self.build, self.longest = _mend(build[:80]) if build else None, longest
        self.encode = cache(self._encode)

    @abc.abstractmethod
    def _encode(self, text: str, special: bool) -> Ids:
        """Return token ids, with those that begin every text if `special`."""

    @abc.abstractmethod
    def predict(self, prompt: Ids, wanted: Sequence[int]) -> FirstToken:
        """Return what may follow the prompt: the likeliest tokens, and the `wanted` ones where they can be had."""

    @abc.abstractmethod
    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:
        """Add the log-probabilities of `ids` after the prompt to `score`; of fewer where that falls below `bar`."""

    def write(self, prompt: Ids, tokens: int) -> str:
        """Return what the model writes greedily, of at most so many tokens."""
        return _mend(self.complete(prompt, {"text": str}, max_tokens=tokens)["text"])

    def complete(self, prompt: Ids, form: Mapping[str, Any], **how: Any) -> Mapping[str, Any]:
        """Return the completion of a prompt, in that form; of one token, where `how` does not say otherwise."""
        body = {"model": self.model, "temperature": 0, "prompt": self._make_prompt(prompt), "max_tokens": 1, **how}
        answer = self.client.post("/v1/completions", body, {"choices": [form], "model?": (str, None)})
        if not answer["choices"]:
            raise self.make_error("has no choices")
        # A date may follow the name.
        if not (model := answer.get("model") or self.model).startswith(self.model):
            raise self.make_error(f"comes from another model, {model[:80]!r}")
        return dict(answer["choices"][0])

    def _make_prompt(self, prompt: Ids) -> Any:
        return list(prompt)

    def check_logp(self, value: float | None) -> float:
        """Check a log-probability. Raise CompressknowError if it is none: a server that lies is not believed."""
        if value is None or not LEAST <= value <= ABOVE:
            raise self.make_error(f"holds {value}, which is not a log-probability")
        return min(float(value), 0.0)

    def check_token(self, number: int) -> int:
        """Check the id of a token. Raise CompressknowError if it can be none."""
        if not 0 <= number < 1 << 31:
            raise self.make_error(f"holds {number} for a token")
        return number

    def make_error(self, what: str) -> CompressknowError:
        """Return the error for an answer that cannot be one."""
        return CompressknowError(
            f"{self.client.url} gives answers that make no sense: one {what}.",
            why=f"It was taken for {self.name}.",
            hint="Update the server, or ask who runs it.",
        )


class LlamaServer(ServedModel):
    """llama.cpp's server."""

    name = "llama-server"

    def _encode(self, text: str, special: bool) -> Ids:
        body = {"content": text, "add_special": special, "model": self.model}
        return tuple(map(self.check_token, self.client.post("/tokenize", body, _TOKENS)["tokens"]))

    def predict(self, prompt: Ids, wanted: Sequence[int]) -> FirstToken:
        found = self._find_likeliest(prompt, LLAMA_TOKENS)
        if found.whole or all(number in found.logp for number in wanted):
            return found
        # A second request for all tokens: a second of work, and 5 MB, seldom needed.
        return self._find_likeliest(prompt, self._vocabulary)

    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:
        for place, number in enumerate(ids):
            before = (*prompt, *ids[:place])
            step = self._request_step(before, number, 1)
            if step is None:
                score += self._find_likeliest(before, self._vocabulary).logp.get(number, -math.inf)
            elif step["id"] != number:
                raise self.make_error(f"has token {step['id']} where {number} was forced")
            else:
                score += self.check_logp(step["logprob"])
            if score < bar:
                break
        return score

    def _find_likeliest(self, prompt: Ids, count: int) -> FirstToken:
        # The written token does not matter; one that is a whole text makes the server report all.
        step = self._request_step(prompt, next(iter(self.encode("a", False)), 0), count)
        top = step["top_logprobs"] if step else []
        if len(top) < min(count, self._vocabulary):
            raise self.make_error(f"has {len(top):,} tokens where {count:,} were asked for")
        logp = {self.check_token(each["id"]): self.check_logp(each["logprob"]) for each in top}
        texts = {each["id"]: _mend(each["token"]) for each in top}
        return FirstToken(logp, texts, whole=len(logp) >= self._vocabulary)

    def _request_step(self, prompt: Ids, forced: int, count: int) -> Mapping[str, Any] | None:
        """Return what is told of the next position, where the server writes the token `forced`: None if that token
        ends in the middle of a letter, of which the server tells nothing."""
        how = {"n_predict": 1, "n_probs": count, "logit_bias": [[forced, FORCE]], "temperature": 0}
        how["response_fields"] = ["completion_probabilities", "content"]
        answer = self.client.post("/completion", {"prompt": list(prompt), "model": self.model, **how}, _STEPS)
        steps = answer.get("completion_probabilities")
        content = answer.get("content")
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
    """vLLM: prompts and options are token ids."""

    name = "vLLM"

    def _encode(self, text: str, special: bool) -> Ids:
        body = {"prompt": text, "add_special_tokens": special, "model": self.model}
        return tuple(map(self.check_token, self.client.post("/tokenize", body, _TOKENS)["tokens"]))

    def predict(self, prompt: Ids, wanted: Sequence[int]) -> FirstToken:  # noqa: ARG002
        form = {"logprobs": {"top_logprobs": [{str: float}]}}
        answer = self.complete(prompt, form, logprobs=SERVER_TOKENS, return_tokens_as_token_ids=True)
        if not (top := answer["logprobs"]["top_logprobs"]):
            raise self.make_error("has no top_logprobs")
        found: dict[int, float] = {}
        for name, value in top[0].items():
            # ``token_id:17``
            digits = name.removeprefix("token_id:")
            if not re.fullmatch("[0-9]{1,10}", digits):
                raise self.make_error(f"holds {name[:40]!r} for a token")
            found[self.check_token(int(digits))] = self.check_logp(value)
        return FirstToken(dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))))

    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:  # noqa: ARG002
        form = {"logprobs": {"token_logprobs": [(float, None)]}}
        read = self.complete((*prompt, *ids), form, logprobs=1, echo=True)["logprobs"]["token_logprobs"]
        end = len(prompt) + len(ids)
        if len(read) < end:
            raise self.make_error("has too few token_logprobs")
        return score + sum(map(self.check_logp, read[len(prompt) : end]))


class WritingServer(ServedModel):
    """Server that gives no log-probabilities. Prompts and options are texts, told apart by character."""

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
    """Any server that echoes prompts with log-probabilities: its tokens begin where it says (``text_offset``)."""

    name = "a server that echoes"
    scores = True

    def score_rest(self, prompt: Ids, ids: Ids, score: float, bar: float) -> float:  # noqa: ARG002
        found = self.complete((*prompt, *ids), {"logprobs": _ECHO}, logprobs=1, echo=True)["logprobs"]
        tokens, values, offsets = (found[key] for key in _ECHO)
        if not len(tokens) == len(values) == len(offsets) > 0:
            raise self.make_error("has a text_offset that fits no token")
        pairs = zip(_find_spans(self._make_prompt((*prompt, *ids)), tokens, offsets), values, strict=True)
        end = len(prompt) + len(ids)
        # A token that reaches over the beginning of the answer is counted with it.
        chosen = [value for (start, stop), value in pairs if len(prompt) < stop and start < end]
        if not chosen:
            raise self.make_error("has no token for the answer")
        return score + sum(map(self.check_logp, chosen))


def _find_spans(text: str, tokens: Sequence[str], offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Return where in the text each token begins and ends. A token that begins every text, and is not in it, counts in
    the offsets of some servers.

    >>> _find_spans("a b", ["<s>", "a", " b"], [0, 3, 4])
    [(-3, 0), (0, 1), (1, 3)]
    >>> _find_spans("é.", ["bytes:\\xc3", "bytes:\\xa9", "."], [0, 0, 1])
    [(0, 1), (0, 1), (1, 2)]
    """
    begins = [offset - offsets[0] for offset in offsets]
    ahead = begins[1] if len(begins) > 1 and not text.startswith(tokens[0]) else 0
    starts = [begin - ahead for begin in begins]
    # The start of the next character: servers spell out the bytes of a partial one.
    ends = [start + len(token) for start, token in zip(starts, tokens, strict=True)]
    later = [next((other for other in starts[place:] if other > start), None) for place, start in enumerate(starts)]
    return [(start, end if other is None else other) for start, end, other in zip(starts, ends, later, strict=True)]


def _mend(text: str) -> str:
    """Replace halves of surrogate pairs, as a model may write that is cut off in the middle of a letter."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def detect_server(client: Client, model: str, listed: Mapping[str, Any]) -> ServedModel:
    """Find out the kind of server, by what it tells of itself and, of one that tells nothing, one completion. `listed`
    is what ``/v1/models`` says of the model. Raises CompressknowError if the server completes no text."""
    # A router with several models passes it on; of itself it says 0.
    if about := _request_about(client, f"/props?model={quote(model, safe='')}", _PROPS):
        longest = about["default_generation_settings"]["n_ctx"] or None
        listed = {**about, **(listed.get("meta") or {})}
        return LlamaServer(client, model, listed, build=about.get("build_info"), longest=longest)
    version = _request_about(client, "/version", _VERSION)
    if version and listed.get("owned_by") == "vllm":
        return Vllm(client, model, listed, build=version["version"], longest=listed.get("max_model_len"))
    echoing, writing = EchoingServer(client, model, {}), WritingServer(client, model, {})
    # It may know nothing of log-probabilities.
    trial, form = writing.encode(TRIAL, True), {f"{key}?": (form, None) for key, form in _ECHO.items()}
    try:
        found = echoing.complete(trial, {"logprobs?": (form, None)}, logprobs=1, echo=True).get("logprobs") or {}
        if len(found.get("token_logprobs") or ()) > 2 and found.get("text_offset"):
            return echoing
    except RequestRefused as refused:
        if refused.status not in (400, 422, 501):
            raise
    writing.write(trial, 1)
    return writing


def _request_about(client: Client, path: str, form: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a server reports of itself in that form; empty if it reports nothing."""
    try:
        return dict(client.get(path, form))
    except RequestRefused as refused:
        if refused.status in (401, 403):
            raise
        return {}
