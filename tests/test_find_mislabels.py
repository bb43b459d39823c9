"""The rivals of the recipe that looks for wrong labels: out of fold, and with what the validation rows know."""

import numpy as np
import pytest
from datasets import Dataset
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from helpers.recipes import load

recipe = load("find_mislabels")


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_no_row_teaches_the_classifier_that_judges_it_and_validation_rows_teach_each(form):
    """Rows of two classes and a column of their own each, by which a fit that saw them would know them by heart."""
    rng = np.random.default_rng(0)
    true = np.arange(60) % 2
    wrong = np.arange(60) < 12
    observed = np.where(wrong, 1 - true, true)
    x = np.concatenate([true[:, None] + 0.1 * rng.normal(size=(60, 1)), 10 * np.eye(60)], 1)
    x_known = np.concatenate([[[0.0], [1.0], [5.0]], np.zeros((3, 60))], 1)

    def made():
        return LogisticRegression(C=100)

    got = recipe.trusting_with(made, form(x), observed, form(x_known), np.array([0, 1, 2]))
    assert got[wrong].max() < np.log(0.5) < got[~wrong].min()
    alone = recipe.trusting_with(made, form(x), np.where(wrong, 2, true), form(x_known), np.array([0, 1, 2]))
    assert np.isfinite(alone).all(), "a label of few rows is known by the validation rows"


def test_a_bag_of_words_knows_the_labels_that_do_not_fit_their_words():
    words = [["red", "crimson", "scarlet"], ["blue", "navy", "azure"], ["green", "olive", "lime"]]
    rows = [{"prompt": f"{words[i % 3][i // 3 % 3]} thing {i}", "completion": str(i % 3)} for i in range(90)]
    noisy = [i % 7 == 0 for i in range(90)]
    wrong = [{**r, "completion": str((int(r["completion"]) + n) % 3)} for r, n in zip(rows, noisy, strict=True)]
    noisy = np.array(noisy)
    for name, values in recipe.word_rivals(Dataset.from_list(wrong), Dataset.from_list(rows[:30])):
        assert values[noisy].max() < values[~noisy].min(), name
