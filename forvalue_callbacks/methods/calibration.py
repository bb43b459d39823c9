"""Which kinds of noise can be told from clean rows, and how much of each the training rows hold. Knows no model.

Validation rows are clean; copies of them are corrupted on purpose. Classifiers learn from both, on a handful of
numbers per row, what tells a clean row from each kind of noise: one for each fold of the validation rows that never
sees that fold. On training rows their probabilities are weighted by shares of the kinds that explain those rows best
(Saerens, Latinne and Decaestecker 2002). How much noise there is in all is then found by moments, which the validation
rows out of fold keep honest. Imports torch and numpy.

Shapes: N rows, F features, K kinds of copies; class 0 is "clean", class k the k-th kind. Copies may be of noise, or of
right rows in another form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ..core.fit import fit_softmax, logits

# From stiff to loose, in equal ratios.
RIDGES = (100.0, 10.0, 1.0, 0.1)
ITERATIONS = 60
FOLDS = 5
# Standardised features are cut here: one odd row must not decide.
LIMIT = 4.0
# Standard errors on either side of a 95 % interval.
INTERVAL = 1.96
# A kind that was not found keeps the share of so many rows, so that rows are ranked even where none was.
FLOOR_ROWS = 0.5


@dataclass(frozen=True)
class Relative:
    """Features of a row against what clean rows of its length have, in standard deviations of those.

    Short answers differ from long ones in nearly all features, and are right as often. So length is no evidence.

    Args:
        center, scale: of the lengths.
        low, high: of the validation rows.
        mean_3F, log_spread_2F: coefficients on 1, length and its square.
    """

    center: float
    scale: float
    low: float
    high: float
    mean_3F: np.ndarray
    log_spread_2F: np.ndarray

    @classmethod
    def of(cls, features_NF: np.ndarray, length_N: np.ndarray) -> Relative:
        """From clean rows."""
        center, scale = float(length_N.mean()), float(length_N.std() + 1e-9)
        low, high = (float((end - center) / scale) for end in (length_N.min(), length_N.max()))
        found = cls(center, scale, low, high, np.zeros((3, 0)), np.zeros((2, 0)))
        basis = found._basis(length_N)
        spread = features_NF.std(0) + 1e-9
        mean = _ridge(basis, features_NF)
        rest = features_NF - basis @ mean
        log_spread = _ridge(basis[:, :2], np.log(np.abs(rest) + 0.05 * spread))
        scaled = rest / np.exp(basis[:, :2] @ log_spread)
        log_spread[0] += np.log(np.sqrt((scaled**2).mean(0)) + 1e-9)
        return cls(center, scale, low, high, mean, log_spread)

    def __call__(self, features_NF: np.ndarray, length_N: np.ndarray) -> np.ndarray:
        basis = self._basis(length_N)
        z = (features_NF - basis @ self.mean_3F) / np.exp(basis[:, :2] @ self.log_spread_2F)
        return np.clip(z, -LIMIT, LIMIT)

    def _basis(self, length_N: np.ndarray) -> np.ndarray:
        u = np.clip((length_N - self.center) / self.scale, self.low, self.high)
        return np.stack([np.ones_like(u), u, u**2], 1)


@dataclass(frozen=True)
class Classifier:
    """Class probabilities of rows, as if all classes were equally frequent.

    Args:
        relative: how features become those of rows of one length; `relatives`: without the clean rows of each fold,
            which else would look more usual than rows that nobody has seen.
        coefficients: by fold that they have not seen, (2 F + 1, K + 1) each, on those features and their squares: with
            the squares, classes may differ in spread, which the estimate of the shares needs most.
        ridge: where the likelihood in cross-validation is best, between those that were tried too: of two that do as
            well, rounding would choose.
    """

    relative: Relative
    relatives: list[Relative]
    coefficients: list[Tensor]
    ridge: float

    def by_fold(self, features: np.ndarray, length: np.ndarray) -> np.ndarray:
        """log p by each of them, (FOLDS, N, K + 1)."""
        folds = zip(self.relatives, self.coefficients, strict=True)
        return np.stack([_log_softmax(logits(model, _expand(own(features, length))).numpy()) for own, model in folds])

    def spoke(self, features: np.ndarray, length: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much each feature said for "clean" against the kind (0 to K - 1) of each row, (N, F), against what it
        says of a clean row on average; and the features in standard deviations, (N, F)."""
        z = self.relative(features, length)
        n = z.shape[1]
        mean = torch.stack(self.coefficients).mean(0).numpy()
        speaks = mean[:, :1] - mean[:, 1:]
        return z * speaks[:n, kinds].T + (z**2 - 1) * speaks[n : 2 * n, kinds].T, z


