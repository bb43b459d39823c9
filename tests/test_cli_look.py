"""The commands around scores: worst, compare, report, demo, recipes."""

import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from forvalue_callbacks import ForValueScores
from forvalue_callbacks.cli import main
from forvalue_callbacks.scores.judgements import Judgements
from helpers.cli import FAST, N, failed, files, pairs, rows_of, select, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- the other commands ----


def test_scores_are_looked_at(capsys):
    arguments = files()
    for method in ("gradient", "whitened"):
        assert main(["score", *arguments, "--method", method, "--out", f"{method}.parquet"]) == 0
    assert "rows        24" in capsys.readouterr().out
    scores = ForValueScores.load("gradient.parquet")
    order = np.argsort(scores.values)
    said = Judgements.none(N)
    said.kind[order[0]], said.probability[order[0]], said.why[order[0]] = "swapped", 0.9, "likelihood"
    said.suggested_row[order[0]], said.suggested_probability[order[0]] = order[-1], 0.7
    scores.judgements = said
    scores.save("gradient.parquet")
    assert main(["worst", "gradient.parquet", "--data", "pairs.jsonl", "--n", "3"]) == 0
    seen, rows = capsys.readouterr().out, rows_of("pairs.jsonl")
    assert re.findall(r"line (\d+)", seen) == [str(i + 1) for i in order[:3]]
    assert "swapped (0.90)  likelihood" in seen
    assert f"rather {rows[order[-1]]['completion']!r} (0.70)" in seen
    assert f"-> {rows[order[0]]['completion']!r}" in seen
    assert main(["worst", "gradient.parquet", "--data", "pairs.jsonl", "--n", "1", "--best", "true"]) == 0
    assert f"line {order[-1] + 1} " in capsys.readouterr().out
    assert main(["compare", "gradient.parquet", "whitened.parquet", "--share", "0.5"]) == 0
    other = ForValueScores.load("whitened.parquet").values
    same = len(set(order[:12]) & set(np.argsort(other)[:12]))
    assert f"{same} of 12" in capsys.readouterr().out
    assert main(["compare", "gradient.parquet", "gradient.parquet", "--share", "0.25"]) == 0
    assert "+1.000  6 of 6" in capsys.readouterr().out
    write("fewer.jsonl", rows[:5])
    assert "has scores of 24 rows, and fewer.jsonl has 5" in failed(
        capsys, 1, "worst", "gradient.parquet", "--data", "fewer.jsonl"
    )
    assert "one file of scores cannot be compared" in failed(capsys, 1, "compare", "gradient.parquet")


def test_scores_of_other_rows_are_not_compared(capsys):
    arguments = files()
    assert main(["score", *arguments, "--method", "gradient", "--out", "a.parquet"]) == 0
    write("pairs.jsonl", pairs(N, 7))
    assert main(["score", *arguments, "--method", "gradient", "--out", "b.parquet"]) == 0
    assert "b.parquet is not of the rows of a.parquet" in failed(capsys, 1, "compare", "a.parquet", "b.parquet")


def test_a_report_is_written_with_the_result_and_later(capsys):
    arguments = files()
    rows = rows_of("pairs.jsonl")
    write("pairs.jsonl", [*rows, rows[3]])
    assert select(*arguments, *FAST, "--out", "kept.jsonl", "--report", "report.html") == 0
    assert "report      report.html" in capsys.readouterr().out
    given = ["report", "kept.scores.parquet", "--data", "pairs.jsonl", "--out", "later.html", "--policy", "drop:0.25"]
    assert main(given) == 0
    first, later = (Path(name).read_text() for name in ("report.html", "later.html"))
    for text in (first, later):
        assert "1 training rows repeat another one (first: rows 3, 24)" in text
        assert rows[5]["completion"].strip() in text
    assert "forvalue select --data pairs.jsonl" in first
    tokens = "Tokens that speak against a row"
    assert (tokens in first, tokens in later) == (True, False), "the model is needed for them"


def test_the_demo_says_how_much_it_found(capsys):
    assert main(["demo", "--rows", "60", "--validation-rows", "120", "--out", "d", "--policy", "drop:0.2"]) == 0
    out = capsys.readouterr().out
    found, dropped = map(
        int, re.search(r"truth +18 answers are wrong: (\d+) of them are among the (\d+)", out).groups()
    )
    assert dropped == 12
    assert found >= 9
    assert len(rows_of("d/kept.jsonl")) == 48
    assert "forvalue select --data d/train.jsonl" in Path("d/report.html").read_text()


def test_recipes_are_listed_and_started(monkeypatch, capsys):
    assert main(["recipes"]) == 0
    seen = capsys.readouterr().out
    assert re.search(r"prefilter_sft +Fine-tune on the rows that For-Value keeps", seen)
    assert not re.search(r"^ +data ", seen, re.MULTILINE), "a module that they share"
    Path("r").mkdir()
    Path("r/shared.py").write_text("WHAT = 'shared'\n")
    Path("r/mine.py").write_text(
        '"""Mine."""\nimport sys\nfrom shared import WHAT\nif __name__ == "__main__":\n    print(WHAT, sys.argv[1:])\n'
    )
    monkeypatch.setattr("forvalue_callbacks.cli.recipes.FOLDERS", (Path("nowhere"), Path("r")))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert main(["recipes", "mine", "--rows", "3"]) == 0
    assert "shared ['--rows', '3']" in capsys.readouterr().out
    assert "there is no recipe 'x': mine." in failed(capsys, 1, "recipes", "x")


def test_the_log_is_left_as_it_was():
    arguments = files()
    before = logging.getLogger("transformers").level
    assert main(["score", *arguments, "--method", "gradient", "--out", "a.parquet"]) == 0
    assert logging.getLogger("transformers").level == before
