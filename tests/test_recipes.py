"""The SFT recipes with real files: rows come back as they came, and what is wrong is said with its place."""

import csv
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from forvalue_callbacks import TINY_MODEL
from forvalue_callbacks.data.files import DataError

RECIPES = Path(__file__).parent.parent / "recipes"
N = 24
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def asked(i):
    return f"Message: the fan hummed {i} times.\nTopic:"


def answer(i):
    return " music" if i % 3 else " cooking, naïve"


def turns(i, role="role", content="content", names=("user", "assistant")):
    return [{role: name, content: text} for name, text in zip(names, (asked(i), answer(i)), strict=True)]


FORMS = {
    "prompt_completion.jsonl": lambda i: {"id": i, "prompt": asked(i), "completion": answer(i)},
    "messages.json": lambda i: {"messages": turns(i), "source": "a"},
    "sharegpt.jsonl": lambda i: {"conversations": turns(i, "from", "value", ("human", "gpt"))},
    "text.parquet": lambda i: {"text": asked(i) + answer(i), "n": i},
    "alpaca.csv": lambda i: {"instruction": asked(i), "input": "" if i % 2 else "a, b", "output": answer(i)},
}
OPTIONS = {
    "messages.json": ["--chat_template_path", "template.jinja"],
    "sharegpt.jsonl": ["--shuffle_dataset", "true"],
    "alpaca.csv": ["--prompt_template", "{instruction}\\n{input}\\n", "--completion_template", "{output}"],
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(RECIPES))
    Path("template.jinja").write_text(TEMPLATE)


def write(name, rows):
    if name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # every other line is empty
    elif name.endswith(".json"):
        Path(name).write_text(json.dumps(rows))
    elif name.endswith(".csv"):
        with open(name, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(name)


def rows_of(path):
    text = path.read_text() if path.suffix != ".parquet" else ""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line]
    if path.suffix == ".json":
        return json.loads(text)
    return list(csv.DictReader(io.StringIO(text))) if text else Dataset.from_parquet(str(path)).to_list()


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output_dir", "out", *arguments])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


@pytest.mark.newest  # what SFTTrainer drops and truncates has changed
@pytest.mark.parametrize("name", FORMS)
def test_rows_of_every_form_come_back_as_they_came_with_their_places(name, monkeypatch, capsys):
    rows = [FORMS[name](i) for i in range(N)]
    write(name, rows)
    write(f"trusted_{name}", [FORMS[name](i) for i in range(100, 108)])
    arguments = ["--data", name, "--validation_data", f"trusted_{name}", "--train", "false", "--policy", "drop:0.25"]
    run(monkeypatch, "prefilter_sft", *arguments, *OPTIONS.get(name, []))
    seen = capsys.readouterr().out
    suffix = Path(name).suffix
    kept, dropped = rows_of(Path(f"out/kept{suffix}")), rows_of(Path(f"out/dropped{suffix}"))
    table = list(csv.DictReader(io.StringIO(Path("out/rows.csv").read_text())))
    assert [int(row["row"]) for row in table] == list(range(N))
    assert kept == [rows[i] for i in range(N) if table[i]["what"] == "kept"]
    assert (len(kept), len(dropped)) == (18, 6)
    assert dropped == [rows[i] for i in range(N) if table[i]["what"] == "dropped"]
    for fate in (fate for fate in table if fate["what"] == "dropped"):
        place, score, line = int(fate["row"]), float(fate["score"]), fate["line"]
        assert f"{score:.4g}" in fate["reason"]
        assert "drop:0.25" in fate["reason"]
        assert all(float(other["score"]) >= score for other in table if other["what"] == "kept")
        if suffix == ".jsonl":
            assert json.loads(Path(name).read_text().splitlines()[int(line) - 1]) == rows[place]
        where = f"line {line}" if line else f"row {place} (from 0)"
        where = f"(row {place} from 0)" if suffix == ".json" else where  # all of it is one line
        assert (re.search(rf"{re.escape(where)} .*\(dropped\)", seen) is not None) == (
            score in sorted(float(other["score"]) for other in table)[:3]
        )
    assert "test_loss" not in seen, "no row is taken from the training file without being asked"
    assert not Path("out/model.safetensors").exists()


@pytest.mark.newest  # SFTConfig's shuffle_dataset
def test_what_is_found_is_said_before_the_training(monkeypatch, capfd):
    rows = [FORMS["prompt_completion.jsonl"](i) for i in range(N)]
    rows[5]["completion"] = None
    rows[7]["prompt"] *= 40  # its answer lies beyond max_length
    write("rows.jsonl", rows)
    write("trusted.jsonl", [FORMS["prompt_completion.jsonl"](i) for i in range(100, 108)])
    arguments = ["--data", "rows.jsonl", "--validation_data", "trusted.jsonl", "--test_data", "trusted.jsonl"]
    run(monkeypatch, "prefilter_sft", *arguments, "--max_steps", "1", "--max_length", "200", "--report_to", "none")
    seen, said = capfd.readouterr()
    assert (
        "1 row of rows.jsonl cannot be trained on and is dropped: rows.jsonl, line 11: 'completion' is null: fill"
        in said
    )
    assert seen.index("worst rows") < seen.index("dropped rows ") < seen.index("train_loss") < seen.index("test_loss")
    table = csv.DictReader(io.StringIO(Path("out/rows.csv").read_text()))
    reasons = {row["line"]: row["reason"] for row in table if row["what"] == "dropped"}
    assert reasons["11"] == "'completion' is null"
    assert "max_length" in reasons["15"]
    assert len(rows_of(Path("out/dropped.jsonl"))) == len(reasons)
    assert Path("out/model.safetensors").exists()
    assert len(rows_of(Path("out/kept.jsonl"))) + len(reasons) == N


