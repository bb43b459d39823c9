"""The equations of For-Value (arXiv 2508.10180) on plain tensors, streamed over blocks of the vocabulary.

Imports torch and nothing else of the stack. Every function is the exact full-vocabulary value of the naive code in its
docstring; none of them allocates tokens x vocabulary, nor vocabulary x hidden per row.

Shapes      V vocabulary, D hidden size, C one block of the vocabulary, T labelled positions of some rows, N rows
Symbols     W (V, D) unembedding, h_t (D) input of the head at position t, y_t the token predicted there
            f_t = transform(W h_t + b) logits, p_t = softmax(f_t)
            e_t = df_t/d(W h_t) * (onehot(y_t) - p_t)            prediction error (paper: e_{y} - pi)
            G   = sum_t e_t h_t^T = d/dW sum_t log p_t(y_t)      (paper, Eq. 2: one factor of the inner product)

Arithmetic is float32 (float64 when the head or the hidden states are), whatever the dtype of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from .head import Head, factor, product, working_dtype

logger = logging.getLogger(__name__)

# One tile of logits is TOKEN_TILE x VOCAB_BLOCK: 8 MB in float32, so that the passes over it stay in the cache while
# the two products that fill it are still large enough to run at full speed.
TOKEN_TILE = 1024
VOCAB_BLOCK = 2048
# On an accelerator a product must be larger to outweigh its launch: 128 MB.
ACCELERATOR_TOKEN_TILE, ACCELERATOR_VOCAB_BLOCK = 4096, 8192


def tile_for(device: torch.device) -> int:
    """How many positions meet a block of the vocabulary at once."""
    return TOKEN_TILE if device.type == "cpu" else ACCELERATOR_TOKEN_TILE


def tile_sizes(like: Tensor, token_tile: int | None, vocab_block: int | None) -> tuple[int, int]:
    """Tile and block as given, or by the device."""
    block = VOCAB_BLOCK if like.device.type == "cpu" else ACCELERATOR_VOCAB_BLOCK
    return token_tile or tile_for(like.device), vocab_block or block


def blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(lo, min(lo + size, n)) for lo in range(0, n, size))


class OnlineSoftmax:
    """log sum exp, the mean of a value under the softmax, and both at the labels, folded over blocks of vocabulary.

    Args:
        hidden_TD: the positions, for their number and device.
        dtype: of the sums.
        labels_T: where to pick; None: nowhere.
    """

    def __init__(self, hidden_TD: Tensor, dtype: torch.dtype, labels_T: Tensor | None = None):
        def new(value: float) -> Tensor:
            return torch.full((len(hidden_TD),), value, dtype=dtype, device=hidden_TD.device)

        self.labels = labels_T
        self.top, self.mass, self.weighted = new(-torch.inf), new(0.0), new(0.0)
        self.logit_y, self.value_y = new(0.0), new(0.0)

    def fold(self, block: slice, logits_TC: Tensor, value_TC: Tensor | None = None) -> None:
        """Take in one block; overwrites both arguments."""
        if logits_TC.is_cuda and logits_TC.dtype == torch.float32 and (kernel := fold_kernel()) is not None:
            kernel(self, block, logits_TC, value_TC)
            return
        if self.labels is not None:
            self.logit_y = pick(self.logit_y, logits_TC, self.labels, block)
            if value_TC is not None:
                self.value_y = pick(self.value_y, value_TC, self.labels, block)
        top = torch.maximum(self.top, logits_TC.amax(-1))
        shrink = (self.top - top).exp_()
        mass_TC = logits_TC.sub_(top[:, None]).exp_()
        self.mass = self.mass * shrink + mass_TC.sum(-1)
        if value_TC is not None:
            self.weighted = self.weighted * shrink + value_TC.mul_(mass_TC).sum(-1)
        self.top = top

    def log_normalizer(self) -> Tensor:
        return self.top + self.mass.log()

    def log_likelihood(self) -> Tensor:
        return self.logit_y - self.log_normalizer()

    def surplus(self) -> Tensor:
        """The value at the label, minus its mean."""
        return self.value_y - self.weighted / self.mass


@cache
def fold_kernel() -> Callable[..., None] | None:
    """The fold as one Triton kernel, None where Triton is missing or cannot build it (it needs a C compiler)."""
    try:
        from .triton_fold import fold

        probe = torch.zeros(1, 1, device="cuda")
        fold(OnlineSoftmax(probe, torch.float32), slice(0, 1), probe, None)
    except Exception as error:  # whatever is wrong with a compiler: the fold in torch gives the same numbers
        logger.warning("the fold runs in torch, twice as slow: no Triton kernel (%s: %s)", type(error).__name__, error)
        return None
    return fold


def pick(out_T: Tensor, value_TC: Tensor, labels_T: Tensor, block: slice) -> Tensor:
    """out_T with value_TC[t, y_t] written where y_t lies in the block (no synchronisation, unlike a masked index)."""
    inside = (labels_T >= block.start) & (labels_T < block.stop)
    column = (labels_T - block.start).clamp(0, value_TC.shape[1] - 1)
    return torch.where(inside, value_TC.gather(1, column[:, None])[:, 0], out_T)


def log_normalizer(head: Head, hidden_TD: Tensor, vocab_block: int | None = None) -> Tensor:
    """`torch.logsumexp(head.logits(hidden), -1)`, (T,)."""
    dtype = working_dtype(head.weight, hidden_TD)
    hidden_TD = factor(head, hidden_TD, dtype)
    fold = OnlineSoftmax(hidden_TD, dtype)
    for block in blocks(head.vocab_size, tile_sizes(hidden_TD, None, vocab_block)[1]):
        fold.fold(block, head.logits(hidden_TD, block))
    return fold.log_normalizer()


def errors(head: Head, hidden_TD: Tensor, labels_T: Tensor, log_norm_T: Tensor, block: slice) -> Tensor:
    """Prediction errors e_t on one block of the vocabulary, (T, C): `slope * (onehot(y) - softmax(logits))`."""
    logits_TC = head.logits(hidden_TD, block)
    slope = head.slope(logits_TC)
    errors_TC = logits_TC.sub_(log_norm_T[:, None]).exp_().neg_()
    column = labels_T - block.start
    inside = (column >= 0) & (column < errors_TC.shape[1])
    errors_TC.scatter_add_(1, column.clamp(0, errors_TC.shape[1] - 1)[:, None], inside[:, None].to(errors_TC.dtype))
    return errors_TC.mul_(slope)


def add_gradient(
    out_VD: Tensor,
    head: Head,
    hidden_TD: Tensor,
    labels_T: Tensor,
    *,
    weights_T: Tensor | None = None,
    token_tile: int | None = None,
    vocab_block: int | None = None,
) -> Tensor:
    """Add `G = sum_t e_t h_t^T` to `out_VD`: the gradient of `sum_t log p_t(y_t)` in W (paper, Eq. 2).

    Naive: `e.T @ hidden`. The log-normaliser first, then `out[block] += e_block^T H`.

    Args:
        out_VD: accumulator, (V, D), changed in place.
        hidden_TD: inputs of the head at the labelled positions, (T, D).
        labels_T: the tokens predicted there, (T,).
        weights_T: of the positions, (T,): `G = sum_t w_t e_t h_t^T`; None: all are 1.
    """
    dtype = working_dtype(head.weight, hidden_TD)
    token_tile, vocab_block = tile_sizes(hidden_TD, token_tile, vocab_block)
    for tile in blocks(len(hidden_TD), token_tile):
        hidden, labels = factor(head, hidden_TD[tile], dtype), labels_T[tile]
        states = hidden.to(out_VD.dtype)
        if weights_T is not None:
            states = states * weights_T[tile].to(states)[:, None]
        log_norm = log_normalizer(head, hidden, vocab_block)
        for block in blocks(head.vocab_size, vocab_block):
            out_VD[block].addmm_(errors(head, hidden, labels, log_norm, block).T.to(out_VD.dtype), states)
    return out_VD


def log_likelihood_tokens(
    head: Head, hidden_TD: Tensor, labels_T: Tensor, *, token_tile: int | None = None, vocab_block: int | None = None
) -> Tensor:
    """`log_softmax(logits)[t, labels[t]]`, (T,)."""
    dtype = working_dtype(head.weight, hidden_TD)
    token_tile, vocab_block = tile_sizes(hidden_TD, token_tile, vocab_block)
    log_p = []
    for tile in blocks(len(hidden_TD), token_tile):
        hidden = factor(head, hidden_TD[tile], dtype)
        fold = OnlineSoftmax(hidden, dtype, labels_T[tile])
        for block in blocks(head.vocab_size, vocab_block):
            fold.fold(block, head.logits(hidden, block))
        log_p.append(fold.log_likelihood())
    return _join(log_p, hidden_TD, dtype)


def score_tokens(
    head: Head,
    direction_VD: Tensor,
    hidden_TD: Tensor,
    labels_T: Tensor,
    *,
    token_tile: int | None = None,
    vocab_block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score of each labelled position, `<direction, e_t h_t^T>`, and its log-likelihood.

    Naive::

        score = (e * (hidden @ direction.T)).sum(-1)         # with q = D h: q[y] - sum_u p[u] q[u]
        log_p = log_softmax(logits)[t, labels[t]]

    The sum over a row's positions is the row's For-Value score (paper, Eq. 1 and 2): the derivative of its
    log-likelihood when the head moves from W to W + eps * direction. Costs two products of (T, D) with (V, D).

    Returns:
        score_T, log_likelihood_T: both (T,).
    """
    dtype = working_dtype(head.weight, hidden_TD, direction_VD)
    token_tile, vocab_block = tile_sizes(hidden_TD, token_tile, vocab_block)
    scores, log_p = [], []
    for tile in blocks(len(hidden_TD), token_tile):
        hidden = factor(head, hidden_TD[tile], dtype)
        fold = OnlineSoftmax(hidden, dtype, labels_T[tile])
        for block in blocks(head.vocab_size, vocab_block):
            logits = head.logits(hidden, block)
            gain = product(hidden, direction_VD[block])
            slope = head.slope(logits)
            if not isinstance(slope, float) or slope != 1.0:
                gain = gain.mul_(slope)
            fold.fold(block, logits, gain)
        scores.append(fold.surplus())
        log_p.append(fold.log_likelihood())
    return _join(scores, hidden_TD, dtype), _join(log_p, hidden_TD, dtype)


