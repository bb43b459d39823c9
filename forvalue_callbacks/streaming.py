"""filter_stream for `IterableDataset`: a cut is learnt on its first scored rows, and each row is judged by itself."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import numpy as np

from .policies import Keep, Policy, as_policy, parts
from .progress import Progress

# So many rows are read before the first is judged, if no other number is given.
WINDOW = 1000
SCORE = "forvalue_score"


def filter_stream(stream: Any, policy: Policy | str | None = None, window: int = WINDOW) -> Any:
    """A stream without the rows that a policy drops, for rows that `ForValueTransform` has scored::

        scored = stream.map(ForValueTransform(model, validation, processing_class=tokenizer), batched=True)
        clean = filter_stream(scored, "drop:0.3")

    The policy is asked about the first `window` rows alone, which are scored here and again when the stream is read.
    The lowest score that it keeps there is the cut (of a `Threshold` its own number): each row is then judged by
    itself, the same in every epoch, and no row of the stream is held in memory. Where the first rows are unlike the
    later ones, another share than that of the policy goes: shuffle the stream first.

    Rows without a score stay, with their `forvalue_reason`. What is kept and dropped is said, first after `window`
    rows of a process and then whenever their number has doubled.

    Args:
        stream: a `datasets.IterableDataset` with the column `forvalue_score`.
        policy: `Drop`, `Keep` of a fraction, `Threshold` or a chain of them, or its text; `Drop(0.2)` by default.
        window: how many rows the cut is learnt on.

    Returns:
        A `datasets.IterableDataset`.

    Raises:
        TypeError: no stream, or no policy.
        ValueError: a policy that cannot judge a row by itself; no row in the window, no score or none that is kept.
    """
    policy = as_policy(policy)
    if hasattr(stream, "__len__") or not hasattr(stream, "take"):
        raise TypeError(
            f"a {type(stream).__name__} is no stream: filter_stream takes a datasets.IterableDataset. The scores of a "
            f"Dataset are all there: dataset.select(policy(dataset['{SCORE}']).nonzero()[0])."
        )
    _refuse(policy)
    scores = np.array([_score(row) for row in stream.take(window)])
    kept = int((policy(scores) > 0).sum())
    cut = policy.cut(scores[np.isfinite(scores)])
    Progress().say(
        f"For-Value: {policy} keeps {kept:,} of the first {len(scores):,} rows of the stream: rows that score less "
        f"than {cut:.6g} are dropped"
    )
    return stream.filter(_Above(cut, window))


class _Above:
    """Whether a row scores as much as the cut, or has no score; counts what it says."""

    def __init__(self, cut: float, first_report: int):
        self.cut = cut
        self.next_report = first_report
        self.kept = self.dropped = self.unscored = 0

    def __call__(self, row: Mapping[str, Any]) -> bool:
        score = _score(row)
        scored = bool(np.isfinite(score))
        keeps = not scored or score >= self.cut
        self.kept += keeps
        self.dropped += not keeps
        self.unscored += not scored
        if self.kept + self.dropped == self.next_report:
            self.next_report *= 2
            Progress().say(
                f"For-Value: of {self.kept + self.dropped:,} rows of the stream {self.kept:,} are kept "
                f"({self.unscored:,} of them without a score: forvalue_reason says why) and {self.dropped:,} dropped"
            )
        return keeps


def _score(row: Mapping[str, Any]) -> float:
    """The score of a row, NaN without one."""
    if SCORE not in row:
        raise ValueError(
            f"the rows of the stream have no column {SCORE!r}: stream.map(ForValueTransform(...), batched=True) first."
        )
    return float("nan") if row[SCORE] is None else float(row[SCORE])


def _refuse(policy: Policy) -> None:
    counts = any(isinstance(part, Keep) and isinstance(part.amount, Integral) for part in parts(policy))
    for refused, why in (
        (policy.relabels, "needs the answers of all rows: load the stream as a Dataset and use prefilter"),
        (policy.needs_log_odds, "needs log odds, which methods learn from all rows: use ForValueCallback"),
        (policy.reweights, "weights rows, and a stream has none to draw again: use Drop"),
        (policy.group_column is not None, "compares rows within groups: filter the stream of each group by itself"),
        (counts, "keeps a number of rows, and nobody knows of how many: give a fraction, Keep(0.5)"),
    ):
        if refused:
            raise ValueError(f"{policy} cannot judge the rows of a stream one by one: it {why}.")