def fit_classifier(
    features: np.ndarray, length: np.ndarray, classes: np.ndarray, fold: np.ndarray
) -> tuple[Classifier, np.ndarray]:
    """The classifier, and the `log_p` (N, K + 1) of its own rows out of fold.

    Args:
        features: (N, F).
        length: (N,), of the answers.
        classes: (N,), 0 = clean.
        fold: (N,), that of the validation row that each is a copy of.
    """
    clean = classes == 0
    relative = Relative.of(features[clean], length[clean])
    relatives = [Relative.of(features[some], length[some]) for some in (clean & (fold != k) for k in range(FOLDS))]
    by_fold = [_expand(own(features, length)) for own in relatives]
    counts = np.bincount(classes)
    onehot = np.eye(len(counts))[classes] * (len(classes) / len(counts) / counts)[:, None].T
    targets = torch.from_numpy(onehot)
    kept = [torch.from_numpy(fold != k) for k in range(FOLDS)]

    def fit(ridge: float, start: Sequence[Tensor | None]) -> tuple[float, list[Tensor], np.ndarray]:
        """Likelihood out of fold, the models, and what they say out of fold."""
        models = [
            fit_softmax(x[some], targets[some], ridge, start_FK=at, iterations=ITERATIONS)
            for x, some, at in zip(by_fold, kept, start, strict=True)
        ]
        held_out = np.zeros_like(onehot)
        for x, some, model in zip(by_fold, kept, models, strict=True):
            held_out[~some.numpy()] = _log_softmax(logits(model, x[~some]).numpy())
        return float((onehot * held_out).sum()), models, held_out

    models: Sequence[Tensor | None] = [None] * FOLDS
    tried = []
    for ridge in RIDGES:  # each started where the stiffer one ended
        tried.append(fit(ridge, models))
        models = tried[-1][1]
    k, away = _highest([likelihood for likelihood, _, _ in tried])
    ridge = RIDGES[k] * (RIDGES[1] / RIDGES[0]) ** away
    _, found, held_out = fit(ridge, tried[k][1]) if away else tried[k]
    return Classifier(relative, relatives, found, ridge), held_out


def _highest(values: Sequence[float]) -> tuple[int, float]:
    """Where the highest value is, and how far from there, in steps of less than one, the top of the parabola through
    it and its neighbours; 0 at either end."""
    k = int(np.argmax(values))
    if k in (0, len(values) - 1):
        return k, 0.0
    before, top, after = values[k - 1 : k + 2]
    bend = 2 * top - before - after
    return k, (after - before) / (2 * bend) if bend else 0.0


def shares(log_p: np.ndarray, n_validation: int) -> np.ndarray:
    """Shares of the classes among rows, (K + 1,), that explain their probabilities `log_p` (N, K + 1) best.

    Maximum likelihood over mixtures of clean rows and some of the kinds, taken in one after the other as long as the
    likelihood pays for one more (half the logarithm of the number of rows, as in the Bayesian information criterion),
    or else a few per cent of noise would be found in clean data. `n_validation`, the clean rows that these rest on,
    bounds the number of rows that count: what their own sampling error looks like from N rows is no evidence.
    """
    n_classes = log_p.shape[1]
    effective = 1 / (1 / max(1, len(log_p)) + 1 / n_validation)
    classes, share = [0], np.ones(1)
    best = log_p[:, 0].mean() * effective if len(log_p) else 0.0
    while len(log_p):
        tried = []
        for kind in set(range(1, n_classes)) - set(classes):
            p = _expectation_maximisation(log_p[:, [*classes, kind]])
            likelihood = _log_sum_exp(log_p[:, [*classes, kind]] + np.log(np.maximum(p, 1e-12))).mean() * effective
            tried.append((likelihood - len(classes) * np.log(effective) / 2, kind, p))
        if not tried or max(tried, key=lambda one: one[0])[0] <= best:
            break
        best, kind, share = max(tried, key=lambda one: one[0])
        classes.append(kind)
    found = np.zeros(n_classes)
    found[classes] = share
    return found


