"""Which answers are wrong where answers repeat: a label model of validation rows and, untrusted, of training rows.

A softmax over the K different answers predicts a row's right answer from what is known at the end of the prompt, in
several views of it (`label_views.py`), whose logits are weighed by evidence::

    p(c | x)  =  softmax( sum_v  w_v  B_v^T view_v(x) )

The training rows hold more evidence than the validation rows but some of their answers are wrong. They are not used,
or used with their answers as they are (a linear model bears a good share of wrong ones that contradict each other), or
with those that are right as far as validation rows can tell::

    q_i(c)  ~  p(c | x_i) T[c, o_i]           which answer is right, given the one observed and the noise T
    T[c, o] =  share of rows of right answer c that are observed as o, drawn to symmetric noise

whichever predicts the answers of validation rows best.

Nothing vouches for itself. There is a chain for each fold of the validation rows that never sees that fold, the soft
targets of training rows and the weights of the views included; within a chain the p that judges a training row was
fitted without its fold. What chain k says of validation fold k is evidence: it chooses the ridges, and how
training rows are used. Without validation rows there is one chain, and the folds of the training rows are all
the evidence there is. The score of a training row is the log of the odds that its observed answer is right, the mean
over the chains. Folds are drawn in the order of the rows: give them in one that follows their content.

An answer that no validation row has is learned from the training rows that show it, if there are two or more. Answers
that come once in all are one answer, "another", that nothing speaks for: they are not judged.

Shapes: M validation rows, N training rows that are fitted on, F features, K answers, V views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.fit import fit_softmax, logits
from .label_odds import Odds, Told, Weights, expectation, posterior_odds, share_by_moments, told_apart, weigh
from .label_views import EM_RIDGE, RIDGES, Answers, views_of

FOLDS = 5
# Of the training rows; more where they are all there is.
TRAIN_FOLDS, ALONE_FOLDS = 2, 5
ITERATIONS, TOLERANCE = 30, 1e-2
# Ways to use the training rows: not at all, with their answers as they are, with those that seem right.
ALONE, GIVEN, EXPECTED = "validation rows alone", "training rows as they are", "training rows as expected"
NO_WEIGHTS = Weights(torch.zeros(0), 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class LabelFit:
    """What the label model says of N training rows and M validation rows, and of any more.

    Args:
        log_odds: (N,), of the observed answer being right.
        suggested: (N,), the number of the most probable other answer, and `suggested_p`, its probability if the
            observed one is wrong.
        share: estimated share of wrong answers among the training rows, and `share_error`, its standard error from the
            sampling of both sides; 0 and 1 where a wrong answer cannot be told from the right one.
        told: how well a wrong answer is told from the right one, by what has not seen the rows.
        likelihood: mean log-likelihood of the validation rows' answers (without any: of the training rows'), out of
            fold, of each way to use the training rows that was tried: the best one judges.
        known_log_odds: (M,), of the validation rows' own answers being right, out of fold.
        known_share: the share of wrong ones among them, and its standard error.
        weights: of the views, by name, the mean over the chains.
    """

    log_odds: np.ndarray
    suggested: np.ndarray
    suggested_p: np.ndarray
    share: float
    share_error: float
    told: Told
    likelihood: dict[str, float]
    known_log_odds: np.ndarray
    known_share: tuple[float, float]
    weights: dict[str, float]
    _maps: dict[str, Any] = field(repr=False)
    _chains: _Chains = field(repr=False)
    _odds: Odds = field(repr=False)
    _answers: Answers = field(repr=False)

    def judged(self, observed_N: np.ndarray) -> np.ndarray:
        """Which rows are judged, (N,) bool: those of whose answer enough is known."""
        return self._odds.judged(self._answers.numbers(observed_N))

    def judge(
        self, features: Mapping[str, Tensor], observed_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`log_odds`, `suggested` and `suggested_p` of further rows, in turn by the models of the folds, which have
        seen none of them."""
        z = [self._maps[name](x) for name, x in features.items()]
        numbers = self._answers.numbers(observed_N)
        device = self._chains.device
        turn = torch.arange(len(numbers), device=device) % len(self._chains.models[0])
        odds, suggested, p = self._chains.judge(z, turn, torch.from_numpy(numbers).to(device))
        return self._odds(odds, numbers), suggested, p

    def names(self, numbers: np.ndarray) -> np.ndarray:
        """Answers by their numbers, as they were given."""
        return self._answers.names(numbers)


