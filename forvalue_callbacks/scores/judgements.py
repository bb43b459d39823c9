"""What is said of each row beside its score: which kind of noise it looks like, why, and whose answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pyarrow as pa

from .parts import printable


@dataclass(eq=False)
class Judgements:
    """Of N rows, in row order.

    Args:
        probability: (N,) float64, that the row is noisy; NaN where it is not judged (it is kept then) or not scored.
        kind: what a row looks like, the most probable kind of noise; None where it is not judged or more likely clean.
        why: what spoke for that in a few words, or why the row is not judged. Quotes nothing of the row.
        suggested_row: (N,) int64, a row of the same data whose answer is more likely the right one of this, -1 where
            there is none or answers do not repeat.
        suggested_probability: (N,) float64, that it is; NaN where there is none.

    Raises:
        ValueError: the lengths differ.
    """

    probability: np.ndarray
    kind: list[str | None]
    why: list[str | None]
    suggested_row: np.ndarray
    suggested_probability: np.ndarray

    def __post_init__(self) -> None:
        self.probability = np.asarray(self.probability, dtype=np.float64)
        self.suggested_row = np.asarray(self.suggested_row, dtype=np.int64)
        self.suggested_probability = np.asarray(self.suggested_probability, dtype=np.float64)
        self.kind, self.why = ([None if x is None else printable(x) for x in side] for side in (self.kind, self.why))
        lengths = {name: len(values) for name, values in self.columns().items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the judgements differ in length: {lengths}")

    @classmethod
    def none(cls, n: int) -> Judgements:
        """Of n rows of which nothing is said."""
        return cls(np.full(n, np.nan), [None] * n, [None] * n, np.full(n, -1), np.full(n, np.nan))

    def __len__(self) -> int:
        return len(self.probability)

    @property
    def judged(self) -> np.ndarray:
        """(N,) bool."""
        return np.isfinite(self.probability)

    def columns(self) -> dict[str, np.ndarray | list[str | None]]:
        """By name."""
        return {spec.name: getattr(self, spec.name) for spec in fields(self)}

    def placed(self, index: np.ndarray, n: int) -> Judgements:
        """Those of n rows, of which these are the ones at the places `index`: nothing is said of the others."""
        out = Judgements.none(n)
        found = self.suggested_row >= 0
        suggested = np.where(found, index[np.where(found, self.suggested_row, 0)], -1)
        for name, values in replace(self, suggested_row=suggested).columns().items():
            whole = getattr(out, name)
            for place, value in zip(index.tolist(), values, strict=True):
                whole[place] = value
        return out

    def to_arrow(self) -> dict[str, pa.Array]:
        """Columns of a table, null for NaN, None and -1."""
        return {
            "probability": pa.array(self.probability, from_pandas=True),
            "kind": pa.array(self.kind, type=pa.string()),
            "why": pa.array(self.why, type=pa.string()),
            "suggested_row": pa.array(self.suggested_row, mask=self.suggested_row < 0),
            "suggested_probability": pa.array(self.suggested_probability, from_pandas=True),
        }

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Judgements:
        """Of a table with these columns."""
        return cls(
            table["probability"].to_numpy(),
            table["kind"].to_pylist(),
            table["why"].to_pylist(),
            table["suggested_row"].fill_null(-1).to_numpy(),
            table["suggested_probability"].to_numpy(),
        )

    def take(self, rows: Sequence[int]) -> Judgements:
        """Some of them, in the order given; `suggested_row` keeps its meaning."""
        index = np.asarray(rows, dtype=np.int64)
        kind, why = ([side[i] for i in index] for side in (self.kind, self.why))
        numbers = (self.suggested_row[index], self.suggested_probability[index])
        return Judgements(self.probability[index], kind, why, *numbers)
