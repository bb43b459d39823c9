"""The command where trusted rows are few, none, or among the others; and what it would take."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from forvalue_callbacks import ForValueScores
from forvalue_callbacks.cli import main
from forvalue_callbacks.cli.to_read import worth_reading
from forvalue_callbacks.data.duplicates import Duplicates
from forvalue_callbacks.data.reader import sample_of
from forvalue_callbacks.data.sft import Row
from forvalue_callbacks.tiny import instructions
from helpers.cli import FAST, MODEL, M, N, failed, files, rows_of, select, turns, write

AUTO = ["--method", "auto"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def labels(n, seed=0, noise=0.3):
    """Rows whose answers repeat, with what is true of them."""
    return instructions(n, seed, noise, ["topic", "intent"]).to_list()


def free(n, seed=0):
    """Rows whose answers do not."""
    rng = random.Random(seed)
    words = list("abcdefghijklmnop")
    return [
        {"prompt": f"Say {i}:", "completion": " " + " ".join(rng.choices(words, k=rng.randint(3, 30)))}
        for i in range(n)
    ]


# ---- training rows that are validation rows too, and rows that are there twice ----


@pytest.mark.parametrize("command", ["select", "score"])
def test_validation_rows_among_the_training_rows_are_kept_and_not_scored(command, capsys):
    arguments = files()
    rows, trusted = rows_of("pairs.jsonl"), rows_of("trusted_pairs.jsonl")
    write("pairs.jsonl", [*rows, *trusted[2:5], rows[7]])
    out = "kept.jsonl" if command == "select" else "kept.scores.parquet"
    flags = FAST if command == "select" else FAST[:2]
    assert main([command, *arguments, *flags, "--out", out]) == 0
    seen = capsys.readouterr()
    assert f"3 training rows are validation rows too, the first is pairs.jsonl, line {N + 1}:" in seen.err
    said = f"leakage     3 of {N + 4} training rows are validation rows too (first: row {N}, validation row 2): kept, "
    assert said + "without a score" in seen.out
    assert f"duplicates  1 training rows repeat another one (first: rows 7, {N + 3})" in seen.out
    scores = ForValueScores.load("kept.scores.parquet")
    assert np.flatnonzero(np.isnan(scores.values)).tolist() == [N, N + 1, N + 2]
    assert set(scores.reasons) == {None, "a validation row too: kept, without a score"}
    facts = scores.metadata["duplicates"]
    assert facts["counts"] == {
        "n_train": N + 4, "n_validation": M, "exact": 1, "near": 0, "leaked_exact": 3, "leaked_near": 0,
        "validation": 0,
    }  # fmt: skip
    found = Duplicates.from_dict(facts["first"])
    assert found.exact == [[7, N + 3]]
    assert found.leaked_exact == [(N, 2), (N + 1, 3), (N + 2, 4)]
    if command == "select":
        assert [row for row in rows_of("kept.jsonl") if row in trusted] == trusted[2:5]
        before = Path("kept.scores.parquet").read_bytes()
        assert select(*arguments, *FAST, "--out", out) == 0
        assert "with the scores made before" in capsys.readouterr().out
        assert Path("kept.scores.parquet").read_bytes() == before


def test_rows_that_are_nearly_validation_rows_are_named(capsys):
    arguments = files()
    long = [{"prompt": "".join(f" {i * 7919 % 997}" for i in range(60)), "completion": " yes and no and yes"}] * 2
    long[1] = {**long[1], "prompt": long[1]["prompt"] + " 5"}
    write("pairs.jsonl", [{"id": 9, **long[0]}, *rows_of("pairs.jsonl")])
    write("trusted_pairs.jsonl", [*rows_of("trusted_pairs.jsonl"), {"id": 8, **long[1]}])
    assert select(*arguments, *FAST, "--out", "kept.jsonl") == 0
    said = f"1 of {N + 1} training rows nearly repeat a validation row (first: row 0, validation row {M}):"
    assert said in capsys.readouterr().out
    assert np.isfinite(ForValueScores.load("kept.scores.parquet").values).all()


def test_what_is_kept_of_duplicates_is_cut():
    groups = [list(range(i, i + 300)) for i in range(0, 150_000, 300)]
    pairs = [(i, 0) for i in range(5000)]
    found = Duplicates(200_000, 1, groups, [], pairs, [], [])
    first = found.first(100)
    assert (len(first.exact), len(first.exact[0]), len(first.leaked_exact)) == (100, 100, 100)
    assert found.counts()["exact"] == 500 * 299
    assert found.counts()["leaked_exact"] == 5000
    assert json.loads(json.dumps(first.to_dict())) == first.to_dict()
    assert Duplicates.from_dict(first.to_dict()) == first


# ---- without trusted rows ----


def test_without_trusted_rows_repeated_answers_judge_each_other(capsys):
    rows = labels(240)
    write("rows.jsonl", [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    assert (
        select("rows.jsonl", *MODEL, *AUTO, "--policy", "drop:0.2", "--out", "kept.jsonl", "--report", "r.html") == 0
    )
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "rows.jsonl: 240 rows, JSONL, prompt/completion; no validation rows"
    assert "evidence    without validation rows: on the rows themselves, wrong ones among them" in out
    dropped = [fact["row"] for fact in rows_of("kept.dropped.reasons.jsonl")]
    assert np.mean([rows[row]["is_noisy"] for row in dropped]) > 0.7
    assert not Path("kept.to_read.jsonl").exists()
    assert Path("r.html").is_file()


def test_a_method_that_needs_trusted_rows_says_what_does_not(capsys):
    write("rows.jsonl", free(30))
    said = failed(capsys, 1, "select", "rows.jsonl", *MODEL, *FAST, "--out", "kept.jsonl")
    assert "give two or three hundred of the same kind by --validation FILE" in said
    assert "--method auto finds wrong answers where answers repeat" in said


@pytest.mark.parametrize(("name", "command"), [("rows.jsonl", "select"), ("rows.csv", "score"), ("saved", "score")])
def test_answers_that_do_not_repeat_are_to_be_read_by_somebody(name, command, monkeypatch, capsys):
    monkeypatch.setattr("forvalue_callbacks.cli.to_read.WORTH_READING", 20)
    rows = free(60) if name != "saved" else [{"messages": turns(row)} for row in free(60)]
    write(name, rows)
    out = f"kept{Path(name).suffix}" if command == "select" else "s.parquet"
    given = [command, name, *MODEL, *AUTO, "--out", out]
    said = failed(capsys, 1, *given)
    path = Path(f"{Path(out).stem}.to_read{Path(name).suffix}")
    assert "share theirs with another. Rows worth reading are in" in said
    assert said.endswith(f"read them, keep those that are right, and give them as --validation {path}.")
    found = rows_of(path)
    assert len(found) == 20
    assert [row for row in rows if row in found] == found, "in their form and order"
    assert {path.name for path in Path().iterdir()} == {name, path.name}
    if path.is_dir():
        return
    path.write_text("mine\n")
    failed(capsys, 1, *given)
    assert path.read_text() == "mine\n", "somebody has read it"
    failed(capsys, 1, *given, "--overwrite", "true")
    assert rows_of(path) == found


def test_what_has_been_read_comes_back(monkeypatch, capsys):
    monkeypatch.setattr("forvalue_callbacks.cli.to_read.WORTH_READING", 40)
    write("rows.jsonl", free(90))
    given = ["select", "rows.jsonl", *MODEL, "--policy", "drop:0.2", "--out", "kept.jsonl"]
    failed(capsys, 1, *given, *AUTO)
    assert main([*given, "--validation", "kept.to_read.jsonl", "--method", "gradient"]) == 0
    assert "40 of 90 training rows are validation rows too" in capsys.readouterr().out
    kept = rows_of("kept.jsonl")
    assert all(row in kept for row in rows_of("kept.to_read.jsonl"))
    assert len(kept) == 80


def samples_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 10**6, n) for n in lengths]
    return [sample_of(i, Row(ids, np.where(np.arange(len(ids)) < 2, -100, ids))) for i, ids in enumerate(rows)]


def test_rows_worth_reading_are_spread_over_lengths_whatever_their_order():
    samples = samples_of([*[5] * 500, *range(10, 110)])
    chosen = worth_reading([*samples, *samples], 60)
    assert len(set(chosen)) == 60
    long = [samples[i].n_read for i in chosen if samples[i].n_read > 5]
    assert len(long) == 10
    assert max(np.diff(sorted(long))) < 25
    order = np.random.default_rng(1).permutation(len(samples))
    shuffled = [sample_of(i, Row(s.segments[0].tokens, labels_of(s))) for i, s in enumerate(samples[j] for j in order)]
    assert {int(order[i]) for i in worth_reading(shuffled, 60)} == set(chosen)
    assert len(worth_reading(samples, 10_000)) == 600
    assert worth_reading([], 10) == []


def labels_of(sample):
    ids = sample.segments[0].tokens
    return np.where(np.arange(len(ids)) < 2, -100, ids)


# ---- dry runs ----


@pytest.mark.parametrize("command", ["score", "select"])
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(command, capsys):
    arguments = files()
    before = sorted(Path().iterdir())
    out = "there/kept.jsonl" if command == "select" else "there/kept.parquet"
    flags = FAST if command == "select" else FAST[:2]
    cached = ["--direction-cache", "cache"]
    assert main([command, *arguments, *flags, *cached, "--out", out, "--dry-run", "true"]) == 0
    seen = capsys.readouterr().out
    assert f"rows        {N} by {M} validation rows" in seen
    for what in ("tokens  ", "passes  ", "forwards", "memory  ", "time    "):
        assert f"\n{what}" in seen
    assert seen.rstrip().endswith("dry run     nothing is written")
    assert sorted(Path().iterdir()) == before


def test_a_dry_run_of_rows_that_nobody_trusts_writes_nothing_either(capsys):
    write("rows.jsonl", free(40))
    said = failed(capsys, 1, "select", "rows.jsonl", *MODEL, *AUTO, "--out", "kept.jsonl", "--dry-run", "true")
    assert "without --dry-run, rows worth reading are written" in said
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]
