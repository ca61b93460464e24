"""TODO"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from compressknow.base.errors import CompressknowError, UnsupportedError, UsageError
from compressknow.base.reading import (
    NotReadable,
    check_regular,
    find_lone_surrogate,
    load_tables,
    open_regular,
    parse_json,
    read_lines,
)
from compressknow.engine.language_model import embedding_rows, family_of, most_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Kind = Literal["self", "file", "hf"]
SELF, HUB = "self", "hf:"
# The key of a JSON line, and the column of a table, that hold a text.
KEY = "text"
# A set's own text to learn from comes first: facts are asked of the others.
_SPLITS = ("train", "validation", "test")
_PIECE = 1 << 16
_ROWS_AT_ONCE = 256
FORMS = "Give self (the model's own samples), FILE.txt, FILE.jsonl or hf:DATASET."


class Passage(NamedTuple):
    """A piece of text; `begins` where it is the first of a text, so that a separator goes before it."""

    text: str
    begins: bool


def kind_of(source: str) -> Kind:
    """What `source` names: ``self``, a file or a data set. Looks at no file, and imports nothing large.

    Raises UsageError where it is none of these.

    >>> [kind_of(source) for source in ("self", "notes.txt", "rows.jsonl", "hf:wikitext:wikitext-2-raw-v1")]
    ['self', 'file', 'file', 'hf']
    """
    if source == SELF:
        return "self"
    if source.startswith(HUB) and source != HUB:
        return "hf"
    if Path(source).suffix.lower() in (".txt", ".jsonl"):
        return "file"
    raise UsageError(f"There is no calibration text {source!r}.", hint=FORMS)


def check_file(source: str) -> None:
    """Raise UsageError where the file that `source` names is not there, CompressknowError where it is another kind of
    file."""
    path = Path(source).expanduser()
    try:
        check_regular(path)
    except FileNotFoundError:
        raise UsageError(f"There is no calibration text {path}.", hint=FORMS) from None
    except NotReadable as error:
        raise CompressknowError(f"{path} cannot be read: {error}.") from None
    except OSError as error:
        raise CompressknowError(f"{path} cannot be read.", error.strerror) from None


def passages(source: str, most: int) -> Iterator[Passage]:
    """The texts of a ``.txt`` file (one text), a ``.jsonl`` file (one a line) or ``hf:DATASET`` (one a row), in order.

    Blank ones are left out. No more is read than is asked for, and that must be found in the first `most` bytes.
    Raises UsageError where the file or set is not found, CompressknowError where it cannot be read, or where there is
    more of it.
    """
    if source.startswith(HUB):
        yield from _of_some(_rows(source.removeprefix(HUB)), most, source)
        return
    check_file(source)
    path = Path(source).expanduser()
    try:
        found = _lines(path) if path.suffix.lower() == ".jsonl" else _pieces(path)
        yield from _of_some(found, most, str(path))
    except UnicodeDecodeError:
        raise CompressknowError(f"{path} is not UTF-8.", hint="Save it as UTF-8, and try again.") from None
    except NotReadable as error:
        raise CompressknowError(f"{path} cannot be read: {error}.") from None
    except OSError as error:
        raise CompressknowError(f"{path} cannot be read.", error.strerror) from error


# A passage, nothing where it is blank, and what was read for it.
_Read = tuple[Passage | None, int]


def _of_some(found: Iterator[_Read], most: int, source: str) -> Iterator[Passage]:
    left = most
    for passage, read in found:
        if left < 0:
            raise CompressknowError(
                f"{source} has too few tokens in its first {most:,} bytes.",
                hint="Give a text of words, or fewer --calibration-tokens.",
            )
        left -= read
        if passage:
            yield passage


def _pieces(path: Path) -> Iterator[_Read]:
    """Whole lines of about 64 K characters together: what is tokenized at once."""
    with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
        begins = True
        while piece := file.read(_PIECE):
            piece += file.readline(_PIECE)
            yield Passage(piece, begins), len(piece)
            begins = False


def _lines(path: Path) -> Iterator[_Read]:
    for number, line in enumerate(read_lines(path), start=1):
        text = _text_of(path, number, line)
        yield (Passage(text, True) if text else None), len(line) + 1


def _text_of(path: Path, number: int, line: bytes) -> str:
    if not line.strip():
        return ""
    try:
        row = parse_json(line)
    except UnicodeDecodeError:
        raise
    except ValueError:
        raise CompressknowError(f"{path}, line {number}: no JSON.", hint=f'Each line is {{"{KEY}": "..."}}.') from None
    if not isinstance(row, dict) or not isinstance(row.get(KEY), str):
        raise CompressknowError(f'{path}, line {number}: no text under "{KEY}".', hint=f'Each is {{"{KEY}": "..."}}.')
    text: str = row[KEY]
    if b"\\u" in line and (half := find_lone_surrogate(text)):
        raise CompressknowError(f"{path}, line {number}: {half} is half of a character.", hint="Save it as UTF-8.")
    return text if text.strip() else ""


def _rows(dataset: str) -> Iterator[_Read]:
    table = _split_of(load_tables(dataset), dataset)
    column = _column_of(table, dataset)
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for text in batch.column(column).to_pylist():
            yield (Passage(text, True) if text and text.strip() else None), len(text or "") + 1


def _split_of(splits: dict[str, Any], dataset: str) -> Any:
    name = next((name for name in _SPLITS if name in splits), None)
    if name is None and len(splits) > 1:
        raise UsageError(
            f"hf:{dataset} has none of the splits {', '.join(_SPLITS)}, but {', '.join(splits)}.",
            hint='Save the one you want as a .jsonl file of {"text": "..."}.',
        )
    return splits[name] if name else next(iter(splits.values()))


def _column_of(table: Any, dataset: str) -> str:
    """``text``, or the only column of texts."""
    texts = [name for name, kind in table.features.items() if getattr(kind, "dtype", "").endswith("string")]
    if KEY in texts:
        return KEY
    if len(texts) == 1:
        return str(texts[0])
    raise UsageError(
        f"hf:{dataset} has no column {KEY!r}, and {'several columns' if texts else 'no column'} of texts.",
        hint=f"Its columns are {', '.join(table.column_names)}. Save the one you want as a .jsonl file of "
        '{"text": "..."}.',
    )


LENGTH = 512
# Of the text, hidden from a model that fills blanks; and the mean length of a hidden span (Raffel et al. 2020, 3.3.4).
HIDDEN, SPAN = 0.15, 3
# A model's text of fewer tokens has no room for a blank and what is around it.
_SHORTEST = 8
_SENTINEL = re.compile(r"<extra_id_(\d+)>")

Ids = Sequence[int]


@dataclass(frozen=True)
class Form:
    """What a sequence of a model looks like.

    Attributes
    ----------
    family : ``masked``, ``causal`` or ``seq2seq``; ``plain`` where a model has no head and no mask token.
    length : tokens of a sequence, `prefix` and `suffix` included.
    prefix, suffix : special tokens that the tokenizer puts around a text, and so around each sequence.
    separator : between two texts of a sequence.
    marks : what stands for hidden tokens: the mask token, or T5's sentinels in their order; none where a model has
        neither.
    known : ids of ordinary tokens that both the tokenizer and the embedding have.
    rows : of the embedding.
    """

    family: str
    length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: tuple[int, ...]
    marks: tuple[int, ...]
    known: tuple[int, ...]
    rows: int

    @property
    def body(self) -> int:
        """Tokens of a sequence that are text."""
        return self.length - len(self.prefix) - len(self.suffix)

    @property
    def has_sentinels(self) -> bool:
        return len(self.marks) > 1

    def framed(self, ids: Ids) -> list[int]:
        return [*self.prefix, *ids, *self.suffix]


def form_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Form:
    """The form of a model's sequences; `model` may be a module tree on the meta device.

    Raises UnsupportedError where it reads no text, or no more than a few tokens of it.
    """
    marks = _marks(tokenizer)
    family = family_of(model) or _family_without_head(model, tokenizer)
    prefix, suffix = _frame(tokenizer)
    rows = embedding_rows(model)
    form = Form(
        family=family,
        length=_length(model, tokenizer, marks if family == "seq2seq" else ()),
        prefix=prefix,
        suffix=suffix,
        separator=_separator(tokenizer, family, prefix, suffix),
        marks=marks if family in ("masked", "seq2seq") else (),
        known=_known(tokenizer, marks, rows),
        rows=rows,
    )
    if form.body < _SHORTEST:
        raise UnsupportedError(f"{type(model).__name__} reads no more than {form.length} tokens at once.")
    return form


def _family_without_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    if model.config.is_encoder_decoder:
        return "seq2seq"
    return "masked" if tokenizer.mask_token_id is not None else "plain"


def _marks(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    found = {
        int(match[1]): number
        for token, number in tokenizer.get_vocab().items()
        if (match := _SENTINEL.fullmatch(token))
    }
    sentinels = tuple(found[place] for place in range(len(found)) if place in found)
    if len(sentinels) > 1:
        return sentinels
    return (tokenizer.mask_token_id,) if tokenizer.mask_token_id is not None else ()


def _known(tokenizer: PreTrainedTokenizerBase, marks: tuple[int, ...], rows: int) -> tuple[int, ...]:
    special = {*tokenizer.all_special_ids, *marks}
    tokens = tokenizer.get_vocab().items()
    return tuple(
        sorted(number for token, number in tokens if number < rows and number not in special and "unused" not in token)
    )


def _length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, marks: tuple[int, ...]) -> int:
    most = min(LENGTH, most_tokens(model, tokenizer) or LENGTH)
    # A sentinel for each span, and one that closes the last.
    return min(most, int((len(marks) - 1) * SPAN / HIDDEN) + 1) if len(marks) > 1 else most


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and after a text. Some tokenizers tell them only by what they do to one."""
    alone, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    place = next((at for at in range(len(framed)) if framed[at : at + len(alone)] == alone), 0)
    return tuple(framed[:place]), tuple(framed[place + len(alone) :])


