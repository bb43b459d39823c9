"""ForValueTransform for `Dataset.map(batched=True)` and `IterableDataset.map(batched=True)`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES

from .config import ForValueConfig
from .data.reading import are_data_sets, kept
from .data.sft import RowConfig
from .methods import METHODS
from .scorer import ForValueScorer

# What the transforms of this process hold. `datasets` hashes a function by pickling it, and the pickle of a model
# differs from process to process: a transform is pickled as its fingerprint, and found again here (forked workers
# inherit the dictionary).
_LIVE: dict[str, ForValueTransform] = {}


class _Text(list[str | None]):
    """Text that `datasets` writes as such from the first batch on, be it all None: the type of a column is settled
    there."""

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return pa.array(list(self), type or pa.string())


class ForValueTransform:
    """Adds the columns `forvalue_score` (NaN where a row cannot be scored) and `forvalue_reason` to a batch of rows.

    ::

        scored = dataset.map(ForValueTransform(model, validation_dataset, processing_class=tokenizer), batched=True)
        clean = scored.filter(lambda row: row["forvalue_score"] > 0)

    Workers of Ray Data make one each: `dataset.map_batches(ForValueTransform, fn_constructor_args=(path, validation),
    fn_constructor_kwargs={"model_kwargs": {"device_map": "auto"}}, batch_format="pyarrow", concurrency=2)`.

    Its fingerprint is that of the weights, the validation rows and the config, so a second run with the same is served
    from the cache of `datasets`, in any process, and a change of any of them scores anew.

    Args:
        model: a model, or the path or hub id of one, which is then loaded where it is first needed: with
            `map(..., num_proc=2, with_rank=True)` each worker loads its own, on the device of its rank.
        validation_dataset, config, processing_class, data_collator, row_config: as for `ForValueScorer`.
        model_kwargs: for `from_pretrained` where `model` is a path or an id.

    Raises:
        ValueError: `vocab="seen"` and methods that need all rows ("auto", "label_model"): they depend on rows that a
            batch does not hold; and what `ForValueScorer` raises.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        validation_dataset: Iterable[Mapping[str, Any]],
        config: ForValueConfig | None = None,
        *,
        processing_class: Any = None,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        row_config: RowConfig | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ):
        self.config = config or ForValueConfig()
        if self.config.vocab != "full":
            raise ValueError("vocab='seen' depends on the whole data set: use ForValueScorer.score.")
        if METHODS[self.config.method].needs_all_rows:
            raise ValueError(
                f"method={self.config.method!r} learns from all the rows, and map shows a batch at a time: "
                "use dataset.add_column('forvalue_score', ForValueScorer(...).score(dataset).values)."
            )
        if are_data_sets(validation_dataset):
            raise ValueError(
                f"{len(validation_dataset)} validation sets are given, and which of their scores of a row is the "
                f"greatest depends on all rows: give one of {', '.join(map(repr, validation_dataset))}, or use "
                "ForValueScorer.score."
            )
        self._model = model
        self._model_kwargs = dict(model_kwargs or {})
        self._validation_dataset = kept(validation_dataset)
        self._options: dict[str, Any] = {
            "processing_class": processing_class,
            "data_collator": data_collator,
            "row_config": row_config,
            "progress": False,
        }
        self._scorers: dict[int | None, ForValueScorer] = {}
        self._fingerprint: str | None = None
        self._pid = os.getpid()

    def __call__(self, batch: Any, *others: Any, rank: int | None = None) -> Any:
        """Score a batch of rows: a dict of columns (then the new columns come back), or an Arrow table or a data frame
        (then an Arrow table with all columns).

        Args:
            others: what `map` gives besides: indices (of no use here), and the rank, which picks the device.

        Raises:
            ValueError: a row in place of a batch, or columns without their names.
        """
        for other in others:
            if isinstance(other, int):
                rank = other
        table = _table(batch)
        columns = table.to_pydict() if table is not None else batch
        _refuse_other_than_batches(columns)
        if os.getpid() != self._pid and torch.get_num_threads() > 1:
            # A worker of `map(num_proc=...)`: after a fork, GNU OpenMP waits forever for the threads of the parent.
            torch.set_num_threads(1)
        values = zip(*columns.values(), strict=True)
        rows = [{name: _plain(value) for name, value in zip(columns, row, strict=True)} for row in values]
        scores = self.scorer(rank).score(rows)
        new = {"forvalue_score": scores.values.tolist(), "forvalue_reason": _Text(scores.reasons)}
        if table is None:
            return new
        for name, column in new.items():
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, pa.array(column))
        return table

    def scorer(self, rank: int | None = None) -> ForValueScorer:
        """The scorer of a worker; a model given by name is loaded onto the accelerator `rank % n`, if there is one."""
        if rank not in self._scorers:
            model: Any = self._model
            if isinstance(model, (str, os.PathLike)):
                options = {"trust_remote_code": False, **self._model_kwargs}  # or a terminal would be asked
                model = _class_of(model, options).from_pretrained(model, **options)
                accelerator = torch.accelerator.current_accelerator(check_available=True)
                if rank is not None and accelerator is not None:
                    model = model.to(torch.device(accelerator.type, rank % torch.accelerator.device_count()))
            self._scorers[rank] = ForValueScorer(model, self._validation_dataset, self.config, **self._options)
        return self._scorers[rank]

    @property
    def fingerprint(self) -> str:
        """Hash of weights, validation rows and config; the same in every process."""
        if self._fingerprint is None:
            provenance = self.scorer().provenance()
            self._fingerprint = xxhash.xxh3_64_hexdigest(repr(sorted(provenance.items())).encode())
        return self._fingerprint

    def __reduce__(self) -> tuple[Any, ...]:
        _LIVE[self.fingerprint] = self
        return _find, (self.fingerprint,)


