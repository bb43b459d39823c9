"""Rows through a data collator, which decides what is trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, default_data_collator
from transformers.trainer_utils import RemoveColumnsCollator

from .reading import OwnRandomness, copied
from .reasons import UnscorableError, place_of
from .sample import IGNORED, Segment
from .sft import TOKEN_COLUMNS, Row, RowPreparer, columns_of, has_images, refuse_packed

# What a collator may be given, of a row of tokens, where it stumbles over other columns (a trainer removes those of
# its training rows, and the validation rows have them still).
MODEL_COLUMNS = (*TOKEN_COLUMNS, "token_type_ids", "special_tokens_mask")
# Inputs of so many tokens each; the last is of the rejected answers of pairs.
TOKENS = ("input_ids", "decoder_input_ids", "rejected_input_ids")
# What flattening collators say besides; true of one row as it is.
_OF_FLAT_ROWS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class Collated(NamedTuple):
    """A row that only a collator makes model inputs of."""

    example: Any  # what the collator was given a copy of
    labels: np.ndarray  # int64 (L,), as the collator makes them, not shifted
    batch: dict[str, Any]  # the model inputs that it made, a batch of one


class Collating:
    """A data collator that makes one row of each example.

    Every example goes through it alone, as a copy, once: collators may write into what they are given, and draw
    random numbers (which are not those of the run). Where the batch holds token ids and labels and no more, that is
    the row. Else (images) it is what the forward pass is made of (`together`).

    A collator that only pads is passed by where the row has labels. Raw rows that the collator does not take (the
    validation rows beside tokenised training rows) are prepared first.

    Raises:
        ValueError: a collator that masks tokens at random.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]], prepare: RowPreparer):
        self.collator = collator
        self.prepare = prepare
        self._random_numbers = OwnRandomness()
        self._only_pads = only_pads(collator)
        self._drops_types = of_trl(collator)
        self._takes_tokens = self._only_pads
        if getattr(inner(collator), "mlm", False) is True:
            raise ValueError(
                f"a {type(inner(collator)).__name__} with mlm=True masks tokens at random, for models that read later "
                "tokens too: For-Value scores causal language models (mlm=False)."
            )

    def read(self, example: Any) -> Row | Collated:
        """One example, left as it is; a `Row` with a reason where it cannot be scored.

        Raises:
            ValueError: what `RowPreparer` raises.
        """
        try:
            return self._read(example)
        except UnscorableError as reason:
            return Row.unscorable(reason)

    def _read(self, example: Any) -> Row | Collated:
        if not isinstance(example, Mapping):
            return self._collated(example, example)
        refuse_packed(example)
        raw = "input_ids" not in example and not has_images(example)
        if self._only_pads and (raw or _is_labelled(example)):
            return self.prepare(_without_types(example) if self._drops_types else example)
        if raw and self._takes_tokens:
            return self._prepared(example)
        try:
            return self._collated(example, example)
        except _RefusedError as refused:
            try:
                found = self._prepared(example) if raw else self._collated(example, _columns(example))
            except (UnscorableError, ValueError):
                raise refused from None
            if isinstance(found, Row) and found.reason is not None:
                raise refused from None
            self._takes_tokens = raw or self._takes_tokens
            return found

    def _prepared(self, example: Mapping[str, Any]) -> Row | Collated:
        row = self.prepare(example)
        if row.reason is not None:
            return row
        ids = row.input_ids.tolist()
        tokens = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": row.labels.tolist()}
        return self._collated(tokens, tokens)

    def _collated(self, example: Any, given: Any) -> Row | Collated:
        try:
            batch = self._call(given)
        except Exception as error:  # whatever a user's collator finds wrong with a row is the row's reason
            raise _RefusedError(f"the data_collator fails: {place_of(error)}") from error
        if not isinstance(batch, Mapping):
            raise UnscorableError(f"the data_collator gives a {type(batch).__name__}, not a mapping with 'input_ids'")
        for column in ("input_ids", "labels"):
            if batch.get(column) is None:
                raise UnscorableError(
                    f"the data_collator gives no {column!r}: rows are scored as they are trained on, by 'input_ids' "
                    "and 'labels'"
                )
        try:
            labels = torch.as_tensor(batch["labels"])
            shape = tuple(torch.as_tensor(batch["input_ids"]).shape)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UnscorableError("the data_collator gives 'input_ids' or 'labels' that are no tensors") from error
        if len(shape) != 2 or shape[0] != 1 or tuple(labels.shape) != shape:
            raise UnscorableError(
                f"the data_collator makes 'input_ids' of shape {shape} and 'labels' of shape {tuple(labels.shape)} of "
                "one row: both must be (1, tokens)"
            )
        if _is_row_of_tokens(batch):
            return self.prepare.collated(example if isinstance(example, Mapping) else {}, batch)
        found = _predicted(labels[0].cpu().numpy().astype(np.int64), batch.get("attention_mask"))
        if not (found[1:] != IGNORED).any():
            raise UnscorableError("no labelled tokens after the data_collator")
        self._refuse_labels(found)
        return Collated(given, found, _inputs(batch))

    def _refuse_labels(self, labels: np.ndarray) -> None:
        size, highest = self.prepare.vocab_size, int(labels.max())
        if size is not None and highest >= size:
            raise UnscorableError(
                f"label {highest} after the data_collator is outside the model's vocabulary of {size:,}: label the "
                "answer alone (completion_only_loss or assistant_only_loss), and no places of images"
            )

    def again(self, example: Any) -> dict[str, Any]:
        """The batch of one that the collator makes of an example that it has been given before."""
        return _inputs(self._call(example))

    def _call(self, example: Any) -> Any:
        with self._random_numbers:
            return self.collator([copied(example)])


