"""One score per row, and what made them; one Parquet file on disk. Knows no model."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from .judgements import Judgements
from .noise import NoiseEstimate
from .parts import Part, printable
from .provenance import differing
from .table import read_table, write_table
from .writer import read_finished

if TYPE_CHECKING:
    from datasets import Dataset
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ..report.worst import RowTable

# What the columns of scores by one validation set of several begin with.
BY_SET = "score_"
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")


@dataclass(eq=False)
class ForValueScores:
    """Scores of N rows, in row order.

    Args:
        values: (N,) float64, higher = more valuable; NaN where a row could not be scored. Of several validation sets:
            the greatest of the row's scores by each, in standard deviations from their mean (`best_of`).
        reasons: N entries: why a row could not be scored, None where it was; what logs and files do not bear (control
            characters, halves of characters) becomes "?".
        log_likelihood: (N,) float64, sum of log p over the labelled tokens; NaN where a row could not be scored.
        n_labelled: (N,) int64, number of labelled tokens.
        metadata: JSON-able. `metadata["provenance"]` maps each part that determines the scores (weights, validation,
            data, config) to its hash; everything else (versions, the config itself) is for the reader.
        row_digests: N digests of the rows, 16 hex digits each, where they are known.
        judgements: what is said of each row beside its score, by methods that do.
        by_set: of several validation sets the scores by each, (N,) float64 by its name.

    Raises:
        ValueError: the lengths differ, or a row has neither a score nor a reason, or both.
    """

    values: np.ndarray
    reasons: list[str | None]
    log_likelihood: np.ndarray
    n_labelled: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    row_digests: list[str] | None = None
    judgements: Judgements | None = None
    by_set: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = np.asarray(self.values, dtype=np.float64)
        self.reasons = [None if reason is None else printable(reason) for reason in self.reasons]
        self.log_likelihood = np.asarray(self.log_likelihood, dtype=np.float64)
        self.n_labelled = np.asarray(self.n_labelled, dtype=np.int64)
        lengths = [len(self.values), len(self.reasons), len(self.log_likelihood), len(self.n_labelled)]
        lengths += [len(values) for values in self.by_set.values()]
        if len(set(lengths)) != 1:
            raise ValueError(f"values, reasons, log_likelihood and n_labelled differ in length: {lengths}")
        if self.row_digests is not None and len(self.row_digests) != len(self):
            raise ValueError(f"{len(self.row_digests):,} digests of {len(self):,} rows")
        if self.judgements is not None and len(self.judgements) != len(self):
            raise ValueError(f"{len(self.judgements):,} judgements of {len(self):,} rows")
        for row, (value, reason) in enumerate(zip(self.values, self.reasons, strict=True)):
            if np.isnan(value) != (reason is not None):
                raise ValueError(f"row {row} has the score {value} and the reason {reason!r}: exactly one is needed")

    @classmethod
    def of_scored(
        cls,
        reasons: list[str | None],
        index: Any,
        values: Any,
        log_likelihood: Any,
        n_labelled: Any,
        metadata: dict[str, Any],
        row_digests: list[str] | None = None,
        judgements: Judgements | None = None,
    ) -> ForValueScores:
        """Scores of the rows at the places `index`; all others have a reason, get NaN and no labelled tokens."""
        n = len(reasons)
        scores, likelihoods, lengths = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, dtype=np.int64)
        scores[index], likelihoods[index], lengths[index] = values, log_likelihood, n_labelled
        whole = None if judgements is None else judgements.placed(np.asarray(index), n)
        return cls(scores, reasons, likelihoods, lengths, metadata, row_digests, whole)

    @classmethod
    def of_parts(cls, parts: Iterable[Part], metadata: dict[str, Any]) -> ForValueScores:
        """Scores of rows that a `ScoreWriter` keeps, of a method that scores row by row.

        Args:
            parts: in order, with the columns score (or of several validation sets score_NAME each), log_likelihood and
                n_labelled, (n,) each.
            metadata: that of the scores.

        Raises:
            ValueError: they keep no scores.
        """
        parts = list(parts)
        sets = [name for name in next((part.columns for part in parts if part.columns), ()) if name.startswith(BY_SET)]
        names = [*(sets or ["score"]), "log_likelihood", "n_labelled"]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
        reasons: list[str | None] = []
        digests: list[str] = []
        for part in parts:
            missing = [name for name in columns if name not in part.columns]
            if missing and not all(part.reasons):  # nothing is known of rows that all have a reason
                raise ValueError(f"no scores are kept there: {' and '.join(missing)} of row {part.start} are missing")
            nothing = np.full(len(part.reasons), np.nan), np.zeros(len(part.reasons))
            for name, kept in columns.items():
                kept.append(part.columns.get(name, nothing[name == "n_labelled"]))
            reasons += part.reasons
            digests += part.digests
        whole = {name: np.concatenate(kept) if kept else np.zeros(0) for name, kept in columns.items()}
        by_set = {name.removeprefix(BY_SET): whole[name] for name in sets}
        values = best_of(by_set) if sets else whole["score"]
        known = (whole["log_likelihood"], whole["n_labelled"])
        return cls(values, reasons, *known, metadata, digests, by_set=by_set)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        """Three lines at most, whatever N is."""
        scored = self.values[np.isfinite(self.values)]
        lines = [f"ForValueScores of {len(self):,} rows, {len(scored):,} with a score"]
        if len(scored):
            lines[0] += f" from {scored.min():.4g} to {scored.max():.4g} (median {np.median(scored):.4g})"
        if reasons := grouped_reasons(self.reasons):
            more = f" and {len(reasons) - 1} other reasons" if len(reasons) > 1 else ""
            lines.append(f"without: {reasons[0][0]:,} x {reasons[0][1]}{more}")
        if self.noise is not None:
            lines.append("log odds that a row is clean")
        return "\n".join(lines)

    @property
    def fingerprint(self) -> str:
        """Hash of `metadata["provenance"]`, 32 hex digits: the same wherever the same parts made the scores."""
        provenance = json.dumps(self.metadata.get("provenance", {}), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(provenance.encode())

    def check_rows(self, digests: Sequence[str]) -> None:
        """Checks that the scores are those of these rows, in their order.

        Args:
            digests: of the rows. Only their number is compared where the scores do not say which rows they are of.

        Raises:
            ValueError: they are not; what differs, and from which row on.
        """
        mine = digests if self.row_digests is None else self.row_digests
        if len(self) == len(digests) and list(mine) == list(digests):
            return
        if self.row_digests is not None and Counter(mine) == Counter(digests):
            row = _first_difference(mine, digests)
            raise ValueError(
                f"the scores are of the same rows in another order, from row {row} on: sort them as they were when "
                "they were scored, or score again"
            )
        if len(self) != len(digests):
            more = len(digests) - len(self)
            text = f"{len(self):,} rows have scores, but there are {len(digests):,} rows, {abs(more):,} "
            text += "more" if more > 0 else "fewer"
            if self.row_digests is not None:
                row = _first_difference(mine, digests)
                same = row == min(len(mine), len(digests))
                text += f"; the first {row:,} are the same" if same else f", which differ from row {row} on"
            raise ValueError(f"{text}: give the rows that were scored, or score again")
        other = [row for row, (one, another) in enumerate(zip(mine, digests, strict=True)) if one != another]
        raise ValueError(
            f"{len(other):,} of {len(self):,} rows are others than those that have scores, the first is row "
            f"{other[0]}: give the rows that were scored, or score again"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one Parquet file (row, score, reason, log_likelihood, n_labelled, and digest where the rows' are
        known, the judgements where there are any, and score_NAME for each of several validation sets); a row without a
        score has null.

        The file appears whole or not at all. In the Parquet schema are the metadata, as JSON, the number of rows and a
        checksum.
        """
        write_table(path, self.to_arrow(), json.dumps(self.metadata))

    def to_arrow(self) -> pa.Table:
        """What `save` writes, without the metadata."""
        columns = {
            "row": pa.array(np.arange(len(self))),
            "score": pa.array(self.values, from_pandas=True),  # NaN becomes null
            "reason": pa.array(self.reasons, type=pa.string()),
            "log_likelihood": pa.array(self.log_likelihood, from_pandas=True),
            "n_labelled": pa.array(self.n_labelled),
        }
        if self.row_digests is not None:
            columns["digest"] = pa.array(self.row_digests, type=pa.string())
        if self.judgements is not None:
            columns |= self.judgements.to_arrow()
        columns |= {f"{BY_SET}{name}": pa.array(values, from_pandas=True) for name, values in self.by_set.items()}
        return pa.table(columns)

    def to_dataset(self) -> Dataset:
        """One row a row: row, score, reason, log_likelihood, n_labelled, and what else `save` writes."""
        from datasets import Dataset

        return Dataset(self.to_arrow())

    def to_pandas(self) -> DataFrame:
        """The same as a data frame."""
        return self.to_arrow().to_pandas()

    @classmethod
    def load(cls, path: str | os.PathLike[str], expected: Mapping[str, Any] | None = None) -> ForValueScores:
        """Reads what `save` wrote, or the folder of a `ScoreWriter` that is finished.

        Args:
            path: the Parquet file, or the folder.
            expected: what the scores must be made of: some or all keys of `metadata["provenance"]`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a file of scores; cut short, sorted otherwise or changed; or made of something else than
                `expected`.
        """
        if Path(path).is_dir():
            manifest, parts = read_finished(Path(path))
            metadata = {"provenance": manifest["provenance"], **manifest["metadata"]}
            _refuse_other(metadata["provenance"], expected or {}, path)
            return cls.of_parts(parts, metadata)
        table, metadata = read_table(path)
        _refuse_other(metadata.get("provenance", {}), expected or {}, path)
        return cls(
            values=table["score"].to_numpy(),
            reasons=table["reason"].to_pylist(),
            log_likelihood=table["log_likelihood"].to_numpy(),
            n_labelled=table["n_labelled"].to_numpy(),
            metadata=metadata,
            row_digests=table["digest"].to_pylist() if "digest" in table.column_names else None,
            judgements=Judgements.from_arrow(table) if "probability" in table.column_names else None,
            by_set={
                name.removeprefix(BY_SET): table[name].to_numpy()
                for name in table.column_names
                if name.startswith(BY_SET)
            },
        )

    @property
    def noise(self) -> NoiseEstimate | None:
        """What is estimated of the noise, where the scores are log odds that a row is clean."""
        facts = self.metadata.get("noise")
        return None if facts is None else NoiseEstimate.from_dict(facts)

    def summary(self) -> str:
        """A few lines for the log: what is known of the scores, their quantiles, whether length decides, and how many
        rows have none and why.
        """
        from ..report.words import summary  # made from scores, and needs what reading a file of them does not

        return summary(self)

    def worst(self, n: int = 20, dataset: Any = None) -> RowTable:
        """The n rows that score least, the worst first, with what is said of them: shown as a table in a notebook.

        Args:
            dataset: the rows that were scored; then their text is there too, and the suggested answer.
        """
        from ..report.worst import worst

        return worst(self, n, dataset)

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        weights: np.ndarray | None = None,
        noisy: np.ndarray | None = None,
    ) -> Figure:
        """Draws the histogram of the scores, from their 1st to their 99th percentile.

        Args:
            path: a PNG file to write to.
            weights: (N,), as a policy gives them: the rows of weight 0 are hatched.
            noisy: (N,) bool, where it is known which rows are noisy: clean and noisy rows are drawn apart.

        Returns:
            A figure of matplotlib, which a notebook shows.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: no row has a score.
        """
        from ..report.plots import histogram

        return histogram(self, path, weights, noisy)

    def report(self, path: str | os.PathLike[str], dataset: Any = None, **beside: Any) -> None:
        """Writes the report: one HTML file, to look at before any row is dropped.

        Args:
            path: the file.
            dataset: the rows that were scored, in their order and in any form; None: no texts are shown.
            beside: what else there is to show, by name (`report.html.write_report`): `validation`, `explanations`
                (`ForValueScorer.explain`), `weights` of a policy, `columns` to count by (those that name a source, a
                task or a label, unless told otherwise), `processing_class` for rows of token ids, `findings` and
                `warnings`, and `run`, the resolved config.

        Raises:
            ValueError: another number of rows or weights, a column that is not there, or no row has a score.
        """
        from ..report.html import write_report

        write_report(path, self, dataset, **beside)

    def _repr_html_(self) -> str:
        from ..report.html import in_notebook

        return in_notebook(self)


