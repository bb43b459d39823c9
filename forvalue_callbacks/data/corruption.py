"""Copies of token rows that go wrong in the ways in which data goes wrong. Knows no model.

What counts as the answer of a row is its longest run of labelled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .sample import IGNORED
from .sft import Row

# Share of the words that are deleted or inserted, and of those that a truncated answer keeps: uniform within.
CHANGED, KEPT = (0.1, 0.5), (0.2, 0.8)

Words = list[np.ndarray]


def answer_span(row: Row) -> slice:
    """The longest run of labelled tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.labels != IGNORED, [False]]).astype(np.int8)))
    starts, stops = edges[::2], edges[1::2]
    longest = int(np.argmax(stops - starts))
    return slice(int(starts[longest]), int(stops[longest]))


def word_starts(tokenizer: object, vocab_size: int) -> np.ndarray | None:
    """Which tokens begin a word (bool, (vocab_size,)): those that come with a space, by the tokenizer's own spelling.

    None where that tells nothing (no tokenizer, or one that never spells a space): then each token is a word.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return None
    size = min(vocab_size, len(tokenizer))  # type: ignore[arg-type]
    tokens = tokenizer.convert_ids_to_tokens(list(range(size)))
    starts = np.zeros(vocab_size, dtype=bool)
    starts[:size] = [str(token).startswith(("\u2581", "\u0120", " ")) for token in tokens]
    return starts if starts.any() else None


def corrupted(
    rows: Sequence[Row],
    kind: str,
    rng: np.random.Generator,
    starts: np.ndarray | None = None,
    max_length: int | None = None,
) -> list[Row | None]:
    """A copy of each row with another answer; None where the row cannot be changed that way (an answer of one word).

    Args:
        kind: one of `KINDS`.
        starts: which tokens begin a word, (vocab,).
        max_length: rows are cut to so many tokens.
    """
    spans = [answer_span(row) for row in rows]
    answers = [row.labels[span] for row, span in zip(rows, spans, strict=True)]
    # The token that ends nearly every answer (EOS) is no word of it and stays where it is.
    lasts, counts = np.unique([answer[-1] for answer in answers], return_counts=True)
    end = int(lasts[counts.argmax()]) if counts.max() > 0.8 * len(rows) else None
    pool = [word for answer in answers for word in _words(answer, end, starts)[0]]
    turn = rng.permutation(len(rows))
    other = {int(i): int(j) for i, j in zip(turn, np.roll(turn, 1), strict=True)}
    out: list[Row | None] = []
    for i, (row, span, answer) in enumerate(zip(rows, spans, answers, strict=True)):
        words, tail = _words(answer, end, starts)
        if kind == "swapped":
            changed: np.ndarray | None = answers[other[i]]
        else:
            new_words = _CHANGES[kind](words, pool, rng)
            changed = None if new_words is None else np.concatenate([*new_words, tail])
        if changed is None or np.array_equal(changed, answer):
            out.append(None)
            continue
        ids = np.concatenate([row.input_ids[: span.start], changed, row.input_ids[span.stop :]])
        labels = np.concatenate([row.labels[: span.start], changed, row.labels[span.stop :]])
        copy = replace(row, input_ids=ids[:max_length], labels=labels[:max_length])
        out.append(copy if copy.n_labelled else None)
    return out


def _words(answer: np.ndarray, end: int | None, starts: np.ndarray | None) -> tuple[Words, np.ndarray]:
    """The words of an answer, and the token that ends it, if it does."""
    n = len(answer) - 1 if answer[-1] == end and len(answer) > 1 else len(answer)
    body = answer[:n]
    cuts = np.arange(1, n) if starts is None else 1 + np.flatnonzero(starts[body[1:]])
    return np.split(body, cuts), answer[n:]


def _deleted(words: Words, pool: Words, rng: np.random.Generator) -> Words | None:
    if len(words) < 2:
        return None
    n = min(len(words) - 1, max(1, round(rng.uniform(*CHANGED) * len(words))))
    kept = np.sort(rng.permutation(len(words))[n:])
    return [words[k] for k in kept]


def _inserted(words: Words, pool: Words, rng: np.random.Generator) -> Words | None:
    out = list(words)
    for _ in range(max(1, round(rng.uniform(*CHANGED) * len(words)))):
        out.insert(int(rng.integers(len(out) + 1)), pool[int(rng.integers(len(pool)))])
    return out


def _truncated(words: Words, pool: Words, rng: np.random.Generator) -> Words | None:
    return words[: max(1, round(rng.uniform(*KEPT) * len(words)))] if len(words) > 1 else None


_CHANGES: dict[str, Callable[[Words, Words, np.random.Generator], Words | None]] = {
    "words deleted": _deleted,
    "words inserted": _inserted,
    "truncated": _truncated,
}
KINDS = ("swapped", *_CHANGES)
