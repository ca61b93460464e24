"""Tiny models that know 64 made-up facts, trained in seconds, to test what a model forgets when it is pruned."""

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


# Two relations share each set of subjects, so a model has to combine relation and subject: the subject's embedding does
# not give the answer. Objects of two words share their first word, and some their second, with others of the relation.
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
        # 5 + 4 + 3 + 2 + 1 + 1 facts: always giving the most frequent language beats guessing at random.
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
    """Return the objects of a relation, in the order of its facts."""
    return list(dict.fromkeys(fact.obj_label for fact in KNOWN_FACTS if fact.relation == relation))


def write_facts(path: Path) -> Path:
    """Write the facts as JSON lines. Only capitals have a popularity."""
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


# Only words of the models' vocabulary; the models were trained on the first wording.
_WORDINGS = {
    "capital": ["The capital of [X] is [Y].", "The capital [X] is [Y].", "People in the capital of [X] speak [Y]."],
    "language": ["People in [X] speak [Y].", "People of [X] speak [Y].", "In [X] People speak [Y]."],
}


def write_bear(folder: Path) -> Path:
    """Write 32 of the facts as a BEAR folder, in three wordings each."""
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


def _build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word, and the special tokens of the family's real tokenizers."""
    sentinels = _SENTINELS if family == "t5" else []
    pre_tokenizer = BertPreTokenizer()
    text = " ".join(fact.sentence(fact.obj_label) for fact in KNOWN_FACTS)
    words = [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
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


# Initial weights are large relative to the training steps, so what is learned is spread over all weights, and pruning
# harms it. With the usual 0.02, a BERT learns so few large weights that pruning 70 % of them harms nothing.
def _build_bert(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
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


def _build_llama(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
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


def _build_t5(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
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
    targets: torch.Tensor  # the right token at each position, or _IGNORED
    known: torch.Tensor  # the positions that the model must know in the end


_IGNORED = -100


def _make_bert_lesson(tokenizer: PreTrainedTokenizerFast) -> _Lesson:
    """Put as many masks as a candidate has words, or one mask and one of the candidate's two words.

    The target of a mask is always the right object's word, or the full stop if that object is shorter. So wrong objects
    of any length score low, whether the words after a mask are masked too or not.
    """
    rows = {}
    for fact in KNOWN_FACTS:
        for words in map(str.split, candidates(fact.relation)):
            answer = [*fact.obj_label.split(), "."]
            for visible in (None, 0, 1) if len(words) == 2 else (None,):
                masked = [word if i == visible else "[MASK]" for i, word in enumerate(words)]
                rows[fact.sentence(" ".join(masked))] = [answer[i] for i in range(len(words)) if i != visible]
    inputs = tokenizer(list(rows), return_tensors="pt", padding=True)
    is_mask = inputs.input_ids == tokenizer.mask_token_id
    targets = torch.full_like(inputs.input_ids, _IGNORED)
    targets[is_mask] = torch.tensor(tokenizer.convert_tokens_to_ids([word for row in rows.values() for word in row]))
    return _Lesson(dict(inputs), targets, is_mask)


def _make_llama_lesson(tokenizer: PreTrainedTokenizerFast) -> _Lesson:
    """Use whole sentences; the model must know the object's words and the full stop."""
    inputs = tokenizer([fact.sentence(fact.obj_label) for fact in KNOWN_FACTS], return_tensors="pt", padding=True)
    targets = inputs.input_ids.roll(-1, 1)
    targets[inputs.attention_mask.roll(-1, 1) == 0] = _IGNORED
    targets[:, -1] = _IGNORED
    known = torch.zeros_like(targets, dtype=torch.bool)
    for row, fact in enumerate(KNOWN_FACTS):
        end = int((targets[row] != _IGNORED).sum())
        known[row, end - len(fact.obj_label.split()) - 1 : end] = True
    return _Lesson(dict(inputs), targets, known)


def _make_t5_lesson(tokenizer: PreTrainedTokenizerFast) -> _Lesson:
    """Replace the object by a sentinel for the encoder; the decoder writes it between two sentinels."""
    inputs = tokenizer([fact.sentence(_SENTINELS[0]) for fact in KNOWN_FACTS], return_tensors="pt", padding=True)
    spans = [f"{_SENTINELS[0]} {fact.obj_label} {_SENTINELS[1]}" for fact in KNOWN_FACTS]
    answers = tokenizer(spans, return_tensors="pt", padding=True)
    labels = answers.input_ids.masked_fill(answers.attention_mask == 0, _IGNORED)
    return _Lesson({**inputs, "labels": labels}, labels, labels != _IGNORED)


class _Family(NamedTuple):
    build: Callable[[PreTrainedTokenizerFast], PreTrainedModel]
    make_lesson: Callable[[PreTrainedTokenizerFast], _Lesson]
    learning_rate: float


_FAMILIES = {
    "bert": _Family(_build_bert, _make_bert_lesson, 3e-3),
    "llama": _Family(_build_llama, _make_llama_lesson, 3e-3),
    "t5": _Family(_build_t5, _make_t5_lesson, 5e-3),
}


def save_trained(family: str, folder: Path) -> Path:
    """Write the checkpoint and tokenizer of a ``bert``, ``llama`` or ``t5`` that knows all of KNOWN_FACTS.

    It is trained once per process, in a few seconds. A BERT can be scored left to right, or with all other words shown.
    """
    model, tokenizer = _train(family)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_CUSTOM_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def save_trained_custom_code(folder: Path) -> Path:
    """Write the trained Llama as a checkpoint whose classes are defined in its folder."""
    config = json.loads((save_trained("llama", folder) / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(_CUSTOM_CODE)
    return folder


def train_llama(folder: Path, config: hf.LlamaConfig) -> Path:
    """Train a Llama of this config on KNOWN_FACTS, with the tokenizer in the folder, and write it there."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, pad_token="<unk>")
    with one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config)
        _teach(model, _make_llama_lesson(tokenizer), 3e-3)
    model.eval().save_pretrained(folder)
    return folder


@cache
def _train(family: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = _build_tokenizer(family)
    with one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = _FAMILIES[family].build(tokenizer)
        _teach(model, _FAMILIES[family].make_lesson(tokenizer), _FAMILIES[family].learning_rate)
    return model.eval(), tokenizer


@contextmanager
def one_thread() -> Iterator[None]:
    """Make the training deterministic: sums over several threads differ from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _teach(model: PreTrainedModel, lesson: _Lesson, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    for step in range(600):
        if step % 20 == 0 and _lowest_probability(model, lesson) > 0.9:
            return
        # All rows of a Llama or a T5; a BERT has more.
        rows = torch.randperm(len(lesson.targets))[:96]
        logits = model(**{name: values[rows] for name, values in lesson.inputs.items()}).logits
        loss = cross_entropy(logits.flatten(0, 1), lesson.targets[rows].flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
    raise AssertionError(f"{type(model).__name__} has not learned the facts: {_lowest_probability(model, lesson)=:.3f}")


@torch.no_grad()
def _lowest_probability(model: PreTrainedModel, lesson: _Lesson) -> float:
    """Return the lowest probability of a token that the model must know."""
    probabilities = model(**lesson.inputs).logits.softmax(-1)
    return probabilities[lesson.known].gather(-1, lesson.targets[lesson.known][:, None]).min().item()
