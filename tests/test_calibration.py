"""The classifier of noise, the shares of its kinds, and the log odds of a row."""

import numpy as np
import pytest

from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.methods.calibration import fit_classifier, log_odds, shares


def mixture(n, share, seed):
    """Three features; noise of kind 1 shifts the first, of kind 2 spreads the second."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(3, n, p=[1 - sum(share), *share])
    x = rng.normal(size=(n, 3))
    x[kind == 1, 0] += 2
    x[kind == 2, 1] *= 4
    return x, kind


def calibrated(n=250, seed=0):
    clean, _ = mixture(n, (0, 0), seed)
    one, two = mixture(n, (1, 0), seed + 1)[0], mixture(n, (0, 1), seed + 2)[0]
    classes = np.repeat([0, 1, 2], n)
    return fit_classifier(np.concatenate([clean, one, two]), classes, np.tile(np.arange(n), 3))


@pytest.mark.parametrize("share", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.1, 0.4)])
def test_shares_of_a_known_mixture_are_found(share):
    classifier, _ = calibrated()
    x, kind = mixture(1000, share, 9)
    found = shares(classifier.log_p(x), 250)
    assert found.sum() == pytest.approx(1)
    assert abs((1 - found[0]) - sum(share)) < 0.06
    if sum(share):
        scores = log_odds(classifier.log_p(x), found)
        assert auc(scores[kind == 0], scores[kind > 0]) > 0.8
        assert abs((scores < 0).mean() - sum(share)) < 0.15, "0 is where a row is as likely noisy as clean"


def test_no_noise_is_found_where_there_is_none():
    """What the validation rows' own sampling error looks like from 3,000 clean rows is no evidence."""
    for seed in range(4):
        classifier, _ = calibrated(seed=10 * seed)
        x, _ = mixture(3000, (0, 0), seed + 5)
        assert shares(classifier.log_p(x), 250).tolist() == [1, 0, 0]


def test_out_of_fold_probabilities_do_not_know_their_own_row():
    """Features that say nothing: out of fold the classes cannot be told, in sample they can."""
    rng = np.random.default_rng(0)
    x, classes = rng.normal(size=(60, 20)), np.repeat([0, 1], 30)
    _, held_out = fit_classifier(x, classes, np.tile(np.arange(30), 2))
    score = held_out[:, 0]
    assert auc(score[:30], score[30:]) < 0.7


def test_copies_of_a_row_are_never_in_different_folds():
    """A row and its copy look the same: what is said of both out of fold is the same."""
    x, classes = np.random.default_rng(0).normal(size=(30, 20)).repeat(2, 0), np.arange(60) % 2
    _, held_out = fit_classifier(x, classes, np.arange(30).repeat(2))
    np.testing.assert_array_equal(held_out[::2], held_out[1::2])


def test_classes_count_alike_however_many_rows_they_have():
    x = np.random.default_rng(0).normal(size=(600, 2))
    classifier, _ = fit_classifier(x, (np.arange(600) >= 500).astype(int), np.arange(600))
    assert abs(classifier.log_p(x).mean(0) - np.log(0.5)).max() < 0.1


def test_log_odds_are_those_of_bayes():
    p = np.array([[0.5, 0.3, 0.2]])
    share = np.array([0.6, 0.1, 0.3])
    want = np.log(0.5 * 0.6) - np.log(0.3 * 0.1 + 0.2 * 0.3)
    # The floor of half a row for each kind is above 0.1 with one row: take many.
    assert log_odds(np.log(np.repeat(p, 100, 0)), share)[0] == pytest.approx(want)


def test_rows_are_ranked_by_a_kind_that_was_not_found():
    """It keeps the share of half a row."""
    p = np.linspace(0.1, 0.9, 100)
    odds = log_odds(np.log(np.stack([p, 1 - p], 1)), np.array([1.0, 0.0]))
    np.testing.assert_allclose(odds, np.log(p) - np.log((1 - p) * 0.5 / 100), rtol=1e-12)


def test_auc_counts_ties_half():
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
