"""From probabilities of answers to what is said of rows: the noise, its share, odds, and evidence for them.

Shapes: E rows with answers that are given, N training rows, K answers, V views.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.fit import minimum
from ..core.stats import auc
from ..scores.noise import USEFUL_AUC

# Standard errors on either side of a 95 % interval; how often rows are drawn again for one.
INTERVAL, DRAWS = 1.96, 200
# An answer is judged if so many validation rows have it; so many rows' worth of the share is mixed into its odds.
MIN_OF_CLASS, FEW = 3, 2.0
# Where the fit of the noise among the given answers starts, and how far its log odds may go from there.
FIRST_NOISE, SPREAD_OF_NOISE = 0.02, 2.0
# So many rows of one answer given in place of another count as much as the symmetric noise.
PSEUDO_ROWS = 10.0
# Rows that a handful of numbers, and intervals, rest on at most.
ENOUGH = 4096


@dataclass(frozen=True)
class Told:
    """How well a wrong answer is told from the right one.

    Args:
        auc: chance that a row's own answer gets better odds than a wrong one of another.
        interval: 95 %, over rows drawn again.
    """

    auc: float
    interval: tuple[float, float]

    @property
    def useful(self) -> bool:
        return self.interval[0] >= USEFUL_AUC


def told_apart(right_E: np.ndarray, wrong_E: np.ndarray, rng: np.random.Generator) -> Told:
    """By log odds of rows' own answers and of answers that are wrong on purpose."""
    right_E, wrong_E = right_E[:ENOUGH], wrong_E[:ENOUGH]
    drawn = [rng.integers(len(right_E), size=len(right_E)) for _ in range(DRAWS)]
    low, high = np.quantile([auc(right_E[some], wrong_E[some]) for some in drawn], [0.025, 0.975])
    return Told(auc(right_E, wrong_E), (float(low), float(high)))


@dataclass(frozen=True)
class Weights:
    """How views are weighed, and the noise among the answers that this rests on.

    Args:
        by_chain: (chains, V), each from the folds that its chain has seen.
        noise, noise_error: share of given answers that are wrong, and its standard error.
        likelihood: mean log-likelihood of the given answers, each by the weights that have not seen it.
    """

    by_chain: Tensor
    noise: float
    noise_error: float
    likelihood: float

    @property
    def surely_noise(self) -> bool:
        """Whether there is any beyond what chance may look like."""
        return self.noise > INTERVAL * self.noise_error


def weigh(logits_VEK: Tensor, given_E: Tensor, fold_E: Tensor | None, n_chains: int) -> Weights:
    """Weights w and noise e with the best likelihood of the given answers, for each chain those of the other folds'::

        sum_i log( (1 - e) p_i(o_i) + e (1 - p_i(o_i)) / (K - 1) ),   p_i = softmax( sum_v w_v logits_v )

    The noise keeps single wrong answers from flattening all probabilities. A prior holds the weights near 1 / V.

    Args:
        logits_VEK: float64, of rows by models that have not seen them.
        fold_E: None: all in one.
    """
    fitted = _fit_weights(logits_VEK, given_E)
    log_p = _log_p_given(fitted, logits_VEK, given_E)
    if fold_E is not None:
        by_chain = [_fit_weights(logits_VEK[:, fold_E != k], given_E[fold_E != k]) for k in range(n_chains)]
        log_p = torch.cat(
            [_log_p_given(x, logits_VEK[:, fold_E == k], given_E[fold_E == k]) for k, x in enumerate(by_chain)]
        )
    else:
        by_chain = [fitted] * n_chains
    noise = float(fitted[-1].sigmoid())
    own = torch.einsum("v,vek->ek", fitted[:-1].exp(), logits_VEK).softmax(1).gather(1, given_E[:, None])[:, 0]
    other = (1 - own) / (logits_VEK.shape[2] - 1)
    information = ((other - own) / ((1 - noise) * own + noise * other).clamp(min=1e-12)).square().sum()
    error = min(1.0, float(1 / information.clamp(min=1e-12).sqrt()))
    return Weights(torch.stack([x[:-1].exp() for x in by_chain]), noise, error, float(log_p.mean()))


