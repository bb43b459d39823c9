"""The classifier of noise, the shares of its kinds, and the log odds of a row."""

import numpy as np
import pytest

from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.methods.calibration import (
    FOLDS,
    Relative,
    fit_classifier,
    log_odds,
    share_by_moments,
    shares,
    shift_to,
)

NOISY = np.array([False, True, True])


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
    return fitted(np.concatenate([clean, one, two]), classes, np.tile(np.arange(n), 3))


def fitted(x, classes, rows):
    """On rows of one length."""
    return fit_classifier(x, np.zeros(len(x)), classes, rows % FOLDS)


def log_p_of(classifier, x):
    return classifier.by_fold(x, np.zeros(len(x))).mean(0)


@pytest.mark.parametrize("share", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.1, 0.4)])
def test_shares_of_a_known_mixture_are_found(share):
    classifier, _ = calibrated()
    x, kind = mixture(1000, share, 9)
    found = shares(log_p_of(classifier, x), 250)
    assert found.sum() == pytest.approx(1)
    assert abs((1 - found[0]) - sum(share)) < 0.06
    if sum(share):
        scores = log_odds(log_p_of(classifier, x), found, NOISY)
        assert auc(scores[kind == 0], scores[kind > 0]) > 0.8
        assert abs((scores < 0).mean() - sum(share)) < 0.15, "0 is where a row is as likely noisy as clean"


def test_no_noise_is_found_where_there_is_none():
    """What the validation rows' own sampling error looks like from 3,000 clean rows is no evidence."""
    for seed in range(4):
        classifier, _ = calibrated(seed=10 * seed)
        x, _ = mixture(3000, (0, 0), seed + 5)
        assert shares(log_p_of(classifier, x), 250).tolist() == [1, 0, 0]


def test_out_of_fold_probabilities_do_not_know_their_own_row():
    """Features that say nothing: out of fold the classes cannot be told, in sample they can."""
    rng = np.random.default_rng(0)
    x, classes = rng.normal(size=(60, 20)), np.repeat([0, 1], 30)
    _, held_out = fitted(x, classes, np.tile(np.arange(30), 2))
    score = held_out[:, 0]
    assert auc(score[:30], score[30:]) < 0.7


def test_copies_of_a_row_are_never_in_different_folds():
    """A row and its copy look the same: what is said of both out of fold is the same."""
    x, classes = np.random.default_rng(0).normal(size=(30, 20)).repeat(2, 0), np.arange(60) % 2
    _, held_out = fitted(x, classes, np.arange(30).repeat(2))
    np.testing.assert_array_equal(held_out[::2], held_out[1::2])


def test_classes_count_alike_however_many_rows_they_have():
    x = np.random.default_rng(0).normal(size=(600, 2))
    classifier, _ = fitted(x, (np.arange(600) >= 500).astype(int), np.arange(600))
    assert abs(log_p_of(classifier, x).mean(0) - np.log(0.5)).max() < 0.1


def test_log_odds_are_those_of_bayes():
    p = np.array([[0.5, 0.3, 0.2]])
    share = np.array([0.6, 0.1, 0.3])
    want = np.log(0.5 * 0.6) - np.log(0.3 * 0.1 + 0.2 * 0.3)
    # The floor of half a row for each kind is above 0.1 with one row: take many.
    assert log_odds(np.log(np.repeat(p, 100, 0)), share, NOISY)[0] == pytest.approx(want)


def test_another_form_of_clean_rows_counts_as_clean():
    p, share = np.array([[0.2, 0.5, 0.3]]), np.array([0.5, 0.3, 0.2])
    want = np.log(0.2 * 0.5 + 0.5 * 0.3) - np.log(0.3 * 0.2)
    got = log_odds(np.log(np.repeat(p, 100, 0)), share, np.array([False, False, True]))
    assert got[0] == pytest.approx(want)


