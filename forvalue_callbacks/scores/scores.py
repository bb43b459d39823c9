"""One score per row, and what made them; one Parquet file on disk. Knows no model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

METADATA_KEY = b"forvalue_scores"
INSTEAD = "give the file that it wrote (a run keeps forvalue_scores.parquet in its output_dir), or score again"
# What scores are made of, for people.
PARTS = {"weights": "weights", "validation": "validation rows", "data": "training rows", "config": "settings"}
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")


@dataclass(eq=False)
class ForValueScores:
    """Scores of N rows, in row order.

    Args:
        values: (N,) float64, higher = more valuable; NaN where a row could not be scored.
        reasons: N entries: why a row could not be scored, None where it was; what logs and files do not bear (control
            characters, halves of characters) becomes "?".
        log_likelihood: (N,) float64, sum of log p over the labelled tokens; NaN where a row could not be scored.
        n_labelled: (N,) int64, number of labelled tokens.
        metadata: JSON-able. `metadata["provenance"]` maps each part that determines the scores (weights, validation,
            data, config) to its hash; everything else (versions, the config itself) is for the reader.

    Raises:
        ValueError: the lengths differ, or a row has neither a score nor a reason, or both.
    """

    values: np.ndarray
    reasons: list[str | None]
    log_likelihood: np.ndarray
    n_labelled: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = np.asarray(self.values, dtype=np.float64)
        self.reasons = [None if reason is None else _printable(reason) for reason in self.reasons]
        self.log_likelihood = np.asarray(self.log_likelihood, dtype=np.float64)
        self.n_labelled = np.asarray(self.n_labelled, dtype=np.int64)
        lengths = [len(self.values), len(self.reasons), len(self.log_likelihood), len(self.n_labelled)]
        if len(set(lengths)) != 1:
            raise ValueError(f"values, reasons, log_likelihood and n_labelled differ in length: {lengths}")
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
    ) -> ForValueScores:
        """Scores of the rows at the places `index`; all others have a reason, get NaN and no labelled tokens."""
        n = len(reasons)
        scores, likelihoods, lengths = np.full(n, np.nan), np.full(n, np.nan), np.zeros(n, dtype=np.int64)
        scores[index], likelihoods[index], lengths[index] = values, log_likelihood, n_labelled
        return cls(scores, reasons, likelihoods, lengths, metadata)

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
        if "noise" in self.metadata:
            lines.append("log odds that a row is clean")
        return "\n".join(lines)

    @property
    def fingerprint(self) -> str:
        """Hash of `metadata["provenance"]`, 32 hex digits: the same wherever the same parts made the scores."""
        provenance = json.dumps(self.metadata.get("provenance", {}), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(provenance.encode())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one Parquet file (row, score, reason, log_likelihood, n_labelled); a row without a score has null.

        The file appears whole or not at all. The metadata are JSON in the Parquet schema.
        """
        path = Path(path)
        columns = {
            "row": pa.array(np.arange(len(self))),
            "score": pa.array(self.values, from_pandas=True),  # NaN becomes null
            "reason": pa.array(self.reasons, type=pa.string()),
            "log_likelihood": pa.array(self.log_likelihood, from_pandas=True),
            "n_labelled": pa.array(self.n_labelled),
        }
        table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(self.metadata)})
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            pq.write_table(table, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], expected: Mapping[str, Any] | None = None) -> ForValueScores:
        """Reads what `save` wrote.

        Args:
            path: the Parquet file.
            expected: what the scores must be made of: some or all keys of `metadata["provenance"]`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a file of scores, or made of something else than `expected`.
        """
        try:
            with pq.ParquetFile(path) as file:
                table = file.read()
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read as a Parquet file: {INSTEAD}") from error
        stored = (table.schema.metadata or {}).get(METADATA_KEY)
        if stored is None:
            raise ValueError(f"{path} was not written by ForValueScores.save: {INSTEAD}")
        metadata = json.loads(stored)
        _check_provenance(metadata.get("provenance", {}), expected or {}, path)
        return cls(
            values=table["score"].to_numpy(),
            reasons=table["reason"].to_pylist(),
            log_likelihood=table["log_likelihood"].to_numpy(),
            n_labelled=table["n_labelled"].to_numpy(),
            metadata=metadata,
        )

    def summary(self) -> str:
        """A few lines for the log: what is known of the scores, their quantiles, whether length decides, and how many
        rows have none and why.
        """
        from ..core.stats import spearman  # here, since core imports torch

        scored = np.isfinite(self.values)
        lines = [f"rows        {len(self)}", f"scored      {scored.sum()}"]
        lines += self.metadata.get("noise", {}).get("report", [])
        if scored.any():
            names = ["min", "5%", "25%", "median", "75%", "95%", "max"]
            quantiles = np.quantile(self.values[scored], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
            lines.append(
                "score       " + "  ".join(f"{name} {q:.4g}" for name, q in zip(names, quantiles, strict=True))
            )
            rho = spearman(self.values[scored], self.n_labelled[scored])
            if np.isnan(rho):  # nothing to correlate with
                lines.append("length      all scores or all numbers of labelled tokens are the same")
            else:
                hint = ": long rows decide; compare normalize='length'" if abs(rho) > 0.5 else ""
                lines.append(f"length      Spearman correlation of score and labelled tokens {rho:+.2f}{hint}")
        lines += [f"not scored  {count}: {reason}" for count, reason in grouped_reasons(self.reasons)]
        return "\n".join(lines)

    def plot(
        self, path: str | os.PathLike[str], weights: np.ndarray | None = None, noisy: np.ndarray | None = None
    ) -> None:
        """Draws the histogram of the scores as a PNG, from their 1st to their 99th percentile.

        Args:
            path: the PNG file.
            weights: (N,), as a policy gives them: the rows of weight 0 are hatched.
            noisy: (N,) bool, where it is known which rows are noisy: clean and noisy rows are drawn apart.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: no row has a score.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'forvalue-callbacks[plot]'") from error

        scored = np.isfinite(self.values)
        if not scored.any():
            raise ValueError("no row has a score: nothing to plot")
        low, high = np.percentile(self.values[scored], [1, 99])
        margin = 0.0 if high > low else 0.5
        bins = np.linspace(low - margin, high + margin, 61).tolist()
        outside = int(((self.values < bins[0]) | (self.values > bins[-1])).sum())

        axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
        if noisy is None:
            axes.hist(self.values[scored], bins, color="tab:blue", alpha=0.5, label=f"{scored.sum()} rows")
        else:
            noisy = np.asarray(noisy, dtype=bool)
            for rows, color, name in ((scored & ~noisy, "tab:blue", "clean"), (scored & noisy, "tab:orange", "noisy")):
                axes.hist(self.values[rows], bins, color=color, alpha=0.5, label=f"{rows.sum()} {name} rows")
        if weights is not None:
            dropped = scored & (np.asarray(weights) == 0)
            label = f"{dropped.sum()} dropped"
            axes.hist(self.values[dropped], bins, histtype="step", hatch="////", color="black", label=label)
        axes.set_xlim(bins[0], bins[-1])
        axes.set_xlabel(
            f"For-Value score ({outside} rows lie outside of this range)" if outside else "For-Value score"
        )
        axes.set_ylabel("rows")
        axes.legend()
        figure.savefig(path, dpi=120, format="png")


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder that can be written to, made where there is none.

    Raises:
        ValueError: it cannot be, as a file tried out there shows.
    """
    trial = Path(folder) / f".forvalue.{os.getpid()}"
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(
            f"nothing can be written to the folder {folder} ({error.strerror}): choose another."
        ) from error
    return trial.parent


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


def _check_provenance(
    provenance: Mapping[str, Any], expected: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    expected = json.loads(json.dumps(dict(expected)))  # a tuple comes back from JSON as a list
    differing = [PARTS.get(key, key) for key in expected if provenance.get(key) != expected[key]]
    if differing:
        raise ValueError(
            f"the scores in {path} were made with other {' and other '.join(differing)}: score again, or go back to "
            "what they were made with"
        )


def _printable(reason: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in reason)
