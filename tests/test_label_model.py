"""method="label_model": the fit, also where data is awkward, and the ways in: ranks, callback, prefilter, images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from forvalue_callbacks import (
    TINY_MODEL,
    Drop,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    prefilter,
)
from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.methods import label_fit
from forvalue_callbacks.methods.label_model import MAX_FEATURES, narrowed, narrowing
from forvalue_callbacks.methods.label_odds import expectation
from helpers.answers import rows_of
from helpers.models import build_model, llava
from helpers.oracles import relative

CONFIG = ForValueConfig(method="label_model")


# ---- the fit ----


def fit_labels(known, answers, x, observed, **options):
    """In one view, of states."""
    return label_fit.fit_labels({"states": known}, answers, {"states": x}, observed, **options)


def clusters(n, seed, noise=0.0, k=4, d=6, apart=2.0):
    """Features around the centre of their true answer, the true answers, those given, and which of these are wrong."""
    generator = torch.Generator().manual_seed(seed)
    centers = apart * torch.randn(k, d, generator=torch.Generator().manual_seed(99))
    true = torch.randint(k, (n,), generator=generator)
    x = centers[true] + torch.randn(n, d, generator=generator)
    wrong = torch.rand(n, generator=generator) < noise
    observed = torch.where(wrong, (true + torch.randint(1, k, (n,), generator=generator)) % k, true)
    return x, true.numpy(), observed.numpy(), wrong.numpy()


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_label_model_finds_wrong_answers_and_their_share(noise):
    known, answers, _, _ = clusters(60, 0, 0.0)
    x, _, observed, wrong = clusters(500, 1, noise)
    fit = fit_labels(known, answers, x, observed)
    assert abs(fit.share - wrong.mean()) < 0.04
    assert fit.told.auc > 0.9
    if noise:
        assert auc(fit.log_odds[~wrong], fit.log_odds[wrong]) > 0.95


def test_an_answer_that_no_validation_row_has_is_learned_from_the_training_rows():
    known, answers, _, _ = clusters(80, 0, 0.0)
    x, true, observed, wrong = clusters(500, 1, 0.2)
    kept = answers != 3
    fit = fit_labels(known[torch.from_numpy(kept)], answers[kept], x, observed)
    right = (true == 3) & ~wrong
    assert (fit.log_odds[right] > 0).mean() > 0.9


def test_a_row_does_not_vouch_for_itself():
    """One row's observed answer changed: the model that judges it is the same, so the odds of both answers agree."""
    known, answers, _, _ = clusters(60, 0, 0.0, k=2)
    x, _, observed, _ = clusters(300, 1, 0.2, k=2)
    before = fit_labels(known, answers, x, observed)
    flipped = observed.copy()
    flipped[7] = 1 - flipped[7]
    after = fit_labels(known, answers, x, flipped)
    # log p(o) T[o, o] / p(c) T[c, o] changes sign up to the noise terms T, which one row in 300 hardly moves.
    assert before.log_odds[7] * after.log_odds[7] < 0


def test_a_row_that_only_its_own_feature_could_explain_does_not_vouch_for_itself():
    """The odds of both answers of a row add up to what the noise says, also where it has a feature of its own."""
    rng = np.random.default_rng(0)
    known, x = torch.randn(40, 2, generator=torch.manual_seed(0)), torch.randn(200, 2)
    answers = (known[:, 0] > 0).long().numpy()
    observed = ((x[:, 0] > 0).numpy() ^ (rng.random(200) < 0.2)).astype(int)
    known, x = torch.cat([known, torch.zeros(40, 6)], 1), torch.cat([x, torch.eye(200)[:, :6]], 1)
    before, sums = fit_labels(known, answers, x, observed), []
    for i in range(9):
        flipped = observed.copy()
        flipped[i] = 1 - flipped[i]
        sums.append(before.log_odds[i] + fit_labels(known, answers, x, flipped).log_odds[i])
    assert max(sums) - min(sums) < 1


def test_an_answer_given_in_place_of_another_is_doubted_and_not_the_other_way_round():
    true = torch.arange(600) % 2
    x = torch.randn(600, 3, generator=torch.manual_seed(0))
    x[:, 0] += true
    observed = true[:400].clone()
    observed[100:] = 1  # none of the answers 0 is wrong, of the answers 1 many are
    fit = fit_labels(x[400:], true[400:].numpy(), x[:400], observed.numpy())
    zero, one = (fit.log_odds[observed.numpy() == k].mean() for k in (0, 1))
    assert zero > one + 0.3


