"""Answers get the tokens that they have in running text, with each kind of tokenizer that real models have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compressknow.evaluate.evaluate import Prompts
from compressknow.evaluate.facts import BLANK, Fact
from compressknow.evaluate.scoring.families import make_scorer
from compressknow.evaluate.scoring.scorer import NO_TOKENS, Encoder, Query
from tests.evaluate.references import (
    check_choices,
    encode_sentence,
    evaluate_model,
    make_probe,
    score_bart,
    score_causal,
    score_masked,
    score_t5,
    split_at_blank,
)
from tests.evaluate.trained import train_byte_level, train_metaspace, train_word_piece
from tests.long import one_in

ANSWERS = (
    "Guinea",
    "Guinea-Bissau",
    "Equatorial Guinea",
    "São Tomé",
    "the Netherlands",
    "New York",
    "Bern",
    "iron ore",
)
PROMPTS = (
    "Conakry is the capital of [MASK].",
    "In [MASK] , people speak French and Dutch.",
    "[MASK] is the name of a country.",
    "The capital (of [MASK]) is Conakry",
    'The Latin name "[MASK]" was given in 1941.',
    "Its largest neighbour ([MASK]) has more people than that.",
    "The answer is [MASK]",
)
TEXTS = [prompt.replace(BLANK, answer) for prompt in PROMPTS if " [MASK]" in prompt for answer in ANSWERS] * 2
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level, framed": lambda: train_byte_level(TEXTS),
    "byte-level, plain mask": lambda: train_byte_level(TEXTS, mask="<mask>"),
    "byte-level, nothing added": lambda: train_byte_level(TEXTS, "$A"),
    "byte-level, letters": lambda: train_byte_level(TEXTS, "<s> $A", size=263),
    "metaspace, begun": lambda: train_metaspace(TEXTS),
    "metaspace, closed": lambda: train_metaspace(TEXTS, "$A </s>", "always", unigram=True),
    "word pieces": lambda: train_word_piece(TEXTS),
    "word pieces, cased": lambda: train_word_piece(TEXTS, lowercase=False),
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {kind: make() for kind, make in KINDS.items()}


def make_facts() -> list[Fact]:
    return [
        Fact(f"f{number}", "p", "r", "geography", "s", ANSWERS[number % len(ANSWERS)], prompt, ANSWERS)
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_the_tokens_that_it_has_in_its_sentence(
    tokenizers: dict[str, PreTrainedTokenizerFast], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    encoder = Encoder(tokenizer)
    for fact in make_facts():
        before, after = split_at_blank(fact)
        for text in ANSWERS:
            ids, positions = encode_sentence(tokenizer, before, text, after)
            answer = encoder.answer(fact.before, text, fact.gap)
            assert list(answer) == [ids[position] for position in positions], (fact.prompt, text)
            assert encoder.decode(answer).casefold().replace(" ", "") in ("".join(text.split()).casefold(), "saotome")


def test_a_space_belongs_to_the_word_after_it_and_a_sentence_begins_without_one(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    tokenizer = tokenizers["byte-level, framed"]
    encoder = Encoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(encoder.answer("is", "Bern")))[0].startswith("Ġ")
    assert not tokenizer.convert_ids_to_tokens(list(encoder.answer("", "bern")))[0].startswith("Ġ")
    assert not tokenizer.convert_ids_to_tokens(list(encoder.answer('"', "Bern", "")))[0].startswith("Ġ")
    assert encoder.answer("", "the Netherlands") == encoder.ids("The Netherlands")


def test_an_answer_that_would_merge_with_the_text_before_it_gets_no_space() -> None:
    letters = [(letter, -5.0) for letter in "▁他出生在上海京("]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("在北京", -3.0), ("北京", -4.0), *letters], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.tokenize("他出生在北京")[-1] == "在北京"
    encoder = Encoder(tokenizer)
    written = [tokenizer.convert_ids_to_tokens(list(encoder.answer("他出生在", text, ""))) for text in ("上海", "北京")]
    assert written == [["上", "海"], ["北京"]]


@pytest.mark.parametrize("space", ["\n", "\n\n", "\n ", " "])
def test_a_line_break_before_the_blank_is_part_of_the_prompt(
    tokenizers: dict[str, PreTrainedTokenizerFast], space: str
) -> None:
    tokenizer = tokenizers["byte-level, letters"]
    fact = Fact("1", "probe", "country", "geography", "", "Guinea", f"Which country has iron ore?\nIt is:{space}[MASK]")
    scorer = make_scorer(_make_gpt2(len(tokenizer)), tokenizer, "causal", make_probe([fact], vocabulary="open"))
    query = scorer.make_query(fact)
    assert isinstance(query, Query)
    assert [*query.prompt, *query.gold] == tokenizer(fact.prompt.replace(BLANK, "Guinea"))["input_ids"]


def test_special_tokens_are_added_on_request_and_never_decoded(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    encoder = Encoder(tokenizers["byte-level, framed"])
    plain, framed = encoder.ids("Bern is"), encoder.ids("Bern is", True)
    assert framed == (0, *plain, 2)
    assert encoder.decode(framed) == "Bern is"
    assert encoder.decode([]) == ""


@pytest.mark.parametrize("kind", ["byte-level, framed", "metaspace, begun", "word pieces, cased"])
def test_finds_words_of_one_token_in_running_text(tokenizers: dict[str, PreTrainedTokenizerFast], kind: str) -> None:
    tokenizer = tokenizers[kind]
    encoder = Encoder(tokenizer)
    words = ("Guinea", "capital", "Guinea", "São Tomé", "xyzzyquux", "Dutch", "\u4e16")
    expected = {}
    for word in dict.fromkeys(words):
        ids, positions = encode_sentence(tokenizer, "It is ", word, "")
        if len(positions) == 1 and ids[positions[0]] != tokenizer.unk_token_id:
            expected[ids[positions[0]]] = word
    assert encoder.find_single(words) == expected
    assert "Guinea" in expected.values()


def test_an_answer_from_a_vocabulary_is_a_word_after_a_space_also_in_brackets(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    """LAMA's dates of birth have such prompts."""
    tokenizer = tokenizers["byte-level, framed"]
    fact = Fact("1", "probe", "country", "geography", "", "Guinea", "It is near Bern ([MASK]).")
    probe = make_probe([fact], vocabulary="words", words=("Guinea", "Dutch"))
    query = make_scorer(_make_gpt2(len(tokenizer)), tokenizer, "causal", probe).make_query(fact)
    assert isinstance(query, Query)
    assert query.gold == tuple(tokenizer(" Guinea", add_special_tokens=False)["input_ids"])