def test_rows_are_ranked_by_a_kind_that_was_not_found():
    """It keeps the share of half a row."""
    p = np.linspace(0.1, 0.9, 100)
    odds = log_odds(np.log(np.stack([p, 1 - p], 1)), np.array([1.0, 0.0]), NOISY[:2])
    np.testing.assert_allclose(odds, np.log(p) - np.log((1 - p) * 0.5 / 100), rtol=1e-12)


def test_auc_counts_ties_half():
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_what_length_alone_makes_of_a_measure_is_no_evidence():
    """A measure that falls with the length, and spreads."""
    rng = np.random.default_rng(0)

    def rows(n, low, high):
        length = rng.uniform(low, high, n)
        return (-3 * length + rng.normal(size=n) * np.exp(length))[:, None], length

    relative = Relative.of(*rows(2000, 0, 2))
    for low, high in ((0, 0.3), (1.7, 2.0)):
        z = relative(*rows(2000, low, high))
        assert abs(z.mean()) < 0.15
        assert z.std() == pytest.approx(1, abs=0.15)
    x, length = rows(5, 9, 9.1)  # longer than any clean row: as the longest
    np.testing.assert_allclose(relative(x, length), relative(x, np.full(5, 50.0)))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_the_share_by_moments_is_right_and_so_is_its_error(share):
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        clean, noisy = rng.normal(1, 1, 100), [rng.normal(0, 1, 50), rng.normal(-1, 1, 100)]
        weights = np.array([0.25, 0.75])
        kind = rng.choice(3, 150, p=[1 - share, *(share * weights)])
        found.append(
            share_by_moments(rng.normal(np.array([1, 0, -1])[kind], 1), [clean], noisy, np.array([1, *weights]))
        )
    shares_found, errors = np.array(found).T
    if share:
        assert shares_found.mean() == pytest.approx(share, abs=0.02)
        assert errors.mean() == pytest.approx(shares_found.std(), rel=0.2)
    else:
        assert (shares_found > 1.96 * errors).mean() < 0.06


def test_log_odds_say_the_share_and_put_no_more_rows_below_zero_than_are_allowed():
    odds = np.random.default_rng(0).normal(0, 3, 1000)
    shifted = odds + shift_to(odds, 0.2, 1.0)
    assert (1 / (1 + np.exp(shifted))).mean() == pytest.approx(0.2, abs=1e-6)
    certain = np.concatenate([np.full(300, -20.0), np.full(700, 20.0)]) + np.linspace(0, 1, 1000)
    assert (certain + shift_to(certain, 0.3, 0.1) < 0).sum() == 100
    assert (odds + shift_to(odds, 0.0, 0.0) >= 0).all()


def test_the_ridge_moves_smoothly_with_the_data():
    """Where two of those tried do as well, rounding would choose, and decisions with it."""
    rng = np.random.default_rng(0)
    classes, rows = np.repeat([0, 1], 75), np.arange(150)
    length, noise = rng.normal(size=150), rng.normal(size=(150, 3))
    shifted = classes[:, None] * np.array([1.0, 0.5, 0.0])
    ridges = [
        fit_classifier(noise + s * shifted, length, classes, rows % FOLDS)[0].ridge for s in np.geomspace(2.3, 3.3, 5)
    ]
    assert max(ridges) > 2 * min(ridges)
    assert np.abs(np.diff(np.log(ridges))).max() < np.log(5)


def test_rows_out_of_fold_look_no_more_usual_than_rows_that_nobody_has_seen():
    """Few clean rows, against which all are made relative: those of a fold may not be among them."""
    gaps = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x, length = rng.standard_t(4, size=(90, 8)), rng.normal(size=90)
        x[45:] += 0.7
        classes, rows = np.repeat([0, 1], 45), np.tile(np.arange(45), 2)
        classifier, held_out = fit_classifier(x, length, classes, rows % FOLDS)
        unseen = classifier.by_fold(rng.standard_t(4, size=(1000, 8)), rng.normal(size=1000))
        gaps.append(np.exp(held_out[:45, 0]).mean() - np.exp(unseen[:, :, 0]).mean())
    assert abs(np.mean(gaps)) < 0.02
