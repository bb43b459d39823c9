"""A dry run scores and says what it would do, and changes nothing; no training fails for its report."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from forvalue_callbacks import (
    TINY_MODEL,
    Drop,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    ForValueScores,
    Reweight,
    prefilter,
)
from forvalue_callbacks.trainer.callback import SCORES_FILE
from helpers.models import build_model
from helpers.trainers import TRAIN, VALIDATION, Passes, drawn, losses, make_trainer, rows_with_id

REPORT_FILE = "forvalue_report.html"


@pytest.fixture
def reports(monkeypatch):
    """What reports are made of, and pages of three letters in their place."""
    made = []

    def report(self, path, dataset, **beside):
        made.append({"scores": self, "dataset": dataset, **beside})
        path.write_text("htm")

    monkeypatch.setattr(ForValueScores, "report", report, raising=False)
    return made


def rows_with_one_unscorable():
    rows = rows_with_id()
    rows[4]["labels"] = [-100] * len(rows[4]["labels"])
    return Dataset.from_list(rows)


@pytest.mark.parametrize("policy", [Drop(0.25), Reweight(1.0)])
def test_a_dry_run_trains_as_without_the_callback_and_says_what_would_be_dropped(
    tmp_path, capfd, caplog, plain, policy
):
    without = make_trainer(tmp_path / "a", train=rows_with_one_unscorable())
    without.train()
    wet = ForValueCallback(VALIDATION, policy, verbose=False)
    make_trainer(tmp_path / "b", [wet], train=rows_with_one_unscorable(), max_steps=1).train()
    n = int((wet.weights == 0).sum())
    caplog.clear()
    capfd.readouterr()
    callback = ForValueCallback(VALIDATION, policy, dry_run=True)
    trainer = make_trainer(tmp_path / "c", [callback], train=rows_with_one_unscorable())
    trainer.train()
    assert losses(trainer) == losses(without)
    assert drawn(trainer) == drawn(without)
    assert 4 in drawn(trainer)
    assert callback.weights.tolist() == [1.0] * 24
    np.testing.assert_array_equal(callback.scores.values, wet.scores.values)
    assert len(ForValueScores.load(tmp_path / "c" / SCORES_FILE)) == 24
    said = capfd.readouterr().err
    assert f"policy      {policy} would keep {24 - n} rows and drop {n}: a dry run, nothing is dropped" in said
    assert "is drawn" not in said
    assert (
        "1 rows have no score and would not be trained on but for the dry run: 1 x no labelled tokens" in caplog.text
    )
    entry = next(e for e in trainer.state.log_history if "forvalue_kept" in e)
    assert (entry["forvalue_kept"], entry["forvalue_dropped"], entry["forvalue_would_drop"]) == (24, 0, n)


def test_a_dry_run_of_prefilter_leaves_the_rows(tmp_path, capfd, plain, reports):
    trainer = make_trainer(tmp_path)
    rows = trainer.train_dataset
    scores = prefilter(trainer, VALIDATION, "drop:0.25", dry_run=True)
    assert trainer.train_dataset is rows
    assert len(scores) == 24
    assert "policy      drop:0.25 would keep 18 rows and drop 6: a dry run" in capfd.readouterr().err
    prefilter(trainer, VALIDATION, "drop:0.25")
    assert len(trainer.train_dataset) == 18
    assert [(report["dataset"] is rows, (report["weights"] == 0).sum()) for report in reports] == [(True, 6)] * 2
    assert (tmp_path / REPORT_FILE).is_file()


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_report_has_the_worst_and_best_rows_and_what_the_policy_would_do(tmp_path, reports, dry_run):
    model = build_model(dtype=torch.float64)
    rows = Dataset.from_list(rows_with_id([*TRAIN, *TRAIN]))
    want = ForValueScorer(model, VALIDATION, ForValueConfig("whitened"), progress=False)
    order = np.argsort(want.score(rows).values, kind="stable").tolist()
    expected = want.explain(rows, [*order[:20], *order[::-1][:20]])
    callback = ForValueCallback(VALIDATION, Drop(0.25), ForValueConfig("whitened"), dry_run=dry_run)
    make_trainer(tmp_path, [callback], train=rows, model=model, max_steps=1).train()
    (made,) = reports
    assert made["scores"] is callback.scores
    assert made["dataset"]["input_ids"] == rows["input_ids"]
    assert made["validation"] == VALIDATION
    assert (made["weights"] == 0).sum() == 12
    assert [explanation.row for explanation in made["explanations"]] == [explanation.row for explanation in expected]
    for found, other in zip(made["explanations"], expected, strict=True):
        assert found.token_scores == pytest.approx(other.token_scores, rel=1e-9)
        assert [place for place, _ in found.opposing] == [place for place, _ in other.opposing]
    assert (tmp_path / REPORT_FILE).is_file()


def test_the_report_shows_rows_of_token_ids_as_text_and_says_by_which_model_and_policy(tmp_path):
    """As they are when SFTTrainer has prepared them."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    ids = [tokenizer("the sky is blue " * n)["input_ids"] for n in range(1, 12)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(TINY_MODEL),
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[ForValueCallback(rows[:4], "drop:0.25")],
    )
    trainer.train()
    text = (tmp_path / REPORT_FILE).read_text()
    assert "the sky is blue" in text
    assert "drop:0.25" in text
    assert str(TINY_MODEL) in text


