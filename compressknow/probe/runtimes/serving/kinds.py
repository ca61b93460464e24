"""What the kinds of servers tell of a model, and how they are asked for it.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, ClassVar

from compressknow.errors import CompressknowError
from compressknow.probe.answers import SERVER_TOKENS
from compressknow.probe.runtimes.serving.client import Client, Refused
from compressknow.probe.scoring.prompts import Ids

# Likeliest tokens that llama-server is asked for: most candidates begin with one of them.
LLAMA_TOKENS = 1024
# What makes a token the likeliest whatever the model thinks of it.
FORCE = 1e5
# Rounding may put a sure thing a little above 0.
ABOVE = 1e-3
# Characters of one token, and of all that is asked for at a time: no model writes more.
LONGEST_TOKEN, LONGEST_TEXT = 1_000, 100_000
TRIAL = "The capital of France is Paris"


@dataclass(frozen=True)
class First:
    """The distribution at the answer's first position, as far as the server tells it.

    Attributes
    ----------
    logp : token id -> log-probability, the likeliest first; `texts` of the same tokens.
    """

    logp: Mapping[int, float] = field(default_factory=dict)
    texts: Mapping[int, str] = field(default_factory=dict)
    whole: bool = False

    @property
    def bound(self) -> float:
        """What no other token exceeds."""
        return -math.inf if self.whole else min(self.logp.values(), default=0.0)


class Served(abc.ABC):
    """A model on a server.

    Attributes
    ----------
    name : of the kind of server.
    scores : whether it gives log-probabilities; without, it only writes.
    tokens : whether token ids are the model's own; else texts are told apart by character.
    """

    name: ClassVar[str]
    scores: ClassVar[bool] = True
    tokens: ClassVar[bool] = True

    def __init__(self, client: Client, model: str, about: Mapping[str, Any]) -> None:
        self.client, self.model, self.about = client, model, about
        self.encode = cache(self._encode)

    @property
    def build(self) -> str | None:
        """Which version of the server it is, where it says so."""
        return None

    @property
    def longest(self) -> int | None:
        """Tokens that it reads at most, where it says so."""
        return None

    @abc.abstractmethod
    def _encode(self, text: str, special: bool) -> Ids:
        """Token ids, with those that begin every text if `special`."""

    @abc.abstractmethod
    def first(self, prompt: Ids, wanted: Sequence[int] = ()) -> First:
        """What may follow the prompt: the likeliest tokens, and the `wanted` ones where they can be had."""

    @abc.abstractmethod
    def rest(self, prompt: Ids, ids: Ids, score: float = 0.0, bar: float = -math.inf) -> float:
        """`score` and the log-probabilities of `ids` after the prompt; of fewer where that falls below `bar`."""

    def write(self, prompt: Ids, tokens: int) -> str:
        """What the model writes greedily, of at most so many tokens."""
        asked = {"model": self.model, "prompt": self._said(prompt), "max_tokens": tokens, "temperature": 0}
        return _text(self._choice(self.client.post("/v1/completions", asked)), "text", self)

    def _logprobs(self, prompt: Ids, how: Mapping[str, Any]) -> Mapping[str, Any]:
        asked = {"model": self.model, "prompt": self._said(prompt), "max_tokens": 1, "temperature": 0}
        found = self._choice(self.client.post("/v1/completions", {**asked, **how})).get("logprobs")
        if not isinstance(found, dict):
            raise self.wrong("has no logprobs")
        return found

    def _said(self, prompt: Ids) -> Any:
        """A prompt as the server reads it."""
        return list(prompt)

    def _choice(self, answer: Any) -> Mapping[str, Any]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self.wrong("has no choices")
        if (model := answer.get("model")) is not None and not self._is(str(model)):
            raise self.wrong(f"comes from another model, {str(model)[:80]!r}")
        return choices[0]

    def _is(self, model: str) -> bool:
        # A date may follow the name.
        return model.startswith(self.model)

    def number(self, value: Any) -> float:
        """A log-probability. Raises CompressknowError where it is none: a server that lies is not believed."""
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or value > ABOVE:
            raise self.wrong(f"holds {str(value)[:40]}, which is no log-probability")
        return min(float(value), 0.0)

    def wrong(self, what: str) -> CompressknowError:
        """The error for an answer that cannot be one."""
        return CompressknowError(
            f"{self.client.url} gives answers that make no sense: one {what}.",
            why=f"It was taken for {self.name}.",
            hint="Update the server, or ask who runs it.",
        )


class LlamaServer(Served):
    """llama.cpp's server."""

    name = "llama-server"

    @property
    def build(self) -> str | None:
        return _known(self.about.get("build_info"))

    @property
    def longest(self) -> int | None:
        found = self.about.get("default_generation_settings")
        length = found.get("n_ctx") if isinstance(found, dict) else None
        return length if isinstance(length, int) else None

    def _encode(self, text: str, special: bool) -> Ids:
        asked = {"content": text, "add_special": special, "model": self.model}
        return _ids(self.client.post("/tokenize", asked), self)

    def first(self, prompt: Ids, wanted: Sequence[int] = ()) -> First:
        found = self._likeliest(prompt, LLAMA_TOKENS)
        if found.whole or all(number in found.logp for number in wanted):
            return found
        # A second request for all tokens: a second of work, and 5 MB, seldom needed.
        return self._likeliest(prompt, self._vocabulary)

    def rest(self, prompt: Ids, ids: Ids, score: float = 0.0, bar: float = -math.inf) -> float:
        for place, number in enumerate(ids):
            score += self._next((*prompt, *ids[:place]), number)
            if score < bar:
                break
        return score

    def _next(self, prompt: Ids, number: int) -> float:
        """Log-probability of one token."""
        step = self._step(prompt, number, 1)
        if step is None:
            return self._likeliest(prompt, self._vocabulary).logp.get(number, -math.inf)
        if step.get("id") != number:
            raise self.wrong(f"has token {step.get('id')!r} where {number} was forced")
        return self.number(step.get("logprob"))

    def _likeliest(self, prompt: Ids, count: int) -> First:
        # Whatever is written, of a token that is a whole text the server tells all.
        top = (self._step(prompt, self._whole_text, count) or {}).get("top_logprobs")
        if not isinstance(top, list) or not all(isinstance(each, dict) for each in top):
            raise self.wrong("has no top_logprobs")
        if len(top) < min(count, self._vocabulary):
            raise self.wrong(f"has {len(top):,} tokens where {count:,} were asked for")
        logp = {_token(each.get("id"), self): self.number(each.get("logprob")) for each in top}
        texts = {int(each["id"]): str(each.get("token", ""))[:LONGEST_TOKEN] for each in top}
        return First(logp, texts, whole=len(logp) >= self._vocabulary)

    def _step(self, prompt: Ids, forced: int, count: int) -> Mapping[str, Any] | None:
        """What is told of the next position, where the server writes the token `forced`: None where that token ends in
        the middle of a letter, of which the server tells nothing."""
        how = {"n_predict": 1, "n_probs": count, "logit_bias": [[forced, FORCE]], "temperature": 0}
        how["response_fields"] = ["completion_probabilities", "content"]
        answer = self.client.post("/completion", {"prompt": list(prompt), "model": self.model, **how})
        steps = answer.get("completion_probabilities") if isinstance(answer, dict) else None
        if steps is None and isinstance(answer, dict) and _is_cut(answer.get("content")):
            return None
        if not isinstance(steps, list) or len(steps) > 1 or not all(isinstance(step, dict) for step in steps):
            raise self.wrong("has no completion_probabilities of one token")
        return steps[0] if steps else None

    @cached_property
    def _whole_text(self) -> int:
        return next(iter(self.encode("a", False)), 0)

    @property
    def _vocabulary(self) -> int:
        count = self.about.get("n_vocab")
        return count if isinstance(count, int) and count > 0 else 1 << 20


