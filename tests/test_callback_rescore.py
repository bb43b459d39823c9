"""Rows scored again while a model is trained, where somebody asks for it."""

import numpy as np
import pytest
from datasets import IterableDataset
from transformers import TrainerCallback

from forvalue_callbacks import Drop, ForValueCallback, ForValueScorer, ForValueScores
from helpers.oracles import relative
from helpers.trainers import VALIDATION, drawn, make_trainer, rows_with_id


class Look(TrainerCallback):
    """What the scores are, and what a scorer says, at the end of each epoch; the rows of each epoch."""

    def __init__(self, callback):
        self.callback, self.scores, self.weights, self.want, self.n = callback, [], [], [], []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.scores.append(self.callback.scores.values)
        self.weights.append(self.callback.weights)
        self.want.append(ForValueScorer(model, VALIDATION, progress=False).score(rows_with_id()).values)


def test_scores_of_every_kth_epoch_are_those_of_the_weights_there_and_draw_the_next_rows(tmp_path):
    callback = ForValueCallback(VALIDATION, Drop(0.25), rescore_epochs=2, verbose=False)
    look = Look(callback)
    trainer = make_trainer(tmp_path, [callback, look], num_train_epochs=5)
    start = ForValueScorer(trainer.model, VALIDATION, progress=False).score(rows_with_id()).values
    trainer.train()
    for epoch, want in enumerate([start, look.want[1], look.want[1], look.want[3], look.want[3]]):
        assert relative(look.scores[epoch], want) < 1e-5
    assert relative(look.want[1], start) > 1e-2, "the weights have moved"
    dropped = [np.flatnonzero(weights == 0).tolist() for weights in look.weights]
    assert dropped[0] != dropped[1]
    entries = [entry for entry in trainer.state.log_history if "forvalue_kept" in entry]
    assert [(entry["step"], entry["epoch"]) for entry in entries] == [(0, 0), (12, 2), (24, 4)]
    assert len(ForValueScores.load(tmp_path / "forvalue_scores.parquet")) == 24


def test_what_is_drawn_follows_the_newest_scores_also_when_a_run_goes_on(tmp_path):
    callback = ForValueCallback(VALIDATION, Drop(0.25), rescore_epochs=1, verbose=False)
    options = {"num_train_epochs": 2, "save_strategy": "epoch"}
    epochs = []

    class Before(TrainerCallback):
        def on_epoch_end(self, *args, **kwargs):
            epochs.append((drawn(trainer), callback.weights))

    class After(TrainerCallback):
        def on_epoch_end(self, *args, **kwargs):
            trainer.seen.clear()

    trainer = make_trainer(tmp_path, [Before(), callback, After()], **options)
    trainer.train()
    assert len(epochs) == 2
    for rows, weights in epochs:
        assert set(rows) == set(np.flatnonzero(weights))
        assert len(rows) == 24
    assert set(epochs[0][0]) != set(epochs[1][0])
    assert callback.weights is epochs[1][1], "nothing is drawn after the last epoch"
    going_on = ForValueCallback(VALIDATION, Drop(0.25), verbose=False)
    resumed = make_trainer(tmp_path, [going_on], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert np.array_equal(going_on.weights, epochs[1][1])
    assert drawn(resumed) == epochs[1][0]


def test_what_came_of_the_scores_is_said_each_time(tmp_path, capfd, plain):
    make_trainer(tmp_path, [ForValueCallback(VALIDATION, Drop(0.25), rescore_epochs=1)], num_train_epochs=2).train()
    said = capfd.readouterr().err
    assert said.count("For-Value: 24 rows scored in") == 2
    assert said.count("policy      drop:0.25 keeps 18 rows and drops 6") == 2
    assert said.count("draws       a kept row is drawn 1.33 times an epoch") == 2


def test_what_cannot_be_scored_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rescore_epochs is 0"):
        ForValueCallback(VALIDATION, rescore_epochs=0)
    given = ForValueScores(np.zeros(24), [None] * 24, np.zeros(24), np.ones(24))
    ForValueCallback(None, scores=given)
    with pytest.raises(TypeError, match="validation_dataset is None"):
        ForValueCallback(None, scores=given, rescore_epochs=1)
    stream = IterableDataset.from_generator(lambda: iter(rows_with_id()))
    callback = ForValueCallback(VALIDATION, rescore_epochs=1)
    with pytest.raises(ValueError, match="streaming data is scored before the first step alone"):
        make_trainer(tmp_path, [callback], train=stream, max_steps=2).train()
