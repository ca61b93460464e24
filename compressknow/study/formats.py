"""Files that a search chooses from: for each size, the types predicted to lose least, made when needed."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compressknow.base.errors import OutputError, UnsupportedError, UsageError, suggest_word
from compressknow.base.format import share
from compressknow.base.packages import require
from compressknow.base.progress import Begin, Listener
from compressknow.compress.recipe import EXPORT, Recipe, to_toml
from compressknow.compress.staging import make_scratch
from compressknow.compress.steps import Calibration, Quantize, Where
from compressknow.engine.identity import get_record_path
from compressknow.gguf.choice import Rounding, SizeFit, TypeChoice
from compressknow.gguf.converter import read_version
from compressknow.gguf.tensors import Tensors, align, describe_tensors
from compressknow.model.gguf_file import read_gguf
from compressknow.model.manifest import MANIFEST_NAME
from compressknow.model.structure import SCOPES, LinearWeight, compile_pattern
from compressknow.study import allocation
from compressknow.study.allocation import NONE
from compressknow.study.sensitivity import Guidance, Guide, Sensitivity, check_guide, name_guide

if TYPE_CHECKING:
    from compressknow.compress.calibrate.walk import Batches
    from compressknow.compress.convert import VariantMaker
    from compressknow.gguf.export import ExportPlan
    from compressknow.study.cells import StudyModel
    from compressknow.study.measuring import Roundings


GGUF, CHECKPOINT = FORMS = ("gguf", "checkpoint")
NEEDED = ("llama_cpp_py_sync", "gguf", "sentencepiece")  # packages that making a GGUF file needs
# A hint for weights of a checkpoint that cannot be quantized.
_CANNOT_QUANTIZE = (
    "Search for a GGUF file (--to gguf), if it generates text, or leave them as they are: --must PATTERN=none."
)
# Bytes per tensor in a safetensors header, besides its name; tensors that a quantized weight becomes.
_HEADER, _PARTS = 130, 3
_SHAPE = 16  # bytes of the tensor that holds the shape of a packed one
_NAMED = 3  # types named in a summary line


@dataclass(frozen=True)
class SearchRequest:
    """Options of a search: the share of knowledge to `keep` or the `size` of the file in bytes; one of `FORMS`, or None
    for the model's default; what guides the choice of types; and `must`, rules for types that are fixed. Raises
    UsageError for invalid ones."""

    keep: float | None
    size: int | None
    to: str | None
    guide: Guide
    must: tuple[tuple[str, str], ...]
    rounding: Rounding | None
    text: Calibration

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.size is None):
            raise UsageError(
                "Give either --keep or --size.",
                hint="--keep 0.95 keeps 95 %; --size 90MB is the best file of that size.",
            )
        if self.keep is not None and not 0 < self.keep < 1:
            raise UsageError(
                f"The share of knowledge to keep must be more than 0 and less than 1: {self.keep:g}.",
                hint="Write 95 % as 0.95 or 95%.",
            )
        check_guide(self.guide)
        if self.to not in (None, *FORMS):
            raise UsageError(f"--to {self.to}: there is no such form.", hint=f"Choose from {', '.join(FORMS)}.")
        allocation.check_rounding("gptq" if self.rounding is None else self.rounding)
        if self.to == GGUF:
            allocation.check_must(self.must)


class FileFormat(ABC):
    """File format that a search can write a model in."""

    name: ClassVar[str]
    file_name: ClassVar[str]  # or the name of its folder
    roundings: Roundings
    label: str  # what guides the types, and how weights are rounded
    floats: Path | None = None  # the model as an unquantized GGUF file, while the format is open
    guidance: Guidance  # this and the texts are set by `learn`
    texts: tuple[Batches, ...]

    def __init__(self, table: allocation.OptionTable, overhead: int, whole: int, numel: Mapping[str, int]) -> None:
        """Take the `table` of types for each weight (or group of weights with one type), whose losses are unknown until
        `learn`; the bytes of a file apart from these, and of the `whole` file unquantized; and each weight's number of
        parameters. Raises UsageError if no weight may be rounded."""
        self.table, self.overhead, self.whole, self.numel = table, overhead, whole, numel
        self._chosen: dict[int, allocation.Allocation] = {}
        if overhead + sum(min(options.values()).nbytes for options in table.values()) >= whole:
            raise UsageError("No weight may be rounded: there is no type to choose.", hint=allocation.PIN_LESS)

    @property
    def tables(self) -> list[allocation.OptionTable]:
        """Return the alternative tables; types are chosen from one of them."""
        return [self.table]

    @property
    def floor(self) -> int:
        """Return the bytes of the smallest file."""
        return self.overhead + min(sum(ascending[0] for ascending in sizes) for sizes in self._sizes)

    @property
    def ceiling(self) -> int:
        """Return the bytes of a file with the largest type of each weight below its own, about 8 bits."""
        return self.overhead + max(sum(ascending[-2:][0] for ascending in sizes) for sizes in self._sizes)

    @property
    def _sizes(self) -> list[list[list[int]]]:
        """Return, for each table, the bytes of each choice's options, ascending."""
        choices = (table.values() for table in self.tables)
        return [[sorted(option.nbytes for option in options.values()) for options in of_table] for of_table in choices]

    def check(self, budget: int) -> None:
        """Raise UsageError if no file is that small, or if the unquantized model already is."""
        allocation.check_below_whole(budget, self.whole)
        self.choose(budget)

    def choose(self, budget: int) -> allocation.Allocation:
        """Return the types predicted to lose least within so many bytes. Raises UsageError if none fit."""
        if budget not in self._chosen:
            self._chosen[budget] = allocation.allocate_from(self.tables, budget, overhead=self.overhead)
        return self._chosen[budget]

    def learn(self, sensitivity: Sensitivity, texts: tuple[Batches, ...]) -> None:
        """Fill the table with the losses of a sensitivity; keep the texts that GPTQ runs over."""
        self.guidance, self.texts = sensitivity.guidance, texts
        self.table = self.predict_losses(sensitivity)
        self._chosen.clear()

    def mix(self, types: Mapping[str, str]) -> str:
        """Return the shares of the most frequent types: ``62.1 % q4_k, 20.0 % q3_k, 9.1 % q6_k, ...``."""
        numel = Counter[str]()
        for name, kind in types.items():
            numel[kind] += self.numel[name]
        parts = [f"{share(number / numel.total())} {kind}" for kind, number in numel.most_common(_NAMED)]
        return ", ".join([*parts, *(["..."] if len(numel) > _NAMED else [])])

    @abstractmethod
    def predict_losses(self, sensitivity: Sensitivity) -> allocation.OptionTable:
        """Return the bytes and the predicted loss of each weight by type."""

    def list_decisive(self) -> list[Any]:
        """Return what decides the bytes of a file besides its types."""
        return []

    @abstractmethod
    def make(self, chosen: allocation.Allocation, place: Path, begin: Begin) -> None:
        """Write a file or folder, whole or not at all."""

    @abstractmethod
    def recipe(self, chosen: allocation.Allocation) -> str:
        """Return a recipe with the same types, as TOML; `export` rounds a GGUF file by it to nearest."""


