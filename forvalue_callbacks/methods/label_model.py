"""Which answers are wrong where answers repeat: a label model of held-out rows and, untrusted, of training rows.

A softmax over the K different answers predicts a row's right answer from what the network knows at the end of the
prompt: the state that predicts the answer's first token, and the mean state of the prompt. The training rows hold more
evidence than the held-out ones but some of their answers are wrong; expectation-maximisation uses them all the same::

    E   q_i(c)  ~  p(c | x_i) T[c, o_i]           which answer is right, given the one observed and the noise T
        T[c, o] =  share of rows of right answer c that are observed as o, drawn to symmetric noise
    M   p       =  softmax regression on held-out rows and on training rows with targets q

The rows are in folds: the p that judges a row was fitted without its fold, so no row vouches for itself. The score is
the log of the odds that the observed answer is right. Imports torch and numpy.

An answer that no held-out row has is learned from the training rows that show it, if there are two or more. Answers
that come once in all are one answer, "another", that nothing speaks for: they get low odds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.fit import fit_softmax, logits
from ..core.stats import auc

FOLDS = 5
RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0)
# A stiff ridge and few rounds: at a loose one, more rounds confirm what they started from.
EM_RIDGE, EM_ROUNDS, EM_ITERATIONS = 30.0, 2, 30
# Ridge of the whitening, of a correlation matrix; beyond so many features, the leading directions.
WHITENING_RIDGE, MAX_FEATURES = 0.01, 512
TEMPERATURES = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)


@dataclass(frozen=True)
class LabelFit:
    """What the label model says of N training rows and M held-out rows.

    Args:
        log_odds: (N,), of the observed answer being right.
        noise_share: estimated share of wrong answers among the training rows.
        flipped_auc: chance that a held-out row's answer gets better odds than a wrong one of another, out of fold.
        likelihood: mean log p of the held-out rows' answers, out of fold: from held-out rows alone, and with training
            rows.
    """

    log_odds: np.ndarray
    noise_share: float
    flipped_auc: float
    likelihood: tuple[float, float]


def fit_labels(
    held_out_MF: Tensor, held_out_M: np.ndarray, train_NF: Tensor, observed_N: np.ndarray, seed: int = 0
) -> LabelFit:
    """Fit the label model.

    Args:
        held_out_MF, train_NF: features, on any device; the fit is in float32 there.
        held_out_M, observed_N: the answers, as any integers.
        seed: of the folds and of the wrong answers.

    Raises:
        ValueError: fewer than two different answers, features that are not finite.
    """
    x = torch.cat([held_out_MF, train_NF]).float()
    if not torch.isfinite(x).all():
        raise ValueError("features of the label model are not finite.")
    held_out_M, observed_N, n_answers, another = _numbered(held_out_M, observed_N)
    if n_answers < 2:
        raise ValueError("all answers are the same: there is no wrong one to be found.")
    device, n_held_out = x.device, len(held_out_M)
    z = _half_whitened(x, seed)
    known, train = z[:n_held_out], z[n_held_out:]
    rng = np.random.default_rng(seed)
    fold = rng.permutation(n_held_out) % FOLDS
    train_fold = rng.permutation(len(observed_N)) % FOLDS
    others = [torch.from_numpy(fold != k).to(device) for k in range(FOLDS)]
    train_others = [torch.from_numpy(train_fold != k).to(device) for k in range(FOLDS)]
    observed = torch.from_numpy(observed_N).to(device)
    eye = torch.eye(n_answers, dtype=z.dtype, device=device)
    onehot, unknown_onehot = eye[torch.from_numpy(held_out_M).to(device)], eye[observed]
    # Of an answer that no held-out row has, the training rows that show it are all there is to start from.
    unknown = torch.from_numpy(~np.isin(observed_N, held_out_M) & (observed_N != another)).to(device)

    def held_out_logits(models: list[Tensor]) -> Tensor:
        out = torch.zeros_like(onehot)
        for model, kept in zip(models, others, strict=True):
            out[~kept] = logits(model, known[~kept])
        return out

    candidates = []
    models = [z.new_zeros(z.shape[1] + 1, n_answers)] * FOLDS
    for ridge in RIDGES:  # from stiff to loose, each started where the last one ended
        models = [
            fit_softmax(
                torch.cat([known[kept], train[unknown & train_kept]]),
                torch.cat([onehot[kept], unknown_onehot[unknown & train_kept]]),
                ridge,
                start_FK=start,
            )
            for kept, train_kept, start in zip(others, train_others, models, strict=True)
        ]
        candidates.append((*_tempered(held_out_logits(models), onehot), models))
    alone, temperature, fitted = max(candidates, key=lambda candidate: candidate[0])

    truth = torch.zeros(len(train), n_answers, dtype=torch.float64, device=device)  # q
    flips = torch.zeros(n_answers, n_answers, dtype=torch.float64, device=device)  # T
    log_p = torch.zeros_like(truth)
    likelihood = alone
    for round_ in range(EM_ROUNDS + 1):
        for model, kept in zip(fitted, train_others, strict=True):
            log_p[~kept] = (logits(model, train[~kept]).double() * temperature).log_softmax(1)
        truth, flips = _expectation(log_p, observed)
        if round_ == EM_ROUNDS:
            break
        fitted = [
            fit_softmax(
                torch.cat([known[kept], train[train_kept]]),
                torch.cat([onehot[kept], truth[train_kept].to(z.dtype)]),
                EM_RIDGE,
                start_FK=model,
                iterations=EM_ITERATIONS,
            )
            for model, kept, train_kept in zip(fitted, others, train_others, strict=True)
        ]
        likelihood, temperature = _tempered(held_out_logits(fitted), onehot)
    rows = torch.arange(len(train), device=device)
    joint = log_p + flips.clamp(min=1e-12).log().T[observed]
    right = joint[rows, observed]
    joint[rows, observed] = -torch.inf
    return LabelFit(
        (right - joint.logsumexp(1)).cpu().numpy(),
        float(1 - truth[rows, observed].mean()),
        _flipped_auc((held_out_logits(fitted).double() * temperature).log_softmax(1), held_out_M, rng),
        (alone, likelihood),
    )


def _numbered(held_out_M: np.ndarray, observed_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Answers as 0 to K - 1, those of held-out rows first; K; and the one for all that come once (K if none does)."""
    answers, counts = np.unique(observed_N, return_counts=True)
    rest = np.setdiff1d(answers[counts > 1], held_out_M)
    names = [*np.unique(held_out_M).tolist(), *rest.tolist()]
    number = {name: k for k, name in enumerate(names)}
    another = len(names)
    observed = np.array([number.get(name, another) for name in observed_N.tolist()], dtype=np.int64)
    n_answers = another + int((observed == another).any())
    return np.array([number[name] for name in held_out_M.tolist()], dtype=np.int64), observed, n_answers, another


