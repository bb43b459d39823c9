"""The worst rows as a table, for a notebook and for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import escape

from ..scores.explanations import tails
from ..scores.scores import ForValueScores
from .rows import LONGEST_BESIDE, Texts

if TYPE_CHECKING:
    from pandas import DataFrame

WIDEST = 60  # letters of a cell in a terminal
STYLE = "text-align: left; vertical-align: top; white-space: pre-wrap; font-variant-numeric: tabular-nums"


@dataclass(frozen=True, eq=False)
class RowTable(Sequence[dict[str, Any]]):
    """Rows as dictionaries with the same keys; None where nothing is known."""

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def to_pandas(self) -> DataFrame:
        """As a data frame."""
        from pandas import DataFrame

        return DataFrame(self.rows)

    def __repr__(self) -> str:
        if not self.rows:
            return "no row has a score"
        lines = [list(self.rows[0]), *([_cell(value) for value in row.values()] for row in self.rows)]
        lines = [[" ".join(cell.split()) for cell in line] for line in lines]
        lines = [[cell if len(cell) <= WIDEST else cell[: WIDEST - 1] + "…" for cell in line] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, line, widths)).rstrip()  # as wide as the widest of each column
            for line in lines
        )

    def _repr_html_(self) -> str:
        if not self.rows:
            return "<p>no row has a score</p>"
        head = "".join(f'<th style="{STYLE}">{escape(name)}</th>' for name in self.rows[0])
        body = (
            "".join(f'<td style="{STYLE}">{escape(_cell(value))}</td>' for value in row.values()) for row in self.rows
        )
        lines = "".join(f"<tr>{cells}</tr>" for cells in body)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def worst(scores: ForValueScores, n: int, dataset: Any = None) -> RowTable:
    """See `ForValueScores.worst`."""
    rows, said = tails(scores.values, n)[0], scores.judgements
    others = [] if said is None else [int(said.suggested_row[row]) for row in rows if said.suggested_row[row] >= 0]
    texts = Texts(dataset, [*rows, *others], None, LONGEST_BESIDE)
    out = []
    for row in rows:
        line: dict[str, Any] = {"row": row, "score": float(scores.values[row])}
        if said is not None:
            line["probability"] = float(said.probability[row]) if np.isfinite(said.probability[row]) else None
            line["kind"], line["why"] = said.kind[row], said.why[row]
            line["suggested_row"] = other = int(said.suggested_row[row]) if said.suggested_row[row] >= 0 else None
            if dataset is not None:
                text = None if other is None else texts[other]
                line["suggested"] = None if text is None else text.answer.strip()
        if dataset is not None and (text := texts[row]) is not None:
            line |= {"prompt": text.prompt, "answer": text.answer.strip()}
        out.append(line)
    return RowTable(out)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
