"""The recipe on rows with errors that people have judged: what it draws, what it says, and that it can be redone."""

import json
import re
import runpy
import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from forvalue_callbacks import TINY_MODEL, ForValueScorer
from helpers.recipes import RECIPES, load

real = load("real_errors")
WORDS = ["red", "blue", "green", "old", "new", "big", "small", "warm", "cold", "dry"]
TEMPLATES = ("{q}\\n", "{a}")


@pytest.fixture
def file(tmp_path):
    """180 prompts with two answers each; every third prompt has a wrong one, some rows are there twice."""
    rows = []
    for i in range(180):
        word, other = WORDS[i % 10], WORDS[(i + 3) % 10]
        rows.append({"q": f"say {word} {i}", "a": f"{word} {word}", "is_bad": False})
        rows.append({"q": f"say {word} {i}", "a": f"{other if i % 3 == 0 else word} {i}", "is_bad": i % 3 == 0})
    rows += rows[:20]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_prompt_lies_on_both_sides_and_no_row_is_there_twice(file):
    given = [json.loads(line) for line in file.read_text().splitlines()]
    judged = real.judged_rows(str(file), "is_bad", TEMPLATES, 200, 60, seed=0)
    assert judged.train.column_names == judged.validation.column_names == ["prompt", "completion"], "no truth"
    assert len(judged.train) == len(judged.bad) == 200
    assert len(set(judged.places)) == 200
    assert len({(row["prompt"], row["completion"]) for row in judged.train}) == 200
    assert [row["prompt"] for row in judged.train] == [given[i]["q"] + "\n" for i in judged.places]
    assert judged.bad.tolist() == [given[i]["is_bad"] for i in judged.places]
    validation = judged.validation["prompt"]
    assert len(set(validation)) == 60
    assert not set(validation) & set(judged.train["prompt"])
    right = {(row["q"] + "\n", row["a"]) for row in given if not row["is_bad"]}
    assert {(row["prompt"], row["completion"]) for row in judged.validation} <= right
    assert len(np.unique(judged.prompts)) == len(set(judged.train["prompt"]))
    again, other = (real.judged_rows(str(file), "is_bad", TEMPLATES, 200, 60, seed=s) for s in (0, 1))
    assert again.places.tolist() == judged.places.tolist() != other.places.tolist()
    short = real.judged_rows(str(file), "is_bad", TEMPLATES, 200, 20, seed=0, max_characters=19)
    assert max(len(row["prompt"] + row["completion"]) for row in short.train) == 19


def test_what_cannot_be_drawn_is_refused_with_the_way_out(file, tmp_path):
    def draw(path=file, truth="is_bad", n_validation=60, **more):
        return real.judged_rows(str(path), truth, TEMPLATES, 200, n_validation, 0, **more)

    with pytest.raises(ValueError, match=r"'wrong', and .* has q, a, is_bad"):
        draw(truth="wrong")
    with pytest.raises(ValueError, match="180 prompts with a right row, and 0 rows beside them"):
        draw(n_validation=180)
    with pytest.raises(ValueError, match="raise --max_characters"):
        draw(max_characters=5)
    path = tmp_path / "worded.jsonl"
    path.write_text('{"q": "a", "a": "b", "is_bad": "no"}\n')
    with pytest.raises(ValueError, match=r"row 0 \(from 0\): 'is_bad' is str, not true or false"):
        draw(path)


def test_the_auc_is_scikit_learns_and_its_interval_knows_of_prompts():
    rng = np.random.default_rng(0)
    bad = np.arange(300) % 3 == 0
    values = rng.integers(5, size=300) - bad
    found = real.auc_of(values, bad, np.arange(300))
    assert found.value == pytest.approx(roc_auc_score(~bad, values))
    assert 0.05 < found.high - found.low < 0.25
    assert found.low < found.value < found.high
    four = real.auc_of(np.repeat(values, 4), np.repeat(bad, 4), np.repeat(np.arange(300), 4))
    assert four.low == pytest.approx(found.low, abs=0.01), "rows of one prompt are no more rows"
    missing = np.where(bad, np.nan, values - 10)
    assert real.auc_of(missing, bad, np.arange(300)).value > 0.8, "no score counts as the lowest"


