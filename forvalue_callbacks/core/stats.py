"""Statistics that several modules need, each once: ranks and what rests on them, powers of a second moment.

Shapes      N numbers, D hidden size or number of features
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mean_ranks(x_N: np.ndarray) -> np.ndarray:
    """Ranks of x, 1 = smallest, ties by their mean rank, (N,)."""
    _, inverse, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Rank correlation of x and y, ties by their mean rank; NaN where one is constant."""
    x_N, y_N = mean_ranks(x_N), mean_ranks(y_N)
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    norm = np.sqrt((x_N @ x_N) * (y_N @ y_N))
    return float(x_N @ y_N / norm) if norm > 0 else float("nan")


def auc(clean_N: np.ndarray, noisy_M: np.ndarray) -> float:
    """Chance that a clean row scores higher than a noisy one; ties count half."""
    ranks = mean_ranks(np.concatenate([clean_N, noisy_M]))
    return float((ranks[: len(clean_N)].mean() - (len(clean_N) + 1) / 2) / len(noisy_M))


def inverse_with_ridge(moment_DD: Tensor, ridge: float) -> Tensor:
    """`(A + ridge * mean(diag A) * I)^-1` of a second moment A, by Cholesky in float64.

    Raises:
        ValueError: there is none, since A is 0 or not finite.
    """
    moment_DD = moment_DD.double()
    eye = torch.eye(len(moment_DD), dtype=torch.float64, device=moment_DD.device)
    root_DD, failed = torch.linalg.cholesky_ex(moment_DD + ridge * moment_DD.diagonal().mean() * eye)
    if failed:
        raise ValueError(
            "the hidden states of the validation rows are all 0, or too large for numbers: they tell nothing apart. "
            "Look at the model's weights."
        )
    return torch.cholesky_inverse(root_DD)


def power_of_moment(
    moment_DD: Tensor, power: float, *, ridge: float = 0.0, floor: float = 0.0, rotated: bool = False
) -> Tensor:
    """`(A + (ridge * mean(diag A) + floor) * I)^power` of a second moment A, by its eigenvalues, in its dtype.

    Args:
        moment_DD: symmetric; eigenvalues that rounding made negative count as zero.
        rotated: leave out the last product, with the eigenvectors: where the result meets nothing but inner products.
    """
    values, vectors = torch.linalg.eigh(moment_DD)
    root = vectors * (values.clamp(min=0) + ridge * values.mean() + floor) ** power
    return root if rotated else root @ vectors.T
