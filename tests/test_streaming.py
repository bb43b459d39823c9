"""Streams: scored as they come, filtered by a cut learnt on their first rows, and in trainers."""

from itertools import chain, count, islice

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from forvalue_callbacks import (
    Drop,
    ForValueCallback,
    ForValueConfig,
    ForValueScorer,
    ForValueScores,
    ForValueTransform,
    Keep,
    Relabel,
    Reweight,
    Threshold,
    filter_stream,
    prefilter,
)
from forvalue_callbacks.tiny import instructions
from helpers.models import build_model
from helpers.oracles import relative
from helpers.trainers import TRAIN, VALIDATION, Passes, make_sft, make_trainer, rows_with_id

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


def test_rows_without_a_score_stay_and_what_goes_is_counted(capfd, plain):
    values = [float("nan"), *range(9), float("nan"), *range(5)]
    stream = filter_stream(scored(values), Threshold(4), window=4 * 2)
    assert kept_of(stream) == [0, *range(5, 11), 15]
    said = capfd.readouterr().err
    assert "threshold:4 keeps 3 of the first 8 rows of the stream: rows that score less than 4 are" in said
    assert "of 8 rows of the stream 4 are kept (1 of them without a score: forvalue_reason" in said
    assert "of 16 rows of the stream 8 are kept (2 of them" in said
    assert "and 8 dropped" in said


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


# ---- in trainers ----


