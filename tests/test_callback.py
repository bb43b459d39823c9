"""The callback in a trainer: scores, weights, what is said, what is left as found, ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig

from forvalue_callbacks import (
    TINY_MODEL,
    Drop,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    ForValueScores,
    Keep,
    Reweight,
    Threshold,
    prefilter,
)
from forvalue_callbacks.policies import Policy
from forvalue_callbacks.scores.noise import NoiseEstimate
from forvalue_callbacks.tiny import instructions
from forvalue_callbacks.trainer.settings import SCORES_FILE, apply_policy
from helpers.models import build_model
from helpers.oracles import relative
from helpers.trainers import (
    TRAIN,
    VALIDATION,
    Passes,
    drawn,
    losses,
    make_sft,
    make_trainer,
    rows_with_id,
)


class Record(TrainerCallback):
    """Losses, learning rates and rows of every step."""

    def __init__(self):
        self.rows, self.rates = [], []

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        pytest.param({"train_sampling_strategy": "group_by_length"}, marks=pytest.mark.newest),
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
    [
        {},
        {"gradient_accumulation_steps": 2},
        pytest.param({"train_sampling_strategy": "group_by_length"}, marks=pytest.mark.newest),
    ],
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
    assert relative(callback.scores.values, want.values) < 1e-5
    entry = next(e for e in trainer.state.log_history if "forvalue_kept" in e)
    assert entry["forvalue_kept"] == 24
    assert entry["forvalue_dropped"] == entry["forvalue_unscored"] == 0
    assert 1 < entry["forvalue_effective_sample_size"] < 24
    assert entry["forvalue_seconds"] > 0
    assert len(ForValueScores.load(tmp_path / SCORES_FILE)) == 24
    counts = np.bincount(drawn(trainer), minlength=24)
    assert np.corrcoef(counts, callback.weights)[0, 1] > 0.8


def test_a_plain_script_is_told_before_during_and_after_the_work_once(tmp_path, capfd, plain):
    callback = ForValueCallback(VALIDATION, Drop(0.25))
    make_trainer(tmp_path, [callback], disable_tqdm=False, max_steps=1).train()
    said = capfd.readouterr().err
    before = "For-Value (gradient): scoring 24 rows by 6 validation rows: 2 passes (validation rows, rows to score), "
    after = ["For-Value: 24 rows scored in ", "score       min ", "policy      drop:0.25 keeps 18 rows and drops 6"]
    after.append("draws       a kept row is drawn 1.33 times an epoch; effective sample size 18")
    places = [said.index(text) for text in (before, "2 of 2: rows to score: 100%", *after)]
    assert places == sorted(places)
    assert all(said.count(text) == 1 for text in (before, *after))


def test_bars_are_those_of_the_trainer_and_verbose_turns_all_of_it_off(tmp_path, capfd, plain):
    make_trainer(tmp_path / "a", [ForValueCallback(VALIDATION)], disable_tqdm=True, max_steps=1).train()
    said = capfd.readouterr().err
    assert "For-Value: 24 rows scored" in said
    assert "row/s]" not in said
    options = {"disable_tqdm": False, "max_steps": 1}
    make_trainer(tmp_path / "b", [ForValueCallback(VALIDATION, verbose=False)], **options).train()
    trainer = make_trainer(tmp_path / "c", disable_tqdm=False)
    prefilter(trainer, VALIDATION, verbose=False)
    said = capfd.readouterr()
    assert "row/s]" not in said.err
    assert "For-Value" not in said.err + said.out
    prefilter(trainer, VALIDATION, "keep:16")
    said = capfd.readouterr().err
    assert "policy      keep:16 keeps 16 rows and drops 3" in said
    assert "2 of 2: rows to score: 100%" in said


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


class Nobody(Policy):
    """A policy of a user's own that finds no row good enough, or weights rows without saying so."""

    def __init__(self, weights):
        super().__init__()
        object.__setattr__(self, "weights", weights)

    def _weights(self, scores, groups):
        return self.weights[: len(scores)]

    __str__ = object.__repr__


def test_scores_are_saved_before_a_policy_can_refuse_them(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="drops all 24 scored rows"):
        make_trainer(tmp_path, [ForValueCallback(VALIDATION, Threshold(1e9))]).train()
    model = build_model()
    passes = Passes(model)
    mended = ForValueCallback(VALIDATION, verbose=False)  # without a report, which explains rows
    make_trainer(tmp_path, [mended], model=model, max_steps=1).train()
    assert passes.n == 1  # of the training alone
    (tmp_path / SCORES_FILE).unlink()
    for policy in (Threshold(1e9), Nobody(np.arange(24.0))):
        with pytest.raises(ValueError, match=r"drops all|weights rows"):
            prefilter(make_trainer(tmp_path), VALIDATION, policy)
        assert len(ForValueScores.load(tmp_path / SCORES_FILE)) == 24
        (tmp_path / SCORES_FILE).unlink()


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


def test_packed_rows_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match=r"packed.*prefilter\(trainer.*takes the packs apart"):
        make_sft(tmp_path, [ForValueCallback(VALIDATION)], packing=True, max_length=64).train()


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
    assert relative(callback.scores.values, want.values) < 1e-4
    assert (callback.weights == 0).sum() == 20


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
from helpers.models import build_model
from helpers.trainers import VALIDATION, FromHereOn, collate, rows_with_id
from forvalue_callbacks import Drop, ForValueCallback, ForValueConfig

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


@pytest.mark.newest  # the argument for the strategy
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_gloo_ranks_have_the_scores_of_one_and_never_draw_a_dropped_row(tmp_path, strategy):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    results = {}
    for world, batch in ((1, 8), (2, 4)):
        out = tmp_path / str(world)
        out.mkdir()
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}", "--standalone"]
        run = subprocess.run(
            [*launch, str(script), str(Path(__file__).parent), str(out), str(batch), strategy],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=240,
            capture_output=True,
            text=True,
        )
        for once in ("For-Value (gradient): scoring", "For-Value: 24 rows scored"):  # the first rank alone speaks
            assert (run.stdout + run.stderr).count(once) == 1
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
    from forvalue_callbacks.trainer.callback import settings_of

    args = SFTConfig(output_dir=str(tmp_path), max_length=77, bf16=True, assistant_only_loss=True, use_cpu=True)
    settings = settings_of(args, ForValueConfig(), None)
    assert settings["row_config"].max_length == 77
    assert settings["row_config"].assistant_only_loss
    assert settings["config"].forward_dtype == "bfloat16"
    assert settings_of(args, ForValueConfig(forward_dtype="float16"), None)["config"].forward_dtype == "float16"


def test_drop_auto_refuses_scores_that_are_no_log_odds():
    scores = ForValueScorer(build_model(), VALIDATION, progress=False).score(TRAIN)
    with pytest.raises(ValueError, match="method='auto'"):
        apply_policy(Drop("auto"), scores, TRAIN)
    scores.metadata["noise"] = NoiseEstimate(0.5, {}, 40).to_dict()
    np.testing.assert_array_equal(apply_policy(Drop("auto"), scores, TRAIN) > 0, scores.values >= 0)
