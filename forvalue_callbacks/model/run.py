"""Rows to batches of labelled positions: by length under a token budget, sharded across ranks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets.fingerprint import Hasher
from torch import Tensor, nn

from ..core import working_dtype
from ..data.collated import Collated, Collating, NotTogetherError, n_bytes, together
from ..data.reading import examples_of
from ..data.sft import IGNORED, Row, RowPreparer
from ..progress import Progress, aside, size
from .backbone import Backbone
from .plan import pack, padded_tokens, shared_prefixes

logger = logging.getLogger(__name__)

# Rows are read, sorted by length and batched a window at a time: memory stays flat however long the data set is, and
# 4,096 rows are enough for batches alike in length.
WINDOW = 4096
# Padded tokens in one forward pass. On a CPU a batch should stay in the cache, and a smaller one has less padding:
# 1,024 is 1.2 times as fast as 2,048 on 32 rows of uneven length, that 1.4 times as fast as 8,192. Below 1,024 the
# weights are read too often.
CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 16384
# Rows are run after common beginnings where that leaves less than such a share of the padded tokens: it costs a second
# pass, and a copy of the keys and values for each row.
WORTH_SHARING = 0.8
# Rows per batch where a data collator makes the batch (images), whose token count nobody knows before.
COLLATED_ROWS = 8
# What a collator has made of rows is kept until they are run, as long as it takes no more memory than this.
MADE_BYTES = 2**30


@dataclass
class Item:
    """A row that can be scored: token ids, or, where a collator makes the batch, the example itself."""

    index: int
    row: Row | None
    example: Any = None
    made: dict[str, Any] | None = None  # the batch of one that the collator has made; None: made again when needed
    collated: np.ndarray | None = None  # the example's labels as the collator makes them
    n_shared: int = 0  # how many of its first tokens are run once for all rows of its batch that begin with them

    @property
    def answer(self) -> bytes:
        """The labelled tokens."""
        labels = self.collated if self.row is None else self.row.labels
        assert labels is not None
        return answer_of(labels[1:])

    @property
    def prefix(self) -> bytes:
        """The tokens that it shares."""
        return b"" if self.row is None else self.row.input_ids[: self.n_shared].tobytes()

    @property
    def n_labelled(self) -> int:
        """Labelled tokens."""
        labels = self.collated if self.row is None else self.row.labels
        assert labels is not None
        return int((labels[1:] != IGNORED).sum())

    @cached_property
    def tokens(self) -> int:
        """Tokens that the model must read: nothing needs what follows the position that predicts the last label."""
        return 1 if self.row is None else int(np.flatnonzero(self.row.labels != IGNORED)[-1])

    def predicting(self, start: int = 0) -> Row:
        """Those tokens from `start` on, and beside each the label that it predicts."""
        assert self.row is not None
        ids, labels = self.row.input_ids[start : self.tokens], self.row.labels[start + 1 : self.tokens + 1]
        return replace(self.row, input_ids=ids, labels=labels)

    def hash(self) -> str:
        """Hash of the row as the model sees it."""
        if self.row is None:
            return xxhash.xxh3_64_hexdigest(Hasher.hash(self.example).encode() + self.answer)
        types = b"|0" if self.row.typed else b""
        return xxhash.xxh3_64_hexdigest(self.row.input_ids.tobytes() + b"|" + self.row.labels.tobytes() + types)


def answer_of(labels: np.ndarray) -> bytes:
    """Labelled tokens as something that can be counted."""
    return labels[labels != IGNORED].astype(np.int64).tobytes()


@dataclass
class Labelled:
    """The labelled positions of some rows after a forward pass."""

    items: list[Item]
    lengths: list[int]  # labelled positions of each row
    hidden_TD: Tensor  # inputs of the head, row after row
    labels_T: Tensor
    states_BLD: Tensor | None = None  # at all positions, padding included; None once batches are concatenated
    prompt_BL: Tensor | None = None  # the positions up to the one that predicts the first label

    def without_states(self) -> Labelled:
        return replace(self, states_BLD=None, prompt_BL=None)

    @property
    def index(self) -> list[int]:
        """The rows' places in the data set."""
        return [item.index for item in self.items]

    @property
    def rows_T(self) -> Tensor:
        """Which row (0, 1, ... of this batch) each position belongs to."""
        lengths = torch.tensor(self.lengths, device=self.hidden_TD.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=lengths.device), lengths)

    @property
    def prompt_RD(self) -> Tensor:
        """Mean hidden state over the positions before each row's first label, (rows, D), float32 or float64."""
        assert self.states_BLD is not None
        assert self.prompt_BL is not None
        states_BLD = self.states_BLD.to(working_dtype(self.states_BLD))
        weight_BL = self.prompt_BL.to(states_BLD)
        return torch.einsum("bl,bld->bd", weight_BL / weight_BL.sum(1, keepdim=True), states_BLD)

    @property
    def first_RD(self) -> Tensor:
        """Hidden state that predicts the first label of each row, (rows, D)."""
        starts = np.cumsum([0, *self.lengths[:-1]])
        return self.hidden_TD[torch.as_tensor(starts, device=self.hidden_TD.device)]

    def sum(self, values_T: Tensor) -> np.ndarray:
        """Sum of a value over the positions of each row, float64 (rows,)."""
        out = torch.zeros(len(self.lengths), dtype=torch.float64, device=values_T.device)
        return out.index_add_(0, self.rows_T, values_T.double()).cpu().numpy()


