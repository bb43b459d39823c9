"""Baselines that cost forward passes alone, on tokenised rows (`input_ids`, `labels`). Higher is more valuable.

Pairwise ones return float64 (N, M) like `ForValueScorer.pairwise`, those without a validation side float64 (N,).
All raise ValueError for a row that cannot be scored and for a head that `Backbone` refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import core
from ..data.sample import Sample, Segment, answer_alone
from ..model.backbone import Backbone, left_as_found
from .batches import Batch, batches, prepared

Rows = Iterable[Mapping[str, Any]]


def emb(model: nn.Module, rows: Rows, validation: Rows, *, cosine: bool = False) -> Tensor:
    """`< sum_t h_t, sum_t' h_t' >` over the positions that predict labelled tokens, (N, M).

    "Emb" of arXiv 2508.10180. Raw, it follows the length of the row; `cosine=True` divides by both norms.
    """
    return _inner(pooled(model, rows, _sum), pooled(model, validation, _sum), cosine)


def rds_plus(model: nn.Module, rows: Rows, validation: Rows) -> Tensor:
    """RDS+ (arXiv 2503.01807): cosine of position-weighted mean hidden states, (N, M).

    `sum_t t h_t / sum_t t` over all tokens of the row, t = 1, 2, ...: the prompt counts too, as published.
    """
    return _inner(pooled(model, rows, _position_weighted), pooled(model, validation, _position_weighted), True)


def loss(model: nn.Module, rows: Rows | list[Sample]) -> Tensor:
    """Mean log-likelihood of the labelled tokens, (N,): minus the loss, so that well-predicted rows are high."""
    items = prepared(rows)
    return log_likelihoods(model, items) / counts(items)


def log_likelihoods(model: nn.Module, rows: Rows | list[Sample]) -> Tensor:
    """Sum of log p over the labelled tokens of each row, (N,); 0 without any."""
    items, backbone = prepared(rows), Backbone(model)
    out = torch.zeros(len(items), dtype=torch.float64)
    with left_as_found(model):
        head = backbone.head()
        for batch in batches(items, device=backbone.device):
            hidden_TD = batch.pick(backbone.hidden_states(batch.inputs))
            log_p_T = core.log_likelihood_tokens(head, hidden_TD, batch.target_T).double()
            out[batch.index] = batch.sum(log_p_T).cpu()
    return out


def pmi(model: nn.Module, rows: Rows, *, bos_token_id: int | None = None) -> Tensor:
    """Pointwise mutual information of prompt and answer: mean of `log p(answer | prompt) - log p(answer)`, (N,).

    The answer is the labelled tokens; alone, without an image too, it follows the BOS token (default: that of the
    model's config). Without one its first token cannot be predicted and counts on neither side; an answer of one token
    then has the value 0. A row without a prompt, labelled from its second token on, has 0 up to the BOS token.
    """
    items = prepared(rows)
    backbone = Backbone(model)
    if bos_token_id is None:
        bos_token_id = backbone.causal.config.get_text_config().bos_token_id
    given, alone = _with_and_without_prompt(items, bos_token_id)
    n_labelled = counts(given)
    difference = log_likelihoods(model, given) - log_likelihoods(model, alone)
    return torch.where(n_labelled > 0, difference / n_labelled.clamp(min=1), 0.0)


def ifd(model: nn.Module, rows: Rows, *, bos_token_id: int | None = None) -> Tensor:
    """Instruction-following difficulty (arXiv 2308.12032): `ppl(answer | prompt) / ppl(answer)`, (N,).

    As published the hardest rows are the most valuable (higher is better), and rows at or above 1, where the prompt
    does not help at all, are thrown out: here those have the negative of their ratio, below all others.
    `ppl(...) = exp(-mean log p)`, so that the ratio is `exp(-pmi)`.
    """
    ratio = (-pmi(model, rows, bos_token_id=bos_token_id)).exp()
    return torch.where(ratio < 1, ratio, -ratio)


def pooled(model: nn.Module, rows: Rows | list[Sample], pool: Callable[[Tensor, Batch], Tensor]) -> Tensor:
    """One vector per row, float64 (N, D)."""
    backbone, items = Backbone(model), prepared(rows)
    out: Tensor | None = None
    with left_as_found(model):
        for batch in batches(items, device=backbone.device):
            hidden_BLD = backbone.hidden_states(batch.inputs)
            if out is None:
                out = torch.zeros(len(items), hidden_BLD.shape[2], dtype=torch.float64)
            hidden_BLD = hidden_BLD.to(core.working_dtype(hidden_BLD))
            out[batch.index] = pool(hidden_BLD, batch).double().cpu()
    if out is None:
        raise ValueError("no rows")
    return out


def _sum(hidden_BLD: Tensor, batch: Batch) -> Tensor:
    return batch.sum(batch.pick(hidden_BLD))


def _position_weighted(hidden_BLD: Tensor, batch: Batch) -> Tensor:
    real_BL = batch.inputs["attention_mask"]
    weight_BL = (real_BL.cumsum(1) * real_BL).to(hidden_BLD.dtype)
    return (hidden_BLD * weight_BL[:, :, None]).sum(1) / weight_BL.sum(1, keepdim=True)


def _inner(rows_ND: Tensor, validation_MD: Tensor, cosine: bool) -> Tensor:
    if cosine:
        rows_ND, validation_MD = (nn.functional.normalize(x, dim=1) for x in (rows_ND, validation_MD))
    return rows_ND @ validation_MD.T


def counts(items: list[Sample]) -> Tensor:
    """Labelled tokens of each row, float64 (N,)."""
    return torch.tensor([item.n_labelled for item in items], dtype=torch.float64)


def _with_and_without_prompt(items: list[Sample], bos_token_id: int | None) -> tuple[list[Sample], list[Sample]]:
    """The rows, and their labelled tokens alone, with the same tokens predicted in both."""
    given, alone = [], []
    for item in items:
        (segment,) = item.segments
        answer = segment.target
        if bos_token_id is not None:
            behind = answer_alone(replace(segment, inputs={"input_ids": segment.tokens}), bos_token_id)
        else:
            segment = replace(segment, at=segment.at[1:], target=answer[1:])
            behind = Segment({"input_ids": answer}, np.arange(len(answer) - 1), answer[1:])
        given.append(replace(item, segments=(segment,)))
        alone.append(replace(item, segments=(behind,)))
    return given, alone
