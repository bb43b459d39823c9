"""Influence functions on per-sample gradients of log-likelihoods, as pure functions on tensors.

    scores_NM = datainf(gradients(model, rows), gradients(model, validation_rows))

Shapes      N rows, M validation rows, P parameters of one layer (here: of one LoRA factor)
Symbols     G_l (N, P) and V_l (M, P): gradients of each row's summed log-likelihood in the parameters of layer l
            H_l = mean_i g_i g_i^T + lam_l I    damped empirical Fisher matrix of the layer, over the N rows
            lam_l = damping * mean(G_l^2)       damping 0.1, as in the code published with DataInf

Every function takes G and V as mappings from layer to (N, ...) and (M, ...) and returns (N, M): the sum over the
layers of `<g, H_l^-1 v>` or what the method puts in its place. Higher is more valuable: a step on such a row raises
the validation row's log-likelihood. (The papers write gradients of the loss and a minus sign: the same number.)
Arithmetic is that of the gradients, float32 or float64. Layers whose gradients are all zero add nothing, as those of
every LoRA A before the first step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Gradients = Mapping[str, Tensor]
DAMPING = 0.1


def tracin(rows: Gradients, validation: Gradients) -> Tensor:
    """Hessian-free: `sum_l <g, v>`, (N, M). TracIn (arXiv 2002.08484) at one checkpoint."""
    return _over_layers(rows, validation, lambda g_NP, v_MP: g_NP @ v_MP.T)


def tracin_checkpoints(checkpoints: Iterable[tuple[float, Gradients, Gradients]]) -> Tensor:
    """`sum_c eta_c * tracin(rows_c, validation_c)`, (N, M) (arXiv 2002.08484, Eq. 1): TracInCP.

    Args:
        checkpoints: learning rate and the gradients of both sides at each checkpoint; read one at a time, so that a
            generator keeps only one checkpoint's gradients.

    Raises:
        ValueError: no checkpoint.
    """
    total: Tensor | None = None
    for rate, rows, validation in checkpoints:
        step = tracin(rows, validation).mul_(rate)
        total = step if total is None else total.add_(step)
    if total is None:
        raise ValueError("tracin_checkpoints: no checkpoint")
    return total


def z0_inf(checkpoints: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Z0-Inf (arXiv 2510.11832): gradients guessed from what consecutive checkpoints do to the losses, float64 (N, M).

    Mean over the K checkpoints of `< g_k(z), g_k(v) >`, where the gradient of a row at checkpoint k is put together
    from its log-likelihoods there and at the checkpoints before and after it (as many as there are)::

        g_k(z) = mean_j (l_k(z) - l_j(z)) (w_k - w_j) / ||w_k - w_j||^2,    j = k - 1, k + 1

    No more than what points along the run itself is seen of a gradient. Of the weights only their inner products are
    needed, (K, K). The published code weighs neighbours by their closeness too, takes the mean row off the losses,
    and multiplies by the rank correlation of both sides' losses: three settings that are left out here.

    Args:
        checkpoints: the trainable parameters (P,), and the log-likelihoods of both sides, (N,) and (M,), in the order
            of the run. One loss of each row per checkpoint; no gradient.

    Raises:
        ValueError: fewer than two checkpoints.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"z0_inf compares checkpoints: {len(checkpoints)} of at least 2")
    weights, rows, validation = zip(*checkpoints, strict=True)
    weights_KP = torch.stack([w.double() for w in weights])
    rows_KN, validation_KM = (torch.stack([side.double() for side in sides]) for sides in (rows, validation))
    last = len(weights_KP) - 1
    total = rows_KN.new_zeros(rows_KN.shape[1], validation_KM.shape[1])
    for k in range(last + 1):
        near = [j for j in (k - 1, k + 1) if 0 <= j <= last]
        step_JP = weights_KP[k] - weights_KP[near]
        slope_J = 1 / (len(near) * step_JP.square().sum(1).clamp(min=1e-300))  # equal ones: the differences are 0
        metric_JJ = slope_J[:, None] * (step_JP @ step_JP.T).to(rows_KN.device) * slope_J
        total += (rows_KN[k] - rows_KN[near]).T @ metric_JJ @ (validation_KM[k] - validation_KM[near])
    return total / (last + 1)


def datainf(rows: Gradients, validation: Gradients, *, damping: float = DAMPING) -> Tensor:
    """DataInf (arXiv 2310.00902, Eq. 5): the inverse of the mean replaced by the mean of the inverses, (N, M).

    Naive, for each layer, validation row v and row k::

        sum_i ( <v, g_k> - <v, g_i> <g_i, g_k> / (lam + <g_i, g_i>) ) / (n lam)

    In closed form `(C - K (C / (lam + diag K)) / n) / lam` with C = G V^T, K = G G^T; K is never formed.
    """

    def layer(g_NP: Tensor, v_MP: Tensor) -> Tensor:
        lam = damping * g_NP.square().mean()
        products_NM = g_NP @ v_MP.T
        shrunk_NM = products_NM / (lam + g_NP.square().sum(1))[:, None]
        return (products_NM - g_NP @ (g_NP.T @ shrunk_NM) / len(g_NP)) / lam

    return _over_layers(rows, validation, layer)


def exact_influence(rows: Gradients, validation: Gradients, *, damping: float = DAMPING) -> Tensor:
    """The influence function itself (Koh & Liang 2017), layer by layer: `<g, H_l^-1 v>`, (N, M).

    Naive: `G @ inv(G.T @ G / n + lam I) @ V.T`. Where there are fewer rows than parameters the same number comes from
    `H^-1 G^T = G^T (K / n + lam I)^-1`: one N x N system per layer, so the exact value costs no more than its
    approximations as long as N is small.
    """

    def layer(g_NP: Tensor, v_MP: Tensor) -> Tensor:
        n, p = g_NP.shape
        lam = damping * g_NP.square().mean()
        if n <= p:
            return _solve(g_NP @ g_NP.T / n, lam, g_NP @ v_MP.T)
        return g_NP @ _solve(g_NP.T @ g_NP / n, lam, v_MP.T)

    return _over_layers(rows, validation, layer)


def lissa(
    rows: Gradients,
    validation: Gradients,
    *,
    damping: float = DAMPING,
    iterations: int = 10,
    scale: float | None = None,
) -> Tensor:
    """LiSSA (Agarwal et al. 2017) with the whole data set in each step, (N, M): `<g, r / scale>` after `iterations` of

        r <- v + r - (mean_i g_i <g_i, r> + lam r) / scale,    r_0 = v

    which converges to H^-1 v for every scale above half the largest eigenvalue of H. The published code subtracts the
    damping, and updates its product with H only once.

    Args:
        scale: None: the trace of H, always large enough.
    """

    def layer(g_NP: Tensor, v_MP: Tensor) -> Tensor:
        n = len(g_NP)
        lam = damping * g_NP.square().mean()
        size = float(g_NP.square().sum() / n + lam) if scale is None else scale
        r_MP = v_MP
        for _ in range(iterations):
            r_MP = v_MP + r_MP - ((r_MP @ g_NP.T) @ g_NP / n + lam * r_MP) / size
        return g_NP @ r_MP.T / size

    return _over_layers(rows, validation, layer)


def hyperinf(
    rows: Gradients,
    validation: Gradients,
    *,
    damping: float = DAMPING,
    iterations: int | None = None,
    residuals: dict[str, float] | None = None,
) -> Tensor:
    """HyperINF (arXiv 2410.05090): `< v F_l^-1, g >` with gradients as matrices g (r, d), (N, M);

        F_l = mean_i g_i^T g_i + (lam_l + 1e-3) I        generalised Fisher information, d x d

    Args:
        rows, validation: layer -> (N, r, d) and (M, r, d).
        iterations: None: F is solved by Cholesky. A number: so many of the published Schulz steps
            `X <- X (2 I - F X)` from `X = 5e-5 I` (the paper's code takes 30). They diverge where an eigenvalue of F
            exceeds 4e4 and have not converged where one is small: a residual near 1 means that X is still a multiple
            of I, and the score another name for `tracin`.
        residuals: filled with `||F X - I||_F / ||I||_F` of each layer.

    Raises:
        ValueError: gradients that are not matrices.
    """
    total = _empty(rows, validation)
    for name, g_Nrd in _nonzero(rows):
        v_Mrd = validation[name]
        if g_Nrd.ndim != 3:
            raise ValueError(f"hyperinf needs gradients of shape (rows, r, d); those of {name} are {g_Nrd.shape}")
        g_Xd = g_Nrd.flatten(0, 1)
        lam = damping * g_Nrd.square().mean() + 1e-3
        fisher_dd = g_Xd.T @ g_Xd / len(g_Nrd)
        fisher_dd.diagonal().add_(lam)
        eye_dd = torch.eye(len(fisher_dd), dtype=fisher_dd.dtype, device=fisher_dd.device)
        if iterations is None:
            inverse_dd = torch.cholesky_inverse(torch.linalg.cholesky(fisher_dd))
        else:
            inverse_dd = 5e-5 * eye_dd
            for _ in range(iterations):
                inverse_dd = inverse_dd @ (2 * eye_dd - fisher_dd @ inverse_dd)
        residual = float((fisher_dd @ inverse_dd - eye_dd).norm() / eye_dd.norm())
        if residuals is not None:
            residuals[name] = residual
        if not residual < 1e-2:
            logger.warning("hyperinf: the inverse for %s has a residual of %.2g: not converged", name, residual)
        total += g_Nrd.flatten(1) @ (v_Mrd @ inverse_dd).flatten(1).T
    return total


def outlier_gradients(rows: Gradients, *, seed: int = 0) -> Tensor:
    """Outlier gradient analysis (arXiv 2405.03869): an isolation forest over the rows' gradients, (N,).

    Its anomaly score, so that higher is more normal. Uses no validation row: for detecting noise, not for matching.
    Needs scikit-learn.
    """
    from sklearn.ensemble import IsolationForest

    flat_NP = torch.cat([g.flatten(1) for g in rows.values()], 1).cpu().numpy()
    return torch.from_numpy(IsolationForest(random_state=seed).fit(flat_NP).score_samples(flat_NP))


def _over_layers(rows: Gradients, validation: Gradients, layer: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum over the layers of `layer(G, V)` on flat gradients (N, P) and (M, P)."""
    total_NM = _empty(rows, validation)
    for name, gradients in _nonzero(rows):
        total_NM += layer(gradients.flatten(1), validation[name].flatten(1))
    return total_NM


def _empty(rows: Gradients, validation: Gradients) -> Tensor:
    if not rows or rows.keys() != validation.keys():
        raise ValueError(f"gradients of different layers: {sorted(rows)[:3]} ... and {sorted(validation)[:3]} ...")
    first, other = next(iter(rows.values())), next(iter(validation.values()))
    return first.new_zeros(len(first), len(other))


def _nonzero(rows: Gradients) -> Iterable[tuple[str, Tensor]]:
    return ((name, gradients) for name, gradients in rows.items() if gradients.any())


def _solve(matrix: Tensor, ridge: Tensor, right: Tensor) -> Tensor:
    """(matrix + ridge I)^-1 right; the matrix, positive semi-definite, is changed in place."""
    matrix.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
