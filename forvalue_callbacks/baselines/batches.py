"""Tokenised rows to padded batches, for the baselines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batching import cut, pad, tokens_per_batch
from ..rows import Row, RowPreparer


@dataclass
class Batch:
    """Rows padded on the right: `inputs` for the model, `labels` (B, L) aligned with them, -100 = not labelled."""

    index: Tensor  # (B,) the rows' places in the data set
    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def predicts(self) -> Tensor:
        """(B, L - 1): whether position t predicts a labelled token."""
        return self.labels[:, 1:] != -100


def prepared(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Tokenised rows (input_ids, labels) as `ForValueScorer` reads them.

    Raises:
        ValueError: a row that cannot be scored.
    """
    prepare = RowPreparer()
    out = [prepare(row) for row in rows]
    for i, row in enumerate(out):
        if row.reason is not None:
            raise ValueError(f"row {i} cannot be scored: {row.reason}")
    return out


def batches(
    items: Sequence[Row], max_tokens: int | None = None, device: torch.device | None = None
) -> Iterator[Batch]:
    """Rows sorted by length, the longest first, cut so that no padded batch exceeds `max_tokens` (or one row)."""
    for chosen in cut([len(item.input_ids) for item in items], max_tokens or tokens_per_batch(device)):
        inputs = {name: values.to(device) for name, values in pad([items[i] for i in chosen]).items()}
        yield Batch(torch.tensor(chosen), inputs, inputs.pop("labels"))
