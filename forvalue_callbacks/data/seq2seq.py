"""Rows of an encoder-decoder: the encoder reads the prompt, the decoder's positions predict the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .labels import in_place, labels_of, without_labels
from .reasons import SetUpError, UnscorableError
from .sample import IGNORED, Segment


def shifted_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """Inputs of a decoder, (B, L), that predict `labels` (B, L): the start token, and all labels but the last."""
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORED, pad)


def decoder_segment(batch: Mapping[str, Any], decoder_inputs: Callable[[Tensor], Tensor], vocab_size: int) -> Segment:
    """What a collator makes of one row (`DataCollatorForSeq2Seq`: `input_ids`, `labels`, ...) as a segment.

    The decoder reads the labels moved by one place, so that position t predicts `labels[t]`: the labels themselves
    are not shifted again.

    Args:
        batch: inputs of the encoder, `labels` (1, L), and perhaps `decoder_input_ids` (1, L).
        decoder_inputs: makes `decoder_input_ids` of labels, where the batch has none (`Backbone.decoder_inputs`).
        vocab_size: of the head.

    Raises:
        UnscorableError: no labels to predict, or shapes that do not belong together.
    """
    labels, inputs = labels_of(batch), without_labels(batch)
    if labels.ndim != 2 or len(labels) != 1 or not labels.numel():
        raise UnscorableError(
            f"the data_collator makes 'labels' of shape {tuple(labels.shape)} of one row: it must be (1, tokens)"
        )
    at, target = in_place(labels[0], vocab_size)
    _refuse_causal(inputs.get("input_ids"), labels)
    if "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = decoder_inputs(labels.long())
    shape = tuple(torch.as_tensor(inputs["decoder_input_ids"]).shape)
    if shape != tuple(labels.shape):
        raise UnscorableError(
            f"the data_collator makes 'decoder_input_ids' of shape {shape} and 'labels' of shape "
            f"{tuple(labels.shape)} of one row: each position of the decoder predicts the label at its place"
        )
    return Segment(inputs, at, target)


def _refuse_causal(ids: Any, labels: Tensor) -> None:
    """Labels that begin with a masked prompt and go on as the inputs do, place by place, are not an encoder-decoder's:
    its encoder would read the answer."""
    if not isinstance(ids, Tensor) or ids.shape != labels.shape or labels[0, 0] != IGNORED:
        return
    if ((labels == IGNORED) | (labels == ids)).all():
        raise SetUpError(
            "'labels' are those of a causal language model (a masked prompt, then the same tokens as in 'input_ids'), "
            "and the encoder would read the answer: give the prompt in 'input_ids' and the answer in 'labels'"
        )
