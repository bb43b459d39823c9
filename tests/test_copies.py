"""Rows with another answer: what a collator made of their images and masks is what it would make of that row."""

import numpy as np
import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from forvalue_callbacks.data.copies import answer_can_change, copy_of, with_tokens
from forvalue_callbacks.data.reader import Reader, row_of
from forvalue_callbacks.data.sample import Segment
from forvalue_callbacks.data.sft import Row, RowPreparer
from helpers.vision import build_vlm, image_rows, turn

NEW = pytest.mark.newest
ANSWERS = ["blueberry pie and the sky is blue today", "pie", "the sky"]


def answered(row, answer):
    """The same row with another answer; one of messages goes on with another turn."""
    if "completion" in row:
        return {**row, "completion": " " + answer}
    return {**row, "messages": [*row["messages"][:-1], turn("assistant", answer), turn("user", "it is")]}


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llava", "pairs"),
        pytest.param("qwen2_5_vl", "pairs", marks=NEW),
        ("gemma3", "pairs"),
        ("idefics3", "pairs"),
        pytest.param("gemma3", "messages", marks=NEW),
        pytest.param("mllama", "messages", marks=NEW),
    ],
)
def test_a_copy_is_what_the_collator_makes_of_a_row_with_that_answer(family, form):
    _, processor = build_vlm(family)
    labelled = "completion_only_loss" if form == "pairs" else "assistant_only_loss"
    reader = Reader(RowPreparer(), DataCollatorForVisionLanguageModeling(processor, **{labelled: True}))
    (row,) = image_rows(family, form, [2])
    samples = [reader.sample(7, answered(row, answer)) for answer in ANSWERS]
    for one in samples:
        for other in samples:
            copy = copy_of(one, row_of(other.segments[0]))
            (segment,), (want,) = copy.segments, other.segments
            made, wanted = segment.load(), want.load()
            assert made.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(made[name], value), name
            np.testing.assert_array_equal(segment.at, want.at)
            np.testing.assert_array_equal(segment.target, want.target)
            np.testing.assert_array_equal(segment.ids, want.ids)
            assert (copy.index, segment.n_prompt, segment.tokens) == (7, want.n_prompt, None)
    assert len({copy_of(samples[0], row_of(x.segments[0])).digest for x in samples}) == len(samples)


def test_a_copy_of_a_row_of_tokens_is_that_row():
    sample = Reader(RowPreparer()).sample(3, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    copy = copy_of(sample, Row(np.array([5, 8, 9, 9]), np.array([-100, 8, 9, 9])))
    assert copy.segments[0].tokens.tolist() == [5, 8, 9, 9]
    assert (copy.index, copy.segments[0].target.tolist()) == (3, [8, 9, 9])


def segment(inputs, target=(7, 8)):
    ids = np.array([4, 5, 6, 7, 8])
    return Segment(
        {"input_ids": torch.from_numpy(ids)[None], **inputs}, np.array([2, 3]), np.array(target), 3, read=ids
    )


def test_padding_stays_and_positions_go_on():
    inputs = {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]]), "position_ids": torch.tensor([[0, 0, 1, 2, 3]])}
    pixels = {"pixel_attention_mask": torch.arange(5)[None], "pixel_values": torch.rand(1, 5)}
    made = with_tokens(segment({**inputs, **pixels}), np.array([4, 5, 6, 9, 9, 9, 8]))
    assert made["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1, 1]]
    assert made["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4, 5]]
    assert all(made[name] is value for name, value in pixels.items())


@pytest.mark.parametrize(
    ("inputs", "can"),
    [
        ({"token_type_ids": torch.zeros(1, 5)}, True),
        ({"cross_attention_mask": torch.zeros(1, 5, 1, 4)}, True),
        ({"pixel_attention_mask": torch.zeros(1, 2, 5, 5)}, True),
        ({"position_ids": torch.zeros(3, 1, 5)}, False),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, False),
    ],
)
def test_inputs_of_which_nobody_knows_what_they_have_one_for_are_not_changed(inputs, can):
    assert answer_can_change(segment(inputs)) == can


def test_answers_that_the_model_does_not_read_are_not_changed():
    assert answer_can_change(segment({}))
    assert not answer_can_change(segment({}, target=(7, 9)))
    assert not answer_can_change(Segment({"input_ids": torch.tensor([[4, 5]])}, np.array([0]), np.array([1])))
