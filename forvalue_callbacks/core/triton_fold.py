"""The fold of `stream.py` over one tile of logits as a Triton kernel: each read once, nothing written but sums."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048


@triton.jit
def _fold(
    logits, values, labels, top, mass, weighted, logit_y, value_y,
    first, n_columns, stride, HAS_VALUES: tl.constexpr, HAS_LABELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    start = row.to(tl.int64) * stride
    highest, total, sum_of_values = tl.load(top + row), tl.load(mass + row), tl.load(weighted + row)
    for lo in range(0, n_columns, COLUMNS):
        column = lo + tl.arange(0, COLUMNS)
        inside = column < n_columns
        x = tl.load(logits + start + column, mask=inside, other=float("-inf"))
        new = tl.maximum(highest, tl.max(x, 0))
        shrink, p = tl.exp(highest - new), tl.exp(x - new)
        total = total * shrink + tl.sum(p, 0)
        if HAS_VALUES:
            value = tl.load(values + start + column, mask=inside, other=0.0)
            sum_of_values = sum_of_values * shrink + tl.sum(value * p, 0)
        highest = new
    tl.store(top + row, highest)
    tl.store(mass + row, total)
    tl.store(weighted + row, sum_of_values)
    if HAS_LABELS:
        label = tl.load(labels + row) - first
        here = (label >= 0) & (label < n_columns)
        tl.store(logit_y + row, tl.load(logits + start + label, mask=here, other=0.0), mask=here)
        if HAS_VALUES:
            tl.store(value_y + row, tl.load(values + start + label, mask=here, other=0.0), mask=here)


def fold(state: Any, block: slice, logits_TC: Tensor, value_TC: Tensor | None) -> None:
    """What `OnlineSoftmax.fold` does, `state` being one, in place.

    Args:
        logits_TC, value_TC: float32, of one shape; here they are not overwritten.
    """
    if len(logits_TC) == 0:
        return
    logits_TC = logits_TC.contiguous()
    values = logits_TC if value_TC is None else value_TC.contiguous()
    labels = state.top if state.labels is None else state.labels
    _fold[(len(logits_TC),)](
        logits_TC, values, labels, state.top, state.mass, state.weighted, state.logit_y, state.value_y,
        block.start, logits_TC.shape[1], logits_TC.stride(0),
        HAS_VALUES=value_TC is not None, HAS_LABELS=state.labels is not None, COLUMNS=COLUMNS,
    )  # fmt: skip
