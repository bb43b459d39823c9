"""Scores of pairs: every row against every validation row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import core
from ..data.sample import Sample
from ..model.positions import Columns, Positions, concatenate
from ..model.ranks import together, world
from ..model.run import Run, Window
from ..scores.pairs import PairsFile
from .base import Method, State

# The passes by name.
PAIRS_WITH, PAIRS = "validation rows, for pairs", "pairs"


class Pairs:
    """`<G(row), M G(v)>` of rows with all validation rows, whose hidden states are kept.

    Args:
        run: runs the model.
        method, state: a method with pairs, and what it knows.
        validation: rows that can be scored.
        n_validation: how many there are with the others.
    """

    def __init__(self, run: Run, method: Method, state: State, validation: Sequence[Sample], n_validation: int):
        self.run, self.method, self.state, self.n_validation = run, method, state, n_validation
        with together("running the validation rows", run.sharded):
            self.side = concatenate(run.positions(validation, method, PAIRS_WITH, all_ranks=True))
        self.head = run.backbone.head()  # once: where weights are sharded all ranks must come here
        metric = method.metric(state)
        self.metric_TD = None if metric is None else self.side.hidden_TD.to(metric) @ metric

    def windows(self, dataset: Iterable[Any], skip: Any = None) -> Iterator[Window | int]:
        """ "pairs" of the rows, (rows, n_validation) float64, NaN where a row of either side has no score."""
        return self.run.windows(dataset, self.method, self.score, PAIRS, skip, core.PAIR_TILE)

    def score(self, positions: Positions) -> Columns:
        """ "pairs" of the rows of these positions."""
        side = self.side
        values = core.score_pairs(
            self.head,
            positions.hidden_TD,
            positions.target_T,
            positions.rows_T,
            len(positions.lengths),
            side.hidden_TD,
            side.target_T,
            side.rows_T,
            len(side.lengths),
            other_metric_TD=self.metric_TD,
        )
        signed = positions.weights[:, None] * values.cpu().numpy() * side.weights
        out = np.full((len(positions.lengths), self.n_validation), np.nan)
        out[:, side.index] = 0.0
        np.add.at(out.T, list(side.index), signed.T)  # those of several segments of a row add up
        return {"pairs": out}

    def to_file(self, file: PairsFile | None, path: str | Path, dataset: Any) -> Tensor:
        """Writes them to the file of `pairs_file`, and gives what lies there."""

        def skip(start: int, digests: list[str]) -> bool:
            return file is not None and file.holds(start, digests)

        for window in self.windows(dataset, skip):
            with together("writing the pairs"):
                if file is not None and isinstance(window, Window):
                    file.write(window.start, window.digests, window.columns["pairs"])
        with together("writing the pairs"):
            if file is not None:
                file.finish()
        return torch.from_numpy(np.load(path, mmap_mode="r+"))


def pairs_file(path: str | Path | None, n: int | None, n_validation: int, provenance: dict[str, str]) -> Any:
    """The file for pairs, opened by the first rank, if they go to one."""
    with together("opening the file of the pairs"):
        if path is None or world()[0] > 0:
            return nullcontext()
        assert n is not None
        return PairsFile(path, n, n_validation, provenance)
