"""Models on servers: facts are scored by requests to an API like OpenAI's completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar

import numpy as np

from compressknow.base.errors import CompressknowError, UnsupportedError, UsageError, suggest_word
from compressknow.base.format import clean
from compressknow.evaluate.answers import REFERENCE_TOKENS, Answer
from compressknow.evaluate.facts import Fact, Probe
from compressknow.evaluate.grades import add_grade, find_choice, judge, list_choices
from compressknow.evaluate.runtimes import Settings
from compressknow.evaluate.runtimes.client import Client, RequestRefused
from compressknow.evaluate.runtimes.kinds import FirstToken, ServedModel, detect_server
from compressknow.evaluate.scoring.families import CausalScorer
from compressknow.evaluate.scoring.ranking import TOP, Ranking, Scores, make_answer, make_choice, rank_candidates
from compressknow.evaluate.scoring.scorer import OPENING_TOKENS, SLACK_TOKENS, Ids, Query

T = TypeVar("T")


# Characters per token, a low estimate: if tokens are not known, it gives the length of a free answer.
CHARACTERS = 2


class ServerTokenizer:
    """Tokenizer of a server, with only the methods that prompts need."""

    eos_token_id = unk_token_id = None

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    def __call__(self, text: str, *, add_special_tokens: bool = False, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(self._served.encode(text, add_special_tokens))}

    @property
    def bos_token_id(self) -> int | None:
        """Return the token that begins every text, if there is one."""
        return next(iter(self._served.encode("", True)), None)


class ServedScorer(CausalScorer):
    """Scorer of a model on a server, with the prompts and candidates of any causal model. Without log-probabilities,
    the answer is the generated text, which is correct if it begins with the object."""

    def __init__(self, served: ServedModel, probe: Probe, parallel: int) -> None:
        super().__init__(None, ServerTokenizer(served), probe)
        if self.one_token:
            raise UnsupportedError(
                f"{probe.name} needs the probabilities of all words of a vocabulary, which servers do not return.",
                hint="Choose a probe with candidates or with free answers, such as atlas, bear or facts:FILE.jsonl.",
            )
        self._served, self._parallel = served, parallel
        # Every request asks for a further token.
        self._most = served.longest and served.longest - 1

    def make_query(self, fact: Fact) -> Query | str:
        """Return the query of any causal model; without candidates if the server only generates text."""
        if self._served.scores or not fact.candidates:
            return super().make_query(fact)
        if reason := self.find_obstacle(replace(fact, candidates=None)):
            return reason
        prompt = self.encode_prompt(fact)
        (gold,) = self.encode_options(fact, [fact.obj_label], rest=False)
        return Query(fact, prompt, (), gold, (), self.find_shape(fact, prompt))

    def split(self, batch: Sequence[Query]) -> Sequence[Sequence[Query]]:
        """Split the batch into single facts, so that each is counted and stored as soon as it is answered."""
        return [(query,) for query in batch]

    def run_each(
        self, work: Callable[[Sequence[Query]], T], batches: Iterable[Sequence[Query]]
    ) -> Iterator[tuple[Sequence[Query], T]]:
        """Send the requests of several batches concurrently; those of one batch are sent in sequence."""
        batches = list(batches)
        # Its threads are daemons, so interrupting the run does not wait for a server that hangs.
        with ThreadPool(max(1, min(self._parallel, len(batches)))) as pool:
            yield from pool.imap_unordered(lambda batch: (batch, work(batch)), batches)

    def answer(self, batch: Sequence[Query], reference: Sequence[Ids] | None, *_: Any, **__: Any) -> list[Answer]:
        """Answer the only query of a batch, without divergences: servers are too slow for all tokens."""
        (query,), wanted = batch, None if reference is None else [int(number) for number in reference[0]]
        text, first = self._write(query), self._served.predict(query.prompt, wanted or ())
        answer = self._choose(query, first) if query.options else self._judge(query, first, text)
        return [_add_first(add_grade(answer, query.fact, text), first, wanted)]

    def generate_answers(self, batch: Sequence[Query]) -> list[str]:
        return [find_choice(self._write(query), list_choices(query.fact)) for query in batch]

    def _write(self, query: Query) -> str:
        """Return a greedy continuation that is long enough to contain an answer."""
        tokens = max(map(len, query.options or (query.gold,)))
        slack = 1 + OPENING_TOKENS if query.options else SLACK_TOKENS
        count = slack + (tokens if self._served.tokens else math.ceil(tokens / CHARACTERS))
        # vLLM refuses requests for more tokens than there is room for.
        room = self._served.longest and self._served.longest - len(query.prompt)
        return self._served.write(query.prompt, min(count, room or count))

    def _choose(self, query: Query, first: FirstToken) -> Answer:
        """Rank the candidates. A candidate's bound is the log-probability of its first token if the server returned it,
        and otherwise the lowest one that it returned; exact scores are requested only where they matter. The sum over
        all candidates is left out, unless each is scored anyway because the server returned no tokens."""
        options = query.options
        heads = [first.logp.get(ids[0]) for ids in options]
        scores = np.array([first.bound if head is None else head for head in heads])
        finished = np.array([head is not None and len(ids) == 1 for head, ids in zip(heads, options, strict=True)])
        assert query.fact.candidates is not None
        ranking = Ranking(scores, finished, query.fact.candidates.index(query.fact.obj_label), summed=not first.logp)

        def finish(pairs: list[tuple[int, int]], bars: Scores) -> Scores:
            rows = zip(pairs, bars, strict=True)
            return np.array([self._score(query, options[option], first, bar) for (_, option), bar in rows])

        rank_candidates([ranking], finish)
        return make_choice(query.fact, ranking)

    def _score(self, query: Query, ids: Ids, first: FirstToken, bar: float) -> float:
        head = first.logp.get(ids[0])
        if head is None:
            return self._served.score_rest(query.prompt, ids, 0.0, bar)
        if len(ids) == 1 or head < bar:
            return head
        return self._served.score_rest((*query.prompt, ids[0]), ids[1:], head, bar)

    def _judge(self, query: Query, first: FirstToken, text: str) -> Answer:
        """Judge a free answer. If it is wrong, its rank is that of the object's first token, if the server returned
        that."""
        correct = find_choice(text, list_choices(query.fact)) == query.fact.obj_label
        text, _ = judge(text, query.fact.obj_label)
        best = list(first.logp)[:TOP]
        rank = next((n for n, number in enumerate(first.logp, 1) if number == query.gold[0]), None)
        rank = 1 if correct and best else rank
        logp = self._score(query, query.gold, first, -math.inf) if self._served.scores else None
        top = {text: [first.logp[number] for number in best[:1]]}
        for number in best[1:]:
            # vLLM returns no texts.
            if number in first.texts:
                top.setdefault(first.texts[number].strip(), [first.logp[number]])
        fields = {"correct": correct, "rank": rank, "logp_gold": logp}
        return make_answer(query.fact, tuple(top), chain.from_iterable(top.values()), choices=None, **fields)


def _add_first(answer: Answer, first: FirstToken, wanted: list[int] | None) -> Answer:
    """Add the distribution at the first position over the `wanted` tokens, or the most likely, if all are known."""
    ids = list(first.logp)[:REFERENCE_TOKENS] if wanted is None else wanted
    if not all(number in first.logp for number in ids):
        ids = []
    values = np.array([first.logp[number] for number in ids], dtype=np.float32)
    return replace(answer, first_ids=np.array(ids, dtype=np.int32), first_logp=values, first_kl=None)


# Maximum number of models that a message lists.
SHOWN = 8
# Form of a list of models.
MODELS = {"data": [{"id": str, "meta?": (dict, None), "owned_by?": (str, None), "max_model_len?": (int, None)}]}


def connect(url: str, settings: Settings) -> ServedModel:
    """Connect to a model on a server. Raises as `choose_model` and `detect_server` do."""
    client = Client(url, timeout=settings.timeout, parallel=settings.parallel)
    return detect_server(client, *choose_model(client, settings.model))


def choose_model(client: Client, named: str | None) -> tuple[str, Mapping[str, Any]]:
    """Return the model's name on the server, and its entry in ``/v1/models``. Raises UsageError if the server has
    several models and none is named, or has none of that name."""
    try:
        rows = client.request("/v1/models", MODELS)["data"]
    except RequestRefused as refused:
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
    names = ", ".join(clean(name, 60) for name in list(models)[:SHOWN])
    if len(models) > SHOWN:
        names += f" and {len(models) - SHOWN} more"
    if named is None:
        raise UsageError(f"{client.url} has several models: {names}.", hint="Choose one with --model NAME.")
    raise UsageError(f"{client.url} has no model {named!r}.", hint=f"{suggest_word(named, models)}It has {names}.")
