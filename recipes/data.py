"""Data sets of the recipes: any hub id or local file to prompt/completion rows, and noise to test a filter with."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

from forvalue_callbacks.tiny import instructions

_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataConfig:
    """Which rows to fine-tune on, and which clean rows to judge them by."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local file (json, jsonl, csv, parquet). None: rows generated for the tiny model."
        },
    )
    data_split: str = field(default="train", metadata={"help": "Split of a hub data set."})
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Python format string over the columns, e.g. '{instruction}\\n{input}\\n'. None: as it is."},
    )
    completion_template: str | None = field(default=None, metadata={"help": "The same for the answer: '{output}'."})
    validation_rows: int = field(default=200, metadata={"help": "Clean rows held out to judge the others by."})
    test_rows: int = field(default=200, metadata={"help": "Rows held out to measure the result on."})
    max_train_rows: int | None = field(default=None, metadata={"help": "At most so many training rows."})
    noise: float = field(default=0.0, metadata={"help": "Share of training answers to swap, to test the filter."})
    data_seed_rows: int = field(default=0, metadata={"help": "Seed of the split and of the noise."})


def load_rows(config: DataConfig) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation and test rows; the training rows carry `is_noisy` (bool).

    Raises:
        ValueError: an unknown kind of file, a template that names a column that is not there, too few rows.
    """
    seed = config.data_seed_rows
    if config.data is None:
        n = config.max_train_rows or 1000
        train = instructions(n, seed=seed, noise=config.noise)
        return (
            train,
            instructions(config.validation_rows, seed=seed + 10_001),
            instructions(config.test_rows, seed=seed + 10_002),
        )
    if Path(config.data).suffix in _LOADERS:
        rows = load_dataset(_LOADERS[Path(config.data).suffix], data_files=config.data, split="train")
    else:
        rows = load_dataset(config.data, split=config.data_split)
    if config.prompt_template is not None and config.completion_template is not None:
        rows = rows.map(_fill, fn_kwargs={"prompt": config.prompt_template, "completion": config.completion_template})
        rows = rows.select_columns(["prompt", "completion"])
    held_out = config.validation_rows + config.test_rows
    if len(rows) <= held_out:
        raise ValueError(f"{config.data} has {len(rows)} rows, and {held_out} are to be held out: lower test_rows.")
    rows = rows.shuffle(seed=seed)
    validation, test = rows.select(range(config.validation_rows)), rows.select(range(config.validation_rows, held_out))
    stop = len(rows) if config.max_train_rows is None else min(len(rows), held_out + config.max_train_rows)
    return swap_answers(rows.select(range(held_out, stop)), config.noise, seed), validation, test


def change_words(rows: Dataset, share: float, seed: int, insert: bool) -> Dataset:
    """`round(share * N)` rows have three in ten words of their completion deleted, or as many words of others put in.

    Adds `is_noisy`; a completion of one word cannot lose any and stays clean.
    """
    rng = random.Random(seed)
    answers = [answer.split() for answer in rows["completion"]]
    pool = [word for answer in answers for word in answer]
    changed, noisy = list(rows["completion"]), [False] * len(rows)
    for i in rng.sample(range(len(rows)), round(share * len(rows))):
        words, n = list(answers[i]), max(1, round(0.3 * len(answers[i])))
        if insert:
            for _ in range(n):
                words.insert(rng.randrange(len(words) + 1), rng.choice(pool))
        elif len(words) > 1:
            dropped = set(rng.sample(range(len(words)), min(n, len(words) - 1)))
            words = [word for place, word in enumerate(words) if place not in dropped]
        noisy[i] = words != answers[i]
        if noisy[i]:
            changed[i] = " ".join(words)
    kept = rows.remove_columns("completion")
    return concatenate_datasets([kept, Dataset.from_dict({"completion": changed, "is_noisy": noisy})], axis=1)


def swap_answers(rows: Dataset, share: float, seed: int) -> Dataset:
    """`round(share * N)` rows get one another's completion (nobody keeps its own text where avoidable).

    Adds `is_noisy`: whether the completion is now another text.
    """
    rng = random.Random(seed)
    chosen = rng.sample(range(len(rows)), round(share * len(rows)))
    answers = list(rows["completion"])
    swapped = list(answers)
    for place, source in zip(chosen, [*chosen[1:], *chosen[:1]], strict=True):
        swapped[place] = answers[source]
    noisy = [new != old for new, old in zip(swapped, answers, strict=True)]
    kept = rows.remove_columns("completion")
    return concatenate_datasets([kept, Dataset.from_dict({"completion": swapped, "is_noisy": noisy})], axis=1)


def _fill(row: dict[str, object], prompt: str, completion: str) -> dict[str, str]:
    prompt, completion = (template.replace("\\n", "\n") for template in (prompt, completion))  # as a shell gives it
    try:
        return {"prompt": prompt.format(**row), "completion": completion.format(**row)}
    except KeyError as error:
        raise ValueError(f"the template names {error}, the columns are {sorted(row)}") from None