@pytest.mark.parametrize("apart", [0.0, 0.3])
def test_what_it_says_of_itself_is_true_of_rows_that_it_has_not_seen(apart):
    """Pure noise and a weak signal among 60 features, in which soft targets could be learned by heart."""
    claims, truths, covered = [], [], []
    for seed in range(4):
        known, answers, *_ = clusters(300, seed, d=60, apart=apart)
        x, _, observed, _ = clusters(500, 10 + seed, 0.3, d=60, apart=apart)
        fit = fit_labels(known, answers, x, observed)
        untouched, right, *_ = clusters(2000, 20 + seed, d=60, apart=apart)
        wrong = (right + np.random.default_rng(seed).integers(1, 4, 2000)) % 4
        claims.append(fit.told.auc)
        truths.append(auc(fit.judge({"states": untouched}, right)[0], fit.judge({"states": untouched}, wrong)[0]))
        covered.append(fit.told.interval[0] <= truths[-1] <= fit.told.interval[1])
    assert abs(np.mean(claims) - np.mean(truths)) < 0.04
    assert sum(covered) >= 3
    assert apart or abs(np.mean(claims) - 0.5) < 0.05


@pytest.mark.parametrize("n_known", [300, 0])
@pytest.mark.parametrize("seed", [2, 3])
def test_where_nothing_can_be_told_nothing_is_said_of_the_noise(seed, n_known):
    """A share by moments of two means that are nearly the same was .97 +- .21 for one of these, and half of the rows
    went."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(n_known + 1500, 32)))
    answers = rng.integers(0, 8, len(x))
    fit = fit_labels(x[:n_known], answers[:n_known], x[n_known:], answers[n_known:])
    assert (fit.log_odds >= 0).all()
    assert (fit.known_log_odds >= 0).all()
    assert (fit.share, fit.share_error) == fit.known_share == (0.0, 1.0)


def test_rows_of_answers_with_few_validation_rows_are_kept_and_no_answer_goes_altogether():
    known, answers, *_ = clusters(120, 0)
    x, _, observed, wrong = clusters(500, 1, 0.3)
    few = np.append(np.flatnonzero(answers != 3), np.flatnonzero(answers == 3)[:2])
    fit = fit_labels(known[torch.from_numpy(few)], answers[few], x, observed)
    np.testing.assert_array_equal(fit.judged(observed), observed != 3)
    assert (fit.log_odds[observed == 3] >= 0).all()
    one_kind = np.where(wrong, 2, observed)  # answers 2 are nearly all wrong
    fit = fit_labels(known, answers, x, one_kind)
    assert all((fit.log_odds[one_kind == k] >= 0).any() for k in range(4))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 0.5])
def test_the_share_has_an_error_that_covers_it(noise):
    known, answers, *_ = clusters(200, 0, apart=1.0)
    x, _, observed, wrong = clusters(800, 1, noise, apart=1.0)
    fit = fit_labels(known, answers, x, observed)
    assert abs(fit.share - wrong.mean()) < 2.5 * fit.share_error < 0.25


def test_training_rows_teach_the_label_model_what_few_validation_rows_cannot():
    known, answers, _, _ = clusters(8, 0, 0.0)
    x, _, observed, _ = clusters(300, 1, 0.2)
    likelihood = fit_labels(known, answers, x, observed).likelihood
    assert max(likelihood.values()) > likelihood[label_fit.ALONE] + 0.3


def test_the_expectation_step_is_that_of_a_loop():
    """Two alternations: after the first the noise is no longer the symmetric one that it starts from."""
    torch.manual_seed(0)
    log_p = (3 * torch.randn(30, 3, dtype=torch.float64)).log_softmax(1)
    observed = np.arange(30) % 3
    truth, flips = expectation(log_p, observed, iterations=2)
    noise = 0.8 * np.eye(3) + 0.1 * (1 - np.eye(3))
    for _ in range(2):
        q = np.array([[float(log_p[i, c].exp()) * noise[c, o] for c in range(3)] for i, o in enumerate(observed)])
        q /= q.sum(1, keepdims=True)
        counts = np.zeros((3, 3))
        for i, o in enumerate(observed):
            counts[:, o] += q[i]
        rate = 1 - np.trace(counts) / counts.sum()
        symmetric = (1 - rate) * np.eye(3) + rate * (1 - np.eye(3)) / 2
        noise = (counts + 20 * symmetric) / (counts.sum(1, keepdims=True) + 20)
    np.testing.assert_allclose(truth, q, rtol=1e-10)
    np.testing.assert_allclose(flips, noise, rtol=1e-10)


def words(true, seed, k=4, noise=0.3):
    """Hashes of 6 words of each row, most of them of its answer's own 20, and which are -1."""
    rng = np.random.default_rng(seed)
    own = 20 * true[:, None] + rng.integers(20, size=(len(true), 6))
    any_word = rng.integers(20 * k, size=own.shape)
    hashes = np.where(rng.random(own.shape) < noise, any_word, own)
    hashes[:, 5] = np.where(rng.random(len(true)) < 0.5, -1, hashes[:, 5])
    return torch.from_numpy(hashes)


