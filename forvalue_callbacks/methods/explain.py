"""What speaks for and against single rows, with every method: their tokens, and the validation rows nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import core
from ..core import Head
from ..data.sample import Sample
from ..model.positions import Columns, Positions, concatenate
from ..model.run import Run, Window
from ..scores.explanations import Explanation
from . import METHODS
from .base import ROWS, Method, State, row_tokens, token_columns
from .fitted import FittedLikelihood
from .pairs import Pairs
from .whitened import Whitened

SEVERAL = "rows of several parts"  # a pass, by name


def tokens_by(name: str) -> str:
    """The method whose scores tokens have: that one, or `fitted_likelihood` where it has none."""
    return name if METHODS[name].tokenwise else FittedLikelihood.name


def nearest_by(name: str) -> str:
    """The method whose pairs say which validation rows are nearest: that one, or `whitened` where it has none."""
    return name if METHODS[name].pairwise else Whitened.name


@dataclass(frozen=True)
class Explainer:
    """Explains rows.

    Args:
        run: runs the model.
        method, state: a `tokenwise` method, and what it knows.
        pairs: of another or the same.
        texts: of what is predicted, one for each.
        n_nearest: so many validation rows at most speak for a row, and as many against it.
    """

    run: Run
    method: Method
    state: State
    pairs: Pairs
    texts: Callable[[Sequence[int]], tuple[str, ...]]
    n_nearest: int

    def explained(self, examples: Iterable[Any], rows: Sequence[int]) -> list[Explanation]:
        """One explanation for each of the examples, whose places in their data set are `rows`."""
        head = self.run.backbone.head()
        sides = self.pairs.side
        norms = np.full(self.pairs.n_validation, np.nan)
        norms[list(dict.fromkeys(sides.index))] = self.pairs.method.row_norms(self.pairs.state, head, sides)
        out: list[Explanation] = []
        for window in self.run.windows(examples, self.method, partial(self._score, head), ROWS, tile=core.PAIR_TILE):
            assert isinstance(window, Window)
            own = self._own_norms(head, window)
            for i, (sample, reason) in enumerate(zip(window.samples, window.reasons, strict=True)):
                row = rows[window.start + i]
                tokens = np.full(1, np.nan) if reason is not None else row_tokens(window.columns["tokens"][i])
                if np.isfinite(tokens).all():
                    cosines = window.columns["pairs"][i] / norms / own[i]
                    out.append(self._explanation(row, sample, tokens, cosines))
                else:
                    out.append(Explanation(row, (), (), self.method.name, nearest_by=self.pairs.method.name))
        return out

    def _score(self, head: Head, positions: Positions) -> Columns:
        """ "tokens" as `token_columns`, and "pairs" over the norm of the row where it is one segment, (segments,
        validation rows)."""
        norms = self.pairs.method.norms(self.pairs.state, head, positions)
        norms[[len(sample.segments) > 1 for sample in positions.samples]] = 1.0
        pairs = self.pairs.score(positions)["pairs"] / norms[:, None]
        return {**token_columns(self.method, self.state, head, positions), "pairs": pairs}

    def _own_norms(self, head: Head, window: Window) -> np.ndarray:
        """Norms of the rows of a window that are several segments, which need not have been run together; else 1."""
        norms = np.ones(len(window.samples))
        some = zip(window.samples, window.reasons, strict=True)
        several = [sample for sample, reason in some if reason is None and len(sample.segments) > 1]
        if several:
            sides = concatenate(self.run.positions(several, self.pairs.method, SEVERAL, all_ranks=True))
            places = [index - window.start for index in dict.fromkeys(sides.index)]
            norms[places] = self.pairs.method.row_norms(self.pairs.state, head, sides)
        return norms

    def _explanation(self, row: int, sample: Sample, tokens: np.ndarray, cosines: np.ndarray) -> Explanation:
        target = np.concatenate([segment.target for segment in sample.segments])
        for_it, against_it = _most(cosines, self.n_nearest), _most(-cosines, self.n_nearest)
        return Explanation(
            row,
            self.texts(target.tolist()),
            tuple(tokens.tolist()),
            self.method.name,
            tuple((place, float(cosines[place])) for place in for_it),
            tuple((place, float(cosines[place])) for place in against_it),
            self.pairs.method.name,
        )


def _most(values: np.ndarray, n: int) -> list[int]:
    """Places of the n greatest values, of those that are positive; the first of equal ones first."""
    order = np.argsort(-values, kind="stable")[:n]  # NaN comes last
    return [int(place) for place in order if values[place] > 0]
