"""Several validation sets: one pass over the rows, a score by each, and what policies see of them."""

import numpy as np
import pytest
import torch

from forvalue_callbacks import (
    Drop,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    ForValueScores,
    ForValueTransform,
    Keep,
    Swap,
    prefilter,
    value,
)
from forvalue_callbacks.scores.scores import best_of
from helpers.models import build_model, build_rows
from helpers.oracles import inverse_second_moment, relative, row_gradient, score_by_autograd
from helpers.trainers import Passes, make_trainer, rows_with_id


def about(token, n, seed):
    """Rows of which all labels but the last are one token, which can be learnt."""
    rows = build_rows(n, seed=seed)
    for row in rows:
        answer = [place for place, label in enumerate(row["labels"]) if label != -100]
        for place in answer[:-1]:
            row["input_ids"][place] = row["labels"][place] = token
    return rows


TRAIN = [row for token in (7, 20, 33) for row in about(token, 4, seed=token)]
SETS = {"short": about(7, 10, seed=2), "of three": about(20, 11, seed=3), "other": about(33, 12, seed=4)}
BAD = {"input_ids": [5], "labels": [5]}
WAYS = [
    ("gradient", "none"),
    ("gradient", "length"),
    ("gradient", "cosine"),
    ("whitened", "none"),
    ("whitened", "cosine"),
    ("fitted", "none"),
    ("fitted_likelihood", "length"),
]


def scorer(validation, model=None, **config):
    model = build_model(dtype=torch.float64) if model is None else model
    return ForValueScorer(model, validation, ForValueConfig(**config), progress=False)


def standard(values):
    return (values - np.nanmean(values)) / np.nanstd(values)


@pytest.mark.parametrize(("method", "normalize"), WAYS)
def test_scores_by_each_set_are_those_of_a_scorer_of_its_own(method, normalize):
    config = {"method": method, "normalize": normalize}
    scores = scorer(SETS, **config).score(TRAIN)
    assert list(scores.by_set) == list(SETS)
    for name, rows in SETS.items():
        alone = scorer(rows, **config).score(TRAIN)
        assert relative(scores.by_set[name], alone.values) < 1e-10
        assert relative(scores.log_likelihood, alone.log_likelihood) < 1e-12
        assert scores.n_labelled.tolist() == alone.n_labelled.tolist()


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_models_in_float32_have_the_scores_of_float64(normalize):
    scores, exact = (
        scorer(SETS, build_model(dtype=dtype), method="whitened", normalize=normalize).score(TRAIN)
        for dtype in (torch.float32, torch.float64)
    )
    for name in SETS:
        assert relative(scores.by_set[name], exact.by_set[name]) < 1e-4


def test_scores_by_each_set_equal_autograd_on_the_heads_weight():
    model = build_model("qwen2", torch.float64)
    scores = scorer(SETS, model).score(TRAIN)
    for name, rows in SETS.items():
        assert relative(scores.by_set[name], [score_by_autograd(model, row, rows) for row in TRAIN]) < 1e-10


def test_the_cosine_of_whitened_is_in_the_metric_of_each_set():
    model = build_model(dtype=torch.float64)
    scores = scorer(SETS, model, method="whitened", normalize="cosine").score(TRAIN)
    for name, rows in SETS.items():
        metric = inverse_second_moment(model, rows)
        direction = torch.stack([row_gradient(model, row) for row in rows]).mean(0) @ metric
        gradients = [row_gradient(model, row) for row in TRAIN]
        want = [float((direction * g).sum() / ((g @ metric) * g).sum().sqrt()) for g in gradients]
        assert relative(scores.by_set[name], want) < 1e-10


def test_the_score_is_the_greatest_by_any_set_in_standard_deviations_and_a_row_that_fails_has_none(tmp_path):
    scores = scorer(SETS).score([*TRAIN, BAD], tmp_path / "scores.parquet")
    by_set = np.stack(list(scores.by_set.values()))
    assert np.isnan(by_set[:, 12]).all()
    want = np.max([standard(values) for values in by_set], 0)
    assert np.allclose(scores.values, want, equal_nan=True)
    assert scores.reasons[12] is not None
    assert len(set(by_set[:, :12].argmax(0))) > 1, "or the greatest is always by the same set"
    loaded = ForValueScores.load(tmp_path / "scores.parquet")
    assert np.array_equal(loaded.values, scores.values, equal_nan=True)
    assert list(loaded.by_set) == list(SETS)
    for name in SETS:
        assert np.array_equal(loaded.by_set[name], scores.by_set[name], equal_nan=True)
    assert [f"score_{name}" for name in SETS] == [name for name in loaded.to_pandas() if name.startswith("score_")]


def test_a_set_by_which_all_rows_score_alike_says_nothing():
    alike, none = np.array([0.1] * 3), np.array([np.nan] * 3)
    assert alike.std() > 0, "rounding"
    assert best_of({"a": alike, "b": np.array([-5.0, 0.0, 5.0])}).tolist() == [0, 0, np.sqrt(1.5)]
    assert np.isnan(best_of({"a": none})).all()
    assert scorer(SETS).score([BAD]).reasons[0] is not None
    assert len(scorer(SETS).score([])) == 0


