"""Wanda: weights of small magnitude on inputs of small norm (Sun et al. 2023, arXiv 2306.11695).

Its equation 1: the score of a weight is |W_ij| * ||X_j||_2, compared within each output, that is a row of W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compressknow.compress.pruning import Calibrated, Needs, Weights
from compressknow.compress.pruning.patterns import Patterned

if TYPE_CHECKING:
    import torch

    from compressknow.compress.calibrate.statistics import InputStatistics


class Wanda(Patterned, Calibrated):
    """See the module."""

    name = "wanda"
    help = "small weights on small inputs, per output"
    needs: ClassVar[Needs] = "norms"

    def count(self, weights: Weights, amount: float) -> int:
        """The same in each row."""
        if self.groups is not None:
            return super().count(weights, amount)
        inputs = weights.matrices[1 + weights.axis(1)]
        return weights.tensor.numel // inputs * round(amount * inputs)

    def prune(self, weight: torch.Tensor, inputs: InputStatistics, amount: float) -> tuple[torch.Tensor, None]:
        """See `Calibrated.prune`; no weight that stays is changed."""
        import torch

        from compressknow.compress.pruning.masks import score_keys, smallest_of_rows

        keys = score_keys(weight.abs() * inputs.squares.sqrt(), weight == 0)
        if self.groups is None:
            return torch.from_numpy(smallest_of_rows(keys, round(amount * keys.shape[1]))), None
        pruned = smallest_of_rows(keys.reshape(-1, self.groups.of), self.groups.pruned)
        return torch.from_numpy(pruned).view(weight.shape), None
