"""The head fitted on the validation rows' positions, and softmax regression with soft targets: both by one L-BFGS.

The fitted head is the finite step that `whitened` takes the start of. Softmax regression serves the label model and
the calibration: thousands of rows, hundreds of features. Shapes and symbols of `stream.py`, and S the tokens seen as
labels in validation, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .head import Head, working_dtype
from .stats import power_of_moment
from .stream import TOKEN_TILE, VOCAB_BLOCK, OnlineSoftmax, blocks

RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
FOLDS = 3
# L-BFGS steps: a few at each ridge on the way, since each starts where the last one ended; more at the one chosen.
ITERATIONS, LAST_ITERATIONS = 8, 25
# The fit is for a few thousand numbers per token seen; more positions than this would cost time and change little.
MAX_POSITIONS, CROSS_VALIDATED_POSITIONS = 8192, 4096
# Added to the eigenvalues of the second moment, as a share of their mean.
FLOOR = 1e-2
# So many logits are kept while the head is fitted, rather than made again at each step: 256 MB.
KEPT_LOGITS = 2**26
SOFTMAX_ITERATIONS = 100
# Steps that L-BFGS remembers; those of a fit of the head are fewer.
HISTORY = 8


@dataclass(frozen=True)
class Fit:
    """The move of the head, and what it was chosen by.

    Args:
        move_VD: float32 (V, D), zero in the rows of tokens that are no label in validation.
        ridge: the one with the best likelihood out of fold; inf where no move at all was best.
        curve: log-likelihood out of fold per position for each ridge tried, inf for the model's own head; no looser
            ridge is tried than the first that does worse than the one before.
    """

    move_VD: Tensor
    ridge: float
    curve: dict[float, float]


def fit_head(
    head: Head,
    hidden_TD: Tensor,
    labels_T: Tensor,
    rows_T: Tensor,
    seed: int = 0,
    weights_T: Tensor | None = None,
) -> Fit:
    """The head that predicts the validation rows best without learning them by heart.

    Maximises over M (S, D), for z = h C^(-1/4) with C the second moment of the hidden states (a ridge half way between
    one on the weights and one on the change of the logits)::

        sum_t log softmax(transform(W h_t + b + M z_t))[y_t]  -  ridge / 2 * ||M||^2

    Only the rows of tokens that are labels somewhere in validation move; the mass of all others stays in the
    normaliser, so the likelihood is that of the whole vocabulary. The ridge is the one with the best likelihood of
    held-out rows in 3-fold cross-validation over rows, "no move" among the candidates: a small validation set is not
    learned by heart.

    With `weights_T` what is maximised, and measured out of fold, is of each row (a pair: chosen minus rejected)::

        log sigmoid(sum_t w_t (log p_t(y_t) after the move - before))

    so that what is to become less likely does not count for more and more. Its gradient at no move is half of
    `sum_t w_t G_t`.

    Args:
        hidden_TD, labels_T: labelled positions of the validation rows.
        rows_T: the row of each position; folds never split a row.
        weights_T: of the positions, -1 where the label is to become less likely; None: all are 1.
    """
    dtype = working_dtype(head.weight, hidden_TD)
    generator = torch.Generator().manual_seed(seed)
    if weights_T is not None:
        order = _whole_rows(rows_T, generator)
        hidden_TD, labels_T, rows_T, weights_T = hidden_TD[order], labels_T[order], rows_T[order], weights_T[order]
    elif len(labels_T) > MAX_POSITIONS:
        chosen = torch.randperm(len(labels_T), generator=generator)[:MAX_POSITIONS].sort().values.to(labels_T.device)
        hidden_TD, labels_T, rows_T = hidden_TD[chosen], labels_T[chosen], rows_T[chosen]
    hidden_TD = hidden_TD.to(dtype)
    seen_S, target_T = labels_T.unique(return_inverse=True)
    small = replace(head, weight=head.weight[seen_S], bias=None if head.bias is None else head.bias[seen_S])
    rest_T = _rest_log_normalizer(head, seen_S, hidden_TD)
    spread_DD = _inverse_fourth_root(hidden_TD)
    problem = _Problem(small, hidden_TD, hidden_TD @ spread_DD, target_T, rest_T)
    if weights_T is not None:
        problem = _Margins(problem, rows_T, weights_T)
    fold_T, n_folds = _folds(rows_T, generator)
    curve = problem.curve(fold_T, n_folds)
    best = max(curve, key=lambda ridge: curve[ridge])
    move_VD = torch.zeros_like(head.weight, dtype=dtype)
    if best != torch.inf:
        move, everywhere = problem.no_move, torch.ones_like(fold_T, dtype=torch.bool)
        for ridge in RIDGES[: RIDGES.index(best) + 1]:
            move = problem.fit(move, ridge, everywhere, LAST_ITERATIONS if ridge == best else ITERATIONS)
        move_VD[seen_S] = move @ spread_DD.T
    return Fit(move_VD, best, curve)


def _folds(rows_T: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """The fold of each position, (T,), -1: only in the last fit; and how many folds there are."""
    rows = rows_T.unique()
    folds = min(FOLDS, len(rows))
    turn = torch.randperm(len(rows), generator=generator).to(rows.device)
    n_held_out = max(folds, int(len(rows) * min(1.0, CROSS_VALIDATED_POSITIONS / len(rows_T))))
    fold_of_row = torch.where(turn < n_held_out, turn % folds, -1)
    return fold_of_row[torch.searchsorted(rows, rows_T)], folds


# Logits before the move, z, labels and the mass of the tokens that are not seen.
_Positions = tuple[Tensor, Tensor, Tensor, Tensor]


class _Problem:
    """The likelihood of some positions as a function of M, (S, D)."""

    def __init__(self, head: Head, hidden_TD: Tensor, z_TD: Tensor, target_T: Tensor, rest_T: Tensor):
        self.head, self.hidden_TD, self.z_TD, self.target_T, self.rest_T = head, hidden_TD, z_TD, target_T, rest_T
        self.no_move = hidden_TD.new_zeros(head.vocab_size, hidden_TD.shape[1])

    def _tile(self, at: Tensor) -> _Positions:
        """What is read of some positions, whatever the move."""
        linear = self.head.linear(self.hidden_TD[at], slice(None))
        return linear, self.z_TD[at], self.target_T[at], self.rest_T[at]

    def _log_p(self, move_SD: Tensor, tile: _Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Log-likelihood of the labels, (T,), the logits (T, S), and their log normaliser, (T,)."""
        before, z_TD, target_T, rest_T = tile
        logits = self.head.transform(torch.addmm(before, z_TD, move_SD.T))
        normalizer_T = torch.logaddexp(logits.logsumexp(-1), rest_T)
        return logits.gather(1, target_T[:, None])[:, 0] - normalizer_T, logits, normalizer_T

    def value(self, log_p_T: Tensor, at: Tensor) -> tuple[float, Tensor | None]:
        """What is maximised, of one of the `tiles`, and its derivative in each log-likelihood; None: that is 1."""
        return float(log_p_T.double().sum()), None

    def tiles(self, where_T: Tensor) -> Sequence[Tensor]:
        """Places of positions that are looked at together."""
        return where_T.nonzero()[:, 0].split(TOKEN_TILE)

    def log_likelihood(self, move_SD: Tensor, where_T: Tensor) -> float:
        return sum(self.value(self._log_p(move_SD, self._tile(at))[0], at)[0] for at in self.tiles(where_T))

    def fit(self, start_SD: Tensor, ridge: float, where_T: Tensor, iterations: int) -> Tensor:
        """The best M of one ridge; the gradient is of this small problem only, never through the network."""
        places = self.tiles(where_T)
        # The logits before the move are the same in all steps.
        known = [self._tile(at) for at in places] if self._n_logits(places) <= KEPT_LOGITS else None

        def loss_and_gradient(move_SD: Tensor) -> tuple[float, Tensor]:
            loss, gradient_SD = 0.5 * ridge * float(move_SD.square().sum()), ridge * move_SD
            for i, at in enumerate(places):
                tile = self._tile(at) if known is None else known[i]
                log_p_T, logits_TS, normalizer_T = self._log_p(move_SD, tile)
                value, pull_T = self.value(log_p_T, at)
                slope = self.head.slope(logits_TS)
                error_TS = logits_TS.sub_(normalizer_T[:, None]).exp_()  # what the softmax gives beyond the label
                error_TS[torch.arange(len(at), device=at.device), tile[2]] -= 1
                if pull_T is not None:
                    error_TS.mul_(pull_T[:, None])
                if isinstance(slope, Tensor) or slope != 1.0:
                    error_TS.mul_(slope)
                loss, gradient_SD = loss - value, gradient_SD.addmm_(error_TS.T, tile[1])
            return loss, gradient_SD

        return minimum(loss_and_gradient, start_SD, iterations, tolerance=1e-4)

    def _n_logits(self, places: Sequence[Tensor]) -> int:
        return sum(len(at) for at in places) * self.head.vocab_size

    def curve(self, fold_T: Tensor, n_folds: int) -> dict[float, float]:
        """Held-out log-likelihood per position for each ridge tried, from stiff to loose, inf for no move."""
        in_a_fold = fold_T >= 0
        n = int(in_a_fold.sum())
        curve = {torch.inf: self.log_likelihood(self.no_move, in_a_fold) / n}
        if n_folds < 2:
            return curve
        moves, previous = [self.no_move] * n_folds, -torch.inf
        for ridge in RIDGES:  # each started where the last one ended
            moves = [
                self.fit(move, ridge, in_a_fold & (fold_T != fold), ITERATIONS) for fold, move in enumerate(moves)
            ]
            held_out = sum(self.log_likelihood(move, fold_T == fold) for fold, move in enumerate(moves))
            curve[ridge] = held_out / n
            if held_out < previous:
                break
            previous = held_out
        return curve


