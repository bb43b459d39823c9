"""Encoder-decoders and classifiers through the scorer, against autograd through each model's own forward and loss."""

import numpy as np
import pytest
import torch
from torch.func import functional_call

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.methods.label_model import LabelModel
from helpers.kinds import KINDS, SEQUENCE, build, build_rows, collator, head_of
from helpers.oracles import relative
from helpers.trained import label_gradient

# Where the model itself computes something in float32, a row beside others differs from the row alone.
ROUNDED = ("t5", "LlamaForSequenceClassification", "LlamaForTokenClassification")


def batch_of(row):
    """The row alone as the model's own forward takes it; nothing of a collator."""
    dtypes = {"input_features": torch.float64}
    batch = {name: torch.tensor([value], dtype=dtypes.get(name)) for name, value in row.items()}
    return {"labels" if name == "label" else name: value for name, value in batch.items()}


def gradient(model, kind, row):
    return label_gradient(model, head_of(kind), batch_of(row))


def states(model, kind, row):
    """What the head gets where there is a label, (T, D), caught on its way."""
    batch, caught = batch_of(row), []
    hook = model.get_submodule(KINDS[kind][-1]).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    if kind in SEQUENCE:  # of each token, or of the row: the last one's counts, and no row is padded
        return caught[0].view(1, -1, 32)[:, -1]
    return caught[0][batch["labels"] != -100]


def log_likelihood(model, kind, row, move=0.0):
    """Of the row's labels with a moved head, by the model's own forward; its loss may be rounded to float32."""
    batch, weight = batch_of(row), model.get_parameter(head_of(kind))
    with torch.no_grad():
        output = functional_call(model, {head_of(kind): weight + move}, kwargs=batch, tie_weights=False)
    labels = batch["labels"].flatten()
    log_p = -torch.nn.functional.cross_entropy(output.logits.view(len(labels), -1), labels, reduction="sum")
    assert float(-log_p / (labels != -100).sum()) == pytest.approx(float(output.loss), rel=1e-6)
    return float(log_p)


def make(model, kind, validation, **config):
    return ForValueScorer(model, validation, ForValueConfig(**config), data_collator=collator(kind), progress=False)


def sides(kind):
    return build_rows(kind, 11, seed=1), build_rows(kind, 5, seed=2)


def tolerance(kind):
    return 1e-5 if kind in ROUNDED else 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_autograd_through_the_models_own_loss(kind):
    model, (rows, validation) = build(kind), sides(kind)
    ours, clean = ([gradient(model, kind, row) for row in side] for side in (rows, validation))
    pairs = np.array([[float((g * v).sum()) for v in clean] for g in ours])
    alone, beside = (make(model, kind, validation, max_tokens_per_batch=n) for n in (1, None))
    scores = alone.score(rows)
    assert scores.reasons == [None] * len(rows)
    assert relative(scores.values, pairs.mean(1)) < 1e-10
    assert relative(scores.log_likelihood, [log_likelihood(model, kind, row) for row in rows]) < 1e-10
    assert relative(alone.pairwise(rows), pairs) < 1e-10
    assert relative(beside.score(rows).values, pairs.mean(1)) < tolerance(kind)
    assert relative(beside.pairwise(rows), pairs) < tolerance(kind)
    tokens = alone.token_scores(rows)
    assert [len(values) for values in tokens] == scores.n_labelled.tolist()
    assert relative([values.sum() for values in tokens], scores.values) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_whitened_scores_are_those_of_the_inverse_second_moment_written_out(kind):
    model, (rows, validation) = build(kind), sides(kind)
    hidden = torch.cat([states(model, kind, row) for row in validation])
    moment = hidden.T @ hidden / len(hidden)
    metric = torch.linalg.inv(moment + 0.01 * moment.diagonal().mean() * torch.eye(32, dtype=moment.dtype))
    direction = torch.stack([gradient(model, kind, row) for row in validation]).mean(0) @ metric
    want = [float((direction * gradient(model, kind, row)).sum()) for row in rows]
    found = make(model, kind, validation, method="whitened", max_tokens_per_batch=1)
    assert relative(found.score(rows).values, want) < 1e-9
    assert relative(found.pairwise(rows).mean(1), want) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_fitted_scores_are_the_losses_of_the_models_own_before_and_after_the_move(kind):
    model, (rows, validation) = build(kind), sides(kind)
    found = make(model, kind, validation * 3, method="fitted", max_tokens_per_batch=1)
    scores, move = found.score(rows), found.direction()
    assert move.any()
    want = [log_likelihood(model, kind, row, move) - log_likelihood(model, kind, row) for row in rows]
    assert relative(scores.values, want) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_same_whatever_the_batch_size_and_the_row_order(kind):
    model, (rows, validation) = build(kind), sides(kind)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    want = make(model, kind, validation, max_tokens_per_batch=1).score(rows).values
    for n in (3, None):
        found = make(model, kind, validation[::-1], max_tokens_per_batch=n).score([rows[i] for i in order]).values
        assert relative(found, want[order]) < tolerance(kind)


def repeated(model, kind, n, seed):
    """Rows whose label is the likeliest of three to the model, but for every fifth."""
    rows, rng = build_rows(kind, n, seed), np.random.default_rng(seed)
    first = 10 if kind == "bart" else 0
    head = model.get_parameter(head_of(kind)).detach()[first : first + 3]
    for i, row in enumerate(rows):
        if kind == "bart":
            row["labels"] = [first]
        best = int((states(model, kind, row)[0] @ head.T).argmax()) + (i % 5 == 0) * int(rng.integers(1, 3))
        row.update({"labels": [first + best % 3]} if kind == "bart" else {"label": best % 3})
    return rows, np.arange(n) % 5 == 0


LABEL_MODELS = ["bart", "BertForSequenceClassification", "LlamaForSequenceClassification"]


@pytest.mark.parametrize("kind", LABEL_MODELS)
@pytest.mark.parametrize("method", ["label_model", "auto"])
def test_where_labels_repeat_the_label_model_judges_them_by_the_states_that_the_head_gets(kind, method):
    model = build(kind)
    (rows, wrong), (validation, _) = repeated(model, kind, 60, 1), repeated(model, kind, 75, 2)
    validation = [row for i, row in enumerate(validation) if i % 5]
    scorer = make(model, kind, validation, method=method)
    scores = scorer.score(rows)
    for row in rows[:9]:
        with torch.no_grad():
            (found,) = scorer.run.positions(list(scorer.run.reader.samples([row])), LabelModel())
        for made in (found.first_RD, found.prompt_RD):  # the first position is all that comes before the label
            torch.testing.assert_close(made, states(model, kind, row), rtol=1e-5, atol=1e-6)
    assert auc(scores.values[~wrong], scores.values[wrong]) > 0.75
    assert scores.noise is not None


def test_the_mean_state_before_the_first_label_is_not_masked_by_the_encoders_mask():
    """Where both sides are alike in length only the names tell their masks apart."""
    model = build("bart")
    row = {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 0, 0, 1], "labels": [-100, -100, 10, 11]}
    run = make(model, "bart", [row]).run
    with torch.no_grad():
        (found,) = run.positions(list(run.reader.samples([row])), LabelModel())
        caught = []
        model.lm_head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        model(**batch_of(row))
    torch.testing.assert_close(found.prompt_RD[0], caught[0][0, :3].mean(0), rtol=1e-10, atol=1e-12)
