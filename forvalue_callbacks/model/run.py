"""Forward passes by the plan: memory, ranks, progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from ..core import tile_for
from ..data.collated import NotTogetherError
from ..data.reader import Reader
from ..data.reasons import place_of
from ..data.sample import Sample, Segment
from ..progress import Progress, aside, size
from .backbone import Backbone
from .plan import COLLATED_ROWS, Batch, padded, plan
from .positions import (
    Columns,
    Positions,
    collated,
    joined,
    middle_states,
    pad,
    picked,
    prompt_means,
    prompt_means_after,
    summed,
    tokens_of,
)
from .ranks import of_first_rank, refuse_other_rows, together, world
from .sharding import is_sharded

logger = logging.getLogger(__name__)

# Padded tokens in one forward pass. On a CPU a batch should stay in the cache, and a smaller one has less padding:
# 1,024 is 1.2 times as fast as 2,048 on 32 rows of uneven length, that 1.4 times as fast as 8,192. Below 1,024 the
# weights are read too often.
CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 16384

# What no row is to blame for: inputs that the model has not, an accelerator that no longer works.
NOT_OF_A_ROW = (TypeError, torch.AcceleratorError)


@dataclass
class Window:
    """Some rows, one after the other, and what a method found in them.

    Args:
        start: place of the first.
        samples: all of them.
        reasons: why a row could not be scored.
        columns: numbers of all rows, 0 (NaN for floats) where there is a reason.
    """

    start: int
    samples: list[Sample]
    reasons: list[str | None]
    columns: Columns

    @property
    def digests(self) -> list[str]:
        return [sample.digest for sample in self.samples]


class Run:
    """Runs a model over rows: batches alike in length, this rank's share of them, smaller ones where memory runs out.

    Args:
        backbone: the model without its head.
        reader: makes samples of rows.
        max_tokens: padded tokens in one forward pass; None: by the device.
        progress: shows how far it is.
    """

    def __init__(
        self,
        backbone: Backbone,
        reader: Reader,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ):
        self.backbone = backbone
        self.reader = reader
        self.max_tokens = max_tokens or tokens_per_batch(backbone.device)  # of plans: the same on all ranks
        self.fits = self.max_tokens  # what has not run out of memory here
        self.progress = progress or Progress(lines=False, bars=False)
        self.sharded = world()[1] > 1 and is_sharded(backbone.holder)

    def wait(self) -> None:
        """Until an accelerator has done what it was told."""
        if self.backbone.device.type != "cpu":
            torch.accelerator.synchronize(self.backbone.device)

    # ---- a window of rows after the other ----

    def windows(
        self,
        dataset: Iterable[Any],
        method: Any,
        score: Callable[[Positions], Columns],
        name: str,
        skip: Callable[[int, list[str]], bool] | None = None,
        tile: int | None = None,
    ) -> Iterator[Window | int]:
        """What a method finds in the rows of a data set, in their order, so that nobody need keep it all.

        Args:
            method: says what is read of a row (`methods.base.Method`).
            score: columns of positions.
            name: of the pass.
            skip: whether a window is known already, by its first row and the digests of all; the first rank decides.
            tile: how many positions meet the head at once; None: by the device.

        Yields:
            each window; of one that is skipped, the number of its rows.

        Raises:
            RuntimeError, ValueError: on every rank, where one of them fails or reads other rows than the first.
        """
        n = size(dataset)
        n_parts = len(method.parts)
        with self.progress.part(name, None if n is None else n * n_parts):
            windows, start = iter(self.reader.windows(dataset)), 0
            while True:
                samples = self._read(windows, start)
                if samples is None:
                    return
                method.refuse(samples)
                if skip is not None and of_first_rank(skip(start, [s.digest for s in samples]), "looking for rows"):
                    self.progress.update(len(samples) * n_parts)
                    yield len(samples)
                else:
                    yield self._window(start, samples, method, score, tile)
                start += len(samples)

    def _read(self, windows: Iterator[list[Sample]], start: int) -> list[Sample] | None:
        """The next window, which must be the same on every rank, as the plan must."""
        with together("reading rows") as work:
            samples = next(windows, None)
            mine = None if samples is None else [(sample.digest, sample.reason) for sample in samples]
            ranks = work.exchange((mine, min(self.fits, self.max_tokens)))
            refuse_other_rows([rows for rows, _ in ranks], start)
            # What one rank cannot run it would split, window after window, while the others wait for it.
            self.max_tokens = min(fits for _, fits in ranks)
        return samples

    def _window(
        self, start: int, samples: list[Sample], method: Any, score: Callable[[Positions], Columns], tile: int | None
    ) -> Window:
        good = [sample for sample in samples if sample.reason is None]
        self.progress.update((len(samples) - len(good)) * len(method.parts))
        found: list[tuple[list[int], Columns]] = []
        failed: dict[int, str] = {}
        with together("scoring", self.sharded) as work:
            for part in range(len(method.parts)):
                positions = self.positions(good, method, part=part, failed=failed)
                if not method.reads_prompt:
                    positions = joined(positions, tile or tile_for(self.backbone.device))
                for batch in positions:
                    found += self._scored(batch, score, failed)
            ranks = work.exchange((found, failed))
        reasons = [sample.reason for sample in samples]
        columns: Columns = {}
        for found, failed in ranks:
            for index, values in found:
                _put(columns, reasons, len(samples), [i - start for i in index], values)
            for i, why in failed.items():
                reasons[i - start] = why
        return Window(start, samples, reasons, _blanked(columns, reasons))

    def _scored(
        self, positions: Positions, score: Callable[[Positions], Columns], failed: dict[int, str]
    ) -> list[tuple[list[int], Columns]]:
        """Columns of positions, in halves where memory runs out."""
        try:
            return [(positions.index, score(positions))]
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        if len(positions.samples) == 1:
            n = len(positions.target_T)
            failed[positions.index[0]] = f"out of memory with this row alone ({n} labelled tokens): set max_length"
            return []
        return [found for half in positions.halves() for found in self._scored(half, score, failed)]

    # ---- one pass over samples ----

    def positions(
        self,
        samples: Sequence[Sample],
        method: Any,
        name: str | None = None,
        *,
        part: int = 0,
        all_ranks: bool = False,
        failed: dict[int, str] | None = None,
    ) -> Iterator[Positions]:
        """Forward passes over this rank's share of the samples.

        Args:
            method: says what is read of a row.
            name: of a pass of its own; None: part of one that is under way.
            part: which of the method's parts.
            all_ranks: every rank runs over all of them.
            failed: takes in the rows too large for the memory.
        """
        rank, n_ranks = (0, 1) if all_ranks else world()
        work, ranks = self.planned(samples, method, part, n_ranks)
        n_forwards = [sum(batch.n_forwards for batch in batches) for batches in ranks]
        # A row is counted once, by its first segment.
        begins = [i == 0 or work[i - 1][0] is not sample for i, (sample, _) in enumerate(work)]
        with nullcontext() if name is None else self.progress.part(name, sum(begins)):
            for batch in ranks[rank]:
                for made in self._forward(work, batch, method, failed):
                    yield replace(made, part=part)
                tokens = sum(work[i][1].n_read for i in batch.rows)
                self.progress.update(sum(begins[i] for i in batch.rows) * n_ranks, tokens * n_ranks)
            for _ in range(max(n_forwards) - n_forwards[rank]):
                last = ranks[0][-1].rows[0]
                self.run([work[last]])

    def planned(
        self, samples: Sequence[Sample], method: Any, part: int, n_ranks: int = 1
    ) -> tuple[list[tuple[Sample, Segment]], list[list[Batch]]]:
        """What is to be run for one of a method's parts, and every rank's batches of it."""
        work = [(sample, segment) for sample in samples for segment in method.segments(sample, part)]
        lengths = [None if segment.tokens is None else segment.n_read for _, segment in work]
        prompts = None
        if not method.reads_middle and self.backbone.shares_prefixes:
            prompts = [_shareable(segment) for _, segment in work]
        # Sharded models gather weights in every forward: all ranks must run equally many, and so none may find out
        # that what collators have made of rows does not go together.
        collated_rows = 1 if self.sharded else COLLATED_ROWS
        return work, plan(lengths, self.max_tokens, n_ranks, prompts, collated_rows)

    def _forward(
        self, work: Sequence[tuple[Sample, Segment]], batch: Batch, method: Any, failed: dict[int, str] | None
    ) -> Iterator[Positions]:
        """One forward pass, or several smaller ones where memory runs out."""
        parts = [batch]
        while parts:
            part = parts.pop(0)
            rows = [work[i] for i in part.rows]
            tokens = _padded(rows, part.shared)
            if len(rows) > 1 and tokens > min(self.fits, self.max_tokens):
                parts[:0] = part.halves()
                continue
            try:
                made = self.run(rows, part.shared, method)
            except NotTogetherError:
                parts[:0] = [Batch((i,), (0,)) for i in part.rows]
                continue
            except Exception as error:
                if not should_reduce_batch_size(error):
                    if rows[0][1].tokens is not None or self.sharded or isinstance(error, NOT_OF_A_ROW):
                        raise
                    if len(rows) > 1:  # what fails may be one of them
                        parts[:0] = [Batch((i,), (0,)) for i in part.rows]
                        continue
                    self._refused(error, rows[0][0].index, failed)
                    continue
                self._out_of_memory(error, rows, tokens, failed)
                if len(rows) > 1:
                    parts.insert(0, part)
                continue
            yield made

    def _out_of_memory(
        self, error: Exception, rows: Sequence[tuple[Sample, Segment]], tokens: int, failed: dict[int, str] | None
    ) -> None:
        """Halves the budget; a row that is too large alone cannot be scored."""
        if self.sharded:
            raise MemoryError(
                f"rank {world()[0]} is out of memory with {tokens} tokens in a batch, and the model's weights lie on "
                f"all ranks, which must run alike: set max_tokens_per_batch to {max(1, tokens // 2)} or less."
            ) from error
        clear_device_cache(garbage_collection=True)
        if len(rows) > 1:
            self.fits = max(1, min(tokens, self.fits) // 2)  # plans go by it once all ranks know
            with aside():
                logger.warning("out of memory with %d tokens in a batch: now %d", tokens, self.fits)
            return
        reason = f"out of memory with this row alone ({tokens} tokens): set max_length"
        if failed is None:
            raise MemoryError(f"validation row {rows[0][0].index}: {reason}") from error
        failed[rows[0][0].index] = reason

    def _refused(self, error: Exception, index: int, failed: dict[int, str] | None) -> None:
        """A row that the model does not take as its collator has made it: fewer images than places for them, ..."""
        reason = f"the model fails on what the data_collator makes of this row: {place_of(error)}"
        if failed is None:
            raise ValueError(f"validation row {index}: {reason}. Mend the row, or take it out.") from error
        failed[index] = reason

    def run(
        self, rows: Sequence[tuple[Sample, Segment]], shared: Sequence[int] = (0,), method: Any = None
    ) -> Positions:
        """One forward pass over all the rows at once; `method` says what it reads besides.

        Raises:
            NotTogetherError: rows that the model must read one by one.
        """
        segments = [segment for _, segment in rows]
        if any(shared):
            sums, hidden = self._after_prefixes(segments, shared)
            at = [segment.at - n for segment, n in zip(segments, shared, strict=True)]
            made = picked(rows, hidden, at)
            if method is not None and method.reads_prompt:
                made.prompt_RD = prompt_means_after(sums, hidden, segments, shared)
        else:
            inputs = collated(segments)
            with self.backbone.watched_middle(method is not None and method.reads_middle) as middle:
                hidden = self.backbone.hidden_states(inputs)
            made = picked(rows, hidden, [segment.at for segment in segments])
            if method is not None and method.reads_prompt:
                mask = inputs.get(self.backbone.mask_name)
                made.prompt_RD = prompt_means(hidden, segments, mask)
                made.middle_RE = middle_states([x for x in middle if x.shape == hidden.shape], segments, mask)
        return made

    def _after_prefixes(self, segments: Sequence[Segment], shared: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The sum of the hidden states of each segment's beginning, and those of what follows; beginnings run once."""
        ids = [tokens_of(segment) for segment in segments]
        prefixes = [tokens[:n].tobytes() for tokens, n in zip(ids, shared, strict=True)]
        beginnings = {key: tokens[:n] for key, tokens, n in zip(prefixes, ids, shared, strict=True)}
        number = {prefix: k for k, prefix in enumerate(beginnings)}
        place = torch.tensor([number[prefix] for prefix in prefixes])
        before = pad(list(beginnings.values()))
        rest = pad([tokens[n : s.n_read] for tokens, n, s in zip(ids, shared, segments, strict=True)])
        first = torch.tensor(list(shared))[:, None]
        last = torch.tensor([segment.n_read - 1 for segment in segments])[:, None]
        positions = first + torch.arange(rest["input_ids"].shape[1])
        rest["position_ids"] = positions.minimum(last)  # or padding would lie beyond what learned positions there are
        rest["attention_mask"] = torch.cat([before["attention_mask"][place], rest["attention_mask"]], 1)
        states, hidden = self.backbone.hidden_states_after(before, rest, place)
        return summed(states, before["attention_mask"])[place.to(states.device)], hidden


