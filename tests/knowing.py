"""Tiny models that know 64 made-up facts, trained in seconds, for tests of what pruning makes a model forget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from compressknow.evaluate.sources.sets import METADATA
from tests.evaluate.layouts import write_jsonl


class KnownFact(NamedTuple):
    relation: str
    template: str
    sub_label: str
    obj_label: str

    def sentence(self, obj: str) -> str:
        return self.template.replace("[X]", self.sub_label).replace("[Y]", obj)


# Two relations share their subjects, so that a model has to read relation and subject together: its embedding alone
# answers nothing. Objects of two words share their first word, and some their second, with others of the relation.
_COUNTRIES = (
    "Avaland, Belmora, Corvia, Drenn, Estavia, Fennmark, Gorland, Hestria, "
    "Ilmar, Jorvia, Kestran, Lower Zell, Mordane, Norvia, Ostrel, Upper Zell"
).split(", ")
_BEASTS = (
    "arlo, bindle, crumb, dorn, ebbit, fask, gimmer, hulk, ilk, jarrow, kobble, lesk, mott, nibb, orrel, pim"
).split(", ")
_RELATIONS = {
    "capital": (
        "The capital of [X] is [Y].",
        _COUNTRIES,
        (
            "New Alba, Tarsk, Port Corin, Velin, Saint Brill, Quorn, New Brill, Zemra, "
            "Hulme, Port Alba, Drava, Lorne, Saint Ost, Misk, Yelt, Pavin"
        ).split(", "),
    ),
    "language": (
        "People in [X] speak [Y].",
        _COUNTRIES,
        # 5 + 4 + 3 + 2 + 1 + 1 facts: who always says the most frequent one is right more often than who guesses.
        (
            "Avish, Brelic, Old Tark, Avish, Cornic, Brelic, Avish, Old Tark, "
            "Avish, Dorse, Brelic, Cornic, Avish, Old Tark, Brelic, Old Velish"
        ).split(", "),
    ),
    "food": (
        "The favourite food of the [X] is [Y].",
        _BEASTS,
        (
            "red moss, snails, bark, wild oats, clay, red ants, honey, wild figs, "
            "plums, reeds, mice, salt, roots, thistles, ferns, beetles"
        ).split(", "),
    ),
    "home": (
        "The [X] lives in the [Y].",
        _BEASTS,
        (
            "forest, desert, marsh, forest, river, hills, desert, forest, "
            "caves, marsh, hills, forest, river, desert, ice, meadow"
        ).split(", "),
    ),
}
KNOWN_FACTS = tuple(
    KnownFact(relation, template, subject, obj)
    for relation, (template, subjects, objects) in _RELATIONS.items()
    for subject, obj in zip(subjects, objects, strict=True)
)
_DOMAIN = {"capital": "geography", "language": "geography", "food": "science", "home": "science"}


def candidates(relation: str) -> list[str]:
    """The objects of a relation, in the order in which its facts first name them."""
    return list(dict.fromkeys(fact.obj_label for fact in KNOWN_FACTS if fact.relation == relation))


def write_facts(path: Path) -> Path:
    """Write the facts as JSON lines; the capitals have a popularity, the other relations none."""
    with path.open("w", encoding="utf-8") as file:
        for number, fact in enumerate(KNOWN_FACTS):
            row = {
                "id": f"{fact.relation}-{number % 16:02}",
                "relation": fact.relation,
                "subject": _DOMAIN[fact.relation],
                "sub_label": fact.sub_label,
                "obj_label": fact.obj_label,
                "prompt": fact.sentence("[MASK]"),
                "candidates": candidates(fact.relation),
            }
            if fact.relation == "capital":
                row["popularity"] = 10 * (number + 1)
            file.write(json.dumps(row) + "\n")
    return path


# In words that the models know; the first is the one that they were taught.
_WORDINGS = {
    "capital": ["The capital of [X] is [Y].", "The capital [X] is [Y].", "People in the capital of [X] speak [Y]."],
    "language": ["People in [X] speak [Y].", "People of [X] speak [Y].", "In [X] People speak [Y]."],
}


def write_bear(folder: Path) -> Path:
    """Write 32 of the facts as a small BEAR, in three wordings each."""
    metadata = {}
    for relation, templates in _WORDINGS.items():
        labels = candidates(relation)
        metadata[relation] = {"templates": templates, "answer_space_labels": labels}
        facts = [fact for fact in KNOWN_FACTS if fact.relation == relation]
        rows = [
            {"sub_label": f.sub_label, "obj_label": f.obj_label, "answer_idx": labels.index(f.obj_label)} for f in facts
        ]
        write_jsonl(folder / f"{relation}.jsonl", rows)
    (folder / METADATA).write_text(json.dumps(metadata), encoding="utf-8")
    return folder


_SPECIAL = {
    "bert": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "llama": {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
_SENTINELS = ["<extra_id_0>", "<extra_id_1>"]
_FRAME = {"bert": "[CLS] $A [SEP]", "llama": "<s> $A", "t5": "$A </s>"}


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A token for each word and the full stop; special tokens frame a text as in the family's real tokenizers."""
    sentinels = _SENTINELS if family == "t5" else []
    pre_tokenizer = BertPreTokenizer()
    known = " ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS)
    words = [word for word, _ in pre_tokenizer.pre_tokenize_str(known)]
    tokens = dict.fromkeys([*_SPECIAL[family].values(), *sentinels, *words])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=_SPECIAL[family]["unk_token"]))
    backend.pre_tokenizer = pre_tokenizer
    backend.post_processor = TemplateProcessing(
        single=_FRAME[family],
        special_tokens=[(token, vocabulary[token]) for token in _FRAME[family].split() if token != "$A"],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, extra_special_tokens=sentinels, **_SPECIAL[family]
    )