class Endless(torch.utils.data.IterableDataset):
    """The rows over and over, in an order of their own each time round."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        for place in chain.from_iterable(np.random.default_rng(k).permutation(len(self.rows)) for k in count()):
            yield self.rows[place]


def sharded(rows):
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=3)


def places(rows):
    return [row["input_ids"][0] - 3 for row in rows]


def trained_on(trainer):
    """Rows by their number, as they come; those that are looked at alone, to tell them, do not count."""
    trainer.train()
    return [place for batch in trainer.seen if len(batch) > 1 for place in batch]


@pytest.mark.parametrize("options", [{}, {"accelerator_config": {"dispatch_batches": True}}], ids=["", "dispatched"])
@pytest.mark.parametrize("form", [stream_of, Endless, sharded])
def test_a_trainer_leaves_out_what_a_policy_drops_of_the_rows_that_it_takes(tmp_path, form, options):
    stream = form(rows_with_id())
    first = list(islice(iter(stream), 16))
    callback = ForValueCallback(VALIDATION, Drop(0.25))
    trainer = make_trainer(tmp_path, [callback], train=stream, max_steps=3, **options)
    seen = trained_on(trainer)
    want = ForValueScorer(build_model(), VALIDATION, progress=False).score(first)
    assert relative(callback.scores.values, want.values) < 1e-5
    assert callback.weights.tolist() == Drop(0.25)(want.values).tolist()
    assert seen[:12] == places(row for row, stays in zip(first, callback.weights, strict=True) if stays)
    assert trainer.state.global_step == 3
    (entry,) = [entry for entry in trainer.state.log_history if "forvalue_kept" in entry]
    assert (entry["forvalue_kept"], entry["forvalue_dropped"]) == (12, 4)
    assert "forvalue_draws_per_kept_row_mean" not in entry


def test_a_short_stream_comes_again_by_the_same_decisions_shuffled_or_not(tmp_path, caplog):
    callback = ForValueCallback(VALIDATION, Drop(0.5))
    plain = trained_on(make_trainer(tmp_path, [callback], train=stream_of(rows_with_id()), max_steps=9))
    stay = np.flatnonzero(callback.weights).tolist()
    assert len(stay) == 12
    assert plain[:36] == stay * 3
    shuffled = stream_of(rows_with_id()).shuffle(seed=1, buffer_size=24)
    epochs = np.reshape(trained_on(make_trainer(tmp_path, [callback], train=shuffled, max_steps=9))[:36], (3, 12))
    assert [sorted(epoch) for epoch in epochs.tolist()] == [stay] * 3
    assert epochs[0].tolist() != epochs[1].tolist(), "shuffled anew"
    assert "another than when it was scored" not in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_where_the_kept_rows_of_a_longer_stream_run_out_they_come_again(tmp_path, workers, caplog):
    stream = stream_of(rows_with_id() * 4).shuffle(seed=1, buffer_size=96)
    order = places(islice(iter(stream), 32))
    below = ForValueScorer(build_model(), VALIDATION, progress=False).score(rows_with_id()).values < 0
    assert below.any()
    callback = ForValueCallback(VALIDATION, Threshold(0.0))
    trainer = make_trainer(
        tmp_path, [callback], train=stream, max_steps=4, gradient_accumulation_steps=2, dataloader_num_workers=workers
    )
    taken = trained_on(trainer)
    assert (callback.weights == 0).tolist() == below[order].tolist()
    assert trainer.state.global_step == 4
    if workers == 0:  # else they are collated in another process
        stay = [row for row in order if not below[row]]
        assert len(stay) % 4 != 1, "none is alone in its batch"
        assert taken[:32] == [*stay, *stay][:32]
    assert "another than when it was scored" not in caplog.text


@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # transformers 4 with bf16 on a CPU
def test_sft_with_its_default_precision_has_the_scores_of_a_data_set(tmp_path):
    rows, validation = instructions(40, seed=0, noise=0.2), instructions(20, seed=1)
    streamed, loaded = (ForValueCallback(validation, Drop(0.25)) for _ in range(2))
    trainer = make_sft(tmp_path, [streamed], train=rows.to_iterable_dataset(), max_steps=6, bf16=True)
    trainer.train()
    assert trainer.state.global_step == 6
    assert (tmp_path / "forvalue_report.html").is_file()
    make_sft(tmp_path / "b", [loaded], train=rows, max_steps=1, bf16=True).train()
    assert np.array_equal(streamed.scores.values, loaded.scores.values)
    assert np.array_equal(streamed.weights, loaded.weights)
    assert streamed.scores.metadata["provenance"] == loaded.scores.metadata["provenance"]


def test_rows_without_a_score_stay_in_training_with_a_reason(tmp_path, caplog):
    rows = rows_with_id()
    rows[3] = {**rows[3], "labels": [-100] * len(rows[3]["labels"])}
    callback = ForValueCallback(VALIDATION, Drop(0.5))
    seen = trained_on(make_trainer(tmp_path, [callback], train=stream_of(rows), max_steps=3))
    assert np.flatnonzero(np.isnan(callback.scores.values)).tolist() == [3]
    assert callback.weights[3] == 1
    assert 3 in seen
    assert "1 rows have no score and are trained on: 1 x no labelled tokens" in caplog.text


def test_a_dry_run_leaves_the_stream_as_it_is(tmp_path):
    callback = ForValueCallback(VALIDATION, Drop(0.5), dry_run=True)
    assert trained_on(make_trainer(tmp_path, [callback], train=stream_of(rows_with_id()), max_steps=4))[:16] == [
        *range(16)
    ]
    assert len(callback.scores) == 24


def test_a_resumed_run_has_the_scores_from_before_its_first_step(tmp_path):
    def trainer(callback):
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        return make_trainer(tmp_path, [callback], train=stream_of(rows_with_id()), **options)

    first, second = (ForValueCallback(VALIDATION, Drop(0.25)) for _ in range(2))
    whole = trained_on(trainer(first))
    resumed = trainer(second)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    seen = [place for batch in resumed.seen if len(batch) > 1 for place in batch]
    assert np.array_equal(first.scores.values, second.scores.values)
    assert resumed.state.global_step == 6
    assert [*map(int, seen)][-len(whole) :] == whole, "skipped by reading on"


def test_rows_that_were_not_there_before_are_named_and_trained_on(tmp_path, caplog):
    class Drifting(torch.utils.data.IterableDataset):
        n_read = 0

        def __iter__(self):
            self.n_read += 1
            rows = rows_with_id()
            rows[7] = {**rows[7], "input_ids": [3 + 7, 10 + self.n_read % 5, *rows[7]["input_ids"][2:]]}
            return iter(rows)

    callback = ForValueCallback(VALIDATION, Drop(0.5), verbose=False)
    assert 7 in trained_on(make_trainer(tmp_path, [callback], train=Drifting(), max_steps=3))
    assert caplog.text.count("row 7 of the stream is another than when it was scored") >= 1


class OneShot(torch.utils.data.IterableDataset):
    def __init__(self):
        self.rows = iter(rows_with_id())

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize(
    ("policy", "train", "options", "match"),
    [
        (Drop(0.2), OneShot, {}, r"begins otherwise each time.*filter_stream\("),
        (Drop(0.2), lambda: stream_of([]), {}, "stream is empty"),
        (Reweight(), None, {}, "weights rows.*use Drop"),
        (Drop(0.2, group_column="source"), None, {}, "leave the groups out"),
        (Drop(0.2), None, {"groups": ["a"]}, "groups are given"),
        (Drop(0.2), None, {"dataloader_num_workers": 2}, "2 workers read a stream.*0 or 1"),
        (Drop(0.2), None, {"scores": ForValueScores([1.0], [None], [0.0], [1])}, "leave scores out"),
    ],
    ids=["one pass", "empty", "weights", "group column", "groups", "workers", "scores"],
)
def test_what_a_stream_cannot_do_is_refused_before_any_row_is_scored(tmp_path, policy, train, options, match):
    train = stream_of(rows_with_id()) if train is None else train()
    mine = {name: options[name] for name in options if name in ("groups", "scores")}
    theirs = {name: options[name] for name in options if name not in mine}
    model = build_model()
    passes = Passes(model)
    callback = ForValueCallback(VALIDATION, policy, **mine)
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, [callback], train=train, model=model, max_steps=2, **theirs).train()
    assert passes.n == 0


def test_a_stream_cannot_be_shortened_nor_its_packs_taken_apart(tmp_path):
    trainer = make_trainer(tmp_path, train=stream_of(rows_with_id()), max_steps=2)
    with pytest.raises(ValueError, match=r"use ForValueCallback, or filter_stream\("):
        prefilter(trainer, VALIDATION)
    rows = instructions(40, seed=0).to_iterable_dataset()
    callback = ForValueCallback(instructions(10, seed=1))
    trainer = make_sft(tmp_path, [callback], train=rows, packing=True, max_length=64)
    with pytest.raises(ValueError, match="a stream packs them as they come: set packing=False"):
        trainer.train()
    packs = Dataset.from_list([{**row, "seq_lengths": [1, len(row["input_ids"]) - 1]} for row in rows_with_id()])
    options = {"max_steps": 2, "remove_unused_columns": False}
    trainer = make_trainer(tmp_path, [ForValueCallback(VALIDATION)], train=packs.to_iterable_dataset(), **options)
    with pytest.raises(ValueError, match="a stream packs them as they come: set packing=False"):
        trainer.train()


def test_a_method_that_needs_all_rows_has_those_that_the_run_takes(tmp_path):
    rows, validation = instructions(60, seed=0, noise=0.2), instructions(60, seed=1)
    streamed, loaded = (
        ForValueCallback(validation, Drop(0.25), ForValueConfig(method="label_model"), verbose=False) for _ in range(2)
    )
    make_sft(tmp_path, [streamed], train=rows.to_iterable_dataset(), max_steps=8).train()
    make_sft(tmp_path / "b", [loaded], train=rows, max_steps=1).train()
    assert np.array_equal(streamed.scores.values, loaded.scores.values)
    assert np.array_equal(streamed.weights, loaded.weights)
    assert len(np.unique(loaded.scores.values)) > 10
