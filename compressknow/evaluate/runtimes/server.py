"""Servers: each runs a model that it alone knows, behind an address; OpenAI's completions are its language."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CompressknowError, UsageError, did_you_mean
from compressknow.base.format import plain
from compressknow.base.libraries import require
from compressknow.base.reading import find_mismatch
from compressknow.evaluate.facts import Probe
from compressknow.evaluate.runtimes import Loaded, Runtime

if TYPE_CHECKING:
    from compressknow.engine.contents import Contents
    from compressknow.engine.identity import Located
    from compressknow.evaluate.runtimes import Settings
    from compressknow.evaluate.runtimes.client import Client
    from compressknow.evaluate.runtimes.kinds import Served
    from compressknow.evaluate.scoring.server import ServedScorer


# Part of the key of stored answers, and nothing else: facts are answered one by one.
BATCH_SIZE = 32
# What a model writes to these tells it from others behind the same name.
PROMPTS = ("The capital of France is", "Water boils at", "The author of Hamlet is", "1, 1, 2, 3, 5, 8,")
WRITTEN_TOKENS = 8
SHOWN, LONGEST_NAME = 8, 1_000
# The form of a list of models.
MODELS = {"data": [{"id": str, "meta?": (dict, None), "owned_by?": (str, None), "max_model_len?": (int, None)}]}


class Server(Runtime):
    """Registered as ``server``."""

    name = "server"
    help = "an OpenAI-compatible server: MODEL is http://HOST:PORT"
    whole_vocabulary = False

    def reads(self, located: Located) -> bool:
        return located.url is not None

    def resolve_settings(self, settings: Settings) -> Settings:
        """Return the settings; device, dtype and batches are the server's own business."""
        return replace(settings, batch_size=BATCH_SIZE)

    def where(self, located: Located, settings: Settings) -> str:  # noqa: ARG002
        return located.url or ""

    def contents(self, located: Located, settings: Settings) -> Contents:
        from compressknow.engine.contents import Contents

        return Contents(self.open(located, settings).sha256)

    def open(self, located: Located, settings: Settings) -> LoadedFromServer:
        """Find out which model it has, and what it tells of it.

        Raises CompressknowError where there is no server, it wants a key, or has no such model.
        """
        require("requests", "urllib3")
        from compressknow.evaluate.runtimes.client import Client
        from compressknow.evaluate.runtimes.kinds import detect_server

        assert located.url is not None
        client = Client(located.url, timeout=settings.timeout, parallel=settings.parallel)
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
        self.sha256 = self._hash()

    def make_scorer(self, probe: Probe) -> ServedScorer:
        from compressknow.evaluate.scoring.server import ServedScorer

        return ServedScorer(self._served, probe, self._parallel)

    @property
    def gives_scores(self) -> bool:  # type: ignore[override]
        """Return whether the server gives log-probabilities."""
        return self._served.scores

    def make_record(self) -> Mapping[str, Any]:
        """Return name and build, the address, the model's name there, and what the server tells of answers: ``scores``
        (log-probabilities of candidates) and ``distribution`` (of the first token).
        """
        served = self._served
        build = " ".join(filter(None, (served.name, served.build)))
        where = {"url": served.client.url, "model": served.model}
        return {"name": "server", "build": build, **where, "scores": served.scores, "distribution": served.tokens}

    def describe(self) -> Mapping[str, Any]:
        """Name, size and quantization, as far as the server tells them."""
        known = {"bytes": self._find_about("size", int), "dtype": self._type, "quantization": self._type}
        name = self._served.model.rpartition("/")[2] or self._served.model
        return {"name": plain(name, 80), **{key: value for key, value in known.items() if value is not None}}

    def release(self) -> None:
        """Close the connections."""
        self._served.client.close()

    @property
    def _type(self) -> str | None:
        """Return the type of most weights, as llama.cpp names it; where the file does not say so, it guesses and says
        that.
        """
        kind = self._find_about("ftype", str)
        return kind and str(kind).removeprefix("(guessed) ")

    def _find_about(self, key: str, kind: type) -> Any:
        value = self._served.about.get(key)
        return None if find_mismatch(value, kind) else value

    def _hash(self) -> str:
        """Hash, in place of files, which a server does not show: its address, the model's name, the build, the model's
        size there, and what it writes greedily to a few prompts.
        """
        served = self._served
        identity = [served.client.url, served.model, served.name, served.build]
        identity += [self._find_about(key, int) for key in ("n_params", "size")] + [self._type]
        identity += [served.write(served.encode(prompt, True), WRITTEN_TOKENS) for prompt in PROMPTS]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def choose_model(client: Client, named: str | None) -> tuple[str, Mapping[str, Any]]:
    """Return the model's name on the server, and what ``/v1/models`` says of it.

    Raises UsageError where the server has several and none is named, or has none of that name.
    """
    from compressknow.evaluate.runtimes.client import Refused

    try:
        rows = client.get("/v1/models", MODELS)["data"]
    except Refused as refused:
        if refused.status != 404:
            raise
        rows = []
    models = {row["id"]: row for row in rows if 0 < len(row["id"]) <= LONGEST_NAME}
    if named is None:
        return _choose_only(client, models)
    if named in models or not models:
        return named, models.get(named, {})
    near = did_you_mean(named, models)
    raise UsageError(
        f"{client.url} has no model {named!r}.", hint=f"{near}It has {_list_names(models)}." if models else None
    )


def _choose_only(client: Client, models: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    if len(models) == 1:
        return next(iter(models.items()))
    if not models:
        raise CompressknowError(
            f"{client.url} does not say which models it has.", hint="Give the model's name there with --model NAME."
        )
    raise UsageError(f"{client.url} has several models: {_list_names(models)}.", hint="Choose one with --model NAME.")


def _list_names(models: Mapping[str, Any]) -> str:
    shown = ", ".join(plain(name, 60) for name in list(models)[:SHOWN])
    return f"{shown} and {len(models) - SHOWN} more" if len(models) > SHOWN else shown
