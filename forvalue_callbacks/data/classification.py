"""Rows of a classifier: a class of each row, or of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .labels import in_place, labels_of, without_labels
from .reasons import UnscorableError
from .sample import Segment


def sequence_segment(batch: Mapping[str, Any], n_classes: int) -> Segment:
    """What a collator makes of one row with one class, `labels` (1,) or `label`, as a segment of one position.

    Raises:
        UnscorableError: no class, several (multi-label), or one that the model does not know.
    """
    labels = labels_of(batch)
    if labels.numel() != 1:
        raise UnscorableError(
            f"the data_collator makes 'labels' of shape {tuple(labels.shape)} of one row: For-Value scores "
            "classifiers of sequences by one class a row"
        )
    at, target = in_place(labels.reshape(1), n_classes)
    return Segment(without_labels(batch), at, target)


def token_segment(batch: Mapping[str, Any], n_classes: int) -> Segment:
    """What a collator makes of one row with a class for each token, `labels` (1, L), -100 where there is none.

    The class at a place is that of the token there: nothing is shifted.

    Raises:
        UnscorableError: no class, classes that are not one a token, or one that the model does not know.
    """
    labels, inputs = labels_of(batch), without_labels(batch)
    shape = tuple(torch.as_tensor(inputs["input_ids"]).shape) if "input_ids" in inputs else tuple(labels.shape)
    if labels.ndim != 2 or len(labels) != 1 or tuple(labels.shape) != shape:
        raise UnscorableError(
            f"the data_collator makes 'input_ids' of shape {shape} and 'labels' of shape {tuple(labels.shape)} of one "
            "row: classifiers of tokens need one label for each, both (1, tokens)"
        )
    at, target = in_place(labels[0], n_classes)
    return Segment(inputs, at, target)
