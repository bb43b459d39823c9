"""Preference rows in trl's trainers, end to end on the tiny model: which rows are dropped, turned round, refused."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from forvalue_callbacks import TINY_MODEL, ForValueCallback, ForValueConfig, Swap, Threshold, prefilter
from forvalue_callbacks.core.stats import auc
from forvalue_callbacks.tiny import instructions
from helpers.trainers import Passes, make_sft

trl = pytest.importorskip("trl")
FITTED = ForValueConfig(method="fitted")


def pairs(n, seed, share=0.0):
    """Questions with the right answer and another one, a share of them swapped; and which."""
    right, wrong = (instructions(n, seed, noise).to_list() for noise in (0.0, 1.0))
    swapped = np.random.default_rng(seed).permutation(n) < round(share * n)
    rows = []
    for one, other, turned in zip(right, wrong, swapped, strict=True):
        assert one["prompt"] == other["prompt"]
        answers = [one["completion"], other["completion"]][:: -1 if turned else 1]
        rows.append({"prompt": one["prompt"], "chosen": answers[0], "rejected": answers[1]})
    return rows, swapped


def marked(rows):
    sides = [("chosen", True), ("rejected", False)]
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": label}
        for i, row in enumerate(rows)
        for name, label in [sides[i % 2]]
    ]


def config_of(name):
    try:
        return getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    except AttributeError:
        module = pytest.importorskip(f"trl.experimental.{name.lower()}")
        return getattr(module, f"{name}Config"), getattr(module, f"{name}Trainer")


def make(name, path, rows, callbacks=(), evaluation=None, **options):
    args, kind = config_of(name)
    settings = {
        "output_dir": str(path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    more = {} if evaluation is None else {"eval_dataset": Dataset.from_list(evaluation)}
    return kind(
        model,
        args=args(**{**settings, **options}),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
        callbacks=list(callbacks),
        **more,
    )


class Drawn:
    """Notes which rows a trainer draws, by what its collator is given."""

    def __init__(self, trainer):
        self.collate, self.seen = trainer.data_collator, []
        trainer.data_collator = self

    def __call__(self, rows):
        self.seen += [json.dumps({name: row[name] for name in sorted(row) if name.endswith("_ids")}) for row in rows]
        return self.collate(rows)


@pytest.fixture(scope="module")
def data():
    rows, swapped = pairs(120, 0, 0.3)
    return rows, swapped, pairs(150, 1)[0]


@pytest.mark.filterwarnings("ignore")
def test_dpo_trains_on_the_pairs_that_are_the_right_way_round(data, tmp_path, capsys):
    rows, swapped, validation = data
    callback = ForValueCallback(validation, Threshold(0.0), FITTED)
    trainer = make("DPO", tmp_path, rows, [callback], max_steps=-1, num_train_epochs=1)
    drawn = Drawn(trainer)
    trainer.train()
    assert auc(callback.scores.values[~swapped], callback.scores.values[swapped]) > 0.95
    dropped = callback.weights == 0
    assert np.array_equal(dropped, callback.scores.values < 0)
    assert (dropped == swapped).mean() > 0.9
    columns = [name for name in trainer.train_dataset.column_names if name.endswith("_ids")]
    ids = [json.dumps({name: row[name] for name in sorted(columns)}) for row in trainer.train_dataset]
    trained = set(drawn.seen[-len(rows) :])
    assert trained == {key for key, gone in zip(ids, dropped, strict=True) if not gone}
    assert f"{dropped.sum()} of 120 preference rows look the wrong way round" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_prefilter_turns_pairs_round_and_they_are_the_right_way_then(data, tmp_path):
    rows, swapped, validation = data
    trainer = make("DPO", tmp_path, rows)
    before = trainer.train_dataset.to_list()
    scores = prefilter(trainer, validation, Swap(), FITTED, verbose=False)
    after = trainer.train_dataset.to_list()
    assert len(after) == len(rows)
    turned = scores.values < 0
    for old, new, other in zip(before, after, turned, strict=True):
        names = ("chosen", "rejected") if not other else ("rejected", "chosen")
        for kind in (name.removeprefix("chosen") for name in old if name.startswith("chosen")):
            assert [new[f"chosen{kind}"], new[f"rejected{kind}"]] == [old[f"{name}{kind}"] for name in names]
    assert (turned == swapped).mean() > 0.9
    again = prefilter(trainer, validation, Threshold(0.0), FITTED, verbose=False)
    np.testing.assert_allclose(again.values, np.abs(scores.values), rtol=1e-4, atol=1e-6)
    trainer.train()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ORPO", "CPO", "KTO"])
def test_other_trainers_of_preferences(name, data, tmp_path):
    rows, swapped, validation = data
    rows, validation = (marked(rows), marked(validation)) if name == "KTO" else (rows, validation)
    callback = ForValueCallback(validation, Threshold(0.0), FITTED)
    trainer = make(name, tmp_path, rows, [callback])
    trainer.train()
    assert len(callback.scores) == len(rows)
    assert callback.scores.reasons == [None] * len(rows)
    assert auc(callback.scores.values[~swapped], callback.scores.values[swapped]) > (0.8 if name == "KTO" else 0.95)


@pytest.mark.filterwarnings("ignore")
def test_rows_to_learn_may_be_the_validation_rows_of_pairs(data, tmp_path):
    rows, swapped, _ = data
    callback = ForValueCallback(instructions(100, seed=2), Threshold(0.0), FITTED)
    make("DPO", tmp_path, rows, [callback], max_steps=1).train()
    assert auc(callback.scores.values[~swapped], callback.scores.values[swapped]) > 0.85


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["auto", "label_model"])
@pytest.mark.parametrize("kind", ["pairs", "rows to learn"])
def test_methods_that_judge_answers_are_refused(method, kind, data, tmp_path):
    rows, _, validation = data
    clean = validation if kind == "pairs" else instructions(60, seed=2)
    given = (clean, "drop:auto", ForValueConfig(method=method))
    trainer = make("DPO", tmp_path, rows)
    passes = Passes(trainer.model)
    match = rf"method='{method}' scores answers, and row 0 is one of preferences"
    with pytest.raises(ValueError, match=match):
        prefilter(trainer, *given)
    trainer.add_callback(ForValueCallback(*given))
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert passes.n == 0


@pytest.mark.filterwarnings("ignore")
def test_swap_is_for_preference_rows_and_for_prefilter(data, tmp_path):
    trainer = make_sft(tmp_path)
    passes = Passes(trainer.model)
    with pytest.raises(ValueError, match=r"threshold:0.0\+swap:0.0 turns preference rows round.*leave Swap out"):
        prefilter(trainer, instructions(40, seed=1), Swap(), FITTED)
    assert passes.n == 0
    with pytest.raises(ValueError, match="a callback cannot: use prefilter"):
        ForValueCallback(data[2], Swap())


def answering(name, path, rows):
    args, kind = config_of(name)
    settings = {"output_dir": str(path), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    return kind(
        model,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=args(**settings, per_device_train_batch_size=8),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (partial(answering, "GRPO"), "GRPOConfig are prompts, whose answers are written while it trains"),
        (partial(answering, "RLOO"), "RLOOConfig are prompts, whose answers are written while it trains"),
    ],
)
def test_trainers_of_other_rows_are_refused_before_the_work(build, match, data, tmp_path):
    rows, _, validation = data
    trainer = build(tmp_path, rows)
    passes = Passes(trainer.model)
    with pytest.raises(ValueError, match=match):
        prefilter(trainer, validation)
    trainer.add_callback(ForValueCallback(validation))
    with pytest.raises(ValueError, match=match):
        trainer.train()
    assert passes.n == 0
