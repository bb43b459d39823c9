"""The command where answers repeat: other answers suggested, shown, and put in the place of wrong ones."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from forvalue_callbacks import ForValueScores
from forvalue_callbacks.cli import main
from forvalue_callbacks.tiny import instructions
from helpers.cli import MODEL, rows_of, select

N = 600


def write(name, rows):
    text = "".join(json.dumps({"prompt": row["prompt"], "completion": row["completion"]}) + "\n" for row in rows)
    Path(name).write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows with wrong answers, and what `select --relabel` has made of them."""
    path = tmp_path_factory.mktemp("labels")
    rows = instructions(N, 0, 0.3, ["topic", "intent"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        write("rows.jsonl", rows)
        write("trusted.jsonl", instructions(250, 10_001, 0.0, ["topic", "intent"]))
        given = ["rows.jsonl", "--validation", "trusted.jsonl", *MODEL, "--relabel", "0.95"]
        assert select(*given, "--report", "report.html", "--out", "kept.jsonl") == 0
    return path, rows.to_list()


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder[0])


def test_answers_put_in_the_place_of_wrong_ones_are_right_as_often_as_was_said(folder):
    rows, facts = folder[1], rows_of("kept.dropped.reasons.jsonl")
    changed = {fact["row"]: fact for fact in facts if fact.get("relabelled")}
    assert len(changed) > 0.1 * N
    right = [fact["suggested_answer"] == f" {rows[row]['true_answer']}" for row, fact in changed.items()]
    assert np.mean(right) > 0.93
    gone = {fact["row"] for fact in facts} - changed.keys()
    expected = [
        {"prompt": row["prompt"], "completion": changed[i]["suggested_answer"] if i in changed else row["completion"]}
        for i, row in enumerate(rows)
        if i not in gone
    ]
    assert rows_of("kept.jsonl") == expected
    left = [i for i in range(N) if i not in gone]
    wrong = [f" {rows[i]['true_answer']}" != row["completion"] for i, row in zip(left, expected, strict=True)]
    assert np.mean(wrong) < 0.1 < np.mean([row["is_noisy"] for row in rows])


def test_suggested_answers_are_shown(folder, capsys):
    rows = folder[1]
    assert main(["worst", "kept.scores.parquet", "--data", "rows.jsonl", "--n", "10"]) == 0
    out = capsys.readouterr().out
    blocks = re.findall(r"rows.jsonl, line (\d+) .*\n    .* -> '(.*)'\n    rather '(.*)' \((.*)\)", out)
    assert len(blocks) == 10
    said = ForValueScores.load("kept.scores.parquet").judgements
    for line, answer, other, probability in blocks:
        i = int(line) - 1
        assert answer.strip() == rows[i]["answer"]
        assert other.strip() == rows[said.suggested_row[i]]["answer"] != rows[i]["answer"]
        assert probability == f"{said.suggested_probability[i]:.2f}"
    assert main(["report", "kept.scores.parquet", "--data", "rows.jsonl", "--out", "later.html"]) == 0
    worst = int(blocks[0][0]) - 1
    for name in ("report.html", "later.html"):
        text = Path(name).read_text()
        assert f"as in row {said.suggested_row[worst]}<" in text


def test_scores_with_judgements_are_compared(capsys):
    assert main(["compare", "kept.scores.parquet", "kept.scores.parquet"]) == 0
    assert f"+1.000  {N // 5} of {N // 5}" in capsys.readouterr().out
