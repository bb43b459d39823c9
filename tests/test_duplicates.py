"""Rows that are there twice: by a loop over all pairs of sets, and whatever templates, copies and sizes there are."""

import json

import numpy as np
import pytest

from forvalue_callbacks.data import duplicates
from forvalue_callbacks.data.duplicates import Duplicates, find_duplicates
from forvalue_callbacks.data.reader import sample_of
from forvalue_callbacks.data.sample import Sample
from forvalue_callbacks.data.sft import Row
from forvalue_callbacks.report.words import about_duplicates

TEMPLATE = list(range(200, 800))


def tokens(rng, n):
    return rng.integers(1000, 1_000_000, n).tolist()


def changed(rng, ids, n):
    """The same with n tokens changed."""
    out = list(ids)
    for place in rng.choice(len(ids), n, replace=False):
        out[place] = int(rng.integers(1000, 1_000_000))
    return out


def samples(pairs):
    """Of pairs of a prompt and an answer."""
    for index, (prompt, answer) in enumerate(pairs):
        labels = np.array([-100] * len(prompt) + answer)
        yield sample_of(index, Row(np.array(prompt + answer), labels))


def find(train, validation=()):
    return find_duplicates(samples(train), samples(validation))


def shingles(ids):
    return {tuple(ids[i : i + 5]) for i in range(max(1, len(ids) - 4))} if ids else set()


def alike_pairs(rows):
    """By the definition, in sets of tuples."""
    sets = [[shingles(side) for side in row] for row in rows]
    both = ((i, j, list(zip(sets[i], sets[j], strict=True))) for j in range(len(rows)) for i in range(j))
    return {(i, j) for i, j, sides in both if all(len(a & b) >= 0.8 * len(a | b) for a, b in sides)}


