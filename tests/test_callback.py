import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_model, build_rows
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from forvalue_callbacks import (
    TINY_MODEL,
    Drop,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    ForValueScores,
    Keep,
    Reweight,
    prefilter,
)
from forvalue_callbacks.callback import SCORES_FILE, apply_policy
from forvalue_callbacks.tiny import instructions

TRAIN, VALIDATION = build_rows(24, seed=1), build_rows(6, seed=2)


def rows_with_id(rows=TRAIN):
    """The first token names the row, so that what is drawn can be read off a batch."""
    return [{**row, "input_ids": [3 + i, *row["input_ids"][1:]]} for i, row in enumerate(rows)]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(name, filler):
        return torch.tensor([row[name] + [filler] * (longest - len(row["input_ids"])) for row in rows])

    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
    return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}


class Record(TrainerCallback):
    """Losses, learning rates and rows of every step."""

    def __init__(self):
        self.rows, self.rates = [], []

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


class FromHereOn(TrainerCallback):
    """Forgets what a collator has noted while the rows were scored: they go through it too."""

    def __init__(self, seen):
        self.seen = seen

    def on_train_begin(self, *args, **kwargs):
        self.seen.clear()


def make_trainer(tmp_path, callbacks=(), train=None, model=None, record=None, **options):
    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 5,
    }
    seen = []

    def collate_and_note(rows):
        seen.append([row["input_ids"][0] - 3 for row in rows])
        return collate(rows)

    trainer = Trainer(
        build_model() if model is None else model,
        args=TrainingArguments(**{**settings, **options}),
        train_dataset=Dataset.from_list(rows_with_id()) if train is None else train,
        data_collator=collate_and_note,
        callbacks=[*callbacks, FromHereOn(seen)],
    )
    trainer.seen = seen
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def drawn(trainer):
    return [i for batch in trainer.seen for i in batch]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
    ids=["plain", "accumulation", "group_by_length", "workers"],
)
def test_a_policy_that_keeps_everything_reproduces_the_run_loss_for_loss(tmp_path, options):
    without = make_trainer(tmp_path / "a", **options)
    without.train()
    callback = ForValueCallback(VALIDATION, Keep(1.0))
    with_it = make_trainer(tmp_path / "b", [callback], **options)
    with_it.train()
    assert losses(with_it) == losses(without)
    assert drawn(with_it) == drawn(without)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"train_sampling_strategy": "group_by_length"}],
    ids=["plain", "accumulation", "group_by_length"],
)
def test_dropped_rows_are_never_drawn_and_steps_and_schedule_stay(tmp_path, options):
    plain = make_trainer(tmp_path / "a", [rates := Record()], **options)
    plain.train()
    callback = ForValueCallback(VALIDATION, Drop(0.25))
    trainer = make_trainer(tmp_path / "b", [callback, new_rates := Record()], **options)
    trainer.train()
    assert (callback.weights == 0).sum() == 6
    assert set(np.flatnonzero(callback.weights == 0)).isdisjoint(drawn(trainer))
    assert set(np.flatnonzero(callback.weights)) == set(drawn(trainer))
    assert len(drawn(trainer)) == len(drawn(plain)) == 48
    assert trainer.state.global_step == plain.state.global_step
    assert new_rates.rates == rates.rates


def test_scores_are_those_of_the_scorer_and_the_log_says_what_was_done(tmp_path):
    callback = ForValueCallback(VALIDATION, Reweight(1.0))
    trainer = make_trainer(tmp_path, [callback])
    want = ForValueScorer(build_model(), VALIDATION, progress=False).score(rows_with_id())
    trainer.train()
    assert np.allclose(callback.scores.values, want.values, rtol=1e-6)
    entry = next(e for e in trainer.state.log_history if "forvalue_kept" in e)
    assert entry["forvalue_kept"] == 24
    assert entry["forvalue_dropped"] == entry["forvalue_unscored"] == 0
    assert 1 < entry["forvalue_effective_sample_size"] < 24
    assert entry["forvalue_seconds"] > 0
    assert len(ForValueScores.load(tmp_path / SCORES_FILE)) == 24
    counts = np.bincount(drawn(trainer), minlength=24)
    assert np.corrcoef(counts, callback.weights)[0, 1] > 0.8