def test_views_are_weighed_by_what_they_tell():
    """States that say nothing beside words that do, and the other way round."""
    (known, answers, *_), (x, true, observed, wrong) = clusters(200, 0), clusters(500, 1, 0.3)
    noise, no_words = torch.randn(200, 6), words(np.zeros(200, dtype=int), 5)
    both = label_fit.fit_labels(
        {"states": noise, "words": words(answers, 2)},
        answers,
        {"states": torch.randn(500, 6), "words": words(true, 3)},
        observed,
    )
    assert both.weights["words"] > 3 * both.weights["states"] * both.log_odds.std() / 10
    assert auc(both.log_odds[~wrong], both.log_odds[wrong]) > 0.95
    states = label_fit.fit_labels(
        {"states": known, "words": no_words},
        answers,
        {"states": x, "words": words(np.zeros(500, dtype=int), 6)},
        observed,
    )
    assert auc(states.log_odds[~wrong], states.log_odds[wrong]) > 0.93


def test_without_validation_rows_the_training_rows_judge_each_other():
    x, true, observed, wrong = clusters(600, 1, 0.25)
    fit = fit_labels(x[:0], true[:0], x, observed)
    assert auc(fit.log_odds[~wrong], fit.log_odds[wrong]) > 0.95
    assert abs(fit.share - wrong.mean()) < max(2.5 * fit.share_error, 0.03)
    assert wrong[fit.log_odds < 0].mean() > 0.85
    clean = fit_labels(x[:0], true[:0], x, true)
    assert (clean.log_odds < 0).mean() < 0.02


def test_without_validation_rows_no_row_vouches_for_itself():
    """Pure noise: what is said of the rows is no better than chance, and none goes."""
    x, _, observed, wrong = clusters(400, 1, 0.3, d=60, apart=0.0)
    fit = fit_labels(x[:0], observed[:0], x, observed)
    assert abs(fit.told.auc - 0.5) < 0.06
    assert abs(auc(fit.log_odds[~wrong], fit.log_odds[wrong]) - 0.5) < 0.08
    assert (fit.log_odds >= 0).all()


def test_validation_rows_that_are_wrong_themselves_are_found_and_the_share_is_still_that_of_the_training_rows():
    (known, _, given, bad), (x, _, observed, wrong) = clusters(300, 0, 0.2), clusters(800, 1, 0.3)
    fit = fit_labels(known, given, x, observed)
    doubted = fit.known_log_odds < 0
    assert bad[doubted].mean() > 0.8
    assert doubted[bad].mean() > 0.8
    assert abs(fit.known_share[0] - bad.mean()) < 3 * fit.known_share[1]
    assert abs(fit.share - wrong.mean()) < 3 * fit.share_error
    _, right, *_ = clusters(300, 0)
    clean = fit_labels(known, right, x, observed)
    assert (clean.known_log_odds < 0).sum() <= 3


def test_the_answer_that_would_be_right_is_named():
    (known, answers, *_), (x, true, observed, wrong) = clusters(200, 0), clusters(500, 1, 0.3)
    fit = fit_labels(known, answers + 50, x, observed + 50)
    found = wrong & (fit.log_odds < 0)
    assert (fit.names(fit.suggested)[found] == true[found] + 50).mean() > 0.9
    assert (fit.suggested_p[found] > 0.5).mean() > 0.9


def test_one_answer_cannot_be_wrong():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="all answers are the same"):
        fit_labels(x, np.zeros(10, dtype=int), x, np.zeros(10, dtype=int))


def test_names_of_answers_do_not_matter():
    (known, answers, *_), (x, _, observed, _) = clusters(60, 0), clusters(200, 1, 0.3)
    plain, renamed = (fit_labels(known, f(answers), x, f(observed)) for f in (lambda a: a, lambda a: 7 * a + 1000))
    np.testing.assert_array_equal(plain.log_odds, renamed.log_odds)
    assert plain.share == renamed.share


