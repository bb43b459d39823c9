"""Relabel and Swap: other answers in the place of wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .policy import Drop, Policy, Threshold


class _Rewriting(Policy):
    """Another policy, but some of the rows that it drops stay with another answer."""

    policy: Policy

    def __post_init__(self) -> None:
        if self.policy.relabels or self.group_column not in (None, self.policy.group_column):
            name = type(self).__name__
            raise ValueError(f"{name} takes a policy that drops rows, with its own group column, not {self.policy}")
        object.__setattr__(self, "group_column", self.policy.group_column)

    @property
    def needs_log_odds(self) -> bool:
        return self.policy.needs_log_odds

    @property
    def reweights(self) -> bool:
        return self.policy.reweights

    @property
    def relabels(self) -> bool:
        return True

    def __call__(self, scores: np.ndarray, groups: Sequence[Any] | None = None) -> np.ndarray:
        return self.policy(scores, groups)


@dataclass(frozen=True)
class Relabel(_Rewriting):
    """Another policy, but rows that it drops stay with another answer where one is known that is right with at least
    this probability: where answers repeat, by scores of `method="auto"` or "label_model". For `prefilter`.

    Args:
        probability: in (0, 1].
        policy: which rows are dropped, or stay with another answer.
    """

    probability: float = 0.95
    policy: Policy = field(default_factory=lambda: Drop("auto"))

    def __post_init__(self) -> None:
        if isinstance(self.probability, bool) or not 0 < self.probability <= 1:
            raise ValueError(f"Relabel: probability must be in (0, 1], not {self.probability!r}")
        super().__post_init__()

    def other_answers(self, weights: np.ndarray, scores: Any) -> dict[int, int]:
        """Raises ValueError for scores without judgements."""
        judgements = scores.judgements
        if judgements is None:
            raise ValueError(
                f"{self} needs to know whose answer is right, and these scores do not say: score with method='auto', "
                "of rows whose answers repeat"
            )
        sure = judgements.suggested_probability >= self.probability  # NaN is not
        found = np.flatnonzero(sure & (judgements.suggested_row >= 0) & (weights == 0))
        return dict(zip(found.tolist(), judgements.suggested_row[found].tolist(), strict=True))

    def __str__(self) -> str:
        return f"{self.policy}+relabel:{self.probability}"


@dataclass(frozen=True)
class Swap(_Rewriting):
    """Another policy, but preference rows that it drops stay the other way round where their score is below `-margin`:
    chosen and rejected change places, or a mark becomes the other one. A row turned round has the opposite score. For
    `prefilter`.

    Args:
        margin: >= 0.
        policy: which rows are dropped, or stay turned round.
    """

    margin: float = 0.0
    policy: Policy = field(default_factory=Threshold)

    def __post_init__(self) -> None:
        if isinstance(self.margin, bool) or not 0 <= self.margin < np.inf:
            raise ValueError(f"Swap: margin must be 0 or more, not {self.margin!r}")
        super().__post_init__()

    def other_answers(self, weights: np.ndarray, scores: Any) -> dict[int, int]:
        return {row: row for row in np.flatnonzero((weights == 0) & (scores.values < -self.margin)).tolist()}

    def __str__(self) -> str:
        return f"{self.policy}+swap:{self.margin}"
