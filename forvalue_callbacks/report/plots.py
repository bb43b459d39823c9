"""Plots of scores."""

from __future__ import annotations

import os

import numpy as np

from ..scores.scores import ForValueScores


def histogram(
    scores: ForValueScores, path: str | os.PathLike[str], weights: np.ndarray | None, noisy: np.ndarray | None
) -> None:
    """Draws the histogram of the scores: see `ForValueScores.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'forvalue-callbacks[plot]'") from error

    scored = np.isfinite(scores.values)
    if not scored.any():
        raise ValueError("no row has a score: nothing to plot")
    low, high = np.percentile(scores.values[scored], [1, 99])
    margin = 0.0 if high > low else 0.5
    bins = np.linspace(low - margin, high + margin, 61).tolist()
    outside = int(((scores.values < bins[0]) | (scores.values > bins[-1])).sum())

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    if noisy is None:
        axes.hist(scores.values[scored], bins, color="tab:blue", alpha=0.5, label=f"{scored.sum()} rows")
    else:
        noisy = np.asarray(noisy, dtype=bool)
        for rows, color, name in ((scored & ~noisy, "tab:blue", "clean"), (scored & noisy, "tab:orange", "noisy")):
            axes.hist(scores.values[rows], bins, color=color, alpha=0.5, label=f"{rows.sum()} {name} rows")
    if weights is not None:
        dropped = scored & (np.asarray(weights) == 0)
        label = f"{dropped.sum()} dropped"
        axes.hist(scores.values[dropped], bins, histtype="step", hatch="////", color="black", label=label)
    axes.set_xlim(bins[0], bins[-1])
    axes.set_xlabel(f"For-Value score ({outside} rows lie outside of this range)" if outside else "For-Value score")
    axes.set_ylabel("rows")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