def _separator(
    tokenizer: PreTrainedTokenizerBase, family: str, prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> tuple[int, ...]:
    """What ends a text; of a decoder also what begins one, as in the text that it has learned from."""
    end = suffix or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    return (*end, *prefix) if family == "causal" else end


def pack(pieces: Iterable[Ids], form: Form, most: int) -> tuple[torch.Tensor, int]:
    """Whole bodies of sequences, int64 [at most `most`, form.body], and how many tokens of text there were.

    No more pieces are taken than are needed; what is left of the last is dropped.
    """
    import torch

    ids: list[int] = []
    for piece in pieces:
        ids.extend(piece)
        if len(ids) >= most * form.body:
            break
    rows = min(most, len(ids) // form.body)
    return torch.tensor(ids[: rows * form.body], dtype=torch.int64).reshape(rows, form.body), len(ids)


def check_ids(bodies: torch.Tensor, form: Form, unknown: int | None, source: str) -> None:
    """Raise CompressknowError where a text has tokens that the model has no row for, or is mostly unknown tokens."""
    if (largest := int(bodies.max())) >= form.rows:
        raise CompressknowError(
            f"The tokenizer gives token {largest} for {source}, and the model's embedding has {form.rows:,} rows.",
            hint="Put the tokenizer that the model was trained with in its folder.",
        )
    share = float((bodies == unknown).double().mean()) if unknown is not None else 0.0
    if share > 0.5:
        raise CompressknowError(
            f"The tokenizer does not know {share:.0%} of the tokens of {source}.",
            hint="Give a text in the language that the model was trained on.",
        )
