"""Rows by what the validation rows, once known, change in their loss: shown in the context, or trained on.

Forward passes on tokenised rows (`input_ids`, `labels`); float64 (N,), in nats per labelled token. Higher is more
valuable: the validation rows teach what such a row says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..data.sample import Sample
from ..model.backbone import Backbone
from .batches import Batch, prepared
from .forward import counts, log_likelihoods, loss, pooled

Rows = Iterable[Mapping[str, Any]]


def rho_loss(model: nn.Module, fitted: nn.Module, rows: Rows) -> Tensor:
    """RHO-loss (arXiv 2206.07137, Eq. 3): `loss of the model - loss of a model fitted on the validation rows`, (N,).

    The second is the irreducible loss: high where a row is noise, or not of the validation rows' kind. The paper takes
    the first anew in every step of a run; here it is that of one model, before training or at a checkpoint.

    Args:
        fitted: a model that was trained on the validation rows alone; it need not be of the same kind.
    """
    items = prepared(rows)
    return loss(fitted, items) - loss(model, items)


def in_context(model: nn.Module, rows: Rows, validation: Rows, *, k: int = 3) -> Tensor:
    """In-context approximation (ICA, arXiv 2510.14459): `loss - loss behind k validation rows as context`, (N,).

    The rows of the context stand for a model fitted on them, so that it is `rho_loss` without training. They are those
    whose prompts are nearest to the row's, the nearest last: by the cosine of mean hidden states of the prompts alone,
    for a wrong answer would bring along the rows where it is right. Tokens follow one another as they are; a row
    without a prompt is compared by its first token. Costs two passes over the rows, one of them some `k + 1` times as
    long, and one over the prompts of both sides to find who is near.

    Raises:
        ValueError: `k` is not between 1 and the number of validation rows, rows that are more than tokens, a context
            longer than the model's.
    """
    items, known = prepared(rows), prepared(validation)
    if not 1 <= k <= len(known):
        raise ValueError(f"in_context: k={k} of {len(known)} validation rows")
    if any(segment.load().keys() != {"input_ids"} for item in (*items, *known) for segment in item.segments):
        raise ValueError("in_context: rows with images or other inputs beside their tokens have no place in a context")
    similar_NM = _prompts(model, items) @ _prompts(model, known).T
    nearest_Nk = similar_NM.topk(k, dim=1).indices.flip(1).tolist()
    behind = [_behind([known[j] for j in places], item) for places, item in zip(nearest_Nk, items, strict=True)]
    longest = max(item.n_read for item in behind)
    limit = getattr(Backbone(model).causal.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(f"in_context: {longest} tokens, and the model takes {limit}: lower k={k}")
    return (log_likelihoods(model, behind) - log_likelihoods(model, items)) / counts(items)


def _prompts(model: nn.Module, items: list[Sample]) -> Tensor:
    """Mean hidden states of the prompts, of unit length, float64 (N, D)."""
    cut = []
    for item in items:
        (segment,) = item.segments
        assert segment.tokens is not None
        n = max(1, segment.n_prompt)
        inputs = {**segment.load(), "input_ids": segment.tokens[:n]}
        cut.append(replace(item, segments=(replace(segment, inputs=inputs, at=np.array([0]), target=np.array([0])),)))
    return nn.functional.normalize(pooled(model, cut, _mean), dim=1)


def _mean(hidden_BLD: Tensor, batch: Batch) -> Tensor:
    real_BL = batch.inputs["attention_mask"].to(hidden_BLD.dtype)
    return (hidden_BLD * real_BL[:, :, None]).sum(1) / real_BL.sum(1, keepdim=True)


def _behind(context: list[Sample], item: Sample) -> Sample:
    """The row behind others, which are not learnt."""
    (segment,) = item.segments
    tokens = [other.segments[0].tokens for other in context]
    ids = np.concatenate([*tokens, segment.tokens])
    moved = len(ids) - len(segment.tokens)  # type: ignore[arg-type]
    there = replace(segment, inputs={"input_ids": ids}, at=segment.at + moved, n_prompt=segment.n_prompt + moved)
    return replace(item, segments=(there,))
