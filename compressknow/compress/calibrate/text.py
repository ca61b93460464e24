"""TODO"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base.errors import CheckpointError, CompressknowError, UnsupportedError, UsageError
from compressknow.base.files import write_whole
from compressknow.base.reading import RECORD, find_mismatch, read_json
from compressknow.compress.calibrate.passages import HUB, SELF, Kind, check_file, kind_of, passages

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressknow.base.progress import Advance
    from compressknow.compress.calibrate.passages import Form
    from compressknow.compress.steps import Calibration


TOKENS = 32_768
# Of one batch, about.
BATCH_TOKENS = 2_048
# A shorter text says too little of what a layer reads: it is refused unless no more was asked for.
FEWEST_TOKENS = 2_048
# Tokens are looked for in so many bytes each, what stands beside the texts of a .jsonl file included, and in no fewer
# bytes than these: a file of blanks would be read for hours.
BYTES_PER_TOKEN, FEWEST_BYTES = 256, 16 << 20


@dataclass(frozen=True)
class CalibrationText:
    """A text to calibrate a model on.

    Attributes
    ----------
    kind : ``self``, ``file`` or ``hf``.
    source : ``self``, the path as it was given, or ``hf:NAME``.
    sha256 : of all token ids in `batches`.
    seed : what the model's own text, and what is hidden of any text, was drawn with.
    tokens : of the text, special tokens included: whole sequences alone. Fewer than were asked for where the text is
        shorter.
    asked : tokens that were asked for.
    batches : arguments of a forward pass each: ``input_ids`` and, for encoder-decoder models, ``decoder_input_ids``;
        int64 [sequences, tokens], of equal shapes but for the last, which may have fewer sequences. Nothing is padded.
    texts : what stands in each sequence, nothing hidden, without special tokens.
    """

    kind: Kind
    source: str
    sha256: str
    seed: int
    tokens: int
    asked: int
    batches: tuple[dict[str, torch.Tensor], ...]
    texts: tuple[str, ...]


def check_text(text: str, tokens: int) -> None:
    """Raise UsageError where no text could be made of a request, CompressknowError where its file is no regular one.
    Imports nothing large.

    >>> check_text("self", 0)
    Traceback (most recent call last):
    compressknow.base.errors.UsageError: 0 tokens to calibrate on.
    Give 1 or more; 32,768 is usual.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise UsageError(f"{tokens!r} tokens to calibrate on.", hint=f"Give 1 or more; {TOKENS:,} is usual.")
    if kind_of(text) == "file":
        check_file(text)