class _Margins(_Problem):
    """The same of rows that hold what is to become less likely; positions come row by row."""

    def __init__(self, plain: _Problem, rows_T: Tensor, weights_T: Tensor):
        super().__init__(plain.head, plain.hidden_TD, plain.z_TD, plain.target_T, plain.rest_T)
        self.rows_T, self.weights_T = rows_T, weights_T.to(plain.z_TD)
        everywhere = torch.arange(len(rows_T), device=rows_T.device)
        tiles = everywhere.split(TOKEN_TILE)
        self.before_T = torch.cat([self._log_p(self.no_move, self._tile(at))[0] for at in tiles])

    def value(self, log_p_T: Tensor, at: Tensor) -> tuple[float, Tensor | None]:
        gain_T = self.weights_T[at] * (log_p_T - self.before_T[at])
        rows, place = self.rows_T[at].unique_consecutive(return_inverse=True)
        gain_R = gain_T.new_zeros(len(rows)).index_add(0, place, gain_T)
        value = float(torch.nn.functional.logsigmoid(gain_R).double().sum())
        return value, (-gain_R).sigmoid()[place] * self.weights_T[at]

    def tiles(self, where_T: Tensor) -> Sequence[Tensor]:
        places = where_T.nonzero()[:, 0]
        _, lengths = self.rows_T[places].unique_consecutive(return_counts=True)
        sizes = [0]
        for length in lengths.tolist():
            if sizes[-1] + length > TOKEN_TILE and sizes[-1]:
                sizes.append(0)
            sizes[-1] += length
        return places.split(sizes)