class Vllm(Served):
    """vLLM: prompts and options are token ids."""

    name = "vLLM"

    @property
    def build(self) -> str | None:
        return _known(self.about.get("version"))

    @property
    def longest(self) -> int | None:
        length = self.about.get("max_model_len")
        return length if isinstance(length, int) else None

    def _encode(self, text: str, special: bool) -> Ids:
        asked = {"prompt": text, "add_special_tokens": special, "model": self.model}
        return _ids(self.client.post("/tokenize", asked), self)

    def first(self, prompt: Ids, wanted: Sequence[int] = ()) -> First:  # noqa: ARG002
        logprobs = self._logprobs(prompt, {"logprobs": SERVER_TOKENS, "return_tokens_as_token_ids": True})
        top = logprobs.get("top_logprobs")
        if not isinstance(top, list) or not top or not isinstance(top[0], dict):
            raise self.wrong("has no top_logprobs")
        found = {_token(name.removeprefix("token_id:"), self): self.number(value) for name, value in top[0].items()}
        return First(dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))))

    def rest(self, prompt: Ids, ids: Ids, score: float = 0.0, bar: float = -math.inf) -> float:  # noqa: ARG002
        read = self._logprobs((*prompt, *ids), {"logprobs": 1, "echo": True}).get("token_logprobs")
        end = len(prompt) + len(ids)
        if not isinstance(read, list) or len(read) < end:
            raise self.wrong("has too few token_logprobs")
        return score + sum(map(self.number, read[len(prompt) : end]))