def test_answers_that_come_once_are_not_judged_and_leave_the_others_alone():
    (known, answers, *_), (x, _, observed, _) = clusters(60, 0, apart=1.0), clusters(400, 1, apart=1.0)
    odd = np.arange(0, 400, 8)
    changed = observed.copy()
    changed[odd] = 100 + np.arange(len(odd))
    fit = fit_labels(known, answers, x, changed)
    others = np.setdiff1d(np.arange(400), odd)
    np.testing.assert_array_equal(fit.judged(changed), ~np.isin(np.arange(400), odd))
    assert (fit.log_odds[odd] > 0).all()
    assert (fit.log_odds[others] > 0).mean() > 0.9
    assert fit.share < 2 * fit.share_error


@pytest.mark.parametrize(
    "case", ["one known answer", "one row of a class", "three validation rows", "one row to score"]
)
def test_few_rows_or_answers_are_fitted_all_the_same(case):
    (known, answers, *_), (x, _, observed, _) = clusters(60, 0), clusters(100, 1)
    if case == "one known answer":
        known, answers = known[torch.from_numpy(answers == 0)], answers[answers == 0]
    elif case == "one row of a class":
        keep = np.append(np.flatnonzero(answers != 3), np.flatnonzero(answers == 3)[0])
        known, answers = known[torch.from_numpy(keep)], answers[keep]
    elif case == "three validation rows":
        known, answers = known[:3], answers[:3]
    else:
        x, observed = x[:1], observed[:1]
    fit = fit_labels(known, answers, x, observed)
    assert np.isfinite(fit.log_odds).all()
    assert len(fit.log_odds) == len(x)
    assert 0 <= fit.share <= 1
    assert 0 <= fit.told.auc <= 1


def test_features_that_are_not_finite_are_refused():
    known, answers, *_ = clusters(20, 0)
    with pytest.raises(ValueError, match="not finite"):
        fit_labels(known, answers, torch.full((5, 6), torch.nan), np.zeros(5, dtype=int))


def test_many_features_are_narrowed_to_what_inner_products_need():
    """40 directions that matter among 600 features: the leading ones of validation rows hold them all; and the random
    state is as found."""
    torch.manual_seed(0)
    mix = torch.randn(40, 600)
    known, x = torch.randn(60, 40) @ mix, torch.randn(500, 40) @ mix
    before = torch.random.get_rng_state()
    state = narrowing(known)
    assert torch.equal(before, torch.random.get_rng_state())
    found = narrowed(state, x)
    assert found.shape == (500, MAX_FEATURES)
    z = (x - known.mean(0)) / known.std(0)
    torch.testing.assert_close(found @ found.T, z @ z.T, rtol=1e-3, atol=0.2)
    unseen = torch.randn(500, 600)  # directions that no validation row has are kept as far as chance goes
    z = (unseen - known.mean(0)) / known.std(0)
    want, got = z @ z.T, narrowed(state, unseen) @ narrowed(state, unseen).T
    assert float(torch.corrcoef(torch.stack([want.flatten(), got.flatten()]))[0, 1]) > 0.9


def test_rows_beyond_those_that_are_fitted_on_are_judged_like_them(monkeypatch):
    (known, answers, *_), (x, _, observed, noisy) = clusters(60, 0), clusters(600, 1, 0.3)
    whole = fit_labels(known, answers, x, observed)
    some = fit_labels(known, answers, x[:300], observed[:300], all_observed=observed)
    judged = some.judge({"states": x[300:]}, observed[300:])[0]
    assert auc(judged[~noisy[300:]], judged[noisy[300:]]) > auc(whole.log_odds[~noisy], whole.log_odds[noisy]) - 0.02
    assert ((judged > 0) == (whole.log_odds[300:] > 0)).mean() > 0.95
    # Each is judged by the model of a fold in turn, whatever comes with it.
    np.testing.assert_allclose(some.judge({"states": x[300:305]}, observed[300:305])[0], judged[:5], rtol=1e-4)


# ---- the ways in ----


