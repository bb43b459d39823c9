"""Scores with judgements, rows and explanations, as a report takes them."""

import numpy as np

from forvalue_callbacks.scores.explanations import Explanation
from forvalue_callbacks.scores.judgements import Judgements
from forvalue_callbacks.scores.noise import Evidence, NoiseEstimate, ValidationNoise
from forvalue_callbacks.scores.scores import ForValueScores

SOURCES = ("forum", "books", "wiki")
# What a row may hold: markup, the end of a script, what only shows elsewhere, halves of characters.
HOSTILE = (
    "<img src=x onerror=\"document.title='hacked'\"></script><script>document.title='hacked'</script>"
    "<!-- {{ 7 * 7 }} {% raw %} &amp; '\" \x00\x07\x1b[31m\u202eright to left\u2028\u2029\ud800 end"
)


def judged_scores(n, seed=0, unscored=2):
    """Log odds, a third of them below 0 and judged noisy; the first `unscored` rows have no score."""
    rng = np.random.default_rng(seed)
    noisy = rng.random(n) < 1 / 3
    values = np.where(noisy, rng.normal(-4, 1.5, n), rng.normal(5, 2, n))
    values[np.abs(values) < 0.01] = 0.5
    values[:unscored] = np.nan
    reasons = ["no labelled tokens" if row < unscored else None for row in range(n)]
    said = Judgements.none(n)
    said.probability = 1 / (1 + np.exp(values))
    gone = values < 0
    said.kind = ["wrong answer" if bad else None for bad in gone]
    said.why = ["another answer is likelier for such a prompt" if bad else None for bad in gone]
    best = int(np.nanargmax(values))
    said.suggested_row = np.where(gone, best, -1)
    said.suggested_probability = np.where(gone, 0.9, np.nan)
    noise = NoiseEstimate(
        0.33,
        {
            "flipped": Evidence(0.93, (0.9, 0.96), "match", 0.91, 0.8),
            "truncated": Evidence(0.55, (0.5, 0.6), "loss", 0.55, 0.54),
        },
        40,
        share_error=0.02,
        differences=("training answers end with EOS",),
        validation=ValidationNoise(0.1, 0.02, (3,), (-2.5,)),
    )
    metadata = {
        "noise": noise.to_dict(),
        "provenance": {"weights": "aa", "validation": "bb"},
        "config": {"method": "auto"},
        "version": "0.2.0",
    }
    n_labelled = np.where(np.isnan(values), 0, rng.integers(1, 60, n))
    likelihood = np.where(np.isnan(values), np.nan, -rng.random(n))
    return ForValueScores(values, reasons, likelihood, n_labelled, metadata, None, said)


def prompts(n, hostile=()):
    """Rows of prompt and completion with a source; the rows of `hostile` hold what nobody should run."""
    return [
        {
            "prompt": HOSTILE if row in hostile else f"question {row}",
            "completion": f" {HOSTILE}" if row in hostile else f" answer {row}",
            "source": HOSTILE if row in hostile else SOURCES[row % 3],
        }
        for row in range(n)
    ]


def explanation(row):
    tokens = (" answer", f" {row}", "</script>\u2028")
    return Explanation(row, tokens, (-3.0, 0.001, 2.0), "gradient", ((3, 0.5),), ((5, -0.25),), "whitened")
