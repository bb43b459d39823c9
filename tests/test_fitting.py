import numpy as np
import pytest
import torch
from conftest import build_model, build_rows
from test_core import HEADS, D, V, make, naive_log_p, relative

from forvalue_callbacks import ForValueConfig, ForValueScorer, core
from forvalue_callbacks.core.fit import RIDGES, fit_head, fit_softmax

# Rows that come three times: what is learned from one helps with another, so the fit does move the head.
TRAIN, VALIDATION = build_rows(12, seed=1), build_rows(5, seed=2) * 3


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("tiles", [(4, 5), (1000, 1000)])
def test_gains_equal_two_naive_log_softmaxes(kind, tiles):
    head, (hidden, _), (labels, _) = make(kind)
    move = torch.randn(V, D, dtype=torch.float64)
    gain, log_p = core.gain_tokens(head, move, hidden, labels, token_tile=tiles[0], vocab_block=tiles[1])
    before = naive_log_p(head, head.weight, hidden, labels)
    assert relative(log_p, before) < 1e-12
    assert relative(gain, naive_log_p(head, head.weight + move, hidden, labels) - before) < 1e-10


def test_a_small_step_gains_what_the_score_says():
    head, (hidden, _), (labels, _) = make("all")
    direction = torch.randn(V, D, dtype=torch.float64)
    gain, _ = core.gain_tokens(head, 1e-6 * direction, hidden, labels)
    score, _ = core.score_tokens(head, direction, hidden, labels)
    assert relative(gain / 1e-6, score) < 1e-4


def problem(kind="plain", n=60, seed=0):
    """Hidden states whose labels depend on them, three positions to a row."""
    torch.manual_seed(seed)
    head, _, _ = make(kind)
    pattern = torch.randn(D, 5, dtype=torch.float64)
    hidden = torch.randn(n, D, dtype=torch.float64)
    labels = (hidden @ pattern).argmax(1) * 3
    return head, hidden, labels, torch.arange(n) // 3


def fourth_root_of_the_inverse(hidden):
    """Of the second moment with a hundredth of its mean eigenvalue added, scaled to unit mean square; written out."""
    moment = torch.stack([torch.outer(h, h) for h in hidden]).mean(0)
    ridged = moment + 0.01 * moment.trace() / D * torch.eye(D, dtype=moment.dtype)
    values, vectors = np.linalg.eigh(np.linalg.inv(ridged.numpy()))
    root = torch.from_numpy(vectors @ np.diag(values**0.25) @ vectors.T)
    return root / (hidden @ root).square().mean().sqrt()


@pytest.mark.parametrize("kind", ["plain", "bias", "scale"])
def test_the_fit_is_the_optimum_of_the_naive_full_softmax_problem(kind):
    """At the move found, the gradient of the objective written out over the whole vocabulary has all but vanished."""
    head, hidden, labels, rows = problem(kind)
    fit = fit_head(head, hidden, labels, rows)
    root = fourth_root_of_the_inverse(hidden)
    seen = labels.unique()
    assert fit.ridge in RIDGES
    assert not fit.move_VD[[v for v in range(V) if v not in seen.tolist()]].any()

    def gradient(coefficients):
        m = coefficients.clone().requires_grad_(True)
        weight = head.weight.clone().index_add(0, seen, m @ root.T)
        objective = naive_log_p(head, weight, hidden, labels).sum() - 0.5 * fit.ridge * m.square().sum()
        return torch.autograd.grad(objective, m)[0]

    found = fit.move_VD[seen] @ torch.linalg.inv(root)
    assert float(gradient(found).norm()) < 1e-2 * float(gradient(torch.zeros_like(found)).norm())


def test_the_ridge_is_the_best_on_held_out_rows_and_beats_no_move():
    head, hidden, labels, rows = problem()
    fit = fit_head(head, hidden, labels, rows)
    assert fit.ridge == max(fit.curve, key=fit.curve.get)
    assert fit.curve[fit.ridge] > fit.curve[torch.inf]
    fresh = problem(n=300)
    gain, _ = core.gain_tokens(head, fit.move_VD, fresh[1], fresh[2])
    assert float(gain.mean()) > 0