def _whole_rows(rows_T: Tensor, generator: torch.Generator) -> Tensor:
    """Places of the positions row by row, of as many rows, drawn by chance, as have `MAX_POSITIONS` at most."""
    order = rows_T.argsort(stable=True)
    rows, lengths = rows_T[order].unique_consecutive(return_counts=True)
    if len(rows_T) <= MAX_POSITIONS:
        return order
    drawn = torch.randperm(len(rows), generator=generator).to(rows.device)
    kept = drawn[(lengths[drawn].cumsum(0) <= MAX_POSITIONS) | (torch.arange(len(rows), device=rows.device) == 0)]
    return order[torch.isin(rows_T[order], rows[kept])]


def _rest_log_normalizer(head: Head, seen_S: Tensor, hidden_TD: Tensor) -> Tensor:
    """log sum exp of the logits of all tokens that are not seen, (T,)."""
    seen_V = torch.zeros(head.vocab_size, dtype=torch.bool, device=hidden_TD.device)
    seen_V[seen_S] = True
    out = []
    for hidden in hidden_TD.split(TOKEN_TILE):
        fold = OnlineSoftmax(hidden, hidden.dtype)
        for block in blocks(head.vocab_size, VOCAB_BLOCK):
            unseen = ~seen_V[block]
            if unseen.any():
                fold.fold(block, head.logits(hidden, block)[:, unseen])
        out.append(fold.log_normalizer())
    return torch.cat(out)


