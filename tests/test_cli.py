"""The command: files in and files out, what it says where something is wrong, and what is left when it is stopped."""

import csv
import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import reload
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, load_from_disk

from forvalue_callbacks import TINY_MODEL, ForValueScores
from forvalue_callbacks.cli import COMMANDS, main
from forvalue_callbacks.scores.judgements import Judgements
from forvalue_callbacks.tiny import instructions

N, M = 24, 12
MODEL = ["--model", str(TINY_MODEL)]
FAST = ["--method", "gradient", "--policy", "drop:0.25"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pairs(n, seed, noise=0.0):
    rows = instructions(n, seed, noise).select_columns(["prompt", "completion"]).to_list()
    return [{"id": seed * 1000 + i, **row} for i, row in enumerate(rows)]  # none comes twice


def turns(row, role="role", content="content", names=("user", "assistant")):
    texts = (row["prompt"], row["completion"])
    return [{role: name, content: text} for name, text in zip(names, texts, strict=True)]


FORMS = {
    "pairs.jsonl": lambda row: row,
    "messages.json": lambda row: {"messages": turns(row), "n": 1.5},
    "sharegpt.jsonl": lambda row: {"conversations": turns(row, "from", "value", ("human", "gpt")), "system": "x"},
    "alpaca.csv": lambda row: {"instruction": row["prompt"], "input": "", "output": row["completion"]},
    "text.parquet": lambda row: {"text": row["prompt"] + row["completion"]},
    "own.jsonl": lambda row: {"q": row["prompt"], "a": row["completion"]},
    "saved": lambda row: {"messages": turns(row)},
}
NAMES = {"pairs.jsonl": "JSONL, prompt/completion", "messages.json": "JSON, messages ('messages')",
         "sharegpt.jsonl": "JSONL, ShareGPT ('conversations')", "alpaca.csv": "CSV, Alpaca",
         "text.parquet": "Parquet, text ('text')", "own.jsonl": "JSONL, own templates",
         "saved": "a saved data set, messages ('messages')"}  # fmt: skip


def write(name, rows):
    if name.endswith(".jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".json"):
        Path(name).write_text(json.dumps(rows, indent=1))
    elif name.endswith(".csv"):
        with open(name, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(name)
    else:
        Dataset.from_list(rows).save_to_disk(name)


def rows_of(path):
    path = Path(path)
    if path.is_dir():
        return load_from_disk(path).to_list()
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text) if path.suffix == ".json" else list(csv.DictReader(io.StringIO(text)))


def files(name="pairs.jsonl", n=N, m=M):
    """Training and trusted rows in files, and the flags that name them."""
    form = FORMS[name]
    write(name, [form(row) for row in pairs(n, 0, 0.3)])
    write(f"trusted_{name}", [form(row) for row in pairs(m, 1)])
    return [name, "--validation", f"trusted_{name}", *MODEL]


def select(*arguments):
    return main(["select", *arguments])


def failed(capsys, code, *arguments):
    """What a command that fails says, in one line."""
    assert main(list(arguments)) == code
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if line.startswith("forvalue: ")]
    assert len(said) == 1, err
    assert "Traceback" not in err
    return said[0]


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
    assert select("pairs.jsonl", "--validation-share", "0.25", *MODEL, *FAST, "--out", "kept.jsonl") == 0
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
    "validation in training": (
        {"train.jsonl": lines() + json.dumps(pairs(12, 1)[3]) + "\n"}, [],
        "1 training rows are validation rows too, the first is train.jsonl, line 7",
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


def test_trusted_rows_among_the_training_rows_where_they_were_looked_through(capsys):
    arguments = files()
    write("pairs.jsonl", [*rows_of("pairs.jsonl"), *rows_of("trusted_pairs.jsonl")])
    assert "12 training rows are validation rows too" in failed(
        capsys, 1, "select", *arguments, *FAST, "--out", "kept.jsonl"
    )
    assert select(*arguments, *FAST, "--out", "kept.jsonl", "--allow-overlap", "true") == 0


# ---- scores that are there ----


def test_scores_are_used_again_or_refused_by_name(capsys):
    arguments = [*files(), *FAST, "--out", "kept.jsonl"]
    assert select(*arguments) == 0
    assert "scored in" in capsys.readouterr().out
    assert select(*arguments, "--policy", "drop:0.5") == 0
    assert "with the scores made before" in capsys.readouterr().out
    assert len(rows_of("kept.jsonl")) == N // 2
    for change, what in (
        (["--method", "whitened"], "other settings"),
        (["--max-length", "100"], "other settings"),
        (["--validation", "few.jsonl"], "other validation rows"),
        (["--data", "more.jsonl"], "other training rows"),
    ):
        write("few.jsonl", rows_of("trusted_pairs.jsonl")[:5])
        write("more.jsonl", [*rows_of("pairs.jsonl"), *pairs(1, 5)])
        given = arguments[1:] if "--data" in change else arguments
        said = failed(capsys, 1, "select", *given, *change)
        assert f"the scores in kept.scores.parquet was made with {what}" in said, said
        assert "--overwrite true" in said
    assert select(*arguments, "--method", "whitened", "--overwrite", "true") == 0
    assert ForValueScores.load("kept.scores.parquet").metadata["config"]["method"] == "whitened"


# A disk that fills, and Ctrl-C, while rows are scored: small windows, one part each.
@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr("forvalue_callbacks.data.reader.WINDOW", 8)


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("why", ["disk full", "interrupted"])
def test_what_is_done_is_kept(why, monkeypatch, capsys):
    from forvalue_callbacks.scores.writer import ScoreWriter

    arguments = [*files(), *FAST, "--out", "kept.jsonl"]
    assert select(*arguments) == 0
    expected = {path.name: path.read_bytes() for path in Path().glob("kept.*") if path.suffix != ".yaml"}
    for name in expected:
        Path(name).unlink()
    real, error = ScoreWriter.write, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = []

    def write_two(self, start, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt if why == "interrupted" else error
        written.append(start)
        real(self, start, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreWriter, "write", write_two)
        if why == "interrupted":
            assert "interrupted: what has been scored is kept, the same command goes on" in failed(
                capsys, 130, "select", *arguments
            )
        else:
            said = failed(capsys, 1, "select", *arguments)
            assert "No space left on device" in said
            assert "Make room and give the same command again" in said
    assert not Path("kept.jsonl").exists()
    assert len(list(Path("kept.scores.parquet.parts").glob("part-*"))) == 2
    said = failed(capsys, 1, "select", *arguments, "--method", "whitened")
    assert "what is in kept.scores.parquet.parts was made with other settings" in said
    read = []
    monkeypatch.setattr(
        ScoreWriter, "write", lambda self, start, *rest: (read.append(start), real(self, start, *rest))
    )
    assert select(*arguments) == 0
    assert read == [16], "the third window alone"
    assert {name: Path(name).read_bytes() for name in expected} == expected
    assert not Path("kept.scores.parquet.parts").exists()


@pytest.mark.usefixtures("windows")
def test_a_full_disk_leaves_no_half_of_a_file(monkeypatch, capsys):
    from forvalue_callbacks.data.files import JsonLines

    arguments = [*files(), *FAST, "--out", "kept.jsonl"]

    def half(self, path, rows, changed=None):
        path.write_bytes(b'{"half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", half)
        assert "kept.dropped.jsonl" in failed(capsys, 1, "select", *arguments)
    assert not Path("kept.jsonl").exists()
    assert not Path("kept.dropped.jsonl").exists()
    assert not [path for path in Path().iterdir() if path.name.startswith(".forvalue-")]
    assert select(*arguments) == 0
    assert "with the scores made before" in capsys.readouterr().out


SMALL_WINDOWS = (
    "import sys; import forvalue_callbacks.data.reader as reader; reader.WINDOW = 8\n"
    "from forvalue_callbacks.cli import main; sys.exit(main())"
)
# FORVALUE_KILLS=20 is what was done once; each costs the start of a process.
KILLS = int(os.environ.get("FORVALUE_KILLS", "2"))


@pytest.mark.usefixtures("windows")
def test_a_killed_run_goes_on_and_ends_bit_for_bit_alike():
    """Killed as soon as one more part, or one more file of the result, is there."""
    arguments = ["select", *files(n=48), *FAST, "--out"]
    assert main([*arguments, "whole.jsonl"]) == 0
    killed = 0
    for attempt in range(KILLS):
        there = n_files()
        command = [sys.executable, "-c", SMALL_WINDOWS, *arguments, "kept.jsonl"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if n_files() > there + attempt % 3 and Path("kept.scores.parquet.parts").exists():
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if Path("kept.jsonl").exists():  # done: from the start again
            for path in Path().glob("kept*"):
                path.unlink()
    assert killed
    assert main([*arguments, "kept.jsonl"]) == 0
    for name in (".jsonl", ".dropped.jsonl", ".dropped.reasons.jsonl", ".scores.parquet"):
        assert Path(f"kept{name}").read_bytes() == Path(f"whole{name}").read_bytes(), name
    assert not Path("kept.scores.parquet.parts").exists()


def n_files():
    return len([*Path().rglob("kept*"), *Path().rglob("part-*")])


@pytest.mark.usefixtures("windows")
def test_parts_beside_scores_that_are_whole_go(monkeypatch):
    """A kill between writing the one and removing the others leaves both."""
    from forvalue_callbacks.scores.writer import ScoreWriter

    arguments = [*files(), *FAST, "--out", "kept.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(ScoreWriter, "remove", lambda self: self.close())
        patch.setattr("forvalue_callbacks.cli.scoring.remove_parts", lambda path: None)
        assert select(*arguments) == 0
    assert Path("kept.scores.parquet.parts").is_dir()
    assert select(*arguments) == 0
    assert not Path("kept.scores.parquet.parts").exists()


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
    arguments = [*files(), *FAST, "--out", "kept.jsonl", "--report", "report.html"]
    assert select(*arguments) == 0
    written = re.search(r"^report +(\S+)", capsys.readouterr().out, re.MULTILINE)[1]
    first = Path(written).stat().st_size
    Path(written).unlink()
    given = ["report", "kept.scores.parquet", "--data", "pairs.jsonl", "--out", "report.html", "--policy", "drop:0.25"]
    assert main(given) == 0
    assert Path(written).stat().st_size == first > 1000


def test_the_demo_says_how_much_it_found(capsys):
    assert main(["demo", "--rows", "60", "--validation-rows", "120", "--out", "d", "--policy", "drop:0.2"]) == 0
    out = capsys.readouterr().out
    found, dropped = map(
        int, re.search(r"truth +18 answers are wrong: (\d+) of them are among the (\d+)", out).groups()
    )
    assert dropped == 12
    assert found >= 9
    assert len(rows_of("d/kept.jsonl")) == 48


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
