"""Which answers are wrong where answers repeat: a label model of validation rows and, untrusted, of training rows.

A softmax over the K different answers predicts a row's right answer from what the network knows at the end of the
prompt: the state that predicts the answer's first token, and the mean state of the prompt. The training rows hold more
evidence than the validation rows but some of their answers are wrong; expectation-maximisation uses them anyway::

    E   q_i(c)  ~  p(c | x_i) T[c, o_i]           which answer is right, given the one observed and the noise T
        T[c, o] =  share of rows of right answer c that are observed as o, drawn to symmetric noise
    M   p       =  softmax regression on validation rows and on training rows with targets q

Nothing vouches for itself. There is a chain for each fold of the validation rows that never sees that fold, the soft
targets of training rows included; within a chain the p that judges a training row was fitted without its fold. What
chain k says of validation fold k is evidence: it chooses the temperature, and whether training rows are used at all.
The score of a training row is the log of the odds that its observed answer is right, the mean over the chains. Folds
are drawn in the order of the rows: give them in one that follows their content. Imports torch and numpy.

An answer that no validation row has is learned from the training rows that show it, if there are two or more. Answers
that come once in all are one answer, "another", that nothing speaks for: they get low odds.

Shapes: M validation rows, N training rows that are fitted on, F features, K answers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..core.fit import fit_softmax, logits
from ..core.stats import auc, power_of_moment
from ..scores.noise import USEFUL_AUC

FOLDS, TRAIN_FOLDS = 5, 2
RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0)
# A stiff ridge and few rounds: at a loose one, more rounds confirm what they started from.
EM_RIDGE, EM_ROUNDS, EM_ITERATIONS = 30.0, 2, 30
# Ridge of the whitening, of a correlation matrix.
WHITENING_RIDGE = 0.01
# Standard errors on either side of a 95 % interval; how often rows are drawn again for one.
INTERVAL, DRAWS = 1.96, 200
# An answer is judged if so many validation rows have it; so many rows' worth of the share is mixed into its odds.
MIN_OF_CLASS, FEW = 3, 2.0
TEMPERATURES = (0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)


@dataclass(frozen=True)
class LabelFit:
    """What the label model says of N training rows and M validation rows, and of any more.

    Args:
        log_odds: (N,), of the observed answer being right.
        noise_share: estimated share of wrong answers among the training rows.
        share_error: standard error of that, from the sampling of both sides.
        flipped_auc: chance that a validation row's answer gets better odds than a wrong one of another, by the chains
            that have not seen it.
        auc_interval: 95 %, from the sampling of the validation rows.
        likelihood: mean log p of the validation rows' answers, out of fold: from validation rows alone, and with
            training rows.
    """

    log_odds: np.ndarray
    noise_share: float
    share_error: float
    flipped_auc: float
    auc_interval: tuple[float, float]
    likelihood: tuple[float, float]
    _map: FeatureMap = field(repr=False)
    _chains: _Chains = field(repr=False)
    _odds: Odds = field(repr=False)
    _answers: Answers = field(repr=False)

    def judged(self, observed_N: np.ndarray) -> np.ndarray:
        """Which rows are judged, (N,) bool: those whose answer has `MIN_OF_CLASS` validation rows."""
        return self._odds.counts[self._answers.numbers(observed_N)] >= MIN_OF_CLASS

    def judge(self, features_NF: Tensor, observed_N: np.ndarray) -> np.ndarray:
        """Log odds of further rows, (N,), in turn by the models of the folds, which have seen none of them."""
        z = self._map(features_NF)
        numbers = self._answers.numbers(observed_N)
        turn = torch.arange(len(z), device=z.device) % TRAIN_FOLDS
        return self._odds(self._chains.log_odds(z, turn, torch.from_numpy(numbers).to(z.device)), numbers)


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
    rng = np.random.default_rng(seed)
    sides = _Sides(feature_map(x), answers.numbers(known_M), answers.numbers(observed_N), answers, rng)
    first = _on_validation_rows(sides)
    share, error = _share_by_moments(sides, first)
    chains = first
    for _ in range(EM_ROUNDS):
        chains = _with_training_rows(sides, chains)
    likelihood = (first.likelihood, chains.likelihood)
    if first.likelihood > chains.likelihood:  # training rows do not help to predict answers that are right
        chains = first
    odds = Odds(np.bincount(sides.known_M, minlength=answers.n), share, error)
    flipped, interval = _flipped_auc(sides.out_of_fold(chains).double() * chains.temperature, sides.known_M, rng)
    raw = chains.log_odds(sides.train, sides.train_fold, sides.observed)
    log_odds = odds.calibrated(raw, sides.observed.cpu().numpy(), interval[0] >= USEFUL_AUC)
    return LabelFit(log_odds, share, error, flipped, interval, likelihood, feature_map, chains, odds, answers)


class _Sides:
    """Validation and training rows, in folds."""

    def __init__(
        self, z: Tensor, known_M: np.ndarray, observed_N: np.ndarray, answers: Answers, rng: np.random.Generator
    ):
        device = z.device
        self.known_M = known_M
        self.known, self.train = z[: len(known_M)], z[len(known_M) :]
        self.fold = torch.from_numpy(rng.permutation(len(known_M)) % FOLDS).to(device)
        self.train_fold = torch.from_numpy(rng.permutation(len(observed_N)) % TRAIN_FOLDS).to(device)
        self.observed = torch.from_numpy(observed_N).to(device)
        eye = torch.eye(answers.n, dtype=z.dtype, device=device)
        self.onehot, self.observed_onehot = eye[torch.from_numpy(known_M).to(device)], eye[self.observed]
        # Of an answer that no validation row has, the training rows that show it are all there is to start from.
        unknown = ~np.isin(observed_N, known_M) & (observed_N != answers.another)
        self.unknown = torch.from_numpy(unknown).to(device)

    def out_of_fold(self, chains: _Chains) -> Tensor:
        """Logits of the validation rows by the chains that have not seen them, (M, K)."""
        out = torch.zeros_like(self.onehot)
        for k, models in enumerate(chains.models):
            here = self.fold == k
            out[here] = torch.stack([logits(model, self.known[here]) for model in models]).mean(0)
        return out


@dataclass(frozen=True)
class _Chains:
    """Models by validation fold and training fold that they have not seen, and what they say of their fold.

    Args:
        models: FOLDS x TRAIN_FOLDS coefficients.
        flips: the noise T of each chain, (FOLDS, K, K).
        temperature: factor on the logits with the best likelihood of the validation rows' answers, out of fold.
        likelihood: that, per row.
    """

    models: list[list[Tensor]]
    flips: list[Tensor]
    temperature: float
    likelihood: float

    def log_p(self, k: int, z_NF: Tensor, fold_N: Tensor) -> Tensor:
        """By chain k, (N, K) float64: each row by the model that has not seen its training fold."""
        out = torch.zeros(len(z_NF), self.flips[k].shape[0], dtype=torch.float64, device=z_NF.device)
        for j, model in enumerate(self.models[k]):
            here = fold_N == j
            out[here] = (logits(model, z_NF[here]).double() * self.temperature).log_softmax(1)
        return out

    def log_odds(self, z_NF: Tensor, fold_N: Tensor, observed: Tensor) -> np.ndarray:
        """Of the observed answers being right, (N,), the mean over the chains."""
        chains = range(len(self.models))
        return np.mean([_log_odds(self.log_p(k, z_NF, fold_N), self.flips[k], observed) for k in chains], 0)


def _chains(sides: _Sides, models: list[list[Tensor]]) -> _Chains:
    """Models with their temperature, and the noise that each chain sees."""
    n = sides.onehot.shape[1]
    none = [torch.eye(n, dtype=torch.float64, device=sides.known.device)] * FOLDS
    likelihood, temperature = _tempered(sides.out_of_fold(_Chains(models, none, 1.0, 0.0)), sides.onehot)
    chains = _Chains(models, none, temperature, likelihood)
    judged = (chains.log_p(k, sides.train, sides.train_fold) for k in range(FOLDS))
    return replace(chains, flips=[expectation(log_p, sides.observed)[1] for log_p in judged])


def _on_validation_rows(sides: _Sides) -> _Chains:
    """Chains of validation rows alone, at the ridge with the best likelihood out of fold."""
    n_unseen = int(sides.unknown.sum())
    found = []
    models = [[sides.known.new_zeros(sides.known.shape[1] + 1, sides.onehot.shape[1])] * TRAIN_FOLDS] * FOLDS
    for ridge in RIDGES:  # from stiff to loose, each started where the last one ended
        fitted = []
        for k in range(FOLDS):
            kept = sides.fold != k
            row = []
            for j in range(TRAIN_FOLDS if n_unseen else 1):
                more = sides.unknown & (sides.train_fold != j)
                x = torch.cat([sides.known[kept], sides.train[more]])
                targets = torch.cat([sides.onehot[kept], sides.observed_onehot[more]])
                row.append(fit_softmax(x, targets, ridge, start_FK=models[k][j]))
            fitted.append(row if n_unseen else row * TRAIN_FOLDS)
        models = fitted
        found.append((_tempered(sides.out_of_fold(_Chains(models, [], 1.0, 0.0)), sides.onehot)[0], models))
    return _chains(sides, max(found, key=lambda one: one[0])[1])


def _with_training_rows(sides: _Sides, chains: _Chains) -> _Chains:
    """The chains fitted on both sides, a training row with the answers that are right as far as its chain knows."""
    fitted = []
    for k in range(FOLDS):
        truth, _ = expectation(chains.log_p(k, sides.train, sides.train_fold), sides.observed)
        kept, row = sides.fold != k, []
        for j in range(TRAIN_FOLDS):
            others = sides.train_fold != j
            x = torch.cat([sides.known[kept], sides.train[others]])
            targets = torch.cat([sides.onehot[kept], truth[others].to(x.dtype)])
            start = chains.models[k][j]
            row.append(fit_softmax(x, targets, EM_RIDGE, start_FK=start, iterations=EM_ITERATIONS))
        fitted.append(row)
    return _chains(sides, fitted)


def _share_by_moments(sides: _Sides, chains: _Chains) -> tuple[float, float]:
    """Share of wrong answers among the training rows, and its standard error.

    With a the mean p of validation rows' own answers, out of fold, and b that of the others, training rows of which a
    share s have wrong answers have the mean p of their observed ones `(1 - s) a + s b`. Of rows that are judged: a
    validation row that is the only one of its answer has p near 0 out of fold, and says nothing of training rows.
    """
    p = (sides.out_of_fold(chains).double() * chains.temperature).softmax(1).cpu().numpy()
    known = np.bincount(sides.known_M, minlength=p.shape[1]) >= MIN_OF_CLASS
    if not known.any():
        return 0.0, 1.0
    own = p[np.arange(len(p)), sides.known_M][known[sides.known_M]]
    judged = torch.stack([chains.log_p(k, sides.train, sides.train_fold) for k in range(FOLDS)]).exp().mean(0)
    observed = sides.observed.cpu().numpy()
    seen = judged.cpu().numpy()[np.arange(len(observed)), observed][known[observed]]
    if not len(seen):
        return 0.0, 1.0
    a, b = float(own.mean()), float((1 - own).mean() / (p.shape[1] - 1))
    span = max(a - b, 1e-3)
    share = (a - float(seen.mean())) / span
    error = np.sqrt(own.var() / len(own) * (1 - share) ** 2 + seen.var() / len(seen)) / span
    return float(np.clip(share, 0, 1)), float(min(error, 1.0))


class Odds:
    """Log odds as they are given: calibrated to the share of noise there seems to be, careful where little is known.

    Args:
        counts: validation rows of each answer, (K,).
        share, error: of wrong answers, estimated, and its standard error.
    """

    def __init__(self, counts: np.ndarray, share: float, error: float):
        self.counts, self.share, self.error = counts, share, error
        self.shift = 0.0

    def calibrated(self, log_odds: np.ndarray, observed: np.ndarray, useful: bool) -> np.ndarray:
        """Log odds, (N,), shifted so that they say the share that there is and put no more rows below 0 than the upper
        end of its interval. Where nothing tells right from wrong (not `useful`), or the share may be none, its lower
        end counts: what is not known to be noise stays."""
        spread = INTERVAL * self.error
        useful = useful and self.share > spread
        likely = self.share if useful else max(0.0, self.share - spread)
        low, high = -20.0, 20.0
        for _ in range(50):
            self.shift = (low + high) / 2
            noise = 1 / (1 + np.exp(np.clip(self(log_odds, observed), -50, 50)))
            low, high = (self.shift, high) if noise.mean() > likely else (low, self.shift)
        most = int(min(1.0, likely + spread if useful else likely) * len(log_odds))
        while (self(log_odds, observed) < 0).sum() > most:
            self.shift += 0.25
        values = self(log_odds, observed)
        for answer in np.unique(observed):  # no answer goes altogether: its best row stays
            rows = np.flatnonzero(observed == answer)
            best = rows[values[rows].argmax()]
            values[best] = max(values[best], 0.0)
        return values

    def __call__(self, log_odds: np.ndarray, observed: np.ndarray) -> np.ndarray:
        """Of an answer with few validation rows the odds are drawn to the share's, and of one with hardly any they are
        no less: it is not judged."""
        n = self.counts[observed]
        prior = np.log((1 - min(self.share, 0.45)) / max(min(self.share, 0.45), 0.01))
        drawn = (n * (log_odds + self.shift) + FEW * prior) / (n + FEW)
        return np.where(n >= MIN_OF_CLASS, drawn, np.maximum(drawn, prior))


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


def _flipped_auc(
    logits_MK: Tensor, known_M: np.ndarray, rng: np.random.Generator
) -> tuple[float, tuple[float, float]]:
    """AUC of the log odds of the validation rows' own answers against those of an answer that is wrong on purpose, and
    its 95 % interval over validation rows drawn again."""
    log_p_MK = logits_MK.log_softmax(1)
    log_odds = (log_p_MK - torch.log1p(-log_p_MK.exp().clamp(max=1 - 1e-12))).cpu().numpy()
    n_known = int(known_M.max()) + 1
    n = n_known if n_known > 1 else log_odds.shape[1]
    wrong = (known_M + rng.integers(1, n, len(known_M))) % n
    rows = np.arange(len(known_M))
    right, flipped = log_odds[rows, known_M], log_odds[rows, wrong]
    drawn = [rng.integers(len(rows), size=len(rows)) for _ in range(DRAWS)]
    low, high = np.quantile([auc(right[some], flipped[some]) for some in drawn], [0.025, 0.975])
    return auc(right, flipped), (float(low), float(high))
