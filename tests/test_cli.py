"""The command: files in and files out, and what it says where something is wrong."""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib import reload
from pathlib import Path

import numpy as np
import pytest
import yaml

from forvalue_callbacks import TINY_MODEL, ForValueScores
from forvalue_callbacks.cli import COMMANDS, main
from forvalue_callbacks.scores.judgements import Judgements
from helpers.cli import FAST, FORMS, MODEL, NAMES, M, N, failed, files, pairs, rows_of, select, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- the job ----


@pytest.mark.parametrize("name", FORMS)
def test_rows_go_from_files_to_files_as_they_came(name, capsys):
    arguments = files(name)
    if name == "own.jsonl":
        arguments += ["--prompt-template", "{q}\\n", "--completion-template", "{a}"]
    suffix = Path(name).suffix
    assert select(*arguments, *FAST, "--out", f"kept{suffix}") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == (
        f"{name}: {N} rows, {NAMES[name]}; validation trusted_{name}: {M} rows, {NAMES[name]}"
    )
    rows, kept, dropped = rows_of(name), rows_of(f"kept{suffix}"), rows_of(f"kept.dropped{suffix}")
    why = rows_of("kept.dropped.reasons.jsonl")
    scores = ForValueScores.load("kept.scores.parquet")
    assert sorted(np.argsort(scores.values)[:6].tolist()) == [fact["row"] for fact in why]
    assert dropped == [rows[fact["row"]] for fact in why]
    assert kept == [row for i, row in enumerate(rows) if i not in {fact["row"] for fact in why}]
    assert [fact["score"] for fact in why] == [scores.values[fact["row"]] for fact in why]
    if suffix == ".jsonl":
        lines = Path(name).read_bytes().splitlines()
        assert [lines[fact["line"] - 1] for fact in why] == Path("kept.dropped.jsonl").read_bytes().splitlines()
        both = (Path("kept.jsonl").read_bytes() + Path("kept.dropped.jsonl").read_bytes()).splitlines()
        assert Counter(both) == Counter(lines)


def test_prompts_count_only_where_that_is_asked_for(capsys):
    """Of messages whose answers are the same, what is scored is the same, whoever asks."""
    arguments = files("messages.json")
    rows = rows_of("messages.json")
    n_labelled = {}
    for name, more in (("answers", []), ("all", ["--learn-prompts", "true"])):
        assert main(["score", *arguments, "--method", "gradient", "--out", f"{name}.parquet", *more]) == 0
        n_labelled[name] = ForValueScores.load(f"{name}.parquet").n_labelled
    assert n_labelled["answers"].max() < 6
    assert (n_labelled["all"] > n_labelled["answers"] + 5).all()
    assert len(rows) == N


