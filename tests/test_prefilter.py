"""The training rows of a trainer shortened before it runs."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import Subset

from forvalue_callbacks import (
    Keep,
    Reweight,
    prefilter,
)
from forvalue_callbacks.tiny import instructions
from helpers.models import build_model
from helpers.trainers import (
    TRAIN,
    VALIDATION,
    Passes,
    drawn,
    make_sft,
    make_trainer,
    rows_with_id,
)


def test_prefilter_shortens_the_data_set_and_the_run(tmp_path):
    trainer = make_sft(tmp_path, max_steps=-1, num_train_epochs=1)
    rows = trainer.train_dataset
    scores = prefilter(trainer, instructions(10, seed=1), Keep(16))
    assert len(trainer.train_dataset) == 16
    assert trainer.train_dataset["prompt"] == [rows["prompt"][i] for i in sorted(np.argsort(-scores.values)[:16])]
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match=r"reweight.*ForValueCallback"):
        prefilter(trainer, instructions(10, seed=1), Reweight(1.0))
    with pytest.raises(ValueError, match="validation_dataset"):
        prefilter(trainer)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.mark.parametrize("form", [Dataset.from_list, Rows, list, lambda rows: Subset(rows, range(len(rows)))])
def test_prefilter_shortens_rows_in_any_form_that_a_trainer_takes(tmp_path, form):
    trainer = make_trainer(tmp_path, train=form(rows_with_id()), num_train_epochs=1)
    scores = prefilter(trainer, VALIDATION, Keep(8), verbose=False)
    trainer.train()
    assert sorted(drawn(trainer)[-8:]) == sorted(np.argsort(-scores.values)[:8].tolist())
    assert trainer.state.global_step == 2


def rows_only_in_turn():
    class InTurn:
        def __len__(self):
            return len(TRAIN)

        def __iter__(self):
            return iter(TRAIN)

    return InTurn()


def test_prefilter_of_rows_that_cannot_be_had_by_their_place(tmp_path):
    model = build_model()
    passes = Passes(model)
    trainer = make_trainer(tmp_path, model=model)
    for rows, match in (
        (rows_only_in_turn(), "InTurn cannot be shortened"),
        (None, "no training rows to score: the trainer has no train_dataset"),
        ([], "train_dataset is empty"),
        ({"a": TRAIN, "b": TRAIN}, "mapping of data sets"),
    ):
        trainer.train_dataset = rows
        with pytest.raises(ValueError, match=match):
            prefilter(trainer, VALIDATION)
    assert passes.n == 0
