"""Rows are data: nothing that they hold is run, believed, or printed as it is.

A chat template is a program, and comes with the tokenizer: who gives it is trusted as with the model. A row brings
none, and of its variables the sandbox of transformers bounds what one loop makes of them. How long a template of one's
own takes that loops inside of loops is not bounded.
"""

import ast
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import forvalue_callbacks
from forvalue_callbacks import TINY_MODEL, ForValueScorer, ForValueScores, ForValueTransform
from forvalue_callbacks.cli import main
from helpers.cli import FAST, MODEL, pairs, select, write
from helpers.models import build_model
from helpers.rows import IDS, chats
from helpers.tokenizers import build_tokenizer, chatml
from helpers.trainers import collate

ATTACK = int(os.environ.get("ATTACK", "1"))
SECRET = "Zx9Qv7"
# A terminal's colours and title, a bell, ends of lines and texts, text turned round, and a way out of the report.
EVIL = (
    f"\x1b[31m{SECRET}\x1b]0;{SECRET}\x07\x00\x9b\u202e\u2066\u200e\r\n</script><script>{SECRET}<img src=x onerror=1>"
)
HALF = "\ud800"  # half of a character
COLUMN = EVIL.replace(SECRET, "")
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


# ---- templates and their variables ----


def nested(depth):
    out = []
    for _ in range(depth):
        out = [out]
    return out


def itself():
    """Messages that hold themselves, in each place where something may be."""
    chat, tools, call, part = chats()[0], [], {"role": "assistant"}, {"type": "text"}
    chat.append(chat)
    tools.append(tools)
    call["tool_calls"] = [call]
    part["text"] = part
    user = chats()[0][0]
    yield {"messages": chat}
    yield {"messages": chats()[0], "tools": tools}
    yield {"messages": [user, call]}
    yield {"messages": [user, {"role": "assistant", "content": [part]}]}
    yield {"messages": chats()[0], "chat_template_kwargs": {"documents": tools}}


