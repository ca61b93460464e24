"""Measure a sensitivity: how much, to first order, rounding each weight changes scores, and the resulting KL.

For every weight W and type, D is the rounded W minus W. The change of a score is the sum of g . D x over the tokens,
where x is the input that W multiplies and g the gradient of the score at the product: one backward pass serves all
weights and types. With changes dz of the log-probabilities of a fact's best candidates, and p their softmax, the KL
divergence of their distribution is 1/2 dz' (diag p - p p') dz, to second order. The risk of a fact is the probability
that its margin, the score of its object minus that of the best other candidate, changes sign, if the change is normal
with the measured mean square. For text, see `compressknow.study.guides`.

Means over text are trimmed: at the start of a piece, models keep attention sinks, whose activations are hundreds of
times larger than usual. To first order, rounding there changes everything; in truth it changes little, because what
reads a sink is normalized. So for each weight and type, the tenth of the pieces that change most is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from compressknow.base.progress import Advance, ignore_advance
from compressknow.base.reading import group_by
from compressknow.comparison.checkpoints import name_in_block
from compressknow.compress.calibrate.backward import FACTORS, Product, ScoredBatch, compute_gradients
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.compress.schemes import GROUP_SIZES, SCHEMES, Scheme, round_to_nearest
from compressknow.compress.sources import Sources
from compressknow.gguf import grids
from compressknow.model.groups import read_structure
from compressknow.model.structure import LinearWeight, Structure
from compressknow.model.tensors import DTYPE_SIZES, OpenFiles
from compressknow.study.sensitivity import Rounding, TensorSensitivity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compressknow.model.checkpoint import Checkpoint


# Types that ggml rounds to quickly, and whose blocks of 32 fit almost all rows: fine and coarse ones.
_QUICK = ("q8_0", "q5_0", "q4_0")


class Roundings(ABC):
    """Candidate types, the largest first; weights are [out, in]."""

    form: ClassVar[Literal["gguf", "checkpoint"]]
    types: ClassVar[tuple[str, ...]]
    has_one_type: bool = False  # see `Guidance`

    @abstractmethod
    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        """Return the types that fit a weight's rows."""

    def list_measured(self, shape: Sequence[int]) -> tuple[str, ...]:
        """Return the types with which a weight's sensitivity is measured."""
        return self.list_legal(shape)

    @abstractmethod
    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        """Return the bytes of a weight, including its scales."""

    @abstractmethod
    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        """Return a weight rounded to a type, as float32; `importance` [in] has the mean squares of its inputs."""


class GgufRoundings(Roundings):
    """Tensor types by llama.cpp's names."""

    form, types = "gguf", grids.CANDIDATES

    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        return grids.list_legal_types(shape[-1], self.types)

    def list_measured(self, shape: Sequence[int]) -> tuple[str, ...]:
        return tuple(name for name in self.list_legal(shape) if name in _QUICK)

    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        return grids.get_nbytes(name, shape)

    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        matrix = None if importance is None else importance.numpy()
        return torch.from_numpy(grids.roundtrip(weight.numpy(), name, matrix))


class SchemeRoundings(Roundings):
    """Schemes that do not quantize activations; ``int4/64`` is int4 in groups of 64."""

    form = "checkpoint"
    types = ("int8-weights", *(f"int4/{size}" for size in GROUP_SIZES))

    def __init__(self, dtypes: Iterable[str] = ()) -> None:
        """Take the stored dtypes of the weights; scales are counted in the widest of them."""
        self._dtype = max(dtypes, key=DTYPE_SIZES.__getitem__, default="BF16")

    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        return tuple(name for name in self.types if parse_scheme(name).misfit(tuple(shape)) is None)

    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        # I64 tensors hold the shapes of packed ones.
        stored = [each for each in parse_scheme(name).stored(tuple(shape), self._dtype) if each.dtype != "I64"]
        return sum(prod(each.shape) * DTYPE_SIZES[each.dtype] for each in stored)

    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG002
        scheme = parse_scheme(name)
        per = scheme.scale_per
        groups = weight.reshape(len(weight), -1, per) if isinstance(per, int) else weight[:, None]
        scales = scheme.scales(groups.abs().amax(2))
        return scheme.dequantize(round_to_nearest(weight, scales, scheme), scales)


def parse_scheme(name: str) -> Scheme:
    """Return the scheme of a checkpoint type, such as ``int4/64``."""
    kind, _, size = name.partition("/")
    return SCHEMES[kind].with_values({"group_size": int(size)}) if size else SCHEMES[kind]


