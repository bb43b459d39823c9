"""The training rows of a data loader: drawn by their place, or a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil
from typing import Any

import numpy as np
from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard
from torch.utils.data import IterableDataset
from transformers import TrainerState, TrainingArguments

from ..data.reader import Reader
from ..policies import Policy
from ..scorer import ForValueScorer
from ..scores.scores import ForValueScores
from .refusals import groups_of, refuse_other_rows, refuse_trainer
from .sampler import INSTEAD, find_sampler, install_sampler
from .settings import apply_policy

logger = logging.getLogger(__name__)


class DrawnRows:
    """Rows that a loader draws by their place: rows take the places of others.

    Args:
        loader: a torch `DataLoader`, prepared by accelerate or not.
        groups: those of the policy, where its column is not there.

    Raises:
        ValueError: a loader that cannot draw by weight; groups that do not fit.
    """

    streamed = False

    def __init__(self, loader: Any, policy: Policy, groups: Sequence[Any] | None):
        self.loader, self.dataset, self.policy = loader, loader.dataset, policy
        find_sampler(loader, len(self.dataset))
        self.groups = groups_of(policy, self.dataset, groups)

    def refuse_others(self, scores: ForValueScores, scorer: ForValueScorer) -> None:
        """Raises ValueError for scores that are not those of these rows."""
        refuse_other_rows(scores, scorer, self.dataset)

    def look(self, reader: Reader) -> None:
        """Raises ValueError for rows that cannot be trained on by their scores."""

    def weights(self, scores: ForValueScores) -> np.ndarray:
        """(N,) by the policy."""
        return apply_policy(self.policy, scores, self.dataset, self.groups)

    def install(self, reader: Reader, scores: ForValueScores, weights: np.ndarray, seed: int) -> None:
        """Makes the loader draw by weight, in place."""
        install_sampler(self.loader, weights, seed=seed)


class StreamedRows:
    """The first rows of a stream: as many as the run takes, and as many more as the policy says that it drops.

    They are all scored before the first step, with the weights that are there then. Rows without a score stay.

    Args:
        loader: as for `DrawnRows`; its data set is a stream.

    Raises:
        ValueError: a policy that does not drop or keep rows by their scores alone; a stream that several workers read.
    """

    streamed = True

    def __init__(
        self,
        loader: Any,
        policy: Policy,
        groups: Sequence[Any] | None,
        args: TrainingArguments,
        state: TrainerState,
    ):
        self.loader, self.policy = loader, policy
        for refused, why in (
            (policy.reweights, "weights rows, and those of a stream are not drawn again: use Drop"),
            (policy.group_column is not None, "compares rows within groups: leave the groups out"),
        ):
            if refused:
                raise ValueError(f"{policy} is not for streaming data: it {why}, or load the data as a Dataset.")
        groups_of(policy, None, groups)
        if loader.num_workers > 1:
            raise ValueError(
                f"{loader.num_workers} workers read a stream in another order than it is scored in: set "
                "dataloader_num_workers to 0 or 1."
            )
        shared = isinstance(loader, DataLoaderDispatcher) or isinstance(loader.dataset, IterableDatasetShard)
        if args.world_size > 1 and not shared:
            raise ValueError(
                "the shards of the stream are read by a process each, and every process must be able to read all of "
                "it: make it of one shard, as dataset.to_iterable_dataset(num_shards=1), or set "
                "accelerator_config={'split_batches': True}."
            )
        n_taken = state.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
        shard = loader.dataset
        self.dataset = FirstRows(
            shard.dataset if isinstance(shard, IterableDatasetShard) else shard, ceil(n_taken / policy.kept_share)
        )

    def refuse_others(self, scores: ForValueScores, scorer: ForValueScorer) -> None:
        raise ValueError("scores are given, and of streaming data nobody knows whose they are: leave scores out.")

    def look(self, reader: Reader) -> None:
        first = [[reader.sample(0, row).digest for row in islice(iter(self.dataset), 1)] for _ in range(2)]
        if first[0] != first[1]:
            raise ValueError(
                "the stream begins otherwise each time that it is read, and it is read to score it and again to train "
                "on it: make it begin anew at each iter(), with a fixed seed where it is shuffled, or filter it as it "
                "comes: filter_stream(stream.map(ForValueTransform(...), batched=True))."
            )
        if not first[0]:
            raise ValueError("there are no training rows to score: the stream is empty.")

    def weights(self, scores: ForValueScores) -> np.ndarray:
        weights = self.policy(scores.values)
        weights[np.isnan(scores.values)] = 1.0
        return weights

    def install(self, reader: Reader, scores: ForValueScores, weights: np.ndarray, seed: int) -> None:
        """Makes the loader leave out rows of its stream, in place."""
        kept = KeptRows(self.dataset, reader, scores, weights)
        loader = getattr(self.loader, "base_dataloader", self.loader)  # accelerate's holds torch's
        if isinstance(loader.dataset, IterableDatasetShard):
            loader.dataset.dataset = kept
        else:
            vars(loader)["dataset"] = kept  # torch refuses to assign it, since samplers know its length: here are none


class FirstRows:
    """The first rows of a stream, as often as they are asked for.

    Args:
        stream: begins anew each time.
        most: so many of them, or all where there are fewer.
    """

    def __init__(self, stream: Any, most: int):
        self.stream, self.most = stream, most

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.stream), self.most)


class KeptRows(IterableDataset[Any]):
    """The first rows of a stream without some of them, told by their content.

    A stream that is shuffled at each epoch gives them in another order. Where it goes on after them, other rows would
    come: then each epoch has the order of the first.

    Args:
        first: the rows.
        reader: makes of a row the digest that its score has.
        scores: theirs.
        weights: (N,) of the policy; 0 drops a row, unless it is there again and stays.
    """

    def __init__(self, first: FirstRows, reader: Reader, scores: ForValueScores, weights: np.ndarray):
        self.first, self.reader = first, reader
        self.whole = len(scores) < first.most
        self.keeps: dict[str, bool] = {}
        for digest, weight in zip(scores.row_digests or [], weights, strict=True):
            self.keeps[digest] = self.keeps.get(digest, False) or bool(weight)

    def set_epoch(self, epoch: int) -> None:
        if self.whole and hasattr(self.first.stream, "set_epoch"):
            self.first.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        warned = False
        for place, row in enumerate(self.first):
            keeps = self.keeps.get(self.reader.sample(place, row).digest)
            if keeps is None and not warned:
                warned = True
                logger.warning(
                    "row %d of the stream is another than when it was scored: such rows are trained on, whatever the "
                    "policy; give the random steps of the stream a fixed seed",
                    place,
                )
            if keeps is not False:
                yield row


def rows_of(
    loader: Any, policy: Policy, groups: Sequence[Any] | None, args: TrainingArguments, state: TrainerState
) -> DrawnRows | StreamedRows:
    """The training rows of a trainer's loader.

    Raises:
        ValueError: no rows, or such as cannot be trained on by their scores.
    """
    if not hasattr(loader, "dataset"):
        raise ValueError(f"a {type(loader).__name__} as data loader has no dataset. {INSTEAD}")
    refuse_trainer(args, loader.dataset, streams=True)
    if isinstance(loader.dataset, IterableDataset):
        return StreamedRows(loader, policy, groups, args, state)
    return DrawnRows(loader, policy, groups)
