"""Answers of training rows that are never those of validation rows are said to be in another form."""

import logging

import numpy as np
import pytest
from conftest import build_model

from forvalue_callbacks import ForValueConfig, ForValueScorer

EOS = 2


def rows(n, seed, *, eos):
    generator = np.random.default_rng(seed)
    out = []
    for i in range(n):
        prompt, answer = generator.integers(10, 60, 5).tolist(), [3 + i % 3, *([EOS] if eos else [])]
        out.append({"input_ids": prompt + answer, "labels": [-100] * 5 + answer})
    return out


@pytest.mark.parametrize("direction", ["auto", "labels"])
def test_answers_in_another_form_are_told(direction, caplog):
    scorer = ForValueScorer(build_model(), rows(60, 0, eos=True), ForValueConfig(direction), progress=False)
    with caplog.at_level(logging.WARNING):
        scorer.score(rows(30, 1, eos=True))
        assert "token for token" not in caplog.text
        scorer.score(rows(30, 1, eos=False))
    assert "0 of 30 training rows have an answer that a validation row has, token for token" in caplog.text
    assert "nearly all answers end with the same token, as with EOS" in caplog.text
