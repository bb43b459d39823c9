"""What a run would take: counted as the run then does it."""

import json
from dataclasses import replace

import pytest
import torch

from forvalue_callbacks import ForValueConfig, ForValueScorer
from forvalue_callbacks.data import reader
from forvalue_callbacks.probe import estimate
from forvalue_callbacks.progress import Progress
from forvalue_callbacks.report.words import about_estimate
from helpers.models import build_model, build_rows

TRAIN, VALIDATION = build_rows(60, seed=1), build_rows(40, seed=2)
NOTHING = {"input_ids": [5], "labels": [5]}


def labels(n, seed):
    """Rows whose answers repeat."""
    rows = build_rows(n, seed=seed)
    return [
        {"input_ids": [*row["input_ids"][:2], 5 + i % 2], "labels": [-100, -100, 5 + i % 2]}
        for i, row in enumerate(rows)
    ]


def shared(n):
    """Rows that begin alike, which are run in two passes a batch."""
    return [{"input_ids": [*range(3, 33), 40 + i % 9, 7], "labels": [-100] * 31 + [7]} for i in range(n)]


def scorer_of(method, validation=VALIDATION):
    return ForValueScorer(build_model(), validation, ForValueConfig(method=method, max_tokens_per_batch=100))


@pytest.mark.parametrize(
    ("method", "train", "validation"),
    [
        ("gradient", TRAIN, VALIDATION),
        ("gradient", shared(60), VALIDATION),
        ("whitened", TRAIN, VALIDATION),
        ("fitted", TRAIN, VALIDATION),
        ("auto", TRAIN, VALIDATION),
        ("label_model", labels(60, 1), labels(40, 2)),
    ],
)
def test_counts_are_those_of_the_run(method, train, validation, monkeypatch, capsys):
    monkeypatch.setattr(reader, "WINDOW", 17)
    train = [NOTHING, *train]
    found = estimate(scorer_of(method, validation), train)
    made, forwards, read = [], [], []
    part, update = Progress.part, Progress.update
    scorer = scorer_of(method, validation)
    monkeypatch.setattr(
        Progress, "part", lambda self, name, n: made.append(name) or forwards.clear() or part(self, name, n)
    )
    monkeypatch.setattr(Progress, "update", lambda self, n, t=0: read.append((made[-1], t)) or update(self, n, t))
    scorer.backbone.model.model.register_forward_hook(lambda *_: forwards.append(1))
    scorer.score(train)
    assert [planned.name for planned in found.passes] == made
    assert (found.rows, found.unscored, found.validation_rows) == (60, 1, 40)
    assert found.passes[-1].rows == 60 * len(scorer.validation.method.parts)
    assert found.forwards == len(forwards)
    assert round(found.passes[-1].rows * found.passes[-1].tokens) == sum(t for name, t in read if name == made[-1])
    assert found.tokens > sum(planned.rows for planned in found.passes)
    assert found.seconds > 0


def test_memory_is_that_of_the_tensors():
    model, scorer = build_model("llama-tied"), ForValueScorer(build_model("llama-tied"), VALIDATION)
    weights = {p.data_ptr(): p.numel() * 4 for p in model.parameters()}
    found = estimate(scorer, TRAIN)
    buffers = sum(b.nbytes for b in model.buffers())
    assert found.memory["weights"] == sum(weights.values()) + buffers
    assert found.memory["state"] == scorer.direction().nbytes
    assert found.memory["window"] > 0


def test_nothing_is_left_behind_and_scores_are_the_same():
    scorer, other = scorer_of("gradient"), scorer_of("gradient")
    scorer.backbone.model.train()
    estimate(scorer, TRAIN)
    assert scorer.backbone.model.training
    assert torch.equal(torch.tensor(scorer.score(TRAIN).values), torch.tensor(other.score(TRAIN).values))


def test_rows_that_cannot_be_scored_are_no_estimate():
    with pytest.raises(ValueError, match="none of 2 rows can be scored"):
        estimate(scorer_of("gradient"), [NOTHING, NOTHING])


def test_lines_say_what_there_is():
    found = estimate(scorer_of("auto"), [*TRAIN, NOTHING])
    lines = about_estimate(replace(found, seconds=400.0))
    assert lines[0] == "rows        60 by 40 validation rows (1 more cannot be scored)"
    assert lines[1] == f"tokens      {found.tokens:,} that the model reads"
    sizes = "rows: first half of the validation rows 20, second half 20, "
    assert lines[2].startswith(f"passes      {len(found.passes)} ({sizes}")
    assert lines[3] == f"forwards    {found.forwards} over the rows to score, of at most 100 tokens"
    assert lines[4].startswith("memory      weights ")
    assert lines[5] == "time        about 6.7 min, at the pace of a few batches"
    json.dumps(found.to_dict())
