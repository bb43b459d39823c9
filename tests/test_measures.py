"""What is measured on a row: matches, likelihoods and overlaps, against each of them written out."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer, baselines
from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.methods.auto import Auto
from forvalue_callbacks.methods.base import measured
from forvalue_callbacks.methods.measures import (
    CANDIDATES,
    FOLDS,
    HALF_CANDIDATES,
    Half,
    Match,
    Reference,
    features,
    leading,
    n_grams,
)
from forvalue_callbacks.model.positions import concatenate
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


def reference_of(scorer):
    """What rows are measured against, and the method that measures them."""
    method, run, samples = Auto(), scorer.run, scorer.validation.samples()
    method.bos, head = 1, scorer.backbone.head()
    halves = [Half.of(head, concatenate(run.positions(samples[h::2], method)), 0.01) for h in (0, 1)]
    of_halves = [samples[h::2] for h in (0, 1)]
    frequency = [Counter(g for sample in half for g in n_grams(sample.segments[0].tokens)) for half in of_halves]
    return method, {"reference": Reference(halves, [len(half) for half in of_halves], frequency)}


def by_name(columns, half):
    match = np.zeros(len(columns["index"]))
    return dict(zip(CANDIDATES, features(columns, half, match).T, strict=True))


def test_what_is_measured_on_a_row_is_that_of_the_row_alone():
    """Against the baselines' mutual information, the model's own logits, and n-grams counted by hand."""
    model, rows, validation = build_model("llama", torch.float64), answered(8, seed=1), answered(12, seed=2)
    scorer = ForValueScorer(model, validation, progress=False)
    with torch.no_grad():
        method, state = reference_of(scorer)
        found = measured(scorer.run, method, state, rows, "rows")
    assert found["index"].tolist() == list(range(8))
    column = by_name(found, 0)
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
        for h in (0, 1):
            weights = {g: np.log(7 / (sum(g in n_grams(r.input_ids) for r in prepared(validation[h::2])) + 0.5))
                       for g in n_grams(np.array(answer_ids))}  # fmt: skip
            shared = sum(w for g, w in weights.items() if g in n_grams(np.array(prompt)))
            assert by_name(found, h)["overlap"][i] == pytest.approx(shared / sum(weights.values()))
        pairs = list(pairwise(answer_ids))
        assert column["repetition"][i] == pytest.approx(1 - len(set(pairs)) / len(pairs))
        assert found["asked"][i] == pytest.approx(np.log(1 + start))
        assert found["end"][i] == answer_ids[-1]
    for h in (0, 1):
        plain = ForValueScorer(model, validation[h::2], progress=False).score(rows)
        after = ForValueScorer(model, validation[h::2], ForValueConfig("fitted_likelihood", "length"), progress=False)
        by_half = by_name(found, h)
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
    with torch.no_grad():
        method, state = reference_of(scorer)
        found = measured(scorer.run, method, state, rows, "rows")
    np.testing.assert_array_equal(found["n_labelled"], [len(answer(row)) for row in prepared(rows)])
    np.testing.assert_allclose(found["length"], np.log(found["n_labelled"]))
    gradients, n = [row_gradient(model, row) for row in rows], found["n_labelled"]
    answers = [answer(row) for row in prepared(rows)]
    alone = [{"input_ids": [1, *tokens], "labels": [-100, *tokens]} for tokens in answers]
    for h, half in enumerate(state["reference"].halves):
        metric = inverse_second_moment(model, validation[h::2])
        direction = torch.stack([row_gradient(model, row) for row in validation[h::2]]).mean(0)
        moved = deepcopy(model)
        with torch.no_grad():
            moved.get_output_embeddings().weight[half.move.seen_S] += half.move.move_SD
        before, after = (np.array([log_likelihood(m, row) for row in rows]) for m in (model, moved))
        after_alone = np.array([log_likelihood(moved, row) for row in alone])
        want, plain = {}, torch.eye(len(metric), dtype=metric.dtype)
        for name, along, m in (("gradient", direction, plain), ("whitened", direction @ metric, metric)):
            want[name] = np.array([float((along * g).sum()) for g in gradients])
            want[f"{name}, length"] = want[name] / n
            want[f"{name}, cosine"] = want[name] / [float((g @ m * g).sum().sqrt()) for g in gradients]
        want |= {"fitted": after - before, "fitted, length": (after - before) / n, "fitted_likelihood": after / n}
        want["mutual information, fitted"] = (after - after_alone) / n
        assert half.move.move_SD.any()
        assert {"overlap", *want} == set(HALF_CANDIDATES)
        for name, values in want.items():
            assert relative(by_name(found, h)[name], values) < 1e-6, name


def test_rows_of_one_prompt_are_known_by_it():
    rows, others = answered(6, seed=1), answered(6, seed=2)
    mixed = []  # prompts of the ones, answers of the others
    for row, other in zip(rows, others, strict=True):
        prompt = row["input_ids"][: row["labels"].count(-100)]
        learnt = [x for x in other["labels"] if x >= 0]
        mixed.append({"input_ids": prompt + learnt, "labels": [-100] * len(prompt) + learnt})
    scorer = ForValueScorer(build_model("llama", torch.float64), answered(12, seed=3), progress=False)
    with torch.no_grad():
        method, state = reference_of(scorer)
        first, again = (measured(scorer.run, method, state, side, "rows")["prompt hash"] for side in (rows, mixed))
    assert first.tolist() == again.tolist()
    assert len(set(first.tolist())) == 6


def test_wide_states_are_kept_along_their_leading_directions(monkeypatch):
    """Prompts along those of the validation rows' prompts, answers along those of their answers."""
    monkeypatch.setattr("forvalue_callbacks.methods.measures.MATCH_DIMENSIONS", 4)
    model, rows, validation = build_model("llama", torch.float64), answered(8, seed=1), answered(12, seed=2)
    scorer = ForValueScorer(model, validation, progress=False)
    with torch.no_grad():
        method, state = reference_of(scorer)
        clean, wide = (measured(scorer.run, method, state, side, "rows") for side in (validation, rows))
        bases = leading(torch.from_numpy(clean["prompt"]).double(), torch.from_numpy(clean["answer"]).double())
        narrow = {"reference": replace(state["reference"], bases=bases)}
        after = measured(scorer.run, method, narrow, rows, "rows")
    for name in ("prompt", "answer"):
        _, _, directions = np.linalg.svd((clean[name] - clean[name].mean(0)).astype(np.float64))
        x, kept = wide[name] @ directions[:4].T, after[name]
        assert kept.shape == (8, 4)
        assert relative(kept @ kept.T, x @ x.T) < 1e-5, "up to a rotation"
