"""Policies that drop, keep and weight rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from numbers import Integral
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# Reweighting that leaves less than such a share of the rows as effective sample size is worth a warning.
SMALL_SAMPLE = 0.2


@dataclass(frozen=True)
class Policy:
    """Base of all policies. A subclass says in `_weights` what to do with the rows that have a score.

    Args:
        group_column: name of a dataset column (the class, the source). Then the policy holds within each group, and
            every group with a scored row keeps at least one.
    """

    group_column: str | None = field(default=None, kw_only=True)

    @property
    def needs_log_odds(self) -> bool:
        """Whether the scores must be log odds that a row is clean, as `method="auto"` and "label_model" give."""
        return False

    @property
    def reweights(self) -> bool:
        """Whether rows that are kept have different weights."""
        return False

    @property
    def kept_share(self) -> float:
        """Share of the scored rows that stays, where that is known before the scores are; else 1."""
        return 1.0

    @property
    def relabels(self) -> bool:
        """Whether rows get other answers: `Relabel` and `Swap`, and no other."""
        return False

    def other_answers(self, weights: np.ndarray, scores: Any) -> dict[int, int]:
        """Rows that stay with another answer, and the rows whose answer that is: itself where it is turned round.

        Args:
            weights: (N,), as this policy gives them.
            scores: `ForValueScores`.
        """
        return {}

    def __call__(self, scores: np.ndarray, groups: Sequence[Any] | None = None) -> np.ndarray:
        """Weights of the rows, (N,) float64.

        Args:
            scores: (N,), higher = more valuable. Rows whose score is not finite always get weight 0.
            groups: (N,) hashable values of `group_column`; ignored by a policy that has none.

        Raises:
            ValueError: every row would be dropped; shapes that do not fit; no `groups` though there is a group column.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.ndim != 1:
            raise ValueError(f"scores must have shape (N,), not {scores.shape}")
        scored = np.isfinite(scores)
        if not scored.any():
            raise ValueError(
                f"none of the {len(scores)} rows has a score: the reasons are in ForValueScores.summary()"
            )
        weights = np.zeros(len(scores))
        weights[scored] = self._weights(scores[scored], self._group_codes(groups, scored))
        if not weights.any():
            raise ValueError(
                f"{self} drops all {scored.sum()} scored rows (scores from {scores[scored].min():g} to "
                f"{scores[scored].max():g}): lower the threshold or the fraction, or use Keep(count)"
            )
        return weights

    def cut(self, scores: np.ndarray) -> float:
        """The score that a row must have to stay where rows are judged one by one: the lowest kept of these (n,)."""
        kept = self._weights(scores, np.zeros(len(scores), dtype=np.int64)) > 0
        return float(scores[kept].min())

    def _weights(self, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Weights (n,) of n rows that all have a finite score; groups (n,) numbered 0, 1, ... (0 without groups)."""
        raise NotImplementedError

    def _group_codes(self, groups: Sequence[Any] | None, scored: np.ndarray) -> np.ndarray:
        if self.group_column is None:
            return np.zeros(scored.sum(), dtype=np.int64)
        if groups is None:
            raise ValueError(f"{self} needs groups: the values of the column {self.group_column!r}, one per row")
        if len(groups) != len(scored):
            raise ValueError(f"{len(groups)} groups for {len(scored)} scores")
        codes: dict[Any, int] = {}
        return np.array(
            [codes.setdefault(group, len(codes)) for group, has in zip(groups, scored, strict=True) if has]
        )

    def then(self, other: Policy) -> Chain:
        """This policy, then `other` on the rows it kept; weights multiply."""
        return Chain((*parts(self), *parts(other)))

    def __str__(self) -> str:
        """The form that `parse_policy` reads."""
        (argument,) = (value for name, value in vars(self).items() if name != "group_column")
        column = f"@{self.group_column}" if self.group_column is not None else ""
        return f"{type(self).__name__.lower()}:{argument}{column}"


@dataclass(frozen=True)
class Drop(Policy):
    """Drops the `round(fraction * N)` worst of the N scored rows; of equal scores the later row goes first.

    With groups the number dropped is the same and each group gives its share (see `_keep_best`).

    Args:
        fraction: in [0, 1), or "auto": the rows that are more likely noisy than clean, by scores that are log odds
            (`method="auto"` or "label_model"); with groups the best row of each group stays in any case.
    """

    fraction: float | str

    def __post_init__(self) -> None:
        if self.fraction != "auto" and (isinstance(self.fraction, str) or not 0 <= self.fraction < 1):
            raise ValueError(f"Drop: fraction must be in [0, 1) or 'auto', not {self.fraction!r}")

    @property
    def needs_log_odds(self) -> bool:
        return self.fraction == "auto"

    @property
    def kept_share(self) -> float:
        return 1.0 if isinstance(self.fraction, str) else 1 - self.fraction

    def _weights(self, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
        if isinstance(self.fraction, str):
            return Threshold(0.0, group_column=self.group_column)._weights(scores, groups)
        n_keep = len(scores) - round(self.fraction * len(scores))
        return _keep_best(scores, groups, n_keep, every_group=self.group_column is not None)


@dataclass(frozen=True)
class Keep(Policy):
    """Keeps the best rows; of equal scores the earlier row stays.

    With groups the number kept is the same and each group gets its share (see `_keep_best`).

    Args:
        amount: a float in (0, 1] keeps `round(amount * N)` of the N scored rows; an int >= 1 keeps that many, or all
            if there are fewer.
    """

    amount: float | int

    def __post_init__(self) -> None:
        if isinstance(self.amount, Integral) and not isinstance(self.amount, bool):
            if self.amount < 1:
                raise ValueError(f"Keep: a count must be at least 1, not {self.amount}")
        elif isinstance(self.amount, bool) or not 0 < self.amount <= 1:
            raise ValueError(f"Keep: amount must be a float in (0, 1] or a count as int, not {self.amount!r}")

    @property
    def kept_share(self) -> float:
        return 1.0 if isinstance(self.amount, Integral) else float(self.amount)

    def _weights(self, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
        n_keep = self.amount if isinstance(self.amount, Integral) else round(self.amount * len(scores))
        return _keep_best(scores, groups, int(n_keep), every_group=self.group_column is not None)


@dataclass(frozen=True)
class Threshold(Policy):
    """Drops the rows that score less than `below`; with groups the best row of each group stays in any case."""

    below: float = 0.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.below):
            raise ValueError(f"Threshold: below must be a finite number, not {self.below}")

    def cut(self, scores: np.ndarray) -> float:
        return self.below

    def _weights(self, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
        keep = scores >= self.below
        if self.group_column is not None:
            keep |= _ranks(scores, groups) == 0
        return keep.astype(np.float64)


@dataclass(frozen=True)
class Reweight(Policy):
    """Weights proportional to `exp(z / temperature)`, z the standardised score clipped to [-3, 3]; mean weight 1.

    With groups both hold within each group: z is standardised there, and the mean weight 1 keeps the group's share.

    Args:
        temperature: > 0; the lower, the more the best rows are drawn.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < np.inf:
            raise ValueError(f"Reweight: temperature must be a finite number > 0, not {self.temperature}")

    @property
    def reweights(self) -> bool:
        return True

    def _weights(self, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
        deviation = scores - _group_mean(scores, groups)
        spread = np.sqrt(_group_mean(deviation**2, groups))
        z = np.clip(np.divide(deviation, spread, out=np.zeros_like(deviation), where=spread > 0), -3, 3)
        best = np.full(groups.max() + 1, -np.inf)
        np.maximum.at(best, groups, z)
        unscaled = np.exp((z - best[groups]) / self.temperature)  # the best cancels; without it exp could overflow
        weights = unscaled / _group_mean(unscaled, groups)
        if (size := effective_sample_size(weights)) < SMALL_SAMPLE * len(weights):
            logger.warning(
                "%s draws so few of %d rows so often that they are worth %.0f drawn alike: raise the temperature",
                self,
                len(weights),
                size,
            )
        return weights


@dataclass(frozen=True)
class Chain(Policy):
    """Policies one after the other, as `first.then(second)` makes them: each judges only the rows still kept.

    `group_column` is that of the policies that have one.

    Raises:
        ValueError: two policies with different group columns.
    """

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        if any(policy.relabels for policy in self.policies):
            raise ValueError("Relabel and Swap are no part of a chain: give them the chain, as Relabel(policy=chain)")
        columns = {policy.group_column for policy in self.policies} - {None}
        if self.group_column is not None:
            columns.add(self.group_column)
        if len(columns) > 1:
            raise ValueError(f"a chain of policies takes one group column, not {sorted(map(str, columns))}")
        object.__setattr__(self, "group_column", next(iter(columns), None))

    @property
    def needs_log_odds(self) -> bool:
        return any(policy.needs_log_odds for policy in self.policies)

    @property
    def reweights(self) -> bool:
        return any(policy.reweights for policy in self.policies)

    @property
    def kept_share(self) -> float:
        return prod(policy.kept_share for policy in self.policies)

    def __call__(self, scores: np.ndarray, groups: Sequence[Any] | None = None) -> np.ndarray:
        scores = np.asarray(scores, dtype=np.float64)
        weights = np.ones(len(scores))
        for policy in self.policies:
            weights = weights * policy(np.where(weights > 0, scores, np.nan), groups)
        return weights

    def cut(self, scores: np.ndarray) -> float:
        cut = -np.inf
        for policy in self.policies:
            cut = max(cut, policy.cut(scores[scores >= cut]))
        return cut

    def __str__(self) -> str:
        return "+".join(map(str, self.policies))


def effective_sample_size(weights: np.ndarray) -> float:
    """(sum w)^2 / sum w^2 (Kish 1965): as many equally weighted rows have the same variance of a weighted mean."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def describe(weights: np.ndarray) -> dict[str, float]:
    """What weights (N,) do to an epoch of N draws, for the log: JSON-able.

    Returns:
        `kept` and `dropped` rows; `draws_per_kept_row_mean` and `_max`, of the expected draws `N * w / sum(w)`;
        `effective_sample_size`.
    """
    kept = weights > 0
    draws = len(weights) * weights[kept] / weights.sum()
    return {
        "kept": int(kept.sum()),
        "dropped": int((~kept).sum()),
        "draws_per_kept_row_mean": float(draws.mean()),
        "draws_per_kept_row_max": float(draws.max()),
        "effective_sample_size": effective_sample_size(weights),
    }


def parts(policy: Policy) -> tuple[Policy, ...]:
    """The policies of a chain, or the one that it is."""
    return policy.policies if isinstance(policy, Chain) else (policy,)


def _group_mean(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Mean over each row's group, (n,)."""
    return (np.bincount(groups, weights=values) / np.bincount(groups))[groups]


def _ranks(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Rank of each row within its group, (N,): 0 is the best; of equal scores the earlier row is better."""
    order = np.lexsort((-scores, groups))  # by group, then best first; stable
    first_of_group = np.searchsorted(groups[order], groups[order])
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[order] = np.arange(len(scores)) - first_of_group
    return ranks


def _keep_best(scores: np.ndarray, groups: np.ndarray, n_keep: int, every_group: bool) -> np.ndarray:
    """1.0 for the `n_keep` best rows, shared out over the groups in proportion to their sizes, else 0.0; (N,).

    The shares are those of Sainte-Lague (1910): row r of a group of n is taken in the order of (r + 1/2) / n. They sum
    to exactly `n_keep`. With `every_group` the best row of each group is taken first, whatever `n_keep` is.
    """
    ranks = _ranks(scores, groups)
    turn = (ranks + 0.5) / np.bincount(groups)[groups]
    if every_group:
        turn[ranks == 0] = 0
        n_keep = max(n_keep, int((ranks == 0).sum()))
    weights = np.zeros(len(scores))
    weights[np.argsort(turn, kind="stable")[:n_keep]] = 1.0
    return weights
