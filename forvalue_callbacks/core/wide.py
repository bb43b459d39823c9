"""Several directions and fitted heads in one pass over the vocabulary: the logits once, and of them one wide product.

The score along a direction D is `e_t^T D h_t`. `stream.py` makes `D h_t` for each token of the vocabulary; here
`e_t^T D` is made, (T, D), in as many operations, side by side for all directions. It meets any metric afterwards:
`e_t^T (D M) h_t = (e_t^T D) (M h_t)`. A fitted head moves the rows of few tokens, and so changes few logits.

The label is left out of all sums over the softmax, and `1 - p_t(y_t)` is the sum over the others: what is small of
tokens that the model knows is a sum of small numbers, and no difference of large ones.

Shapes and symbols of `stream.py`, K directions or moves, S tokens that a move changes, R rows of up to L positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .head import Head, factor, product, working_dtype
from .stream import OnlineSoftmax, blocks, pick, tile_sizes

# Rows whose Gram matrices are one product are padded to so many times their positions at most.
PADDED = 1.25


@dataclass(frozen=True)
class Move:
    """A move of the head, W to W + move: of the rows `seen_S` (ascending) by `move_SD`."""

    seen_S: Tensor
    move_SD: Tensor

    @classmethod
    def of(cls, move_VD: Tensor) -> Move:
        seen_S = move_VD.any(1).nonzero()[:, 0]
        return cls(seen_S, move_VD[seen_S])


@dataclass(frozen=True)
class Along:
    """What positions are measured along.

    Args:
        directions_VE: K directions side by side, (V, K * D).
        metrics: M of each, (D, D), symmetric.
        moves: fitted heads, as differences.
        still_VK: for each move 1 at the tokens that it leaves alone, and a column of ones.
    """

    directions_VE: Tensor
    metrics: Sequence[Tensor]
    moves: Sequence[Move]
    still_VK: Tensor

    @classmethod
    def of(
        cls, like_VD: Tensor, directions: Sequence[Tensor], metrics: Sequence[Tensor], moves: Sequence[Move]
    ) -> Along:
        """`like_VD` is of the vocabulary, the device and the dtype that sums have."""
        still_VK = like_VD.new_ones(len(like_VD), len(moves) + 1)
        for k, move in enumerate(moves):
            still_VK[move.seen_S, k] = 0
        return cls(torch.cat([like_VD[:, :0], *directions], 1), metrics, moves, still_VK)


@dataclass(frozen=True)
class Measured:
    """Of T positions and N rows.

    Args:
        log_likelihood_T: of the labels.
        temperature_T: the score along W itself, which is that of a colder softmax; 0 without directions.
        score_TK, metric_score_TK: along each direction D, and along D M.
        gain_TK: log-likelihood after each move, minus before.
        squares_NK: squared norm of each row's gradient, and then in each metric; no columns without directions, or
            where they are not asked for.
    """

    log_likelihood_T: Tensor
    temperature_T: Tensor
    score_TK: Tensor
    metric_score_TK: Tensor
    gain_TK: Tensor
    squares_NK: Tensor


def measure(
    head: Head,
    along: Along,
    hidden_TD: Tensor,
    labels_T: Tensor,
    lengths: Sequence[int],
    *,
    squares: bool = True,
    token_tile: int | None = None,
    vocab_block: int | None = None,
) -> Measured:
    """What `score_tokens`, `gain_tokens` and `squared_norms` give one after the other.

    Costs 1 + K products of (T, D) with (V, D), one with the rows of each move, and as many exponentials as logits.

    Args:
        lengths: labelled positions of each row, in the order in which they follow one another.
        squares: the norms are wanted.
    """
    token_tile, vocab_block = tile_sizes(hidden_TD, token_tile, vocab_block)
    parts = [
        _Tile(head, along, hidden_TD[tile], labels_T[tile], rows, squares).measured(vocab_block)
        for tile, rows in _tiles(lengths, token_tile)
    ]
    return Measured(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


def _tiles(lengths: Sequence[int], size: int) -> Iterator[tuple[slice, list[int]]]:
    """Whole rows of so many positions together, or one row."""
    start, rows = 0, list[int]()
    for length in lengths:
        if rows and sum(rows) + length > size:
            yield slice(start, start + sum(rows)), rows
            start, rows = start + sum(rows), []
        rows.append(length)
    yield slice(start, start + sum(rows)), rows


class _Tile:
    """Some whole rows, folded over blocks of the vocabulary. Until they are divided by the mass, sums over the softmax
    are times `exp(-top)`."""

    def __init__(
        self, head: Head, along: Along, hidden_TD: Tensor, labels_T: Tensor, lengths: Sequence[int], squares: bool
    ):
        self.head, self.along, self.labels_T, self.lengths = head, along, labels_T, lengths
        self.dtype = working_dtype(head.weight, hidden_TD)
        self.hidden_TD = factor(head, hidden_TD, self.dtype)
        self.states_TD = hidden_TD.to(self.dtype)

        def new(*shape: int) -> Tensor:
            return self.states_TD.new_zeros(len(labels_T), *shape)

        self.top = new().fill_(-torch.inf)
        self.logit_y, self.linear_y, self.slope_y = new(), new(), new().fill_(head.scale)
        self.linear, self.pulled_TE = new(), new(along.directions_VE.shape[1])
        self.still_TK = new(along.still_VK.shape[1])  # mass of the tokens that moves leave alone, and of all
        places = [torch.searchsorted(move.seen_S, labels_T) for move in along.moves]
        self.after = [OnlineSoftmax(hidden_TD, self.dtype, place) for place in places]
        groups = _alike(lengths) if along.metrics and squares else []
        self.grams = [_Gram(lengths, rows, labels_T, self.dtype) for rows in groups]

    def measured(self, vocab_block: int) -> Measured:
        cut = list(blocks(self.head.vocab_size, vocab_block))
        edges = torch.tensor([0, *(block.stop for block in cut)], device=self.labels_T.device)
        places = [torch.searchsorted(move.seen_S, edges).tolist() for move in self.along.moves]
        for k, block in enumerate(cut):
            self._fold(block, [slice(*place[k : k + 2]) for place in places])
        own = (self.logit_y - self.top).exp()
        mass = own + self.still_TK[:, -1]
        log_p = self.logit_y - self.top - mass.log()
        error_y = self.slope_y * self.still_TK[:, -1] / mass
        pulled = error_y[:, None] * self.along.directions_VE[self.labels_T] - self.pulled_TE / mass[:, None]
        sides = pulled.unflatten(1, (len(self.along.metrics), -1)).unbind(1) if self.along.metrics else ()
        states = [self.states_TD, *(self.states_TD.to(metric) @ metric for metric in self.along.metrics)]
        for gram in self.grams:
            gram.finish(error_y, mass)
        return Measured(
            log_p,
            error_y * self.linear_y - self.linear / mass if sides else torch.zeros_like(mass),
            self._columns([(side * self.states_TD).sum(1) for side in sides]),
            self._columns([(side * other).sum(1) for side, other in zip(sides, states[1:], strict=False)]),
            self._columns([self._gain(k, own, log_p) for k in range(len(self.after))]),
            self._squares(states),
        )

    def _fold(self, block: slice, places: Sequence[slice]) -> None:
        """Take in one block, in which each move changes the tokens at `places` of those that it has seen."""
        head, linear_TC = self.head, self.head.linear(self.hidden_TD, block)
        for move, after, place in zip(self.along.moves, self.after, places, strict=True):
            if place.start < place.stop:
                seen, here = move.seen_S[place] - block.start, linear_TC
                here = linear_TC if len(seen) == linear_TC.shape[1] else linear_TC[:, seen]
                after.fold(place, head.transform(product(self.hidden_TD, move.move_SD[place]).add_(here)))
        plain = head.bias is None and head.scale == 1.0 and head.softcap is None
        logits_TC = linear_TC if plain else head.transform(linear_TC.clone())
        if head.bias is not None:
            linear_TC = linear_TC.sub_(head.bias[block])
        self.logit_y = pick(self.logit_y, logits_TC, self.labels_T, block)
        self.linear_y = pick(self.linear_y, linear_TC, self.labels_T, block)
        top = torch.maximum(self.top, logits_TC.amax(-1))
        shrink, self.top = (self.top - top).exp_(), top
        mass_TC = (logits_TC - top[:, None]).exp_()
        _forget(mass_TC, self.labels_T, block)
        slope, weighted_TC = head.slope(logits_TC), mass_TC
        if isinstance(slope, Tensor):
            self.slope_y = pick(self.slope_y, slope, self.labels_T, block)
        if isinstance(slope, Tensor) or slope != 1.0:
            weighted_TC = mass_TC * slope
        self.still_TK.mul_(shrink[:, None]).addmm_(mass_TC, self.along.still_VK[block])
        if self.along.metrics:
            self.pulled_TE.mul_(shrink[:, None]).addmm_(weighted_TC, self.along.directions_VE[block])
            self.linear.mul_(shrink).add_(torch.linalg.vecdot(weighted_TC, linear_TC))
        for gram in self.grams:
            gram.fold(weighted_TC, shrink, block)

    def _gain(self, k: int, own: Tensor, log_p: Tensor) -> Tensor:
        """Of the k-th move, (T,)."""
        seen_S, after = self.along.moves[k].seen_S, self.after[k]
        if not len(seen_S):
            return torch.zeros_like(log_p)
        moved = torch.isin(self.labels_T, seen_S)
        still = self.still_TK[:, k] + torch.where(moved, 0.0, own)
        logit_y = torch.where(moved, after.logit_y, self.logit_y)
        return logit_y - torch.logaddexp(after.log_normalizer(), self.top + still.log()) - log_p

    def _squares(self, states: Sequence[Tensor]) -> Tensor:
        out = torch.zeros(len(self.lengths), len(states), dtype=torch.float64, device=self.top.device)
        for gram in self.grams:
            out[gram.rows] = torch.stack([gram.squares(states[0], other) for other in states], 1)
        return out if self.grams else out[:, :0]

    def _columns(self, columns: list[Tensor]) -> Tensor:
        return torch.stack(columns, 1) if columns else self.states_TD[:, :0]


class _Gram:
    """Inner products of the errors of some rows' positions, `<e_t, e_t'>` (R, L, L)."""

    def __init__(self, lengths: Sequence[int], rows: Sequence[int], labels_T: Tensor, dtype: torch.dtype):
        starts = [sum(lengths[:row]) for row in rows]
        count = torch.arange(max(lengths[row] for row in rows))
        real_RL = count < torch.tensor([lengths[row] for row in rows])[:, None]
        place_RL = (torch.tensor(starts)[:, None] + count).where(real_RL, 0)
        self.rows, self.real_RL, self.place_RL = rows, real_RL.to(labels_T.device), place_RL.to(labels_T.device)
        self.labels_RL = labels_T[self.place_RL]
        shape = (*place_RL.shape, place_RL.shape[1])
        self.inner = torch.zeros(shape, dtype=dtype, device=labels_T.device)
        self.cross = self.inner.clone()  # what the softmax at t gives the label of t'

    def fold(self, mass_TC: Tensor, shrink_T: Tensor, block: slice) -> None:
        mass_RLC, shrink_RL = mass_TC[self.place_RL], shrink_T[self.place_RL]
        self.inner.mul_(shrink_RL[:, :, None] * shrink_RL[:, None]).baddbmm_(mass_RLC, mass_RLC.mT)
        column = (self.labels_RL - block.start).clamp(0, mass_RLC.shape[2] - 1)
        inside = (self.labels_RL >= block.start) & (self.labels_RL < block.stop)
        picked = mass_RLC.gather(2, column[:, None].expand_as(self.cross)) * inside[:, None]
        self.cross.mul_(shrink_RL[:, :, None]).add_(picked)

    def finish(self, error_y_T: Tensor, mass_T: Tensor) -> None:
        """To inner products: `e_t` is its entry at the label, and minus the softmax elsewhere."""
        error_RL, mass_RL = error_y_T[self.place_RL], mass_T[self.place_RL]
        cross = self.cross / mass_RL[:, :, None] * error_RL[:, None]
        same = (self.labels_RL[:, :, None] == self.labels_RL[:, None]) * error_RL[:, :, None] * error_RL[:, None]
        self.inner = self.inner / (mass_RL[:, :, None] * mass_RL[:, None]) - cross - cross.mT + same
        self.inner *= self.real_RL[:, :, None] & self.real_RL[:, None]

    def squares(self, states_TD: Tensor, other_TD: Tensor) -> Tensor:
        """`sum_{t, t'} <e_t, e_t'> <h_t, M h_t'>` of each row, (R,) float64, for the states h and M h."""
        products = states_TD[self.place_RL].to(other_TD) @ other_TD[self.place_RL].mT  # a metric may be float64
        return (self.inner * products).sum((1, 2), dtype=torch.float64)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows in groups of like length."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        last = groups[-1] if groups else []
        real = sum(lengths[other] for other in last) + lengths[row]
        if last and lengths[last[0]] * (len(last) + 1) <= PADDED * real:
            last.append(row)
        else:
            groups.append([row])
    return groups


def _forget(mass_TC: Tensor, labels_T: Tensor, block: slice) -> None:
    """Nothing at the label, in place."""
    inside = (labels_T >= block.start) & (labels_T < block.stop)
    column = (labels_T - block.start).clamp(0, mass_TC.shape[1] - 1)[:, None]
    mass_TC.scatter_(1, column, mass_TC.gather(1, column).masked_fill(inside[:, None], 0.0))
