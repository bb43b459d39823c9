"""What speaks for and against single rows: their tokens, and the validation rows that are nearest to them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Explanation:
    """Of one row.

    Args:
        row: its place in the data set.
        tokens: the labelled tokens as text, one after the other, where a tokenizer is known; else their ids as text.
        token_scores: of each, in nats: negative ones speak against the row.
        by: the method whose scores of tokens they are: the one that scored the rows, or another where that has none.
        supporting: places of the validation rows that speak most for it and their scores, the most first.
        opposing: of those that speak most against it, the most first.
    """

    row: int
    tokens: tuple[str, ...]
    token_scores: tuple[float, ...]
    by: str
    supporting: tuple[tuple[int, float], ...] = ()
    opposing: tuple[tuple[int, float], ...] = ()
