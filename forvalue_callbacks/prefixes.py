"""Beginnings that many rows have in common (a system prompt, examples, several answers to one prompt).

A forward pass over the beginnings, one over what follows: the tokens that are shared go through the model once for
each batch. All on token ids, no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

# How many depths are tried at which rows may part.
DEPTHS = 32


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
    """Places of rows in batches of at most `max_tokens` padded tokens (or one row), those of one prefix together."""
    longest: dict[bytes, int] = {}
    for prefix, rest in zip(prefixes, rest_lengths, strict=True):
        longest[prefix] = max(rest, longest.get(prefix, 0))
    order = sorted(
        range(len(prefixes)), key=lambda i: (-longest[prefixes[i]], prefixes[i], -rest_lengths[i])
    )  # groups of like lengths meet, and the longest batch comes first, so that a lack of memory shows at once
    batches: list[list[int]] = []
    n_prefixes = longest_prefix = longest_rest = 0
    for i in order:
        new = not batches or prefixes[i] != prefixes[batches[-1][-1]]
        wider = n_prefixes + new, max(longest_prefix, prefix_lengths[i]), max(longest_rest, rest_lengths[i])
        if batches and wider[0] * wider[1] + (len(batches[-1]) + 1) * wider[2] <= max_tokens:
            batches[-1].append(i)
            n_prefixes, longest_prefix, longest_rest = wider
        else:
            batches.append([i])
            n_prefixes, longest_prefix, longest_rest = 1, prefix_lengths[i], rest_lengths[i]
    return batches