def test_a_word_of_a_vocabulary_that_begins_the_sentence_keeps_its_case(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    """LAMA's official code looks up the object as it is."""
    tokenizer = tokenizers["word pieces, cased"]
    fact = Fact("1", "probe", "IsA", "common sense", "", "capital", "[MASK] is the name of a city .")
    probe = make_probe([fact], vocabulary="words", words=("capital", "name"))
    query = make_scorer(_make_bert(len(tokenizer)), tokenizer, "masked", probe).make_query(fact)
    assert isinstance(query, Query)
    assert tokenizer.convert_ids_to_tokens(list(query.aliases)) == ["capital"]


def test_a_text_is_spelled_as_the_tokenizer_does_unless_it_has_unknown_characters(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    encoder = Encoder(tokenizers["word pieces"])
    assert [encoder.spelled(text) for text in ("Guinea-Bissau", "\u4e16")] == ["guinea - bissau", "\u4e16"]


def test_the_first_of_two_words_with_the_same_token_is_found(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    encoder = Encoder(tokenizers["word pieces"])
    assert list(encoder.find_single(("Guinea", "guinea")).values()) == ["Guinea"]


def _make_gpt2(vocabulary: int) -> PreTrainedModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=128))


def _make_llama(vocabulary: int) -> PreTrainedModel:
    config = hf.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return hf.LlamaForCausalLM(config)


def _make_bert(vocabulary: int) -> PreTrainedModel:
    config = hf.BertConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return hf.BertForMaskedLM(config)


def _make_roberta(vocabulary: int) -> PreTrainedModel:
    config = hf.RobertaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return hf.RobertaForMaskedLM(config)


def _make_t5(vocabulary: int) -> PreTrainedModel:
    config = hf.T5Config(
        vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=1
    )
    return hf.T5ForConditionalGeneration(config)


def _make_bart(vocabulary: int) -> PreTrainedModel:
    layers = {
        f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in (("layers", 2), ("ffn_dim", 48))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=vocabulary, d_model=32, **layers, **heads))


