"""Encoder-decoders and classifiers through every way in: trainers, `prefilter`, `map`; rows that cannot be scored."""

import copy
import os
import re

import numpy as np
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from forvalue_callbacks import (
    Drop,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    ForValueTransform,
    Keep,
    prefilter,
)
from helpers.kinds import CLASSES, TEXT, TOKENIZER, build, build_rows, collator
from helpers.models import VOCAB
from helpers.oracles import relative
from helpers.trainers import Passes

WAYS = {  # kind of model -> trainer, its arguments, data collator by the model
    "bart": (Seq2SeqTrainer, Seq2SeqTrainingArguments, lambda model: DataCollatorForSeq2Seq(TOKENIZER, model)),
    "t5": (Trainer, TrainingArguments, lambda model: DataCollatorForSeq2Seq(TOKENIZER)),
    "DistilBertForSequenceClassification": (Trainer, TrainingArguments, lambda model: None),
    "LlamaForSequenceClassification": (Trainer, TrainingArguments, lambda model: DataCollatorWithPadding(TOKENIZER)),
    "BertForTokenClassification": (
        Trainer,
        TrainingArguments,
        lambda model: DataCollatorForTokenClassification(TOKENIZER),
    ),
}


def rows_of(kind):
    """Training rows whose first token names them, and validation rows; columns beside them that no model takes."""
    train, validation = build_rows(kind, 24, seed=1), build_rows(kind, 6, seed=2)
    for i, row in enumerate(train):
        row["input_ids"][0] = 3 + i
    for row in train + validation:
        if WAYS[kind][2](None) is None:  # what pads nothing is given rows of one length
            row["input_ids"], row["attention_mask"] = (row["input_ids"] * 2)[:6], [1] * 6
        row |= {"text": "the sky is blue", "tokens": ["the", "sky"], "source": 7}
    return train, validation


def make_trainer(path, kind, callbacks=(), form=Dataset.from_list):
    model, (cls, arguments, make_collator) = build(kind, dtype=torch.float32), WAYS[kind]
    seen = []

    def note(module, args, kwargs):
        if module.training:
            seen.extend((kwargs["input_ids"][:, 0] - 3).tolist())

    model.register_forward_pre_hook(note, with_kwargs=True)
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": []}
    trainer = cls(
        model,
        args=arguments(output_dir=str(path), use_cpu=True, disable_tqdm=True, **options),
        train_dataset=form(rows_of(kind)[0]),
        data_collator=make_collator(model),
        callbacks=list(callbacks),
    )
    return trainer, seen


def score(kind, model, rows, validation, **config):
    collate = WAYS[kind][2](model)
    return ForValueScorer(model, validation, ForValueConfig(**config), data_collator=collate, progress=False).score(
        rows
    )