def gain_tokens(
    head: Head,
    move_VD: Tensor,
    hidden_TD: Tensor,
    labels_T: Tensor,
    *,
    token_tile: int | None = None,
    vocab_block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each labelled position after the head moves from W to W + move, minus before; and before.

    Naive: `log_softmax(transform(hidden @ (W + move).T + b))[t, labels[t]]`, minus the same with W. The finite step of
    which `score_tokens` is the derivative; costs the same two products.

    Returns:
        gain_T, log_likelihood_T: both (T,).
    """
    dtype = working_dtype(head.weight, hidden_TD, move_VD)
    token_tile, vocab_block = tile_sizes(hidden_TD, token_tile, vocab_block)
    gains, log_p = [], []
    for tile in blocks(len(hidden_TD), token_tile):
        hidden = factor(head, hidden_TD[tile], dtype)
        before, after = (OnlineSoftmax(hidden, dtype, labels_T[tile]) for _ in range(2))
        for block in blocks(head.vocab_size, vocab_block):
            linear = head.linear(hidden, block)
            moved = head.transform(product(hidden, move_VD[block]).add_(linear))
            before.fold(block, head.transform(linear))
            after.fold(block, moved)
        log_p.append(before.log_likelihood())
        gains.append(after.log_likelihood() - log_p[-1])
    return _join(gains, hidden_TD, dtype), _join(log_p, hidden_TD, dtype)


def _join(tiles: list[Tensor], hidden_TD: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat(tiles) if tiles else hidden_TD.new_zeros(0, dtype=dtype)
