"""Data sets of the recipes: rows to train on, trusted ones to judge them by, and noise to test a filter with."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets

from forvalue_callbacks.data.files import DataError, Source
from forvalue_callbacks.data.formats import form_of
from forvalue_callbacks.data.reasons import UnscorableError
from forvalue_callbacks.data.sources import read
from forvalue_callbacks.data.tables import OfDatasets
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
    seed, templates = config.data_seed_rows, (config.prompt_template, config.completion_template)
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
                raise DataError(listed(found, bad))
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
        OfDatasets("generated rows", "generated", train),
        train.add_column(ROW, list(range(len(train)))),
        instructions(config.validation_rows, seed=seed + 10_001),
        instructions(config.test_rows, seed=seed + 10_002),
        {},
        [],
    )


def as_dataset(source: Source) -> Dataset:
    """Rows as a data set with the columns of all of them, None where a row has not got one.

    Raises:
        DataError: a column holds values of several kinds.
    """
    if isinstance(source, OfDatasets):
        return source.rows
    rows = list(source)
    columns: dict[str, list[Any]] = {c: [] for c in dict.fromkeys(column for row in rows for column in row)}
    for column, values in columns.items():
        values += [row.get(column) for row in rows]
        kinds = [_kind(value) for value in values]
        common = Counter(kind for kind in kinds if kind).most_common(2)
        if len(common) == 2:
            odd = next(i for i, kind in enumerate(kinds) if kind and kind != common[0][0])
            raise DataError(
                f"{source.place(odd)}: {column!r} is {kinds[odd]}, and {common[0][0]} in most rows: make them alike."
            )
    try:
        return Dataset.from_dict(columns)
    except Exception as error:  # deeper differences, which Arrow words in its own way
        raise DataError(
            f"{source.name}: rows differ in the form of their values ({error}): make them alike."
        ) from None


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


def _for_sft(
    source: Source, templates: tuple[str | None, str | None], text_field: str
) -> tuple[Dataset, dict[int, str]]:
    """The rows that SFTTrainer can take, with their places in the column `ROW`, and why it cannot take the others."""
    rows = as_dataset(source)
    rows = rows.add_column(ROW, list(range(len(rows))))
    if any(templates):
        rows, problems = _filled(source, rows, templates)
    else:
        columns = _raw_columns(source.name, rows.column_names[:-1], text_field)
        problems = {
            i: why
            for i, values in enumerate(zip(*(rows[column] for column in columns), strict=True))
            if (why := _problem(dict(zip(columns, values, strict=True))))
        }
    if len(problems) == len(rows):
        raise DataError(f"{source.name} has no row to train on: {listed(source, problems)}")
    return rows.select([i for i in range(len(rows)) if i not in problems]) if problems else rows, problems


def _raw_columns(name: str, found: Sequence[str], text_field: str) -> list[str]:
    """The columns that SFTTrainer reads."""
    for columns in (["input_ids"], ["prompt", "completion"], ["messages"], ["conversations"], [text_field]):
        if set(columns) <= set(found):
            return columns
    raise DataError(
        f"{name} has the columns {', '.join(map(repr, found))}, and rows are 'prompt' with 'completion', "
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


def _filled(source: Source, rows: Dataset, templates: tuple[str | None, str | None]) -> tuple[Dataset, dict[int, str]]:
    """Rows with a prompt and a completion of templates."""
    convert = form_of(source, templates).convert
    problems: dict[int, str] = {}
    filled: dict[str, list[str]] = {"prompt": [], "completion": []}
    for i, row in enumerate(source):
        try:
            made = convert(row)
        except UnscorableError as reason:
            problems[i], made = str(reason), {"prompt": "", "completion": ""}
        for name, values in filled.items():
            values.append(made[name])
    others = rows.remove_columns([c for c in rows.column_names if c in (*RAW, *filled)])
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
