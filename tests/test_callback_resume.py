"""A run that goes on, begins again or is the second of its callback: which scores it takes."""

import re

import numpy as np
import pytest
from transformers import Trainer

from forvalue_callbacks import (
    Drop,
    ForValueCallback,
    ForValueScorer,
    ForValueScores,
)
from forvalue_callbacks.trainer.callback import SCORES_FILE
from helpers.models import build_model, build_rows
from helpers.oracles import relative
from helpers.trainers import (
    VALIDATION,
    drawn,
    losses,
    make_trainer,
    rows_with_id,
)


@pytest.mark.parametrize("step", [6, 8], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_reuses_its_scores_and_goes_on_as_if_never_stopped(tmp_path, step, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": step}
    whole = make_trainer(tmp_path, [ForValueCallback(VALIDATION, Drop(0.25))], **options)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{step}"
    assert (checkpoint / SCORES_FILE).is_file()
    (tmp_path / SCORES_FILE).unlink()

    def refuse(self, dataset):
        raise AssertionError("a resumed run must not score with trained weights")

    monkeypatch.setattr(ForValueScorer, "score", refuse)
    callback = ForValueCallback(VALIDATION, Drop(0.25))
    resumed = make_trainer(tmp_path, [callback], **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert np.array_equal(callback.scores.values, ForValueScores.load(checkpoint / SCORES_FILE).values, equal_nan=True)
    assert losses(resumed)[-(12 - step) :] == losses(whole)[-(12 - step) :]


def test_scores_of_other_data_are_not_reused(tmp_path):
    make_trainer(tmp_path, [ForValueCallback(VALIDATION)]).train()
    other = ForValueCallback(build_rows(6, seed=3))
    make_trainer(tmp_path, [other]).train()
    want = ForValueScorer(build_model(), build_rows(6, seed=3), progress=False).score(rows_with_id())
    assert relative(other.scores.values, want.values) < 1e-5


class SmallMemory(Trainer):
    """Runs out of memory in the third step while the batch is larger than 4."""

    def compute_loss(self, model, inputs, *args, **options):
        if len(inputs["input_ids"]) > 4 and self.state.global_step >= 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().compute_loss(model, inputs, *args, **options)


def test_a_run_that_begins_again_with_smaller_batches_keeps_its_scores_and_says_so(tmp_path, capfd, plain):
    callback = ForValueCallback(VALIDATION, Drop(0.25))
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    trainer = make_trainer(tmp_path, [callback], kind=SmallMemory, **options)
    trainer.train()
    want = ForValueScorer(build_model(), VALIDATION, progress=False).score(rows_with_id())
    assert trainer.state.train_batch_size < 8
    assert np.array_equal(callback.scores.values, want.values)
    said = capfd.readouterr().err
    assert "the run begins again, with the scores made before its first step" in said
    assert said.count("For-Value (gradient): scoring") == said.count("policy      ") == 1
    assert set(np.flatnonzero(callback.weights == 0)).isdisjoint(drawn(trainer))


def test_a_second_run_on_trained_weights_scores_anew_and_says_that_they_are_trained(tmp_path, caplog):
    callback = ForValueCallback(VALIDATION)
    trainer = make_trainer(tmp_path, [callback], max_steps=2)
    trainer.train()
    first = callback.scores
    (tmp_path / SCORES_FILE).unlink()
    trainer.train()
    assert not np.allclose(callback.scores.values, first.values)
    assert "the scores of the last run are not used again, they were made of other weights; the model has been " in (
        caplog.text
    )
    assert not re.search(r"[0-9a-f]{16}", caplog.text)  # no hash is for people
    trainer = make_trainer(tmp_path / "b", [callback], max_steps=1)  # a new model, as it was in the beginning
    caplog.clear()
    trainer.train()
    assert np.array_equal(callback.scores.values, first.values)


def test_a_file_of_scores_that_cannot_be_read_is_no_hindrance(tmp_path, caplog):
    (tmp_path / SCORES_FILE).write_bytes(b"PAR1, but no more of it")
    make_trainer(tmp_path, [ForValueCallback(VALIDATION)], max_steps=1).train()
    assert "cannot be read as scores" in caplog.text
    assert len(ForValueScores.load(tmp_path / SCORES_FILE)) == 24
