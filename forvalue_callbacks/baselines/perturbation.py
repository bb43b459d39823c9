"""Influence read off a model that has been moved: gradients for few rows, forward passes for many. Small models.

Log-likelihoods are summed over a row's labelled tokens; the parameters are those that require a gradient (with LoRA
its factors). Higher is more valuable. Everything is computed on the model itself, which gets its weights back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data.sample import Sample
from ..model.backbone import left_as_found
from .batches import Batch, batches, prepared

Rows = Iterable[Mapping[str, Any]]
Direction = Sequence[Tensor]


def mirrored(model: nn.Module, rows: Rows, validation: Rows, *, step: float = 1e-3) -> Tensor:
    """Mirrored influence (arXiv 2402.08922), float64 (N,): one step on the validation rows, one forward per row.

    `(log p(z; theta + eps u) - log p(z; theta)) / eps` with u the gradient of the validation rows' mean
    log-likelihood; as eps goes to 0 that is `<u, g_z>`, the mean of `tracin` over the validation rows, in all
    trainable parameters.

    Args:
        step: length of the step `eps u` relative to that of all trainable parameters.
    """
    items, validation_items = prepared(rows), prepared(validation)
    parameters = _trainable(model)
    with left_as_found(model):
        direction = _gradient(model, validation_items, parameters)
        epsilon = _epsilon(parameters, direction, step)
        before = _log_likelihoods(model, items)
        with _moved(parameters, direction, epsilon):
            after = _log_likelihoods(model, items)
    return (after - before) / epsilon


def forward_only_inference(
    model: nn.Module,
    rows: Rows,
    queries: Rows,
    *,
    training: Rows | None = None,
    damping: float | None = None,
    learning_rate: float | None = None,
    iterations: int = 50,
    step: float = 1e-3,
    residuals: list[float] | None = None,
) -> Tensor:
    """Influence functions with forward passes at query time (arXiv 2511.19803), float64 (N, M).

    Once per row z: `D <- D - eta (H D + damping D - g_z)`, with H the Hessian of the training rows' mean loss and its
    product with D a difference of two gradients. Then for any query q, by two forwards, what converges to
    `<g_q, (H + damping)^-1 g_z>`::

        (log p(q; theta + eps D) - log p(q; theta - eps D)) / (2 eps)

    Costs `2 * iterations` gradients over `training` per row: for a small model and few rows.

    Args:
        training: rows of the Hessian; None: `rows`.
        damping: added to H, which has negative eigenvalues too: too little, and the simulation diverges. None: as
            large as its largest eigenvalue in absolute value, found by 8 products, which is always enough.
        learning_rate: eta, below `2 / (largest eigenvalue of H + damping)`. None: half of that.
        step: length of each move, relative to that of all trainable parameters.
        residuals: filled with `||H D + damping D - g_z|| / ||g_z||` of each row.

    Raises:
        ValueError: the simulation diverges.
    """
    items, query_items = prepared(rows), prepared(queries)
    training_items = items if training is None else prepared(training)
    parameters = _trainable(model)
    out = torch.zeros(len(items), len(query_items), dtype=torch.float64)
    with left_as_found(model):
        if damping is None or learning_rate is None:
            largest = _largest_eigenvalue(model, training_items, parameters, step)
            damping = largest if damping is None else damping
            learning_rate = 1 / (largest + damping) if learning_rate is None else learning_rate
        for i, item in enumerate(items):
            target = _gradient(model, [item], parameters)
            response = [torch.zeros_like(g) for g in target]
            gap = target
            for _ in range(iterations):
                response = [d + learning_rate * g for d, g in zip(response, gap, strict=True)]
                product = _hessian_product(model, training_items, parameters, response, step)
                gap = [g - h - damping * d for g, h, d in zip(target, product, response, strict=True)]
            residual = _norm(gap) / _norm(target)
            if not residual < 1e3:
                raise ValueError(
                    f"the simulation of row {i} diverges (residual {residual:.2g}): lower learning_rate or raise "
                    "damping"
                )
            if residuals is not None:
                residuals.append(residual)
            epsilon = _epsilon(parameters, response, step)
            ends = []
            for sign in (1, -1):
                with _moved(parameters, response, sign * epsilon):
                    ends.append(_log_likelihoods(model, query_items))
            out[i] = (ends[0] - ends[1]) / (2 * epsilon)
    return out


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient")
    return parameters


def _norm(direction: Direction) -> float:
    return sum(float(d.double().square().sum()) for d in direction) ** 0.5


def _epsilon(parameters: Direction, direction: Direction, step: float) -> float:
    """Factor that makes the direction `step` times as long as the parameters."""
    return step * _norm(parameters) / max(_norm(direction), 1e-30)


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], direction: Direction, epsilon: float) -> Iterator[None]:
    """The parameters plus epsilon * direction; afterwards, bit for bit, as they were."""
    originals = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=epsilon)
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(parameters, originals, strict=True):
                p.copy_(original)


def _row_log_likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """(B,), by the model's own logits."""
    logits_TV = batch.pick(model(**batch.inputs, use_cache=False).logits)
    return batch.sum(logits_TV.log_softmax(-1).gather(1, batch.target_T[:, None])[:, 0])


def _log_likelihoods(model: nn.Module, items: list[Sample]) -> Tensor:
    out = torch.zeros(len(items), dtype=torch.float64)
    for batch in batches(items, device=next(model.parameters()).device):
        out[batch.index] = _row_log_likelihoods(model, batch).double().cpu()
    return out


def _gradient(model: nn.Module, items: list[Sample], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of the rows' mean log-likelihood."""
    total = [torch.zeros_like(p) for p in parameters]
    for batch in batches(items, device=next(model.parameters()).device):
        with torch.enable_grad():
            value = _row_log_likelihoods(model, batch).sum() / len(items)
        for out, g in zip(total, torch.autograd.grad(value, list(parameters)), strict=True):
            out.add_(g)
    return total


def _largest_eigenvalue(
    model: nn.Module, items: list[Sample], parameters: Sequence[nn.Parameter], step: float
) -> float:
    """Of the Hessian, in absolute value: by the power method from the gradient."""
    vector, value = _gradient(model, items, parameters), 0.0
    for _ in range(8):
        length = _norm(vector)
        vector = _hessian_product(model, items, parameters, [v / length for v in vector], step)
        value = _norm(vector)
    return value


def _hessian_product(
    model: nn.Module, items: list[Sample], parameters: Sequence[nn.Parameter], direction: Direction, step: float
) -> list[Tensor]:
    """Hessian of the mean loss times the direction: `(grad(theta - eps D) - grad(theta + eps D)) / (2 eps)`."""
    epsilon = _epsilon(parameters, direction, step)
    with _moved(parameters, direction, -epsilon):
        low = _gradient(model, items, parameters)
    with _moved(parameters, direction, epsilon):
        high = _gradient(model, items, parameters)
    return [(a - b) / (2 * epsilon) for a, b in zip(low, high, strict=True)]
