"""Scores of preference rows: chosen minus rejected, against autograd through the model's own forward in float64."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.func import functional_call

from forvalue_callbacks import ForValueConfig, ForValueScorer, ForValueTransform, baselines
from forvalue_callbacks.core.fit import fit_head
from forvalue_callbacks.methods import fitted
from helpers.models import VOCAB, build_model
from helpers.oracles import HEADS, inverse_second_moment, make, naive_log_p, relative, row_gradient
from helpers.trainers import Passes


def pairs(n, seed):
    """Pairs of random tokens; lengths of prompts and of both answers differ."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, VOCAB, rng.integers(low, high)).tolist()

    return [{"prompt_ids": ids(1, 6), "chosen_ids": ids(1, 8), "rejected_ids": ids(2, 7)} for _ in range(n)]


def marked(n, seed):
    rng = np.random.default_rng(seed)
    rows = [{"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"]} for row in pairs(n, seed)]
    return [{**row, "label": bool(rng.integers(2))} for row in rows]


def plain(n, seed):
    return [{**whole, "labels": labels} for row in pairs(n, seed) for whole, labels in [answer(row, "chosen_ids")]]


def answer(row, name):
    prompt, ids = row["prompt_ids"], row[name]
    return {"input_ids": prompt + ids}, [-100] * len(prompt) + ids


def sides(row):
    """The row's answers as rows with labels, and their weights; written out anew."""
    if "input_ids" in row:
        return [(row, 1)]
    names = {"chosen_ids": 1, "rejected_ids": -1}
    if "label" in row:
        names = {"completion_ids": 1 if row["label"] else -1}
    return [({**answer(row, name)[0], "labels": answer(row, name)[1]}, weight) for name, weight in names.items()]


def gradient(model, row):
    return sum(weight * row_gradient(model, side) for side, weight in sides(row))


def margin(model, row, move=0.0):
    """Log-likelihood of what is chosen minus that of what is rejected, by the model's own forward."""
    total = 0.0
    for side, weight in sides(row):
        ids, labels = torch.tensor([side["input_ids"]]), torch.tensor(side["labels"])
        moved = {"lm_head.weight": model.lm_head.weight + move}
        with torch.no_grad():
            log_p = (
                functional_call(model, moved, kwargs={"input_ids": ids}, tie_weights=False).logits[0].log_softmax(-1)
            )
        keep = labels[1:] != -100
        total += weight * float(log_p[:-1][keep].gather(1, labels[1:][keep][:, None]).sum())
    return total


KINDS = {"pairs": pairs, "marked": marked, "plain": plain}
# Rows to score and validation rows.
SIDES = [("pairs", "pairs"), ("marked", "marked"), ("pairs", "plain"), ("plain", "pairs"), ("marked", "pairs")]


def build(rows, validation):
    return build_model(dtype=torch.float64), KINDS[rows](11, 1), KINDS[validation](5, 2)


def scorer(model, validation, **config):
    return ForValueScorer(model, validation, ForValueConfig(**config), progress=False)


@pytest.mark.parametrize("kinds", SIDES)
@pytest.mark.parametrize("most", [1, 40, None])
def test_gradient_scores_equal_autograd(kinds, most):
    """Whichever batches both sides of a row are in."""
    model, rows, validation = build(*kinds)
    ours, clean = ([gradient(model, row) for row in side] for side in (rows, validation))
    want = np.array([[float((g * v).sum()) for v in clean] for g in ours])
    found = scorer(model, validation, max_tokens_per_batch=most)
    scores = found.score(rows)
    assert scores.reasons == [None] * len(rows)
    assert relative(found.direction(), torch.stack(clean).mean(0)) < 1e-10
    assert relative(scores.values, want.mean(1)) < 1e-10
    assert relative(found.pairwise(rows), want) < 1e-10
    assert relative(scores.log_likelihood, [margin(model, row) for row in rows]) < 1e-10
    n = [sum(label != -100 for side, _ in sides(row) for label in side["labels"][1:]) for row in rows]
    assert scores.n_labelled.tolist() == n
    tokens = found.token_scores(rows)
    assert [len(values) for values in tokens] == n
    assert relative([values.sum() for values in tokens], scores.values) < 1e-12


