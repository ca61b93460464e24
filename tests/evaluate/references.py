"""What the scorers must find, computed plainly: one sentence at a time, by the whole model, without cache or hooks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compressknow.engine.language_model import LanguageModel
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.evaluate import evaluate, make_prompts
from compressknow.evaluate.facts import BLANK, Fact, Probe
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.ranking import TAIL
from tests.knowing import KNOWN_FACTS, candidates
from tests.models import VOCABULARY

CLOSE = 1e-4
Model, FastTokenizer = PreTrainedModel, PreTrainedTokenizerFast
# Score of a text as the answer to a fact; whether what follows the blank is scored too.
Score = Callable[[Model, FastTokenizer, Fact, str, bool], float]


def evaluate_model(
    model: Model,
    tokenizer: FastTokenizer,
    family: str,
    probe: Probe,
    *,
    batch_size: int = 32,
    reference: Mapping[str, Any] | None = None,
) -> dict[str, Answer]:
    """Fact id -> answer, as the scorers give it."""
    prompts = make_prompts(make_scorer(model, tokenizer, family, probe), batch_size)
    return {answer.fact_id: answer for answers in evaluate(prompts, reference=reference) for answer in answers}


def evaluate_lm(lm: LanguageModel, probe: Probe, **options: Any) -> dict[str, Answer]:
    """Fact id -> answer, of a model with its tokenizer; options are those of `answers_to`."""
    return evaluate_model(lm.model, lm.tokenizer, lm.family, probe, **options)


def encode_sentence(tokenizer: FastTokenizer, before: str, text: str, after: str) -> tuple[list[int], list[int]]:
    """Ids of a sentence with the tokenizer's special tokens, and the places of those of `text` in it."""
    text = text if before else text[:1].upper() + text[1:]
    whole = tokenizer(before + text + after, return_offsets_mapping=True)
    # A space before the text may be a token of its own.
    start, end = len(before.rstrip()), len(before) + len(text)
    spans = enumerate(whole["offset_mapping"])
    return whole["input_ids"], [place for place, (left, right) in spans if left < end and start < right]


def _find_end(tokenizer: FastTokenizer, ids: Sequence[int]) -> int:
    """Where the tokens that close a text begin, if any do."""
    closing = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next(end for end in range(len(ids), 0, -1) if ids[end - 1] not in closing)


def split_at_blank(fact: Fact) -> tuple[str, str]:
    before, _, after = fact.prompt.partition(BLANK)
    return before, after


def compute_log_probs(model: Model, ids: Sequence[int], **decoder: Any) -> torch.Tensor:
    """Log-probabilities at each position (of the decoder, if any), [tokens, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **decoder).logits[0].double().log_softmax(-1)


def score_masked(model: Model, tokenizer: FastTokenizer, fact: Fact, text: str, rest: bool = False) -> float:
    """The answer's tokens from left to right, each with itself and the later ones masked."""
    ids, places = encode_sentence(tokenizer, *_fill(fact, text))
    score = 0.0
    for number, place in enumerate(places):
        hidden = [tokenizer.mask_token_id if at in places[number:] else token for at, token in enumerate(ids)]
        score += float(compute_log_probs(model, hidden)[place, ids[place]])
    return score


def score_causal(model: Model, tokenizer: FastTokenizer, fact: Fact, text: str, rest: bool = False) -> float:
    """The answer's tokens (and those after it, if `rest`), each after all that stands before it."""
    before, text, after = _fill(fact, text)
    ids, places = encode_sentence(tokenizer, before, text, after if rest else "")
    ids = ids[: _find_end(tokenizer, ids)]
    if places[0] == 0:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids, places = [start, *ids], [place + 1 for place in places]
    scored = range(places[0], len(ids)) if rest else places
    found = compute_log_probs(model, ids)
    return sum(float(found[place - 1, ids[place]]) for place in scored)


def score_t5(model: Model, tokenizer: FastTokenizer, fact: Fact, text: str, rest: bool = False) -> float:
    """T5's way: the decoder fills the first sentinel, and closes with the next one, if `rest`."""
    before, text, _ = _fill(fact, text)
    prompt = tokenizer(fact.prompt.replace(BLANK, "<extra_id_0>"))["input_ids"]
    ids, places = encode_sentence(tokenizer, before, text, "")
    first, following = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    answer = [ids[place] for place in places] + ([following] if rest else [])
    decoder = [model.config.decoder_start_token_id, first, *answer]
    found = compute_log_probs(model, prompt, decoder_input_ids=torch.tensor([decoder]))
    return sum(float(found[place + 1, token]) for place, token in enumerate(answer))


def score_bart(model: Model, tokenizer: FastTokenizer, fact: Fact, text: str, rest: bool = False) -> float:
    """BART's way: the decoder writes the whole sentence anew."""
    before, text, after = _fill(fact, text)
    prompt = tokenizer(fact.prompt.replace(BLANK, tokenizer.mask_token))["input_ids"]
    ids, places = encode_sentence(tokenizer, before, text, after if rest else "")
    decoder = [model.config.decoder_start_token_id, *ids]
    found = compute_log_probs(model, prompt, decoder_input_ids=torch.tensor([decoder]))
    scored = range(places[0], _find_end(tokenizer, ids)) if rest else places
    return sum(float(found[place, ids[place]]) for place in scored)


