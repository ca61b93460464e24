"""Grades of facts, against a plain reference that takes one fact at a time and reads all of it for each token."""

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
from compressknow.evaluate.evaluate import Prompts, add_examples, evaluate, put_after_example
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
from tests.evaluate.references import make_known_facts, make_probe, score_causal, score_masked, score_t5
from tests.evaluate.trained import train_word_piece
from tests.knowing import save_trained
from tests.pages.answering import make_answer, make_answers

FAMILIES = {"bert": "masked", "llama": "causal", "t5": "seq2seq"}
PRUNED = 0.6


def write_with_bert(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, gold: str) -> str:
    """Fill as many masks as the object has words, one by one."""
    words: list[str] = []
    for _ in gold.split():
        masks = ["[MASK]"] * (len(gold.split()) - len(words))
        ids = tokenizer(prompt.replace(BLANK, " ".join([*words, *masks])), return_tensors="pt").input_ids
        place = ids[0].tolist().index(tokenizer.mask_token_id)
        words.append(tokenizer.decode(model(ids).logits[0, place].argmax()))
    return " ".join(words)


def write_with_llama(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, gold: str) -> str:
    ids = tokenizer(prompt.partition(f" {BLANK}")[0], return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def write_with_t5(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, gold: str) -> str:
    ids = tokenizer(prompt.replace(BLANK, "<extra_id_0>"), return_tensors="pt").input_ids
    first, following = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    decoder = torch.tensor([[model.config.decoder_start_token_id, first]])
    for _ in range(4):
        token = model(input_ids=ids, decoder_input_ids=decoder).logits[:, -1:].argmax(-1)
        if int(token) in (following, tokenizer.eos_token_id):
            break
        decoder = torch.cat([decoder, token], dim=1)
    return tokenizer.decode(decoder[0, 2:], skip_special_tokens=True)


Writer = Callable[[PreTrainedModel, PreTrainedTokenizerFast, str, str], str]
WRITERS: dict[str, Writer] = {"bert": write_with_bert, "llama": write_with_llama, "t5": write_with_t5}
SCORES = {"bert": score_masked, "llama": score_causal, "t5": score_t5}


class Case(NamedTuple):
    """A model that knows the facts, the same model pruned, and the answers of both."""

    family: str
    original: LanguageModel
    pruned: LanguageModel
    before: dict[str, Answer]
    after: dict[str, Answer]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    source = save_trained(request.param, folder / "original")
    compressknow.convert(source, folder / "pruned", scope="overall", prune=PRUNED)
    original, pruned = (load_language_model(folder / name) for name in ("original", "pruned"))
    before, after = evaluate_facts(original, ()), evaluate_facts(pruned, ())
    after = evaluate_facts(pruned, tuple(before.values()))
    return Case(request.param, original, pruned, before, after)


def evaluate_facts(lm: LanguageModel, original: tuple[Answer, ...], probe: Probe | None = None) -> dict[str, Answer]:
    probe = probe or make_probe(make_known_facts())
    scorer = make_scorer(lm.model, lm.tokenizer, lm.family, probe)
    answers = [answer for batch in evaluate(Prompts(scorer, 24)) for answer in batch]
    return {answer.fact_id: answer for answer in add_examples(scorer, answers, original)}


def begins_with(text: str, label: str) -> bool:
    return bool(re.match(rf"{re.escape(label)}(?!\w)", text.strip(), re.IGNORECASE))


@torch.no_grad()
def grade_plainly(case: Case, fact: Fact, *, lost: bool) -> str:
    """Return the grade of a fact for the pruned model; `lost` says that the original knew it."""
    model, tokenizer = case.pruned.model, case.pruned.tokenizer
    is_produced = begins_with(WRITERS[case.family](model, tokenizer, fact.prompt, fact.obj_label), fact.obj_label)
    assert fact.candidates is not None
    scores = {text: SCORES[case.family](model, tokenizer, fact, text) for text in fact.candidates}
    better = sum(score > scores[fact.obj_label] for score in scores.values())
    if not better:
        return PRODUCED if is_produced else RECOGNIZED
    if is_produced or better < 5:
        return DEMOTED
    generated = WRITERS[case.family](model, tokenizer, add_example_plainly(fact), fact.obj_label)
    return DEMOTED if lost and begins_with(generated, fact.obj_label) else GONE


def add_example_plainly(fact: Fact) -> str:
    """Put the prompt after the first fact of its relation with another subject and object."""
    others = [each for each in make_known_facts() if each.relation == fact.relation]
    other = next(each for each in others if each.obj_label != fact.obj_label and each.sub_label != fact.sub_label)
    return f"{other.prompt.replace(BLANK, other.obj_label)} {fact.prompt}"


def test_each_grade_is_that_of_a_plain_reference(case: Case) -> None:
    expected = {fact.id: grade_plainly(case, fact, lost=case.before[fact.id].correct) for fact in make_known_facts()}
    assert {name: answer.grade for name, answer in case.after.items()} == expected
    # A model pruned this much has facts of several grades; otherwise the test would show nothing.
    assert len(Counter(expected.values())) >= 3, Counter(expected.values())


def test_an_original_that_knows_all_produces_all(case: Case) -> None:
    assert {answer.grade for answer in case.before.values()} == {PRODUCED}
    assert all(answer.produced == answer.gold for answer in case.before.values())


@torch.no_grad()
def test_each_answer_after_an_example_is_that_of_a_plain_reference(case: Case) -> None:
    lost = [fact for fact in make_known_facts() if not case.after[fact.id].correct]
    assert lost
    for fact in make_known_facts():
        with_example = case.after[fact.id].with_example
        if fact not in lost:
            assert with_example is None
            continue
        text = WRITERS[case.family](case.pruned.model, case.pruned.tokenizer, add_example_plainly(fact), fact.obj_label)
        assert with_example is not None
        assert (with_example == fact.obj_label) == begins_with(text, fact.obj_label)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_generated_texts_do_not_depend_on_the_batch(case: Case, batch_size: int) -> None:
    scorer = make_scorer(case.pruned.model, case.pruned.tokenizer, case.pruned.family, make_probe(make_known_facts()))
    for batch in evaluate(Prompts(scorer, batch_size)):
        for found in batch:
            assert found.produced == case.after[found.fact_id].produced


def test_without_candidates_known_facts_are_produced(case: Case) -> None:
    facts = make_known_facts(closed=False)
    if case.family == "bert":
        facts = tuple(fact for fact in facts if " " not in fact.obj_label)
    for found in evaluate_facts(case.pruned, (), make_probe(facts, vocabulary="open")).values():
        assert found.correct == (found.grade == PRODUCED) == (found.produced == found.gold)
        # A correct free answer was generated.
        assert found.grade != RECOGNIZED


def test_a_text_chooses_the_longest_candidate_that_it_begins_with() -> None:
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
def test_quotes_articles_and_punctuation_before_an_answer_are_ignored(text: str, label: str) -> None:
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
def test_accents_may_be_separate_characters(form: Literal["NFC", "NFD"]) -> None:
    label, text = (unicodedata.normalize(form, "São Tomé"), "São Tomé, an island")
    assert find_choice(text, ["Paris", label]) == label
    assert judge(text, label)[1]
    assert judge(unicodedata.normalize("NFD", text), label)[1]
    assert not judge(unicodedata.normalize(form, "Café"), "Cafe")[1]


def test_a_word_goes_on_in_letters_of_its_script() -> None:
    assert not judge("ローマンの", "ローマ")[1]
    assert not judge("Parisianの", "Paris")[1]
    assert find_choice("日本語です", ["日本", "日本語"]) == "日本語"


def test_a_sentence_ends_at_the_full_stop_of_its_script() -> None:
    assert judge("北京。它位于", "上海") == ("北京", False)
    assert judge("दिल्ली। यह", "मुंबई") == ("दिल्ली", False)


def test_articles_and_signs_can_belong_to_an_answer() -> None:
    assert find_choice("A. Then", ["B", "A"]) == "A"
    assert find_choice("-5 degrees", ["5", "-5"]) == "-5"
    assert find_choice("5 degrees", ["-5"]) == "5 degrees"
    assert find_choice("another day", ["other day", "day"]) == "another day"
    # An exact match comes before one without the article.
    assert find_choice("cat", ["a cat", "cat"]) == "cat"
    assert find_choice("a cat", ["cat", "a cat"]) == "a cat"


def test_a_greedy_text_is_one_token_longer_after_an_article(tmp_path: Path) -> None:
    """Two tokens show whether a text is a candidate of one token; an article before it takes one more."""
    lm = load_language_model(save_trained("llama", tmp_path / "model"))
    scorer = make_scorer(lm.model, lm.tokenizer, "causal", make_probe(make_known_facts()))
    assert isinstance(scorer, DecodingScorer)
    (query, *_) = (query for query in map(scorer.make_query, make_known_facts()) if not isinstance(query, str))
    room = max(map(len, query.options)) + 1
    article, other = (scorer.encoder.ids(text)[:1] for text in ("the", query.fact.sub_label))
    assert scorer.encoder.decode(article) == "the"
    assert scorer.needs_more(query, [*article, *other * (room - 1)])
    assert scorer.needs_more(query, [*article, *other * room])
    assert not scorer.needs_more(query, [*article, *other * (room + 1)])
    assert not scorer.needs_more(query, list(other * room))


def test_labels_are_found_in_texts_that_the_tokenizer_changes() -> None:
    """An uncased tokenizer without accents decodes a text that differs from the label."""
    encoder = Encoder(train_word_piece(["São Tomé", "Guinea-Bissau"]))
    for label in ("São Tomé", "Guinea-Bissau"):
        text = encoder.decode(encoder.ids(label))
        assert find_choice(text, [label], encoder.spelled) == label


@pytest.mark.parametrize(
    ("changes", "grade"),
    [
        ({"produced": "Paris", "correct": True}, PRODUCED),
        # A generated object is not known if another candidate is likelier as a whole.
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
        # Among five or fewer candidates, all are among the best five.
        ({"produced": "Rome", "correct": False, "rank": 2, "choices": 5}, GONE),
        ({"produced": "Rome", "correct": False, "rank": 2, "choices": 6}, DEMOTED),
        ({"produced": "Rome", "correct": False, "rank": 2, "choices": None}, DEMOTED),
    ],
)
def test_grade_of_an_answer(changes: dict[str, Any], grade: str) -> None:
    assert grade_answer(replace(make_answer(0, True), **changes)) == grade


def make_fact(
    number: int, subject: str, obj: str, prompt: str = "The capital of {} is [MASK].", relation: str = "r"
) -> Fact:
    return Fact(f"f{number}", "known", relation, "geography", subject, obj, prompt.format(subject), ("Paris", "Rome"))


def test_an_example_is_another_fact_of_the_relation_with_another_answer() -> None:
    facts = [make_fact(0, "France", "Paris"), make_fact(1, "Gaul", "Paris"), make_fact(2, "Italy", "Rome")]
    # The same subject with another answer, and the same answer in another case.
    facts += [make_fact(3, "France", "Rome"), make_fact(4, "Lutetia", "PARIS"), make_fact(5, "Spain", "Madrid")]
    probe = make_probe(facts)
    shown = [put_after_example(each, probe) for each in facts]
    assert [each and each.prompt for each in shown] == [
        "The capital of Italy is Rome. The capital of France is [MASK].",
        "The capital of Italy is Rome. The capital of Gaul is [MASK].",
        "The capital of France is Paris. The capital of Italy is [MASK].",
        "The capital of Spain is Madrid. The capital of France is [MASK].",
        "The capital of Italy is Rome. The capital of Lutetia is [MASK].",
        "The capital of France is Paris. The capital of Spain is [MASK].",
    ]
    assert put_after_example(facts[0], make_probe(facts[:2])) is None


def test_an_example_may_be_outside_the_sample() -> None:
    facts = [make_fact(n, f"Land {n}", ("Paris", "Rome")[n % 2], relation=f"r{n // 2}") for n in range(8)]
    sample = make_probe(facts).sample(4)
    assert len({each.relation for each in sample.facts}) == len(sample.facts) == 4
    assert all(put_after_example(each, sample) for each in sample.facts)


def test_an_example_with_the_full_stop_of_its_script_gets_no_other() -> None:
    facts = [
        Fact(f"f{n}", "p", "r", "geography", country, city, f"{country}的首都是[MASK]。")
        for n, (country, city) in enumerate([("法国", "巴黎"), ("中国", "北京")])
    ]
    shown = put_after_example(facts[1], make_probe(facts))
    assert shown is not None
    assert shown.prompt == "法国的首都是巴黎。 中国的首都是[MASK]。"


def test_a_blank_is_no_example() -> None:
    facts = [make_fact(0, "France", "Paris"), make_fact(1, "BERT", "[MASK]")]
    assert put_after_example(facts[0], make_probe(facts)) is None


def test_an_example_without_a_full_stop_gets_one() -> None:
    prompt = "{}'s capital: [MASK]"
    facts = [make_fact(0, "France", "Paris", prompt), make_fact(1, "Italy", "Rome", prompt)]
    shown = put_after_example(facts[0], make_probe(facts))
    assert shown is not None
    assert shown.prompt == "Italy's capital: Rome. France's capital: [MASK]"


def test_known_as_produced_counts_only_generated_answers() -> None:
    rows = [
        make_answer(0, True, produced="Paris", grade=PRODUCED),
        make_answer(1, True, produced="a city", grade=RECOGNIZED),
        make_answer(2, False, produced="Paris", grade=DEMOTED),
        make_answer(3, False, produced="Rome", grade=DEMOTED),
    ]
    reading = apply_reading(make_answers(rows), "produced")
    assert [each.correct for each in reading.answers] == [True, False, False, False]
    assert [each.predicted for each in reading.answers] == ["Paris", "a city", "Rome", "Rome"]
    # A generated answer is not right by chance.
    assert {each.choices for each in reading.answers} == {None}
    assert all(each.chance is None for each in reading.record.probes.values())
    assert apply_reading(make_answers(rows), "recognized") == make_answers(rows)


def test_answers_without_generated_text_are_refused() -> None:
    with pytest.raises(CompressknowError, match="have no generated text") as caught:
        apply_reading(make_answers([make_answer(0, True)]), "produced")
    assert "--known produced" in str(caught.value.hint)


def test_an_unknown_reading_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean produced"):
        check_known("produce")


def test_a_greedy_text_ends_at_the_last_position_of_the_model(tmp_path: Path) -> None:
    """A prompt and its candidates that just fit leave no room for another token."""
    folder = save_trained("llama", tmp_path / "model")
    lm = load_language_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    facts = make_known_facts()[:2]
    positions = len(tokenizer(facts[0].before).input_ids) + 2
    lm.tokenizer.model_max_length = lm.model.config.max_position_embeddings = positions
    scorer = make_scorer(lm.model, lm.tokenizer, "causal", make_probe(facts))
    assert {answer.grade for batch in evaluate(Prompts(scorer)) for answer in batch} <= {PRODUCED, RECOGNIZED}