def fit_labels(
    known: Mapping[str, Tensor],
    known_M: np.ndarray,
    train: Mapping[str, Tensor],
    observed_N: np.ndarray,
    *,
    all_observed: np.ndarray | None = None,
    seed: int = 0,
) -> LabelFit:
    """Fit the label model.

    Args:
        known, train: views of validation and training rows, by name, on any device; floats (rows, F) are states,
            fitted in float32, and integers hashes of words, -1 for none.
        known_M, observed_N: the answers, as any integers; M may be 0.
        all_observed: those of all training rows, where these are some of them.
        seed: of the folds and of the wrong answers.

    Raises:
        ValueError: fewer than two different answers, features that are not finite.
    """
    both = {name: torch.cat([known[name], train[name]]) for name in train}
    both = {name: x.float() if x.is_floating_point() else x for name, x in both.items()}
    if not all(torch.isfinite(x).all() for x in both.values()):
        raise ValueError("features of the label model are not finite.")
    answers = Answers(known_M, observed_N if all_observed is None else all_observed)
    if answers.n < 2:
        raise ValueError("all answers are the same: there is no wrong one to be found.")
    maps = views_of(both)
    rng = np.random.default_rng(seed)
    z = [maps[name](x) for name, x in both.items()]
    kinds = [maps[name].kind for name in both]
    sides = _Sides(z, kinds, answers.numbers(known_M), answers.numbers(observed_N), answers, rng)
    candidates = _candidates(sides, answers.another)
    likelihood = {name: chains.likelihood for name, chains in candidates.items()}
    chains = candidates[max(likelihood, key=lambda name: likelihood[name])]
    odds = Odds(np.bincount(sides.given.cpu().numpy(), minlength=answers.n), answers.another)
    told = sides.told(chains, odds, rng)
    share, error = sides.share(chains) if told.useful else (0.0, 1.0)
    if not told.useful:  # nothing is known of the noise, of validation rows neither
        chains = replace(chains, weights=replace(chains.weights, noise=share, noise_error=error))
    raw, suggested, likely = chains.judge(sides.train, sides.train_fold, sides.observed)
    log_odds = odds.calibrated(raw, sides.observed.cpu().numpy(), share, error)
    return LabelFit(
        log_odds,
        suggested,
        likely,
        share,
        error,
        told,
        likelihood,
        sides.known_log_odds(chains),
        (chains.weights.noise, chains.weights.noise_error) if len(known_M) else (0.0, 1.0),
        dict(zip(both, chains.weights.by_chain.mean(0).tolist(), strict=True)),
        maps,
        chains,
        odds,
        answers,
    )


def _candidates(sides: _Sides, another: int) -> dict[str, _Chains]:
    """Chains by each way to use the training rows."""
    found = {GIVEN: _as_given(sides, sides.observed != another)}
    if sides.m:
        found[ALONE] = _as_given(sides, sides.unknown)
        found[EXPECTED] = _as_expected(sides, found[ALONE])
    return found


