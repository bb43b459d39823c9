"""The command on files of rows, which tests share."""

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from forvalue_callbacks import TINY_MODEL
from forvalue_callbacks.cli import main
from forvalue_callbacks.tiny import instructions

N, M = 24, 12
MODEL = ["--model", str(TINY_MODEL)]
FAST = ["--method", "gradient", "--policy", "drop:0.25"]


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
