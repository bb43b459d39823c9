"""The answer of a row, and a row with another one: as they came, in any form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .formats import MASKS, ROLES
from .preference import swapped


def answer_of(row: Mapping[str, Any], answer: Sequence[str]) -> str | None:
    """The answer of a row as text, by `Form.answer`; None where it has none."""
    parts = []
    for column in answer:
        value = row.get(column)
        if isinstance(value, list):
            spoken = [turn for turn in value if _is_answer(turn)]
            value = spoken[-1].get("content", spoken[-1].get("value")) if spoken else None
        parts += [] if value is None else [str(value)]
    return " ".join(parts) if parts else None


def rewritten(rows: Callable[[int], Mapping[str, Any]], row: int, other: int, answer: Sequence[str] = ()) -> Any:
    """A row with the answer of another; where that is itself, a preference row turned round."""
    return swapped(rows(row)) if row == other else with_answer_of(rows(row), rows(other), answer)


def with_answer_of(row: Mapping[str, Any], other: Mapping[str, Any], answer: Sequence[str] = ()) -> dict[str, Any]:
    """A copy of a row with the answer of another, of the same form: its completion, the last that the assistant says,
    its output; and of tokens those that are labelled.

    Args:
        answer: columns that make the answer (`Form.answer`); none: found by their names.

    Raises:
        ValueError: the row has no answer.
    """
    columns = list(answer) or [name for name in ("completion", "output") if name in row]
    columns = columns or [name for name in ("messages", "conversations") if isinstance(row.get(name), list)]
    new = dict(row)
    for column in columns:
        value = row[column]
        is_chat = column in ("messages", "conversations") and isinstance(value, list)
        new[column] = _with_last_turn_of(value, other[column]) if is_chat else other[column]
    tokens = "input_ids" in row and any(name in row for name in MASKS)
    if not columns and not tokens:
        raise ValueError("rows of text have no answer that could be replaced: give prompt and completion.")
    return {**new, **_with_tokens_of(row, other)} if tokens else new


def _with_last_turn_of(turns: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    def last(turns: Sequence[Any]) -> int:
        spoken = [i for i, turn in enumerate(turns) if _is_answer(turn)]
        if not spoken:
            raise ValueError(
                "a conversation in which the assistant says nothing has no answer that could be replaced."
            )
        return spoken[-1]

    at, source = last(turns), others[last(others)]
    return [
        *turns[:at],
        {**turns[at], **{k: source[k] for k in ("content", "value") if k in source}},
        *turns[at + 1 :],
    ]


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, dict) and ROLES.get(str(turn.get("role", turn.get("from")))) == "assistant"


def _with_tokens_of(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[int]]:
    """Columns of tokens with the last stretch of labelled tokens that the other has in the place of its own."""
    (start, end), (first, last) = _last_labelled(row), _last_labelled(other)
    columns = [name for name in ("input_ids", *MASKS) if row.get(name) is not None and other.get(name) is not None]
    new = {name: [*row[name][:start], *other[name][first:last], *row[name][end:]] for name in columns}
    if row.get("attention_mask") is not None:
        new["attention_mask"] = [1] * len(new["input_ids"])
    return new


def labelled(row: Mapping[str, Any]) -> np.ndarray:
    """Which tokens of a row of token ids are learnt, by its masks: (T,) bool."""
    found = np.ones(len(row["input_ids"]), dtype=bool)
    for name, ignored in MASKS.items():
        if row.get(name) is not None:
            found &= np.asarray(row[name]) != ignored
    return found


def _last_labelled(row: Mapping[str, Any]) -> tuple[int, int]:
    known = labelled(row)
    places = np.flatnonzero(known)
    if not len(places):
        raise ValueError("a row without labelled tokens has no answer that could be replaced.")
    end = int(places[-1]) + 1
    return int(np.flatnonzero(~known[:end])[-1] + 1 if not known[:end].all() else 0), end
