"""`map` in every way in which it hands over rows: scored, or a message that says how."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from forvalue_callbacks import ForValueScorer, ForValueTransform
from helpers.models import build_model, build_rows
from helpers.tokenizers import build_tokenizer, chatml

TRAIN, VALIDATION = build_rows(6, seed=1), build_rows(5, seed=2)
BAD = {"input_ids": [5, 6], "labels": [-100, -100]}


@pytest.fixture
def transform():
    return ForValueTransform(build_model(), iter(VALIDATION))


@pytest.fixture(scope="module")
def want():
    return ForValueScorer(build_model(), VALIDATION, progress=False).score(TRAIN).values


@pytest.mark.parametrize("form", [None, "numpy", "torch", "pandas", "arrow"])
def test_every_format_gives_the_scores_and_keeps_the_columns(form, transform, want):
    data = Dataset.from_list([{**row, "text": "x"} for row in [*TRAIN, BAD]]).with_format(form)
    mapped = data.map(transform, batched=True, batch_size=4).with_format(None)
    assert np.allclose(mapped["forvalue_score"][:-1], want, rtol=1e-5, atol=1e-6)
    assert mapped["forvalue_reason"][:-1] == [None] * len(TRAIN)
    assert "no labelled tokens" in mapped["forvalue_reason"][-1]
    assert mapped["input_ids"] == [row["input_ids"] for row in [*TRAIN, BAD]]
    assert mapped["text"] == ["x"] * 7
    again = mapped.with_format(form).map(transform, batched=True).with_format(None)
    assert again.column_names == mapped.column_names


@pytest.mark.parametrize("form", ["pandas", "numpy"])
def test_conversations_come_through_other_formats(form):
    turns = [[{"role": "user", "content": f"the sky {i}"}, {"role": "assistant", "content": "blue"}] for i in range(3)]
    rows, tokenizer = [{"messages": turn} for turn in turns], build_tokenizer(chatml())
    model = build_model()
    model.resize_token_embeddings(400)
    transform = ForValueTransform(model, rows, processing_class=tokenizer)
    mapped = Dataset.from_list(rows).with_format(form).map(transform, batched=True).with_format(None)
    assert mapped["forvalue_reason"] == [None] * 3


@pytest.mark.parametrize(
    "options", [{"with_indices": True}, {"with_rank": True}, {"with_indices": True, "with_rank": True}], ids=str
)
def test_indices_and_ranks_are_no_columns(options, transform, want):
    mapped = Dataset.from_list(TRAIN).map(transform, batched=True, **options)
    assert np.allclose(mapped["forvalue_score"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", ["input_ids", ["input_ids", "labels"]])
def test_columns_without_names_are_refused(names, transform):
    with pytest.raises(ValueError, match=r"ForValueTransform needs the names of the columns.*select_columns"):
        Dataset.from_list(TRAIN).map(transform, batched=True, input_columns=names)


ONE = {
    "text": {"text": "hello there"},
    "pairs": {"prompt": "what ", "completion": "a cat"},
    "messages": {"messages": [{"role": "user", "content": "hi"}]},
    "message pairs": {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "user", "content": "x"}]},
    "tokens": {"input_ids": [3, 4, 5], "labels": [3, 4, 5]},
    "other columns": {"question": "what", "n": 3},
}


@pytest.mark.parametrize("stream", [False, True], ids=["data set", "stream"])
@pytest.mark.parametrize("form", [None, "torch"])
@pytest.mark.parametrize("row", ONE.values(), ids=ONE)
def test_a_row_in_place_of_a_batch_is_refused(row, form, stream, transform):
    data = Dataset.from_list([row] * 3)
    data = data.to_iterable_dataset() if stream else data
    with pytest.raises(ValueError, match=r"ForValueTransform scores batches of rows.*batched=True"):
        next(iter(data.with_format(form).map(transform)))


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"batch_size": 2, "writer_batch_size": 2}], ids=str)
@pytest.mark.parametrize("form", [None, "pandas", "arrow"])
def test_a_first_reason_may_come_late(options, form, transform):
    mapped = Dataset.from_list([*TRAIN, BAD]).with_format(form).map(transform, batched=True, **options)
    assert mapped.features.arrow_schema.field("forvalue_reason").type == pa.string()
    assert mapped.features.arrow_schema.field("forvalue_score").type == pa.float64()
    assert mapped.with_format(None)["forvalue_reason"][-1]


def test_a_first_score_may_come_late(transform):
    mapped = Dataset.from_list([BAD, BAD, *TRAIN]).map(transform, batched=True, batch_size=2)
    assert np.isnan(mapped["forvalue_score"]).tolist() == [True, True] + [False] * 6
