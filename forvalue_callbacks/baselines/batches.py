"""Tokenised rows to padded batches, for the baselines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rows import Row, RowPreparer
from ..scorer import tokens_per_batch


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
    max_tokens = max_tokens or tokens_per_batch(device)
    order = sorted(range(len(items)), key=lambda i: -len(items[i].input_ids))
    while order:
        longest = len(items[order[0]].input_ids)
        chosen, order = order[: max(1, max_tokens // longest)], order[max(1, max_tokens // longest) :]
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for k, i in enumerate(chosen):
            length = len(items[i].input_ids)
            ids[k, :length] = torch.from_numpy(items[i].input_ids)
            mask[k, :length] = 1
            labels[k, :length] = torch.from_numpy(items[i].labels)
        yield Batch(
            torch.tensor(chosen), {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, labels.to(device)
        )