def test_rows_without_a_prompt_have_a_reason_and_the_others_their_scores():
    (validation, _), (train, wrong) = rows_of(60, 1), rows_of(100, 2, 0.3)
    model = build_model()
    plain = ForValueScorer(model, validation, CONFIG, progress=False).score(train)
    mixed = [*train[:50], {"input_ids": [5, 10], "labels": [5, 10]}, *train[50:]]
    scores = ForValueScorer(model, validation, CONFIG, progress=False).score(mixed)
    assert len(scores) == 101
    assert "no prompt" in scores.reasons[50]
    assert np.isnan(scores.values[50])
    assert relative(np.delete(scores.values, 50), plain.values) < 1e-3
    assert auc(plain.values[~wrong], plain.values[wrong]) > 0.9
    json.dumps(scores.metadata)
    text = [{"input_ids": row["input_ids"]} for row in train]
    with pytest.raises(ValueError, match=r"validation rows: none of 100 can be scored \(no prompt"):
        ForValueScorer(model, text, CONFIG, progress=False).score(train)


@pytest.mark.parametrize("method", ["label_model", "auto"])
def test_rows_that_a_collator_makes_batches_of_are_judged_too(method):
    model, rows, collate = llava()
    rows = [{**row, "text": [3, 4, 5, 6, 7, 8 + i % 2]} for i, row in enumerate(rows)]
    config = ForValueConfig(method=method)
    scores = ForValueScorer(model, rows[:6], config, data_collator=collate, progress=False).score(rows[6:])
    assert np.isfinite(scores.values).all()
    assert len(scores) == 4
    assert scores.noise.n_answers == 2


@pytest.mark.parametrize("method", ["label_model", "auto"])
def test_no_decision_follows_the_order_of_rows(method):
    (validation, _), (train, wrong) = rows_of(60, 1), rows_of(160, 2, 0.3)
    config, model = ForValueConfig(method=method), build_model()
    turn, other = np.random.default_rng(0).permutation(160), np.random.default_rng(1).permutation(60)
    one = ForValueScorer(model, validation, config, progress=False).score(train)
    shuffled = [validation[i] for i in other], [train[i] for i in turn]
    two = ForValueScorer(model, shuffled[0], config, progress=False).score(shuffled[1])
    np.testing.assert_array_equal(two.values < 0, (one.values < 0)[turn])
    np.testing.assert_allclose(two.values, one.values[turn], rtol=1e-2, atol=1e-2)
    assert wrong[one.values < 0].mean() > 0.7


def test_answers_that_lose_more_than_half_of_their_rows_are_named(caplog):
    (validation, _), (train, _) = rows_of(90, 1), rows_of(160, 2)
    for row in [row for row in train if row["labels"][-1] != 10][:90]:  # most rows of the answer 10 are wrong ones
        row["input_ids"][-1] = row["labels"][-1] = 10
    ForValueScorer(build_model(), validation, CONFIG, progress=False).score(train)
    row = next(i for i, row in enumerate(train) if row["labels"][-1] == 10)
    assert f"with the answer of scored row {row}: look" in caplog.text


def test_judgements_name_rows_with_the_right_answer():
    (validation, _), (train, wrong) = rows_of(60, 1), rows_of(160, 2, 0.3)
    scores = ForValueScorer(build_model(), validation, CONFIG, progress=False).score(train)
    judgements = scores.judgements
    found = np.flatnonzero(wrong & (judgements.suggested_row >= 0))
    # The last token of the prompt decides the answer.
    right = [train[judgements.suggested_row[i]]["labels"][-1] == train[i]["input_ids"][-2] + 7 for i in found]
    assert len(found) > 0.6 * wrong.sum()
    assert np.mean(right) > 0.85
    assert {judgements.kind[i] for i in np.flatnonzero(scores.values < 0)} == {"wrong answer"}
    np.testing.assert_allclose(judgements.probability, 1 / (1 + np.exp(scores.values)))


def test_rows_are_scored_without_validation_rows_where_answers_repeat():
    train, wrong = rows_of(200, 2, 0.25)
    for method in ("label_model", "auto"):
        scores = ForValueScorer(build_model(), None, ForValueConfig(method=method), progress=False).score(iter(train))
        assert auc(scores.values[~wrong], scores.values[wrong]) > 0.9
        assert "without validation rows" in scores.summary()
    with pytest.raises(ValueError, match="method='whitened' needs a validation_dataset"):
        ForValueScorer(build_model(), None, ForValueConfig(method="whitened")).score(train)
    different = [{**row, "labels": [-100] * 3 + [i], "input_ids": [5, 6, 7, i]} for i, row in enumerate(train[:40])]
    scorer = ForValueScorer(build_model(), None, CONFIG, progress=False)
    for _ in range(2):  # asked again, it says so again
        with pytest.raises(ValueError, match="0% of the first 40 rows share theirs with another: read 300 rows"):
            scorer.score(different)