class _Sides:
    """Validation and training rows in their views, in folds; the first M rows are those of validation."""

    def __init__(
        self,
        z: Sequence[Any],
        kinds: Sequence[str],
        known_M: np.ndarray,
        observed_N: np.ndarray,
        answers: Answers,
        rng: np.random.Generator,
    ):
        device = z[0].new_zeros(0).device
        m, n = len(known_M), len(observed_N)
        self.z, self.kinds, self.m, self.n_answers = z, kinds, m, answers.n
        self.train_folds = TRAIN_FOLDS if m else ALONE_FOLDS
        self.fold = torch.from_numpy(rng.permutation(m) % FOLDS).to(device)
        self.train_fold = torch.from_numpy(rng.permutation(n) % self.train_folds).to(device)
        self.known = torch.from_numpy(known_M).to(device)
        self.observed = torch.from_numpy(observed_N).to(device)
        self.eye = torch.eye(answers.n, dtype=torch.float32, device=device)
        self.train = [view[torch.arange(m, m + n, device=device)] for view in z]
        # Of an answer that no validation row has, the training rows that show it are all there is to start from.
        unknown = ~np.isin(observed_N, known_M) & (observed_N != answers.another)
        self.unknown = torch.from_numpy(unknown).to(device)

    @property
    def n_chains(self) -> int:
        return FOLDS if self.m else 1

    def rows(self, k: int, train_N: Tensor) -> Tensor:
        """Places of the validation rows that chain k sees, and of some training rows."""
        return torch.cat([(self.fold != k).nonzero()[:, 0], self.m + train_N.nonzero()[:, 0]])

    @property
    def given(self) -> Tensor:
        """The answers that there are to be predicted: of validation rows, or else of training rows."""
        return self.known if self.m else self.observed

    def out_of_fold(self, models: Sequence[Sequence[Tensor]], view: int) -> Tensor:
        """Logits in one view of the rows with answers given, by what has not seen them, (M or N, K)."""
        out = torch.zeros(len(self.given), self.n_answers, device=self.known.device)
        if not self.m:
            for j, model in enumerate(models[0]):
                here = self.train_fold == j
                out[here] = logits(model, self.train[view][here])
            return out
        for k, row in enumerate(models):
            here = (self.fold == k).nonzero()[:, 0]
            out[here] = torch.stack([logits(model, self.z[view][here]) for model in row]).mean(0)
        return out

    def log_p_given(self, chains: _Chains) -> Tensor:
        """log p of the rows with answers given, by what has not seen them, (M or N, K) float64."""
        total = torch.zeros(len(self.given), self.n_answers, dtype=torch.float64, device=self.known.device)
        weights = chains.weights.by_chain[self.fold if self.m else torch.zeros_like(self.given)]
        for v in range(len(self.z)):
            total += weights[:, v, None] * self.out_of_fold(chains.of_view(v), v)
        return total.log_softmax(1)

    def share(self, chains: _Chains) -> tuple[float, float]:
        """Share of wrong answers among the training rows, and its standard error."""
        if not self.m:
            return chains.weights.noise, chains.weights.noise_error
        # Each model by itself, as for training rows: together they are better, and training rows would look worse.
        alone = (replace(chains, models=[[row[j]] for row in chains.models]) for j in range(self.train_folds))
        given = torch.stack([self.log_p_given(model) for model in alone]).exp().mean(0).cpu().numpy()
        log_p = [chains.log_p(k, self.train, self.train_fold) for k in range(self.n_chains)]
        judged = torch.stack(log_p).exp().mean(0).cpu().numpy()
        noise = chains.weights.noise if chains.weights.surely_noise else 0.0
        return share_by_moments(given, self.known.cpu().numpy(), noise, judged, self.observed.cpu().numpy())

    def told(self, chains: _Chains, odds: Odds, rng: np.random.Generator) -> Told:
        """How well answers that are wrong on purpose are told from those given; of answers that are judged."""
        given = self.given.cpu().numpy()
        n_known = int(given.max()) + 1
        n = n_known if n_known > 1 else self.n_answers
        wrong = (given + rng.integers(1, n, len(given))) % n
        judged = odds.judged(given) & odds.judged(wrong)
        judged = judged if judged.any() else np.ones(len(given), dtype=bool)
        own, other = (self._odds_given(chains, torch.from_numpy(x).to(self.given.device)) for x in (given, wrong))
        return told_apart(own[judged], other[judged], rng)

    def _odds_given(self, chains: _Chains, answers: Tensor) -> np.ndarray:
        """Log odds of answers of the rows with answers given, by what has not seen those, (M or N,)."""
        log_p, out = self.log_p_given(chains), torch.zeros(len(answers), dtype=torch.float64)
        fold = self.fold if self.m else torch.zeros_like(self.given)
        for k, flips in enumerate(chains.flips):
            here = (fold == k).nonzero()[:, 0]
            out[here.cpu()] = posterior_odds(log_p[here], flips, answers[here])[0].cpu()
        return out.numpy()

    def known_log_odds(self, chains: _Chains) -> np.ndarray:
        """Log odds of the validation rows' own answers being right, out of fold, (M,)."""
        if not self.m:
            return np.zeros(0)
        own = self.log_p_given(chains).gather(1, self.known[:, None])[:, 0].exp()
        noise = chains.weights.noise
        right, wrong = (1 - noise) * own, noise * (1 - own) / (self.n_answers - 1)
        return (right.clamp(min=1e-30).log() - wrong.clamp(min=1e-30).log()).cpu().numpy()


