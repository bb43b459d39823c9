"""Which answers are wrong where answers repeat: a label model of validation rows and, untrusted, of training rows.

A softmax over the K different answers predicts a row's right answer from what the network knows at the end of the
prompt: the state that predicts the answer's first token, and the mean state of the prompt. The training rows hold more
evidence than the validation rows but some of their answers are wrong; expectation-maximisation uses them anyway::

    E   q_i(c)  ~  p(c | x_i) T[c, o_i]           which answer is right, given the one observed and the noise T
        T[c, o] =  share of rows of right answer c that are observed as o, drawn to symmetric noise
    M   p       =  softmax regression on validation rows and on training rows with targets q

The rows are in folds: the p that judges a row was fitted without its fold, so no row vouches for itself. The score is
the log of the odds that the observed answer is right. Imports torch and numpy.

An answer that no validation row has is learned from the training rows that show it, if there are two or more. Answers
that come once in all are one answer, "another", that nothing speaks for: they get low odds.

Shapes: M validation rows, N training rows that are fitted on, F features, K answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..core.fit import fit_softmax, logits
from ..core.stats import auc, power_of_moment

FOLDS = 5
RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0)
# A stiff ridge and few rounds: at a loose one, more rounds confirm what they started from.
EM_RIDGE, EM_ROUNDS, EM_ITERATIONS = 30.0, 2, 30
# Ridge of the whitening, of a correlation matrix.
WHITENING_RIDGE = 0.01
TEMPERATURES = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)


@dataclass(frozen=True)
class LabelFit:
    """What the label model says of N training rows and M validation rows, and of any more.

    Args:
        log_odds: (N,), of the observed answer being right.
        noise_share: estimated share of wrong answers among the training rows.
        flipped_auc: chance that a validation row's answer gets better odds than a wrong one of another, out of fold.
        likelihood: mean log p of the validation rows' answers, out of fold: from validation rows alone, and with
            training rows.
    """

    log_odds: np.ndarray
    noise_share: float
    flipped_auc: float
    likelihood: tuple[float, float]
    _map: FeatureMap = field(repr=False)
    _models: list[Tensor] = field(repr=False)
    _temperature: float = field(repr=False)
    _flips: Tensor = field(repr=False)
    _answers: Answers = field(repr=False)

    def judge(self, features_NF: Tensor, observed_N: np.ndarray) -> np.ndarray:
        """Log odds of further rows, (N,), in turn by the models of the folds, which have seen none of them."""
        z = self._map(features_NF)
        observed = torch.from_numpy(self._answers.numbers(observed_N)).to(z.device)
        log_p = torch.zeros(len(z), len(self._flips), dtype=torch.float64, device=z.device)
        for k, model in enumerate(self._models):
            log_p[k::FOLDS] = (logits(model, z[k::FOLDS]).double() * self._temperature).log_softmax(1)
        return _log_odds(log_p, self._flips, observed)


class Answers:
    """Answers as 0 to K - 1, those of validation rows first; the last may be one for all that come once.

    Args:
        known_M, observed_N: the answers of both sides, as any integers.
    """

    def __init__(self, known_M: np.ndarray, observed_N: np.ndarray):
        answers, counts = np.unique(observed_N, return_counts=True)
        known = np.unique(known_M)
        rest = np.setdiff1d(answers[counts > 1], known)
        names = np.concatenate([known, rest])
        self._order = np.argsort(names, kind="stable")
        self._sorted = names[self._order]
        self.another = len(names)
        self.n = self.another + int(len(np.setdiff1d(answers, names)) > 0)

    def numbers(self, answers: np.ndarray) -> np.ndarray:
        """The number of each, int64; `another` for those that are none of them."""
        place = np.searchsorted(self._sorted, answers).clip(max=len(self._sorted) - 1)
        found = self._sorted[place] == answers
        return np.where(found, self._order[place], self.another).astype(np.int64)


class FeatureMap:
    """Standardised features times (C + ridge)^(-1/4), C their correlations: half way to decorrelated ones.

    Args:
        x_NF: features of the rows that it is learned from.
        standardised: they are already, of the rows of the validation side.
    """

    def __init__(self, x_NF: Tensor, standardised: bool = False):
        n_features = x_NF.shape[1]
        self.center = torch.zeros(n_features).to(x_NF) if standardised else x_NF.mean(0)
        self.spread = torch.ones(n_features).to(x_NF) if standardised else x_NF.std(0).clamp(min=1e-9)
        z = (x_NF - self.center) / self.spread
        moment = (z.T @ z).double() / len(z)
        self.root = power_of_moment(moment, -0.25, floor=WHITENING_RIDGE, rotated=True).to(z.dtype)

    def __call__(self, x_NF: Tensor) -> Tensor:
        return (x_NF.float() - self.center) / self.spread @ self.root


def fit_labels(
    known_MF: Tensor,
    known_M: np.ndarray,
    train_NF: Tensor,
    observed_N: np.ndarray,
    *,
    all_observed: np.ndarray | None = None,
    standardised: bool = False,
    seed: int = 0,
) -> LabelFit:
    """Fit the label model.

    Args:
        known_MF, train_NF: features of validation and training rows, on any device; the fit is in float32 there.
        known_M, observed_N: the answers, as any integers.
        all_observed: those of all training rows, where these are some of them.
        standardised: the features are.
        seed: of the folds and of the wrong answers.

    Raises:
        ValueError: fewer than two different answers, features that are not finite.
    """
    x = torch.cat([known_MF, train_NF]).float()
    if not torch.isfinite(x).all():
        raise ValueError("features of the label model are not finite.")
    answers = Answers(known_M, observed_N if all_observed is None else all_observed)
    if answers.n < 2:
        raise ValueError("all answers are the same: there is no wrong one to be found.")
    feature_map = FeatureMap(x, standardised)
    z = feature_map(x)
    rng = np.random.default_rng(seed)
    sides = _Sides(z, answers.numbers(known_M), answers.numbers(observed_N), answers, rng)
    alone, temperature, models = _on_validation_rows(sides)
    likelihood = alone
    for _ in range(EM_ROUNDS):
        truth, _ = expectation(sides.judged(models, temperature), sides.observed)
        models = _with_training_rows(sides, models, truth)
        likelihood, temperature = _tempered(sides.out_of_fold(models), sides.onehot)
    log_p = sides.judged(models, temperature)
    truth, flips = expectation(log_p, sides.observed)
    rows = torch.arange(len(log_p), device=z.device)
    judged = (sides.out_of_fold(models).double() * temperature).log_softmax(1)
    return LabelFit(
        _log_odds(log_p, flips, sides.observed),
        float(1 - truth[rows, sides.observed].mean()),
        _flipped_auc(judged, sides.known_M, rng),
        (alone, likelihood),
        feature_map,
        models,
        temperature,
        flips,
        answers,
    )


class _Sides:
    """Validation and training rows, in folds."""

    def __init__(
        self, z: Tensor, known_M: np.ndarray, observed_N: np.ndarray, answers: Answers, rng: np.random.Generator
    ):
        device = z.device
        self.known_M = known_M
        self.known, self.train = z[: len(known_M)], z[len(known_M) :]
        fold = rng.permutation(len(known_M)) % FOLDS
        train_fold = rng.permutation(len(observed_N)) % FOLDS
        self.others = [torch.from_numpy(fold != k).to(device) for k in range(FOLDS)]
        self.train_others = [torch.from_numpy(train_fold != k).to(device) for k in range(FOLDS)]
        self.observed = torch.from_numpy(observed_N).to(device)
        eye = torch.eye(answers.n, dtype=z.dtype, device=device)
        self.onehot, self.observed_onehot = eye[torch.from_numpy(known_M).to(device)], eye[self.observed]
        # Of an answer that no validation row has, the training rows that show it are all there is to start from.
        unknown = ~np.isin(observed_N, known_M) & (observed_N != answers.another)
        self.unknown = torch.from_numpy(unknown).to(device)

    def out_of_fold(self, models: list[Tensor]) -> Tensor:
        """Logits of the validation rows, (M, K)."""
        out = torch.zeros_like(self.onehot)
        for model, kept in zip(models, self.others, strict=True):
            out[~kept] = logits(model, self.known[~kept])
        return out

    def judged(self, models: list[Tensor], temperature: float) -> Tensor:
        """log p of the training rows by the models that have not seen them, float64 (N, K)."""
        log_p = torch.zeros(self.observed_onehot.shape, dtype=torch.float64, device=self.train.device)
        for model, kept in zip(models, self.train_others, strict=True):
            log_p[~kept] = (logits(model, self.train[~kept]).double() * temperature).log_softmax(1)
        return log_p


def _on_validation_rows(sides: _Sides) -> tuple[float, float, list[Tensor]]:
    """The ridge with the best likelihood out of fold: that, the temperature, and a model for each fold."""
    known, train, unknown = sides.known, sides.train, sides.unknown
    candidates = []
    models = [known.new_zeros(known.shape[1] + 1, sides.onehot.shape[1])] * FOLDS
    for ridge in RIDGES:  # from stiff to loose, each started where the last one ended
        models = [
            fit_softmax(
                torch.cat([known[kept], train[unknown & train_kept]]),
                torch.cat([sides.onehot[kept], sides.observed_onehot[unknown & train_kept]]),
                ridge,
                start_FK=start,
            )
            for kept, train_kept, start in zip(sides.others, sides.train_others, models, strict=True)
        ]
        candidates.append((*_tempered(sides.out_of_fold(models), sides.onehot), models))
    return max(candidates, key=lambda candidate: candidate[0])


def _with_training_rows(sides: _Sides, models: list[Tensor], truth: Tensor) -> list[Tensor]:
    """The models fitted on both sides, a training row with the answers that are right as far as is known."""
    known, train = sides.known, sides.train
    return [
        fit_softmax(
            torch.cat([known[kept], train[train_kept]]),
            torch.cat([sides.onehot[kept], truth[train_kept].to(known.dtype)]),
            EM_RIDGE,
            start_FK=model,
            iterations=EM_ITERATIONS,
        )
        for model, kept, train_kept in zip(models, sides.others, sides.train_others, strict=True)
    ]


def _log_odds(log_p: Tensor, flips: Tensor, observed: Tensor) -> np.ndarray:
    """Of the observed answer being right, (N,)."""
    joint = log_p + flips.clamp(min=1e-12).log().T[observed]
    rows = torch.arange(len(log_p), device=log_p.device)
    right = joint[rows, observed]
    joint[rows, observed] = -torch.inf
    return (right - joint.logsumexp(1)).cpu().numpy()


def expectation(log_p: Tensor, observed: Tensor, iterations: int = 4) -> tuple[Tensor, Tensor]:
    """q (N, K) and T (K, K), alternating."""
    n_answers = log_p.shape[1]
    p = log_p.exp()
    eye = torch.eye(n_answers, dtype=p.dtype, device=p.device)
    seen = eye[observed]
    pseudo_rows = max(5.0, len(p) / n_answers / 4)
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


def _tempered(logits_MK: Tensor, onehot_MK: Tensor) -> tuple[float, float]:
    """The best mean log-likelihood over temperatures, and the factor on the logits that gives it."""
    likelihoods = {t: float(((logits_MK * t).log_softmax(1) * onehot_MK).sum() / len(onehot_MK)) for t in TEMPERATURES}
    best = max(likelihoods, key=lambda t: likelihoods[t])
    return likelihoods[best], best


def _flipped_auc(log_p_MK: Tensor, known_M: np.ndarray, rng: np.random.Generator) -> float:
    """AUC of the log odds of the validation rows' own answers against those of an answer that is wrong on purpose."""
    log_odds = (log_p_MK - torch.log1p(-log_p_MK.exp().clamp(max=1 - 1e-12))).cpu().numpy()
    n_known = int(known_M.max()) + 1
    n = n_known if n_known > 1 else log_odds.shape[1]
    wrong = (known_M + rng.integers(1, n, len(known_M))) % n
    rows = np.arange(len(known_M))
    return auc(log_odds[rows, known_M], log_odds[rows, wrong])
