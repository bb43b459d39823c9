"""Rows of preferences by the rules of trl's `DPOTrainer` and `KTOTrainer`: what should become likelier, and what less.

A pair (columns 'chosen' and 'rejected', with a 'prompt' or with all that both begin with as one) is two sides, of
weight 1 and -1; an answer marked as good or bad (a 'prompt', a 'completion' and a 'label' that is true or false) is
one side, of weight 1 or -1. The rules are those of `_prepare_dataset` of both trainers in trl 1.16; rows that a
trainer has tokenised come with the columns of that version, of trl 0.24, or of frameworks around it ('chosen_labels').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .conversations import common_prefix_length, messages_of
from .reasons import SetUpError, UnscorableError
from .sample import IGNORED, Segment
from .sft import Row, RowPreparer, columns_of, has_images, integers

CHOSEN, REJECTED, MARKED = "chosen", "rejected", "completion"
AGAINST = "rejected_"  # before the names of model inputs that are of the rejected answer
# How columns of tokens end: of trl 1, of trl before, and of frameworks around it.
_ENDS = ("_ids", "_input_ids")
# Columns that make a row one to be learnt as it is, whatever else it has.
_OTHER_ROWS = ("input_ids", MARKED)


class Side(NamedTuple):
    """One answer with its prompt."""

    row: Row
    weight: int


def is_preference(example: Any) -> bool:
    """Whether a row is a pair, or an answer that is marked as good or bad. A row with 'input_ids' is neither, nor is
    one with a 'completion' that has no mark; one with 'messages' or text beside a pair is the pair."""
    return isinstance(example, Mapping) and (is_pair(example) or _is_marked(example))


def is_pair(columns: Any) -> bool:
    """The same of pairs alone; a row, or the names of its columns."""
    pair = any({f"{CHOSEN}{end}", f"{REJECTED}{end}"} <= set(columns) for end in ("", *_ENDS))
    return pair and not any(name in columns for name in _OTHER_ROWS)


def _is_marked(example: Mapping[str, Any]) -> bool:
    if "input_ids" in example or not isinstance(example.get("label"), (bool, np.bool_)):
        return False
    return any(f"{MARKED}{end}" in example and f"prompt{end}" in example for end in ("", *_ENDS))


def made_for_preferences(collator: Any) -> bool:
    """Whether a collator is one of trl's for such rows: they truncate and pad, which is done here."""
    cls = type(collator)
    named = "Preference" in cls.__name__ or cls.__name__.startswith("DPODataCollator")
    return named and cls.__module__.split(".")[0] == "trl"


def sides_of(prepare: RowPreparer, example: Mapping[str, Any]) -> list[Side]:
    """The sides of a row, each truncated to the `max_length` of `prepare`.

    Raises:
        UnscorableError: one has nothing to predict, both are the same, or what `prepare` refuses.
    """
    if has_images(example):
        raise SetUpError(f"preference rows with images ({columns_of(example)}) have no score: give rows of text")
    pair = is_pair(example)
    names = (CHOSEN, REJECTED) if pair else (MARKED,)
    weights = (1, -1) if pair else (1 if example["label"] else -1,)
    found = _tokenised(example, names) or _tokenise(prepare, example, names)
    rows = [prepare.checked(ids, labels, source) for ids, labels, source in found]
    if pair:
        _refuse_same(rows, found, prepare.config.max_length)
    return [Side(row, weight) for row, weight in zip(rows, weights, strict=True)]


def refuse_unless_pair(example: Any) -> None:
    """Raises UnscorableError for a row that a reward model is not trained on, or is by another loss."""
    pair = isinstance(example, Mapping) and is_pair(example)
    if pair and "margin" not in example:
        return
    what = "has a 'margin'" if pair else f"is none ({columns_of(example)})"
    raise SetUpError(
        "the model predicts a number (num_labels=1), and is scored by pairs, 'chosen' and 'rejected', without a "
        f"margin; this row {what}: give such pairs, or a classifier that chooses one of several classes"
    )


def pair_segment(sides: Sequence[Side]) -> Segment:
    """Both sides of a pair as one segment, for a reward model: its one position is what the model's head gets of the
    chosen answer minus what it gets of the rejected one, and it predicts that the chosen one is better (0)."""
    inputs: dict[str, Any] = {}
    for side, name in zip(sides, ("", AGAINST), strict=True):
        ids = torch.from_numpy(side.row.input_ids)[None]
        inputs |= {f"{name}input_ids": ids, f"{name}attention_mask": torch.ones_like(ids)}
    return Segment(inputs, np.array([0]), np.array([0]), n_prompt=1)