def test_the_model_is_left_exactly_as_found(tmp_path):
    model = build_model()
    state = {k: v.clone() for k, v in model.state_dict().items()}

    class Look(TrainerCallback):
        def on_train_begin(self, args, state_, control, model=None, **kwargs):
            self.rng, self.grads = torch.get_rng_state(), [p.grad for p in model.parameters()]
            self.modes, self.hooks = (
                [m.training for m in model.modules()],
                [len(m._forward_hooks) for m in model.modules()],
            )
            self.same = all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    before, after = Look(), Look()
    make_trainer(tmp_path, [before, ForValueCallback(VALIDATION), after], model=model).train()
    assert torch.equal(before.rng, after.rng)
    assert (before.modes, before.hooks) == (after.modes, after.hooks)
    assert all(g is None for g in after.grads)
    assert after.same


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
    assert np.allclose(other.scores.values, want.values, rtol=1e-6)


def test_rows_without_a_score_are_not_trained_on_and_said(tmp_path, caplog):
    rows = rows_with_id()
    rows[4]["labels"] = [-100] * len(rows[4]["labels"])
    callback = ForValueCallback(VALIDATION, Keep(1.0))
    trainer = make_trainer(tmp_path, [callback], train=Dataset.from_list(rows))
    trainer.train()
    assert callback.weights[4] == 0
    assert 4 not in drawn(trainer)
    assert "1 rows have no score and are not trained on: 1 x no labelled tokens" in caplog.text


def test_groups_come_from_a_column_or_by_hand(tmp_path):
    train = Dataset.from_list([{**row, "source": "ab"[i % 2]} for i, row in enumerate(rows_with_id())])
    policy = Drop(0.5, group_column="source")
    with pytest.raises(ValueError, match=r"no column 'source'.*remove_unused_columns=False.*groups="):
        make_trainer(tmp_path, [ForValueCallback(VALIDATION, policy)], train=train).train()
    for options, given in (({"remove_unused_columns": False}, None), ({}, train["source"])):
        callback = ForValueCallback(VALIDATION, policy, groups=given)
        make_trainer(tmp_path, [callback], train=train, **options).train()
        kept = np.array(train["source"])[callback.weights > 0]
        assert (kept == "a").sum() == (kept == "b").sum() == 6


def test_packed_and_streaming_rows_are_refused_with_the_way_out(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(rows_with_id()))
    with pytest.raises(ValueError, match=r"streaming.*ForValueTransform"):
        make_trainer(tmp_path, [ForValueCallback(VALIDATION)], train=stream, max_steps=2).train()
    with pytest.raises(ValueError, match=r"packed.*before packing"):
        make_sft(tmp_path, [ForValueCallback(VALIDATION)], packing=True, max_length=64).train()


def make_sft(tmp_path, callbacks=(), train=None, peft_config=None, **options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32),
        args=SFTConfig(**{**settings, **options}),
        train_dataset=instructions(40, seed=0, noise=0.2) if train is None else train,
        processing_class=AutoTokenizer.from_pretrained(TINY_MODEL),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("peft", [False, True])
def test_sft_trainer_with_raw_validation_rows(tmp_path, peft):
    """The validation rows are prepared by the trainer's own settings, the scores those of the plain model."""
    validation = instructions(10, seed=1)
    callback = ForValueCallback(validation, Drop(0.5))
    lora = LoraConfig(r=4, target_modules="all-linear") if peft else None
    trainer = make_sft(tmp_path, [callback], peft_config=lora, gradient_checkpointing=peft)
    trainer.train()
    plain = make_sft(tmp_path / "b")
    prepared = make_sft(tmp_path / "c", train=validation).train_dataset
    want = ForValueScorer(plain.model, prepared, progress=False).score(plain.train_dataset)
    assert np.allclose(callback.scores.values, want.values, rtol=1e-4)
    assert (callback.weights == 0).sum() == 20


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


