"""Text to calibrate a model on: write it with the model or read it from a file or data set, store it, and search it."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressknow.base import reading
from compressknow.base.errors import CompressknowError, UsageError
from compressknow.base.files import expand_home, write_whole
from compressknow.base.progress import Advance, ignore_advance
from compressknow.compress.steps import FORMS, HUB, Calibration, Kind

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from compressknow.compress.calibrate.sequences import SequenceFormat


# The key of a JSON line, and the column of a table, that hold a text.
KEY = "text"
# The training split comes first, since facts are evaluated on the others.
_SPLITS = ("train", "validation", "test")
_PIECE = 1 << 16
_ROWS_AT_ONCE = 256


@contextmanager
def _explain_failures(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"There is no calibration text {path}.", hint=FORMS) from None
    except UnicodeDecodeError:
        raise CompressknowError(f"{path} is not UTF-8.", hint="Save it as UTF-8, and try again.") from None
    except reading.NotReadable as error:
        raise CompressknowError(f"{path} cannot be read: {error}.") from None
    except OSError as error:
        raise CompressknowError(f"{path} cannot be read.", error.strerror) from None


def _read_passages(source: str) -> Iterator[str]:
    """Read the texts of a ``.jsonl`` file (one per line) or ``hf:DATASET`` (one per row) that are not blank, or the
    pieces of a ``.txt`` file. Raises UsageError if it is not found, CompressknowError if it cannot be read."""
    if source.startswith(HUB):
        yield from _read_rows(source.removeprefix(HUB))
        return
    path = expand_home(source)
    with _explain_failures(path):
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(reading.read_lines(path), start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text := _parse_line(path, number, content):
                    yield text
            return
        with io.TextIOWrapper(reading.open_regular(path), encoding="utf-8-sig") as file:
            # Each piece of about 64 K characters, in whole lines, is tokenized at once.
            while piece := file.read(_PIECE):
                yield piece + file.readline(_PIECE)


def _parse_line(path: Path, number: int, line: bytes) -> str:
    if not line.strip():
        return ""
    hint = f'Each line must be {{"{KEY}": "..."}}.'
    try:
        row = reading.parse_json(line)
    except UnicodeDecodeError:
        raise
    except ValueError:
        raise CompressknowError(f"{path}, line {number} is not JSON.", hint=hint) from None
    if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
        raise CompressknowError(f'{path}, line {number} has no text under "{KEY}".', hint=hint)
    text: str = row[KEY]
    if b"\\u" in line and (half := reading.find_lone_surrogate(text)):
        raise CompressknowError(f"{path}, line {number}: {half} is half of a character.", hint="Save it as UTF-8.")
    return text if text.strip() else ""


def _read_rows(dataset: str) -> Iterator[str]:
    splits, save = reading.load_tables(dataset), 'Save the one you want as a .jsonl file of {"text": "..."}.'
    name = next((name for name in _SPLITS if name in splits), None)
    if name is None and len(splits) > 1:
        what = f"hf:{dataset} has none of the splits {', '.join(_SPLITS)}, but {', '.join(splits)}."
        raise UsageError(what, hint=save)
    table = splits[name] if name else next(iter(splits.values()))
    texts = [name for name, kind in table.features.items() if getattr(kind, "dtype", "").endswith("string")]
    if KEY not in texts and len(texts) != 1:
        raise UsageError(
            f"hf:{dataset} has no column {KEY!r}, and {'several columns' if texts else 'no column'} of texts.",
            hint=f"Its columns are {', '.join(table.column_names)}. {save}",
        )
    column = KEY if KEY in texts else texts[0]
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        yield from (text for text in batch.column(column).to_pylist() if text and text.strip())


TOKENS = Calibration.tokens
# Approximate size of a batch.
BATCH_TOKENS = 2_048
# A shorter text is not representative of a layer's inputs. It is rejected, unless that few tokens were requested.
FEWEST_TOKENS = 2_048
# With fewer tokens than this, statistics of the inputs of an expert are not used.
LEAST_TOKENS = 32


@dataclass(frozen=True)
class CalibrationText:
    """Text to calibrate a model on.

    Attributes
    ----------
    kind : ``self``, ``file`` or ``hf``.
    source : ``self``, the path as the user wrote it, or ``hf:NAME``.
    sha256 : hash of all token ids in `batches`.
    seed : seed of the model's own text, and of the choice of masked tokens in any text.
    tokens : tokens in whole sequences, including special tokens; fewer than `asked` if the text is shorter.
    asked : requested tokens.
    batches : arguments of one forward pass each: ``input_ids`` and, for encoder-decoder models, ``decoder_input_ids``;
        int64 [sequences, tokens], of equal shapes, except that the last may have fewer sequences. Nothing is padded.
    texts : text of each sequence, unmasked, without special tokens.
    """

    kind: Kind
    source: str
    sha256: str
    seed: int
    tokens: int
    asked: int
    batches: tuple[dict[str, torch.Tensor], ...]
    texts: tuple[str, ...]


def check_text(calibration: Calibration) -> None:
    """Raise UsageError if the file of a text is not found, CompressknowError if it is not a regular file."""
    if calibration.kind == "file":
        path = expand_home(calibration.text)
        with _explain_failures(path):
            reading.check_regular(path)


def hash_text(calibration: Calibration) -> str | None:
    """Return the SHA-256 of the file of a text; None if it has none. Raises the errors of `check_text`."""
    check_text(calibration)
    path = expand_home(calibration.text)
    with _explain_failures(path):
        return reading.compute_sha256(path) if calibration.kind == "file" else None


def read_calibration_text(
    folder: Path,
    tree: PreTrainedModel,
    calibration: Calibration,
    *,
    trust_remote_code: bool = False,
    advance: Advance = ignore_advance,
) -> CalibrationText:
    """Return the text to calibrate a checkpoint on, the same for the same arguments on one machine.

    Sequences have 512 tokens, or fewer if the model has fewer positions or sentinels. Texts follow one another in them,
    separated by the tokenizer's separator.

    Parameters
    ----------
    folder, tree : the checkpoint, and its module tree, perhaps on the meta device. Weights are read only for ``self``.
    calibration : its tokens are rounded down to whole sequences; a shorter text is used whole if it has 2,048 tokens.
    advance : called with the numbers of tokens that the model has written and must write, by one thread at a time.

    Raises
    ------
    UsageError : the text is not found, or the tokens are fewer than one sequence.
    CompressknowError : the text cannot be read, is too short, or has tokens that the model does not have.
    CheckpointError : the checkpoint has no tokenizer; or, for ``self``, no head, or a weight that is NaN or infinite.
    UnsupportedError : for ``self``, a model that cannot write text.
    """
    check_text(calibration)
    import torch

    from compressknow.base.progress import silence_libraries
    from compressknow.compress.calibrate.sequences import build_inputs, find_sequence_format
    from compressknow.engine.load import load_tokenizer

    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    with silence_libraries():
        form = find_sequence_format(tree, tokenizer)
        if not (sequences := calibration.tokens // form.length):
            raise UsageError(
                f"{calibration.tokens:,} calibration tokens do not fill a sequence of this model, of {form.length:,}.",
                hint=f"Give {form.length:,} or more; {TOKENS:,} is usual.",
            )
        pieces: Iterable[Sequence[int]]
        if calibration.kind == "self":
            from compressknow.compress.calibrate.samples import write_samples

            wanted = sequences * form.body
            pieces = write_samples(folder, form, wanted, calibration.seed, trust_remote_code, advance)
        else:
            pieces = _read(calibration.text, tokenizer, form)
        bodies = _pack(pieces, form, sequences, calibration.text, tokenizer)
        inputs = build_inputs(bodies, form, tree, torch.Generator().manual_seed(calibration.seed))
    rows = max(1, BATCH_TOKENS // form.length)
    batches = tuple(
        {name: ids[start : start + rows] for name, ids in inputs.items()} for start in range(0, len(bodies), rows)
    )
    return CalibrationText(
        kind=calibration.kind,
        source=calibration.text,
        sha256=hash_batches(batches),
        seed=calibration.seed,
        tokens=len(bodies) * form.length,
        asked=calibration.tokens,
        batches=batches,
        texts=tuple(tokenizer.batch_decode(bodies.tolist(), skip_special_tokens=True)),
    )


def reread_texts(
    folder: Path, calibration: Mapping[str, Any], *, trust_remote_code: bool = False
) -> tuple[str, ...] | None:
    """Return the texts of the sequences that a converted checkpoint, whose folder has the tokenizer, was calibrated on,
    by its record (`compressknow.model.manifest.summarize_calibration`).

    None if they are not available: the model's own text was not stored, a data set would have to be fetched from the
    hub, or a file is missing or gives other tokens now.
    """
    from compressknow.model.checkpoint import open_checkpoint
    from compressknow.model.meta import build_meta_model

    try:
        recorded = Calibration(calibration["source"], calibration["tokens"], calibration["seed"])
        is_on_disk = expand_home(recorded.text.removeprefix(HUB)).exists()
        if recorded.kind == "self" or recorded.kind != calibration["kind"] or not is_on_disk:
            return None
        names = open_checkpoint(folder).tensors
        tree = build_meta_model(folder, trust_remote_code=trust_remote_code, tensor_names=names)
        text = read_calibration_text(folder, tree, recorded, trust_remote_code=trust_remote_code)
    except (CompressknowError, OSError, RuntimeError, ValueError):
        # The manifest may come from anyone, and name a source that gives no text.
        return None
    return text.texts if text.sha256 == calibration["sha256"] else None


def _read(text: str, tokenizer: PreTrainedTokenizerBase, form: SequenceFormat) -> Iterator[list[int]]:
    """Yield the token ids of each passage, with the separator before each new text except the first."""
    is_one_text = not text.startswith(HUB) and Path(text).suffix.lower() == ".txt"
    for number, passage in enumerate(_read_passages(text)):
        ids = tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]
        yield list(ids) if is_one_text or not number else [*form.separator, *ids]


def _pack(
    pieces: Iterable[Sequence[int]], form: SequenceFormat, sequences: int, text: str, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """Pack pieces into bodies of at most so many sequences, int64 [sequences, form.body]. Raises CompressknowError if
    the text is too short, or not in the model's tokens."""
    import torch

    ids: list[int] = []
    for piece in pieces:
        ids.extend(piece)
        if len(ids) >= sequences * form.body:
            break
    rows, fewest = min(sequences, len(ids) // form.body), min(-(-FEWEST_TOKENS // form.length), sequences)
    if rows < fewest:
        raise CompressknowError(
            f"{text} has {len(ids):,} tokens of this model, but {fewest * form.body:,} are needed to calibrate it.",
            hint=f"Give a longer text; {TOKENS:,} tokens are usual.",
        )
    bodies = torch.tensor(ids[: rows * form.body], dtype=torch.int64).reshape(rows, form.body)
    if (largest := int(bodies.max())) >= form.rows:
        raise CompressknowError(
            f"The tokenizer gives token {largest} for {text}, but the model's embedding has {form.rows:,} rows.",
            hint="Put the tokenizer that the model was trained with in its folder.",
        )
    unknown = tokenizer.unk_token_id
    share = float((bodies == unknown).double().mean()) if unknown is not None else 0.0
    if share > 0.5:
        raise CompressknowError(
            f"The tokenizer does not know {share:.0%} of the tokens of {text}.",
            hint="Give a text in the language that the model was trained on.",
        )
    return bodies


def hash_batches(batches: Iterable[dict[str, torch.Tensor]]) -> str:
    """Return the SHA-256 of all token ids, with the names and shapes of their tensors."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, ids in batch.items():
            digest.update(f"{name} {tuple(ids.shape)}".encode())
            digest.update(ids.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


# A stop ends a sentence after three letters or more, not in "St. Louis". Uncased tokenizers put spaces around stops.
_SENTENCE = re.compile(r"(?<=\w\w\w[.!?])\s+|\s+[.!?]\s+|\n+")

_WORD = re.compile(r"[^\W_]+")


def count_facts(texts: Iterable[str], pairs: Iterable[tuple[str, str]]) -> int:
    """Count the facts that texts contain: pairs of names, of subject and object, that occur in the same sentence.

    Names are compared as words, without case, accents and punctuation. A pair that is given twice counts twice.

    >>> text = "Paris, the capital of France, lies on the Seine. Rome does not."
    >>> count_facts([text], [("France", "paris"), ("Rome", "Seine"), ("Rom", "not")])
    1
    """
    sentences = [_normalize(part) for text in texts for part in _SENTENCE.split(text)]

    @cache
    def find_sentences(name: str) -> frozenset[int]:
        words = _normalize(name)
        return frozenset(i for i, sentence in enumerate(sentences) if words in sentence and words.strip())

    return sum(not find_sentences(subject).isdisjoint(find_sentences(obj)) for subject, obj in pairs)


def _normalize(text: str) -> str:
    """Return the words of a text, with a space before and after each."""
    plain = "".join(mark for mark in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(mark))
    return f" {' '.join(_WORD.findall(plain))} "


_FORM = {
    **{"kind": str, "source": str, "sha256": str, "seed": int, "tokens": int, "asked": int},
    **{"batches": [{str: [[int]]}], "texts": [str]},
}


def load_or_make_text(path: Path, make: Callable[[], CalibrationText]) -> CalibrationText:
    """Return the calibration text in a file, or make it and store it there; a damaged file is replaced. Raises as
    `make` does, and OutputError if it cannot be written."""
    text = _load(path)
    if text is None:
        text = make()
        batches = [{name: ids.tolist() for name, ids in batch.items()} for batch in text.batches]
        write_whole(path, json.dumps(asdict(text) | {"batches": batches}).encode())
    return text


def choose_name(calibration: Calibration) -> str:
    """Choose a file name unique to this calibration; it changes with the content of a text file.

    >>> from compressknow.compress.recipe import Calibration
    >>> choose_name(Calibration())
    'self-32768-0-b6ef'
    """
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", Path(calibration.text).name).strip("-.")[:100]
    identity = f"{calibration.text} {calibration.tokens} {calibration.seed}{hash_text(calibration) or ''}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:4]
    return f"{readable}-{calibration.tokens}-{calibration.seed}-{digest}"


def _load(path: Path) -> CalibrationText | None:
    """Read a stored text; None if there is none, or it is damaged."""
    import torch

    try:
        record = reading.read_json(path, reading.RECORD)
        if not isinstance(record, dict) or reading.find_mismatch(record, _FORM):
            return None
        batches = tuple({name: torch.tensor(ids) for name, ids in batch.items()} for batch in record["batches"])
    except (OSError, ValueError):
        return None
    if hash_batches(batches) != record["sha256"]:
        return None
    known = {name: record[name] for name in _FORM}
    return CalibrationText(**{**known, "batches": batches, "texts": tuple(record["texts"])})
