"""Multinomial logistic regression with soft targets, for thousands of rows and hundreds of features (torch only)."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 100


def logits(coefficients_FK: Tensor, features_NF: Tensor) -> Tensor:
    """(N, K); the last row of the coefficients is the intercept."""
    return torch.addmm(coefficients_FK[-1], features_NF, coefficients_FK[:-1])


def fit_softmax(
    features_NF: Tensor,
    targets_NK: Tensor,
    ridge: float,
    *,
    start_FK: Tensor | None = None,
    iterations: int = ITERATIONS,
    intercept_ridge: float = 1e-2,
) -> Tensor:
    """Coefficients B, (F + 1, K), the intercept last, that maximise by L-BFGS::

        sum_n sum_k targets[n, k] * log softmax(B^T [x_n, 1])[k]  -  ridge / 2 * ||B[:-1]||^2

    Args:
        features_NF: standardised features.
        targets_NK: >= 0; a row's sum is its weight.
        start_FK: where to start; zeros by default.
        intercept_ridge: of the intercept, so that a class without rows has a finite one.
    """
    n_features, n_classes = features_NF.shape[1], targets_NK.shape[1]
    start = features_NF.new_zeros(n_features + 1, n_classes) if start_FK is None else start_FK.clone()
    coefficients = start.requires_grad_(True)
    penalty = torch.full_like(coefficients[:, :1], ridge, requires_grad=False)
    penalty[-1] = intercept_ridge
    optimizer = torch.optim.LBFGS(
        [coefficients], max_iter=iterations, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            log_p = logits(coefficients, features_NF).log_softmax(1)
            loss = 0.5 * (penalty * coefficients.square()).sum() - (targets_NK * log_p).sum()
            loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return coefficients.detach()
