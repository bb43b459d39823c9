import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from forvalue_callbacks.core.stats import auc, inverse_with_ridge, power_of_moment, spearman

D = 6


def moment(n, dtype=torch.float64):
    hidden = torch.randn(n, D, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return hidden.T @ hidden / n


def test_the_rank_correlation_agrees_with_scipy_where_there_are_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 80).astype(float), rng.integers(0, 9, 80)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(spearman(x, np.ones(80)))


def test_auc_counts_ties_half():
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    rng = np.random.default_rng(1)
    clean, noisy = rng.integers(2, 9, 30), rng.integers(0, 7, 50)
    truth = np.repeat([1, 0], [30, 50])
    assert auc(clean, noisy) == pytest.approx(roc_auc_score(truth, np.concatenate([clean, noisy])), abs=1e-12)


@pytest.mark.parametrize("power", [-1.0, -0.5, -0.25, 0.5])
def test_a_power_of_a_moment_is_that_of_the_ridged_matrix(power):
    ridged = moment(50) + (0.1 * moment(50).diagonal().mean() + 0.03) * torch.eye(D, dtype=torch.float64)
    got = power_of_moment(moment(50), power, ridge=0.1, floor=0.03)
    want = np.linalg.matrix_power(ridged.numpy(), -1 if power < 0 else 1)
    torch.testing.assert_close(
        torch.linalg.matrix_power(got, round(1 / abs(power))), torch.from_numpy(want), rtol=1e-10, atol=1e-10
    )
    rotated = power_of_moment(moment(50), power, ridge=0.1, floor=0.03, rotated=True)
    torch.testing.assert_close(rotated @ rotated.T, got @ got, rtol=1e-10, atol=1e-10)


def test_a_moment_of_fewer_positions_than_dimensions_has_finite_powers():
    """Rounding leaves it eigenvalues below zero, which have no root."""
    assert (torch.linalg.eigvalsh(moment(2)) < 0).any()
    for ridge, floor in ((1e-20, 0.0), (0.0, 1e-20)):
        assert torch.isfinite(power_of_moment(moment(2), -0.25, ridge=ridge, floor=floor)).all()


def test_the_inverse_is_that_of_the_ridged_matrix_in_float64():
    got = inverse_with_ridge(moment(50, torch.float32), 0.1)
    torch.testing.assert_close(got, power_of_moment(moment(50, torch.float32).double(), -1.0, ridge=0.1))
    assert got.dtype == torch.float64
    assert torch.isfinite(inverse_with_ridge(moment(2), 0.1)).all()
