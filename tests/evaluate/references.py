"""Plain references for the scorers: one sentence at a time, by the whole model, without cache or hooks."""

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
from compressknow.evaluate.evaluate import Prompts, evaluate
from compressknow.evaluate.facts import BLANK, Fact, Probe
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.ranking import TAIL
from tests.knowing import KNOWN_FACTS, candidates
from tests.models import VOCABULARY

CLOSE = 1e-4
Model, FastTokenizer = PreTrainedModel, PreTrainedTokenizerFast


def evaluate_model(
    model: Model,
    tokenizer: FastTokenizer,
    family: str,
    probe: Probe,
    *,
    batch_size: int = 32,
    reference: Mapping[str, Any] | None = None,
) -> dict[str, Answer]:
    """Return the answers of the scorers by fact id."""
    prompts = Prompts(make_scorer(model, tokenizer, family, probe), batch_size)
    return {answer.fact_id: answer for answers in evaluate(prompts, reference=reference) for answer in answers}


def evaluate_lm(lm: LanguageModel, probe: Probe, **options: Any) -> dict[str, Answer]:
    """Return the answers of a model with its tokenizer by fact id; options are those of `evaluate_model`."""
    return evaluate_model(lm.model, lm.tokenizer, lm.family, probe, **options)


def encode_sentence(tokenizer: FastTokenizer, before: str, text: str, after: str) -> tuple[list[int], list[int]]:
    """Return the ids of a sentence with special tokens, and the positions of those of `text`."""
    text = text if before else text[:1].upper() + text[1:]
    whole = tokenizer(before + text + after, return_offsets_mapping=True)
    # A space before the text may be a token of its own.
    start, end = len(before.rstrip()), len(before) + len(text)
    spans = enumerate(whole["offset_mapping"])
    return whole["input_ids"], [position for position, (left, right) in spans if left < end and start < right]


def _find_end(tokenizer: FastTokenizer, ids: Sequence[int]) -> int:
    """Return where the tokens that close a text begin, if there are any."""
    closing = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next(end for end in range(len(ids), 0, -1) if ids[end - 1] not in closing)


def split_at_blank(fact: Fact) -> tuple[str, str]:
    before, _, after = fact.prompt.partition(BLANK)
    return before, after


def compute_log_probs(model: Model, ids: Sequence[int], **decoder: Any) -> torch.Tensor:
    """Return log-probabilities at each position (of the decoder, if any), [tokens, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **decoder).logits[0].double().log_softmax(-1)


def score_masked(model: Model, tokenizer: FastTokenizer, fact: Fact, text: str, rest: bool = False) -> float:
    """Score the answer's tokens from left to right, each with itself and the later ones masked."""
    before, after = split_at_blank(fact)
    ids, positions = encode_sentence(tokenizer, before, text, after)
    score = 0.0
    for number, position in enumerate(positions):
        hidden = [tokenizer.mask_token_id if at in positions[number:] else token for at, token in enumerate(ids)]
        score += float(compute_log_probs(model, hidden)[position, ids[position]])
    return score


def score_causal(model: Model, tokenizer: FastTokenizer, fact: Fact, text: str, rest: bool = False) -> float:
    """Score the answer's tokens (and those after it, if `rest`), each after all tokens before it."""
    before, after = split_at_blank(fact)
    ids, positions = encode_sentence(tokenizer, before, text, after if rest else "")
    ids = ids[: _find_end(tokenizer, ids)]
    if positions[0] == 0:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids, positions = [start, *ids], [position + 1 for position in positions]
    scored = range(positions[0], len(ids)) if rest else positions
    log_probs = compute_log_probs(model, ids)
    return sum(float(log_probs[position - 1, ids[position]]) for position in scored)


def score_t5(model: Model, tokenizer: FastTokenizer, fact: Fact, text: str, rest: bool = False) -> float:
    """Score the answer as T5's decoder fills the first sentinel (and closes with the next one, if `rest`)."""
    prompt = tokenizer(fact.prompt.replace(BLANK, "<extra_id_0>"))["input_ids"]
    ids, positions = encode_sentence(tokenizer, split_at_blank(fact)[0], text, "")
    first, following = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    answer = [ids[position] for position in positions] + ([following] if rest else [])
    decoder = [model.config.decoder_start_token_id, first, *answer]
    log_probs = compute_log_probs(model, prompt, decoder_input_ids=torch.tensor([decoder]))
    return sum(float(log_probs[position + 1, token]) for position, token in enumerate(answer))


def score_bart(model: Model, tokenizer: FastTokenizer, fact: Fact, text: str, rest: bool = False) -> float:
    """Score the answer (and the tokens after it, if `rest`) as BART's decoder writes the whole sentence."""
    before, after = split_at_blank(fact)
    prompt = tokenizer(fact.prompt.replace(BLANK, tokenizer.mask_token))["input_ids"]
    ids, positions = encode_sentence(tokenizer, before, text, after if rest else "")
    decoder = [model.config.decoder_start_token_id, *ids]
    log_probs = compute_log_probs(model, prompt, decoder_input_ids=torch.tensor([decoder]))
    scored = range(positions[0], _find_end(tokenizer, ids)) if rest else positions
    return sum(float(log_probs[position, ids[position]]) for position in scored)


def check_choices(
    answers: Mapping[str, Answer],
    facts: Iterable[Fact],
    score: Callable[[Fact, str], float],
) -> None:
    """Check that each answer follows from these scores of all candidates of its fact."""
    for fact in facts:
        assert fact.candidates is not None
        scores = np.array([score(fact, text) for text in fact.candidates])
        check_answer(answers[fact.id], fact, fact.candidates, scores, fact.candidates.index(fact.obj_label))


def check_answer(answer: Answer, fact: Fact, texts: Sequence[str], scores: Any, gold: int) -> None:
    """Check that an answer follows from the scores of all possible texts; equal scores keep their order."""
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
    """Check that two sets of answers are equal up to rounding."""
    assert left.keys() == right.keys()
    for fact_id, answer in left.items():
        other = right[fact_id]
        for name in ("predicted", "top5", "correct", "rank", "choices", "produced", "grade"):
            assert getattr(answer, name) == getattr(other, name), fact_id
        assert answer.logp_gold == pytest.approx(other.logp_gold, abs=1e-5)
        assert answer.total_logp == pytest.approx(other.total_logp, abs=1e-5)
        assert answer.top5_logp == pytest.approx(other.top5_logp, abs=1e-5)
        # Rounding decides which of the least likely tokens are stored.
        shared = {int(token): float(value) for token, value in zip(answer.first_ids, answer.first_logp, strict=True)}
        for token, value in zip(other.first_ids, other.first_logp, strict=True):
            assert shared.get(int(token), value) == pytest.approx(float(value), abs=1e-5)


def make_known_facts(*, closed: bool = True) -> tuple[Fact, ...]:
    """Make the facts that the models of tests.knowing know."""
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
    """Make a tokenizer with one token per word, as many as the models of tests.models have embeddings."""
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
    """Make facts of these words: the blank last, in the middle or first, and candidates of one to three words."""
    draw = random.Random(0)
    templates = ["w1 of {} is [MASK].", "w2 {} is [MASK] of w3.", "Who of {} of w4 is [MASK]."]
    templates += ["w5 w6 w7 {} is [MASK].", *["[MASK] is w8 of {}."] * first]
    facts = []
    for number, template in enumerate(templates):
        texts = [" ".join(draw.choices(WORDS[20:], k=number % 3 + 1)) for number in range(9)]
        # Two more candidates that begin with the first one.
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
