"""The main job on generated data: find wrong answers by forward passes, fine-tune without them, compare.

    make demo        or        python recipes/demo.py --noise 0.3 --seed 0

1,000 instruction rows, 30 % of them with a wrong answer, are scored by 200 clean validation rows: by the
published method, three more, and by `auto`, which also says how many rows are wrong. Then the tiny model is
fine-tuned with LoRA through `SFTTrainer` and `ForValueCallback`, from one start and for as many steps each: on all
rows, without a random share, without the worst rows, with all rows reweighted, and on the clean rows alone (which
nobody knows in practice).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Rows
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from outcomes import constant_scores, fine_tune
from sft import make_trainer
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, SFTConfig, SFTTrainer

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
from forvalue_callbacks.data.tables import OfDatasets
from forvalue_callbacks.policies import Policy
from forvalue_callbacks.tiny import instructions

# As published first; the last one is what the fine-tuning drops and reweights by.
METHODS = ("gradient", "whitened", "fitted", "fitted_likelihood", "auto")


@dataclass
class DemoConfig:
    model: str = field(default=str(TINY_MODEL), metadata={"help": "Path or hub id of the model."})
    rows: int = field(default=1000, metadata={"help": "Training rows."})
    noise: float = field(
        default=0.3,
        metadata={
            "help": "Share of them with a wrong answer. As many are dropped, but by auto, which does not know it."
        },
    )
    epochs: float = field(default=2.0, metadata={"help": "Epochs of each fine-tuning."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate of LoRA."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows and of the training."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Where scores, table and picture go."})


def trainer_of(config: DemoConfig, train: Dataset, test: Dataset, callbacks: Sequence[Any] = ()) -> SFTTrainer:
    """A fresh copy of the model under LoRA; every call starts from the same weights."""
    args = SFTConfig(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        max_length=256,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        disable_tqdm=True,
        seed=config.seed,
    )
    lora = ModelConfig(
        model_name_or_path=config.model, use_peft=True, lora_r=8, lora_alpha=16, lora_target_modules=["all-linear"]
    )
    rows = Rows(OfDatasets("generated rows", "generated", train), train, test, test, {}, [])
    trainer = make_trainer(rows, args, lora, callbacks)
    trainer.remove_callback(PrinterCallback)  # the tables say it
    return trainer


def within_answers(scores: np.ndarray, noisy: np.ndarray, answers: np.ndarray) -> float:
    """Mean AUC of clean against noisy among rows of one observed answer, where matching the answer is no help."""
    groups = [answers == answer for answer in set(answers.tolist())]
    return float(np.mean([roc_auc_score(~noisy[g], scores[g]) for g in groups if 0 < noisy[g].sum() < g.sum()]))


def policy(method: str, config: DemoConfig) -> Drop:
    """The true share of noise, which nobody knows in practice; `auto` finds it."""
    return Drop("auto" if method == "auto" else config.noise)


def main(config: DemoConfig) -> list[dict[str, Any]]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    warnings.simplefilter("ignore", category=Warning)  # notes between the frameworks, nothing for who runs a demo
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    train = instructions(config.rows, seed=config.seed, noise=config.noise)
    validation = instructions(200, seed=config.seed + 10_001)
    test = instructions(300, seed=config.seed + 10_002)
    print(f"{len(train)} training rows, {np.mean(train['is_noisy']):.0%} of them with a wrong answer, for example")
    row = next(row for row in train if row["is_noisy"])
    print(f"  {row['prompt']!r} ->{row['completion']!r}, where {row['true_answer']!r} is right")

    trainer = trainer_of(config, train, test)
    trainer.evaluate(trainer.train_dataset.select(range(16)))  # warm up
    started = time.perf_counter()
    trainer.evaluate(trainer.train_dataset)
    pass_seconds = time.perf_counter() - started
    started = time.perf_counter()
    noisy, answers = np.array(trainer.train_dataset["is_noisy"]), np.array(trainer.train_dataset["answer"])
    valued, valuation, found = {}, {}, []
    for method in METHODS:
        started = time.perf_counter()
        scorer = ForValueScorer(
            trainer.model,
            validation,
            ForValueConfig(method=method),
            processing_class=trainer.processing_class,
        )
        scores = valued[method] = scorer.score(trainer.train_dataset)
        valuation[method] = time.perf_counter() - started
        weights = policy(method, config)(scores.values)
        found.append(
            {
                "method": method,
                "AUC": round(roc_auc_score(~noisy, scores.values), 3),
                "AUC within an answer": round(within_answers(scores.values, noisy, answers), 3),
                "noisy among dropped": f"{noisy[weights == 0].mean():.1%}",
                "noisy among kept": f"{noisy[weights > 0].mean():.1%}",
                "seconds": round(valuation[method], 2),
                "x evaluate()": round(valuation[method] / pass_seconds, 2),
            }
        )
        scores.plot(out / f"scores_{method}.png", weights=weights, noisy=noisy)
        scores.save(out / f"scores_{method}.parquet")
    print(
        f"\n{len(train)} rows valued by {len(validation)} clean ones; AUC of clean against noisy rows, 0.5 is chance\n"
    )
    print(markdown(found))
    print(f"\nOne evaluate() pass over the same rows: {pass_seconds:.2f} s. Scores by {METHODS[-1]}:")
    print(valued[METHODS[-1]].summary() + "\n")

    rng = np.random.default_rng(config.seed)
    best = METHODS[-1]
    drop = Drop(config.noise)

    def filtering(policy: Policy, scores: ForValueScores) -> ForValueCallback:
        return ForValueCallback(validation, policy, scores=scores, verbose=False)  # what they say stands above

    runs: dict[str, tuple[str | None, ForValueCallback | None]] = {
        "all rows": (None, None),
        "random drop": (None, filtering(drop, constant_scores(rng.random(len(train))))),
    }
    for method in ("gradient", best):
        runs[f"drop by {method}"] = (
            method,
            filtering(policy(method, config), valued[method]),
        )
    runs[f"reweight by {best}"] = best, filtering(Reweight(0.5), valued[best])
    runs["clean rows only"] = None, filtering(Threshold(0.5), constant_scores(~noisy))
    table = []
    for name, (method, callback) in (bar := tqdm(runs.items(), desc="fine-tuning", unit="run")):
        outcome = fine_tune(trainer_of(config, train, test, [callback] if callback else []))
        table.append(
            {
                "fine-tuning on": name,
                "test loss": round(outcome.test_loss, 4),
                "accuracy": round(outcome.accuracy, 3),
                "training s": round(outcome.training_seconds, 1),
                "valuation s": round(valuation[method], 2) if method else "",
                "x evaluate()": round(valuation[method] / pass_seconds, 2) if method else "",
            }
        )
        bar.set_postfix_str(f"{name}: test loss {table[-1]['test loss']}")
    (out / "table.md").write_text(markdown(found) + "\n\n" + markdown(table) + "\n")
    print("\n" + markdown(table))
    print(f"\nPictures and scores are in {out}: look at {out / f'scores_{best}.png'}.")
    return table


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)])


if __name__ == "__main__":
    main(*HfArgumentParser(DemoConfig).parse_args_into_dataclasses())
