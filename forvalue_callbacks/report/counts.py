"""How many rows each cut would drop, of all and of each group: counts, however many rows there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 160
MOST_LEVELS = 40
OTHERS = "all others"


@dataclass(frozen=True)
class Cuts:
    """Where rows may be cut: `anchor + step * k` for k from `first` to `first + BINS`, the anchor among them.

    Args:
        start: which of the cuts is shown first, from 0; None: none, nothing follows from the scores or the weights.
        exact: whether that drops the same rows as the policy, where there is one.
    """

    anchor: float
    step: float
    first: int
    start: int | None
    exact: bool

    @property
    def edges(self) -> np.ndarray:
        """(BINS + 1,); the anchor to the last bit."""
        return self.anchor + self.step * np.arange(self.first, self.first + BINS + 1)

    def counted(self, values: np.ndarray) -> list[int]:
        """Scored rows below the first edge, between each and the next, and at or above the last: (BINS + 2,)."""
        places = np.searchsorted(self.edges, values[np.isfinite(values)], side="right")
        return np.bincount(places, minlength=BINS + 2).tolist()


def cuts_of(values: np.ndarray, weights: np.ndarray | None, log_odds: bool) -> Cuts:
    """Cuts over the bulk of the scores.

    Args:
        values: (N,), NaN where a row has no score; at least one has.
        weights: (N,), as a policy gives them. Where one cut drops the same rows that is where the slider starts, and
            else at 0 with `log_odds`.
    """
    scored = np.isfinite(values)
    some = values[scored]
    anchor, exact = (0.0, weights is None) if log_odds else (None, False)
    if weights is not None:
        gone, kept = some[np.asarray(weights)[scored] == 0], some[np.asarray(weights)[scored] != 0]
        if len(kept) and (not len(gone) or gone.max() < kept.min()):
            between = log_odds and (not len(gone) or gone.max() < 0) and kept.min() >= 0
            anchor, exact = (0.0 if between else float(kept.min())), True
    low, high = (float(x) for x in np.quantile(some, [0.002, 0.998]))
    if anchor is not None:
        low, high = min(low, anchor), max(high, anchor)
    if high - low < 1e-9 * max(1.0, abs(low)):
        low, high = low - 0.5, high + 0.5
    step = (high - low) / (BINS - 2)
    if anchor is None:
        return Cuts(low - step, step, 0, None, exact)
    first = int(np.floor((low - anchor) / step))
    return Cuts(anchor, step, first, -first, exact)


def by_group(
    name: str, groups: Sequence[Any], values: np.ndarray, cuts: Cuts, order: Sequence[str] | None = None
) -> dict[str, Any]:
    """Counts of the rows of each group, JSON-able; the smallest of many groups are one.

    Args:
        groups: (N,), one value a row.
        order: of the groups, where they have one.
    """
    names = [str(group) for group in groups]
    shown = list(order or [level for level, _ in Counter(names).most_common(MOST_LEVELS)])
    places = {level: i for i, level in enumerate(shown)}
    codes = np.array([places.get(level, len(shown)) for level in names])
    levels = [
        {"name": level, "rows": int((codes == i).sum()), "counts": cuts.counted(values[codes == i])}
        for i, level in enumerate([*shown, OTHERS])
        if (codes == i).any()
    ]
    return {"name": name, "ordered": order is not None, "levels": levels}


def lengths(n_labelled: np.ndarray) -> tuple[list[str], list[str]] | None:
    """The span of each length among six with about as many rows each, and the spans, the shortest first; None where
    all are equally long."""
    edges = np.unique(np.quantile(n_labelled, np.linspace(0, 1, 7), method="lower"))
    if len(edges) < 2:
        return None
    ends = [*(edges[1:-1] - 1).tolist(), int(edges[-1])]
    names = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in zip(edges[:-1].tolist(), ends, strict=True)]
    places = np.searchsorted(edges[1:-1], n_labelled, side="right")
    return [names[place] for place in places.tolist()], names