class GgufFormat(FileFormat):
    """GGUF files. `job` is an export whose float file is written; `tensors` and `overhead` describe that file."""

    name, file_name = GGUF, "model.gguf"

    def __init__(self, job: ExportPlan, tensors: Tensors, overhead: int, target: allocation.SizeTarget) -> None:
        from compressknow.study.measuring import GgufRoundings

        self.roundings = GgufRoundings()
        self._job, self._tensors, self._target, self.floats = job, tensors, target, job.floats
        self.label = f"{name_guide(target.guide)}, rounded by {'GPTQ' if target.rounding == 'gptq' else 'llama.cpp'}"
        table = self.predict_losses(None)
        whole = overhead + sum(align(tensors.tensors[name].nbytes) for name in table)
        super().__init__(table, overhead, whole, {name: tensors.tensors[name].numel for name in table})

    def predict_losses(self, sensitivity: Sensitivity | None) -> allocation.OptionTable:
        return allocation.build_table(sensitivity, self._tensors, self._target)

    def list_decisive(self) -> list[Any]:
        # Guide and rules are only in its record.
        target, guidance = self._target, self.guidance
        converter = read_version(self._job.converter)
        return [target.rounding, target.guide, target.must, guidance.fingerprint, guidance.text, converter]

    def make(self, chosen: allocation.Allocation, place: Path, begin: Begin) -> None:
        from compressknow.gguf.export import write

        # The budget is not part of the file: two budgets may give the same one.
        target = replace(self._target, size=chosen.nbytes)
        fitted = allocation.describe_fit(chosen, chosen.nbytes, target, self.guidance)
        fit = SizeFit(target.label, chosen.nbytes, lambda *_: fitted, target.rounding, self.texts)
        write(replace(self._job, fit=fit), place, begin=begin)

    def recipe(self, chosen: allocation.Allocation) -> str:
        from compressknow.gguf.export import find_main_type

        values: dict[str, Any] = {"type": find_main_type(chosen.types, self._tensors)}
        if text := self._job.choice.calibration:
            values["calibration"] = asdict(text)
        table = "\n".join(
            f"{json.dumps(pattern)} = {json.dumps(kind)}"
            for kind, patterns in build_rules(chosen.types).items()
            for pattern in patterns
        )
        note = "# The types alone: `export --recipe` rounds to nearest, and the winner was rounded by GPTQ.\n"
        head = note if self._target.rounding == "gptq" else ""
        return f"{head}[{EXPORT}]\n{to_toml({**values, 'steps': []})}\n\n[{EXPORT}.types]\n{table}"