def share_by_moments(
    of_training: np.ndarray, of_clean: Sequence[np.ndarray], of_noisy: Sequence[np.ndarray], weights: np.ndarray
) -> tuple[float, float]:
    """Share of noisy rows and its standard error, from numbers that are higher for clean rows.

    With a the mean of clean validation rows out of fold and b that of noisy copies of them, training rows of which a
    share s is noisy have the mean `(1 - s) a + s b`: s = (a - mean) / (a - b).

    Args:
        of_clean, of_noisy: by class.
        weights: of the classes, the clean ones first.
    """
    n = len(of_clean)
    a, a_variance = _mean(of_clean, weights[:n])
    b, b_variance = _mean(of_noisy, weights[n:])
    span = max(a - b, 1e-3)
    share = float(np.clip((a - of_training.mean()) / span, 0, 1))
    variance = of_training.var() / len(of_training) + (1 - share) ** 2 * a_variance + share**2 * b_variance
    return share, float(min(1.0, np.sqrt(variance) / span))


def errors_of_one_of(n_kinds: int) -> float:
    """Standard errors above 0 of which a share is more than what chance looks like: as many as `INTERVAL` where a
    single kind of noise is looked for. Training rows choose the kinds that explain them best, and of many one explains
    clean rows by chance more often than one of one does (Bonferroni 1936)."""
    return NormalDist().inv_cdf(1 - (1 - NormalDist().cdf(INTERVAL)) / max(1, n_kinds))


def log_odds(log_p: np.ndarray, class_shares: np.ndarray, noisy: np.ndarray) -> np.ndarray:
    """Log of P(clean) / P(noisy) of each row, (N,), given the shares of the classes and which are noise, (K + 1,)."""
    floor = FLOOR_ROWS / len(log_p)
    weighted = log_p + np.log(np.maximum(class_shares, floor))
    return _log_sum_exp(weighted[:, ~noisy]) - _log_sum_exp(weighted[:, noisy])


def _mean(of_classes: Sequence[np.ndarray], weights: np.ndarray) -> tuple[float, float]:
    """Of a mixture of classes, and its variance."""
    weights = weights / weights.sum()
    mean = sum(w * x.mean() for w, x in zip(weights, of_classes, strict=True))
    return float(mean), float(sum(w**2 * x.var() / len(x) for w, x in zip(weights, of_classes, strict=True)))


def shift_to(log_odds_N: np.ndarray, share: float, most: float) -> float:
    """What to add to log odds so that they say a share of noisy rows, and put at most the share `most` below 0."""
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        noise = 1 / (1 + np.exp(np.clip(log_odds_N + middle, -50, 50)))
        low, high = (middle, high) if noise.mean() > share else (low, middle)
    n = int(most * len(log_odds_N))
    ascending = np.sort(log_odds_N)
    return high if n >= len(ascending) else max(high, -float(ascending[n]))


def _ridge(x_NB: np.ndarray, y_NF: np.ndarray) -> np.ndarray:
    """Least squares with a little ridge on all but the mean."""
    penalty = np.diag([0.0, *[1e-2 * len(x_NB)] * (x_NB.shape[1] - 1)])
    return np.linalg.solve(x_NB.T @ x_NB + penalty, x_NB.T @ y_NF)


def _expand(z: np.ndarray) -> Tensor:
    return torch.from_numpy(np.hstack([z, z**2 - 1]))


def _expectation_maximisation(log_p: np.ndarray, iterations: int = 300) -> np.ndarray:
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    share = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(iterations):
        posterior = p * share
        new = (posterior / posterior.sum(1, keepdims=True)).mean(0)
        if np.abs(new - share).max() < 1e-4:
            break
        share = new
    return share


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = x.max(1)
    return top + np.log(np.exp(x - top[:, None]).sum(1))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - _log_sum_exp(x)[:, None]
