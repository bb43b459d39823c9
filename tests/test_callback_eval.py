"""The trainer's own evaluation rows as validation rows."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from forvalue_callbacks import ForValueCallback, ForValueScorer, Keep, prefilter
from forvalue_callbacks.tiny import instructions
from forvalue_callbacks.trainer.evaluation import trainer_of
from helpers.models import build_model, build_rows
from helpers.oracles import relative
from helpers.trainers import VALIDATION, Passes, make_sft, make_trainer, rows_with_id

EVALUATION = Dataset.from_list(VALIDATION)
SETS = {"easy": Dataset.from_list(build_rows(5, seed=7)), "hard": EVALUATION}


def scores_by(tmp_path, validation, evaluation=EVALUATION, way="callback"):
    trainer = make_trainer(tmp_path, evaluation=evaluation, max_steps=1)
    if way == "prefilter":
        return prefilter(trainer, validation, Keep(12), verbose=False).values
    callback = ForValueCallback(validation, Keep(12), verbose=False)
    trainer.add_callback(callback)
    trainer.train()
    return callback.scores.values


@pytest.mark.parametrize("way", ["callback", "prefilter"])
def test_eval_stands_for_the_evaluation_rows_of_the_trainer(tmp_path, caplog, way):
    want = ForValueScorer(build_model(), VALIDATION, progress=False).score(rows_with_id()).values
    assert relative(scores_by(tmp_path / "a", "eval", way=way), want) < 1e-6
    assert "its loss no longer measures the result fairly" in caplog.text
    assert relative(scores_by(tmp_path / "b", "eval:hard", SETS, way), want) < 1e-6
    assert relative(scores_by(tmp_path / "c", "eval:easy", SETS, way), want) > 0.1


def test_evaluation_rows_are_those_that_the_trainer_has_prepared(tmp_path):
    """Rows of SFT with another EOS: nothing but the trainer's own preparation puts it there."""
    trainer = make_sft(tmp_path, max_steps=1)
    trainer.eval_dataset = trainer.train_dataset.select(range(6))
    callback = ForValueCallback("eval", Keep(12), verbose=False)
    trainer.add_callback(callback)
    given = trainer.train_dataset.select(range(6))
    want = ForValueScorer(trainer.model, given, progress=False).score(trainer.train_dataset)
    trainer.train()
    assert relative(callback.scores.values, want.values) < 1e-6
    raw = ForValueScorer(
        make_sft(tmp_path).model,
        instructions(6, seed=0, noise=0.2),
        processing_class=trainer.processing_class,
        progress=False,
    ).score(trainer.train_dataset)
    assert not np.allclose(raw.values, want.values)


@pytest.mark.parametrize(
    ("validation", "evaluation", "match"),
    [
        ("eval", None, "or the trainer an eval_dataset"),
        ("eval:other", SETS, "no set 'other': give 'eval' for all, or 'eval:easy' or 'eval:hard'"),
        ("eval:easy", EVALUATION, "one set, without names: give 'eval', not 'eval:easy'"),
        ("rows.jsonl", EVALUATION, "is the text 'rows.jsonl': give rows, or 'eval'"),
    ],
)
def test_evaluation_rows_that_are_not_there_are_refused_before_any_pass(tmp_path, validation, evaluation, match):
    model = build_model()
    passes = Passes(model)
    for way in (
        lambda t: t.add_callback(ForValueCallback(validation)) or t.train(),
        lambda t: prefilter(t, validation),
    ):
        with pytest.raises(ValueError, match=match):
            way(make_trainer(tmp_path, model=model, evaluation=evaluation))
    assert passes.n == 0


def test_a_callback_that_no_trainer_calls_cannot_find_evaluation_rows(tmp_path):
    callback = ForValueCallback("eval", verbose=False)
    trainer = make_trainer(tmp_path)
    loader = trainer.get_train_dataloader()
    with pytest.raises(ValueError, match="no trainer is calling: give rows"):
        callback.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, train_dataloader=loader
        )


def test_a_trainer_is_found_and_shortened_while_it_is_being_made(tmp_path):
    """What frameworks that take nothing but callbacks need."""

    class Shorten(TrainerCallback):
        def on_init_end(self, args, state, control, **kwargs):
            prefilter(trainer_of(state), "eval", Keep(12), verbose=False)

    trainer = make_trainer(tmp_path, [Shorten()], evaluation=EVALUATION, num_train_epochs=1)
    assert len(trainer.train_dataset) == 12
    trainer.train()
    assert trainer.state.global_step == 3
