"""Trainers of tiny models that note which rows they draw."""

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from forvalue_callbacks import TINY_MODEL
from forvalue_callbacks.tiny.world import instructions
from helpers.models import build_model, build_rows

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


class FromHereOn(TrainerCallback):
    """Forgets what a collator has noted while the rows were scored: they go through it too."""

    def __init__(self, seen):
        self.seen = seen

    def on_train_begin(self, *args, **kwargs):
        self.seen.clear()


def make_trainer(
    tmp_path, callbacks=(), train=None, model=None, evaluation=None, kind=Trainer, args=TrainingArguments, **options
):
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

    trainer = kind(
        build_model() if model is None else model,
        args=args(**{**settings, **options}),
        train_dataset=Dataset.from_list(rows_with_id()) if train is None else train,
        eval_dataset=evaluation,
        data_collator=collate_and_note,
        callbacks=[*callbacks, FromHereOn(seen)],
    )
    trainer.seen = seen
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def drawn(trainer):
    return [i for batch in trainer.seen for i in batch]


class Passes:
    """Forward passes of a model."""

    def __init__(self, model):
        self.n = 0
        model.base_model.register_forward_hook(self.count)

    def count(self, *_):
        self.n += 1


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