class Batcher:
    """Runs a model over rows: batches alike in length, this rank's share of them, smaller ones where memory runs out.

    Args:
        backbone: the model without its head.
        prepare: a row in any form to token ids and labels.
        data_collator: makes rows of the examples, as in training (`Collating`).
        max_tokens: padded tokens in one forward pass; None: by the device.
        progress: shows how far it is.
    """

    def __init__(
        self,
        backbone: Backbone,
        prepare: RowPreparer,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        progress: Progress | None = None,
    ):
        self.backbone = backbone
        self.prepare = prepare
        self._fits_set_up = False  # whether some row to be scored did
        self.collating = None if data_collator is None else Collating(data_collator, prepare)
        self.max_tokens = max_tokens or tokens_per_batch(backbone.device)
        self.progress = progress or Progress(lines=False, bars=False)

    def items(self, dataset: Iterable[Mapping[str, Any] | Row]) -> Iterator[tuple[Item, str | None]]:
        """Every row of the data set as an item, with the reason where it cannot be scored; a `Row` and an `Item` stay
        as they are. What a collator made is kept up to `MADE_BYTES`."""
        left = MADE_BYTES
        for item, reason in itertools.starmap(self._item, enumerate(examples_of(dataset))):
            left -= n_bytes(item.made or {})
            yield (item if left >= 0 else replace(item, made=None)), reason

    def _item(self, index: int, example: Any) -> tuple[Item, str | None]:
        if isinstance(example, Item):
            return replace(example, index=index), None
        if isinstance(example, Row):
            found: Row | Collated = example
        else:
            found = self.prepare(example) if self.collating is None else self.collating.read(example)
        if isinstance(found, Row):
            return Item(index, found), found.reason
        return Item(index, None, found.example, found.batch, found.labels), None

    def collate(self, items: Sequence[Item]) -> dict[str, Any]:
        """Model inputs, and beside each position the label that it predicts.

        Raises:
            NotTogetherError: rows that the model must read one by one.
        """
        if items[0].row is not None:
            return pad([item.predicting() for item in items])
        assert self.collating is not None
        batch = together([item.made or self.collating.again(item.example) for item in items])
        return {**batch, "labels": nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)}

    def _batches(self, items: list[Item], states: bool) -> list[list[Item]]:
        tokens = [item for item in items if item.row is not None]
        collated = [item for item in items if item.row is None]
        batches = self._cut(tokens)
        if not states and self.backbone.shares_prefixes:
            worth_it = WORTH_SHARING * sum(map(padded, batches))
            sharing = self._sharing(tokens, worth_it)
            if sharing and sum(map(padded, sharing)) < worth_it:
                batches = sharing
        return batches + [collated[lo : lo + COLLATED_ROWS] for lo in range(0, len(collated), COLLATED_ROWS)]

    def _cut(self, items: list[Item]) -> list[list[Item]]:
        return [[items[i] for i in batch] for batch in cut([item.tokens for item in items], self.max_tokens)]

    def _sharing(self, items: list[Item], max_total: float) -> list[list[Item]]:
        """Batches of rows that begin alike, then those of the others; none where all that is saved leaves too much.

        Args:
            max_total: tokens that must be left at most, without padding.
        """
        rows = [item.row for item in items if item.row is not None]
        # The position that predicts the first label must be run for each row, or its hidden state would be missing.
        prompts = [
            row.input_ids[: 0 if row.typed else max(0, int((row.labels != IGNORED).argmax()) - 1)] for row in rows
        ]
        n_shared = shared_prefixes(prompts)
        sharing = [replace(item, n_shared=int(n)) for item, n in zip(items, n_shared, strict=True) if n]
        beginnings = {item.prefix: item.n_shared for item in sharing}
        if sum(item.tokens for item in items) - n_shared.sum() + sum(beginnings.values()) >= max_total:
            return []
        alone = [item for item, n in zip(items, n_shared, strict=True) if not n]
        lengths = [item.n_shared for item in sharing], [item.tokens - item.n_shared for item in sharing]
        packed = pack([item.prefix for item in sharing], *lengths, self.max_tokens)
        return [[sharing[i] for i in batch] for batch in packed] + self._cut(alone)

    def labelled(
        self,
        items: list[Item],
        description: str | None = None,
        *,
        all_ranks: bool = False,
        states: bool = True,
        failed: dict[int, str] | None = None,
    ) -> Iterator[Labelled]:
        """Forward passes over this rank's share of the items.

        Args:
            description: of a pass of its own; None: part of one that is under way.
            all_ranks: every rank runs over all the items.
            states: keep the states at all positions; without, tokens that rows share are run once.
            failed: takes in the rows too large for the memory.
        """
        rank, n_ranks = (0, 1) if all_ranks else world()
        batches = self._batches(items, states)
        # Sharded models (FSDP, ZeRO-3) gather weights in every forward: all ranks must run equally many.
        n_forwards = [sum(1 + any(i.n_shared for i in batch) for batch in batches[r::n_ranks]) for r in range(n_ranks)]
        mine = batches[rank::n_ranks]
        padding = max(n_forwards) - n_forwards[rank]
        with nullcontext() if description is None else self.progress.part(description, len(items)):
            for batch in mine:
                yield from self._forward(batch, failed)
                self.progress.update(len(batch) * n_ranks, sum(item.tokens for item in batch) * n_ranks)
            for _ in range(padding):
                self.run([replace(batches[-1][0], n_shared=0)])

    def wait(self) -> None:
        """Until an accelerator has done what it was told."""
        device = self.backbone.device
        if device is not None and device.type != "cpu":
            torch.accelerator.synchronize(device)

    def run(self, items: Sequence[Item]) -> Labelled:
        """One forward pass over all the items at once."""
        if items[0].n_shared:
            return self._run_after_prefixes(items)
        batch = self.collate(items)
        hidden = self.backbone.hidden_states(batch)
        predicts = batch["labels"] != IGNORED
        prompt = torch.arange(hidden.shape[1], device=predicts.device) <= predicts.int().argmax(1, keepdim=True)
        if (mask := batch.get("attention_mask")) is not None:
            prompt = prompt & torch.as_tensor(mask).to(prompt.device).bool()
        return replace(
            labelled_positions(items, hidden, batch["labels"]), states_BLD=hidden, prompt_BL=prompt.to(hidden.device)
        )

    def _run_after_prefixes(self, items: Sequence[Item]) -> Labelled:
        rows = [(item.row, item.n_shared) for item in items if item.row is not None]
        beginnings = {row.input_ids[:n].tobytes(): Row(row.input_ids[:n], row.labels[:n]) for row, n in rows}
        number = {prefix: k for k, prefix in enumerate(beginnings)}
        place = torch.tensor([number[item.prefix] for item in items])
        prefixes = pad(list(beginnings.values()))
        rest = pad([item.predicting(item.n_shared) for item in items])
        labels = rest.pop("labels")
        first, last = (
            torch.tensor(ends)[:, None] for ends in ([n for _, n in rows], [item.tokens - 1 for item in items])
        )
        positions = first + torch.arange(rest["input_ids"].shape[1])
        rest["position_ids"] = positions.minimum(last)  # or padding would lie beyond what learned positions there are
        rest["attention_mask"] = torch.cat([prefixes["attention_mask"][place], rest["attention_mask"]], 1)
        hidden = self.backbone.hidden_states_after(prefixes, rest, place)
        return labelled_positions(items, hidden, labels)

    def _forward(self, items: list[Item], failed: dict[int, str] | None) -> Iterator[Labelled]:
        """One forward pass, or several smaller ones where memory runs out."""
        parts = [items]
        while parts:
            part = parts.pop(0)
            if len(part) > 1 and padded(part) > self.max_tokens:
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                continue
            try:
                batch = self.run(part)
            except NotTogetherError:
                parts[:0] = [[item] for item in part]
                continue
            except Exception as error:
                tokens = padded(part)
                if not should_reduce_batch_size(error) or (len(part) == 1 and failed is None):
                    raise
                if len(part) == 1 and failed is not None:
                    failed[part[0].index] = f"out of memory with this row alone ({tokens} tokens): set max_length"
                    clear_device_cache(garbage_collection=True)
                    continue
                self.max_tokens = max(1, min(tokens, self.max_tokens) // 2)
                with aside():
                    logger.warning("out of memory with %d tokens in a batch: now %d", tokens, self.max_tokens)
                clear_device_cache(garbage_collection=True)
                parts.insert(0, part)
                continue
            yield batch

    def map(
        self,
        dataset: Iterable[Mapping[str, Any] | Row],
        fn: Callable[[Labelled], Sequence[Any]],
        description: str,
        *,
        positions: int = 0,
    ) -> tuple[dict[int, Any], list[str | None], str]:
        """`fn` on every batch of the data set.

        Returns the result of each scored row by index, the reason of each row that was not, and the data's hash.
        """
        results: dict[int, Any] = {}
        reasons: list[str | None] = []
        hasher = xxhash.xxh3_64()
        for window, found in self.windows(dataset, fn, description, positions=positions):
            results |= found
            for item, reason in window:
                reasons.append(reason)
                hasher.update(item.hash().encode())
        return results, reasons, hasher.hexdigest()

    def windows(
        self,
        dataset: Iterable[Mapping[str, Any] | Row],
        fn: Callable[[Labelled], Sequence[Any]],
        description: str,
        *,
        positions: int = 0,
    ) -> Iterator[tuple[list[tuple[Item, str | None]], dict[int, Any]]]:
        """`map` a window of rows at a time, in their order, so that a caller need not keep all results.

        Args:
            positions: `fn` is called on so many labelled positions at least, those of several batches (`joined`).

        Yields:
            the items with the reason of each that could not be scored, and the results of the others by index.
        """
        with self.progress.part(description, size(dataset)):
            for window in self._read(dataset):
                results: dict[int, Any] = {}
                failed: dict[int, str] = {}
                items = [item for item, reason in window if reason is None]
                self.progress.update(len(window) - len(items))
                for batch in joined(self.labelled(items, states=positions == 0, failed=failed), positions):
                    results.update(zip(batch.index, fn(batch), strict=True))
                results, failed = of_all_ranks(results), of_all_ranks(failed)
                yield [(item, failed.get(item.index, reason)) for item, reason in window], results

    def _read(self, dataset: Iterable[Mapping[str, Any] | Row]) -> Iterator[list[tuple[Item, str | None]]]:
        """Windows of items. Rows are read in this thread, which may be the only one that their data set bears; those
        of the next window are tokenised in another while the model runs over this one.

        Raises:
            ValueError: no row of the data set fits the set-up, and none of those before did.
        """
        reason = None
        for window in self._windows(enumerate(examples_of(dataset))):
            wrong = [item.row is not None and item.row.set_up for item, _ in window]
            self._fits_set_up |= not all(wrong)
            reason = reason or window[0][1]
            yield window
        if reason is not None and not self._fits_set_up:
            raise ValueError(f"no row can be scored: {reason}.")

    def _windows(self, rows: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[Item, str | None]]]:
        if self.collating is not None:  # it belongs to this thread as the data set does
            window, held = [], 0
            for index, example in rows:
                window.append(self._item(index, example))
                held += n_bytes(window[-1][0].made or {})
                if len(window) == WINDOW or held > MADE_BYTES:
                    yield window
                    window, held = [], 0
            if window:
                yield window
            return

        def items(window: list[tuple[int, Any]]) -> list[tuple[Item, str | None]]:
            return list(itertools.starmap(self._item, window))

        with ThreadPoolExecutor(1) as worker:
            ahead = worker.submit(items, list(islice(rows, WINDOW)))
            while window := ahead.result():
                ahead = worker.submit(items, list(islice(rows, WINDOW)))
                yield window


