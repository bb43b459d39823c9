"""Plots of scores."""

from __future__ import annotations

import io
import os
import re
from typing import Any

import numpy as np
from markupsafe import Markup

from ..scores.scores import ForValueScores

# Colours that the page's theme takes the place of: matplotlib writes them into style attributes.
INK, LINE, MIDDLE = "#010203", "#010204", "#010205"
THEMED = {INK: "var(--muted)", LINE: "var(--line)", MIDDLE: "var(--kept)"}


def histogram(
    scores: ForValueScores,
    path: str | os.PathLike[str] | None,
    weights: np.ndarray | None,
    noisy: np.ndarray | None,
) -> Any:
    """Draws the histogram of the scores: see `ForValueScores.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'forvalue-callbacks[plot]'") from error

    class Shown(Figure):
        """A notebook shows it, whether or not pyplot is there."""

        def _repr_png_(self) -> bytes:
            self.savefig(out := io.BytesIO(), dpi=120, format="png")
            return out.getvalue()

    scored = np.isfinite(scores.values)
    if not scored.any():
        raise ValueError("no row has a score: nothing to plot")
    low, high = np.percentile(scores.values[scored], [1, 99])
    margin = 0.0 if high > low else 0.5
    bins = np.linspace(low - margin, high + margin, 61).tolist()
    outside = int(((scores.values < bins[0]) | (scores.values > bins[-1])).sum())

    axes = (figure := Shown(figsize=(7, 4), layout="constrained")).subplots()
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
    if path is not None:
        figure.savefig(path, dpi=120, format="png")
    return figure


def score_by_length(scores: ForValueScores) -> Markup | None:
    """Median and middle 80 % of the scores of rows of about the same length, as an SVG in the colours of the page;
    None without matplotlib, or where all rows are equally long."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    scored = np.isfinite(scores.values)
    values, lengths = scores.values[scored], scores.n_labelled[scored]
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 13), method="lower"))
    if len(edges) < 3:
        return None
    places = np.searchsorted(edges[1:-1], lengths, side="right")
    some = [k for k in range(len(edges) - 1) if (places == k).any()]
    at = np.array([np.median(lengths[places == k]) for k in some])
    low, middle, high = np.array([np.quantile(values[places == k], [0.1, 0.5, 0.9]) for k in some]).T
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "forvalue",
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        axes = (figure := Figure(figsize=(7.6, 2.7), layout="constrained")).subplots()
        axes.fill_between(at, low, high, color=MIDDLE, alpha=0.16, linewidth=0)
        axes.plot(at, middle, color=MIDDLE, linewidth=1.8, marker="o", markersize=3.5)
        axes.set_xlabel("labelled tokens", color=INK)
        axes.set_ylabel("score", color=INK)
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in axes.spines.values():
            side.set_visible(False)
        if at[-1] > 20 * max(1.0, at[0]):
            axes.set_xscale("log")
            axes.minorticks_off()
            round_ones = [digit * 10**k for k in range(8) for digit in (1, 2, 5)]
            axes.set_xticks(ticks := [x for x in round_ones if at[0] <= x <= at[-1]], [f"{x:,}" for x in ticks])
        figure.savefig(out := io.StringIO(), format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'font: [^"]*?; ', "font: 11px inherit; font-family: inherit; ", svg)
    for color, themed in THEMED.items():
        svg = svg.replace(color, themed)
    return Markup(
        re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1 role='img'>", svg, count=1)
    )  # no text of rows