def test_a_tokenizer_without_a_chat_template_gets_chatml_and_says_so(capsys):
    Path("model").mkdir()
    for file in Path(TINY_MODEL).iterdir():
        if file.name != "chat_template.jinja":
            Path("model", file.name).symlink_to(file)
    arguments = files("messages.json")[:-1]
    assert select(*arguments, "model", *FAST, "--out", "kept.json") == 0
    assert "chat template: ChatML (the tokenizer of model has none)" in capsys.readouterr().out
    Path("mine.jinja").write_text("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    one = Path("kept.json").read_bytes(), ForValueScores.load("kept.scores.parquet").values
    given = [*arguments, "model", *FAST, "--out", "other.json"]
    assert select(*given, "--chat-template", "mine.jinja") == 0
    assert "ChatML" not in capsys.readouterr().out
    assert not np.array_equal(one[1], ForValueScores.load("other.scores.parquet").values)
    said = failed(capsys, 1, "select", *given, "--chat-template", "none.jinja")
    assert "--chat-template none.jinja cannot be read" in said


def test_a_share_of_the_training_rows_validates_only_where_that_is_asked_for(capsys):
    write("pairs.jsonl", pairs(N, 0, 0.3))
    assert "--validation-share 0.1" in failed(capsys, 1, "select", "pairs.jsonl", *MODEL, *FAST, "--out", "kept.jsonl")
    given = ["--validation-share", "0.25", *MODEL, *FAST, "--out", "kept.jsonl", "--report", "r.html"]
    assert select("pairs.jsonl", *given) == 0
    assert Path("r.html").is_file()
    seen = capsys.readouterr()
    assert "6 training rows are taken for validation: what is wrong with them hides" in seen.err
    assert "validation 6 of them" in seen.out
    scores = ForValueScores.load("kept.scores.parquet")
    taken = [i for i, reason in enumerate(scores.reasons) if reason is not None]
    assert len(taken) == 6
    assert all("--validation-share" in scores.reasons[i] for i in taken)
    dropped = {fact["row"] for fact in rows_of("kept.dropped.reasons.jsonl")}
    assert len(dropped) == round(0.25 * 18)
    assert not dropped & set(taken), "they are trusted"


def test_a_policy_by_source(capsys):
    rows = [{**row, "source": "ab"[i % 2]} for i, row in enumerate(pairs(N, 0, 0.3))]
    arguments = files()
    write("pairs.jsonl", rows)
    assert select(*arguments, *FAST, "--policy", "drop:0.5@source", "--out", "kept.jsonl") == 0
    assert Counter(row["source"] for row in rows_of("kept.jsonl")) == {"a": 6, "b": 6}
    said = failed(capsys, 1, "select", *arguments, *FAST, "--policy", "drop:0.5@origin", "--out", "kept.jsonl")
    assert "pairs.jsonl, line 1: no column 'origin', which the policy groups by (columns found: 'id'" in said


def suggesting(file, suggestions):
    """Scores in a file that suggest other answers: {row: (other row, probability)}."""
    scores = ForValueScores.load(file)
    said = Judgements.none(len(scores))
    for row, (other, probability) in suggestions.items():
        said.suggested_row[row], said.suggested_probability[row] = other, probability
    scores.judgements = said
    scores.save(file)


def test_a_sure_answer_takes_the_place_of_a_wrong_one(capsys):
    arguments = [*files(), *FAST, "--out", "kept.jsonl"]
    assert select(*arguments) == 0
    gone = [fact["row"] for fact in rows_of("kept.dropped.reasons.jsonl")]
    stays = next(i for i in range(N) if i not in gone)
    suggesting("kept.scores.parquet", {gone[0]: (3, 0.96), gone[1]: (4, 0.94), stays: (5, 0.99)})
    before = Path("kept.dropped.jsonl").read_bytes()
    assert select(*arguments, "--relabel", "0.95") == 0
    assert "1 relabelled" in capsys.readouterr().out
    rows = rows_of("pairs.jsonl")
    expected = [row for i, row in enumerate(rows) if i not in gone[1:]]
    expected = [{**row, "completion": rows[3]["completion"]} if row == rows[gone[0]] else row for row in expected]
    assert rows_of("kept.jsonl") == expected
    assert Path("kept.dropped.jsonl").read_bytes() == before, "as it came"
    facts = rows_of("kept.dropped.reasons.jsonl")
    assert [fact.get("relabelled") for fact in facts] == [True] + [None] * 5
    assert facts[0]["suggested_answer"] == rows[3]["completion"]
    assert facts[1]["suggested_probability"] == 0.94
    assert "suggested_row" not in facts[2]
    suggesting("kept.scores.parquet", {})
    no = ForValueScores.load("kept.scores.parquet")
    no.judgements = None
    no.save("kept.scores.parquet")
    said = failed(capsys, 1, "select", *arguments, "--relabel", "0.95")
    assert "relabel:0.95 needs to know whose answer is right" in said


# ---- flags, YAML, replay ----


def test_a_run_is_given_again_by_its_file(capsys):
    arguments = files()
    Path("here").mkdir()
    assert select(*arguments, *FAST, "--out", "here/kept.jsonl") == 0
    first = {path.name: path.read_bytes() for path in Path("here").iterdir()}
    assert yaml.safe_load(first["kept.run.yaml"])["policy"] == "drop:0.25"
    for path in Path("here").iterdir():
        if path.suffix != ".yaml":
            path.unlink()
    os.chdir("here")  # paths hold from everywhere
    assert main(["replay", "kept.run.yaml"]) == 0
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == first
    assert main(["replay", "kept.run.yaml", "--policy", "drop:0.5"]) == 0
    assert len(rows_of("kept.jsonl")) == N // 2
    assert main(["replay", "--help"]) == 0
    Path("other.yaml").write_text("policy: drop:0.5\n")
    assert "other.yaml is no run file" in failed(capsys, 1, "replay", "other.yaml")


@pytest.mark.parametrize("with_trl", [True, False])
def test_yaml_stands_in_place_of_flags_and_flags_win(with_trl, monkeypatch, capsys):
    from forvalue_callbacks.cli import options

    with monkeypatch.context() as patch:
        if not with_trl:
            patch.setitem(sys.modules, "trl", None)
            reload(options)
        given = options.ScoringOptions, options.SelectOptions
        values = {"data": "a.jsonl", "model": "m", "out": "o.jsonl", "policy": "keep:5", "max_length": None}
        Path("run.yaml").write_text(yaml.safe_dump({**values, "validation_share": 0.5}))
        scoring, choice = options.parse("select", given, ["--config", "run.yaml", "--out", "p.jsonl"])
        assert (scoring.data, scoring.model, scoring.out) == ("a.jsonl", "m", "p.jsonl")
        assert (scoring.validation_share, scoring.max_length, choice.policy) == (0.5, None, "keep:5")
        scoring, _ = options.parse("select", given, ["b.jsonl", "--config", "run.yaml"])
        assert scoring.data == "b.jsonl"
        for text, match in (
            ("polcy: x", "sets what is no flag here: polcy"),
            ("a: [", "is no YAML"),
            ("- a", "must hold flags"),
        ):
            Path("bad.yaml").write_text(text)
            with pytest.raises(SystemExit) as ended:
                options.parse("select", given, ["--config", "bad.yaml"])
            assert ended.value.code == 2
            assert match in capsys.readouterr().err
    reload(options)


def test_usage_ends_with_2(capsys):
    for arguments in (
        ["select"],
        ["select", "a.jsonl"],
        ["nothing"],
        [],
        ["select", "a", "--model", "m", "--nope", "1"],
        ["score", "a", *MODEL, "--out", "x", "--method", "best"],
        ["score", "--config"],
    ):
        assert main(arguments) == 2, arguments
    assert "there is no command 'nothing': one of score" in capsys.readouterr().err
    assert main(["--version"]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    seen = capsys.readouterr().out
    assert COMMANDS[name][2] in seen
    assert COMMANDS[name][2].startswith(f"forvalue {name} ")


def test_help_imports_nothing_of_the_stack():
    code = (
        "import sys; from forvalue_callbacks.cli import main; assert main(['--help']) == 0; "
        "print(sorted({'torch', 'numpy', 'transformers', 'datasets', 'yaml'} & sys.modules.keys()))"
    )
    seen = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert seen.splitlines()[-1] == "[]"
    assert all(f"forvalue {name}" in seen for name in COMMANDS)


# ---- what is wrong ----


def lines(n=6, **changes):
    """Training rows, some of them with another line in their place."""
    found = [json.dumps(row) for row in pairs(n, 0)]
    for line, text in changes.items():
        found[int(line[1:]) - 1] = text
    return "\n".join(found) + "\n"


WRONG = {
    "no file": ({}, ["no.jsonl"], "there is no file or folder no.jsonl"),
    "broken line": ({"train.jsonl": lines(_3='{"prompt": "x", ')}, [], "train.jsonl, line 3: broken JSON"),
    "broken line of the trusted": ({"trusted.jsonl": lines(_2="{")}, [], "trusted.jsonl, line 2: broken JSON"),
    "wrong column": ({"train.jsonl": '{"q": 1, "a": 2}\n'}, [], "train.jsonl: no known form of rows (columns found"),
    "wrong text column": ({}, ["--prompt-template", "{q}", "--completion-template", "{a}"], "names the column 'q'"),
    "missing template": ({}, ["--prompt-template", "{prompt}"], "one template of two is missing"),
    "empty validation": ({"trusted.jsonl": ""}, [], "trusted.jsonl is empty: give a file with rows"),
    "validation is training": ({}, ["--validation", "train.jsonl"], "train.jsonl is both training and validation"),
    "training is a part of validation": (
        {"train.jsonl": "".join(json.dumps(row) + "\n" for row in pairs(12, 1)[3:7])}, [],
        "every row of train.jsonl is a validation row too, and nothing is left to score",
    ),
    "null fields": (
        {"train.jsonl": '{"prompt": "x", "completion": null}\n' * 3}, [],
        "no row can be scored; train.jsonl, line 1: 'completion' is None, not text",
    ),
    "no labelled tokens": (
        {"train.jsonl": '{"messages": [{"role": "user", "content": "x"}]}\n'}, [],
        "no row can be scored; train.jsonl, line 1: no labelled tokens in 'messages': add an assistant's turn",
    ),
    "no validation row": (
        {"trusted.jsonl": '{"prompt": "x", "completion": null}\n'}, [],
        "trusted.jsonl: no validation row can be",
    ),
    "unknown model": ({}, ["--model", "no/such/model"], "the model no/such/model cannot be loaded"),
    "a policy that is none": ({}, ["--policy", "drp:0.2"], "cannot read the policy 'drp:0.2'"),
    "a policy that weights": ({}, ["--policy", "reweight:1.0"], "reweight:1.0 weights rows"),
    "auto without log odds": ({}, ["--policy", "drop:auto"], "drop:auto needs scores that are log odds"),
    "another form of output": ({}, ["--out", "kept.csv"], "kept.csv: rows are written in the form they came in"),
    "output is input": ({}, ["--out", "train.jsonl"], "train.jsonl is what is read: give another file to write"),
    "scores over what is read": (
        {}, ["--scores", "train.jsonl", "--overwrite", "true"], "train.jsonl is what is read: give another"
    ),
    "report over what is read": ({}, ["--report", "trusted.jsonl"], "trusted.jsonl is what is read"),
    "two outputs in one": ({}, ["--dropped", "kept.jsonl"], "kept.jsonl is where the kept rows go"),
    "somebody else's output": ({"kept.jsonl": "mine\n"}, [], "kept.jsonl is there, and no run of forvalue is"),
    "two sources": ({}, ["--validation-share", "0.1"], "--validation and --validation-share exclude each other"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line_with_the_way_out(case, capsys):
    others, arguments, match = WRONG[case]
    given = {
        "train.jsonl": lines(),
        "trusted.jsonl": "".join(json.dumps(row) + "\n" for row in pairs(12, 1)),
        **others,
    }
    for name, text in given.items():
        Path(name).write_text(text)
    data = ["train.jsonl"] if not arguments or arguments[0].startswith("-") else []
    flags = ["--validation", "trusted.jsonl", *MODEL, *FAST, "--out", "kept.jsonl"]
    said = failed(
        capsys, 1, "select", *data, *(a for a in arguments if not data), *flags, *(arguments if data else [])
    )
    assert match in said
    assert not Path("kept.jsonl").exists() or others.get("kept.jsonl") == Path("kept.jsonl").read_text()


def test_an_error_of_ours_shows_where_only_if_asked(monkeypatch, capsys):
    def broken(*arguments):
        raise KeyError("secret")

    monkeypatch.setattr("forvalue_callbacks.cli.look.worst", broken)
    assert "KeyError: 'secret' (--debug shows where)" in failed(capsys, 1, "worst", "x")
    with pytest.raises(KeyError):
        main(["worst", "x", "--debug"])


def test_one_null_field_costs_one_row(capsys):
    arguments = files()
    rows = rows_of("pairs.jsonl")
    rows[4]["completion"] = None
    write("pairs.jsonl", rows)
    assert select(*arguments, *FAST, "--out", "kept.jsonl") == 0
    assert "warning: pairs.jsonl, line 5: 'completion' is None" in capsys.readouterr().err
    (fact,) = [fact for fact in rows_of("kept.dropped.reasons.jsonl") if fact["reason"]]
    assert (fact["row"], fact["score"]) == (4, None)
    assert "'completion' is None" in fact["reason"]
