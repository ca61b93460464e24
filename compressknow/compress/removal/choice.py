"""Which blocks and which neurons go, from what was seen on the calibration text, and what mends the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressknow.errors import CompressknowError

# Of the mean diagonal of X^T X; the second where the first is too little.
DAMPING = (0.01, 0.1)


def blocks_to_drop(similarities: Sequence[float], number: int) -> tuple[int, ...]:
    """The blocks that change their input least, ascending.

    Parameters
    ----------
    similarities : of each block, the mean over tokens of the cosine between a token's hidden state before and after it.
        1 - that is the block's influence (Men et al. 2024, ShortGPT, arXiv 2403.03853, section 3.2).
    number : how many. Of equal ones the first go.

    >>> blocks_to_drop([0.5, 0.9, 0.8, 0.9], 2)
    (1, 3)
    """
    order = sorted(range(len(similarities)), key=lambda block: (-similarities[block], block))
    return tuple(sorted(order[:number]))


def neurons_to_keep(down: torch.Tensor, squares: torch.Tensor, number: int) -> torch.Tensor:
    """The neurons that give most to the output, int64 [number], ascending.

    A neuron's score is the norm of its activations times the norm of the weights that read it,
    ||h_j||_2 * ||W[:, j]||_2: the Frobenius norm of what it adds to the output, over all tokens.

    Parameters
    ----------
    down : float [out, in], the weight of the down projection; `in` counts neurons.
    squares : float [in], the sum over tokens of each activation's square.
    number : how many. Of equal ones the first stay.
    """
    scores = squares.to(torch.float64).sqrt() * torch.linalg.vector_norm(down.to(torch.float64), dim=0)
    best = torch.sort(scores, descending=True, stable=True).indices[:number]
    return torch.sort(best).values


def fit(down: torch.Tensor, products: torch.Tensor, kept: torch.Tensor, name: str = "") -> torch.Tensor:
    """The down projection of the kept neurons that gives most nearly what all of them gave, float32 [out, len(kept)].

    Least squares over the calibration tokens: with H = X^T X, it is W' = W H[:, S] H[S, S]^-1. Damped, it is drawn
    towards the weights that it had, so that a neuron which the text never woke keeps them:
    W' = W[:, S] + W[:, D] H[D, S] (H[S, S] + damping)^-1, for kept neurons S and dropped ones D.

    Parameters
    ----------
    down : float [out, in]. products : float [in, in], H. kept : int64, ascending.
    name : of the module, for errors.

    Raises
    ------
    CompressknowError : H[S, S] has no inverse even with a damping of 10 % of its mean diagonal.
    """
    gone = torch.ones(down.shape[1], dtype=torch.bool)
    gone[kept] = False
    weight = down.to(torch.float64)
    inner = products[kept][:, kept].to(torch.float64)
    target = weight[:, gone] @ products[gone][:, kept].to(torch.float64)
    mean = float(inner.diagonal().mean())
    for damping in DAMPING:
        factor, failed = torch.linalg.cholesky_ex(inner + torch.eye(len(kept), dtype=torch.float64) * (damping * mean))
        if mean > 0 and not int(failed):
            change = torch.cholesky_solve(target.T, factor).T
            return (weight[:, kept] + change).to(torch.float32)
    raise CompressknowError(
        f"What was seen of the neurons of {name} has no inverse.",
        why="Their activations on the calibration text are zero, infinite, or all alike.",
        hint="Calibrate on more text.",
    )