def test_a_collators_labels_are_the_ones_scored(tmp_path):
    """A plain Trainer whose rows have input_ids only: the labels are what its collator makes of them."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    trainer_model = make_sft(tmp_path).model
    texts = [row["prompt"] + row["completion"] for row in instructions(12, seed=0)]
    train = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    callback = ForValueCallback(train.select(range(4)), Drop(0.5))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1, disable_tqdm=True)
    Trainer(
        trainer_model,
        args=args,
        train_dataset=train,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[callback],
    ).train()
    assert callback.scores.n_labelled.tolist() == [len(ids) - 1 for ids in train["input_ids"]]


RANKS = """
import json, sys, torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
sys.path.insert(0, sys.argv[1])
from conftest import build_model
from test_callback import VALIDATION, Drop, FromHereOn, ForValueCallback, ForValueConfig, collate, rows_with_id

seen = []
def note(rows):
    seen.extend(row["input_ids"][0] - 3 for row in rows)
    return collate(rows)

callback = ForValueCallback(VALIDATION, Drop(0.25), ForValueConfig(max_tokens_per_batch=40))  # several batches
args = TrainingArguments(
    output_dir=sys.argv[2], use_cpu=True, report_to=[], per_device_train_batch_size=int(sys.argv[3]), max_steps=6,
    save_strategy="no", disable_tqdm=True, seed=5, train_sampling_strategy=sys.argv[4],
)
trainer = Trainer(build_model(), args=args, train_dataset=Dataset.from_list(rows_with_id()), data_collator=note,
                  callbacks=[callback, FromHereOn(seen)])
trainer.train()
with open(f"{sys.argv[2]}/rank{args.process_index}.json", "w") as file:
    json.dump({"scores": callback.scores.values.tolist(), "seen": seen, "world": args.world_size}, file)
"""


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_gloo_ranks_have_the_scores_of_one_and_never_draw_a_dropped_row(tmp_path, strategy):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    results = {}
    for world, batch in ((1, 8), (2, 4)):
        out = tmp_path / str(world)
        out.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--master_port=29517"]
        subprocess.run(
            [*launch, str(script), str(Path(__file__).parent), str(out), str(batch), strategy],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=240,
        )
        results[world] = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]
    (one,), two = results[1], results[2]
    scale = np.abs(one["scores"]).max()
    for rank in two:
        assert rank["world"] == 2
        assert np.abs(np.array(rank["scores"]) - one["scores"]).max() <= 1e-6 * scale
    dropped = set(np.argsort(one["scores"])[:6].tolist())
    assert dropped.isdisjoint(one["seen"])
    assert dropped.isdisjoint(two[0]["seen"] + two[1]["seen"])
    assert len(two[0]["seen"]) == len(two[1]["seen"])


def test_settings_of_the_trainer_reach_the_scorer(tmp_path):
    from forvalue_callbacks.callback import settings_of

    args = SFTConfig(output_dir=str(tmp_path), max_length=77, bf16=True, assistant_only_loss=True, use_cpu=True)
    settings = settings_of(args, ForValueConfig())
    assert settings["rows"].max_length == 77
    assert settings["rows"].assistant_only_loss
    assert settings["config"].forward_dtype == "bfloat16"
    assert settings_of(args, ForValueConfig(forward_dtype="float16"))["config"].forward_dtype == "float16"


def test_drop_auto_refuses_scores_that_are_no_log_odds():
    scores = ForValueScorer(build_model(), VALIDATION, progress=False).score(TRAIN)
    with pytest.raises(ValueError, match="direction='auto'"):
        apply_policy(Drop("auto"), scores, TRAIN)
    scores.metadata["noise"] = {"share": 0.5}
    np.testing.assert_array_equal(apply_policy(Drop("auto"), scores, TRAIN) > 0, scores.values >= 0)
