"""Which kinds of noise can be told from clean rows, and how much of each the training rows hold. Knows no model.

Validation rows are clean; copies of them are corrupted on purpose. A classifier learns from both, on a handful of
numbers per row, what tells a clean row from each kind of noise. On training rows its probabilities are weighted by
shares of the kinds that explain those rows best (Saerens, Latinne and Decaestecker 2002). Imports torch and numpy.

Shapes: N rows, F features, K kinds of noise; class 0 is "clean", class k the k-th kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from ..core.fit import fit_softmax, logits

RIDGES = (1.0, 10.0, 100.0)
FOLDS = 5
# Standardised features are cut here: one odd row must not decide.
LIMIT = 4.0


@dataclass(frozen=True)
class Classifier:
    """Class probabilities of rows, as if all classes were equally frequent.

    Args:
        center, spread: (F,), mean and standard deviation of the clean rows.
        coefficients: (2 F + 1, K + 1), on the standardised features and their squares: with the squares, classes may
            differ in spread, which the estimate of the shares needs most.
        ridge: the one with the best likelihood in cross-validation.
    """

    center: np.ndarray
    spread: np.ndarray
    coefficients: torch.Tensor
    ridge: float

    def log_p(self, features: np.ndarray) -> np.ndarray:
        """(N, K + 1)."""
        return _log_softmax(logits(self.coefficients, _expand(features, self.center, self.spread)).numpy())


def fit_classifier(features: np.ndarray, classes: np.ndarray, rows: np.ndarray) -> tuple[Classifier, np.ndarray]:
    """The classifier, and the `log_p` (N, K + 1) of its own rows out of fold.

    Args:
        features: (N, F).
        classes: (N,), 0 = clean.
        rows: (N,), the validation row that each is a copy of; folds never split one.
    """
    center, spread = features[classes == 0].mean(0), features[classes == 0].std(0) + 1e-9
    x = _expand(features, center, spread)
    counts = np.bincount(classes)
    onehot = np.eye(len(counts))[classes] * (len(classes) / len(counts) / counts)[:, None].T
    targets = torch.from_numpy(onehot)
    fold = rows % FOLDS
    best: tuple[float, float, np.ndarray] | None = None
    for ridge in RIDGES:
        held_out = np.zeros_like(onehot)
        for k in range(FOLDS):
            inside = torch.from_numpy(fold != k)
            fitted = fit_softmax(x[inside], targets[inside], ridge)
            held_out[fold == k] = _log_softmax(logits(fitted, x[~inside]).numpy())
        likelihood = float((onehot * held_out).sum())
        if best is None or likelihood > best[0]:
            best = (likelihood, ridge, held_out)
    assert best is not None
    return Classifier(center, spread, fit_softmax(x, targets, best[1]), best[1]), best[2]


def shares(log_p: np.ndarray, n_validation: int) -> np.ndarray:
    """Shares of the classes among rows, (K + 1,), that explain their probabilities `log_p` (N, K + 1) best.

    Maximum likelihood over mixtures of clean rows and any subset of the kinds. A kind is taken in only where the
    likelihood pays for it (half the logarithm of the number of rows, as in the Bayesian information criterion), or
    else a few per cent of noise would be found in clean data. `n_validation`, the clean rows that these rest on,
    bounds the number of rows that count: what their own sampling error looks like from N rows is no evidence.
    """
    n_kinds = log_p.shape[1] - 1
    effective = 1 / (1 / len(log_p) + 1 / n_validation)
    best, found = -np.inf, np.zeros(0)
    for size in range(n_kinds + 1):
        for kinds in combinations(range(1, n_kinds + 1), size):
            classes = [0, *kinds]
            p = _expectation_maximisation(log_p[:, classes])
            likelihood = np.log(np.exp(log_p[:, classes]) @ p).mean() * effective - size * np.log(effective) / 2
            if likelihood > best:
                best, found = likelihood, np.zeros(n_kinds + 1)
                found[classes] = p
    return found


def log_odds(log_p: np.ndarray, class_shares: np.ndarray) -> np.ndarray:
    """Log of P(clean) / P(noisy) of each row, (N,), given the shares of the classes.

    A kind that was not found keeps the share of half a row, so that rows are ranked even where none was.
    """
    floor = 0.5 / len(log_p)
    weighted = log_p + np.log(np.maximum(class_shares, floor))
    return weighted[:, 0] - _log_sum_exp(weighted[:, 1:])


def _expand(features: np.ndarray, center: np.ndarray, spread: np.ndarray) -> torch.Tensor:
    z = np.clip((features - center) / spread, -LIMIT, LIMIT)
    return torch.from_numpy(np.hstack([z, z**2]))


def _expectation_maximisation(log_p: np.ndarray, iterations: int = 1000) -> np.ndarray:
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    share = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(iterations):
        posterior = p * share
        new = (posterior / posterior.sum(1, keepdims=True)).mean(0)
        if np.abs(new - share).max() < 1e-6:
            break
        share = new
    return share


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = x.max(1)
    return top + np.log(np.exp(x - top[:, None]).sum(1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - _log_sum_exp(x)[:, None]
