"""What came of the scores, for people and for the tools that a trainer reports to."""

from __future__ import annotations

import numpy as np

from ..core.stats import spearman
from ..policies import Policy, describe
from ..scores.noise import USEFUL_AUC, NoiseEstimate
from ..scores.scores import ForValueScores, grouped_reasons


def summary(scores: ForValueScores) -> str:
    """What is known of the scores, their quantiles, whether length decides, and how many rows have none and why."""
    scored = np.isfinite(scores.values)
    lines = [f"rows        {len(scores)}", f"scored      {scored.sum()}"]
    if scores.noise is not None:
        lines += about_noise(scores.noise)
    if scored.any():
        names = ["min", "5%", "25%", "median", "75%", "95%", "max"]
        quantiles = np.quantile(scores.values[scored], [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
        lines.append("score       " + "  ".join(f"{name} {q:.4g}" for name, q in zip(names, quantiles, strict=True)))
        rho = spearman(scores.values[scored], scores.n_labelled[scored])
        if np.isnan(rho):  # nothing to correlate with
            lines.append("length      all scores or all numbers of labelled tokens are the same")
        else:
            hint = ": long rows decide; compare normalize='length'" if abs(rho) > 0.5 else ""
            lines.append(f"length      Spearman correlation of score and labelled tokens {rho:+.2f}{hint}")
    lines += [f"not scored  {count}: {reason}" for count, reason in grouped_reasons(scores.reasons)]
    return "\n".join(lines)


def about_noise(noise: NoiseEstimate) -> list[str]:
    """The evidence, and how much noise there seems to be."""
    if noise.n_answers is not None:
        (found,) = noise.evidence.values()
        low, high = found.interval or (found.auc, found.auc)
        hint = ": do not filter by this" if low < USEFUL_AUC else ""
        share = f"noise       estimated share of wrong answers {noise.share:.2f}" + _interval(noise)
        lines = [
            f"evidence    on your {noise.n_validation} validation rows a wrong answer put in on purpose is told from "
            f"the right one with AUC {found.auc:.2f} (95 %: {low:.2f} to {high:.2f}; cross-fitted; {noise.n_answers} "
            f"different answers){hint}",
            share,
        ]
        if noise.n_unjudged:
            lines.append(f"not judged  {noise.n_unjudged:,} rows, kept: too few validation rows have their answer")
        return lines
    return _about_copies(noise)


def _about_copies(noise: NoiseEstimate) -> list[str]:
    """That of rows whose answers do not repeat: the evidence is about corrupted copies."""
    lines = [
        f"evidence    on your {noise.n_validation} validation rows against copies corrupted on purpose (AUC, "
        "cross-fitted; 95 %):",
    ]
    for kind, found in noise.evidence.items():
        low, high = found.interval or (found.auc, found.auc)
        lines.append(
            f"            {kind:26s} {found.auc:.2f} ({low:.2f} to {high:.2f}; best single measure: {found.best} "
            f"{found.best_auc:.2f}; mean log-likelihood {found.loss_auc:.2f})"
        )
    lines.append("            this is about copies made for the purpose: no promise about the errors of your data")
    hidden = " or ".join(kind for kind, found in noise.evidence.items() if found.auc < USEFUL_AUC)
    if hidden:
        lines.append(f"            on your validation rows no score finds {hidden}: do not filter by this against it")
    lines += [f"form        {difference}: a difference of form, no noise" for difference in noise.differences]
    kinds = ", ".join(f"{kind} {share:.2f}" for kind, share in noise.shares.items() if share >= 0.005)
    lines.append(
        f"noise       estimated share of noisy rows among those judged {noise.share:.2f}"
        + _interval(noise)
        + (f": {kinds}" if kinds else "")
    )
    if noise.n_unjudged:
        lines.append(
            f"not judged  {noise.n_unjudged:,} rows, kept: their prompts, lengths or forms are unlike those of all "
            "validation rows; give validation rows of their kind"
        )
    if noise.n_unlike:
        lines.append(
            f"look at     {noise.n_unlike:,} rows, kept: unlike the validation rows and every kind of noise tried"
        )
    return lines


def _interval(noise: NoiseEstimate) -> str:
    """Of the share, where its error is known."""
    if noise.share_error is None:
        return ""
    spread = 1.96 * noise.share_error
    return f" (95 %: {max(0.0, noise.share - spread):.2f} to {min(1.0, noise.share + spread):.2f})"


def numbers(scores: ForValueScores, weights: np.ndarray, seconds: float) -> dict[str, float]:
    """What there is to log, JSON-able: what the weights do, and the shares and evidence where scores have them."""
    found = {
        **describe(weights),
        "unscored": int(np.isnan(scores.values).sum()),
        "seconds": round(seconds, 3),
    }
    if (noise := scores.noise) is not None:
        found["noise_share"] = noise.share
        found |= {f"share_{kind}": share for kind, share in noise.shares.items()}
        found |= {f"auc_{kind}": evidence.auc for kind, evidence in noise.evidence.items()}
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
