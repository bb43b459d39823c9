"""What is measured on a row: matches, likelihoods and overlaps, against each of them written out."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer, baselines
from forvalue_callbacks.methods.measures import (
    FOLDS,
    HALF_CANDIDATES,
    ROW_CANDIDATES,
    Evidence,
    Half,
    Match,
    n_grams,
)
from forvalue_callbacks.model.run import concatenate
from forvalue_callbacks.scores.scores import auc
from helpers.answers import answer, answered, prepared
from helpers.models import build_model
from helpers.oracles import inverse_second_moment, relative, row_gradient


def test_a_match_never_scores_a_pair_that_it_has_seen():
    torch.manual_seed(0)
    prompts, answers = torch.randn(50, 4).double(), torch.randn(50, 4).double()
    fold = np.arange(50) % FOLDS
    before = Match(prompts, answers, fold)(prompts, answers, fold)
    kept = Match(prompts, answers, fold)
    for k in range(FOLDS):
        x, y = kept.sides[0](prompts), kept.sides[1](answers)
        others = torch.from_numpy(fold != k)
        torch.testing.assert_close(kept.cross[k], x[others].T @ y[others] / int(others.sum()))
    answers_related = prompts @ torch.randn(4, 4).double()
    related = Match(prompts, answers_related, fold)
    right = related(prompts, answers_related, fold)
    wrong = related(prompts, answers_related.roll(1, 0), fold)
    assert auc(right, wrong) > 0.9
    assert auc(before, Match(prompts, answers, fold)(prompts, answers.roll(1, 0), fold)) < 0.75


def test_the_match_is_a_cosine_of_whitened_sides_with_a_tenth_of_ridge():
    torch.manual_seed(0)
    prompts = torch.randn(30, 4).double() @ torch.randn(4, 4).double()
    answers, fold = prompts + torch.randn(30, 4).double(), np.arange(30) % FOLDS

    def inverse_root(x):
        moment = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
        values, vectors = torch.linalg.eigh(moment + 0.1 * moment.trace() / 4 * torch.eye(4, dtype=torch.float64))
        return ((x - x.mean(0)) @ (vectors * values**-0.5)).numpy()

    p, a, want = inverse_root(prompts), inverse_root(answers), np.zeros(30)
    for i in range(30):
        others = fold != fold[i]
        projected = p[i] @ (p[others].T @ a[others]) / others.sum()
        want[i] = projected @ a[i] / (np.linalg.norm(p[i]) * np.linalg.norm(a[i]))
    assert relative(Match(prompts, answers, fold)(prompts, answers, fold), want) < 1e-9


def test_what_is_measured_on_a_row_is_that_of_the_row_alone():
    """Against the baselines' mutual information, the model's own logits, and n-grams counted by hand."""
    model, rows, validation = build_model("llama", torch.float64), answered(8, seed=1), answered(12, seed=2)
    scorer = ForValueScorer(model, validation, progress=False)
    items = scorer._validation()
    head = scorer.backbone.head()
    with torch.no_grad():
        halves = [Half.of(head, concatenate(scorer.batcher.labelled(items[h::2])), 0.01) for h in (0, 1)]
        evidence = Evidence(scorer.batcher, head, prepared(validation), halves, bos=1)
        measured, reasons, _ = evidence.measure(rows, "rows")
    assert reasons == [None] * 8
    column = dict(zip(ROW_CANDIDATES, measured.row_NF.T, strict=True))
    assert relative(column["mutual information"], baselines.pmi(model, rows, bos_token_id=1)) < 1e-8
    assert relative(column["mean log-likelihood"], baselines.loss(model, rows)) < 1e-8
    for i, row in enumerate(rows):
        ids, start = torch.tensor(row["input_ids"]), sum(label == -100 for label in row["labels"])
        with torch.no_grad():
            logits_LV = model(input_ids=ids[None]).logits[0, :-1]
        log_p = logits_LV.log_softmax(-1)[start - 1 :]
        own = log_p.gather(1, ids[start:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(1)
        assert column["last token"][i] == pytest.approx(float(own[-1]))
        assert column["temperature score"][i] == pytest.approx(float((own + entropy).mean()))
        prompt, answer_ids = row["input_ids"][:start], row["input_ids"][start:]
        weights = {g: np.log(13 / (sum(g in n_grams(r.input_ids) for r in prepared(validation)) + 0.5))
                   for g in n_grams(np.array(answer_ids))}  # fmt: skip
        shared = sum(w for g, w in weights.items() if g in n_grams(np.array(prompt)))
        assert column["overlap"][i] == pytest.approx(shared / sum(weights.values()))
    for h in (0, 1):
        plain = ForValueScorer(model, validation[h::2], progress=False).score(rows)
        after = ForValueScorer(model, validation[h::2], ForValueConfig("fitted_likelihood", "length"), progress=False)
        by_half = dict(zip(HALF_CANDIDATES, measured.half_NHF[:, h].T, strict=True))
        assert relative(by_half["gradient"], plain.values) < 1e-8
        assert relative(by_half["fitted_likelihood"], after.score(rows).values) < 1e-4


def log_likelihood(model, row):
    """Of the row's labelled tokens, by the model's own forward."""
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
    with torch.no_grad():
        log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    keep = labels != -100
    return float(log_p[keep].gather(1, labels[keep][:, None]).sum())


def test_what_half_of_the_validation_rows_says_of_a_row_is_written_out():
    """Against autograd on the head's weight, and a copy of the model with the moved head."""
    model, rows, validation = build_model("llama", torch.float64), answered(6, seed=1), answered(12, seed=2)
    scorer = ForValueScorer(model, validation, progress=False)
    items, head = scorer._validation(), scorer.backbone.head()
    with torch.no_grad():
        halves = [Half.of(head, concatenate(scorer.batcher.labelled(items[h::2])), 0.01) for h in (0, 1)]
        measured, _, _ = Evidence(scorer.batcher, head, prepared(validation), halves, bos=1).measure(rows, "rows")
    np.testing.assert_array_equal(measured.n_labelled, [len(answer(row)) for row in prepared(rows)])
    np.testing.assert_allclose(measured.row_NF[:, ROW_CANDIDATES.index("length")], np.log(measured.n_labelled))
    gradients, n = [row_gradient(model, row) for row in rows], measured.n_labelled
    answers = [answer(row) for row in prepared(rows)]
    alone = [{"input_ids": [1, *tokens], "labels": [-100, *tokens]} for tokens in answers]
    for h, half in enumerate(halves):
        metric = inverse_second_moment(model, validation[h::2])
        direction = torch.stack([row_gradient(model, row) for row in validation[h::2]]).mean(0)
        moved = deepcopy(model)
        with torch.no_grad():
            moved.get_output_embeddings().weight += half.move_VD
        before, after = (np.array([log_likelihood(m, row) for row in rows]) for m in (model, moved))
        after_alone = np.array([log_likelihood(moved, row) for row in alone])
        want, plain = {}, torch.eye(len(metric), dtype=metric.dtype)
        for name, along, m in (("gradient", direction, plain), ("whitened", direction @ metric, metric)):
            want[name] = np.array([float((along * g).sum()) for g in gradients])
            want[f"{name}, length"] = want[name] / n
            want[f"{name}, cosine"] = want[name] / [float((g @ m * g).sum().sqrt()) for g in gradients]
        want |= {"fitted": after - before, "fitted, length": (after - before) / n, "fitted_likelihood": after / n}
        want["mutual information, fitted"] = (after - after_alone) / n
        assert half.move_VD.any()
        assert tuple(want) == HALF_CANDIDATES
        for column, (name, values) in enumerate(want.items()):
            assert relative(measured.half_NHF[:, h, column], values) < 1e-6, name