def test_a_report_changes_no_loss(tmp_path, reports):
    runs = []
    for name, verbose in (("a", False), ("b", True)):
        callback = ForValueCallback(VALIDATION, Drop(0.25), ForValueConfig("fitted"), verbose=verbose)
        runs.append(make_trainer(tmp_path / name, [callback], model=build_model().train()))
        runs[-1].train()
    assert len(reports) == 1  # a silent callback writes none
    assert not (tmp_path / "a" / REPORT_FILE).exists()
    assert losses(runs[0]) == losses(runs[1])
    assert drawn(runs[0]) == drawn(runs[1])


def test_a_resumed_run_leaves_the_report_of_the_weights_that_were_scored(tmp_path, reports):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, [ForValueCallback(VALIDATION)], **options).train()
    trainer = make_trainer(tmp_path, [ForValueCallback(VALIDATION)], **{**options, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert len(reports) == 1


def test_scores_of_another_model_or_none_to_compare_with_are_not_explained_by_this_one(tmp_path, reports, caplog):
    scores = ForValueScorer(build_model(seed=1), VALIDATION, progress=False).score(rows_with_id())
    for validation in (VALIDATION, None):
        model = build_model()
        passes = Passes(model)
        callback = ForValueCallback(validation, Drop(0.25), scores=scores)
        make_trainer(tmp_path, [callback], model=model, max_steps=1).train()
        assert passes.n == 1  # of the training alone
    assert [(made["validation"], made["explanations"]) for made in reports] == [(VALIDATION, None), (None, None)]
    assert caplog.text == ""


def test_ranks_that_could_not_go_on_alone_explain_nothing(tmp_path, reports, monkeypatch):
    """With sharded weights a rank that fails ends the others, and a report must end nobody."""
    make = ForValueScorer.__init__

    def make_sharded(self, *args, **options):
        make(self, *args, **options)
        self.run.sharded = True

    monkeypatch.setattr(ForValueScorer, "__init__", make_sharded)
    make_trainer(tmp_path, [ForValueCallback(VALIDATION)], max_steps=1).train()
    assert [made["explanations"] for made in reports] == [None]


def fail(*args, **kwargs):
    raise KeyError("the text of a row")


@pytest.mark.parametrize(("owner", "name"), [(ForValueScores, "report"), (ForValueScorer, "explain")])
def test_a_report_that_fails_is_a_warning_without_the_text_of_rows(
    tmp_path, monkeypatch, caplog, reports, owner, name
):
    monkeypatch.setattr(owner, name, fail)
    trainer = make_trainer(tmp_path, [callback := ForValueCallback(VALIDATION, Drop(0.25))])
    trainer.train()
    assert trainer.state.global_step == 12
    assert (callback.weights == 0).sum() == 6
    assert len(ForValueScores.load(tmp_path / SCORES_FILE)) == 24
    said = {
        "report": f"{tmp_path / REPORT_FILE} is not written: KeyError in fail",
        "explain": "explains no rows: KeyError",
    }
    assert said[name] in caplog.text
    assert "the text" not in caplog.text
    assert [made["explanations"] for made in reports] == ([None] if name == "explain" else [])
