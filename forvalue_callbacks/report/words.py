"""What came of the scores, for people and for the tools that a trainer reports to."""

from __future__ import annotations

import numpy as np

from ..policies import Policy, describe
from ..scores.scores import ForValueScores


def numbers(scores: ForValueScores, weights: np.ndarray, seconds: float) -> dict[str, float]:
    """What there is to log, JSON-able: what the weights do, and the shares and evidence where scores have them."""
    found = {
        **describe(weights),
        "unscored": int(np.isnan(scores.values).sum()),
        "seconds": round(seconds, 3),
    }
    noise = scores.metadata.get("noise", {})
    if "share" in noise:
        found["noise_share"] = noise["share"]
    found |= {f"share_{kind}": share for kind, share in noise.get("shares", {}).items()}
    found |= {f"auc_{kind}": facts["auc"] for kind, facts in noise.get("held_out", {}).items()}
    return {f"forvalue_{name.replace(' ', '_')}": value for name, value in found.items()}


def lines(scores: ForValueScores, weights: np.ndarray, policy: Policy, seconds: float | None, drawn: bool) -> str:
    """What came of the scores: the evidence, the shares, what is kept and dropped.

    Args:
        seconds: how long the scoring took; None: it was done before.
        drawn: kept rows take the places of dropped ones, so it says how often each is drawn.
    """
    facts = describe(weights)
    how = "with the scores made before" if seconds is None else f"scored in {seconds:.1f} s"
    out = [f"For-Value: {len(scores):,} rows {how}", scores.summary()]
    out.append(f"policy      {policy} keeps {facts['kept']:,} rows and drops {facts['dropped']:,}")
    if drawn:
        mean, most = facts["draws_per_kept_row_mean"], facts["draws_per_kept_row_max"]
        out.append(
            f"draws       a kept row is drawn {mean:.2f} times an epoch"
            + (f" (at most {most:.2f})" if most > mean + 0.005 else "")
            + f"; effective sample size {facts['effective_sample_size']:,.0f}"
        )
    return "\n".join(out)
