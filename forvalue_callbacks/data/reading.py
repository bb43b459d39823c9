"""Data sets read row by row, and rows through a data collator, which decides what is trained on."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import datasets
import numpy as np
import torch

from .reasons import place_of

logger = logging.getLogger(__name__)

_ATOMS = {int, float, bool, str, bytes, type(None)}


class Unreadable(dict[str, Any]):
    """In the place of a row that its data set fails on (a broken image, a file that is gone): no columns."""

    def __init__(self, error: Exception):
        super().__init__()
        self.reason = f"the data set fails on this row: {place_of(error)}"


def examples_of(dataset: Iterable[Any]) -> Iterator[Any]:
    """The rows of a data set in order; by index where it is map-style, since it need not know where it ends. Of one
    whose rows have places, a row that cannot be had is `Unreadable`.

    Raises:
        ValueError: a mapping of several data sets; columns or a path in place of rows.
    """
    if are_data_sets(dataset):
        raise ValueError(
            f"a {type(dataset).__name__} of data sets is no data set: give one of {', '.join(map(repr, dataset))}."
        )
    if isinstance(dataset, (str, Path, Mapping)) or hasattr(dataset, "iloc"):
        raise ValueError(
            f"a {type(dataset).__name__} is no data set of rows: give a list of rows, or what datasets.load_dataset, "
            "Dataset.from_dict or Dataset.from_pandas makes of it."
        )
    if type(dataset) in (list, tuple):  # one that is derived may make its rows by index
        return iter(dataset)
    if not _by_index(dataset):
        return _apart(dataset)
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom":
        return _arrow(dataset)
    rows: Any = dataset
    return _apart(map(partial(_row, rows), range(len(rows))))


def rows_at(dataset: Any, places: Sequence[int]) -> list[Any]:
    """Some rows of a data set, in the order asked for: no others are read, but of a stream all of them.

    Raises:
        ValueError: a place that it does not have; what `examples_of` refuses.
    """
    rows = examples_of(dataset)
    if _by_index(dataset):
        _refuse_outside(places, len(dataset))
        some: Any = torch.utils.data.Subset(dataset, places)
        return list(examples_of(some))
    wanted, found, n = set(places), {}, 0
    for place, row in enumerate(rows):
        n = place + 1
        if place in wanted:
            found[place] = row
    _refuse_outside(places, n)
    return [found[place] for place in places]


def _row(dataset: Any, place: int) -> Any:
    try:
        return dataset[place]
    except Exception as error:  # rows come from anywhere, and one of them ends no run
        return Unreadable(error)


def _arrow(dataset: datasets.Dataset) -> Iterator[Any]:
    """Rows one after the other, which is faster than by place; begun anew behind one that cannot be had."""
    start, n = 0, len(dataset)
    while start < n:
        try:
            for row in dataset.select(range(start, n)) if start else dataset:
                start += 1
                yield row
        except Exception as error:
            start += 1
            yield Unreadable(error)


def _by_index(dataset: Any) -> bool:
    """Whether rows can be had by their place."""
    by_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return by_index and not isinstance(dataset, torch.utils.data.IterableDataset)


def _refuse_outside(places: Sequence[int], n: int) -> None:
    for place in places:
        if not 0 <= place < n:
            raise ValueError(f"row {place} is asked for, and the data set has {n:,} rows, from row 0 on.")


def _apart(dataset: Iterable[Any]) -> Iterator[Any]:
    """Rows that may be made with random numbers (transforms that augment)."""
    rows, random_numbers = iter(dataset), OwnRandomness()
    while True:
        with random_numbers:
            try:
                row = next(rows)
            except StopIteration:
                return
        yield row


def kept(dataset: Any) -> Any:
    """The data set itself, or the rows of a generator as a list: they are read more than once. Of a mapping of data
    sets those of each."""
    if isinstance(dataset, Mapping) and any(isinstance(rows, Iterator) for rows in dataset.values()):
        return {name: kept(rows) for name, rows in dataset.items()}
    return list(dataset) if isinstance(dataset, Iterator) else dataset


def are_data_sets(dataset: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether this is a mapping of data sets, and not of columns."""
    if not isinstance(dataset, Mapping):
        return False
    first = [next(iter(rows), None) for rows in dataset.values()]
    rows = [row for row in first if row is not None]
    return bool(rows) and all(isinstance(row, Mapping) for row in rows)


def copied(value: Any) -> Any:
    """A copy deep enough that nothing done to it is done to the original."""
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if type(value) is list:
        return value.copy() if all(type(item) in _ATOMS for item in value) else [copied(item) for item in value]
    if type(value) in _ATOMS:
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # open files, readers of videos: nothing that a collator writes into
        return value


class OwnRandomness(AbstractContextManager[None]):
    """Random numbers of a data set's or a collator's own: those of the run go on as if none had been drawn.

    The states of Python's, numpy's and torch's generator (CPU) are swapped for those at the end of the last time.
    """

    def __init__(self) -> None:
        self._own: tuple[Any, ...] | None = None

    def __enter__(self) -> None:
        self._found = _random_states()
        if self._own is not None:
            _set_random_states(self._own)

    def __exit__(self, *error: object) -> None:
        self._own = _random_states()
        _set_random_states(self._found)


def _random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