def check_choices(
    answers: Mapping[str, Answer],
    facts: Iterable[Fact],
    score: Callable[[Fact, str], float],
) -> None:
    """Each answer is what these scores of all the fact's candidates make it."""
    for fact in facts:
        assert fact.candidates is not None
        scores = np.array([score(fact, text) for text in fact.candidates])
        check_answer(answers[fact.id], fact, fact.candidates, scores, fact.candidates.index(fact.obj_label))


def check_answer(answer: Answer, fact: Fact, texts: Sequence[str], scores: Any, gold: int) -> None:
    """The answer is what the scores of all possible texts make it; equal ones are ranked in their own order."""
    order = np.argsort(-scores, kind="stable")
    assert answer.top5 == tuple(texts[index] for index in order[:5]), fact.id
    assert answer.top5_logp == pytest.approx(scores[order[:5]], abs=CLOSE), fact.id
    assert answer.predicted == answer.top5[0]
    assert answer.rank == list(order).index(gold) + 1, fact.id
    assert answer.correct == (answer.rank == 1)
    assert answer.logp_gold == pytest.approx(scores[gold], abs=CLOSE), fact.id
    assert answer.choices == len(texts)
    assert answer.total_logp == pytest.approx(np.logaddexp.reduce(scores), abs=2 * TAIL), fact.id


def check_same(left: Mapping[str, Answer], right: Mapping[str, Answer]) -> None:
    """Two sets of answers are alike, but for the last digits of their numbers."""
    assert left.keys() == right.keys()
    for fact_id, answer in left.items():
        other = right[fact_id]
        for name in ("predicted", "top5", "correct", "rank", "choices", "produced", "grade"):
            assert getattr(answer, name) == getattr(other, name), fact_id
        assert answer.logp_gold == pytest.approx(other.logp_gold, abs=1e-5)
        assert answer.total_logp == pytest.approx(other.total_logp, abs=1e-5)
        assert answer.top5_logp == pytest.approx(other.top5_logp, abs=1e-5)
        # Near the edge of what is kept, the last digits decide which token comes first.
        shared = {int(token): float(value) for token, value in zip(answer.first_ids, answer.first_logp, strict=True)}
        for token, value in zip(other.first_ids, other.first_logp, strict=True):
            assert shared.get(int(token), value) == pytest.approx(float(value), abs=1e-5)


def make_known_facts(*, closed: bool = True) -> tuple[Fact, ...]:
    """The facts that the models of tests.knowing know."""
    return tuple(
        Fact(
            id=f"{fact.relation}-{number}",
            probe="known",
            relation=fact.relation,
            subject="science",
            sub_label=fact.sub_label,
            obj_label=fact.obj_label,
            prompt=fact.sentence(BLANK),
            candidates=tuple(candidates(fact.relation)) if closed else None,
        )
        for number, fact in enumerate(KNOWN_FACTS)
    )


def make_probe(facts: Iterable[Fact], **settings: Any) -> Probe:
    return Probe("known", "test/1", tuple(facts), **settings)


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<extra_id_0>", "<extra_id_1>", ".", "of", "is", "Who"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]


def make_word_tokenizer(frame: str = "<s> $A </s>", *, sentinels: bool = False) -> FastTokenizer:
    """As many words as the models of tests.models have embeddings, a token each."""
    tokens = [*SPECIAL, *WORDS] if sentinels else [token.replace("extra_id", "other") for token in [*SPECIAL, *WORDS]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = BertPreTokenizer()
    named = [(token, vocabulary[token]) for token in frame.split() if token != "$A"]
    backend.post_processor = TemplateProcessing(single=frame, special_tokens=named)
    more = {"extra_special_tokens": ["<extra_id_0>", "<extra_id_1>"]} if sentinels else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True),
        **more,
    )


def make_word_facts(*, first: bool = True) -> tuple[Fact, ...]:
    """Facts of these words: the blank last, in the middle and first, candidates of one to three words."""
    draw = random.Random(0)
    templates = ["w1 of {} is [MASK].", "w2 {} is [MASK] of w3.", "Who of {} of w4 is [MASK]."]
    templates += ["w5 w6 w7 {} is [MASK].", *["[MASK] is w8 of {}."] * first]
    facts = []
    for number, template in enumerate(templates):
        texts = [" ".join(draw.choices(WORDS[20:], k=number % 3 + 1)) for number in range(9)]
        # One that another begins with, and two of the same beginning.
        texts = list(dict.fromkeys([*texts, f"{texts[0]} w9", f"{texts[0]} w10"]))
        facts.append(
            Fact(
                id=f"f{number}",
                probe="words",
                relation=f"r{number % 2}",
                subject="science",
                sub_label=WORDS[number + 10],
                obj_label=texts[2 * number % len(texts)],
                prompt=template.format(WORDS[number + 10]),
                candidates=tuple(texts),
            )
        )
    return tuple(facts)


def _fill(fact: Fact, text: str) -> tuple[str, str, str]:
    before, after = split_at_blank(fact)
    return before, text, after
