"""What came of the scores, for people and for the tools that a trainer reports to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..core.stats import spearman
from ..policies import Policy, describe
from ..progress import duration
from ..scores.noise import USEFUL_AUC, NoiseEstimate
from ..scores.scores import ForValueScores, grouped_reasons

if TYPE_CHECKING:
    from ..data.duplicates import Duplicates
    from ..probe import Estimate

# Of methods that estimate no noise.
NO_EVIDENCE = (
    "None: scores of this method order rows, and say of none that it is wrong. Nothing here shows that the dropped "
    "rows are worse than the kept ones."
)


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
        return _about_answers(noise)
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
        + _interval(noise.share, noise.share_error)
        + (f": {kinds}" if kinds else "")
        + "; of the kinds that were found, and not of others"
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
    return [*lines, *_about_validation(noise)]


def _about_answers(noise: NoiseEstimate) -> list[str]:
    """Where answers repeat."""
    (found,) = noise.evidence.values()
    told = f"a wrong answer put in on purpose is told from the right one with AUC {found}"
    if noise.n_validation:
        rests = f"on your {noise.n_validation} validation rows {told}, out of fold ({noise.n_answers} answers)"
    else:
        rests = f"without validation rows: on the rows themselves, wrong ones among them, {told}, out of fold "
        rests += f"({noise.n_answers} answers); errors that agree with each other cannot be seen"
    lines = [f"evidence    {rests}" + ("" if found.useful else ": do not filter by this")]
    if noise.views:
        lines.append("seen in     " + ", ".join(f"{view} {weight:.2f}" for view, weight in noise.views.items()))
    share = f"estimated share of wrong answers {noise.share:.2f}{_interval(noise.share, noise.share_error)}"
    lines.append(
        f"noise       {share if found.useful else 'not known: nothing here tells a wrong answer from a right one'}"
    )
    if noise.n_unjudged:
        lines.append(f"not judged  {noise.n_unjudged:,} rows, kept: too few rows are known to have their answer")
    return [*lines, *_about_validation(noise)]


def _about_validation(noise: NoiseEstimate) -> list[str]:
    """Validation rows that look wrong themselves."""
    known = noise.validation
    if known is None or not known.rows:
        return []
    return [
        f"validation  {len(known.rows)} validation rows look wrong themselves; share of wrong ones there "
        f"{known.share:.2f}{_interval(known.share, known.share_error)}"
        + (": the evidence is limited by them" if known.surely else "")
    ]


def _interval(share: float, error: float | None) -> str:
    if error is None:
        return ""
    return f" (95 %: {max(0.0, share - 1.96 * error):.2f} to {min(1.0, share + 1.96 * error):.2f})"


def numbers(
    scores: ForValueScores,
    weights: np.ndarray,
    seconds: float,
    chosen: np.ndarray | None = None,
    drawn: bool = True,
) -> dict[str, float]:
    """What there is to log, JSON-able: what the weights do, and the shares and evidence where scores have them.

    Args:
        chosen: weights that are not used, in a dry run: how many rows they would drop.
        drawn: kept rows take the places of dropped ones, so it says how often each is drawn.
    """
    facts = describe(weights)
    found = {
        **(facts if drawn else {name: facts[name] for name in ("kept", "dropped")}),
        "unscored": int(np.isnan(scores.values).sum()),
        "seconds": round(seconds, 3),
    }
    if chosen is not None:
        found["would_drop"] = int((chosen == 0).sum())
    if (noise := scores.noise) is not None:
        found["noise_share"] = noise.share
        found |= {f"share_{kind}": share for kind, share in noise.shares.items()}
        found |= {f"auc_{kind}": evidence.auc for kind, evidence in noise.evidence.items()}
    return {f"forvalue_{name.replace(' ', '_')}": value for name, value in found.items()}


def lines(
    scores: ForValueScores,
    weights: np.ndarray,
    policy: Policy,
    seconds: float | None,
    drawn: bool,
    dry_run: bool = False,
    preferences: bool = False,
) -> str:
    """What came of the scores: the evidence, the shares, what is kept and dropped.

    Args:
        seconds: how long the scoring took; None: it was done before.
        drawn: kept rows take the places of dropped ones, so it says how often each is drawn.
        dry_run: nothing is done with the weights.
        preferences: rows are pairs of a chosen and a rejected answer, or answers marked as good or bad.
    """
    facts = describe(weights)
    how = "with the scores made before" if seconds is None else f"scored in {seconds:.1f} s"
    out = [f"For-Value: {len(scores):,} rows {how}", scores.summary()]
    if preferences and not scores.by_set:
        out.append(_about_preferences(scores))
    kept, dropped = (f"{facts[name]:,}" for name in ("kept", "dropped"))
    if dry_run:
        out.append(f"policy      {policy} would keep {kept} rows and drop {dropped}: a dry run, nothing is dropped")
        return "\n".join(out)
    out.append(f"policy      {policy} keeps {kept} rows and drops {dropped}")
    if drawn:
        mean, most = facts["draws_per_kept_row_mean"], facts["draws_per_kept_row_max"]
        out.append(
            f"draws       a kept row is drawn {mean:.2f} times an epoch"
            + (f" (at most {most:.2f})" if most > mean + 0.005 else "")
            + f"; effective sample size {facts['effective_sample_size']:,.0f}"
        )
    return "\n".join(out)


def _about_preferences(scores: ForValueScores) -> str:
    """How many preference rows look as if they were the wrong way round."""
    n, scored = int((scores.values < 0).sum()), int(np.isfinite(scores.values).sum())
    return (
        f"swapped     {n:,} of {scored:,} preference rows look the wrong way round: their score is below 0 (a policy "
        "+swap:0.0 turns them round)"
    )


def about_duplicates(found: Duplicates, set_aside: bool = False) -> list[str]:
    """What is there twice, one line a fact; rows by number, from 0.

    Args:
        set_aside: training rows that are validation rows too have not been scored.
    """
    if not (found.exact or found.near or found.leaked_exact or found.leaked_near or found.validation):
        return [f"duplicates  none among {found.n_train:,} training and {found.n_validation:,} validation rows"]
    lines = []
    if found.exact:
        first = ", ".join(map(str, found.exact[0][:3]))
        lines.append(f"duplicates  {found.n_exact:,} training rows repeat another one (first: rows {first})")
    if found.near:
        first = ", ".join(map(str, found.near[0][:3]))
        lines.append(f"duplicates  {found.n_near:,} training rows nearly repeat another one (first: rows {first})")
    spoils = "the evidence is better than it should be; take them out of one of the two"
    for what, pairs, then in (
        ("are validation rows too", found.leaked_exact, "kept, without a score" if set_aside else spoils),
        ("nearly repeat a validation row", found.leaked_near, spoils),
    ):
        if pairs:
            row, at = pairs[0]
            lines.append(
                f"leakage     {len(pairs):,} of {found.n_train:,} training rows {what} (first: row {row}, validation "
                f"row {at}): {then}"
            )
    if found.validation:
        first = ", ".join(map(str, found.validation[0][:3]))
        n = sum(len(group) - 1 for group in found.validation)
        lines.append(
            f"leakage     {n:,} of {found.n_validation:,} validation rows repeat another one, exactly or nearly "
            f"(first: rows {first}): what is tested on one has been learnt from the other"
        )
    return lines


def about_estimate(estimate: Estimate) -> list[str]:
    """What scoring would take, for `--dry-run`."""
    unscored = f" ({estimate.unscored:,} more cannot be scored)" if estimate.unscored else ""
    passes = ", ".join(f"{planned.name} {planned.rows:,}" for planned in estimate.passes)
    names = {
        "weights": "weights",
        "state": "what the method keeps of the validation rows",
        "window": "a batch of rows",
    }
    memory = ", ".join(f"{names[name]} {_bytes(n)}" for name, n in estimate.memory.items() if n)
    return [
        f"rows        {estimate.rows:,} by {estimate.validation_rows:,} validation rows{unscored}",
        f"tokens      {estimate.tokens:,} that the model reads",
        f"passes      {len(estimate.passes)} (rows: {passes})",
        f"forwards    {estimate.forwards:,} over the rows to score, of at most {estimate.tokens_per_batch:,} tokens",
        f"memory      {memory}",
        f"time        {duration(estimate.seconds)}, at the pace of a few batches",
    ]


def _bytes(n: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1e3:.0f} kB"