# Whether the rest of the sentence is scored does not change a masked model's scores.
CASES = {
    "gpt2": ("byte-level, nothing added", _make_gpt2, "causal", score_causal),
    "gpt2, letters": ("byte-level, letters", _make_gpt2, "causal", score_causal),
    "opt": ("byte-level, letters", _make_llama, "causal", score_causal),
    "llama": ("metaspace, begun", _make_llama, "causal", score_causal),
    "bert": ("word pieces", _make_bert, "masked", score_masked),
    "roberta": ("byte-level, framed", _make_roberta, "masked", score_masked),
    "roberta, plain mask": ("byte-level, plain mask", _make_roberta, "masked", score_masked),
    "t5": ("metaspace, closed", _make_t5, "seq2seq", score_t5),
    "bart": ("byte-level, framed", _make_bart, "seq2seq", score_bart),
}


@pytest.mark.parametrize("case", one_in(2, CASES))
@pytest.mark.parametrize("score_rest", [True, False])
def test_models_with_real_tokenizers_agree_with_the_plain_reference(
    tokenizers: dict[str, PreTrainedTokenizerFast], case: str, score_rest: bool
) -> None:
    kind, make, family, score = CASES[case]
    tokenizer = tokenizers[kind]
    torch.manual_seed(0)
    model = make(len(tokenizer)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    facts = make_facts()
    if not score_rest:
        # Only facts where no candidate begins another one and no words follow.
        facts = [replace(fact, candidates=ANSWERS[1:]) for fact in facts if not any(map(str.isalpha, fact.after))]
        facts = [fact for fact in facts if fact.obj_label in ANSWERS[1:]]
    answers = evaluate_model(model, tokenizer, family, make_probe(facts, score_rest=score_rest))
    check_choices(answers, facts, lambda fact, text: score(model, tokenizer, fact, text, score_rest))


def test_the_embedding_may_have_more_rows_than_the_tokenizer_has_tokens(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    tokenizer = tokenizers["byte-level, nothing added"]
    model = _make_gpt2(len(tokenizer) + 7).eval()
    facts = [replace(fact, candidates=None) for fact in make_facts()]
    for vocabulary in ("full", "open"):
        probe = make_probe(facts, vocabulary=vocabulary, fold_case=True, keep_unanswerable=True)
        for answer in evaluate_model(model, tokenizer, "causal", probe).values():
            assert len(answer.top5) == 5
            assert all(isinstance(text, str) for text in answer.top5)


@pytest.mark.parametrize("text", ["", "\u200b"])
def test_a_fact_with_a_candidate_without_tokens_is_dropped(
    tokenizers: dict[str, PreTrainedTokenizerFast], text: str
) -> None:
    tokenizer = tokenizers["word pieces"]
    fact = replace(make_facts()[0], candidates=("Guinea", text))
    prompts = Prompts(make_scorer(_make_bert(len(tokenizer)), tokenizer, "masked", make_probe([fact])))
    assert prompts.dropped == {NO_TOKENS: 1}