def labelled_positions(items: Sequence[Item], hidden_BLD: Tensor, labels_BL: Tensor) -> Labelled:
    """The positions that predict a label, found where the labels lie: looking for them on an accelerator would wait
    for the forward pass."""
    predicts = labels_BL != IGNORED
    places = predicts.flatten().nonzero()[:, 0].to(hidden_BLD.device)
    labels_T = labels_BL[predicts].to(hidden_BLD.device)
    return Labelled(list(items), predicts.sum(1).tolist(), hidden_BLD.flatten(0, 1)[places], labels_T)


def padded(batch: Sequence[Item]) -> int:
    """Tokens that a batch of rows makes the model run over."""
    shared = [item.n_shared for item in batch]
    return padded_tokens(
        [item.prefix for item in batch], shared, [item.tokens - n for item, n in zip(batch, shared, strict=True)]
    )


def pad(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows padded on the right: `input_ids`, `attention_mask`, `labels`, (rows, longest) each; token types if they
    come with them."""
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        input_ids[i, :n] = torch.from_numpy(row.input_ids)
        attention_mask[i, :n] = 1
        labels[i, :n] = torch.from_numpy(row.labels)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {**batch, "token_type_ids": torch.zeros(shape, dtype=torch.long)} if rows[0].typed else batch


def cut(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places of rows in batches alike in length, the longest first, of at most `max_tokens` padded (or one row)."""
    return pack([b""] * len(lengths), [0] * len(lengths), lengths, max_tokens)


def tokens_per_batch(device: torch.device | None) -> int:
    """How many padded tokens one forward pass should hold on a device."""
    return CPU_TOKENS if device is None or device.type == "cpu" else ACCELERATOR_TOKENS


def joined(batches: Iterable[Labelled], positions: int) -> Iterator[Labelled]:
    """Batches put together until they have so many labelled positions; 0: as they come, with all their states.

    The head is read once for all of them: a batch of prompts with short answers has too few positions to be worth it.
    """
    if positions == 0:
        yield from batches
        return
    parts: list[Labelled] = []
    for batch in batches:
        parts.append(batch.without_states())
        if sum(len(part.labels_T) for part in parts) >= positions:
            yield concatenate(parts)
            parts = []
    if parts:
        yield concatenate(parts)


def concatenate(batches: Iterable[Labelled]) -> Labelled:
    """The labelled positions of all batches as one; the states of the other positions go as each batch comes."""
    parts = [batch.without_states() for batch in batches]
    return Labelled(
        [item for part in parts for item in part.items],
        [n for part in parts for n in part.lengths],
        torch.cat([part.hidden_TD for part in parts]),
        torch.cat([part.labels_T for part in parts]),
    )


def world() -> tuple[int, int]:
    """This rank and the number of ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_all_ranks(mine: dict[int, Any]) -> dict[int, Any]:
    """What this rank found and what the others did, on every rank."""
    if world()[1] == 1:
        return mine
    parts: list[dict[int, Any]] = [{} for _ in range(world()[1])]
    torch.distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}
