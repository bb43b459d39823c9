"""Corrupted copies of rows: the same prompt, and an answer that goes wrong as data goes wrong."""

import numpy as np
import pytest

from forvalue_callbacks.data.corruption import KINDS, answer_span, corrupted, word_starts
from forvalue_callbacks.data.sft import Row
from helpers.answers import EOS, answer, answered, prepared


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_the_prompt_of_its_row_and_another_answer_that_still_ends(kind):
    rows = prepared(answered(60))
    copies = corrupted(rows, kind, np.random.default_rng(0))
    changed = [(row, copy) for row, copy in zip(rows, copies, strict=True) if copy is not None]
    assert len(changed) > 45
    for row, copy in changed:
        start = answer_span(row).start
        assert copy.input_ids[:start].tolist() == row.input_ids[:start].tolist()
        assert (copy.labels[:start] == -100).all()
        assert copy.input_ids[start:].tolist() == answer(copy) != answer(row)
        assert answer(copy)[-1] == EOS
        words, own = answer(copy)[:-1], answer(row)[:-1]
        if kind == "swapped":
            assert any(answer(copy) == answer(other) for other in rows)
        elif kind == "truncated":
            assert words == own[: len(words)]
            assert len(words) < len(own)
        else:
            longer, shorter = (words, own) if kind == "words inserted" else (own, words)
            rest = iter(longer)
            assert all(token in rest for token in shorter), "one is the other with words left out, in order"
            assert len(longer) > len(shorter)


def test_a_row_that_cannot_be_changed_has_no_copy():
    rows = prepared([{"input_ids": [3, 4, EOS], "labels": [-100, 4, EOS]}] * 5)
    assert corrupted(rows, "words deleted", np.random.default_rng(0)) == [None] * 5
    assert corrupted(rows, "swapped", np.random.default_rng(0)) == [None] * 5, "the same answer everywhere"


def test_words_are_deleted_whole():
    starts = np.zeros(67, dtype=bool)
    starts[:30] = True
    row = Row(np.arange(20, 40), np.array([-100, *range(21, 40)]))  # words 21, ..., 28, one from 29 on, the end
    for seed in range(5):
        (copy,) = corrupted([row], "words deleted", np.random.default_rng(seed), starts)
        kept = answer(copy)
        assert (29 in kept) == (35 in kept) == (38 in kept)


def test_as_many_words_change_as_the_kind_says_and_rows_keep_to_their_longest():
    words, end = 40, np.array([EOS])
    rows = [Row(np.concatenate([[3], k + np.arange(words), end]), np.concatenate([[-100], k + np.arange(words), end]))
            for k in range(100, 100 + 50 * words, words)]  # fmt: skip
    lengths = {kind: [] for kind in KINDS}
    for kind in KINDS:
        copies = corrupted(rows, kind, np.random.default_rng(0))
        lengths[kind] = [len(answer(copy)) - 1 for copy in copies]
        foreign = [
            sum(token not in row.labels for token in answer(copy)) for row, copy in zip(rows, copies, strict=True)
        ]
        if kind == "words inserted":
            assert sum(foreign) > 0.9 * sum(n - words for n in lengths[kind]), "words of all answers"
        cut = corrupted(rows, kind, np.random.default_rng(0), max_length=7)
        for copy, short in zip(copies, cut, strict=True):
            np.testing.assert_array_equal(short.input_ids, copy.input_ids[:7])
            np.testing.assert_array_equal(short.labels, copy.labels[:7])
    for kind, low, high in (("words deleted", 20, 36), ("words inserted", 44, 60), ("truncated", 8, 32)):
        assert low <= min(lengths[kind]) < low + 4 < high - 4 < max(lengths[kind]) <= high, kind


def test_the_answer_is_the_longest_run_of_labels():
    labels = np.array([-100, 5, -100, 6, 7, 8, -100, 9, 10])
    assert answer_span(Row(labels, labels)) == slice(3, 6)


def test_word_starts_come_from_the_tokenizers_spelling():
    class Tokenizer:
        def __len__(self):
            return 4

        def convert_ids_to_tokens(self, ids):
            return [["\u0120a", "b", "\u2581c", None][i] for i in ids]

    assert word_starts(Tokenizer(), 6).tolist() == [True, False, True, False, False, False]
    assert word_starts(None, 6) is None
