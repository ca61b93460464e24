"""Model on a server that alone knows it, behind an address; OpenAI's completions are its language."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CompressknowError, UsageError, did_you_mean
from compressknow.base.format import plain
from compressknow.base.reading import find_mismatch
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.runtimes import Loaded, Settings
from compressknow.evaluate.runtimes.client import Client, Refused
from compressknow.evaluate.runtimes.kinds import Served, detect_server

if TYPE_CHECKING:
    from compressknow.evaluate.scoring.server import ServedScorer


# What a model writes to these tells it from others behind the same name.
PROMPTS = ("The capital of France is", "Water boils at", "The author of Hamlet is", "1, 1, 2, 3, 5, 8,")
WRITTEN_TOKENS = 8
# Models of a server that a message names.
SHOWN = 8
# The form of a list of models.
MODELS = {"data": [{"id": str, "meta?": (dict, None), "owned_by?": (str, None), "max_model_len?": (int, None)}]}


def connect(url: str, settings: Settings) -> LoadedFromServer:
    """Find out which model a server has, and what it tells of it. Raises what `Server.open` does."""
    client = Client(url, timeout=settings.timeout, parallel=settings.parallel)
    model, listed = choose_model(client, settings.model)
    return LoadedFromServer(detect_server(client, model, listed), settings.parallel)


class LoadedFromServer(Loaded):
    """Model on a server."""

    family = "causal"

    def __init__(self, served: Served, parallel: int) -> None:
        self._served, self._parallel = served, parallel
        self.architecture = served.name
        self.computed_in = self._type or "its own precision"
        self.parameters = self._find_about("n_params", int)
        self.gives_scores = served.scores
        # In place of files, which a server does not show: its address, the model's name, the build, the model's size
        # there, and what it writes greedily to a few prompts.
        identity = [served.client.url, served.model, served.name, served.build]
        identity += [self._find_about(key, int) for key in ("n_params", "size")] + [self._type]
        identity += [served.write(served.encode(prompt, True), WRITTEN_TOKENS) for prompt in PROMPTS]
        self.sha256 = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def make_scorer(self, probe: Probe) -> ServedScorer:
        from compressknow.evaluate.scoring.server import ServedScorer

        return ServedScorer(self._served, probe, self._parallel)

    def make_record(self) -> Mapping[str, Any]:
        """Return name and build, the address, the model's name there, and what the server tells of answers: ``scores``
        (log-probabilities of candidates) and ``distribution`` (of the first token).
        """
        served = self._served
        build = " ".join(filter(None, (served.name, served.build)))
        where = {"url": served.client.url, "model": served.model}
        return {"name": "server", "build": build, **where, "scores": served.scores, "distribution": served.tokens}

    def describe(self) -> Mapping[str, Any]:
        known = {"bytes": self._find_about("size", int), "dtype": self._type, "quantization": self._type}
        name = self._served.model.rpartition("/")[2] or self._served.model
        return {"name": plain(name, 80), **{key: value for key, value in known.items() if value is not None}}

    def release(self) -> None:
        """Close the connections."""
        self._served.client.close()

    @property
    def _type(self) -> str | None:
        """Return the type of most weights, as llama.cpp names it, or guesses where the file does not say so."""
        kind = self._find_about("ftype", str)
        return kind and str(kind).removeprefix("(guessed) ")

    def _find_about(self, key: str, kind: type) -> Any:
        value = self._served.about.get(key)
        return None if find_mismatch(value, kind) else value


def choose_model(client: Client, named: str | None) -> tuple[str, Mapping[str, Any]]:
    """Return the model's name on the server, and what ``/v1/models`` says of it.

    Raises UsageError where the server has several and none is named, or has none of that name.
    """
    try:
        rows = client.get("/v1/models", MODELS)["data"]
    except Refused as refused:
        if refused.status != 404:
            raise
        rows = []
    models = {row["id"]: row for row in rows if row["id"]}
    if named is None and len(models) == 1:
        return next(iter(models.items()))
    if named is not None and (named in models or not models):
        return named, models.get(named, {})
    if not models:
        raise CompressknowError(
            f"{client.url} does not say which models it has.", hint="Give the model's name there with --model NAME."
        )
    names = ", ".join(plain(name, 60) for name in list(models)[:SHOWN])
    if len(models) > SHOWN:
        names += f" and {len(models) - SHOWN} more"
    if named is None:
        raise UsageError(f"{client.url} has several models: {names}.", hint="Choose one with --model NAME.")
    raise UsageError(f"{client.url} has no model {named!r}.", hint=f"{did_you_mean(named, models)}It has {names}.")
