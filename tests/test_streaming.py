"""Streams: scored as they come, filtered by a cut learnt on their first rows, and in trainers."""

import logging

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from forvalue_callbacks import ForValueTransform, Keep, Relabel, Reweight, Threshold, filter_stream
from forvalue_callbacks.policies import Drop
from helpers.models import build_model, build_rows

TRAIN, VALIDATION = build_rows(24, seed=1), build_rows(6, seed=2)
NO_LABELS = {"input_ids": [5, 6], "labels": [-100, -100]}


def stream_of(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


def scored(values):
    return stream_of([{"row": i, "forvalue_score": value} for i, value in enumerate(values)])


def kept_of(stream):
    return [row["row"] for row in stream]


def test_a_stream_has_the_columns_that_the_same_rows_have_in_a_data_set():
    rows = [*TRAIN[:5], NO_LABELS, *TRAIN[5:]]
    transform = ForValueTransform(build_model(), VALIDATION)
    options = {"batched": True, "batch_size": 8}
    want = Dataset.from_list(rows).map(transform, **options).to_list()
    got = list(stream_of(rows).map(transform, **options))
    assert [row["forvalue_reason"] for row in got] == [row["forvalue_reason"] for row in want]
    scores = [[row["forvalue_score"] for row in rows] for rows in (got, want)]
    assert np.array_equal(*scores, equal_nan=True)
    assert [row["input_ids"] for row in got] == [row["input_ids"] for row in want]


def test_the_cut_is_learnt_on_the_window_and_later_rows_are_judged_by_it_in_every_epoch():
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000)
    stream = filter_stream(scored(values), "drop:0.3", window=400)
    cut = np.sort(values[:400])[120]
    want = np.flatnonzero(values >= cut).tolist()
    assert kept_of(stream) == want
    assert kept_of(stream) == want, "a second epoch"
    assert 0.65 < len(want) / 5000 < 0.75
    later = np.concatenate([values[:400], values[400:] - 10])
    assert max(kept_of(filter_stream(scored(later), Drop(0.3), window=400))) < 400


@pytest.mark.parametrize(
    ("policy", "cut"),
    [(Threshold(0.15), 0.15), (Keep(0.3), 7.0), (Drop(0.5).then(Drop(0.5)), 7.0), ("drop:0.5+threshold:0.0", 5.0)],
    ids=str,
)
def test_each_policy_has_its_own_cut(policy, cut):
    values = [*range(10), 0.1, 0.2, 4.5, 5.5, 6.5, 7.5]
    assert kept_of(filter_stream(scored(values), policy, window=10)) == [i for i, v in enumerate(values) if v >= cut]


def test_rows_without_a_score_stay_and_what_goes_is_counted(caplog):
    caplog.set_level(logging.INFO, "forvalue_callbacks")
    values = [float("nan"), *range(9), float("nan"), *range(5)]
    stream = filter_stream(scored(values), Threshold(4), window=4 * 2)
    assert kept_of(stream) == [0, *range(5, 11), 15]
    assert "threshold:4 keeps 3 of the first 8 rows of the stream: rows that score less than 4 are" in caplog.text
    assert "of 8 rows of the stream 4 are kept (1 of them without a score, forvalue_reason" in caplog.text
    assert "of 16 rows of the stream 8 are kept (2 of them" in caplog.text
    assert "and 8 dropped" in caplog.text


def test_scored_and_filtered_it_reads_no_more_than_it_must():
    read = []

    def endless():
        while True:
            for row in TRAIN:
                read.append(1)
                yield row

    transform = ForValueTransform(build_model(), VALIDATION)
    stream = IterableDataset.from_generator(endless).map(transform, batched=True, batch_size=4)
    clean = filter_stream(stream, Drop(0.5), window=24)
    assert len(read) <= 32
    read.clear()
    values = np.array(Dataset.from_list(TRAIN).map(transform, batched=True, batch_size=4)["forvalue_score"])
    want = [TRAIN[i]["input_ids"] for i in np.flatnonzero(Drop(0.5)(values))]
    assert [row["input_ids"] for row in clean.take(24)] == want * 2
    assert len(read) <= 52


@pytest.mark.parametrize(
    ("policy", "match"),
    [
        (Reweight(), "weights rows.*use Drop"),
        ("drop:auto", "log odds.*use ForValueCallback"),
        (Keep(100), r"Keep\(0.5\)"),
        (Drop(0.1).then(Keep(3)), r"Keep\(0.5\)"),
        (Drop(0.2, group_column="source"), "within groups"),
        (Relabel(0.9), "prefilter"),
        (Threshold(100.0), "drops all 5 scored rows"),
    ],
    ids=str,
)
def test_policies_that_cannot_judge_a_row_by_itself_are_refused(policy, match):
    with pytest.raises(ValueError, match=match):
        filter_stream(scored(range(5)), policy)


def test_what_is_no_stream_of_scored_rows_is_refused():
    with pytest.raises(TypeError, match=r"a Dataset is no stream.*dataset\.select"):
        filter_stream(Dataset.from_list(TRAIN))
    with pytest.raises(ValueError, match=r"no column 'forvalue_score'.*ForValueTransform"):
        filter_stream(stream_of(TRAIN))
    with pytest.raises(ValueError, match="none of the 2 rows has a score"):
        filter_stream(scored([float("nan")] * 2))