def varied(n, seed):
    """Rows of their own, and copies of some with 1 to 3 of 60 to 200 tokens changed on each side."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        if i % 3 == 2:
            prompt, answer = rows[int(rng.integers(len(rows)))]
            rows.append((changed(rng, prompt, rng.integers(1, 4)), changed(rng, answer, rng.integers(1, 4))))
        else:
            rows.append((tokens(rng, rng.integers(60, 200)), tokens(rng, rng.integers(60, 200))))
    return rows


def test_near_rows_are_those_of_a_loop_over_all_pairs():
    rows = varied(300, 0)
    pairs = alike_pairs(rows)
    found = find(rows)
    group = {row: k for k, rows_of_it in enumerate(found.near) for row in rows_of_it}
    assert len(pairs) > 20
    assert set(group) == {row for pair in pairs for row in pair}
    assert all(group[i] == group[j] for i, j in pairs)
    across = find(rows[100:], rows[:100]).leaked_near
    assert {row for row, _ in across} == {j - 100 for i, j in pairs if i < 100 <= j}
    assert all((at, row + 100) in pairs for row, at in across)


def test_the_same_rows_are_found_on_each_side_and_across():
    rng = np.random.default_rng(0)
    a, b, c, d = ((tokens(rng, 20), tokens(rng, 20)) for _ in range(4))
    found = find([a, b, a, c, a, b], [d, c, c, d, a])
    assert found.exact == [[0, 2, 4], [1, 5]]
    assert found.n_exact == 3
    assert found.leaked_exact == [(0, 4), (2, 4), (3, 1), (4, 4)]
    assert found.validation == [[0, 3], [1, 2]]
    assert found.near == found.leaked_near == []
    assert (found.n_train, found.n_validation) == (6, 5)


def test_every_copy_of_a_row_that_nearly_is_a_validation_row_is_named():
    rng = np.random.default_rng(0)
    row = tokens(rng, 200), tokens(rng, 200)
    near = changed(rng, row[0], 1), row[1]
    found = find([near, (tokens(rng, 9), [5]), near, row], [row])
    assert found.leaked_near == [(0, 0), (2, 0)]
    assert found.leaked_exact == [(3, 0)]
    assert found.near == [[0, 3]]
    assert find([], [near, row, near]).validation == [[0, 1, 2]]


@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_agree_on_one_side_alone_are_no_duplicates(side):
    rng = np.random.default_rng(0)
    shared = tokens(rng, 300)
    rows = [[tokens(rng, 20), tokens(rng, 20)] for _ in range(5)]
    for row in rows:
        row[side] = shared
    assert find(rows[1:], rows[:1]).leaked_near == find(rows).near == []


def test_a_template_makes_no_duplicates_and_hides_none():
    """Forty questions in one long template with two answers; one question comes again with a token changed."""
    rng = np.random.default_rng(0)
    questions = [tokens(rng, 60) for _ in range(40)]
    questions.append(changed(rng, questions[7][:30], 1) + questions[7][30:])
    rows = [(TEMPLATE + question, [7 + i % 2 if i < 40 else 8]) for i, question in enumerate(questions)]
    found = find(rows)
    assert found.near == [[7, 40]]
    other = [*rows[:40], (rows[40][0], [7])]  # another class
    assert find(other).near == []


def test_rows_of_a_template_and_nothing_else_are_compared_by_it():
    rng = np.random.default_rng(0)
    answers = [tokens(rng, 100) for _ in range(30)]
    answers.append(changed(rng, answers[3], 1))
    assert find([(TEMPLATE, answer) for answer in answers]).near == [[3, 30]]


def test_texts_without_a_prompt_are_compared_by_all_their_tokens():
    rng = np.random.default_rng(0)
    text = tokens(rng, 100)
    assert find([([], text), ([], [5, *text[1:]]), ([], tokens(rng, 100))]).near == [[0, 1]]


def test_rows_that_cannot_be_scored_and_rows_that_are_not_tokens_alone():
    bad = [Sample(i, (), "0" * 16, "no labels") for i in range(3)]
    assert find_duplicates(bad, bad) == Duplicates(3, 3, [], [], [], [], [])
    (row,) = samples([([3, 4], [5, 6])])
    image = Sample(0, row.segments, "1" * 16), Sample(1, row.segments, "1" * 16)
    made = [Sample(s.index, tuple(type(g)(lambda: {}, g.at, g.target) for g in s.segments), s.digest) for s in image]
    assert find_duplicates(made).exact == [[0, 1]]


def test_nothing_depends_on_how_much_is_in_memory_at_once(monkeypatch):
    rows = varied(100, 1)
    want = find(rows[30:], rows[:30])
    monkeypatch.setattr(duplicates, "CHUNK", 256)
    assert find(rows[30:], rows[:30]) == want


def test_many_rows_that_meet_are_one_group():
    """More than any row is compared with."""
    rng = np.random.default_rng(0)
    text = tokens(rng, 300)
    rows = [(tokens(rng, 60), tokens(rng, 60)) for _ in range(40)]
    rows += [(text, changed(rng, text, 1)) for _ in range(19)]
    assert find(rows).near == [list(range(40, 59))]


def test_what_is_found_goes_through_json():
    rng = np.random.default_rng(0)
    row = tokens(rng, 200), tokens(rng, 200)
    found = find([row, row, (row[0], changed(rng, row[1], 1))], [row])
    assert Duplicates.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.n_near == 1


def test_what_is_found_is_said_with_its_first_rows():
    rng = np.random.default_rng(0)
    row, other = (tokens(rng, 200), tokens(rng, 200)), (tokens(rng, 200), tokens(rng, 200))
    near = changed(rng, row[0], 1), row[1]
    lines = about_duplicates(find([other, row, row, near], [row, (changed(rng, other[0], 1), other[1]), row]))
    assert [line[: line.index(":")] for line in lines] == [
        "duplicates  1 training rows repeat another one (first",
        "duplicates  1 training rows nearly repeat another one (first",
        "leakage     2 of 4 training rows are validation rows too (first",
        "leakage     2 of 4 training rows nearly repeat a validation row (first",
        "leakage     1 of 3 validation rows repeat another one, exactly or nearly (first",
    ]
    assert "(first: rows 1, 2)" in lines[0]
    assert "(first: rows 1, 3)" in lines[1]
    assert "(first: row 1, validation row 0)" in lines[2]
    assert "(first: row 0, validation row 1)" in lines[3]
    assert "(first: rows 0, 2)" in lines[4]
    assert about_duplicates(find([row], [other])) == ["duplicates  none among 1 training and 1 validation rows"]
