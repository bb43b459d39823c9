"""Copies of rows with another answer; what a collator made of their images stays."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from .conversations import common_prefix_length
from .reader import sample_of
from .sample import Sample, Segment, next_tokens
from .sft import Row

# Inputs whose names say that they have one for each token, and those that say of what else they have.
_OF_TOKENS, _OF_OTHERS = ("_ids", "mask"), ("pixel", "image", "video", "audio", "feature")


def copy_of(sample: Sample, row: Row) -> Sample:
    """A sample of one segment with the tokens and labels of a row: its answer is another one."""
    (segment,) = sample.segments
    made = sample_of(sample.index, row)
    if segment.tokens is not None:
        return made
    answer = replace(next_tokens(partial(with_tokens, segment, row.input_ids), row.labels), read=row.input_ids)
    digest = xxhash.xxh3_64_hexdigest(f"{sample.digest}{made.digest}".encode())
    return replace(made, segments=(answer,), digest=digest)


def answer_can_change(segment: Segment) -> bool:
    """Whether the answer is of tokens that the model reads, and `with_tokens` knows which inputs have one for each."""
    if segment.tokens is not None or not segment.predicts_next:
        return segment.tokens is not None
    n = len(segment.ids)
    # Positions of several dimensions, masks of every token for every other: which dimension is which nobody says.
    named = [value for name, value in segment.load().items() if _is_of_tokens(name, value)]
    return all(value.shape[:2] == (1, n) and n not in value.shape[2:] for value in named if n in value.shape)


def _is_of_tokens(name: str, value: Any) -> bool:
    named = name.endswith(_OF_TOKENS) and not any(other in name for other in _OF_OTHERS)
    return named and isinstance(value, Tensor)


def with_tokens(segment: Segment, ids: np.ndarray) -> dict[str, Any]:
    """What a collator made of a row, with other tokens: what there is one of for each token (a mask, types of tokens)
    is for the new ones as it was for the first of those that were in their place.

    Args:
        ids: int64 (L,), which begin as those of the row.
    """
    inputs, old = dict(segment.load()), segment.ids
    n = min(len(old), len(ids)) - 1
    start = common_prefix_length(old[:n].tolist(), ids[:n].tolist())
    same = common_prefix_length(old[start:][::-1].tolist(), ids[start:][::-1].tolist())
    new = len(ids) - start - same
    for name, value in inputs.items():
        if not _is_of_tokens(name, value) or value.shape[:2] != (1, len(old)):
            continue
        if name == "position_ids":
            behind = value[:, start - 1 : start] + torch.arange(1, new + same + 1)
            inputs[name] = torch.cat([value[:, :start], behind], 1)
        else:
            between = value[:, start : start + 1].expand(1, new, *value.shape[2:])
            inputs[name] = torch.cat([value[:, :start], between, value[:, len(old) - same :]], 1)
    return {**inputs, "input_ids": torch.from_numpy(ids)[None]}
