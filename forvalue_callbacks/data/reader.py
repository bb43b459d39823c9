"""Data sets in any form -> samples, a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice, starmap
from typing import Any

import numpy as np
import xxhash
from datasets.fingerprint import Hasher

from .collated import Collating, OneByOne, inner, n_bytes
from .preference import is_preference, made_for_preferences, pair_segment, refuse_unless_pair, sides_of
from .reading import Unreadable, examples_of
from .reasons import SetUpError, UnscorableError
from .sample import IGNORED, Sample, Segment, next_tokens
from .sft import Row, RowPreparer

# Rows are read, sorted by length and batched a window at a time: memory stays flat however long the data set is, and
# 4,096 rows are enough for batches alike in length.
WINDOW = 4096
# What a collator has made of rows is kept until they are run, as long as it takes no more memory than this.
MADE_BYTES = 2**30


class Reader:
    """Makes samples of the rows of data sets.

    Args:
        prepare: a row in any form to token ids and labels.
        data_collator: makes rows of the examples, as in training (`Collating`).
        one_by_one: makes samples of rows of models that are no language models from left to right.
        rewards: the model says how good an answer is, and rows are pairs of a better and a worse one.
    """

    def __init__(
        self,
        prepare: RowPreparer,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        one_by_one: OneByOne | None = None,
        rewards: bool = False,
    ):
        self.prepare = prepare
        self.one_by_one = one_by_one
        self.rewards = rewards
        self.collating: Collating | None = None
        if data_collator is not None and one_by_one is None and not made_for_preferences(inner(data_collator)):
            self.collating = Collating(data_collator, prepare)
        self._fits_set_up = False  # whether some row to be scored did

    def samples(self, dataset: Iterable[Any]) -> Iterator[Sample]:
        """Every row of the data set, with the reason where it cannot be scored; a `Sample` stays as it is. What a
        collator made is kept up to `MADE_BYTES`."""
        left = MADE_BYTES
        for index, example in enumerate(examples_of(dataset)):
            sample, again = self._sample(index, example)
            left -= made_bytes(sample)
            yield sample if left >= 0 or again is None else again

    def sample(self, index: int, example: Any) -> Sample:
        """One row."""
        return self._sample(index, example)[0]

    def _sample(self, index: int, example: Any) -> tuple[Sample, Sample | None]:
        """One row, and the same without what its collator made, if one did."""
        if isinstance(example, Sample):
            return replace(example, index=index), None
        if isinstance(example, Unreadable):
            return sample_of(index, Row.unscorable(example.reason)), None
        if self.rewards or is_preference(example):
            return self._preference(index, example), None
        if self.one_by_one is not None:
            return self._by_itself(index, example, self.one_by_one)
        if self.collating is None:
            return sample_of(index, self.prepare(example)), None
        found = self.collating.read(example)
        if isinstance(found, Row):
            return sample_of(index, found), None
        ids = found.batch["input_ids"][0].cpu().numpy().astype(np.int64)
        segment = replace(next_tokens(found.batch, found.labels), read=ids)
        digest = xxhash.xxh3_64_hexdigest(Hasher.hash(found.example).encode() + segment.target.tobytes())
        again = replace(segment, inputs=partial(self.collating.again, found.example))
        return Sample(index, (segment,), digest), Sample(index, (again,), digest)

    def _by_itself(self, index: int, example: Any, reader: OneByOne) -> tuple[Sample, Sample | None]:
        try:
            segment = reader.read(example)
        except UnscorableError as reason:
            return sample_of(index, Row.unscorable(reason)), None
        digest = xxhash.xxh3_64_hexdigest(Hasher.hash(segment.load()).encode() + segment.target.tobytes())
        again = replace(segment, inputs=lambda: reader.read(example).load())
        return Sample(index, (segment,), digest), Sample(index, (again,), digest)

    def _preference(self, index: int, example: Any) -> Sample:
        """A pair, or an answer that is marked as good or bad: a segment for each side."""
        try:
            if self.one_by_one is not None:
                raise SetUpError("preference rows are scored by language models from left to right: give one of those")
            if self.rewards:
                refuse_unless_pair(example)
            sides = sides_of(self.prepare, example)
        except UnscorableError as reason:
            return sample_of(index, Row.unscorable(reason))
        samples = [sample_of(index, side.row) for side in sides]
        segments = tuple(
            replace(sample.segments[0], weight=side.weight) for sample, side in zip(samples, sides, strict=True)
        )
        if self.rewards:
            segments = (pair_segment(sides),)
        digest = "".join(f"{side.weight:+d}{sample.digest}" for sample, side in zip(samples, sides, strict=True))
        return Sample(index, segments, xxhash.xxh3_64_hexdigest(digest.encode()))

    def windows(self, dataset: Iterable[Any]) -> Iterator[list[Sample]]:
        """Rows a window at a time. They are read in this thread, which may be the only one that their data set bears;
        those of the next window are tokenised in another while the model runs over this one.

        Raises:
            ValueError: no row of the data set fits the set-up, and none of those before did.
        """
        reason = None
        for window in self._windows(enumerate(examples_of(dataset))):
            self._fits_set_up |= not all(sample.set_up for sample in window)
            reason = reason or window[0].reason
            yield window
        if reason is not None and not self._fits_set_up:
            raise ValueError(f"no row can be scored: {reason}.")

    def _windows(self, rows: Iterator[tuple[int, Any]]) -> Iterator[list[Sample]]:
        if self.collating is not None or self.one_by_one is not None:  # it belongs to this thread as the data set does
            window, held = [], 0
            for index, example in rows:
                window.append(self.sample(index, example))
                held += made_bytes(window[-1])
                if len(window) == WINDOW or held > MADE_BYTES:
                    yield window
                    window, held = [], 0
            if window:
                yield window
            return

        def samples(window: list[tuple[int, Any]]) -> list[Sample]:
            return list(starmap(self.sample, window))

        with ThreadPoolExecutor(1) as worker:
            ahead = worker.submit(samples, list(islice(rows, WINDOW)))
            while window := ahead.result():
                ahead = worker.submit(samples, list(islice(rows, WINDOW)))
                yield window


def row_of(segment: Segment) -> Row:
    """The tokens and labels of a segment; where there is no more in it, `sample_of` makes it of them."""
    ids = segment.ids
    labels = np.full_like(ids, IGNORED)
    labels[segment.at + 1] = segment.target
    if segment.n_prompt == 0:  # a first token that is learnt and that nothing predicts
        labels[0] = ids[0]
    return Row(ids, labels, typed=segment.tokens is not None and "token_type_ids" in segment.load())


def sample_of(index: int, row: Row) -> Sample:
    """The sample of a row of tokens."""
    types = b"|0" if row.typed else b""
    digest = xxhash.xxh3_64_hexdigest(row.input_ids.tobytes() + b"|" + row.labels.tobytes() + types)
    if row.reason is not None:
        return Sample(index, (), digest, row.reason, row.set_up)
    inputs = {"input_ids": row.input_ids}
    if row.typed:
        inputs["token_type_ids"] = np.zeros_like(row.input_ids)
    return Sample(index, (next_tokens(inputs, row.labels),), digest)


def made_bytes(sample: Sample) -> int:
    """How much memory what a collator made of a row takes."""
    return sum(n_bytes(s.inputs) for s in sample.segments if s.tokens is None and not callable(s.inputs))