class Echoing(Served):
    """Any server that echoes prompts with log-probabilities: its tokens begin where it says (``text_offset``).

    Prompts and options are texts, told apart by character.
    """

    name = "a server that echoes"
    tokens = False

    def _encode(self, text: str, special: bool) -> Ids:  # noqa: ARG002
        return tuple(map(ord, text))

    def _said(self, prompt: Ids) -> Any:
        return "".join(map(chr, prompt))

    def first(self, prompt: Ids, wanted: Sequence[int] = ()) -> First:  # noqa: ARG002
        """Nothing: its tokens have no ids."""
        return First()

    def rest(self, prompt: Ids, ids: Ids, score: float = 0.0, bar: float = -math.inf) -> float:  # noqa: ARG002
        found = self._logprobs((*prompt, *ids), {"logprobs": 1, "echo": True})
        lists = [found.get(key) for key in ("tokens", "token_logprobs", "text_offset")]
        tokens, values, offsets = (each if isinstance(each, list) else [] for each in lists)
        try:
            spans = _spans(self._said((*prompt, *ids)), tokens, offsets)
            pairs = list(zip(spans, values, strict=True))
        except (TypeError, ValueError, OverflowError):
            raise self.wrong("has a text_offset that fits no token") from None
        end = len(prompt) + len(ids)
        # A token that reaches over the beginning of the answer is counted with it.
        chosen = [value for (start, stop), value in pairs if len(prompt) < stop and start < end]
        if not chosen:
            raise self.wrong("has no token for the answer")
        return score + sum(map(self.number, chosen))


class Writing(Served):
    """A server that gives no log-probabilities."""

    name = "a server without log-probabilities"
    scores = False
    tokens = False

    def _encode(self, text: str, special: bool) -> Ids:  # noqa: ARG002
        return tuple(map(ord, text))

    def _said(self, prompt: Ids) -> Any:
        return "".join(map(chr, prompt))

    def first(self, prompt: Ids, wanted: Sequence[int] = ()) -> First:  # noqa: ARG002
        return First()

    def rest(self, prompt: Ids, ids: Ids, score: float = 0.0, bar: float = -math.inf) -> float:
        raise NotImplementedError


def _is_cut(text: Any) -> bool:
    """Whether a text ends in the middle of a letter, or has not begun one."""
    return isinstance(text, str) and (not text or text.endswith("\ufffd"))


def _spans(text: str, tokens: Any, offsets: Any) -> list[tuple[int, int]]:
    """Where in the text each token begins and ends. A token that begins every text, and is not in it, counts in the
    offsets of some servers.

    >>> _spans("a b", ["<s>", "a", " b"], [0, 3, 4])
    [(-3, 0), (0, 1), (1, 3)]
    """
    begins = [int(offset) - int(offsets[0]) for offset in offsets]
    ahead = begins[1] if len(begins) > 1 and not text.startswith(str(tokens[0])) else 0
    starts = [begin - ahead for begin in begins]
    return [(start, start + len(token)) for start, token in zip(starts, tokens, strict=True)]


def _ids(answer: Any, served: Served) -> Ids:
    found = answer.get("tokens") if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise served.wrong("has no tokens")
    return tuple(_token(each, served) for each in found)


def _token(value: Any, served: Served) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if not 0 <= number < 1 << 31:
        raise served.wrong(f"holds {str(value)[:40]!r} for a token")
    return number


def _text(choice: Mapping[str, Any], key: str, served: Served) -> str:
    text = choice.get(key)
    if not isinstance(text, str):
        raise served.wrong("has no text")
    if len(text) > LONGEST_TEXT:
        raise served.wrong(f"has a text of {len(text):,} characters for a few tokens")
    return text


def _known(build: Any) -> str | None:
    return build[:80] if isinstance(build, str) and build else None


def find_out(client: Client, model: str, listed: Mapping[str, Any]) -> Served:
    """Which kind of server it is, by what it tells of itself and, of one that tells nothing, one completion.

    Parameters
    ----------
    listed : what ``/v1/models`` says of the model.

    Raises CompressknowError where the server completes no text.
    """
    if "default_generation_settings" in (about := _asked(client, "/props")):
        meta = listed.get("meta")
        return LlamaServer(client, model, {**about, **(meta if isinstance(meta, dict) else {})})
    version = _asked(client, "/version")
    if "version" in version and listed.get("owned_by") == "vllm":
        return Vllm(client, model, {**listed, **version})
    return _tried(client, model)


def _tried(client: Client, model: str) -> Served:
    """By a completion: it echoes log-probabilities, or it writes."""
    asked = {"model": model, "prompt": TRIAL, "max_tokens": 1, "temperature": 0}
    echoing = Echoing(client, model, {})
    try:
        found = echoing._choice(client.post("/v1/completions", {**asked, "logprobs": 1, "echo": True})).get("logprobs")
        if isinstance(found, dict) and len(found.get("token_logprobs") or ()) > 2 and found.get("text_offset"):
            return echoing
    except Refused as refused:
        if refused.status not in (400, 422, 501):
            raise
    writing = Writing(client, model, {})
    writing.write(writing.encode(TRIAL, True), 1)
    return writing


def _asked(client: Client, path: str) -> Mapping[str, Any]:
    try:
        found = client.get(path)
    except Refused as refused:
        if refused.status in (401, 403):
            raise
        return {}
    return found if isinstance(found, dict) else {}