@pytest.fixture(autouse=True)
def precision_of_its_own(monkeypatch):
    """Accelerate keeps the precision of the first trainer of a process for all later ones: here none was before."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)  # as accelerate's own tests do; there is no other way


@pytest.mark.parametrize("form", [Dataset.from_list, list])
@pytest.mark.parametrize("kind", WAYS)
def test_a_trainer_never_draws_the_rows_that_the_callback_drops(tmp_path, kind, form):
    train, validation = rows_of(kind)
    callback = ForValueCallback(validation, Drop(0.2), verbose=False)
    trainer, seen = make_trainer(tmp_path, kind, [callback], form)
    expected = score(kind, build(kind, dtype=torch.float32), train, validation).values
    trainer.train()
    assert relative(callback.scores.values, expected) < 1e-5
    dropped = set(np.argsort(expected)[:5].tolist())
    assert set(np.flatnonzero(callback.weights == 0).tolist()) == dropped
    assert len(seen) == 48
    assert set(seen) == set(range(24)) - dropped


@pytest.mark.parametrize("kind", WAYS)
def test_prefilter_keeps_the_best_rows(tmp_path, kind):
    trainer, _ = make_trainer(tmp_path, kind)
    scores = prefilter(trainer, rows_of(kind)[1], Keep(8), verbose=False)
    kept = [row["input_ids"][0] - 3 for row in trainer.train_dataset]
    assert kept == sorted(np.argsort(-scores.values)[:8].tolist())


@pytest.mark.parametrize("kind", WAYS)
def test_map_scores_tokenised_rows(kind):
    train, validation = rows_of(kind)
    model = build(kind)
    transform = ForValueTransform(model, validation, data_collator=WAYS[kind][2](model))
    scored = Dataset.from_list(train).map(transform, batched=True, batch_size=10)
    assert relative(scored["forvalue_score"], score(kind, model, train, validation).values) < 1e-5
    assert scored["forvalue_reason"] == [None] * 24


@pytest.mark.parametrize("kind", WAYS)
def test_map_loads_a_model_of_the_kind_that_lies_in_a_folder(tmp_path, kind):
    train, validation = rows_of(kind)
    model = build(kind, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    transform = ForValueTransform(str(tmp_path), validation, data_collator=WAYS[kind][2](model))
    assert type(transform.scorer().backbone.model) is type(model)
    assert relative(transform.scorer().score(train).values, score(kind, model, train, validation).values) < 1e-5


def test_a_collator_that_makes_tokens_of_text_is_given_the_text():
    kind = "BertForSequenceClassification"
    rows, model = build_rows(kind, 8, seed=1), build(kind)
    collate = collator(kind)

    def of_text(examples):
        ids = [[int(word) for word in row["text"].split()] for row in examples]
        return collate([{"input_ids": i, "label": row["label"]} for i, row in zip(ids, examples, strict=True)])

    texts = [{"text": " ".join(map(str, row["input_ids"])), "label": row["label"]} for row in rows]
    found, expected = (
        ForValueScorer(model, side[4:], data_collator=made_by, progress=False).score(side[:4]).values
        for side, made_by in ((texts, of_text), (rows, collate))
    )
    assert relative(found, expected) < 1e-12


# ---- rows that cannot be scored ----

N = 70  # more tokens than the models have places for
BAD = {  # what is changed in a row of a classifier of sequences, and the reason
    "no label": ({"label": ...}, "no 'labels'"),
    "nothing as a label": ({"label": None}, "nothing in 'label'.*give labels as numbers"),
    "text as a label": ({"label": "spam"}, "text in 'label'.*label2id"),
    "an unknown label": ({"label": CLASSES}, f"label {CLASSES} in 'labels'.*0 to {CLASSES - 1}"),
    "a number": ({"label": 0.5}, "'labels' of floating-point numbers .*as integers"),
    "several labels": ({"label": ..., "labels": [0, 1, 1]}, r"'labels' of shape \(1, 3\).*one class a row"),
    "several floating labels": ({"label": ..., "labels": [0.0, 1.0]}, "'labels' of floating-point numbers"),
    "no tokens": ({"input_ids": ..., "text": "spam"}, "no 'input_ids' .*'text'.*prepare the row"),
    "nothing as tokens": ({"input_ids": None}, "no 'input_ids'"),
    "too many": ({"input_ids": [5] * N, "attention_mask": [1] * N}, f"{N} tokens in 'input_ids'.* 64: truncate"),
    "empty": ({"input_ids": [], "attention_mask": []}, r"'input_ids' of shape \(1, 0\)"),
    "an unknown token": ({"input_ids": [5, VOCAB], "attention_mask": [1, 1]}, f"token {VOCAB} in 'input_ids'"),
    "a mask of other length": ({"attention_mask": [1]}, r"'attention_mask' of shape \(1, 1\) beside"),
    "no row": (None, "the row is a NoneType"),
}
BAD_BY_TOKEN = {
    "no label": ({"labels": ...}, "no 'labels'"),
    "an unknown label": ({"labels": [99] * 3}, "label 99 in 'labels'"),
    "none trained on": ({"labels": [-100] * 3}, "no labels in 'labels' that are trained on"),
    "several labels": ({"labels": [[0, 1]] * 3}, "'labels'"),
    "too many": ({"input_ids": [5] * N, "attention_mask": [1] * N, "labels": [1] * N}, f"{N} tokens.* 64"),
    "no tokens": ({"input_ids": ..., "text": "spam"}, "no 'input_ids'"),
    "no row": (None, "the row is a NoneType"),
}
BAD_ANSWERS = {
    "too long an answer": ({"labels": [5] * N}, f"{N} tokens in 'decoder_input_ids'.* 64: truncate"),
    "of a causal model": ({"labels": [-100, 6, 7]}, "the encoder would read the answer: give the prompt"),
}
CASES = [("BertForSequenceClassification", name) for name in BAD]
CASES += [("BertForTokenClassification", name) for name in BAD_BY_TOKEN]
CASES += [("bart", name) for name in {**BAD_BY_TOKEN, **BAD_ANSWERS} if name != "several labels"]


@pytest.mark.parametrize("collated", [True, False])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_row_that_cannot_be_scored_has_a_reason_and_the_run_goes_on(kind, name, collated):
    changes, reason = (BAD if "Sequence" in kind else {**BAD_BY_TOKEN, **BAD_ANSWERS})[name]
    rows, model = build_rows(kind, 7, seed=1), build(kind)
    bad = {**rows[0], "input_ids": [5, 6, 7], "attention_mask": [1] * 3, **(changes or {})}
    bad = None if changes is None else {column: value for column, value in bad.items() if value is not ...}
    before = copy.deepcopy(bad)
    collate = collator(kind) if collated else None
    scorer = ForValueScorer(model, [*rows[3:], bad], data_collator=collate, progress=False)
    scores, good = scorer.score([rows[1], bad, rows[2]]), scorer.score(rows[1:3])
    assert len(scores) == 3
    assert np.isnan(scores.values[1])
    if collated or ("nothing" not in name and "text" not in name):  # the default collator leaves those out
        assert re.search(reason, scores.reasons[1])
    np.testing.assert_allclose(scores.values[[0, 2]], good.values, rtol=1e-10)
    assert bad == before


# ---- what is refused as a whole ----


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("BertForSequenceClassification", {"num_labels": 1}, "predicts a number .*this row is none"),
        ("BertForSequenceClassification", {"problem_type": "regression", "num_labels": 3}, "predicts a number"),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, "multi_label"),
        ("BertForMaskedLM", {}, "reads later tokens"),
        ("BertForQuestionAnswering", {}, "no output embeddings"),
    ],
)
def test_models_that_choose_nothing_are_refused_by_name_before_any_forward_pass(tmp_path, name, settings, match):
    model = getattr(transformers, name)
    model = model(model.config_class(**{**TEXT, **settings}))
    passes, rows = Passes(model), build_rows("BertForSequenceClassification", 8, seed=1)
    for row in rows:
        row["labels"] = row.pop("label")
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_list(rows),
        data_collator=collator("BertForSequenceClassification"),
        callbacks=[ForValueCallback(rows[:4], verbose=False)],
    )
    for go in (
        trainer.train,
        lambda: prefilter(trainer, rows[:4]),
        lambda: ForValueScorer(model, rows[:4]).score(rows),
    ):
        with pytest.raises(ValueError, match=f"{name}.*{match}"):
            go()
    assert passes.n == 0


@pytest.mark.parametrize("kind", ["bart", "BertForTokenClassification"])
def test_log_odds_of_free_answers_are_refused_before_any_forward_pass_with_what_to_use_instead(kind):
    model, rows = build(kind), build_rows(kind, 60, seed=1)
    passes = Passes(model)
    with pytest.raises(ValueError, match=r"'auto'.*encoder-decoders.*method='whitened' or 'fitted'.*Drop\(0.2\)"):
        score(kind, model, rows[:10], rows[10:], method="auto")
    assert passes.n == 0


def test_causal_rows_alone_are_refused_by_an_encoder_decoder_by_its_name():
    rows = [{"input_ids": [5, 6, 7 + i], "labels": [-100, 6, 7 + i]} for i in range(6)]
    model = build("bart")
    passes = Passes(model)
    with pytest.raises(ValueError, match=r"BartForConditional.*the encoder would read"):
        score("bart", model, rows[3:], rows[:3])
    assert passes.n == 0
