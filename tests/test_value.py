"""Weights for a training loop of one's own."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader

from forvalue_callbacks import (
    Drop,
    ForValueScorer,
    ForValueScores,
    Relabel,
    Reweight,
    install_sampler,
    value,
)
from helpers.models import build_model
from helpers.oracles import relative
from helpers.trainers import VALIDATION, Passes, collate, rows_with_id

ROWS = Dataset.from_list(rows_with_id())


def drawn_in(loader, model, optimizer, backward, epochs=2):
    """Trains, and gives the rows of each batch."""
    batches = []
    for _ in range(epochs):
        for batch in loader:
            batches.append((batch["input_ids"][:, 0] - 3).tolist())
            backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    return batches


@pytest.mark.parametrize("way", ["torch", "accelerate"])
def test_a_plain_loop_never_draws_what_the_policy_drops(tmp_path, way):
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loader = DataLoader(ROWS, batch_size=4, shuffle=True, collate_fn=collate)
    backward = torch.Tensor.backward
    if way == "accelerate":
        accelerator = Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward
    weights = value(model, ROWS, VALIDATION, "drop:0.25", path=tmp_path / "scores.parquet", verbose=False)
    install_sampler(loader, weights, seed=0)
    batches = drawn_in(loader, model, optimizer, backward)
    assert [len(batch) for batch in batches] == [4] * 12
    assert {row for batch in batches for row in batch} == set(weights.nonzero()[0].tolist())
    want = ForValueScorer(build_model(), VALIDATION, progress=False).score(ROWS)
    got = ForValueScores.load(tmp_path / "scores.parquet")
    assert relative(np.array(got.values), np.array(want.values)) < 1e-6
    assert weights.tolist() == Drop(0.25)(want.values).tolist()


def test_what_is_found_is_said_and_weights_may_differ(capsys):
    weights = value(build_model(), ROWS, VALIDATION, Reweight(1.0))
    assert len(np.unique(weights)) == len(ROWS)
    assert f"policy      {Reweight(1.0)} keeps 24 rows and drops 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "options", "match"),
    [
        ("drop:auto", {}, "needs scores that are log odds"),
        (Relabel(0.9), {}, "gives rows other answers, and weights cannot: use prefilter"),
        (Drop(0.2), {"groups": [1] * 24}, "groups are given"),
        (Drop(0.2, group_column="source"), {}, "have no column 'source'"),
    ],
)
def test_what_cannot_be_weighted_is_refused_before_any_pass(policy, options, match):
    model = build_model()
    passes = Passes(model)
    with pytest.raises(ValueError, match=match):
        value(model, ROWS, VALIDATION, policy, **options)
    assert passes.n == 0
