"""Grades of knowing: those of a plain reference that takes one fact at a time and reads all of it for each token."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import compressknow
from compressknow.base.errors import CompressknowError, UsageError
from compressknow.engine.language_model import LanguageModel, load_language_model
from compressknow.evaluate.answers import Answer
from compressknow.evaluate.evaluate import add_examples, evaluate, make_prompts, put_after_example
from compressknow.evaluate.facts import BLANK, Fact, Probe
from compressknow.evaluate.grades import (
    DEMOTED,
    GONE,
    PRODUCED,
    RECOGNIZED,
    apply_reading,
    check_known,
    find_choice,
    grade_answer,
    judge,
)
from compressknow.evaluate.scoring.decoding import DecodingScorer
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.scorer import Encoder
from tests.evaluate.references import as_probe, causal, filled, known_facts, masked
from tests.evaluate.trained import word_piece
from tests.knowing import knowing
from tests.pages.answering import make_answer, make_answers

FAMILIES = {"bert": "masked", "llama": "causal", "t5": "seq2seq"}
PRUNED = 0.6


def bert_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, gold: str) -> str:
    """As many masks as the object has words, filled one by one."""
    words: list[str] = []
    for _ in gold.split():
        masks = ["[MASK]"] * (len(gold.split()) - len(words))
        ids = tokenizer(prompt.replace(BLANK, " ".join([*words, *masks])), return_tensors="pt").input_ids
        place = ids[0].tolist().index(tokenizer.mask_token_id)
        words.append(tokenizer.decode(model(ids).logits[0, place].argmax()))
    return " ".join(words)


def llama_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, gold: str) -> str:
    ids = tokenizer(prompt.partition(f" {BLANK}")[0], return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def t5_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, gold: str) -> str:
    ids = tokenizer(prompt.replace(BLANK, "<extra_id_0>"), return_tensors="pt").input_ids
    first, following = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    decoder = torch.tensor([[model.config.decoder_start_token_id, first]])
    for _ in range(4):
        token = model(input_ids=ids, decoder_input_ids=decoder).logits[:, -1:].argmax(-1)
        if int(token) in (following, tokenizer.eos_token_id):
            break
        decoder = torch.cat([decoder, token], dim=1)
    return tokenizer.decode(decoder[0, 2:], skip_special_tokens=True)


Text = Callable[[PreTrainedModel, PreTrainedTokenizerFast, str, str], str]
TEXTS: dict[str, Text] = {"bert": bert_text, "llama": llama_text, "t5": t5_text}
SCORES = {"bert": masked, "llama": causal, "t5": filled}


class Case(NamedTuple):
    """A model that knows, the same pruned, and what both answer."""

    family: str
    original: LanguageModel
    pruned: LanguageModel
    before: dict[str, Answer]
    after: dict[str, Answer]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    source = knowing(request.param, folder / "original")
    compressknow.convert(source, folder / "pruned", scope="overall", prune=PRUNED)
    original, pruned = (load_language_model(folder / name) for name in ("original", "pruned"))
    before, after = graded(original, ()), graded(pruned, ())
    after = graded(pruned, tuple(before.values()))
    return Case(request.param, original, pruned, before, after)


def graded(language: LanguageModel, original: tuple[Answer, ...], probe: Probe | None = None) -> dict[str, Answer]:
    probe = probe or as_probe(known_facts())
    scorer = make_scorer(language.model, language.tokenizer, language.family, probe)
    found = [answer for batch in evaluate(make_prompts(scorer, 24)) for answer in batch]
    return {answer.fact_id: answer for answer in add_examples(scorer, found, original)}


def begins(text: str, label: str) -> bool:
    return bool(re.match(rf"{re.escape(label)}(?!\w)", text.strip(), re.IGNORECASE))


@torch.no_grad()
def plain_grade(case: Case, fact: Fact, *, lost: bool) -> str:
    """The grade of the pruned model; `lost` says that the original knew the fact."""
    model, tokenizer = case.pruned.model, case.pruned.tokenizer
    says = begins(TEXTS[case.family](model, tokenizer, fact.prompt, fact.obj_label), fact.obj_label)
    assert fact.candidates is not None
    scores = {text: SCORES[case.family](model, tokenizer, fact, text) for text in fact.candidates}
    better = sum(score > scores[fact.obj_label] for score in scores.values())
    if not better:
        return PRODUCED if says else RECOGNIZED
    if says or better < 5:
        return DEMOTED
    shown = TEXTS[case.family](model, tokenizer, shown_prompt(fact), fact.obj_label)
    return DEMOTED if lost and begins(shown, fact.obj_label) else GONE


def shown_prompt(fact: Fact) -> str:
    """The prompt after the first fact of its relation that has another subject and object, solved."""
    others = [each for each in known_facts() if each.relation == fact.relation]
    other = next(each for each in others if each.obj_label != fact.obj_label and each.sub_label != fact.sub_label)
    return f"{other.prompt.replace(BLANK, other.obj_label)} {fact.prompt}"


def test_each_grade_is_that_of_a_plain_reference(case: Case) -> None:
    expected = {fact.id: plain_grade(case, fact, lost=case.before[fact.id].correct) for fact in known_facts()}
    assert {name: answer.grade for name, answer in case.after.items()} == expected
    # Pruned so far, a model has facts of several grades, else the test shows nothing.
    assert len(Counter(expected.values())) >= 3, Counter(expected.values())


def test_an_original_that_knows_all_produces_all(case: Case) -> None:
    assert {answer.grade for answer in case.before.values()} == {PRODUCED}
    assert all(answer.produced == answer.gold for answer in case.before.values())


@torch.no_grad()
def test_what_is_said_after_an_example_is_that_of_a_plain_reference(case: Case) -> None:
    lost = [fact for fact in known_facts() if not case.after[fact.id].correct]
    assert lost
    for fact in known_facts():
        told = case.after[fact.id].with_example
        if fact not in lost:
            assert told is None
            continue
        text = TEXTS[case.family](case.pruned.model, case.pruned.tokenizer, shown_prompt(fact), fact.obj_label)
        assert told is not None
        assert (told == fact.obj_label) == begins(text, fact.obj_label)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_grades_do_not_depend_on_the_batch(case: Case, batch_size: int) -> None:
    scorer = make_scorer(case.pruned.model, case.pruned.tokenizer, case.pruned.family, as_probe(known_facts()))
    for batch in evaluate(make_prompts(scorer, batch_size)):
        for found in batch:
            assert found.produced == case.after[found.fact_id].produced


def test_without_candidates_the_object_itself_is_what_is_said(case: Case) -> None:
    facts = known_facts(closed=False)
    if case.family == "bert":
        facts = tuple(fact for fact in facts if " " not in fact.obj_label)
    for found in graded(case.pruned, (), as_probe(facts, vocabulary="open")).values():
        assert found.correct == (found.grade == PRODUCED) == (found.produced == found.gold)
        # Whoever writes freely and is right has written it.
        assert found.grade != RECOGNIZED


def test_a_text_says_the_longest_candidate_with_which_it_begins() -> None:
    choices = ["New York", "New York City", "Paris"]
    assert find_choice("new york city, of course", choices) == "New York City"
    assert find_choice("New York Cityscape", choices) == "New York"
    assert find_choice(" Paris.", choices) == "Paris"
    assert find_choice("Parisian. food", choices) == "Parisian"
    assert find_choice("", choices) == ""
    assert find_choice("sao tome", ["São Tomé"], lambda text: text.translate(str.maketrans("ãé", "ae"))) == "São Tomé"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (' "blood".', "blood"),
        (" the South America continent", "South America"),
        (' a "Gambia"', "the Gambia"),
        (" **1969**, when", "1969"),
        (" an apple, or", "apple"),
    ],
)
def test_quotes_articles_and_punctuation_before_an_answer_are_no_part_of_it(text: str, label: str) -> None:
    assert find_choice(text, ["Paris", label]) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("北京。它位于", "北京"),
        ("北京是中国的首都", "北京"),
        ("「パリ」です", "パリ"),
        ("パリです", "パリ"),
        ("Parisです", "Paris"),
        ("1949年", "1949"),
        ("กรุงเทพมหานคร", "กรุงเทพ"),
    ],
)
def test_a_word_ends_without_a_space_where_its_script_has_none(text: str, label: str) -> None:
    assert find_choice(text, ["Paris", label]) == label
    assert judge(text, label)[1]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_letters_and_accents_may_be_apart(form: Literal["NFC", "NFD"]) -> None:
    label, text = (unicodedata.normalize(form, "São Tomé"), "São Tomé, an island")
    assert find_choice(text, ["Paris", label]) == label
    assert judge(text, label)[1]
    assert judge(unicodedata.normalize("NFD", text), label)[1]
    assert not judge(unicodedata.normalize(form, "Café"), "Cafe")[1]


def test_a_word_goes_on_where_its_script_shows_it() -> None:
    assert not judge("ローマンの", "ローマ")[1]
    assert not judge("Parisianの", "Paris")[1]
    assert find_choice("日本語です", ["日本", "日本語"]) == "日本語"


def test_a_sentence_ends_at_its_own_script_s_stop() -> None:
    assert judge("北京。它位于", "上海") == ("北京", False)
    assert judge("दिल्ली। यह", "मुंबई") == ("दिल्ली", False)


def test_what_opens_an_answer_is_told_from_the_answer() -> None:
    assert find_choice("A. Then", ["B", "A"]) == "A"
    assert find_choice("-5 degrees", ["5", "-5"]) == "-5"
    assert find_choice("5 degrees", ["-5"]) == "5 degrees"
    assert find_choice("another day", ["other day", "day"]) == "another day"
    # To the letter before one that only reads alike.
    assert find_choice("cat", ["a cat", "cat"]) == "cat"
    assert find_choice("a cat", ["cat", "a cat"]) == "a cat"


def test_a_greedy_text_goes_on_past_what_opens_it(tmp_path: Path) -> None:
    """Of one-token candidates, two tokens tell what a text says; an article before it takes one more."""
    language = load_language_model(knowing("llama", tmp_path / "model"))
    scorer = make_scorer(language.model, language.tokenizer, "causal", as_probe(known_facts()))
    assert isinstance(scorer, DecodingScorer)
    (query, *_) = (query for query in map(scorer.make_query, known_facts()) if not isinstance(query, str))
    room = max(map(len, query.options)) + 1
    article, other = (scorer.encoder.ids(text)[:1] for text in ("the", query.fact.sub_label))
    assert scorer.encoder.decode(article) == "the"
    assert scorer.needs_more(query, [*article, *other * (room - 1)])
    assert scorer.needs_more(query, [*article, *other * room])
    assert not scorer.needs_more(query, [*article, *other * (room + 1)])
    assert not scorer.needs_more(query, list(other * room))


def test_a_tokenizer_that_changes_a_text_says_it_all_the_same() -> None:
    """An uncased one without accents gives back another text than the label."""
    encoder = Encoder(word_piece(["São Tomé", "Guinea-Bissau"]))
    for label in ("São Tomé", "Guinea-Bissau"):
        text = encoder.decode(encoder.ids(label))
        assert find_choice(text, [label], encoder.spelled) == label


@pytest.mark.parametrize(
    ("changes", "grade"),
    [
        ({"produced": "Paris", "correct": True}, PRODUCED),
        # What is said, though another candidate is likelier as a whole, is not known: near, however few there are.
        ({"produced": "Paris", "correct": False, "rank": 2}, DEMOTED),
        ({"produced": "Paris", "correct": False, "rank": 6}, DEMOTED),
        ({"produced": "Paris", "correct": False, "rank": 2, "choices": 2}, DEMOTED),
        ({"produced": "the city", "correct": True, "rank": 1}, RECOGNIZED),
        ({"produced": None, "correct": True, "rank": 1}, RECOGNIZED),
        ({"produced": "Rome", "correct": False, "rank": 5}, DEMOTED),
        ({"produced": "Rome", "correct": False, "rank": 6}, GONE),
        ({"produced": "Rome", "correct": False, "rank": 6, "with_example": "Paris"}, DEMOTED),
        ({"produced": "Rome", "correct": False, "rank": 6, "with_example": "Oslo"}, GONE),
        ({"produced": "Rome", "correct": False, "rank": None}, GONE),
        # Among five or fewer, being among the best five says nothing.
        ({"produced": "Rome", "correct": False, "rank": 2, "choices": 5}, GONE),
        ({"produced": "Rome", "correct": False, "rank": 2, "choices": 6}, DEMOTED),
        ({"produced": "Rome", "correct": False, "rank": 2, "choices": None}, DEMOTED),
    ],
)
def test_a_grade_follows_from_what_an_answer_holds(changes: dict[str, Any], grade: str) -> None:
    assert grade_answer(replace(make_answer(0, True), **changes)) == grade


def fact(
    number: int, subject: str, obj: str, prompt: str = "The capital of {} is [MASK].", relation: str = "r"
) -> Fact:
    return Fact(f"f{number}", "known", relation, "geography", subject, obj, prompt.format(subject), ("Paris", "Rome"))


def test_an_example_is_another_fact_of_the_relation_with_another_answer() -> None:
    facts = [fact(0, "France", "Paris"), fact(1, "Gaul", "Paris"), fact(2, "Italy", "Rome")]
    probe = as_probe(facts)
    shown = [put_after_example(each, probe) for each in facts]
    assert [each and each.prompt for each in shown] == [
        "The capital of Italy is Rome. The capital of France is [MASK].",
        "The capital of Italy is Rome. The capital of Gaul is [MASK].",
        "The capital of France is Paris. The capital of Italy is [MASK].",
    ]
    assert put_after_example(facts[0], as_probe(facts[:2])) is None


def test_an_example_is_of_all_facts_of_the_probe_not_of_its_sample() -> None:
    facts = [fact(n, f"Land {n}", ("Paris", "Rome")[n % 2], relation=f"r{n // 2}") for n in range(8)]
    sample = as_probe(facts).sample(4)
    assert len({each.relation for each in sample.facts}) == len(sample.facts) == 4
    assert all(put_after_example(each, sample) for each in sample.facts)


def test_an_example_that_ends_in_another_stop_gets_none() -> None:
    facts = [
        Fact(f"f{n}", "p", "r", "geography", country, city, f"{country}的首都是[MASK]。")
        for n, (country, city) in enumerate([("法国", "巴黎"), ("中国", "北京")])
    ]
    shown = put_after_example(facts[1], as_probe(facts))
    assert shown is not None
    assert shown.prompt == "法国的首都是巴黎。 中国的首都是[MASK]。"


def test_an_example_whose_sentence_is_open_is_closed() -> None:
    facts = [fact(0, "France", "Paris", "{}'s capital: [MASK]"), fact(1, "Italy", "Rome", "{}'s capital: [MASK]")]
    shown = put_after_example(facts[0], as_probe(facts))
    assert shown is not None
    assert shown.prompt == "Italy's capital: Rome. France's capital: [MASK]"


def test_known_as_produced_counts_what_is_said_alone() -> None:
    rows = [
        make_answer(0, True, produced="Paris", grade=PRODUCED),
        make_answer(1, True, produced="a city", grade=RECOGNIZED),
        make_answer(2, False, produced="Paris", grade=DEMOTED),
        make_answer(3, False, produced="Rome", grade=DEMOTED),
    ]
    told = apply_reading(make_answers(rows), "produced")
    assert [each.correct for each in told.answers] == [True, False, False, False]
    assert [each.predicted for each in told.answers] == ["Paris", "a city", "Rome", "Rome"]
    # What is said freely is not right by chance.
    assert {each.choices for each in told.answers} == {None}
    assert all(each.chance is None for each in told.record.probes.values())
    assert apply_reading(make_answers(rows), "recognized") == make_answers(rows)


def test_answers_that_do_not_tell_what_is_said_are_refused_in_one_message() -> None:
    with pytest.raises(CompressknowError, match="have no generated text") as caught:
        apply_reading(make_answers([make_answer(0, True)]), "produced")
    assert "--known produced" in str(caught.value.hint)


def test_an_unknown_reading_is_refused_with_what_there_is() -> None:
    with pytest.raises(UsageError, match="Did you mean produced"):
        check_known("produce")


def test_the_greedy_text_of_a_prompt_at_the_model_s_last_position_is_no_longer_than_that(tmp_path: Path) -> None:
    """A prompt and its candidates that just fit leave no room for a token more."""
    folder = knowing("llama", tmp_path / "model")
    language = load_language_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    facts = known_facts()[:2]
    room = len(tokenizer(facts[0].before).input_ids) + 2
    language.tokenizer.model_max_length = language.model.config.max_position_embeddings = room
    scorer = make_scorer(language.model, language.tokenizer, "causal", as_probe(facts))
    assert {answer.grade for batch in evaluate(make_prompts(scorer)) for answer in batch} <= {PRODUCED, RECOGNIZED}
