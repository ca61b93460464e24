"""Base class of the scorers of all model families."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from compressknow.base.errors import CompressknowError, UnsupportedError, is_out_of_memory
from compressknow.base.reading import group_by
from compressknow.engine.language_model import check_tokens, count_embedding_rows, count_positions
from compressknow.engine.load import find_reason
from compressknow.evaluate.answers import LOGP_FLOOR, REFERENCE_TOKENS, Answer
from compressknow.evaluate.facts import BLANK, Fact, Probe, capitalize
from compressknow.evaluate.grades import add_grade, find_choice, judge, list_choices
from compressknow.evaluate.scoring.ranking import (
    Ranking,
    Scores,
    find_best,
    find_rank,
    make_answer,
    make_choice,
    rank_candidates,
    sum_logs,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
Ids = tuple[int, ...]
# Takes ids of facts and log-probabilities over the whole vocabulary at the answer's first position, [batch,
# vocabulary]; returns the divergence of each from the original's, or None.
MeasureKl = Callable[[Sequence[str], torch.Tensor], Sequence[float | None]]

# Maximum rows of a forward pass that finishes candidates, which are short.
ROWS = 512
# Tokens of a free answer beyond the object's, which show whether the object is the whole answer.
SLACK_TOKENS = 4
# Tokens that may precede an answer: an article and a quote.
OPENING_TOKENS = 2

SEVERAL_TOKENS = "the object is several tokens of this model"
NOT_IN_VOCABULARY = "the object is no single word of the common vocabulary for this model"
NO_TOKENS = "an answer has no tokens in this model's vocabulary"
SAME_TOKENS = "the object and another candidate are the same tokens for this model"
UNKNOWN_TOKEN = "the object is the unknown token of this model's tokenizer"
UNKNOWN_TOKENS = "the object and another candidate are the unknown token of this model's tokenizer"
TOO_LONG = "the prompt is longer than this model reads"
NO_BEGINNING = "the blank begins the prompt, and this model has no token to begin a text with"
SECOND_BLANK = "the prompt contains the token that stands for the blank in this model"
BLANK_NOT_LAST = "the blank is not at the end of the prompt"


class Encoder:
    """Tokenizer with a cache, and with the ids of texts in context."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids = cache(self._tokenize)
        self.continuation = cache(self._tokenize_after)
        self.spelled = cache(self._respell)

    def _tokenize(self, text: str, special: bool = False) -> Ids:
        """Return ids of `text`, with the tokenizer's special tokens around it if `special`."""
        return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def begin(self, text: str) -> Ids:
        """Return ids of the beginning of a text: with the special tokens before it, without those at its end."""
        ids = self.ids(text, True)
        return ids[: len(ids) - self._closing]

    @cached_property
    def _closing(self) -> int:
        """Count the special tokens at the end of a text: an end, a separator (BERT, XLNet), a language (mBART)."""
        plain, whole = self.ids("a"), self.ids("a", True)
        ends = range(len(whole), len(plain) - 1, -1)
        return next((len(whole) - end for end in ends if whole[end - len(plain) : end] == plain), 0)

    def _tokenize_after(self, context: str, text: str) -> Ids:
        """Return ids of `text` after `context`; if a token spans the boundary, those after a bracket, since some
        tokenizers would put a space before the text alone."""
        for before in (context, "("):
            prefix, whole = self.ids(before), self.ids(before + text)
            if whole[: len(prefix)] == prefix and len(whole) > len(prefix):
                return whole[len(prefix) :]
        return self.ids(text)

    def answer(self, context: str, text: str, gap: str = " ") -> Ids:
        """Return ids of an answer in running text after `context` and `gap`; capitalized if there is no context."""
        if not context:
            return self.ids(capitalize(text))
        # The last word is enough, as no token is longer.
        return self.continuation(context.rpartition(" ")[2], gap + text)

    def _respell(self, text: str) -> str:
        """Return the text as the tokenizer spells it ("sao tome" for "são tomé" if uncased), unless that needs the
        unknown token."""
        ids = self.ids(text)
        return text if self.tokenizer.unk_token_id in ids else self.decode(ids)

    def decode(self, ids: Ids | list[int] | Any) -> str:
        """Return the text of `ids` without special tokens and surrounding spaces."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def find_single(self, words: tuple[str, ...]) -> dict[int, str]:
        """Map ids to those words that are one token in running text (the first word of each id)."""
        by_id: dict[int, str] = {}
        for word in words:
            ids = self.answer("is", word)
            if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                by_id.setdefault(ids[0], word)
        return by_id


@dataclass(frozen=True, slots=True)
class Query:
    """Fact as token ids of one model.

    Attributes
    ----------
    prompt : ids that the model reads first.
    options : ids of each candidate; empty if the fact has none.
    gold : ids of the object, or of its option if the fact has candidates.
    aliases : ids of single tokens that count as the object, for answers from a vocabulary.
    shape : queries of equal shape can run in a batch without padding.
    """

    fact: Fact
    prompt: Ids
    options: tuple[Ids, ...]
    gold: Ids
    aliases: tuple[int, ...]
    shape: tuple[int, ...]


class Scorer(ABC):
    """Scorer of one model on the facts of one probe."""

    family: ClassVar[str]
    # Cached properties that depend on the model's weights.
    by_weights: ClassVar[tuple[str, ...]] = ()
    _is_tested = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Probe) -> None:
        self.model, self.tokenizer, self.probe = model, tokenizer, probe
        self.encoder, self.architecture = Encoder(tokenizer), type(model).__name__
        # Whether facts without candidates are answered by one token.
        self.one_token = self.family == "masked" or probe.vocabulary in ("words", "full")

    def release(self) -> None:
        """Drop the model and what depends on its weights; `model` may then be set to one of the same architecture."""
        for name in ("model", *self.by_weights):
            self.__dict__.pop(name, None)

    # Methods of a family.

    @property
    def blank(self) -> str | None:
        """Return the text of the token that stands for the blank; None if prompts end there."""
        return None

    @abstractmethod
    def encode_prompt(self, fact: Fact) -> Ids:
        """Return the ids that the model reads first. Raise CompressknowError if a prompt cannot be used at all."""

    @abstractmethod
    def read_first(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        """Return log-probabilities at the answer's first position, [batch, vocabulary], and the state for `finish`."""

    @abstractmethod
    def bound_options(self, batch: Sequence[Query], log_probs: torch.Tensor) -> list[Scores]:
        """Return the log-probabilities of the first tokens of each query's options, [options]."""

    @abstractmethod
    def finish(self, state: Any, rows: Sequence[tuple[int, Ids]], scores: Scores, bars: Scores) -> Scores:
        """Return scores of whole options, [rows]: `scores` of the first tokens plus log-probabilities of all others. A
        row is (query, ids of an option), and need not be finished once its score is below its bar."""

    @abstractmethod
    def produce(self, batch: Sequence[Query], log_probs: torch.Tensor, state: Any) -> list[str]:
        """Return the model's greedy continuation of each query."""

    def find_obstacle(self, fact: Fact) -> str | None:
        """Return why this family cannot be evaluated on a fact, or None."""
        is_last = fact.before and not re.search(r"\w", fact.after)
        return None if fact.candidates or is_last else BLANK_NOT_LAST

    def encode_options(self, fact: Fact, texts: Sequence[str], *, rest: bool) -> tuple[Ids, ...]:
        """Return the ids to score for each of these answers; with those of the text after the blank if `rest`."""
        after = fact.after if rest else ""
        return tuple(self.encoder.answer(fact.before, text + after, fact.gap) for text in texts)

    def find_shape(self, fact: Fact, prompt: Ids) -> tuple[int, ...]:  # noqa: ARG002
        return (len(prompt),)

    # Methods of all families.

    def make_query(self, fact: Fact) -> Query | str:
        """Return the query of a fact, or the reason why it is dropped."""
        if reason := self.find_obstacle(fact):
            return reason
        if self.blank and self.blank.strip() in fact.prompt.replace(BLANK, ""):
            return SECOND_BLANK
        prompt = self.encode_prompt(fact)
        options: tuple[Ids, ...] = ()
        aliases: tuple[int, ...] = ()
        if fact.candidates:
            rest = self.probe.score_rest or bool(re.search(r"\w", fact.after))
            options = self.encode_options(fact, fact.candidates, rest=rest)
            if not rest and any(after[: len(ids)] == ids for ids, after in pairwise(sorted(set(options)))):
                # A candidate that begins another would always be more likely, so score a full stop too.
                closed = fact if fact.after.strip() else replace(fact, prompt=f"{fact.prompt}.")
                options = self.encode_options(closed, fact.candidates, rest=True)
            gold = options[fact.candidates.index(fact.obj_label)]
        elif self.one_token:
            aliases = self._find_aliases(fact)
            gold = aliases[:1]
            if not gold and not self.probe.keep_unanswerable:
                if self.probe.vocabulary == "words":
                    return NOT_IN_VOCABULARY
                ids = self.encoder.answer(fact.before, fact.obj_label, fact.gap)
                return UNKNOWN_TOKEN if ids == (self.tokenizer.unk_token_id,) else SEVERAL_TOKENS
        else:
            (gold,) = self.encode_options(fact, [fact.obj_label], rest=False)
        query = Query(fact, prompt, options, gold, aliases, self.find_shape(fact, prompt))
        return self._find_incompatibility(query) or query

    def split(self, batch: Sequence[Query]) -> Sequence[Sequence[Query]]:
        """Split a batch into those that are answered at a time."""
        return [batch]

    def run_each(
        self, work: Callable[[Sequence[Query]], T], batches: Iterable[Sequence[Query]]
    ) -> Iterator[tuple[Sequence[Query], T]]:
        """Yield each batch with the result of `work`."""
        return ((batch, work(batch)) for batch in batches)

    def answer(
        self,
        batch: Sequence[Query],
        reference: Sequence[Ids] | None,
        measure_kl: MeasureKl | None = None,
        known: Sequence[Answer] | None = None,
    ) -> list[Answer]:
        """Answer queries of one shape. At each answer's first position, store the log-probabilities of the ids in
        `reference`, by default this model's most likely, and the divergence that `measure_kl` returns. Answers of this
        model that are `known` get only these."""
        with torch.inference_mode():
            log_probs, state = self._begin(batch)
            if known is None:
                texts = self.produce(batch, log_probs, state)
                answers = {
                    **self._answer_closed(batch, log_probs, state),
                    **self._answer_by_word(batch, log_probs),
                    **self._answer_freely(batch, log_probs, state, texts),
                }
                facts = [query.fact for query in batch]
                known = [add_grade(answers[i], facts[i], text, self.encoder.spelled) for i, text in enumerate(texts)]
            return self._add_distributions(known, log_probs, reference, measure_kl)

    def generate_answers(self, batch: Sequence[Query]) -> list[str]:
        """Return the generated answers to queries of one shape: a choice, or the first sentence."""
        with torch.inference_mode():
            pairs = zip(batch, self.produce(batch, *self._begin(batch)), strict=True)
        return [find_choice(text, list_choices(query.fact), self.encoder.spelled) for query, text in pairs]

    def _begin(self, batch: Sequence[Query]) -> tuple[torch.Tensor, Any]:
        """Return what `read_first` does, after a test of the first two queries."""
        for query in batch:
            largest = max(chain(query.prompt, query.gold, *query.options), default=0)
            check_tokens(largest, self._rows, f"the fact {query.fact.id}")
        if not self._is_tested:
            try:
                self.read_first(batch[:2])
            except CompressknowError:
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise UnsupportedError(
                    f"{self.architecture} cannot be evaluated: it fails on the first prompts.",
                    why=find_reason(error),
                    hint="It may need an input besides the text, or a setting in its config.json.",
                ) from error
            self._is_tested = True
        return self.read_first(batch)

    def _add_distributions(
        self,
        answers: Sequence[Answer],
        log_probs: torch.Tensor,
        reference: Sequence[Ids] | None,
        measure_kl: MeasureKl | None,
    ) -> list[Answer]:
        if reference is not None:
            ids = torch.tensor(np.stack([np.asarray(ids) for ids in reference]), device=log_probs.device).long()
        else:
            ids = log_probs.topk(min(REFERENCE_TOKENS, log_probs.shape[1] - 1), dim=1).indices
        # With less padding than the original's, tokens may be missing, which are impossible then.
        missing = ids >= log_probs.shape[1]
        stored = log_probs.gather(1, ids.masked_fill(missing, 0)).masked_fill(missing, LOGP_FLOOR).float().cpu().numpy()
        fact_ids = [answer.fact_id for answer in answers]
        divergences = measure_kl(fact_ids, log_probs) if measure_kl else [None] * len(fact_ids)
        # NaN is stored too; such answers are wrong, and have no rank.
        rows = zip(answers, ids.cpu().numpy().astype(np.int32), stored, divergences, strict=True)
        return [
            replace(answer, first_ids=ids, first_logp=log_probs, first_kl=divergence)
            for answer, ids, log_probs, divergence in rows
        ]

    def _find_incompatibility(self, query: Query) -> str | None:
        """Return why the model cannot be evaluated on the ids of a query, or None."""
        is_free = not query.options and not self.one_token
        answers = query.options or (query.gold,)
        if (query.options or is_free) and not all(answers):
            return NO_TOKENS
        if query.options.count(query.gold) > 1:
            return UNKNOWN_TOKENS if self.tokenizer.unk_token_id in query.gold else SAME_TOKENS
        longest = max(query.shape) + max(map(len, answers)) + (SLACK_TOKENS if is_free else 0)
        return TOO_LONG if self._most is not None and longest > self._most else None

    @cached_property
    def _rows(self) -> int:
        return count_embedding_rows(self.model)

    @cached_property
    def _most(self) -> int | None:
        return count_positions(self.model, self.tokenizer)

    @cached_property
    def allowed(self) -> NDArray[np.int64] | None:
        """Return the ids of possible answers, ascending, [allowed]; None if all are possible."""
        return np.array(sorted(self.words), dtype=np.int64) if self.probe.vocabulary == "words" else None

    @cached_property
    def words(self) -> Mapping[int, str]:
        """Map ids to the words of the probe's vocabulary that are one token of this model."""
        return self.encoder.find_single(self.probe.words)

    @cached_property
    def _folded(self) -> dict[str, tuple[int, ...]]:
        """Map lower-cased texts to ids of the vocabulary (the paper compares lower-cased text)."""
        folded = group_by(range(len(self.tokenizer)), lambda number: self.encoder.decode([number]).lower())
        return {text: tuple(ids) for text, ids in folded.items()}

    def _find_aliases(self, fact: Fact) -> tuple[int, ...]:
        if self.probe.fold_case:
            ids = self._folded.get(fact.obj_label.lower(), ())
        else:
            # Words of a vocabulary have the ids that `find_single` gives them, wherever the blank is.
            before, gap = (fact.before, fact.gap) if self.allowed is None else ("is", " ")
            ids = self.encoder.answer(before, fact.obj_label, gap)
            ids = ids if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id else ()
        return ids if self.allowed is None else tuple(number for number in ids if number in self.words)

    def _answer_closed(self, batch: Sequence[Query], log_probs: torch.Tensor, state: Any) -> dict[int, Answer]:
        """Return answers to the queries with options, by index in the batch, as the next two methods do."""
        indices = [index for index, query in enumerate(batch) if query.options]
        bounds = self.bound_options([batch[index] for index in indices], log_probs[indices])
        rankings = [
            Ranking(first, np.array([len(ids) == 1 for ids in query.options]), query.options.index(query.gold))
            for query, first in zip([batch[index] for index in indices], bounds, strict=True)
        ]
        firsts = [ranking.scores.copy() for ranking in rankings]

        def finish(pairs: list[tuple[int, int]], bars: Scores) -> Scores:
            rows = [(indices[ranking], batch[indices[ranking]].options[candidate]) for ranking, candidate in pairs]
            first = np.array([firsts[ranking][candidate] for ranking, candidate in pairs])
            return self.finish(state, rows, first, bars)

        rank_candidates(rankings, finish)
        return {index: make_choice(batch[index].fact, each) for index, each in zip(indices, rankings, strict=True)}

    def _answer_by_word(self, batch: Sequence[Query], log_probs: torch.Tensor) -> dict[int, Answer]:
        indices = [index for index, query in enumerate(batch) if not query.options and self.one_token]
        scores, ids = log_probs[indices], np.arange(log_probs.shape[1])
        if self.allowed is not None:
            scores, ids = scores[:, self.allowed], self.allowed
        values = scores.double().cpu().numpy()
        return {i: self._make_word_answer(batch[i], row, ids) for i, row in zip(indices, values, strict=True)}

    def _make_word_answer(self, query: Query, scores: Scores, ids: Any) -> Answer:
        best = find_best(scores)
        words = tuple(self.encoder.decode([ids[index]]) for index in best)
        aliases = [int(index) for index in np.searchsorted(ids, query.aliases)]
        gold = max(aliases, key=lambda index: (scores[index], -index), default=None)
        rank, logp = (None, None) if gold is None else (find_rank(gold, scores), float(scores[gold]))
        fields = {"rank": rank, "logp_gold": logp, "choices": len(ids), "total_logp": sum_logs(scores)}
        return make_answer(query.fact, words, scores[best], correct=rank == 1, **fields)

    def _answer_freely(
        self, batch: Sequence[Query], log_probs: torch.Tensor, state: Any, texts: Sequence[str]
    ) -> dict[int, Answer]:
        indices = [index for index, query in enumerate(batch) if not query.options and not self.one_token]
        zeros = np.zeros(len(indices))
        after_first = self.finish(state, [(index, batch[index].gold) for index in indices], zeros, zeros - np.inf)
        answers = {}
        for index, logp in zip(indices, after_first, strict=True):
            query, scores = batch[index], log_probs[index].double().cpu().numpy()
            first = query.gold[0]
            rank = find_rank(first, scores)
            text, correct = judge(texts[index], query.fact.obj_label, self.encoder.spelled)
            # A text may begin with the object though its first token is another: of an article, another spelling, or
            # T5's sentinel once more.
            rank = 1 if correct and rank is not None else rank
            best = find_best(scores)
            # Likely first tokens, of which the text may itself be one, after T5's sentinel.
            top = {text: scores[best[0]]}
            for token in best[1:]:
                top.setdefault(self.encoder.decode([token]), scores[token])
            fields = {"correct": correct and rank is not None, "rank": rank, "logp_gold": float(scores[first] + logp)}
            answers[index] = make_answer(query.fact, tuple(top), top.values(), choices=None, **fields)
        return answers
