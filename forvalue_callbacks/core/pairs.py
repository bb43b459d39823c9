"""Inner products of the gradients of two rows, and norms of one: over pairs of positions and blocks of the vocabulary.

Shapes and symbols of `stream.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import Head, factor, working_dtype
from .stream import blocks, errors, log_normalizer, tile_sizes

# Pairs of positions: errors of PAIR_TILE x VOCAB_BLOCK on both sides are made for a product of PAIR_TILE x PAIR_TILE,
# so that making them costs 2 D / PAIR_TILE of it. 64 MB for the product, 32 MB for each side.
PAIR_TILE = 4096


def score_pairs(
    head: Head,
    hidden_TD: Tensor,
    labels_T: Tensor,
    rows_T: Tensor,
    n_rows: int,
    other_hidden_TD: Tensor,
    other_labels_T: Tensor,
    other_rows_T: Tensor,
    n_other_rows: int,
    *,
    other_metric_TD: Tensor | None = None,
    token_tile: int | None = None,
    vocab_block: int | None = None,
) -> Tensor:
    """`<G(z), G(v)>` for every pair of rows, (n_rows, n_other_rows): `sum_{t, t'} <e_t, e_t'> <h_t, h_t'>`.

    Paper, Eq. 1.
    The inner products of the errors are accumulated over blocks of the vocabulary, so nothing of the size of the
    vocabulary is kept. `rows_T` names the row of each position. `other_metric_TD` replaces the other side's hidden
    states in `<h, h'>` (for a score in another metric, `<h, M h'>`).
    """
    dtype = working_dtype(head.weight, hidden_TD, other_hidden_TD)
    token_tile, vocab_block = tile_sizes(hidden_TD, token_tile or PAIR_TILE, vocab_block)
    out = torch.zeros(n_rows, n_other_rows, dtype=torch.float64, device=hidden_TD.device)
    others = [(tile, factor(head, other_hidden_TD[tile], dtype)) for tile in blocks(len(other_hidden_TD), token_tile)]
    other_log_norms = [log_normalizer(head, other_hidden, vocab_block) for _, other_hidden in others]
    for tile in blocks(len(hidden_TD), token_tile):
        hidden, labels = factor(head, hidden_TD[tile], dtype), labels_T[tile]
        log_norm = log_normalizer(head, hidden, vocab_block)
        for (other, other_hidden), other_log_norm in zip(others, other_log_norms, strict=True):
            other_labels = other_labels_T[other]
            products = hidden.new_zeros(len(hidden), len(other_hidden), dtype=dtype)
            for block in blocks(head.vocab_size, vocab_block):
                left = errors(head, hidden, labels, log_norm, block)
                right = errors(head, other_hidden, other_labels, other_log_norm, block)
                products.addmm_(left, right.T)
            metric = (other_hidden if other_metric_TD is None else other_metric_TD[other]).to(dtype)
            products.mul_(hidden.to(dtype) @ metric.T)
            per_row = products.new_zeros(n_rows, len(other_hidden), dtype=torch.float64)
            per_row.index_add_(0, rows_T[tile], products.double())
            out.index_add_(1, other_rows_T[other], per_row)
    return out


def squared_norms(
    head: Head,
    hidden_TD: Tensor,
    labels_T: Tensor,
    lengths: list[int],
    *,
    metric_TD: Tensor | None = None,
    weights_T: Tensor | None = None,
    token_tile: int | None = None,
    vocab_block: int | None = None,
) -> Tensor:
    """`||G(z)||^2` of each row, (N,), from its token pairs: `sum_{t, t'} <e_t, e_t'> <h_t, h_t'>` within the row.

    Args:
        lengths: labelled positions of each row, in the order in which they follow one another in `hidden_TD`.
        metric_TD: replaces one side's hidden states, for the norm in another metric.
        weights_T: of the positions: `G = sum_t w_t e_t h_t^T`; None: all are 1.
    """
    dtype = working_dtype(head.weight, hidden_TD)
    token_tile, vocab_block = tile_sizes(hidden_TD, token_tile, vocab_block)
    out = torch.zeros(len(lengths), dtype=torch.float64, device=hidden_TD.device)
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    while order:
        longest = lengths[order[-1]]
        if longest == 0:
            break
        group = order[-max(1, token_tile // longest) :]
        del order[-len(group) :]
        # A padded (rows, longest, D) copy of rows alike in length, so that all their Gram matrices are one product.
        place = torch.zeros(len(group), longest, dtype=torch.long)
        real = torch.zeros(len(group), longest, dtype=torch.bool)
        for k, i in enumerate(group):
            place[k, : lengths[i]] = torch.arange(starts[i], starts[i + 1])
            real[k, : lengths[i]] = True
        place, real = place.to(hidden_TD.device), real.to(hidden_TD.device)
        hidden, labels = hidden_TD[place].to(dtype), labels_T[place].flatten()
        flat = factor(head, hidden_TD[place].flatten(0, 1), dtype)
        log_norm = log_normalizer(head, flat, vocab_block)
        gram = hidden.new_zeros(len(group), longest, longest)
        for block in blocks(head.vocab_size, vocab_block):
            error = errors(head, flat, labels, log_norm, block).unflatten(0, real.shape)
            error.mul_(real[:, :, None])
            gram.baddbmm_(error, error.mT)
        if weights_T is not None:
            weight = weights_T[place].to(gram)
            gram = gram * weight[:, :, None] * weight[:, None, :]
        metric = hidden if metric_TD is None else metric_TD[place].to(dtype)
        out[group] = (gram * (hidden @ metric.mT)).sum((1, 2), dtype=torch.float64)
    return out
