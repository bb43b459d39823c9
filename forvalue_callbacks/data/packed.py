"""Packs of rows, as `trl.pack_dataset` makes them: taken apart to be scored row by row, and packed again."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

LENGTHS = "seq_lengths"  # of the rows in a pack; TRL writes it for padding-free batches of single rows too


def has_packs(dataset: Any) -> bool:
    """Whether rows of a data set hold several samples, by the column that TRL keeps their lengths in."""
    return LENGTHS in (getattr(dataset, "column_names", None) or ()) and any(
        lengths is not None and len(lengths) > 1 for lengths in dataset[LENGTHS]
    )


def taken_apart(dataset: Any) -> Any:
    """A `datasets.Dataset` with a row for each sample of packs, in their order; columns of numbers of tokens are cut,
    and all others are left out."""
    return dataset.map(
        _cut, batched=True, remove_columns=dataset.column_names, load_from_cache_file=False, desc="Taking packs apart"
    )


def packed_again(dataset: Any, longest: int) -> Any:
    """Packs of at most so many tokens, none of which cuts a row."""
    from trl import pack_dataset

    return pack_dataset(dataset, longest, "bfd")


def _cut(packs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    ids, lengths = packs["input_ids"], packs[LENGTHS]
    columns = [
        column
        for column, values in packs.items()
        if column not in (LENGTHS, "position_ids")
        and all(isinstance(value, list) and len(value) == len(row) for value, row in zip(values, ids, strict=True))
    ]
    ends = [list(pairwise(accumulate(numbers, initial=0))) for numbers in lengths]
    return {
        column: [value[a:b] for value, cuts in zip(packs[column], ends, strict=True) for a, b in cuts]
        for column in columns
    }
