"""Measure a sensitivity: to first order, what rounding each weight alone changes of scores, and what KL that makes.

Of every weight W and type, D is what rounding takes W to, less W. The change of a score is the sum of g . D x over the
tokens, where x is what W is multiplied with and g the gradient of the score at the product: one backward pass for all
weights and types. With the changes dz of the log-probabilities of a fact's best candidates, p their softmax, the KL
divergence of their distribution is 1/2 dz' (diag p - p p') dz, to second order. A fact is at risk by the probability
that its margin, the score of its object less that of the best other candidate, changes its sign, where the change is
normal with the mean square that was measured. For text see `compressknow.study.guides`.

Means over text are robust: where a piece begins, models keep attention sinks with activations of hundreds of times the
usual size. To first order rounding there changes everything, in truth little, for what reads a sink is normalized. So
of each weight and type the tenth of the pieces that it changes most is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from compressknow.base.progress import Advance, ignore_advance
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


# Types that ggml rounds to at once, and whose blocks of 32 fit almost all rows: fine and coarse ones.
_AT_ONCE = ("q8_0", "q5_0", "q4_0")


class Roundings(ABC):
    """Candidate types, the largest first; weights are [out, in]."""

    form: ClassVar[Literal["gguf", "checkpoint"]]
    types: ClassVar[tuple[str, ...]]

    @abstractmethod
    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        """Return the types that a weight's rows fit."""

    def list_measured(self, shape: Sequence[int]) -> tuple[str, ...]:
        """Return the types by which a weight's sensitivity is measured."""
        return self.list_legal(shape)

    @abstractmethod
    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        """Return the bytes that a weight takes, its scales included."""

    @abstractmethod
    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        """Return a weight rounded to a type, float32; `importance` [in] has the mean squares of its inputs."""


class GgufRoundings(Roundings):
    """Types of tensors, by llama.cpp's names."""

    form, types = "gguf", grids.CANDIDATES

    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        return grids.list_legal_types(shape[-1], self.types)

    def list_measured(self, shape: Sequence[int]) -> tuple[str, ...]:
        own = self.list_legal(shape)
        return tuple(name for name in own if name in _AT_ONCE) or own

    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        return grids.get_nbytes(name, shape)

    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:
        matrix = None if importance is None else importance.numpy()
        return torch.from_numpy(grids.roundtrip(weight.numpy(), name, matrix))


class SchemeRoundings(Roundings):
    """Schemes that leave activations as they are; ``int4/64`` is int4 in groups of 64."""

    form = "checkpoint"
    types = ("int8-weights", *(f"int4/{size}" for size in GROUP_SIZES))

    def __init__(self, dtype: str = "BF16") -> None:
        """Scales are stored in the `dtype` of the weights."""
        self._dtype = dtype

    def list_legal(self, shape: Sequence[int]) -> tuple[str, ...]:
        return tuple(name for name in self.types if parse_scheme(name).misfit(tuple(shape)) is None)

    def nbytes(self, name: str, shape: Sequence[int]) -> int:
        # Shapes of what is packed are I64.
        stored = [each for each in parse_scheme(name).stored(tuple(shape), self._dtype) if each.dtype != "I64"]
        return sum(prod(each.shape) * DTYPE_SIZES[each.dtype] for each in stored)

    def roundtrip(self, weight: torch.Tensor, name: str, importance: torch.Tensor | None) -> torch.Tensor:  # noqa: ARG002
        scheme = parse_scheme(name)
        per = scheme.scale_per
        groups = weight.reshape(len(weight), -1, per) if isinstance(per, int) else weight[:, None]
        scales = scheme.scales(groups.abs().amax(2))
        return scheme.dequantize(round_to_nearest(weight, scales, scheme), scales)


def parse_scheme(name: str) -> Scheme:
    """Return the scheme that a type of a checkpoint names."""
    kind, _, size = name.partition("/")
    return SCHEMES[kind].with_values({"group_size": int(size)}) if size else SCHEMES[kind]


# Rows of a weight that are rounded and multiplied at a time: a head has as many as the vocabulary.
BAND = 2048
# Rows of a weight whose errors are measured: the most important ones, and one in so many of the others.
FIRST_ROWS, STRIDE = 64, 16
# Share of the pieces of a text to leave out of a mean: those that change most.
TRIMMED = 0.1
# Facts of a domain that its mean needs.
FEWEST_OF_A_DOMAIN = 5


@dataclass(frozen=True)
class FactBatches:
    """Facts in batches, and the candidates that their scores are of."""

    batches: tuple[ScoredBatch, ...]
    owners: tuple[torch.Tensor, ...]  # by batch, the number of each score's candidate, int64 [rows, directions]
    facts: torch.Tensor  # of each candidate the number of its fact, int64 [candidates], ascending