def best_of(by_set: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of scores (N,) by several validation sets the greatest of each row, (N,), in standard deviations from the mean
    by each set: a row that is good for one aim is good. NaN stays.
    """
    standard = []
    for values in by_set.values():
        scored = values[np.isfinite(values)]
        mean, spread = (scored.mean(), scored.std()) if len(scored) else (0.0, 0.0)
        alike = spread <= 1e-9 * abs(mean)  # what they differ by is rounding
        standard.append((values - mean) * 0 if alike else (values - mean) / spread)
    return np.max(standard, axis=0)


def grouped_reasons(reasons: Iterable[str | None]) -> list[tuple[int, str]]:
    """How many rows have each reason, the most frequent first; None is no reason.

    Reasons that differ in a number only are one, which names the least and the greatest: "600 to 2,048 tokens".
    """
    groups: dict[str, list[str]] = {}
    for reason in reasons:
        if reason is not None:
            groups.setdefault(NUMBER.sub("0", reason), []).append(reason)
    found = []
    for same in groups.values():
        columns = iter(list(zip(*map(NUMBER.findall, same), strict=True)))
        text = NUMBER.sub(lambda _, columns=columns: _span(next(columns)), same[0])  # type: ignore[misc]
        found.append((len(same), text))
    return sorted(found, key=lambda group: -group[0])


def _span(numbers: Iterable[str]) -> str:
    ordered = sorted(set(numbers), key=lambda number: float(number.replace(",", "")))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _refuse_other(provenance: Mapping[str, Any], expected: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    if other := differing(provenance, expected):
        raise ValueError(
            f"the scores in {path} were made with other {' and other '.join(other)}: score again, or go back to what "
            "they were made with"
        )


def _first_difference(a: Sequence[str], b: Sequence[str]) -> int:
    """The first place where two sequences differ; the length of the shorter one where none does."""
    return next((row for row, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
