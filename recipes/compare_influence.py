"""For-Value against influence functions and cheap rivals on the text tasks of arXiv 2508.10180 (Table 1).

    python recipes/compare_influence.py --config recipes/compare_influence.yaml
    python recipes/compare_influence.py --seeds 1 --tasks math --losses answer

Ten classes of rows per task: a method is good if, for each validation row, the training rows of its class score
highest. AUC of `same class` against the score, and recall: the share of the n_class best-scored rows that are of the
class; mean and standard deviation over the validation rows. One convention for all gradients: labelled tokens, summed.

`answer` labels the answers alone, `full` all tokens. With `full` the prompts give the class away: read `answer` first.
LoRA methods are read at several checkpoints (0: before training). The paper reports the best one,
which nobody knows in practice: here are the best, the last, and the range.

Writes compare_influence.csv (one line per method, checkpoint and seed), .md and .png to `output_dir`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import torch
from influence_comparison import Labels, Rows, compare
from influence_report import CLOCKS, ComparisonConfig, Result, known, write
from influence_tasks import TASKS, task_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from forvalue_callbacks import TINY_MODEL, baselines
from forvalue_callbacks.data.sft import Row, RowConfig, RowPreparer

LOSSES = ["answer", "full"]


@dataclass
class CompareConfig(ComparisonConfig):
    model: str = field(default=str(TINY_MODEL), metadata={"help": "Path or hub id of a causal language model."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Some of the tasks."})
    losses: list[str] = field(
        default_factory=lambda: ["answer"], metadata={"help": "'answer': the answers are labelled; 'full': all."}
    )
    train_per_class: int = field(default=90, metadata={"help": "Training rows of each of the ten classes."})
    validation_per_class: int = field(default=10, metadata={"help": "Validation rows of each class."})

    def __post_init__(self) -> None:
        super().__post_init__()
        known("tasks", self.tasks, TASKS)
        known("losses", self.losses, LOSSES)


def compare_task(config: CompareConfig, task: str, loss: str, seed: int) -> tuple[list[Result], list[str]]:
    raw_train, raw_validation = task_rows(task, seed, config.train_per_class, config.validation_per_class)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    prepare = RowPreparer(tokenizer, RowConfig(completion_only_loss=loss == "answer"))
    train, validation = ([tokenised(prepare(row)) for row in side] for side in (raw_train, raw_validation))
    same = np.array([[row["label"] == other["label"] for other in raw_validation] for row in raw_train])
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    texts, validation_texts = (
        [f"{row['prompt']}{row['completion']}" for row in side] for side in (raw_train, raw_validation)
    )
    answers, validation_answers = ([row["completion"] for row in side] for side in (raw_train, raw_validation))
    cheap = {
        "Emb": lambda: baselines.emb(model, train, validation),
        "Emb, cosine": lambda: baselines.emb(model, train, validation, cosine=True),
        "RDS+": lambda: baselines.rds_plus(model, train, validation),
        "loss": lambda: baselines.loss(model, train),
        "IFD": lambda: baselines.ifd(model, train),
        "mutual information": lambda: baselines.pmi(model, train),
        "in-context approximation, 3 rows": lambda: baselines.in_context(model, train, validation),
        "TF-IDF of the text": lambda: baselines.tfidf(texts, validation_texts),
        "TF-IDF of the answer": lambda: baselines.tfidf(answers, validation_answers),
        "random": lambda: baselines.random_scores(*same.shape, seed=seed),
    }
    rows = Rows(train, validation, train, validation)
    return compare(config, f"{task}, {loss}", seed, model, rows, Labels(same), cheap)


def tokenised(row: Row) -> dict[str, list[int]]:
    if row.reason is not None:
        raise ValueError(f"a generated row cannot be scored: {row.reason}")
    return {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()}


def main(config: CompareConfig) -> list[Result]:
    now = CLOCKS[config.clock]
    started = now()
    results: list[Result] = []
    notes: list[str] = []
    head = (
        "# For-Value against influence functions on generated text tasks\n\n"
        f"{10 * config.train_per_class} training and {10 * config.validation_per_class} validation rows of ten "
        f"classes. Model: {Path(config.model).name}."
    )
    for seed, loss, task in product(range(config.seeds), config.losses, config.tasks):
        more, more_notes = compare_task(config, task, loss, seed)
        results += more
        notes += more_notes
        text = write(config, head, results, notes, now() - started, "compare_influence")
    print(text)
    return results


if __name__ == "__main__":
    (compare_config,) = TrlParser((CompareConfig,)).parse_args_and_config()
    main(compare_config)
