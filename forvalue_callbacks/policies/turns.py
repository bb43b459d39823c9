"""Rows for several aims at once: every validation row, or every validation set, chooses in turn."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .policy import Keep


def keep_in_turn(scores: np.ndarray, amount: float | int, alike: Iterable[Iterable[int]] = ()) -> np.ndarray:
    """Weights (N,), 1 for the rows that are kept and 0 for the others: columns take turns, and each takes the row that
    it scores highest among those that are left. So no aim is lost among larger ones, as it is by a mean over all (the
    rule of the selections compared in arXiv 2602.14696).

    Args:
        scores: (N, M); of `ForValueScorer.pairwise`, a column per validation row, or the `values` of several sets of
            scores side by side. NaN: no score.
        amount: as `Keep` takes it, of the rows with a score in any column.
        alike: groups of rows of which one at most is kept, as `find_duplicates(...).exact` and `.near` are.

    Raises:
        ValueError: no column, no score, an amount that `Keep` refuses.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores of shape {scores.shape}: give a column for each validation row or set, (N, M)")
    scored = np.isfinite(scores)
    if not scored.any():
        raise ValueError(f"none of the {len(scores)} rows has a score")
    n_keep = int(Keep(amount)(np.where(scored.any(1), 0.0, np.nan)).sum())
    group = np.arange(len(scores))
    for rows in alike:
        members = sorted(rows)
        group[np.isin(group, group[members])] = group[members].min()
    weights, taken = np.zeros(len(scores)), np.zeros(len(scores), dtype=bool)
    waiting = [
        iter(np.argsort(-column, kind="stable")[: some.sum()].tolist())
        for column, some in zip(np.where(scored, scores, -np.inf).T, scored.T, strict=True)
    ]
    while waiting and n_keep:
        for column in list(waiting):
            row = next((row for row in column if not taken[group[row]]), None)
            if row is None:
                waiting.remove(column)
                continue
            weights[row], taken[group[row]] = 1.0, True
            n_keep -= 1
            if not n_keep:
                break
    return weights