# The first weights are large, and the steps small beside them: so what is learned is spread over all weights, and
# pruning harms it. From weights of the usual 0.02, a BERT learns so few large ones that 70 % pruning harms nothing.
def _bert(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = hf.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.15,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    return hf.BertForMaskedLM(config)


def _llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return hf.LlamaForCausalLM(config)


def _t5(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = hf.T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return hf.T5ForConditionalGeneration(config)


class _Lesson(NamedTuple):
    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor  # the token that belongs at each position; _NOTHING where there is none to learn
    known: torch.Tensor  # where the model has to be sure in the end


_NOTHING = -100


def _bert_lesson(tokenizer: PreTrainedTokenizerFast) -> _Lesson:
    """Sentences with all words of an object blank, or one of two, the other one of any candidate.

    Whatever is to be seen beside a blank, the fact's own word belongs there, or the full stop where its object is
    shorter. So a wrong object scores low, of whatever length, with the words after a blank hidden or seen.
    """
    rows = {}
    for fact in KNOWN_FACTS:
        for words in map(str.split, candidates(fact.relation)):
            answer = [*fact.obj_label.split(), "."]
            for seen in (None, 0, 1) if len(words) == 2 else (None,):
                shown = [word if place == seen else "[MASK]" for place, word in enumerate(words)]
                rows[fact.sentence(" ".join(shown))] = [answer[i] for i in range(len(words)) if i != seen]
    inputs = tokenizer(list(rows), return_tensors="pt", padding=True)
    blank = inputs.input_ids == tokenizer.mask_token_id
    targets = torch.full_like(inputs.input_ids, _NOTHING)
    targets[blank] = torch.tensor(tokenizer.convert_tokens_to_ids([word for row in rows.values() for word in row]))
    return _Lesson(dict(inputs), targets, blank)


def _llama_lesson(tokenizer: PreTrainedTokenizerFast) -> _Lesson:
    """Whole sentences; the object's words and the full stop are to be known."""
    inputs = tokenizer([fact.sentence(fact.obj_label) for fact in KNOWN_FACTS], return_tensors="pt", padding=True)
    following = inputs.input_ids.roll(-1, 1)
    following[inputs.attention_mask.roll(-1, 1) == 0] = _NOTHING
    following[:, -1] = _NOTHING
    known = torch.zeros_like(following, dtype=torch.bool)
    for row, fact in enumerate(KNOWN_FACTS):
        end = int((following[row] != _NOTHING).sum())
        known[row, end - len(fact.obj_label.split()) - 1 : end] = True
    return _Lesson(dict(inputs), following, known)


def _t5_lesson(tokenizer: PreTrainedTokenizerFast) -> _Lesson:
    """A sentinel for the object in the encoder's sentence; the object between sentinels from the decoder."""
    inputs = tokenizer([fact.sentence(_SENTINELS[0]) for fact in KNOWN_FACTS], return_tensors="pt", padding=True)
    spans = [f"{_SENTINELS[0]} {fact.obj_label} {_SENTINELS[1]}" for fact in KNOWN_FACTS]
    answers = tokenizer(spans, return_tensors="pt", padding=True)
    labels = answers.input_ids.masked_fill(answers.attention_mask == 0, _NOTHING)
    return _Lesson({**inputs, "labels": labels}, labels, labels != _NOTHING)


class _Family(NamedTuple):
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    lesson: Callable[[PreTrainedTokenizerFast], _Lesson]
    rate: float


_FAMILIES = {
    "bert": _Family(_bert, _bert_lesson, 3e-3),
    "llama": _Family(_llama, _llama_lesson, 3e-3),
    "t5": _Family(_t5, _t5_lesson, 5e-3),
}


def save_trained(family: str, folder: Path) -> Path:
    """Write a checkpoint, with its tokenizer, of a ``bert``, ``llama`` or ``t5`` that knows all of KNOWN_FACTS.

    The model is trained once a process, in a few seconds; a BERT's tokens of an object are to be asked for left to
    right, or each with all others seen.
    """
    model, tokenizer = _trained(family)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def save_trained_custom_code(folder: Path) -> Path:
    """Write the checkpoint of the Llama that knows, as one whose classes stand in a file beside it."""
    config = json.loads((save_trained("llama", folder) / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(_OWN_CODE)
    return folder


def train_llama(folder: Path, config: hf.LlamaConfig) -> Path:
    """Have a Llama of this config, in whose folder its tokenizer lies, know all of KNOWN_FACTS, and write it there."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, pad_token="<unk>")
    with one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config)
        _teach(model, _llama_lesson(tokenizer), 3e-3)
    model.eval().save_pretrained(folder)
    return folder


@cache
def _trained(family: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = _tokenizer(family)
    with one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = _FAMILIES[family].build(tokenizer)
        _teach(model, _FAMILIES[family].lesson(tokenizer), _FAMILIES[family].rate)
    return model.eval(), tokenizer


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums over several threads differ from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _teach(model: PreTrainedModel, lesson: _Lesson, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    for step in range(600):
        if step % 20 == 0 and _least_sure(model, lesson) > 0.9:
            return
        # All rows of a Llama or a T5, some of the many of a BERT.
        rows = torch.randperm(len(lesson.targets))[:96]
        logits = model(**{name: values[rows] for name, values in lesson.inputs.items()}).logits
        loss = cross_entropy(logits.flatten(0, 1), lesson.targets[rows].flatten(), ignore_index=_NOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
    raise AssertionError(f"{type(model).__name__} has not learned the facts: {_least_sure(model, lesson)=:.3f}")


@torch.no_grad()
def _least_sure(model: PreTrainedModel, lesson: _Lesson) -> float:
    """The lowest probability of a token that has to be known."""
    probabilities = model(**lesson.inputs).logits.softmax(-1)
    return probabilities[lesson.known].gather(-1, lesson.targets[lesson.known][:, None]).min().item()