@pytest.mark.parametrize("method", ["gradient", "whitened"])
def test_more_sets_cost_no_pass_over_the_training_rows(method):
    n = []
    for sets in ({"short": SETS["short"]}, SETS):
        model = build_model()
        made = scorer(sets, model, method=method)
        made.validation.state()
        passes = Passes(model)
        made.score(TRAIN)
        n.append(passes.n)
    assert n[0] == n[1] > 0


def test_the_passes_to_come_are_one_for_each_set_and_one_over_the_rows(capfd, plain):
    made = ForValueScorer(build_model(), SETS)
    made.score(TRAIN)
    made.score(TRAIN)
    said = capfd.readouterr().err
    assert "scoring 12 rows by 33 validation rows: 4 passes" in said
    assert "scoring 12 rows by 33 validation rows: 1 pass" in said


def test_what_scores_are_made_of_follows_the_names_and_rows_of_the_sets(tmp_path):
    made = scorer(SETS).provenance()
    assert made == scorer({**SETS}).provenance()
    renamed = {"a": SETS["short"], **{name: rows for name, rows in SETS.items() if name != "short"}}
    for other in (renamed, {**SETS, "other": SETS["short"]}, {**SETS, "fourth": SETS["short"]}, SETS["short"]):
        assert scorer(other).provenance()["validation"] != made["validation"]
    cached = scorer(SETS, direction_cache=str(tmp_path))
    want = cached.score(TRAIN)
    assert len(list(tmp_path.iterdir())) == len(SETS), "one state each, for scorers of one set too"
    assert np.array_equal(scorer(SETS, direction_cache=str(tmp_path)).score(TRAIN).values, want.values)


def test_rows_of_a_set_that_cannot_be_scored_are_named_with_it(caplog):
    scorer({**SETS, "worse": [*SETS["short"], BAD]}).score(TRAIN)
    assert "1 of 11 validation rows of 'worse' cannot be scored (row 10:" in caplog.text
    with pytest.raises(ValueError, match=r"no validation row of 'none' can be scored.*1 rows; row 0"):
        scorer({**SETS, "none": [BAD]}).score(TRAIN)
    with pytest.raises(ValueError, match=r"no validation row of 'empty' can be scored.*none given"):
        scorer({**SETS, "empty": []}).score(TRAIN)
    leaking = scorer(SETS).score([*TRAIN, SETS["other"][2]])
    assert leaking.metadata["leakage"] == {"n": 1, "rows": [12]}


@pytest.mark.parametrize("config", [{"method": "auto"}, {"method": "label_model"}, {"vocab": "seen"}])
def test_methods_by_one_set_are_refused_by_name(config):
    match = r"3 validation sets are given.*takes one: give one of 'short', 'of three', 'other'.*'whitened' or 'fitted'"
    with pytest.raises(ValueError, match=match):
        scorer(SETS, **config)


def test_what_is_by_one_set_is_refused_before_any_pass():
    model = build_model()
    passes = Passes(model)
    made = scorer(SETS, model)
    for way in (
        lambda: made.pairwise(TRAIN),
        lambda: made.token_scores(TRAIN),
        lambda: made.explain(TRAIN, [0]),
        made.direction,
    ):
        with pytest.raises(ValueError, match=r"3 validation sets are given.*'short'.*take ForValueScorer.score"):
            way()
    with pytest.raises(ValueError, match=r"3 validation sets are given.*'short'.*use ForValueScorer.score"):
        ForValueTransform(model, SETS)
    with pytest.raises(ValueError, match="no data set of rows"):
        scorer({"input_ids": [[3, 4]], "labels": [[3, 4]]}).score(TRAIN)
    assert passes.n == 0


def test_a_loop_a_trainer_and_its_own_evaluation_sets(tmp_path, caplog):
    want = scorer(SETS, build_model()).score(rows_with_id())
    weights = value(build_model(), rows_with_id(), SETS, "keep:10", verbose=False)
    assert weights.tolist() == Keep(10)(want.values).tolist()
    streams = {name: iter(rows) for name, rows in SETS.items()}
    for number, (given, evaluation) in enumerate(((streams, None), ("eval", SETS))):
        callback = ForValueCallback(given, Drop(0.25))
        make_trainer(tmp_path / str(number), [callback], evaluation=evaluation, max_steps=1).train()
        assert relative(callback.scores.values, want.values) < 1e-5
        assert callback.weights.tolist() == Drop(0.25)(want.values).tolist()
        loaded = ForValueScores.load(tmp_path / str(number) / "forvalue_scores.parquet")
        assert list(loaded.by_set) == list(SETS)
        assert (tmp_path / str(number) / "forvalue_report.html").is_file()
    assert "the report explains no rows" not in caplog.text, "there is nothing wrong"


def test_prefilter_keeps_by_the_greatest_and_refuses_what_turns_rows_by_one_score(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    scores = prefilter(trainer, SETS, Keep(7), verbose=False)
    kept = [row["input_ids"][0] - 3 for row in trainer.train_dataset]
    assert kept == np.flatnonzero(Keep(7)(scores.values)).tolist()
    pairs = [{"chosen_ids": [3, 4], "rejected_ids": [3, 5]}]
    with pytest.raises(ValueError, match="needs scores by one validation set"):
        prefilter(make_trainer(tmp_path, train=pairs, remove_unused_columns=False), SETS, Swap())