def test_wide_states_are_kept_along_their_leading_directions(monkeypatch):
    """Prompts along those of the validation rows' prompts, answers along those of their answers."""
    monkeypatch.setattr("forvalue_callbacks.methods.measures.MATCH_DIMENSIONS", 4)
    model, rows, validation = build_model("llama", torch.float64), answered(8, seed=1), answered(12, seed=2)
    scorer = ForValueScorer(model, validation, progress=False)
    head = scorer.backbone.head()
    with torch.no_grad():
        half = Half.of(head, concatenate(scorer.batcher.labelled(scorer._validation())), 0.01)
        evidence = Evidence(scorer.batcher, head, prepared(validation), [half, half], bos=1)
        clean, wide = (evidence.measure(side, "rows")[0] for side in (validation, rows))
        narrow = evidence.project(clean), evidence.measure(rows, "rows")[0]
    for name in ("prompt_ND", "answer_ND"):
        known = getattr(clean, name)
        _, _, directions = np.linalg.svd((known - known.mean(0)).numpy())
        for before, after in zip((clean, wide), narrow, strict=True):
            x, kept = getattr(before, name).numpy() @ directions[:4].T, getattr(after, name).numpy()
            assert relative(kept @ kept.T, x @ x.T) < 1e-5, "up to a rotation"