def _expectation(log_p: Tensor, observed: Tensor, iterations: int = 4) -> tuple[Tensor, Tensor]:
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


def _flipped_auc(log_p_MK: Tensor, held_out_M: np.ndarray, rng: np.random.Generator) -> float:
    """AUC of the log odds of the held-out rows' own answers against those of an answer that is wrong on purpose."""
    log_odds = (log_p_MK - torch.log1p(-log_p_MK.exp().clamp(max=1 - 1e-12))).cpu().numpy()
    n_known = int(held_out_M.max()) + 1
    n = n_known if n_known > 1 else log_odds.shape[1]
    wrong = (held_out_M + rng.integers(1, n, len(held_out_M))) % n
    rows = np.arange(len(held_out_M))
    return auc(log_odds[rows, held_out_M], log_odds[rows, wrong])


def _half_whitened(x_NF: Tensor, seed: int) -> Tensor:
    """Standardised features times (C + ridge)^(-1/4), C their correlations: half way to decorrelated ones."""
    z = (x_NF - x_NF.mean(0)) / x_NF.std(0).clamp(min=1e-9)
    if z.shape[1] > MAX_FEATURES:
        with torch.random.fork_rng():  # the sketch draws from the global generator, which stays as found
            torch.manual_seed(seed)
            z = z @ torch.svd_lowrank(z, q=min(MAX_FEATURES, len(z)))[2]
    values, vectors = torch.linalg.eigh((z.T @ z).double() / len(z))
    root = vectors * (values.clamp(min=0) + WHITENING_RIDGE) ** -0.25
    return z @ root.to(z.dtype)