def inputs_of_sides(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Model inputs of the chosen and of the rejected answers of such segments."""
    against = {name.removeprefix(AGAINST): value for name, value in inputs.items() if name.startswith(AGAINST)}
    return [{name: value for name, value in inputs.items() if not name.startswith(AGAINST)}, against]


# Token ids and labels of a side, and the columns that they come from.
_Labelled = tuple[np.ndarray, np.ndarray, str]


def _refuse_same(rows: Sequence[Row], whole: Sequence[_Labelled], limit: int | None) -> None:
    """Nothing can be learnt of a pair whose sides are the same: each takes back what the other says."""
    if not np.array_equal(rows[0].input_ids, rows[1].input_ids):
        return
    if np.array_equal(whole[0][0], whole[1][0]):
        raise UnscorableError(f"{CHOSEN!r} and {REJECTED!r} are the same: drop the row")
    raise UnscorableError(
        f"{CHOSEN!r} and {REJECTED!r} are the same after truncation to max_length={limit}: raise max_length, or drop "
        "the row"
    )


# ---- rows that a trainer has tokenised ----


def _tokenised(example: Mapping[str, Any], names: Sequence[str]) -> list[_Labelled] | None:
    end = next((end for end in _ENDS if all(f"{name}{end}" in example for name in names)), None)
    if end is None:
        return None
    columns = [f"{name}{end}" for name in names]
    ids = [integers(example, column) for column in columns]
    if all(f"{name}_labels" in example for name in names):
        labels = [integers(example, f"{name}_labels") for name in names]
        for column, some, other in zip(columns, ids, labels, strict=True):
            if len(some) != len(other):
                raise UnscorableError(f"{len(other):,} labels for {len(some):,} tokens in {column!r}: make them equal")
        return list(zip(ids, labels, map(repr, columns), strict=True))
    if f"prompt{end}" in example:
        prompt = integers(example, f"prompt{end}")
        start, source = len(prompt), f"'prompt{end}' and "
        ids = [np.concatenate([prompt, side]) for side in ids]
    else:  # of a RewardTrainer, which reads both as a whole
        start, source = common_prefix_length(ids[0].tolist(), ids[-1].tolist()), ""
    return [(side, _after(side, start), f"{source}{column!r}") for side, column in zip(ids, columns, strict=True)]


def _after(ids: np.ndarray, start: int) -> np.ndarray:
    """Labels of what follows the prompt."""
    return np.where(np.arange(len(ids)) < start, IGNORED, ids)


# ---- raw rows ----


def _tokenise(prepare: RowPreparer, example: Mapping[str, Any], names: Sequence[str]) -> list[_Labelled]:
    if prepare.processing_class is None:
        raise SetUpError(f"raw rows ({columns_of(example)}) need a tokenizer: pass processing_class")
    parts = {name: example[name] for name in ("prompt", *names) if name in example}
    kind = _kind(parts)
    if kind is list:
        parts = {name: messages_of(example, name) if example[name] else [] for name in parts}
    if "prompt" not in parts:
        parts = without_prompt(parts)
    empty = next((name for name in parts if kind is list and not parts[name]), None)
    if empty is not None:
        raise UnscorableError(f"{empty!r} has no message (of its own): fill it or drop the row")
    source = {name: f"'prompt' and {name!r}" if "prompt" in example else repr(name) for name in names}
    if kind is list:
        options = prepare.template_options(example)
        prompt = prepare.tokens("'prompt'", parts["prompt"], add_generation_prompt=True, **options)
    else:
        options = {}
        prompt = prepare.tokens("'prompt'", parts["prompt"])
        parts |= {name: prepare.ending(parts[name]) for name in names}
    whole = [prepare.tokens(source[name], parts["prompt"] + parts[name], **options)["input_ids"] for name in names]
    start = min(common_prefix_length(prompt["input_ids"], ids) for ids in whole)
    sides = [np.array(ids, dtype=np.int64) for ids in whole]
    return [(ids, _after(ids, start), source[name]) for ids, name in zip(sides, names, strict=True)]


def _kind(parts: Mapping[str, Any]) -> type:
    """str or list: text or messages, the same in all columns."""
    for name, value in parts.items():
        if not isinstance(value, (str, list)):
            kind = "None" if value is None else f"a {type(value).__name__}"
            raise UnscorableError(f"{name!r} is {kind}, not text or a list of messages: fill it or drop the row")
    kinds = {type(value) for value in parts.values()}
    if len(kinds) > 1:
        raise UnscorableError(f"{', '.join(map(repr, parts))} are text and messages: make all of them one of the two")
    return kinds.pop()


def without_prompt(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair with all that both sides begin with as its prompt (trl's `extract_prompt`), text or messages."""
    chosen, rejected = pair[CHOSEN], pair[REJECTED]
    n = min(len(chosen), len(rejected))
    start = next((i for i in range(n) if chosen[i] != rejected[i]), n - 1)
    if 0 < start < n and chosen[start] != rejected[start] and chosen[start - 1] == " ":
        start -= 1  # the space goes with the answer
    start = max(start, 0)
    return {"prompt": chosen[:start], CHOSEN: chosen[start:], REJECTED: rejected[start:]}


def swapped(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a row of preferences that says the opposite: what is chosen and what is rejected change places, in all
    columns that come in two; or the mark is the other one.

    Raises:
        ValueError: the row is no such row.
    """
    if not is_preference(row):
        raise ValueError(
            "a row without 'chosen' and 'rejected', and without a 'label' that is true or false, cannot be swapped."
        )
    if not is_pair(row):
        return {**row, "label": not row["label"]}
    twins = {name: name.replace(CHOSEN, REJECTED) for name in row if CHOSEN in name}
    twins |= {other: name for name, other in twins.items()}
    return {name: row[twins[name]] if twins.get(name) in row else value for name, value in row.items()}
