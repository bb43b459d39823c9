"""`forvalue select` on files of preference rows: forms, rows turned round, and the rest byte for byte."""

import json
from pathlib import Path

import pytest

from forvalue_callbacks.cli import main
from forvalue_callbacks.tiny import instructions
from helpers.cli import MODEL, failed, rows_of, select, write

N, M = 30, 100
FITTED = ["--method", "fitted", "--out"]


def pairs(n, seed, swapped=()):
    """Questions with the right answer chosen, but for those swapped."""
    right, wrong = (instructions(n, seed, noise, ["mood"]).to_list() for noise in (0.0, 1.0))
    rows = []
    for i, (one, other) in enumerate(zip(right, wrong, strict=True)):
        answers = [one["completion"], other["completion"]][:: -1 if i in swapped else 1]
        rows.append({"id": i, "prompt": one["prompt"], "chosen": answers[0], "rejected": answers[1]})
    return rows


def said(text, role="assistant"):
    return {"role": role, "content": text}


def from_value(text, name="gpt"):
    return {"from": name, "value": text}


FORMS = {
    "pairs.jsonl": lambda row: row,
    "chats.json": lambda row: {
        "n": row["id"],
        "prompt": [said(row["prompt"], "user")],
        "chosen": [said(row["chosen"])],
        "rejected": [said(row["rejected"])],
    },
    "whole.parquet": lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")},
    "alpaca.jsonl": lambda row: {
        "instruction": row["prompt"],
        "input": "",
        "chosen": row["chosen"],
        "rejected": row["rejected"],
    },
    "sharegpt.jsonl": lambda row: {
        "conversations": [from_value(row["prompt"], "human")],
        "chosen": from_value(row["chosen"]),
        "rejected": from_value(row["rejected"]),
    },
    "marked.jsonl": lambda row: {"prompt": row["prompt"], "completion": row["chosen"], "label": True},
}
SWAPPED = {3, 7, 8, 20, 21, 29}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def files(name):
    """Rows, some of them turned round, and rows that are trusted."""
    form = FORMS[name]
    rows = [form(row) for row in pairs(N, 0, SWAPPED)]
    right = [form(row) for row in pairs(N, 0)]
    if "marked" in name:  # right answers, some of them marked as bad
        rows = [{**row, "label": i not in SWAPPED} for i, row in enumerate(right)]
    write(name, rows)
    write(f"trusted_{name}", [form(row) for row in pairs(M, 1)] + bad(name))
    return rows, right, [name, "--validation", f"trusted_{name}", *MODEL]


def bad(name):
    """Marked rows of both kinds are trusted."""
    if "marked" not in name:
        return []
    return [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in pairs(M, 2)]


@pytest.mark.parametrize("name", FORMS)
def test_rows_come_back_turned_round_and_all_others_as_they_came(name, folder, capsys):
    rows, right, arguments = files(name)
    out = f"kept{Path(name).suffix}"
    assert select(*arguments, "--policy", "threshold:0+swap:0", *FITTED, out) == 0
    text = capsys.readouterr().out
    facts = [json.loads(line) for line in Path(out).with_name("kept.dropped.reasons.jsonl").read_text().splitlines()]
    gone = {fact["row"] for fact in facts}
    assert f"{len(gone)} of {N} preference rows look the wrong way round" in text
    assert len(gone ^ SWAPPED) <= 3
    assert all(fact["swapped"] and fact["kind"] == "swapped" and fact["score"] < 0 for fact in facts)
    kept = rows_of(out)
    assert len(kept) == N
    for i, (new, old) in enumerate(zip(kept, rows, strict=True)):
        assert list(new) == list(old)
        if i not in gone:
            assert new == old
        elif i in SWAPPED:
            assert new == right[i]
    assert [row for i, row in enumerate(rows) if i in gone] == rows_of(
        Path(out).with_name(f"kept.dropped{Path(out).suffix}")
    )
    if name.endswith(".jsonl"):
        lines, before = Path(out).read_bytes().splitlines(), Path(name).read_bytes().splitlines()
        assert all(line == old for i, (line, old) in enumerate(zip(lines, before, strict=True)) if i not in gone)
    assert main(["worst", "kept.scores.parquet", "--data", name, "--n", "2"]) == 0


def test_what_is_refused_for_files_of_preferences(folder, capsys):
    _, _, arguments = files("pairs.jsonl")
    said = failed(capsys, 1, "select", *arguments, "--out", "kept.jsonl")
    assert "method='auto' scores answers, and row 0 is one of preferences" in said
    assert "method='whitened'" in said
    said = failed(capsys, 1, "select", *arguments, "--policy", "drop:auto", *FITTED, "kept.jsonl")
    assert "log odds" in said
    write("plain.jsonl", instructions(20, 5).select_columns(["prompt", "completion"]).to_list())
    given = ["plain.jsonl", *arguments[1:], "--policy", "threshold:0+swap:0", *FITTED, "kept.jsonl"]
    assert "turns preference rows round, and plain.jsonl has none" in failed(capsys, 1, "select", *given)
    assert not Path("kept.jsonl").exists()


def test_a_report_shows_both_answers(folder):
    _, _, arguments = files("pairs.jsonl")
    given = ["--policy", "drop:0.2", *FITTED, "kept.jsonl", "--report", "report.html"]
    assert select(*arguments, *given) == 0
    page = Path("report.html").read_text()
    row = pairs(N, 0, SWAPPED)[3]
    assert f"chosen: {row['chosen']}" in page
    assert f"rejected: {row['rejected']}" in page
