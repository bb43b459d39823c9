"""Answers of training rows that are never those of validation rows are said to be in another form."""

import logging

import numpy as np

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.methods.auto import _warn_of_other_forms
from helpers.models import build_model

EOS = 2


def rows(n, seed, *, eos):
    generator = np.random.default_rng(seed)
    out = []
    for i in range(n):
        prompt, answer = generator.integers(10, 60, 5).tolist(), [3 + i % 3, *([EOS] if eos else [])]
        out.append({"input_ids": prompt + answer, "labels": [-100] * 5 + answer})
    return out


def test_answers_in_another_form_are_told(caplog):
    scorer = ForValueScorer(build_model(), rows(40, 0, eos=True), ForValueConfig("auto"), progress=False)
    with caplog.at_level(logging.WARNING):
        scorer.score(rows(12, 1, eos=False))
    assert "0 of 12 training rows have an answer that a validation row has, token for token" in caplog.text
    assert "nearly all answers end with the same token, as with EOS" in caplog.text


def test_answers_in_one_form_are_not(caplog):
    answers = [np.array([3 + i, EOS]).tobytes() for i in range(3)]
    _warn_of_other_forms(answers, [*answers, b"other"])
    assert not caplog.records