def test_tokens_come_side_by_side_the_chosen_ones_first():
    model, rows, validation = build("pairs", "pairs")
    found = scorer(model, validation, max_tokens_per_batch=1)
    whole = found.token_scores(rows)
    for weight, name in ((1, "chosen_ids"), (-1, "rejected_ids")):
        alone = [{"prompt_ids": row["prompt_ids"], "completion_ids": row[name], "label": weight > 0} for row in rows]
        for row, tokens, part in zip(rows, whole, found.token_scores(alone), strict=True):
            n = len(row["chosen_ids"])
            assert relative(tokens[:n] if weight > 0 else tokens[n:], part) < 1e-10


@pytest.mark.parametrize("kinds", SIDES)
def test_whitened_scores_are_those_of_the_inverse_second_moment_written_out(kinds):
    model, rows, validation = build(*kinds)
    metric = inverse_second_moment(model, [side for row in validation for side, _ in sides(row)])
    direction = torch.stack([gradient(model, row) for row in validation]).mean(0) @ metric
    want = [float((direction * gradient(model, row)).sum()) for row in rows]
    found = scorer(model, validation, method="whitened")
    assert relative(found.score(rows).values, want) < 1e-9
    assert relative(found.pairwise(rows).mean(1), want) < 1e-9


@pytest.mark.parametrize("kinds", SIDES)
def test_fitted_scores_are_margins_after_the_move_minus_before(kinds):
    model, rows, validation = build(*kinds)
    for method in ("fitted", "fitted_likelihood"):
        found = scorer(model, validation * 3, method=method)
        scores, move = found.score(rows), found.direction()
        assert move.any()
        before = np.array([margin(model, row) for row in rows])
        want = np.array([margin(model, row, move) for row in rows]) - (before if method == "fitted" else 0)
        assert relative(scores.values, want) < 1e-10


@pytest.mark.parametrize("method", ["gradient", "whitened", "fitted"])
def test_a_swapped_pair_has_the_opposite_score_and_length_is_of_each_side(method):
    model, rows, validation = build("pairs", "pairs")
    back = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]
    found = scorer(model, validation, method=method)
    assert relative(found.score(back).values, -found.score(rows).values) < 1e-12
    each = scorer(model, validation, method=method, normalize="length").score(rows).values
    tokens = found.token_scores(rows)
    cuts = [len(row["chosen_ids"]) for row in rows]
    want = [float(t[:n].mean() + t[n:].mean()) for t, n in zip(tokens, cuts, strict=True)]
    assert relative(each, want) < 1e-10


@pytest.mark.parametrize("kind", HEADS)
def test_the_head_is_fitted_to_where_the_margins_are_likeliest(kind):
    """The gradient of what is maximised, written out, is 0 there along all that may move; and it is not on the way."""
    head, (hidden, _), (labels, _) = make(kind)
    hidden, labels = hidden.repeat(4, 1), labels.repeat(4)
    hidden = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = torch.arange(len(labels)) % 9  # nobody says that positions of a row come one after the other
    weights = torch.where(torch.arange(len(labels)) % 3 == 0, -1.0, 1.0)
    fit = fit_head(head, hidden, labels, rows, weights_T=weights)
    assert 0 < fit.ridge < torch.inf
    before = naive_log_p(head, head.weight, hidden, labels)

    def objective(move):
        gain = weights * (naive_log_p(head, head.weight + move, hidden, labels) - before)
        return torch.nn.functional.logsigmoid(torch.zeros(9, dtype=gain.dtype).index_add(0, rows, gain)).sum()

    moment = hidden.T @ hidden / len(hidden)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors @ torch.diag((values + 1e-2 * values.mean()) ** -0.25) @ vectors.T
    root = root / (hidden @ root).square().mean().sqrt()
    small = (fit.move_VD.double() @ torch.linalg.inv(root)).requires_grad_(True)
    seen = labels.unique()
    (objective(small @ root) - 0.5 * fit.ridge * small.square().sum()).backward()
    assert small.grad[seen].abs().max() < 2e-3
    none = torch.zeros_like(small).requires_grad_(True)
    objective(none @ root).backward()
    assert none.grad[seen].abs().max() > 0.1
    assert not fit.move_VD[[v for v in range(len(head.weight)) if v not in seen]].any()