def _class_of(path: str | os.PathLike[str], options: Mapping[str, Any]) -> Any:
    """What loads a model of the kind that lies there: of an encoder-decoder, `AutoModelForCausalLM` would load the
    decoder alone."""
    where = ("revision", "token", "cache_dir", "subfolder", "trust_remote_code")
    try:
        config = AutoConfig.from_pretrained(path, **{name: options[name] for name in where if name in options})
    except (OSError, ValueError):  # an adapter, which says itself what it is for
        return AutoModelForCausalLM
    names = getattr(config, "architectures", None) or [""]
    if names[0].endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if names[0].endswith("ForTokenClassification"):
        return AutoModelForTokenClassification
    if getattr(config, "is_encoder_decoder", False):
        speech = config.model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES
        return AutoModelForSpeechSeq2Seq if speech else AutoModelForSeq2SeqLM
    return AutoModelForCausalLM


def _table(batch: Any) -> pa.Table | None:
    """A batch in another format as an Arrow table; None where it is a dict of columns."""
    if isinstance(batch, pa.Table):
        return batch
    if hasattr(batch, "iloc"):  # pandas
        return pa.Table.from_pandas(batch, preserve_index=False)
    return batch.to_arrow() if hasattr(batch, "to_arrow") else None  # polars


def _refuse_other_than_batches(columns: Any) -> None:
    if not isinstance(columns, Mapping):
        raise ValueError(
            "ForValueTransform needs the names of the columns, which map(input_columns=...) leaves out: use "
            "dataset.select_columns([...]).map(transform, batched=True)."
        )
    if any(_is_of_one_row(name, value) for name, value in columns.items()):
        raise ValueError(
            "ForValueTransform scores batches of rows, and was given one row: dataset.map(transform, batched=True)."
        )


def _is_of_one_row(name: str, value: Any) -> bool:
    """Whether a value is that of one row, and not a column of a batch."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__len__"):
        return True
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0:
        return True
    first = next((item for item in value if item is not None), None) if len(value) else None
    if first is None:
        return False
    if name in ("messages", "conversations", "prompt", "completion"):
        return isinstance(first, Mapping)
    flat = not isinstance(first, (list, tuple)) and getattr(first, "ndim", 0) == 0
    return flat and name in ("input_ids", "labels", "attention_mask")


def _plain(value: Any) -> Any:
    """A value as Python has it where numpy, or a format of `datasets`, has wrapped lists, dicts and text."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUS":
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list) and value and not isinstance(value[0], (int, float)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _find(fingerprint: str) -> ForValueTransform:
    if fingerprint not in _LIVE:
        raise RuntimeError(
            "a ForValueTransform cannot be sent to a process that was not forked from the one that made it. Use the "
            "'fork' start method, or map without num_proc; let workers of Ray make their own: "
            "map_batches(ForValueTransform, fn_constructor_args=(path, validation), batch_format='pyarrow')."
        )
    return _LIVE[fingerprint]
