"""Beginnings that many rows have in common (a system prompt, examples, several answers to one prompt), and batches.

A forward pass over the beginnings, one over what follows: the tokens that are shared go through the model once for
each batch. All on token ids, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# How many depths are tried at which rows may part.
DEPTHS = 32
# What a batch costs whatever it holds (the weights are read, kernels launched), as a share of the largest one.
PASS_COST = 1 / 32


def shared_prefixes(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """How many of its first tokens each row should share with others, 0 where none; (rows,).

    Rows that agree in at least k tokens form a group and share all that they agree in; k is the one of up to 32
    depths that saves the most tokens.

    Args:
        prompts: of each row the tokens that may be shared.
    """
    best = np.zeros(len(prompts), dtype=np.int64)
    if len(prompts) < 2:
        return best
    keys = [prompt.astype(">i8").tobytes() for prompt in prompts]  # big-endian bytes sort as the numbers do
    order = np.array(sorted(range(len(prompts)), key=keys.__getitem__))
    common = np.array([_agree(prompts[i], prompts[j]) for i, j in pairwise(order)])
    depths = np.unique(common[common > 0])
    if len(depths) > DEPTHS:
        depths = np.unique(np.quantile(depths, np.linspace(0, 1, DEPTHS), method="nearest"))
    most = 0
    for depth in depths:
        parts = np.flatnonzero(np.concatenate([[True], common < depth]))  # where a group starts, in `order`
        sizes = np.diff([*parts, len(order)])
        inner = np.concatenate([[np.iinfo(np.int64).max], np.where(common < depth, np.iinfo(np.int64).max, common)])
        shared = np.where(sizes > 1, np.minimum.reduceat(inner, parts), 0)
        saved = int(((sizes - 1) * shared).sum())
        if saved > most:
            most = saved
            best[order] = np.repeat(shared, sizes)
    return best


def _agree(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common prefix."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n


def padded_tokens(prefixes: Sequence[bytes], prefix_lengths: Sequence[int], rest_lengths: Sequence[int]) -> int:
    """Padded tokens of one batch in both passes: each prefix once, the rest of every row."""
    return len(set(prefixes)) * max(prefix_lengths) + len(rest_lengths) * max(rest_lengths)


def pack(
    prefixes: Sequence[bytes], prefix_lengths: Sequence[int], rest_lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Places of rows in batches of at most `max_tokens` padded tokens (or one row), those of one prefix together.

    The rows are put in order; where to cut is found by dynamic programming: the fewest padded tokens over all batches,
    each counted as `PASS_COST` more.
    """
    longest: dict[bytes, int] = {}
    for prefix, length in zip(prefixes, rest_lengths, strict=True):
        longest[prefix] = max(length, longest.get(prefix, 0))
    order = sorted(
        range(len(prefixes)), key=lambda i: (-longest[prefixes[i]], prefixes[i], -rest_lengths[i])
    )  # groups of like lengths meet, and the longest batch comes first, so that a lack of memory shows at once
    number = np.cumsum([k > 0 and prefixes[i] != prefixes[order[k - 1]] for k, i in enumerate(order)])
    begin, rest = np.array(prefix_lengths)[order], np.array(rest_lengths)[order]
    sharing, counts = begin.any(), np.arange(1, len(order) + 1)
    least = np.full(len(order) + 1, np.inf)  # what the best batches of the first so many rows cost
    least[0] = 0
    start = np.zeros(len(order) + 1, dtype=np.int64)  # where the last of them starts
    for i in range(len(order)):
        some = slice(i, min(len(order), i + max(1, max_tokens // max(1, rest[i]))))
        tokens = counts[: some.stop - i] * rest[i]
        if sharing:  # and a longer rest may follow, of another prefix
            tokens = counts[: some.stop - i] * np.maximum.accumulate(rest[some])
            tokens += (number[some] - number[i] + 1) * np.maximum.accumulate(begin[some])
            tokens = tokens[: max(1, np.searchsorted(tokens, max_tokens, "right"))]  # they only grow
        ends = slice(i + 1, i + 1 + len(tokens))
        cost = least[i] + tokens + PASS_COST * max_tokens
        start[ends] = np.where(cost < least[ends], i, start[ends])
        least[ends] = np.minimum(cost, least[ends])
    batches, end = [], len(order)
    while end:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]
