"""Labels that stand where they are predicted, and are not shifted: of a decoder's positions, and of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .reasons import UnscorableError
from .sample import IGNORED


def in_place(labels: Tensor, n_outputs: int, column: str = "labels") -> tuple[np.ndarray, np.ndarray]:
    """Positions that have a label, and their labels, int64 (T,) each.

    Args:
        labels: (L,), the label of each position or -100.
        n_outputs: how many tokens, or classes, the head tells apart.

    Raises:
        UnscorableError: no label, or one that the head has no output for.
    """
    values = labels.cpu().numpy().astype(np.int64)
    at = np.flatnonzero(values != IGNORED)
    target = values[at]
    if not len(at):
        raise UnscorableError(f"no labels in {column!r} that are trained on")
    if target.min() < 0 or target.max() >= n_outputs:
        wrong = target.min() if target.min() < 0 else target.max()
        raise UnscorableError(f"label {wrong} in {column!r}, but the model's head has outputs 0 to {n_outputs - 1}")
    return at, target


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """The labels of a batch of one row, as integers.

    Raises:
        UnscorableError: there are none, or they are no integers.
    """
    values = batch.get("labels", batch.get("label"))
    if values is None:
        raise UnscorableError("no 'labels' (nor 'label') after the data_collator: give the row what it is to predict")
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnscorableError("'labels' that are no tensor after the data_collator: give them as integers") from error
    if labels.is_floating_point():
        raise UnscorableError(
            "'labels' of floating-point numbers (regression, or several labels a row): For-Value scores labels that "
            "are one of several, as integers"
        )
    return labels


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is run on."""
    return {
        name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value
        for name, value in batch.items()
        if name not in ("labels", "label") and value is not None
    }
