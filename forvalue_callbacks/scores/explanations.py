"""What speaks for and against single rows: their tokens, and the validation rows that are nearest to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Explanation:
    """Of one row. One that cannot be scored has no tokens and no validation rows.

    Args:
        row: its place in the data set.
        tokens: the labelled tokens as text, one after the other, where a tokenizer is known; else their ids as text.
            Where several tokens make one character the last has it, and the others "". Of a classifier the names of
            the classes.
        token_scores: of each, in nats: the lowest speak against the row. Those of "fitted_likelihood" are
            log-likelihoods, none above 0; of the others the negative ones speak against it.
        by: the method whose scores of tokens they are: the one that scored the rows, or another where that has none.
        supporting: places of the validation rows that speak most for it and their scores, the most first: the cosine
            of both rows' gradients in the head, above 0.
        opposing: of those that speak most against it, the most first, below 0.
        nearest_by: the method in whose metric that is: the one that scored the rows, or another where that has none.
    """

    row: int
    tokens: tuple[str, ...]
    token_scores: tuple[float, ...]
    by: str
    supporting: tuple[tuple[int, float], ...] = ()
    opposing: tuple[tuple[int, float], ...] = ()
    nearest_by: str = ""


def tails(values: np.ndarray, n: int) -> tuple[list[int], list[int]]:
    """Places of the rows to look at: the n worst, the worst first, and the n best, the best first.

    Rows without a score are in neither, and no row is in both: of fewer than 2 n the worst are taken first. Of equal
    ones the first are the worse.

    Args:
        values: scores, (N,).
    """
    order = np.argsort(values, kind="stable")  # NaN comes last
    order = order[: len(order) - int(np.isnan(values).sum())]
    worst, rest = order[:n], order[n:]
    return worst.tolist(), rest[::-1][:n].tolist()