def test_a_filter_is_tried_on_answers_swapped_by_hand(monkeypatch, capsys):
    write("rows.jsonl", [FORMS["sharegpt.jsonl"](i) for i in range(N)])
    write("trusted.jsonl", [FORMS["sharegpt.jsonl"](i) for i in range(100, 108)])
    arguments = ["--data", "rows.jsonl", "--validation_data", "trusted.jsonl", "--noise", "0.5", "--train", "false"]
    run(monkeypatch, "prefilter_sft", *arguments)
    report = json.loads(Path("out/report.json").read_text())
    assert 0 < report["noisy"] <= 12
    assert 0 <= report["auc_clean_against_noisy"] <= 1
    assert not Path("out/kept.jsonl").exists(), "rows of a trial are not to be trained on"


def test_reweighting_takes_the_same_files(monkeypatch, capsys):
    write("rows.jsonl", [FORMS["prompt_completion.jsonl"](i) for i in range(N)])
    arguments = ["--data", "rows.jsonl", "--draw_validation", "true", "--validation_rows", "6", "--max_steps", "1"]
    run(monkeypatch, "reweight_sft", *arguments, "--report_to", "none")
    seen, said = capsys.readouterr()
    assert "'forvalue_kept': 18" in seen
    assert "6 validation rows are drawn from rows.jsonl: noisy ones hide noise" in said


GOOD = '{"prompt": "a", "completion": "b"}\n'
BROKEN = {
    "there is no file": (None, {}),
    "rows.jsonl is empty": ("", {}),
    "rows.jsonl has no rows": ("\n\n", {}),
    r"rows.jsonl, line 2: broken JSON \(.*character 15\): mend or delete": (GOOD + '{"prompt": "a"', {}),
    "rows.jsonl, line 3: a list, not an object": (GOOD + "\n[1]\n", {}),
    "rows.jsonl, line 2: not UTF-8": (GOOD.encode() + b'{"prompt": "\xff"}', {}),
    "rows.jsonl, line 2: 'completion' is a number, and text in most rows": (
        GOOD + '{"prompt": "a", "completion": 1}\n' + GOOD,
        {},
    ),
    "no row to train on: rows.jsonl, line 1: 'completion' is null": ('{"prompt": "a", "completion": null}', {}),
    "has the columns 'a', 'b', and rows are .*--prompt_template": ('{"a": "x", "b": "y"}', {}),
    "one template of two is missing: give both": (GOOD, {"prompt_template": "{prompt}"}),
    "rows.jsonl: a template names the column 'question', and the rows have 'prompt', 'completion'": (
        GOOD,
        {"prompt_template": "{question}", "completion_template": "{completion}"},
    ),
    "a template is no format string": (
        GOOD,
        {"prompt_template": "{prompt", "completion_template": "{completion}"},
    ),
    "give two or three hundred of the same kind as --validation_data FILE": (GOOD, {"validation_data": None}),
    "rows.jsonl has too few rows to draw 200 test rows": (GOOD, {"draw_test": True}),
    "trusted.jsonl, line 2: 'prompt' is empty: fill it or leave the row out": (GOOD, {"validation_data": "holes"}),
    "noise swaps answers, and these rows have none": ('{"text": "a b c"}', {"noise": 0.5}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_wrong_with_a_file_is_said_with_its_place_and_the_way_out(message):
    from data import DataConfig, load_rows

    content, options = BROKEN[message]
    if content is not None:
        Path("rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    holes = options.get("validation_data") == "holes"
    Path("trusted.jsonl").write_text(GOOD + '{"prompt": "", "completion": "b"}' * holes)
    options = {"validation_data": "trusted.jsonl"} | {k: v for k, v in options.items() if v != "holes"}
    with pytest.raises(DataError, match=message):
        load_rows(DataConfig(data="rows.jsonl", **options))


def test_a_mistake_ends_the_script_without_a_traceback(monkeypatch):
    write("rows.jsonl", [{"messages": turns(i)} for i in range(4)])
    both = ["--data", "rows.jsonl", "--validation_data", "rows.jsonl"]
    AutoTokenizer.from_pretrained(TINY_MODEL, chat_template="").save_pretrained("bare")
    with pytest.raises(SystemExit, match=r"^error: the tokenizer of bare has no chat template: give one as --chat_"):
        run(monkeypatch, "prefilter_sft", *both, "--model_name_or_path", "bare")
    with pytest.raises(SystemExit, match=r"^error: cannot read the policy 'drop'"):
        run(monkeypatch, "prefilter_sft", *both, "--policy", "drop")


def test_templates_and_cells_are_taken_as_they_are():
    from data import DataConfig, load_rows

    Path("rows.csv").write_text('q,n,a,text\nis it {x}?,007,NA,t\n"say ""hi""",,5,t\nempty,1,,t\n')
    options = {"prompt_template": "{q}\\n{n}", "completion_template": "{a}"}
    write("good.csv", [{"q": "a", "n": "b", "a": "c"}])
    rows = load_rows(DataConfig(data="rows.csv", validation_data="good.csv", **options))
    assert rows.train["prompt"] == ["is it {x}?\n007", 'say "hi"\n']
    assert rows.train["completion"] == ["NA", "5"]
    assert rows.train["forvalue_row"] == [0, 1]
    assert rows.unusable == {2: "'a' is None: fill it or drop the row"}
    assert "text" not in rows.train.column_names, "SFTTrainer would read it"
    assert rows.test is None
