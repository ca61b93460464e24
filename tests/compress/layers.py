"""Layers with correlated inputs, and references that follow the papers' formulas.

The references compute in float64, column by column, without blocks or decompositions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressknow.compress.calibrate.gathering import InputStatistics
from compressknow.compress.schemes import Int8Weights


class Groups4(Int8Weights):
    """4 bits in groups of 16 input channels."""

    name = "groups-4"
    lowest, highest = -8, 7
    scale_per = 16

    def scales(self, absmax: Tensor) -> Tensor:
        return (absmax / 7.5).clamp(min=torch.finfo(absmax.dtype).eps)


def make_inputs(tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Draw correlated inputs [tokens, channels], whose norms differ by a factor of 30."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, channels // 2, generator=generator) @ torch.randn(
        channels // 2, channels, generator=generator
    )
    noise = torch.randn(tokens, channels, generator=generator)
    norms = torch.exp(torch.linspace(-1.7, 1.7, channels)[torch.randperm(channels, generator=generator)])
    return (shared / (channels // 2) ** 0.5 + 0.5 * noise) * norms


def make_weights(outputs: int, channels: int, seed: int = 1) -> Tensor:
    """Draw weights [outputs, channels]."""
    return torch.randn(outputs, channels, generator=torch.Generator().manual_seed(seed))


def gather_statistics(inputs: Tensor, name: str = "model.layers.0.mlp.down_proj") -> InputStatistics:
    """Return the statistics of inputs [tokens, channels]."""
    inputs = inputs.to(torch.float32)
    return InputStatistics(name, len(inputs), inputs.square().sum(0), inputs.abs().amax(0), inputs.T @ inputs)


def error(inputs: Tensor, before: Tensor, after: Tensor) -> float:
    """Compute ||X (before - after)^T||."""
    return float((inputs.double() @ (before.double() - after.double()).T).norm())


def damp_products(inputs: Tensor) -> Tensor:
    """Compute H = X^T X with 1 % of its mean diagonal added."""
    products = inputs.double().T @ inputs.double()
    return products + 0.01 * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64)


def eliminate_columns(products: Tensor) -> list[Tensor]:
    """Return each column's row of the inverse after the columns before it are eliminated (GPTQ, equation 3)."""
    inverse, rows = torch.linalg.inv(products), []
    for _ in range(len(products)):
        rows.append(inverse[0])
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return rows


def settle_columns(weight: Tensor, rows: list[Tensor], settle: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Settle columns one by one, and carry each error to all columns that follow (GPTQ, equation 2)."""
    weight = weight.double().clone()
    for column, row in enumerate(rows):
        lost = weight[:, column] - settle(column, weight)
        weight[:, column + 1 :] -= torch.outer(lost / row[0], row[1:])
        weight[:, column] -= lost
    return weight


def prune_by_formula(
    weight: Tensor, inputs: Tensor, amount: float, pattern: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mask and the new values of SparseGPT's algorithm 1."""
    rows = eliminate_columns(damp_products(inputs))
    diagonals = torch.stack([row[0] for row in rows])
    pruned = torch.zeros(weight.shape, dtype=torch.bool)
    outputs, width = len(weight), 128 if pattern is None else pattern[1]

    def settle(column: int, current: Tensor) -> Tensor:
        if column % width == 0:
            block = slice(column, min(column + width, len(rows)))
            scores = current[:, block].square() / diagonals[block]
            scores[weight[:, block] == 0] = -1
            if pattern is None:
                count = round(amount * outputs * block.stop) - round(amount * outputs * block.start)
                lowest = scores.flatten().argsort(stable=True)[:count]
                pruned[:, block] = (
                    torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, lowest, True).view_as(scores)
                )
            else:
                lowest = scores.argsort(dim=1, stable=True)[:, : pattern[1] - pattern[0]]
                pruned[:, block] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, lowest, True)
        return current[:, column].masked_fill(pruned[:, column] | (weight[:, column] == 0), 0)

    return pruned, settle_columns(weight, rows, settle)


def round_by_formula(
    weight: Tensor, inputs: Tensor, scales: Tensor, bounds: tuple[int, int], fixed: Tensor | None = None
) -> Tensor:
    """Round to integers [outputs, channels], columns of the largest inputs first; `scales` broadcast."""
    order = inputs.double().square().sum(0).argsort(descending=True, stable=True)
    rows = eliminate_columns(damp_products(inputs)[order][:, order])
    scales = scales.double().expand(weight.shape)[:, order]
    zeros = torch.zeros(weight.shape, dtype=torch.bool) if fixed is None else fixed[:, order]

    def settle(column: int, current: Tensor) -> Tensor:
        steps = (current[:, column] / scales[:, column]).round().clamp(*bounds)
        return (steps * scales[:, column]).masked_fill(zeros[:, column], 0)

    rounded = settle_columns(weight[:, order], rows, settle) / scales
    return torch.empty_like(rounded).index_copy(1, order, rounded).round().to(torch.int8)