def test_states_of_the_middle_layer_are_those_that_the_model_gives():
    model, (rows, _) = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32), rows_of(6, 1)
    scorer = ForValueScorer(model, rows, CONFIG, progress=False)
    (batch,) = scorer.run.positions(scorer.validation.samples(), scorer.validation.method)
    states = batch.middle_RE
    with torch.no_grad():
        for i, sample in enumerate(batch.samples):
            ids = torch.tensor(rows[sample.index]["input_ids"])[None]
            hidden = model(ids, output_hidden_states=True).hidden_states[3][0]  # of four layers
            first = rows[sample.index]["labels"].count(-100) - 1
            want = torch.cat([hidden[first], hidden[: first + 1].mean(0)])
            torch.testing.assert_close(states[i], want, rtol=1e-4, atol=1e-5)


def test_the_share_of_answers_that_repeat_is_named():
    validation, _ = rows_of(8, 1)
    for i, row in enumerate(validation[:5]):
        row["input_ids"][-1] = row["labels"][-1] = 30 + i
    with pytest.raises(ValueError, match=r"of the 8 validation rows .* use method='auto'"):
        ForValueScorer(build_model(), validation, CONFIG, progress=False).score(validation)


def arguments(tmp_path, **kwargs):
    return TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **kwargs,
    )


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {
        name: torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])
        for name, fill in (("input_ids", 0), ("labels", -100))
    }
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return {**padded, "attention_mask": (torch.arange(longest) < lengths).long()}


def test_callback_drops_wrong_answers_and_a_second_run_reuses_the_scores(tmp_path, monkeypatch):
    (validation, _), (train, wrong) = rows_of(60, 1), rows_of(120, 2, 0.3)

    def run():
        callback = ForValueCallback(validation, Drop("auto"), CONFIG)
        Trainer(
            build_model(),
            arguments(tmp_path),
            train_dataset=Dataset.from_list(train),
            data_collator=collate,
            callbacks=[callback],
        ).train()
        return callback

    first = run()
    assert (first.weights[wrong] == 0).mean() > 0.8
    assert (first.weights[~wrong] == 0).mean() < 0.2
    monkeypatch.setattr(ForValueScorer, "score", lambda *_: pytest.fail("scored again"))
    np.testing.assert_array_equal(run().scores.values, first.scores.values)


def test_prefilter_drops_wrong_answers(tmp_path):
    (validation, _), (train, wrong) = rows_of(60, 1), rows_of(120, 2, 0.3)
    trainer = Trainer(
        build_model(), arguments(tmp_path), train_dataset=Dataset.from_list(train), data_collator=collate
    )
    prefilter(trainer, validation, Drop(0.2), CONFIG)
    kept = [row["input_ids"] for row in trainer.train_dataset]
    assert len(kept) == 96
    bad = [row["input_ids"] for row, is_wrong in zip(train, wrong, strict=True) if is_wrong]
    assert sum(row in bad for row in kept) < 0.6 * len(bad)


RANKS = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from helpers.models import build_model
from helpers.answers import rows_of
from forvalue_callbacks import ForValueConfig, ForValueScorer
torch.distributed.init_process_group("gloo")  # and no accelerate
rank = torch.distributed.get_rank()
train, values = rows_of(90, 2, 0.3)[0], {}
for method in ("label_model", "whitened", "whitened"):  # the last one finds the direction that the one before has kept
    config = ForValueConfig(method=method, direction_cache=sys.argv[2])
    scorer = ForValueScorer(build_model(), rows_of(60, 1)[0], config, progress=False)
    scorer.run.max_tokens = 40
    values[method] = scorer.score(train).values.tolist()
values["pairs"] = scorer.pairwise(train, f"{sys.argv[2]}/pairs.npy").nanmean(1).tolist()
with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
    json.dump(values, file)
torch.distributed.destroy_process_group()
"""


def test_two_gloo_ranks_have_the_scores_of_one(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    subprocess.run(
        [*launch, str(tmp_path / "ranks.py"), str(Path(__file__).parent), str(tmp_path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0] == two[1], "ranks that differ would draw different rows"
    for method, tolerance in (("label_model", 1e-2), ("whitened", 1e-5)):
        config = ForValueConfig(method=method)
        one = ForValueScorer(build_model(), rows_of(60, 1)[0], config, progress=False).score(rows_of(90, 2, 0.3)[0])
        assert relative(two[0][method], one.values) < tolerance
    assert relative(two[0]["pairs"], one.values) < 1e-4
