"""The main job on generated data: find wrong answers by forward passes, fine-tune without them, compare.

    make demo        or        python recipes/demo.py --noise 0.3 --seed 0

1,000 instruction rows, 30 % of them with a wrong answer, are scored against 200 clean held-out rows. Then the tiny
model is fine-tuned with LoRA through `SFTTrainer` and `ForValueCallback`, five times from one start and for as many
steps: on all rows, without a random share, without the worst rows, with all rows reweighted, and on the clean rows
alone (which nobody knows in practice). One table, one picture.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from forvalue_callbacks import (
    TINY_MODEL,
    Drop,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    ForValueScores,
    Reweight,
    Threshold,
)
from forvalue_callbacks.tiny import instructions


@dataclass
class DemoConfig:
    model: str = field(default=str(TINY_MODEL), metadata={"help": "Path or hub id of the model."})
    rows: int = field(default=1000, metadata={"help": "Training rows."})
    noise: float = field(default=0.3, metadata={"help": "Share of them with a wrong answer; as many are dropped."})
    direction: str = field(default="gradient", metadata={"help": "ForValueConfig.direction"})
    epochs: float = field(default=3.0, metadata={"help": "Epochs of each fine-tuning."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of LoRA."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows and of the training."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Where scores, table and picture go."})


def make_trainer(config: DemoConfig, train: Dataset, test: Dataset, callbacks=()) -> SFTTrainer:
    """A fresh copy of the model under LoRA; every call starts from the same weights."""
    args = SFTConfig(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        max_length=256,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
    )
    return SFTTrainer(
        AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=AutoTokenizer.from_pretrained(config.model),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=list(callbacks),
    )


@torch.no_grad()
def accuracy(trainer: SFTTrainer) -> float:
    """Share of held-out rows whose whole answer is the model's first choice, token by token."""
    model, right = trainer.model.eval(), []
    for batch in trainer.get_eval_dataloader():
        labels = batch["labels"][:, 1:]
        best = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
        right += ((best == labels) | (labels == -100)).all(1).tolist()
    return float(np.mean(right))


def report_found(scores: ForValueScores, rows: Dataset, weights: np.ndarray) -> None:
    """What the scores say of the truth."""
    noisy, answers = np.array(rows["is_noisy"]), np.array(rows["answer"])
    print(f"AUC of clean against noisy rows                {roc_auc_score(~noisy, scores.values):.3f}")
    per_answer = [
        roc_auc_score(~noisy[answers == a], scores.values[answers == a])
        for a in set(answers.tolist())
        if 0 < noisy[answers == a].sum() < (answers == a).sum()
    ]
    print(f"the same within rows of one observed answer    {np.mean(per_answer):.3f}  (0.5 is chance)")
    print(f"share of noisy rows among the dropped          {noisy[weights == 0].mean():.3f}")
    print(f"share of noisy rows in all rows                {noisy.mean():.3f}")


def constant_scores(values: np.ndarray) -> ForValueScores:
    """Scores made by hand, for the comparisons."""
    n = len(values)
    return ForValueScores(values.astype(np.float64), [None] * n, np.zeros(n), np.ones(n, dtype=np.int64))


def main(config: DemoConfig) -> list[dict[str, float | str]]:
    transformers_logging.set_verbosity_error()
    disable_progress_bar()
    logging.getLogger("forvalue_callbacks").setLevel(logging.WARNING)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    train = instructions(config.rows, seed=config.seed, noise=config.noise)
    validation = instructions(200, seed=config.seed + 10_001)
    test = instructions(300, seed=config.seed + 10_002)
    print(f"{len(train)} training rows, {np.mean(train['is_noisy']):.0%} of them with a wrong answer, for example")
    for row in (r for r in train.select(range(20)) if r["is_noisy"]):
        print(f"  {row['prompt']!r} ->{row['completion']!r}, where {row['true_answer']!r} is right")
        break

    trainer = make_trainer(config, train, test)
    trainer.evaluate(trainer.train_dataset.select(range(64)))  # warm up
    started = time.perf_counter()
    trainer.evaluate(trainer.train_dataset)
    pass_seconds = time.perf_counter() - started
    started = time.perf_counter()
    scorer = ForValueScorer(
        trainer.model,
        validation,
        ForValueConfig(direction=config.direction),
        processing_class=trainer.processing_class,
    )
    scores = scorer.score(trainer.train_dataset)
    valuation_seconds = time.perf_counter() - started
    weights = Drop(config.noise)(scores.values)
    print(
        f"\nFor-Value ({config.direction}): {len(scores)} rows against {len(validation)} in {valuation_seconds:.2f} s"
    )
    print(scores.summary())
    report_found(scores, trainer.train_dataset, weights)
    scores.plot(out / "scores.png", weights=weights, noisy=np.array(train["is_noisy"]))
    scores.save(out / "scores.parquet")

    rng = np.random.default_rng(config.seed)
    clean = ~np.array(trainer.train_dataset["is_noisy"])
    runs = {
        "all rows": None,
        "random drop": ForValueCallback(
            validation, Drop(config.noise), scores=constant_scores(rng.random(len(train)))
        ),
        "For-Value drop": ForValueCallback(validation, Drop(config.noise), scores=scores),
        "For-Value reweight": ForValueCallback(validation, Reweight(1.0), scores=scores),
        "clean rows only": ForValueCallback(validation, Threshold(0.5), scores=constant_scores(clean)),
    }
    table = []
    for name, callback in runs.items():
        trainer = make_trainer(config, train, test, [callback] if callback else [])
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        used = name.startswith("For-Value")
        table.append(
            {
                "run": name,
                "held-out loss": round(trainer.evaluate()["eval_loss"], 4),
                "accuracy": round(accuracy(trainer), 3),
                "training s": round(seconds, 1),
                "valuation s": round(valuation_seconds, 2) if used else 0.0,
                "x evaluate()": round(valuation_seconds / pass_seconds, 2) if used else 0.0,
            }
        )
        print(f"  {name}: held-out loss {table[-1]['held-out loss']}, {seconds:.0f} s")
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in table]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    print(f"\nOne evaluate() pass over the training rows takes {pass_seconds:.2f} s.")
    print(f"Picture of the scores: {out / 'scores.png'}; all scores: {out / 'scores.parquet'}")
    return table


if __name__ == "__main__":
    main(*HfArgumentParser(DemoConfig).parse_args_into_dataclasses())
