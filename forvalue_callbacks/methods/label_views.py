"""What a label model sees: answers by number, and of a prompt states of a layer or its words. Imports torch and numpy.

Each view is a matrix with a row for each row of the data, times coefficients the logits of the answers: a dense one of
decorrelated states, or a bag of hashed words and pairs of words, weighted by their inverse frequency (no model in it).

Shapes: N rows, F features, G words of a row, K answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.stats import power_of_moment

# Ridges from stiff to loose, of states and of bags of words, and the one that training rows are fitted with: a stiff
# one, since at a loose one rounds confirm what they started from.
STATES, WORDS = "states", "words"
RIDGES = {STATES: (100.0, 30.0, 10.0, 3.0, 1.0), WORDS: (3.0, 1.0, 0.3, 0.1, 0.03)}
EM_RIDGE = {STATES: 30.0, WORDS: 0.3}
# Ridge of the whitening, of a correlation matrix.
WHITENING_RIDGE = 0.01
# Words that are in two rows at least count, at most so many.
MAX_WORDS = 16384


class Bag:
    """Rows of a sparse matrix (N, F), which takes `@`, `.T @` and `[rows]`.

    Args:
        places: (N, G) int64, columns.
        values: (N, G) float32, 0 where a row has fewer.
        n_columns: F.
    """

    def __init__(self, places: Tensor, values: Tensor, n_columns: int):
        self.places, self.values, self.shape = places, values, (len(places), n_columns)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Tensor) -> Bag:
        return Bag(self.places[rows], self.values[rows], self.shape[1])

    def __matmul__(self, x_FK: Tensor) -> Tensor:
        return self._both[0] @ x_FK

    @property
    def T(self) -> Tensor:
        return self._both[1]

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        """It and its transpose as sparse tensors."""
        rows, _ = here = (self.values != 0).nonzero(as_tuple=True)
        indices = torch.stack([rows, self.places[here]])
        coo = torch.sparse_coo_tensor(indices, self.values[here], self.shape, check_invariants=False)
        return coo.coalesce(), coo.T.coalesce()

    def new_zeros(self, *shape: int) -> Tensor:
        return self.values.new_zeros(*shape)


class StateMap:
    """Standardised features times (C + ridge)^(-1/4), C their correlations: half way to decorrelated ones.

    Args:
        x_NF: features of the rows that it is learned from.
    """

    kind = STATES

    def __init__(self, x_NF: Tensor):
        self.center, self.spread = x_NF.mean(0), x_NF.std(0).clamp(min=1e-9)
        z = (x_NF - self.center) / self.spread
        moment = (z.T @ z).double() / len(z)
        self.root = power_of_moment(moment, -0.25, floor=WHITENING_RIDGE, rotated=True).to(z.dtype)

    def __call__(self, x_NF: Tensor) -> Tensor:
        return (x_NF.float() - self.center) / self.spread @ self.root


class WordMap:
    """Hashes of words as a bag of them, each weighted by its inverse frequency among the rows, rows of norm one.

    Args:
        hashes_NG: of the rows that it is learned from, -1 where a row has fewer.
    """

    kind = WORDS

    def __init__(self, hashes_NG: Tensor):
        known, counts = hashes_NG[hashes_NG >= 0].unique(return_counts=True)
        kept = counts >= 2
        if int(kept.sum()) > MAX_WORDS:
            kept &= counts > counts.sort(descending=True).values[MAX_WORDS]
        self.known, counts = known[kept], counts[kept]
        self.weight = torch.log((1 + len(hashes_NG)) / (1 + counts.float())) + 1

    def __call__(self, hashes_NG: Tensor) -> Bag:
        if not len(self.known):
            return Bag(torch.zeros_like(hashes_NG), torch.zeros(hashes_NG.shape).to(self.weight), 1)
        places = torch.searchsorted(self.known, hashes_NG).clamp(max=len(self.known) - 1)
        values = torch.where(self.known[places] == hashes_NG, self.weight[places], 0.0)
        norm = values.norm(dim=1, keepdim=True).clamp(min=1e-9)
        return Bag(torch.where(values > 0, places, 0), values / norm, len(self.known))


class Answers:
    """Answers as 0 to K - 1, those of validation rows first; the last may be one for all that come once.

    Args:
        known_M, observed_N: the answers of both sides, as any integers.
    """

    def __init__(self, known_M: np.ndarray, observed_N: np.ndarray):
        answers, counts = np.unique(observed_N, return_counts=True)
        known = np.unique(known_M)
        rest = np.setdiff1d(answers[counts > 1], known)
        self._names = np.concatenate([known, rest])
        self._order = np.argsort(self._names, kind="stable")
        self._sorted = self._names[self._order]
        self.another = len(self._names)
        self.n = self.another + int(len(np.setdiff1d(answers, self._names)) > 0)

    def numbers(self, answers: np.ndarray) -> np.ndarray:
        """The number of each, int64; `another` for those that are none of them."""
        if not len(self._sorted):
            return np.full(len(answers), self.another)
        place = np.searchsorted(self._sorted, answers).clip(max=len(self._sorted) - 1)
        found = self._sorted[place] == answers
        return np.where(found, self._order[place], self.another).astype(np.int64)

    def names(self, numbers: np.ndarray) -> np.ndarray:
        """The answers as they were given; 0 for `another`."""
        return np.append(self._names, 0)[numbers]


def views_of(features: Mapping[str, Tensor]) -> dict[str, Any]:
    """A map for each view, by the columns that it reads: integers are hashes of words, floats are states."""
    return {name: (StateMap if x.is_floating_point() else WordMap)(x) for name, x in features.items()}