def tokens_per_batch(device: torch.device | None) -> int:
    """How many padded tokens one forward pass should hold on a device."""
    return CPU_TOKENS if device is None or device.type == "cpu" else ACCELERATOR_TOKENS


def _shareable(segment: Segment) -> np.ndarray:
    """The tokens that a row may share with others: the position that predicts first must be run for each row, or its
    hidden state would be missing."""
    if segment.tokens is None or "token_type_ids" in segment.load():
        return np.zeros(0, dtype=np.int64)
    return segment.tokens[: max(0, segment.n_prompt - 1)]


def _padded(rows: Sequence[tuple[Sample, Segment]], shared: Sequence[int]) -> int:
    lengths = {i: segment.n_read for i, (_, segment) in enumerate(rows)}
    prompts = [np.zeros(0) if segment.tokens is None else segment.tokens for _, segment in rows]
    return padded(Batch(tuple(range(len(rows))), tuple(shared)), lengths, prompts)


def _put(columns: Columns, reasons: list[str | None], n: int, places: list[int], values: Columns) -> None:
    """Writes the values of some rows into columns of n; those of several segments of a row add up."""
    for name, value in values.items():
        if name == "reason":
            for place, why in zip(places, value, strict=True):
                reasons[place] = reasons[place] or why
            continue
        if name not in columns:
            columns[name] = np.zeros((n, *value.shape[1:]), dtype=value.dtype)
        if value.dtype == object:  # by the number of the segment
            for place, parts in zip(places, value, strict=True):
                columns[name][place] = {**(columns[name][place] or {}), **parts}
        elif len(set(places)) == len(places):
            columns[name][places] += value
        else:
            np.add.at(columns[name], places, value)


def _blanked(columns: Columns, reasons: Sequence[str | None]) -> Columns:
    """Columns with nothing in the rows that could not be scored."""
    bad = np.array([reason is not None for reason in reasons])
    for values in columns.values():
        values[bad] = np.nan if values.dtype.kind == "f" else 0
    return columns
