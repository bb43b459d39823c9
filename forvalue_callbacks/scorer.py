"""Data set in, scores out: batches by length under a token budget, sharded across ranks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object, reduce
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import core
from .fitting import Fit, fit_head
from .head import Backbone, left_as_found, whole
from .rows import Row, RowConfig, RowPreparer, needs_collator
from .scores import ForValueScores

logger = logging.getLogger(__name__)

# Rows are read, sorted by length and batched a window at a time: memory stays flat however long the data set is, and
# 4,096 rows are enough for batches alike in length.
WINDOW = 4096
# Padded tokens in one forward pass. On a CPU a batch should stay in the cache: 2,048 is 1.4 times as fast as 8,192.
CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 16384
# Rows per batch where a data collator makes the batch (images), whose token count nobody knows before.
COLLATED_ROWS = 8
# Share of the mean diagonal that is added to the second moment before it is inverted.
WHITENING_RIDGE = 0.01
OVERFLOW = "hidden states or logits overflow; try forward_dtype='bfloat16' or float32 weights"


@dataclass
class ForValueConfig:
    """How rows are scored. No field is named like one of `SFTConfig` or `ModelConfig`: `TrlParser` takes all three."""

    direction: str = field(
        default="gradient",
        metadata={
            "help": "How the validation rows move the head. 'gradient': along their mean gradient (For-Value as "
            "published, arXiv 2508.10180). 'whitened': that times the inverse second moment of the hidden states. "
            "'fitted': to the head fitted on them; the score is a row's log-likelihood after minus before. "
            "'fitted_likelihood': the same head; the score is the log-likelihood after.",
            "choices": ["gradient", "whitened", "fitted", "fitted_likelihood"],
        },
    )
    normalize: str = field(
        default="none",
        metadata={
            "help": "'none': sum over labelled tokens (the paper). 'length': per labelled token. 'cosine': divided by "
            "the norm of the row's own gradient.",
            "choices": ["none", "length", "cosine"],
        },
    )
    vocab: str = field(
        default="full",
        metadata={
            "help": "'full': exact. 'seen': only tokens that are labels somewhere in the data or validation rows, as "
            "in the paper's Algorithm 1; an approximation, for comparison.",
            "choices": ["full", "seen"],
        },
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Padded tokens in one forward pass; halves itself when memory runs out. None: 2,048 on a CPU, "
            "16,384 on an accelerator."
        },
    )
    forward_dtype: str | None = field(
        default=None,
        metadata={"help": "Run the forward pass under autocast in this dtype ('bfloat16'); None: the model's own."},
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            choices = spec.metadata.get("choices")
            if choices is not None and getattr(self, spec.name) not in choices:
                raise ValueError(f"{spec.name}={getattr(self, spec.name)!r}: choose one of {choices}.")
        if self.fits_head and (self.normalize == "cosine" or self.vocab != "full"):
            raise ValueError(f"direction={self.direction!r} needs normalize='none' or 'length', and vocab='full'.")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(f"max_tokens_per_batch={self.max_tokens_per_batch}: must be at least 1.")

    @property
    def fits_head(self) -> bool:
        """Whether the head takes a finite step, to where it is fitted."""
        return self.direction.startswith("fitted")


@dataclass
class Labelled:
    """The labelled positions of some rows after a forward pass."""

    index: list[int]  # the rows' places in the data set
    lengths: list[int]  # labelled positions of each row
    hidden_TD: Tensor  # inputs of the head, row after row
    labels_T: Tensor

    @property
    def rows_T(self) -> Tensor:
        """Which row (0, 1, ... of this batch) each position belongs to."""
        lengths = torch.tensor(self.lengths, device=self.hidden_TD.device)
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=lengths.device), lengths)

    def sum(self, values_T: Tensor) -> np.ndarray:
        """Sum of a value over the positions of each row, float64 (rows,)."""
        out = torch.zeros(len(self.lengths), dtype=torch.float64, device=values_T.device)
        return out.index_add_(0, self.rows_T, values_T.double()).cpu().numpy()


@dataclass
class _Item:
    """A row that can be scored: token ids, or, where a collator makes the batch, the example itself."""

    index: int
    row: Row | None
    example: Mapping[str, Any] | None = None

    @property
    def tokens(self) -> int:
        return 1 if self.row is None else len(self.row.input_ids)


class ForValueScorer:
    """For-Value scores of a data set against a validation set, by forward passes alone.

    The validation rows define a direction D (V, d) for the output head: the mean gradient of their log-likelihood in
    it. A row's score is `<D, G(row)>`, how much its own log-likelihood rises along D (paper, Eq. 2 averaged over the
    validation set), exact over the whole vocabulary. Higher is more valuable.

    Under `torch.distributed`, rows are sharded over the ranks and every rank returns all scores.

    Args:
        model: `PreTrainedModel` or `PeftModel` with an output head; left exactly as found.
        validation_dataset: clean rows of the kind that the fine-tuned model should be good at.
        config: `ForValueConfig`.
        processing_class: tokenizer (or processor) for rows that are not tokenised yet.
        data_collator: makes model inputs of rows that need more than token ids (images), and labels of rows that
            come with `input_ids` only.
        rows: how rows are prepared, as in `SFTConfig` (`max_length`, `completion_only_loss`, ...).
        progress: show progress bars (on the first rank).

    The direction is computed once, at first use: make a new scorer for a model that has been trained since.

    Raises:
        ValueError: a model whose head cannot be described, no validation row that can be scored, unknown columns.
    """

    def __init__(
        self,
        model: nn.Module,
        validation_dataset: Iterable[Mapping[str, Any]],
        config: ForValueConfig | None = None,
        *,
        processing_class: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        rows: RowConfig | None = None,
        progress: bool = True,
    ):
        self.config = config or ForValueConfig()
        self.backbone = Backbone(model, self.config.forward_dtype)
        self.validation_dataset = validation_dataset
        self.data_collator = data_collator
        self.rows = rows or RowConfig()
        self.prepare = RowPreparer(
            processing_class,
            self.rows,
            max_positions=self.backbone.max_positions,
            vocab_size=self.backbone.head().vocab_size,
        )
        self.progress = progress
        self._made_of: dict[str, str] | None = None
        self._max_tokens = self.config.max_tokens_per_batch or tokens_per_batch(self.backbone.device)
        self._direction: Tensor | None = None
        self.fit: Fit | None = None  # how the head was fitted, with "fitted" and "fitted_likelihood"
        self._second_moment: Tensor | None = None
        self._validation_items: list[_Item] | None = None

    # ---- what users call ----

    def score(self, dataset: Iterable[Mapping[str, Any]]) -> ForValueScores:
        """One score per row, in row order; NaN and a reason where a row cannot be scored.

        Units: nats of log-likelihood, per unit step along "gradient" and "whitened"; per labelled token with
        `normalize="length"`, per unit of gradient norm with "cosine".
        """
        with left_as_found(self.backbone.model):
            head, direction = self.backbone.head(), self._seen_only(self.direction(), dataset)
            metric = self._metric()

            def score(batch: Labelled) -> list[tuple[float, float, int]]:
                score_T, log_p_T = self._score_tokens(head, direction, batch)
                values, log_p = batch.sum(score_T), batch.sum(log_p_T)
                if self.config.normalize == "length":
                    values = values / np.array(batch.lengths)
                elif self.config.normalize == "cosine":
                    metric_TD = None if metric is None else batch.hidden_TD.to(metric) @ metric
                    square = core.squared_norms(
                        head, batch.hidden_TD, batch.labels_T, batch.lengths, metric_TD=metric_TD
                    )
                    values = values / square.clamp(min=1e-30).sqrt().cpu().numpy()
                return list(zip(values.tolist(), log_p.tolist(), batch.lengths, strict=True))

            results, reasons, data_hash = self._map(dataset, score, "scoring")
        values = np.full(len(reasons), np.nan)
        log_likelihood = np.full(len(reasons), np.nan)
        n_labelled = np.zeros(len(reasons), dtype=np.int64)
        for i, (value, log_p, length) in results.items():
            n_labelled[i] = length
            if np.isfinite(value) and np.isfinite(log_p):
                values[i], log_likelihood[i] = value, log_p
            else:
                reasons[i] = f"non-finite score: {OVERFLOW}"
        metadata = {"made_of": {**self.made_of(), "data": data_hash}, "config": asdict(self.config)}
        return ForValueScores(values, reasons, log_likelihood, n_labelled, metadata)

    def token_scores(self, dataset: Iterable[Mapping[str, Any]]) -> list[Tensor]:
        """Scores of each row's labelled tokens, float64 (n_labelled,) each, empty where a row cannot be scored.

        They sum to the row's score (with `normalize="none"`).
        """
        with left_as_found(self.backbone.model):
            head, direction = self.backbone.head(), self._seen_only(self.direction(), dataset)

            def score(batch: Labelled) -> list[Tensor]:
                score_T, _ = self._score_tokens(head, direction, batch)
                return list(score_T.double().cpu().split(batch.lengths))

            results, reasons, _ = self._map(dataset, score, "scoring tokens")
        return [results.get(i, torch.zeros(0, dtype=torch.float64)) for i in range(len(reasons))]

    def pairwise(self, dataset: Iterable[Mapping[str, Any]]) -> Tensor:
        """Score of every row against every validation row, float64 (rows of dataset, rows of validation).

        `pairwise(...).nanmean(1)` equals `score(...).values` with `normalize="none"`. NaN for rows of either side that
        cannot be scored. The validation set's labelled hidden states are kept in memory: tokens x d.
        """
        if self.config.normalize != "none" or self.config.vocab != "full" or self.config.fits_head:
            raise ValueError(
                "pairwise scores are defined for direction='gradient' or 'whitened', normalize='none', vocab='full'."
            )
        with left_as_found(self.backbone.model):
            head = self.backbone.head()
            self.direction()  # prepares and checks what follows, the metric included
            metric = self._metric()
            items = self._validation()
            validation = _concatenate(list(self._labelled(items, "validation", all_ranks=True)))
            metric_TD = None if metric is None else validation.hidden_TD.to(metric) @ metric

            def score(batch: Labelled) -> list[Tensor]:
                return list(
                    core.score_pairs(
                        head,
                        batch.hidden_TD,
                        batch.labels_T,
                        batch.rows_T,
                        len(batch.lengths),
                        validation.hidden_TD,
                        validation.labels_T,
                        validation.rows_T,
                        len(validation.lengths),
                        other_metric_TD=metric_TD,
                    ).cpu()
                )

            results, reasons, _ = self._map(dataset, score, "scoring pairs")
        out = torch.full((len(reasons), self._n_validation), torch.nan, dtype=torch.float64)
        for i, row in results.items():
            out[i, validation.index] = row
        return out

    def direction(self) -> Tensor:
        """How the head moves, float32 (V, d) (float64 for a float64 model), computed once: D, or the fitted move."""
        if self._direction is None:
            with left_as_found(self.backbone.model):
                self._direction = self._fit()
        return self._direction

    def made_of(self) -> dict[str, str]:
        """Hashes of what determines a score apart from the row itself: weights, validation rows, config."""
        if self._made_of is None:
            config = {**asdict(self.config), **asdict(self.rows)}
            del config["max_tokens_per_batch"]  # changes no score
            self._made_of = {
                "weights": hash_weights(self.backbone.model),
                "validation": _digest("".join(map(_hash_item, self._validation()))),
                "config": _digest(repr(sorted(config.items()))),
            }
        return self._made_of

    def hash_rows(self, dataset: Iterable[Mapping[str, Any]]) -> str:
        """Hash of rows as the model sees them: what `metadata["made_of"]["data"]` is after scoring them."""
        return _digest("".join(_hash_item(item) for item, _ in self._items(dataset)))

    def _score_tokens(self, head: core.Head, direction: Tensor, batch: Labelled) -> tuple[Tensor, Tensor]:
        """Score and log-likelihood of each labelled position, (T,) both."""
        if not self.config.fits_head:
            return core.score_tokens(head, direction, batch.hidden_TD, batch.labels_T)
        gain_T, log_p_T = core.gain_tokens(head, direction, batch.hidden_TD, batch.labels_T)
        return (gain_T if self.config.direction == "fitted" else gain_T + log_p_T), log_p_T

    # ---- the validation side ----

    def _validation(self) -> list[_Item]:
        if self._validation_items is None:
            items, bad, n = [], [], 0
            for item, reason in self._items(self.validation_dataset):
                n += 1
                if reason is None:
                    items.append(item)
                else:
                    bad.append(f"row {item.index}: {reason}")
            if bad:
                logger.warning("%d of %d validation rows cannot be scored (%s)", len(bad), n, "; ".join(bad[:3]))
            if not items:
                raise ValueError(f"no validation row can be scored ({n} rows; {'; '.join(bad[:3]) or 'none given'}).")
            self._validation_items, self._n_validation = items, n
        return self._validation_items

    def _fit(self) -> Tensor:
        """Mean gradient over the validation rows, times the inverse second moment if asked for; or the fitted move."""
        items = self._validation()
        shortest = min(items, key=lambda item: item.tokens)
        self.backbone.check(self._collate([shortest]))
        head = self.backbone.head()
        if self.config.fits_head:
            # Every rank fits for itself: validation sets are small, and the same fit needs no exchange.
            positions = _concatenate(list(self._labelled(items, "validation", all_ranks=True)))
            self.fit = fit_head(head, positions.hidden_TD, positions.labels_T, positions.rows_T)
            if self.fit.ridge == np.inf:
                logger.warning("no move of the head predicts held-out validation rows better: use another direction")
            return self.fit.move_VD
        dtype = core.working_dtype(head.weight)
        total_VD = torch.zeros(head.weight.shape, dtype=dtype, device=head.weight.device)
        whiten = self.config.direction == "whitened"
        moment_DD = torch.zeros(
            head.weight.shape[1], head.weight.shape[1], dtype=torch.float64, device=total_VD.device
        )
        n_rows = n_tokens = 0
        for batch in self._labelled(items, "validation direction"):
            core.add_gradient(total_VD, head, batch.hidden_TD, batch.labels_T)
            n_rows += len(batch.index)
            if whiten:
                hidden = batch.hidden_TD.double()
                moment_DD.addmm_(hidden.T, hidden)
                n_tokens += len(hidden)
        if _world()[1] > 1:
            counts = torch.tensor([n_rows, n_tokens], device=total_VD.device)
            total_VD, moment_DD, counts = reduce((total_VD, moment_DD, counts), reduction="sum")
            n_rows, n_tokens = counts.tolist()
        total_VD /= n_rows
        if not torch.isfinite(total_VD).all():
            raise ValueError(f"the validation direction is not finite: {OVERFLOW}")
        if whiten:
            self._second_moment = moment_DD / n_tokens
        metric = self._metric()
        return total_VD if metric is None else total_VD @ metric.to(total_VD)

    def _metric(self) -> Tensor | None:
        """M of `<h, M h'>`: inverse of the ridged second moment for "whitened", None (the identity) otherwise."""
        if self._second_moment is None:
            return None
        ridge = WHITENING_RIDGE * self._second_moment.diagonal().mean()
        eye = torch.eye(len(self._second_moment), dtype=torch.float64, device=self._second_moment.device)
        return torch.cholesky_inverse(torch.linalg.cholesky(self._second_moment + ridge * eye))

    def _seen_only(self, direction: Tensor, dataset: Iterable[Mapping[str, Any]]) -> Tensor:
        """With `vocab="seen"`, the direction without the tokens that are no label anywhere (the paper's Algorithm 1,
        with the union over the data set in place of the batch, so that a score does not depend on its batch-mates)."""
        if self.config.vocab == "full":
            return direction
        seen = torch.zeros(len(direction), dtype=torch.bool)
        for item, reason in (*((item, None) for item in self._validation()), *self._items(dataset)):
            if item.row is None:
                raise ValueError("vocab='seen' needs rows of token ids, not rows that a collator makes batches of.")
            if reason is None:
                labels = item.row.labels[1:]
                seen[labels[labels != -100]] = True
        return direction * seen.to(direction.device)[:, None]

    # ---- rows to batches ----

    def _items(self, dataset: Iterable[Mapping[str, Any]], first: int = 0) -> Iterator[tuple[_Item, str | None]]:
        """Every row of the data set as an item, with the reason where it cannot be scored."""
        for index, example in enumerate(dataset, first):
            if self.data_collator is None or not needs_collator(example):
                row = self.prepare(example)
                yield _Item(index, row), row.reason
                continue
            try:
                batch = self.data_collator([example])
            except Exception as error:  # whatever a user's collator finds wrong with a row is the row's reason
                row = Row.unscorable(f"the data_collator fails: {type(error).__name__}: {error}")
                yield _Item(index, row), row.reason
                continue
            if set(batch) <= {"input_ids", "attention_mask", "labels", "position_ids"}:
                row = self.prepare({k: v[0] for k, v in batch.items() if k != "position_ids"})
                yield _Item(index, row), row.reason
            else:
                labelled = bool((torch.as_tensor(batch["labels"])[:, 1:] != -100).any())
                yield _Item(index, None, example), None if labelled else "no labelled tokens after the data_collator"

    def _collate(self, items: Sequence[_Item]) -> dict[str, Any]:
        if items[0].row is None:
            assert self.data_collator is not None
            batch = dict(self.data_collator([item.example for item in items]))
            if len(batch["input_ids"]) != len(items):
                raise ValueError("the data_collator flattens rows into one (padding-free): score with a padding one.")
            return batch
        rows = [item.row for item in items if item.row is not None]
        shape = (len(rows), max(len(row.input_ids) for row in rows))
        input_ids = torch.zeros(shape, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, -100)
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            input_ids[i, :n] = torch.from_numpy(row.input_ids)
            attention_mask[i, :n] = 1
            labels[i, :n] = torch.from_numpy(row.labels)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _batches(self, items: list[_Item]) -> list[list[_Item]]:
        """Items sorted by length, cut where the padded batch would exceed the token budget."""
        batches: list[list[_Item]] = []
        for item in sorted(items, key=lambda item: -item.tokens):
            limit = (
                COLLATED_ROWS
                if item.row is None
                else max(1, self._max_tokens // batches[-1][0].tokens)
                if batches
                else 0
            )
            if not batches or len(batches[-1]) >= limit or (item.row is None) != (batches[-1][0].row is None):
                batches.append([])
            batches[-1].append(item)
        return batches

    def _labelled(
        self,
        items: list[_Item],
        description: str | None,
        *,
        all_ranks: bool = False,
        bar: Any = None,
        failed: dict[int, str] | None = None,
    ) -> Iterator[Labelled]:
        """Forward passes over this rank's share of the items; `failed` takes in the rows too large for the memory."""
        rank, world = (0, 1) if all_ranks else _world()
        batches = self._batches(items)
        # Sharded models (FSDP, ZeRO-3) gather weights in every forward: all ranks must run equally many.
        n_forwards = -(-len(batches) // world)
        mine = batches[rank::world]
        padding = n_forwards - len(mine)
        own_bar = bar is None
        bar = bar if bar is not None else self._bar(len(items), description)
        for batch in mine:
            yield from self._forward(batch, failed)
            bar.update(min(len(batch) * world, bar.total - bar.n) if bar.total else len(batch) * world)
        for _ in range(padding):
            self._hidden_states(batches[-1][:1])
        if own_bar:
            bar.close()

    def _hidden_states(self, items: Sequence[_Item]) -> Labelled:
        batch = self._collate(items)
        hidden = self.backbone.hidden_states(batch)
        labels = torch.as_tensor(batch["labels"]).to(hidden.device)[:, 1:]
        mask = labels != -100
        return Labelled([item.index for item in items], mask.sum(1).tolist(), hidden[:, :-1][mask], labels[mask])

    def _forward(self, items: list[_Item], failed: dict[int, str] | None) -> Iterator[Labelled]:
        """One forward pass, or several smaller ones where memory runs out."""
        parts = [items]
        while parts:
            part = parts.pop(0)
            if len(part) > 1 and len(part) * max(item.tokens for item in part) > self._max_tokens:
                parts[:0] = [part[: len(part) // 2], part[len(part) // 2 :]]
                continue
            try:
                batch = self._hidden_states(part)
            except Exception as error:
                tokens = len(part) * max(item.tokens for item in part)
                if not should_reduce_batch_size(error) or (len(part) == 1 and failed is None):
                    raise
                if len(part) == 1 and failed is not None:
                    failed[part[0].index] = f"out of memory with this row alone ({tokens} tokens): set max_length"
                    clear_device_cache(garbage_collection=True)
                    continue
                self._max_tokens = max(1, min(tokens, self._max_tokens) // 2)
                logger.warning("out of memory with %d tokens in a batch: going on with %d", tokens, self._max_tokens)
                clear_device_cache(garbage_collection=True)
                parts.insert(0, part)
                continue
            yield batch

    def _map(
        self, dataset: Iterable[Mapping[str, Any]], fn: Callable[[Labelled], Sequence[Any]], description: str
    ) -> tuple[dict[int, Any], list[str | None], str]:
        """`fn` on every batch of the data set.

        Returns the result of each scored row by index, the reason of each row that was not, and the data's hash.
        """
        results: dict[int, Any] = {}
        failed: dict[int, str] = {}
        reasons: list[str | None] = []
        hasher = xxhash.xxh3_64()
        bar = self._bar(len(dataset) if isinstance(dataset, Sized) else None, description)
        stream = self._items(dataset)
        while window := list(islice(stream, WINDOW)):
            for item, reason in window:
                reasons.append(reason)
                hasher.update(_hash_item(item).encode())
            items = [item for item, reason in window if reason is None]
            bar.update(len(window) - len(items))
            for batch in self._labelled(items, None, bar=bar, failed=failed):
                results.update(zip(batch.index, fn(batch), strict=True))
        bar.close()
        if _world()[1] > 1:
            results = dict(pair for part in gather_object([list(results.items())]) for pair in part)
            failed = dict(pair for part in gather_object([list(failed.items())]) for pair in part)
        for index, reason in failed.items():
            reasons[index] = reason
        return results, reasons, hasher.hexdigest()

    def _bar(self, total: int | None, description: str | None) -> Any:
        disable = None if self.progress and _world()[0] == 0 else True
        return tqdm(total=total, desc=description, unit="row", disable=disable)


def tokens_per_batch(device: torch.device | None) -> int:
    """How many padded tokens one forward pass should hold on a device."""
    return CPU_TOKENS if device is None or device.type == "cpu" else ACCELERATOR_TOKENS


def hash_weights(model: nn.Module) -> str:
    """Hash of every parameter and buffer of a model, adapters included; the same in every process."""
    hasher = xxhash.xxh3_64()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = whole(tensor)
        hasher.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _hash_item(item: _Item) -> str:
    if item.row is None:
        return Hasher.hash(item.example)
    return xxhash.xxh3_64_hexdigest(item.row.input_ids.tobytes() + b"|" + item.row.labels.tobytes())


def _concatenate(batches: list[Labelled]) -> Labelled:
    return Labelled(
        [i for batch in batches for i in batch.index],
        [n for batch in batches for n in batch.lengths],
        torch.cat([batch.hidden_TD for batch in batches]),
        torch.cat([batch.labels_T for batch in batches]),
    )


def _world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
