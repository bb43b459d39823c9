"""method="label_model" where data is awkward, and the ways in: ranks, the callback, prefilter, rows with images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from forvalue_callbacks import Drop, ForValueCallback, ForValueConfig, ForValueScorer, prefilter
from forvalue_callbacks.methods.label_model import MAX_FEATURES, _half_whitened, fit_labels
from forvalue_callbacks.scores.scores import auc
from helpers.models import build_model, llava, rows_of
from helpers.oracles import relative

CONFIG = ForValueConfig(method="label_model")


def clusters(n, seed, noise=0.0, k=4, d=6, apart=2.0):
    generator = torch.Generator().manual_seed(seed)
    centers = apart * torch.randn(k, d, generator=torch.Generator().manual_seed(99))
    true = torch.randint(k, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < noise
    observed = torch.where(wrong, (true + torch.randint(1, k, (n,), generator=generator)) % k, true)
    return centers[true] + torch.randn(n, d, generator=generator), observed.numpy(), wrong.numpy()


# ---- the fit ----


def test_names_of_answers_do_not_matter():
    (known, answers, _), (x, observed, _) = clusters(60, 0), clusters(200, 1, 0.3)
    plain, renamed = (fit_labels(known, f(answers), x, f(observed)) for f in (lambda a: a, lambda a: 7 * a + 1000))
    np.testing.assert_array_equal(plain.log_odds, renamed.log_odds)
    assert plain.noise_share == renamed.noise_share


def test_answers_that_come_once_get_low_odds_and_leave_the_others_alone():
    (known, answers, _), (x, observed, _) = clusters(60, 0, apart=1.0), clusters(400, 1, apart=1.0)
    odd = np.arange(0, 400, 8)
    changed = observed.copy()
    changed[odd] = 100 + np.arange(len(odd))
    fit = fit_labels(known, answers, x, changed)
    others = np.setdiff1d(np.arange(400), odd)
    assert (fit.log_odds[odd] < 0).all()
    assert (fit.log_odds[others] > 0).mean() > 0.9
    assert abs(fit.noise_share - len(odd) / 400) < 0.1


@pytest.mark.parametrize("case", ["one known answer", "one row of a class", "three held-out rows", "one row to score"])
def test_few_rows_or_answers_are_fitted_all_the_same(case):
    (known, answers, _), (x, observed, _) = clusters(60, 0), clusters(100, 1)
    if case == "one known answer":
        known, answers = known[torch.from_numpy(answers == 0)], answers[answers == 0]
    elif case == "one row of a class":
        keep = np.append(np.flatnonzero(answers != 3), np.flatnonzero(answers == 3)[0])
        known, answers = known[torch.from_numpy(keep)], answers[keep]
    elif case == "three held-out rows":
        known, answers = known[:3], answers[:3]
    else:
        x, observed = x[:1], observed[:1]
    fit = fit_labels(known, answers, x, observed)
    assert np.isfinite(fit.log_odds).all()
    assert len(fit.log_odds) == len(x)
    assert 0 <= fit.noise_share <= 1
    assert 0 <= fit.flipped_auc <= 1


def test_features_that_are_not_finite_are_refused():
    known, answers, _ = clusters(20, 0)
    with pytest.raises(ValueError, match="not finite"):
        fit_labels(known, answers, torch.full((5, 6), torch.nan), np.zeros(5, dtype=int))


def test_the_leading_directions_of_many_features_are_those_of_a_full_decomposition():
    """40 directions that matter among 600 features: the inner products of all rows are those of the exact projection,
    and the random state is as found."""
    torch.manual_seed(0)
    x = torch.randn(700, 40) @ torch.randn(40, 600) + 1e-3 * torch.randn(700, 600)
    before = torch.random.get_rng_state()
    found = _half_whitened(x, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert found.shape == (700, MAX_FEATURES)
    z = ((x - x.mean(0)) / x.std(0)).double()
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    values, vectors = values[-MAX_FEATURES:], vectors[:, -MAX_FEATURES:]
    want = (z @ vectors * (values + 0.01) ** -0.25).float()
    torch.testing.assert_close(found @ found.T, want @ want.T, rtol=1e-3, atol=1e-2)


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
    assert scores.metadata["noise"]["answers"] == 2


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
from helpers.models import rows_of
from forvalue_callbacks import ForValueConfig, ForValueScorer
torch.distributed.init_process_group("gloo")  # and no accelerate
rank = torch.distributed.get_rank()
train, values = rows_of(90, 2, 0.3)[0], {}
for method in ("label_model", "whitened", "whitened"):  # the last one finds the direction that the one before has kept
    config = ForValueConfig(method=method, direction_cache=sys.argv[2])
    scorer = ForValueScorer(build_model(), rows_of(60, 1)[0], config, progress=False)
    scorer.batcher.max_tokens = 40
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
