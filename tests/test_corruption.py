"""Corrupted copies of rows: the same prompt, and an answer that goes wrong as data goes wrong."""

import numpy as np
import pytest

from forvalue_callbacks.data.corruption import (
    MAIN_KINDS,
    TEXT_KINDS,
    Spelling,
    answer_span,
    corrupted,
    word_starts,
)
from forvalue_callbacks.data.sft import Row
from helpers.answers import EOS, answer, answered, prepared
from helpers.tokenizers import build_tokenizer


@pytest.mark.parametrize("kind", MAIN_KINDS)
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
    lengths = {kind: [] for kind in MAIN_KINDS}
    for kind in MAIN_KINDS:
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


def changed(kind, rows=None, **options):
    """Rows and their copies, side by side."""
    rows = prepared(answered(60)) if rows is None else rows
    copies = corrupted(rows, kind, np.random.default_rng(0), **options)
    return [(row, copy) for row, copy in zip(rows, copies, strict=True) if copy is not None]


def prompt(row):
    return row.input_ids[: answer_span(row).start].tolist()


def test_other_changes_of_tokens_are_what_they_say():
    for row, copy in changed("words shuffled"):
        assert sorted(answer(copy)) == sorted(answer(row)) != answer(copy)
        assert answer(copy)[-1] == EOS
    for row, copy in changed("repeated text"):
        own = answer(row)[:-1]
        assert answer(copy) in [own * k + [EOS] for k in (2, 3, 4)]
    for row, copy in changed("prompt echoed"):
        assert answer(copy) == [*prompt(row), EOS]
    pairs = changed("prompt truncated")
    assert len(pairs) > 45
    for row, copy in pairs:
        assert answer(copy) == answer(row)
        assert prompt(copy) == prompt(row)[: len(prompt(copy))] != prompt(row)


def test_the_tokens_of_a_template_stay_in_the_prompt_and_out_of_its_echo():
    rows = [Row(np.array([3, 4, a, b, c, 5, a + 20, EOS]), np.array([-100] * 6 + [a + 20, EOS]))
            for a, b, c in ((7, 8, 9), (10, 11, 12), (13, 14, 15))]  # fmt: skip
    for row, copy in changed("prompt echoed", rows):
        assert answer(copy) == [*row.input_ids[2:5], EOS]
    for _, copy in changed("prompt truncated", rows):
        assert prompt(copy)[:2] == [3, 4]
        assert prompt(copy)[-1] == 5
        assert len(prompt(copy)) < 6


def test_the_answer_of_a_similar_prompt_is_that_of_the_nearest_one_that_differs():
    four = ((10, 11, 12, 30), (10, 11, 13, 31), (20, 21, 22, 32), (20, 21, 23, 33), (20, 21, 22, 32))
    four = ((10, 11, 12, 30), (10, 11, 13, 31), (20, 21, 22, 32), (20, 21, 23, 33), (20, 21, 22, 32))
    rows = [Row(np.array([a, b, c, d, EOS]), np.array([-100] * 3 + [d, EOS]))
            for a, b, c, d in four]  # fmt: skip
    copies = corrupted(rows, "answer of a similar prompt", np.random.default_rng(0))
    assert [answer(copy)[0] for copy in copies] == [31, 30, 33, 32, 33]


def test_no_answer_echoes_the_place_of_an_image_and_pictures_asked_about_alike_swap_their_answers():
    image, rows = 66, []
    for i in range(6):
        prompt = [image, image, 3, 10 + i, 4]
        ids = np.array([*prompt, 20 + i, 30 + i, EOS])
        rows.append(Row(ids, np.where(np.arange(8) < 5, -100, ids)))
    rng = np.random.default_rng(0)
    plain, other = (corrupted([row, *rows], "prompt echoed", rng, places=[10])[0] for row in rows[:2])
    assert (answer(plain) if plain is not None else None, answer(other)) == (None, [11, EOS])
    alike = [Row(np.where(np.arange(8) == 3, 9, row.input_ids), row.labels) for row in rows]
    copies = corrupted(alike, "answer of a similar prompt", rng, places=[image])
    said = [tuple(answer(copy)) for copy in copies]
    assert sorted(said) == sorted(tuple(answer(row)) for row in rows)
    assert all(one != tuple(answer(row)) for one, row in zip(said, rows, strict=True))


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_changes_of_text_need_a_tokenizer_and_keep_prompt_and_end(kind):
    tokenizer = build_tokenizer()
    texts = ["The cat sat on the mat.", "Dogs are good.", "Yes it is so."] * 4
    rows = []
    for k, text in enumerate(texts):
        ids = [5 + k, *tokenizer(" " + text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(Row(np.array(ids), np.array([-100, *ids[1:]])))
    assert corrupted(rows, kind, np.random.default_rng(0)) == [None] * len(rows)
    pairs = changed(kind, rows, spelling=Spelling.of(tokenizer))
    assert pairs
    for row, copy in pairs:
        assert prompt(copy) == prompt(row)
        assert answer(copy)[-1] == tokenizer.eos_token_id
        assert answer(copy)[:-1] != answer(row)[:-1]


def test_without_a_tokenizer_there_is_no_spelling():
    assert Spelling.of(None) is None
    assert Spelling.of(object()) is None


def test_a_text_is_spelled_with_a_space_before_it_where_the_answer_was():
    spelling = Spelling.of(build_tokenizer())
    for side in ("", " "):
        like = np.array(spelling.tokenizer(side + "cat", add_special_tokens=False)["input_ids"])
        want = spelling.tokenizer(side + "the mat", add_special_tokens=False)["input_ids"]
        assert spelling.tokens("the mat", like).tolist() == want
