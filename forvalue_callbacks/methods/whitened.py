"""The mean gradient without the large common part of all hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import core
from ..core import Head
from ..data.sample import Sample
from ..model.run import Run
from .base import State
from .gradient import Gradient, mean_gradient, sound

# Share of the mean diagonal that is added to the second moment before it is inverted.
WHITENING_RIDGE = 0.01


class Whitened(Gradient):
    name = "whitened"
    help = "the same, the large common part of all hidden states taken out"

    def fit(self, run: Run, validation: Sequence[Sample]) -> State:
        gradient_VD, moment_DD = mean_gradient(run, validation, self, moment=True)
        assert moment_DD is not None
        metric_DD = core.inverse_with_ridge(moment_DD, WHITENING_RIDGE)
        return {"direction": sound(gradient_VD @ metric_DD.to(gradient_VD)), "metric": metric_DD}

    def shapes(self, head: Head) -> dict[str, tuple[int, ...]]:
        dim = head.weight.shape[1]
        return {**super().shapes(head), "metric": (dim, dim)}

    def metric(self, state: State) -> Tensor:
        return state["metric"]
