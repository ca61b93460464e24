"""Steps of a conversion, the layers where each acts, and the text that some of them need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressknow.base.errors import UsageError, suggest_word
from compressknow.base.packages import Registry
from compressknow.compress.parameters import has_options, is_of, make_fields_plain, make_plain, option
from compressknow.compress.pruning import METHODS, Calibrated, PruningMethod, Weights
from compressknow.compress.schemes import SCHEMES, Scheme
from compressknow.model.structure import DEFAULT_SCOPES, MOST_BLOCKS, check_scope_names, compile_patterns, parse_layers

if TYPE_CHECKING:
    import torch

    from compressknow.compress.blocks import Reader
    from compressknow.compress.calibrate.gathering import InputStatistics
    from compressknow.compress.pruning import Mask

# Parameters of every prune step, even if its method has none of them.
SHARED = ("per_layer", "norm", "dim", "seed")
# Ways to round weights to a scheme's grid.
ROUNDINGS = ("nearest", "gptq")
# The paper has only one scheme, of 8 bits, and does not name it.
PAPER_BITS = 8
# Maximum characters of patterns in a name.
_LONGEST = 80
# The paper's words for the scopes (sections 2.2-2.5, figure 8), and ours for those that it does not have.
PAPER_SCOPES = {
    "blocks": "Blocks",
    "attention": "Att",
    "feed-forward": "FF",
    "overall": "Overall",
    "self-attention": "SelfAtt",
    "cross-attention": "CrossAtt",
    "encoder-attention": "EncoderAtt",
    "decoder-attention": "DecoderAtt",
}


@has_options
class Where:
    """Linear weights that a step acts on: a union of scopes, narrowed by module names and block numbers. An item of
    `scope` may name several, separated by commas; a single text stands for a tuple of one, and a number for a block.
    Raises UsageError for what no model can have."""

    scope: tuple[str, ...] = option(
        default=DEFAULT_SCOPES, help="Linear layers, repeatable or with commas; see below.", multiple=True
    )
    include: tuple[str, ...] = option(
        default=(), help="Only modules whose name matches, repeatable.", metavar="REGEX", multiple=True, axis=False
    )
    exclude: tuple[str, ...] = option(
        default=(), help="No modules whose name matches, repeatable.", metavar="REGEX", multiple=True, axis=False
    )
    layers: str | None = option(
        default=None, help="Only these blocks, such as 0-5 or 0-2,11.", kind=int | str, metavar="RANGE"
    )

    def __post_init__(self) -> None:
        for key, what in (("scope", "name"), ("include", "pattern"), ("exclude", "pattern")):
            value = getattr(self, key)
            texts = (value,) if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
            if not all(isinstance(text, str) for text in texts):
                raise UsageError(f"{key} must be a {what}, or a list of {what}s: {value!r}.")
            object.__setattr__(self, key, texts)
        layers = make_plain(self.layers)
        object.__setattr__(self, "layers", str(layers) if is_of(int, layers) else layers)
        scopes = tuple(dict.fromkeys(name.strip() for text in self.scope for name in text.split(",")))
        check_scope_names(scopes)
        compile_patterns("--include", self.include)
        compile_patterns("--exclude", self.exclude)
        if self.layers is not None:
            parse_layers(self.layers)
        object.__setattr__(self, "scope", scopes)

    @property
    def label(self) -> str:
        named = "+".join(PAPER_SCOPES.get(scope, scope) for scope in self.scope)
        narrowed = [f"layers {self.layers}"] if self.layers else []
        for word, patterns in (("include", self.include), ("exclude", self.exclude)):
            if sum(map(len, patterns)) > _LONGEST:
                # Written out, they would make the name too long to read.
                patterns = (f"{len(patterns)} pattern{'s' if len(patterns) > 1 else ''}",)
            narrowed += [f"{word} {pattern}" for pattern in patterns]
        return named + (f"[{', '.join(narrowed)}]" if narrowed else "")


# The scopes of removal steps: blocks and neurons belong to a side of the model, not to a kind of layer.
SIDES = ("encoder", "decoder")


@has_options
class DropBlocks:
    """Step that drops whole transformer blocks, in each stack separately.

    `blocks` is their number (those whose output is most similar to their input on the calibration text are dropped), or
    a string that lists them: ``20-23``, ``0-2,5``, ``7``. The scope of `where` is ``encoder``, ``decoder`` or, by
    default, both.
    """

    blocks: int | str = option(
        name="drop_blocks",
        help="Transformer blocks to leave out: a number, or 20-23.",
        kind=int | str,
        metavar="N|LIST",
        axis=False,
    )
    where: Where = Where()

    def __post_init__(self) -> None:
        make_fields_plain(self)
        if isinstance(self.blocks, str):
            # A huge number would make an endless list.
            last = max(numbers[-1] for numbers in parse_layers(self.blocks).values())
            if last >= MOST_BLOCKS:
                what = f"There is no block {last:,}, which {self.blocks!r} names."
                raise UsageError(what, hint="Write 20-23, 3 or 0-2,5.")
        elif not is_of(int, self.blocks) or self.blocks < 1:
            what = f"{self.blocks!r} is not a number of blocks to drop."
            raise UsageError(what, hint="Give a number such as 4, or blocks: 20-23.")
        _check_sides(self.where, "drop_blocks")

    @property
    def calibrated(self) -> bool:
        """Return whether the calibration text decides which blocks are dropped."""
        return self.named is None

    @property
    def named(self) -> tuple[int, ...] | None:
        """Return the listed blocks, ascending; None if only their number is given."""
        if not isinstance(self.blocks, str):
            return None
        return tuple(sorted({number for numbers in parse_layers(self.blocks).values() for number in numbers}))

    @property
    def label(self) -> str:
        """Name it by the number of dropped blocks: `Drop4`."""
        return f"Drop{self.blocks if self.named is None else len(self.named)}{_name_side(self.where)}"


@has_options
class DropNeurons:
    """Step that drops hidden units of the feed-forward blocks: a share `amount` (0-1, exclusive), the same number in
    each block.

    The number kept is rounded to a multiple of `multiple`, by default the largest power of two up to 128 that divides
    the width at least eight times, so that int4 and kernels can still take columns in groups.
    `where` is as for `DropBlocks`.
    """

    amount: float = option(
        name="drop_neurons",
        help="Share of each feed-forward block's neurons to leave out.",
        kind=float,
        metavar="AMOUNT",
        is_share=True,
        axis=False,
    )
    multiple: int | None = None
    where: Where = Where()
    # The calibration text decides which neurons are dropped.
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        make_fields_plain(self)
        what, hint = "The amount of neurons to drop", "0.2 drops 20 % of the neurons of each feed-forward block."
        _check_amount(self.amount, what, hint)
        if self.multiple is not None and (not is_of(int, self.multiple) or self.multiple < 1):
            what = f"multiple must be a whole number of at least 1: {self.multiple!r}."
            raise UsageError(what, hint="1 is the exact amount.")
        _check_sides(self.where, "drop_neurons")

    @property
    def label(self) -> str:
        """Name it by the dropped share: `DropNeurons 20%`."""
        return f"DropNeurons{_name_side(self.where)} {self.amount * 100:.6g}%"


def _check_sides(where: Where, key: str) -> None:
    if where != Where() and (where != Where(where.scope) or not set(where.scope) <= set(SIDES)):
        raise UsageError(
            f"{key} accepts only the scopes encoder and decoder, and no include, exclude or layers.",
            hint="Prune and quantize in separate steps.",
        )


def _name_side(where: Where) -> str:
    return "" if where == Where() else f"[{'+'.join(where.scope)}]"


@has_options
class Prune:
    """Step that zeroes a share `amount` (0-1, exclusive) of the weights; for `method` see
    `compressknow.compress.pruning`.

    `l1-unstructured` and `random-unstructured` choose single weights, over the whole scope or, with
    `per_layer`, in each tensor separately. The structured methods take whole output channels (`dim` 0) or input
    channels (`dim` 1) of each layer, and of each expert in a fused stack, however its matrix is stored; `ln-structured`
    those of the smallest L`norm`. `seed` is for the random methods. `parameters` are those of other methods, by name.
    Semantics are those of torch.nn.utils.prune.
    """

    amount: float = option(
        name="prune", help="Share of the weights to zero: 0.2, or 20%.", kind=float, metavar="AMOUNT", is_share=True
    )
    method: str = option(
        default=METHODS.first,
        name="prune_method",
        key="method",
        help="Which weights to zero; see below.",
        choices=METHODS,
    )
    where: Where = Where()
    per_layer: bool = False
    norm: float = 1
    dim: int = 0
    seed: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        make_fields_plain(self)
        hint = "0.2 prunes 20 % of the weights; leave pruning out to prune none."
        _check_amount(self.amount, "The pruning amount", hint)
        _check_known("pruning method", self.method, METHODS)
        parameters = dict(self.parameters)
        built_in = {each.name: each for method in METHODS.built_in().values() for each in method.parameters()}
        for each in (built_in[name] for name in SHARED):
            object.__setattr__(self, each.name, each.check(parameters.pop(each.name, getattr(self, each.name))))
        # `chosen` is built from these, and fills in the defaults.
        object.__setattr__(self, "parameters", parameters)
        complete = {name: value for name, value in self.chosen.values().items() if name not in SHARED}
        object.__setattr__(self, "parameters", complete)
        with METHODS.explain_failures(self.method):
            self.chosen.check(self.amount)

    @cached_property
    def chosen(self) -> PruningMethod:
        """Return the method, with its parameters."""
        method = METHODS[self.method]
        names = {each.name for each in method.parameters()}
        shared = {name: getattr(self, name) for name in SHARED if name in names}
        return method.with_values(shared | dict(self.parameters))

    @property
    def calibrated(self) -> bool:
        """Return whether it looks at activations."""
        return isinstance(self.chosen, Calibrated)

    @property
    def is_global(self) -> bool:
        """Return whether all tensors of the scope are pruned together, not each by the same amount."""
        return self.chosen.over_scope

    @property
    def label(self) -> str:
        """Name the method as the paper does: `L1-structured`, `L1-unstructured`."""
        return self.chosen.label


@has_options
class Quantize:
    """Step that stores weights by one of the schemes of `compressknow.compress.schemes`, with its `parameters` by name.

    `rounding` is ``nearest``, or ``gptq`` (Frantar et al. 2022), which rounds column by column and lets later columns
    compensate for the error. `smooth` (0-1, for schemes that round activations by token) is the strength with which
    outliers of activations are moved into the weights (Xiao et al. 2023, alpha).
    """

    scheme: str = option(
        default=SCHEMES.first,
        option_default=None,
        name="quantize",
        help="How to store the weights; see below.",
        choices=SCHEMES,
        metavar="SCHEME",
    )
    where: Where = Where()
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)
    rounding: str = option(default=ROUNDINGS[0], help="nearest, or gptq.", choices=ROUNDINGS)
    smooth: float | None = option(
        default=None, help="Move outliers of activations into weights: 0.5.", kind=float, metavar="ALPHA", is_share=True
    )

    def __post_init__(self) -> None:
        make_fields_plain(self)
        _check_known("scheme", self.scheme, SCHEMES)
        object.__setattr__(self, "parameters", self.chosen.values())
        _check_known("rounding", self.rounding, ROUNDINGS)
        if self.rounding != "nearest" and self.chosen.rounds == "batch":
            raise UsageError(
                f"{self.scheme} can only be rounded to nearest.",
                hint="It reproduces the paper; use int8, int8-weights or int4 with gptq.",
            )
        if self.smooth is None:
            return
        if not is_of(float, self.smooth) or not 0 < self.smooth <= 1:
            raise UsageError(
                f"smooth must be a number greater than 0 and at most 1: {self.smooth!r}.", hint="0.5 is usual."
            )
        if self.chosen.rounds != "token":
            raise UsageError(
                f"{self.scheme} has nothing to smooth: it rounds no activations by token.",
                hint="Use it with int8 or fp8.",
            )

    @property
    def calibrated(self) -> bool:
        """Return whether it looks at activations."""
        return self.rounding != "nearest" or self.smooth is not None

    @cached_property
    def chosen(self) -> Scheme:
        """Return the scheme, with its parameters."""
        return SCHEMES[self.scheme].with_values(self.parameters)

    @property
    def label(self) -> str:
        """Name it as the paper does, with what differs from the defaults; a scheme of 8 bits is not named."""
        return " ".join(["GQ", *([self.scheme] if self.is_named else []), *self.further])

    @property
    def is_named(self) -> bool:
        """Tell whether the setup names the scheme."""
        return self.chosen.bits != PAPER_BITS

    @property
    def further(self) -> list[str]:
        """Describe what else differs from the defaults."""
        rounding = [] if self.rounding == ROUNDINGS[0] else [self.rounding]
        return [*self.chosen.describe_changed(), *rounding, *([f"smooth {self.smooth:g}"] if self.smooth else [])]


# Sources of calibration text: the model itself, a file, or a data set.
Kind = Literal["self", "file", "hf"]
SELF, HUB = "self", "hf:"
FORMS = "Give self (the model's own samples), FILE.txt, FILE.jsonl or hf:DATASET."


@has_options
class Calibration:
    """Text that the model runs over, for steps that look at activations.

    `text` is ``self`` (the model's own samples), the path of a .txt or .jsonl file, or ``hf:DATASET``; `tokens` is how
    many of its tokens are used. `seed` is for the samples, and for the tokens that are masked.
    """

    text: str = option(
        default=SELF,
        option_default=None,
        name="calibration",
        help="self (the model's own samples; default), FILE.txt, FILE.jsonl or hf:DATASET.",
    )
    tokens: int = option(
        default=32_768,
        option_default=None,
        name="calibration_tokens",
        help="How many tokens of it.  [default: 32768]",
        kind=int,
        minimum=1,
    )
    seed: int = 0

    @property
    def kind(self) -> Kind:
        """Return the kind of text, judged only by its name. Raises UsageError if there is no such kind."""
        if self.text == SELF:
            return "self"
        if isinstance(self.text, str) and self.text.startswith(HUB) and self.text != HUB:
            return "hf"
        if isinstance(self.text, str) and Path(self.text).suffix.lower() in (".txt", ".jsonl"):
            return "file"
        raise UsageError(f"A calibration text cannot be {self.text!r}.", hint=FORMS)

    @property
    def work(self) -> Literal["sample", "text"]:
        """Name the stage that produces the text: the model writes it, or it is read."""
        return "sample" if self.kind == "self" else "text"

    def __post_init__(self) -> None:
        make_fields_plain(self)
        self.kind  # noqa: B018  # raises for an invalid text
        for name, minimum in (("tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if not is_of(int, value) or value < minimum:
                raise UsageError(f"calibration: {name} must be a whole number of at least {minimum}: {value!r}.")


Step = DropBlocks | DropNeurons | Prune | Quantize


def _check_known(kind: str, name: Any, known: Registry[Any] | Sequence[str]) -> None:
    if name not in known:
        is_open = isinstance(known, Registry)
        # A recipe may come from where more packages are installed: int6 is not a typo for int8.
        suggestion = suggest_word(str(name), known, cutoff=0.8 if is_open else 0.6)
        install = ", or install the package that adds it" if is_open else ""
        raise UsageError(f"Unknown {kind} {name!r}.", hint=f"{suggestion}Choose from {', '.join(known)}{install}.")


def _check_amount(amount: Any, subject: str, hint: str) -> None:
    """Raise UsageError if an amount is not between 0 and 1; suggest a percentage if it may have been meant as one."""
    if not is_of(float, amount) or not 0 < amount < 1:
        is_percent = is_of(float, amount) and 1 < amount < 100
        suggestion = f"Did you mean {amount / 100:g}, which is {amount:g} %? " if is_percent else ""
        raise UsageError(
            f"{subject} must be a number greater than 0 and less than 1: {amount!r}.", hint=suggestion + hint
        )


def count_pruned(step: Prune, weights: Sequence[Weights]) -> tuple[list[int] | None, int]:
    """Count the weights that a step zeroes, from shapes alone: per tensor (None if all are chosen together), and
    total."""
    with METHODS.explain_failures(step.method):
        counts = step.chosen.count_all(weights, step.amount)
    return (None, counts) if isinstance(counts, int) else (counts, sum(counts))


def choose_masks(reader: Reader, step: Prune, weights: Sequence[Weights]) -> list[Mask]:
    """Choose what a step prunes from the weights alone. Raises CheckpointError for a tensor with NaN or infinity,
    CompressknowError if a method of another package fails."""
    with METHODS.explain_failures(step.method):
        masks = step.chosen.choose(reader, weights, step.amount)
        if len(masks) != len(weights):
            raise ValueError(f"it gives {len(masks)} masks for {len(weights)} tensors")
    return list(masks)


def prune_matrix(
    step: Prune, weight: torch.Tensor, inputs: InputStatistics
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply a step's method to one matrix, float32 [out, in]: see `Calibrated.prune`. Raises CompressknowError if a
    method of another package fails or returns other shapes."""
    method = step.chosen
    assert isinstance(method, Calibrated)
    with METHODS.explain_failures(step.method):
        mask, values = method.prune(weight, inputs, step.amount)
        shapes = [tuple(result.shape) for result in (mask, values) if result is not None]
        if any(shape != tuple(weight.shape) for shape in shapes):
            raise ValueError(f"it gives {list(shapes[-1])} for the weight of {inputs.name}, {list(weight.shape)}")
        if str(mask.dtype) != "torch.bool" or not (values is None or values.is_floating_point()):
            raise TypeError(f"its mask for {inputs.name} is not boolean, or its values are not floats")
    return mask, values
