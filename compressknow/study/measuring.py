"""Measuring a sensitivity: to first order, what rounding each weight alone changes of scores, and what KL that makes.

Of every weight W and type, D is what rounding takes W to, less W. The change of a score is the sum of g . D x over the
tokens, where x is what W is multiplied with and g the gradient of the score at the product: one backward pass for all
weights and types. With the changes dz of the log-probabilities of a fact's best candidates, p their softmax, the KL
divergence of their distribution is 1/2 dz' (diag p - p p') dz, to second order. For text see
`compressknow.study.questions`.

Means over text are robust: where a piece begins, models keep attention sinks with activations of hundreds of times the
usual size. To first order rounding there changes everything, in truth little, for what reads a sink is normalized. So
of each weight and type the tenth of the pieces that it changes most is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from compressknow.compress.calibrate.backward import Product, gradients
from compressknow.compress.calibrate.model import StreamedModel
from compressknow.compress.sources import Sources
from compressknow.model.groups import structure_of
from compressknow.model.structure import LinearWeight, Structure
from compressknow.model.tensors import OpenFiles
from compressknow.study.questions import Questions
from compressknow.study.roundings import Roundings
from compressknow.study.sensitivity import Rounding, TensorSensitivity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compressknow.compress.calibrate.backward import Batch
    from compressknow.model.checkpoint import Checkpoint
    from compressknow.quiet import Advance

# Rows of a weight that are rounded and multiplied at a time: of a head there are as many as tokens.
BAND = 8192
# Of the pieces of a text, left out of a mean: those that change most.
TRIMMED = 0.1


@dataclass(frozen=True)
class Measured:
    """Changes of scores, by weight and type.

    Attributes
    ----------
    weights : by name, group, block and shape [out, in] of each.
    scores : of all candidates of facts, [candidates]; `owners` are the numbers of their facts.
    facts : changes of these.
    text : changes of the scores of text, [rows, draws].
    importance : by name, what types were rounded with, [in].
    """

    weights: Mapping[str, tuple[str, int | None, tuple[int, ...]]]
    scores: torch.Tensor
    owners: torch.Tensor
    facts: Mapping[tuple[str, str], torch.Tensor]
    text: Mapping[tuple[str, str], torch.Tensor]
    importance: Mapping[str, torch.Tensor]

    def rows(self, roundings: Roundings) -> tuple[TensorSensitivity, ...]:
        """Return the sensitivity of each weight."""
        found = []
        for name, (group, layer, shape) in self.weights.items():
            types = {
                each: Rounding(roundings.nbytes(each, shape), self.kl_of_facts(name, each), self.kl_of_text(name, each))
                for each in roundings.legal(shape)
            }
            found.append(TensorSensitivity(name, shape, group, layer, types))
        return tuple(found)

    def kl_of_facts(self, name: str, type: str) -> float | None:
        """The mean over facts, nats; None where there are no facts."""
        changes = self.facts.get((name, type))
        if changes is None:
            return None
        return float(divergence(self.scores, changes, self.owners).mean())

    def kl_of_text(self, name: str, type: str) -> float | None:
        """The robust mean over rows, nats per token; None where there is no text."""
        changes = self.text.get((name, type))
        if changes is None:
            return None
        rows = changes.double().square().mean(1).sort().values / 2
        return float(rows[: max(1, round(len(rows) * (1 - TRIMMED)))].mean())


def divergence(scores: torch.Tensor, changes: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """KL divergences by which changes of log-scores move each fact's distribution over its candidates, to second order:
    float64 [facts]."""
    count = int(owners.max()) + 1
    scores, changes = scores.double(), changes.double()

    def summed(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, owners, values)

    top = torch.full((count,), -torch.inf, dtype=torch.float64).scatter_reduce(0, owners, scores, "amax")
    weights = (scores - top[owners]).exp()
    p = weights / summed(weights)[owners]
    return (summed(p * changes.square()) - summed(p * changes).square()) / 2


def measure(
    checkpoint: Checkpoint,
    tree: PreTrainedModel,
    roundings: Roundings,
    questions: Questions | None,
    texts: Sequence[Batch] = (),
    advance: Advance | None = None,
) -> Measured:
    """Measure all Linear weights of a model, and of a GGUF file its embedding, from one pass forward and one back.

    Importance, where a type rounds with it, is that of the same tokens: the mean squares of what facts and text have a
    weight multiplied with, both halves normalized.
    """
    structure = structure_of(tree)
    sources = Sources(checkpoint, tree, structure)
    weights = [weight for weight in structure.linears if weight.group != "vision" and weight.kind != "experts"]
    batches = [*(questions.batches if questions else ()), *texts]
    with OpenFiles() as files:
        streamed = StreamedModel(tree, sources, files)
        measuring = _Measuring(streamed, structure, weights, roundings, questions, texts, advance)
        scores = gradients(streamed, weights, batches, measuring.visit)
    return measuring.measured(scores)


class _Measuring:
    """Visits blocks, and adds up what rounding their weights changes."""

    def __init__(
        self,
        streamed: StreamedModel,
        structure: Structure,
        weights: Sequence[LinearWeight],
        roundings: Roundings,
        questions: Questions | None,
        texts: Sequence[Batch],
        advance: Advance | None,
    ) -> None:
        self._streamed, self._structure, self._roundings, self._advance = streamed, structure, roundings, advance
        self._linears = {weight.parameter: weight for weight in weights}
        self._questions, self._texts = questions, texts
        self._fact_batches = len(questions.batches) if questions else 0
        self._starts = [sum(len(text.positions) for text in texts[:number]) for number in range(len(texts) + 1)]
        self._found: dict[str, tuple[str, int | None, tuple[int, ...]]] = {}
        self._facts: dict[tuple[str, str], torch.Tensor] = {}
        self._text: dict[tuple[str, str], torch.Tensor] = {}
        self._importance: dict[str, torch.Tensor] = {}
        self._dtype = torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
        self._done = 0

    def visit(self, module: str, products: Mapping[str, Sequence[Product]]) -> None:
        """See `compressknow.compress.calibrate.backward.Visit`."""
        for parameter, own in products.items():
            if not own:
                continue
            weight = self._streamed.model.get_parameter(parameter).detach()
            if own[0].inputs.is_floating_point():
                self._add_linear(self._linears[parameter], weight, own)
            elif self._roundings.form == "gguf":
                scale = getattr(self._streamed.model.get_submodule(module), "embed_scale", 1.0)
                self._add_lookups(parameter, weight, own, float(scale))
        self._done += 1
        if self._advance:
            self._advance(self._done, len(self._streamed.blocks))

    def _add_linear(self, linear: LinearWeight, weight: torch.Tensor, products: Sequence[Product]) -> None:
        if self._roundings.form == "checkpoint" and linear.parameter in self._structure.tied:
            # To round a head that is the embedding too would untie it.
            return
        weight = weight.T.contiguous() if linear.transposed else weight
        name = self._name(linear.parameter)
        self._found.setdefault(name, (linear.group or "other", linear.layer, tuple(weight.shape)))
        importance = self._importance_of(name, products)
        inputs = [each.inputs.to(self._dtype) for each in products]
        for start in range(0, len(weight), BAND):
            band = weight[start : start + BAND]
            seen = [each.gradients[..., start : start + BAND].to(self._dtype) for each in products]
            for type in self._roundings.legal(weight.shape):
                change = (self._roundings.roundtrip(band, type, importance) - band).to(self._dtype)
                for product, x, g in zip(products, inputs, seen, strict=True):
                    self._add(name, type, product.batch, _contract(g, x @ change.T))

    def _add_lookups(self, parameter: str, weight: torch.Tensor, products: Sequence[Product], scale: float) -> None:
        name = self._name(parameter)
        self._found.setdefault(name, ("embedding", None, tuple(weight.shape)))
        tokens, places = torch.unique(torch.cat([each.inputs.flatten() for each in products]), return_inverse=True)
        rows, importance = weight[tokens], self._importance.get(name)
        for type in self._roundings.legal(weight.shape):
            change = ((self._roundings.roundtrip(rows, type, importance) - rows) * scale).to(self._dtype)
            start = 0
            for product in products:
                own = change[places[start : start + product.inputs.numel()]]
                start += product.inputs.numel()
                of_rows = own.reshape(*product.inputs.shape, -1)
                self._add(name, type, product.batch, _contract(product.gradients.to(self._dtype), of_rows))

    def _name(self, parameter: str) -> str:
        return self._structure.tied.get(parameter, parameter)

    def _importance_of(self, name: str, products: Sequence[Product]) -> torch.Tensor:
        """Mean squares of the inputs [in], facts and text alike."""
        halves = []
        for is_text in (False, True):
            own = [each.inputs.flatten(0, 1) for each in products if (each.batch >= self._fact_batches) is is_text]
            if own:
                squares = torch.cat(own).square().mean(0)
                halves.append(squares / squares.mean())
        self._importance[name] = torch.stack(halves).mean(0)
        return self._importance[name]

    def _add(self, name: str, type: str, batch: int, changes: torch.Tensor) -> None:
        """Changes of a batch's scores, [rows, directions]."""
        if batch < self._fact_batches:
            assert self._questions is not None
            known = self._facts.setdefault((name, type), torch.zeros(len(self._questions.facts)))
            known.index_add_(0, self._questions.owners[batch].flatten(), changes.flatten())
            return
        number = batch - self._fact_batches
        known = self._text.setdefault((name, type), torch.zeros(self._starts[-1], self._texts[0].directions))
        known[self._starts[number] : self._starts[number + 1]] += changes

    def measured(self, scores: Sequence[torch.Tensor]) -> Measured:
        """What was found, where these are the scores of all batches."""
        facts = self._questions.facts if self._questions else torch.empty(0, dtype=torch.long)
        own = torch.zeros(len(facts))
        for batch, owners in zip(scores, self._questions.owners if self._questions else (), strict=False):
            own.index_add_(0, owners.flatten(), batch.flatten())
        return Measured(self._found, own, facts, self._facts, self._text, self._importance)


def _contract(gradients: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The sums of g . y over tokens: of [rows, directions, tokens, out] and [rows, tokens, out], [rows, directions]."""
    return torch.bmm(gradients.flatten(2), products.flatten(1)[:, :, None])[..., 0].float()