class CheckpointFormat(FileFormat):
    """Checkpoints whose blocks have weights in 8 bits, 4 bits or unquantized. Raises UsageError for a `must` rule that
    matches nothing or names an unknown type, and as planning a conversion does."""

    name, file_name = CHECKPOINT, "model"

    def __init__(self, maker: VariantMaker, request: SearchRequest) -> None:
        from compressknow.compress.sources import Sources
        from compressknow.model.tensors import DTYPE_SIZES
        from compressknow.study.measuring import SchemeRoundings

        self._maker, self._guide = maker, request.guide
        self._calibration = None if request.rounding == "nearest" else request.text
        self.label = f"{name_guide(request.guide)}, rounded {'by GPTQ' if self._calibration else 'to nearest'}"
        structure = maker.structure()
        sources = Sources(maker.checkpoint, maker.tree, structure)
        stored = list(sources.distinct())
        self._weights = {
            weight.module: weight
            for weight in structure.linears
            if SCOPES["blocks"](weight, "quantize") and weight.kind != "experts" and sources.of(weight)
        }
        dtypes = {module: sources.of(weight)[0].dtype for module, weight in self._weights.items()}
        self.roundings = SchemeRoundings(dtypes.values())
        exact = {module: prod(self._weights[module].shape) * DTYPE_SIZES[dtype] for module, dtype in dtypes.items()}
        header = _HEADER * (len(stored) + _PARTS * len(exact)) + sum(len(each.name) for each in stored)
        header += sum((_PARTS + 1) * len(module) for module in exact)
        table, rows = {}, {}
        for module, weight in self._weights.items():
            shape = weight.shape[::-1] if weight.transposed else weight.shape
            rows[module] = shape[-1]
            table[module] = {NONE: allocation.TypeOption(exact[module], 0.0)}
            for kind in self.roundings.list_legal(shape):
                table[module][kind] = allocation.TypeOption(self.roundings.nbytes(kind, shape) + _SHAPE, 0.0)
        self._options = allocation.pin_types(table, _resolve_modules(self._weights, request.must), rows)
        self._units = allocation.group_fused(self._weights)
        whole = sum(each.nbytes for each in stored) + header
        super().__init__(
            allocation.join_options(self._options, self._units),
            whole - sum(exact.values()),
            whole,
            {module: prod(weight.shape) for module, weight in self._weights.items()},
        )
        self.roundings.has_one_type = not self._takes_several()
        # Fail before anything is measured.
        try:
            maker.plan(self._build_recipe(self.choose(self.floor).types))
        except UnsupportedError as error:
            raise UnsupportedError(error.what, error.why, _CANNOT_QUANTIZE) from None

    def _takes_several(self) -> bool:
        """Tell whether transformers loads several schemes at once; it does not if it unpacks them on loading (T5)."""
        several = [name for name, options in self.table.items() if len(options) > 2]
        if len(several) < 2:
            return True
        types = dict.fromkeys(self._units[several[0]], list(self.table[several[0]])[-1])
        types |= dict.fromkeys(self._units[several[-1]], list(self.table[several[-1]])[1])
        try:
            self._maker.plan(self._build_recipe(types))
        except UnsupportedError:
            return False
        return True

    @property
    def tables(self) -> list[allocation.OptionTable]:
        if not self.roundings.has_one_type:
            return [self.table]
        return allocation.split_by_type(self.table, reversed(self.roundings.types))

    def predict_losses(self, sensitivity: Sensitivity) -> allocation.OptionTable:
        rows = sensitivity.kl(self._guide)
        table = {}
        for module, options in self._options.items():
            # A weight that was not measured stays as it is.
            losses = {NONE: 0.0, **rows.get(self._weights[module].parameter, {})}
            known = {kind: each._replace(loss=losses[kind]) for kind, each in options.items() if kind in losses}
            table[module] = known or options
        return allocation.join_options(table, self._units)

    def choose(self, budget: int) -> allocation.Allocation:
        chosen = super().choose(budget)
        types = {module: chosen.types[name] for name, modules in self._units.items() for module in modules}
        return replace(chosen, types={module: types[module] for module in self._options})

    def make(self, chosen: allocation.Allocation, place: Path, begin: Begin) -> None:
        from compressknow.pages.model_card import make_model_card

        self._maker.write(self._build_recipe(chosen.types), place, make_model_card, begin)

    def list_decisive(self) -> list[Any]:
        return [asdict(self._calibration), self.guidance.text] if self._calibration else []

    def recipe(self, chosen: allocation.Allocation) -> str:
        return to_toml(self._build_recipe(chosen.types).to_dict())

    def _build_recipe(self, types: Mapping[str, str]) -> Recipe:
        """Return the recipe that gives each module its type."""
        from compressknow.study.measuring import parse_scheme

        schemes = {kind: parse_scheme(kind) for kind in types.values() if kind != NONE}
        rounding = "gptq" if self._calibration else "nearest"
        steps = (
            Quantize(schemes[kind].name, Where(("blocks",), tuple(patterns)), schemes[kind].values(), rounding)
            for kind, patterns in build_rules(types).items()
            if kind in schemes
        )
        return Recipe(tuple(steps), calibration=self._calibration)