def _fit_weights(logits_VEK: Tensor, given_E: Tensor) -> Tensor:
    """log w of each view, and the log odds of the noise, (V + 1,)."""
    logits_VEK, given_E = logits_VEK[:, :ENOUGH], given_E[:ENOUGH]
    n_views = len(logits_VEK)
    center = torch.zeros(n_views + 1, dtype=torch.float64, device=logits_VEK.device)
    center[:-1] = -np.log(n_views)
    center[-1] = np.log(FIRST_NOISE / (1 - FIRST_NOISE))
    spread = torch.ones_like(center)
    spread[-1] = SPREAD_OF_NOISE

    def loss_and_gradient(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_(True)
        with torch.enable_grad():
            loss = 0.5 * ((x - center) / spread).square().sum() - _log_p_given(x, logits_VEK, given_E).sum()
        return loss.item(), torch.autograd.grad(loss, x)[0]

    return minimum(loss_and_gradient, center, iterations=50, tolerance=1e-3)


def _log_p_given(x: Tensor, logits_VEK: Tensor, given_E: Tensor) -> Tensor:
    """Log-likelihood of the given answers, (E,)."""
    mixed = torch.einsum("v,vek->ek", x[:-1].exp(), logits_VEK)
    own = mixed.log_softmax(1).gather(1, given_E[:, None])[:, 0].exp()
    noise = x[-1].sigmoid()
    return ((1 - noise) * own + noise * (1 - own) / (logits_VEK.shape[2] - 1)).clamp(min=1e-30).log()


def expectation(log_p: Tensor, observed: Tensor, iterations: int = 4) -> tuple[Tensor, Tensor]:
    """q (N, K) and T (K, K), alternating."""
    n_answers = log_p.shape[1]
    p = log_p.exp()
    eye = torch.eye(n_answers, dtype=p.dtype, device=p.device)
    seen = eye[observed]
    pseudo_rows = max(PSEUDO_ROWS * (n_answers - 1), len(p) / n_answers / 4)
    flips = 0.8 * eye + 0.2 * (1 - eye) / (n_answers - 1)
    truth = p
    for _ in range(iterations):
        truth = p * flips.T[observed]
        truth = truth / truth.sum(1, keepdim=True).clamp(min=1e-300)
        counts = truth.T @ seen
        rate = 1 - float(counts.diagonal().sum() / counts.sum())
        symmetric = (1 - rate) * eye + rate * (1 - eye) / (n_answers - 1)
        flips = (counts + pseudo_rows * symmetric) / (counts.sum(1, keepdim=True) + pseudo_rows)
    return truth, flips


def posterior_odds(log_p: Tensor, flips: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds of the observed answer being right, (N,), and which other one is if it is not, p (N, K)."""
    joint = log_p + flips.clamp(min=1e-12).log().T[observed]
    rows = torch.arange(len(log_p), device=log_p.device)
    right = joint[rows, observed]
    joint[rows, observed] = -torch.inf
    return right - joint.logsumexp(1), joint.softmax(1)


def share_by_moments(
    p_EK: np.ndarray, given_E: np.ndarray, noise: float, p_NK: np.ndarray, observed_N: np.ndarray
) -> tuple[float, float]:
    """Share of wrong answers among the training rows, and its standard error.

    With a the mean p of right answers, known from the validation rows' own, out of fold and less those of their share
    `noise` that are wrong, and b that of the others, training rows of which a share s have wrong answers have the mean
    p of their observed ones `(1 - s) a + s b`. Of rows that are judged: a validation row that is the only one of its
    answer has p near 0 out of fold, and says nothing of training rows.
    """
    known = np.bincount(given_E, minlength=p_EK.shape[1]) >= MIN_OF_CLASS
    own = p_EK[np.arange(len(p_EK)), given_E][known[given_E]]
    seen = p_NK[np.arange(len(observed_N)), observed_N][known[observed_N]]
    if not len(own) or not len(seen):
        return 0.0, 1.0
    n_others = p_EK.shape[1] - 1
    a = float((own.mean() - noise / n_others) / (1 - noise - noise / n_others))
    b = (1 - a) / n_others
    span = max(a - b, 1e-3)
    share = (a - float(seen.mean())) / span
    error = np.sqrt(own.var() / len(own) * (1 - share) ** 2 + seen.var() / len(seen)) / span
    return float(np.clip(share, 0, 1)), float(min(error, 1.0))


class Odds:
    """Log odds as they are given: calibrated to the share of noise there seems to be, careful where little is known.

    Args:
        counts: rows with an answer given of each answer, (K,).
        another: the number of answers that come once; K or more where there are none.
    """

    def __init__(self, counts: np.ndarray, another: int):
        self.counts = counts.copy()
        self.counts[another:] = 0
        self.share = self.shift = 0.0

    def judged(self, observed: np.ndarray) -> np.ndarray:
        """(N,) bool."""
        return self.counts[observed] >= MIN_OF_CLASS

    def calibrated(self, log_odds: np.ndarray, observed: np.ndarray, share: float, error: float) -> np.ndarray:
        """Log odds, (N,), shifted so that they say the share of wrong answers that there is, and put no more rows
        below 0 than the upper end of its interval. Where the share may be none, none: what is not known to be noise
        stays.

        Args:
            share, error: estimated, and its standard error.
        """
        self.share, spread = share, INTERVAL * error
        likely, most = (share, min(1.0, share + spread)) if share > spread else (0.0, 0.0)
        low, high = -20.0, 20.0
        for _ in range(50):
            self.shift = (low + high) / 2
            noise = 1 / (1 + np.exp(np.clip(self(log_odds, observed), -50, 50)))
            low, high = (self.shift, high) if noise.mean() > likely else (low, self.shift)
        while (self(log_odds, observed) < 0).sum() > int(most * len(log_odds)):
            self.shift += 0.25
        values = self(log_odds, observed)
        for answer in np.unique(observed):  # no answer goes altogether: its best row stays
            rows = np.flatnonzero(observed == answer)
            best = rows[values[rows].argmax()]
            values[best] = max(values[best], 0.0)
        return values

    def __call__(self, log_odds: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """Of an answer with few rows the odds are drawn to the share's, and of one with hardly any they keep their
        order above 0: it is not judged."""
        n = np.maximum(self.counts[observed], 1)
        prior = np.log((1 - min(self.share, 0.45)) / max(min(self.share, 0.45), 0.01))
        drawn = (n * (log_odds + self.shift) + FEW * prior) / (n + FEW)
        return np.where(self.judged(observed), drawn, np.logaddexp(0, drawn))
