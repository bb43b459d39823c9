"""Data sets of the recipes: rows to train on, trusted ones to judge them by, and noise to test a filter with."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from files import DataError, Source, read

from forvalue_callbacks.tiny import instructions

# Column of the training rows that survives what SFTTrainer does to them: the row's place in the file, from 0.
ROW = "forvalue_row"
# What SFTTrainer would read beside the columns that templates make.
RAW = ("text", "messages", "conversations", "tools", "chat_template_kwargs")


@dataclass
class DataConfig:
    """Which rows to fine-tune on, and which trusted rows to judge them by."""

    data: str | None = field(
        default=None,
        metadata={"help": "File (json, jsonl, csv, parquet) or hub id. None: rows generated for the tiny model."},
    )
    validation_data: str | None = field(
        default=None, metadata={"help": "The same for the validation rows: trusted ones, of the same kind."}
    )
    test_data: str | None = field(
        default=None, metadata={"help": "The same for rows to measure the result on. None: no test loss."}
    )
    data_split: str = field(default="train", metadata={"help": "Split of a hub data set to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split of validation_data on the hub."})
    test_split: str = field(default="test", metadata={"help": "Split of test_data on the hub."})
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Python format string over the columns, e.g. '{instruction}\\n{input}\\n'. None: as it is."},
    )
    completion_template: str | None = field(default=None, metadata={"help": "The same for the answer: '{output}'."})
    draw_validation: bool = field(
        default=False,
        metadata={"help": "Draw validation_rows of the training rows. Only if you trust them: their noise is hidden."},
    )
    draw_test: bool = field(default=False, metadata={"help": "Draw test_rows of the training rows."})
    validation_rows: int = field(default=200, metadata={"help": "How many validation rows are drawn or generated."})
    test_rows: int = field(default=200, metadata={"help": "How many test rows are drawn or generated."})
    max_train_rows: int | None = field(default=None, metadata={"help": "At most so many training rows, drawn."})
    noise: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training answers to swap, to test the filter. None: none; of generated rows 0.2."
        },
    )
    data_seed_rows: int = field(default=0, metadata={"help": "Seed of what is drawn and of the noise."})


@dataclass
class Rows:
    """What `load_rows` gives.

    Args:
        source: all rows of the training file, as they came.
        train: rows to train on, as SFTTrainer takes them, with their places in `source` in the column `ROW`; with
            noise also `is_noisy`.
        validation, test: trusted rows, and rows to measure the result on; None: there are none.
        unusable: why rows of the file cannot be trained on, by their places.
        warnings: what is to be said before the work.
        text_field: column of text rows.
    """

    source: Source
    train: Dataset
    validation: Dataset
    test: Dataset | None
    unusable: dict[int, str]
    warnings: list[str]
    text_field: str = "text"


def load_rows(config: DataConfig, text_field: str = "text") -> Rows:
    """Training, validation and test rows.

    Args:
        text_field: SFTTrainer's `dataset_text_field`.

    Raises:
        DataError: what `read` refuses, no validation rows, columns or templates that make no rows for SFTTrainer, too
            few rows, validation or test rows that cannot be used.
    """
    seed, templates = config.data_seed_rows, _templates(config)
    if config.data is None:
        return _generated(config)
    if config.validation_data is None and not config.draw_validation:
        raise DataError(
            "rows are judged by rows that you trust: give two or three hundred of the same kind as --validation_data "
            f"FILE (--draw_validation true draws {config.validation_rows} of {config.data}: only if you trust it)."
        )
    source = read(config.data, config.data_split)
    train, unusable = _for_sft(source, templates, text_field)
    order = train.shuffle(seed=seed) if config.draw_validation or config.draw_test or config.max_train_rows else train
    drawn = {}
    for name, draw, n in (
        ("validation", config.draw_validation, config.validation_rows),
        ("test", config.draw_test, config.test_rows),
    ):
        if draw:
            if len(order) <= n:
                raise DataError(f"{config.data} has too few rows to draw {n} {name} rows of: lower {name}_rows.")
            drawn[name], order = order.select(range(n)), order.select(range(n, len(order)))
    if config.max_train_rows is not None:
        order = order.select(range(min(len(order), config.max_train_rows)))
    sides = {}
    for name, file, split in (
        ("validation", config.validation_data, config.validation_split),
        ("test", config.test_data, config.test_split),
    ):
        if file is not None:
            sides[name], bad = _for_sft(found := read(file, split), templates, text_field)
            if bad:
                raise DataError(f"{file}, {listed(found, bad)}")
    warnings = []
    if "validation" in drawn:
        warnings.append(
            f"{config.validation_rows} validation rows are drawn from {config.data}: noisy ones hide noise, "
            "up to all. Better: rows that you trust, as --validation_data FILE."
        )
    if unusable:
        n = len(unusable)
        what = f"{n:,} row{'s' * (n > 1)} of {config.data} cannot be trained on and {'are' if n > 1 else 'is'} dropped"
        warnings.append(f"{what}: {listed(source, unusable)}")
    if config.noise:
        order = swap_answers(order, config.noise, seed)
    sides |= drawn
    return Rows(source, order, sides["validation"], sides.get("test"), unusable, warnings, text_field)


def listed(source: Source, unusable: dict[int, str], n: int = 5) -> str:
    """Rows that cannot be used with their places, the first few of them, and the way out."""
    first = "; ".join(f"{source.place(row)}: {why}" for row, why in list(unusable.items())[:n])
    more = f"; and {len(unusable) - n:,} more" if len(unusable) > n else ""
    return f"{first}{more}: fill {'it' if len(unusable) == 1 else 'them'} or leave the row out."


def _generated(config: DataConfig) -> Rows:
    seed, noise = config.data_seed_rows, 0.2 if config.noise is None else config.noise
    train = instructions(config.max_train_rows or 1000, seed=seed, noise=noise)
    return Rows(
        Source("generated rows", "jsonl", train),
        train.add_column(ROW, list(range(len(train)))),
        instructions(config.validation_rows, seed=seed + 10_001),
        instructions(config.test_rows, seed=seed + 10_002),
        {},
        [],
    )


def _templates(config: DataConfig) -> dict[str, str] | None:
    """Templates of the prompt and the completion, as a shell gives them: with a backslash and an n for a new line."""
    given = {"prompt": config.prompt_template, "completion": config.completion_template}
    missing = [name for name, template in given.items() if template is None]
    if len(missing) == 1:
        raise DataError(f"one template without the other: give --{missing[0]}_template as well.")
    return None if missing else {name: str(template).replace("\\n", "\n") for name, template in given.items()}


def _for_sft(source: Source, templates: dict[str, str] | None, text_field: str) -> tuple[Dataset, dict[int, str]]:
    """The rows that SFTTrainer can take, with their places in the column `ROW`, and why it cannot take the others."""
    rows = source.rows.add_column(ROW, list(range(len(source.rows))))
    if templates is None:
        columns = _raw_columns(source, text_field)
        problems = {
            i: why
            for i, values in enumerate(zip(*(rows[column] for column in columns), strict=True))
            if (why := _problem(dict(zip(columns, values, strict=True))))
        }
    else:
        rows, problems = _filled(source, rows, templates)
    if len(problems) == len(rows):
        raise DataError(f"{source.name} has no row to train on: {listed(source, problems)}")
    return rows.select([i for i in range(len(rows)) if i not in problems]) if problems else rows, problems


def _raw_columns(source: Source, text_field: str) -> list[str]:
    """The columns that SFTTrainer reads."""
    found = source.rows.column_names
    for columns in (["input_ids"], ["prompt", "completion"], ["messages"], ["conversations"], [text_field]):
        if set(columns) <= set(found):
            return columns
    raise DataError(
        f"{source.name} has the columns {', '.join(map(repr, found))}, and rows are 'prompt' with 'completion', "
        f"'messages', 'conversations' or text in {text_field!r}: name yours with --prompt_template and "
        f"--completion_template, for example '{{{found[0]}}}\\n' and '{{{found[-1]}}}'."
    )


def _problem(row: dict[str, object]) -> str | None:
    """Why SFTTrainer would stop at a row."""
    for column, value in row.items():
        if value is None:
            return f"{column!r} is null"
        if not isinstance(value, (str, list)):
            return f"{column!r} is neither text nor a list"
        if not value and column != "completion":  # an empty completion is the end of the text alone
            return f"{column!r} is empty"
    return None


def _filled(source: Source, rows: Dataset, templates: dict[str, str]) -> tuple[Dataset, dict[int, str]]:
    """Rows with a prompt and a completion of templates: null is nothing in a prompt, and no answer in a completion."""
    named: dict[str, list[str]] = {}
    for name, template in templates.items():
        try:
            columns = [
                re.split(r"[.[]", part[1])[0] for part in string.Formatter().parse(template) if part[1] is not None
            ]
        except ValueError as error:
            raise DataError(f"--{name}_template {template!r} is no format string ({error}).") from None
        for column in columns:
            if column not in source.rows.column_names:
                raise DataError(
                    f"--{name}_template names the column {column!r}, and {source.name} has "
                    f"{', '.join(map(repr, source.rows.column_names))}."
                )
        named[name] = columns
    problems, filled = {}, {"prompt": [], "completion": []}
    for i, row in enumerate(source.rows):
        null = [column for column in named["completion"] if row[column] is None]
        if null:
            problems[i] = f"{null[0]!r} is null"
        row = {column: "" if value is None else value for column, value in row.items()}
        for name, template in templates.items():
            filled[name].append(template.format(**row))
    others = rows.remove_columns([c for c in rows.column_names if c in (*RAW, *templates)])
    return concatenate_datasets([others, Dataset.from_dict(filled)], axis=1), problems


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
    """`round(share * N)` rows get one another's answer (nobody keeps its own where avoidable).

    The answer is the completion, or the last turn of a conversation. Adds `is_noisy`: whether it is now another one.

    Raises:
        DataError: rows of text, which have no answer.
    """
    rng = random.Random(seed)
    chosen = rng.sample(range(len(rows)), round(share * len(rows)))
    column = next((c for c in ("completion", "messages", "conversations") if c in rows.column_names), None)
    if column is None:
        raise DataError("noise swaps answers, and these rows have none: give prompt and completion, or conversations.")
    whole = list(rows[column])
    answers = whole if column == "completion" else [turns[-1:] for turns in whole]
    swapped = list(answers)
    for place, source in zip(chosen, [*chosen[1:], *chosen[:1]], strict=True):
        swapped[place] = answers[source]
    noisy = [new != old for new, old in zip(swapped, answers, strict=True)]
    if column != "completion":
        swapped = [turns[:-1] + answer for turns, answer in zip(whole, swapped, strict=True)]
    kept = rows.remove_columns(column)
    return concatenate_datasets([kept, Dataset.from_dict({column: swapped, "is_noisy": noisy})], axis=1)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Tokenised rows (`input_ids`, `labels`) padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[filler] * (longest - len(row[name]))] for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": pad("input_ids", 0), "attention_mask": mask, "labels": pad("labels", -100)}
