"""A sampler that draws rows by weight and leaves everything else about an epoch as it was.

Put inside the data loader of a Trainer, it drops rows (weight 0) and repeats others without changing the number of
steps, the learning-rate schedule or what a resumed run skips.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SubsetRandomSampler, WeightedRandomSampler

# Weights are kept as integers up to this, so that sums over any order of any number of rows are exact.
WEIGHT_UNITS = 2**32
# The one random number of an epoch is an odd multiple of 2^-25: never within rounding of a whole number of draws.
OFFSET_GRID = 2**24

# Samplers whose order means nothing; accelerate's SeedableRandomSampler is a RandomSampler.
RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

INSTEAD = "Score before training instead: prefilter(trainer), or dataset.map(ForValueTransform(...)) and a filter."


class ResamplingSampler(Sampler[int]):
    """Draws row i about `weights[i] * N / sum(weights)` times per epoch, in the order of the sampler it wraps.

    Systematic resampling (Kitagawa 1996, appendix): the expected draws are laid end to end along the wrapped order
    and read off at N points, one apart, from one random offset. So each row is drawn floor or ceil of its expectation,
    rows of weight 0 never, N rows in all; with equal weights the epoch is exactly that of the wrapped sampler.

    After a random sampler a drawn row appears first at its own place in the wrapped order, and its copies go to the
    places of the rows not drawn, spread around the epoch so that they do not share a batch. Any other order has a
    meaning (a curriculum, groups of one length): there the copies follow the row directly and later rows move up or
    down, so that the order stays what it is.

    The offset depends on (seed, epoch) alone: every rank and every resumed run draws the same rows.

    Args:
        sampler: yields each of N row indices once per epoch.
        weights: (N,), finite, >= 0, not all 0.
        seed: >= 0.

    Raises:
        ValueError: weights of another length than the sampler, negative, not finite or all 0.
    """

    def __init__(self, sampler: Sampler[int], weights: np.ndarray, seed: int) -> None:
        weights = np.asarray(weights, dtype=np.float64)
        n = len(sampler)  # type: ignore[arg-type]
        if weights.shape != (n,):
            raise ValueError(f"weights of shape {weights.shape} for a sampler of length {n}")
        if not np.isfinite(weights).all() or weights.min(initial=0) < 0 or not weights.any():
            raise ValueError("weights must be finite and >= 0, and one of them > 0")
        self.sampler = sampler
        self.weights = weights
        self.seed = seed
        self.epoch: int = getattr(sampler, "epoch", 0)
        self._units = np.rint(weights / weights.max() * WEIGHT_UNITS).astype(np.int64)

    def __len__(self) -> int:
        return len(self.weights)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch to draw next, here and in the wrapped sampler."""
        self.epoch = epoch
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        self.set_epoch(self.epoch)  # an epoch that was broken off has left the wrapped sampler one ahead
        order = np.array(list(self.sampler))
        draws = self._draws(order)
        yield from self._arrange(order, draws).tolist()
        self.set_epoch(self.epoch + 1)  # as accelerate's SeedableRandomSampler does

    def _draws(self, order: np.ndarray) -> np.ndarray:
        """Number of draws at each place of the epoch, (N,), sum N."""
        n = len(order)
        offset = (np.random.default_rng([self.seed, self.epoch]).integers(OFFSET_GRID) + 0.5) / OFFSET_GRID
        expected_so_far = np.cumsum(self._units[order])
        return np.diff(np.floor(expected_so_far / expected_so_far[-1] * n + offset).astype(np.int64), prepend=0)

    def _arrange(self, order: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The rows of the epoch, (N,), each of them as often as drawn."""
        if not isinstance(self.sampler, RANDOM):
            return np.repeat(order, draws)
        n = len(order)
        place = np.repeat(np.arange(n), draws)
        copy = np.arange(n) - np.repeat(np.cumsum(draws) - draws, draws)  # 0 for the first draw of a row, then 1, ...
        # Copy k of a row drawn c times belongs k / c of the way round the epoch; free places are taken in that order.
        target = (place + copy * n / draws[place]) % n
        extra = copy > 0
        rows = order.copy()
        rows[draws == 0] = order[place[extra][np.argsort(target[extra], kind="stable")]]
        return rows


def find_sampler(dataloader: Any, n: int) -> tuple[Sampler[int], list[Any]]:
    """The sampler that draws the rows of a data loader, and the batch samplers that hold it; changes nothing.

    Follows `dataloader.batch_sampler`, through the `batch_sampler` of accelerate's `BatchSamplerShard`, to the
    innermost batch sampler. Where a `ResamplingSampler` is installed there, the sampler is the one that it wraps.

    Args:
        dataloader: a torch `DataLoader`, prepared by accelerate or not.
        n: how many rows it must draw.

    Raises:
        ValueError: streaming data, a loader without a batch sampler or whose batch sampler makes whole batches itself,
            a sampler that does not draw N rows.
    """
    if isinstance(getattr(dataloader, "dataset", None), IterableDataset):
        raise ValueError(f"streaming data (IterableDataset) has no rows to draw by index. {INSTEAD}")
    chain = []
    level = getattr(dataloader, "batch_sampler", None)
    while level is not None:
        chain.append(level)
        level = getattr(level, "batch_sampler", None)
    if not chain:
        raise ValueError(f"the data loader has no batch_sampler. {INSTEAD}")
    sampler: Any = getattr(chain[-1], "sampler", None)
    if sampler is None:
        raise ValueError(f"{type(chain[-1]).__name__} makes whole batches, without a sampler of rows. {INSTEAD}")
    if isinstance(sampler, ResamplingSampler):
        sampler = sampler.sampler
    if not hasattr(sampler, "__len__") or len(sampler) != n:
        draws = f"{len(sampler)} rows" if hasattr(sampler, "__len__") else "nobody knows how many rows"
        raise ValueError(
            f"{type(sampler).__name__} draws {draws} per epoch and there are {n} to weight: only a sampler that draws "
            f"each row once can be reweighted. {INSTEAD}"
        )
    return sampler, chain


def install_sampler(dataloader: Any, weights: np.ndarray, seed: int) -> ResamplingSampler:
    """Makes a data loader draw its rows by weight, in place; of an earlier installation only the new weights remain.

    Wraps the sampler that `find_sampler` finds. The shards on the way to it get it as `sampler` too: that is where
    accelerate's data loaders look when they pass on `set_epoch`, also after `skip_first_batches`.

    Args:
        dataloader: a torch `DataLoader`, prepared by accelerate or not.
        weights: (N,), one per row of the data set that it loads.
        seed: the same on every rank.

    Raises:
        ValueError: what `find_sampler` refuses.
    """
    sampler, chain = find_sampler(dataloader, len(weights))
    resampling = ResamplingSampler(sampler, weights, seed)
    for level in chain:
        level.sampler = resampling
    return resampling
