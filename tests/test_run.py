"""Forward passes: what runs together, in which thread and dtype, with how much memory."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.data import reader
from forvalue_callbacks.methods.gradient import Gradient
from helpers.models import build_model, build_rows
from helpers.oracles import (
    hidden_states,
    relative,
)

TRAIN, VALIDATION = build_rows(12, seed=1), build_rows(5, seed=2)


def score(model, train=TRAIN, validation=VALIDATION, rows=None, **config):
    return ForValueScorer(model, validation, ForValueConfig(**config), row_config=rows, progress=False).score(train)


def test_tokens_after_the_last_position_that_predicts_are_not_run(monkeypatch):
    model, run = build_model(), []
    forward = model.base_model.forward

    def count(*args, input_ids=None, **kwargs):
        run.append(tuple(input_ids.shape))
        return forward(*args, input_ids=input_ids, **kwargs)

    want = score(model).values
    longer = [
        {"input_ids": row["input_ids"] + [7] * (5 + i), "labels": row["labels"] + [-100] * (5 + i)}
        for i, row in enumerate(TRAIN)
    ]
    monkeypatch.setattr(model.base_model, "forward", count)
    scorer = ForValueScorer(model, VALIDATION, ForValueConfig(max_tokens_per_batch=1), progress=False)
    scorer.direction()
    run.clear()
    assert relative(scorer.score(longer).values, want) < 1e-6
    assert sorted(run) == sorted((1, len(row["input_ids"]) - 1) for row in TRAIN)


def test_the_forward_pass_runs_in_the_dtype_asked_for():
    model, seen = build_model(), set()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    for name, dtype in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        seen.clear()
        run = ForValueScorer(model, VALIDATION, ForValueConfig(forward_dtype=name), progress=False).run
        with torch.no_grad():
            (batch,) = run.positions(list(run.reader.samples(TRAIN[:1])), Gradient())
            with torch.autocast("cpu", torch.bfloat16, enabled=name is not None):
                want = hidden_states(model, TRAIN[0])
        assert seen == {dtype}
        assert relative(batch.hidden_TD, want) < 1e-2


def test_batches_are_joined_until_the_head_has_enough_positions():
    scorer = ForValueScorer(build_model(), VALIDATION, ForValueConfig(max_tokens_per_batch=14), progress=False)
    seen = []

    def sizes(batch):
        seen.append(len(batch.target_T))
        assert len(batch.hidden_TD) == len(batch.target_T) == sum(batch.lengths)
        return {"length": np.array(batch.lengths)}

    (apart,) = scorer.run.windows(TRAIN, Gradient(), sizes, "apart", tile=1)
    n_apart, total = len(seen), sum(seen)
    seen.clear()
    (together,) = scorer.run.windows(TRAIN, Gradient(), sizes, "together", tile=20)
    np.testing.assert_array_equal(together.columns["length"], apart.columns["length"])
    assert sum(seen) == total
    assert len(seen) < n_apart
    assert all(n >= 20 for n in seen[:-1])


def test_the_next_window_is_tokenised_while_the_model_runs(monkeypatch):
    """In a thread of its own; rows are read in that of the caller, the third window after the first one's results."""
    monkeypatch.setattr(reader, "WINDOW", 4)
    asked, tokenised, ready = [], [], threading.Event()

    def rows():
        for row in TRAIN:
            asked.append(threading.current_thread())
            yield row

    scorer = ForValueScorer(build_model(), VALIDATION, progress=False)
    prepare = scorer.run.reader.prepare

    def noted(example):
        tokenised.append(threading.current_thread())
        if len(tokenised) == 8:
            ready.set()
        return prepare(example)

    scorer.run.reader.prepare = noted
    windows = scorer.run.windows(rows(), Gradient(), lambda batch: {"n": np.array(batch.lengths)}, "rows")
    assert len(next(windows).samples) == 4
    assert ready.wait(10)
    assert len(asked) == 8
    assert sum(len(window.samples) for window in windows) == len(TRAIN) - 4
    assert set(asked) == {threading.main_thread()}
    assert threading.main_thread() not in tokenised


def test_a_broken_data_set_raises_its_own_error():
    def rows():
        yield TRAIN[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        score(build_model(), rows())


def test_running_out_of_memory_halves_the_batch_and_changes_no_score(monkeypatch):
    model = build_model()
    want = score(model).values
    forward, seen = model.base_model.forward, []

    def limited(*args, input_ids=None, **kwargs):
        seen.append(input_ids.numel())
        if input_ids.numel() > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", limited)
    assert relative(score(model).values, want) < 1e-6
    assert max(seen) > 30

    long = [{"input_ids": list(range(3, 43)), "labels": list(range(3, 43))}]
    scores = score(model, TRAIN + long)
    assert "out of memory with this row alone (39 tokens)" in scores.reasons[-1]
    assert relative(scores.values[:-1], want) < 1e-6


def test_the_model_is_left_exactly_as_found():
    model = build_model().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    model(
        input_ids=torch.tensor([TRAIN[0]["input_ids"]]), labels=torch.tensor([TRAIN[0]["input_ids"]])
    ).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    score(model, normalize="cosine", method="whitened")
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True))
    assert not any(p.is_inference() for p in [*model.parameters(), *model.buffers()])


def test_a_sample_of_several_segments_has_the_sum_of_their_scores():
    scorer = ForValueScorer(build_model("llama", torch.float64), VALIDATION, progress=False)
    samples = list(scorer.run.reader.samples(TRAIN))
    apart = scorer.score(samples)
    pairs = [
        replace(one, segments=one.segments + other.segments)
        for one, other in zip(samples[::2], samples[1::2], strict=True)
    ]
    together = scorer.score(pairs)
    assert relative(together.values, apart.values[::2] + apart.values[1::2]) < 1e-12
    np.testing.assert_array_equal(together.n_labelled, apart.n_labelled[::2] + apart.n_labelled[1::2])


def test_samples_are_scored_as_their_rows_are():
    scorer = ForValueScorer(build_model(), VALIDATION, progress=False)
    samples = list(scorer.run.reader.samples(TRAIN))
    np.testing.assert_array_equal(scorer.score(samples).values, scorer.score(TRAIN).values)