def test_folds_never_part_a_pair(monkeypatch):
    """What the head is fitted on says of each position which row it is of, and its weight."""
    model, _, validation = build("pairs", "pairs")
    given = {}

    def fit(head, hidden, labels, rows, **more):
        given.update(rows=rows, weights=more["weights_T"])
        return fit_head(head, hidden, labels, rows, **more)

    monkeypatch.setattr(fitted, "fit_head", fit)
    scorer(model, validation, method="fitted", max_tokens_per_batch=1).direction()
    found = [given["weights"][given["rows"] == row].tolist() for row in range(len(validation))]
    want = [[1.0] * len(row["chosen_ids"]) + [-1.0] * len(row["rejected_ids"]) for row in validation]
    assert sorted(map(sorted, found)) == sorted(map(sorted, want))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"method": "auto"}, r"method='auto' scores answers, and row 0 is one of preferences.*method='whitened'"),
        ({"method": "label_model"}, "method='label_model' scores answers, and row 0"),
        ({"normalize": "cosine"}, "normalize='cosine' scores answers, and row 0.*normalize='none' or 'length'"),
    ],
)
@pytest.mark.parametrize("kinds", SIDES[:3])
def test_methods_without_a_score_for_preferences_are_refused_before_the_model_runs_over_them(config, match, kinds):
    model, rows, validation = build(*kinds)
    if "marked" in kinds:
        rows, validation = ([{**row, "label": False} for row in side] for side in (rows, validation))
    passes, made = Passes(model), scorer(model, validation, **config)
    with pytest.raises(ValueError, match=match):
        made.score(rows)
    assert passes.n == 0


def test_map_gives_the_same_scores():
    model, rows, validation = build("pairs", "pairs")
    made = Dataset.from_list(rows).map(ForValueTransform(model, validation), batched=True)
    assert relative(made["forvalue_score"], scorer(model, validation).score(rows).values) < 1e-12


def test_rivals_have_no_score_for_preferences():
    model, rows, validation = build("pairs", "plain")
    for row in (rows[0], next(scorer(model, validation).run.reader.samples(rows))):
        with pytest.raises(ValueError, match="row 1 is one of preferences"):
            baselines.loss(model, [validation[0], row])


def test_a_row_out_for_every_row_in():
    model, rows, validation = build("pairs", "pairs")
    rows[3] = {**rows[3], "rejected_ids": rows[3]["chosen_ids"]}
    rows[5] = {**rows[5], "chosen_ids": [999]}
    scores = scorer(model, validation).score(rows)
    assert [i for i, why in enumerate(scores.reasons) if why is not None] == [3, 5]
    assert np.flatnonzero(np.isnan(scores.values)).tolist() == [3, 5]
    assert scores.reasons[3] == "'chosen' and 'rejected' are the same: drop the row"
    assert [len(values) == 0 for values in scorer(model, validation).token_scores(rows)] == [
        i in (3, 5) for i in range(11)
    ]


@pytest.mark.parametrize("kinds", [("pairs", "pairs"), ("marked", "pairs"), ("pairs", "plain"), ("plain", "pairs")])
@pytest.mark.parametrize("method", ["gradient", "whitened"])
@pytest.mark.parametrize("most", [1, None])
def test_validation_rows_are_near_by_the_cosine_of_the_gradients_of_whole_rows(kinds, method, most):
    model, rows, validation = build(*kinds)
    metric = torch.eye(32, dtype=torch.float64)
    if method == "whitened":
        metric = inverse_second_moment(model, [side for row in validation for side, _ in sides(row)])
    asked = [7, 2, 5]
    ours, clean = [gradient(model, rows[i]) for i in asked], [gradient(model, row) for row in validation]

    def product(one, other):
        return float((one @ metric * other).sum())

    made = scorer(model, validation, method=method, max_tokens_per_batch=most)
    scores, found = made.score(rows).values, made.explain(rows, asked, len(validation))
    for explanation, g in zip(found, ours, strict=True):
        want = [product(g, v) / (product(g, g) * product(v, v)) ** 0.5 for v in clean]
        near = dict((*explanation.supporting, *explanation.opposing))
        assert sorted(near) == list(range(len(validation)))
        assert relative([near[i] for i in range(len(validation))], want) < 1e-8
        assert sum(explanation.token_scores) == pytest.approx(scores[explanation.row], rel=1e-8)
