"""Tokenised rows to padded batches, for the baselines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.sft import Row, RowPreparer
from ..model.run import cut, pad, tokens_per_batch


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


@dataclass(frozen=True)
class ModelRow(Row):
    """A row with what the model takes beside its tokens, such as `pixel_values`, of one shape for all rows."""

    inputs: dict[str, Tensor] = field(default_factory=dict)


def prepared(rows: Iterable[Mapping[str, Any]]) -> list[ModelRow]:
    """Tokenised rows (input_ids, labels) as `ForValueScorer` reads them, with their `pixel_values` if they have any.

    Raises:
        ValueError: a row that cannot be scored.
    """
    prepare = RowPreparer()
    out = []
    for i, example in enumerate(rows):
        row = prepare({name: value for name, value in example.items() if name != "pixel_values"})
        if row.reason is not None:
            raise ValueError(f"row {i} cannot be scored: {row.reason}")
        pixels = {"pixel_values": torch.as_tensor(example["pixel_values"])} if "pixel_values" in example else {}
        out.append(ModelRow(row.input_ids, row.labels, inputs=pixels))
    return out


def batches(
    items: Sequence[ModelRow], max_tokens: int | None = None, device: torch.device | None = None
) -> Iterator[Batch]:
    """Rows sorted by length, the longest first, cut so that no padded batch exceeds `max_tokens` (or one row)."""
    for chosen in cut([len(item.input_ids) for item in items], max_tokens or tokens_per_batch(device)):
        rows = [items[i] for i in chosen]
        further = {name: torch.stack([row.inputs[name] for row in rows]) for name in rows[0].inputs}
        inputs = {name: values.to(device) for name, values in {**pad(rows), **further}.items()}
        yield Batch(torch.tensor(chosen), inputs, inputs.pop("labels"))
