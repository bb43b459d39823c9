"""Rows to padded batches, for the baselines: by the package's own plan, with all their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.preference import is_preference
from ..data.reader import sample_of
from ..data.sample import Sample
from ..data.sft import RowPreparer
from ..model.plan import plan
from ..model.positions import pad, tokens_of
from ..model.run import tokens_per_batch


@dataclass
class Batch:
    """Rows padded on the right.

    Args:
        index: (B,) the rows' places in the data set.
        inputs: for the model, (B, L) each, and what else it takes, such as `pixel_values`.
        rows_T, at_T, target_T: of each prediction its row (0, 1, ... of these), its position there, and what is
            predicted.
    """

    index: Tensor
    inputs: dict[str, Tensor]
    rows_T: Tensor
    at_T: Tensor
    target_T: Tensor

    def pick(self, states_BLX: Tensor) -> Tensor:
        """What there is at the positions that predict something, (T, X)."""
        return states_BLX[self.rows_T, self.at_T]

    def sum(self, values_TX: Tensor) -> Tensor:
        """Sums over the predictions of each row, (B, X)."""
        out = torch.zeros(len(self.index), *values_TX.shape[1:], dtype=values_TX.dtype, device=values_TX.device)
        return out.index_add_(0, self.rows_T, values_TX)


def prepared(rows: Iterable[Mapping[str, Any] | Sample]) -> list[Sample]:
    """Tokenised rows (input_ids, labels) as `ForValueScorer` reads them, with their `pixel_values` if they have any;
    samples stay as they are.

    Raises:
        ValueError: a row that cannot be scored.
    """
    prepare = RowPreparer()
    out = []
    for i, example in enumerate(rows):
        if is_preference(example) or (isinstance(example, Sample) and example.is_preference):
            raise ValueError(f"row {i} is one of preferences, for which rivals have no score: give rows to learn.")
        if isinstance(example, Sample):
            out.append(example)
            continue
        sample = sample_of(i, prepare({name: value for name, value in example.items() if name != "pixel_values"}))
        if sample.reason is not None:
            raise ValueError(f"row {i} cannot be scored: {sample.reason}")
        if "pixel_values" in example:
            (segment,) = sample.segments
            inputs = {**segment.load(), "pixel_values": torch.as_tensor(example["pixel_values"])}
            sample = replace(sample, segments=(replace(segment, inputs=inputs),))
        out.append(sample)
    return out


def batches(
    samples: Sequence[Sample], max_tokens: int | None = None, device: torch.device | None = None
) -> Iterator[Batch]:
    """Rows sorted by length, the longest first, cut so that no padded batch exceeds `max_tokens` (or one row)."""
    segments = [sample.segments[0] for sample in samples]
    lengths = [len(tokens_of(segment)) for segment in segments]
    (planned,) = plan(lengths, max_tokens or tokens_per_batch(device))
    for batch in planned:
        chosen = [segments[i] for i in batch.rows]
        inputs = pad([tokens_of(segment) for segment in chosen])
        for name in chosen[0].load().keys() - {"input_ids"}:
            inputs[name] = torch.stack([torch.as_tensor(segment.load()[name]) for segment in chosen])
        parts = (
            np.repeat(np.arange(len(chosen)), [len(segment.at) for segment in chosen]),
            np.concatenate([segment.at for segment in chosen]),
            np.concatenate([segment.target for segment in chosen]),
        )
        rows_T, at_T, target_T = (torch.from_numpy(part).to(device) for part in parts)
        moved = {name: values.to(device) for name, values in inputs.items()}
        yield Batch(torch.tensor(batch.rows), moved, rows_T, at_T, target_T)