class OneByOne:
    """Samples of models that are no language models from left to right (encoder-decoders, classifiers): what the data
    collator makes of a row alone, as a segment.

    Args:
        collator: the trainer's; None: rows are tokenised, and become tensors as they are.
        segment: makes the segment of a batch of one.
        columns: what the collator is given of a row: a trainer removes all else.
        main: the input without which the model has nothing to read ("input_ids", "input_features").
        most: how many tokens the model takes, by the input's name; None: any number.
        n_tokens: how many different ones it knows.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Mapping[str, Any]] | None,
        segment: Callable[[Mapping[str, Any]], Segment],
        columns: Collection[str],
        main: str,
        most: Mapping[str, int | None],
        n_tokens: int,
    ):
        self.collator, self.segment = inner(collator) or default_data_collator, segment
        self.columns, self.main, self.most, self.n_tokens = columns, main, most, n_tokens
        self._random_numbers = OwnRandomness()

    def read(self, example: Any) -> Segment:
        """One example, left as it is.

        Raises:
            UnscorableError: it cannot be scored.
        """
        batch = self._collated(example)
        if not isinstance(batch, Mapping):
            raise UnscorableError(f"the data_collator gives a {type(batch).__name__}, not a mapping of model inputs")
        if batch.get(self.main) is None and batch.get("inputs_embeds") is None:
            raise UnscorableError(self._nothing_to_read(example))
        segment = self.segment(batch)
        inputs = dict(segment.load())
        for name, most in self.most.items():
            if isinstance(ids := inputs.get(name), Tensor):
                self._refuse_tokens(name, ids, most)
        if "input_ids" in inputs:  # beside longer rows it must be known what is padding
            inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
            for name in ("attention_mask", "token_type_ids"):
                _refuse_other_shape(name, inputs.get(name), inputs["input_ids"])
        return replace(segment, inputs=inputs, n_prompt=max(1, int(segment.at[0])))

    def _collated(self, example: Any) -> Any:
        """What the collator makes of the columns that a trainer leaves it, or of all of them: it may read text."""
        given = [example]
        if isinstance(example, Mapping):
            given.insert(0, {name: value for name, value in example.items() if name in self.columns})
            if only_pads(self.collator) or len(given[0]) == len(example):
                del given[1]
        failed: Exception | None = None
        for row in given:
            try:
                with self._random_numbers:
                    return self.collator([copied(row)])
            except Exception as error:  # whatever a user's collator finds wrong with a row is the row's reason
                failed = failed or error
        assert failed is not None
        raise UnscorableError(self._why(example, failed)) from failed

    def _why(self, example: Any, error: Exception) -> str:
        """What is wrong with a row on which the collator fails."""
        if not isinstance(example, Mapping):
            return f"the row is a {type(example).__name__}: make it a mapping from columns to values"
        failed = f"the data_collator fails: {place_of(error)}"
        if example.get(self.main) is None:
            return f"{self._nothing_to_read(example)} ({failed})"
        labels = [name for name in ("labels", "label", "label_ids") if name in example]
        for name in labels:
            if example[name] is None or isinstance(example[name], str):
                kind = "nothing" if example[name] is None else "text"
                return f"{kind} in {name!r}: give labels as numbers (of classes as in the model's config.label2id)"
        return failed

    def _nothing_to_read(self, example: Any) -> str:
        found = f" ({columns_of(example)})" if isinstance(example, Mapping) else ""
        return f"no {self.main!r}{found}: prepare the row as the training rows are, or have the data_collator do it"

    def _refuse_tokens(self, name: str, ids: Tensor, most: int | None) -> None:
        if ids.ndim != 2 or len(ids) != 1 or not ids.numel() or ids.is_floating_point():
            raise UnscorableError(
                f"{name!r} of shape {tuple(ids.shape)} and {ids.dtype} of one row: it must be token ids, (1, tokens)"
            )
        if most is not None and ids.shape[1] > most:
            n = ids.shape[1]
            raise UnscorableError(f"{n:,} tokens in {name!r}, but the model takes {most:,}: truncate the row")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.n_tokens:
            wrong = low if low < 0 else high
            raise UnscorableError(f"token {wrong} in {name!r}, but the model knows 0 to {self.n_tokens - 1}")


def _refuse_other_shape(name: str, value: Any, ids: Tensor) -> None:
    if isinstance(value, Tensor) and value.ndim <= 2 and value.shape != ids.shape:
        raise UnscorableError(
            f"{name!r} of shape {tuple(value.shape)} beside 'input_ids' of shape {tuple(ids.shape)}: both must be "
            "(1, tokens)"
        )


def _predicted(labels: np.ndarray, mask: Any) -> np.ndarray:
    """Labels without those at padding and that of the first token behind it, which nothing predicts; (L,)."""
    if mask is None or np.shape(mask) != (1, len(labels)):
        return labels
    real = torch.as_tensor(mask)[0].cpu().numpy() != 0
    return np.where(real & np.append(True, real[:-1]), labels, IGNORED)


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: torch.as_tensor(value) if isinstance(value, np.ndarray) or name in TOKEN_COLUMNS else value
        for name, value in batch.items()
        if value is not None and name != "labels"
    }


def n_bytes(batch: Mapping[str, Any]) -> int:
    """How much memory the tensors of a batch take."""
    return sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))


def together(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of several of one row each: what there is one of for each token (of the row, or of a decoder) is
    padded on the right, all else (pixels, sizes of images) put together along its first dimension.

    Raises:
        NotTogetherError: other inputs or shapes in one than in another, or inputs of an unknown kind.
    """
    if len(batches) == 1:
        return dict(batches[0])
    lengths = [
        [batch[name].shape[1] for batch in batches]
        for name in TOKENS
        if all(isinstance(batch.get(name), Tensor) for batch in batches)
    ]
    out = {}
    for name in dict.fromkeys(name for batch in batches for name in batch):
        values = [batch.get(name) for batch in batches]
        tensors = [value for value in values if isinstance(value, Tensor) and value.ndim > 0]
        if len(tensors) < len(values):
            raise NotTogetherError
        sizes = [tuple(value.shape) for value in tensors]
        if of_tokens := [n for n in lengths if sizes == [(1, length) for length in n]]:
            # Token ids go on with the last one, which is no place of an image where the row ends with an answer.
            ids = name in TOKENS
            pads = [value[:, -1:] if ids else torch.tensor([[0]]) for value in tensors]
            tensors = [
                torch.cat([value, pad.to(value).expand(1, max(of_tokens[0]) - n)], 1)
                for value, pad, n in zip(tensors, pads, of_tokens[0], strict=True)
            ]
        elif any(n in size[1:] for counts in lengths for size, n in zip(sizes, counts, strict=True)):
            raise NotTogetherError  # one for each token, and nobody knows which dimension is that of the rows
        if len({value.shape[1:] for value in tensors}) > 1:
            raise NotTogetherError
        out[name] = torch.cat(tensors)
    return out


