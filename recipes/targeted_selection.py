"""Are the rows of a task found in a mixture of ten, by a few rows of that task? Precision of what `Keep` keeps.

    python recipes/targeted_selection.py
    python recipes/targeted_selection.py --mixtures unnamed --train_per_task 50 --seeds 5

Mixtures of ten tasks each, generated (`influence_tasks.py`): transformations of sentences with the name of the task in
the prompt, the same without (the answer alone tells), and math word problems. Each task in turn is the aim, known by
its validation rows; all ten are validation sets of one scorer, so that a method takes one pass over the training rows.
Precision is the share of the kept rows that are of the task, mean over the ten tasks; its 95 % interval is over seeds
(Student's t). What all could reach is on the last line: there are no more rows of a task than a tenth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from influence_tasks import N_CLASSES, task_rows
from outcome_report import Difference, paired
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from forvalue_callbacks import TINY_MODEL, ForValueConfig, ForValueScorer, Keep, baselines
from forvalue_callbacks.data.sft import RowPreparer
from forvalue_callbacks.policies import keep_in_turn

Row = dict[str, Any]
MIXTURES = {"named": "sentences", "unnamed": "sentences", "math": "math"}
# A task and a share -> the weights (N,) of what is kept of the training rows.
Chooser = Callable[[int, float], np.ndarray]


@dataclass
class SelectionConfig:
    model: str = field(default=str(TINY_MODEL), metadata={"help": "Path or hub id of the model."})
    mixtures: list[str] = field(default_factory=lambda: list(MIXTURES), metadata={"help": "Some of the mixtures."})
    train_per_task: int = field(default=100, metadata={"help": "Training rows of each of the ten tasks."})
    validation_per_task: int = field(default=20, metadata={"help": "Rows that a task is known by."})
    shares: list[float] = field(
        default_factory=lambda: [0.01, 0.05, 0.1, 0.2], metadata={"help": "Of the training rows, that are kept."}
    )
    seeds: int = field(default=3, metadata={"help": "So many seeds: which rows, in which order."})


def mixture(name: str, seed: int, config: SelectionConfig) -> tuple[list[Row], list[Row]]:
    """Training and validation rows: `prompt`, `completion` and `label`, the task."""
    sides = task_rows(MIXTURES[name], seed, config.train_per_task, config.validation_per_task)
    if name == "unnamed":
        for row in (row for side in sides for row in side):
            row["prompt"] = str(row["prompt"]).split(": ", 2)[2]
    return sides


def tokenised(rows: list[Row], prepare: RowPreparer) -> list[dict[str, list[int]]]:
    made = [prepare({name: row[name] for name in ("prompt", "completion")}) for row in rows]
    return [{"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in made]


def choosers(model: Any, prepare: RowPreparer, train: list[Row], known: list[Row], seed: int) -> dict[str, Chooser]:
    """By name, what gives the weights of the rows that are kept for a task, and a share."""
    rows, validation = tokenised(train, prepare), tokenised(known, prepare)
    label = np.array([row["label"] for row in known])
    places = [np.flatnonzero(label == task) for task in range(N_CLASSES)]
    sets = {str(task): [validation[i] for i in places[task]] for task in range(N_CLASSES)}

    def scorer(chosen: Any, method: str, normalize: str) -> ForValueScorer:
        return ForValueScorer(model, chosen, ForValueConfig(method=method, normalize=normalize), progress=False)

    def by_score(method: str) -> Chooser:
        by_set = scorer(sets, method, "cosine").score(rows).by_set
        return lambda task, share: Keep(share)(by_set[str(task)])

    def by_pairs(pairs: Any, in_turn: bool) -> Chooser:
        pairs = np.asarray(pairs)
        if in_turn:
            return lambda task, share: keep_in_turn(pairs[:, places[task]], share)
        return lambda task, share: Keep(share)(pairs[:, places[task]].mean(1))

    texts, known_texts = ([f"{row['prompt']}{row['completion']}" for row in side] for side in (train, known))
    words, states = baselines.tfidf(texts, known_texts), baselines.rds_plus(model, rows, validation)
    return {
        "whitened, cosine": by_score("whitened"),
        "gradient, cosine": by_score("gradient"),
        "gradient, in turn": by_pairs(scorer(validation, "gradient", "none").pairwise(rows), True),
        "whitened, in turn": by_pairs(scorer(validation, "whitened", "none").pairwise(rows), True),
        "RDS+, mean": by_pairs(states, False),
        "RDS+, in turn (as published)": by_pairs(states, True),
        "bag of words, mean": by_pairs(words, False),
        "bag of words, in turn": by_pairs(words, True),
        "random": by_pairs(baselines.random_scores(len(rows), len(known), seed=seed), False),
    }


def precision(weights: np.ndarray, label: np.ndarray, task: int) -> float:
    """Share of the rows with a weight that are of the task."""
    return float((label[weights > 0] == task).mean())


def table(config: SelectionConfig, name: str, model: Any, prepare: RowPreparer) -> list[str]:
    """Markdown: a line for each way to choose, a column for each share."""
    found: dict[tuple[str, float], dict[int, float]] = {}
    for seed in range(config.seeds):
        train, known = mixture(name, seed, config)
        label = np.array([row["label"] for row in train])
        for way, choose in choosers(model, prepare, train, known, seed).items():
            for share in config.shares:
                each = [precision(choose(task, share), label, task) for task in range(N_CLASSES)]
                found.setdefault((way, share), {})[seed] = float(np.mean(each))
    ways = list(dict.fromkeys(way for way, _ in found))
    lines = [f"| {name} | " + " | ".join(f"{share:.0%}" for share in config.shares) + " |"]
    lines.append("|---" * (1 + len(config.shares)) + "|")
    for way in ways:
        cells = [_cell(paired(found[way, share], dict.fromkeys(range(config.seeds), 0.0))) for share in config.shares]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    most = [f"{min(1.0, 1 / N_CLASSES / share):.3f}" for share in config.shares]
    return [*lines, "| all that there are | " + " | ".join(most) + " |"]


def _cell(found: Difference | None) -> str:
    assert found is not None
    return f"{found.mean:.3f}" + (f" ± {found.high - found.mean:.3f}" if found.pairs > 1 else "")


def main(config: SelectionConfig) -> str:
    """The tables."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    prepare = RowPreparer(tokenizer)
    return "\n\n".join("\n".join(table(config, name, model, prepare)) for name in config.mixtures)


if __name__ == "__main__":
    print(main(*HfArgumentParser(SelectionConfig).parse_args_into_dataclasses()))
