"""What is estimated of the noise in a data set: numbers; `report/` makes the words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# Below this a kind of noise counts as not found: half way between chance and a score that is of some use.
USEFUL_AUC = 0.6


@dataclass(frozen=True)
class Evidence:
    """How well a kind of noise is told from clean rows, on the validation rows.

    Args:
        auc: of the scores, out of fold.
        interval: 95 % of it, from the sampling of the validation rows, where that is known.
        best: the single measure that tells it best, and its AUC.
        loss_auc: that of the mean log-likelihood alone.
    """

    auc: float
    interval: tuple[float, float] | None = None
    best: str | None = None
    best_auc: float | None = None
    loss_auc: float | None = None

    @property
    def useful(self) -> bool:
        """Whether it is of some use, as far as its interval knows."""
        return (self.interval or (self.auc,))[0] >= USEFUL_AUC

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.auc:.2f}"
        return f"{self.auc:.2f} (95 %: {self.interval[0]:.2f} to {self.interval[1]:.2f})"


@dataclass(frozen=True)
class ValidationNoise:
    """Which validation rows look wrong themselves, judged by what has not seen them.

    Args:
        share, share_error: of wrong ones, estimated, and its standard error.
        rows: places of those that are more likely wrong than right, the least likely first, and `log_odds`, theirs.
    """

    share: float
    share_error: float
    rows: tuple[int, ...]
    log_odds: tuple[float, ...]

    @property
    def surely(self) -> bool:
        """Whether there are more than chance may look like."""
        return bool(self.rows) and self.share > 1.96 * self.share_error


@dataclass(frozen=True)
class NoiseEstimate:
    """How much noise there seems to be, and what that rests on.

    Args:
        share: of the rows that are judged.
        shares: of each kind of noise among them.
        evidence: on the validation rows, by kind.
        n_validation: how many of them it rests on.
        n_answers: how many different answers there are, where they repeat; None where the kinds are corrupted copies.
        share_error: standard error of the share, where that is known.
        n_unjudged: rows that are kept because too few validation rows have their answer or are of their kind or form.
        n_unlike: rows that are kept and worth a look: unlike the validation rows and every kind of noise.
        differences: of form, between the two sides, in words.
        likelihood: mean log-likelihood of the validation rows' answers, out of fold, by how training rows are used:
            the best one judges.
        views: weights of what the answers were predicted from.
        validation: what is said of the validation rows' own answers.
    """

    share: float
    evidence: dict[str, Evidence]
    n_validation: int
    shares: dict[str, float] = field(default_factory=dict)
    n_answers: int | None = None
    share_error: float | None = None
    n_unjudged: int = 0
    n_unlike: int = 0
    differences: tuple[str, ...] = ()
    likelihood: dict[str, float] = field(default_factory=dict)
    views: dict[str, float] = field(default_factory=dict)
    validation: ValidationNoise | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> NoiseEstimate:
        evidence = {}
        for kind, found in facts["evidence"].items():
            interval = found.get("interval")
            evidence[kind] = Evidence(**{**found, "interval": None if interval is None else tuple(interval)})
        facts = {**facts, "evidence": evidence, "differences": tuple(facts.get("differences", ()))}
        if (known := facts.get("validation")) is not None:
            facts["validation"] = ValidationNoise(
                known["share"], known["share_error"], tuple(known["rows"]), tuple(known["log_odds"])
            )
        return cls(**facts)