def test_claims_stand_beside_the_truth():
    result = {"bad": [True, True, False, False], "prompts": [0, 1, 2, 3]}
    evidence = {"swapped": {"auc": 0.9, "interval": [0.85, 0.95]}, "truncated": {"auc": 0.8, "interval": None}}
    evidence["refusal"] = {"auc": 0.85}
    noise = {"share": 0.25, "share_error": 0.1, "evidence": evidence}
    cells = real.claims(result, {"values": [-1.0, 2.0, 1.0, -2.0], "noise": noise})
    assert cells[0] == "3 kinds: truncated 0.80 to swapped 0.90 (0.85 to 0.95)"
    assert cells[2:] == ["0.25 (0.05 to 0.45)", "0.50", "2", "0.50", "0.50", "0.50"]
    kept = real.claims(result, {"values": [1.0] * 4, "noise": {"share": 0.0, "evidence": {}}})
    assert kept[2:] == ["0.00", "0.50", "0", "-", "0.00", "0.00"]


def test_no_row_is_known_by_the_others_of_its_prompt():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(60), 4)
    is_right = np.repeat(rng.integers(2, size=60), 4)
    texts = [f"prompt{k} word{rng.integers(50)}" for k in prompts]
    found = real.probability(real.bag_of_words(), texts, is_right, prompts)
    assert 0.25 < roc_auc_score(is_right, found) < 0.75


def test_no_rival_but_the_ceilings_sees_the_truth(file):
    model, tokenizer = (c.from_pretrained(TINY_MODEL) for c in (AutoModelForCausalLM, AutoTokenizer))
    judged = real.judged_rows(str(file), "is_bad", TEMPLATES, 60, 40, seed=0)
    prepare = ForValueScorer(model, judged.validation, processing_class=tokenizer, progress=False).run.reader.prepare
    turned = replace(judged, bad=~judged.bad)
    both = zip(*(real.rivals(model, prepare, rows, 0) for rows in (judged, turned)), strict=True)
    changed = [name for (name, score), (_, other) in both if not np.array_equal(score(), other())]
    assert len(changed) == 2
    assert all(name.startswith("ceiling: ") for name in changed)
    assert real.said({"prompt": "Say red 3", "completion": "red, not 3."}) == pytest.approx(2 / 3)


def test_some_scores_are_made_again_and_the_others_stay(file, tmp_path, monkeypatch, capsys):
    def recipe(*arguments):
        monkeypatch.setattr(sys, "argv", ["find_mislabels.py", *arguments])
        runpy.run_path(str(RECIPES / "find_mislabels.py"), run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.syspath_prepend(str(RECIPES))
    common = ["--data", str(file), "--truth", "is_bad", "--prompt_template", TEMPLATES[0], "--completion_template"]
    common += [TEMPLATES[1], "--train_rows", "60", "--validation_rows", "40", "--output_dir", str(tmp_path / "out")]
    out = recipe(*common, "--methods", "gradient", "label_model", "auto")
    aucs = dict(re.findall(r"\| ([^|]+) \| (\d\.\d\d) \(", out.split("claims")[0]))
    assert len(aucs) == 11 + 2, "rivals, and the methods that do not refuse"
    assert "label_model refuses" in out
    assert float(aucs["auto"]) > 0.6
    assert len([line for line in out.splitlines() if line.startswith("| tiny, 60 rows, auto at ")]) == 1

    path = tmp_path / "out" / "real_errors.json"
    before = json.loads(path.read_text())
    before["scores"]["gradient"]["values"][0], before["scores"]["random"]["values"][0] = 1e6, 7.0
    path.write_text(json.dumps(before))
    recipe(*common, "--methods", "gradient")
    after = json.loads(path.read_text())
    assert after["scores"]["gradient"]["values"][0] != 1e6
    assert after["scores"].keys() == before["scores"].keys()
    assert after["scores"]["random"] == before["scores"]["random"]

    with pytest.raises(ValueError, match="other rows or of another model"):
        recipe(*common, "--first_seed", "1")
    both = recipe("--tables", str(tmp_path / "out"), str(tmp_path / "out"))
    assert "| AUC (95 %) | tiny, 60 rows | tiny, 60 rows |" in both
    assert len(re.findall(r"validation rows, seed 0, all lengths; date \d{4}-\d\d-\d\d, commit \S+, torch", both)) == 2
    assert both.count("\n- tiny: 60 rows of rows.jsonl") + both.startswith("- tiny") == 2