def test_positions_of_one_row_are_never_in_different_folds():
    """Rows of ten positions alike, each row with a label of its own: what is learned of a row helps with no other."""
    torch.manual_seed(0)
    head = core.Head(torch.zeros(V, D, dtype=torch.float64))
    hidden = torch.randn(12, D, dtype=torch.float64).repeat_interleave(10, 0)
    rows = torch.arange(12).repeat_interleave(10)
    fit = fit_head(head, hidden, rows % 6, rows)
    together = fit_head(head, hidden, rows % 6, torch.arange(120))  # the same positions as rows of their own
    assert max(fit.curve.values()) < 0.5 * fit.curve[torch.inf]
    assert max(together.curve.values()) > 0.5 * fit.curve[torch.inf]
    assert together.ridge < fit.ridge


def test_of_too_many_positions_the_fit_takes_some_from_everywhere(monkeypatch):
    head, hidden, labels, rows = problem(n=240)
    labels[:120], labels[120:] = labels[:120] % 2, 20 + labels[120:] % 2
    monkeypatch.setattr("forvalue_callbacks.core.fit.MAX_POSITIONS", 80)
    seen = set(labels[fit_head(head, hidden, labels, rows).move_VD[labels].any(1)].tolist())
    assert seen == {0, 1, 20, 21}


def test_labels_without_any_pattern_do_not_move_a_head_that_knows_it():
    """Uniform labels and a head that predicts them uniformly: every move is learned by heart, none is taken far."""
    torch.manual_seed(0)
    head = core.Head(torch.zeros(V, D, dtype=torch.float64))
    hidden, labels = torch.randn(V * 2, D, dtype=torch.float64), torch.arange(V * 2) % V
    fit = fit_head(head, hidden, labels, torch.arange(V * 2))
    assert fit.ridge >= 30
    loosest = min(fit.curve)
    assert loosest < 100
    assert fit.curve[loosest] < fit.curve[torch.inf] < fit.curve[100.0] + 1.0


def test_one_validation_row_cannot_be_held_out_and_moves_nothing():
    head, hidden, labels, _ = problem(n=6)
    fit = fit_head(head, hidden, labels, torch.zeros(6, dtype=torch.long))
    assert fit.ridge == torch.inf
    assert not fit.move_VD.any()


@pytest.mark.parametrize("architecture", ["llama", "gemma2-softcap", "phi-bias"])
def test_the_scorers_fitted_scores_are_log_likelihoods_after_and_before(architecture):
    model = build_model(architecture, torch.float64)
    scorers = {
        d: ForValueScorer(model, VALIDATION, ForValueConfig(method=d), progress=False)
        for d in ("fitted", "fitted_likelihood")
    }
    gain, after = (scorer.score(TRAIN) for scorer in scorers.values())
    move = scorers["fitted"].direction()
    assert move.any()
    with torch.no_grad():
        model.set_output_embeddings(model.get_output_embeddings())
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight + move)
    moved = ForValueScorer(model, VALIDATION, progress=False).score(TRAIN)
    assert relative(torch.tensor(after.values), torch.tensor(moved.log_likelihood)) < 1e-10
    assert relative(torch.tensor(gain.values), torch.tensor(moved.log_likelihood - gain.log_likelihood)) < 1e-9


def test_fitted_scores_are_the_same_whatever_the_batch_size():
    model = build_model("llama", torch.float64)
    values = [
        ForValueScorer(model, VALIDATION, ForValueConfig(method="fitted", max_tokens_per_batch=n), progress=False)
        .score(TRAIN)
        .values
        for n in (1, 10_000)
    ]
    assert relative(torch.tensor(values[0]), torch.tensor(values[1])) < 1e-6


def test_what_has_no_meaning_for_a_finite_step_is_refused():
    with pytest.raises(ValueError, match="normalize"):
        ForValueConfig(method="fitted", normalize="cosine")
    with pytest.raises(ValueError, match="pairwise"):
        ForValueScorer(build_model(), VALIDATION, ForValueConfig(method="fitted")).pairwise(TRAIN)


def test_the_softmax_is_fitted_to_its_optimum():
    torch.manual_seed(0)
    x, targets = torch.randn(80, 4, dtype=torch.float64), torch.rand(80, 3, dtype=torch.float64)
    fitted = fit_softmax(x, targets, ridge=2.0).requires_grad_(True)
    log_p = (x @ fitted[:-1] + fitted[-1]).log_softmax(1)
    objective = (targets * log_p).sum() - fitted[:-1].square().sum() - 0.5e-2 * fitted[-1].square().sum()
    (gradient,) = torch.autograd.grad(objective, fitted)
    assert float(gradient.abs().max()) < 1e-3
