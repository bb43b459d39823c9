"""For-Value as published (arXiv 2508.10180), and the base of all methods that move the head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import core
from ..core import Head
from ..data.sample import Sample
from ..model.positions import Columns, Positions, joined
from ..model.ranks import answering, together, world
from ..model.run import Run
from ..progress import aside
from .base import OVERFLOW, VALIDATION, Method, State, finite_positions, reasons_unless

logger = logging.getLogger(__name__)


class HeadMethod(Method):
    """Scores along a move of the head, `state["direction"]` (V, D): token by token, summed over the row."""

    tokenwise = True
    signed = True
    normalizations: ClassVar[tuple[str, ...]] = ("none", "length")

    def shapes(self, head: Head) -> dict[str, tuple[int, ...]]:
        return {"direction": tuple(head.weight.shape)}

    def score(self, state: State, head: Head, positions: Positions) -> Columns:
        score_T, log_p_T = self.tokens(state, head, positions)
        lengths, weights = np.array(positions.lengths), positions.weights
        values, log_p = weights * positions.sum(score_T), weights * positions.sum(log_p_T)
        if self.normalize == "length":
            values = values / lengths
        elif self.normalize == "cosine":
            values = values / self.norms(state, head, positions)
        finite = np.isfinite(values) & np.isfinite(log_p)
        columns = {"score": values, "log_likelihood": log_p, "n_labelled": lengths.astype(np.int64)}
        return {**columns, "reason": reasons_unless(finite)}

    def norms(self, state: State, head: Head, positions: Positions) -> np.ndarray:
        hidden, metric = positions.hidden_TD, self.metric(state)
        metric_TD = None if metric is None else hidden.to(metric) @ metric
        square = core.squared_norms(head, hidden, positions.target_T, positions.lengths, metric_TD=metric_TD)
        return square.clamp(min=1e-30).sqrt().cpu().numpy()

    def along(self, states: Sequence[State]) -> core.Along:
        """What rows are measured along by several validation sets, of which these are the states."""
        raise NotImplementedError

    def scores_along(self, found: core.Measured) -> Tensor:
        """Score of each position by each set, (T, K)."""
        raise NotImplementedError

    def row_norms(self, state: State, head: Head, positions: Positions) -> np.ndarray:
        if len(set(positions.index)) == len(positions.lengths) and positions.weights_T is None:
            return self.norms(state, head, positions)
        order, lengths = positions.row_by_row()
        hidden, metric, weights_T = positions.hidden_TD[order], self.metric(state), positions.weights_T
        square = core.squared_norms(
            head,
            hidden,
            positions.target_T[order],
            lengths,
            metric_TD=None if metric is None else hidden.to(metric) @ metric,
            weights_T=None if weights_T is None else weights_T[order],
        )
        return square.clamp(min=1e-30).sqrt().cpu().numpy()


class Gradient(HeadMethod):
    name = "gradient"
    help = "its gradient along the mean gradient of the validation rows: For-Value as published"
    pairwise = True
    normalizations = ("none", "length", "cosine")
    vocabularies = ("full", "seen")

    def fit(self, run: Run, validation: Sequence[Sample]) -> State:
        return {"direction": sound(mean_gradient(run, validation, self)[0])}

    def along(self, states: Sequence[State]) -> core.Along:
        directions = [state["direction"] for state in states]
        plain_DD = torch.eye(directions[0].shape[1]).to(directions[0])
        metrics = [self.metric(state) for state in states]  # of the norms: a direction is in its metric already
        return core.Along.of(directions[0], directions, [plain_DD if m is None else m for m in metrics], [])

    def scores_along(self, found: core.Measured) -> Tensor:
        return found.score_TK

    def tokens(self, state: State, head: Head, positions: Positions) -> tuple[Tensor, Tensor]:
        return core.score_tokens(head, state["direction"], positions.hidden_TD, positions.target_T)


def mean_gradient(
    run: Run, validation: Sequence[Sample], method: Method, moment: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Mean gradient of the rows' log-likelihood in the head (of pairs: chosen minus rejected), (V, D), and the second
    moment of the hidden states, (D, D) float64, if asked for: both of the rows of all ranks."""
    head = run.backbone.head()
    dim, device = head.weight.shape[1], head.weight.device
    total_VD = torch.zeros(head.weight.shape, dtype=core.working_dtype(head.weight), device=device)
    moment_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    n_positions = torch.zeros(1, dtype=torch.int64, device=device)
    with together("scoring the validation rows", run.sharded):
        for batch in joined(finite_positions(run, validation, method, VALIDATION), core.tile_for(device)):
            core.add_gradient(total_VD, head, batch.hidden_TD, batch.target_T, weights_T=batch.weights_T)
            if moment:
                hidden = batch.hidden_TD.double()
                moment_DD.addmm_(hidden.T, hidden)
            n_positions += len(batch.target_T)
    if world()[1] > 1:
        with answering("adding up the gradients"):
            for tensor in (total_VD, moment_DD, n_positions):
                torch.distributed.all_reduce(tensor)
    total_VD /= len(validation)
    return total_VD, moment_DD / int(n_positions) if moment else None


def sound(direction_VD: Tensor) -> Tensor:
    """A direction that rows can be scored along: the same.

    Raises:
        ValueError: it is not finite.
    """
    if not torch.isfinite(direction_VD).all():
        raise ValueError(f"the validation direction is not finite: {OVERFLOW}")
    if not direction_VD.any():
        with aside():
            logger.warning("the validation rows move the head nowhere (is the model sure of them?): all scores are 0")
    return direction_VD