def hostile():
    chat, size = chats()[0], 2_000_000 * min(ATTACK, 5)
    loops = "{% for i in range(10 ** 9) %}x{% endfor %}"
    for kwargs in (
        {"chat_template": loops},
        {"tokenize": False, "max_length": 3, "padding": True},
        {"messages": [{"role": "user", "content": loops}]},
        {"raise_exception": 1, "range": loops, "namespace": None, "loop": 3},
        {"documents": nested(10_000), "bos_token": EVIL, "self": EVIL, "__class__": EVIL},
        {"n": 10**9},
        {"times": 10**15},
        nested(3),
    ):
        yield {"messages": chat, "chat_template_kwargs": kwargs}
    yield {"messages": chat, "tools": nested(10_000)}
    yield {"messages": chat, "tools": "[" * 100_000 + "]" * 100_000}
    yield {"messages": [*chat, {"role": "user", "content": "the sky " * (size // 8)}]}
    yield {"messages": [*chat, {"role": "x" * size, "content": "the sky"}]}
    yield {"messages": chat * (size // 1000)}
    yield {"messages": [{"role": "user", "content": loops + "{{ 7 * 7 }}" + EVIL}, chat[1]]}
    yield from itself()


@pytest.fixture(scope="module")
def scorer():
    """By a template that loops as often, and writes a text as often, as it is asked to."""
    tokenizer = build_tokenizer(chatml() + "{% for i in range(n or 0) %}{% endfor %}{{ 'x' * (times or 0) }}")
    model = build_model()
    model.resize_token_embeddings(len(tokenizer))
    validation = [{"input_ids": IDS[::-1], "labels": [-100] * n + IDS[:-n][::-1]} for n in (4, 5)]
    return ForValueScorer(model, validation, processing_class=tokenizer, progress=False)


def test_rows_cannot_make_a_template_loop_or_end_the_run(scorer, tmp_path):
    good, rows = {"messages": chats()[0]}, list(hostile())
    scores = scorer.score([good, *rows, good])
    assert scores.values[0] == pytest.approx(scores.values[-1])
    for value, reason in zip(scores.values, scores.reasons, strict=True):
        assert math.isfinite(value) == (reason is None)
        assert reason is None or (len(reason) <= 400 and not UNPRINTABLE.search(reason) and SECRET not in reason)
    said = dict(zip(map(id, rows), scores.reasons[1:-1], strict=True))
    by_name = {next(iter(row["chat_template_kwargs"])): said[id(row)] for row in rows[:7]}
    assert "'chat_template', which no row may" in by_name["chat_template"]
    assert "'max_length', 'padding', 'tokenize', which no row may" in by_name["tokenize"]
    assert "OverflowError in line" in by_name["n"]
    assert "MemoryError in line" in by_name["times"]
    scores.report(tmp_path / "report.html", [good, *rows, good])


def test_a_row_has_no_template_and_no_lengths_beside_its_messages_either(scorer):
    row = {"messages": chats()[0]}
    given = {
        "chat_template": "{{ 1 }}",
        "max_length": 2,
        "padding": "max_length",
        "truncation": True,
        "eos_token": "x",
    }
    scores = scorer.score([row, {**row, **given}])
    assert scores.values[0] == scores.values[1]


def test_rows_that_hold_themselves_go_through_a_collator(scorer):
    circle = []
    circle.append(circle)
    rows = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS, "labels": IDS, "other": circle}]
    scores = ForValueScorer(scorer.backbone.model, rows[:1], data_collator=collate, progress=False).score(rows)
    assert scores.reasons[0] is None
    assert scores.reasons[1] is None or SECRET not in scores.reasons[1]


# ---- what is printed, logged and kept ----

FORMS = {
    "rows.jsonl": lambda row, evil: {**row, "prompt": evil + row["prompt"], "completion": row["completion"] + evil},
    "rows.json": lambda row, evil: {"messages": [{"role": role, "content": text + evil} for role, text in turns(row)]},
    "chats.jsonl": lambda row, evil: {
        "conversations": [{"from": role, "value": text + evil} for role, text in turns(row)],
        "system": evil,
        "tools": evil,
    },
    "rows.csv": lambda row, evil: {"instruction": row["prompt"] + evil, "input": evil, "output": row["completion"]},
    "text.jsonl": lambda row, evil: {"text": row["prompt"] + row["completion"] + evil},
}


def turns(row):
    return ("user", row["prompt"]), ("assistant", row["completion"])


@pytest.mark.parametrize("name", FORMS)
def test_no_text_of_rows_and_no_control_character_is_printed_or_kept(name, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    evil = EVIL.replace("\x00", "") if name == "rows.csv" else EVIL  # of which the csv module reads none
    broken = [] if name == "rows.csv" else [{COLUMN: 1, "prompt": {EVIL: EVIL}, "messages": [EVIL], EVIL[:9]: EVIL}]
    for file, n, seed in ((name, 16, 0), (f"trusted_{name}", 8, 1)):
        rows = [FORMS[name](row, "") for row in pairs(n, seed)] + [
            FORMS[name](row, evil) for row in pairs(4, seed + 2)
        ]
        rows += [] if name == "rows.csv" else [FORMS[name](row, HALF) for row in pairs(1, seed + 4)]
        rows = [{**row, COLUMN.replace("\x00", ""): evil, "source": evil} for row in rows]
        write(file, rows + rows[-2:] + ([{**row, "source": evil} for row in broken]))
    given = [name, "--validation", f"trusted_{name}", *MODEL, *FAST[:2], "--policy", "drop:0.25@source"]
    assert select(*given, "--out", f"kept_{name}", "--report", "report.html", "--card") == 0
    assert main(["report", f"kept_{name[: name.rindex('.')]}.scores.parquet", "--data", name, "--out", "r.html"]) == 0
    out, err = capfd.readouterr()
    for text in (out, err.replace("\r", ""), caplog.text):  # bars go back
        assert not UNPRINTABLE.search(text)
        assert SECRET not in text
    (file,) = Path().glob("*.scores.parquet")
    scores = ForValueScores.load(file)
    kept = [*filter(None, scores.reasons), json.dumps(scores.metadata, ensure_ascii=False)]
    kept += [
        path.read_text()
        for path in (*Path().glob("*.reasons.jsonl"), *Path().glob("*.run.yaml"), *Path().glob("README.md"))
    ]
    assert len(kept) > 3
    for text in kept:
        assert not UNPRINTABLE.search(text)
        assert SECRET not in text
    for page in ("report.html", "r.html"):
        text = Path(page).read_text()
        assert text.count("<script") == text.count("</script>") == 2
        assert "<img src=x" not in text
        assert not UNPRINTABLE.search(text)
    assert main(["worst", file.name, "--data", name]) == 0
    assert not UNPRINTABLE.search(capfd.readouterr().out)


def test_names_that_would_speak_to_a_terminal_are_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("a\x1b[31m.jsonl", "a\nkept 5.jsonl", "a\u202elnosj.jsonl", "a\udce9.jsonl"):
        write("rows.jsonl", pairs(8, 0))
        Path("folder").mkdir()
        shutil.copy("rows.jsonl", name)
        shutil.copy("rows.jsonl", Path("folder") / name)
        good = {"": "rows.jsonl", "validation": "rows.jsonl", "model": str(TINY_MODEL), "out": "kept.jsonl"}
        for flag, value in [*((flag, name) for flag in good), ("", "folder")]:
            first, *rest = {**good, flag: value}.items()
            assert select(first[1], *(word for key, text in rest for word in (f"--{key}", text))) == 1
            out, err = capfd.readouterr()
            assert "rename it" in err
            assert not UNPRINTABLE.search(out + err)
        shutil.rmtree("folder")


def test_a_model_and_a_file_whose_names_are_markup(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "<script>alert(1)<img src=x>"
    shutil.copytree(TINY_MODEL, name)
    write(f"{name}.jsonl", pairs(16, 0))
    write("trusted.jsonl", pairs(8, 1))
    given = [f"{name}.jsonl", "--validation", "trusted.jsonl", "--model", name, *FAST, "--out", f"kept{name}.jsonl"]
    assert select(*given, "--report", "report.html") == 0
    page = Path("report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "&lt;script&gt;alert(1)" in page
    assert "<img src=x" not in page


# ---- pickles and programs ----


class Runs:
    """What makes a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def model_with(tmp_path, what):
    folder = tmp_path / what
    shutil.copytree(TINY_MODEL, folder)
    if what == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({"model.embed_tokens.weight": Runs()}, folder / "pytorch_model.bin")
        return folder
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    (folder / "own.py").write_text("from pathlib import Path\nPath('ran').touch()\nclass Own: pass\n")
    return folder


@pytest.mark.parametrize("what", ["pickle", "program"])
def test_what_a_model_brings_is_not_run(what, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    folder = model_with(tmp_path, what)
    write("rows.jsonl", pairs(8, 0))
    write("trusted.jsonl", pairs(8, 1))
    assert select("rows.jsonl", "--validation", "trusted.jsonl", "--model", str(folder), "--out", "kept.jsonl") == 1
    (said,) = re.findall("forvalue: .*", capfd.readouterr().err)
    assert re.search(r"Weights only|remote code|weights_only|execute", said)
    with pytest.raises(Exception, match=r"Weights only|remote code|weights_only|execute"):
        ForValueTransform(str(folder), pairs(4, 1)).scorer()
    assert not Path("ran").exists()


def calls(tree):
    """Calls by name, as 'torch.load', with their keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def programs(source):
    """What in a source may run what it reads."""
    tree = ast.parse(source)
    names = {
        alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found = {
        f"import {name}" for name in ("pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle") if name in names
    }
    for name, words in calls(tree):
        if name == "torch.load" and words.get("weights_only") != "True":
            found.add(name)
        if words.get("allow_pickle", "False") != "False" or words.get("trust_remote_code", "False") != "False":
            found.add(name)
        if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"):
            found.add(name)
    return found


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "eval(x)",
     "np.load(f, allow_pickle=True)", "A.from_pretrained(m, trust_remote_code=True)", "yaml.load(f)"],
)  # fmt: skip
def test_what_may_run_what_it_reads_is_seen(source):
    assert programs(source)


def test_nothing_of_the_package_or_the_recipes_runs_what_it_reads():
    package = Path(forvalue_callbacks.__file__).parent
    files = [*package.rglob("*.py"), *(package.parent / "recipes").glob("*.py")]
    assert len(files) > 100
    assert {file.name: found for file in files if (found := programs(file.read_text()))} == {}
