"""Runs that were paired by their seeds: differences with intervals, a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from forvalue_callbacks.methods import METHODS

BASE, RANDOM, CEILING = "no filter", "random", "clean rows alone"
Run = dict[str, Any]  # a line of the file of results


class Difference(NamedTuple):
    """Mean over pairs, its 95 % interval by Student's t (NaN for a single pair), and how many pairs there are."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        if self.pairs < 2:
            return f"{self.mean:+.3f} (1 seed)"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def paired(runs: dict[int, float], others: dict[int, float]) -> Difference | None:
    """The first minus the second, by seed, over the seeds that both have; None without any."""
    differences = np.array([runs[seed] - others[seed] for seed in runs if seed in others])
    n = len(differences)
    if n == 0:
        return None
    half = float(student.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    mean = float(differences.mean())
    return Difference(mean, mean - half, mean + half, n)


def by_seed(runs: list[Run], measure: str) -> dict[int, float]:
    return {run["seed"]: run[measure] for run in runs}


def grouped(runs: list[Run], budget: str) -> dict[tuple[str, str | None], list[Run]]:
    """Arm and how many rows it drops -> its runs at a budget; those that are the same at every budget are in each."""
    out: dict[tuple[str, str | None], list[Run]] = {}
    for run in runs:
        if run["budget"] in (budget, None):
            out.setdefault((run["arm"], run["drop"]), []).append(run)
    return out


def table(runs: list[Run], budget: str, measure: str) -> list[str]:
    """Markdown, a line per arm: means over seeds, and differences to no filter and to random rows by `measure`.

    `gap`: of the way from no filter to the clean rows, the share that the arm has gone.
    """
    arms = grouped(runs, budget)
    head = ["arm", "dropped", "kept", "wrong among kept", measure.replace("_", " "), "to no filter (95 %)"]
    head += ["to random (95 %)", "gap", "valuation s", "training s", "seeds"]
    if measure != "test_loss":
        head.insert(5, "test loss")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    base, ceiling = (by_seed(arms.get((name, None), []), measure) for name in (BASE, CEILING))
    whole = paired(ceiling, base)
    for (arm, drop), here in arms.items():
        values = by_seed(here, measure)
        to_base = None if arm == BASE else paired(values, base)
        rivals = by_seed(arms.get((RANDOM, drop), []), measure)
        to_random = None if arm in (BASE, RANDOM) else paired(values, rivals)
        gap = f"{to_base.mean / whole.mean:.0%}" if to_base and whole and whole.mean else ""
        cells = [arm, drop or "", f"{_mean(here, 'kept_share'):.0%}", _share(here), _spread(here, measure)]
        cells += [_spread(here, "test_loss")] if measure != "test_loss" else []
        cells += ["" if d is None else str(d) for d in (to_base, to_random)]
        cells += [gap, f"{_mean(here, 'valuation_seconds'):.1f}", f"{_mean(here, 'training_seconds'):.0f}"]
        lines.append(f"| {' | '.join([*cells, str(len(here))])} |")
    return lines


def _mean(runs: list[Run], measure: str) -> float:
    return float(np.mean([run[measure] for run in runs]))


def _share(runs: list[Run]) -> str:
    known = [run["wrong_share"] for run in runs if run["wrong_share"] is not None]
    return f"{np.mean(known):.1%}" if known else ""


def _spread(runs: list[Run], measure: str) -> str:
    values = [run[measure] for run in runs]
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def spread(values: list[float], gap: float) -> list[float]:
    """Places of labels beside these heights, of 0 to 1 in any order: as near as may be, at least `gap` apart."""
    order = np.argsort(values, kind="stable")
    places = np.array(values, dtype=float)[order]
    gap = min(gap, 1 / max(1, len(places) - 1))
    for k in range(1, len(places)):
        places[k] = max(places[k], places[k - 1] + gap)
    ceiling = 1.0
    for k in range(len(places) - 1, -1, -1):
        places[k] = min(places[k], ceiling)
        ceiling = places[k] - gap
    out = np.empty(len(places))
    out[order] = places
    return out.tolist()


def _points(axes: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Dots, and their names in a column to the right, each with a line to its dot: many lie on top of one another.

    Args:
        points: x, y, name and colour.
    """
    low, high = min(y for _, y, *_ in points), max(y for _, y, *_ in points)
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    heights = [(y - low + margin) / (high - low + 2 * margin) for _, y, *_ in points]
    for (x, y, name, color), place in zip(points, spread(heights, 0.05), strict=True):
        axes.plot(x, y, "o", color=color)
        axes.annotate(
            name,
            (x, y),
            xytext=(1.04, place),
            textcoords="axes fraction",
            fontsize=8,
            color=color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 0},
        )


def picture(runs: list[Run], budgets: list[str], measure: str, path: Path) -> None:
    """Quality against the share of rows kept, and against seconds of valuation: a row of panels per budget."""
    figure = Figure(figsize=(15, 5 * len(budgets)), layout="constrained")
    rows = figure.subplots(len(budgets), 2, squeeze=False)
    for budget, (left, right) in zip(budgets, rows, strict=True):
        arms = grouped(runs, budget)
        several = len({drop for _, drop in arms if drop is not None}) > 1
        for axes, what in ((left, "kept_share"), (right, "valuation_seconds")):
            shown = [arm for arm in arms if what == "kept_share" or arm[0] not in (BASE, CEILING)]
            points = []
            for arm, drop in shown:
                here = arms[arm, drop]
                color = "tab:orange" if arm.split(",")[0] in METHODS else "tab:blue"
                name = f"{arm} ({drop})" if several and drop is not None else arm
                points.append((_mean(here, what), _mean(here, measure), name, color))
            if points:
                _points(axes, points)
            for name, style in ((BASE, "-"), (CEILING, ":")):
                if (name, None) in arms:
                    axes.axhline(_mean(arms[name, None], measure), color="grey", linewidth=0.8, linestyle=style)
            axes.set(ylabel=f"{measure.replace('_', ' ')} on test rows", title=f"equal {budget}")
        left.set_xlabel("share of the rows trained on (lines: no filter; dotted: clean rows)")
        right.set(xlabel="seconds of valuation", xscale="symlog")
        right.set_xlim(left=0)
    figure.savefig(path, dpi=80)