def calibration_text(
    folder: Path,
    tree: PreTrainedModel,
    *,
    text: str = SELF,
    tokens: int = TOKENS,
    seed: int = 0,
    trust_remote_code: bool = False,
    advance: Advance | None = None,
) -> CalibrationText:
    """The text to calibrate a checkpoint on, the same for the same arguments on one machine.

    Sequences have 512 tokens, or as many as the model has positions for, or sentinels; texts follow one another in them
    with the tokenizer's separator between.

    Parameters
    ----------
    folder : the checkpoint. Its weights are read for ``self`` alone.
    tree : its module tree, which may be on the meta device.
    text : ``self`` (the model's own samples), ``FILE.txt``, ``FILE.jsonl`` (key ``text``) or ``hf:DATASET``.
    tokens : rounded down to whole sequences. A text of fewer is taken whole, from 2,048 tokens on.
    seed : of the samples, and of what is hidden from models that fill blanks.
    advance : told the tokens that the model has written, and how many it is to write, by one thread at a time.

    Raises
    ------
    UsageError : no such text, or `tokens` make no sequence.
    CompressknowError : the text cannot be read, is too short, or has tokens that the model does not.
    CheckpointError : the checkpoint has no tokenizer; or, for ``self``, no head.
    UnsupportedError : for ``self``, a model that writes no text.
    """
    check_text(text, tokens)
    import torch

    from compressknow.base.progress import quiet
    from compressknow.compress.calibrate.corruption import inputs_of
    from compressknow.compress.calibrate.passages import form_of
    from compressknow.engine.language_model import load_whole_tokenizer

    tokenizer = load_whole_tokenizer(folder, trust_remote_code=trust_remote_code)
    with quiet():
        form = form_of(tree, tokenizer)
        rows = _rows(tokens, form)
        if text == SELF:
            pieces: Iterable[Sequence[int]] = _own(folder, form, rows, seed, trust_remote_code, advance)
        else:
            pieces = _read(text, tokenizer, form, max(FEWEST_BYTES, rows * form.body * BYTES_PER_TOKEN))
        bodies = _packed(pieces, form, rows, text, tokenizer)
        inputs = inputs_of(bodies, form, tree, torch.Generator().manual_seed(seed))
    batches = tuple(_batches(inputs, max(1, BATCH_TOKENS // form.length)))
    return CalibrationText(
        kind=kind_of(text),
        source=text,
        sha256=sha256_of_batches(batches),
        seed=seed,
        tokens=len(bodies) * form.length,
        asked=tokens,
        batches=batches,
        texts=tuple(tokenizer.batch_decode(bodies.tolist(), skip_special_tokens=True)),
    )


def texts_again(
    folder: Path, calibration: Mapping[str, Any], *, trust_remote_code: bool = False
) -> tuple[str, ...] | None:
    """What stands in the sequences that a converted checkpoint was calibrated on.

    None where it is not at hand: the model's own text was not kept, a data set of the hub would have to be fetched, and
    a file may be gone, or give other tokens now.

    Parameters
    ----------
    folder : the converted checkpoint, which has the tokenizer.
    calibration : what `compressknow.model.manifest.calibration_of` says of it.
    """
    if not _is_on_disk(calibration):
        return None
    from compressknow.model.checkpoint import open_checkpoint
    from compressknow.model.meta import meta_model

    names = open_checkpoint(folder).tensors
    try:
        again = calibration_text(
            folder,
            meta_model(folder, trust_remote_code=trust_remote_code, tensor_names=names),
            text=calibration["source"],
            tokens=calibration["tokens"],
            seed=calibration["seed"],
            trust_remote_code=trust_remote_code,
        )
    except (CompressknowError, RuntimeError, ValueError):
        # The manifest may be anyone's: what gives no text at all does not give this one.
        return None
    return again.texts if again.sha256 == calibration["sha256"] else None


def _is_on_disk(calibration: Mapping[str, Any]) -> bool:
    """Whether it names a file, or a data set on disk, that is there."""
    try:
        kind = kind_of(calibration["source"])
        found = Path(calibration["source"].removeprefix(HUB)).expanduser().exists()
    except (UsageError, OSError, ValueError, RuntimeError):
        return False
    return kind == calibration["kind"] and kind != SELF and found


def _rows(tokens: int, form: Form) -> int:
    if rows := tokens // form.length:
        return rows
    raise UsageError(
        f"{tokens:,} tokens to calibrate on make no sequence: this model's have {form.length:,}.",
        hint=f"Give {form.length:,} or more; {TOKENS:,} is usual.",
    )


def _own(
    folder: Path,
    form: Form,
    rows: int,
    seed: int,
    trust_remote_code: bool,
    advance: Advance | None,
) -> list[list[int]]:
    from compressknow.compress.calibrate.samples import HINT, check_writes, compute_dtype, samples
    from compressknow.engine.language_model import load_language_model

    check_writes(folder, form)
    try:
        model = load_language_model(folder, dtype=compute_dtype(), trust_remote_code=trust_remote_code)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(error.what, error.why, HINT) from error
    return samples(model, form, rows * form.body, seed, advance)


def _read(text: str, tokenizer: PreTrainedTokenizerBase, form: Form, most: int) -> Iterator[list[int]]:
    """Token ids of each passage, those of the separator first where it begins another text than the first."""
    for number, passage in enumerate(passages(text, most)):
        ids = tokenizer(passage.text, add_special_tokens=False, verbose=False)["input_ids"]
        yield [*form.separator, *ids] if passage.begins and number else list(ids)


def _packed(
    pieces: Iterable[Sequence[int]], form: Form, rows: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Bodies of sequences, int64 [sequences, form.body]: `rows` of them, or as many as the text fills."""
    from compressknow.compress.calibrate.passages import check_ids, pack

    bodies, found = pack(pieces, form, rows)
    fewest = min(-(-FEWEST_TOKENS // form.length), rows)
    if len(bodies) < fewest:
        raise CompressknowError(
            f"{text} has {found:,} tokens of this model, and {fewest * form.body:,} are needed to calibrate it.",
            hint=f"Give a longer text; {TOKENS:,} tokens are usual.",
        )
    check_ids(bodies, form, tokenizer.unk_token_id, text)
    return bodies


def _batches(inputs: dict[str, torch.Tensor], rows: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(inputs["input_ids"]), rows):
        yield {name: ids[start : start + rows] for name, ids in inputs.items()}


def sha256_of_batches(batches: Iterable[dict[str, torch.Tensor]]) -> str:
    """Of all token ids, with the names and shapes of what holds them."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, ids in batch.items():
            digest.update(f"{name} {tuple(ids.shape)}".encode())
            digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


# A stop after a word of three letters or more, so that "St. Louis" is no end; uncased tokenizers put spaces around it.
_SENTENCE = re.compile(r"(?<=\w\w\w[.!?])\s+|\s+[.!?]\s+|\n+")

_WORD = re.compile(r"[^\W_]+")


def facts_in(texts: Iterable[str], pairs: Iterable[tuple[str, str]]) -> int:
    """How many facts stand in texts: pairs of names, of subject and object, that a sentence has both of.

    Names are compared as words, without case, accents and punctuation. A pair that is given twice counts twice.

    >>> text = "Paris, the capital of France, lies on the Seine. Rome does not."
    >>> facts_in([text], [("France", "paris"), ("Rome", "Seine"), ("Rom", "not")])
    1
    """
    sentences = [_words(part) for text in texts for part in _SENTENCE.split(text)]
    found: dict[str, frozenset[int]] = {}
    return sum(
        not _having(subject, sentences, found).isdisjoint(_having(obj, sentences, found)) for subject, obj in pairs
    )


def _having(name: str, sentences: Sequence[str], found: dict[str, frozenset[int]]) -> frozenset[int]:
    """Which sentences have a name, found once."""
    words = _words(name)
    if words not in found:
        found[words] = frozenset(at for at, sentence in enumerate(sentences) if words in sentence and words.strip())
    return found[words]


def _words(text: str) -> str:
    """Words with a space before and after each."""
    plain = "".join(mark for mark in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(mark))
    return f" {' '.join(_WORD.findall(plain))} "


_FORM = {
    **{"kind": str, "source": str, "sha256": str, "seed": int, "tokens": int, "asked": int},
    **{"batches": [{str: [[int]]}], "texts": [str]},
}


def kept_text(folder: Path, calibration: Calibration, make: Callable[[], CalibrationText]) -> CalibrationText:
    """The text of a calibration as `folder` has it, or as `make` gives it, which is kept there then.

    What is damaged is made anew. Raises what `make` does, and OutputError where it cannot be written.
    """
    path = folder / f"{name_of(calibration)}.json"
    text = _read_stored(path)
    if text is None:
        text = make()
        folder.mkdir(parents=True, exist_ok=True)
        said = asdict(text) | {"batches": [{n: ids.tolist() for n, ids in batch.items()} for batch in text.batches]}
        write_whole(path, json.dumps(said).encode())
    return text


def name_of(calibration: Calibration) -> str:
    """A file's name, of that calibration alone.

    >>> from compressknow.compress.recipe import Calibration
    >>> name_of(Calibration())
    'self-32768-0-b6ef'
    """
    import hashlib
    import re

    said = f"{calibration.text} {calibration.tokens} {calibration.seed}"
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", Path(calibration.text).name).strip("-.")[:100]
    digest = hashlib.sha256(said.encode()).hexdigest()[:4]
    return f"{readable}-{calibration.tokens}-{calibration.seed}-{digest}"


def _read_stored(path: Path) -> CalibrationText | None:
    """None where there is none, or not the one that was written."""
    import torch

    try:
        said = read_json(path, RECORD)
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or find_mismatch(said, _FORM):
        return None
    try:
        batches = tuple({name: torch.tensor(ids) for name, ids in batch.items()} for batch in said["batches"])
    except ValueError:
        return None
    if sha256_of_batches(batches) != said["sha256"]:
        return None
    return CalibrationText(**{**said, "batches": batches, "texts": tuple(said["texts"])})