@dataclass(frozen=True)
class ScoreChanges:
    """Changes of scores, by weight and type."""

    weights: dict[str, TensorSensitivity]  # by name, each as yet without its types and domains
    scores: torch.Tensor  # of all candidates of facts, [candidates]
    owners: torch.Tensor  # the numbers of their facts, of each of which its object comes first
    facts: dict[tuple[str, str], torch.Tensor]  # changes of these scores, by name and the types that were tried
    text: dict[tuple[str, str], torch.Tensor]  # likewise of the scores of text, [rows, draws]
    errors: dict[tuple[str, str], float]  # by name and each type, squared errors, in a unit of the weight's own
    importance: dict[str, torch.Tensor]  # by name, what types were rounded with, [in]

    def build_rows(self, roundings: Roundings, domains: Sequence[str] = ()) -> tuple[TensorSensitivity, ...]:
        """Return the sensitivity of each weight; `domains` are those of the facts."""
        rows = []
        for name, weight in self.weights.items():
            tried = roundings.list_measured(weight.shape)
            facts, per_token = self._compute_per_error(name, tried), self._compute_text_per_error(name, tried)
            types = {}
            for type in roundings.list_legal(weight.shape):
                error = self.errors[name, type]
                text = None if per_token is None else per_token * error
                kl = risk = None
                if facts is not None:
                    kl = float(facts[0].mean()) * error
                    # Its change has this mean square: the probability that a margin changes its sign.
                    spread = (facts[1] * error).sqrt().clamp_min(1e-12)
                    risk = float(torch.special.ndtr(-self.margins[2] / spread).mean())
                types[type] = Rounding(roundings.nbytes(type, weight.shape), kl, text, risk)
            by_domain = _compare_domains(facts[0], domains) if facts is not None else {}
            rows.append(replace(weight, by_type=types, by_domain=by_domain))
        return tuple(rows)

    def _compute_per_error(self, name: str, tried: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return two losses of each fact per squared error of a weight, float64 [facts], the means over the types that
        were tried: KL in nats, and the square of the change of its margin. None if there are no facts.

        What one rounding happens to change of some facts is a matter of luck: types are told apart by their errors,
        weights by what all types do.
        """
        if (name, tried[0]) not in self.facts:
            return None
        own = [type for type in tried if self.errors[name, type] > 0] or tried[:1]
        errors = torch.tensor([self.errors[name, type] or 1.0 for type in own], dtype=torch.float64)
        changes = torch.stack([self.facts[name, type] for type in own], 1).double()
        objects, others, _ = self.margins
        return (
            (compute_divergence(self.scores, changes, self.owners) / errors).mean(1),
            ((changes[objects] - changes[others]).square() / errors).mean(1),
        )

    @cached_property
    def margins(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the numbers of each fact's object and best other candidate, and how far apart their scores are."""
        objects = torch.searchsorted(self.owners, torch.arange(int(self.owners[-1]) + 1))
        others = self.scores.double().index_fill(0, objects, -torch.inf)
        order = others.argsort(descending=True)
        best = order[self.owners[order].argsort(stable=True)][objects]
        return objects, best, self.scores.double()[objects] - others[best]

    def _compute_text_per_error(self, name: str, tried: Sequence[str]) -> float | None:
        """Return the KL of text, in nats per token, per squared error of a weight: a trimmed mean over rows, averaged
        over the types tried; None without text."""
        if (name, tried[0]) not in self.text:
            return None
        ratios = []
        for type in tried:
            if (error := self.errors[name, type]) > 0:
                rows = self.text[name, type].double().square().mean(1).sort().values / 2
                ratios.append(float(rows[: max(1, round(len(rows) * (1 - TRIMMED)))].mean()) / error)
        return sum(ratios) / len(ratios) if ratios else 0.0


def _compare_domains(divergences: torch.Tensor, domains: Sequence[str]) -> dict[str, float]:
    """Return how many times the mean the mean of each domain's facts is, where there are enough of it."""
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

    Types that round with an importance use that of the same tokens: the mean squares of a weight's inputs from facts
    and from text, each normalized.
    """
    structure = read_structure(tree)
    sources = Sources(checkpoint, tree, structure)
    # Which rows the tokens of an expert come from is not known.
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
    """Visitor of blocks that adds up in `changes` what rounding their weights changes."""

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
        self._done = 0

    def visit(self, module: str, products: Mapping[str, Sequence[Product]]) -> None:
        """Add what rounding the weights of a module changes: see `compressknow.compress.calibrate.backward.Visit`."""
        for parameter, own in products.items():
            if not own:
                continue
            weight = self._streamed.model.get_parameter(parameter).detach()
            if own[0].inputs.is_floating_point():
                self._add_linear(self._linears[parameter], weight, own)
            elif self._roundings.form == "gguf" and self._roundings.list_legal(weight.shape):
                scale = getattr(self._streamed.model.get_submodule(module), "embed_scale", 1.0)
                self._add_lookups(parameter, weight, own, float(scale))
        self._done += 1
        self._advance(self._done, len(self._streamed.blocks))

    def _add_linear(self, linear: LinearWeight, weight: torch.Tensor, products: Sequence[Product]) -> None:
        if self._roundings.form == "checkpoint" and linear.parameter in self._structure.tied:
            # To round a head that is the embedding too would untie it.
            return
        weight = weight.T.contiguous() if linear.transposed else weight
        if not self._roundings.list_legal(weight.shape):
            return
        name = self._structure.tied.get(linear.parameter, linear.parameter)
        self._add_weight(name, weight, linear.group or "other", linear.layer, linear.stack)
        importance = self.changes.importance[name] = self._sum_halves(
            products, [each.inputs.flatten(0, 1).float().square().sum(0) for each in products]
        )
        # Inputs count by the gradients at their tokens: those of attention sinks are large, and change nothing.
        by_row, by_column = [], []
        for product in products:
            # One direction at a time: of a head, all in float32 are as much as everything else in memory.
            first, *others = product.gradients.unbind(1)
            squares = first.flatten(0, 1).float().square_()
            for gradients in others:
                own = gradients.flatten(0, 1).float()
                squares.addcmul_(own, own)
            by_row.append(squares.sum(0))
            by_column.append(squares.sum(1) @ product.inputs.flatten(0, 1).float().square())
        of_rows, of_columns = self._sum_halves(products, by_row), self._sum_halves(products, by_column)
        self._add_errors(name, weight, importance, of_rows, of_columns)
        types = self._roundings.list_measured(weight.shape)
        inputs = [each.inputs.to(FACTORS) for each in products]
        for start in range(0, len(weight), BAND):
            band = weight[start : start + BAND]
            rounded = torch.stack([self._roundings.roundtrip(band, type, importance) for type in types], 1)
            # Types change fastest: what one product of all of them gives lies as the next one reads it.
            change = (rounded - band[:, None]).to(FACTORS).flatten(0, 1)
            for product, x in zip(products, inputs, strict=True):
                seen = product.gradients[..., start : start + BAND]
                self._add_changes(name, types, product.batch, _contract(seen, x @ change.T, len(types)))

    def _add_weight(self, name: str, weight: torch.Tensor, group: str, layer: int | None, stack: str | None) -> None:
        found = TensorSensitivity(name, tuple(weight.shape), group, layer, {}, stack, name_in_block(name))
        self.changes.weights.setdefault(name, found)

    def _add_errors(
        self,
        name: str,
        weight: torch.Tensor,
        importance: torch.Tensor | None,
        of_rows: torch.Tensor,
        of_columns: torch.Tensor,
    ) -> None:
        """Add a weight's squared errors by type, weighted by row [out] and column [in], for the most important rows and
        some of the others."""
        order = of_rows.argsort(descending=True, stable=True)
        own = torch.cat([order[:FIRST_ROWS], order[FIRST_ROWS::STRIDE]])
        rows = weight[own]
        for type in self._roundings.list_legal(weight.shape):
            squares = (self._roundings.roundtrip(rows, type, importance) - rows).square()
            self.changes.errors[name, type] = float(of_rows[own] @ squares @ of_columns)

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
        """Return the sum of a vector of each product, normalized; those of facts and of text count alike."""
        halves = []
        for is_text in (False, True):
            own = [
                value
                for each, value in zip(products, values, strict=True)
                if (each.batch >= len(self._fact_batches.batches)) is is_text
            ]
            if own:
                total = torch.stack(own).sum(0)
                halves.append(total / total.mean())
        return torch.stack(halves).mean(0)

    def _add_changes(self, name: str, types: Sequence[str], batch: int, changes: torch.Tensor) -> None:
        """Add changes of a batch's scores, [rows, directions, types]."""
        for type, own in zip(types, changes.unbind(2), strict=True):
            number = batch - len(self._fact_batches.batches)
            if number < 0:
                known = self.changes.facts.setdefault((name, type), torch.zeros(len(self.changes.owners)))
                known.index_add_(0, self._fact_batches.owners[batch].flatten(), own.flatten())
                continue
            known = self.changes.text.setdefault((name, type), torch.zeros(self._starts[-1], self._texts[0].directions))
            known[self._starts[number] : self._starts[number + 1]] += own


def _contract(gradients: torch.Tensor, products: torch.Tensor, types: int) -> torch.Tensor:
    """Sum g . y over tokens: of [rows, directions, tokens, out] and [rows, tokens, out x types], float32 [rows,
    directions, types]."""
    return torch.bmm(gradients.flatten(2).to(products.dtype), products.reshape(len(products), -1, types)).float()
