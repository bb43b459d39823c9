"""The training rows of a trainer shortened before it runs."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import Subset

from forvalue_callbacks import (
    ForValueCallback,
    ForValueScorer,
    ForValueScores,
    Keep,
    Relabel,
    Reweight,
    prefilter,
)
from forvalue_callbacks.data.packed import taken_apart
from forvalue_callbacks.policies import Drop
from forvalue_callbacks.scores.judgements import Judgements
from forvalue_callbacks.tiny import instructions
from helpers.models import build_model
from helpers.oracles import relative
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
    with pytest.raises(ValueError, match="validation_dataset, or the trainer an eval_dataset"):
        prefilter(trainer)
    with pytest.raises(ValueError, match="'gradient' needs a validation_dataset"):
        prefilter(trainer, None)


def test_packs_are_taken_apart_scored_row_by_row_and_packed_again(tmp_path, capfd, plain):
    options = {"max_length": 64, "max_steps": -1, "num_train_epochs": 1}
    alone = make_sft(tmp_path / "a", **options)
    trainer = make_sft(tmp_path / "b", packing=True, padding_free=True, **options)
    n_packs = len(trainer.train_dataset)
    assert n_packs < 20
    scores = prefilter(trainer, instructions(10, seed=1), Keep(16))
    single = {tuple(row["input_ids"]): row for row in alone.train_dataset}
    rows = ForValueScorer(
        alone.model, instructions(10, seed=1), processing_class=alone.processing_class, progress=False
    ).score(alone.train_dataset)
    assert relative(np.sort(scores.values), np.sort(rows.values)) < 1e-5
    best = np.argsort(-rows.values)[:16]
    want = sorted(tuple(alone.train_dataset[int(i)]["input_ids"]) for i in best)
    packs = trainer.train_dataset
    kept = taken_apart(packs)
    assert sorted(map(tuple, kept["input_ids"])) == want
    for row in kept:  # what is learnt of each goes with it
        for column in {"labels", "completion_mask"} & set(kept.column_names):
            assert row[column] == single[tuple(row["input_ids"])][column]
    assert max(map(sum, packs["seq_lengths"])) <= 64
    assert f"packs       {n_packs} taken apart, {len(packs)} of what is kept" in capfd.readouterr().err
    trainer.train()
    assert trainer.state.global_step == -(-len(packs) // 8)


def test_packs_that_cut_rows_are_refused(tmp_path):
    trainer = make_sft(tmp_path, packing=True, packing_strategy="wrapped", max_length=64)
    with pytest.raises(ValueError, match=r"'wrapped' cut rows in two.*'bfd'"):
        prefilter(trainer, instructions(10, seed=1), Keep(16))


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


@pytest.fixture
def suggested(monkeypatch):
    """Scores by row number, of which row 0 should have the answer of the last row, and row 1 rather not."""

    def score(self, dataset, path=None):
        n = len(dataset)
        said = Judgements.none(n)
        said.suggested_row[:2], said.suggested_probability[:2] = n - 1, [0.99, 0.9]
        return ForValueScores(np.arange(n), [None] * n, np.zeros(n), np.ones(n), judgements=said)

    monkeypatch.setattr("forvalue_callbacks.trainer.prefilter.ForValueScorer.score", score)


def start(row):
    """Where the answer begins, whichever column says so (TRL's versions differ)."""
    return row["completion_mask"].index(1) if "completion_mask" in row else row["labels"].count(-100)


@pytest.mark.usefixtures("suggested")
def test_prefilter_puts_sure_answers_in_the_place_of_wrong_ones(tmp_path, capsys):
    policy = Relabel(0.95, policy=Drop(0.25))
    trainer = make_sft(tmp_path, max_steps=-1, num_train_epochs=1)
    rows = trainer.train_dataset.to_list()
    n = len(rows)
    prefilter(trainer, instructions(10, seed=1), policy)
    assert "1 of the kept rows have the answer of another row" in capsys.readouterr().err
    kept = trainer.train_dataset.to_list()
    assert kept[1:] == rows[n // 4 :]
    changed, last = kept[0], rows[-1]
    prompt, answer = rows[0]["input_ids"][: start(rows[0])], last["input_ids"][start(last) :]
    assert changed["input_ids"] == prompt + answer
    assert start(changed) == len(prompt)
    assert (changed["prompt"], changed["completion"]) == (rows[0]["prompt"], last["completion"])
    trainer.train()
    assert trainer.state.global_step > 0


@pytest.mark.usefixtures("suggested")
def test_relabelled_rows_in_a_list_and_what_cannot_be_relabelled(tmp_path):
    policy = Relabel(0.95, policy=Drop(0.25))
    rows = rows_with_id()
    trainer = make_trainer(tmp_path, train=list(rows), num_train_epochs=1)
    prefilter(trainer, VALIDATION, policy, verbose=False)
    assert trainer.train_dataset[1:] == rows[len(rows) // 4 :]
    first = next(i for i, label in enumerate(rows[0]["labels"]) if label != -100)
    last = next(i for i, label in enumerate(rows[-1]["labels"]) if label != -100)
    assert trainer.train_dataset[0]["labels"] == [-100] * first + rows[-1]["labels"][last:]
    trainer = make_trainer(tmp_path, train=Rows(rows))
    with pytest.raises(ValueError, match="a Rows bears not: make it a list"):
        prefilter(trainer, VALIDATION, policy)
    with pytest.raises(ValueError, match="a callback cannot: use prefilter"):
        ForValueCallback(VALIDATION, policy)
