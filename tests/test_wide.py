"""Several directions in one pass over the vocabulary: against one after the other, and against sums written out."""

import pytest
import torch

from forvalue_callbacks import core
from helpers.oracles import relative

LENGTHS = [3, 10, 1, 16]


def problem(dtype=torch.float64, n_tokens=97, **head):
    """A head, hidden states, labels, directions with metrics, and moves of some rows, of all and of none."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if head.pop("biased", False):
        head["bias"] = normal(n_tokens)
    made = core.Head(normal(n_tokens, 8), **head)
    labels = torch.randint(n_tokens, (sum(LENGTHS),), generator=generator)
    labels[3:6] = labels[7]  # the same token several times in a row
    directions = [normal(n_tokens, 8) for _ in range(2)]
    metrics = [root @ root.T for root in (normal(8, 8), normal(8, 8))]
    moves = [torch.zeros(n_tokens, 8, dtype=dtype), normal(n_tokens, 8), torch.zeros(n_tokens, 8, dtype=dtype)]
    moves[0][torch.randperm(n_tokens, generator=generator)[:20]] = normal(20, 8)
    return made, normal(sum(LENGTHS), 8), labels, directions, metrics, moves


def measured(head, hidden, labels, directions, metrics, moves, **sizes):
    along = core.Along.of(directions[0], directions, metrics, [core.Move.of(move) for move in moves])
    return core.measure(head, along, hidden, labels, LENGTHS, **sizes)


@pytest.mark.parametrize(
    "head", [{}, {"biased": True}, {"scale": 0.5}, {"scale": 0.7, "softcap": 3.0}, {"biased": True, "softcap": 4.0}]
)
@pytest.mark.parametrize("sizes", [{}, {"token_tile": 12, "vocab_block": 10}, {"token_tile": 5, "vocab_block": 97}])
def test_all_that_is_measured_is_what_one_function_after_the_other_gives(head, sizes):
    head, hidden, labels, directions, metrics, moves = problem(**head)
    found = measured(head, hidden, labels, directions, metrics, moves, **sizes)
    temperature, log_p = core.score_tokens(head, head.weight, hidden, labels)
    assert relative(found.temperature_T, temperature) < 1e-10
    assert relative(found.log_likelihood_T, log_p) < 1e-10
    assert relative(found.squares_NK[:, 0], core.squared_norms(head, hidden, labels, LENGTHS)) < 1e-10
    for k, (direction, metric) in enumerate(zip(directions, metrics, strict=True)):
        assert relative(found.score_TK[:, k], core.score_tokens(head, direction, hidden, labels)[0]) < 1e-10
        in_metric = core.score_tokens(head, direction @ metric, hidden, labels)[0]
        assert relative(found.metric_score_TK[:, k], in_metric) < 1e-10
        square = core.squared_norms(head, hidden, labels, LENGTHS, metric_TD=hidden @ metric)
        assert relative(found.squares_NK[:, 1 + k], square) < 1e-10
    for k, move in enumerate(moves[:2]):
        assert relative(found.gain_TK[:, k], core.gain_tokens(head, move, hidden, labels)[0]) < 1e-10
    assert not found.gain_TK[:, 2].any(), "no move, no gain: not the rounding of one"


def test_what_is_measured_is_the_naive_computation():
    """All errors as one matrix (T, V), gradients of rows as matrices (V, D)."""
    head, hidden, labels, directions, metrics, moves = problem()
    found = measured(head, hidden, labels, directions, metrics, moves)
    logits = hidden @ head.weight.T
    errors = torch.eye(97, dtype=torch.float64)[labels] - logits.softmax(-1)
    assert relative(found.temperature_T, (errors * logits).sum(1)) < 1e-10
    gradients = [e.T @ h for e, h in zip(errors.split(LENGTHS), hidden.split(LENGTHS), strict=True)]
    assert relative(found.squares_NK[:, 0], [float(g.square().sum()) for g in gradients]) < 1e-10
    assert relative(found.squares_NK[:, 1], [float((g @ metrics[0] * g).sum()) for g in gradients]) < 1e-10
    assert relative(found.score_TK[:, 1], (errors @ directions[1] * hidden).sum(1)) < 1e-10
    after = (hidden @ (head.weight + moves[0]).T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert relative(found.gain_TK[:, 0] + found.log_likelihood_T, after) < 1e-10


def test_small_errors_of_tokens_that_are_known_are_not_lost():
    """Where the label has nearly all of the probability, float32 still holds the error and its norm."""
    head, hidden, labels, directions, metrics, moves = problem()
    weight = head.weight.clone()
    hidden = hidden.abs()
    labels[:] = 5
    weight[5] = 5.0
    exact = measured(core.Head(weight), hidden, labels, directions, metrics, moves)
    single = [[x.float() for x in some] for some in (directions, metrics, moves)]
    found = measured(core.Head(weight.float()), hidden.float(), labels, *single)
    assert exact.squares_NK.min() < 1e-10, "too large to be lost"
    torch.testing.assert_close(found.squares_NK, exact.squares_NK, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(found.score_TK.double(), exact.score_TK, rtol=1e-3, atol=0.0)


def test_norms_that_nobody_asks_for_cost_nothing_and_change_nothing():
    args = problem()
    asked, not_asked = measured(*args), measured(*args, squares=False)
    assert not_asked.squares_NK.shape == (len(LENGTHS), 0)
    for name in ("log_likelihood_T", "temperature_T", "score_TK", "metric_score_TK", "gain_TK"):
        assert torch.equal(getattr(asked, name), getattr(not_asked, name))


def test_nothing_is_measured_along_no_direction():
    head, hidden, labels, directions, _, moves = problem()
    along = core.Along.of(directions[0], [], [], [core.Move.of(moves[0])])
    found = core.measure(head, along, hidden, labels, LENGTHS)
    assert found.score_TK.shape == found.metric_score_TK.shape == (30, 0)
    assert found.squares_NK.shape == (4, 0)
    assert relative(found.gain_TK[:, 0], core.gain_tokens(head, moves[0], hidden, labels)[0]) < 1e-10