def _resolve_modules(weights: Mapping[str, LinearWeight], must: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the type of each module that a rule matches. Raises UsageError for a rule that matches none."""
    pins: dict[str, str] = {}
    for which, kind in must:
        pattern = None if which in SCOPES else compile_pattern("--must", which)
        modules = [
            module
            for module, weight in weights.items()
            if (pattern.search(module) if pattern else SCOPES[which](weight, "quantize"))
        ]
        if not modules:
            raise UsageError(
                f"--must: {which!r} is not a scope, and matches no module of the blocks.",
                hint=f"{suggest_word(which, SCOPES)}Choose from {', '.join(SCOPES)}, or give a regular expression.",
            )
        pins |= dict.fromkeys(modules, kind)
    return pins


def build_rules(types: Mapping[str, str]) -> dict[str, list[str]]:
    """Return regular expressions by type: names that differ in the number of their block share one.

    >>> build_rules({"a.0.x": "q4_k", "a.1.x": "q4_k", "a.0.y": "q4_k", "a.1.y": "q4_k", "z": "q6_k"})
    {'q6_k': ['^z$'], 'q4_k': ['^a\\\\.(0|1)\\\\.(x|y)$']}
    """
    blocks: dict[tuple[str, str, str], list[str]] = {}
    rules: dict[str, list[str]] = {}
    for name, kind in types.items():
        at = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        if at is None:
            rules.setdefault(kind, []).append(f"^{re.escape(name)}$")
        else:
            blocks.setdefault((kind, at[1], at[3]), []).append(at[2])
    by_blocks: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (kind, before, after), numbers in blocks.items():
        by_blocks.setdefault((kind, before, tuple(sorted(numbers, key=int))), []).append(after[1:])
    for (kind, before, blocks_of), parts in by_blocks.items():
        ends = "|".join(map(re.escape, parts))
        rules.setdefault(kind, []).append(f"^{re.escape(before)}({'|'.join(blocks_of)})\\.({ends})$")
    return rules


def check_size(job: ExportPlan, target: allocation.SizeTarget) -> None:
    """Raise UsageError, before any work, if the size of a GGUF file is far too small or large."""
    is_expert = {name: (own := job.source.linear(name)) and own.is_expert for name in job.tensors}
    shapes = [each.shape for name, each in job.tensors.items() if not is_expert[name]]
    # Rules may give experts fewer bits.
    experts = 0 if target.must else sum(each.tensor.numel for name, each in job.tensors.items() if is_expert[name])
    allocation.check_budget(target.budget(job.numel), shapes, job.exact_bytes, experts)


def is_made(place: Path) -> bool:
    """Tell whether a file or folder was made by a search."""
    return get_record_path(place).is_file() if place.suffix else (place / MANIFEST_NAME).is_file()


def _check_winners_place(place: Path) -> None:
    """Raise OutputError if something that no search wrote is at the winner's path."""
    if os.path.lexists(place) and not is_made(place):
        raise OutputError(
            f"{place} exists already, and is not a winner of a search.",
            hint="Move it away, or choose a new folder for the search.",
        )


@contextmanager
def open_format(
    model: StudyModel, request: SearchRequest, folder: Path, begin: Begin, on_progress: Listener | None = None
) -> Iterator[FileFormat]:
    """Yield the file format of a search; the intermediate file of GGUF files is in `folder` meanwhile. Raises, before
    that is written, OutputError if something that no search wrote is at the winner's path, UsageError for a size that
    is far too small or large, and CompressknowError if the model cannot be written in this format."""
    from compressknow.engine.language_model import find_family

    form = request.to or (GGUF if find_family(model.maker.tree) == "causal" else CHECKPOINT)
    _check_winners_place(folder / (CheckpointFormat if form == CHECKPOINT else GgufFormat).file_name)
    if form == CHECKPOINT:
        yield CheckpointFormat(model.maker, request)
        return
    require(*NEEDED)
    from compressknow.compress.sources import check_usable
    from compressknow.gguf.export import prepare_export, write_floats

    # For a share to keep, the size is chosen later.
    target = allocation.SizeTarget(request.size or 1, None, request.must, request.guide, request.rounding or "gptq")
    # llama.cpp's rounding uses an importance matrix of the text, GPTQ does not.
    choice = TypeChoice(calibration=request.text if target.rounding == "nearest" else None)
    (source, revision), trusted = model.source, model.original.settings.trust_remote_code
    job = prepare_export(source, choice, revision=revision, trust_remote_code=trusted, on_progress=on_progress)
    check_usable(job.checkpoint)
    if request.size is not None:
        check_size(job, target)
    with make_scratch(folder / "floats") as place:
        floats = write_floats(job, place, job.exact, begin=begin)
        tensors = describe_tensors(read_gguf(floats), job.source)
        yield GgufFormat(replace(job, floats=floats), tensors, job.measure_overhead(tensors), target)
