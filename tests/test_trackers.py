"""The numbers that trackers are told, and nobody else."""

import json
import sys
import types

import numpy as np
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from forvalue_callbacks import (
    Drop,
    ForValueCallback,
    ForValueScores,
)
from forvalue_callbacks.report.words import numbers
from forvalue_callbacks.scores.noise import Evidence, NoiseEstimate
from forvalue_callbacks.trainer.trackers import report
from helpers.trainers import (
    VALIDATION,
    make_trainer,
    rows_with_id,
)


def test_nothing_of_ours_is_in_the_dictionaries_of_others(tmp_path):
    """A search over hyperparameters sums up the metrics of an evaluation."""
    logged = []

    class Look(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(set(logs))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            logged.append(set(metrics))

    callbacks = [Look(), ForValueCallback(VALIDATION), Look()]
    evaluation = Dataset.from_list(rows_with_id()[:4])
    trainer = make_trainer(tmp_path, callbacks, evaluation=evaluation, eval_strategy="epoch", num_train_epochs=1)
    trainer.train()
    assert logged
    assert not any(name.startswith("forvalue") for names in logged for name in names)
    assert json.loads(json.dumps(trainer.state.log_history)) == trainer.state.log_history


@pytest.mark.parametrize("named", [False, pytest.param(True, marks=pytest.mark.newest)])  # transformers 4: an argument
def test_the_numbers_reach_tensorboard(tmp_path, named, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if named:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    trainer = make_trainer(
        tmp_path, [ForValueCallback(VALIDATION, Drop(0.25))], report_to=["tensorboard"], max_steps=1
    )
    trainer.train()
    ours, theirs = sorted((tmp_path / ("elsewhere" if named else "runs")).rglob("events.out.tfevents.*"))
    assert ours.parent == theirs.parent
    entry = next(e for e in trainer.state.log_history if "forvalue_kept" in e)
    for read in (ours, ours.parent):  # the folder as TensorBoard reads it: file after file, never back
        events = EventAccumulator(str(read)).Reload()
        for name in ("forvalue_kept", "forvalue_dropped", "forvalue_draws_per_kept_row_mean"):
            (event,) = events.Scalars(f"train/{name}")
            assert (event.step, event.value) == (0, pytest.approx(entry[name]))
    assert "train/loss" in events.Tags()["scalars"]  # as without us
    assert "train/loss" in EventAccumulator(str(theirs)).Reload().Tags()["scalars"]


def test_the_numbers_reach_a_run_of_wandb_where_the_trainer_reports_to_it(monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=logged.append)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=run))
    report(types.SimpleNamespace(report_to=["wandb"]), 7, {"forvalue_kept": 3})
    assert logged == [{"train/forvalue_kept": 3, "train/global_step": 7}]
    report(types.SimpleNamespace(report_to=[]), 7, {"forvalue_kept": 3})
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None))
    report(types.SimpleNamespace(report_to=["wandb"]), 7, {"forvalue_kept": 3})
    assert len(logged) == 1


def test_shares_and_evidence_are_among_the_numbers():
    scores = ForValueScores([1.0, -2.0], [None, None], [-1.0, -1.0], [2, 2])
    evidence = {"swapped": Evidence(0.9), "words deleted": Evidence(0.7)}
    scores.metadata["noise"] = NoiseEstimate(0.4, evidence, 50, {"swapped": 0.3, "words deleted": 0.1}).to_dict()
    found = numbers(scores, np.array([1.0, 0.0]), 1.0)
    assert found["forvalue_noise_share"] == 0.4
    assert found["forvalue_share_words_deleted"] == 0.1
    assert found["forvalue_auc_swapped"] == 0.9
