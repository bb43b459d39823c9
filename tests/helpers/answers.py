"""Rows with answers: random ones that end with EOS, and ones that repeat."""

import numpy as np

from forvalue_callbacks.data.sft import RowPreparer

EOS = 2


def rows_of(n, seed, noise=0.0):
    """Rows whose prompt holds the token that decides the answer, one of three; and which answers are wrong."""
    rng = np.random.default_rng(seed)
    rows, wrong = [], rng.random(n) < noise
    for is_wrong in wrong:
        kind = int(rng.integers(3))
        prompt = [*rng.integers(20, 60, int(rng.integers(2, 6))).tolist(), 3 + kind]
        answer = 10 + (kind + (int(rng.integers(1, 3)) if is_wrong else 0)) % 3
        rows.append({"input_ids": [*prompt, answer], "labels": [-100] * len(prompt) + [answer]})
    return rows, wrong


def answered(n, seed=0, vocab=67):
    """Rows of a prompt and an answer of two to eight tokens that ends with EOS."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt, answer = (rng.integers(3, vocab, rng.integers(lo, 9)) for lo in (3, 2))
        ids = np.concatenate([prompt, answer, [EOS]])
        labels = np.concatenate([np.full(len(prompt), -100), answer, [EOS]])
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def prepared(rows):
    prepare = RowPreparer()
    return [prepare(row) for row in rows]


def answer(row):
    return row.labels[row.labels != -100].tolist()