class NotTogetherError(Exception):
    """Rows that a collator has made cannot be put into one batch."""


class _RefusedError(UnscorableError):
    """The collator raised."""


def inner(collator: Any) -> Any:
    """The collator itself where `Trainer` has wrapped it."""
    return inner(collator.data_collator) if isinstance(collator, RemoveColumnsCollator) else collator


def only_pads(collator: Any) -> bool:
    """Whether a collator is known to leave the tokens and labels of a row as they are."""
    collator = inner(collator)
    if collator is default_data_collator or collator is transformers.default_data_collator:
        return True
    padding = (DataCollatorForSeq2Seq, DataCollatorWithPadding, transformers.DefaultDataCollator)
    return of_trl(collator) or type(collator) in padding


def of_trl(collator: Any) -> bool:
    """Whether this is the collator of `SFTTrainer`, which takes 'input_ids' and 'labels' of a row and no more."""
    cls = type(inner(collator))
    return cls.__module__.split(".")[0] == "trl" and cls.__name__ == "DataCollatorForLanguageModeling"


def _is_labelled(example: Mapping[str, Any]) -> bool:
    types = example.get("token_type_ids")
    labelled = any(example.get(column) is not None for column in ("labels", "completion_mask", "assistant_masks"))
    return labelled and not has_images(example) and (types is None or not np.any(types))


def _is_row_of_tokens(batch: Mapping[str, Any]) -> bool:
    """Whether a batch of one is its token ids and labels and no more: plain positions and mask, types all 0."""
    for column in batch.keys() - {"input_ids", "labels"} - _OF_FLAT_ROWS:
        value = batch[column]
        if value is None:
            continue
        if column.endswith("token_type_ids"):
            plain = not np.any(torch.as_tensor(value).cpu().numpy())
        elif column == "attention_mask":
            plain = torch.as_tensor(value).ndim == 2
        elif column == "position_ids":  # those that the model would count itself, or those of a pack, refused later
            positions = torch.as_tensor(value)
            plain = positions.ndim == 2 and int(positions.min()) == 0 and bool((positions.diff() <= 1).all())
        else:
            plain = False
        if not plain:
            return False
    return True


def _without_types(example: Mapping[str, Any]) -> Mapping[str, Any]:
    return {column: value for column, value in example.items() if column != "token_type_ids"}


def _columns(example: Mapping[str, Any]) -> dict[str, Any]:
    return {column: example[column] for column in MODEL_COLUMNS if column in example}