BAND = 2048  # rows of a weight that are rounded and multiplied at a time, because a head has as many as the vocabulary
# Rows of a weight whose errors are measured: this many of the most important ones, and one in `STRIDE` of the others.
FIRST_ROWS, STRIDE = 64, 16
TRIMMED = 0.1  # share of the pieces of a text that a mean leaves out: those that change most
FEWEST_OF_A_DOMAIN = 5  # minimum number of facts for the mean of a domain


@dataclass(frozen=True)
class FactBatches:
    """Facts in batches, and the candidates of their scores."""

    batches: tuple[ScoredBatch, ...]
    owners: tuple[torch.Tensor, ...]  # by batch, the candidate number of each score, int64 [rows, directions]
    facts: torch.Tensor  # the fact number of each candidate, int64 [candidates], ascending


@dataclass(frozen=True)
class ScoreChanges:
    """Changes of scores, by weight and type."""

    weights: dict[str, TensorSensitivity]  # by name, still without types and domains
    scores: torch.Tensor  # of all candidates of facts, [candidates]
    owners: torch.Tensor  # fact numbers of the candidates; a fact's object is its first candidate
    facts: dict[tuple[str, str], torch.Tensor]  # changes of these scores, by name and measured type
    text: dict[tuple[str, str], torch.Tensor]  # changes of the scores of text, [rows, draws], likewise
    errors: dict[tuple[str, str], float]  # squared errors by name and type, in a unit that differs by weight
    importance: dict[str, torch.Tensor]  # by name, the importance used for rounding, [in]

    def build_rows(self, roundings: Roundings, domains: Sequence[str] = ()) -> tuple[TensorSensitivity, ...]:
        """Return the sensitivity of each weight; `domains` has the domain of each fact."""
        rows = []
        for name, weight in self.weights.items():
            measured = roundings.list_measured(weight.shape)
            facts, per_token = self._compute_per_error(name, measured), self._compute_text_per_error(name, measured)
            types = {}
            for type in roundings.list_legal(weight.shape):
                error = self.errors[name, type]
                text = None if per_token is None else per_token * error
                kl = risk = None
                if facts is not None:
                    kl = float(facts[0].mean()) * error
                    # The probability that a margin changes sign, if its change has this mean square.
                    spread = (facts[1] * error).sqrt().clamp_min(1e-12)
                    risk = float(torch.special.ndtr(-self.margins[2] / spread).mean())
                types[type] = Rounding(roundings.nbytes(type, weight.shape), kl, text, risk)
            by_domain = _compare_domains(facts[0], domains) if facts is not None else {}
            rows.append(replace(weight, by_type=types, by_domain=by_domain))
        return tuple(rows)

    def _compute_per_error(self, name: str, measured: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return two losses of each fact per squared error of a weight, float64 [facts], averaged over the measured
        types, because the effect of a single one is partly luck: KL in nats, and the squared change of its margin. None
        if there are no facts."""
        if (name, measured[0]) not in self.facts:
            return None
        types = [type for type in measured if self.errors[name, type] > 0] or measured[:1]
        errors = torch.tensor([self.errors[name, type] or 1.0 for type in types], dtype=torch.float64)
        changes = torch.stack([self.facts[name, type] for type in types], 1).double()
        objects, others, _ = self.margins
        return (
            (compute_divergence(self.scores, changes, self.owners) / errors).mean(1),
            ((changes[objects] - changes[others]).square() / errors).mean(1),
        )

    @cached_property
    def margins(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the candidate numbers of each fact's object and best other candidate, and the gap of their scores."""
        objects = torch.searchsorted(self.owners, torch.arange(int(self.owners[-1]) + 1))
        others = self.scores.double().index_fill(0, objects, -torch.inf)
        order = others.argsort(descending=True)
        best = order[self.owners[order].argsort(stable=True)][objects]
        return objects, best, self.scores.double()[objects] - others[best]

    def _compute_text_per_error(self, name: str, measured: Sequence[str]) -> float | None:
        """Return the KL of text, in nats per token, per squared error of a weight: a trimmed mean over rows, averaged
        over the measured types; None without text."""
        if (name, measured[0]) not in self.text:
            return None
        ratios = []
        for type in measured:
            if (error := self.errors[name, type]) > 0:
                rows = self.text[name, type].double().square().mean(1).sort().values / 2
                ratios.append(float(rows[: max(1, round(len(rows) * (1 - TRIMMED)))].mean()) / error)
        return sum(ratios) / len(ratios) if ratios else 0.0


def _compare_domains(divergences: torch.Tensor, domains: Sequence[str]) -> dict[str, float]:
    """Return the mean of each domain's facts relative to that of all facts, for domains with enough facts."""
    counts, whole = Counter(domains), float(divergences.mean())
    if not whole:
        return {}
    return {
        domain: float(divergences[torch.tensor([each == domain for each in domains])].mean()) / whole
        for domain, known in counts.items()
        if known >= FEWEST_OF_A_DOMAIN
    }


def compute_divergence(scores: torch.Tensor, changes: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence that changes of log-scores cause in each fact's distribution over its candidates, to
    second order: float64 [facts], or [facts, types] for `changes` [candidates, types]."""
    count = int(owners.max()) + 1
    scores, changes = scores.double(), changes.double()

    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, *values.shape[1:], dtype=torch.float64).index_add_(0, owners, values)

    top = torch.full((count,), -torch.inf, dtype=torch.float64).scatter_reduce(0, owners, scores, "amax")
    weights = (scores - top[owners]).exp()
    p = (weights / summed(weights)[owners]).reshape(-1, *[1] * (changes.dim() - 1))
    return (summed(p * changes.square()) - summed(p * changes).square()) / 2


def measure(
    checkpoint: Checkpoint,
    tree: PreTrainedModel,
    roundings: Roundings,
    facts: FactBatches | None,
    texts: Sequence[ScoredBatch] = (),
    advance: Advance = ignore_advance,
) -> ScoreChanges:
    """Measure all Linear weights of a model, and for GGUF files the embedding, in one forward and one backward pass.
    The importance for rounding is the mean squares of a weight's inputs from facts and from text, each normalized."""
    structure = read_structure(tree)
    sources = Sources(checkpoint, tree, structure)
    # Experts are left out: their inputs do not show which rows the tokens belong to.
    weights = [weight for weight in structure.linears if weight.group != "vision" and not weight.is_expert]
    facts = facts or FactBatches((), (), torch.empty(0, dtype=torch.long))
    with OpenFiles() as files:
        streamed = StreamedModel(tree, sources, files)
        measurer = _Measurer(streamed, structure, weights, roundings, facts, texts, advance)
        scores = compute_gradients(streamed, weights, [*facts.batches, *texts], measurer.visit)
    for batch, owners in zip(scores, facts.owners, strict=False):
        measurer.changes.scores.index_add_(0, owners.flatten(), batch.flatten())
    return measurer.changes


class _Measurer:
    """Visitor of blocks that collects in `changes` the effects of rounding their weights."""

    def __init__(
        self,
        streamed: StreamedModel,
        structure: Structure,
        weights: Sequence[LinearWeight],
        roundings: Roundings,
        facts: FactBatches,
        texts: Sequence[ScoredBatch],
        advance: Advance,
    ) -> None:
        self._streamed, self._structure, self._roundings, self._advance = streamed, structure, roundings, advance
        self._linears = {weight.parameter: weight for weight in weights}
        self._fact_batches, self._texts = facts, texts
        self._starts = [sum(len(text.positions) for text in texts[:number]) for number in range(len(texts) + 1)]
        self.changes = ScoreChanges({}, torch.zeros(len(facts.facts)), facts.facts, {}, {}, {}, {})
        self._visited = set[str]()

    def visit(self, module: str, products: Mapping[str, Sequence[Product]]) -> None:
        """Add the effects of rounding a module's weights; see `compressknow.compress.calibrate.backward.Visit`."""
        for parameter, of_weight in products.items():
            if not of_weight:
                continue
            weight = self._streamed.model.get_parameter(parameter).detach()
            if of_weight[0].inputs.is_floating_point():
                self._add_linear(self._linears[parameter], weight, of_weight)
            elif self._roundings.form == "gguf" and self._roundings.list_legal(weight.shape):
                scale = getattr(self._streamed.model.get_submodule(module), "embed_scale", 1.0)
                self._add_lookups(parameter, weight, of_weight, float(scale))
        # Layers outside the blocks are not counted, and blocks that share their weights (ALBERT) are one. After the
        # final layer, which comes first and takes as long as several blocks, none is done.
        if module in self._streamed.blocks:
            self._visited.add(module)
        self._advance(len(self._visited), len(self._streamed.blocks))

    def _add_linear(self, linear: LinearWeight, weight: torch.Tensor, products: Sequence[Product]) -> None:
        if self._roundings.form == "checkpoint" and linear.parameter in self._structure.tied:
            # Rounding a head that is tied to the embedding would untie it.
            return
        weight = weight.T.contiguous() if linear.transposed else weight
        if not self._roundings.list_legal(weight.shape):
            return
        name = self._structure.tied.get(linear.parameter, linear.parameter)
        self._add_weight(name, weight, linear.group or "other", linear.layer, linear.stack)
        importance = self.changes.importance[name] = self._sum_halves(
            products, [each.inputs.flatten(0, 1).float().square().sum(0) for each in products]
        )
        # Weight inputs by the gradients at their tokens, because the large inputs of attention sinks change nothing.
        by_row, by_column = [], []
        for product in products:
            # One direction at a time: for a head, all in float32 would double the memory.
            first, *others = product.gradients.unbind(1)
            squares = first.flatten(0, 1).float().square_()
            for gradients in others:
                flat = gradients.flatten(0, 1).float()
                squares.addcmul_(flat, flat)
            by_row.append(squares.sum(0))
            by_column.append(squares.sum(1) @ product.inputs.flatten(0, 1).float().square())
        of_rows, of_columns = self._sum_halves(products, by_row), self._sum_halves(products, by_column)
        self._add_errors(name, weight, importance, of_rows, of_columns)
        types = self._roundings.list_measured(weight.shape)
        inputs = [each.inputs.to(FACTORS) for each in products]
        for start in range(0, len(weight), BAND):
            band = weight[start : start + BAND]
            rounded = torch.stack([self._roundings.roundtrip(band, type, importance) for type in types], 1)
            # Types are the fastest dimension, so that the product for all types is laid out as the next one reads it.
            change = (rounded - band[:, None]).to(FACTORS).flatten(0, 1)
            for product, x in zip(products, inputs, strict=True):
                gradients = product.gradients[..., start : start + BAND]
                self._add_changes(name, types, product.batch, _contract(gradients, x @ change.T, len(types)))

    def _add_weight(self, name: str, weight: torch.Tensor, group: str, layer: int | None, stack: str | None) -> None:
        row = TensorSensitivity(name, tuple(weight.shape), group, layer, {}, stack, name_in_block(name))
        self.changes.weights.setdefault(name, row)

    def _add_errors(
        self,
        name: str,
        weight: torch.Tensor,
        importance: torch.Tensor | None,
        of_rows: torch.Tensor,
        of_columns: torch.Tensor,
    ) -> None:
        """Add squared errors by type, weighted by row [out] and column [in], of the important rows and some more."""
        order = of_rows.argsort(descending=True, stable=True)
        selected = torch.cat([order[:FIRST_ROWS], order[FIRST_ROWS::STRIDE]])
        rows = weight[selected]
        for type in self._roundings.list_legal(weight.shape):
            squares = (self._roundings.roundtrip(rows, type, importance) - rows).square()
            self.changes.errors[name, type] = float(of_rows[selected] @ squares @ of_columns)

    def _add_lookups(self, parameter: str, weight: torch.Tensor, products: Sequence[Product], scale: float) -> None:
        name = self._structure.tied.get(parameter, parameter)
        self._add_weight(name, weight, "embedding", None, None)
        tokens, places = torch.unique(torch.cat([each.inputs.flatten() for each in products]), return_inverse=True)
        rows, importance = weight[tokens], self.changes.importance.get(name)
        if importance is None:
            self._add_errors(name, rows, None, torch.ones(len(rows)), torch.ones(rows.shape[1]))
        types = self._roundings.list_measured(weight.shape)
        rounded = torch.stack([self._roundings.roundtrip(rows, type, importance) for type in types], 2)
        change = ((rounded - rows[:, :, None]) * scale).to(FACTORS)
        start = 0
        for product in products:
            own = change[places[start : start + product.inputs.numel()]]
            start += product.inputs.numel()
            of_rows = own.reshape(*product.inputs.shape, -1)
            self._add_changes(name, types, product.batch, _contract(product.gradients, of_rows, len(types)))

    def _sum_halves(self, products: Sequence[Product], values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the normalized sum of a vector per product; facts and text have equal weight."""
        facts = len(self._fact_batches.batches)
        halves = group_by(zip(products, values, strict=True), lambda each: each[0].batch >= facts)
        totals = [torch.stack([value for _, value in half]).sum(0) for half in halves.values()]
        return torch.stack([total / total.mean() for total in totals]).mean(0)

    def _add_changes(self, name: str, types: Sequence[str], batch: int, changes: torch.Tensor) -> None:
        """Add changes of a batch's scores, [rows, directions, types]."""
        for type, of_type in zip(types, changes.unbind(2), strict=True):
            number = batch - len(self._fact_batches.batches)
            if number < 0:
                total = self.changes.facts.setdefault((name, type), torch.zeros(len(self.changes.owners)))
                total.index_add_(0, self._fact_batches.owners[batch].flatten(), of_type.flatten())
                continue
            total = self.changes.text.setdefault((name, type), torch.zeros(self._starts[-1], self._texts[0].directions))
            total[self._starts[number] : self._starts[number + 1]] += of_type


def _contract(gradients: torch.Tensor, products: torch.Tensor, types: int) -> torch.Tensor:
    """Sum [rows, directions, tokens, out] . [rows, tokens, out x types] to float32 [rows, directions, types]."""
    return torch.bmm(gradients.flatten(2).to(products.dtype), products.reshape(len(products), -1, types)).float()