def _inverse_fourth_root(hidden_TD: Tensor) -> Tensor:
    """C^(-1/4) for the second moment C of the hidden states, scaled so that z has unit mean square, (D, D)."""
    hidden = hidden_TD.double()
    root = power_of_moment(hidden.T @ hidden / len(hidden), -0.25, ridge=FLOOR)
    return (root / (hidden @ root).square().mean().sqrt()).to(hidden_TD.dtype)


def logits(coefficients_FK: Tensor, features_NF: Any) -> Tensor:
    """(N, K); the last row of the coefficients is the intercept."""
    return features_NF @ coefficients_FK[:-1] + coefficients_FK[-1]


def fit_softmax(
    features_NF: Any,
    targets_NK: Tensor,
    ridge: float,
    *,
    start_FK: Tensor | None = None,
    iterations: int = SOFTMAX_ITERATIONS,
    intercept_ridge: float = 1e-2,
    tolerance: float = 1e-5,
) -> Tensor:
    """Coefficients B, (F + 1, K), the intercept last, that maximise by L-BFGS::

        sum_n sum_k targets[n, k] * log softmax(B^T [x_n, 1])[k]  -  ridge / 2 * ||B[:-1]||^2

    Args:
        features_NF: standardised features; or a matrix that is not dense, with a shape, `.T`, `@` and `new_zeros`.
        targets_NK: >= 0; a row's sum is its weight.
        start_FK: where to start; zeros by default.
        intercept_ridge: of the intercept, so that a class without rows has a finite one.
        tolerance: of the largest entry of the gradient.
    """
    n_features, n_classes = features_NF.shape[1], targets_NK.shape[1]
    start = features_NF.new_zeros(n_features + 1, n_classes) if start_FK is None else start_FK
    penalty = torch.full_like(start[:, :1], ridge)
    penalty[-1] = intercept_ridge

    weight_N1 = targets_NK.sum(1, keepdim=True)

    def loss_and_gradient(coefficients_FK: Tensor) -> tuple[float, Tensor]:
        log_p = logits(coefficients_FK, features_NF).log_softmax(1)
        loss = 0.5 * (penalty * coefficients_FK.square()).sum() - (targets_NK * log_p).sum()
        residual_NK = log_p.exp_() * weight_N1 - targets_NK
        gradient_FK = torch.cat([features_NF.T @ residual_NK, residual_NK.sum(0, keepdim=True)])
        return float(loss), gradient_FK.add_(penalty * coefficients_FK)

    return minimum(loss_and_gradient, start, iterations, tolerance=tolerance)


def minimum(
    loss_and_gradient: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, iterations: int, *, tolerance: float
) -> Tensor:
    """Where L-BFGS gets from a start; `tolerance` is of the largest entry of the gradient."""
    x = start.detach().clone()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=iterations, tolerance_grad=tolerance, history_size=HISTORY, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        total, x.grad = loss_and_gradient(x)
        return total

    optimizer.step(closure)
    return x
