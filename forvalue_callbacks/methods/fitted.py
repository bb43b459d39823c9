"""A finite step of the head, to where it is fitted on the validation rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import core
from ..core import Head
from ..core.fit import Fit, fit_head
from ..data.sample import Sample
from ..model.positions import Positions, concatenate
from ..model.ranks import together
from ..model.run import Run
from ..progress import aside
from .base import VALIDATION, State, finite_positions
from .gradient import HeadMethod

logger = logging.getLogger(__name__)


class Fitted(HeadMethod):
    name = "fitted"
    help = "its log-likelihood after the head is fitted on the validation rows, minus before"

    def fit(self, run: Run, validation: Sequence[Sample]) -> State:
        # Every rank fits for itself: validation sets are small, and the same fit needs no exchange.
        with together("fitting the head", run.sharded):
            positions = concatenate(finite_positions(run, validation, self, VALIDATION, all_ranks=True))
            run.progress.now("fitting the head")
            fit = fit_head(
                run.backbone.head(),
                positions.hidden_TD,
                positions.target_T,
                positions.samples_T,
                weights_T=positions.weights_T,
            )
        if fit.ridge == torch.inf:
            with aside():
                logger.warning("no move of the head predicts validation rows out of fold better: choose another way")
        curve = torch.tensor(list(fit.curve.items()), dtype=torch.float64)
        return {"direction": fit.move_VD, "ridge": torch.tensor(fit.ridge, dtype=torch.float64), "curve": curve}

    def along(self, states: Sequence[State]) -> core.Along:
        moves = [core.Move.of(state["direction"]) for state in states]
        return core.Along.of(states[0]["direction"], [], [], moves)

    def scores_along(self, found: core.Measured) -> Tensor:
        return found.gain_TK

    def tokens(self, state: State, head: Head, positions: Positions) -> tuple[Tensor, Tensor]:
        return core.gain_tokens(head, state["direction"], positions.hidden_TD, positions.target_T)


class FittedLikelihood(Fitted):
    name = "fitted_likelihood"
    help = "its log-likelihood after the head is fitted on the validation rows"

    def scores_along(self, found: core.Measured) -> Tensor:
        return found.gain_TK + found.log_likelihood_T[:, None]

    def tokens(self, state: State, head: Head, positions: Positions) -> tuple[Tensor, Tensor]:
        gain_T, log_p_T = super().tokens(state, head, positions)
        return gain_T + log_p_T, log_p_T


def fit_of(state: State) -> Fit:
    """How the head was fitted."""
    return Fit(state["direction"], float(state["ridge"]), dict(map(tuple, state["curve"].tolist())))
