"""Which rows run together, on every rank: pure, on token ids and lengths.

Beginnings that many rows have in common (a system prompt, examples, several answers to one prompt) are run once for
each batch: a forward pass over the beginnings, one over what follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# How many depths are tried at which rows may part.
DEPTHS = 32
# What a batch costs whatever it holds (the weights are read, kernels launched), as a share of the largest one.
PASS_COST = 1 / 32
# Rows are run after common beginnings where that leaves less than such a share of the padded tokens: it costs a second
# pass, and a copy of the keys and values for each row.
WORTH_SHARING = 0.8
# Rows per batch where a data collator makes the inputs (images), whose token count nobody knows before.
COLLATED_ROWS = 8


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


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, or of one over their beginnings and one over what follows.

    Args:
        rows: their places.
        shared: how many first tokens of each are run once for all rows of the batch that begin with them.
    """

    rows: tuple[int, ...]
    shared: tuple[int, ...]

    @property
    def n_forwards(self) -> int:
        return 2 if any(self.shared) else 1

    def halves(self) -> list[Batch]:
        """Two batches of half as many rows."""
        n = len(self.rows) // 2
        return [Batch(self.rows[:n], self.shared[:n]), Batch(self.rows[n:], self.shared[n:])]


def plan(
    lengths: Sequence[int | None],
    budget: int,
    n_ranks: int = 1,
    prompts: Sequence[np.ndarray] | None = None,
    collated_rows: int = COLLATED_ROWS,
) -> list[list[Batch]]:
    """Which rows run together, on every rank: (ranks, batches).

    Every row is in one batch of one rank. Batches are alike in length, the longest first; where it leaves less than
    `WORTH_SHARING` of the padded tokens, rows that begin alike share their beginnings.

    Args:
        lengths: tokens that the model reads in each row; None: nobody knows (a collator makes the inputs).
        budget: padded tokens in one batch, or one row.
        prompts: of each row the tokens that may be shared; None: nothing is.
        collated_rows: rows of unknown length in one batch.
    """
    known = [i for i, length in enumerate(lengths) if length is not None]
    unknown = [i for i, length in enumerate(lengths) if length is None]
    tokens = {i: length for i, length in enumerate(lengths) if length is not None}
    batches = _cut(known, tokens, budget)
    if prompts is not None:
        worth_it = WORTH_SHARING * sum(padded(batch, tokens) for batch in batches)
        sharing = _sharing(known, tokens, prompts, budget, worth_it)
        if sharing and sum(padded(batch, tokens, prompts) for batch in sharing) < worth_it:
            batches = sharing
    for lo in range(0, len(unknown), collated_rows):
        rows = tuple(unknown[lo : lo + collated_rows])
        batches.append(Batch(rows, (0,) * len(rows)))
    return [batches[rank::n_ranks] for rank in range(n_ranks)]


def padded(batch: Batch, lengths: Mapping[int, int], prompts: Sequence[np.ndarray] | None = None) -> int:
    """Tokens that a batch makes the model run over, padding included."""
    prefixes = [
        b"" if prompts is None else prompts[i][:n].tobytes() for i, n in zip(batch.rows, batch.shared, strict=True)
    ]
    rest = [lengths.get(i, 1) - n for i, n in zip(batch.rows, batch.shared, strict=True)]
    return padded_tokens(prefixes, batch.shared, rest)


def _cut(rows: Sequence[int], lengths: Mapping[int, int], budget: int) -> list[Batch]:
    """Batches alike in length, without sharing."""
    places = pack([b""] * len(rows), [0] * len(rows), [lengths[i] for i in rows], budget)
    return [Batch(tuple(rows[k] for k in batch), (0,) * len(batch)) for batch in places]


def _sharing(
    rows: Sequence[int],
    lengths: Mapping[int, int],
    prompts: Sequence[np.ndarray],
    budget: int,
    max_total: float,
) -> list[Batch]:
    """Batches of rows that begin alike, then those of the others; none where all that is saved leaves more than
    `max_total` tokens, without padding."""
    n_shared = dict(zip(rows, shared_prefixes([prompts[i] for i in rows]).tolist(), strict=True))
    sharing, alone = [i for i in rows if n_shared[i]], [i for i in rows if not n_shared[i]]
    prefix = {i: prompts[i][: n_shared[i]].tobytes() for i in sharing}
    beginnings = {prefix[i]: n_shared[i] for i in sharing}
    if sum(lengths[i] - n_shared[i] for i in rows) + sum(beginnings.values()) >= max_total:
        return []
    numbers = [n_shared[i] for i in sharing]
    packed = pack([prefix[i] for i in sharing], numbers, [lengths[i] - n_shared[i] for i in sharing], budget)
    batches = [Batch(tuple(sharing[k] for k in batch), tuple(numbers[k] for k in batch)) for batch in packed]
    return batches + _cut(alone, lengths, budget)
