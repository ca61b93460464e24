"""Wanda and SparseGPT: pruning by what is known of the inputs of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compressknow.compress.pruning import Calibrated, Needs, Pattern, Patterned, Weights

if TYPE_CHECKING:
    import torch

    from compressknow.compress.calibrate.compensation import Level
    from compressknow.compress.calibrate.gathering import InputStatistics
    from compressknow.compress.pruning.masks import Keys


class Wanda(Patterned, Calibrated):
    """Wanda (Sun et al. 2023, arXiv 2306.11695, equation 1): a weight's score is |W_ij| * ||X_j||_2, compared within
    each output, a row of W."""

    name = "wanda"
    help = "small weights on small inputs, per output"
    needs: ClassVar[Needs] = "norms"

    def count(self, weights: Weights, amount: float) -> int:
        """See `PruningMethod.count`; as many in each row."""
        if self.groups is not None:
            return super().count(weights, amount)
        inputs = weights.matrices[1 + weights.axis(1)]
        return weights.tensor.numel // inputs * round(amount * inputs)

    def prune(self, weight: torch.Tensor, inputs: InputStatistics, amount: float) -> tuple[torch.Tensor, None]:
        """See `Calibrated.prune`; weights that stay do not change."""
        import torch

        from compressknow.compress.pruning.masks import make_score_keys, mask_smallest_of_rows

        keys = make_score_keys(weight.abs() * inputs.squares.sqrt(), weight == 0)
        if self.groups is None:
            return torch.from_numpy(mask_smallest_of_rows(keys, round(amount * keys.shape[1]))), None
        pruned = mask_smallest_of_rows(keys.reshape(-1, self.groups.of), self.groups.pruned)
        return torch.from_numpy(pruned).view(weight.shape), None


class SparseGPT(Patterned, Calibrated):
    """SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1).

    The score of a weight is W_ij^2 / U_jj^2, with U the upper Cholesky factor of the inverse of X^T X: the squared
    error that is left when the columns after it have made up for its loss (section 3.2). It is compared over all rows
    in blocks of 128 columns, with a pattern in each group of an output (section 3.4).
    """

    name = "sparsegpt"
    help = "weights that others make up for"
    needs: ClassVar[Needs] = "products"

    def count(self, weights: Weights, amount: float) -> int:
        """See `PruningMethod.count`; the amount of each matrix."""
        if self.groups is not None:
            return super().count(weights, amount)
        number, rows, columns = weights.matrices
        return number * round(amount * rows * columns)

    def prune(
        self, weight: torch.Tensor, inputs: InputStatistics, amount: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Calibrated.prune`. A weight that is zero stays zero, whether it counts as pruned or not.

        Raises CompressknowError naming the layer if X^T X cannot be inverted.
        """
        from compressknow.compress.calibrate.compensation import compensate, get_inverse

        factor, _ = get_inverse(inputs)
        columns = weight.T.contiguous().clone()
        zero = columns == 0
        choice = _Choice(zero, factor.diagonal().square(), amount, self.groups)
        values = columns.clone()

        def settle(column: int, current: torch.Tensor) -> torch.Tensor:
            return values[column].copy_(current).masked_fill_(choice.pruned[column] | zero[column], 0)

        compensate(columns, factor, choice.build_levels(), settle)
        return choice.pruned.T.contiguous(), values.T.contiguous()


class _Choice:
    """Choice of `pruned` weights, bool [in, out], for a block of columns once all errors before it have reached it."""

    def __init__(self, zero: torch.Tensor, scale: torch.Tensor, amount: float, pattern: Pattern | None) -> None:
        import torch

        self.pruned = torch.zeros_like(zero)
        self._zero, self._scale, self._amount, self._pattern = zero, scale, amount, pattern

    def build_levels(self) -> list[Level]:
        from compressknow.compress.calibrate.compensation import BLOCK, FINE, Level

        if self._pattern is None:
            return [Level(BLOCK, self._choose_amount), Level(FINE)]
        group = self._pattern.of
        fine = group * max(1, FINE // group)
        return [Level(fine * max(1, BLOCK // fine)), Level(fine), Level(group, self._choose_in_groups)]

    def _choose_amount(self, first: int, block: torch.Tensor) -> None:
        """Choose so many that the amount is right up to this block; ties go in the order of rows, then of columns."""
        import torch

        from compressknow.compress.pruning.masks import mask_smallest_of_rows

        last, rows = first + len(block), block.shape[1]
        count = round(self._amount * rows * last) - round(self._amount * rows * first)
        pruned = mask_smallest_of_rows(self._make_keys(first, block).reshape(1, -1), count)
        self.pruned[first:last] = torch.from_numpy(pruned).view(rows, -1).T

    def _choose_in_groups(self, first: int, block: torch.Tensor) -> None:
        import torch

        from compressknow.compress.pruning.masks import mask_smallest_of_rows

        assert self._pattern is not None
        pruned = mask_smallest_of_rows(self._make_keys(first, block), self._pattern.pruned)
        self.pruned[first : first + len(block)] = torch.from_numpy(pruned).T

    def _make_keys(self, first: int, block: torch.Tensor) -> Keys:
        """Return keys of the scores, [out, columns of the block]."""
        from compressknow.compress.pruning.masks import make_score_keys

        here = slice(first, first + len(block))
        scores = block.square().div_(self._scale[here, None])
        return make_score_keys(scores.T.contiguous(), self._zero[here].T)