@dataclass(frozen=True)
class _Chains:
    """Models by validation fold and training fold that they have not seen, and what they say of their fold.

    Args:
        models: coefficients of chain k without training fold j in view v.
        weights: of the views in each chain.
        flips: the noise T of each chain, (K, K).
    """

    models: list[list[list[Tensor]]]
    weights: Weights
    flips: list[Tensor]

    @property
    def likelihood(self) -> float:
        return self.weights.likelihood

    def of_view(self, view: int) -> list[list[Tensor]]:
        """Coefficients by chain and training fold."""
        return [[model[view] for model in row] for row in self.models]

    @property
    def device(self) -> torch.device:
        return self.models[0][0][0].device

    def log_p(self, k: int, z: Sequence[Any], fold_N: Tensor) -> Tensor:
        """By chain k, (N, K) float64: each row by the model that has not seen its training fold."""
        n_answers = self.models[k][0][0].shape[1]
        out = torch.zeros(len(fold_N), n_answers, dtype=torch.float64, device=fold_N.device)
        for j, model in enumerate(self.models[k]):
            here = (fold_N == j).nonzero()[:, 0]
            weights = self.weights.by_chain[k]
            mixed = [w * logits(b, view[here]).double() for w, b, view in zip(weights, model, z, strict=True)]
            out[here] = torch.stack(mixed).sum(0).log_softmax(1)
        return out

    def judge(self, z: Sequence[Any], fold_N: Tensor, observed: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log odds of the observed answers being right, the most probable other answers, and their probabilities if
        they are not, (N,) each, means over the chains."""
        found = [posterior_odds(self.log_p(k, z, fold_N), flips, observed) for k, flips in enumerate(self.flips)]
        log_odds = torch.stack([odds for odds, _ in found]).mean(0)
        p, suggested = torch.stack([others for _, others in found]).mean(0).max(1)
        return log_odds.cpu().numpy(), suggested.cpu().numpy(), p.cpu().numpy()


def _chains(sides: _Sides, models: list[list[list[Tensor]]]) -> _Chains:
    """Models with the weights of their views, and the noise that each chain sees."""
    chains = _Chains(models, NO_WEIGHTS, [])
    logits_VEK = torch.stack([sides.out_of_fold(chains.of_view(v), v) for v in range(len(sides.z))]).double()
    weights = weigh(logits_VEK, sides.given, sides.fold if sides.m else None, sides.n_chains)
    chains = replace(chains, weights=weights)
    judged = (chains.log_p(k, sides.train, sides.train_fold) for k in range(sides.n_chains))
    return replace(chains, flips=[expectation(log_p, sides.observed)[1] for log_p in judged])


def _as_given(sides: _Sides, taught: Tensor) -> _Chains:
    """Chains of the answers as they are given, those of the training rows `taught` (N,) too, in each view at the ridge
    with the best likelihood out of fold."""
    best = [_in_one_view(sides, view, taught) for view in range(len(sides.z))]
    folds, chains = range(sides.train_folds), range(sides.n_chains)
    return _chains(sides, [[[models[k][j] for models in best] for j in folds] for k in chains])


def _in_one_view(sides: _Sides, view: int, taught: Tensor) -> list[list[Tensor]]:
    """Coefficients by chain and training fold."""
    z, folds = sides.z[view], range(sides.train_folds)
    # Validation rows judge the ridges, so that the models of one training fold are enough for that.
    tried = folds[:1] if sides.m else folds

    def fitted(ridge: float, k: int, j: int, start: Tensor) -> Tensor:
        more = taught & (sides.train_fold != j)
        targets = sides.eye[torch.cat([sides.known[sides.fold != k], sides.observed[more]])]
        return fit_softmax(
            z[sides.rows(k, more)], targets, ridge, start_FK=start, iterations=ITERATIONS, tolerance=TOLERANCE
        )

    start = z.new_zeros(z.shape[1] + 1, sides.n_answers)
    models = best = [[start for _ in tried] for _ in range(sides.n_chains)]
    likelihood, chosen = -np.inf, 0.0
    for ridge in RIDGES[sides.kinds[view]]:  # from stiff to loose, each started where the last one ended
        models = [[fitted(ridge, k, j, models[k][j]) for j in tried] for k in range(sides.n_chains)]
        logits_VEK = sides.out_of_fold(models, view)[None].double()
        if (found := weigh(logits_VEK, sides.given, None, 1).likelihood) < likelihood:
            break
        likelihood, chosen, best = found, ridge, models
    if not taught.any():  # then training folds are all the same
        return [row * sides.train_folds for row in best]
    rest = folds[len(tried) :]
    return [[*row, *(fitted(chosen, k, j, row[0]) for j in rest)] for k, row in enumerate(best)]


def _as_expected(sides: _Sides, chains: _Chains) -> _Chains:
    """The chains fitted on both sides, a training row with the answers that are right as far as its chain knows.

    From chains that no answer of a training row has taught: else that of a row would come back to it, by way of what
    it has taught of the others.
    """
    fitted = []
    for k in range(sides.n_chains):
        truth, _ = expectation(chains.log_p(k, sides.train, sides.train_fold), sides.observed)
        row = []
        for j in range(sides.train_folds):
            others = sides.train_fold != j
            places = sides.rows(k, others)
            targets = torch.cat([sides.eye[sides.known[sides.fold != k]], truth[others].float()])
            row.append(
                [
                    fit_softmax(
                        view[places],
                        targets,
                        EM_RIDGE[kind],
                        start_FK=start,
                        iterations=ITERATIONS,
                        tolerance=TOLERANCE,
                    )
                    for view, kind, start in zip(sides.z, sides.kinds, chains.models[k][j], strict=True)
                ]
            )
        fitted.append(row)
    return _chains(sides, fitted)
